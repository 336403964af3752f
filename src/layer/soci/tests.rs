//! What the writer wrote is read back, by spans; what nobody should write is refused.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::LazyLock;

use flate2::write::GzEncoder;
use flate2::{Compression as Level, GzBuilder};
use proptest::prelude::*;

use super::writer::{Draft, Layout, Options, draft, write_ztoc};
use super::*;
use crate::digest::Digest;
use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::index::Index;
use crate::layer::kept::Kept;
use crate::layer::spool::InMemory;
use crate::layer::{decoder, indexer, tar};

mod hostile;

type File = (Entry, Vec<u8>);

const SPAN_BYTES: u64 = 64 << 10;

fn options(layout: Layout) -> Options {
    Options {
        layout,
        span_bytes: SPAN_BYTES,
    }
}

/// Bytes that hardly compress.
fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn file(path: &str, payload: Vec<u8>) -> File {
    (Entry::new(path, Kind::File), payload)
}

/// Entries of all kinds: with content of several spans, of a few bytes, and none.
fn entries() -> Vec<File> {
    let mut special = Entry::new("./dir/special", Kind::File);
    special.mode = 0o6755;
    (special.uid, special.gid) = (4_294_967_294, 1000);
    special.mtime = Time {
        seconds: 1_700_000_000,
        nanos: 120_000_000,
    };
    special.xattrs = vec![
        (b"user.a".to_vec(), b"\0\xff".to_vec()),
        (b"user.b".to_vec(), vec![]),
    ];
    let link = |path: &str, kind, target: &str| {
        let mut entry = Entry::new(path, kind);
        entry.link = target.into();
        (entry, Vec::new())
    };
    let mut device = Entry::new("dev", Kind::Char);
    device.rdev = (1, 3);
    let mut raw = Entry::new("raw", Kind::File);
    raw.path = b"not \xff UTF-8".to_vec();
    vec![
        (Entry::new("dir/", Kind::Dir), Vec::new()),
        (special, b"special".to_vec()),
        file("large", noise(500_000, 1)),
        file("empty", Vec::new()),
        link("soft", Kind::Symlink, "../large"),
        link("hard", Kind::Hardlink, "./large"),
        (device, Vec::new()),
        (Entry::new("pipe", Kind::Fifo), Vec::new()),
        file("text", b"a line of text\n".repeat(20_000)),
        (raw, noise(70_000, 2)),
        file(&"long/".repeat(40), Vec::new()),
        file("last", vec![7]),
    ]
}

fn tar_of(entries: &[File]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (entry, payload) in entries {
        let entry = Entry {
            size: payload.len() as u64,
            ..entry.clone()
        };
        bytes.extend_from_slice(&tar::header(&entry).unwrap());
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len() + tar::padding(entry.size), 0);
    }
    bytes.resize(bytes.len() + tar::END_BYTES, 0);
    bytes
}

/// Compresses in as many gzip members as there are pieces.
fn gzip(pieces: &[&[u8]], level: u32) -> Vec<u8> {
    let member = |piece: &&[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Level::new(level));
        encoder.write_all(piece).unwrap();
        encoder.finish().unwrap()
    };
    pieces.iter().flat_map(member).collect()
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::new(),
        urls: Vec::new(),
    }
}

/// The index of a layer by its zTOC.
fn index(blob: &[u8], ztoc: &[u8]) -> Result<Vec<u8>> {
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob);
    let wanted = descriptor("application/octet-stream", ztoc);
    let mut indexer = indexer(&layer, Some(&wanted), Arc::new(InMemory))?;
    match indexer.step(None)? {
        Step::NeedBlob(asked) => assert_eq!(asked, wanted),
        other => panic!("{other:?}"),
    }
    match indexer.step(Some(ztoc))? {
        Step::Done(index) => Ok(index.to_vec()),
        other => panic!("{other:?}"),
    }
}

