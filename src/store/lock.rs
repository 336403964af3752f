//! The lock that makes one process the owner of a store.
//!
//! It is an flock, so it ends with its holder however that dies. The file's text says who holds it and where it listens;
//! that is a hint for people and for clients, never proof.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Who holds a store's lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// Its control socket, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// Makes a directory of the store where it is missing, with those above it, for its owner alone: the cache holds what only
/// its owner's credentials may have brought. One that is there already stays as it is.
///
/// # Errors
/// [`Error::Io`].
pub fn make_dir(dir: &Path) -> Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(dir);
    made.map_err(|e| Error::io(dir.display().to_string(), &e))
}

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct Lock {
    file: Mutex<File>,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock of the store in `dir`, which is made if it is missing.
    ///
    /// # Errors
    /// [`Error::Busy`] naming the holder; [`Error::Io`].
    pub fn take(dir: &Path) -> Result<Self> {
        make_dir(dir)?;
        let path = dir.join("lock");
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        let file = file.map_err(|e| Error::io(path.display().to_string(), &e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let who = holder(dir)
                    .map_or_else(|| "another process".to_owned(), |h| format!("process {}", h.pid));
                return Err(Error::busy(
                    dir.display().to_string(),
                    format!("the store is in use by {who}"),
                ));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io(path.display().to_string(), &error)),
        }
        let lock = Self {
            file: Mutex::new(file),
            path,
        };
        lock.note(None)?;
        Ok(lock)
    }

    /// Notes in the lock file how the holder can be reached.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn note(&self, socket: Option<&Path>) -> Result<()> {
        let holder = Holder {
            pid: std::process::id(),
            socket: socket.map(Path::to_owned),
        };
        let text = serde_json::to_vec(&holder).map_err(|e| Error::malformed("lock", e.to_string()))?;
        let mut file = self.file.lock();
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(&text));
        written.map_err(|e| Error::io(self.path.display().to_string(), &e))
    }
}

/// Who noted himself in the lock file of the store in `dir`. He may be gone.
#[must_use]
pub fn holder(dir: &Path) -> Option<Holder> {
    let mut text = String::new();
    File::open(dir.join("lock"))
        .ok()?
        .take(1 << 16)
        .read_to_string(&mut text)
        .ok()?;
    serde_json::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_he_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let lock = Lock::take(dir.path()).unwrap();
        lock.note(Some(Path::new("/run/x"))).unwrap();
        let refused = Lock::take(dir.path()).unwrap_err();
        assert!(matches!(&refused, Error::Busy { why, .. } if why.contains(&std::process::id().to_string())));
        assert_eq!(holder(dir.path()).unwrap().socket.unwrap(), Path::new("/run/x"));
        drop(lock);
        Lock::take(dir.path()).unwrap();
    }
}
