//! The maps of sparse files, in the four forms that GNU tar has written: behind a header of its own type (`S`), and in PAX
//! versions 0.0 and 0.1 (in the records) and 1.0 (in front of the data).
//!
//! All come to the same: segments of the file that the payload holds, one behind the other. The rest are holes.

use crate::layer::tar::header::number;
use crate::layer::tar::pax::{Records, decimal};
use crate::layer::tar::{BLOCK_BYTES, Rule, SPECIAL_BYTES_MAX};

/// Where the map starts in a GNU header.
const HEADER_MAP_AT: usize = 386;
/// Segments in a GNU header.
const HEADER_SEGMENTS: usize = 4;
/// Segments in a block that continues it.
const EXTENSION_SEGMENTS: usize = BLOCK_BYTES / SEGMENT_BYTES;
/// An offset and a length of 12 bytes each.
const SEGMENT_BYTES: usize = 24;
/// Where the file's size stands in a GNU header; its size field has that of the payload.
const REAL_SIZE: std::ops::Range<usize> = 483..495;

/// Why a map is not read on.
const TOO_LONG: Rule = "its sparse map is longer than 1 MiB";
const NOT_NUMBERS: Rule = "its sparse map is not made of numbers";

/// A part of a file that is not a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// A map as it was written: offsets and lengths, not checked yet.
pub(super) type RawMap = Vec<(i64, i64)>;

/// The size of the file that a GNU header of type `S` is of.
pub(super) fn real_size(block: &[u8; BLOCK_BYTES]) -> Result<i64, Rule> {
    number(&block[REAL_SIZE]).ok_or("its sparse file has no size")
}

/// Reads the map in a GNU header and in the blocks that continue it.
#[derive(Debug, Default)]
pub(super) struct HeaderMap {
    map: RawMap,
    bytes: usize,
}

impl HeaderMap {
    /// Takes the header. Returns whether a block with more follows it.
    pub(super) fn header(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<bool, Rule> {
        segments(&block[HEADER_MAP_AT..], HEADER_SEGMENTS, &mut self.map)
    }

    /// Takes a block that continues it. Returns whether another follows.
    pub(super) fn extension(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<bool, Rule> {
        self.bytes += BLOCK_BYTES;
        if self.bytes > SPECIAL_BYTES_MAX {
            return Err(TOO_LONG);
        }
        segments(block, EXTENSION_SEGMENTS, &mut self.map)
    }

    pub(super) fn finish(self) -> RawMap {
        self.map
    }
}

fn segments(records: &[u8], count: usize, map: &mut RawMap) -> Result<bool, Rule> {
    let (table, rest) = records.split_at(count * SEGMENT_BYTES);
    for record in table.chunks_exact(SEGMENT_BYTES) {
        // A record that starts with NUL ends the table, but blocks may follow it.
        if record[0] == 0 {
            break;
        }
        let (offset, bytes) = record.split_at(SEGMENT_BYTES / 2);
        map.push(number(offset).zip(number(bytes)).ok_or(NOT_NUMBERS)?);
    }
    Ok(rest.first().is_some_and(|&more| more != 0))
}

/// Which sparse file the PAX records speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    /// 0.0 or 0.1: the map is in the records.
    InRecords,
    /// 1.0: the map is in front of the data.
    InPayload,
}

/// Whether the records speak of a sparse file. Of a version that nobody knows they do not, as in Go.
pub(super) fn version(records: &Records) -> Option<Version> {
    let version = |key: &[u8]| records.get(key).unwrap_or_default();
    match (version(b"GNU.sparse.major"), version(b"GNU.sparse.minor")) {
        (b"0", b"0" | b"1") => Some(Version::InRecords),
        (b"1", b"0") => Some(Version::InPayload),
        (b"", b"") => records
            .get(b"GNU.sparse.map")
            .is_some()
            .then_some(Version::InRecords),
        _ => None,
    }
}

/// The map of version 0.0 or 0.1.
pub(super) fn of_records(records: &Records) -> Result<RawMap, Rule> {
    let count = records
        .number(b"GNU.sparse.numblocks")?
        .and_then(|count| usize::try_from(count).ok());
    let numbers: Vec<i64> = match records.get(b"GNU.sparse.map") {
        Some(map) => map
            .split(|&byte| byte == b',')
            .map(|number| decimal(number).ok_or(NOT_NUMBERS))
            .collect::<Result<_, _>>()?,
        None => Vec::new(),
    };
    if !numbers.len().is_multiple_of(2) || Some(numbers.len() / 2) != count {
        return Err("its sparse map has another number of segments than its PAX records say");
    }
    Ok(pairs(&numbers))
}

fn pairs(numbers: &[i64]) -> RawMap {
    numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Reads the map of version 1.0: lines with decimal numbers, the first of which says how many segments follow, in as many
/// blocks as that takes.
#[derive(Debug, Default)]
pub(super) struct PayloadMap {
    /// The start of a line whose end has not come yet.
    line: Vec<u8>,
    /// How many numbers are to come, once that is known.
    wanted: Option<usize>,
    numbers: Vec<i64>,
    bytes: usize,
}

impl PayloadMap {
    /// Takes the next block. Returns whether it was the last one.
    pub(super) fn block(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<bool, Rule> {
        self.bytes += BLOCK_BYTES;
        if self.bytes > SPECIAL_BYTES_MAX {
            return Err(TOO_LONG);
        }
        for &byte in block {
            if self.wanted == Some(self.numbers.len()) {
                return Ok(true);
            }
            if byte != b'\n' {
                // Leading zeros included, a number needs no more room than this.
                if self.line.len() >= BLOCK_BYTES {
                    return Err(NOT_NUMBERS);
                }
                self.line.push(byte);
                continue;
            }
            let number = decimal(&self.line).ok_or(NOT_NUMBERS)?;
            self.line.clear();
            if self.wanted.is_some() {
                self.numbers.push(number);
            } else {
                let wanted = usize::try_from(number)
                    .ok()
                    .and_then(|count| count.checked_mul(2));
                self.wanted = Some(wanted.ok_or(NOT_NUMBERS)?);
            }
        }
        Ok(self.wanted == Some(self.numbers.len()))
    }

    pub(super) fn finish(self) -> RawMap {
        pairs(&self.numbers)
    }
}

/// Checks a map against the size of its file and the payload that is left for it. Segments that touch become one.
pub(super) fn check(map: &RawMap, size: i64, payload_bytes: u64) -> Result<Vec<Segment>, Rule> {
    let size = u64::try_from(size).map_err(|_| "the size of its sparse file is negative")?;
    let mut segments: Vec<Segment> = Vec::new();
    let (mut end, mut stored_bytes) = (0, 0);
    for &(offset, bytes) in map {
        let (Ok(offset), Ok(bytes)) = (u64::try_from(offset), u64::try_from(bytes)) else {
            return Err("its sparse map has negative numbers");
        };
        if offset < end {
            return Err("the segments of its sparse map overlap or are out of order");
        }
        let is_adjacent = offset == end;
        // Both are at most 2^63, so their sum is not too large for 64 bits.
        end = offset + bytes;
        if end > size {
            return Err("its sparse map reaches beyond the end of the file");
        }
        stored_bytes += bytes;
        match segments.last_mut() {
            _ if bytes == 0 => {}
            Some(last) if is_adjacent && last.offset + last.bytes == offset => last.bytes += bytes,
            _ => segments.push(Segment { offset, bytes }),
        }
    }
    if stored_bytes != payload_bytes {
        return Err("its sparse map has another length than its data");
    }
    Ok(segments)
}
