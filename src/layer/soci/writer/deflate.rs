//! Decodes gzip and says where each deflate block starts, bit by bit, for the demo's zTOCs.
//!
//! A second inflater beside the one that reads layers, on purpose: checkpoints that were found by the code that starts from
//! them would agree with it also where both are wrong. It is simple rather than fast.

use crate::error::{Error, Result};

/// The longest Huffman code.
const CODE_BITS_MAX: u32 = 15;
/// What a gzip header has at least.
const HEADER_BYTES: usize = 10;
/// CRC and length behind the last block.
const TRAILER_BYTES: u64 = 8;
/// The end of a block, among literals and lengths.
const END: u16 = 256;
/// The order in which the lengths of code length codes stand (RFC 1951, 3.2.7).
const CODE_LENGTH_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
const LENGTH_BASE: [u16; 29] = [
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
    227, 258,
];
const LENGTH_EXTRA: [u32; 29] = [
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
];
const DISTANCE_BASE: [u16; 30] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073,
    4097, 6145, 8193, 12289, 16385, 24577,
];
const DISTANCE_EXTRA: [u32; 30] = [
    0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13,
];

/// Where a block starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockStart {
    /// In the blob, in bits.
    pub(super) blob_bits: u64,
    /// In the decoded bytes.
    pub(super) out: u64,
}

/// What a gzip blob decodes to, and where the blocks of all its members start.
///
/// # Errors
/// [`Error::Malformed`] when it is no gzip. Checksums are not looked at.
pub(super) fn decode(blob: &[u8]) -> Result<(Vec<u8>, Vec<BlockStart>)> {
    let refuse = || Error::malformed("demo layer", "it is no gzip");
    let mut bits = Bits { bytes: blob, at: 0 };
    let (mut out, mut blocks) = (Vec::new(), Vec::new());
    while bits.at < blob.len() as u64 * 8 {
        let header = blob.get((bits.at / 8) as usize..).and_then(header_bytes);
        bits.at += header.ok_or_else(refuse)? as u64 * 8;
        let mut is_last = false;
        while !is_last {
            blocks.push(BlockStart {
                blob_bits: bits.at,
                out: out.len() as u64,
            });
            is_last = bits.take(1) == 1;
            block(&mut bits, &mut out).ok_or_else(refuse)?;
        }
        bits.at = bits.at.next_multiple_of(8) + TRAILER_BYTES * 8;
    }
    Ok((out, blocks))
}

/// The length of a gzip header (RFC 1952, 2.3).
fn header_bytes(member: &[u8]) -> Option<usize> {
    let flags = *member.strip_prefix(&[0x1f, 0x8b, 8])?.first()?;
    let mut at = HEADER_BYTES;
    if flags & 4 != 0 {
        at += 2 + usize::from(u16::from_le_bytes([*member.get(at)?, *member.get(at + 1)?]));
    }
    for text in [8, 16] {
        if flags & text != 0 {
            at += member.get(at..)?.iter().position(|&byte| byte == 0)? + 1;
        }
    }
    Some(at + if flags & 2 != 0 { 2 } else { 0 })
}

/// Reads bits, the low ones of a byte first. Behind the end there are zeros.
struct Bits<'b> {
    bytes: &'b [u8],
    /// How many bits were read.
    at: u64,
}

impl Bits<'_> {
    /// The next 32 bits, at least.
    fn peek(&self) -> u64 {
        let rest = self.bytes.get((self.at / 8) as usize..).unwrap_or_default();
        let mut word = [0; 8];
        let len = rest.len().min(8);
        word[..len].copy_from_slice(&rest[..len]);
        u64::from_le_bytes(word) >> (self.at % 8)
    }

    fn take(&mut self, count: u32) -> usize {
        let bits = self.peek() & ((1 << count) - 1);
        self.at += u64::from(count);
        bits as usize
    }
}

/// A Huffman code: symbol and length by the next [`CODE_BITS_MAX`] bits.
struct Code(Vec<(u16, u8)>);

impl Code {
    /// The code whose symbols have these lengths; 0 is none.
    fn new(lengths: &[u8]) -> Self {
        let mut table = vec![(0, 0); 1 << CODE_BITS_MAX];
        let mut code = 0usize;
        for bits in 1..=CODE_BITS_MAX {
            for (symbol, _) in lengths
                .iter()
                .enumerate()
                .filter(|(_, length)| u32::from(**length) == bits)
            {
                let reversed = (code as u32).reverse_bits() >> (32 - bits);
                let places = (reversed as usize..table.len()).step_by(1 << bits);
                for place in places {
                    table[place] = (symbol as u16, bits as u8);
                }
                code += 1;
            }
            code <<= 1;
        }
        Self(table)
    }

