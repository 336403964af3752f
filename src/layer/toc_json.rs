//! Reads the JSON of a TOC straight into an index, record by record: a TOC of a million entries is 400 MB of text, and
//! must not become as many structs before it becomes an index. eStargz and zstd:chunked share it; where the chunks of a
//! format stand in the blob is for its [`Placement`] to say.
//!
//! The formats' reference readers take keys in any case and the last of duplicate ones. A TOC that uses this means
//! different things to different readers, so it is refused here; keys that nobody knows are ignored.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time, clean_path};
use crate::layer::estargz::{OWN_FILES, PREFETCH_LANDMARK};
use crate::layer::index::Coding;
use crate::layer::index_builder::{IndexBuilder, NewChunk};
use crate::layer::spool::{Scratch, Spooled};
use crate::layer::time::parse_rfc3339;

/// Largest compressed TOC in bytes, that of containers/storage: at some 60 bytes an entry, 2.5 million entries.
pub(super) const COMPRESSED_BYTES_MAX: u64 = 150 << 20;
/// Largest TOC in bytes: at some 400 bytes an entry, 1.3 million entries.
pub(super) const JSON_BYTES_MAX: u64 = 512 << 20;
/// A TOC over [`JSON_FREE_BYTES`] may be this many times its compressed size. Real ones are 5 to 15 times.
const RATIO_MAX: u64 = 64;
/// TOCs up to this many bytes may have any ratio.
const JSON_FREE_BYTES: u64 = 16 << 20;
/// The most records (entries and chunks) in a TOC. What a TOC of the largest size can hold of real ones is fewer; the cap
/// keeps tiny made-up ones from becoming an index many times the TOC's size.
const RECORDS_MAX: u32 = 4_000_000;
/// Longest name, before cleaning, in bytes.
const NAME_BYTES_MAX: usize = 16 << 10;
/// The most characters of the JSON parser's message that are kept: it may quote a string of any length.
const MESSAGE_CHARS_MAX: usize = 300;

/// Time zero of Go, which means that there is none.
const GO_ZERO_TIME: &str = "0001-01-01T00:00:00Z";

/// The most bytes that a TOC of so many compressed ones may have.
pub(super) fn json_bytes_max(compressed_bytes: u64) -> u64 {
    let by_ratio = compressed_bytes.saturating_mul(RATIO_MAX);
    by_ratio.clamp(JSON_FREE_BYTES, JSON_BYTES_MAX)
}

/// What a TOC says of where a chunk stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// Where its member starts in the blob.
    pub(super) offset: u64,
    /// Where it starts in the decoded member.
    pub(super) inner_offset: u64,
    /// Where the last member of its file ends in the blob; 0 if the record does not say it.
    pub(super) end_offset: u64,
    /// What is special about it, empty for nothing.
    pub(super) chunk_type: &'a str,
    /// Whether its file starts with it.
    pub(super) is_first: bool,
    /// Whether its file ends with it.
    pub(super) is_last: bool,
}

/// What a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Bytes in the blob.
    Data,
    /// Zeros, for which the blob need not be read.
    Hole,
}

/// What is particular to a format.
pub(super) trait Placement {
    /// The format's TOC, for messages.
    fn what(&self) -> &'static str;

    /// How members are decoded.
    fn coding(&self) -> Coding;

    /// Takes the next chunk; those of a file follow one another.
    ///
    /// # Errors
    /// The rule that it breaks.
    fn place(&mut self, place: &Place<'_>) -> std::result::Result<Content, &'static str>;

    /// Whether a file whose record says `end_offset` can be one that belongs to the format and not to the image.
    fn has_own_files(&self, end_offset: u64) -> bool;
}

/// What a TOC says.
#[derive(Debug)]
pub(super) struct Toc {
    /// Its entries and chunks.
    pub(super) builder: IndexBuilder,
    /// The end of what is to be prefetched in the blob, in bytes; 0 for nothing.
    pub(super) prefetch_end: u64,
    /// Whether nothing vouches for some chunk: old writers have no digest for the parts of a large file.
    pub(super) has_unverifiable: bool,
}

/// Reads a TOC. What becomes of it is built in `scratch`.
///
/// # Errors
/// [`Error::Malformed`] when it is not the JSON of a TOC or breaks a rule of the format.
pub(super) fn read(json: &Spooled, placement: &mut dyn Placement, scratch: &Arc<dyn Scratch>) -> Result<Toc> {
    let mut collector = Collector::new(placement, scratch);
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let parsed = TocSeed(&mut collector)
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    match (collector.failure, parsed) {
        (Some(failure), _) => Err(failure),
        (None, Err(error)) => {
            let why: String = error.to_string().chars().take(MESSAGE_CHARS_MAX).collect();
            Err(Error::malformed(collector.placement.what(), why))
        }
        (None, Ok(())) => json.vouch(collector.toc),
    }
}

/// A string, borrowed from the JSON where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> std::result::Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.into())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

/// The next value of a map, its default for `null`, as in Go.
fn value<'de, T: Deserialize<'de> + Default, A: MapAccess<'de>>(
    map: &mut A,
) -> std::result::Result<T, A::Error> {
    Ok(map.next_value::<Option<T>>()?.unwrap_or_default())
}

