//! Layer formats behind one trait: parse an index, say which byte range and which decoder yield which chunk.
//!
//! This folder is pure: bytes in, bytes out, no I/O and no clock. Whoever drives it fetches the ranges it asks for
//! and stores what it decodes. One file (or folder) a format; `identify` is the only place that knows them all.

mod checked;
mod cutter;
pub mod entry;
pub mod estargz;
pub mod exchange;
pub(crate) mod fields;
pub mod gzip;
mod identify;
pub mod index;
pub mod index_builder;
#[cfg(test)]
mod kept;
pub mod scan;
pub mod soci;
mod spare;
pub mod spool;
mod stored;
pub mod tar;
pub mod time;
mod toc_json;
mod toc_writer;
pub mod xattrs;
mod zstd;
pub mod zstd_chunked;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::digest::Digest;
use crate::error::Result;
use crate::layer::spool::Spooled;

pub use identify::{
    WHOLE_BLOB, decoder, decoder_with, decompressor, expected, format_of_media_type, index_promise, indexer,
    reading, scanner, takes_ztoc, toc,
};
pub use spare::Spare;

/// How a layer's bytes are laid out, as shown in `layers/N/format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Format {
    /// eStargz: a gzip member a chunk, and a TOC at the end.
    Estargz = 1,
    /// zstd:chunked: a zstd frame a chunk, and a manifest at the end.
    ZstdChunked = 2,
    /// Plain gzip with a SOCI zTOC.
    Soci = 3,
    /// Plain gzip.
    Gzip = 4,
    /// Plain zstd.
    Zstd = 5,
    /// Uncompressed tar.
    Tar = 6,
}

impl Format {
    /// The name that users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Estargz => "estargz",
            Self::ZstdChunked => "zstd:chunked",
            Self::Soci => "soci",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Tar => "tar",
        }
    }

    /// The inverse of `self as u8`.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Estargz,
            Self::ZstdChunked,
            Self::Soci,
            Self::Gzip,
            Self::Zstd,
            Self::Tar,
        ]
        .into_iter()
        .find(|format| *format as u8 == byte)
    }
}

/// What reading a layer costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reading {
    /// A table of contents says where everything is: each read fetches what it needs.
    Ranges,
    /// Before the first read one pass over the whole blob is needed.
    PassNeeded,
    /// One pass has been made; each read fetches what it needs.
    PassDone,
    /// One pass has been made. Its content cannot be read from the middle: what has left the cache costs another pass.
    KeptWhole,
    /// It cannot be read: it is encrypted, no layer of files, or its annotations contradict each other.
    Refused,
}

impl Reading {
    /// The words that users see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ranges => "ranges",
            Self::PassNeeded => "one pass needed",
            Self::PassDone => "pass done",
            Self::KeptWhole => "kept whole",
            Self::Refused => "refused",
        }
    }
}

/// What the manifest says of a layer: its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// The media type, without parameters.
    pub media_type: String,
    /// The digest of the blob.
    pub digest: Digest,
    /// The size of the blob in bytes.
    pub size: u64,
    /// The annotations.
    pub annotations: BTreeMap<String, String>,
    /// Where else the blob is to be had: what makes a foreign layer.
    pub urls: Vec<String>,
}

/// What an [`Indexer`] wants next.
#[derive(Debug)]
pub enum Step {
    /// These bytes of the blob; call again with exactly them.
    Need(Range<u64>),
    /// All of another blob of the same repository, verified by its digest; call again with exactly it.
    NeedBlob(Descriptor),
    /// The blob that holds this layer's table of contents in the image of TOCs that belongs to the image (`REF-esgztoc`);
    /// call again with exactly it, or with `None` if there is none. Nobody vouches for it but the digest that the indexer
    /// knows: where it is not the right one, this step comes again.
    NeedExternalToc,
    /// The layer's index, in the form of [`index`].
    Done(Spooled),
    /// A layer without a table of contents: one pass over the whole blob, see [`decompressor`], makes its index.
    Pass,
}

/// A place in a blob from which decoding can start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The first byte in the blob that is needed to decode from here.
    pub blob_start: u64,
    /// How to decode from here.
    pub coding: index::Coding,
    /// As in [`index::Member::bits`].
    pub bits: u8,
    /// The window to start with, compressed as zstd; empty for none.
    pub window: Vec<u8>,
}

/// What comes out of a [`Decompressor`], in the order of the tar.
#[derive(Debug)]
pub enum Decoded<'a> {
    /// The next bytes of the tar.
    Bytes(&'a [u8]),
    /// Decoding can start here, before the bytes that come next.
    Checkpoint(Checkpoint),
}

/// Decompresses a whole blob once, from its first byte to its last, and finds the places from which to do so again.
pub trait Decompressor: Send {
    /// The format, as the blob itself says it.
    fn format(&self) -> Format;

    /// Takes the next bytes of the blob.
    ///
    /// # Errors
    /// `Malformed` when they cannot be decoded, and those of `out`; it is of no use afterwards.
    fn push(&mut self, blob: &[u8], out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()>;

    /// The blob has ended.
    ///
    /// # Errors
    /// `Malformed` when it has ended early, and those of `out`.
    fn finish(&mut self, out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()>;
}

/// Receives the content of a layer's files while a pass goes over it.
pub trait ContentSink {
    /// `bytes` at `data_offset` of the layer's data file, which belong to one file. Offsets only grow. Not verified: what
    /// the pass has seen is worth something when its end has the right digest.
    ///
    /// # Errors
    /// Whatever must end the pass.
    fn content(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()>;
}

/// Turns a few byte ranges of a blob into its index: a state machine that is handed what it asks for.
pub trait Indexer: Send {
    /// Takes the bytes of the range that the previous step asked for (`None` at first) and says what comes next.
    ///
    /// # Errors
    /// `Malformed` or `Verification` when the bytes break the format, `Unsupported` when the layer turns out to be of a
    /// format without lazy reading.
    fn step(&mut self, bytes: Option<&[u8]>) -> Result<Step>;
}

/// Receives what a [`MemberDecoder`] decodes.
pub trait ChunkSink {
    /// `bytes` of chunk `chunk` (its position in the index's chunk table), at `offset` in the chunk. Not verified yet.
    ///
    /// # Errors
    /// Whatever keeps the sink from taking them; decoding stops.
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()>;

    /// All of chunk `chunk` was handed over and has the digest that the index promises.
    ///
    /// # Errors
    /// Whatever keeps the sink from keeping it; decoding stops.
    fn verified(&mut self, chunk: u32) -> Result<()>;
}

/// Decodes one member (the independently decodable unit of a layer, see [`index::Member`]) from its compressed bytes,
/// pushed in pieces of any size.
pub trait MemberDecoder: Send {
    /// Takes the next compressed bytes. Returns whether all chunks of the member are done; bytes after that are ignored.
    ///
    /// # Errors
    /// `Verification` when a chunk has another digest, `Malformed` when the member cannot be decoded, and the sink's own.
    fn push(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool>;

    /// Takes all of the member, which came in `pieces`. Returns whether all chunks are done.
    ///
    /// # Errors
    /// As [`Self::push`].
    fn push_all(&mut self, pieces: &[&[u8]], sink: &mut dyn ChunkSink) -> Result<bool> {
        for piece in pieces {
            if self.push(piece, sink)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What the next decoder can use of this one.
    fn into_spare(self: Box<Self>) -> Spare {
        Spare::default()
    }
}
