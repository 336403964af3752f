//! Decodes the chunks of one member that is zstd frames.
//!
//! A member that is small, compressed and decoded, is collected, and its frame decoded into room for all of it: libzstd needs
//! no window then, and writers of zstd:chunked claim windows of 32 MiB for frames of 64 KiB. All others are streamed. Behind
//! the last chunk anything may follow (stargz-snapshotter's frames go on with tar headers), so decoding stops there.

use std::ops::Deref;

use ::zstd::zstd_safe::{
    DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, WINDOWLOG_MAX_32, WINDOWLOG_MAX_64,
};

use super::stream::{Stopped, Stream, new_context, set};
use crate::error::{Error, Result};
use crate::layer::cutter::Cutter;
use crate::layer::index::Index;
use crate::layer::{ChunkSink, MemberDecoder, Spare};

/// Members up to so many bytes, compressed and up to their last chunk's end, are decoded at one go: a chunk of the usual
/// 4 MiB, with what compression may add.
const WHOLE_BYTES_MAX: u64 = (4 << 20) + WHOLE_SLACK_BYTES;
/// Room for what a frame holds behind its last chunk: padding and tar headers. If it is more, the frame is streamed.
const WHOLE_SLACK_BYTES: u64 = 64 << 10;

/// The largest that libzstd knows: nothing is allocated for it.
const WINDOW_LOG_MAX: u32 = match usize::BITS {
    32 => WINDOWLOG_MAX_32,
    _ => WINDOWLOG_MAX_64,
};

/// Decodes a member whose chunks were copied out of the index.
pub(in crate::layer) struct ZstdMember {
    /// Where the member starts in the blob, for messages.
    blob_start: u64,
    cutter: Cutter,
    method: Method,
    spare: Spare,
}

/// How the member is decoded.
enum Method {
    /// Collected until all of its range is there.
    Whole { range_bytes: usize, collected: Vec<u8> },
    /// Frame by frame, as the bytes come.
    Streamed(Stream),
    /// A push failed: what comes after that belongs nowhere.
    Failed,
}

impl ZstdMember {
    /// A decoder of member `member`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the index is damaged, [`Error::Io`] without memory.
    pub(in crate::layer) fn new<B: Deref<Target = [u8]>>(
        index: &Index<B>,
        member: u32,
        spare: Spare,
    ) -> Result<Self> {
        let member = index.member(member)?;
        let cutter = Cutter::new(index, &member)?;
        let range_bytes = member.blob_end - member.blob_start;
        let method = if range_bytes.max(cutter.end()) <= WHOLE_BYTES_MAX {
            Method::Whole {
                range_bytes: range_bytes as usize,
                collected: Vec::new(),
            }
        } else {
            Method::Streamed(Stream::new(cutter.end())?)
        };
        Ok(Self {
            blob_start: member.blob_start,
            cutter,
            method,
            spare,
        })
    }

    fn malformed(&self, why: impl Into<String>) -> Error {
        Error::malformed(format!("zstd frames at {}", self.blob_start), why)
    }

    /// Decodes the frames of the member, all of which came in `pieces`.
    fn whole(&mut self, pieces: &[&[u8]], sink: &mut dyn ChunkSink) -> Result<bool> {
        let spare = &mut self.spare;
        let context = match &mut spare.context {
            Some(context) => context,
            none => none.insert(context_for_whole()?),
        };
        match at_one_go(context, pieces, self.cutter.end(), &mut spare.decoded) {
            Some(decoded) => self.cutter.decoded(decoded, sink)?,
            None => {
                let mut stream = Stream::new(self.cutter.end())?;
                for piece in pieces {
                    self.streamed(&mut stream, piece, sink)?;
                }
            }
        }
        if self.cutter.is_done() {
            return Ok(true);
        }
        Err(self.malformed("they end before their last chunk"))
    }

    fn streamed(&mut self, stream: &mut Stream, mut bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        let start = self.blob_start;
        while !self.cutter.is_done() {
            let cutter = &mut self.cutter;
            let stopped =
                stream.decode(&mut bytes, || format!("zstd frames at {start}"), &mut |decoded| {
                    cutter.decoded(decoded, sink)?;
                    Ok(!cutter.is_done())
                })?;
            if stopped == Stopped::InputUsed || (stopped == Stopped::FrameEnded && bytes.is_empty()) {
                break;
            }
        }
        Ok(self.cutter.is_done())
    }

    fn decode(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        if self.cutter.is_done() {
            return Ok(true);
        }
        match std::mem::replace(&mut self.method, Method::Failed) {
            Method::Whole {
                range_bytes,
                mut collected,
            } => {
                // Nearly always one push has all of it, and then nothing is copied.
                if collected.is_empty() && bytes.len() >= range_bytes {
                    return self.whole(&[bytes.get(..range_bytes).unwrap_or(bytes)], sink);
                }
                let missing = range_bytes.saturating_sub(collected.len());
                collected.reserve_exact(missing);
                collected.extend_from_slice(bytes.get(..missing).unwrap_or(bytes));
                if collected.len() == range_bytes {
                    return self.whole(&[&collected], sink);
                }
                self.method = Method::Whole {
                    range_bytes,
                    collected,
                };
                Ok(false)
            }
            Method::Streamed(mut stream) => {
                let is_done = self.streamed(&mut stream, bytes, sink)?;
                self.method = Method::Streamed(stream);
                Ok(is_done)
            }
            Method::Failed => Err(self.malformed("it failed before")),
        }
    }
}

impl MemberDecoder for ZstdMember {
    fn push(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        self.decode(bytes, sink)
    }

    fn push_all(&mut self, pieces: &[&[u8]], sink: &mut dyn ChunkSink) -> Result<bool> {
        if matches!(&self.method, Method::Whole { collected, .. } if collected.is_empty()) {
            self.method = Method::Failed;
            return self.whole(pieces, sink);
        }
        for piece in pieces {
            if self.push(piece, sink)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn into_spare(self: Box<Self>) -> Spare {
        self.spare
    }
}

/// A context that decodes into one buffer for all of a frame. It needs no window, so a frame may claim any.
fn context_for_whole() -> Result<DCtx<'static>> {
    let mut context = new_context()?;
    set(&mut context, DParameter::StableOutBuffer(true))?;
    set(&mut context, DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
    Ok(context)
}

/// What the first frame in `pieces`, which are one behind the other, decodes to, in `room`. `None` if that is less than
/// `wanted` bytes, more than there is room for, or broken: streaming says which.
fn at_one_go<'r>(
    context: &mut DCtx<'static>,
    pieces: &[&[u8]],
    wanted: u64,
    room: &'r mut Vec<u8>,
) -> Option<&'r [u8]> {
    // Whatever became of the last one.
    context.reset(ResetDirective::SessionOnly).ok()?;
    let room_bytes = (wanted + WHOLE_SLACK_BYTES) as usize;
    room.resize(room.len().max(room_bytes), 0);
    let (mut made, mut has_ended) = (0, false);
    for piece in pieces {
        let mut from = InBuffer::around(piece);
        while from.pos() < piece.len() && !has_ended {
            let before = (from.pos(), made);
            let mut to = OutBuffer::around_pos(room.get_mut(..room_bytes)?, made);
            has_ended = context.decompress_stream(&mut to, &mut from).ok()? == 0;
            made = to.pos();
            if before == (from.pos(), made) {
                return None;
            }
        }
    }
    room.get(..made)
        .filter(|decoded| has_ended && decoded.len() as u64 >= wanted)
}
