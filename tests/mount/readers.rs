//! Many readers at once: each chunk is fetched once, and all get the right bytes.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use registryfs::demo::{Behaviour, Content, Image, Record};
use registryfs::fetch::plan::GAP_BYTES_MAX;
use registryfs::layer::entry::Kind;

use crate::support::{CHUNK_BYTES, file, image, link};
use crate::world::{World, finish, names, noise, start};

fn content_of(image: &Image) -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    content
}

/// The byte ranges of the requests for blobs, sorted.
fn ranges(records: &[Record]) -> Vec<(u64, u64)> {
    let range = |record: &Record| {
        let text = record.range.as_deref()?.strip_prefix("bytes=")?;
        let (first, last) = text.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    let blobs = records.iter().filter(|record| record.path.contains("/blobs/"));
    let mut ranges: Vec<_> = blobs.map(|record| range(record).unwrap()).collect();
    ranges.sort_unstable();
    ranges
}

#[test]
fn a_hundred_processes_cause_one_request_for_one_chunk() {
    let payload = noise(4000, 3);
    let made = image(&[&[file("one", payload.clone()), file("rest", noise(500_000, 4))]]);
    let world = World::new(content_of(&made)).mounted();
    let one = world.at("team/app/1.0/rootfs/one");
    fs::metadata(&one).unwrap();
    // All of them arrive before the first answer does.
    world
        .handle()
        .update(|behaviour| behaviour.latency = Duration::from_millis(700));
    let (outputs, requests) = world.requests(|| {
        let readers: Vec<_> = (0..100).map(|_| start(Command::new("cat").arg(&one))).collect();
        readers.into_iter().map(finish).collect::<Vec<_>>()
    });
    assert!(
        outputs
            .iter()
            .all(|output| output.status.success() && output.stdout == payload)
    );
    assert_eq!(requests.len(), 1, "{:?}", ranges(&requests));
}

#[test]
fn readers_of_a_cold_image_share_its_first_requests() {
    let made = image(&[&[file("one", noise(4000, 3))], &[file("two", noise(500_000, 4))]]);
    let behaviour = Behaviour {
        latency: Duration::from_millis(100),
        ..Behaviour::default()
    };
    let world = World::with(content_of(&made), behaviour, &[]).mounted();
    let spellings = ["team/app/1.0", "team/app:1.0"];
    let (outputs, requests) = world.requests(|| {
        let reader = |number: usize| {
            let path = world.at(spellings[number % 2]).join("rootfs/one");
            start(Command::new("cat").arg(path))
        };
        let readers: Vec<_> = (0..20).map(reader).collect();
        readers.into_iter().map(finish).collect::<Vec<_>>()
    });
    assert!(outputs.iter().all(|output| output.stdout == noise(4000, 3)));
    assert_eq!(
        requests.len(),
        4,
        "manifest, two indexes, one chunk: {requests:#?}"
    );
}

#[test]
fn no_chunk_comes_twice_for_readers_side_by_side() {
    let size = 12 << 20;
    let payload = noise(size, 5);
    let made = image(&[&[file("big", payload.clone())]]);
    let world = World::new(content_of(&made)).mounted();
    let big = world.at("team/app/1.0/rootfs/big");
    fs::metadata(&big).unwrap();
    world
        .handle()
        .update(|behaviour| behaviour.latency = Duration::from_millis(5));
    let ((), requests) = world.requests(|| {
        std::thread::scope(|scope| {
            for reader in 0..8_usize {
                let (big, payload) = (&big, &payload);
                scope.spawn(move || {
                    let file = fs::File::open(big).unwrap();
                    let pieces = size / 100_000;
                    // Half of them go through from different places, half jump.
                    for step in 0..pieces {
                        let piece = match reader % 2 {
                            0 => (step + reader * pieces / 8) % pieces,
                            _ => (step * 37 + reader * 11) % pieces,
                        };
                        let mut bytes = vec![0; 100_000];
                        let at = piece * 100_000;
                        file.read_exact_at(&mut bytes, at as u64).unwrap();
                        assert!(bytes == payload[at..at + 100_000], "reader {reader} at {at}");
                    }
                });
            }
        });
    });
    let decoded = world.status()["transfers"]["chunks_decoded"].as_u64().unwrap();
    assert_eq!(decoded, (size / CHUNK_BYTES) as u64);
    let ranges = ranges(&requests);
    let twice = |pair: &[(u64, u64)]| (pair[0].1.min(pair[1].1) + 1).saturating_sub(pair[1].0);
    // What has come is skipped over with the request for what is around it, where that is little.
    assert!(
        ranges.windows(2).all(|pair| twice(pair) <= GAP_BYTES_MAX),
        "{ranges:?}"
    );
    let fetched: u64 = ranges.iter().map(|(first, last)| last - first + 1).sum();
    assert!(fetched <= made.layers[0].blob().len() as u64 * 11 / 10);
}

#[test]
fn a_sequential_reader_soon_asks_for_large_ranges() {
    let size = 16 << 20;
    let payload = noise(size, 6);
    let made = image(&[&[file("big", payload.clone())]]);
    let world = World::new(content_of(&made)).mounted();
    let big = world.at("team/app/1.0/rootfs/big");
    fs::metadata(&big).unwrap();
    let (bytes, requests) = world.requests(|| fs::read(&big).unwrap());
    assert!(bytes == payload);
    assert!(requests.len() < 30, "{:?}", ranges(&requests));
}

#[test]
fn small_files_that_follow_are_handed_on_before_they_are_asked_for() {
    let size_of = |number: usize| [1, 4095, 4096, 4097, 70_000][number % 5];
    let name_of = |number: usize| format!("dir/{number:03}");
    let count = 200;
    let entries: Vec<_> = (0..count)
        .map(|number| match number % 10 {
            9 => link(&name_of(number), Kind::Symlink, "000"),
            _ => file(&name_of(number), noise(size_of(number), number as u64)),
        })
        .collect();
    let made = image(&[&entries]);
    // In kernel mode the kernel reads data files, in which neighbours are neighbours, and reads ahead in them itself.
    let world = World::new(content_of(&made)).by_fuse().mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    world.text(&["prefetch", &format!("{}/team/app:1.0", world.registry.host())]);
    names(&rootfs.join("dir"));
    let asked = || world.status()["mounts"][0]["requests"]["read"].as_u64().unwrap();
    let before = asked();
    for number in 0..count {
        let path = rootfs.join(name_of(number));
        match number % 10 {
            9 => assert_eq!(fs::read_link(&path).unwrap(), Path::new("000")),
            _ => assert_eq!(fs::read(&path).unwrap(), noise(size_of(number), number as u64)),
        }
        // A reader does something with what it has read.
        std::thread::sleep(Duration::from_millis(3));
    }
    let asked = asked() - before;
    assert!(asked < count as u64 / 2, "{asked}");
}
