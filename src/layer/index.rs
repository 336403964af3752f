//! The index of one layer as bytes: what a layer is parsed into once in its life, kept in the store and memory-mapped.
//!
//! Fixed-size little-endian records in sections behind a header, so that opening costs no parsing and no heap, and an
//! entry or chunk is found by its number. The file is a cache from outside the process: every access is checked against
//! its section, and the whole carries a CRC that [`Index::open`] checks.
//!
//! ```text
//! header 256 | entries 96 each | chunks 64 each | members 48 each | order 4 each | digests 32 each | xattrs | windows |
//! strings
//! ```
//! *Entries* stand in tar order. The *chunks* of a file stand together in file order, and files in the order of their
//! places in the data file, so that a chunk is also found by its place; what no chunk covers is a hole, and reads as zeros. A *member* is the unit that decodes on its own (a gzip member, a zstd frame, a span between two
//! checkpoints): its chunks are `order[first..first + count]`, by their place in it. Every non-empty regular file has its
//! place in the layer's data file, contiguous and aligned to [`DATA_ALIGN_BYTES`].

use std::ops::{Deref, Range};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::Format;
use crate::layer::entry::{Kind, Time};
use crate::layer::fields::Fields;
use crate::layer::xattrs;

pub(super) const MAGIC: [u8; 8] = *b"RFSLAYER";
pub(super) const VERSION: u32 = 2;
/// Size of the header, which holds a checksum of everything else.
pub const HEADER_BYTES: usize = 256;
pub(super) const ENTRY_BYTES: usize = 96;
pub(super) const CHUNK_BYTES: usize = 64;
pub(super) const MEMBER_BYTES: usize = 48;
pub(super) const ORDER_BYTES: usize = 4;
pub(super) const DIGEST_BYTES: usize = 32;
/// Where the CRC stands in the header; it covers everything behind itself.
pub(super) const CRC_AT: usize = 12;

/// Files start at multiples of this in the data file: the page and block size that the kernel's EROFS needs.
pub const DATA_ALIGN_BYTES: u64 = 4096;
/// The largest data file: what ext4 can hold with 4 KiB blocks, less some room.
pub const DATA_BYTES_MAX: u64 = 8 << 40;
/// The most entries a layer may have.
pub const ENTRIES_MAX: usize = 16_000_000;
/// The most chunks a layer may have.
pub const CHUNKS_MAX: usize = 64_000_000;
/// The largest index in bytes: some four million files. It is put together in memory, and a few megabytes of a blob can
/// unpack to any number of names and attributes.
pub const INDEX_BYTES_MAX: u64 = 1 << 30;

/// What the index as a whole says of its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The layer's format.
    pub format: Format,
    /// Size of the blob in bytes.
    pub blob_bytes: u64,
    /// Size of the data file in bytes, a multiple of [`DATA_ALIGN_BYTES`].
    pub data_bytes: u64,
    /// Sum of the sizes of all regular files in bytes.
    pub unpacked_bytes: u64,
    /// Digest of the table of contents (for eStargz: of its uncompressed JSON), all zeros where there is none.
    pub toc_digest: Digest,
    /// Where the compressed TOC stands in the blob; at `toc_end` where it is none of it, or there is none.
    pub toc_start: u64,
    /// End of the compressed TOC in the blob.
    pub toc_end: u64,
    /// Size of the uncompressed TOC in bytes, 0 where there is none.
    pub toc_bytes: u64,
    /// The blob's first bytes that its builder wants prefetched (0: none).
    pub prefetch_end: u64,
    /// Digest of the layer's tar, where one pass over the whole blob has computed it: the blob's own digest was checked
    /// then too. All zeros in an index that was made without reading the blob.
    pub diff_id: Digest,
    /// Size of the layer's tar in bytes, 0 where nobody has seen it.
    pub tar_bytes: u64,
}

impl Summary {
    /// What is known of a layer before its index is built: nothing promised, no TOC, no pass.
    #[must_use]
    pub fn of(format: Format, blob_bytes: u64) -> Self {
        Self {
            format,
            blob_bytes,
            data_bytes: 0,
            unpacked_bytes: 0,
            toc_digest: NO_DIGEST,
            toc_start: 0,
            toc_end: 0,
            toc_bytes: 0,
            prefetch_end: 0,
            diff_id: NO_DIGEST,
            tar_bytes: 0,
        }
    }

