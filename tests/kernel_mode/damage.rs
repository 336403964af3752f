//! Store files that somebody damages while nothing is mounted: what is known to be damaged comes anew, and nothing wrong is
//! shown.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use registryfs::demo::Content;

use crate::ground::{is_erofs, kernel_world, make_local, said};
use crate::support::{dir, file, image};
use crate::world::{World, noise};

const FILES: u64 = 6;

fn payload(number: u64) -> Vec<u8> {
    noise(1 + 37_000 * number as usize, 50 + number)
}

fn world() -> World {
    let files = (0..FILES).map(|number| file(&format!("d/f{number}"), payload(number)));
    let entries: Vec<_> = std::iter::once(dir("d/")).chain(files).collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&entries, &[file("top", "top")]]));
    kernel_world(content, "retries = 0\n")
}

/// The files of a store of which the names end so.
fn stored(world: &World, subdir: &str, is_it: fn(&Path) -> bool) -> Vec<PathBuf> {
    let all = said(&world.store().join(subdir), "find \"$PWD\" -type f");
    let found: Vec<PathBuf> = all
        .lines()
        .map(PathBuf::from)
        .filter(|path| is_it(path))
        .collect();
    assert!(!found.is_empty(), "{all}");
    found
}

fn check(world: &World, what: &str) {
    let rootfs = world.at("team/app:1.0/rootfs");
    assert!(is_erofs(&rootfs), "{what}");
    for number in (0..FILES).rev() {
        let bytes = fs::read(rootfs.join(format!("d/f{number}")));
        assert!(
            bytes.unwrap_or_else(|error| panic!("{what}: f{number}: {error}")) == payload(number),
            "{what}: f{number}"
        );
    }
    assert_eq!(fs::read(rootfs.join("top")).unwrap(), b"top", "{what}");
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

fn cut(path: &Path, bytes: u64) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(bytes)
        .unwrap();
}

/// A way to damage a file.
type Damage = fn(&Path);

const DAMAGES: [(&str, Damage); 6] = [
    ("a flipped header", |path| flip(path, 9)),
    ("a flipped middle", |path| flip(path, len(path) / 2)),
    ("a flipped end", |path| flip(path, len(path) - 1)),
    ("half of it", |path| cut(path, len(path) / 2)),
    ("nothing of it", |path| cut(path, 0)),
    ("too much of it", |path| cut(path, len(path) + 4096)),
];

fn damaged_is_made_anew(subdir: &str, is_it: fn(&Path) -> bool) {
    let world = world();
    make_local(&world, &world.at("team/app:1.0/rootfs"));
    for (what, damage) in DAMAGES {
        world.umount();
        for path in stored(&world, subdir, is_it) {
            damage(&path);
        }
        world.mount();
        check(&world, what);
    }
}

#[test]
fn a_damaged_kernel_image_is_written_anew() {
    damaged_is_made_anew("trees", |path| path.extension().is_some_and(|end| end == "erofs"));
}

#[test]
fn a_damaged_tree_is_merged_anew() {
    damaged_is_made_anew("trees", |path| path.extension().is_none());
}

#[test]
fn a_damaged_index_is_read_anew() {
    damaged_is_made_anew("layers", |path| path.ends_with("index"));
}

#[test]
fn data_of_another_size_is_fetched_anew() {
    let world = world();
    make_local(&world, &world.at("team/app:1.0/rootfs"));
    for damage in [
        |path: &Path| cut(path, len(path) / 2),
        |path: &Path| cut(path, 0),
        |path: &Path| {
            cut(path, len(path) + 4096);
        },
    ] {
        world.umount();
        for path in stored(&world, "layers", |path| path.ends_with("data")) {
            damage(&path);
        }
        world.mount();
        check(&world, "data");
    }
}

#[test]
fn a_map_that_is_gone_or_another_is_begun_anew() {
    let world = world();
    make_local(&world, &world.at("team/app:1.0/rootfs"));
    // Of what it says of single chunks nothing can be told.
    for damage in [
        |path: &Path| flip(path, 9),
        |path: &Path| cut(path, 100),
        |path: &Path| cut(path, 0),
        |path: &Path| fs::remove_file(path).unwrap(),
    ] {
        world.umount();
        for path in stored(&world, "layers", |path| path.ends_with("map")) {
            damage(&path);
        }
        world.mount();
        check(&world, "map");
    }
}

/// An image that is mounted has its own files, whatever takes their places.
#[test]
fn what_is_mounted_does_not_mind_what_is_removed() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    make_local(&world, &rootfs);
    for subdir in ["trees", "layers"] {
        for path in stored(&world, subdir, |_| true) {
            fs::remove_file(path).unwrap();
        }
    }
    fs::write("/proc/sys/vm/drop_caches", "3\n").unwrap();
    check(&world, "removed");
    world.restart();
    check(&world, "anew");
}
