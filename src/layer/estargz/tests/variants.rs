//! Stargz, and TOCs that are in another image.

use serde_json::{Value, json};

use super::super::writer::{Options, Variant, write_layer};
use super::super::*;
use super::{
    SMALL, blob_with_toc, content, decode_blob, descriptor, file, first_steps, index_blob, index_edited,
    index_written, small_layer, toc_json,
};
use crate::layer::index::{Coding, Index};
use crate::layer::indexer;
use crate::layer::spool::InMemory;

const LEGACY: Options = Options {
    chunk_bytes: 10,
    variant: Variant::Legacy,
    ..SMALL
};
const EXTERNAL: Options = Options {
    variant: Variant::ExternalToc,
    ..SMALL
};

#[test]
fn stargz_is_read_by_the_digests_of_its_files() {
    let (blob, finished) = write_layer(&small_layer(), LEGACY).unwrap();
    let (bytes, ranges) = index_blob(&blob, Some(finished.toc_digest)).unwrap();
    assert_eq!(ranges.len(), 1);
    let index = Index::open(bytes.as_slice()).unwrap();
    assert_eq!(index.summary().toc_end, blob.len() as u64 - 47);
    let (chunks, failed) = decode_blob(&index, &blob, 100);
    assert_eq!((chunks.len(), failed), (2, 0));
    assert_eq!(content(&index, &chunks, 1), b"0123456789");
    let digest = index.content_digest(&index.entry(1).unwrap()).unwrap();
    assert_eq!(digest, Some(Digest::of(b"0123456789")));
}

#[test]
fn a_large_file_of_stargz_takes_a_pass_over_the_layer() {
    // Two chunks, and one digest that is of both together.
    let (blob, finished) = write_layer(&[file("a", b"0123456789a")], LEGACY).unwrap();
    let promised = descriptor(&blob, Some(finished.toc_digest));
    assert!(matches!(first_steps(&promised, &blob), Ok(Step::Pass)));
    let unverifiable: [fn(&mut Vec<Value>); 2] = [
        |e| {
            e[4]["chunkDigest"] = Value::Null;
            e[4]["digest"] = json!("");
        },
        |e| e[1]["chunkDigest"] = Value::Null,
    ];
    for edit in unverifiable {
        let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
        let mut toc: Value = serde_json::from_slice(&toc_json(&blob, &finished)).unwrap();
        edit(toc["entries"].as_array_mut().unwrap());
        let json = serde_json::to_vec(&toc).unwrap();
        let blob = blob_with_toc(&blob[..finished.toc_offset as usize], &json);
        let promised = descriptor(&blob, Some(Digest::of(&json)));
        assert!(matches!(first_steps(&promised, &blob), Ok(Step::Pass)));
    }
    // A pass does not make good what is broken besides.
    assert!(
        index_edited(|e| {
            e[1]["chunkDigest"] = Value::Null;
            e[4]["innerOffset"] = json!(-1);
        })
        .is_err()
    );
}

#[test]
fn an_external_toc_is_taken_by_its_digest() {
    let (blob, finished) = write_layer(&small_layer(), EXTERNAL).unwrap();
    let bytes = index_written(&blob, &finished).unwrap();
    let index = Index::open(bytes.as_slice()).unwrap();
    let summary = index.summary();
    assert_eq!((summary.toc_start, summary.toc_end), (0, 0));
    assert_eq!(
        (summary.toc_digest, summary.format),
        (finished.toc_digest, Format::Estargz)
    );
    assert!(summary.toc_bytes > 0);
    // The last member ends where the footer starts.
    let last = index.member(index.member_count() - 1).unwrap();
    assert_eq!(
        (last.blob_end, last.coding),
        (blob.len() as u64 - 46, Coding::Gzip)
    );
    let (chunks, failed) = decode_blob(&index, &blob, 100);
    assert_eq!(failed, 0);
    assert_eq!(content(&index, &chunks, 1), b"0123456789");
}

#[test]
fn other_tocs_are_passed_over_and_none_is_a_pass() {
    let (blob, finished) = write_layer(&small_layer(), EXTERNAL).unwrap();
    let (_, other) = write_layer(&[file("a", b"another")], EXTERNAL).unwrap();
    let begin = || {
        let mut indexer = indexer(
            &descriptor(&blob, Some(finished.toc_digest)),
            None,
            Arc::new(InMemory),
        )
        .unwrap();
        indexer.step(None).unwrap();
        let step = indexer.step(Some(&blob));
        assert!(matches!(step, Ok(Step::NeedExternalToc)), "{step:?}");
        indexer
    };
    let mut right = begin();
    for wrong in [&other.external_toc.unwrap()[..], b"no gzip", b"", &blob] {
        assert!(matches!(right.step(Some(wrong)), Ok(Step::NeedExternalToc)));
    }
    assert!(matches!(
        right.step(finished.external_toc.as_deref()),
        Ok(Step::Done(_))
    ));
    assert!(right.step(None).is_err(), "asked for again after the end");
    assert!(matches!(begin().step(None), Ok(Step::Pass)));
}

#[test]
fn the_promised_external_toc_must_fit_the_layer() {
    let json = br#"{"version":1,"entries":[{"name":"a","type":"reg","size":1,"offset":9999,
        "chunkDigest":"sha256:0000000000000000000000000000000000000000000000000000000000000001"}]}"#;
    let toc = blob_with_toc(b"member", json);
    let toc = &toc[6..toc.len() - 51];
    let (blob, _) = write_layer(&small_layer(), EXTERNAL).unwrap();
    let mut indexer = indexer(
        &descriptor(&blob, Some(Digest::of(json))),
        None,
        Arc::new(InMemory),
    )
    .unwrap();
    indexer.step(None).unwrap();
    indexer.step(Some(&blob)).unwrap();
    assert!(matches!(indexer.step(Some(toc)), Err(Error::Malformed { .. })));
}
