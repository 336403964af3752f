//! Indexes of plain layers as files that go from one machine to another, so that one pass over a layer serves all.
//!
//! ```text
//! magic 8 | version u32 | packed bytes u64 | index bytes u64 | layer digest 32 | packed index | sha256 of all before 32
//! ```
//! A file holds one such record after the other. The index is packed with zstd. A record is bytes from outside: it is
//! checked by its own digest, then by all the rules that an index of our own making keeps (it is built anew from what it
//! says, and must come out the same). What that cannot find out is whether the index tells the truth about its layer: only
//! the whole blob would. So an index is taken from those only who may decide what is in the cache anyway.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::Entry;
use crate::layer::fields::Fields;
use crate::layer::index::{Coding, INDEX_BYTES_MAX, Index, VERSION};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};

const MAGIC: [u8; 8] = *b"RFSINDEX";
/// Size of what stands before the packed index.
const HEADER_BYTES: usize = 60;
/// Size of the digest at the end.
const DIGEST_BYTES: usize = 32;
/// Largest packed index in bytes.
pub const PACKED_BYTES_MAX: u64 = 1 << 30;
/// What an index can be packed to at best: names and digests do not pack better, and the decoder's memory is bounded by it.
const RATIO_MAX: u64 = 256;
/// Fast, and most of what packs well are names.
const LEVEL: i32 = 3;

/// An index on its way, and the layer it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchanged {
    /// The layer's blob.
    pub layer: Digest,
    /// The index, in the form of [`crate::layer::index`]; it says the blob's size and the digest of its tar.
    pub index: Vec<u8>,
}

fn malformed(why: impl Into<String>) -> Error {
    Error::malformed("index file", why)
}

/// A record for the index of a layer that one pass has made.
///
/// # Errors
/// [`Error::Malformed`] for a damaged index, or one that no pass has made.
pub fn pack(layer: &Digest, index: &[u8]) -> Result<Vec<u8>> {
    if Index::open(index)?.summary().passed().is_none() {
        return Err(malformed("only indexes of plain layers can be handed on"));
    }
    let packed = zstd::bulk::compress(index, LEVEL).map_err(|e| malformed(e.to_string()))?;
    if index.len() as u64 > INDEX_BYTES_MAX || packed.len() as u64 > PACKED_BYTES_MAX {
        return Err(malformed("an index of over 1 GiB cannot be handed on"));
    }
    let mut record = Vec::with_capacity(HEADER_BYTES + packed.len() + DIGEST_BYTES);
    record.extend_from_slice(&MAGIC);
    record.extend_from_slice(&VERSION.to_le_bytes());
    record.extend_from_slice(&(packed.len() as u64).to_le_bytes());
    record.extend_from_slice(&(index.len() as u64).to_le_bytes());
    record.extend_from_slice(layer.as_bytes());
    record.extend_from_slice(&packed);
    let digest = Digest::of(&record);
    record.extend_from_slice(digest.as_bytes());
    Ok(record)
}

/// Takes the first record off `bytes`, checked. Nothing is left for the end of the file.
///
/// # Errors
/// [`Error::Malformed`] and [`Error::Verification`] for what is no record or damaged, [`Error::Unsupported`] for one of
/// another version of this program.
pub fn unpack(bytes: &mut &[u8]) -> Result<Exchanged> {
    let header = bytes
        .get(..HEADER_BYTES)
        .ok_or_else(|| malformed("it ends early, or is none"))?;
    let mut fields = Fields(header);
    if fields.take::<8>() != MAGIC {
        return Err(malformed("it is no index file of registryfs"));
    }
    let version = fields.u32();
    if version != VERSION {
        let why = format!(
            "it is of version {version}, this program reads version {VERSION}; export it anew with this version"
        );
        return Err(Error::unsupported("index file", why));
    }
    let (packed_bytes, index_bytes) = (fields.u64(), fields.u64());
    let layer = Digest::from_bytes(fields.take());
    if packed_bytes > PACKED_BYTES_MAX
        || index_bytes > INDEX_BYTES_MAX.min(packed_bytes.saturating_mul(RATIO_MAX))
    {
        return Err(malformed("it is too large to be one"));
    }
    let end = HEADER_BYTES + packed_bytes as usize;
    let (record, rest) = bytes
        .split_at_checked(end + DIGEST_BYTES)
        .ok_or_else(|| malformed("it ends early"))?;
    let (covered, promised) = record.split_at(end);
    let actual = Digest::of(covered);
    if actual.as_bytes() != promised {
        return Err(malformed("it is damaged: its checksum is wrong"));
    }
    let packed = covered.get(HEADER_BYTES..).unwrap_or_default();
    let index = zstd::bulk::decompress(packed, index_bytes as usize).map_err(|e| malformed(e.to_string()))?;
    check(&index)?;
    *bytes = rest;
    Ok(Exchanged { layer, index })
}

