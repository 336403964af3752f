//! What is on disk already, in another layer or image, is not fetched: counted in requests and bytes on a registry.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/fetching.rs"]
mod fetching;
mod support;

use std::ops::Range;
use std::sync::Arc;

use registryfs::demo::{Content, DemoRegistry, Image, ImageBuilder, Layer, Record};
use registryfs::fetch::device::DeviceAt;
use registryfs::fetch::{CounterValues, FetchOptions, Fetcher, Place, Source};
use registryfs::layer::estargz::writer::Options;
use registryfs::layer::zstd_chunked::writer as zstd_chunked;
use registryfs::registry::reference::Repository;
use registryfs::store::layer::Layer as Stored;

use crate::fetching::{Fetching, manifest_of};
use crate::support::{File, file};

const CHUNK: usize = 65_536;
/// Longer than what is read ahead at a new place.
const LONG: usize = 600_000;

/// Bytes that do not compress, others for each seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let byte = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 57) as u8 ^ (state >> 33) as u8
    };
    (0..len).map(byte).collect()
}

fn estargz(files: &[File]) -> Layer {
    let options = Options {
        chunk_bytes: CHUNK as u64,
        ..Options::default()
    };
    Layer::estargz(files, options).unwrap()
}

struct World {
    dir: tempfile::TempDir,
    registry: DemoRegistry,
    runtime: tokio::runtime::Runtime,
    fetcher: Arc<Fetcher>,
}

impl World {
    fn new(content: Content) -> Self {
        let Fetching {
            registry,
            runtime,
            fetcher,
            dir,
        } = Fetching::from(content, |_| FetchOptions::default());
        Self {
            dir,
            registry,
            runtime,
            fetcher,
        }
    }

    /// A layer of an image in a repository that is open to everyone, or not known to be.
    fn open(&self, name: &str, image: &Image, number: usize, is_open: bool) -> DeviceAt {
        let manifest = manifest_of(image);
        let source = Arc::new(Source {
            repository: Repository::new(&self.registry.host(), name).unwrap(),
            descriptor: manifest.layers[number].clone(),
            ztoc: None,
            place: Some(Place {
                manifest: image.digest(),
                config: manifest.config.clone(),
                number,
                is_open,
            }),
        });
        let opened = self.fetcher.layer_as_it_is(&source);
        let layer = self.runtime.block_on(opened).unwrap();
        self.fetcher.store().digests().settle();
        DeviceAt { source, layer }
    }

    fn read(&self, at: &DeviceAt, range: Range<u64>) -> Vec<u8> {
        let len = (range.end - range.start) as usize;
        let read = self.fetcher.read_device(at, range.start, len);
        self.runtime.block_on(read).unwrap()
    }

    /// The content of a file, read in one go.
    fn file(&self, at: &DeviceAt, path: &str) -> Vec<u8> {
        let place = place(&at.layer, path);
        self.read(at, place)
    }

    fn everything(&self, at: &DeviceAt) -> Vec<u8> {
        let bytes = self.read(at, 0..at.bytes());
        assert!(at.layer.is_complete());
        bytes
    }

    /// What `work` asks of the registry, and what it adds to the counters of reuse: chunks and bytes.
    fn cost<T>(&self, work: impl FnOnce() -> T) -> (T, Vec<Record>, (u64, u64)) {
        self.registry.handle().clear_ledger();
        let before = self.fetcher.counters();
        let result = work();
        let after: CounterValues = self.fetcher.counters();
        let reused = (
            after.reused_chunks - before.reused_chunks,
            after.reused_bytes - before.reused_bytes,
        );
        (result, self.registry.handle().ledger(), reused)
    }
}

fn place(layer: &Stored, path: &str) -> Range<u64> {
    let index = layer.index();
    let mut entries = (0..index.entry_count()).map(|number| index.entry(number).unwrap());
    let entry = entries.find(|entry| entry.path == path.as_bytes()).unwrap();
    entry.data_offset..entry.data_offset + entry.size
}

/// Images of one layer each, as `NAME:1`.
fn images(images: &[(&str, Layer)]) -> (World, Vec<Image>) {
    let mut content = Content::new();
    let mut built = Vec::new();
    for (name, layer) in images {
        let image = ImageBuilder::new(vec![layer.clone()]).build();
        content.add_tagged_image(name, "1", &image);
        built.push(image);
    }
    (World::new(content), built)
}

fn evict_all(layer: &Stored) {
    let chunks = 0..layer.index().chunk_count();
    layer.evict(std::slice::from_ref(&chunks)).unwrap();
}

