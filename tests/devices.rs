//! Ranges of layers' data files as the kernel's EROFS reads them, brought from a registry.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/fetching.rs"]
mod fetching;

use std::sync::Arc;
use std::time::{Duration, Instant};

use registryfs::demo::{Content, DemoRegistry, Fault, ImageBuilder, Layer, Scope};
use registryfs::fetch::device::DeviceAt;
use registryfs::fetch::{FetchOptions, Fetcher, Source};
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::estargz::writer::Options;
use registryfs::layer::zstd_chunked::writer as zstd_chunked;
use registryfs::registry::reference::Repository;

use crate::fetching::{Fetching, manifest_of};

const BLOCK: usize = 4096;

/// Files of all sizes, some of the same content, with directories between them.
fn entries() -> Vec<(Entry, Vec<u8>)> {
    let mut entries = Vec::new();
    for number in 0..60_usize {
        if number.is_multiple_of(10) {
            entries.push((Entry::new(format!("dir{}", number / 10), Kind::Dir), Vec::new()));
        }
        let size = [0, 1, 100, BLOCK, BLOCK + 1, 20_000, 300_000][number % 7] + number / 7 * 11;
        // Neither all the same nor easily compressed.
        let mut state = number as u64 % 50 + 1;
        let byte = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 57) as u8
        };
        let content: Vec<u8> = (0..size).map(byte).collect();
        let name = format!("dir{}/file{number}", number / 10);
        entries.push((
            Entry {
                size: size as u64,
                ..Entry::new(name, Kind::File)
            },
            content,
        ));
    }
    entries
}

struct World {
    _dir: tempfile::TempDir,
    registry: DemoRegistry,
    runtime: tokio::runtime::Runtime,
    fetcher: Arc<Fetcher>,
    at: DeviceAt,
    /// What the device holds.
    bytes: Vec<u8>,
}

impl World {
    fn new(layer: Layer) -> Self {
        let image = ImageBuilder::new(vec![layer]).build();
        let mut content = Content::new();
        content.add_tagged_image("name", "1", &image);
        let Fetching {
            registry,
            runtime,
            fetcher,
            dir,
        } = Fetching::from(content, |_| FetchOptions::default());
        let source = Arc::new(Source {
            repository: Repository::new(&registry.host(), "name").unwrap(),
            descriptor: manifest_of(&image).layers.remove(0),
            ztoc: None,
            place: None,
        });
        let layer = runtime.block_on(fetcher.layer(&source)).unwrap();
        let mut bytes = vec![0; layer.index().summary().data_bytes as usize];
        let contents = entries();
        for number in 0..layer.index().entry_count() {
            let entry = layer.index().entry(number).unwrap();
            let content = contents.iter().find(|(known, _)| known.path == entry.path);
            let Some((_, content)) = content.filter(|_| entry.kind == Kind::File) else {
                continue;
            };
            let start = entry.data_offset as usize;
            bytes[start..start + content.len()].copy_from_slice(content);
        }
        let at = DeviceAt { source, layer };
        Self {
            _dir: dir,
            registry,
            runtime,
            fetcher,
            at,
            bytes,
        }
    }

    fn read(&self, offset: usize, len: usize) -> registryfs::error::Result<Vec<u8>> {
        let read = self.fetcher.read_device(&self.at, offset as u64, len);
        self.runtime.block_on(read)
    }

    fn expected(&self, offset: usize, len: usize) -> &[u8] {
        &self.bytes[offset..(offset + len).min(self.bytes.len())]
    }
}

fn layers() -> Vec<(&'static str, Layer)> {
    let entries = entries();
    let small = Options {
        chunk_bytes: 65_536,
        min_chunk_bytes: 100_000,
        ..Options::default()
    };
    vec![
        ("estargz", Layer::estargz(&entries, Options::default()).unwrap()),
        ("estargz, joined chunks", Layer::estargz(&entries, small).unwrap()),
        (
            "zstd:chunked",
            Layer::zstd_chunked(&entries, zstd_chunked::Options::default()).unwrap(),
        ),
        ("gzip", Layer::gzip(&entries).unwrap()),
        ("tar", Layer::tar(&entries).unwrap()),
    ]
}

