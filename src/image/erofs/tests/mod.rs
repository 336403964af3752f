//! Tests of images. The judge is the kernel: it mounts them, and shows what the tree says or nothing counts.

mod damage;
mod mounted;
mod random;
mod rules;

use std::io::Cursor;

use crate::digest::Digest;
use crate::error::Result;
use crate::image::erofs::write;
use crate::image::tree::{Tree, Whiteouts, merge};
use crate::layer::Format;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Index, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};

/// A regular file's content: chunks and holes by turns, a chunk first. What is left of the size is one more chunk.
type Pieces = Vec<u64>;

fn key() -> Digest {
    Digest::of(b"image")
}

/// The index of a layer with these entries, as far as it takes them.
fn layer(entries: &[(Entry, Pieces)]) -> Index<Vec<u8>> {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let mut blob_offset = 0;
    for (entry, pieces) in entries {
        if builder.entry(entry).is_err() {
            continue;
        }
        let (mut left, mut pieces) = (
            if entry.kind == Kind::File { entry.size } else { 0 },
            pieces.iter(),
        );
        let mut is_hole = false;
        while left > 0 {
            let bytes = pieces.next().map_or(left, |&bytes| bytes.min(left));
            left -= bytes;
            if is_hole {
                builder.hole(bytes).unwrap();
            } else if bytes > 0 {
                let digest = Some(Digest::of(b"content"));
                builder
                    .chunk(NewChunk {
                        bytes,
                        blob_offset,
                        inner_offset: 0,
                        digest,
                    })
                    .unwrap();
                blob_offset += 1;
            }
            is_hole = !is_hole;
        }
    }
    let blob_bytes = blob_offset + 1;
    let summary = Summary::of(Format::Tar, blob_bytes);
    Index::open(builder.finish(summary, blob_bytes).unwrap().to_vec()).unwrap()
}

/// A merged tree with its layers.
struct Merged {
    layers: Vec<Index<Vec<u8>>>,
    tree: Tree<Vec<u8>>,
}

impl Merged {
    fn new(layers: &[Vec<(Entry, Pieces)>]) -> Self {
        let layers: Vec<_> = layers.iter().map(|entries| layer(entries)).collect();
        let indexes: Vec<_> = layers.iter().collect();
        let merged = merge(&indexes, &key(), Whiteouts::Apply).unwrap();
        let tree = Tree::open(merged.bytes, &key()).unwrap();
        Self { layers, tree }
    }

    /// A tree of one layer, whose files have no holes.
    fn of(entries: &[Entry]) -> Self {
        Self::new(&[entries.iter().map(|entry| (entry.clone(), Vec::new())).collect()])
    }

    fn image(&self) -> Result<Vec<u8>> {
        let indexes: Vec<_> = self.layers.iter().collect();
        let mut image = Cursor::new(Vec::new());
        write(&self.tree, &indexes, &key(), &mut image)?;
        Ok(image.into_inner())
    }
}
