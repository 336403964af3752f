//! A layer of one file, for tests.

use std::sync::Arc;

use crate::digest::Digest;
use crate::layer::Format;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};
use crate::store::Store;
use crate::store::layer::Layer;

/// The size of a chunk.
pub(super) const CHUNK_BYTES: u64 = 64 << 10;

/// A chunk's bytes, never zeros; those of one and the 250th behind it are the same.
pub(super) fn content(chunk: u32) -> Vec<u8> {
    vec![(chunk % 250) as u8 + 1; CHUNK_BYTES as usize]
}

/// A store with the layer `key` of one file of so many chunks, all of them there.
pub(super) fn world(chunks: u32) -> (tempfile::TempDir, Arc<Store>, Arc<Layer>) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layer = add_layer(&store, b"key", chunks, true);
    (dir, store, layer)
}

/// Adds such a layer, whose chunks have digests of their own or only those of their members.
pub(super) fn add_layer(store: &Arc<Store>, key: &[u8], chunks: u32, has_digests: bool) -> Arc<Layer> {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let size = u64::from(chunks) * CHUNK_BYTES;
    let file = Entry {
        size,
        ..Entry::new("file", Kind::File)
    };
    builder.entry(&file).unwrap();
    for chunk in 0..chunks {
        let (blob_start, digest) = (u64::from(chunk) * CHUNK_BYTES, Digest::of(&content(chunk)));
        let member = NewMember {
            blob_start,
            blob_end: blob_start + CHUNK_BYTES,
            coding: Coding::Stored,
            bits: 0,
            window: Vec::new(),
            check: Some(digest),
        };
        builder.member(member).unwrap();
        let new = NewChunk {
            bytes: CHUNK_BYTES,
            blob_offset: blob_start,
            inner_offset: 0,
            digest: has_digests.then_some(digest),
        };
        builder.chunk(new).unwrap();
    }
    let index = builder
        .finish(Summary::of(Format::Tar, size), size)
        .unwrap()
        .to_vec();
    let layer = store.add_layer(&Digest::of(key), &index).unwrap();
    (0..chunks).for_each(|chunk| keep(&layer, chunk));
    layer.note_progress();
    layer
}

/// Stores a chunk.
pub(super) fn keep(layer: &Layer, chunk: u32) {
    let place = layer.index().chunk(chunk).unwrap().data_offset;
    layer.keep(chunk..chunk + 1, place, &content(chunk)).unwrap();
}

/// A chunk's bytes, if it is there.
pub(super) fn read(layer: &Layer, chunk: u32) -> Option<Vec<u8>> {
    let place = layer.index().chunk(chunk).unwrap().data_offset;
    layer
        .read(&(chunk..chunk + 1), place, CHUNK_BYTES as usize)
        .unwrap()
}
