//! Decodes the chunks of one gzip member.
//!
//! Decoding starts at the member's first byte and stops after its last chunk: behind it stand tar headers of unknown
//! length, and often a second member without chunks. So the member's CRC is not reached, and need not be: every chunk has
//! a sha256 of its own. What is not a chunk is inflated into the same scratch buffer and dropped.

use std::ops::Deref;

use flate2::{Decompress, FlushDecompress, Status};

use crate::error::{Error, Result};
use crate::layer::cutter::Cutter;
use crate::layer::gzip::header::Header;
use crate::layer::index::Index;
use crate::layer::{ChunkSink, MemberDecoder, Spare};

/// Decoded bytes at a time: large enough to hash and hand over at full speed, small enough for the L2 cache.
const SCRATCH_BYTES: usize = 128 << 10;

/// Decodes a member whose chunks were copied out of the index.
#[derive(Debug)]
pub(in crate::layer) struct GzipMember {
    /// Where the member starts in the blob, for messages.
    blob_start: u64,
    /// The header, until it is complete.
    header: Option<Header>,
    inflate: Decompress,
    /// Room for decoded bytes, [`SCRATCH_BYTES`] or more.
    scratch: Vec<u8>,
    /// What is of no use here.
    spare: Spare,
    cutter: Cutter,
    /// Whether a push failed: what comes after that belongs nowhere.
    failed: bool,
}

impl GzipMember {
    /// A decoder of member `member`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the index is damaged.
    pub(in crate::layer) fn new<B: Deref<Target = [u8]>>(
        index: &Index<B>,
        member: u32,
        mut spare: Spare,
    ) -> Result<Self> {
        let member = index.member(member)?;
        let cutter = Cutter::new(index, &member)?;
        let mut scratch = std::mem::take(&mut spare.decoded);
        scratch.resize(scratch.len().max(SCRATCH_BYTES), 0);
        let inflate = match spare.inflate.take() {
            Some(mut inflate) => {
                inflate.reset(false);
                inflate
            }
            None => Decompress::new(false),
        };
        Ok(Self {
            blob_start: member.blob_start,
            header: Some(Header::default()),
            inflate,
            scratch,
            spare,
            cutter,
            failed: false,
        })
    }

    fn malformed(&self, why: impl Into<String>) -> Error {
        Error::malformed(format!("gzip member at {}", self.blob_start), why)
    }

    fn decode(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        let mut input = bytes;
        if let Some(header) = &mut self.header {
            let Some(taken) = header.take(bytes).map_err(|why| self.malformed(why))? else {
                return Ok(false);
            };
            input = bytes.get(taken..).unwrap_or_default();
            self.header = None;
        }
        let mut room = std::mem::take(&mut self.scratch);
        let scratch = room.get_mut(..SCRATCH_BYTES).unwrap_or_default();
        while !self.cutter.is_done() {
            let (taken, made) = (self.inflate.total_in(), self.inflate.total_out());
            let status = self.inflate.decompress(input, scratch, FlushDecompress::None);
            let taken = (self.inflate.total_in() - taken) as usize;
            let made = (self.inflate.total_out() - made) as usize;
            input = input.get(taken..).unwrap_or_default();
            self.cutter
                .decoded(scratch.get(..made).unwrap_or_default(), sink)?;
            // Behind the last chunk anything may follow, however much of it came with this piece.
            if self.cutter.is_done() {
                break;
            }
            let status = status.map_err(|e| self.malformed(e.to_string()))?;
            if status == Status::StreamEnd {
                return Err(self.malformed("it ends before its last chunk"));
            }
            if input.is_empty() && made < scratch.len() {
                break;
            }
            if taken == 0 && made == 0 {
                return Err(self.malformed("it cannot be decoded further"));
            }
        }
        self.scratch = room;
        Ok(self.cutter.is_done())
    }
}

impl MemberDecoder for GzipMember {
    fn push(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        if self.failed {
            return Err(self.malformed("it failed before"));
        }
        let outcome = self.decode(bytes, sink);
        self.failed = outcome.is_err();
        outcome
    }

