//! SOCI: a plain gzip or tar layer, and beside it in the registry a table of its contents (zTOC) with places from which
//! its decoding can start.
//!
//! The blob between two such places is a *span*. A zTOC has no digests of files, but of every span's compressed bytes, and
//! these are checked before anything is decoded from them. Its own digest is in the SOCI index, and that one's is in the
//! image's manifest (or comes from the list of what refers to the image: then it is worth as much as the right to push).
//! So all of a layer that anyone gets to see is vouched for, and the blob's own digest is never needed.
//!
//! The annotation `com.amazon.soci.disable-xattrs` promises that a layer has no extended attributes, which saves other
//! readers from asking. It stands outside of the zTOC, so it must not change what the layer is, and is not looked at.

mod flatbuffer;
pub mod writer;
mod ztoc;

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::layer::gzip::window;
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};
use crate::layer::spool::{Scratch, Spooled};
use crate::layer::{Descriptor, Format, Indexer, Step};

use flatbuffer::Buffer;
use ztoc::{Compression, Placed, Span, Ztoc};

/// The largest zTOC in bytes. One has 32 KiB for each span and some 200 bytes for each entry, so this is one of a layer of
/// 24 GiB with a million files.
pub const ZTOC_BYTES_MAX: u64 = 384 << 20;

/// Makes the index of a layer from its zTOC.
#[derive(Debug)]
pub(super) struct SociIndexer {
    /// The layer, for messages.
    what: String,
    blob_bytes: u64,
    ztoc: Descriptor,
    scratch: Arc<dyn Scratch>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Asked,
    Done,
}

impl SociIndexer {
    /// An indexer for a layer of which `ztoc` is said to be the zTOC.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the zTOC is too large to be read.
    pub(super) fn new(layer: &Descriptor, ztoc: &Descriptor, scratch: Arc<dyn Scratch>) -> Result<Self> {
        let what = format!("layer {}", layer.digest);
        if ztoc.size > ZTOC_BYTES_MAX {
            let why = format!(
                "its zTOC has {} bytes; at most {ZTOC_BYTES_MAX} are read",
                ztoc.size
            );
            return Err(Error::unsupported(what, why));
        }
        Ok(Self {
            what,
            blob_bytes: layer.size,
            ztoc: ztoc.clone(),
            scratch,
            state: State::Start,
        })
    }

    fn build(&self, bytes: &[u8]) -> Result<Spooled> {
        let buffer = Buffer::new(bytes);
        let ztoc = Ztoc::read(&buffer, self.blob_bytes)?;
        let coding = match ztoc.compression {
            Compression::Gzip => Coding::Deflate,
            Compression::Uncompressed => Coding::Stored,
        };
        let mut builder = IndexBuilder::spooled(coding, Arc::clone(&self.scratch));
        let mut told = 0;
        for placed in ztoc.entries() {
            let placed = placed?;
            builder.entry(&placed.entry)?;
            tell_spans(&mut builder, coding, &ztoc.spans, &placed, &mut told)?;
        }
        let summary = Summary {
            toc_digest: self.ztoc.digest,
            ..Summary::of(Format::Soci, self.blob_bytes)
        };
        builder.finish(summary, self.blob_bytes)
    }
}

/// Adds the chunks of an entry: its content, cut where one span ends and the next one starts. Spans from `told` on are new
/// to the builder, because entries come in the order of the tar.
fn tell_spans(
    builder: &mut IndexBuilder,
    coding: Coding,
    spans: &[Span<'_>],
    placed: &Placed,
    told: &mut usize,
) -> Result<()> {
    let end = placed.offset.saturating_add(placed.entry.size);
    let mut position = placed.offset;
    let first = spans.partition_point(|span| span.tar.end <= position);
    for (number, span) in spans.iter().enumerate().skip(first) {
        if position >= end {
            break;
        }
        let chunk_end = span.tar.end.min(end);
        if chunk_end <= position {
            // A span without content: two places to start from, and nothing between them.
            continue;
        }
        if number >= *told {
            *told = number + 1;
            builder.member(NewMember {
                blob_start: span.blob.start,
                blob_end: span.blob.end,
                coding,
                bits: span.bits,
                window: window::pack(span.window)?,
                check: Some(span.check),
            })?;
        }
        builder.chunk(NewChunk {
            bytes: chunk_end - position,
            blob_offset: span.blob.start,
            inner_offset: position.saturating_sub(span.tar.start),
            digest: None,
        })?;
        position = chunk_end;
    }
    Ok(())
}

impl Indexer for SociIndexer {
    fn step(&mut self, bytes: Option<&[u8]>) -> Result<Step> {
        match (self.state, bytes) {
            (State::Start, None) => {
                self.state = State::Asked;
                Ok(Step::NeedBlob(self.ztoc.clone()))
            }
            (State::Asked, Some(bytes)) if bytes.len() as u64 == self.ztoc.size => {
                self.state = State::Done;
                self.build(bytes).map(Step::Done)
            }
            _ => Err(Error::malformed(
                &self.what,
                "its zTOC was asked for, but something else came",
            )),
        }
    }
}

#[cfg(test)]
mod tests;