    fn read(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let (symbol, len) = self.0[(bits.peek() & ((1 << CODE_BITS_MAX) - 1)) as usize];
        bits.at += u64::from(len);
        (len > 0).then_some(symbol)
    }
}

fn block(bits: &mut Bits<'_>, out: &mut Vec<u8>) -> Option<()> {
    match bits.take(2) {
        0 => {
            bits.at = bits.at.next_multiple_of(8);
            let len = bits.take(16);
            bits.at += 16;
            let start = (bits.at / 8) as usize;
            out.extend_from_slice(bits.bytes.get(start..start + len)?);
            bits.at += len as u64 * 8;
            Some(())
        }
        1 => {
            let literals: Vec<u8> = (0..288)
                .map(|symbol| match symbol {
                    0..144 => 8,
                    144..256 => 9,
                    256..280 => 7,
                    _ => 8,
                })
                .collect();
            symbols(bits, out, &Code::new(&literals), &Code::new(&[5; 30]))
        }
        2 => {
            let (literals, distances) = read_codes(bits)?;
            symbols(bits, out, &literals, &distances)
        }
        _ => None,
    }
}

/// The two codes at the start of a block that has its own (RFC 1951, 3.2.7).
fn read_codes(bits: &mut Bits<'_>) -> Option<(Code, Code)> {
    let (literals, distances) = (bits.take(5) + 257, bits.take(5) + 1);
    let mut lengths = [0; 19];
    for place in CODE_LENGTH_ORDER.into_iter().take(bits.take(4) + 4) {
        lengths[place] = bits.take(3) as u8;
    }
    let code = Code::new(&lengths);
    let mut lengths: Vec<u8> = Vec::new();
    while lengths.len() < literals + distances {
        let (length, times) = match code.read(bits)? {
            16 => (*lengths.last()?, 3 + bits.take(2)),
            17 => (0, 3 + bits.take(3)),
            18 => (0, 11 + bits.take(7)),
            length => (length as u8, 1),
        };
        lengths.resize(lengths.len() + times, length);
    }
    let (literals, rest) = lengths.split_at(literals);
    Some((Code::new(literals), Code::new(rest.get(..distances)?)))
}

fn symbols(bits: &mut Bits<'_>, out: &mut Vec<u8>, literals: &Code, distances: &Code) -> Option<()> {
    loop {
        let symbol = literals.read(bits)?;
        if symbol < END {
            out.push(symbol as u8);
            continue;
        }
        if symbol == END {
            return Some(());
        }
        let number = usize::from(symbol - END - 1);
        let length = usize::from(*LENGTH_BASE.get(number)?) + bits.take(LENGTH_EXTRA[number]);
        let number = usize::from(distances.read(bits)?);
        let distance = usize::from(*DISTANCE_BASE.get(number)?) + bits.take(DISTANCE_EXTRA[number]);
        let start = out.len().checked_sub(distance)?;
        for at in start..start + length {
            out.push(out[at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::write::GzEncoder;
    use flate2::{Compression, GzBuilder};

    use super::*;

    fn text(len: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len)
            .map(|at| {
                if at / 5000 % 3 == 0 {
                    next()
                } else {
                    b'a' + next() % 7
                }
            })
            .collect()
    }

    #[test]
    fn blocks_of_every_kind_are_decoded_and_found() {
        for (level, len) in [
            (0, 200_000),
            (1, 10),
            (1, 300_000),
            (6, 400_000),
            (9, 400_000),
            (6, 0),
        ] {
            let content = text(len);
            let mut encoder = GzBuilder::new()
                .filename("layer.tar")
                .comment("made here")
                .write(Vec::new(), Compression::new(level));
            encoder.write_all(&content).unwrap();
            let mut blob = encoder.finish().unwrap();
            let mut second = GzEncoder::new(Vec::new(), Compression::fast());
            second.write_all(b"second member").unwrap();
            blob.extend_from_slice(&second.finish().unwrap());
            let (out, blocks) = decode(&blob).unwrap();
            assert_eq!(out, [&content[..], b"second member"].concat(), "level {level}");
            assert!(blocks.is_sorted_by(|a, b| a.blob_bits < b.blob_bits && a.out <= b.out));
            assert_eq!(
                blocks[0],
                BlockStart {
                    blob_bits: 8 * 30,
                    out: 0
                }
            );
            assert_eq!(blocks.last().unwrap().out, len as u64);
            assert!(
                len < 200_000 || blocks.len() > 2,
                "level {level}: {}",
                blocks.len()
            );
        }
    }
}
