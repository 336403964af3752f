//! What EROFS shows is what the tree underneath shows, entry by entry.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use registryfs::demo::{Content, ImageBuilder, Layer, sample_content};
use registryfs::layer::entry::{Entry, Kind};

use crate::ground::{is_erofs, kernel_world};
use crate::seen::assert_same;
use crate::support::{File, dir, file, image, link};
use crate::world::{World, names, noise};

/// A second mount of the same daemon without kernel mode.
pub(crate) fn fuse_mount(world: &World) -> PathBuf {
    let place = world.mountpoint("fuse");
    world.text(&["mount", "-o", "kernel=off", place.to_str().unwrap()]);
    place
}

/// Compares a root filesystem in both modes, and returns where EROFS has it.
fn assert_same_in_both(world: &World, fuse: &Path, image: &str) -> PathBuf {
    let below = fuse.join(world.registry.host()).join(image).join("rootfs");
    let rootfs = world.at(image).join("rootfs");
    assert!(is_erofs(&rootfs), "{image}: {}", world.errors());
    assert!(!is_erofs(&below), "{image}");
    assert_same(&rootfs, &below);
    rootfs
}

#[test]
fn every_image_of_the_demo_is_the_same_in_both_modes() {
    let content = sample_content().unwrap();
    let images: Vec<String> = content
        .names()
        .filter_map(|name| {
            let (tag, _) = content.repository(name)?.tags().last()?;
            Some(format!("{name}:{tag}"))
        })
        .collect();
    assert!(images.len() > 50);
    let world = kernel_world(content, "");
    let fuse = fuse_mount(&world);
    let mut compared = 0;
    for image in images {
        // Artifacts that are no images, and images for another platform alone, have no root filesystem here.
        if fs::metadata(fuse.join(world.registry.host()).join(&image).join("rootfs")).is_ok() {
            assert_same_in_both(&world, &fuse, &image);
            compared += 1;
        }
    }
    assert!(compared > 30, "{compared}");
}

/// Everything at its extremes that a layer can say and Linux can show.
fn extremes() -> Vec<File> {
    let mut entries = vec![dir("d/"), dir("empty/"), dir(&vec!["deep"; 60].join("/"))];
    for size in [0, 1, 4095, 4096, 4097, 8191, 8192, 300_000] {
        entries.push(file(&format!("d/{size}"), noise(size, size as u64)));
    }
    let long = "n".repeat(255);
    entries.push(file(&long, long.as_str()));
    entries.push(link("to-long", Kind::Symlink, &"t/".repeat(2047)));
    entries.push(link("dangling", Kind::Symlink, "/nowhere"));
    entries.push(link("d/again", Kind::Hardlink, "d/4097"));
    entries.push(link("again", Kind::Hardlink, "d/4097"));
    for (number, seconds) in [0, 1, -1, -5_000_000_000, i64::from(i32::MAX) + 1, 1 << 33]
        .into_iter()
        .enumerate()
    {
        let (mut entry, payload) = file(&format!("times/{number}"), "");
        entry.mtime.seconds = seconds;
        entry.mtime.nanos = 999_999_999;
        entries.push((entry, payload));
    }
    for mode in [0, 0o777, 0o1000, 0o2000, 0o4000, 0o7777] {
        let (mut entry, payload) = file(&format!("modes/{mode:o}"), "mode");
        (entry.mode, entry.uid, entry.gid) = (mode, u32::MAX - 1, u32::MAX - 1);
        entries.push((entry, payload));
        let mut entry = Entry::new(format!("modes/dir-{mode:o}"), Kind::Dir);
        entry.mode = mode;
        entries.push((entry, Vec::new()));
    }
    for (name, kind, rdev) in [
        ("null", Kind::Char, (1, 3)),
        ("zero", Kind::Char, (0, 0)),
        ("large", Kind::Block, (4095, (1 << 20) - 1)),
        ("pipe", Kind::Fifo, (0, 0)),
    ] {
        let mut entry = Entry::new(format!("dev/{name}"), kind);
        entry.rdev = rdev;
        entries.push((entry, Vec::new()));
    }
    entries.extend(with_attributes());
    entries
}

