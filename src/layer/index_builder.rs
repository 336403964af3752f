//! Builds the index of a layer (see [`crate::layer::index`]) and refuses what no format may contain.
//!
//! The rules that hold for every format live here, so that a parser cannot forget one: a file's chunks cover it exactly
//! and in order, members do not lie outside the blob, names and attributes are ones that Linux can show, and no count,
//! size or offset overflows its field.

use std::collections::BTreeMap;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time, clean_path};
use crate::layer::index::{
    CHUNKS_MAX, CRC_AT, Coding, DATA_ALIGN_BYTES, DATA_BYTES_MAX, ENTRIES_MAX, ENTRY_BYTES, HEADER_BYTES,
    MAGIC, NO_DIGEST, Sections, Summary, VERSION,
};
use crate::layer::xattrs;

/// Longest path in bytes, as PATH_MAX.
const PATH_BYTES_MAX: usize = 4095;
/// Longest path component in bytes, as NAME_MAX.
const NAME_BYTES_MAX: usize = 255;
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

/// Collects entries and chunks in the order of the layer's index.
#[derive(Debug)]
pub struct IndexBuilder {
    coding: Coding,
    /// By where they start in the blob.
    members: BTreeMap<u64, NewMember>,
    entries: Vec<StoredEntry>,
    chunks: Vec<StoredChunk>,
    digests: Vec<Digest>,
    xattrs: Vec<u8>,
    strings: Vec<u8>,
    data_bytes: u64,
    unpacked_bytes: u64,
    /// Bytes of the last file that no chunk covers yet.
    uncovered: u64,
}

/// An entry with its strings in the pool.
#[derive(Debug)]
struct StoredEntry {
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

/// A chunk before the members are known.
#[derive(Debug)]
struct StoredChunk {
    data_offset: u64,
    entry: u32,
    chunk: NewChunk,
}

impl IndexBuilder {
    /// A builder of an empty index, whose members have this coding unless [`Self::member`] says otherwise.
    #[must_use]
    pub fn new(coding: Coding) -> Self {
        Self {
            coding,
            members: BTreeMap::new(),
            entries: Vec::new(),
            chunks: Vec::new(),
            digests: Vec::new(),
            xattrs: Vec::new(),
            strings: Vec::new(),
            data_bytes: 0,
            unpacked_bytes: 0,
            uncovered: 0,
        }
    }

    /// Tells of a member. Members of which no chunk is come to nothing.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is empty, is there already, or its bits are none.
    pub fn member(&mut self, member: NewMember) -> Result<()> {
        let refuse = |why: &str| Error::malformed(format!("member at {}", member.blob_start), why);
        if member.blob_end <= member.blob_start {
            return Err(refuse("it is empty"));
        }
        if member.bits > 7 || (member.bits > 0 && member.coding != Coding::Deflate) {
            return Err(refuse("it starts within a byte where it cannot"));
        }
        if self.members.contains_key(&member.blob_start) {
            return Err(refuse("it is there twice"));
        }
        if self.members.len() >= CHUNKS_MAX {
            return Err(refuse("too many members"));
        }
        self.members.insert(member.blob_start, member);
        Ok(())
    }

    /// The place in the data file of the content of the entry that was added last, and its size.
    #[must_use]
    pub fn last_place(&self) -> Option<(u64, u64)> {
        self.entries.last().map(|entry| (entry.data_offset, entry.size))
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
                let number = self.entries.len().saturating_sub(1);
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
        self.check_covered()?;
        let refuse =
            |why: &str| Error::malformed(format!("entry {:?}", String::from_utf8_lossy(&entry.path)), why);
        if self.entries.len() >= ENTRIES_MAX {
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
                self.digests.push(digest);
                self.digests.len() as u32
            }
            None => 0,
        };
        let encoded = xattrs::encode(&entry.xattrs).map_err(|e| refuse(&e.to_string()))?;
        let xattrs = (self.xattrs.len() as u64, encoded.len() as u32);
        self.xattrs.extend_from_slice(&encoded);
        let stored = StoredEntry {
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
            chunks: (self.chunks.len() as u32, 0),
            data_offset,
            digest,
            xattrs,
        };
        self.entries.push(stored);
        self.uncovered = size;
        Ok(())
    }

