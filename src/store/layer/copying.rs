//! Chunks that come from another layer on this disk, or from another place in the same one.
//!
//! Where the bytes come from vouches for nothing: they are hashed before they are written, as if a registry had given them,
//! so a copy is as good as what is fetched whatever has become of the source. Hashing costs a third of what decoding would
//! (1.8 GB/s a core). What is copied is shared with the source where the filesystem can share blocks.
//!
//! The order of locks keeps evictors going: first who marks (`keeping`) of the layer that is written, then the count on the
//! one that is read, which nobody waits for. A count is never held while something else is waited for.

use std::ops::Range;

use rustix::fs::copy_file_range;

use super::Layer;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::index::Chunk;

/// Bytes read or shared at a time: an evictor waits for so much.
const PIECE_BYTES: u64 = 8 << 20;
/// What is shorter is written and not shared: sharing costs more than a write then, and makes the disk sync what was
/// just written.
const SHARED_BYTES_MIN: u64 = 64 << 10;

/// What became of a copy.
#[derive(Debug)]
pub enum Copied {
    /// It is there.
    Kept,
    /// The disk does not take it. The verified bytes.
    Unkept(Vec<u8>, Error),
    /// The source does not have it, or not the right bytes.
    Gone,
}

impl Layer {
    /// Puts a chunk that is missing here in its place, from a chunk of the same digest and length in `source`. One that a
    /// crash made doubtful there is looked at first.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for a damaged index.
    pub fn copy_chunk(&self, number: u32, source: &Self, source_number: u32) -> Result<Copied> {
        let chunk = self
            .index
            .source()
            .vouch("layer index", self.index.chunk(number)?)?;
        let from = source.index.chunk(source_number)?;
        let from = source.index.source().vouch("layer index", from)?;
        let Some(digest) = chunk.digest else {
            return Ok(Copied::Gone);
        };
        if (from.digest, from.bytes) != (chunk.digest, chunk.bytes)
            || !source.verify_suspect(source_number)?
        {
            return Ok(Copied::Gone);
        }
        let evictions = (self.evictions(), source.evictions());
        let Some((found, bytes)) = source.hash(source_number, &from)? else {
            return Ok(Copied::Gone);
        };
        if found != digest {
            source.refuse(source_number, evictions.1)?;
            return Ok(Copied::Gone);
        }
        if chunk.bytes >= SHARED_BYTES_MIN {
            match self.share(&chunk, source, source_number, &from) {
                Ok(true) => {
                    self.mark_written(number, evictions.0)?;
                    return Ok(Copied::Kept);
                }
                Ok(false) => return Ok(Copied::Gone),
                // Whoever has the bytes still can write them.
                Err(error) if bytes.is_empty() => return Err(error),
                Err(error) => tracing::debug!(layer = %self.key, %error, "a chunk is not shared but written"),
            }
        }
        match self.keep(number..number + 1, chunk.data_offset, &bytes) {
            Ok(()) => Ok(Copied::Kept),
            Err(error) => Ok(Copied::Unkept(bytes, error)),
        }
    }

    /// The digest of a chunk as it is on the disk, and its bytes if they are few; `None` if it is evicted meanwhile.
    fn hash(&self, number: u32, chunk: &Chunk) -> Result<Option<(Digest, Vec<u8>)>> {
        let (mut hasher, mut bytes) = (Hasher::default(), Vec::new());
        for piece in pieces(chunk.bytes) {
            let len = (piece.end - piece.start) as usize;
            let Some(read) = self.read(&(number..number + 1), chunk.data_offset + piece.start, len)? else {
                return Ok(None);
            };
            hasher.update(&read);
            if chunk.bytes <= PIECE_BYTES {
                bytes = read;
            }
        }
        Ok(Some((hasher.finish(), bytes)))
    }

    /// Puts a chunk's bytes in their place without reading them, piece by piece. False if the source is evicted meanwhile.
    fn share(&self, to: &Chunk, source: &Self, number: u32, from: &Chunk) -> Result<bool> {
        for piece in pieces(to.bytes) {
            let keeping = self.keeping.read();
            if self.map.is_lent() {
                return Err(self.is_given());
            }
            let _guard = source.hold(&(number..number + 1));
            if !source.is_present(number) {
                return Ok(false);
            }
            let (from_data, data) = (source.data(), self.data());
            let (mut from_at, mut to_at) = (from.data_offset + piece.start, to.data_offset + piece.start);
            let end = to.data_offset + piece.end;
            while to_at < end {
                let left = (end - to_at) as usize;
                let copied = copy_file_range(&*from_data, Some(&mut from_at), &*data, Some(&mut to_at), left);
                match copied.map_err(|errno| self.failed(&errno.into()))? {
                    0 => return Ok(false),
                    _ => continue,
                }
            }
            drop(keeping);
        }
        Ok(true)
    }
}

/// The pieces of a chunk of so many bytes.
fn pieces(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let starts = (0..bytes).step_by(PIECE_BYTES as usize);
    starts.map(move |start| start..bytes.min(start + PIECE_BYTES))
}

#[cfg(test)]
mod tests;