/// Files with attributes of all namespaces that images have, of one value that many share, and large ones.
fn with_attributes() -> Vec<File> {
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let attributes: [&[(&str, &[u8])]; 4] = [
        &[("user.a", b""), ("user.b", b"\0\xff")],
        &[("security.capability", &capability)],
        &[("user.shared", b"the same")],
        &[("user.shared", b"the same"), ("user.large", &[b'x'; 3000])],
    ];
    let mut entries = Vec::new();
    for (number, of_file) in attributes.into_iter().enumerate() {
        for kind in [Kind::File, Kind::Dir, Kind::Symlink] {
            let mut entry = Entry::new(format!("attributes/{number}-{}", kind.toc_name()), kind);
            entry.xattrs = of_file
                .iter()
                .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
                .collect();
            if kind == Kind::Symlink {
                entry.link = "x".into();
            }
            entries.push((entry, Vec::new()));
        }
    }
    entries
}

#[test]
fn extremes_are_the_same_in_both_modes_and_every_format() {
    let entries = extremes();
    let more = [
        file("d/more", "more"),
        file("d/.wh.0", ""),
        dir("empty/.wh..wh..opq"),
    ];
    let mut content = Content::new();
    for (tag, layer) in [
        ("tar", Layer::tar(&entries).unwrap()),
        ("gzip", Layer::gzip(&entries).unwrap()),
        ("zstd", Layer::zstd(&entries).unwrap()),
        ("estargz", crate::support::layer(&entries)),
    ] {
        content.add_tagged_image(
            "team/app",
            tag,
            &ImageBuilder::new(vec![layer, crate::support::layer(&more)]).build(),
        );
    }
    let world = kernel_world(content, "");
    let fuse = fuse_mount(&world);
    for tag in ["tar", "gzip", "zstd", "estargz"] {
        let rootfs = assert_same_in_both(&world, &fuse, &format!("team/app:{tag}"));
        let number = |name: &str| fs::metadata(rootfs.join(name)).unwrap().ino();
        assert_eq!(number("again"), number("d/4097"), "{tag}: one file, one number");
        assert_eq!(number("again"), number("d/again"), "{tag}");
        assert_eq!(
            fs::read_link(rootfs.join("to-long")).unwrap().as_os_str().len(),
            4094
        );
    }
}

#[test]
fn a_directory_of_many_is_listed_whole_and_every_name_found() {
    let entries: Vec<File> = (0..20_000).map(|n| file(&format!("many/{n:05}"), "")).collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&entries]));
    let world = kernel_world(content, "");
    let many = world.at("team/app/1.0/rootfs/many");
    assert!(is_erofs(&many));
    let listed = names(&many);
    assert_eq!(listed.len(), 20_000);
    for name in listed.iter().step_by(97) {
        assert_eq!(fs::metadata(many.join(name)).unwrap().len(), 0);
        assert!(fs::metadata(many.join(format!("{name}x"))).is_err());
    }
}

/// Inode numbers by path.
fn numbers(rootfs: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut pending = vec![rootfs.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        found.insert(path.strip_prefix(rootfs).unwrap().to_owned(), metadata.ino());
    }
    found
}

#[test]
fn inode_numbers_are_the_same_after_a_restart_and_with_another_store() {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&extremes()]));
    let world = kernel_world(content.clone(), "");
    let rootfs = world.at("team/app/1.0/rootfs");
    let before = numbers(&rootfs);
    assert!(before.len() > 50);
    world.restart();
    assert_eq!(numbers(&rootfs), before);
    let other = kernel_world(content, "");
    assert_eq!(numbers(&other.at("team/app/1.0/rootfs")), before);
}
