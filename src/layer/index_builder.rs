//! Builds the index of a layer (see [`crate::layer::index`]) and refuses what no format may contain.
//!
//! The rules that hold for every format live here, so that a parser cannot forget one: a file's chunks cover it exactly
//! and in order, members do not lie outside the blob, names and attributes are ones that Linux can show, and no count,
//! size or offset overflows its field.

mod assemble;

use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time, clean_path};
use crate::layer::index::{
    CHUNK_BYTES, CHUNKS_MAX, Coding, DATA_ALIGN_BYTES, DATA_BYTES_MAX, DIGEST_BYTES, ENTRIES_MAX,
    ENTRY_BYTES, INDEX_BYTES_MAX, MEMBER_BYTES, ORDER_BYTES, Summary,
};
use crate::layer::spool::{InMemory, Scratch, Spool, Spooled};
use crate::layer::xattrs;

/// Longest path in bytes, as PATH_MAX.
const PATH_BYTES_MAX: usize = 4095;
/// Longest path component in bytes, as NAME_MAX.
pub const NAME_BYTES_MAX: usize = 255;
/// The most components in a path.
const DEPTH_MAX: usize = 1000;
/// The most chunks of one layer that are the same bytes of the same member.
const COPIES_MAX: usize = 16;
/// The most decoded bytes before a chunk in its member: what one small chunk may cost to reach.
pub const INNER_OFFSET_MAX: u64 = 1 << 30;

/// A chunk as a parser finds it.
#[derive(Debug, Clone, Copy)]
pub struct NewChunk {
    /// Length in bytes.
    pub bytes: u64,
    /// Where its member starts in the blob.
    pub blob_offset: u64,
    /// Where it starts in the decoded member.
    pub inner_offset: u64,
    /// The digest of its bytes; only a chunk of a member with a check may be without one.
    pub digest: Option<Digest>,
}

/// What is to be known of a member besides where it starts. A member of which the builder is told nothing is of the
/// coding that the layer's format has ([`IndexBuilder::new`]), and ends where the next one starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMember {
    /// Where it starts in the blob.
    pub blob_start: u64,
    /// Where it ends in the blob.
    pub blob_end: u64,
    /// How its bytes are decoded.
    pub coding: Coding,
    /// As in [`Member::bits`].
    pub bits: u8,
    /// The window that decoding starts with, compressed as zstd; empty for none.
    pub window: Vec<u8>,
    /// The digest of its bytes in the blob, for chunks that have none.
    pub check: Option<Digest>,
}

/// Collects entries and chunks in the order of the layer's index. What it has collected is in spools, in the form that it
/// has in the index; of a chunk or member some ten bytes are held.
#[derive(Debug)]
pub struct IndexBuilder {
    coding: Coding,
    scratch: Arc<dyn Scratch>,
    /// In the order of the blob.
    members: Vec<Told>,
    entries: Section,
    entry_count: u32,
    /// The entry that was added last: its chunks are still coming.
    open: Option<OpenEntry>,
    chunks: Section,
    /// Of each chunk, where its member starts in the blob.
    blob_offsets: Vec<u64>,
    digests: Section,
    xattrs: Section,
    windows: Section,
    strings: Section,
    data_bytes: u64,
    unpacked_bytes: u64,
    /// Bytes of the last file that no chunk covers yet.
    uncovered: u64,
    /// Bytes by which the index may still grow.
    left_bytes: u64,
}

/// One section of the index.
#[derive(Debug)]
struct Section {
    spool: Box<dyn Spool>,
    bytes: u64,
}

impl Section {
    fn new(scratch: &dyn Scratch) -> Self {
        Self {
            spool: scratch.spool(),
            bytes: 0,
        }
    }