    /// The digest of the layer's tar, if one pass over the blob has computed it.
    #[must_use]
    pub fn passed(&self) -> Option<Digest> {
        (self.diff_id != NO_DIGEST).then_some(self.diff_id)
    }
}

/// Stands for "no digest" in records.
pub(super) const NO_DIGEST: Digest = Digest::from_bytes([0; DIGEST_BYTES]);

/// How a member's bytes in the blob become decoded bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Coding {
    /// A gzip member, from its header on. More may follow it in the range.
    Gzip = 1,
    /// Gzip from a checkpoint on: raw deflate, with a window, that starts within the first byte of the range if
    /// [`Member::bits`] is not 0. It may reach over the ends of gzip members.
    Deflate = 2,
    /// zstd frames, one behind the other.
    Zstd = 3,
    /// Not compressed.
    Stored = 4,
}

impl Coding {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Gzip, Self::Deflate, Self::Zstd, Self::Stored]
            .into_iter()
            .find(|coding| *coding as u8 == byte)
    }
}

/// One chunk: a piece of a regular file that is decoded, verified, stored and evicted as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Place in the data file in bytes.
    pub data_offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where it starts in the decoded member, in bytes.
    pub inner_offset: u64,
    /// The member it is decoded from.
    pub member: u32,
    /// The entry whose content it is part of.
    pub entry: u32,
    /// The digest of its bytes. Only chunks of a member with a [`Member::check`] may be without one.
    pub digest: Option<Digest>,
}

/// One independently decodable unit of the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// First byte in the blob.
    pub blob_start: u64,
    /// End in the blob: where the next member that matters starts. The compressed bytes end at or before it.
    pub blob_end: u64,
    /// Position in the order table of its first chunk.
    pub first: u32,
    /// Number of its chunks.
    pub count: u32,
    /// How its bytes are decoded.
    pub coding: Coding,
    /// Of [`Coding::Deflate`]: how many bits of the range's first byte belong to it, the high ones; 0 if all do.
    pub bits: u8,
    /// Place and length of its window among the windows, in bytes; length 0 for none.
    window: (u64, u32),
    /// Number in the digest table plus one, 0 for none.
    check: u32,
}

impl Member {
    /// The byte range in the blob that decodes to the member's chunks. Neighbours that are not byte-aligned share a byte.
    #[must_use]
    pub fn blob_range(&self) -> Range<u64> {
        self.blob_start..self.blob_end
    }
}

/// An entry as it stands in an index: borrowed from it.
#[derive(Debug, Clone, Copy)]
pub struct EntryRef<'a> {
    /// Cleaned path, see [`crate::layer::entry::clean_path`].
    pub path: &'a [u8],
    /// The type.
    pub kind: Kind,
    /// Whether cleaning held the path at the root.
    pub clamped: bool,
    /// Permission bits (0o7777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Size in bytes of a regular file, else 0.
    pub size: u64,
    /// Symlink target verbatim, or cleaned path of a hard link's target.
    pub link: &'a [u8],
    /// Device numbers.
    pub rdev: (u32, u32),
    /// Its chunks' numbers.
    pub chunks: (u32, u32),
    /// Place of its content in the data file in bytes.
    pub data_offset: u64,
    /// Number in the digest table plus one, 0 for none.
    digest: u32,
    /// Place and length of its encoded xattrs.
    xattrs: (u64, u32),
}

impl EntryRef<'_> {
    /// The numbers of the entry's chunks in the chunk table, in file order.
    #[must_use]
    pub fn chunk_range(&self) -> Range<u32> {
        self.chunks.0..self.chunks.0.saturating_add(self.chunks.1)
    }
}

/// Where each section stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections {
    pub(super) counts: [u64; 5],
    pub(super) xattr_bytes: u64,
    pub(super) window_bytes: u64,
    pub(super) string_bytes: u64,
}

/// The sizes of the records of the five counted sections, in file order.
const RECORD_BYTES: [usize; 5] = [ENTRY_BYTES, CHUNK_BYTES, MEMBER_BYTES, ORDER_BYTES, DIGEST_BYTES];
const ENTRIES: usize = 0;
const CHUNKS: usize = 1;
const MEMBERS: usize = 2;
const ORDER: usize = 3;
const DIGESTS: usize = 4;