impl Default for Text<'_> {
    fn default() -> Self {
        Self(Cow::Borrowed(""))
    }
}

/// Extended attributes: names to base64.
#[derive(Default)]
struct Xattrs(Vec<(Vec<u8>, Vec<u8>)>);

impl<'de> Deserialize<'de> for Xattrs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct XattrsVisitor;
        impl<'de> Visitor<'de> for XattrsVisitor {
            type Value = Xattrs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("extended attributes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut xattrs = Vec::new();
                while let Some(Text(name)) = map.next_key()? {
                    let Text(encoded) = value(&mut map)?;
                    let decoded = STANDARD.decode(encoded.as_bytes()).map_err(de::Error::custom)?;
                    xattrs.push((name.into_owned().into_bytes(), decoded));
                }
                xattrs.sort();
                if xattrs.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                    return Err(de::Error::custom("an extended attribute occurs twice"));
                }
                Ok(Xattrs(xattrs))
            }
        }
        deserializer.deserialize_map(XattrsVisitor)
    }
}

/// One object in `entries`: an entry, or a further chunk of the one before.
#[derive(Default)]
struct Record<'a> {
    name: Text<'a>,
    kind: Text<'a>,
    size: u64,
    modtime: Text<'a>,
    link: Text<'a>,
    mode: i64,
    uid: u32,
    gid: u32,
    rdev: (u32, u32),
    xattrs: Xattrs,
    digest: Text<'a>,
    offset: u64,
    inner_offset: u64,
    chunk_offset: u64,
    chunk_size: u64,
    chunk_digest: Text<'a>,
    end_offset: u64,
    chunk_type: Text<'a>,
}

/// The keys that mean something, by their number in [`Record`]'s visitor.
const KEYS: [&str; 19] = [
    "name",
    "type",
    "size",
    "modtime",
    "linkName",
    "mode",
    "uid",
    "gid",
    "devMajor",
    "devMinor",
    "xattrs",
    "digest",
    "offset",
    "innerOffset",
    "chunkOffset",
    "chunkSize",
    "chunkDigest",
    "endOffset",
    "chunkType",
];

/// The number of `key` in `keys`, `None` for one that nobody knows.
fn key_number<E: de::Error>(keys: &[&str], key: &str) -> std::result::Result<Option<usize>, E> {
    if let Some(number) = keys.iter().position(|known| *known == key) {
        return Ok(Some(number));
    }
    // Go's case folding knows two letters outside of ASCII that fold into it.
    let folded = key.chars().map(|c| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    });
    let folded: String = folded.collect();
    if keys.iter().any(|known| known.eq_ignore_ascii_case(&folded)) {
        return Err(E::custom(format_args!("key {key:?} in another case")));
    }
    Ok(None)
}

