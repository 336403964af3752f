//! Decodes the chunks of one gzip member.
//!
//! Decoding starts at the member's first byte and stops after its last chunk: behind it stand tar headers of unknown
//! length, and often a second member without chunks. So the member's CRC is not reached, and need not be: every chunk has
//! a sha256 of its own. What is not a chunk is inflated into the same scratch buffer and dropped.

use std::ops::Deref;

use flate2::{Decompress, FlushDecompress, Status};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::index::Index;
use crate::layer::{ChunkSink, MemberDecoder};

/// Decoded bytes at a time: large enough to hash and hand over at full speed, small enough for the L2 cache.
const SCRATCH_BYTES: u64 = 128 << 10;
/// Longest gzip header in bytes: an extra field of 64 KiB, and name and comment.
const HEADER_BYTES_MAX: usize = 72 << 10;

/// Chunks of the same bytes: one, or several that the index has at the same place.
#[derive(Debug)]
struct Wanted {
    start: u64,
    end: u64,
    digest: Digest,
    /// Their positions in the chunk table.
    chunks: Vec<u32>,
}

/// Decodes a member whose chunks were copied out of the index.
#[derive(Debug)]
pub(in crate::layer) struct GzipMember {
    /// Where the member starts in the blob, for messages.
    blob_start: u64,
    /// The header's bytes, until it is complete.
    header: Option<Vec<u8>>,
    inflate: Decompress,
    scratch: Vec<u8>,
    /// In the order of the member.
    wanted: std::vec::IntoIter<Wanted>,
    current: Option<Wanted>,
    hasher: Hasher,
    /// Decoded bytes so far.
    position: u64,
}

impl GzipMember {
    /// A decoder of member `member`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the index is damaged.
    pub(in crate::layer) fn new<B: Deref<Target = [u8]>>(index: &Index<B>, member: u32) -> Result<Self> {
        let member = index.member(member)?;
        let damaged = || Error::malformed("layer index", "the chunks of a member overlap");
        let mut wanted: Vec<Wanted> = Vec::new();
        for number in index.member_chunks(&member)? {
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
        let scratch_bytes = wanted.last().map_or(0, |last| last.end).min(SCRATCH_BYTES);
        let mut wanted = wanted.into_iter();
        Ok(Self {
            blob_start: member.blob_start,
            header: Some(Vec::new()),
            inflate: Decompress::new(false),
            scratch: vec![0; scratch_bytes as usize],
            current: wanted.next(),
            wanted,
            hasher: Hasher::default(),
            position: 0,
        })
    }

    fn malformed(&self, why: impl Into<String>) -> Error {
        Error::malformed(format!("gzip member at {}", self.blob_start), why)
    }

    /// Takes what belongs to the header off `bytes`. Returns nothing while the header goes on.
    fn skip_header<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<&'b [u8]>> {
        let Some(mut header) = self.header.take() else {
            return Ok(Some(bytes));
        };
        let before = header.len();
        let taken = bytes.len().min(HEADER_BYTES_MAX - before);
        header.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        match header_bytes(&header).map_err(|why| self.malformed(why))? {
            Some(len) => Ok(bytes.get(len.saturating_sub(before)..)),
            None if header.len() >= HEADER_BYTES_MAX => Err(self.malformed("its header is too long")),
            None => {
                self.header = Some(header);
                Ok(None)
            }
        }
    }

    /// Hands the chunks' parts of newly decoded bytes over.
    fn deliver(&mut self, mut decoded: &[u8], sink: &mut dyn ChunkSink) -> Result<()> {
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
                self.hasher.update(piece);
                for &chunk in &wanted.chunks {
                    sink.piece(chunk, self.position - wanted.start, piece)?;
                }
                self.position += taken;
            }
            if self.position < wanted.end {
                return Ok(());
            }
            let actual = std::mem::take(&mut self.hasher).finish();
            if actual != wanted.digest {
                let what = format!(
                    "chunk at {} in the gzip member at {}",
                    wanted.start, self.blob_start
                );
                return Err(Error::mismatch(what, wanted.digest, actual));
            }
            wanted.chunks.iter().try_for_each(|&chunk| sink.verified(chunk))?;
            self.current = self.wanted.next();
            decoded = rest;
        }
        Ok(())
    }
}

impl MemberDecoder for GzipMember {
    fn push(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        let Some(mut input) = self.skip_header(bytes)? else {
            return Ok(false);
        };
        let mut scratch = std::mem::take(&mut self.scratch);
        while self.current.is_some() {
            let (taken, made) = (self.inflate.total_in(), self.inflate.total_out());
            let status = self
                .inflate
                .decompress(input, &mut scratch, FlushDecompress::None)
                .map_err(|e| self.malformed(e.to_string()))?;
            let taken = (self.inflate.total_in() - taken) as usize;
            let made = (self.inflate.total_out() - made) as usize;
            input = input.get(taken..).unwrap_or_default();
            self.deliver(scratch.get(..made).unwrap_or_default(), sink)?;
            if status == Status::StreamEnd && self.current.is_some() {
                return Err(self.malformed("it ends before its last chunk"));
            }
            if input.is_empty() && made < scratch.len() {
                break;
            }
            if taken == 0 && made == 0 {
                return Err(self.malformed("it cannot be decoded further"));
            }
        }
        self.scratch = scratch;
        Ok(self.current.is_none())
    }
}

/// Length of the gzip header (RFC 1952, 2.3) at the start of `bytes`; nothing while it is not complete.
fn header_bytes(bytes: &[u8]) -> std::result::Result<Option<usize>, &'static str> {
    const CRC: u8 = 2;
    const EXTRA: u8 = 4;
    const NAME: u8 = 8;
    const COMMENT: u8 = 16;
    const RESERVED: u8 = 0xe0;
    if !bytes.starts_with(&[0x1f, 0x8b, 8]) && bytes.len() >= 3 {
        return Err("it does not start like gzip");
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<10>() else {
        return Ok(None);
    };
    let flags = fixed[3];
    if flags & RESERVED != 0 {
        return Err("its header has flags that no reader knows");
    }
    let mut rest = rest;
    if flags & EXTRA != 0 {
        let Some((len, behind)) = rest.split_first_chunk::<2>() else {
            return Ok(None);
        };
        let Some(behind) = behind.get(usize::from(u16::from_le_bytes(*len))..) else {
            return Ok(None);
        };
        rest = behind;
    }
    for text in [NAME, COMMENT] {
        if flags & text != 0 {
            let Some(end) = rest.iter().position(|&byte| byte == 0) else {
                return Ok(None);
            };
            rest = rest.get(end + 1..).unwrap_or_default();
        }
    }
    if flags & CRC != 0 {
        let Some((_, behind)) = rest.split_first_chunk::<2>() else {
            return Ok(None);
        };
        rest = behind;
    }
    Ok(Some(bytes.len() - rest.len()))
}
