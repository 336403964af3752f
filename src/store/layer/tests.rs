//! Files with holes: which chunks a read needs, and what it gets where there are none.

use std::sync::Arc;

use super::*;
use crate::layer::Format;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};
use crate::store::Store;

/// A piece of a file: a chunk or a hole, of this length.
#[derive(Clone, Copy)]
enum Piece {
    Chunk(u64),
    Hole(u64),
}
use Piece::{Chunk as C, Hole as H};

const FILES: [&[Piece]; 8] = [
    &[H(5)],
    &[C(4), C(3)],
    &[H(3), C(2)],
    &[C(2), H(3)],
    &[H(1), C(2), H(2), C(1), C(2), H(3), C(1), H(2)],
    &[H(2), H(2), C(1)],
    &[C(5000), H(9000), C(3)],
    &[H(4)],
];

/// A layer of [`FILES`], with nothing in it yet.
fn layer(store: &Store) -> Arc<Layer> {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let mut blob_offset = 0;
    for (number, pieces) in FILES.iter().enumerate() {
        let size = pieces.iter().map(|&(C(bytes) | H(bytes))| bytes).sum();
        let entry = Entry::new(number.to_string(), Kind::File);
        builder.entry(&Entry { size, ..entry }).unwrap();
        for piece in *pieces {
            match *piece {
                H(bytes) => builder.hole(bytes).unwrap(),
                C(bytes) => {
                    let chunk = NewChunk {
                        bytes,
                        blob_offset,
                        inner_offset: 0,
                        digest: Some(Digest::of(&content(blob_offset, bytes))),
                    };
                    builder.chunk(chunk).unwrap();
                    blob_offset += bytes;
                }
            }
        }
    }
    let index = builder
        .finish(Summary::of(Format::Tar, blob_offset), blob_offset)
        .unwrap();
    store.add_layer(&Digest::of(b"key"), &index).unwrap()
}

/// The bytes of the chunk at a place of the blob: never zero.
fn content(blob_offset: u64, bytes: u64) -> Vec<u8> {
    (blob_offset..blob_offset + bytes)
        .map(|at| (at % 255) as u8 + 1)
        .collect()
}

/// The content of a file, and for each of its bytes the chunk that has it.
fn model(layer: &Layer, file: usize) -> (Vec<u8>, Vec<Option<u32>>) {
    let mut bytes = Vec::new();
    let mut owners = Vec::new();
    let mut chunk = layer.index().entry(file as u32).unwrap().chunks.0;
    for piece in FILES[file] {
        match *piece {
            H(len) => {
                bytes.resize(bytes.len() + len as usize, 0);
                owners.resize(bytes.len(), None);
            }
            C(len) => {
                let index = layer.index();
                let member = index.member(index.chunk(chunk).unwrap().member).unwrap();
                bytes.extend(content(member.blob_start, len));
                owners.resize(bytes.len(), Some(chunk));
                chunk += 1;
            }
        }
    }
    (bytes, owners)
}

/// Every part of a small file; of a large one those that begin and end around the ends of its pieces.
fn parts(size: u64) -> Vec<Range<u64>> {
    let near = |at: u64| size < 100 || [0, 4999, 5000, 5001, 13_999, 14_000, 14_001, 14_003].contains(&at);
    let ends = (0..=size).filter(|&at| near(at)).collect::<Vec<_>>();
    let from = |&start: &u64| ends.iter().map(move |&end| start..end).collect::<Vec<_>>();
    ends.iter()
        .flat_map(from)
        .filter(|part| !part.is_empty())
        .collect()
}

#[test]
fn the_chunks_of_a_part_are_those_that_have_bytes_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let layer = layer(&Store::open(dir.path()).unwrap());
    for file in 0..FILES.len() {
        let entry = layer.index().entry(file as u32).unwrap();
        let (_, owners) = model(&layer, file);
        for part in parts(entry.size) {
            let chunks = layer.chunks_of(&entry, part.start, part.end).unwrap();
            let mut wanted: Vec<u32> = owners[part.start as usize..part.end as usize]
                .iter()
                .copied()
                .flatten()
                .collect();
            wanted.dedup();
            assert_eq!(chunks.collect::<Vec<_>>(), wanted, "file {file}, {part:?}");
        }
    }
}

#[test]
fn a_hole_can_be_read_whatever_becomes_of_the_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let layer = layer(&Store::open(dir.path()).unwrap());
    layer.data().set_len(0).unwrap();
    let entry = layer.index().entry(2).unwrap();
    let chunks = layer.chunks_of(&entry, 0, 3).unwrap();
    assert_eq!(
        layer.read(&chunks, entry.data_offset, 3).unwrap().unwrap(),
        [0; 3]
    );
    assert_eq!(layer.read_now(&chunks, entry.data_offset, 3).unwrap(), [0; 3]);
}

#[test]
fn holes_are_zeros_without_anything_being_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let layer = layer(&Store::open(dir.path()).unwrap());
    let check = |is_filled: bool| {
        for file in 0..FILES.len() {
            let entry = layer.index().entry(file as u32).unwrap();
            let (bytes, owners) = model(&layer, file);
            for part in parts(entry.size) {
                let chunks = layer.chunks_of(&entry, part.start, part.end).unwrap();
                let len = (part.end - part.start) as usize;
                let place = entry.data_offset + part.start;
                let read = layer.read(&chunks, place, len).unwrap();
                if chunks.is_empty() {
                    assert_eq!(layer.read_now(&chunks, place, len), read);
                }
                let range = part.start as usize..part.end as usize;
                let is_hole = owners[range.clone()].iter().all(Option::is_none);
                assert_eq!(read.is_some(), is_filled || is_hole, "file {file}, {part:?}");
                assert!(
                    read.is_none_or(|read| read == bytes[range]),
                    "file {file}, {part:?}"
                );
            }
        }
    };
    check(false);
    assert!(!layer.is_complete());
    for number in 0..layer.index().chunk_count() {
        let chunk = layer.index().chunk(number).unwrap();
        let member = layer.index().member(chunk.member).unwrap();
        let bytes = content(member.blob_start, chunk.bytes);
        layer.keep(number..number + 1, chunk.data_offset, &bytes).unwrap();
    }
    layer.note_progress();
    assert!(layer.is_complete());
    check(true);
}
