//! Lays out what a builder collected as the bytes of an index: groups chunks into members, and checks what only shows when
//! all of them are known.

use super::{COPIES_MAX, INNER_OFFSET_MAX, IndexBuilder, NewChunk, OpenEntry, Section, Told};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::fields::Fields;
use crate::layer::index::{
    CHUNK_BYTES, CRC_AT, Coding, DIGEST_BYTES, ENTRY_BYTES, HEADER_BYTES, MAGIC, MEMBER_BYTES, NO_DIGEST,
    Sections, Summary, VERSION,
};
use crate::layer::spool::{Spool, Spooled};

/// Where the number of its member stands in the record of a chunk: the builder does not know it yet.
const MEMBER_AT: usize = 24;
/// Records of a few bytes are put out so many at a time.
const BATCH: usize = 4096;

/// Lays out what a builder collected.
pub(super) fn assemble(mut built: IndexBuilder, summary: &Summary, data_end: u64) -> Result<Spooled> {
    let chunks = Chunks {
        records: built.chunks.spool.finish()?,
        blob_offsets: built.blob_offsets,
    };
    let (order, members, member_of) =
        group_members(&chunks, built.members, built.coding, data_end, &mut built.digests)?;
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
    check_overlaps(&chunks, &order, &members)?;
    let counts = [
        u64::from(built.entry_count),
        chunks.blob_offsets.len() as u64,
        members.len() as u64,
        order.len() as u64,
        built.digests.bytes / DIGEST_BYTES as u64,
    ];
    let sections = Sections {
        counts,
        xattr_bytes: built.xattrs.bytes,
        window_bytes: members.iter().map(|member| u64::from(member.window.1)).sum(),
        string_bytes: built.strings.bytes,
    };
    let mut out = Out::new(built.scratch.spool(), &header(&sections, summary))?;
    out.section(built.entries)?;
    write_chunks(&mut out, &chunks, &member_of)?;
    write_members(&mut out, &members)?;
    for numbers in order.chunks(BATCH) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        out.put(&bytes)?;
    }
    out.section(built.digests)?;
    out.section(built.xattrs)?;
    write_windows(&mut out, &members, built.windows)?;
    out.section(built.strings)?;
    out.finish()
}

/// The index as it is written, checksum and all.
struct Out {
    spool: Box<dyn Spool>,
    crc: crc32fast::Hasher,
}

impl Out {
    fn new(spool: Box<dyn Spool>, header: &[u8]) -> Result<Self> {
        let mut out = Self {
            spool,
            crc: crc32fast::Hasher::new(),
        };
        let (unchecked, checked) = header.split_at(CRC_AT + 4);
        out.spool.write(unchecked)?;
        out.put(checked)?;
        Ok(out)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.crc.update(bytes);
        self.spool.write(bytes)
    }

    fn section(&mut self, section: Section) -> Result<()> {
        let bytes = section.spool.finish()?;
        let put = self.put(&bytes);
        bytes.vouch(put)?
    }

    fn finish(mut self) -> Result<Spooled> {
        let crc = self.crc.finalize();
        self.spool.patch(CRC_AT as u64, &crc.to_le_bytes())?;
        self.spool.finish()
    }
}

/// The chunks before their members are known.
struct Chunks {
    /// Their records, as [`chunk_record`] makes them.
    records: Spooled,
    /// Where the member of each starts in the blob.
    blob_offsets: Vec<u64>,
}

impl Chunks {
    /// Length, place in the member, and digest of a chunk.
    fn get(&self, number: u32) -> (u64, u64, Digest) {
        let start = number as usize * CHUNK_BYTES;
        let mut fields = Fields(self.records.get(start..start + CHUNK_BYTES).unwrap_or_default());
        let (_data_offset, bytes, inner_offset) = (fields.u64(), fields.u64(), fields.u64());
        let (_member, _entry) = (fields.u32(), fields.u32());
        (bytes, inner_offset, Digest::from_bytes(fields.take()))
    }

    /// By what chunks are ordered: where they stand in the blob.
    fn place(&self, number: u32) -> (u64, u64) {
        let (_, inner_offset, _) = self.get(number);
        (self.blob_offsets[number as usize], inner_offset)
    }
}

/// Two chunks of one member may be the same bytes (then they say the same digest) or follow one another, never overlap.
/// Only so many may be the same: each is a copy that one read of any of them has to write.
fn check_overlaps(chunks: &Chunks, order: &[u32], members: &[Grouped]) -> Result<()> {
    for member in members {
        let refuse = |why: &str| Error::malformed(format!("member at {}", member.blob_start), why);
        let mut copies = 1;
        let mut before: Option<(u64, u64, Digest)> = None;
        for &number in &order[member.first as usize..(member.first + member.count) as usize] {
            let chunk @ (bytes, inner_offset, digest) = chunks.get(number);
            // Of a member that the builder was told of, whoever told it answers for the cost.
            if !member.has_end && inner_offset > INNER_OFFSET_MAX {
                return Err(refuse("a chunk lies more than 1 GiB into it"));
            }
            if member.check == 0 && digest == NO_DIGEST {
                return Err(refuse("nothing vouches for a chunk of it"));
            }
            let same = before == Some((bytes, inner_offset, digest));
            let overlaps = |(bytes, start, _): (u64, u64, Digest)| start.saturating_add(bytes) > inner_offset;
            if !same && before.is_some_and(overlaps) {
                return Err(refuse("two chunks of it overlap or disagree"));
            }
            copies = if same { copies + 1 } else { 1 };
            if copies > COPIES_MAX {
                return Err(refuse("more than 16 chunks of it are the same bytes"));
            }
            before = Some(chunk);
        }
    }
    chunks.records.vouch(())
}

