//! What is brought before anybody needs it, counted at the registry.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/fetching.rs"]
mod fetching;

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use registryfs::config::BackgroundMode;
use registryfs::demo::{Content, DemoRegistry, Fault, ImageBuilder, Layer, Scope};
use registryfs::digest::Digest;
use registryfs::fetch::background::Touch;
use registryfs::fetch::device::DeviceAt;
use registryfs::fetch::prefetch::Pace;
use registryfs::fetch::{BackgroundOptions, FetchOptions, Fetcher, FileAt, Source};
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::estargz::writer::{Landmark, Options};
use registryfs::registry::reference::Repository;
use registryfs::store::Store;

use crate::fetching::{Fetching, manifest_of};

/// The size of each file.
const FILE_BYTES: usize = 200_000;

/// A layer of files that do not compress.
fn layer(files: u64, landmark: Landmark) -> Layer {
    let file = |number: u64| {
        let mut state = number + 1;
        let byte = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 57) as u8
        };
        let entry = Entry {
            size: FILE_BYTES as u64,
            ..Entry::new(format!("file{number}"), Kind::File)
        };
        (entry, (0..FILE_BYTES).map(byte).collect())
    };
    let files: Vec<_> = (0..files).map(file).collect();
    let options = Options {
        chunk_bytes: 65_536,
        landmark,
        ..Options::default()
    };
    Layer::estargz(&files, options).unwrap()
}

struct World {
    registry: DemoRegistry,
    runtime: tokio::runtime::Runtime,
    fetcher: Arc<Fetcher>,
    layers: Vec<DeviceAt>,
    mount: Arc<()>,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(layers: Vec<Layer>) -> Self {
        Self::with(layers, |_, _| FetchOptions::default())
    }

    fn with(layers: Vec<Layer>, options: impl FnOnce(&Store, u64) -> FetchOptions) -> Self {
        let image = ImageBuilder::new(layers).build();
        let mut content = Content::new();
        content.add_tagged_image("name", "1", &image);
        let layers = manifest_of(&image).layers;
        let blob_bytes = layers.iter().map(|layer| layer.size).sum();
        let Fetching {
            registry,
            runtime,
            fetcher,
            dir,
        } = Fetching::from(content, |store| options(store, blob_bytes));
        let open = |descriptor| {
            let source = Arc::new(Source {
                repository: Repository::new(&registry.host(), "name").unwrap(),
                descriptor,
                ztoc: None,
                place: None,
            });
            let layer = runtime.block_on(fetcher.layer(&source)).unwrap();
            DeviceAt { source, layer }
        };
        let layers = layers.into_iter().map(open).collect();
        registry.handle().clear_ledger();
        Self {
            registry,
            runtime,
            fetcher,
            layers,
            mount: Arc::default(),
            _dir: dir,
        }
    }

