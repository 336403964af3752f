//! What the annotations of a layer say of its TOC. They are all that is believed, and everything is strict: two readers
//! that find different TOCs in the same blob would see different images.

use std::collections::{BTreeMap, BTreeSet};

use super::{CHECKSUM, OLD_PREFIX, POSITION, PREFIX};
use crate::digest::Digest;
use crate::layer::Descriptor;
use crate::layer::estargz::TOC_DIGEST_ANNOTATION;
use crate::layer::toc_json::{COMPRESSED_BYTES_MAX, json_bytes_max};
use crate::layer::zstd::SKIPPABLE_HEADER_BYTES;

/// The one type of TOC that there is.
const TYPE: u64 = 1;

/// What a layer's annotations promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Annotations {
    /// The digest of the compressed TOC.
    pub(super) checksum: Digest,
    /// Where it is.
    pub(super) position: Position,
    /// The digest of the uncompressed TOC, where stargz-snapshotter or a converter wrote it.
    pub(super) toc_digest: Option<Digest>,
}

/// Where the TOC is. All of it lies in the blob, behind the header of its skippable frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Its first compressed byte in the blob.
    pub(super) start: u64,
    /// The end of its compressed bytes in the blob.
    pub(super) end: u64,
    /// Its size in bytes.
    pub(super) bytes: u64,
}

/// The values of an annotation under both prefixes.
fn values<'a>(annotations: &'a BTreeMap<String, String>, name: &str) -> BTreeSet<&'a str> {
    let value = |prefix: &str| annotations.get(&format!("{prefix}{name}"));
    let found = [PREFIX, OLD_PREFIX].into_iter().filter_map(value);
    found.map(String::as_str).collect()
}

/// Everything that decides the layer's index, in words that differ where an annotation does; `None` without annotations of
/// zstd:chunked. Where the TOC is belongs to it: no digest says that, and the data ends there.
pub(in crate::layer) fn promise(annotations: &BTreeMap<String, String>) -> Option<String> {
    let checksums = values(annotations, CHECKSUM);
    if checksums.is_empty() {
        return None;
    }
    let words: Vec<&str> = checksums
        .into_iter()
        .chain(values(annotations, POSITION))
        .collect();
    let compressed = format!("zstd:chunked {}", words.join(" "));
    Some(match annotations.get(TOC_DIGEST_ANNOTATION) {
        Some(uncompressed) => format!("{compressed} index {uncompressed}"),
        None => compressed,
    })
}

impl Annotations {
    /// Reads those of a layer, `None` where it has none.
    ///
    /// # Errors
    /// Why they cannot be meant.
    pub(super) fn read(descriptor: &Descriptor) -> Result<Option<Self>, String> {
        let annotations = &descriptor.annotations;
        let (checksum, position) = match (one(annotations, CHECKSUM)?, one(annotations, POSITION)?) {
            (None, None) => return Ok(None),
            (Some(checksum), Some(position)) => (checksum, position),
            (Some(_), None) => return Err(format!("it has the annotation {CHECKSUM} but not {POSITION}")),
            (None, Some(_)) => return Err(format!("it has the annotation {POSITION} but not {CHECKSUM}")),
        };
        if !descriptor.media_type.to_ascii_lowercase().contains("zstd") {
            return Err(format!(
                "its annotations say zstd:chunked, its media type says {:?}",
                descriptor.media_type
            ));
        }
        let toc_digest = annotations.get(TOC_DIGEST_ANNOTATION);
        Ok(Some(Self {
            checksum: digest(CHECKSUM, checksum)?,
            position: Position::parse(position, descriptor.size)?,
            toc_digest: toc_digest
                .map(|text| digest(TOC_DIGEST_ANNOTATION, text))
                .transpose()?,
        }))
    }
}

/// The value of an annotation that may stand under either prefix, or under both if they agree.
fn one<'a>(annotations: &'a BTreeMap<String, String>, name: &str) -> Result<Option<&'a str>, String> {
    let values = values(annotations, name);
    if values.len() > 1 {
        return Err(format!("it has two annotations {name} that disagree"));
    }
    Ok(values.first().copied())
}