fn put(out: &mut Vec<u8>, fields: &[u64]) {
    fields
        .iter()
        .for_each(|field| out.extend_from_slice(&field.to_le_bytes()));
}

/// The header, but for the checksum.
fn header(sections: &Sections, summary: &Summary) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    put(&mut out, &sections.counts);
    put(
        &mut out,
        &[
            sections.xattr_bytes,
            sections.window_bytes,
            sections.string_bytes,
            summary.blob_bytes,
            summary.data_bytes,
            summary.unpacked_bytes,
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
    out
}

/// The record of an entry.
pub(super) fn entry_record(entry: &OpenEntry) -> Vec<u8> {
    let mut out = Vec::with_capacity(ENTRY_BYTES);
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
    out.resize(ENTRY_BYTES, 0);
    out
}

/// The record of a chunk, but for the number of its member.
pub(super) fn chunk_record(data_offset: u64, entry: u32, chunk: &NewChunk) -> Vec<u8> {
    let mut out = Vec::with_capacity(CHUNK_BYTES);
    put(&mut out, &[data_offset, chunk.bytes, chunk.inner_offset]);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&entry.to_le_bytes());
    out.extend_from_slice(chunk.digest.unwrap_or(NO_DIGEST).as_bytes());
    out
}

/// A member with its chunks' places in the order.
struct Grouped {
    blob_start: u64,
    blob_end: u64,
    first: u32,
    count: u32,
    coding: Coding,
    bits: u8,
    /// Place and length of its window among those that were told.
    window: (u64, u32),
    /// Number in the digest table plus one, 0 for none.
    check: u32,
    /// Whether it ends where it was said to end, and not where the next one starts.
    has_end: bool,
}

/// Members are the distinct blob offsets of the chunks. One that the builder was not told of ends where the next starts,
/// or at `data_end`. Returns the chunks' numbers in the order of the blob, the members, and each chunk's member.
fn group_members(
    chunks: &Chunks,
    told: Vec<Told>,
    coding: Coding,
    data_end: u64,
    digests: &mut Section,
) -> Result<(Vec<u32>, Vec<Grouped>, Vec<u32>)> {
    let mut order: Vec<u32> = (0..chunks.blob_offsets.len() as u32).collect();
    order.sort_by_key(|&number| chunks.place(number));
    let mut told = told.into_iter().peekable();
    let start_of = |&number: &u32| chunks.blob_offsets[number as usize];
    let count = order.chunk_by(|a, b| start_of(a) == start_of(b)).count();
    let mut members: Vec<Grouped> = Vec::with_capacity(count);
    let mut member_of = vec![0u32; order.len()];
    for (position, &number) in order.iter().enumerate() {
        let start = start_of(&number);
        match members.last_mut() {
            Some(last) if last.blob_start == start => last.count += 1,
            last => {
                if let Some(last) = last.filter(|last| !last.has_end) {
                    last.blob_end = start;
                }
                while told.next_if(|told| told.blob_start < start).is_some() {}
                let told = told.next_if(|told| told.blob_start == start);
                let mut member = Grouped {
                    blob_start: start,
                    blob_end: data_end,
                    first: position as u32,
                    count: 1,
                    coding,
                    bits: 0,
                    window: (0, 0),
                    check: 0,
                    has_end: told.is_some(),
                };
                if let Some(told) = told {
                    (member.blob_end, member.coding) = (told.blob_end, told.coding);
                    (member.bits, member.window) = (told.bits, told.window);
                    if let Some(check) = told.check {
                        digests.add(check.as_bytes())?;
                        member.check = (digests.bytes / DIGEST_BYTES as u64) as u32;
                    }
                }
                members.push(member);
            }
        }
        member_of[number as usize] = (members.len() - 1) as u32;
    }
    Ok((order, members, member_of))
}

fn write_chunks(out: &mut Out, chunks: &Chunks, member_of: &[u32]) -> Result<()> {
    let records = chunks.records.chunks(BATCH * CHUNK_BYTES);
    for (records, members) in records.zip(member_of.chunks(BATCH)) {
        let mut records = records.to_vec();
        for (record, member) in records.chunks_exact_mut(CHUNK_BYTES).zip(members) {
            record[MEMBER_AT..MEMBER_AT + 4].copy_from_slice(&member.to_le_bytes());
        }
        out.put(&records)?;
    }
    chunks.records.vouch(())
}

fn write_members(out: &mut Out, members: &[Grouped]) -> Result<()> {
    let mut window_offset = 0;
    for members in members.chunks(BATCH) {
        let mut records = Vec::with_capacity(members.len() * MEMBER_BYTES);
        for member in members {
            put(&mut records, &[member.blob_start, member.blob_end]);
            records.extend_from_slice(&member.first.to_le_bytes());
            records.extend_from_slice(&member.count.to_le_bytes());
            put(&mut records, &[window_offset]);
            records.extend_from_slice(&member.window.1.to_le_bytes());
            records.extend_from_slice(&member.check.to_le_bytes());
            records.extend_from_slice(&[member.coding as u8, member.bits, 0, 0, 0, 0, 0, 0]);
            window_offset += u64::from(member.window.1);
        }
        out.put(&records)?;
    }
    Ok(())
}

/// Writes the windows of the members that there are, in their order.
fn write_windows(out: &mut Out, members: &[Grouped], windows: Section) -> Result<()> {
    let windows = windows.spool.finish()?;
    for member in members.iter().filter(|member| member.window.1 > 0) {
        let (start, len) = (member.window.0 as usize, member.window.1 as usize);
        let window = windows.get(start..start + len);
        out.put(window.ok_or_else(|| Error::malformed("layer index", "a window is gone"))?)?;
    }
    windows.vouch(())
}
