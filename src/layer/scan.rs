//! One pass over a layer without a table of contents: its tar goes in, and out come the layer's index, the digest of the
//! tar (the DiffID), and the content of the files for whoever keeps it.
//!
//! A file is cut into chunks where decoding can start anew, because a chunk is decoded from one place, and where it
//! becomes too long to be fetched for the sake of one read. The digest of each chunk is taken here, so that what is fetched
//! again later is verified by itself. An index is worth something only when the digests of the whole, which are known at
//! the end, are the ones that the image's documents promise.

use std::sync::Arc;

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::entry::{Kind, clean_path};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};
use crate::layer::spool::{InMemory, Scratch, Spooled};
use crate::layer::tar::scan::{Event, Scanner};
use crate::layer::{Checkpoint, ContentSink, Format};

/// The longest chunk, as in eStargz: what is decoded and verified for one byte.
const CHUNK_BYTES_MAX: u64 = 4 << 20;
/// The longest chunk of a plain tar, where a shorter one costs nothing to start at and only digests are to be kept.
const TAR_CHUNK_BYTES_MAX: u64 = 256 << 10;

/// What a pass has found.
#[derive(Debug)]
pub struct Scanned {
    /// The layer's index, in the form of [`crate::layer::index`].
    pub index: Spooled,
    /// The digest of the tar.
    pub diff_id: Digest,
    /// The size of the tar in bytes.
    pub tar_bytes: u64,
}

/// Makes the index of a layer from its tar and the places where decoding can start.
#[derive(Debug)]
pub struct LayerScanner {
    format: Format,
    tar: Scanner,
    hasher: Hasher,
    cutting: Cutting,
}

impl LayerScanner {
    /// A scanner of a layer in this format. Of [`Format::Tar`] every chunk is a member of its own, and no checkpoint is
    /// needed; of the others members begin at the checkpoints. It holds the index that it makes in memory.
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self::spooled(format, Arc::new(InMemory))
    }

    /// The same with what becomes the index in `scratch`.
    #[must_use]
    pub fn spooled(format: Format, scratch: Arc<dyn Scratch>) -> Self {
        let (coding, chunk_bytes_max) = match format {
            Format::Tar => (Coding::Stored, TAR_CHUNK_BYTES_MAX),
            Format::Zstd | Format::ZstdChunked => (Coding::Zstd, CHUNK_BYTES_MAX),
            Format::Gzip | Format::Estargz | Format::Soci => (Coding::Deflate, CHUNK_BYTES_MAX),
        };
        Self {
            format,
            tar: Scanner::default(),
            hasher: Hasher::default(),
            cutting: Cutting {
                builder: IndexBuilder::spooled(coding, scratch),
                is_stored: format == Format::Tar,
                chunk_bytes_max,
                member: None,
                chunk: None,
                data_offset: 0,
                left_out: &[],
                is_left_out: false,
            },
        }
    }

    /// The same without the regular files of these names at the root.
    #[must_use]
    pub fn leaving_out(mut self, names: &'static [&'static str]) -> Self {
        self.cutting.left_out = names;
        self
    }

    /// Decoding can start here, in front of the bytes that come next.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it lies before the one before it in the blob.
    pub fn checkpoint(&mut self, checkpoint: Checkpoint) -> Result<()> {
        self.cutting.checkpoint(checkpoint, self.tar.position())
    }

    /// Takes the next bytes of the tar and hands on what of them is content of files.
    ///
    /// # Errors
    /// [`Error::Malformed`] and [`Error::Unsupported`] when they break a rule of tar or of the index, and those of
    /// `content`; the scanner is of no use afterwards.
    pub fn push(&mut self, tar: &[u8], content: &mut dyn ContentSink) -> Result<()> {
        self.hasher.update(tar);
        let cutting = &mut self.cutting;
        self.tar.push(tar, &mut |event| cutting.event(event, content))
    }

    /// The tar, and with it the blob of `blob_bytes` bytes, has ended.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the tar is cut short, or the index breaks a rule.
    pub fn finish(mut self, blob_bytes: u64) -> Result<Scanned> {
        self.tar.finish()?;
        self.cutting.end_chunk()?;
        self.cutting.end_member(blob_bytes)?;
        let (diff_id, tar_bytes) = (self.hasher.finish(), self.tar.position());
        let summary = Summary {
            diff_id,
            tar_bytes,
            ..Summary::of(self.format, blob_bytes)
        };
        Ok(Scanned {
            index: self.cutting.builder.finish(summary, blob_bytes)?,
            diff_id,
            tar_bytes,
        })
    }
}

