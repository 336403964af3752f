//! Regular files: where their chunks are in the data file of their layer.

use std::ops::{Deref, Range};

use crate::error::{Error, Result};
use crate::image::erofs::disk::{BLOCK_BYTES, CHUNK_BYTES, put_chunk};
use crate::image::tree::Node;
use crate::layer::entry::Kind;
use crate::layer::index::{EntryRef, Index};

/// The devices of a layer, of the same bytes: the first has the small files, the second the large ones.
pub(super) const DEVICES_PER_LAYER: usize = 2;
/// The largest small file, in bytes: what EROFS reads of a device in one piece.
pub(super) const SMALL_BYTES_MAX: u64 = 64 << 10;
/// The longest chunk table of one file: 2 KiB, however large the file and however many its holes.
const CHUNKS_MAX: u64 = 256;

/// How one file is cut into chunks.
#[derive(Debug)]
pub(super) struct Chunks {
    /// A chunk has `1 << bits` blocks.
    pub(super) bits: u8,
    /// Number of chunks.
    pub(super) count: u32,
    /// Of them, those that are holes.
    holes: Vec<Range<u32>>,
    /// The device, counted from 1, and its block where the file starts.
    start: (u16, u32),
}

impl Chunks {
    /// Cuts a non-empty file of layer `node.layer`: into one chunk, or more where some of them can be holes.
    pub(super) fn of<B: Deref<Target = [u8]>>(index: &Index<B>, node: &Node) -> Result<Self> {
        let entry = entry_of(index, node)?;
        let blocks = entry.size.div_ceil(BLOCK_BYTES);
        let data_end = blocks
            .checked_mul(BLOCK_BYTES)
            .and_then(|bytes| entry.data_offset.checked_add(bytes));
        let is_inside = data_end.is_some_and(|end| end <= index.summary().data_bytes);
        let block = u32::try_from(entry.data_offset / BLOCK_BYTES);
        let is_large = u16::from(entry.size > SMALL_BYTES_MAX);
        let before = node.layer.checked_mul(DEVICES_PER_LAYER as u16);
        let device = before.and_then(|before| before.checked_add(1 + is_large));
        let (Ok(block), Some(device)) = (block, device) else {
            return Err(damaged("a file beyond the last block"));
        };
        if !is_inside || !entry.data_offset.is_multiple_of(BLOCK_BYTES) {
            return Err(damaged("a file outside its layer's data"));
        }
        let start = (device, block);
        let bits = bits_for(blocks.div_ceil(CHUNKS_MAX));
        let holes = holes(index, &entry, BLOCK_BYTES << bits)?;
        let bits = if holes.is_empty() { bits_for(blocks) } else { bits };
        Ok(Self {
            bits,
            count: blocks.div_ceil(1 << bits) as u32,
            holes,
            start,
        })
    }

    /// Size of the table in bytes.
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.count) * CHUNK_BYTES
    }

    /// Appends the table.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let (device, start) = self.start;
        let mut holes = self.holes.iter().peekable();
        for number in 0..self.count {
            while holes.next_if(|hole| hole.end <= number).is_some() {}
            let is_hole = holes.peek().is_some_and(|hole| hole.contains(&number));
            let block = start + (number << self.bits);
            put_chunk(out, (!is_hole).then_some((device, block)));
        }
    }
}

/// The entry of a regular file, if tree and index agree on it.
fn entry_of<'i, B: Deref<Target = [u8]>>(index: &'i Index<B>, node: &Node) -> Result<EntryRef<'i>> {
    let number = node
        .entry
        .ok_or_else(|| damaged("a file of which no layer has an entry"))?;
    let entry = index.entry(number)?;
    if entry.kind != Kind::File || entry.size != node.size {
        return Err(damaged("a file that its layer has otherwise"));
    }
    Ok(entry)
}

/// The smallest power of two that is not below `blocks`, as an exponent.
fn bits_for(blocks: u64) -> u8 {
    blocks.next_power_of_two().trailing_zeros() as u8
}

/// The chunks of so many bytes that lie in holes altogether. Together they are no more than [`CHUNKS_MAX`].
fn holes<B: Deref<Target = [u8]>>(
    index: &Index<B>,
    entry: &EntryRef<'_>,
    chunk_bytes: u64,
) -> Result<Vec<Range<u32>>> {
    let mut holes = Vec::new();
    let mut note = |start: u64, end: u64| {
        let first = start.div_ceil(chunk_bytes);
        // The last chunk ends with the file.
        let end = if end == entry.size {
            end.div_ceil(chunk_bytes)
        } else {
            end / chunk_bytes
        };
        if first < end {
            holes.push(first as u32..end as u32);
        }
    };
    let mut covered = 0;
    for number in entry.chunk_range() {
        let chunk = index.chunk(number)?;
        let start = chunk.data_offset.checked_sub(entry.data_offset);
        let start = start.filter(|&start| start >= covered);
        let end = start.and_then(|start| start.checked_add(chunk.bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= entry.size)) else {
            return Err(damaged("chunks of a file in another order"));
        };
        note(covered, start);
        covered = end;
    }
    note(covered, entry.size);
    Ok(holes)
}

fn damaged(why: &str) -> Error {
    Error::malformed("merged tree or layer index", why)
}
