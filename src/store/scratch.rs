//! Files without a name, for what is made once and too large to be held meanwhile: they are page cache, which the kernel
//! can write out and drop, and they go with the process however it ends.
//!
//! What is small never becomes a file. A disk that takes nothing is no reason to fail: then memory has to do.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::layer::spool::{Held, Scratch, Spool, Spooled};
use crate::store::mapped::Mapped;
use crate::store::new_name;

/// So many bytes are held at most before they are written; a spool of no more than this has no file.
const BUFFER_BYTES: usize = 256 << 10;

/// Makes spools that are files in a directory.
#[derive(Debug)]
pub(super) struct ScratchDir(PathBuf);

impl ScratchDir {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self(dir)
    }
}

impl Scratch for ScratchDir {
    fn spool(&self) -> Box<dyn Spool> {
        Box::new(FileSpool {
            dir: self.0.clone(),
            buffer: Vec::new(),
            place: Place::None,
        })
    }
}

/// Where the bytes before those in the buffer are.
#[derive(Debug)]
enum Place {
    /// There are none yet.
    None,
    /// In a file, so many of them.
    File(File, u64),
    /// In the buffer too: the disk takes nothing.
    Memory,
}

#[derive(Debug)]
struct FileSpool {
    dir: PathBuf,
    buffer: Vec<u8>,
    place: Place,
}

impl FileSpool {
    fn failed(&self, error: &io::Error) -> Error {
        Error::io(format!("a scratch file in {}", self.dir.display()), error)
    }

    /// Brings the buffer and `bytes` into the file.
    fn flush(&mut self, bytes: &[u8]) -> Result<()> {
        let (mut file, end) = match std::mem::replace(&mut self.place, Place::Memory) {
            Place::File(file, end) => (file, end),
            Place::None => match nameless(&self.dir) {
                Ok(file) => (file, 0),
                Err(error) => return self.stay(&error, bytes),
            },
            Place::Memory => {
                self.buffer.extend_from_slice(bytes);
                return Ok(());
            }
        };
        match file.write_all(&self.buffer).and_then(|()| file.write_all(bytes)) {
            Ok(()) => {
                let end = end + (self.buffer.len() + bytes.len()) as u64;
                self.buffer.clear();
                self.place = Place::File(file, end);
                Ok(())
            }
            Err(error) => {
                let mut all = vec![0; end as usize];
                file.read_exact_at(&mut all, 0).map_err(|e| self.failed(&e))?;
                all.append(&mut self.buffer);
                self.buffer = all;
                self.stay(&error, bytes)
            }
        }
    }

    /// Goes on in memory.
    fn stay(&mut self, error: &io::Error, bytes: &[u8]) -> Result<()> {
        tracing::warn!(%error, dir = %self.dir.display(), "what belongs into a scratch file is held in memory");
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }
}

impl Spool for FileSpool {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if self.buffer.len() + bytes.len() > BUFFER_BYTES {
            return self.flush(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn patch(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let Place::File(..) = &self.place else {
            return self.buffer.patch(offset, bytes);
        };
        // What is patched may stand in both.
        self.flush(&[])?;
        match &self.place {
            Place::File(file, end) if offset.saturating_add(bytes.len() as u64) <= *end => file
                .write_all_at(bytes, offset)
                .map_err(|error| self.failed(&error)),
            _ => self.buffer.patch(offset, bytes),
        }
    }

    fn finish(mut self: Box<Self>) -> Result<Spooled> {
        if let Place::File(..) = &self.place {
            self.flush(&[])?;
        }
        match std::mem::replace(&mut self.place, Place::Memory) {
            Place::File(file, _) => {
                let mapped = Mapped::from_file(file).map_err(|error| self.failed(&error))?;
                Ok(Spooled::new(Box::new(mapped)))
            }
            Place::None | Place::Memory => Ok(Spooled::new(Box::new(self.buffer))),
        }
    }
}

impl Held for Mapped {
    fn vouch(&self) -> Result<()> {
        if self.is_damaged() {
            return Err(Error::malformed("scratch file", "it cannot be read back"));
        }
        Ok(())
    }
}

/// A file in `dir` that nobody finds.
fn nameless(dir: &std::path::Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
        Ok(file) => Ok(file),
        // Not every filesystem can: one with a name loses it at once.
        Err(_) => {
            let path = dir.join(new_name());
            let file = options.create_new(true).open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes pieces of odd sizes that together are `bytes_max` or a little more, and returns them.
    fn fill(spool: &mut dyn Spool, bytes_max: usize) -> Vec<u8> {
        let mut written = Vec::new();
        for piece in 0.. {
            if written.len() >= bytes_max {
                break;
            }
            let bytes = vec![piece as u8; (piece * 7919) % 50_000 + 1];
            spool.write(&bytes).unwrap();
            written.extend_from_slice(&bytes);
        }
        written
    }

    #[test]
    fn what_was_written_comes_back_and_leaves_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = ScratchDir::new(dir.path().to_owned());
        for bytes_max in [0, 1, 100_000, BUFFER_BYTES, 3 << 20] {
            let mut spool = scratch.spool();
            let mut written = fill(&mut *spool, bytes_max);
            if let Some(last) = written.len().checked_sub(3) {
                for at in [0, last] {
                    spool.patch(at as u64, b"new").unwrap();
                    written[at..at + 3].copy_from_slice(b"new");
                }
            }
            assert!(spool.patch(written.len() as u64, b"x").is_err());
            let spooled = spool.finish().unwrap();
            assert!(*spooled == *written, "{bytes_max}");
            spooled.vouch(()).unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn where_no_file_can_be_it_is_held_in_memory() {
        let scratch = ScratchDir::new("/nonexistent".into());
        let mut spool = scratch.spool();
        let mut written = fill(&mut *spool, 1 << 20);
        spool.patch(700_000, b"new").unwrap();
        written[700_000..700_003].copy_from_slice(b"new");
        assert!(*spool.finish().unwrap() == *written);
    }

    #[test]
    fn a_full_disk_in_the_middle_loses_nothing() {
        // A limit on the size of files would be of the whole process; a file that cannot be written is as good.
        let dir = tempfile::tempdir().unwrap();
        let mut spool = FileSpool {
            dir: dir.path().to_owned(),
            buffer: Vec::new(),
            place: Place::None,
        };
        let mut written = fill(&mut spool, 1 << 20);
        let Place::File(file, end) = &spool.place else {
            panic!("no file yet")
        };
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        spool.place = Place::File(File::open(path).unwrap(), *end);
        written.extend(fill(&mut spool, 1 << 20));
        assert!(matches!(spool.place, Place::Memory));
        assert!(*Box::new(spool).finish().unwrap() == *written);
    }
}
