//! What a zTOC says: the entries of a layer's tar, and the spans from which it can be decoded.
//!
//! ```text
//! Ztoc             { version: "0.9", build_tool_identifier, compressed_archive_size: long, uncompressed_archive_size: long,
//!                    toc: TOC, compression_info: CompressionInfo }
//! TOC              { metadata: [FileMetadata] }
//! FileMetadata     { name, type, uncompressed_offset: long, uncompressed_size: long, linkname, mode: long, uid: uint,
//!                    gid: uint, uname, gname, mod_time, devmajor: long, devminor: long, xattrs: [Xattr] }
//! Xattr            { key, value }
//! CompressionInfo  { compression_algorithm: byte = 1, max_span_id: int, span_digests: [string], checkpoints: [ubyte] }
//! TarZinfo         { version: int, span_size: long, size: long }
//! ```
//! `checkpoints` of gzip are packed, little-endian: `count i32, span size i64`, then for each span `in i64, out i64,
//! bits u8, window 32768`. The first version of the format leaves the first span out, which then is at 10, 0, 0. Those of
//! an uncompressed tar are a FlatBuffer of their own, a `TarZinfo`, and its spans are all of one size.

use std::ops::Range;

use super::flatbuffer::{Buffer, Table, Vector};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::checked::CHECKED_BYTES_MAX;
use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::gzip::window::WINDOW_BYTES_MAX;
use crate::layer::index::ENTRIES_MAX;
use crate::layer::time::parse_rfc3339;

/// The only version that there is.
const VERSION: &[u8] = b"0.9";
const GZIP: i8 = 1;
const UNCOMPRESSED: i8 = 2;
/// Count and span size before the checkpoints.
const HEAD_BYTES: usize = 12;
/// One packed checkpoint.
const CHECKPOINT_BYTES: usize = 17 + WINDOW_BYTES_MAX;
/// The first checkpoint of the format's first version: behind the shortest gzip header.
const FIRST_IN_V1: u64 = 10;
/// The most spans: with those of 4 MiB that is common, a layer of 4 TiB.
const SPANS_MAX: usize = 1 << 20;
/// The most bytes that a span unpacks to: what reading one small file may cost.
const SPAN_BYTES_MAX: u64 = 1 << 30;
/// The most PAX records of one entry; Go's `archive/tar` reads at most 1 MiB of them.
const RECORDS_MAX: usize = 1 << 16;
/// The prefix of the PAX records that carry extended attributes.
pub(super) const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
/// The prefix of the PAX records of a sparse file, of whose holes a zTOC knows nothing.
const SPARSE_PREFIX: &[u8] = b"GNU.sparse.";
/// The size of a tar header, and what all in a tar is aligned to.
pub(super) const BLOCK_BYTES: u64 = 512;

pub(super) fn malformed(why: impl Into<String>) -> Error {
    Error::malformed("zTOC", why)
}

fn unsupported(why: impl Into<String>) -> Error {
    Error::unsupported("zTOC", why)
}

/// A length or an offset, which is a signed number in the file.
fn unsigned(number: i64, what: &str) -> Result<u64> {
    u64::try_from(number).map_err(|_| malformed(format!("{what} is negative")))
}

/// How the layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Uncompressed,
}

/// A piece of the blob that decodes on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span<'b> {
    /// Its bytes in the blob. Neighbours share a byte where one ends within it.
    pub(super) blob: Range<u64>,
    /// Its bytes in the tar.
    pub(super) tar: Range<u64>,
    /// How many bits of its first byte are its own, the high ones; 0 if all are.
    pub(super) bits: u8,
    /// The last bytes of the tar before it, as far as deflate may look back.
    pub(super) window: &'b [u8],
    /// The digest of its bytes in the blob.
    pub(super) check: Digest,
}

/// An entry, and where its content stands in the tar.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) entry: Entry,
    pub(super) offset: u64,
}

/// A zTOC whose spans were checked. Entries are checked as they are read.
#[derive(Debug)]
pub(super) struct Ztoc<'r, 'b> {
    pub(super) compression: Compression,
    pub(super) spans: Vec<Span<'b>>,
    metadata: Vector<'r, 'b>,
    tar_bytes: u64,
}

