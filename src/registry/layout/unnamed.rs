//! Files that have no name, so that nothing of them is left whenever and however this process ends.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::files::shown;
use crate::error::{Error, Result};

/// How often another temporary name is tried.
const TRIES_MAX: u32 = 16;

/// A new file on the filesystem of directory `dir`, to write and to read, without a name. Where the filesystem knows such
/// files it can be given one later.
///
/// # Errors
/// [`Error::Io`].
pub fn unnamed_file(dir: &Path) -> Result<File> {
    let failed = |error: &io::Error| Error::io(format!("temporary file in {}", shown(dir)), error);
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644);
    match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
        Ok(file) => return Ok(file),
        Err(error) => match error.raw_os_error() {
            // What filesystems and kernels say that do not know the flag.
            Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT) => {}
            _ => return Err(failed(&error)),
        },
    }
    for _ in 0..TRIES_MAX {
        let path = dir.join(temporary_name());
        match options.clone().create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path).map_err(|error| failed(&error))?;
                return Ok(file);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    Err(failed(&io::ErrorKind::AlreadyExists.into()))
}

/// A name that no other thread or process has.
pub(super) fn temporary_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".registryfs-{}-{number}.part", std::process::id())
}
