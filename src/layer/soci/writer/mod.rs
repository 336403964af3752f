//! Writes zTOCs, as the builder of soci-snapshotter does: for the demo registry and for tests, because no distribution
//! packages a real one.

mod deflate;
mod flatbuffer;

use flatbuffer::{Builder, Place};

use super::ztoc::{BLOCK_BYTES, XATTR_PREFIX};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Time};
use crate::layer::gzip::window::WINDOW_BYTES_MAX;
use crate::layer::tar;
use crate::layer::time::format_rfc3339;

/// Bytes of the tar in a span, of the real builder: a span ends with the first deflate block that reaches beyond.
pub const SPAN_BYTES: u64 = 4 << 20;

/// What a layer is compressed with, and how the places to start from are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Gzip, with all places.
    Gzip,
    /// Gzip, without the first place, as the first version of the builder kept it. The gzip header must have 10 bytes.
    GzipV1,
    /// Not compressed.
    Uncompressed,
}

/// How a zTOC is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What the layer is.
    pub layout: Layout,
    /// Bytes of the tar in a span, at least.
    pub span_bytes: u64,
}

/// What a zTOC says, before it is bytes.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) version: Vec<u8>,
    pub(super) blob_bytes: i64,
    pub(super) tar_bytes: i64,
    pub(super) entries: Vec<DraftEntry>,
    pub(super) algorithm: i8,
    pub(super) span_id_max: i32,
    pub(super) digests: Vec<String>,
    pub(super) checkpoints: Vec<u8>,
}

/// An entry in the words of a zTOC.
#[derive(Debug, Clone)]
pub(super) struct DraftEntry {
    pub(super) entry: Entry,
    pub(super) offset: i64,
    pub(super) size: i64,
    pub(super) kind: &'static str,
    pub(super) mtime: String,
    pub(super) devices: (i64, i64),
    pub(super) records: Vec<(Vec<u8>, Vec<u8>)>,
}

/// The zTOC of the layer `blob`, a tar that consists of `entries` with their payloads.
///
/// # Errors
/// [`Error::Malformed`] when the blob is not what the options say, or is not made of these entries.
pub fn write_ztoc(blob: &[u8], entries: &[(Entry, Vec<u8>)], options: Options) -> Result<Vec<u8>> {
    Ok(draft(blob, entries, options)?.encode())
}

/// The same before it is bytes.
pub(super) fn draft(blob: &[u8], entries: &[(Entry, Vec<u8>)], options: Options) -> Result<Draft> {
    let (tar, spans, checkpoints) = match options.layout {
        Layout::Uncompressed => uncompressed(blob, options.span_bytes),
        _ => gzip(blob, options)?,
    };
    let digest = |(start, end): &(usize, usize)| {
        let bytes = blob.get(*start..*end).unwrap_or_default();
        Digest::of(bytes).to_string()
    };
    Ok(Draft {
        version: b"0.9".to_vec(),
        blob_bytes: blob.len() as i64,
        tar_bytes: tar.len() as i64,
        entries: place(&tar, entries)?,
        algorithm: if options.layout == Layout::Uncompressed {
            2
        } else {
            1
        },
        span_id_max: spans.len() as i32 - 1,
        digests: spans.iter().map(digest).collect(),
        checkpoints,
    })
}

impl Draft {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut builder = Builder::default();
        let version = builder.string(&self.version);
        let tool = builder.string(b"registryfs demo");
        // The real builder writes the entries from the last to the first, so that the first stands in front.
        let mut written: Vec<Place> = self
            .entries
            .iter()
            .rev()
            .map(|entry| entry.write(&mut builder))
            .collect();
        written.reverse();
        let metadata = builder.vector(&written);
        let mut toc = builder.table();
        builder.refer(&mut toc, 0, metadata);
        let toc = builder.end(&toc);
        let checkpoints = builder.bytes(&self.checkpoints);
        let digests: Vec<Place> = self
            .digests
            .iter()
            .map(|digest| builder.string(digest.as_bytes()))
            .collect();
        let digests = builder.vector(&digests);
        let mut info = builder.table();
        builder.number(&mut info, 1, self.span_id_max.to_le_bytes());
        builder.refer(&mut info, 2, digests);
        builder.refer(&mut info, 3, checkpoints);
        // Gzip is what an absent field means.
        builder.number(
            &mut info,
            0,
            [if self.algorithm == 1 {
                0
            } else {
                self.algorithm as u8
            }],
        );
        let info = builder.end(&info);
        let mut root = builder.table();
        builder.refer(&mut root, 0, version);
        builder.refer(&mut root, 1, tool);
        builder.refer(&mut root, 4, toc);
        builder.number(&mut root, 2, self.blob_bytes.to_le_bytes());
        builder.number(&mut root, 3, self.tar_bytes.to_le_bytes());
        builder.refer(&mut root, 5, info);
        let root = builder.end(&root);
        builder.finish(root)
    }
}

/// The decoded tar, where the spans start and end in the blob, and the packed places to start from.
type Parts = (Vec<u8>, Vec<(usize, usize)>, Vec<u8>);

