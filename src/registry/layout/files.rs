//! The files of a layout, opened so that nobody is led elsewhere: a name comes from a digest and has no slash, and a
//! symbolic link is followed only if root or the user of this process made it. So what a stranger put into a layout
//! cannot make root read his choice of files, while stores that keep their blobs elsewhere behind links work.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat};
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};

/// The most bytes of `oci-layout`.
const MARKER_BYTES_MAX: u64 = 64 << 10;
/// The most bytes of `index.json`.
const INDEX_BYTES_MAX: u64 = 32 << 20;
/// The one version of the format (OCI image specification, image layout).
const VERSION: &str = "1.0.0";

/// The directory of a layout.
#[derive(Debug)]
pub(super) struct Dir {
    dir: OwnedFd,
    path: PathBuf,
}

/// What tells whether a file is still the one that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Stamp {
    fn of(metadata: &std::fs::Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether the file may change once more without a new time: clocks of filesystems tick slowly.
    pub(super) fn is_recent(&self, now: SystemTime) -> bool {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now_ns = i128::try_from(since.as_nanos()).unwrap_or(i128::MAX);
        now_ns.saturating_sub(self.changed_ns) < 2_000_000_000
    }
}

impl Dir {
    /// Opens the layout's directory.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Io`].
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let dir = open(path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::ENOENT => Error::not_found(shown(path), "no OCI image layout is there"),
            Errno::ENOTDIR => Error::not_found(
                shown(path),
                "an OCI image layout is a directory; an archive of one has to be unpacked",
            ),
            errno => failed(path, errno),
        })?;
        Ok(Self {
            dir,
            path: path.to_owned(),
        })
    }

    /// Refuses what is no layout of the version that is known.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Malformed`], [`Error::Unsupported`], [`Error::Io`].
    pub(super) fn check_version(&self) -> Result<()> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        let path = self.path.join("oci-layout");
        let file = match open_file(&self.dir, "oci-layout", &path) {
            Err(Error::NotFound { .. }) => {
                let why = "no OCI image layout is there: it has no file oci-layout";
                return Err(Error::not_found(shown(&self.path), why));
            }
            opened => opened?,
        };
        let text = whole(file, &path, MARKER_BYTES_MAX)?;
        let marker: Marker = serde_json::from_slice(&text)
            .map_err(|error| Error::malformed(shown(&path), error.to_string()))?;
        if marker.image_layout_version != VERSION {
            let version: String = marker.image_layout_version.chars().take(20).collect();
            let why = format!("an OCI image layout of version {version:?}; only {VERSION} is known");
            return Err(Error::unsupported(shown(&self.path), why));
        }
        Ok(())
    }

    /// `index.json`, open, with its path.
    ///
    /// # Errors
    /// As [`Self::check_version`].
    pub(super) fn open_index(&self) -> Result<IndexFile> {
        let path = self.path.join("index.json");
        let file = match open_file(&self.dir, "index.json", &path) {
            Err(Error::NotFound { .. }) => {
                let why = "no OCI image layout is there: it has no file index.json";
                return Err(Error::not_found(shown(&self.path), why));
            }
            opened => opened?,
        };
        let metadata = file.metadata().map_err(|error| Error::io(shown(&path), &error))?;
        let stamp = Stamp::of(&metadata);
        Ok(IndexFile { file, path, stamp })
    }

    /// The directory of the blobs.
    ///
    /// # Errors
    /// As [`Self::open_blob`].
    pub(super) fn open_blobs(&self) -> Result<OwnedFd> {
        let path = self.path.join("blobs");
        let blobs = open_dir(&self.dir, "blobs", &path)?;
        open_dir(&blobs, "sha256", &path.join("sha256"))
    }

    /// The file of a blob, with its size in bytes.
    ///
    /// # Errors
    /// [`Error::NotFound`] naming the file; [`Error::Denied`] for a stranger's symbolic link; [`Error::Io`].
    pub(super) fn open_blob(&self, digest: &Digest) -> Result<BlobFile> {
        let hex = digest.hex();
        let sha256 = self.open_blobs()?;
        let path = self.path.join("blobs/sha256").join(&hex);
        let file = open_file(&sha256, &hex, &path)?;
        let metadata = file.metadata().map_err(|error| Error::io(shown(&path), &error))?;
        Ok(BlobFile {
            file,
            path,
            bytes: metadata.len(),
        })
    }
}

/// An `index.json`.
#[derive(Debug)]
pub(super) struct IndexFile {
    file: File,
    pub(super) path: PathBuf,
    pub(super) stamp: Stamp,
}

impl IndexFile {
    /// The text.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it is too large; [`Error::Io`].
    pub(super) fn read(self) -> Result<Vec<u8>> {
        whole(self.file, &self.path, INDEX_BYTES_MAX)
    }
}

/// A blob.
#[derive(Debug)]
pub(super) struct BlobFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// Size in bytes.
    pub(super) bytes: u64,
}

impl BlobFile {
    /// Compares the size with the one that a descriptor promises for `what`.
    ///
    /// # Errors
    /// [`Error::Malformed`].
    pub(super) fn check_size(&self, what: &str, promised: u64) -> Result<()> {
        if self.bytes == promised {
            return Ok(());
        }
        let (has, file) = (self.bytes, shown(&self.path));
        let why = format!("it has {promised} bytes by its descriptor, {has} in {file}");
        Err(Error::malformed(what, why))
    }
}

