//! Builds the index of a layer (see [`crate::layer::index`]) and refuses what no format may contain.
//!
//! The rules that hold for every format live here, so that a parser cannot forget one: a file's chunks cover it exactly
//! and in order, members do not lie outside the blob, names and attributes are ones that Linux can show, and no count,
//! size or offset overflows its field.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time, clean_path};
use crate::layer::index::{
    CHUNKS_MAX, CRC_AT, DATA_ALIGN_BYTES, DATA_BYTES_MAX, ENTRIES_MAX, ENTRY_BYTES, HEADER_BYTES, MAGIC,
    Member, Sections, Summary, VERSION,
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
    /// The digest of its bytes.
    pub digest: Digest,
}

/// Collects entries and chunks in the order of the layer's index.
#[derive(Debug, Default)]
pub struct IndexBuilder {
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

    /// Adds the next chunk of the entry that was added last.
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
        if chunk.inner_offset > INNER_OFFSET_MAX {
            return Err(refuse("it lies more than 1 GiB into its member"));
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
        assemble(&self, &summary, data_end)
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
fn assemble(built: &IndexBuilder, summary: &Summary, data_end: u64) -> Result<Vec<u8>> {
    let (order, members, member_of) = group_members(built, data_end);
    if members.last().is_some_and(|last| last.blob_start >= data_end) || data_end > summary.blob_bytes {
        return Err(Error::malformed(
            "layer index",
            "a chunk starts beyond the layer's data",
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
        out.extend_from_slice(stored.chunk.digest.as_bytes());
    }
    for member in &members {
        put(&mut out, &[member.blob_start, member.blob_end]);
        out.extend_from_slice(&member.first.to_le_bytes());
        out.extend_from_slice(&member.count.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
    }
    order
        .iter()
        .for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
    built
        .digests
        .iter()
        .for_each(|digest| out.extend_from_slice(digest.as_bytes()));
    out.extend_from_slice(&built.xattrs);
    out.extend_from_slice(&built.strings);
    let crc = crc32fast::hash(&out[CRC_AT + 4..]);
    out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    Ok(out)
}

/// Two chunks of one member may be the same bytes (then they say the same digest) or follow one another, never overlap.
/// Only so many may be the same: each is a copy that one read of any of them has to write.
fn check_overlaps(built: &IndexBuilder, order: &[u32], members: &[Member]) -> Result<()> {
    for member in members {
        let mut copies = 1;
        let chunks = &order[member.first as usize..(member.first + member.count) as usize];
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
    put(out, &[sections.xattr_bytes, sections.string_bytes]);
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
        ],
    );
    out.extend_from_slice(summary.toc_digest.as_bytes());
    out.push(u8::from(summary.toc_promised));
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

/// Members are the distinct blob offsets of the chunks; each ends where the next starts, the last at `data_end`.
/// Returns the chunks' numbers in the order of the blob, the members, and each chunk's member.
fn group_members(built: &IndexBuilder, data_end: u64) -> (Vec<u32>, Vec<Member>, Vec<u32>) {
    let mut order: Vec<u32> = (0..built.chunks.len() as u32).collect();
    let place = |&number: &u32| {
        let chunk = &built.chunks[number as usize].chunk;
        (chunk.blob_offset, chunk.inner_offset)
    };
    order.sort_by_key(place);
    let mut members: Vec<Member> = Vec::new();
    let mut member_of = vec![0u32; order.len()];
    for (position, number) in order.iter().enumerate() {
        let (start, _) = place(number);
        match members.last_mut() {
            Some(last) if last.blob_start == start => last.count += 1,
            last => {
                if let Some(last) = last {
                    last.blob_end = start;
                }
                let member = Member {
                    blob_start: start,
                    blob_end: data_end,
                    first: position as u32,
                    count: 1,
                };
                members.push(member);
            }
        }
        member_of[*number as usize] = (members.len() - 1) as u32;
    }
    (order, members, member_of)
}