fn gzip(blob: &[u8], options: Options) -> Result<Parts> {
    let (tar, blocks) = deflate::decode(blob)?;
    let mut chosen: Vec<deflate::BlockStart> = Vec::new();
    for block in blocks {
        let is_due = chosen
            .last()
            .is_none_or(|last| block.out - last.out > options.span_bytes || block.out == 0);
        if is_due {
            chosen.push(block);
        }
    }
    let at = |block: &deflate::BlockStart| block.blob_bits.div_ceil(8);
    let skipped = usize::from(options.layout == Layout::GzipV1);
    if skipped == 1 && chosen.first().map(at) != Some(10) {
        let why = "its gzip header has more than 10 bytes, so the first version of zTOCs cannot describe it";
        return Err(Error::malformed("demo layer", why));
    }
    let mut packed = (chosen.len() as i32).to_le_bytes().to_vec();
    packed.extend_from_slice(&(options.span_bytes as i64).to_le_bytes());
    for block in chosen.iter().skip(skipped) {
        packed.extend_from_slice(&at(block).to_le_bytes());
        packed.extend_from_slice(&block.out.to_le_bytes());
        packed.push((at(block) * 8 - block.blob_bits) as u8);
        let before = &tar[(block.out as usize).saturating_sub(WINDOW_BYTES_MAX)..block.out as usize];
        packed.resize(packed.len() + WINDOW_BYTES_MAX - before.len(), 0);
        packed.extend_from_slice(before);
    }
    let ends = chosen
        .iter()
        .skip(1)
        .map(|block| at(block) as usize)
        .chain([blob.len()]);
    let starts = chosen.iter().map(|block| (block.blob_bits / 8) as usize);
    Ok((tar, starts.zip(ends).collect(), packed))
}

fn uncompressed(blob: &[u8], span_bytes: u64) -> Parts {
    let mut builder = Builder::default();
    let mut info = builder.table();
    builder.number(&mut info, 0, 2i32.to_le_bytes());
    builder.number(&mut info, 1, (span_bytes as i64).to_le_bytes());
    builder.number(&mut info, 2, (blob.len() as i64).to_le_bytes());
    let info = builder.end(&info);
    let starts = (0..blob.len()).step_by(span_bytes as usize);
    let spans = starts.map(|start| (start, (start + span_bytes as usize).min(blob.len())));
    (blob.to_vec(), spans.collect(), builder.finish(info))
}

/// Finds the entries in their tar.
fn place(tar: &[u8], entries: &[(Entry, Vec<u8>)]) -> Result<Vec<DraftEntry>> {
    let mut header = 0;
    let mut placed = Vec::with_capacity(entries.len());
    for (entry, payload) in entries {
        let entry = Entry {
            size: payload.len() as u64,
            ..entry.clone()
        };
        let offset = header + tar::header(&entry)?.len() as u64;
        let end = offset + entry.size;
        if tar.get(offset as usize..end as usize) != Some(payload) {
            return Err(Error::malformed("demo layer", "it is not made of these entries"));
        }
        header = end.next_multiple_of(BLOCK_BYTES);
        placed.push(DraftEntry::new(entry, offset as i64));
    }
    Ok(placed)
}

impl DraftEntry {
    fn new(entry: Entry, offset: i64) -> Self {
        let kind = entry.kind.toc_name();
        // All PAX records, also those that are no extended attributes.
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        if entry.mtime.nanos != 0 {
            let fraction = format!("{}.{:09}", entry.mtime.seconds, entry.mtime.nanos);
            records.push((b"mtime".to_vec(), fraction.into_bytes()));
        }
        for (name, value) in &entry.xattrs {
            records.push(([XATTR_PREFIX, name].concat(), value.clone()));
        }
        records.sort();
        Self {
            offset,
            size: entry.size as i64,
            kind,
            mtime: time(entry.mtime),
            devices: (i64::from(entry.rdev.0), i64::from(entry.rdev.1)),
            records,
            entry,
        }
    }

    fn write(&self, builder: &mut Builder) -> Place {
        let name = builder.string(&self.entry.path);
        let kind = builder.string(self.kind.as_bytes());
        let link = builder.string(&self.entry.link);
        let (user, group) = (builder.string(b""), builder.string(b""));
        let mtime = builder.string(self.mtime.as_bytes());
        let records = self.write_records(builder);
        let mut metadata = builder.table();
        builder.refer(&mut metadata, 0, name);
        builder.refer(&mut metadata, 1, kind);
        builder.number(&mut metadata, 2, self.offset.to_le_bytes());
        builder.number(&mut metadata, 3, self.size.to_le_bytes());
        builder.refer(&mut metadata, 4, link);
        builder.number(&mut metadata, 5, u64::from(self.entry.mode).to_le_bytes());
        builder.number(&mut metadata, 6, self.entry.uid.to_le_bytes());
        builder.number(&mut metadata, 7, self.entry.gid.to_le_bytes());
        builder.refer(&mut metadata, 8, user);
        builder.refer(&mut metadata, 9, group);
        builder.refer(&mut metadata, 10, mtime);
        builder.number(&mut metadata, 11, self.devices.0.to_le_bytes());
        builder.number(&mut metadata, 12, self.devices.1.to_le_bytes());
        builder.refer(&mut metadata, 13, records);
        builder.end(&metadata)
    }

    fn write_records(&self, builder: &mut Builder) -> Place {
        let written: Vec<Place> = self
            .records
            .iter()
            .map(|(key, value)| {
                let (key, value) = (builder.string(key), builder.string(value));
                let mut record = builder.table();
                builder.refer(&mut record, 0, key);
                builder.refer(&mut record, 1, value);
                builder.end(&record)
            })
            .collect();
        builder.vector(&written)
    }
}

/// RFC 3339 with as many digits of the fraction as there are; nothing where it cannot say the year.
fn time(time: Time) -> String {
    let Some(whole) = format_rfc3339(time.seconds) else {
        return String::new();
    };
    if time.nanos == 0 {
        return whole;
    }
    let fraction = format!("{:09}", time.nanos);
    format!(
        "{}.{}Z",
        whole.trim_end_matches('Z'),
        fraction.trim_end_matches('0')
    )
}