    /// Adds the next chunk of the entry that was added last. Its member may be told of before or after.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it does not continue a regular file or reaches beyond its end.
    pub fn chunk(&mut self, chunk: NewChunk) -> Result<()> {
        let number = self.entries.len().saturating_sub(1) as u32;
        let refuse = |why: &str| Error::malformed(format!("chunk of entry {number}"), why);
        let covered = self.uncovered;
        let entry = self
            .entries
            .last_mut()
            .ok_or_else(|| refuse("no entry before it"))?;
        if entry.kind != Kind::File || chunk.bytes == 0 || chunk.bytes > covered {
            return Err(refuse("it reaches beyond the end of its file, or is empty"));
        }
        if self.chunks.len() >= CHUNKS_MAX {
            return Err(refuse("too many chunks"));
        }
        entry.chunks.1 += 1;
        let data_offset = entry.data_offset + (entry.size - covered);
        self.chunks.push(StoredChunk {
            data_offset,
            entry: number,
            chunk,
        });
        self.uncovered -= chunk.bytes;
        Ok(())
    }

    /// Puts the index together. `data_end` is where the last member must end in the blob; of `summary`, the sizes of the
    /// data are filled in here.
    ///
    /// # Errors
    /// [`Error::Malformed`] when a file is not covered by its chunks, or a member starts at or beyond `data_end`.
    pub fn finish(mut self, summary: Summary, data_end: u64) -> Result<Vec<u8>> {
        self.check_covered()?;
        let summary = Summary {
            data_bytes: self.data_bytes,
            unpacked_bytes: self.unpacked_bytes,
            ..summary
        };
        // Offset 0 of the pool is the empty string, whatever came first.
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        assemble(self, &summary, data_end)
    }

    fn check_covered(&self) -> Result<()> {
        if self.uncovered == 0 {
            return Ok(());
        }
        let number = self.entries.len().saturating_sub(1);
        Err(Error::malformed(
            format!("entry {number}"),
            format!("{} bytes of it are in no chunk", self.uncovered),
        ))
    }

