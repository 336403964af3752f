//! An image whose content is mostly in the cache, from another one: by whatever carries the mount.

use std::fs;

use registryfs::demo::{Content, Image};

use crate::support::{file, image};
use crate::world::{World, noise};

/// Files of 64 KiB, of which the later image has one more and one that is changed; its layers are cut otherwise.
fn versions() -> (Image, Image) {
    let content = |number: u64| noise(65_536, number);
    let name = |number: u64| format!("usr/file{number}");
    let files: Vec<_> = (0..30)
        .map(|number| file(&name(number), content(number)))
        .collect();
    let mut later = files.clone();
    later[7] = file(&name(7), content(1007));
    later.insert(0, file("usr/new", content(1000)));
    (image(&[&files[..]]), image(&[&later[..12], &later[12..]]))
}

#[test]
fn the_next_version_of_an_image_costs_what_changed() {
    let (old, new) = versions();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1", &old);
    content.add_tagged_image("team/app", "2", &new);
    let world = World::new(content).mounted();
    let read = |tag: &str| {
        let usr = world.at(&format!("team/app:{tag}/rootfs/usr"));
        let entries = fs::read_dir(usr).unwrap();
        let mut files: Vec<_> = entries
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_owned(), fs::read(&path).unwrap()))
            .collect();
        files.sort_unstable();
        files
    };
    let before = read("1");
    // At its end a daemon knows the digests of all that it has opened.
    world.restart();
    assert_eq!(crate::world::names(&world.at("team/app:2/rootfs")), ["usr"]);
    let (after, requests) = world.requests(|| read("2"));
    assert_eq!(after.len(), 31);
    let changed = after.iter().filter(|file| !before.contains(file)).count();
    assert_eq!(changed, 2);
    let bytes: u64 = requests.iter().map(|request| request.body_bytes).sum();
    let (ranges, transfers) = (requests.len(), &world.status()["transfers"]);
    // The chunks of a file may be asked for apart.
    assert!(ranges <= 4, "{requests:#?}");
    assert!(
        (2 * 65_536..2 * 65_536 + 20_000).contains(&bytes),
        "{bytes}: {requests:#?}"
    );
    // A landmark, of one byte, may come along.
    let reused = transfers["reused_bytes"].as_u64().unwrap();
    assert!((29 * 65_536..29 * 65_536 + 4).contains(&reused), "{transfers}");
}