/// Cuts the content into chunks.
#[derive(Debug)]
struct Cutting {
    builder: IndexBuilder,
    /// Whether the tar is the blob itself.
    is_stored: bool,
    chunk_bytes_max: u64,
    member: Option<OpenMember>,
    chunk: Option<OpenChunk>,
    /// Where the next byte of the current file belongs in the data file.
    data_offset: u64,
    left_out: &'static [&'static str],
    /// Whether the current entry is.
    is_left_out: bool,
}

/// The member that decoding has reached.
#[derive(Debug)]
struct OpenMember {
    checkpoint: Checkpoint,
    /// Where it starts in the tar.
    tar_offset: u64,
    /// Whether a chunk is in it: else it is not needed.
    has_chunks: bool,
}

/// The chunk that the next bytes continue.
#[derive(Debug)]
struct OpenChunk {
    tar_offset: u64,
    bytes: u64,
    hasher: Hasher,
}

impl Cutting {
    fn event(&mut self, event: Event<'_>, content: &mut dyn ContentSink) -> Result<()> {
        match event {
            Event::Entry(entry) => {
                self.end_chunk()?;
                self.is_left_out = entry.kind == Kind::File && !self.left_out.is_empty() && {
                    let path = clean_path(&entry.path).path;
                    self.left_out.iter().any(|name| path == name.as_bytes())
                };
                if self.is_left_out {
                    return Ok(());
                }
                self.builder.entry(entry)?;
                self.data_offset = self.builder.last_place().map_or(0, |(offset, _)| offset);
                Ok(())
            }
            Event::Hole(_) | Event::Data { .. } if self.is_left_out => Ok(()),
            Event::Hole(bytes) => {
                self.end_chunk()?;
                self.builder.hole(bytes)?;
                self.data_offset += bytes;
                Ok(())
            }
            Event::Data { tar_offset, bytes } => {
                content.content(self.data_offset, bytes)?;
                self.data_offset += bytes.len() as u64;
                self.data(tar_offset, bytes)
            }
        }
    }

    fn data(&mut self, mut tar_offset: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let chunk = self.chunk.get_or_insert_with(|| OpenChunk {
                tar_offset,
                bytes: 0,
                hasher: Hasher::default(),
            });
            let room = self.chunk_bytes_max - chunk.bytes;
            let taken = room.min(bytes.len() as u64);
            let (piece, rest) = bytes.split_at(taken as usize);
            chunk.hasher.update(piece);
            chunk.bytes += taken;
            tar_offset += taken;
            bytes = rest;
            if taken == room {
                self.end_chunk()?;
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self) -> Result<()> {
        let Some(chunk) = self.chunk.take() else {
            return Ok(());
        };
        let (blob_offset, inner_offset) = if self.is_stored {
            self.builder.member(NewMember {
                blob_start: chunk.tar_offset,
                blob_end: chunk.tar_offset + chunk.bytes,
                coding: Coding::Stored,
                bits: 0,
                window: Vec::new(),
                check: None,
            })?;
            (chunk.tar_offset, 0)
        } else {
            let member = self.member.as_mut().ok_or_else(|| {
                let what = format!("tar content at {}", chunk.tar_offset);
                Error::malformed(what, "no place is known from which to decode it")
            })?;
            member.has_chunks = true;
            let inner_offset = chunk.tar_offset - member.tar_offset;
            (member.checkpoint.blob_start, inner_offset)
        };
        self.builder.chunk(NewChunk {
            bytes: chunk.bytes,
            blob_offset,
            inner_offset,
            digest: Some(chunk.hasher.finish()),
        })
    }

    fn checkpoint(&mut self, checkpoint: Checkpoint, tar_offset: u64) -> Result<()> {
        self.end_chunk()?;
        // Where it starts within a byte, the one before it has the first bits of that.
        let shared = u64::from(checkpoint.bits != 0);
        self.end_member(checkpoint.blob_start.saturating_add(shared))?;
        self.member = Some(OpenMember {
            checkpoint,
            tar_offset,
            has_chunks: false,
        });
        Ok(())
    }

    /// The open member reaches up to here in the blob.
    fn end_member(&mut self, blob_end: u64) -> Result<()> {
        match self.member.take().filter(|member| member.has_chunks) {
            Some(OpenMember { checkpoint, .. }) => self.builder.member(NewMember {
                blob_start: checkpoint.blob_start,
                blob_end,
                coding: checkpoint.coding,
                bits: checkpoint.bits,
                window: checkpoint.window,
                check: None,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
