//! Cuts a member's decoded bytes into its chunks and verifies them: what every decoder does with what it decodes.
//!
//! Bytes between chunks (tar headers, padding, what other layers' readers want) are passed over. A chunk without a digest
//! of its own belongs to a member whose compressed bytes have one, and its decoder has checked that before.

use std::ops::Deref;

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::ChunkSink;
use crate::layer::index::{Index, Member};

/// Chunks of the same bytes: one, or several that the index has at the same place.
#[derive(Debug)]
struct Wanted {
    start: u64,
    end: u64,
    digest: Option<Digest>,
    /// Their positions in the chunk table.
    chunks: Vec<u32>,
}

/// The chunks of one member, copied out of the index.
#[derive(Debug)]
pub(super) struct Cutter {
    /// Where the member starts in the blob, for messages.
    blob_start: u64,
    /// In the order of the member.
    wanted: std::vec::IntoIter<Wanted>,
    current: Option<Wanted>,
    hasher: Hasher,
    /// Decoded bytes so far.
    position: u64,
    /// End of the last chunk in the decoded member.
    end: u64,
}

impl Cutter {
    /// The chunks of `member`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the index is damaged.
    pub(super) fn new<B: Deref<Target = [u8]>>(index: &Index<B>, member: &Member) -> Result<Self> {
        let damaged = || Error::malformed("layer index", "the chunks of a member overlap");
        let mut wanted: Vec<Wanted> = Vec::new();
        for number in index.member_chunks(member)? {
            let chunk = index.chunk(number)?;
            let start = chunk.inner_offset;
            let end = start
                .checked_add(chunk.bytes)
                .filter(|&end| end > start)
                .ok_or_else(damaged)?;
            match wanted.last_mut() {
                Some(last) if (last.start, last.end, last.digest) == (start, end, chunk.digest) => {
                    last.chunks.push(number);
                }
                Some(last) if last.end > start => return Err(damaged()),
                _ => wanted.push(Wanted {
                    start,
                    end,
                    digest: chunk.digest,
                    chunks: vec![number],
                }),
            }
        }
        let end = wanted.last().map_or(0, |last| last.end);
        let mut wanted = wanted.into_iter();
        Ok(Self {
            blob_start: member.blob_start,
            current: wanted.next(),
            wanted,
            hasher: Hasher::default(),
            position: 0,
            end,
        })
    }

    /// How many decoded bytes are needed for the last chunk.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Whether all chunks were handed over.
    pub(super) fn is_done(&self) -> bool {
        self.current.is_none()
    }

    /// Takes the next decoded bytes of the member and hands the chunks' parts of them over.
    ///
    /// # Errors
    /// [`Error::Verification`] when a chunk has another digest, and the sink's own.
    pub(super) fn decoded(&mut self, mut decoded: &[u8], sink: &mut dyn ChunkSink) -> Result<()> {
        while let Some(wanted) = &self.current {
            let skipped = wanted
                .start
                .saturating_sub(self.position)
                .min(decoded.len() as u64);
            let (_, rest) = decoded.split_at(skipped as usize);
            self.position += skipped;
            let taken = (wanted.end - self.position).min(rest.len() as u64);
            let (piece, rest) = rest.split_at(taken as usize);
            if !piece.is_empty() {
                if wanted.digest.is_some() {
                    self.hasher.update(piece);
                }
                for &chunk in &wanted.chunks {
                    sink.piece(chunk, self.position - wanted.start, piece)?;
                }
                self.position += taken;
            }
            if self.position < wanted.end {
                return Ok(());
            }
            if let Some(promised) = wanted.digest {
                let actual = std::mem::take(&mut self.hasher).finish();
                if actual != promised {
                    let what = format!("chunk at {} in the member at {}", wanted.start, self.blob_start);
                    return Err(Error::mismatch(what, promised, actual));
                }
            }
            wanted.chunks.iter().try_for_each(|&chunk| sink.verified(chunk))?;
            self.current = self.wanted.next();
            decoded = rest;
        }
        Ok(())
    }
}