/// Compares an index with the entries that its layer is made of. Where a chunk's bytes stand in the tar is worked out from
/// where the decoded bytes of its span start there.
fn check(entries: &[File], tar: &[u8], ztoc: &[u8], blob: &[u8], bytes: &[u8]) {
    let buffer = Buffer::new(ztoc);
    let spans = Ztoc::read(&buffer, blob.len() as u64).unwrap().spans;
    let starts: BTreeMap<u64, &Span<'_>> = spans.iter().map(|span| (span.blob.start, span)).collect();
    let index = Index::open(bytes).unwrap();
    assert_eq!(index.entry_count() as usize, entries.len());
    for (number, (expected, payload)) in entries.iter().enumerate() {
        let entry = index.entry(number as u32).unwrap();
        assert_eq!(entry.path, crate::layer::entry::clean_path(&expected.path).path);
        assert_eq!((entry.kind, entry.mode), (expected.kind, expected.mode));
        assert_eq!((entry.uid, entry.gid), (expected.uid, expected.gid));
        assert_eq!((entry.mtime, entry.rdev), (expected.mtime, expected.rdev));
        assert_eq!(entry.size, payload.len() as u64);
        let xattrs: Vec<_> = expected
            .xattrs
            .iter()
            .map(|(name, value)| (&name[..], &value[..]))
            .collect();
        assert_eq!(index.xattrs(&entry).unwrap(), xattrs);
        let mut content = Vec::new();
        for chunk in entry.chunk_range() {
            let chunk = index.chunk(chunk).unwrap();
            let member = index.member(chunk.member).unwrap();
            let span = starts[&member.blob_start];
            assert_eq!((member.blob_range(), member.bits), (span.blob.clone(), span.bits));
            let checked = Digest::of(&blob[member.blob_start as usize..member.blob_end as usize]);
            assert_eq!(index.check(&member).unwrap(), Some(checked));
            assert_eq!(chunk.digest, None);
            let start = (span.tar.start + chunk.inner_offset) as usize;
            assert!(start as u64 + chunk.bytes <= span.tar.end, "a chunk of two spans");
            content.extend_from_slice(&tar[start..start + chunk.bytes as usize]);
        }
        assert!(content == *payload, "content of {:?}", expected.path);
    }
    assert!(decode(&index, blob, 50_000).unwrap() == contents_of(entries));
    let summary = index.summary();
    assert_eq!(
        (summary.format, summary.toc_digest),
        (Format::Soci, Digest::of(ztoc))
    );
    assert!(summary.passed().is_none() && summary.toc_bytes == 0);
}

/// The content of each entry, by its number.
fn contents_of(entries: &[File]) -> Vec<Vec<u8>> {
    entries.iter().map(|(_, payload)| payload.clone()).collect()
}

/// Decodes all members from their ranges of the blob alone, and puts the entries together.
fn decode(index: &Index<&[u8]>, blob: &[u8], piece: usize) -> Result<Vec<Vec<u8>>> {
    let mut kept = Kept::default();
    for number in 0..index.member_count() {
        let member = index.member(number)?;
        let bytes = &blob[member.blob_start as usize..member.blob_end as usize];
        let mut decoder = decoder(index, number)?;
        let mut is_done = false;
        for piece in bytes.chunks(piece) {
            is_done = decoder.push(piece, &mut kept)?;
        }
        assert!(is_done, "span {number} ends before its chunks");
    }
    assert_eq!(kept.verified.len(), index.chunk_count() as usize);
    let content = |number| {
        let chunks = index.entry(number)?.chunk_range();
        Ok(chunks.flat_map(|chunk| kept.verified[&chunk].clone()).collect())
    };
    (0..index.entry_count()).map(content).collect()
}

#[test]
fn a_span_that_lies_is_refused_before_anything_is_decoded() {
    let entries = entries();
    let tar = tar_of(&entries);
    for (layout, blob) in [(Layout::Gzip, gzip(&[&tar], 6)), (Layout::Uncompressed, tar)] {
        let ztoc = write_ztoc(&blob, &entries, options(layout)).unwrap();
        let bytes = index(&blob, &ztoc).unwrap();
        let index = Index::open(&bytes[..]).unwrap();
        for number in 0..index.member_count() {
            let member = index.member(number).unwrap();
            let mut bad = blob[member.blob_start as usize..member.blob_end as usize].to_vec();
            *bad.last_mut().unwrap() ^= 1;
            let mut kept = Kept::default();
            let mut decoder = decoder(&index, number).unwrap();
            let (first, rest) = bad.split_at(bad.len() / 2);
            assert!(!decoder.push(first, &mut kept).unwrap());
            let error = decoder.push(rest, &mut kept).unwrap_err();
            assert!(matches!(error, Error::Verification { .. }), "{error}");
            assert!(kept.open.is_empty() && kept.verified.is_empty());
        }
    }
}

#[test]
fn a_layer_is_indexed_in_every_layout() {
    let entries = entries();
    let tar = tar_of(&entries);
    for level in [0, 1, 6, 9] {
        let blob = gzip(&[&tar], level);
        for layout in [Layout::Gzip, Layout::GzipV1] {
            let ztoc = write_ztoc(&blob, &entries, options(layout)).unwrap();
            let index = index(&blob, &ztoc).unwrap();
            check(&entries, &tar, &ztoc, &blob, &index);
            assert!(level < 6 || Index::open(&index[..]).unwrap().member_count() > 3);
        }
    }
    let ztoc = write_ztoc(&tar, &entries, options(Layout::Uncompressed)).unwrap();
    check(&entries, &tar, &ztoc, &tar, &index(&tar, &ztoc).unwrap());
}