    /// Appends, and returns where.
    fn add(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.bytes;
        self.spool.write(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(at)
    }
}

/// A member that the builder was told of.
#[derive(Debug)]
struct Told {
    blob_start: u64,
    blob_end: u64,
    /// Place and length of its window among those that were told.
    window: (u64, u32),
    coding: Coding,
    bits: u8,
    check: Option<Box<Digest>>,
}

/// An entry with its strings in the pool.
#[derive(Debug)]
struct OpenEntry {
    path: (u32, u16),
    kind: Kind,
    clamped: bool,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
    size: u64,
    link: (u32, u16),
    rdev: (u32, u32),
    chunks: (u32, u32),
    data_offset: u64,
    digest: u32,
    xattrs: (u64, u32),
}

impl IndexBuilder {
    /// A builder of an empty index, whose members have this coding unless [`Self::member`] says otherwise. It holds all of
    /// it in memory.
    #[must_use]
    pub fn new(coding: Coding) -> Self {
        Self::spooled(coding, Arc::new(InMemory))
    }

    /// The same with what it collects in `scratch`.
    #[must_use]
    pub fn spooled(coding: Coding, scratch: Arc<dyn Scratch>) -> Self {
        let section = || Section::new(&*scratch);
        Self {
            coding,
            members: Vec::new(),
            entries: section(),
            entry_count: 0,
            open: None,
            chunks: section(),
            blob_offsets: Vec::new(),
            digests: section(),
            xattrs: section(),
            windows: section(),
            strings: section(),
            data_bytes: 0,
            unpacked_bytes: 0,
            uncovered: 0,
            left_bytes: INDEX_BYTES_MAX,
            scratch,
        }
    }

    /// Counts what is added. Compressed names and attributes are small, what they become here is not.
    fn grow(&mut self, bytes: usize) -> Result<()> {
        match self.left_bytes.checked_sub(bytes as u64) {
            Some(left) => {
                self.left_bytes = left;
                Ok(())
            }
            None => Err(Error::malformed(
                "layer index",
                "the layer has so many names, attributes and pieces that its index would be larger than 1 GiB",
            )),
        }
    }

    /// Tells of the next member in the order of the blob. Members of which no chunk is come to nothing.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is empty, starts where or before the last one does, or its bits are none.
    pub fn member(&mut self, member: NewMember) -> Result<()> {
        let refuse = |why: &str| Error::malformed(format!("member at {}", member.blob_start), why);
        if member.blob_end <= member.blob_start {
            return Err(refuse("it is empty"));
        }
        if member.bits > 7 || (member.bits > 0 && member.coding != Coding::Deflate) {
            return Err(refuse("it starts within a byte where it cannot"));
        }
        let last = self.members.last();
        if last.is_some_and(|last| last.blob_start >= member.blob_start) {
            return Err(refuse("it is there twice, or after one that comes behind it"));
        }
        if self.members.len() >= CHUNKS_MAX {
            return Err(refuse("too many members"));
        }
        let window_bytes =
            u32::try_from(member.window.len()).map_err(|_| refuse("its window is too large"))?;
        self.grow(MEMBER_BYTES + DIGEST_BYTES + member.window.len())?;
        self.members.push(Told {
            blob_start: member.blob_start,
            blob_end: member.blob_end,
            window: (self.windows.add(&member.window)?, window_bytes),
            coding: member.coding,
            bits: member.bits,
            check: member.check.map(Box::new),
        });
        Ok(())
    }

    /// The place in the data file of the content of the entry that was added last, and its size.
    #[must_use]
    pub fn last_place(&self) -> Option<(u64, u64)> {
        self.open.as_ref().map(|entry| (entry.data_offset, entry.size))
    }

    /// The next `bytes` of the entry that was added last are a hole: no chunk has them, and they read as zeros.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it does not continue a regular file or reaches beyond its end.
    pub fn hole(&mut self, bytes: u64) -> Result<()> {
        match self.uncovered.checked_sub(bytes) {
            Some(left) => {
                self.uncovered = left;
                Ok(())
            }
            None => {
                let number = self.last_number();
                Err(Error::malformed(
                    format!("hole in entry {number}"),
                    "it reaches beyond the end of its file",
                ))
            }
        }
    }