impl Sections {
    /// First byte of counted section `which`, in u64 because the counts are not trusted yet.
    fn start(&self, which: usize) -> u64 {
        self.counts
            .iter()
            .zip(RECORD_BYTES)
            .take(which)
            .fold(HEADER_BYTES as u64, |at, (count, record)| {
                at.saturating_add(count.saturating_mul(record as u64))
            })
    }

    fn xattrs_start(&self) -> u64 {
        self.start(RECORD_BYTES.len())
    }

    fn windows_start(&self) -> u64 {
        self.xattrs_start().saturating_add(self.xattr_bytes)
    }

    fn strings_start(&self) -> u64 {
        self.windows_start().saturating_add(self.window_bytes)
    }

    pub(super) fn end(&self) -> u64 {
        self.strings_start().saturating_add(self.string_bytes)
    }
}

fn damaged(why: &str) -> Error {
    Error::malformed("layer index", why)
}

/// A layer's index over its bytes, which may be a memory map.
#[derive(Debug)]
pub struct Index<B> {
    bytes: B,
    sections: Sections,
    summary: Summary,
}

impl<B: Deref<Target = [u8]>> Index<B> {
    /// Checks header, section bounds and CRC.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the bytes are no index of this version or are damaged: the index is to be built anew.
    pub fn open(bytes: B) -> Result<Self> {
        let mut header = Fields(
            bytes
                .get(..HEADER_BYTES)
                .ok_or_else(|| damaged("shorter than its header"))?,
        );
        if header.take::<8>() != MAGIC || header.u32() != VERSION {
            return Err(damaged("another magic number or version"));
        }
        let crc = header.u32();
        let counts = [
            header.u64(),
            header.u64(),
            header.u64(),
            header.u64(),
            header.u64(),
        ];
        let sections = Sections {
            counts,
            xattr_bytes: header.u64(),
            window_bytes: header.u64(),
            string_bytes: header.u64(),
        };
        let summary = Summary {
            blob_bytes: header.u64(),
            data_bytes: header.u64(),
            unpacked_bytes: header.u64(),
            toc_start: header.u64(),
            toc_end: header.u64(),
            toc_bytes: header.u64(),
            prefetch_end: header.u64(),
            tar_bytes: header.u64(),
            toc_digest: Digest::from_bytes(header.take()),
            diff_id: Digest::from_bytes(header.take()),
            format: Format::from_byte(header.u8()).ok_or_else(|| damaged("unknown format"))?,
        };
        if sections.end() != bytes.len() as u64 || counts[..4].iter().any(|&n| n > u64::from(u32::MAX)) {
            return Err(damaged("its sections do not fill it"));
        }
        let covered = bytes.get(CRC_AT + 4..).unwrap_or_default();
        if crc32fast::hash(covered) != crc {
            return Err(damaged("wrong checksum"));
        }
        Ok(Self {
            bytes,
            sections,
            summary,
        })
    }

    /// What the index as a whole says.
    #[must_use]
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The bytes that the index stands on.
    #[must_use]
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// Number of entries.
    #[must_use]
    pub fn entry_count(&self) -> u32 {
        self.sections.counts[ENTRIES] as u32
    }