#[test]
fn both_layouts_of_checkpoints_make_the_same_index() {
    let entries = entries();
    let blob = gzip(&[&tar_of(&entries)], 6);
    let [v1, v2] = [Layout::GzipV1, Layout::Gzip].map(|layout| {
        let ztoc = write_ztoc(&blob, &entries, options(layout)).unwrap();
        let bytes = index(&blob, &ztoc).unwrap();
        let index = Index::open(bytes).unwrap();
        let members = 0..index.member_count();
        let members: Vec<_> = members.map(|number| index.member(number).unwrap()).collect();
        let windows: Vec<_> = members
            .iter()
            .map(|member| index.window(member).unwrap().to_vec())
            .collect();
        (ztoc.len(), members, windows)
    });
    assert_eq!((&v1.1, &v1.2), (&v2.1, &v2.2));
    assert!(v2.0 - v1.0 > 32_000, "the first checkpoint is left out");
    assert!(v2.2[0].is_empty() && v2.2[1..].iter().all(|window| !window.is_empty()));
}

#[test]
fn several_members_and_a_long_header_are_indexed() {
    let entries = entries();
    let tar = tar_of(&entries);
    let (first, rest) = tar.split_at(200_000);
    let (second, third) = rest.split_at(3);
    let mut encoder = GzBuilder::new()
        .filename("layer.tar")
        .write(Vec::new(), Level::fast());
    encoder.write_all(first).unwrap();
    let blob = [encoder.finish().unwrap(), gzip(&[b"", second, b"", third], 6)].concat();
    let ztoc = write_ztoc(&blob, &entries, options(Layout::Gzip)).unwrap();
    check(&entries, &tar, &ztoc, &blob, &index(&blob, &ztoc).unwrap());
    // The first version of the format says nothing of where the first member's header ends.
    assert!(write_ztoc(&blob, &entries, options(Layout::GzipV1)).is_err());
}

#[test]
fn a_layer_without_content_has_no_members() {
    for entries in [vec![], vec![file("empty", Vec::new())]] {
        let blob = gzip(&[&tar_of(&entries)], 6);
        let ztoc = write_ztoc(&blob, &entries, options(Layout::Gzip)).unwrap();
        let bytes = index(&blob, &ztoc).unwrap();
        assert_eq!(Index::open(&bytes[..]).unwrap().member_count(), 0);
    }
}

#[test]
fn landmarks_of_another_format_are_files_like_any_other() {
    let entries = vec![
        file(".prefetch.landmark", vec![0x0f]),
        file(".no.prefetch.landmark", vec![1]),
    ];
    let blob = gzip(&[&tar_of(&entries)], 6);
    let ztoc = write_ztoc(&blob, &entries, options(Layout::Gzip)).unwrap();
    check(
        &entries,
        &tar_of(&entries),
        &ztoc,
        &blob,
        &index(&blob, &ztoc).unwrap(),
    );
}

/// A draft for tests to spoil.
fn sample() -> (Vec<u8>, Draft) {
    static SAMPLE: LazyLock<(Vec<u8>, Draft)> = LazyLock::new(|| {
        let entries = entries();
        let blob = gzip(&[&tar_of(&entries)], 6);
        let draft = draft(&blob, &entries, options(Layout::Gzip)).unwrap();
        (blob, draft)
    });
    SAMPLE.clone()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_layer_is_indexed(
        sizes in prop::collection::vec((0usize..60_000, any::<bool>()), 0..8),
        level in 0u32..=9,
        span_bytes in 1u64..60_000,
        cut in any::<prop::sample::Index>(),
    ) {
        let entries: Vec<File> = sizes
            .iter()
            .enumerate()
            .map(|(number, &(size, is_text))| {
                let payload = match is_text {
                    true => vec![number as u8; size],
                    false => noise(size, number as u32),
                };
                file(&number.to_string(), payload)
            })
            .collect();
        let tar = tar_of(&entries);
        let (first, second) = tar.split_at(cut.index(tar.len()));
        let blob = gzip(&[first, second], level);
        let layout = options(Layout::Gzip);
        let ztoc = write_ztoc(&blob, &entries, Options { span_bytes, ..layout }).unwrap();
        check(&entries, &tar, &ztoc, &blob, &index(&blob, &ztoc).unwrap());
        let layout = options(Layout::Uncompressed);
        let ztoc = write_ztoc(&tar, &entries, Options { span_bytes, ..layout }).unwrap();
        check(&entries, &tar, &ztoc, &tar, &index(&tar, &ztoc).unwrap());
    }
}
