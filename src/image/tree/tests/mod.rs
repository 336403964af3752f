//! Tests of the merged tree, and what they share: layers from entries, and trees as text.

mod damage;
mod model;
mod paths;
mod rules;
mod size;

use crate::digest::Digest;
use crate::image::tree::{Node, Tree, Whiteouts, merge};
use crate::layer::Format;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Index, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};

/// The index of a layer with these entries. A file's content stands in one chunk, somewhere in a made-up blob.
pub(in crate::image) fn layer(entries: &[Entry]) -> Index<Vec<u8>> {
    Index::open(layer_bytes(entries)).unwrap()
}

/// As [`layer`], in bytes.
pub(in crate::image) fn layer_bytes(entries: &[Entry]) -> Vec<u8> {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    let mut blob_bytes = 1;
    for entry in entries {
        builder.entry(entry).unwrap();
        if entry.kind == Kind::File && entry.size > 0 {
            let chunk = NewChunk {
                bytes: entry.size,
                blob_offset: blob_bytes,
                inner_offset: 0,
                digest: Some(Digest::of(&entry.path)),
            };
            builder.chunk(chunk).unwrap();
            blob_bytes += 1;
        }
    }
    let summary = Summary::of(Format::Tar, blob_bytes);
    builder.finish(summary, blob_bytes).unwrap().to_vec()
}

fn key() -> Digest {
    Digest::of(b"image")
}

/// The tree of these layers, base first, and the warnings.
pub(in crate::image) fn merged(
    layers: &[Index<Vec<u8>>],
    whiteouts: Whiteouts,
) -> (Tree<Vec<u8>>, Vec<String>) {
    let layers: Vec<_> = layers.iter().collect();
    let merged = merge(&layers, &key(), whiteouts).unwrap();
    (Tree::open(merged.bytes, &key()).unwrap(), merged.warnings)
}

/// Calls `visit` with the path of every name in the tree, in the order of a sorted walk, and its inode. The root has the
/// empty path.
fn walk(tree: &Tree<Vec<u8>>, visit: &mut dyn FnMut(&[u8], &Node)) {
    let root = tree.node(0).unwrap();
    visit(b"", &root);
    let mut open = vec![(Vec::new(), root, 0)];
    while let Some((path, dir, position)) = open.pop() {
        let Some((name, child)) = tree.child_at(&dir, position).unwrap() else {
            continue;
        };
        let mut child_path: Vec<u8> = path.clone();
        if !path.is_empty() {
            child_path.push(b'/');
        }
        child_path.extend_from_slice(name);
        open.push((path, dir, position + 1));
        let child = tree.node(child).unwrap();
        visit(&child_path, &child);
        if child.is_dir() {
            open.push((child_path, child, 0));
        }
    }
}