    fn intern(&mut self, bytes: &[u8]) -> Result<(u32, u16)> {
        let full = |_| Error::malformed("layer index", "more than 4 GiB of names");
        let offset = u32::try_from(self.strings.len()).map_err(full)?;
        let len =
            u16::try_from(bytes.len()).map_err(|_| Error::malformed("layer index", "a name over 64 KiB"))?;
        self.strings.extend_from_slice(bytes);
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

/// Lays out what a builder collected.
fn assemble(mut built: IndexBuilder, summary: &Summary, data_end: u64) -> Result<Vec<u8>> {
    let (order, members, member_of) = group_members(&mut built, data_end);
    let built = &built;
    if members.last().is_some_and(|last| last.blob_start >= data_end) || data_end > summary.blob_bytes {
        return Err(Error::malformed(
            "layer index",
            "a chunk starts beyond the layer's data",
        ));
    }
    if members.iter().any(|member| member.blob_end > data_end) {
        return Err(Error::malformed(
            "layer index",
            "a member ends beyond the layer's data",
        ));
    }
    check_overlaps(built, &order, &members)?;
    let counts = [
        built.entries.len() as u64,
        built.chunks.len() as u64,
        members.len() as u64,
        order.len() as u64,
        built.digests.len() as u64,
    ];
    let sections = Sections {
        counts,
        xattr_bytes: built.xattrs.len() as u64,
        window_bytes: members.iter().map(|member| member.window.len() as u64).sum(),
        string_bytes: built.strings.len() as u64,
    };
    let mut out = Vec::with_capacity(sections.end() as usize);
    write_header(&mut out, &sections, summary);
    built
        .entries
        .iter()
        .for_each(|entry| write_entry(&mut out, entry));
    for (stored, member) in built.chunks.iter().zip(&member_of) {
        put(
            &mut out,
            &[stored.data_offset, stored.chunk.bytes, stored.chunk.inner_offset],
        );
        out.extend_from_slice(&member.to_le_bytes());
        out.extend_from_slice(&stored.entry.to_le_bytes());
        out.extend_from_slice(stored.chunk.digest.unwrap_or(NO_DIGEST).as_bytes());
    }
    write_members(&mut out, &members);
    order
        .iter()
        .for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
    built
        .digests
        .iter()
        .for_each(|digest| out.extend_from_slice(digest.as_bytes()));
    out.extend_from_slice(&built.xattrs);
    members
        .iter()
        .for_each(|member| out.extend_from_slice(&member.window));
    out.extend_from_slice(&built.strings);
    let crc = crc32fast::hash(&out[CRC_AT + 4..]);
    out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(out)
}

/// Two chunks of one member may be the same bytes (then they say the same digest) or follow one another, never overlap.
/// Only so many may be the same: each is a copy that one read of any of them has to write.
fn check_overlaps(built: &IndexBuilder, order: &[u32], members: &[Grouped]) -> Result<()> {
    for member in members {
        let mut copies = 1;
        let chunks = &order[member.first as usize..(member.first + member.count) as usize];
        // Of a member that the builder was told of, whoever told it answers for the cost.
        let inner_offset = |&number: &u32| built.chunks[number as usize].chunk.inner_offset;
        if !member.has_end && chunks.iter().map(inner_offset).max() > Some(INNER_OFFSET_MAX) {
            let what = format!("member at {}", member.blob_start);
            return Err(Error::malformed(what, "a chunk lies more than 1 GiB into it"));
        }
        let is_bare = |&number: &u32| built.chunks[number as usize].chunk.digest.is_none();
        if member.check == 0 && chunks.iter().any(is_bare) {
            let what = format!("member at {}", member.blob_start);
            return Err(Error::malformed(what, "nothing vouches for a chunk of it"));
        }
        for pair in chunks.windows(2) {
            let (a, b) = (
                &built.chunks[pair[0] as usize].chunk,
                &built.chunks[pair[1] as usize].chunk,
            );
            let same = a.inner_offset == b.inner_offset && a.bytes == b.bytes && a.digest == b.digest;
            if !same && a.inner_offset.saturating_add(a.bytes) > b.inner_offset {
                let what = format!("member at {}", member.blob_start);
                return Err(Error::malformed(what, "two chunks of it overlap or disagree"));
            }
            copies = if same { copies + 1 } else { 1 };
            if copies > COPIES_MAX {
                let what = format!("member at {}", member.blob_start);
                return Err(Error::malformed(
                    what,
                    "more than 16 chunks of it are the same bytes",
                ));
            }
        }
    }
    Ok(())
}

fn put(out: &mut Vec<u8>, fields: &[u64]) {
    fields
        .iter()
        .for_each(|field| out.extend_from_slice(&field.to_le_bytes()));
}

fn write_header(out: &mut Vec<u8>, sections: &Sections, summary: &Summary) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    put(out, &sections.counts);
    put(
        out,
        &[sections.xattr_bytes, sections.window_bytes, sections.string_bytes],
    );
    put(
        out,
        &[summary.blob_bytes, summary.data_bytes, summary.unpacked_bytes],
    );
    put(
        out,
        &[
            summary.toc_start,
            summary.toc_end,
            summary.toc_bytes,
            summary.prefetch_end,
            summary.tar_bytes,
        ],
    );
    out.extend_from_slice(summary.toc_digest.as_bytes());
    out.extend_from_slice(summary.diff_id.as_bytes());
    out.push(summary.format as u8);
    out.resize(HEADER_BYTES, 0);
}

fn write_entry(out: &mut Vec<u8>, entry: &StoredEntry) {
    let end = out.len() + ENTRY_BYTES;
    out.extend_from_slice(&entry.path.0.to_le_bytes());
    out.extend_from_slice(&entry.path.1.to_le_bytes());
    out.push(entry.kind as u8);
    out.push(u8::from(entry.clamped));
    for field in [entry.mode, entry.uid, entry.gid] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&entry.mtime.seconds.to_le_bytes());
    out.extend_from_slice(&entry.mtime.nanos.to_le_bytes());
    out.extend_from_slice(&entry.size.to_le_bytes());
    out.extend_from_slice(&entry.link.0.to_le_bytes());
    out.extend_from_slice(&entry.link.1.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    for field in [entry.rdev.0, entry.rdev.1, entry.chunks.0, entry.chunks.1] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&entry.data_offset.to_le_bytes());
    out.extend_from_slice(&entry.digest.to_le_bytes());
    out.extend_from_slice(&entry.xattrs.0.to_le_bytes());
    out.extend_from_slice(&entry.xattrs.1.to_le_bytes());
    out.resize(end, 0);
}