impl<'r, 'b> Ztoc<'r, 'b> {
    /// Reads a zTOC of a blob of `blob_bytes`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is none or contradicts itself or the blob, [`Error::Unsupported`] when it is of another
    /// version, or its spans are larger than this program wants to hold.
    pub(super) fn read(buffer: &'r Buffer<'b>, blob_bytes: u64) -> Result<Self> {
        let root = buffer.root()?;
        let version = root.bytes(0)?;
        if version != VERSION {
            let shown: String = String::from_utf8_lossy(version).chars().take(40).collect();
            return Err(unsupported(format!("it is of version {shown:?}, not 0.9")));
        }
        let compressed_bytes = unsigned(root.i64(2)?, "the size of its archive")?;
        let tar_bytes = unsigned(root.i64(3)?, "the size of its tar")?;
        if compressed_bytes != blob_bytes {
            let why = format!("it is of a layer of {compressed_bytes} bytes, but the layer has {blob_bytes}");
            return Err(malformed(why));
        }
        let missing = |what: &str| malformed(format!("it has no {what}"));
        let metadata = root
            .table(4)?
            .ok_or_else(|| missing("table of contents"))?
            .vector(0)?;
        if metadata.len() > ENTRIES_MAX {
            return Err(malformed("it has too many entries"));
        }
        let info = root.table(5)?.ok_or_else(|| missing("compression info"))?;
        let (compression, spans) = match info.i8(0, GZIP)? {
            GZIP => (Compression::Gzip, gzip_spans(info.bytes(3)?)?),
            UNCOMPRESSED => (Compression::Uncompressed, tar_spans(info.bytes(3)?, blob_bytes)?),
            other => return Err(unsupported(format!("compression algorithm {other}"))),
        };
        let count = i64::from(info.i32(1)?).saturating_add(1);
        let digests = info.vector(2)?;
        if u64::try_from(count) != Ok(spans.len() as u64) || digests.len() != spans.len() {
            let why = format!(
                "it has {} checkpoints, {} digests and {count} spans",
                spans.len(),
                digests.len()
            );
            return Err(malformed(why));
        }
        Ok(Self {
            compression,
            spans: close_spans(&spans, &digests, blob_bytes, tar_bytes)?,
            metadata,
            tar_bytes,
        })
    }

    /// The entries in the order of the tar.
    pub(super) fn entries(&self) -> impl Iterator<Item = Result<Placed>> {
        // Where the next tar header stands at the earliest.
        let mut header = 0u64;
        (0..self.metadata.len()).map(move |number| {
            let placed = read_entry(&self.metadata.table(number)?)?;
            let content_end = placed.offset.checked_add(placed.entry.size);
            let end = content_end.filter(|&end| end <= self.tar_bytes);
            match end.and_then(|end| end.checked_next_multiple_of(BLOCK_BYTES)) {
                Some(next) if placed.offset >= header.saturating_add(BLOCK_BYTES) => {
                    header = next;
                    Ok(placed)
                }
                _ => Err(malformed(format!(
                    "the content of entry {number} lies over another or beyond the tar"
                ))),
            }
        })
    }
}

/// The start of a span, before it is known where it ends.
struct Start<'b> {
    blob: u64,
    tar: u64,
    bits: u8,
    window: &'b [u8],
}

fn gzip_spans(packed: &[u8]) -> Result<Vec<Start<'_>>> {
    let cut = || malformed("its checkpoints are cut short");
    let (head, packed) = packed.split_at_checked(HEAD_BYTES).ok_or_else(cut)?;
    let count = head
        .first_chunk::<4>()
        .map_or(0, |count| i32::from_le_bytes(*count));
    let count = usize::try_from(count).unwrap_or(0);
    let stored = packed.len() / CHECKPOINT_BYTES;
    let is_whole = packed.len() % CHECKPOINT_BYTES == 0;
    let mut starts = match (is_whole, count.checked_sub(stored)) {
        (true, Some(0)) if count > 0 => Vec::new(),
        (true, Some(1)) => vec![Start {
            blob: FIRST_IN_V1,
            tar: 0,
            bits: 0,
            window: &[],
        }],
        _ => return Err(malformed("the number of its checkpoints does not fit their size")),
    };
    for checkpoint in packed.chunks_exact(CHECKPOINT_BYTES) {
        let (at, rest) = checkpoint.split_first_chunk::<8>().ok_or_else(cut)?;
        let (out, rest) = rest.split_first_chunk::<8>().ok_or_else(cut)?;
        let ([bits], window) = rest.split_first_chunk::<1>().ok_or_else(cut)?;
        let at = unsigned(i64::from_le_bytes(*at), "a checkpoint")?;
        let out = unsigned(i64::from_le_bytes(*out), "a checkpoint")?;
        if *bits > 7 {
            return Err(malformed("a checkpoint has more than 7 bits"));
        }
        // What stands before the start of the tar in a window is whatever the builder had in its memory.
        let used = usize::try_from(out).unwrap_or(usize::MAX).min(WINDOW_BYTES_MAX);
        let blob = at.checked_sub(u64::from(*bits != 0));
        starts.push(Start {
            blob: blob.ok_or_else(|| malformed("a checkpoint lies before the blob"))?,
            tar: out,
            bits: *bits,
            window: window.get(WINDOW_BYTES_MAX - used..).unwrap_or_default(),
        });
    }
    Ok(starts)
}

fn tar_spans(info: &[u8], blob_bytes: u64) -> Result<Vec<Start<'static>>> {
    let buffer = Buffer::new(info);
    let root = buffer.root()?;
    let span_bytes = unsigned(root.i64(1)?, "a span's size")?;
    let size = unsigned(root.i64(2)?, "a tar's size")?;
    if span_bytes == 0 || size != blob_bytes {
        return Err(malformed("its spans are empty, or of a tar of another size"));
    }
    let count = blob_bytes.div_ceil(span_bytes);
    if count > SPANS_MAX as u64 {
        return Err(malformed("it has too many spans"));
    }
    let start = |number: u64| Start {
        blob: number * span_bytes,
        tar: number * span_bytes,
        bits: 0,
        window: &[],
    };
    Ok((0..count).map(start).collect())
}