/// The compressed bytes of a file.
fn blob_bytes(at: &DeviceAt, path: &str) -> u64 {
    let index = at.layer.index();
    let is_it = |number: &u32| index.entry(*number).unwrap().path == path.as_bytes();
    let entry = (0..index.entry_count()).find(is_it).unwrap();
    let chunks = index.entry(entry).unwrap().chunk_range();
    let range = |chunk| {
        let member = index.chunk(chunk).unwrap().member;
        index.member(member).unwrap().blob_range()
    };
    chunks.map(range).map(|range| range.end - range.start).sum()
}

#[test]
fn a_file_that_another_layer_has_costs_no_request_and_a_new_one_its_own_bytes() {
    let (same, new) = (noise(3 * CHUNK + 77, 1), noise(LONG, 2));
    let old_layer = estargz(&[file("usr/lib/same", same.clone()), file("gone", noise(999, 3))]);
    let new_layer = estargz(&[file("opt/new", new.clone()), file("opt/moved", same.clone())]);
    let (world, images) = images(&[("app", old_layer), ("base", new_layer)]);
    let old = world.open("app", &images[0], 0, true);
    world.everything(&old);
    let at = world.open("base", &images[1], 0, true);
    let (bytes, requests, reused) = world.cost(|| world.file(&at, "opt/moved"));
    assert!(bytes == same);
    assert_eq!(
        (requests.len(), reused),
        (0, (4, same.len() as u64)),
        "{requests:#?}"
    );
    let (bytes, requests, reused) = world.cost(|| world.file(&at, "opt/new"));
    assert!(bytes == new);
    assert_eq!((requests.len(), reused), (1, (0, 0)), "{requests:#?}");
    assert_eq!(requests[0].body_bytes, blob_bytes(&at, "opt/new"));
    // A copy is as if it had been fetched.
    assert!(world.file(&at, "opt/moved") == same);
}

#[test]
fn small_files_that_are_copied_between_new_ones_cost_no_requests_more() {
    let same = |number: u64| noise(1000, number);
    let new = |number: u64| noise(20_000, 100 + number);
    let old_files: Vec<File> = (0..10).map(|n| file(&format!("same{n}"), same(n))).collect();
    let new_files: Vec<File> = (0..10)
        .flat_map(|n| {
            [
                file(&format!("{n}-new"), new(n)),
                file(&format!("{n}-same"), same(n)),
            ]
        })
        .collect();
    let (world, images) = images(&[("app", estargz(&old_files)), ("app2", estargz(&new_files))]);
    world.everything(&world.open("app", &images[0], 0, true));
    let at = world.open("app2", &images[1], 0, true);
    let (_, requests, reused) = world.cost(|| world.everything(&at));
    assert_eq!((requests.len(), reused), (1, (10, 10_000)), "{requests:#?}");
    for n in 0..10 {
        assert!(world.file(&at, &format!("{n}-new")) == new(n));
        assert!(world.file(&at, &format!("{n}-same")) == same(n));
    }
}

#[test]
fn of_a_large_file_in_which_one_chunk_changed_only_that_is_fetched() {
    let before = noise(40 * CHUNK, 1);
    let mut after = before.clone();
    after[17 * CHUNK + 5] ^= 1;
    let layer = |content: &Vec<u8>| estargz(&[file("large", content.clone())]);
    let (world, images) = images(&[("app", layer(&before)), ("app2", layer(&after))]);
    let old = world.open("app", &images[0], 0, true);
    world.everything(&old);
    let at = world.open("app2", &images[1], 0, true);
    let (bytes, requests, reused) = world.cost(|| world.file(&at, "large"));
    assert!(bytes == after);
    assert_eq!(reused, (39, 39 * CHUNK as u64));
    let changed = at.layer.index().chunk(17).unwrap().member;
    let range = at.layer.index().member(changed).unwrap().blob_range();
    let asked: Vec<_> = requests
        .iter()
        .map(|request| (request.range.clone(), request.body_bytes))
        .collect();
    let header = format!("bytes={}-{}", range.start, range.end - 1);
    assert_eq!(asked, [(Some(header), range.end - range.start)]);
}

#[test]
fn what_the_source_has_lost_is_fetched() {
    let files = [file("a", noise(LONG, 1)), file("b", noise(LONG, 2))];
    let (world, images) = images(&[
        ("app", estargz(&files)),
        ("app2", estargz(&[files[1].clone(), files[0].clone()])),
    ]);
    let old = world.open("app", &images[0], 0, true);
    world.everything(&old);
    evict_all(&old.layer);
    let at = world.open("app2", &images[1], 0, true);
    let (bytes, requests, reused) = world.cost(|| world.file(&at, "a"));
    assert!(bytes == files[0].1);
    assert_eq!((requests.len(), reused), (1, (0, 0)), "{requests:#?}");
    // Where it is gone altogether, which is found out only by looking.
    let key = *old.layer.key();
    drop(old);
    std::fs::remove_dir_all(world.dir.path().join("layers").join(key.hex())).unwrap();
    let (bytes, requests, _) = world.cost(|| world.file(&at, "b"));
    assert!(bytes == files[1].1);
    assert_eq!(requests.len(), 1, "{requests:#?}");
}