    fn into_spare(self: Box<Self>) -> Spare {
        Spare {
            inflate: Some(self.inflate),
            decoded: self.scratch,
            ..self.spare
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Write;

    use flate2::write::GzEncoder;
    use flate2::{Compression, GzBuilder};

    use super::*;
    use crate::digest::Digest;
    use crate::layer::Format;
    use crate::layer::entry::{Entry, Kind};
    use crate::layer::index::{Coding, Summary};
    use crate::layer::index_builder::{IndexBuilder, NewChunk};
    use crate::layer::kept::Kept;

    /// An index of one member with these chunks (place in the member, content), one file each.
    fn index(chunks: &[(u64, &[u8])]) -> Vec<u8> {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        for (number, (inner_offset, content)) in chunks.iter().enumerate() {
            let size = content.len() as u64;
            builder
                .entry(&Entry {
                    size,
                    ..Entry::new(number.to_string(), Kind::File)
                })
                .unwrap();
            let (inner_offset, digest) = (*inner_offset, Some(Digest::of(content)));
            builder
                .chunk(NewChunk {
                    bytes: size,
                    blob_offset: 7,
                    inner_offset,
                    digest,
                })
                .unwrap();
        }
        let summary = Summary {
            toc_start: 1 << 29,
            toc_end: 1 << 29,
            ..Summary::of(Format::Estargz, 1 << 30)
        };
        builder.finish(summary, 1 << 29).unwrap().to_vec()
    }

    /// Decodes `member`, pushed in pieces of `piece` bytes. Returns what was verified and whether the decoder was done.
    fn decode(index: &[u8], member: &[u8], piece: usize) -> Result<(BTreeMap<u32, Vec<u8>>, bool)> {
        let mut decoder = crate::layer::decoder(&Index::open(index).unwrap(), 0)?;
        let mut kept = Kept::default();
        let mut done = false;
        for bytes in member.chunks(piece) {
            done = decoder.push(bytes, &mut kept)?;
        }
        Ok((kept.verified, done))
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn noise(len: usize) -> Vec<u8> {
        (0..len as u32)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect()
    }

    #[test]
    fn chunks_come_out_of_pieces_of_any_size() {
        let plain = noise(400_000);
        let chunks: [(u64, &[u8]); 4] = [
            (0, &plain[..1]),
            (1, &plain[1..300_000]),
            (300_512, &plain[300_512..300_600]),
            (300_600, &plain[300_600..399_999]),
        ];
        let index = index(&chunks);
        // What follows the last chunk is not looked at: not the rest of the member, not a member behind it.
        let member = [gzip(&plain), b"anything".to_vec()].concat();
        for piece in [1, 2, 1000, 65536, usize::MAX] {
            let (verified, done) = decode(&index, &member, piece).unwrap();
            assert!(done);
            assert_eq!(verified.len(), chunks.len());
            for (number, (_, content)) in chunks.iter().enumerate() {
                assert_eq!(
                    verified[&(number as u32)],
                    *content,
                    "chunk {number}, pieces of {piece}"
                );
            }
        }
    }

    #[test]
    fn what_is_broken_behind_the_last_chunk_is_not_looked_at() {
        let plain = noise(9000);
        let index = index(&[(0, &plain[..4000])]);
        // Two stored blocks: the second one, behind a header of 10 bytes and the first one, is of no type.
        let mut member = gzip(&plain[..4000]);
        member.truncate(10);
        member.extend_from_slice(&[0, 0xa0, 0x0f, 0x5f, 0xf0]);
        member.extend_from_slice(&plain[..4000]);
        member.extend_from_slice(&[0xff; 20]);
        for piece in [1, 700, 4015, 4016, usize::MAX] {
            let (verified, done) = decode(&index, &member, piece).unwrap();
            assert!(done && verified[&0] == plain[..4000], "pieces of {piece}");
        }
    }

    #[test]
    fn two_files_of_the_same_bytes_both_get_them() {
        let index = index(&[(0, b"same"), (8, b"other"), (0, b"same")]);
        let (verified, done) = decode(&index, &gzip(b"same----other"), 3).unwrap();
        let expected = [
            (0, b"same".to_vec()),
            (1, b"other".to_vec()),
            (2, b"same".to_vec()),
        ];
        assert!(done && verified == BTreeMap::from(expected));
    }

    #[test]
    fn every_form_of_header_is_skipped() {
        let index = index(&[(2, b"content")]);
        let build = |builder: GzBuilder| {
            let mut encoder = builder.write(Vec::new(), Compression::default());
            encoder.write_all(b"--content--").unwrap();
            encoder.finish().unwrap()
        };
        let mut with_crc = build(GzBuilder::new());
        with_crc[3] |= 2;
        with_crc.splice(10..10, [1, 2]);
        let members = [
            build(
                GzBuilder::new()
                    .extra(vec![9; 65_535])
                    .filename("name")
                    .comment("comment"),
            ),
            build(GzBuilder::new().extra(vec![])),
            build(GzBuilder::new().mtime(77).filename("n".repeat(1000))),
            with_crc,
        ];
        for member in members {
            for piece in [1, 11, usize::MAX] {
                let (verified, done) = decode(&index, &member, piece).unwrap();
                assert!(done && verified[&0] == b"content");
            }
        }
    }

    #[test]
    fn a_wrong_digest_names_both_and_verifies_nothing() {
        let index = index(&[(0, b"expected")]);
        let expected = Error::mismatch(
            "chunk at 0 in the member at 7",
            Digest::of(b"expected"),
            Digest::of(b"received"),
        );
        let mut decoder = crate::layer::decoder(&Index::open(index.as_slice()).unwrap(), 0).unwrap();
        let mut kept = Kept::default();
        assert_eq!(decoder.push(&gzip(b"received"), &mut kept), Err(expected));
        let over = Error::malformed("gzip member at 7", "it failed before");
        assert_eq!(decoder.push(&gzip(b"expected"), &mut kept), Err(over));
        assert!(kept.verified.is_empty());
    }

    #[test]
    fn a_member_that_cannot_hold_its_chunks_is_refused() {
        let index = index(&[(4, b"content")]);
        let good = gzip(b"----content");
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            bad
        };
        let endless_name = [&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0xff][..], &vec![b'n'; 100_000]].concat();
        let cases = [
            ("ends early", gzip(b"----conten")),
            ("empty", gzip(b"")),
            ("continued by another", [gzip(b"----con"), gzip(b"tent")].concat()),
            ("no gzip", b"----content---------".to_vec()),
            ("another method", with(2, 7)),
            ("reserved flag", with(3, 0x20)),
            ("broken deflate", with(10, 0xff)),
            ("endless header", endless_name),
        ];
        for (name, member) in cases {
            for piece in [1, usize::MAX] {
                let refused = decode(&index, &member, piece);
                assert!(matches!(refused, Err(Error::Malformed { .. })), "{name}, {piece}");
            }
        }
        let (verified, done) = decode(&index, &good[..good.len() - 12], 5).unwrap();
        assert!(!done && verified.is_empty());
    }

    #[test]
    fn an_error_of_the_sink_ends_the_decoding() {
        struct Full;
        impl ChunkSink for Full {
            fn piece(&mut self, _: u32, _: u64, _: &[u8]) -> Result<()> {
                Err(Error::busy("disk", "full"))
            }

            fn verified(&mut self, _: u32) -> Result<()> {
                Ok(())
            }
        }
        let index = index(&[(0, b"content")]);
        let mut decoder = crate::layer::decoder(&Index::open(index.as_slice()).unwrap(), 0).unwrap();
        assert_eq!(
            decoder.push(&gzip(b"content"), &mut Full),
            Err(Error::busy("disk", "full"))
        );
    }

    #[test]
    fn a_member_that_is_not_there_is_refused() {
        let index = index(&[(0, b"content")]);
        assert!(crate::layer::decoder(&Index::open(index.as_slice()).unwrap(), 1).is_err());
    }
}
