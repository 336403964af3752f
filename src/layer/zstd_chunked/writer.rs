//! Writes zstd:chunked layers as each of its writers does, for tests and for the demo registry.
//!
//! Readers of the real ones must not depend on what only one version writes, so all of them are here: footers of 40, 56
//! and 64 bytes, both prefixes of annotations, tar-split data or none, and stargz-snapshotter's layout. The same input
//! gives the same bytes.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;

use super::{CHECKSUM, OLD_PREFIX, POSITION, PREFIX};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::estargz::TOC_DIGEST_ANNOTATION;
use crate::layer::toc_writer::{TocEntry, compact, indented};
use crate::layer::{tar, time};

/// Zeros in a row that become a chunk of their own.
const HOLE_BYTES_MIN: usize = 1024;
/// Content-defined chunks end where so many bits of a rolling hash are zero: every 64 KiB on average.
const BOUNDARY_BITS: u32 = 16;
/// How containers/storage up to 1.43 writes times that are not known.
const NO_TIME: &str = "0001-01-01T00:00:00Z";
/// What the frames around the TOC claim, whatever those of content do.
const METADATA_WINDOW_LOG: u8 = 23;
/// Stands for tar-split data, which no reader of files needs.
const TAR_SPLIT: &[u8] = b"tar-split";

/// Whose layout a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// containers/storage up to 1.43: old annotations, a footer of 40 bytes, times that say nothing.
    Storage1_43,
    /// containers/storage 1.44 to 1.46: new annotations, a footer of 40 bytes.
    Storage1_46,
    /// containers/storage 1.47 to 1.49: a footer of 56 bytes.
    Storage1_49,
    /// containers/storage from 1.50 on: tar-split data, a footer of 64 bytes.
    Storage1_50,
    /// stargz-snapshotter: eStargz with zstd frames.
    Stargz,
}

impl Version {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::Storage1_43,
        Self::Storage1_46,
        Self::Storage1_49,
        Self::Storage1_50,
        Self::Stargz,
    ];

    fn prefix(self) -> &'static str {
        match self {
            Self::Storage1_43 | Self::Stargz => OLD_PREFIX,
            _ => PREFIX,
        }
    }
}

/// How a layer is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Whose layout it has.
    pub version: Version,
    /// Payload bytes in a chunk, at least 1; `None` is 4 MiB for stargz-snapshotter, and what the content defines for
    /// containers/storage.
    pub chunk_bytes: Option<usize>,
    /// Compression level, 1 to 22.
    pub level: i32,
    /// Binary logarithm of the window that the frames claim to need, 17 to 31.
    pub window_log: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            version: Version::Storage1_50,
            chunk_bytes: None,
            level: 3,
            window_log: 25,
        }
    }
}

/// A finished layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The blob.
    pub blob: Vec<u8>,
    /// What its descriptor needs.
    pub annotations: BTreeMap<String, String>,
    /// The digest of the tar.
    pub diff_id: Digest,
    /// Where the compressed TOC is in the blob.
    pub toc: Range<u64>,
}

/// Writes a layer. A regular file has the size of its payload.
///
/// # Errors
/// [`Error::Malformed`] for an entry that tar or the TOC cannot say.
pub fn write_layer(entries: &[(Entry, Vec<u8>)], options: Options) -> Result<Written> {
    let mut writer = Writer {
        options,
        blob: Vec::new(),
        tar: Vec::new(),
        frame_start: 0,
        toc: Vec::new(),
    };
    for (entry, payload) in entries {
        let entry = Entry {
            size: payload.len() as u64,
            ..entry.clone()
        };
        writer.append(&entry, payload)?;
    }
    writer.finish()
}

/// The chunks of a payload, and whether each is a hole.
fn chunks(payload: &[u8], options: Options) -> Vec<(Range<usize>, bool)> {
    let mut found = Vec::new();
    let mut start = 0;
    while start < payload.len() {
        let hole = match options.version {
            Version::Stargz => payload.len()..payload.len(),
            _ => next_hole(payload, start),
        };
        while start < hole.start {
            let end = start + data_bytes(&payload[start..hole.start], options);
            found.push((start..end, false));
            start = end;
        }
        start = hole.end;
        if !hole.is_empty() {
            found.push((hole, true));
        }
    }
    found
}

