//! Deflate streams written bit by bit: blocks that no compressor would write, with boundaries at every bit of a byte.

use super::*;

/// Writes bits in deflate's order: the lowest of each byte first.
#[derive(Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    used: u32,
}

impl BitWriter {
    fn bits(&mut self, value: u32, count: u32) {
        for bit in 0..count {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            *self.bytes.last_mut().unwrap() |= ((value >> bit & 1) as u8) << (self.used % 8);
            self.used += 1;
        }
    }

    /// A Huffman code, which goes from its highest bit on.
    fn code(&mut self, value: u32, count: u32) {
        (0..count).rev().for_each(|bit| self.bits(value >> bit, 1));
    }

    /// A block of fixed codes (RFC 1951, 3.2.6) with these literals below 144.
    pub(super) fn fixed(&mut self, literals: &[u8], is_last: bool) {
        self.bits(u32::from(is_last), 1);
        self.bits(1, 2);
        for &literal in literals {
            assert!(literal < 144);
            self.code(0x30 + u32::from(literal), 8);
        }
        self.code(0, 7);
    }

    /// A block of fixed codes that copies 3 bytes from 4097 or more bytes back: `extra` up to 2047 more.
    pub(super) fn far_copy(&mut self, extra: u32) {
        self.bits(0, 1);
        self.bits(1, 2);
        self.code(1, 7);
        self.code(24, 5);
        self.bits(extra, 11);
        self.code(0, 7);
    }

    pub(super) fn stored(&mut self, bytes: &[u8], is_last: bool) {
        self.bits(u32::from(is_last), 1);
        self.bits(0, 2);
        self.used = self.used.next_multiple_of(8);
        let len = bytes.len() as u16;
        self.bytes.extend(len.to_le_bytes());
        self.bytes.extend((!len).to_le_bytes());
        self.bytes.extend(bytes);
        self.used = self.bytes.len() as u32 * 8;
    }

    /// The stream as a gzip member that decodes to `plain`.
    pub(super) fn member(self, plain: &[u8]) -> Vec<u8> {
        let mut member = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
        member.extend(self.bytes);
        member.extend(crc32fast::hash(plain).to_le_bytes());
        member.extend((plain.len() as u32).to_le_bytes());
        member
    }
}

#[test]
fn blocks_may_begin_at_every_bit() {
    let mut writer = BitWriter::default();
    let mut plain = Vec::new();
    // 3 + 8n + 7 bits each, so the boundary moves by two bits; an odd one comes from a block of codes of other lengths.
    for n in 0..40_u8 {
        let literals: Vec<u8> = (0..n % 5).map(|m| n + m).collect();
        writer.fixed(&literals, false);
        plain.extend(&literals);
        if n == 20 {
            writer.stored(&[n; 6000], false);
            plain.extend([n; 6000]);
        }
        if n > 20 {
            writer.far_copy(u32::from(n));
            let from = plain.len() - 4097 - usize::from(n);
            plain.extend_from_within(from..from + 3);
        }
    }
    writer.fixed(b"end", true);
    plain.extend(b"end");
    let blob = writer.member(&plain);
    for pieces in [&[1][..], &[2, 3], &[usize::MAX]] {
        let passed = send(Box::new(GzipPass::with_spacing(1, 1)), &blob, pieces).unwrap();
        assert_eq!(passed.tar, plain);
        let bits: std::collections::BTreeSet<u8> = passed.checkpoints.iter().map(|(_, at)| at.bits).collect();
        assert_eq!(bits.len(), 8, "{bits:?}");
        let distinct = passed.checkpoints.windows(2).all(|pair| pair[0].0 < pair[1].0);
        assert!(distinct, "two checkpoints at one place");
        check_every_checkpoint(&blob, &passed, pieces);
    }
}

#[test]
fn a_thousand_empty_blocks_are_no_places() {
    let mut writer = BitWriter::default();
    (0..1000).for_each(|_| writer.fixed(b"", false));
    writer.fixed(b"x", false);
    (0..1000).for_each(|_| writer.fixed(b"", false));
    writer.fixed(b"y", true);
    let blob = writer.member(b"xy");
    let passed = send(Box::new(GzipPass::with_spacing(1, 1)), &blob, &[7]).unwrap();
    assert_eq!(passed.tar, b"xy");
    let places: Vec<u64> = passed.checkpoints.iter().map(|(place, _)| *place).collect();
    assert_eq!(places, [0, 1]);
    check_every_checkpoint(&blob, &passed, &[7]);
}

#[test]
fn a_copy_from_before_the_member_is_refused() {
    // The first member leaves bytes where the second one must not reach.
    let mut writer = BitWriter::default();
    writer.far_copy(0);
    writer.fixed(b"", true);
    let blob = [gzip(&noise(9000), 6), writer.member(b"???")].concat();
    assert!(matches!(pass(&blob, &[100]), Err(Error::Malformed { .. })));
}
