//! zstd: decompressing whole blobs, and members that are zstd frames.
//!
//! libzstd cannot save its state in the middle of a frame, so the starts of frames are the only places to decode from.
//! Most tools write one frame a layer: such a blob has one member. Memory for a window is bounded by
//! [`frames::WINDOW_BYTES_MAX`], and where all of a frame's output is small, none is allocated whatever its header claims.

mod decompress;
mod frames;
mod member;
mod stream;

#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use crate::layer::spool::{self, Spool, Spooled};

pub(super) use decompress::ZstdDecompressor;
pub(super) use frames::{SKIPPABLE_HEADER_BYTES, is_zstd};
pub(super) use member::ZstdMember;

/// Decompresses all frames of `compressed` into `spool`, which give at most `bytes_max` bytes.
///
/// # Errors
/// [`Error::Malformed`] about `what` when they are no frames or give more; those of the spool.
pub(super) fn unpack(
    what: &str,
    compressed: &[u8],
    bytes_max: u64,
    mut spool: Box<dyn Spool>,
) -> Result<Spooled> {
    let broken = |e: std::io::Error| Error::malformed(what, format!("its zstd cannot be decoded: {e}"));
    let mut decoder = ::zstd::stream::read::Decoder::with_buffer(compressed).map_err(broken)?;
    decoder
        .window_log_max(frames::WINDOW_BYTES_MAX.ilog2())
        .map_err(broken)?;
    let bytes = spool::copy(decoder, bytes_max.saturating_add(1), &mut *spool, broken)?;
    if bytes > bytes_max {
        let why = format!(
            "more than {bytes_max} bytes from {} compressed ones are too many",
            compressed.len()
        );
        return Err(Error::malformed(what, why));
    }
    spool.finish()
}
