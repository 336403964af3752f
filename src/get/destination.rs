//! The directory that is written below, and everything in it that is no content: directories, links, special files, and
//! names that change from temporary to final.
//!
//! A name is only ever opened relative to the descriptor of its directory, and never through a symlink. What is in the
//! way is replaced if it is no directory; a directory is replaced by nothing, and replaces nothing.

use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::get::attributes::{Attributes, Spared, failed};
use crate::get::shown;
use crate::image::plan::{Item, What};

/// What directories have until they are done: nobody else looks into half of an image, and we can write.
const DIR_MODE: u32 = 0o700;
/// A directory for looking up names in it.
const LOOK_UP: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// A directory for changing its attributes.
const CHANGE: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A directory to write below. When the last holder lets go of it, the directories get their attributes, also if the
/// work was given up before its end.
#[derive(Debug)]
pub(super) struct Destination {
    root: OwnedFd,
    /// Whether the root was made for this.
    is_new: bool,
    attributes: Attributes,
    /// Directories that are to be changed once everything is in them, parents first.
    unfinished: Mutex<Vec<Unfinished>>,
}

#[derive(Debug)]
struct Unfinished {
    item: Item,
    becomes: Becomes,
}

#[derive(Debug)]
enum Becomes {
    /// As in the image.
    AsItem,
    /// As it was before.
    Mode(Mode),
}

/// A directory with a name in it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) dir: Arc<OwnedFd>,
    pub(super) name: OsString,
}

impl Destination {
    /// Opens the directory, which is made with its parents if it is missing.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io(path.display().to_string(), &error);
        let is_new = match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => false,
            Ok(_) => return Err(Error::posix(path.display().to_string(), libc::ENOTDIR)),
            Err(_) => {
                std::fs::create_dir_all(path).map_err(failed)?;
                true
            }
        };
        // Where the user points to may be a symlink.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            root,
            is_new,
            attributes: Attributes::new(),
            unfinished: Mutex::default(),
        })
    }

    /// The attributes, for files.
    pub(super) fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    pub(super) fn spared(&self) -> Spared {
        self.attributes.spared()
    }

    /// The place of an item. `known` is that of an item before, whose directory is taken if it is the same.
    pub(super) fn place(&self, item: &Item, known: Option<(&Item, &Place)>) -> Result<Place> {
        let (parent, name) = split(&item.path.0);
        let name = OsString::from_vec(name.to_vec());
        if let Some((before, place)) = known
            && split(&before.path.0).0 == parent
        {
            let dir = Arc::clone(&place.dir);
            return Ok(Place { dir, name });
        }
        let dir = self.dir(parent).map_err(|errno| in_the_way(item, errno))?;
        Ok(Place {
            dir: Arc::new(dir),
            name,
        })
    }

    /// A directory below the root, for looking up names.
    fn dir(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let mut dir = rustix::fs::openat(&self.root, c".", LOOK_UP, Mode::empty())?;
        for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
            dir = rustix::fs::openat(&dir, OsStr::from_bytes(name), LOOK_UP, Mode::empty())?;
        }
        Ok(dir)
    }

    /// A directory below the root, for changing its attributes.
    fn dir_to_change(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        match split(path) {
            (_, b"") => rustix::fs::openat(&self.root, c".", CHANGE, Mode::empty()),
            (parent, name) => {
                let parent = self.dir(parent)?;
                rustix::fs::openat(&parent, OsStr::from_bytes(name), CHANGE, Mode::empty())
            }
        }
    }

    /// Makes a directory, or takes the one that is there. One that is only passed through stays as it was; so does the
    /// root, unless it was made for this.
    pub(super) fn make_dir(&self, item: &Item, is_passage: bool) -> Result<()> {
        let is_root = item.path.0.is_empty();
        let made = if is_root {
            self.is_new
        } else {
            let place = self.place(item, None)?;
            match rustix::fs::mkdirat(&*place.dir, &*place.name, Mode::from_raw_mode(DIR_MODE)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(failed(item, errno)),
            }
        };
        let was = self
            .make_writable(item)
            .map_err(|errno| in_the_way(item, errno))?;
        let becomes = match was {
            _ if made || !(is_passage || is_root) => Some(Becomes::AsItem),
            Some(mode) => Some(Becomes::Mode(mode)),
            None => None,
        };
        if let Some(becomes) = becomes {
            let item = item.clone();
            self.unfinished.lock().push(Unfinished { item, becomes });
        }
        Ok(())
    }

    /// Sees to it that we can write in a directory of ours. Answers the mode that it had, if it had to be changed.
    fn make_writable(&self, item: &Item) -> rustix::io::Result<Option<Mode>> {
        let path = &item.path.0;
        let dir = match split(path) {
            (_, b"") => rustix::fs::openat(&self.root, c".", LOOK_UP, Mode::empty())?,
            _ => self.dir(path)?,
        };
        let stat = rustix::fs::fstat(&dir)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        let wanted = mode | Mode::from_raw_mode(DIR_MODE);
        // Root may write anyway, and nobody else may change what is not his.
        if wanted == mode || self.attributes.uid() == 0 || stat.st_uid != self.attributes.uid() {
            return Ok(None);
        }
        // A descriptor for changing needs the right to read, which may be what is missing.
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&dir));
        rustix::fs::chmod(own, wanted)?;
        Ok(Some(mode))
    }

    /// Gives the directories their attributes, those inside first.
    pub(super) fn finish(&self) -> Result<()> {
        let mut unfinished = std::mem::take(&mut *self.unfinished.lock());
        let mut first_failure = Ok(());
        while let Some(Unfinished { item, becomes }) = unfinished.pop() {
            let dir = self
                .dir_to_change(&item.path.0)
                .map_err(|errno| failed(&item, errno));
            let done = dir.and_then(|dir| match becomes {
                Becomes::AsItem => self.attributes.of_file(dir.as_fd(), &item),
                Becomes::Mode(mode) => rustix::fs::fchmod(&dir, mode).map_err(|errno| failed(&item, errno)),
            });
            first_failure = first_failure.and(done);
        }
        first_failure
    }

    /// Makes a symlink.
    pub(super) fn make_symlink(&self, item: &Item, target: &[u8]) -> Result<()> {
        let place = self.place(item, None)?;
        let temporary = Temporary::new(&place);
        rustix::fs::symlinkat(OsStr::from_bytes(target), &*place.dir, &*temporary.name)
            .map_err(|errno| failed(item, errno))?;
        self.attributes
            .of_name(place.dir.as_fd(), &temporary.name, item, true)?;
        temporary.put(item)
    }

    /// Makes a device or a named pipe. Answers whether this process may.
    pub(super) fn make_special(&self, item: &Item) -> Result<bool> {
        let place = self.place(item, None)?;
        let temporary = Temporary::new(&place);
        let (kind, rdev) = match item.what {
            What::Char { rdev } => (FileType::CharacterDevice, rdev),
            What::Block { rdev } => (FileType::BlockDevice, rdev),
            _ => (FileType::Fifo, (0, 0)),
        };
        let device = rustix::fs::makedev(rdev.0, rdev.1);
        let mode = Mode::from_raw_mode(0o600);
        match rustix::fs::mknodat(&*place.dir, &*temporary.name, kind, mode, device) {
            Ok(()) => {}
            Err(Errno::PERM) => {
                self.attributes.spare(|spared| spared.devices += 1);
                return Ok(false);
            }
            Err(errno) => return Err(failed(item, errno)),
        }
        self.attributes
            .of_name(place.dir.as_fd(), &temporary.name, item, false)?;
        temporary.put(item).map(|()| true)
    }

    /// Makes another name of `first`. Answers false if that is not there.
    pub(super) fn make_link(&self, item: &Item, first: &Item) -> Result<bool> {
        let place = self.place(item, None)?;
        let from = self.place(first, None)?;
        let temporary = Temporary::new(&place);
        let (dir, name) = (&*place.dir, &*temporary.name);
        match rustix::fs::linkat(&*from.dir, &*from.name, dir, name, AtFlags::empty()) {
            Ok(()) => temporary.put(item).map(|()| true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(failed(item, errno)),
        }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // Whoever wanted to know has asked before.
        let _ = self.finish();
    }
}