/// A member with its chunks' places in the order.
struct Grouped {
    blob_start: u64,
    blob_end: u64,
    first: u32,
    count: u32,
    coding: Coding,
    bits: u8,
    window: Vec<u8>,
    /// Number in the digest table plus one, 0 for none.
    check: u32,
    /// Whether it ends where it was said to end, and not where the next one starts.
    has_end: bool,
}

/// Members are the distinct blob offsets of the chunks. One that the builder was not told of ends where the next starts,
/// or at `data_end`. Returns the chunks' numbers in the order of the blob, the members, and each chunk's member.
fn group_members(built: &mut IndexBuilder, data_end: u64) -> (Vec<u32>, Vec<Grouped>, Vec<u32>) {
    let mut order: Vec<u32> = (0..built.chunks.len() as u32).collect();
    let chunks = &built.chunks;
    let place = |&number: &u32| {
        let chunk = &chunks[number as usize].chunk;
        (chunk.blob_offset, chunk.inner_offset)
    };
    order.sort_by_key(place);
    let mut members: Vec<Grouped> = Vec::new();
    let mut member_of = vec![0u32; order.len()];
    for (position, number) in order.iter().enumerate() {
        let (start, _) = place(number);
        match members.last_mut() {
            Some(last) if last.blob_start == start => last.count += 1,
            last => {
                if let Some(last) = last.filter(|last| !last.has_end) {
                    last.blob_end = start;
                }
                let told = built.members.remove(&start);
                members.push(group(told, start, data_end, built.coding, &mut built.digests));
            }
        }
        if let Some(last) = members.last_mut().filter(|last| last.count == 0) {
            (last.first, last.count) = (position as u32, 1);
        }
        member_of[*number as usize] = (members.len() - 1) as u32;
    }
    (order, members, member_of)
}

/// A member without chunks yet.
fn group(
    told: Option<NewMember>,
    blob_start: u64,
    data_end: u64,
    coding: Coding,
    digests: &mut Vec<Digest>,
) -> Grouped {
    let has_end = told.is_some();
    let told = told.unwrap_or(NewMember {
        blob_start,
        blob_end: data_end,
        coding,
        bits: 0,
        window: Vec::new(),
        check: None,
    });
    digests.extend(told.check);
    Grouped {
        blob_start,
        blob_end: told.blob_end,
        first: 0,
        count: 0,
        coding: told.coding,
        bits: told.bits,
        window: told.window,
        check: told.check.map_or(0, |_| digests.len() as u32),
        has_end,
    }
}

fn write_members(out: &mut Vec<u8>, members: &[Grouped]) {
    let mut window_offset = 0;
    for member in members {
        let window_bytes = member.window.len() as u32;
        put(out, &[member.blob_start, member.blob_end]);
        out.extend_from_slice(&member.first.to_le_bytes());
        out.extend_from_slice(&member.count.to_le_bytes());
        put(out, &[window_offset]);
        out.extend_from_slice(&window_bytes.to_le_bytes());
        out.extend_from_slice(&member.check.to_le_bytes());
        out.extend_from_slice(&[member.coding as u8, member.bits, 0, 0, 0, 0, 0, 0]);
        window_offset += u64::from(window_bytes);
    }
}