impl<'de> Deserialize<'de> for Record<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct RecordVisitor;
        impl<'de> Visitor<'de> for RecordVisitor {
            type Value = Record<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an entry")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut r = Record::default();
                let mut seen = 0u32;
                while let Some(Text(key)) = map.next_key()? {
                    let Some(number) = key_number(&KEYS, &key)? else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    if seen & 1 << number != 0 {
                        return Err(de::Error::custom(format_args!("key {key:?} occurs twice")));
                    }
                    seen |= 1 << number;
                    match number {
                        0 => r.name = value(&mut map)?,
                        1 => r.kind = value(&mut map)?,
                        2 => r.size = value(&mut map)?,
                        3 => r.modtime = value(&mut map)?,
                        4 => r.link = value(&mut map)?,
                        5 => r.mode = value(&mut map)?,
                        6 => r.uid = value(&mut map)?,
                        7 => r.gid = value(&mut map)?,
                        8 => r.rdev.0 = value(&mut map)?,
                        9 => r.rdev.1 = value(&mut map)?,
                        10 => r.xattrs = value(&mut map)?,
                        11 => r.digest = value(&mut map)?,
                        12 => r.offset = value(&mut map)?,
                        13 => r.inner_offset = value(&mut map)?,
                        14 => r.chunk_offset = value(&mut map)?,
                        15 => r.chunk_size = value(&mut map)?,
                        16 => r.chunk_digest = value(&mut map)?,
                        17 => r.end_offset = value(&mut map)?,
                        _ => r.chunk_type = value(&mut map)?,
                    }
                }
                Ok(r)
            }
        }
        deserializer.deserialize_map(RecordVisitor)
    }
}

/// The TOC's outermost object.
struct TocSeed<'c, 'p>(&'c mut Collector<'p>);

impl<'de> DeserializeSeed<'de> for TocSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TocSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut version = None;
        let mut has_entries = false;
        while let Some(Text(key)) = map.next_key()? {
            match key_number(&["version", "entries"], &key)? {
                Some(0) if version.is_none() => version = Some(map.next_value::<u64>()?),
                Some(1) if !has_entries => {
                    has_entries = true;
                    map.next_value_seed(EntriesSeed(self.0))?;
                }
                Some(_) => return Err(de::Error::custom(format_args!("key {key:?} occurs twice"))),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if version != Some(1) || !has_entries {
            return Err(de::Error::custom("no TOC of version 1 with entries"));
        }
        Ok(())
    }
}

/// The array of entries; `null` for none, as Go writes an empty one.
struct EntriesSeed<'c, 'p>(&'c mut Collector<'p>);

impl<'de> DeserializeSeed<'de> for EntriesSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for EntriesSeed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of entries")
    }

    fn visit_none<E>(self) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        while let Some(record) = seq.next_element::<Record<'de>>()? {
            // serde's errors are text: the typed one waits in the collector.
            self.0.record(&record).map_err(|error| {
                let text = de::Error::custom(&error);
                self.0.failure = Some(error);
                text
            })?;
        }
        Ok(())
    }
}

/// Builds the index from records in their order.
struct Collector<'p> {
    placement: &'p mut dyn Placement,
    toc: Toc,
    records: u32,
    /// The regular file that chunks may belong to: chunks go by position, because names may occur twice.
    file: Option<OpenFile>,
    failure: Option<Error>,
}

/// The file whose chunks are being read.
struct OpenFile {
    size: u64,
    covered: u64,
    hidden: bool,
}

/// A digest, which a message may quote only if it is not too long.
fn parse_digest(what: &str, text: &str) -> Result<Digest> {
    if text.len() > 200 {
        return Err(Error::malformed(what, "a digest of over 200 bytes"));
    }
    text.parse()
}

impl<'p> Collector<'p> {
    fn new(placement: &'p mut dyn Placement, scratch: &Arc<dyn Scratch>) -> Self {
        Self {
            toc: Toc {
                builder: IndexBuilder::spooled(placement.coding(), Arc::clone(scratch)),
                prefetch_end: 0,
                has_unverifiable: false,
            },
            placement,
            records: 0,
            file: None,
            failure: None,
        }
    }