/// A name that stands for something unfinished. It is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Temporary {
    pub(super) name: OsString,
    place: Place,
    /// Whether it may still be there.
    is_there: bool,
}

impl Temporary {
    /// A name in the directory of `place`, for what is to become it. Nothing is made.
    pub(super) fn new(place: &Place) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Not the process's number: in a container a killed predecessor, whose files still lie there, had the same.
        static RUN: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            name: format!(".registryfs-{:016x}-{number}.part", *RUN).into(),
            place: place.clone(),
            is_there: true,
        }
    }

    /// Gives it its final name, in place of what has it.
    pub(super) fn put(mut self, item: &Item) -> Result<()> {
        let renamed = self.rename(item);
        // A link in the place of another one to the same file is left where it was.
        self.is_there = renamed.is_err() || matches!(item.what, What::Link { .. });
        renamed
    }

    fn rename(&self, item: &Item) -> Result<()> {
        let (dir, name) = (&*self.place.dir, &*self.place.name);
        let rename = || rustix::fs::renameat(dir, &*self.name, dir, name);
        match rename() {
            Ok(()) => Ok(()),
            Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY) => {
                // An empty directory is in nobody's way.
                let removed = rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR);
                removed.and_then(|()| rename()).map_err(|_| Error::Io {
                    what: shown(&item.path.0),
                    errno: libc::EISDIR,
                    why: "a directory that is not empty is in the way".to_owned(),
                })
            }
            Err(errno) => Err(failed(item, errno)),
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.is_there {
            let _ = rustix::fs::unlinkat(&*self.place.dir, &*self.name, AtFlags::empty());
        }
    }
}

/// A path as directory and name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// What it means that the way to an item could not be opened.
fn in_the_way(item: &Item, errno: Errno) -> Error {
    match errno {
        Errno::NOTDIR | Errno::LOOP => Error::Io {
            what: shown(&item.path.0),
            errno: libc::ENOTDIR,
            why: "something that is no directory is in the way, and symbolic links are not followed"
                .to_owned(),
        },
        other => failed(item, other),
    }
}