/// Checks that spans follow one another, and gives each its end and its digest.
fn close_spans<'b>(
    starts: &[Start<'b>],
    digests: &Vector<'_, 'b>,
    blob_bytes: u64,
    tar_bytes: u64,
) -> Result<Vec<Span<'b>>> {
    if starts.len() > SPANS_MAX {
        return Err(malformed("it has too many spans"));
    }
    if starts.first().is_none_or(|first| first.tar != 0) {
        return Err(malformed("its first span does not start with the tar"));
    }
    let mut spans = Vec::with_capacity(starts.len());
    for (number, start) in starts.iter().enumerate() {
        let (blob_end, tar_end) = match starts.get(number + 1) {
            // The byte within which the next one starts belongs to both.
            Some(next) => (next.blob.saturating_add(u64::from(next.bits != 0)), next.tar),
            None => (blob_bytes, tar_bytes.max(start.tar)),
        };
        let is_behind = starts.get(number + 1).is_none_or(|next| next.blob > start.blob);
        if !is_behind || blob_end <= start.blob || blob_end > blob_bytes || tar_end < start.tar {
            return Err(malformed(format!("span {number} does not end behind its start")));
        }
        if blob_end - start.blob > CHECKED_BYTES_MAX || tar_end - start.tar > SPAN_BYTES_MAX {
            let why = format!("span {number} has more than 64 MiB, or unpacks to more than 1 GiB");
            return Err(unsupported(why));
        }
        let text = std::str::from_utf8(digests.bytes(number)?).unwrap_or_default();
        spans.push(Span {
            blob: start.blob..blob_end,
            tar: start.tar..tar_end,
            bits: start.bits,
            window: start.window,
            check: text
                .parse()
                .map_err(|_| malformed(format!("the digest of span {number} is none")))?,
        });
    }
    Ok(spans)
}

fn read_entry(metadata: &Table<'_, '_>) -> Result<Placed> {
    let path = metadata.bytes(0)?;
    let refuse = |why: &str| malformed(format!("entry {:?}: {why}", String::from_utf8_lossy(path)));
    let kind = match metadata.bytes(1)? {
        b"dir" => Kind::Dir,
        b"reg" => Kind::File,
        b"symlink" => Kind::Symlink,
        b"hardlink" => Kind::Hardlink,
        b"char" => Kind::Char,
        b"block" => Kind::Block,
        b"fifo" => Kind::Fifo,
        _ => return Err(refuse("a type that tar does not have")),
    };
    let offset = unsigned(metadata.i64(2)?, "the place of an entry")?;
    let size = unsigned(metadata.i64(3)?, "the size of an entry")?;
    let device = |number: i64| u32::try_from(number).map_err(|_| refuse("a device number beyond 32 bits"));
    let rdev = match kind {
        Kind::Char | Kind::Block => (device(metadata.i64(11)?)?, device(metadata.i64(12)?)?),
        _ => (0, 0),
    };
    let entry = Entry {
        path: path.to_vec(),
        kind,
        mode: (metadata.i64(5)? & 0o7777) as u32,
        uid: metadata.u32(6)?,
        gid: metadata.u32(7)?,
        mtime: read_time(metadata.bytes(10)?).ok_or_else(|| refuse("a time that is none"))?,
        size: if kind == Kind::File { size } else { 0 },
        link: metadata.bytes(4)?.to_vec(),
        rdev,
        xattrs: read_xattrs(&metadata.vector(13)?).map_err(|error| match error {
            Error::Malformed { why, .. } => refuse(&why),
            other => other,
        })?,
        digest: None,
    };
    Ok(Placed { entry, offset })
}

/// A time. The builder writes nothing for one outside of the years that RFC 3339 has.
fn read_time(text: &[u8]) -> Option<Time> {
    match text {
        b"" => Some(Time::default()),
        text => parse_rfc3339(std::str::from_utf8(text).ok()?),
    }
}

/// The extended attributes among an entry's PAX records, which is what `xattrs` holds.
fn read_xattrs(records: &Vector<'_, '_>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    if records.len() > RECORDS_MAX {
        return Err(malformed("too many PAX records"));
    }
    let mut xattrs = Vec::new();
    for number in 0..records.len() {
        let record = records.table(number)?;
        let key = record.bytes(0)?;
        if key.starts_with(SPARSE_PREFIX) {
            return Err(unsupported("a sparse file, whose holes it does not know"));
        }
        if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
            xattrs.push((name.to_vec(), record.bytes(1)?.to_vec()));
        }
    }
    xattrs.sort_unstable();
    if xattrs.windows(2).any(|pair| matches!(pair, [a, b] if a.0 == b.0)) {
        return Err(malformed("two PAX records of one name"));
    }
    Ok(xattrs)
}