    /// Adds the next entry in tar order. The chunks of a non-empty regular file must follow before the next entry.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the entry and the rule it breaks.
    pub fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.close_entry()?;
        let refuse =
            |why: &str| Error::malformed(format!("entry {:?}", String::from_utf8_lossy(&entry.path)), why);
        if self.entry_count as usize >= ENTRIES_MAX {
            return Err(refuse("too many entries"));
        }
        let clean = clean_path(&entry.path);
        check_path(&clean.path).map_err(refuse)?;
        let link = match entry.kind {
            Kind::Hardlink => {
                let target = clean_path(&entry.link);
                check_path(&target.path).map_err(refuse)?;
                target.path
            }
            Kind::Symlink if entry.link.is_empty() => return Err(refuse("a symbolic link without a target")),
            Kind::Symlink if entry.link.len() > PATH_BYTES_MAX || entry.link.contains(&0) => {
                return Err(refuse("a symbolic link target with a NUL or over 4095 bytes"));
            }
            Kind::Symlink => entry.link.clone(),
            _ => Vec::new(),
        };
        let size = if entry.kind == Kind::File { entry.size } else { 0 };
        let data_offset = self.data_bytes;
        self.data_bytes = size
            .checked_next_multiple_of(DATA_ALIGN_BYTES)
            .and_then(|padded| data_offset.checked_add(padded))
            .filter(|&end| end <= DATA_BYTES_MAX)
            .ok_or_else(|| refuse("the layer unpacks to more than 8 TiB"))?;
        self.unpacked_bytes += size;
        let digest = match entry.digest {
            Some(digest) => {
                self.digests.add(digest.as_bytes())?;
                (self.digests.bytes / DIGEST_BYTES as u64) as u32
            }
            None => 0,
        };
        let encoded = xattrs::encode(&entry.xattrs).map_err(|e| refuse(&e.to_string()))?;
        self.grow(ENTRY_BYTES + DIGEST_BYTES + encoded.len() + clean.path.len() + link.len())?;
        let xattrs = (self.xattrs.add(&encoded)?, encoded.len() as u32);
        let open = OpenEntry {
            path: self.intern(&clean.path)?,
            kind: entry.kind,
            clamped: clean.clamped,
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            size,
            link: self.intern(&link)?,
            rdev: entry.rdev,
            chunks: (self.blob_offsets.len() as u32, 0),
            data_offset,
            digest,
            xattrs,
        };
        self.open = Some(open);
        self.entry_count += 1;
        self.uncovered = size;
        Ok(())
    }

    /// Adds the next chunk of the entry that was added last. Its member may be told of before or after.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it does not continue a regular file or reaches beyond its end.
    pub fn chunk(&mut self, chunk: NewChunk) -> Result<()> {
        let number = self.last_number();
        let refuse = |why: &str| Error::malformed(format!("chunk of entry {number}"), why);
        let covered = self.uncovered;
        let entry = self.open.as_mut().ok_or_else(|| refuse("no entry before it"))?;
        if entry.kind != Kind::File || chunk.bytes == 0 || chunk.bytes > covered {
            return Err(refuse("it reaches beyond the end of its file, or is empty"));
        }
        if self.blob_offsets.len() >= CHUNKS_MAX {
            return Err(refuse("too many chunks"));
        }
        entry.chunks.1 += 1;
        let data_offset = entry.data_offset + (entry.size - covered);
        self.chunks
            .add(&assemble::chunk_record(data_offset, number, &chunk))?;
        self.blob_offsets.push(chunk.blob_offset);
        self.uncovered -= chunk.bytes;
        // It may be a member of its own.
        self.grow(CHUNK_BYTES + ORDER_BYTES + MEMBER_BYTES)
    }

    /// Puts the index together. `data_end` is where the last member must end in the blob; of `summary`, the sizes of the
    /// data are filled in here.
    ///
    /// # Errors
    /// [`Error::Malformed`] when a file is not covered by its chunks, or a member starts at or beyond `data_end`.
    pub fn finish(mut self, summary: Summary, data_end: u64) -> Result<Spooled> {
        self.close_entry()?;
        let summary = Summary {
            data_bytes: self.data_bytes,
            unpacked_bytes: self.unpacked_bytes,
            ..summary
        };
        // Offset 0 of the pool is the empty string, whatever came first.
        if self.strings.bytes == 0 {
            self.strings.add(&[0])?;
        }
        assemble::assemble(self, &summary, data_end)
    }

    /// Number of the entry that was added last.
    fn last_number(&self) -> u32 {
        self.entry_count.saturating_sub(1)
    }