fn digest(name: &str, text: &str) -> Result<Digest, String> {
    text.parse()
        .map_err(|_| format!("its annotation {name} is no sha256 digest"))
}

impl Position {
    /// Reads `offset:compressed size:size:type` for a blob of `blob_bytes` bytes.
    fn parse(text: &str, blob_bytes: u64) -> Result<Self, String> {
        let refuse = |why: String| format!("its annotation {POSITION} {why}");
        let mut numbers = text.split(':').map(number);
        let fields = [(); 4].map(|()| numbers.next().flatten());
        let ([Some(start), Some(compressed_bytes), Some(bytes), Some(kind)], None) = (fields, numbers.next())
        else {
            return Err(refuse("is not four numbers with colons in between".to_owned()));
        };
        if kind != TYPE {
            return Err(refuse(format!(
                "names a TOC of type {kind}, and only type 1 is known"
            )));
        }
        let end = start
            .checked_add(compressed_bytes)
            .filter(|&end| end <= blob_bytes && start >= SKIPPABLE_HEADER_BYTES && compressed_bytes > 0)
            .ok_or_else(|| refuse(format!("lies outside of the blob of {blob_bytes} bytes")))?;
        if compressed_bytes > COMPRESSED_BYTES_MAX || bytes > json_bytes_max(compressed_bytes) {
            return Err(refuse(format!(
                "claims a TOC of {bytes} bytes, {compressed_bytes} compressed, which is too large"
            )));
        }
        Ok(Self { start, end, bytes })
    }
}

