//! A read-only file in memory: mapped where it can be guarded, else read.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::store::sigbus::{Guard, PAGE_BYTES};

/// The bytes of an immutable cache file.
#[derive(Debug)]
pub struct Mapped {
    // Declared before the map, so that the guard ends first.
    guard: Option<Guard>,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Mapped {
    /// Opens a file; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Io`] when it is there but cannot be read.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Self::from_file(file)
                .map(Some)
                .map_err(|e| Error::io(path.display().to_string(), &e)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path.display().to_string(), &error)),
        }
    }

    /// The same for bytes that no file could take.
    #[must_use]
    pub fn owned(bytes: Vec<u8>) -> Self {
        Self {
            guard: None,
            bytes: Bytes::Owned(bytes),
        }
    }

    /// The same for a file that is open, from its start.
    pub(super) fn from_file(mut file: File) -> io::Result<Self> {
        let pages_ok =
            nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE) == Ok(Some(PAGE_BYTES as libc::c_long));
        if pages_ok && file.metadata()?.len() > 0 {
            // SAFETY: the store's files are written aside and renamed, or have no name at all, and only this process, which
            // holds the store's lock, ever changes them; should somebody cut one short all the same, the guard below makes the missing
            // pages zeros. Readers check every field against its bounds and tolerate any bytes.
            let map = unsafe { Mmap::map(&file)? };
            if let Some(guard) = Guard::new(map.as_ptr(), map.len()) {
                return Ok(Self {
                    guard: Some(guard),
                    bytes: Bytes::Map(map),
                });
            }
        }
        file.rewind()?;
        let mut owned = Vec::new();
        file.read_to_end(&mut owned)?;
        Ok(Self::owned(owned))
    }

    /// Whether a part of the file could not be read and shows zeros.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_damaged)
    }

    /// What was just read from the file, unless zeros may have been read in its place: to be asked *after* the reading.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming `what`.
    pub fn vouch<T>(&self, what: &str, read: T) -> Result<T> {
        if self.is_damaged() {
            let why = "its file in the cache was cut short or cannot be read; it is built anew after the mount's end";
            return Err(Error::malformed(what, why));
        }
        Ok(read)
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Map(map) => map,
            Bytes::Owned(owned) => owned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_cut_under_the_map_reads_as_zeros_and_is_marked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7u8; 3 * PAGE_BYTES]).unwrap();
        let mapped = Mapped::open(file.path()).unwrap().unwrap();
        assert_eq!(
            (mapped.len(), mapped[0], mapped.is_damaged()),
            (3 * PAGE_BYTES, 7, false)
        );
        file.as_file().set_len(PAGE_BYTES as u64).unwrap();
        assert_eq!((mapped[0], mapped.is_damaged()), (7, false));
        assert_eq!(mapped[2 * PAGE_BYTES], 0);
        assert!(mapped.is_damaged());
    }

    #[test]
    fn no_file_is_none_and_an_empty_one_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Mapped::open(&dir.path().join("none")).unwrap().is_none());
        let empty = dir.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        assert!(Mapped::open(&empty).unwrap().unwrap().is_empty());
    }
}