/// The next run of zeros that is long enough, or nothing at the payload's end.
fn next_hole(payload: &[u8], mut from: usize) -> Range<usize> {
    while from < payload.len() {
        let zeros = payload[from..].iter().take_while(|&&byte| byte == 0).count();
        if zeros >= HOLE_BYTES_MIN {
            return from..from + zeros;
        }
        let run = payload[from + zeros..].iter().take_while(|&&byte| byte != 0);
        from += zeros + run.count();
    }
    from..from
}

/// Length of the chunk at the start of `data`, which is not empty.
fn data_bytes(data: &[u8], options: Options) -> usize {
    let fixed = match (options.chunk_bytes, options.version) {
        (None, Version::Stargz) => Some(4 << 20),
        (fixed, _) => fixed,
    };
    if let Some(bytes) = fixed {
        return bytes.clamp(1, data.len());
    }
    let mut hash = 0u64;
    let is_boundary = |byte: &u8| {
        hash = (hash << 1).wrapping_add(u64::from(*byte).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        hash >> (64 - BOUNDARY_BITS) == 0
    };
    data.iter().position(is_boundary).map_or(data.len(), |at| at + 1)
}

/// One frame of `content` that claims a window of `window_log`.
fn frame(content: &[u8], level: i32, window_log: u8) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::io("zstd frame", &e);
    let mut encoder = ::zstd::stream::write::Encoder::new(Vec::new(), level).map_err(failed)?;
    encoder.include_checksum(true).map_err(failed)?;
    encoder.include_contentsize(false).map_err(failed)?;
    encoder.window_log(17).map_err(failed)?;
    encoder.write_all(content).map_err(failed)?;
    let mut frame = encoder.finish().map_err(failed)?;
    // Behind the magic number and the descriptor: without a content size there always is one.
    if let Some(window) = frame.get_mut(5) {
        *window = (window_log.clamp(17, 31) - 10) << 3;
    }
    Ok(frame)
}

struct Writer {
    options: Options,
    blob: Vec<u8>,
    tar: Vec<u8>,
    /// Bytes of the tar that are in frames.
    frame_start: usize,
    toc: Vec<TocEntry>,
}

impl Writer {
    /// Puts what the tar has more than the frames into one.
    fn cut(&mut self) -> Result<u64> {
        if self.frame_start < self.tar.len() {
            self.blob.extend_from_slice(&frame(
                &self.tar[self.frame_start..],
                self.options.level,
                self.options.window_log,
            )?);
            self.frame_start = self.tar.len();
        }
        Ok(self.blob.len() as u64)
    }

    fn append(&mut self, entry: &Entry, payload: &[u8]) -> Result<()> {
        let is_stargz = self.options.version == Version::Stargz;
        let mut record = TocEntry::of(entry)?;
        if !is_stargz {
            record.modtime = time_text(entry)?;
            if self.options.version == Version::Storage1_43 {
                (record.accesstime, record.changetime) = (NO_TIME, NO_TIME);
            }
        }
        self.tar.extend_from_slice(&tar::header(entry)?);
        if entry.kind != Kind::File || payload.is_empty() {
            self.toc.push(record);
            return Ok(());
        }
        record.digest = Some(Digest::of(payload));
        let chunks = chunks(payload, self.options);
        let first = self.toc.len();
        let is_one = chunks.len() == 1;
        for (range, is_hole) in chunks {
            record.offset = self.cut()?;
            record.chunk_offset = range.start as u64;
            // Both writers leave out what a file of one chunk says by itself, stargz-snapshotter also the last one's size.
            if !is_one || is_stargz {
                record.chunk_digest = Some(Digest::of(&payload[range.clone()]));
                let is_last = range.end == payload.len();
                record.chunk_size = if is_stargz && is_last {
                    0
                } else {
                    range.len() as u64
                };
                record.chunk_type = if is_hole { "zeros" } else { "" };
            }
            self.tar.extend_from_slice(&payload[range]);
            let next = TocEntry {
                name: record.name.clone(),
                kind: "chunk",
                ..TocEntry::default()
            };
            self.toc.push(std::mem::replace(&mut record, next));
        }
        if !is_stargz {
            let end = self.cut()?;
            if let Some(first) = self.toc.get_mut(first) {
                first.end_offset = end;
            }
        }
        self.tar
            .resize(self.tar.len() + tar::padding(payload.len() as u64), 0);
        Ok(())
    }

