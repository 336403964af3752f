//! Lays out what a builder collected as the bytes of an index: groups chunks into members, and checks what only shows when
//! all of them are known.

use super::{COPIES_MAX, INNER_OFFSET_MAX, IndexBuilder, NewMember, StoredEntry};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::index::{
    CRC_AT, Coding, ENTRY_BYTES, HEADER_BYTES, MAGIC, NO_DIGEST, Sections, Summary, VERSION,
};

/// Lays out what a builder collected.
pub(super) fn assemble(mut built: IndexBuilder, summary: &Summary, data_end: u64) -> Result<Vec<u8>> {
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
