//! zstd:chunked: a zstd frame a chunk, and a table of contents (TOC) in a skippable frame at the end of the blob.
//!
//! The manifest's annotations say where the TOC is and what digest its compressed bytes have, the TOC has a digest for
//! every chunk: one range is read, and the footer, which repeats the annotations, is not. Two writers exist. That of
//! containers/storage has a frame for exactly the bytes of a chunk, says where each ends, and has runs of zeros as chunks
//! of their own, which become holes. That of stargz-snapshotter lays layers out as eStargz, tar headers behind the
//! chunks included, and promises the uncompressed TOC's digest too. The records of the TOC tell which it was.

mod annotations;
mod toc;
pub mod writer;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::index::Summary;
use crate::layer::spool::{Scratch, Spool, Spooled};
use crate::layer::toc_json::{self, json_bytes_max};
use crate::layer::zstd::{self, SKIPPABLE_HEADER_BYTES};
use crate::layer::{Descriptor, Format, Indexer, Step};

use annotations::Annotations;
pub(super) use annotations::promise;
use toc::Frames;

/// The annotations' prefix of containers/storage up to 1.43 and of stargz-snapshotter.
pub const OLD_PREFIX: &str = "io.containers.zstd-chunked.";
/// The annotations' prefix of containers/storage from 1.44 on.
pub const PREFIX: &str = "io.github.containers.zstd-chunked.";
/// Behind a prefix: the digest of the compressed TOC.
pub const CHECKSUM: &str = "manifest-checksum";
/// Behind a prefix: where the TOC is, `offset:compressed size:size:type`.
pub const POSITION: &str = "manifest-position";

/// What messages call the TOC.
const TOC: &str = "zstd:chunked TOC";

/// Makes the index of a zstd:chunked layer from one range of its blob.
#[derive(Debug)]
pub(in crate::layer) struct ZstdChunkedIndexer {
    /// The layer, for messages.
    what: String,
    blob_bytes: u64,
    annotations: Annotations,
    scratch: Arc<dyn Scratch>,
    state: State,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Toc,
    Done,
}

impl ZstdChunkedIndexer {
    /// An indexer for a layer that its annotations call zstd:chunked, `None` for any other.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the annotations are broken, or disagree with each other, the blob or the media type.
    pub(super) fn new(descriptor: &Descriptor, scratch: Arc<dyn Scratch>) -> Result<Option<Self>> {
        let what = format!("layer {}", descriptor.digest);
        let Some(annotations) = Annotations::read(descriptor).map_err(|why| Error::malformed(&what, why))?
        else {
            return Ok(None);
        };
        Ok(Some(Self {
            what,
            blob_bytes: descriptor.size,
            annotations,
            scratch,
            state: State::Start,
        }))
    }

    /// Verifies the TOC and turns it into an index.
    fn build(&self, compressed: &[u8]) -> Result<Step> {
        let Annotations {
            checksum,
            position,
            toc_digest,
        } = &self.annotations;
        let actual = Digest::of(compressed);
        if actual != *checksum {
            let what = format!("compressed TOC of {}", self.what);
            return Err(Error::mismatch(what, *checksum, actual));
        }
        let json = zstd::unpack(TOC, compressed, position.bytes, self.scratch.spool())?;
        if json.len() as u64 != position.bytes {
            let why = format!(
                "it has {} bytes, its annotation says {}",
                json.len(),
                position.bytes
            );
            return Err(Error::malformed(TOC, why));
        }
        let actual = Digest::of(&json);
        if let Some(promised) = toc_digest.filter(|promised| *promised != actual) {
            let what = format!("uncompressed TOC of {}", self.what);
            return Err(Error::mismatch(what, promised, actual));
        }
        let mut frames = Frames::default();
        let mut toc = toc_json::read(&json, &mut frames, &self.scratch)?;
        if toc.has_unverifiable {
            return Ok(Step::Pass);
        }
        let data_end = position.start - SKIPPABLE_HEADER_BYTES;
        frames.tell(&mut toc.builder)?;
        if toc.prefetch_end > data_end {
            return Err(Error::malformed(
                TOC,
                "its prefetch landmark lies beyond the data",
            ));
        }
        let summary = Summary {
            toc_digest: actual,
            toc_start: position.start,
            toc_end: position.end,
            toc_bytes: position.bytes,
            prefetch_end: toc.prefetch_end,
            ..Summary::of(Format::ZstdChunked, self.blob_bytes)
        };
        drop(json);
        Ok(Step::Done(toc.builder.finish(summary, data_end)?))
    }
}

impl Indexer for ZstdChunkedIndexer {
    fn step(&mut self, bytes: Option<&[u8]>) -> Result<Step> {
        let state = std::mem::replace(&mut self.state, State::Done);
        let wanted = self.annotations.position.start..self.annotations.position.end;
        match (state, bytes) {
            (State::Start, _) => {
                self.state = State::Toc;
                Ok(Step::Need(wanted))
            }
            (State::Toc, Some(bytes)) if bytes.len() as u64 == wanted.end - wanted.start => self.build(bytes),
            _ => {
                let why = format!("bytes {wanted:?} were asked for, but others came");
                Err(Error::malformed(&self.what, why))
            }
        }
    }
}

/// Unpacks a TOC for readers, from its compressed bytes.
///
/// # Errors
/// [`Error::Malformed`] when they are no zstd, or of more than a TOC may have.
pub(super) fn unpack_toc(compressed: &[u8], spool: Box<dyn Spool>) -> Result<Spooled> {
    zstd::unpack(TOC, compressed, json_bytes_max(compressed.len() as u64), spool)
}
