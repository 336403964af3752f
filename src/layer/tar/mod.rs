//! Tar, as container layers are made of it: `write` writes it, `scan` reads it from a stream as Go's `archive/tar` does,
//! because that is what every container engine reads layers with. What an engine finds in a layer is what is found here,
//! and what it refuses is refused.
//!
//! `header` understands one block, `pax` extended headers, `sparse` the maps of sparse files.

mod header;
mod pax;
pub mod scan;
mod sparse;
#[cfg(test)]
pub(in crate::layer) mod tests;
mod write;

pub use write::{header, read_plain_header};

/// Headers and padded payloads are multiples of this.
pub const BLOCK_BYTES: usize = 512;
/// A tar ends with two zero blocks.
pub const END_BYTES: usize = 2 * BLOCK_BYTES;

/// The most bytes of what stands in front of one entry and belongs to it (PAX records, a long name, the map of a sparse
/// file): what Go's `archive/tar` reads.
const SPECIAL_BYTES_MAX: usize = 1 << 20;
/// The prefix of the PAX records that carry extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Which rule of the format is broken, as a clause that follows the name of the thing.
type Rule = &'static str;

/// Number of zero bytes after a payload of `bytes` bytes.
#[must_use]
pub fn padding(bytes: u64) -> usize {
    (bytes.wrapping_neg() % BLOCK_BYTES as u64) as usize
}

/// The sums of a header's bytes with its checksum field taken as spaces: of unsigned bytes, as POSIX has it, and of signed
/// ones, as old writers had it.
fn checksums(block: &[u8; BLOCK_BYTES]) -> (u64, i64) {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    let high = |bytes: &[u8]| bytes.iter().filter(|byte| !byte.is_ascii()).count() as i64;
    let (all, field) = (&block[..], &block[148..156]);
    let unsigned = sum(all) - sum(field) + 8 * u64::from(b' ');
    (unsigned, unsigned as i64 - 256 * (high(all) - high(field)))
}
