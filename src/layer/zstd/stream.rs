//! libzstd's streaming decoder, with a bounded window and one scratch buffer for what it makes.

use ::zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::frames::WINDOW_BYTES_MAX;
use crate::error::{Error, Result};

/// Decoded bytes at a time, the size of zstd's largest block: small enough for the L2 cache.
const SCRATCH_BYTES: u64 = 128 << 10;

/// Why a [`Stream`] stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// A frame is complete, its checksum included; another may follow.
    FrameEnded,
    /// All input was used.
    InputUsed,
    /// The receiver has enough.
    Enough,
}

/// A decoder of frames, one behind the other.
pub(super) struct Stream {
    context: DCtx<'static>,
    scratch: Vec<u8>,
}

/// A context of libzstd.
///
/// # Errors
/// [`Error::Io`] without memory.
pub(super) fn new_context() -> Result<DCtx<'static>> {
    DCtx::try_create().ok_or_else(|| Error::io("zstd", &out_of_memory()))
}

/// Sets a parameter of a context.
///
/// # Errors
/// [`Error::Malformed`] when libzstd does not take it.
pub(super) fn set(context: &mut DCtx<'static>, parameter: DParameter) -> Result<()> {
    let set = context.set_parameter(parameter);
    set.map(drop)
        .map_err(|code| Error::malformed("zstd", get_error_name(code)))
}

fn out_of_memory() -> std::io::Error {
    std::io::ErrorKind::OutOfMemory.into()
}

impl Stream {
    /// A decoder whose receiver wants about `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::Io`] without memory.
    pub(super) fn new(bytes: u64) -> Result<Self> {
        let mut context = new_context()?;
        set(&mut context, DParameter::WindowLogMax(WINDOW_BYTES_MAX.ilog2()))?;
        Ok(Self {
            context,
            scratch: vec![0; bytes.clamp(1, SCRATCH_BYTES) as usize],
        })
    }

    /// Decodes from `input`, from which it takes what it used, and hands the bytes to `out`, which says whether it wants
    /// more. Stops after each frame.
    ///
    /// # Errors
    /// [`Error::Malformed`] about `what`, and those of `out`.
    pub(super) fn decode(
        &mut self,
        input: &mut &[u8],
        what: impl Fn() -> String,
        out: &mut dyn FnMut(&[u8]) -> Result<bool>,
    ) -> Result<Stopped> {
        loop {
            let mut from = InBuffer::around(input);
            let mut to = OutBuffer::around(self.scratch.as_mut_slice());
            let missing = self
                .context
                .decompress_stream(&mut to, &mut from)
                .map_err(|code| Error::malformed(what(), get_error_name(code)))?;
            let (taken, made) = (from.pos(), to.pos());
            *input = input.get(taken..).unwrap_or_default();
            let goes_on = made == 0 || out(self.scratch.get(..made).unwrap_or_default())?;
            if !goes_on {
                return Ok(Stopped::Enough);
            }
            if missing == 0 {
                return Ok(Stopped::FrameEnded);
            }
            if input.is_empty() && made < self.scratch.len() {
                return Ok(Stopped::InputUsed);
            }
        }
    }
}
