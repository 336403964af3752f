//! Files that commands write and hand over.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::store::Store;

/// A file that is being written.
pub(super) struct Target {
    pub(super) file: File,
    /// The name that it has so far, and the one that it will have.
    names: Option<(Removed, PathBuf)>,
}

impl Target {
    /// A file that gets the name `path` once it is complete, in the place and with the permissions of what is there. Only what
    /// is no regular file, such as a pipe or a device, is written to as it is: it must not be replaced.
    pub(super) fn new(path: &Path) -> io::Result<Self> {
        let there = match fs::metadata(path) {
            Ok(there) if !there.is_file() => {
                let file = File::options().write(true).open(path)?;
                return Ok(Self { file, names: None });
            }
            Ok(there) => Some((fs::canonicalize(path)?, there.permissions())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let (path, permissions) = match there {
            Some((path, permissions)) => (path, Some(permissions)),
            None => (path.to_owned(), None),
        };
        let mut part = path.clone().into_os_string();
        part.push(format!(".{}.part", unique()));
        let file = File::create_new(&part)?;
        let names = Some((Removed(part.into()), path));
        if let Some(permissions) = permissions {
            file.set_permissions(permissions)?;
        }
        Ok(Self { file, names })
    }

    pub(super) fn finish(self) -> io::Result<()> {
        match self.names {
            Some((part, path)) => fs::rename(&part.0, path),
            None => Ok(()),
        }
    }
}

/// A part of a file's name that no other process uses now.
fn unique() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    format!("{}-{}", std::process::id(), now.unwrap_or_default().as_nanos())
}

/// A file that is gone at the end, whatever the end is.
pub(super) struct Removed(pub(super) PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It has been taken, or has its name, or was never made.
        let _ = fs::remove_file(&self.0);
    }
}

/// Bytes in a file that whoever owns the store takes from there.
pub(super) fn handed_over(config: &Config, bytes: &[u8]) -> Result<Removed> {
    let file = Removed(Store::incoming(&config.cache_dir)?);
    let write = || File::create_new(&file.0)?.write_all(bytes);
    write().map_err(|error: io::Error| Error::io(file.0.display().to_string(), &error))?;
    Ok(file)
}
