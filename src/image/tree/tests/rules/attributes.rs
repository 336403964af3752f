//! The attributes of inodes, those of the root included.

use super::*;
use crate::layer::entry::Time;

#[test]
fn times_keep_their_nanoseconds_and_odd_ones_become_1970() {
    let at = |seconds, nanos| {
        let mtime = Time { seconds, nanos };
        let (tree, _) = merged(&[layer(&[Entry { mtime, ..file("a") }])], Whiteouts::Apply);
        tree.node(1).unwrap().mtime
    };
    let kept = |seconds, nanos| Time { seconds, nanos };
    assert_eq!(at(1_700_000_000, 123_456_789), kept(1_700_000_000, 123_456_789));
    assert_eq!(at(9_223_372_036, 854_775_807), kept(9_223_372_036, 854_775_807));
    for (seconds, nanos) in [
        (-6, 750_000_000),
        (99_999_999_999, 0),
        (9_223_372_036, 854_775_808),
        (i64::MIN, 0),
        (i64::MAX, 0),
        (5, 1_000_000_000),
    ] {
        assert_eq!(at(seconds, nanos), Time::default(), "{seconds}.{nanos:09}");
    }
}

#[test]
fn the_xattrs_of_images_are_shown_and_those_of_hosts_are_not() {
    let shown = [
        "security.capability",
        "system.posix_acl_access",
        "system.posix_acl_default",
        "user.a",
        "user.overlayfs",
    ];
    let hidden = [
        "security.selinux",
        "trusted.overlay.opaque",
        "trusted.x",
        "user.overlay.opaque",
    ];
    let all: Vec<&str> = shown.iter().chain(&hidden).copied().collect();
    let entries = [
        with_xattrs(file("a"), &all),
        with_xattrs(dir("d"), &["user.a"]),
        with_xattrs(file("e"), &hidden),
    ];
    let upper = [with_xattrs(dir("d"), &["user.b"])];
    let (tree, _) = merged(&[tar_layer(&entries), tar_layer(&upper)], Whiteouts::Apply);
    let names = |path: &str| -> Vec<String> {
        let node = tree.node(tree.resolve(path.as_bytes(), false).unwrap()).unwrap();
        let xattrs = tree.xattrs(&node).unwrap();
        let names = xattrs.into_iter().map(|(name, value)| {
            assert_eq!(value, b"v");
            String::from_utf8(name.to_vec()).unwrap()
        });
        names.collect()
    };
    assert_eq!(names("a"), shown);
    assert_eq!(names("d"), ["user.b"], "replaced, not added to");
    assert_eq!(names("e"), Vec::<String>::new());
}

#[test]
fn the_root_has_the_attributes_of_its_entry() {
    let root = node_at(&[&[owned(dir("./"), 0o700, 3, 7777)], &[file("a")]], "");
    assert_eq!((root.mode, root.uid, root.mtime.seconds), (0o700, 3, 7777));
    let root = node_at(&[&[file("a")]], "");
    let attributes = (root.mode, root.uid, root.gid, root.mtime);
    assert_eq!(attributes, (0o755, 0, 0, Time::default()));
}

#[test]
fn the_root_stays_a_directory() {
    becomes_with_warning(
        &[&[file("a")], &[file("./")]],
        &["a f0"],
        "the root is a directory",
    );
    becomes_with_warning(
        &[&[file("a")], &[symlink("/", "x")]],
        &["a f0"],
        "the root is a directory",
    );
}

#[test]
fn special_bits_and_large_ids_are_kept() {
    let entry = Entry {
        gid: u32::MAX - 1,
        ..owned(file("a"), 0o6755, u32::MAX - 1, 0)
    };
    let node = node_at(&[&[entry, dir("b")]], "a");
    assert_eq!(
        (node.mode, node.uid, node.gid),
        (0o6755, u32::MAX - 1, u32::MAX - 1)
    );
    let sticky = node_at(&[&[owned(dir("t"), 0o1777, 0, 0)]], "t");
    assert_eq!(sticky.mode, 0o1777);
}

#[test]
fn names_may_be_any_bytes() {
    let name = b"\xff\xfe\n".to_vec();
    let (tree, warnings) = merged(
        &[layer(&[Entry::new(name.clone(), Kind::File)])],
        Whiteouts::Apply,
    );
    assert_eq!(tree.lookup(0, &name).unwrap(), Some(1));
    assert_eq!(tree.path_of(1).unwrap(), name);
    assert!(warnings.is_empty());
}

#[test]
fn devices_and_pipes_are_shown() {
    let device = |path: &str, kind, rdev| Entry {
        rdev,
        ..Entry::new(path, kind)
    };
    let entries = [
        device("b", Kind::Block, (8, 1)),
        device("c", Kind::Char, (4095, 1_048_575)),
        device("p", Kind::Fifo, (0, 0)),
    ];
    becomes(&[&entries], &["b b0", "c c0", "p p0"]);
    assert_eq!(node_at(&[&entries], "b").rdev, (8, 1));
    assert_eq!(node_at(&[&entries], "c").rdev, (4095, 1_048_575));
    assert_eq!(node_at(&[&entries], "c").size, 0);
}

#[test]
fn directory_over_directory_keeps_the_children() {
    let layers: [&[Entry]; 2] = [
        &[owned(dir("d"), 0o1777, 7, 5000), dir("d/low")],
        &[owned(dir("d"), 0o700, 8, 6000), dir("d/up")],
    ];
    becomes(&layers, &["d d1", "d/low d0", "d/up d1"]);
    let node = node_at(&layers, "d");
    assert_eq!(
        (node.mode, node.uid, node.mtime.seconds, node.nlink),
        (0o700, 8, 6000, 4)
    );
}

#[test]
fn sizes_are_those_of_a_filesystem() {
    let layers: [&[Entry]; 1] = [&[
        dir("d"),
        sized("f", 5),
        symlink("l", "target"),
        hardlink("g", "f"),
    ]];
    let sizes: Vec<u64> = ["d", "f", "l"].map(|path| node_at(&layers, path).size).to_vec();
    // A directory's is that of its dirents in EROFS: 12 bytes and the name, for `.` and `..` too.
    assert_eq!(sizes, [2 * 12 + 3, 5, 6]);
    let sectors: Vec<u64> = ["d", "f", "l"]
        .map(|path| node_at(&layers, path).sectors())
        .to_vec();
    assert_eq!(sectors, [8, 8, 8]);
    assert_eq!(node_at(&layers, "l").mode, 0o777);
    let (tree, _) = merged(&[tar_layer(layers[0])], Whiteouts::Apply);
    let totals = tree.totals();
    assert_eq!((totals.nodes, totals.bytes), (4, 5));
}
