//! What it takes of the heap to index a layer of many files and to merge its tree: a small part of what the index and the
//! text that it is made from are large. An allocator that counts watches it, so this is a process of its own.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use registryfs::digest::Digest;
use registryfs::image::tree::{Tree, Whiteouts, merge};
use registryfs::layer::spool::{Scratch, Spooled};
use registryfs::layer::zstd_chunked::{CHECKSUM, POSITION, PREFIX};
use registryfs::layer::{Descriptor, Step, indexer};
use registryfs::store::Store;

#[path = "fuzz/counting.rs"]
mod counting;

/// Where the TOC stands in the blob; the data before it is never looked at.
const TOC_START: u64 = 1 << 30;

/// The text of a TOC of so many files, each in a frame of its own.
fn toc(files: u32) -> String {
    let mut json = r#"{"version":1,"entries":["#.to_owned();
    for number in 0..files {
        let digest = Digest::of(&number.to_le_bytes());
        let (start, end) = (1 + number * 100, 101 + number * 100);
        let comma = if number > 0 { "," } else { "" };
        write!(
            json,
            r#"{comma}{{"type":"reg","name":"usr/share/directory-{}/file-{number}","mode":420,"size":1000,
            "modtime":"2026-01-02T03:04:05Z","digest":"{digest}","offset":{start},"endOffset":{end},
            "chunkDigest":"{digest}"}}"#,
            number / 100
        )
        .unwrap();
    }
    json + "]}"
}

/// A layer whose manifest promises this TOC, and what stands in its blob as that.
fn layer(toc: &str) -> (Descriptor, Vec<u8>) {
    let compressed = zstd::bulk::compress(toc.as_bytes(), 1).unwrap();
    let position = format!("{TOC_START}:{}:{}:1", compressed.len(), toc.len());
    let annotations = [
        (format!("{PREFIX}{CHECKSUM}"), Digest::of(&compressed).to_string()),
        (format!("{PREFIX}{POSITION}"), position),
    ];
    let descriptor = Descriptor {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd".to_owned(),
        digest: Digest::of(b"blob"),
        size: TOC_START + compressed.len() as u64 + 100,
        annotations: BTreeMap::from(annotations),
        urls: Vec::new(),
    };
    (descriptor, compressed)
}

fn index(descriptor: &Descriptor, toc: &[u8], scratch: Arc<dyn Scratch>) -> Spooled {
    let mut indexer = indexer(descriptor, None, scratch).unwrap();
    assert!(matches!(indexer.step(None), Ok(Step::Need(_))));
    match indexer.step(Some(toc)) {
        Ok(Step::Done(index)) => index,
        other => panic!("{other:?}"),
    }
}

#[test]
fn indexing_and_merging_hold_a_small_part_of_a_layer() {
    const FILES: u32 = 40_000;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let text = toc(FILES);
    let (descriptor, compressed) = layer(&text);

    let (index, held_bytes) = counting::growth(|| index(&descriptor, &compressed, store.scratch()));
    let made_bytes = text.len() + index.len();
    assert!(held_bytes < made_bytes / 2, "{held_bytes} of {made_bytes}");

    let key = Digest::of(b"key");
    let (layer, held_bytes) = counting::growth(|| store.add_layer(&key, &index).unwrap());
    assert!(held_bytes < index.len() / 100, "{held_bytes}");

    let (merged, held_bytes) = counting::growth(|| merge(&[layer.index()], &key, Whiteouts::Apply).unwrap());
    let tree = Tree::open(merged.bytes.as_slice(), &key).unwrap();
    assert!(tree.totals().nodes > u64::from(FILES));
    assert!(held_bytes < 256 * FILES as usize, "{held_bytes}");
}