#[test]
fn a_damaged_source_is_never_shown() {
    let files = [file("a", noise(LONG, 1))];
    let (world, images) = images(&[
        ("app", estargz(&files)),
        ("app2", estargz(&[file("b", noise(LONG, 1))])),
    ]);
    let old = world.open("app", &images[0], 0, true);
    world.everything(&old);
    let data = world
        .dir
        .path()
        .join("layers")
        .join(old.layer.key().hex())
        .join("data");
    let data = std::fs::File::options().write(true).open(data).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&data, b"damage", 3 * CHUNK as u64).unwrap();
    let at = world.open("app2", &images[1], 0, true);
    let (bytes, requests, (chunks, _)) = world.cost(|| world.file(&at, "b"));
    assert!(bytes == files[0].1);
    assert_eq!((requests.len(), chunks), (1, 9), "{requests:#?}");
    // The old image's readers get the right bytes now too.
    assert!(world.file(&old, "a") == files[0].1);
}

#[test]
fn what_came_with_credentials_is_copied_within_its_repository_only() {
    let secret = noise(LONG, 1);
    let other = |name: &str| estargz(&[file(name, secret.clone())]);
    let (world, images) = images(&[
        ("secret", estargz(&[file("a", secret.clone())])),
        ("else", other("b")),
        ("public", other("c")),
        ("secret", other("d")),
    ]);
    let old = world.open("secret", &images[0], 0, false);
    world.everything(&old);
    for (name, image, is_open, is_copied) in [
        ("else", &images[1], false, false),
        ("public", &images[2], true, false),
        ("secret", &images[3], false, true),
    ] {
        let at = world.open(name, image, 0, is_open);
        let (_, requests, _) = world.cost(|| world.everything(&at));
        assert_eq!(requests.is_empty(), is_copied, "{name}: {requests:#?}");
        evict_all(&at.layer);
    }
    // Now the same content is known to be for everyone.
    let public = world.open("public", &images[2], 0, true);
    world.everything(&public);
    let at = world.open("else", &images[1], 0, false);
    let (_, requests, _) = world.cost(|| world.everything(&at));
    assert_eq!(requests.len(), 0, "{requests:#?}");
}

#[test]
fn layers_of_all_formats_are_sources_for_each_other() {
    let mut files: Vec<File> = (0..40_usize)
        .map(|number| file(&format!("file{number}"), noise(number * 700 + 1, number as u64)))
        .collect();
    // As the landmark that eStargz has.
    files.push(file("landmark", [0xf]));
    let whole_files = zstd_chunked::Options {
        chunk_bytes: Some(4 << 20),
        ..zstd_chunked::Options::default()
    };
    let layers = [
        ("estargz", Layer::estargz(&files, Options::default()).unwrap()),
        ("zstd", Layer::zstd_chunked(&files, whole_files).unwrap()),
        ("gzip", Layer::gzip(&files).unwrap()),
        ("tar", Layer::tar(&files).unwrap()),
    ];
    let (world, images) = images(&layers);
    let open = |number: usize| world.open(layers[number].0, &images[number], 0, true);
    let opened: Vec<DeviceAt> = (0..layers.len()).map(open).collect();
    opened.iter().for_each(|at| evict_all(&at.layer));
    for from in &opened {
        world.everything(from);
        for to in opened.iter().filter(|to| to.layer.key() != from.layer.key()) {
            let (_, requests, _) = world.cost(|| world.everything(to));
            for (entry, content) in &files {
                let path = String::from_utf8(entry.path.clone()).unwrap();
                assert!(world.file(to, &path) == *content, "{path}");
            }
            let formats = (
                from.layer.index().summary().format,
                to.layer.index().summary().format,
            );
            assert_eq!(requests.len(), 0, "{formats:?}: {requests:#?}");
            evict_all(&to.layer);
        }
        evict_all(&from.layer);
    }
}

#[test]
fn files_of_one_content_in_one_layer_are_fetched_once() {
    let content = noise(LONG, 1);
    let between = noise(2 * LONG, 2);
    let files = [
        file("a", content.clone()),
        file("b", between),
        file("c", content.clone()),
    ];
    let (world, images) = images(&[("app", estargz(&files))]);
    let at = world.open("app", &images[0], 0, true);
    world.file(&at, "a");
    let (bytes, requests, _) = world.cost(|| world.file(&at, "c"));
    assert!(bytes == content);
    assert_eq!(requests.len(), 0, "{requests:#?}");
}
