//! What stays in memory, alone and together with what is in the store.

use std::sync::Arc;

use super::*;
use crate::fetch::Source;
use crate::fetch::file::FileAt;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};
use crate::layer::{Descriptor, Format};
use crate::registry::reference::Repository;
use crate::store::Store;

#[test]
fn a_disk_that_was_full_once_is_not_full_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let layer = sparse_file(&Store::open(dir.path()).unwrap()).layer;
    let overflow = Overflow::default();
    assert!(!overflow.is_in_use());
    assert!(overflow.put(&layer, 0, Bytes::from_static(b"chunk")));
    assert!(overflow.is_in_use());
    overflow.0.lock().refused_at = Instant::now().checked_sub(REFUSAL_MEMORY);
    assert!(!overflow.is_in_use());
}

/// A file with holes: `..abc..de..f.` has seven bytes that are none.
const FILE: &[u8] = b"\0\0abc\0\0de\0\0f\0";
/// Its chunks, as places in it.
const CHUNKS: [std::ops::Range<usize>; 4] = [2..4, 4..5, 7..9, 11..12];

fn sparse_file(store: &Store) -> FileAt {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let size = FILE.len() as u64;
    let entry = Entry::new("file", Kind::File);
    builder.entry(&Entry { size, ..entry }).unwrap();
    let mut at = 0;
    for chunk in CHUNKS {
        builder.hole((chunk.start - at) as u64).unwrap();
        at = chunk.end;
        let new = NewChunk {
            bytes: chunk.len() as u64,
            blob_offset: chunk.start as u64,
            inner_offset: 0,
            digest: Some(Digest::of(&FILE[chunk])),
        };
        builder.chunk(new).unwrap();
    }
    builder.hole(size - at as u64).unwrap();
    let index = builder
        .finish(Summary::of(Format::Tar, size), size)
        .unwrap()
        .to_vec();
    let source = Source {
        repository: Repository::new("h.io", "name").unwrap(),
        descriptor: Descriptor {
            media_type: String::new(),
            digest: Digest::of(b"blob"),
            size,
            annotations: std::collections::BTreeMap::new(),
            urls: Vec::new(),
        },
        ztoc: None,
        place: None,
    };
    FileAt {
        source: Arc::new(source),
        layer: store.add_layer(&Digest::of(b"key"), &index).unwrap(),
        entry: 0,
        size,
    }
}

#[test]
fn parts_of_a_file_with_holes_come_from_store_and_memory_alike() {
    // Each chunk is in the store, in memory or nowhere.
    for places in 0..3_usize.pow(CHUNKS.len() as u32) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let file = sparse_file(&store);
        let overflow = Overflow::default();
        let place = |number: usize| places / 3_usize.pow(number as u32) % 3;
        for (number, range) in CHUNKS.into_iter().enumerate() {
            let chunk = file.layer.index().chunk(number as u32).unwrap();
            match place(number) {
                0 => {
                    let kept =
                        file.layer
                            .keep(number as u32..number as u32 + 1, chunk.data_offset, &FILE[range]);
                    kept.unwrap();
                }
                1 => drop(overflow.put(&file.layer, number as u32, FILE[range].into())),
                _ => {}
            }
        }
        for start in 0..FILE.len() {
            for end in start + 1..=FILE.len() + 1 {
                let span = file.span(start as u64, end - start).unwrap().unwrap();
                let end = end.min(FILE.len());
                let touched = (0..CHUNKS.len()).filter(|&n| CHUNKS[n].start < end && start < CHUNKS[n].end);
                let touched: Vec<usize> = touched.map(place).collect();
                let assembled = overflow.assemble(&file.layer, &span).unwrap();
                let read = file.layer.read(&span.chunks, span.data_offset, span.len).unwrap();
                let all_stored = touched.iter().all(|&place| place == 0);
                assert_eq!(read.is_some(), all_stored);
                assert_eq!(assembled.is_some(), !all_stored && !touched.contains(&2));
                for bytes in [read, assembled].into_iter().flatten() {
                    assert_eq!(bytes, FILE[start..end]);
                }
            }
        }
    }
}
