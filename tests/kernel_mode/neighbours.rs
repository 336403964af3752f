//! Files beside files that cannot be read: the kernel reads a layer as one device, ahead of what is asked for and in pieces
//! that know no files, and still a file fails only if it is itself what fails.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use registryfs::demo::{Content, ImageBuilder, Layer};
use registryfs::layer::estargz::writer::Options;

use crate::ground::{is_erofs, kernel_world};
use crate::support::{dir, file};
use crate::world::{World, errno, noise};

const FILES: usize = 48;
/// Below, at and above a block, and some that the kernel reads in several requests.
const SIZES: [usize; 7] = [1, 3000, 4096, 5000, 20_000, 130_000, 70_001];

fn payload(number: usize) -> Vec<u8> {
    noise(SIZES[number % SIZES.len()], 1000 + number as u64)
}

/// Every third file but those of a byte is not what the table of contents says, in its last byte.
fn is_readable(number: usize) -> bool {
    number % 3 != 1 || payload(number).len() == 1
}

/// A layer of which some files can never be had.
fn damaged_layer() -> Layer {
    let files = (0..FILES).map(|number| file(&format!("d/f{number:02}"), payload(number)));
    let entries: Vec<_> = std::iter::once(dir("d/")).chain(files).collect();
    // Stored, so that what is to be damaged can be found.
    let options = Options {
        chunk_bytes: 4096,
        level: 0,
        ..Options::default()
    };
    let honest = Layer::estargz(&entries, options).unwrap();
    let mut blob = honest.blob().to_vec();
    for number in (0..FILES).filter(|&number| !is_readable(number)) {
        let payload = payload(number);
        let tail = &payload[payload.len() - payload.len().min(64)..];
        let found = blob.windows(tail.len()).position(|bytes| bytes == tail);
        blob[found.unwrap() + tail.len() - 1] ^= 1;
    }
    let mut damaged = Layer::raw(blob, honest.diff_id);
    damaged.annotations = honest.annotations;
    damaged
}

fn world() -> World {
    let mut content = Content::new();
    let image = ImageBuilder::new(vec![damaged_layer()]).build();
    content.add_tagged_image("team/app", "1.0", &image);
    kernel_world(content, "retries = 0\n")
}

fn path(world: &World, number: usize) -> PathBuf {
    world.at(&format!("team/app:1.0/rootfs/d/f{number:02}"))
}

fn check(world: &World, number: usize) {
    let (read, expected) = (fs::read(path(world, number)), payload(number));
    match is_readable(number) {
        true => assert!(
            read.as_ref().is_ok_and(|bytes| *bytes == expected),
            "f{number}: {:?}",
            read.map(|bytes| bytes.len())
        ),
        false => assert_eq!(errno(read), libc::EIO, "f{number}"),
    }
}

#[test]
fn a_file_can_be_read_whatever_fails_before_and_behind_it() {
    let world = world();
    assert!(is_erofs(&path(&world, 0)));
    for number in 0..FILES {
        check(&world, number);
    }
    // What failed is read ahead of what is there, and the other way round.
    for number in (0..FILES).rev() {
        check(&world, number);
    }
    fs::write("/proc/sys/vm/drop_caches", "3\n").unwrap();
    for number in (0..FILES).map(|step| step * 29 % FILES) {
        check(&world, number);
    }
}

#[test]
fn readers_at_once_and_far_ahead_fail_for_themselves() {
    let world = world();
    assert!(is_erofs(&path(&world, 0)));
    std::thread::scope(|scope| {
        for reader in 0..4 {
            let world = &world;
            scope.spawn(move || {
                for number in (0..FILES).map(|step| (step * (2 * reader + 1) + 11 * reader) % FILES) {
                    let open = File::open(path(world, number)).unwrap();
                    posix_fadvise(&open, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
                    check(world, number);
                }
            });
        }
    });
}

#[test]
fn one_byte_of_a_file_needs_only_its_own_page_to_be_right() {
    let world = world();
    for number in (0..FILES).rev() {
        let (open, expected) = (File::open(path(&world, number)).unwrap(), payload(number));
        let last = expected.len() - 1;
        let mut byte = [0];
        for at in [last, last / 2, 0] {
            let read = open.read_exact_at(&mut byte, at as u64);
            // The damage is in the last page.
            if is_readable(number) || at / 4096 < last / 4096 {
                read.unwrap_or_else(|error| panic!("f{number} at {at}: {error}"));
            }
            if is_readable(number) {
                assert_eq!(byte[0], expected[at], "f{number} at {at}");
            }
        }
        let mut beyond = [7; 10];
        if is_readable(number) {
            assert_eq!(open.read_at(&mut beyond, last as u64).unwrap(), 1);
            assert_eq!(open.read_at(&mut beyond, last as u64 + 1).unwrap(), 0);
        }
    }
}
