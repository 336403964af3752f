//! Layers of every version come back as they were, from one range for the index; what disagrees is refused.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::writer::{Options, Version, Written, seal, write_layer};
use super::*;
use crate::layer::entry::{Entry, Kind};
use crate::layer::estargz::TOC_DIGEST_ANNOTATION;
use crate::layer::index::Index;
use crate::layer::kept::Kept;
use crate::layer::spool::InMemory;
use crate::layer::{decoder, index_promise, indexer};

mod hostile;
mod properties;

const ZSTD_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

fn descriptor(written: &Written) -> Descriptor {
    Descriptor {
        media_type: ZSTD_LAYER.into(),
        digest: Digest::of(&written.blob),
        size: written.blob.len() as u64,
        annotations: written.annotations.clone(),
        urls: Vec::new(),
    }
}

/// Indexes a layer from the one range that this may take.
fn index_described(descriptor: &Descriptor, written: &Written) -> Result<Vec<u8>> {
    let mut indexer = indexer(descriptor, None, Arc::new(InMemory))?;
    let range = match indexer.step(None)? {
        Step::Need(range) => range,
        other => panic!("{other:?}"),
    };
    match indexer.step(Some(&written.blob[range.start as usize..range.end as usize]))? {
        Step::Done(index) => Ok(index.to_vec()),
        other => panic!("{other:?}"),
    }
}

fn index(written: &Written) -> Result<Vec<u8>> {
    index_described(&descriptor(written), written)
}

/// Decodes every member in pieces of `piece` bytes, and says how many failed.
fn decode(index: &Index<&[u8]>, blob: &[u8], piece: usize) -> (BTreeMap<u32, Vec<u8>>, usize) {
    let (mut chunks, mut failed) = (Kept::default(), 0);
    for number in 0..index.member_count() {
        let range = index.member(number).unwrap().blob_range();
        let bytes = &blob[range.start as usize..range.end as usize];
        let mut decoder = decoder(index, number).unwrap();
        let outcome = bytes
            .chunks(piece)
            .try_fold(false, |_, bytes| decoder.push(bytes, &mut chunks));
        failed += usize::from(outcome != Ok(true));
        chunks.open.clear();
    }
    (chunks.verified, failed)
}

/// The content of an entry: its chunks in a file of zeros.
fn content(index: &Index<&[u8]>, chunks: &BTreeMap<u32, Vec<u8>>, number: u32) -> Vec<u8> {
    let entry = index.entry(number).unwrap();
    let mut content = vec![0; entry.size as usize];
    for number in entry.chunk_range() {
        let chunk = index.chunk(number).unwrap();
        let start = (chunk.data_offset - entry.data_offset) as usize;
        content[start..start + chunk.bytes as usize].copy_from_slice(&chunks[&number]);
    }
    content
}

fn file(path: &str, payload: &[u8]) -> (Entry, Vec<u8>) {
    (Entry::new(path, Kind::File), payload.to_vec())
}

/// Bytes that do not repeat, none of them zero.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        1 | (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Records 0 `d`, 1 to 5 `d/a`: data of 4, 4 and 2 bytes, zeros, data; 6 `b`, 7 an empty file.
fn small_layer() -> Vec<(Entry, Vec<u8>)> {
    let with_hole = [b"0123456789", &[0; 2000][..], b"abc"].concat();
    vec![
        (Entry::new("d/", Kind::Dir), Vec::new()),
        file("d/a", &with_hole),
        file("b", b"bbb"),
        file("e", b""),
    ]
}

const SMALL: Options = Options {
    version: Version::Storage1_50,
    chunk_bytes: Some(4),
    level: 1,
    window_log: 25,
};

fn small(version: Version) -> Written {
    write_layer(&small_layer(), Options { version, ..SMALL }).unwrap()
}

fn toc_of(written: &Written) -> Vec<u8> {
    let compressed = &written.blob[written.toc.start as usize..written.toc.end as usize];
    unpack_toc(compressed, Box::new(Vec::new())).unwrap().to_vec()
}