    /// Nothing more belongs to the entry that was added last.
    fn close_entry(&mut self) -> Result<()> {
        if self.uncovered > 0 {
            return Err(Error::malformed(
                format!("entry {}", self.last_number()),
                format!("{} bytes of it are in no chunk", self.uncovered),
            ));
        }
        match self.open.take() {
            Some(entry) => self.entries.add(&assemble::entry_record(&entry)).map(drop),
            None => Ok(()),
        }
    }

    fn intern(&mut self, bytes: &[u8]) -> Result<(u32, u16)> {
        let full = |_| Error::malformed("layer index", "more than 4 GiB of names");
        let len =
            u16::try_from(bytes.len()).map_err(|_| Error::malformed("layer index", "a name over 64 KiB"))?;
        let offset = u32::try_from(self.strings.bytes).map_err(full)?;
        self.strings.add(bytes)?;
        Ok((offset, len))
    }
}

fn check_path(path: &[u8]) -> std::result::Result<(), &'static str> {
    if path.contains(&0) {
        return Err("a name with a NUL");
    }
    if path.len() > PATH_BYTES_MAX {
        return Err("a path over 4095 bytes");
    }
    let mut depth = 0;
    for name in path.split(|&b| b == b'/') {
        depth += 1;
        if name.len() > NAME_BYTES_MAX {
            return Err("a name over 255 bytes");
        }
    }
    if depth > DEPTH_MAX {
        Err("a path of more than 1000 components")
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Format;
    use crate::layer::index::HEADER_BYTES;

    /// Adds files with attributes, chunks and members until the index is full, which may take this many bytes.
    fn fill(left_bytes: u64) -> (usize, Error, IndexBuilder) {
        let mut builder = IndexBuilder {
            left_bytes,
            ..IndexBuilder::new(Coding::Deflate)
        };
        for added in 0.. {
            let mut file = Entry::new(format!("file{added}"), Kind::File);
            (file.size, file.xattrs) = (1, vec![(b"user.a".to_vec(), vec![0; 1000])]);
            let chunk = NewChunk {
                bytes: 1,
                blob_offset: added as u64 + 1,
                inner_offset: 0,
                digest: Some(Digest::of(b"x")),
            };
            let member = NewMember {
                blob_start: chunk.blob_offset,
                blob_end: chunk.blob_offset + 1,
                coding: Coding::Deflate,
                bits: 0,
                window: vec![0; 1000],
                check: None,
            };
            let outcome = builder
                .entry(&file)
                .and_then(|()| builder.chunk(chunk))
                .and_then(|()| builder.member(member));
            if let Err(error) = outcome {
                return (added, error, builder);
            }
        }
        unreachable!("it never gets full");
    }

    #[test]
    fn an_index_stays_below_its_bound_whatever_fills_it() {
        for left_bytes in [0, 20_000, 100_000] {
            let (added, error, builder) = fill(left_bytes);
            assert!(error.to_string().contains("larger than 1 GiB"), "{error}");
            assert!(added as u64 >= left_bytes / 2500, "{added} of {left_bytes}");
            let held = builder.xattrs.bytes + builder.strings.bytes + builder.windows.bytes;
            assert!(held <= left_bytes);
        }
    }

    #[test]
    fn what_fits_is_counted_at_least_as_it_is_written() {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        let mut file = Entry::new("file", Kind::File);
        (file.size, file.digest) = (2, Some(Digest::of(b"xy")));
        file.xattrs = vec![(b"user.a".to_vec(), b"value".to_vec())];
        builder.entry(&file).unwrap();
        for blob_offset in [1, 2] {
            let (bytes, inner_offset, digest) = (1, 0, Some(Digest::of(b"x")));
            builder
                .chunk(NewChunk {
                    bytes,
                    blob_offset,
                    inner_offset,
                    digest,
                })
                .unwrap();
        }
        let counted = INDEX_BYTES_MAX - builder.left_bytes;
        let index = builder
            .finish(Summary::of(Format::Estargz, 9), 9)
            .unwrap()
            .to_vec();
        assert!(index.len() - HEADER_BYTES <= counted as usize);
    }
}
