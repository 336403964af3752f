//! What goes over the wire for the content of files, to the request and the byte, in both modes: the kernel serves the root
//! filesystem, or FUSE does. How many requests lead to a first byte is in `tests/mount/wire.rs`. Mounting needs root and
//! /dev/fuse.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

mod large;
mod many;
mod small;
#[path = "../support/mod.rs"]
mod support;
#[path = "../mount/world.rs"]
mod world;

use std::ops::Range;

use registryfs::demo::{Behaviour, Content, Image, ImageBuilder, Layer, Record};
use registryfs::layer::estargz::writer::Options;

use crate::support::File;
use crate::world::World;

/// An image of one layer, mounted, and which requests for its blob are for content.
struct Wire {
    world: World,
    /// Where in the blob the table of contents starts.
    content_bytes: u64,
}

impl Wire {
    /// In both modes, one after the other.
    fn each_mode(image: &Image, behaviour: &Behaviour, test: impl Fn(&Self)) {
        let blob = image.layers[0].blob();
        let content_bytes = toc_start(blob);
        for is_by_kernel in [true, false] {
            let mut content = Content::new();
            content.add_tagged_image("team/app", "1.0", image);
            let world = World::with(content, behaviour.clone(), &[]);
            let world = match is_by_kernel {
                true => world.by_kernel(),
                false => world.by_fuse(),
            };
            eprintln!("by the kernel: {is_by_kernel}");
            test(&Self {
                world: world.mounted(),
                content_bytes,
            });
        }
    }

    /// A file of the image, whose tables of contents are there.
    fn path(&self, name: &str) -> std::path::PathBuf {
        let rootfs = self.world.at("team/app/1.0/rootfs");
        std::fs::metadata(&rootfs).unwrap();
        rootfs.join(name)
    }

    /// What of the blob was asked for besides the table of contents and the end of the blob, in the order of the blob.
    fn asked(&self, records: &[Record]) -> Vec<Range<u64>> {
        let range = |record: &Record| {
            let text = record.range.as_deref()?.strip_prefix("bytes=")?;
            let (first, last) = text.split_once('-')?;
            Some(first.parse::<u64>().ok()?..last.parse::<u64>().ok()? + 1)
        };
        let blobs = records.iter().filter(|record| record.path.contains("/blobs/"));
        let ranges = blobs.map(|record| range(record).unwrap());
        let mut ranges: Vec<_> = ranges.filter(|range| range.end <= self.content_bytes).collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }
}

/// Where the footer says that the table of contents starts.
fn toc_start(blob: &[u8]) -> u64 {
    let footer = &blob[blob.len() - 51..];
    u64::from_str_radix(std::str::from_utf8(&footer[16..32]).unwrap(), 16).unwrap()
}

/// How many bytes ranges have, none of which may be in two of them.
fn bytes_once(ranges: &[Range<u64>]) -> u64 {
    for pair in ranges.windows(2) {
        assert!(pair[0].end <= pair[1].start, "asked for twice: {pair:?}");
    }
    bytes(ranges)
}

/// How many bytes ranges have. What others fetch already may lie in the gap between two members that one request brings.
fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// An image of one layer with chunks of so many bytes. Nothing is compressed: a chunk is its own size and a little more.
fn image(entries: &[File], chunk_bytes: u64) -> Image {
    let options = Options {
        chunk_bytes,
        level: 0,
        ..Options::default()
    };
    ImageBuilder::new(vec![Layer::estargz(entries, options).unwrap()]).build()
}