/// The layer with another TOC, promised by its annotations.
fn with_toc(written: &Written, json: &[u8], version: Version) -> Written {
    let data = &written.blob[..written.toc.start as usize - 8];
    let compressed = ::zstd::bulk::compress(json, 1).unwrap();
    let sealed = seal(data.to_vec(), b"", json, &compressed, b"", version);
    Written {
        diff_id: written.diff_id,
        ..sealed
    }
}

/// Indexes the small layer with its TOC edited.
fn index_edited(version: Version, edit: impl FnOnce(&mut Vec<Value>)) -> Result<Vec<u8>> {
    let written = small(version);
    let mut toc: Value = serde_json::from_slice(&toc_of(&written)).unwrap();
    edit(toc["entries"].as_array_mut().unwrap());
    let json = serde_json::to_vec(&toc).unwrap();
    index(&with_toc(&written, &json, version))
}

#[test]
fn layers_of_every_version_are_indexed_from_their_annotations() {
    for version in Version::ALL {
        let written = small(version);
        let bytes = index(&written).unwrap();
        let index = Index::open(bytes.as_slice()).unwrap();
        let summary = index.summary();
        let json = toc_of(&written);
        assert_eq!(
            (summary.format, summary.toc_digest),
            (Format::ZstdChunked, Digest::of(&json))
        );
        assert_eq!(
            (summary.toc_start..summary.toc_end, summary.toc_bytes),
            (written.toc.clone(), json.len() as u64)
        );
        let (chunks, failed) = decode(&index, &written.blob, 5);
        assert_eq!(failed, 0, "{version:?}");
        for (number, (_, payload)) in small_layer().iter().enumerate() {
            assert_eq!(&content(&index, &chunks, number as u32), payload, "{version:?}");
        }
        // The whole is also zstd that anyone can decompress.
        let tar = ::zstd::stream::decode_all(written.blob.as_slice()).unwrap();
        assert_eq!(Digest::of(&tar), written.diff_id);
    }
}

#[test]
fn both_prefixes_on_one_layer_are_one_promise() {
    let mut written = small(Version::Storage1_50);
    for name in [CHECKSUM, POSITION] {
        let value = written.annotations[&format!("{PREFIX}{name}")].clone();
        written.annotations.insert(format!("{OLD_PREFIX}{name}"), value);
    }
    assert!(index(&written).is_ok());
    let key = format!("{OLD_PREFIX}{POSITION}");
    written.annotations.insert(key, "8:1:1:1".to_owned());
    assert!(matches!(index(&written), Err(Error::Malformed { .. })));
}

#[test]
fn a_chunk_of_zeros_is_a_hole() {
    let written = small(Version::Storage1_50);
    let bytes = index(&written).unwrap();
    let index = Index::open(bytes.as_slice()).unwrap();
    let entry = index.entry(1).unwrap();
    let chunks: Vec<_> = entry.chunk_range().map(|n| index.chunk(n).unwrap()).collect();
    let places: Vec<_> = chunks
        .iter()
        .map(|chunk| (chunk.data_offset - entry.data_offset, chunk.bytes))
        .collect();
    assert_eq!(places, [(0, 4), (4, 4), (8, 2), (2010, 3)]);
    // Its frame lies between two members and in none.
    let end_before = index.member(chunks[2].member).unwrap().blob_end;
    let start_behind = index.member(chunks[3].member).unwrap().blob_start;
    assert!(end_before < start_behind);
    let gap = &written.blob[end_before as usize..start_behind as usize];
    assert_eq!(::zstd::stream::decode_all(gap).unwrap(), vec![0; 2000]);
}

#[test]
fn a_file_of_nothing_but_zeros_is_data() {
    let written = write_layer(&[file("z", &[0; 5000])], Options::default()).unwrap();
    let bytes = index(&written).unwrap();
    let index = Index::open(bytes.as_slice()).unwrap();
    assert_eq!((index.chunk_count(), index.chunk(0).unwrap().bytes), (1, 5000));
    assert_eq!(decode(&index, &written.blob, 9).0[&0], vec![0; 5000]);
}

