//! Images for the kernel, written from trees and indexes that come back from a disk. What is written then is no longer than
//! what it is made from allows, and is what its header says.

use std::io::{self, Cursor, Seek, SeekFrom, Write};

use registryfs::digest::Digest;
use registryfs::image::erofs;
use registryfs::image::tree::{self, Tree, Whiteouts};
use registryfs::layer::estargz::writer::Variant;
use registryfs::layer::index::Index;

use crate::engine::{Shape, Target};
use crate::samples::{entries, estargz, gzip, plain, tar_of};
use crate::targets::files::sealed;

/// An image is at most so many times as long as tree and indexes together: a target of a symlink may be named by many.
const GROWTH_MAX: u64 = 100;
/// Longer images are not kept to be looked at.
const KEPT_BYTES_MAX: usize = 1 << 20;

pub(crate) fn targets() -> Vec<Target> {
    let layers = [
        estargz(Variant::Estargz, 600),
        plain(gzip(&tar_of(&entries()), 6)),
    ];
    let indexes = layers.map(|layer| layer.index());
    let key = Digest::of(b"key");
    let trees = indexes.each_ref().map(|bytes| {
        let index = Index::open(bytes.as_slice()).unwrap();
        tree::merge(&[&index], &key, Whiteouts::Apply).unwrap().bytes
    });
    let (kept_index, kept_tree) = (indexes[0].clone(), trees[0].clone());
    vec![
        Target {
            name: "erofs-of-tree",
            seeds: trees.to_vec(),
            words: &[b"\xff\xff\xff\xff", b"\0\0\0\0", b"user.", b"/"],
            run: Box::new(move |bytes| write(&sealed(bytes), &kept_index)),
        },
        Target {
            name: "erofs-of-index",
            seeds: indexes.to_vec(),
            words: &[b"\xff\xff\xff\xff\xff\xff\xff\xff", b"\0\x10\0\0"],
            run: Box::new(move |bytes| write(&kept_tree, &sealed(bytes))),
        },
    ]
}

fn write(tree: &[u8], index: &[u8]) -> Shape {
    let key = Digest::of(b"key");
    let mut shape = Shape::default();
    let opened = Tree::open(tree, &key).and_then(|tree| Ok((tree, Index::open(index)?)));
    shape.result(opened, |shape, (tree, index)| {
        let mut image = Image::default();
        let written = erofs::write(&tree, &[&index], &key, &mut image);
        let made_from = tree.tree_bytes() + index.index_bytes();
        assert!(image.bytes <= GROWTH_MAX * made_from, "{} bytes", image.bytes);
        shape.result(written, |shape, ()| {
            shape.count(image.bytes);
            if image.bytes <= KEPT_BYTES_MAX as u64 {
                let identity = erofs::identity(&tree, &[&index], &key);
                erofs::verify(&mut image.kept.get_ref().as_slice(), &identity).unwrap();
            }
        });
    });
    shape
}

/// Takes an image of any length, and keeps its beginning.
#[derive(Default)]
struct Image {
    bytes: u64,
    kept: Cursor<Vec<u8>>,
}

impl Write for Image {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len() as u64;
        if self.kept.position() as usize <= KEPT_BYTES_MAX {
            self.kept.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Image {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.kept.seek(to)
    }
}
