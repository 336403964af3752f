//! Owner, mode, times and extended attributes of what was written, and what had to be spared.
//!
//! Root gets everything as it is in the image. Who may not give files away keeps them as his own; then setuid and setgid
//! are taken off, because they would mean somebody else. What the filesystem or the rights do not allow is counted and
//! told once.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::get::shown;
use crate::image::plan::Item;

/// Bits that lend the owner's or the group's rights.
const SET_ID: u32 = 0o6000;
/// The most names of attributes that are told.
const ATTRIBUTES_TOLD_MAX: usize = 16;

/// What could not be made as it is in the image.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Spared {
    /// Names that belong to this user instead of their owner.
    pub owners: u64,
    /// Those of them that lost setuid or setgid.
    pub set_ids: u64,
    /// Device nodes left out.
    pub devices: u64,
    /// Extended attributes left out, by name.
    pub attributes: BTreeMap<String, u64>,
}

impl Spared {
    /// Whether nothing was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Sets attributes as far as this process may.
#[derive(Debug)]
pub(super) struct Attributes {
    uid: u32,
    gid: u32,
    spared: Mutex<Spared>,
}

impl Attributes {
    pub(super) fn new() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            spared: Mutex::default(),
        }
    }

    pub(super) fn uid(&self) -> u32 {
        self.uid
    }

    pub(super) fn spared(&self) -> Spared {
        self.spared.lock().clone()
    }

    pub(super) fn spare(&self, change: impl FnOnce(&mut Spared)) {
        change(&mut self.spared.lock());
    }

    /// Gives an open file or directory its attributes.
    pub(super) fn of_file(&self, file: BorrowedFd<'_>, item: &Item) -> Result<()> {
        let failed = |errno: Errno| failed(item, errno);
        let is_given = self.give(item, |uid, gid| rustix::fs::fchown(file, Some(uid), Some(gid)))?;
        // Before the mode, which may not let its owner write; after the owner, whose change drops capabilities.
        for (name, value) in &item.xattrs {
            let name = &name.0;
            let set = rustix::fs::fsetxattr(file, OsStr::from_bytes(name), &value.0, XattrFlags::empty());
            self.attribute(name, set);
        }
        rustix::fs::fchmod(file, self.mode(item, is_given)).map_err(failed)?;
        rustix::fs::futimens(file, &times(item)).map_err(failed)
    }

    /// Gives what cannot be opened, a symlink or a special file, its attributes.
    pub(super) fn of_name(
        &self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        item: &Item,
        is_link: bool,
    ) -> Result<()> {
        let failed = |errno: Errno| failed(item, errno);
        let not_followed = AtFlags::SYMLINK_NOFOLLOW;
        let is_given = self.give(item, |uid, gid| {
            rustix::fs::chownat(dir, name, Some(uid), Some(gid), not_followed)
        })?;
        for (attribute, value) in &item.xattrs {
            // There is no system call for this relative to a directory.
            let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
            path.extend_from_slice(name.as_bytes());
            let key = OsStr::from_bytes(&attribute.0);
            let set = rustix::fs::lsetxattr(OsStr::from_bytes(&path), key, &value.0, XattrFlags::empty());
            self.attribute(&attribute.0, set);
        }
        if !is_link {
            Self::mode_of_name(dir, name, self.mode(item, is_given)).map_err(failed)?;
        }
        rustix::fs::utimensat(dir, name, &times(item), not_followed).map_err(failed)
    }

    /// Sets the mode of a special file. The system call that takes a name follows a symlink that somebody has put there.
    fn mode_of_name(dir: BorrowedFd<'_>, name: &OsStr, mode: Mode) -> rustix::io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        if matches!(
            kind,
            FileType::Symlink | FileType::RegularFile | FileType::Directory
        ) {
            return Err(Errno::LOOP);
        }
        rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), mode)
    }

    /// Gives it to its owner with `change`, if that may be. Answers whether it belongs to him.
    fn give(&self, item: &Item, change: impl FnOnce(Uid, Gid) -> rustix::io::Result<()>) -> Result<bool> {
        let is_own = (item.uid, item.gid) == (self.uid, self.gid);
        if self.uid == 0 {
            // The kernel's word for "leave it" is none of an owner.
            let is_id = |id: u32| id != u32::MAX;
            if is_id(item.uid) && is_id(item.gid) {
                match change(Uid::from_raw(item.uid), Gid::from_raw(item.gid)) {
                    Ok(()) => return Ok(true),
                    // In a user namespace root may not give to everyone.
                    Err(Errno::PERM | Errno::INVAL | Errno::OVERFLOW) => {}
                    Err(errno) => return Err(failed(item, errno)),
                }
            }
        }
        if !is_own {
            self.spare(|spared| spared.owners += 1);
        }
        Ok(is_own)
    }

    fn mode(&self, item: &Item, is_given: bool) -> Mode {
        let mut mode = item.mode;
        if !is_given && mode & SET_ID != 0 {
            mode &= !SET_ID;
            self.spare(|spared| spared.set_ids += 1);
        }
        Mode::from_raw_mode(mode)
    }

    /// An attribute that cannot be set is told, but no reason to go without the file: which ones a filesystem takes, and
    /// how many, is its own affair.
    fn attribute(&self, name: &[u8], set: rustix::io::Result<()>) {
        if set.is_err() {
            self.spare(|spared| {
                let is_known = spared.attributes.contains_key(&shown(name));
                if is_known || spared.attributes.len() < ATTRIBUTES_TOLD_MAX {
                    *spared.attributes.entry(shown(name)).or_default() += 1;
                }
            });
        }
    }
}

fn times(item: &Item) -> Timestamps {
    let as_it_is = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_OMIT,
    };
    let (tv_sec, nanos) = item.mtime;
    Timestamps {
        last_access: as_it_is,
        last_modification: Timespec {
            tv_sec,
            tv_nsec: i64::from(nanos),
        },
    }
}

/// A failed system call for an item.
pub(super) fn failed(item: &Item, errno: Errno) -> Error {
    Error::io(shown(&item.path.0), &errno.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_link_put_in_the_place_of_a_special_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let open = fs::File::open(dir.path()).unwrap();
        let precious = dir.path().join("precious");
        fs::write(&precious, "").unwrap();
        let mode = |path| fs::metadata(path).unwrap().mode() & 0o7777;
        let before = mode(&precious);
        symlink("precious", dir.path().join("pipe")).unwrap();
        for name in ["pipe", "precious"] {
            let set = Attributes::mode_of_name(open.as_fd(), OsStr::new(name), Mode::from_raw_mode(0o4777));
            assert!(set.is_err(), "{name}");
        }
        assert_eq!(mode(&precious), before);
    }
}