/// Whether an index keeps all the rules: built anew from what it says, it must come out the same.
fn check(bytes: &[u8]) -> Result<()> {
    let index = Index::open(bytes)?;
    let summary = *index.summary();
    if summary.passed().is_none() {
        return Err(malformed("it is not of a plain layer"));
    }
    // Whatever a member's coding is, it is told of.
    let mut builder = IndexBuilder::new(Coding::Stored);
    for number in 0..index.member_count() {
        let member = index.member(number)?;
        builder.member(NewMember {
            blob_start: member.blob_start,
            blob_end: member.blob_end,
            coding: member.coding,
            bits: member.bits,
            window: index.window(&member)?.to_vec(),
            check: index.check(&member)?,
        })?;
    }
    for number in 0..index.entry_count() {
        add_entry(&index, number, &mut builder)?;
    }
    if *builder.finish(summary, summary.blob_bytes)? != *bytes {
        return Err(malformed("it breaks the rules of an index"));
    }
    Ok(())
}

fn add_entry(index: &Index<&[u8]>, number: u32, builder: &mut IndexBuilder) -> Result<()> {
    let entry = index.entry(number)?;
    let owned = |(name, value): (&[u8], &[u8])| (name.to_vec(), value.to_vec());
    // A path that was held at the root is one that would leave it.
    let path = [if entry.clamped { &b"../"[..] } else { b"" }, entry.path].concat();
    builder.entry(&Entry {
        path,
        kind: entry.kind,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        size: entry.size,
        link: entry.link.to_vec(),
        rdev: entry.rdev,
        xattrs: index.xattrs(&entry)?.into_iter().map(owned).collect(),
        digest: index.content_digest(&entry)?,
    })?;
    let mut at = entry.data_offset;
    for number in entry.chunk_range() {
        let chunk = index.chunk(number)?;
        let gap = chunk.data_offset.checked_sub(at);
        builder.hole(gap.ok_or_else(|| malformed("two chunks of a file overlap"))?)?;
        builder.chunk(NewChunk {
            bytes: chunk.bytes,
            blob_offset: index.member(chunk.member)?.blob_start,
            inner_offset: chunk.inner_offset,
            digest: chunk.digest,
        })?;
        at = chunk.data_offset.saturating_add(chunk.bytes);
    }
    let end = entry.data_offset.saturating_add(entry.size);
    builder.hole(end.saturating_sub(at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::Format;
    use crate::layer::entry::Kind;
    use crate::layer::index::{CRC_AT, Summary};

    /// An index with an entry of every kind of peculiarity.
    fn index(size: u64) -> Vec<u8> {
        let mut builder = IndexBuilder::new(Coding::Deflate);
        let mut file = Entry::new("../above/file", Kind::File);
        (file.size, file.mode) = (size + 100, 0o4755);
        file.xattrs = vec![(b"user.b".to_vec(), b"1".to_vec()), (b"user.a".to_vec(), vec![])];
        file.digest = Some(Digest::of(b"whole"));
        builder.entry(&file).unwrap();
        builder.hole(60).unwrap();
        for (bytes, blob_offset) in [(size / 2, 10), (size - size / 2, 500)] {
            let digest = Some(Digest::of(&bytes.to_le_bytes()));
            let chunk = NewChunk {
                bytes,
                blob_offset,
                inner_offset: 7,
                digest,
            };
            builder.chunk(chunk).unwrap();
        }
        builder.hole(40).unwrap();
        let mut link = Entry::new("link", Kind::Hardlink);
        link.link = b"/above/file".to_vec();
        builder.entry(&link).unwrap();
        let mut symlink = Entry::new("symlink", Kind::Symlink);
        symlink.link = b"../x".to_vec();
        builder.entry(&symlink).unwrap();
        for (blob_start, blob_end, bits, window) in [(10, 501, 0, &b""[..]), (500, 900, 3, b"window")] {
            let (coding, window, check) = (Coding::Deflate, window.to_vec(), None);
            let member = NewMember {
                blob_start,
                blob_end,
                coding,
                bits,
                window,
                check,
            };
            builder.member(member).unwrap();
        }
        let summary = Summary {
            diff_id: Digest::of(b"tar"),
            tar_bytes: 5000,
            ..Summary::of(Format::Gzip, 900)
        };
        builder.finish(summary, 900).unwrap().to_vec()
    }

    fn record(index: &[u8]) -> Vec<u8> {
        pack(&Digest::of(b"layer"), index).unwrap()
    }

    /// The index with a right checksum again.
    fn sealed(mut index: Vec<u8>) -> Vec<u8> {
        let crc = crc32fast::hash(&index[CRC_AT + 4..]);
        index[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        index
    }

    #[test]
    fn records_follow_one_another_and_come_out_as_they_went_in() {
        let (first, second) = (index(1000), index(2000));
        let file = [record(&first), record(&second)].concat();
        let mut rest = file.as_slice();
        for index in [first, second] {
            let layer = Digest::of(b"layer");
            assert_eq!(unpack(&mut rest).unwrap(), Exchanged { layer, index });
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn an_index_that_no_pass_made_is_not_handed_on() {
        let summary = Summary::of(Format::Estargz, 900);
        let promised = IndexBuilder::new(Coding::Gzip)
            .finish(summary, 900)
            .unwrap()
            .to_vec();
        assert!(pack(&Digest::of(b"layer"), &promised).is_err());
    }

    #[test]
    fn another_version_and_other_files_are_named() {
        let mut newer = record(&index(1000));
        newer[8] += 1;
        let error = unpack(&mut newer.as_slice()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let error = unpack(&mut &[7; 100][..]).unwrap_err().to_string();
        assert!(error.contains("no index file"), "{error}");
    }

    #[test]
    fn every_damaged_byte_and_every_cut_is_noticed() {
        let good = record(&index(1000));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(unpack(&mut bad.as_slice()).is_err(), "byte {at}");
            assert!(unpack(&mut &good[..at]).is_err(), "cut to {at}");
        }
    }

    proptest! {
        /// Whoever makes a record can give it any checksums, so each field has to hold on its own.
        #[test]
        fn a_forged_index_is_refused_or_keeps_the_rules(
            size in 2..10_000_u64,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut forged = index(size);
            for (at, byte) in changes {
                let at = at.index(forged.len());
                forged[at] = byte;
            }
            let forged = sealed(forged);
            if let Ok(record) = pack(&Digest::of(b"layer"), &forged)
                && let Ok(taken) = unpack(&mut record.as_slice())
            {
                let index = Index::open(taken.index.as_slice()).unwrap();
                for number in 0..index.entry_count() {
                    let entry = index.entry(number).unwrap();
                    index.xattrs(&entry).unwrap();
                    for chunk in entry.chunk_range() {
                        let chunk = index.chunk(chunk).unwrap();
                        prop_assert!(chunk.data_offset >= entry.data_offset);
                        prop_assert!(chunk.data_offset + chunk.bytes <= index.summary().data_bytes);
                        index.member(chunk.member).unwrap();
                    }
                }
            }
        }
    }
}