    fn finish(mut self) -> Result<Written> {
        let version = self.options.version;
        self.tar.resize(self.tar.len() + tar::END_BYTES, 0);
        self.cut()?;
        let metadata = |content: &[u8]| frame(content, self.options.level, METADATA_WINDOW_LOG);
        let tar_split = metadata(TAR_SPLIT)?;
        let json = match version {
            Version::Stargz => indented(self.toc)?,
            Version::Storage1_50 => compact(self.toc, Some(Digest::of(&tar_split)))?,
            _ => compact(self.toc, None)?,
        };
        Ok(seal(
            self.blob,
            &self.tar,
            &json,
            &metadata(&json)?,
            &tar_split,
            version,
        ))
    }
}

/// Completes a blob by a TOC that has any bytes, and says what its annotations are. Tests lie with it.
pub(super) fn seal(
    mut blob: Vec<u8>,
    tar: &[u8],
    json: &[u8],
    compressed: &[u8],
    tar_split: &[u8],
    version: Version,
) -> Written {
    let place = |start: u64, bytes: &[u8]| start..start + bytes.len() as u64;
    let toc = place(skippable(&mut blob, compressed), compressed);
    let mut annotations = BTreeMap::new();
    let mut annotate = |name: &str, value: String| {
        annotations.insert(format!("{}{name}", version.prefix()), value);
    };
    let compressed_bytes = compressed.len() as u64;
    let position = [toc.start, compressed_bytes, json.len() as u64];
    let [start, length, bytes] = position;
    annotate(CHECKSUM, Digest::of(compressed).to_string());
    annotate(POSITION, format!("{start}:{length}:{bytes}:1"));
    let mut footer: Vec<u64> = [&position[..], &[1]].concat();
    if version == Version::Storage1_50 {
        let start = skippable(&mut blob, tar_split);
        let position = [start, tar_split.len() as u64, TAR_SPLIT.len() as u64];
        let [start, length, bytes] = position;
        annotate("tarsplit-position", format!("{start}:{length}:{bytes}"));
        footer.extend(position);
    }
    let mut footer: Vec<u8> = footer.iter().flat_map(|field| field.to_le_bytes()).collect();
    footer.extend_from_slice(match version {
        Version::Storage1_50 => b"GNUlInUx",
        _ => b"GnUlInUx",
    });
    if version == Version::Storage1_49 {
        footer.extend_from_slice(&[0; 16]);
    }
    skippable(&mut blob, &footer);
    if version == Version::Stargz {
        annotations.insert(TOC_DIGEST_ANNOTATION.to_owned(), Digest::of(json).to_string());
    }
    Written {
        blob,
        annotations,
        diff_id: Digest::of(tar),
        toc,
    }
}

/// Adds a skippable frame and says where its content starts.
fn skippable(blob: &mut Vec<u8>, content: &[u8]) -> u64 {
    blob.extend_from_slice(&[0x50, 0x2a, 0x4d, 0x18]);
    blob.extend_from_slice(&(content.len() as u32).to_le_bytes());
    let start = blob.len() as u64;
    blob.extend_from_slice(content);
    start
}

/// The time of an entry with its fraction.
fn time_text(entry: &Entry) -> Result<String> {
    let Time { seconds, nanos } = entry.mtime;
    let whole = time::format_rfc3339(seconds).ok_or_else(|| {
        let what = format!("entry {:?}", String::from_utf8_lossy(&entry.path));
        Error::malformed(what, "its time lies outside of the years 0 to 9999")
    })?;
    Ok(match nanos {
        0 => whole,
        nanos => format!("{}.{nanos:09}Z", whole.trim_end_matches('Z')),
    })
}
