//! The JSON of a TOC as the writers of eStargz and zstd:chunked make it.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind};
use crate::layer::time;

/// One entry of the TOC's JSON; empty fields are left out, as in Go's writer.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TocEntry {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) size: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) modtime: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) link_name: String,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) mode: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) uid: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) gid: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) offset: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) inner_offset: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) dev_major: u32,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) dev_minor: u32,
    /// Stargz wrote the number of names, 0 for one, under its name in Go.
    #[serde(rename = "NumLink", skip_serializing_if = "is_default")]
    pub(super) num_link: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) xattrs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) chunk_offset: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) chunk_size: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) chunk_digest: Option<Digest>,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) chunk_type: &'static str,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) end_offset: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) accesstime: &'static str,
    #[serde(skip_serializing_if = "is_default")]
    pub(super) changetime: &'static str,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl TocEntry {
    /// The TOC's view of an entry, without what its payload adds; the time in whole seconds.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a time that the TOC cannot say.
    pub(super) fn of(entry: &Entry) -> Result<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let rounded = entry
            .mtime
            .seconds
            .saturating_add(i64::from(entry.mtime.nanos >= 500_000_000));
        let modtime = match rounded {
            0 => String::new(),
            seconds => time::format_rfc3339(seconds).ok_or_else(|| {
                let why = "its time lies outside of the years 0 to 9999";
                Error::malformed(format!("entry {:?}", text(&entry.path)), why)
            })?,
        };
        let xattrs = entry
            .xattrs
            .iter()
            .map(|(name, value)| (text(name), STANDARD.encode(value)));
        Ok(Self {
            name: text(&entry.path),
            kind: entry.kind.toc_name(),
            size: if entry.kind == Kind::File { entry.size } else { 0 },
            modtime,
            link_name: text(&entry.link),
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            dev_major: entry.rdev.0,
            dev_minor: entry.rdev.1,
            xattrs: xattrs.collect(),
            ..Self::default()
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Toc {
    version: u32,
    entries: Vec<TocEntry>,
    #[serde(skip_serializing_if = "is_default")]
    tar_split_digest: Option<Digest>,
}

fn failed(error: &serde_json::Error) -> Error {
    Error::malformed("TOC", error.to_string())
}

/// The JSON of a TOC, spelled as Go does with tabs.
///
/// # Errors
/// [`Error::Malformed`], which cannot be.
pub(super) fn indented(entries: Vec<TocEntry>) -> Result<Vec<u8>> {
    let mut json = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
    let toc = Toc {
        version: 1,
        entries,
        tar_split_digest: None,
    };
    toc.serialize(&mut serializer).map_err(|e| failed(&e))?;
    Ok(json)
}

/// The JSON of a TOC without white space, with the digest of the compressed tar-split data if there is some.
///
/// # Errors
/// As [`indented`].
pub(super) fn compact(entries: Vec<TocEntry>, tar_split_digest: Option<Digest>) -> Result<Vec<u8>> {
    let toc = Toc {
        version: 1,
        entries,
        tar_split_digest,
    };
    serde_json::to_vec(&toc).map_err(|e| failed(&e))
}