    fn record(&mut self, record: &Record<'_>) -> Result<()> {
        let (toc, number) = (self.placement.what(), self.records);
        self.records += 1;
        if record.name.0.len() > NAME_BYTES_MAX {
            let what = format!("{toc}, record {number}");
            return Err(Error::malformed(what, "a name of over 16 KiB"));
        }
        let refuse =
            |why: &str| Error::malformed(format!("{toc}, record {number} ({:?})", record.name.0), why);
        if number >= RECORDS_MAX {
            return Err(refuse("a TOC may have 4 million records"));
        }
        let kind = match &*record.kind.0 {
            "chunk" => return self.chunk(record, refuse),
            "reg" => Kind::File,
            "dir" => Kind::Dir,
            "symlink" => Kind::Symlink,
            "hardlink" => Kind::Hardlink,
            "char" => Kind::Char,
            "block" => Kind::Block,
            "fifo" => Kind::Fifo,
            _ => return Err(refuse("an unknown type")),
        };
        let size = if kind == Kind::File { record.size } else { 0 };
        let hidden = kind == Kind::File && self.is_own_file(record);
        self.file = (kind == Kind::File).then_some(OpenFile {
            size,
            covered: 0,
            hidden,
        });
        if !hidden {
            let mtime = match &*record.modtime.0 {
                "" | GO_ZERO_TIME => Time::default(),
                text => parse_rfc3339(text).ok_or_else(|| refuse("its time is not of RFC 3339"))?,
            };
            let digest = match &*record.digest.0 {
                text if kind == Kind::File && !text.is_empty() => Some(parse_digest(toc, text)?),
                _ => None,
            };
            self.toc.builder.entry(&Entry {
                path: record.name.0.as_bytes().to_vec(),
                kind,
                // Some writers put the type here too; the mask leaves what `mode` means.
                mode: (record.mode & 0o7777) as u32,
                uid: record.uid,
                gid: record.gid,
                mtime,
                size,
                link: record.link.0.as_bytes().to_vec(),
                rdev: record.rdev,
                xattrs: record.xattrs.0.clone(),
                digest,
            })?;
        }
        if size > 0 {
            self.chunk(record, refuse)
        } else {
            Ok(())
        }
    }

    /// Whether a regular file is part of the format instead of the image; takes note of where prefetching ends.
    fn is_own_file(&mut self, record: &Record<'_>) -> bool {
        // Most names need not be cleaned to see that they are none of these.
        if !OWN_FILES.iter().any(|name| record.name.0.contains(name))
            || !self.placement.has_own_files(record.end_offset)
        {
            return false;
        }
        let path = clean_path(record.name.0.as_bytes()).path;
        if path == PREFETCH_LANDMARK.as_bytes() && self.toc.prefetch_end == 0 {
            self.toc.prefetch_end = record.offset;
        }
        OWN_FILES.iter().any(|name| path == name.as_bytes())
    }

    /// Adds what a record says of one chunk, which must go on where the one before ended.
    fn chunk(&mut self, record: &Record<'_>, refuse: impl Fn(&str) -> Error) -> Result<()> {
        let file = self
            .file
            .as_mut()
            .ok_or_else(|| refuse("a chunk that follows no regular file"))?;
        let toc = self.placement.what();
        let left = file.size - file.covered;
        let bytes = if record.chunk_size == 0 {
            left
        } else {
            record.chunk_size
        };
        if record.chunk_offset != file.covered || bytes == 0 || bytes > left {
            return Err(refuse(
                "the chunks of the file overlap, leave gaps or reach beyond its end",
            ));
        }
        // The blob starts with a tar header, so a payload cannot be there.
        if record.offset == 0 && record.inner_offset == 0 {
            return Err(refuse("a chunk without a place in the blob"));
        }
        let place = Place {
            offset: record.offset,
            inner_offset: record.inner_offset,
            end_offset: record.end_offset,
            chunk_type: &record.chunk_type.0,
            is_first: file.covered == 0,
            is_last: bytes == left,
        };
        let content = self.placement.place(&place).map_err(&refuse)?;
        file.covered += bytes;
        if file.hidden {
            return Ok(());
        }
        if content == Content::Hole {
            return self.toc.builder.hole(bytes);
        }
        let digest = match (&*record.chunk_digest.0, &*record.digest.0) {
            ("", "") => None,
            ("", whole) => Some(whole).filter(|_| bytes == file.size),
            (chunk, _) => Some(chunk),
        };
        self.toc.has_unverifiable |= digest.is_none();
        self.toc.builder.chunk(NewChunk {
            bytes,
            blob_offset: record.offset,
            inner_offset: record.inner_offset,
            digest: digest.map(|text| parse_digest(toc, text)).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::estargz::Members;
    use crate::layer::spool::InMemory;

    #[test]
    fn the_number_of_records_is_bounded() {
        let mut placement = Members;
        let scratch: Arc<dyn Scratch> = Arc::new(InMemory);
        let mut collector = Collector::new(&mut placement, &scratch);
        let record = Record {
            kind: Text("dir".into()),
            ..Record::default()
        };
        collector.records = RECORDS_MAX - 1;
        assert!(collector.record(&record).is_ok());
        assert!(matches!(collector.record(&record), Err(Error::Malformed { .. })));
    }
}