    fn touch(&self, mode: BackgroundMode) {
        let touch = Touch {
            image: "the image".to_owned(),
            key: Digest::of(b"tree"),
            mode,
            mount: Arc::downgrade(&self.mount),
        };
        let layers = self.layers.clone();
        self.fetcher.touched(touch, move || async move { Ok(layers) });
    }

    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let started = Instant::now();
        while !is_so() {
            let status = self.fetcher.background();
            assert!(
                started.elapsed() < Duration::from_secs(60),
                "not {what}: {status:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn waits_for(&self, what: &str) -> bool {
        let status = self.fetcher.background();
        status.iter().any(|image| image.waits_for == Some(what))
    }

    fn until_done(&self) {
        self.until("done", || self.fetcher.background().is_empty());
    }

    /// The ranges that were asked for, sorted, of all blobs.
    fn ranges(&self) -> Vec<(String, Range<u64>)> {
        let ledger = self.registry.handle().ledger();
        let mut ranges: Vec<_> = ledger
            .iter()
            .map(|record| (record.path.clone(), range_of(record.range.as_deref().unwrap())))
            .collect();
        ranges.sort_by_key(|(path, range)| (path.clone(), range.start));
        ranges
    }

    /// Compressed bytes that were asked for, none of them twice.
    fn asked_bytes(&self) -> u64 {
        let ranges = self.ranges();
        for pair in ranges.windows(2) {
            let [(path, range), (next_path, next)] = pair else {
                panic!()
            };
            assert!(
                path != next_path || range.end <= next.start,
                "asked for twice: {ranges:?}"
            );
        }
        ranges.iter().map(|(_, range)| range.end - range.start).sum()
    }

    /// Compressed bytes of the members of a layer that start in a part of the blob.
    fn member_bytes(&self, layer: usize, part: Range<u64>) -> u64 {
        let index = self.layers[layer].layer.index();
        let ranges = (0..index.member_count()).map(|number| index.member(number).unwrap().blob_range());
        let ranges = ranges.filter(|range| part.contains(&range.start));
        ranges.map(|range| range.end - range.start).sum()
    }

    fn prefetch_end(&self, layer: usize) -> u64 {
        self.layers[layer].layer.index().summary().prefetch_end
    }

    fn file(&self, layer: usize, name: &str) -> FileAt {
        let DeviceAt { source, layer } = self.layers[layer].clone();
        let is_it = |number: &u32| layer.index().entry(*number).unwrap().path == name.as_bytes();
        let entry = (0..layer.index().entry_count()).find(is_it).unwrap();
        FileAt {
            source,
            layer,
            entry,
            size: FILE_BYTES as u64,
        }
    }
}

/// The range of a `Range` header.
fn range_of(header: &str) -> Range<u64> {
    let (start, last) = header.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    start.parse().unwrap()..last.parse::<u64>().unwrap() + 1
}

fn with_background(background: BackgroundOptions) -> FetchOptions {
    FetchOptions {
        background,
        ..FetchOptions::default()
    }
}

#[test]
fn landmarks_bring_exactly_what_stands_before_them_once() {
    let world = World::new(vec![
        layer(6, Landmark::Prefetch(3)),
        layer(3, Landmark::NoPrefetch),
        layer(4, Landmark::None),
        layer(5, Landmark::Prefetch(1)),
    ]);
    let expected = [0, 3].map(|layer| world.member_bytes(layer, 0..world.prefetch_end(layer)));
    assert!(
        expected[0] > 3 * expected[1] / 2 && expected[1] > FILE_BYTES as u64 / 2,
        "{expected:?}"
    );
    for _ in 0..2 {
        world.touch(BackgroundMode::Off);
        world.until("brought", || world.asked_bytes() > 0);
        world.until_done();
        assert_eq!(world.asked_bytes(), expected.iter().sum::<u64>());
    }
    let read = |layer, name| {
        world
            .runtime
            .block_on(world.fetcher.read(&world.file(layer, name), 0, 10))
    };
    let before = world.ranges().len();
    read(0, "file2").unwrap();
    read(3, "file0").unwrap();
    assert_eq!(world.ranges().len(), before, "they are there");
}

#[test]
fn nothing_is_brought_ahead_where_that_is_switched_off() {
    let options = BackgroundOptions {
        landmarks: false,
        ..BackgroundOptions::default()
    };
    let world = World::with(vec![layer(6, Landmark::Prefetch(3))], |_, _| {
        with_background(options)
    });
    world.touch(BackgroundMode::Off);
    let file = world.file(0, "file5");
    world.runtime.block_on(world.fetcher.read(&file, 0, 10)).unwrap();
    let first = world.layers[0]
        .layer
        .index()
        .entry(file.entry)
        .unwrap()
        .chunk_range()
        .start;
    let member = world.layers[0].layer.index().chunk(first).unwrap().member;
    let start = world.layers[0].layer.index().member(member).unwrap().blob_start;
    assert!(
        world.ranges().iter().all(|(_, range)| range.start >= start),
        "{:?}",
        world.ranges()
    );
    assert!(world.fetcher.background().is_empty());
    // The rest is another matter.
    world.touch(BackgroundMode::Full);
    world.until("complete", || world.layers[0].layer.is_complete());
}

#[test]
fn all_of_an_image_comes_once_while_readers_take_it_too() {
    let world = World::new(vec![layer(20, Landmark::Prefetch(2)), layer(20, Landmark::None)]);
    world.touch(BackgroundMode::Full);
    let readers: Vec<_> = (0..40)
        .map(|number| {
            let (fetcher, file) = (
                Arc::clone(&world.fetcher),
                world.file(number % 2, &format!("file{}", number / 2)),
            );
            world
                .runtime
                .spawn(async move { fetcher.read(&file, 0, FILE_BYTES).await })
        })
        .collect();
    for reader in readers {
        assert_eq!(world.runtime.block_on(reader).unwrap().unwrap().len(), FILE_BYTES);
    }
    world.until("complete", || {
        world.layers.iter().all(|at| at.layer.is_complete())
    });
    world.until_done();
    let expected: u64 = (0..2).map(|layer| world.member_bytes(layer, 0..u64::MAX)).sum();
    assert_eq!(world.asked_bytes(), expected);
}

#[test]
fn while_a_reader_waits_nothing_else_is_asked_for() {
    let world = World::new(vec![layer(60, Landmark::None), layer(2, Landmark::None)]);
    let handle = world.registry.handle();
    // A slow line: all of it would take three seconds, by many short requests.
    handle.update(|behaviour| behaviour.total_bytes_per_s = 4_000_000);
    let other = world.layers[1].source.descriptor.digest.to_string();
    let held = Fault::Delay(Duration::from_secs(1));
    handle.inject(Scope::containing(other.clone()), held);
    world.touch(BackgroundMode::Full);
    world.until("under way", || world.ranges().len() > 2);
    let file = world.file(1, "file0");
    world.runtime.block_on(world.fetcher.read(&file, 0, 10)).unwrap();
    let ledger = handle.ledger();
    handle.update(|behaviour| behaviour.total_bytes_per_s = 0);
    let read = ledger
        .iter()
        .position(|record| record.path.contains(&other))
        .unwrap();
    assert!(ledger[read - 1].path != ledger[read].path, "it came between");
    // The worker may have been on its way when the reader came.
    assert!(ledger[read + 1..].len() <= 1, "{ledger:#?}");
    handle.clear_faults();
    world.until("complete", || {
        world.layers.iter().all(|at| at.layer.is_complete())
    });
}

#[test]
fn who_needs_what_has_stood_still_for_long_gets_it() {
    let layers = vec![layer(2, Landmark::None), layer(60, Landmark::None)];
    let world = World::with(layers, |_, _| FetchOptions {
        timeout: Duration::from_secs(2),
        ..FetchOptions::default()
    });
    let handle = world.registry.handle();
    let slow = |layer: usize, rate| {
        let blob = world.layers[layer].source.descriptor.digest.to_string();
        handle.inject(Scope::containing(blob), Fault::Throttle(rate));
    };
    // The first requests of the background take a second, and the copy takes longer than a small request may in total.
    slow(0, 100_000);
    slow(1, 2_000_000);
    world.touch(BackgroundMode::Full);
    world.until("under way", || !world.ranges().is_empty());
    let (fetcher, DeviceAt { source, layer }) = (Arc::clone(&world.fetcher), world.layers[1].clone());
    let copying = world.runtime.spawn(async move {
        let all = 0..layer.index().chunk_count();
        let part = fetcher.part(&source, &layer, vec![all]).await.unwrap();
        let pace = Pace {
            in_order: false,
            requests_max: 1,
            retries: 0,
        };
        fetcher.bring_parts(&[part], pace, &Arc::default()).await
    });
    std::thread::sleep(Duration::from_millis(3000));
    assert!(!copying.is_finished());
    assert!(!world.layers[0].layer.is_complete(), "it stands still");
    let file = world.file(0, "file0");
    let read = world.fetcher.read(&file, 0, FILE_BYTES);
    assert_eq!(world.runtime.block_on(read).unwrap().len(), FILE_BYTES);
    world.runtime.block_on(copying).unwrap().unwrap();
}

#[test]
fn what_was_copied_makes_no_request_longer() {
    // All but the last files of the second layer are those of the first.
    let world = World::new(vec![layer(40, Landmark::None), layer(60, Landmark::None)]);
    for number in 0..40 {
        let file = world.file(0, &format!("file{number}"));
        let read = world.fetcher.read(&file, 0, FILE_BYTES);
        world.runtime.block_on(read).unwrap();
    }
    world.until("complete", || world.layers[0].layer.is_complete());
    world.fetcher.store().digests().settle();
    let handle = world.registry.handle();
    handle.clear_ledger();
    handle.update(|behaviour| behaviour.total_bytes_per_s = 1_000_000);
    world.touch(BackgroundMode::Full);
    world.until("complete", || world.layers[1].layer.is_complete());
    let lengths: Vec<u64> = world
        .ranges()
        .iter()
        .map(|(_, range)| range.end - range.start)
        .collect();
    let all: u64 = lengths.iter().sum();
    assert!(all < world.member_bytes(1, 0..u64::MAX) / 2, "most was copied");
    // It takes more than a tenth of a second each.
    assert!(lengths.iter().all(|&bytes| bytes <= 512 << 10), "{lengths:?}");
}

#[test]
fn the_rate_holds_and_status_says_what_is_waited_for() {
    let options = BackgroundOptions {
        bytes_per_s: Some(1),
        ..BackgroundOptions::default()
    };
    let layers = vec![layer(20, Landmark::None), layer(2, Landmark::Prefetch(1))];
    let world = World::with(layers, |_, _| with_background(options));
    world.touch(BackgroundMode::Full);
    world.until("waiting", || {
        let status = world.fetcher.background();
        world.waits_for("the rate limit") && status.len() == 1 && status[0].done_bytes > 0
    });
    // What stands before the landmark is not limited, and one request has to be paid off for a day.
    let (landmarks, asked) = (
        world.member_bytes(1, 0..world.prefetch_end(1)),
        world.asked_bytes(),
    );
    let status = world.fetcher.background();
    assert!(landmarks > FILE_BYTES as u64 / 2);
    assert_eq!(asked - landmarks, status[0].done_bytes, "{status:?}");
    assert!(status[0].total_bytes > 5 * status[0].done_bytes, "{status:?}");
    assert_eq!(status[0].image, "the image");
}

#[test]
fn it_ends_with_the_mount() {
    let options = BackgroundOptions {
        bytes_per_s: Some(1),
        ..BackgroundOptions::default()
    };
    let mut world = World::with(vec![layer(20, Landmark::None)], |_, _| with_background(options));
    world.touch(BackgroundMode::Full);
    world.until("waiting", || world.waits_for("the rate limit"));
    world.mount = Arc::default();
    world.until_done();
    assert!(!world.layers[0].layer.is_complete());
}

#[test]
fn the_budget_ends_it() {
    let world = World::with(vec![layer(40, Landmark::None)], |store, blob_bytes| {
        FetchOptions {
            budget_bytes: Some(store.disk_bytes() + blob_bytes / 2),
            ..FetchOptions::default()
        }
    });
    world.touch(BackgroundMode::Full);
    world.until("brought", || world.asked_bytes() > 0);
    world.until_done();
    let brought = world.layers[0].layer.cached_bytes().unwrap();
    let half = 40 * FILE_BYTES as u64 / 2;
    // What is in the way of more are the requests that did not fit.
    assert!(brought <= half && brought > half / 4, "{brought} bytes of {half}");
}

#[test]
fn a_registry_that_goes_away_is_left_alone_for_a_while() {
    let world = World::new(vec![layer(40, Landmark::None)]);
    world.registry.handle().inject(Scope::all(), Fault::Reset);
    world.touch(BackgroundMode::Full);
    world.until("waiting", || world.waits_for("the registry"));
    assert!(
        world.registry.handle().ledger().len() <= 4,
        "{:?}",
        world.registry.handle().ledger()
    );
    world.registry.handle().clear_faults();
    world.until("complete", || world.layers[0].layer.is_complete());
}

#[test]
fn what_is_wrong_with_a_part_is_left_out() {
    let world = World::new(vec![layer(20, Landmark::None)]);
    world
        .registry
        .handle()
        .inject(Scope::containing("/blobs/").next(1), Fault::FlipByte(1000));
    world.touch(BackgroundMode::Full);
    world.until("brought", || world.asked_bytes() > 0);
    world.until_done();
    let index = world.layers[0].layer.index();
    let missing = (0..index.chunk_count()).filter(|&chunk| !world.layers[0].layer.is_present(chunk));
    assert_eq!(missing.count(), 1);
}

#[test]
fn a_layer_that_is_gone_is_not_asked_for_part_by_part() {
    let world = World::new(vec![layer(60, Landmark::None), layer(3, Landmark::None)]);
    let gone = world.layers[0].source.descriptor.digest.to_string();
    let answer = Fault::Status {
        status: 404,
        retry_after: None,
    };
    world
        .registry
        .handle()
        .inject(Scope::containing(gone.clone()), answer);
    world.touch(BackgroundMode::Full);
    world.until("complete", || world.layers[1].layer.is_complete());
    world.until_done();
    let asked = world
        .ranges()
        .into_iter()
        .filter(|(path, _)| path.contains(&gone));
    let asked = asked.count();
    assert!((1..20).contains(&asked), "{asked} requests");
}
