//! Random trees with the extremes of every field, merged of several layers, through the mount in both modes.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use registryfs::demo::{Content, ImageBuilder, Layer};
use registryfs::layer::entry::{Entry, Kind, Time};

use crate::ground::{is_erofs, kernel_world};
use crate::same::fuse_mount;
use crate::seen::assert_same;
use crate::support::File;
use crate::world::noise;

/// Each is an image that is mounted twice: enough for every pair of extremes to meet in one or the other.
const CASES: u32 = 96;
const LAYERS_MAX: usize = 3;
const ENTRIES_MAX: usize = 24;
const DEPTH_MAX: usize = 4;

/// Few names, so that entries of one layer meet those of another; the odd ones among them.
fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => proptest::sample::select(vec!["a", "b", "c", "bin", "lib"]).prop_map(Vec::from),
        2 => proptest::sample::select(vec![".wh.a", ".wh.lib", ".wh..wh..opq"]).prop_map(Vec::from),
        1 => Just(vec![b'n'; 255]),
        1 => Just(vec![0xff, 0xfe, b' ', b'\n']),
        1 => Just("\u{e4}\u{1f980}".into()),
    ]
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(name(), 1..=DEPTH_MAX).prop_map(|names| names.join(&b'/'))
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => Just(Kind::File),
        3 => Just(Kind::Dir),
        1 => Just(Kind::Symlink),
        2 => Just(Kind::Hardlink),
        1 => Just(Kind::Char),
        1 => Just(Kind::Block),
        1 => Just(Kind::Fifo),
    ]
}

fn number() -> impl Strategy<Value = u32> {
    proptest::sample::select(vec![0, 1, 1000, 0xffff, 0x1_0000, u32::MAX - 1])
}

fn mtime() -> impl Strategy<Value = Time> {
    let seconds = vec![
        0,
        1,
        -1,
        1_700_000_000,
        i64::from(i32::MAX),
        i64::from(i32::MAX) + 1,
        i64::from(u32::MAX),
        1 << 34,
    ];
    (
        proptest::sample::select(seconds),
        proptest::sample::select(vec![0, 1, 999_999_999]),
    )
        .prop_map(|(seconds, nanos)| Time { seconds, nanos })
}

fn xattrs() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    let names = vec![
        "user.a",
        "user.b",
        "user.with a long name.and dots",
        "security.capability",
        "trusted.c",
    ];
    let value = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(b"the same in many".to_vec()),
        Just(vec![7; 2000]),
    ];
    proptest::collection::btree_map(proptest::sample::select(names).prop_map(Vec::from), value, 0..3)
        .prop_map(|attributes| attributes.into_iter().collect())
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    let sizes = vec![0, 1, 100, 4095, 4096, 4097, 8192, 12_289, 70_000];
    (proptest::sample::select(sizes), 1_u64..5).prop_map(|(size, seed)| noise(size, seed))
}

fn entry() -> impl Strategy<Value = File> {
    let owner = (number(), number());
    let rdev = proptest::sample::select(vec![(0, 0), (1, 3), (255, 256), (4095, (1 << 20) - 1)]);
    let link = prop_oneof![path(), Just(b"a".to_vec()), Just(b"../".repeat(1365))];
    (
        path(),
        kind(),
        0_u32..=0o7777,
        owner,
        mtime(),
        (rdev, link, xattrs(), payload()),
    )
        .prop_map(
            |(path, kind, mode, (uid, gid), mtime, (rdev, link, xattrs, payload))| {
                let mut entry = Entry::new(path, kind);
                (entry.mode, entry.uid, entry.gid, entry.mtime) = (mode, uid, gid, mtime);
                entry.xattrs = xattrs;
                match kind {
                    Kind::Char | Kind::Block => entry.rdev = rdev,
                    Kind::Symlink | Kind::Hardlink => entry.link = link,
                    _ => (),
                }
                (entry, if kind == Kind::File { payload } else { Vec::new() })
            },
        )
}

fn layers() -> impl Strategy<Value = Vec<Vec<File>>> {
    let layer = proptest::collection::vec(entry(), 0..ENTRIES_MAX);
    proptest::collection::vec(layer, 1..=LAYERS_MAX)
}

#[test]
fn random_trees_are_the_same_in_both_modes() {
    let world = kernel_world(Content::new(), "");
    let fuse = fuse_mount(&world);
    let mut runner = TestRunner::new(Config::with_cases(CASES));
    let number = std::cell::Cell::new(0);
    let compared = std::cell::Cell::new(0);
    let result = runner.run(&layers(), |layers| {
        number.set(number.get() + 1);
        let tag = format!("{}", number.get());
        let layers = layers
            .iter()
            .map(|entries| Layer::tar(entries))
            .collect::<Result<_, _>>();
        let Ok(layers) = layers else {
            return Err(TestCaseError::reject("what a tar cannot say"));
        };
        let image = ImageBuilder::new(layers).build();
        world
            .handle()
            .edit(|content| content.add_tagged_image("team/app", &tag, &image));
        let name = format!("team/app:{tag}/rootfs");
        let below = fuse.join(world.registry.host()).join(&name);
        let rootfs = world.at(&name);
        if fs::metadata(&below).is_err() {
            let why = fs::read_to_string(fuse.join(".registryfs/errors")).unwrap();
            return Err(TestCaseError::fail(why));
        }
        prop_assert!(is_erofs(&rootfs), "{}", world.errors());
        if has_entries(&below) {
            assert_same(&rootfs, &below);
            compared.set(compared.get() + 1);
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(compared.get() > CASES / 2, "{}", compared.get());
}

fn has_entries(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_some()
}