#[test]
fn any_range_of_any_format_is_the_files_at_their_places_and_zeros() {
    for (name, layer) in layers() {
        let world = World::new(layer);
        // What a pass kept goes again, so that everything has to come by ranges.
        let chunks = 0..world.at.layer.index().chunk_count();
        world.at.layer.evict(std::slice::from_ref(&chunks)).unwrap();
        let blocks = world.bytes.len() / BLOCK;
        assert!(blocks > 100, "{name}");
        for step in 0..150 {
            let (block, len) = (step * 7919 % blocks, [1, 3, 32, 256][step % 4] * BLOCK);
            let bytes = world.read(block * BLOCK, len).unwrap();
            assert!(
                bytes == world.expected(block * BLOCK, len),
                "{name}, block {block}, {len} bytes"
            );
            let now = world.runtime.block_on(async {
                world
                    .fetcher
                    .read_device_now(&world.at, (block * BLOCK) as u64, len)
            });
            let now = now.unwrap_or_else(|| bytes.clone());
            assert!(now == bytes, "{name}, block {block}, {len} bytes, at once");
        }
        assert!(
            world.read(0, world.bytes.len() + BLOCK).unwrap() == world.bytes,
            "{name}"
        );
        assert!(world.at.layer.is_complete(), "{name}");
    }
}

#[test]
fn many_readers_of_one_range_have_every_chunk_brought_once_by_few_requests() {
    let world = World::new(Layer::estargz(&entries(), Options::default()).unwrap());
    let before = world.fetcher.counters();
    let read = || {
        let (fetcher, at) = (Arc::clone(&world.fetcher), world.at.clone());
        async move { fetcher.read_device(&at, 0, 1 << 20).await }
    };
    let reading: Vec<_> = (0..50).map(|_| world.runtime.spawn(read())).collect();
    for reader in reading {
        let bytes = world.runtime.block_on(reader).unwrap().unwrap();
        assert!(bytes == world.expected(0, 1 << 20));
    }
    let after = world.fetcher.counters();
    let chunks = world.at.layer.index().chunk_count();
    assert!(
        after.chunks_decoded - before.chunks_decoded <= u64::from(chunks),
        "{after:?}"
    );
    assert!(after.requests - before.requests <= 3, "{after:?}");
    assert_eq!(after.reads - before.reads, 50);
}

#[test]
fn a_failure_names_the_file_fails_nobody_else_and_passes() {
    let world = World::new(Layer::estargz(&entries(), Options::default()).unwrap());
    let index = world.at.layer.index();
    let first = index.chunk(0).unwrap().data_offset as usize;
    world.read(first, BLOCK).unwrap();
    // Far from both ends: its request begins with its first chunk.
    let path = "dir3/file34";
    let is_of_it = |number: &u32| {
        let entry = index.chunk(*number).unwrap().entry;
        index.entry(entry).unwrap().path == path.as_bytes()
    };
    let number = (0..index.chunk_count()).find(is_of_it).unwrap();
    let place = index.chunk(number).unwrap().data_offset as usize;
    let (offset, len) = (place / BLOCK * BLOCK, BLOCK);
    world
        .registry
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::FlipByte(300));
    let error = world.read(offset, len).map(|bytes| bytes.len()).unwrap_err();
    assert!(error.to_string().contains(path), "{error} does not name {path}");
    assert_eq!(error.errno(), libc::EIO, "{error}");
    assert!(
        world.read(first, BLOCK).unwrap() == world.expected(first, BLOCK),
        "that is here"
    );
    assert!(!world.at.layer.is_present(number));
    world.registry.handle().clear_faults();
    let started = Instant::now();
    let bytes = loop {
        match world.read(offset, len) {
            Ok(bytes) => break bytes,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(60), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(bytes == world.expected(offset, len));
}
