//! What is brought of an image before anybody reads it, as a mount asks for it.

use std::time::{Duration, Instant};

use registryfs::demo::{Content, ImageBuilder, Layer, Record};
use registryfs::layer::estargz::writer::{Landmark, Options};
use serde_json::Value;

use crate::support::file;
use crate::world::{World, first_byte, noise, until};

const FILE_BYTES: usize = 400_000;

/// An image whose layer says that one of its files is read first.
fn content() -> Content {
    let files: Vec<_> = (0..5)
        .map(|number| file(&format!("file{number}"), noise(FILE_BYTES, number)))
        .collect();
    let options = Options {
        landmark: Landmark::Prefetch(1),
        ..Options::default()
    };
    let layer = Layer::estargz(&files, options).unwrap();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &ImageBuilder::new(vec![layer]).build());
    content
}

/// Bytes of blobs that were sent.
fn blob_bytes(records: &[Record]) -> u64 {
    let blobs = records.iter().filter(|record| record.path.contains("/blobs/"));
    blobs.map(|record| record.body_bytes).sum()
}

/// The images that are being brought.
fn under_way(world: &World) -> usize {
    world.status()["background"].as_array().unwrap().len()
}

/// Waits until so many bytes of contents have come and nothing more is on its way.
fn until_brought(world: &World, files: usize) {
    until("it is there", || {
        let fetched = world.status()["transfers"]["fetched_bytes"].as_u64().unwrap();
        fetched > (files * FILE_BYTES) as u64 && under_way(world) == 0
    });
}

#[test]
fn what_is_read_first_is_there_once_a_rootfs_was_looked_up() {
    for by_fuse in [false, true] {
        let mut world = World::new(content());
        if by_fuse {
            world = world.by_fuse();
        }
        world.mount();
        world.text(&["info", &format!("{}/team/app:1.0", world.registry.host())]);
        let (_, requests) = world.requests(|| {
            // One layer alone, and the names of the image.
            crate::world::names(&world.at("team/app/1.0/layers/0/fs"));
            crate::world::names(&world.at("team/app/1.0"));
        });
        assert!(blob_bytes(&requests) < FILE_BYTES as u64);
        crate::world::names(&world.at("team/app/1.0/rootfs"));
        until_brought(&world, 1);
        let (_, requests) = world.requests(|| first_byte(&world.at("team/app/1.0/rootfs/file0")));
        assert_eq!(requests.len(), 0, "{requests:#?}");
        let fetched = world.status()["transfers"]["fetched_bytes"].as_u64().unwrap();
        assert!(fetched < 2 * FILE_BYTES as u64, "nothing else is");
    }
}

#[test]
fn a_mount_of_an_image_brings_it_behind_its_readers() {
    let world = World::new(content());
    let image = format!("{}/team/app:1.0", world.registry.host());
    world.mount_with(&["-o", "background=full", &image]);
    until("it is there", || {
        let status: Value = serde_json::from_str(&world.text(&["--format=json", "status"])).unwrap();
        let fetched = status["transfers"]["fetched_bytes"].as_u64().unwrap();
        fetched > 5 * FILE_BYTES as u64 && status["background"] == serde_json::json!([])
    });
    let (_, requests) = world.requests(|| {
        for number in 0..5 {
            let read = std::fs::read(world.root().join(format!("file{number}"))).unwrap();
            assert!(read == noise(FILE_BYTES, number));
        }
    });
    assert_eq!(requests.len(), 0, "{requests:#?}");
}

#[test]
fn offline_nothing_waits_to_be_brought() {
    let world = World::new(content());
    let image = format!("{}/team/app:1.0", world.registry.host());
    world.text(&["info", &image]);
    world.mount_with(&["-o", "background=full,offline", &image]);
    let root = world.root();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(500) {
        crate::world::names(&root);
        let status: Value = serde_json::from_str(&world.text(&["--format=json", "status"])).unwrap();
        assert_eq!(status["background"], serde_json::json!([]));
    }
}

#[test]
fn it_ends_with_its_mount_and_is_seen_until_then() {
    let world = World::new(content()).configured("background_bytes_per_s = 1\n");
    world.mount();
    let other = world.mountpoint("other");
    world.text(&["mount", "-o", "background=full", other.to_str().unwrap()]);
    let image = other.join(world.registry.host()).join("team/app/1.0/rootfs");
    crate::world::names(&image);
    until("it waits", || {
        let status = world.text(&["status"]);
        let words: Vec<&str> = status.split_whitespace().collect();
        let words = words.join(" ");
        let said = ["waits for: the rate limit", "part: rest", "background: full"];
        said.iter().all(|said| words.contains(said)) && under_way(&world) == 1
    });
    world.text(&["umount", other.to_str().unwrap()]);
    until("it has ended", || under_way(&world) == 0);
}
