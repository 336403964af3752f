//! Plain gzip: decompressed once from end to end, and from then on read at random.
//!
//! A gzip file has no table of contents and no places to start at, but at every boundary between two deflate blocks
//! decoding can start, for whoever knows the 32 KiB that came before (RFC 1951, 3.2). [`decompress`] notes such places
//! while it goes over the blob, [`span`] decodes from one of them. Both inflate raw deflate and take the framing of
//! gzip off themselves: that makes the end of one member and the start of the next the same thing everywhere.

pub(super) mod decompress;
pub(super) mod header;
pub(super) mod span;
pub mod window;
mod zlib;

#[cfg(test)]
mod tests;

/// Length of the trailer (CRC32 and ISIZE) behind each member's deflate stream in bytes.
const TRAILER_BYTES: usize = 8;