/// A path in an error.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

pub(super) fn failed(path: &Path, errno: Errno) -> Error {
    match errno {
        Errno::ENOENT => Error::not_found(shown(path), "the layout has no such file"),
        errno => Error::io(shown(path), &errno.into()),
    }
}

fn open_dir(dir: &impl AsFd, name: &str, path: &Path) -> Result<OwnedFd> {
    open_at(dir, name, path, OFlag::O_DIRECTORY)
}

/// Opens a regular file. Nothing else is waited for: a named pipe would never answer.
fn open_file(dir: &impl AsFd, name: &str, path: &Path) -> Result<File> {
    let opened = open_at(dir, name, path, OFlag::O_NONBLOCK | OFlag::O_NOCTTY)?;
    let kind = fstat(&opened).map_err(|errno| failed(path, errno))?.st_mode;
    if SFlag::from_bits_truncate(kind) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Error::malformed(shown(path), "it is no regular file"));
    }
    Ok(File::from(opened))
}

fn open_at(dir: &impl AsFd, name: &str, path: &Path, flags: OFlag) -> Result<OwnedFd> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let refused = match openat(dir, name, flags | OFlag::O_NOFOLLOW, Mode::empty()) {
        Ok(opened) => return Ok(opened),
        Err(errno) => errno,
    };
    // The link itself is opened, so that the one whose owner is judged is the one that is followed.
    let flags_of_link = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let link = openat(dir, name, flags_of_link, Mode::empty()).map_err(|errno| failed(path, errno))?;
    let status = fstat(&link).map_err(|errno| failed(path, errno))?;
    if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK {
        return Err(failed(path, refused));
    }
    if status.st_uid != 0 && status.st_uid != nix::unistd::geteuid().as_raw() {
        let why = format!(
            "a symbolic link of user {}, which is followed for himself only",
            status.st_uid
        );
        return Err(Error::denied(shown(path), why));
    }
    let target = readlinkat(&link, "").map_err(|errno| failed(path, errno))?;
    openat(dir, target.as_os_str(), flags, Mode::empty()).map_err(|errno| failed(path, errno))
}

/// A whole file, of at most `bytes_max` bytes however it grows.
pub(super) fn whole(file: File, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(shown(path), &error))?;
    match bytes.len() as u64 > bytes_max {
        true => Err(Error::unsupported(
            shown(path),
            format!("it has more than {bytes_max} bytes"),
        )),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn blob(dir: &Path, bytes: &[u8]) -> (Digest, PathBuf) {
        let digest = Digest::of(bytes);
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let path = blobs.join(digest.hex());
        std::fs::write(&path, bytes).unwrap();
        (digest, path)
    }

    #[test]
    fn own_links_are_followed_and_what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (digest, path) = blob(dir.path(), b"blob");
        std::fs::rename(dir.path().join("blobs"), dir.path().join("elsewhere")).unwrap();
        symlink("elsewhere", dir.path().join("blobs")).unwrap();
        let target = path.with_extension("kept");
        std::fs::rename(&path, &target).unwrap();
        symlink(&target, &path).unwrap();
        let layout = Dir::open(dir.path()).unwrap();
        let opened = layout.open_blob(&digest).unwrap();
        assert_eq!(opened.bytes, 4);
        assert_eq!(whole(opened.file, &path, 4).unwrap(), b"blob");

        std::fs::remove_file(&target).unwrap();
        let error = layout.open_blob(&digest).unwrap_err();
        assert!(
            matches!(&error, Error::NotFound { what, .. } if what.ends_with(&digest.hex())),
            "{error}"
        );
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert!(matches!(layout.open_blob(&digest), Err(Error::Malformed { .. })));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(layout.open_blob(&digest), Err(Error::Malformed { .. })));
    }

    #[test]
    fn a_strangers_link_is_not_followed() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (digest, path) = blob(dir.path(), b"secret");
        let target = dir.path().join("kept");
        std::fs::rename(&path, &target).unwrap();
        symlink(&target, &path).unwrap();
        std::os::unix::fs::lchown(&path, Some(65534), Some(65534)).unwrap();
        let error = Dir::open(dir.path()).unwrap().open_blob(&digest).unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
    }

    #[test]
    fn what_is_no_layout_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let check = || Dir::open(dir.path()).and_then(|layout| layout.check_version());
        let error = check().unwrap_err();
        assert!(
            matches!(&error, Error::NotFound { why, .. } if why.contains("oci-layout")),
            "{error}"
        );
        for (text, code) in [("", 7), ("{}", 7), (r#"{"imageLayoutVersion":"2.0.0"}"#, 1)] {
            std::fs::write(dir.path().join("oci-layout"), text).unwrap();
            assert_eq!(check().unwrap_err().exit_code(), code, "{text}");
        }
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        check().unwrap();
        let nowhere = Dir::open(&dir.path().join("none")).unwrap_err();
        assert_eq!(nowhere.exit_code(), 4);
        let file = Dir::open(&dir.path().join("oci-layout")).unwrap_err();
        assert!(file.to_string().contains("unpacked"), "{file}");
    }

    #[test]
    fn a_file_that_grows_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![0; 11]).unwrap();
        assert!(whole(File::open(&path).unwrap(), &path, 10).is_err());
        assert_eq!(whole(File::open(&path).unwrap(), &path, 11).unwrap().len(), 11);
    }
}