    /// Number of chunks.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        self.sections.counts[CHUNKS] as u32
    }

    /// Number of members.
    #[must_use]
    pub fn member_count(&self) -> u32 {
        self.sections.counts[MEMBERS] as u32
    }

    /// Size of the index in bytes.
    #[must_use]
    pub fn index_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn record(&self, section: usize, number: u32) -> Result<Fields<'_>> {
        let size = RECORD_BYTES[section];
        if u64::from(number) >= self.sections.counts[section] {
            return Err(damaged("a record number beyond its section"));
        }
        let start = self.sections.start(section) as usize + number as usize * size;
        let record = self.bytes.get(start..start + size);
        record
            .map(Fields)
            .ok_or_else(|| damaged("a record beyond the end"))
    }

    fn string(&self, offset: u32, len: u16) -> Result<&[u8]> {
        let start = self.sections.strings_start() + u64::from(offset);
        let bytes = self.bytes.get(start as usize..start as usize + usize::from(len));
        bytes.ok_or_else(|| damaged("a string beyond the end"))
    }

    /// Entry `number`, in tar order.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index, here and below.
    pub fn entry(&self, number: u32) -> Result<EntryRef<'_>> {
        let mut f = self.record(ENTRIES, number)?;
        let (path, path_len) = (f.u32(), f.u16());
        let kind = Kind::from_byte(f.u8()).ok_or_else(|| damaged("unknown entry type"))?;
        let clamped = f.u8() != 0;
        let (mode, uid, gid) = (f.u32(), f.u32(), f.u32());
        let mtime = Time {
            seconds: f.i64(),
            nanos: f.u32(),
        };
        let size = f.u64();
        let (link, link_len, _reserved) = (f.u32(), f.u16(), f.u16());
        let rdev = (f.u32(), f.u32());
        let chunks = (f.u32(), f.u32());
        let data_offset = f.u64();
        let digest = f.u32();
        let xattrs = (f.u64(), f.u32());
        Ok(EntryRef {
            path: self.string(path, path_len)?,
            kind,
            clamped,
            mode,
            uid,
            gid,
            mtime,
            size,
            link: self.string(link, link_len)?,
            rdev,
            chunks,
            data_offset,
            digest,
            xattrs,
        })
    }

    /// Chunk `number`.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn chunk(&self, number: u32) -> Result<Chunk> {
        let mut f = self.record(CHUNKS, number)?;
        Ok(Chunk {
            data_offset: f.u64(),
            bytes: f.u64(),
            inner_offset: f.u64(),
            member: f.u32(),
            entry: f.u32(),
            digest: Some(Digest::from_bytes(f.take())).filter(|digest| *digest != NO_DIGEST),
        })
    }

    /// Member `number`, in the order of the blob.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn member(&self, number: u32) -> Result<Member> {
        let mut f = self.record(MEMBERS, number)?;
        let member = Member {
            blob_start: f.u64(),
            blob_end: f.u64(),
            first: f.u32(),
            count: f.u32(),
            window: (f.u64(), f.u32()),
            check: f.u32(),
            coding: Coding::from_byte(f.u8()).ok_or_else(|| damaged("unknown coding"))?,
            bits: f.u8(),
        };
        if member.blob_end <= member.blob_start || member.blob_end > self.summary.blob_bytes {
            return Err(damaged("a member beyond the blob"));
        }
        Ok(member)
    }

    /// The numbers of a member's chunks, by their place in it.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn member_chunks(&self, member: &Member) -> Result<Vec<u32>> {
        (member.first..member.first.saturating_add(member.count))
            .map(|number| Ok(self.record(ORDER, number)?.u32()))
            .collect()
    }

    /// The digest of a member's bytes in the blob, where the chunks have none of their own.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn check(&self, member: &Member) -> Result<Option<Digest>> {
        self.digest(member.check)
    }

    /// The window that decoding a member starts with, compressed as zstd; empty for none.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn window(&self, member: &Member) -> Result<&[u8]> {
        let start = self.sections.windows_start().saturating_add(member.window.0);
        let end = start.saturating_add(u64::from(member.window.1));
        if end > self.sections.strings_start() {
            return Err(damaged("a window beyond its section"));
        }
        let window = self.bytes.get(start as usize..end as usize);
        window.ok_or_else(|| damaged("a window beyond the end"))
    }

    /// Digest of an entry's whole content, where the layer says it.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn content_digest(&self, entry: &EntryRef<'_>) -> Result<Option<Digest>> {
        self.digest(entry.digest)
    }

    /// Digest `number - 1` of the table, none for 0.
    fn digest(&self, number: u32) -> Result<Option<Digest>> {
        let Some(number) = number.checked_sub(1) else {
            return Ok(None);
        };
        Ok(Some(Digest::from_bytes(self.record(DIGESTS, number)?.take())))
    }

    /// The xattrs of an entry, name and value.
    ///
    /// # Errors
    /// As [`Self::entry`].
    pub fn xattrs(&self, entry: &EntryRef<'_>) -> Result<Vec<(&[u8], &[u8])>> {
        let start = self.sections.xattrs_start().saturating_add(entry.xattrs.0);
        let end = start.saturating_add(u64::from(entry.xattrs.1));
        if end > self.sections.windows_start() {
            return Err(damaged("xattrs beyond their section"));
        }
        let encoded = self.bytes.get(start as usize..end as usize);
        xattrs::decode(encoded.ok_or_else(|| damaged("xattrs beyond the end"))?)
    }
}

#[cfg(test)]
mod tests;
