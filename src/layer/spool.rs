//! Bytes that are made from front to back and may be too many to be held meanwhile: the text of a TOC, the sections of an
//! index in the making. An image of a million files has hundreds of megabytes of them.
//!
//! This folder does no I/O, so where they go is for whoever drives it to say, with a [`Scratch`]. What comes back is a
//! slice, which may be a map of a file: [`Spooled::vouch`] says whether what was read from it was there.

use std::fmt;
use std::io::{self, Read};
use std::ops::Deref;

use crate::error::{Error, Result};

/// Bytes at a time from a reader into a spool.
const COPY_BYTES: usize = 64 << 10;

/// Where spools are made.
pub trait Scratch: fmt::Debug + Send + Sync {
    /// A new one, empty.
    fn spool(&self) -> Box<dyn Spool>;
}

/// Takes bytes, one behind the other.
pub trait Spool: fmt::Debug + Send {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no place for them.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Writes `bytes` over those at `offset`, which were written before.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no place for them, or nothing was written there.
    fn patch(&mut self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Everything that was written.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be had back.
    fn finish(self: Box<Self>) -> Result<Spooled>;
}

/// What a finished spool has its bytes in.
pub trait Held: Deref<Target = [u8]> + Send + Sync {
    /// Whether all that was read from it until now was what was written.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it was not.
    fn vouch(&self) -> Result<()>;
}

/// What was written to a spool.
pub struct Spooled(Box<dyn Held>);

impl Spooled {
    /// Over what holds the bytes.
    #[must_use]
    pub fn new(held: Box<dyn Held>) -> Self {
        Self(held)
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }

    /// What was just read from it, unless it was not what was written: to be asked *after* the reading.
    ///
    /// # Errors
    /// [`Error::Malformed`].
    pub fn vouch<T>(&self, read: T) -> Result<T> {
        self.0.vouch().map(|()| read)
    }
}

impl Deref for Spooled {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Debug for Spooled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} spooled bytes", self.len())
    }
}

/// Spools that are memory: for what is known to be small, and where there is no disk to use.
#[derive(Debug, Clone, Copy, Default)]
pub struct InMemory;

impl Scratch for InMemory {
    fn spool(&self) -> Box<dyn Spool> {
        Box::new(Vec::new())
    }
}

impl Spool for Vec<u8> {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn patch(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = self
            .get_mut(offset as usize..)
            .and_then(|rest| rest.get_mut(..bytes.len()))
            .ok_or_else(|| Error::io("spool", &io::Error::from_raw_os_error(libc::EINVAL)))?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Spooled> {
        Ok(Spooled::new(self))
    }
}

impl Held for Vec<u8> {
    fn vouch(&self) -> Result<()> {
        Ok(())
    }
}

/// Spools what `from` yields, but no more than `bytes_max` bytes, and says how many. `broken` is what an error of `from`
/// means.
pub(super) fn copy(
    mut from: impl Read,
    bytes_max: u64,
    to: &mut dyn Spool,
    broken: impl Fn(io::Error) -> Error,
) -> Result<u64> {
    let mut piece = vec![0; COPY_BYTES];
    let mut copied = 0;
    while copied < bytes_max {
        let wanted = (bytes_max - copied).min(COPY_BYTES as u64) as usize;
        let read = match from.read(&mut piece[..wanted]) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(broken(error)),
        };
        to.write(&piece[..read])?;
        copied += read as u64;
    }
    Ok(copied)
}