/// A number of nothing but digits.
fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1000;

    fn descriptor(annotations: &[(&str, &str)]) -> Descriptor {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        Descriptor {
            media_type: "application/vnd.oci.image.layer.v1.tar+zstd".to_owned(),
            digest: Digest::of(b"blob"),
            size: SIZE,
            annotations: annotations.iter().map(pair).collect(),
            urls: Vec::new(),
        }
    }

    #[test]
    fn annotations_of_every_version_are_read() {
        let sum = Digest::of(b"toc");
        let text = sum.to_string();
        let old = [
            ("io.containers.zstd-chunked.manifest-checksum", text.as_str()),
            ("io.containers.zstd-chunked.manifest-position", "100:200:300:1"),
        ];
        let new = [
            (
                "io.github.containers.zstd-chunked.manifest-checksum",
                text.as_str(),
            ),
            (
                "io.github.containers.zstd-chunked.manifest-position",
                "100:200:300:1",
            ),
        ];
        let tar_split = [
            ("io.github.containers.zstd-chunked.tarsplit-checksum", "nonsense"),
            ("io.github.containers.zstd-chunked.tarsplit-position", "nonsense"),
        ];
        let expected = Annotations {
            checksum: sum,
            position: Position {
                start: 100,
                end: 300,
                bytes: 300,
            },
            toc_digest: None,
        };
        for annotations in [
            old.to_vec(),
            new.to_vec(),
            [new, tar_split].concat(),
            [old, new].concat(),
        ] {
            let read = Annotations::read(&descriptor(&annotations));
            assert_eq!(read, Ok(Some(expected.clone())), "{annotations:?}");
        }
        let stargz = [&old[..], &[(TOC_DIGEST_ANNOTATION, text.as_str())]].concat();
        let read = Annotations::read(&descriptor(&stargz)).unwrap().unwrap();
        assert_eq!(read.toc_digest, Some(sum));
        assert_eq!(Annotations::read(&descriptor(&tar_split)), Ok(None));
        assert_eq!(Annotations::read(&descriptor(&[])), Ok(None));
    }

    #[test]
    fn positions_that_cannot_be_are_refused() {
        let refused = [
            "",
            "1",
            "100:200:300",
            "100:200:300:1:",
            "100:200:300:1:1",
            "100:200:300:2",
            "100:200:300:0",
            "+100:200:300:1",
            "-100:200:300:1",
            " 100:200:300:1",
            "100:200:300:1 ",
            "0x64:200:300:1",
            "100::300:1",
            "7:200:300:1",
            "0:200:300:1",
            "100:0:300:1",
            "100:901:300:1",
            "1000:1:300:1",
            "18446744073709551615:1:300:1",
            "18446744073709551616:1:300:1",
            "100:18446744073709551615:300:1",
            "100:200:16777217:1",
            "100:200:18446744073709551615:1",
            "١00:200:300:1",
        ];
        for text in refused {
            assert!(Position::parse(text, SIZE).is_err(), "{text}");
        }
        let large = COMPRESSED_BYTES_MAX + 1;
        assert!(Position::parse(&format!("8:{large}:300:1"), u64::MAX).is_err());
        assert!(Position::parse("8:992:0:1", SIZE).is_ok());
        assert!(Position::parse(&format!("8:{COMPRESSED_BYTES_MAX}:536870912:1"), u64::MAX).is_ok());
        assert!(Position::parse(&format!("8:{COMPRESSED_BYTES_MAX}:536870913:1"), u64::MAX).is_err());
    }

    #[test]
    fn annotations_that_disagree_are_refused() {
        let (one, two) = (Digest::of(b"1").to_string(), Digest::of(b"2").to_string());
        let key = |prefix: &str, name: &str| format!("{prefix}{name}");
        let (sum, old_sum) = (key(PREFIX, CHECKSUM), key(OLD_PREFIX, CHECKSUM));
        let (place, old_place) = (key(PREFIX, POSITION), key(OLD_PREFIX, POSITION));
        let good = [(sum.as_str(), one.as_str()), (&place, "100:200:300:1")];
        assert!(Annotations::read(&descriptor(&good)).is_ok());
        let refused: [(&str, Vec<(&str, &str)>); 6] = [
            ("no position", good[..1].to_vec()),
            ("no checksum", good[1..].to_vec()),
            ("two checksums", [&good[..], &[(&old_sum, &two)]].concat()),
            (
                "two positions",
                [&good[..], &[(&old_place, "100:200:301:1")]].concat(),
            ),
            ("no digest", vec![(&sum, "sha512:00"), good[1]]),
            (
                "no TOC digest",
                [&good[..], &[(TOC_DIGEST_ANNOTATION, "x")]].concat(),
            ),
        ];
        for (name, annotations) in refused {
            assert!(Annotations::read(&descriptor(&annotations)).is_err(), "{name}");
        }
        for media_type in [
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar",
        ] {
            let mut gzip = descriptor(&good);
            gzip.media_type = media_type.to_owned();
            let refused = Annotations::read(&gzip).unwrap_err();
            assert!(refused.contains(media_type), "{refused}");
        }
    }

    #[test]
    fn every_annotation_is_part_of_the_promise() {
        let (one, two) = (Digest::of(b"1").to_string(), Digest::of(b"2").to_string());
        let (sum, old_sum) = (format!("{PREFIX}{CHECKSUM}"), format!("{OLD_PREFIX}{CHECKSUM}"));
        let place = format!("{PREFIX}{POSITION}");
        let of = |annotations: &[(&str, &str)]| promise(&descriptor(annotations).annotations);
        assert_eq!(of(&[(TOC_DIGEST_ANNOTATION, &one)]), None);
        assert_eq!(of(&[(&sum, &one)]), of(&[(&old_sum, &one)]));
        assert_eq!(of(&[(&sum, &one)]), of(&[(&sum, &one), (&old_sum, &one)]));
        let different = [
            of(&[(&sum, &one)]),
            of(&[(&sum, &two)]),
            of(&[(&sum, &one), (&old_sum, &two)]),
            of(&[(&sum, &one), (TOC_DIGEST_ANNOTATION, &one)]),
            of(&[(&sum, &one), (TOC_DIGEST_ANNOTATION, &two)]),
            of(&[(&sum, &one), (&place, "100:200:300:1")]),
            of(&[(&sum, &one), (&place, "101:200:300:1")]),
        ];
        for (number, promise) in different.iter().enumerate() {
            assert!(promise.is_some() && !different[..number].contains(promise));
        }
    }
}