#[test]
fn frames_may_claim_any_window() {
    let payload = noise(100_000);
    // Decoding piece by piece would refuse 2 GiB, the most that libzstd knows: no window is allocated for them.
    let options = Options {
        window_log: 31,
        chunk_bytes: Some(60_000),
        ..Options::default()
    };
    let layer = [file("f", &payload), file("g", b"short")];
    for version in [Version::Storage1_50, Version::Stargz] {
        let written = write_layer(&layer, Options { version, ..options }).unwrap();
        let bytes = index(&written).unwrap();
        let index = Index::open(bytes.as_slice()).unwrap();
        let (chunks, failed) = decode(&index, &written.blob, 7000);
        assert_eq!(failed, 0);
        assert!(content(&index, &chunks, 0) == payload);
    }
}

#[test]
fn frames_of_stargz_run_to_the_next_chunk_and_the_last_to_the_toc() {
    let mut layer = vec![file("a", b"aaaa"), file("b", b"bb")];
    // Headers behind the last chunk: 200 KB of the last frame that no chunk has.
    layer.extend((0..400).map(|n| (Entry::new(format!("d{n}/"), Kind::Dir), Vec::new())));
    let options = Options {
        version: Version::Stargz,
        ..SMALL
    };
    let written = write_layer(&layer, options).unwrap();
    let bytes = index(&written).unwrap();
    let index = Index::open(bytes.as_slice()).unwrap();
    let (first, last) = (index.member(0).unwrap(), index.member(1).unwrap());
    assert_eq!(first.blob_end, last.blob_start);
    assert_eq!(last.blob_end, written.toc.start - SKIPPABLE_HEADER_BYTES);
    let (chunks, failed) = decode(&index, &written.blob, 100);
    assert_eq!((failed, content(&index, &chunks, 1).as_slice()), (0, &b"bb"[..]));
}

#[test]
fn times_are_kept_and_no_time_is_1970() {
    let record = |modtime: &'static str| {
        let bytes = index_edited(Version::Storage1_43, |e| e[0]["modtime"] = json!(modtime)).unwrap();
        Index::open(bytes.as_slice()).unwrap().entry(0).unwrap().mtime
    };
    let time = record("2020-01-01T00:00:00.123456789Z");
    assert_eq!((time.seconds, time.nanos), (1_577_836_800, 123_456_789));
    assert_eq!(
        record("0001-01-01T00:00:00Z"),
        crate::layer::entry::Time::default()
    );
}

#[test]
fn landmarks_belong_to_the_format_of_stargz_only() {
    let layer = [
        file("a", b"aa"),
        file(".prefetch.landmark", b"\x0f"),
        file("b", b"b"),
    ];
    for (version, entries) in [(Version::Stargz, 2), (Version::Storage1_50, 3)] {
        let written = write_layer(&layer, Options { version, ..SMALL }).unwrap();
        let bytes = index(&written).unwrap();
        let index = Index::open(bytes.as_slice()).unwrap();
        assert_eq!(index.entry_count(), entries, "{version:?}");
        assert_eq!(index.summary().prefetch_end > 0, version == Version::Stargz);
    }
}

#[test]
fn the_promise_of_a_layer_has_all_its_digests() {
    let stargz = descriptor(&small(Version::Stargz));
    let promise = index_promise(&stargz, None);
    for value in [
        &stargz.annotations[&format!("{OLD_PREFIX}{CHECKSUM}")],
        &stargz.annotations[TOC_DIGEST_ANNOTATION],
    ] {
        assert!(promise.contains(value.as_str()), "{promise}");
    }
    let mut plain = stargz.clone();
    plain.annotations.clear();
    assert_eq!(index_promise(&plain, None), "blob");
}
