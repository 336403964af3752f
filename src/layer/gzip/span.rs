//! Decodes the chunks of one span: raw deflate from a checkpoint on, over the ends of gzip members.
//!
//! Decoding stops after the span's last chunk, so no trailer is relied on: chunks have digests of their own. Where they
//! have none, the span's compressed bytes have one; then they are collected whole and checked before the first of them is
//! decoded, because nothing behind would notice what they became.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::layer::checked::Checked;
use crate::layer::cutter::Cutter;
use crate::layer::gzip::TRAILER_BYTES;
use crate::layer::gzip::header::Header;
use crate::layer::gzip::window;
use crate::layer::gzip::zlib::{BROKEN, Inflate, Stop};
use crate::layer::index::Index;
use crate::layer::{ChunkSink, MemberDecoder};

/// Decoded bytes at a time: large enough to hash and hand over at full speed, small enough for the L2 cache.
const SCRATCH_BYTES: u64 = 128 << 10;
/// What the next byte of the span belongs to.
#[derive(Debug)]
enum Stage {
    /// The byte within which the span starts, with this many bits.
    First(u8),
    /// A deflate stream.
    Body,
    /// A member's trailer, of which so many bytes are still to come.
    Trailer(usize),
    /// The header of the next member.
    Header(Header),
}

/// Decodes a span whose chunks were copied out of the index.
#[derive(Debug)]
pub(in crate::layer) struct Span {
    /// Where the span starts in the blob, for messages.
    blob_start: u64,
    /// What must be checked first, until it is.
    checked: Checked,
    stage: Stage,
    inflate: Inflate,
    scratch: Vec<u8>,
    cutter: Cutter,
    /// Whether a push failed: what comes after that belongs nowhere.
    failed: bool,
}

impl Span {
    /// A decoder of member `member`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the index is damaged, or its window is none.
    pub(in crate::layer) fn new<B: Deref<Target = [u8]>>(index: &Index<B>, member: u32) -> Result<Self> {
        let member = index.member(member)?;
        let cutter = Cutter::new(index, &member)?;
        let scratch_bytes = cutter.end().min(SCRATCH_BYTES);
        let refuse = |why: &str| Error::malformed(what(member.blob_start), why);
        if member.bits > 7 {
            return Err(refuse("it starts within a byte with more than 7 bits of it"));
        }
        let mut inflate = Inflate::new().map_err(refuse)?;
        let window = window::unpack(index.window(&member)?)?;
        // Bits and window may come in any order, but both before the first byte.
        inflate.set_window(&window).map_err(refuse)?;
        Ok(Self {
            blob_start: member.blob_start,
            checked: Checked::new(index, &member, what(member.blob_start))?,
            stage: match member.bits {
                0 => Stage::Body,
                bits => Stage::First(bits),
            },
            inflate,
            scratch: vec![0; scratch_bytes as usize],
            cutter,
            failed: false,
        })
    }

    fn malformed(&self, why: &str) -> Error {
        Error::malformed(what(self.blob_start), why)
    }

    /// Collects the span's bytes where they must be checked, and decodes what may be decoded.
    fn check_and_decode(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        match self.checked.pass(bytes)? {
            Some(bytes) => self.decode(&bytes, sink),
            None => Ok(false),
        }
    }

    fn decode(&mut self, mut bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        while !self.cutter.is_done() && !bytes.is_empty() {
            let taken = match &mut self.stage {
                Stage::First(bits) => {
                    let first = bytes.first().copied().unwrap_or_default();
                    let primed = self.inflate.prime(*bits, first);
                    primed.map_err(|why| self.malformed(why))?;
                    self.stage = Stage::Body;
                    1
                }
                Stage::Body => self.body(bytes, sink)?,
                Stage::Trailer(missing) => {
                    let taken = (*missing).min(bytes.len());
                    *missing -= taken;
                    if *missing == 0 {
                        self.stage = Stage::Header(Header::default());
                    }
                    taken
                }
                Stage::Header(header) => match header.take(bytes) {
                    Ok(Some(taken)) => {
                        self.inflate.reset();
                        self.stage = Stage::Body;
                        taken
                    }
                    Ok(None) => bytes.len(),
                    Err(why) => return Err(self.malformed(why)),
                },
            };
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(self.cutter.is_done())
    }

    /// Decodes up to the end of `bytes`, of the deflate stream, or of the last chunk.
    fn body(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<usize> {
        let mut taken = 0;
        while !self.cutter.is_done() {
            let input = bytes.get(taken..).unwrap_or_default();
            let step = self.inflate.run(input, &mut self.scratch, false);
            taken += step.taken;
            self.cutter
                .decoded(self.scratch.get(..step.made).unwrap_or_default(), sink)?;
            // Behind the last chunk anything may follow, however much of it came with this piece.
            if step.stop == Stop::Broken && !self.cutter.is_done() {
                return Err(self.malformed(BROKEN));
            }
            if step.stop == Stop::End {
                self.stage = Stage::Trailer(TRAILER_BYTES);
                break;
            }
            if step.is_stuck() {
                break;
            }
        }
        Ok(taken)
    }
}

fn what(blob_start: u64) -> String {
    format!("gzip span at {blob_start}")
}

impl MemberDecoder for Span {
    fn push(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        if self.failed {
            return Err(self.malformed("it failed before"));
        }
        let outcome = self.check_and_decode(bytes, sink);
        self.failed = outcome.is_err();
        outcome
    }
}
