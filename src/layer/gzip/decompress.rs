//! Decompresses a gzip blob in one pass and notes the places from which decoding can start again.
//!
//! Output goes into one linear buffer whose first 32 KiB are what came before, so that the window of a place is there
//! without being kept for every place. zlib is asked to stop at block boundaries only when a place is due: elsewhere this
//! is plain inflate.

use crate::error::{Error, Result};
use crate::layer::gzip::TRAILER_BYTES;
use crate::layer::gzip::header::Header;
use crate::layer::gzip::window::{self, WINDOW_BYTES_MAX};
use crate::layer::gzip::zlib::{BROKEN, Inflate, Stop};
use crate::layer::index::Coding;
use crate::layer::{Checkpoint, Decoded, Decompressor, Format};

/// Decoded bytes between two checkpoints: at the first block boundary behind this many. A file that left the cache costs
/// about one such span, and the windows (at some 12 KiB each) less than 1 % of the blob.
const SPACING_BYTES: u64 = 4 << 20;
/// The same between a checkpoint and the start of a gzip member, which needs no window and so costs 48 bytes only.
const MEMBER_SPACING_BYTES: u64 = 1 << 20;
/// Decoded bytes that are handed over at a time: few enough calls, and small enough for the L2 cache.
const PIECE_BYTES: usize = 256 << 10;

/// What the next byte of the blob belongs to.
#[derive(Debug)]
enum Stage {
    /// A member's header; where a member has ended before it, the blob may end instead.
    Header(Header),
    /// A deflate stream.
    Body,
    /// A trailer, with its bytes so far.
    Trailer([u8; TRAILER_BYTES], usize),
    /// Zeros behind the last member, as gzip itself passes over them.
    Padding,
}

/// A gzip blob on its way through.
#[derive(Debug)]
pub(in crate::layer) struct GzipPass {
    stage: Stage,
    /// Set up with the first member.
    inflate: Option<Inflate>,
    /// What came before, and decoded bytes behind it up to `filled`.
    buffer: Vec<u8>,
    /// End of what was handed over in the buffer.
    handed: usize,
    filled: usize,
    /// Bytes of the blob that were taken, and bytes that were decoded, all in all.
    taken: u64,
    made: u64,
    /// Where the current member starts in the blob, for messages, and in the decoded bytes.
    member_start: u64,
    member_made: u64,
    /// How many members have begun.
    members: u64,
    /// CRC32 of what was decoded of the current member.
    crc: crc32fast::Hasher,
    /// Decoded bytes before the last checkpoint.
    last_checkpoint: u64,
    /// [`SPACING_BYTES`], and [`MEMBER_SPACING_BYTES`].
    spacing_bytes: u64,
    member_spacing_bytes: u64,
}

impl Default for GzipPass {
    fn default() -> Self {
        Self::with_spacing(SPACING_BYTES, MEMBER_SPACING_BYTES)
    }
}

