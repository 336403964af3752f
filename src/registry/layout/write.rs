//! Writing images into a layout. Others may read it, and write to it, at the same time.
//!
//! A blob is written to a file without a name and gets the name of its digest once it is whole and on the disk; a partial
//! blob is never under a name, whatever happens. `index.json` is replaced by a rename, under a lock on the layout's
//! directory that all writers of this program take, and is read anew under it, so no writer takes out what another has put
//! in. What it says of other images stays as it is.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::files::{Dir, failed, shown};
use super::index::{REF_NAME, own_name};
use super::unnamed::{temporary_name, unnamed_file};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::registry::document::Object;
use crate::registry::reference::Reference;

/// Longest wait for another writer of `index.json`, which holds the lock for milliseconds.
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// How often the lock is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// Bytes that are copied at a time.
const COPY_BYTES: usize = 1 << 20;
/// The longest name of an image.
const REF_NAME_BYTES_MAX: usize = 512;

const MARKER: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const EMPTY_INDEX: &[u8] = br#"{"schemaVersion":2,"manifests":[]}"#;

/// A layout that is written to. Everything here blocks.
#[derive(Debug)]
pub struct LayoutWriter {
    path: PathBuf,
    dir: Dir,
    blobs: OwnedFd,
}

impl LayoutWriter {
    /// Opens the layout at `path`, or makes an empty one.
    ///
    /// # Errors
    /// [`Error::Usage`] if something else is there; [`Error::Denied`], [`Error::Busy`], [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let error = |error: &io::Error| Error::io(shown(path), error);
        std::fs::create_dir_all(path).map_err(|e| error(&e))?;
        // Of two that begin at once one finds what the other has made.
        let lock = lock(path)?;
        let dir = Dir::open(path)?;
        match dir.check_version() {
            Ok(()) => {}
            Err(Error::NotFound { .. }) if is_empty(path).map_err(|e| error(&e))? => {}
            Err(Error::NotFound { .. }) => {
                let why = "is there, and is neither empty nor an OCI image layout";
                return Err(Error::usage(format!("{} {why}", shown(path))));
            }
            Err(error) => return Err(error),
        }
        std::fs::create_dir_all(path.join("blobs/sha256")).map_err(|e| error(&e))?;
        let blobs = dir.open_blobs()?;
        let layout = Self {
            path: path.to_owned(),
            dir,
            blobs,
        };
        for (name, text) in [("index.json", EMPTY_INDEX), ("oci-layout", MARKER)] {
            if !path.join(name).exists() {
                layout.replace(name, text)?;
            }
        }
        drop(lock);
        Ok(layout)
    }

    /// A file without a name, for a blob that [`Self::put`] will take.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn scratch(&self) -> Result<File> {
        // By its descriptor, so that nobody leads us elsewhere meanwhile.
        let dir = format!("/proc/self/fd/{}", self.blobs.as_raw_fd());
        unnamed_file(Path::new(&dir))
    }

    fn blobs_path(&self) -> PathBuf {
        self.path.join("blobs/sha256")
    }

    /// Whether there is a file of `size` bytes under the name of a blob. Whoever reads it checks its digest.
    #[must_use]
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        self.dir.open_blob(digest).is_ok_and(|blob| blob.bytes == size)
    }

    /// Adds a blob that stands in a file of [`Self::scratch`], or in any other. The caller has checked its digest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put(&self, digest: &Digest, file: &File) -> Result<()> {
        let path = self.blobs_path().join(digest.hex());
        let error = |error: &io::Error| Error::io(shown(&path), error);
        let size = file.metadata().map_err(|e| error(&e))?.len();
        if self.has(digest, size) {
            return Ok(());
        }
        file.sync_data().map_err(|e| error(&e))?;
        let aside = temporary_name();
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        let linked = linkat(
            AT_FDCWD,
            open.as_str(),
            &self.blobs,
            aside.as_str(),
            AtFlags::AT_SYMLINK_FOLLOW,
        );
        if linked.is_err() {
            self.copy(file, &aside).map_err(|e| error(&e))?;
        }
        self.name_blob(&aside, digest).map_err(|e| error(&e))
    }

    /// Adds a small blob.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_bytes(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let mut file = self.scratch()?;
        let path = self.blobs_path().join(digest.hex());
        file.write_all(bytes)
            .map_err(|error| Error::io(shown(&path), &error))?;
        self.put(&digest, &file)?;
        Ok(digest)
    }

    /// Gives a file among the blobs its name. If that fails it is taken away.
    fn name_blob(&self, aside: &str, digest: &Digest) -> io::Result<()> {
        let named = renameat(&self.blobs, aside, &self.blobs, digest.hex().as_str());
        if named.is_err() {
            let _ = unlinkat(&self.blobs, aside, UnlinkatFlags::NoRemoveDir);
        }
        named.map_err(io::Error::from)
    }

    /// Copies a file that cannot be linked to, because it is on another filesystem or has lost its last name.
    fn copy(&self, file: &File, aside: &str) -> io::Result<()> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mut to = File::from(openat(
            &self.blobs,
            aside,
            flags,
            Mode::from_bits_truncate(0o644),
        )?);
        let copied = (|| {
            let mut buffer = vec![0; COPY_BYTES];
            let mut position = 0;
            loop {
                let read = file.read_at(&mut buffer, position)?;
                if read == 0 {
                    return to.sync_data();
                }
                to.write_all(buffer.get(..read).unwrap_or_default())?;
                position += read as u64;
            }
        })();
        if copied.is_err() {
            let _ = unlinkat(&self.blobs, aside, UnlinkatFlags::NoRemoveDir);
        }
        copied
    }

    /// Names a manifest or index of media type `media_type`, which [`Self::put_bytes`] has added. What had the name before
    /// loses it.
    ///
    /// # Errors
    /// [`Error::Usage`] if `name` is no name; [`Error::Busy`], [`Error::Malformed`], [`Error::Unsupported`],
    /// [`Error::Io`].
    pub fn name(&self, name: &str, media_type: &str, digest: &Digest, size: u64) -> Result<()> {
        check_name(name)?;
        let _lock = lock(&self.path)?;
        let file = self.dir.open_index()?;
        let what = shown(&file.path);
        let mut index = Object::parse(&what, &file.read()?)?;
        let mut manifests = index.get::<Vec<Object>>(&what, "manifests")?.unwrap_or_default();
        let mut kept = Vec::with_capacity(manifests.len() + 1);
        for manifest in manifests.drain(..) {
            let annotations = manifest.get::<Object>(&what, "annotations")?.unwrap_or_default();
            if annotations.get::<String>(&what, REF_NAME)?.as_deref() != Some(name) {
                kept.push(manifest);
            }
        }
        let mut annotations = Object::default();
        annotations.set(REF_NAME, name)?;
        let mut descriptor = Object::default();
        descriptor.set("mediaType", media_type)?;
        descriptor.set("digest", digest)?;
        descriptor.set("size", &size)?;
        descriptor.set("annotations", &annotations)?;
        kept.push(descriptor);
        index.set("manifests", &kept)?;
        self.replace("index.json", &index.to_bytes()?)
    }

    /// What an image with this reference is called here: its tag alone in the repository of bare tags.
    #[must_use]
    pub fn name_of(&self, reference: &Reference) -> String {
        let own = own_name(&self.path.file_name().unwrap_or_default().to_string_lossy());
        let tag = reference.tag.clone().unwrap_or_default();
        match reference.repository.path() == own {
            true => tag,
            false => format!("{}:{tag}", reference.repository.path()),
        }
    }

    /// Puts `text` in the place of a file of the layout.
    fn replace(&self, name: &str, text: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let aside = self.path.join(temporary_name());
        let written = (|| {
            let mut file = File::create_new(&aside)?;
            file.write_all(text)?;
            file.sync_data()?;
            std::fs::rename(&aside, &path)
        })();
        written.map_err(|error| {
            let _ = std::fs::remove_file(&aside);
            Error::io(shown(&path), &error)
        })
    }
}

