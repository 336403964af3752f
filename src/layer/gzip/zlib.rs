//! Raw inflate with what flate2 does not offer: stops at the boundaries of deflate blocks, and starts at them.
//!
//! The only place that calls zlib's C interface (of zlib-rs, so both sides are Rust). What makes it sound:
//! - The stream is set up by `inflateInit2_` before it exists as a value here, and freed once, when it is dropped.
//! - It lives in a box, so its address never changes, and nobody else has a pointer to it.
//! - Input and output are slices, borrowed for one call of `inflate`. Their addresses and lengths are put into the stream
//!   before that call and taken out after it; between calls the stream has none that anybody reads.
#![allow(unsafe_code)]

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateInit2_, inflatePrime,
    inflateReset, inflateSetDictionary, z_stream, zlibVersion,
};

/// Raw deflate with a window of 32 KiB, in the terms of `inflateInit2_`.
const RAW_WINDOW_BITS: i32 = -15;
/// In `data_type`: how many bits of the last byte taken are not used yet, where inflate stopped at a block boundary.
const UNUSED_BITS: i32 = 0x3f;
/// In `data_type`: the current block is the last one.
const IN_LAST_BLOCK: i32 = 64;
/// In `data_type`: inflate stopped between two blocks.
const BETWEEN_BLOCKS: i32 = 128;

/// Why a call of [`Inflate::run`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Input or output is used up.
    Used,
    /// Between two blocks: the next one starts within the last byte taken, with this many of its bits, the high ones, or
    /// with the next byte if there are none.
    Block(u8),
    /// The last block has ended.
    End,
    /// What comes next is no valid deflate. What was made before is good.
    Broken,
}

/// What a call of [`Inflate::run`] has done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    /// Bytes of the input that were taken.
    pub(super) taken: usize,
    /// Bytes of the output that were written.
    pub(super) made: usize,
    /// Why it ended.
    pub(super) stop: Stop,
}

impl Step {
    /// Whether nothing happens any more without more input or more room.
    pub(super) fn is_stuck(&self) -> bool {
        self.stop == Stop::Used && self.taken == 0 && self.made == 0
    }
}

/// What is wrong where a run stops with [`Stop::Broken`].
pub(super) const BROKEN: &str = "it is no valid deflate stream";

/// What is wrong with compressed bytes, or with what they were to be decoded with.
type Outcome<T> = std::result::Result<T, &'static str>;

/// A raw deflate stream that is being decoded.
pub(super) struct Inflate {
    stream: Box<z_stream>,
}

impl std::fmt::Debug for Inflate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflate").finish_non_exhaustive()
    }
}

// SAFETY: the stream and what it points to belong to this value alone, are plain memory from the global allocator, and no
// thread has a part in them.
unsafe impl Send for Inflate {}

impl Inflate {
    /// A stream before its first byte.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(super) fn new() -> Outcome<Self> {
        let mut stream = Box::<z_stream>::default();
        // SAFETY: the stream is exclusive and valid, with zlib-rs's own allocator; version and size are those of the library
        // that is called.
        let code = unsafe {
            inflateInit2_(
                &raw mut *stream,
                RAW_WINDOW_BITS,
                zlibVersion(),
                size_of::<z_stream>() as i32,
            )
        };
        if code == Z_OK {
            Ok(Self { stream })
        } else {
            Err("inflate cannot be set up")
        }
    }

    /// Forgets all: the next byte is the first of another stream.
    pub(super) fn reset(&mut self) {
        // SAFETY: the stream is exclusive and was set up by `new`. It cannot fail for such a stream.
        unsafe { inflateReset(&raw mut *self.stream) };
    }

    /// Starts within a byte: `bits` (at most 7) high bits of `byte` come before the next input. Only before the first run.
    ///
    /// # Errors
    /// When `bits` are more.
    pub(super) fn prime(&mut self, bits: u8, byte: u8) -> Outcome<()> {
        if bits > 7 {
            return Err("it starts within a byte with more than 7 bits of it");
        }
        if bits == 0 {
            return Ok(());
        }
        // SAFETY: the stream is exclusive and was set up by `new`.
        let code = unsafe {
            inflatePrime(
                &raw mut *self.stream,
                i32::from(bits),
                i32::from(byte) >> (8 - bits),
            )
        };
        if code == Z_OK {
            Ok(())
        } else {
            Err("it cannot start within a byte")
        }
    }

    /// What was decoded before the first run, or its last 32 KiB.
    ///
    /// # Errors
    /// When it is refused, which a raw stream never does.
    pub(super) fn set_window(&mut self, window: &[u8]) -> Outcome<()> {
        let bytes = u32::try_from(window.len()).map_err(|_| "its window is too large")?;
        // SAFETY: the stream is exclusive and was set up by `new`; address and length are those of a slice, which is copied.
        let code = unsafe { inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), bytes) };
        if code == Z_OK {
            Ok(())
        } else {
            Err("its window is refused")
        }
    }

    /// Decodes from `input` into `output` until one is used up, the stream ends, or, if `to_block`, up to the end of the
    /// current block at most.
    pub(super) fn run(&mut self, input: &[u8], output: &mut [u8], to_block: bool) -> Step {
        let (given, room) = (clamp(input.len()), clamp(output.len()));
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr();
        stream.avail_in = given;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = room;
        let flush = if to_block { Z_BLOCK } else { Z_NO_FLUSH };
        // SAFETY: the stream is exclusive and was set up by `new`; the addresses and lengths are those of slices that are
        // borrowed for longer than the call, for reading and for writing, and are taken out right after it.
        let code = unsafe { inflate(&raw mut *stream, flush) };
        let taken = given.saturating_sub(stream.avail_in) as usize;
        let made = room.saturating_sub(stream.avail_out) as usize;
        stream.next_in = std::ptr::null();
        stream.avail_in = 0;
        stream.next_out = std::ptr::null_mut();
        stream.avail_out = 0;
        let is_between = stream.data_type & (BETWEEN_BLOCKS | IN_LAST_BLOCK) == BETWEEN_BLOCKS;
        let stop = match code {
            Z_STREAM_END => Stop::End,
            // The end of a block may be in bits that were taken before, which zlib calls no progress.
            Z_OK | Z_BUF_ERROR if is_between => Stop::Block((stream.data_type & UNUSED_BITS) as u8),
            Z_OK | Z_BUF_ERROR => Stop::Used,
            _ => Stop::Broken,
        };
        Step { taken, made, stop }
    }
}

/// zlib counts in 32 bits; what is beyond is left for the next run.
fn clamp(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream is exclusive, was set up by `new`, and is not used after this.
        unsafe { inflateEnd(&raw mut *self.stream) };
    }
}