/// Where what is decoded goes.
type Out<'o> = &'o mut dyn FnMut(Decoded<'_>) -> Result<()>;

impl Decompressor for GzipPass {
    fn format(&self) -> Format {
        Format::Gzip
    }

    fn push(&mut self, mut blob: &[u8], out: Out<'_>) -> Result<()> {
        while !blob.is_empty() {
            let taken = match &mut self.stage {
                Stage::Header(_) => self.header(blob, out)?,
                Stage::Body => self.body(blob, out)?,
                Stage::Trailer(..) => self.trailer(blob)?,
                Stage::Padding => self.padding(blob)?,
            };
            self.taken += taken as u64;
            blob = blob.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    fn finish(&mut self, out: Out<'_>) -> Result<()> {
        self.hand_over(out)?;
        match &self.stage {
            Stage::Header(header) if header.is_empty() && self.members > 0 => Ok(()),
            Stage::Padding => Ok(()),
            _ => Err(self.malformed("the blob ends within it")),
        }
    }
}

impl GzipPass {
    /// A pass with other distances between checkpoints than the usual ones, at least 1 byte each.
    pub(super) fn with_spacing(spacing_bytes: u64, member_spacing_bytes: u64) -> Self {
        Self {
            stage: Stage::Header(Header::default()),
            inflate: None,
            buffer: vec![0; WINDOW_BYTES_MAX + PIECE_BYTES],
            handed: WINDOW_BYTES_MAX,
            filled: WINDOW_BYTES_MAX,
            taken: 0,
            made: 0,
            member_start: 0,
            member_made: 0,
            members: 0,
            crc: crc32fast::Hasher::new(),
            last_checkpoint: 0,
            spacing_bytes: spacing_bytes.max(1),
            member_spacing_bytes: member_spacing_bytes.max(1),
        }
    }

    fn malformed(&self, why: &str) -> Error {
        Error::malformed(format!("gzip member at {}", self.member_start), why)
    }

    /// Decoded bytes behind the last checkpoint.
    fn since_checkpoint(&self) -> u64 {
        self.made.saturating_sub(self.last_checkpoint)
    }

    /// Skips a header; behind it a member starts.
    fn header(&mut self, blob: &[u8], out: Out<'_>) -> Result<usize> {
        let Stage::Header(header) = &mut self.stage else {
            return Ok(0);
        };
        if header.is_empty() {
            self.member_start = self.taken;
            if self.members > 0 && blob.first() == Some(&0) {
                self.stage = Stage::Padding;
                return Ok(0);
            }
        }
        let header_end = match header.take(blob) {
            Ok(header_end) => header_end,
            Err(why) => return Err(self.malformed(why)),
        };
        let Some(taken) = header_end else {
            return Ok(blob.len());
        };
        match &mut self.inflate {
            Some(inflate) => inflate.reset(),
            none => *none = Some(Inflate::new().map_err(|why| Error::malformed("gzip", why))?),
        }
        self.stage = Stage::Body;
        self.members += 1;
        self.member_made = self.made;
        self.crc = crc32fast::Hasher::new();
        if self.members == 1 || self.since_checkpoint() >= self.member_spacing_bytes {
            self.checkpoint(self.taken + taken as u64, 0, out)?;
        }
        Ok(taken)
    }

    /// Decodes all of `blob`, or up to the end of the member.
    fn body(&mut self, blob: &[u8], out: Out<'_>) -> Result<usize> {
        let mut taken = 0;
        loop {
            if self.filled == self.buffer.len() {
                self.hand_over(out)?;
            }
            let to_go = self.spacing_bytes.saturating_sub(self.since_checkpoint());
            let is_due = to_go == 0;
            let input = blob.get(taken..).unwrap_or_default();
            let mut room = self.buffer.get_mut(self.filled..).unwrap_or_default();
            if !is_due && to_go < room.len() as u64 {
                room = room.get_mut(..to_go as usize).unwrap_or_default();
            }
            let Some(inflate) = &mut self.inflate else {
                return Err(self.malformed("no member has begun"));
            };
            let step = inflate.run(input, room, is_due);
            let decoded = self.buffer.get(self.filled..self.filled + step.made);
            self.crc.update(decoded.unwrap_or_default());
            taken += step.taken;
            self.filled += step.made;
            self.made += step.made as u64;
            match step.stop {
                Stop::Broken => return Err(self.malformed(BROKEN)),
                Stop::End => {
                    self.stage = Stage::Trailer([0; TRAILER_BYTES], 0);
                    return Ok(taken);
                }
                // More than 7 bits would be whole bytes that belong back to the input: not a place by byte and bits.
                Stop::Block(bits) if is_due && bits <= 7 => {
                    self.checkpoint(self.taken + taken as u64, bits, out)?;
                }
                _ if step.is_stuck() => return Ok(taken),
                _ => {}
            }
        }
    }

    /// Hands over what is decoded so far, and then the place behind it, `bits` bits before byte `blob_position`.
    fn checkpoint(&mut self, blob_position: u64, bits: u8, out: Out<'_>) -> Result<()> {
        self.hand_over(out)?;
        let of_member = self.made.saturating_sub(self.member_made);
        let window_bytes = of_member.min(WINDOW_BYTES_MAX as u64) as usize;
        let window = self
            .buffer
            .get(self.filled.saturating_sub(window_bytes)..self.filled);
        let window = window::pack(window.unwrap_or_default())?;
        self.last_checkpoint = self.made;
        out(Decoded::Checkpoint(Checkpoint {
            blob_start: blob_position.saturating_sub(u64::from(bits > 0)),
            coding: Coding::Deflate,
            bits,
            window,
        }))
    }

    /// Hands over what is decoded and not handed over yet, and makes room.
    fn hand_over(&mut self, out: Out<'_>) -> Result<()> {
        let decoded = self.buffer.get(self.handed..self.filled).unwrap_or_default();
        if !decoded.is_empty() {
            out(Decoded::Bytes(decoded))?;
        }
        self.handed = self.filled;
        if self.filled == self.buffer.len() {
            let history = self.filled.saturating_sub(WINDOW_BYTES_MAX);
            self.buffer.copy_within(history.., 0);
            (self.handed, self.filled) = (WINDOW_BYTES_MAX, WINDOW_BYTES_MAX);
        }
        Ok(())
    }

    /// Collects and checks a trailer.
    fn trailer(&mut self, blob: &[u8]) -> Result<usize> {
        let Stage::Trailer(trailer, have) = &mut self.stage else {
            return Ok(0);
        };
        let room = trailer.get_mut(*have..).unwrap_or_default();
        let taken = room.len().min(blob.len());
        for (byte, given) in room.iter_mut().zip(blob) {
            *byte = *given;
        }
        *have += taken;
        if *have < TRAILER_BYTES {
            return Ok(taken);
        }
        let [c0, c1, c2, c3, s0, s1, s2, s3] = *trailer;
        let promised = (
            u32::from_le_bytes([c0, c1, c2, c3]),
            u32::from_le_bytes([s0, s1, s2, s3]),
        );
        let crc = std::mem::take(&mut self.crc).finalize();
        // RFC 1952, 2.3.1: ISIZE is the size modulo 2^32.
        let actual = (crc, self.made.wrapping_sub(self.member_made) as u32);
        if promised != actual {
            let show = |(crc, bytes): (u32, u32)| format!("crc32:{crc:08x} of {bytes} bytes");
            let what = format!("gzip member at {}", self.member_start);
            return Err(Error::mismatch(what, show(promised), show(actual)));
        }
        self.stage = Stage::Header(Header::default());
        Ok(taken)
    }

    fn padding(&self, blob: &[u8]) -> Result<usize> {
        if blob.iter().all(|&byte| byte == 0) {
            Ok(blob.len())
        } else {
            Err(self.malformed("what follows the last member is neither a member nor zeros"))
        }
    }
}
