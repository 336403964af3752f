//! Random trees with the extremes of every field, each mounted and compared entry by entry.
//!
//! `EROFS_TREES` says how many; in CI they are so few that it takes seconds.

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use super::mounted::mount_and_compare;
use super::*;
use crate::error::Error;
use crate::layer::entry::Time;

const TREES: u32 = 200;

/// Names around those that every directory has, and the longest.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let few: Vec<Vec<u8>> = [
        &b"a"[..],
        b"b",
        b"!",
        b"-",
        b"~",
        b"\x01",
        b"\xff",
        b"...",
        b".a",
        b".\x01",
        b"..\x01",
        b"..a",
        b"a\n",
        b".wh",
        b"\xc3\xa4",
        &[b'x'; 255],
        &[0xff; 255],
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    let any_byte = (1..=u8::MAX).prop_filter("not in names", |byte| *byte != b'/');
    prop_oneof![
        6 => select(few),
        1 => prop::collection::vec(any_byte, 1..40),
        1 => (1usize..=255, b'a'..b'e').prop_map(|(len, byte)| vec![byte; len]),
    ]
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(name(), 1..4).prop_map(|names| names.join(&b'/'))
}

fn size() -> impl Strategy<Value = u64> {
    let edges = vec![
        0,
        1,
        4095,
        4096,
        4097,
        8192,
        65_535,
        1 << 20,
        (1 << 20) + 1,
        (1 << 32) - 1,
        1 << 32,
        (1 << 32) + 1,
        5 << 40,
    ];
    prop_oneof![3 => select(edges), 1 => 0u64..200_000, 1 => 0u64..1 << 42]
}

fn time() -> impl Strategy<Value = Time> {
    let seconds = vec![
        0,
        1,
        i64::from(i32::MAX),
        1 << 32,
        9_223_372_036,
        -1,
        i64::MIN,
        i64::MAX,
    ];
    let nanos = select(vec![0, 1, 999_999_999, 500, 854_775_807]);
    (prop_oneof![select(seconds), any::<i64>()], nanos).prop_map(|(seconds, nanos)| Time { seconds, nanos })
}

fn id() -> impl Strategy<Value = u32> {
    select(vec![0, 1, 1000, 65_534, 65_535, 65_536, u32::MAX - 1, u32::MAX])
}

/// An ACL as the kernel stores it: version 2, then tag, permissions and number of each entry.
fn acl() -> Vec<u8> {
    let none = u32::MAX;
    let entries = [
        (1u16, 6u16, none),
        (2, 4, 1000),
        (4, 4, none),
        (16, 4, none),
        (32, 0, none),
    ];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    acl
}

/// The capability to bind low ports, as the kernel stores it.
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 10, 0, 0, 0]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
}

type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

fn xattrs() -> impl Strategy<Value = Xattrs> {
    let names = vec![
        b"user.a".to_vec(),
        b"user.b".to_vec(),
        [&b"user."[..], &[b'n'; 250]].concat(),
        b"user.overlay.redirect".to_vec(),
        b"trusted.overlay.opaque".to_vec(),
        b"security.selinux".to_vec(),
    ];
    let lengths = select(vec![0usize, 1, 3, 4, 100, 3900, 4000, 4096, 5000, 65_535]);
    let plain = (select(names), lengths, any::<u8>()).prop_map(|(name, len, byte)| (name, vec![byte; len]));
    let special = select(vec![
        (b"security.capability".to_vec(), capability()),
        (b"system.posix_acl_access".to_vec(), acl()),
        (b"system.posix_acl_default".to_vec(), acl()),
    ]);
    let several = prop::collection::vec(prop_oneof![3 => plain, 1 => special], 0..4);
    let many: Xattrs = (0..300)
        .map(|n| (format!("user.{n}").into_bytes(), vec![n as u8; 20]))
        .collect();
    prop_oneof![12 => Just(Vec::new()), 8 => several, 1 => Just(many)]
}

fn entry() -> impl Strategy<Value = (Entry, Pieces)> {
    let kinds = vec![
        Kind::Dir,
        Kind::File,
        Kind::File,
        Kind::File,
        Kind::Symlink,
        Kind::Hardlink,
        Kind::Char,
        Kind::Block,
        Kind::Fifo,
    ];
    let target_bytes = prop_oneof![3 => 1usize..200, 1 => select(vec![3900, 4031, 4032, 4033, 4095])];
    let link = (path(), target_bytes).prop_map(|(path, len)| {
        let mut link = path;
        if len > 200 {
            link.resize(len, b'l');
        }
        link
    });
    let pieces = prop::collection::vec(
        prop_oneof![
            select(vec![0u64, 1, 4096, 8192, 1 << 20, 1 << 30, 1 << 40]),
            0u64..100_000
        ],
        0..6,
    );
    let numbers = select(vec![
        (0, 0),
        (1, 3),
        (4095, 0xf_ffff),
        (255, 256),
        (u32::MAX, u32::MAX),
    ]);
    let what = (path(), select(kinds), link, numbers);
    let attributes = (0u32..0o10000, id(), id(), time(), xattrs());
    (what, attributes, size(), pieces).prop_map(|(what, attributes, size, pieces)| {
        let (path, kind, link, rdev) = what;
        let (mut mode, uid, gid, mtime, mut xattrs) = attributes;
        if uid == u32::MAX || gid == u32::MAX {
            // Nobody's, so that not even root may what not all may.
            mode |= 0o555;
            xattrs.retain(|(name, _)| name != b"system.posix_acl_access");
        }
        let entry = Entry {
            mode,
            uid,
            gid,
            mtime,
            size,
            link,
            rdev,
            xattrs,
            ..Entry::new(path, kind)
        };
        (entry, pieces)
    })
}

fn layers() -> impl Strategy<Value = Vec<Vec<(Entry, Pieces)>>> {
    prop::collection::vec(prop::collection::vec(entry(), 0..25), 0..4)
}

#[test]
fn the_kernel_shows_every_tree_as_it_is() {
    let trees = std::env::var("EROFS_TREES").map(|number| number.parse().unwrap());
    let config = Config {
        cases: trees.unwrap_or(TREES),
        failure_persistence: None,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&layers(), |layers| {
        mount_and_compare(&Merged::new(&layers));
        Ok(())
    });
    outcome.unwrap();
}

proptest! {
    #[test]
    fn the_same_tree_gives_the_same_image(layers in layers()) {
        let (one, two) = (Merged::new(&layers), Merged::new(&layers));
        prop_assert!(one.image() == two.image());
    }

    /// A value of 64 KiB is what Linux can have and EROFS cannot.
    #[test]
    fn what_erofs_cannot_express_is_refused_by_name(layers in layers(), path in path()) {
        let mut file = Entry::new(path, Kind::Dir);
        file.xattrs = vec![(b"user.big".to_vec(), vec![1; 1 << 16])];
        let mut layers = layers;
        layers.push(vec![(file.clone(), Vec::new())]);
        let merged = Merged::new(&layers);
        let clean = crate::layer::entry::clean_path(&file.path).path;
        let is_there = merged.tree.resolve(&clean, false).is_ok_and(|number| {
            !merged.tree.xattrs(&merged.tree.node(number).unwrap()).unwrap().is_empty()
        });
        match merged.image() {
            Err(Error::Unsupported { what, .. }) => prop_assert!(what.starts_with('/')),
            outcome => prop_assert!(!is_there, "{:?}", outcome.map(|image| image.len())),
        }
    }
}
