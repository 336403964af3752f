//! What decoders of members need and what is costly to make: handed on from one decoder to the next.
//!
//! Most members are a small file. To set up a decoder anew for each took half as long as to decode: a context of libzstd has
//! 160 KiB that are cleared, and buffers of megabytes come from the kernel page by page.

use std::fmt;

use ::zstd::zstd_safe::DCtx;
use flate2::Decompress;

/// What a decoder leaves for the next one. At most some 4 MiB, for a buffer of decoded bytes.
#[derive(Default)]
pub struct Spare {
    /// For gzip members.
    pub(super) inflate: Option<Decompress>,
    /// For zstd members that are decoded at one go.
    pub(super) context: Option<DCtx<'static>>,
    /// Room for decoded bytes. What is in it means nothing.
    pub(super) decoded: Vec<u8>,
}

impl fmt::Debug for Spare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spare")
            .field("decoded_bytes", &self.decoded.capacity())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::Spare;
    use crate::digest::Digest;
    use crate::layer::entry::{Entry, Kind};
    use crate::layer::index::{Coding, Index, Summary};
    use crate::layer::index_builder::{IndexBuilder, NewChunk};
    use crate::layer::kept::Kept;
    use crate::layer::{Format, decoder_with};

    fn compress(coding: Coding, content: &[u8]) -> Vec<u8> {
        if coding == Coding::Zstd {
            return ::zstd::bulk::compress(content, 1).unwrap();
        }
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    /// An index of one file, whose content is the only chunk of a member of `member_bytes` bytes.
    fn index(coding: Coding, content: &[u8], member_bytes: u64) -> Vec<u8> {
        let mut builder = IndexBuilder::new(coding);
        let size = content.len() as u64;
        let entry = Entry::new("file".to_owned(), Kind::File);
        builder.entry(&Entry { size, ..entry }).unwrap();
        let chunk = NewChunk {
            bytes: size,
            blob_offset: 0,
            inner_offset: 0,
            digest: Some(Digest::of(content)),
        };
        builder.chunk(chunk).unwrap();
        let summary = Summary {
            toc_start: member_bytes,
            toc_end: member_bytes,
            ..Summary::of(Format::Estargz, member_bytes)
        };
        builder.finish(summary, member_bytes).unwrap().to_vec()
    }

    #[test]
    fn what_a_decoder_leaves_serves_the_next_whatever_became_of_it() {
        let noise = |len: u32| -> Vec<u8> {
            (0..len)
                .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
                .collect()
        };
        let contents = [noise(10), noise(5 << 20), noise(200_000), noise(3000)];
        let mut spare = Spare::default();
        for round in 0..24 {
            let content = &contents[round % contents.len()];
            let coding = [Coding::Gzip, Coding::Zstd][round % 3 % 2];
            let mut member = compress(coding, content);
            let index = index(coding, content, member.len() as u64);
            let is_good = round % 5 != 0;
            if !is_good {
                let middle = member.len() / 2;
                member.truncate(middle);
                member.resize(middle * 2 + 1, 0xff);
            }
            let index = Index::open(index).unwrap();
            let mut decoder = decoder_with(&index, 0, spare).unwrap();
            let mut kept = Kept::default();
            let outcome = decoder.push(&member, &mut kept);
            spare = decoder.into_spare();
            assert_eq!(outcome == Ok(true), is_good, "round {round}: {outcome:?}");
            assert!(
                kept.verified.get(&0) == is_good.then_some(content),
                "round {round}"
            );
        }
    }
}