/// The right to change the layout at `path`, until it is dropped.
fn lock(path: &Path) -> Result<Flock<File>> {
    let mut file = File::open(path).map_err(|error| Error::io(shown(path), &error))?;
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err((_, errno)) => return Err(failed(path, errno)),
        }
        if Instant::now() >= until {
            let why = "another process has been writing to this layout for a minute";
            return Err(Error::busy(shown(path), why));
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
}

/// Refuses what other tools could not name: letters, digits and the separators that the specification knows.
fn check_name(name: &str) -> Result<()> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:@+".contains(&byte);
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(is_allowed);
    match name.len() <= REF_NAME_BYTES_MAX && name.split('/').all(is_part) {
        true => Ok(()),
        false => {
            let shown: String = name.chars().take(100).collect();
            Err(Error::usage(format!(
                "{shown:?} is no name of an image in a layout: only letters, digits and -._:@+/ may be in it"
            )))
        }
    }
}

fn is_empty(path: &Path) -> io::Result<bool> {
    Ok(std::fs::read_dir(path)?.next().is_none())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn index(dir: &Path) -> Value {
        serde_json::from_slice(&std::fs::read(dir.join("index.json")).unwrap()).unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let index = index(dir);
        let name = |entry: &Value| entry["annotations"][REF_NAME].as_str().unwrap().to_owned();
        index["manifests"].as_array().unwrap().iter().map(name).collect()
    }

    /// All files of the layout by name.
    fn files(dir: &Path) -> Vec<String> {
        let list = |dir: &Path| {
            std::fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
        };
        let all = list(dir).chain(list(&dir.join("blobs/sha256")));
        let mut all: Vec<String> = all.map(|name| name.into_string().unwrap()).collect();
        all.sort();
        all
    }

    #[test]
    fn a_new_layout_is_one_and_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let layout = LayoutWriter::open(&path).unwrap();
        assert_eq!(index(&path), json!({ "schemaVersion": 2, "manifests": [] }));
        Dir::open(&path).unwrap().check_version().unwrap();
        drop(layout);
        LayoutWriter::open(&path).unwrap();

        let other = dir.path().join("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("file"), "x").unwrap();
        let error = LayoutWriter::open(&other).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert_eq!(std::fs::read_dir(&other).unwrap().count(), 1);
    }

    #[test]
    fn a_blob_has_its_name_only_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let layout = LayoutWriter::open(dir.path()).unwrap();
        let bare = files(dir.path());
        let mut file = layout.scratch().unwrap();
        file.write_all(b"blob").unwrap();
        assert_eq!(files(dir.path()), bare);
        let digest = Digest::of(b"blob");
        layout.put(&digest, &file).unwrap();
        layout.put(&digest, &file).unwrap();
        let path = dir.path().join("blobs/sha256").join(digest.hex());
        assert_eq!(std::fs::read(&path).unwrap(), b"blob");
        assert_eq!(files(dir.path()).len(), bare.len() + 1);

        // What another tool left behind under the name is replaced.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "bl").unwrap();
        assert!(!layout.has(&digest, 4));
        layout.put(&digest, &file).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"blob");
        assert_eq!(files(dir.path()).len(), bare.len() + 1);
    }

    #[test]
    fn a_file_that_cannot_be_linked_to_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let layout = LayoutWriter::open(dir.path()).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        let mut file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&elsewhere)
            .unwrap();
        std::fs::remove_file(&elsewhere).unwrap();
        let blob = vec![7; 3 * COPY_BYTES + 5];
        file.write_all(&blob).unwrap();
        let digest = Digest::of(&blob);
        layout.put(&digest, &file).unwrap();
        assert_eq!(
            std::fs::read(dir.path().join("blobs/sha256").join(digest.hex())).unwrap(),
            blob
        );
    }

    #[test]
    fn other_names_stay_and_the_same_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let layout = LayoutWriter::open(dir.path()).unwrap();
        let foreign = r#"{"schemaVersion":2,"x-ours":{"b":1,"a":2},"manifests":[{"mediaType":"m","digest":"sha512:00","size":1,"annotations":{"org.opencontainers.image.ref.name":"theirs","z":"1","a":"2"},"data":"AA=="}]}"#;
        std::fs::write(dir.path().join("index.json"), foreign).unwrap();
        let digest = layout.put_bytes(b"one").unwrap();
        layout.name("v1", "type", &digest, 3).unwrap();
        let digest = layout.put_bytes(b"second").unwrap();
        layout.name("v1", "type", &digest, 6).unwrap();
        assert_eq!(names(dir.path()), ["theirs", "v1"]);
        let text = std::fs::read_to_string(dir.path().join("index.json")).unwrap();
        let kept = &foreign[..foreign.len() - 2];
        assert!(text.starts_with(kept), "{text}");
        assert_eq!(index(dir.path())["manifests"][1]["digest"], digest.to_string());
        for bad in ["", "a b", "a//b", "/a", "\u{e4}", "a\nb"] {
            assert_eq!(
                layout.name(bad, "type", &digest, 6).unwrap_err().exit_code(),
                2,
                "{bad}"
            );
        }
    }

    #[test]
    fn writers_at_the_same_time_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path: Arc<Path> = dir.path().into();
        let write = |number: usize| {
            let path = Arc::clone(&path);
            std::thread::spawn(move || {
                let layout = LayoutWriter::open(&path).unwrap();
                for image in 0..8 {
                    let bytes = format!("{number} {image}");
                    let digest = layout.put_bytes(bytes.as_bytes()).unwrap();
                    let name = format!("w{number}-{image}");
                    layout.name(&name, "type", &digest, bytes.len() as u64).unwrap();
                }
            })
        };
        let threads: Vec<_> = (0..4).map(write).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let mut names = names(&path);
        names.sort();
        let expected = (0..4).flat_map(|number| (0..8).map(move |image| format!("w{number}-{image}")));
        assert_eq!(names, expected.collect::<Vec<_>>());
        assert!(files(&path).iter().all(|name| !name.contains(".part")));
    }

    #[test]
    fn images_are_named_as_they_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let layout = LayoutWriter::open(&dir.path().join("images")).unwrap();
        let name = |text: &str| layout.name_of(&text.parse().unwrap());
        assert_eq!(name("h.io/images:1"), "1");
        assert_eq!(name("h.io/team/app:2"), "team/app:2");
    }
}
