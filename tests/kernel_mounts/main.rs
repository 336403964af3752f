//! EROFS mounts with devices on a connection that is attached nowhere (root, /dev/fuse and Linux 6.12 are needed).

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

mod removing;
mod world;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use registryfs::error::Error;
use registryfs::fuse::{Detach, ErofsDevice, MountTableWatch, mounted, resolve_new_mountpoint};
use registryfs::image::erofs::probe;
use registryfs::kernel::probe::try_out;
use world::{PROMPTLY, World, attached_tree, is_over, source_of, within};

#[test]
fn this_kernel_is_found_reliable() {
    let world = World::new();
    try_out(&world.helper, &world.devices, &world.connection, world.dir()).unwrap();
    assert_eq!(
        fs::read_dir(world.dir()).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn an_attached_tree_is_read_through_its_device_and_shows_its_source() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let tree = world.make("docker.io/library/debian:12");
    tree.device.heal();
    let before = world.connection.counters().of("read");
    let attachment = world.attach(&tree, &place).unwrap();
    assert_eq!(attachment.mountpoint, place);
    assert_eq!(source_of(&place), "docker.io/library/debian:12");
    let file = place.join(probe::NAME);
    assert!(within(move || fs::read(file).unwrap()) == probe::content());
    assert!(world.connection.counters().of("read") > before);
    let flags = nix::sys::statvfs::statvfs(&place).unwrap().flags();
    use nix::sys::statvfs::FsFlags;
    for flag in [
        FsFlags::ST_RDONLY,
        FsFlags::ST_NOSUID,
        FsFlags::ST_NODEV,
        FsFlags::ST_NOATIME,
    ] {
        assert!(flags.contains(flag), "{flag:?}");
    }
    assert_eq!(mounted(std::slice::from_ref(&attachment)).unwrap(), [Some(place)]);
    world.detach(&attachment, Detach::Idle).unwrap();
    assert_eq!(mounted(std::slice::from_ref(&attachment)).unwrap(), [None]);
    world.detach(&attachment, Detach::Idle).unwrap();
}

#[test]
fn a_tree_is_made_and_attached_at_once_and_copies_are_the_same_filesystem() {
    let world = World::new();
    let (first, second) = (world.new_dir("a"), world.new_dir("b"));
    let tree = world.make_at("a.b/c:1", &first);
    let copy = world.attach(&tree, &second).unwrap();
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    assert_eq!(device(&first), device(&second));
    assert_eq!(world.detach(&copy, Detach::Idle), Ok(()));
}

#[test]
fn sources_that_the_kernel_cannot_show_are_shown_as_far_as_it_can() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let long = format!("{}/{}:12", "a/".repeat(200), "b".repeat(90));
    for (source, shown) in [
        (long.as_str(), &long[long.len() - 254..]),
        ("../../etc/passwd", "registryfs"),
        ("/etc/passwd", "registryfs"),
        ("a b/c:1", "a\\040b/c:1"),
        ("", "registryfs"),
    ] {
        let tree = world.make(source);
        let attachment = world.attach(&tree, &place).unwrap();
        let seen = source_of(&place);
        assert!(
            seen == shown || long.ends_with(&seen) && seen.len() > 250,
            "{source}: {seen}"
        );
        world.detach(&attachment, Detach::Idle).unwrap();
    }
}

#[test]
fn a_symbolic_link_or_nothing_is_no_place() {
    let world = World::new();
    let tree = world.make("a.b/c:1");
    let target = world.new_dir("target");
    let link = world.dir().join("link");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    for place in [link, world.dir().join("none")] {
        let error = world.attach(&tree, &place).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error:?}");
    }
    assert!(attached_tree(&target).is_none());
    // A name that is no text.
    let odd = world.new_dir_os(std::ffi::OsStr::from_bytes(b"odd\xff name"));
    let attachment = world.attach(&tree, &odd).unwrap();
    assert_eq!(attachment.mountpoint, odd);
    world.detach(&attachment, Detach::Idle).unwrap();
    assert!(attached_tree(&odd).is_none());
}

#[test]
fn the_witness_says_when_the_last_user_is_gone() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let witness = world.devices.show_witness();
    let devices = vec![ErofsDevice::Shown(witness.name().to_owned())];
    let attachment = {
        // The witness stands for the only device: whatever it is, it is open as long as the superblock is there.
        let mount = world.make_of(&world.image(), devices, "a.b/c:1").unwrap();
        world.attach_mount(mount.as_fd(), &place).unwrap()
    };
    assert!(!is_over(&witness), "it is mounted");
    let open = fs::File::open(place.join(probe::NAME)).unwrap();
    world.detach(&attachment, Detach::Lazy).unwrap();
    assert!(attached_tree(&place).is_none());
    assert!(!is_over(&witness), "a program has a file open");
    drop(open);
    world.wait_for(witness.closed());
    let never = world.devices.show_witness();
    let closed = never.closed();
    drop(never);
    world.wait_for(closed);
    assert!(world.connection.counters().of("release") >= 1);
}

#[test]
fn the_devices_of_three_hundred_layers_are_given_in_order() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let layers = world::many_layers(300);
    let locals: Vec<fs::File> = layers.contents.iter().map(|bytes| world.file(bytes)).collect();
    let witness = world.devices.show_witness();
    // Each layer is two: what is best read with its neighbours, and what is best read alone.
    let both = locals.iter().flat_map(|file| [file, file]);
    let devices = both.map(|file| ErofsDevice::Local(file.as_fd()));
    let devices = devices
        .chain([ErofsDevice::Shown(witness.name().to_owned())])
        .collect();
    let image = world.file(&layers.image);
    let mount = world.make_of(&image, devices, "a.b/c:1").unwrap();
    let attachment = world.attach_mount(mount.as_fd(), &place).unwrap();
    for (number, content) in layers.contents.iter().enumerate() {
        let bytes = fs::read(place.join(format!("file-{number}"))).unwrap();
        assert!(content.starts_with(&bytes) && !bytes.is_empty(), "{number}");
    }
    world.detach(&attachment, Detach::Idle).unwrap();
}

#[test]
fn what_the_kernel_refuses_is_told_in_its_words() {
    let world = World::new();
    let image = world.file(&[7; 8192]);
    let error = world
        .make_of(&image, Vec::new(), "a.b/c:1")
        .unwrap_err()
        .to_string();
    assert!(error.contains("erofs"), "{error}");
    let missing = vec![ErofsDevice::Shown("none".to_owned())];
    let error = world.make_of(&world.image(), missing, "a.b/c:1").unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
}

#[test]
fn no_mount_is_made_inside_a_tree_of_ours() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let tree = world.make_at("a.b/c:1", &place);
    let inside = place.join("dir");
    let error = resolve_new_mountpoint(&inside).unwrap_err().to_string();
    assert!(error.contains("lies inside the registryfs at"), "{error}");
    world
        .detach(&tree.attachment.clone().unwrap(), Detach::Idle)
        .unwrap();
}

#[test]
fn changes_of_the_mount_table_are_noticed() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let watch = MountTableWatch::new().unwrap();
    let tree = world.make("a.b/c:1");
    let attachment = world.attach(&tree, &place).unwrap();
    assert!(watch.wait(PROMPTLY).unwrap());
    world.detach(&attachment, Detach::Idle).unwrap();
    assert!(watch.wait(PROMPTLY).unwrap());
    let _ = watch.wait(Duration::ZERO).unwrap();
}

#[test]
fn the_tree_of_devices_is_for_root_and_names_alone() {
    let world = World::new();
    let device = world.devices.show_probe();
    let name = device.shown().name().to_owned();
    let tree = world.connection.root();
    let listed = world.helper.read_in(tree, ".", &[(0, 1)]).unwrap();
    assert_eq!(listed, [Err(libc::EISDIR)]);
    assert!(world.helper.read_in(tree, "none", &[(0, 1)]).is_err());
    let block = 4096;
    let reads = world
        .helper
        .read_in(tree, &name, &[(0, block), (u64::from(block), block)])
        .unwrap();
    assert!(reads[0].as_ref().unwrap()[..] == probe::content()[..4096]);
    assert_eq!(reads[1], Err(libc::EIO));
    device.heal();
    let reads = world.helper.read_in(tree, &name, &[(0, 3 * block)]).unwrap();
    assert!(reads[0].as_ref().unwrap()[..] == probe::content()[..]);
    drop(device);
    assert!(
        world.helper.read_in(tree, &name, &[(0, 1)]).is_err(),
        "nobody shows it"
    );
}
