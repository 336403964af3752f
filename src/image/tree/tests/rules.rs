//! The rules of merging, one test a case of the table of measured container engines (and the cases that implementers
//! were bitten by), under its column "recommended". Each layer is written as a tar, in eStargz, and read from its bytes,
//! but for what eStargz cannot say: names that are not UTF-8, and parts of a second.
//!
//! A tree is written as one line a name: path, type, layer; `D` is a directory that no entry stands for. Then, where
//! there is something to say, `->` the symlink's target, the size of a file, `x` the link count and `#` the number of
//! an inode with several names.

use std::collections::BTreeMap;

use super::*;
use crate::layer::entry::Time;
use crate::layer::estargz::TOC_DIGEST_ANNOTATION;
use crate::layer::estargz::writer::{Options, write_layer};

use crate::layer::{Descriptor, Step, indexer};

fn dir(path: &str) -> Entry {
    Entry::new(path, Kind::Dir)
}

fn file(path: &str) -> Entry {
    Entry::new(path, Kind::File)
}

fn sized(path: &str, size: u64) -> Entry {
    Entry { size, ..file(path) }
}

fn symlink(path: &str, target: &str) -> Entry {
    Entry {
        link: target.into(),
        ..Entry::new(path, Kind::Symlink)
    }
}

fn hardlink(path: &str, target: &str) -> Entry {
    Entry {
        link: target.into(),
        ..Entry::new(path, Kind::Hardlink)
    }
}

fn owned(entry: Entry, mode: u32, uid: u32, seconds: i64) -> Entry {
    let mtime = Time { seconds, nanos: 0 };
    Entry {
        mode,
        uid,
        mtime,
        ..entry
    }
}

fn with_xattrs(entry: Entry, names: &[&str]) -> Entry {
    let xattrs = names.iter().map(|name| (name.as_bytes().to_vec(), b"v".to_vec()));
    Entry {
        xattrs: xattrs.collect(),
        ..entry
    }
}

/// The index of a layer whose tar has these entries.
fn tar_layer(entries: &[Entry]) -> Index<Vec<u8>> {
    let entries: Vec<_> = entries
        .iter()
        .map(|entry| (entry.clone(), vec![b'x'; entry.size as usize]))
        .collect();
    let (blob, finished) = write_layer(&entries, Options::default()).unwrap();
    let toc_digest = finished.toc_digest.to_string();
    let descriptor = Descriptor {
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".to_owned(),
        digest: finished.blob_digest,
        size: finished.blob_bytes,
        annotations: BTreeMap::from([(TOC_DIGEST_ANNOTATION.to_owned(), toc_digest)]),
    };
    let mut indexer = indexer(&descriptor).unwrap();
    let mut step = indexer.step(None).unwrap();
    loop {
        match step {
            Step::Need(range) => {
                let bytes = &blob[range.start as usize..range.end as usize];
                step = indexer.step(Some(bytes)).unwrap();
            }
            Step::Done(index) => return Index::open(index).unwrap(),
        }
    }
}

fn line(tree: &Tree<Vec<u8>>, path: &[u8], node: &Node) -> String {
    let letter = match (node.kind, node.entry) {
        (Kind::Dir, None) => 'D',
        (Kind::Dir, Some(_)) => 'd',
        (Kind::File, _) => 'f',
        (Kind::Symlink, _) => 'l',
        (Kind::Char, _) => 'c',
        (Kind::Block, _) => 'b',
        _ => 'p',
    };
    let mut line = format!("{} {letter}{}", String::from_utf8_lossy(path), node.layer);
    match node.kind {
        Kind::Symlink => {
            let target = tree.link(node).unwrap();
            line += &format!(" -> {}", String::from_utf8_lossy(target));
        }
        Kind::File if node.size > 0 => line += &format!(" {}", node.size),
        _ => {}
    }
    if node.kind != Kind::Dir && node.nlink != 1 {
        line += &format!(" x{} #{}", node.nlink, node.number);
    }
    line
}

/// The lines of all names but the root's, and the warnings.
fn shown(layers: &[&[Entry]], whiteouts: Whiteouts) -> (Vec<String>, Vec<String>) {
    let layers: Vec<_> = layers.iter().map(|entries| tar_layer(entries)).collect();
    let (tree, warnings) = merged(&layers, whiteouts);
    let mut lines = Vec::new();
    walk(&tree, &mut |path, node| lines.push(line(&tree, path, node)));
    lines.remove(0);
    (lines, warnings)
}

#[track_caller]
fn becomes(layers: &[&[Entry]], expected: &[&str]) {
    let (lines, warnings) = shown(layers, Whiteouts::Apply);
    assert_eq!(lines, expected);
    assert_eq!(warnings, Vec::<String>::new());
}

/// As [`becomes`], with one warning that contains `why`.
#[track_caller]
fn becomes_with_warning(layers: &[&[Entry]], expected: &[&str], why: &str) {
    let (lines, warnings) = shown(layers, Whiteouts::Apply);
    assert_eq!(lines, expected);
    assert!(
        matches!(warnings.as_slice(), [warning] if warning.contains(why)),
        "{warnings:?}"
    );
}

/// The inode at `path` in the merged tree of `layers`.
#[track_caller]
fn node_at(layers: &[&[Entry]], path: &str) -> Node {
    let layers: Vec<_> = layers.iter().map(|entries| tar_layer(entries)).collect();
    let (tree, _) = merged(&layers, Whiteouts::Apply);
    tree.node(tree.resolve(path.as_bytes(), false).unwrap()).unwrap()
}

#[test]
fn a_whiteout_before_its_name_leaves_the_new_one() {
    becomes(&[&[file("a")], &[file(".wh.a"), file("a")]], &["a f1"]);
}

#[test]
fn a_whiteout_after_its_name_leaves_the_new_one() {
    becomes(&[&[file("a")], &[file("a"), file(".wh.a")]], &["a f1"]);
}

#[test]
fn a_directory_beside_its_whiteout_is_opaque() {
    let lower = [dir("d"), file("d/low")];
    let upper = [file(".wh.d"), dir("d"), file("d/up")];
    becomes(&[&lower, &upper], &["d d1", "d/up f1"]);
    let [whiteout, dir, up] = upper;
    becomes(&[&lower, &[dir, up, whiteout]], &["d d1", "d/up f1"]);
}

#[test]
fn an_opaque_marker_counts_wherever_it_stands() {
    let lower = [dir("d"), file("d/low")];
    let upper = [dir("d"), file("d/up"), file("d/.wh..wh..opq")];
    becomes(&[&lower, &upper], &["d d1", "d/up f1"]);
    let [dir, up, marker] = upper;
    becomes(&[&lower, &[marker, dir, up]], &["d d1", "d/up f1"]);
}

#[test]
fn an_opaque_marker_alone_keeps_the_lower_attributes() {
    let lower = [owned(dir("d"), 0o1777, 7, 5000), file("d/low")];
    let upper = [file("d/.wh..wh..opq"), file("d/up")];
    becomes(&[&lower, &upper], &["d d0", "d/up f1"]);
    let node = node_at(&[&lower, &upper], "d");
    assert_eq!((node.mode, node.uid, node.mtime.seconds), (0o1777, 7, 5000));
}

#[test]
fn an_opaque_root_hides_everything_below() {
    let lower = [owned(dir("./"), 0o700, 3, 7777), dir("d"), file("d/low")];
    let upper = [file("up"), file(".wh..wh..opq")];
    becomes(&[&lower, &upper], &["up f1"]);
    assert_eq!(node_at(&[&lower, &upper], "/").mode, 0o700);
}

#[test]
fn an_implicit_parent_keeps_the_lower_attributes() {
    let lower = [owned(dir("tmp"), 0o1777, 7, 5000)];
    let upper = [file("tmp/up")];
    becomes(&[&lower, &upper], &["tmp d0", "tmp/up f1"]);
    let node = node_at(&[&lower, &upper], "tmp");
    assert_eq!((node.mode, node.uid, node.mtime.seconds), (0o1777, 7, 5000));
}

#[test]
fn an_implicit_parent_without_a_lower_one_is_plain() {
    becomes(&[&[file("a/b/c")]], &["a D0", "a/b D0", "a/b/c f0"]);
    let node = node_at(&[&[file("a/b/c")]], "a/b");
    let attributes = (node.mode, node.uid, node.gid, node.mtime, node.nlink);
    assert_eq!(attributes, (0o755, 0, 0, Time::default(), 2));
}

#[test]
fn an_implicit_parent_replaces_a_lower_symlink() {
    let lower = [dir("usr"), dir("usr/lib"), symlink("lib", "usr/lib")];
    becomes(
        &[&lower, &[file("lib/up")]],
        &["lib D1", "lib/up f1", "usr d0", "usr/lib d0"],
    );
}

#[test]
fn a_directory_replaces_a_lower_symlink() {
    let lower = [dir("usr"), dir("usr/lib"), symlink("lib", "usr/lib")];
    becomes(&[&lower, &[dir("lib/")]], &["lib d1", "usr d0", "usr/lib d0"]);
}

#[test]
fn a_symlinked_parent_of_the_same_layer_is_followed() {
    let lower = [dir("usr"), dir("usr/lib"), file("usr/lib/low")];
    let upper = [symlink("lib", "usr/lib"), file("lib/up")];
    becomes(
        &[&lower, &upper],
        &[
            "lib l1 -> usr/lib",
            "usr d0",
            "usr/lib d0",
            "usr/lib/low f0",
            "usr/lib/up f1",
        ],
    );
}

#[test]
fn a_symlinked_parent_is_held_at_the_root() {
    let entries = [
        dir("d"),
        symlink("d/out", "../../../../x"),
        symlink("d/root", "/"),
        file("d/out/f"),
        file("d/root/g"),
    ];
    becomes(
        &[&entries],
        &[
            "d d0",
            "d/out l0 -> ../../../../x",
            "d/root l0 -> /",
            "g f0",
            "x D0",
            "x/f f0",
        ],
    );
}

#[test]
fn a_symlinked_parent_that_leads_nowhere_leaves_its_entries_out() {
    let entries = [symlink("a", "b"), symlink("b", "a"), file("a/f")];
    becomes_with_warning(&[&entries], &["a l0 -> b", "b l0 -> a"], "no end");
}

#[test]
fn a_hard_link_to_a_lower_file_shares_its_inode() {
    becomes(
        &[&[sized("a", 5)], &[hardlink("b", "a")]],
        &["a f0 5 x2 #1", "b f0 5 x2 #1"],
    );
}

#[test]
fn a_hard_link_may_come_before_its_target() {
    becomes(
        &[&[hardlink("a", "./z"), sized("z", 5)]],
        &["a f0 5 x2 #1", "z f0 5 x2 #1"],
    );
}

#[test]
fn a_hard_link_to_a_name_that_is_not_there_is_left_out() {
    becomes_with_warning(
        &[&[file("z")], &[hardlink("a", "b")]],
        &["z f0"],
        "what is not there",
    );
}

#[test]
fn a_hard_link_to_a_name_whited_out_in_its_layer_is_left_out() {
    becomes_with_warning(
        &[&[file("a")], &[file(".wh.a"), hardlink("b", "a")]],
        &[],
        "\"b\" is left out: a hard link to what is not there",
    );
}

#[test]
fn a_hard_link_that_is_left_out_does_not_bring_back_older_content() {
    becomes_with_warning(&[&[file("b")], &[hardlink("b", "a")]], &[], "what is not there");
}

#[test]
fn a_link_count_is_the_number_of_names_left() {
    becomes(
        &[&[sized("a", 5), hardlink("b", "a")], &[file(".wh.a")]],
        &["b f0 5"],
    );
}

#[test]
fn a_replaced_name_leaves_the_other_links_alone() {
    becomes(
        &[&[sized("a", 5), hardlink("b", "a")], &[sized("a", 9)]],
        &["a f1 9", "b f0 5"],
    );
}

#[test]
fn a_hard_link_to_a_symlink_shares_its_inode() {
    becomes(
        &[&[symlink("a", "t"), hardlink("b", "a")]],
        &["a l0 -> t x2 #1", "b l0 -> t x2 #1"],
    );
}

#[test]
fn hard_links_to_hard_links_end_at_one_inode() {
    becomes(
        &[&[hardlink("c", "b"), hardlink("b", "a"), sized("a", 5)]],
        &["a f0 5 x3 #1", "b f0 5 x3 #1", "c f0 5 x3 #1"],
    );
}

#[test]
fn hard_links_in_a_circle_are_left_out() {
    let (lines, warnings) = shown(
        &[&[hardlink("a", "b"), hardlink("b", "a"), hardlink("c", "c")]],
        Whiteouts::Apply,
    );
    assert_eq!(lines, Vec::<String>::new());
    assert_eq!(warnings.len(), 3);
    assert!(
        warnings
            .iter()
            .all(|warning| warning.contains("hard link to itself")),
        "{warnings:?}"
    );
}

#[test]
fn a_hard_link_to_a_directory_is_left_out() {
    becomes_with_warning(
        &[&[dir("d"), hardlink("b", "d")]],
        &["d d0"],
        "hard link to a directory",
    );
    becomes_with_warning(&[&[hardlink("b", "/")]], &[], "is left out");
}

#[test]
fn a_hard_link_finds_its_target_through_symlinks() {
    becomes(
        &[
            &[dir("usr"), symlink("lib", "usr"), file("usr/a")],
            &[hardlink("b", "lib/a")],
        ],
        &["b f0 x2 #1", "lib l0 -> usr", "usr d0", "usr/a f0 x2 #1"],
    );
}

#[test]
fn the_attributes_of_a_hard_link_do_not_count() {
    let link = Entry {
        mode: 0o600,
        ..hardlink("b", "a")
    };
    let layers: [&[Entry]; 1] = [&[file("a"), link]];
    becomes_with_warning(&layers, &["a f0 x2 #1", "b f0 x2 #1"], "other attributes");
    assert_eq!(node_at(&layers, "b").mode, 0o644);
}

#[test]
fn of_two_entries_of_one_path_the_last_counts() {
    becomes(
        &[&[sized("a", 1), sized("b", 1), sized("a", 2)]],
        &["a f0 2", "b f0 1"],
    );
    becomes(
        &[&[sized("a", 1), hardlink("b", "a"), sized("b", 2)]],
        &["a f0 1", "b f0 2"],
    );
}

#[test]
fn a_file_after_a_directory_of_its_path_drops_the_children() {
    becomes(&[&[dir("a"), file("a/b"), file("a")]], &["a f0"]);
}

#[test]
fn files_and_directories_replace_one_another() {
    becomes(&[&[dir("a"), file("a/b")], &[file("a")]], &["a f1"]);
    becomes(&[&[file("a")], &[dir("a"), file("a/b")]], &["a d1", "a/b f1"]);
    let away_and_back: [&[Entry]; 3] = [&[dir("a"), file("a/b")], &[file("a")], &[dir("a")]];
    becomes(&away_and_back, &["a d2"]);
}

#[test]
fn a_file_in_the_way_of_a_path_becomes_a_directory() {
    let layers: [&[Entry]; 2] = [&[owned(file("a"), 0o600, 7, 5000)], &[file("a/x")]];
    becomes(&layers, &["a D1", "a/x f1"]);
    let node = node_at(&layers, "a");
    assert_eq!((node.mode, node.uid, node.mtime), (0o755, 0, Time::default()));
}

#[test]
fn names_are_cleaned() {
    becomes(
        &[&[file("/abs/f"), file("a/../c"), file("./e//f")]],
        &["abs D0", "abs/f f0", "c f0", "e D0", "e/f f0"],
    );
}

#[test]
fn names_that_lead_above_the_root_are_held_there() {
    becomes_with_warning(&[&[file("../evil")]], &["evil f0"], "held at the root");
    becomes_with_warning(&[&[file("a/../../b")]], &["b f0"], "held at the root");
}

#[test]
fn a_whiteout_of_nothing_hides_nothing() {
    becomes_with_warning(
        &[&[dir("d"), file("d/low")], &[file("d/.wh.")]],
        &["d d0", "d/low f0"],
        "without a name",
    );
}

#[test]
fn a_whiteout_in_the_base_layer_is_hidden() {
    becomes(
        &[&[file(".wh.a"), file("b"), file(".wh..wh..opq"), file("d/.wh.x")]],
        &["b f0"],
    );
}

#[test]
fn a_whiteout_below_a_whiteout_makes_nothing() {
    becomes(
        &[
            &[dir("foo"), file("foo/bar"), file("foo/baz")],
            &[file(".wh.foo"), file("foo/.wh.bar")],
        ],
        &[],
    );
    becomes_with_warning(
        &[&[file("bar")], &[file(".wh.foo/bar")]],
        &["bar f0"],
        "below one",
    );
}

#[test]
fn a_device_0_0_is_shown() {
    let device = Entry::new("a", Kind::Char);
    becomes(&[&[file("a")], &[device]], &["a c1"]);
}

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
fn the_type_of_a_whiteout_does_not_matter() {
    for kind in [Kind::Dir, Kind::File, Kind::Char, Kind::Fifo] {
        becomes(
            &[&[file("a"), file("b")], &[Entry::new(".wh.a", kind)]],
            &["b f0"],
        );
    }
    becomes(&[&[file("a")], &[symlink(".wh.a", "x")]], &[]);
    becomes(&[&[file("a")], &[hardlink(".wh.a", "x")]], &[]);
}

#[test]
fn what_aufs_left_at_the_root_is_skipped() {
    let entries = [
        dir(".wh..wh.plnk"),
        file(".wh..wh.plnk/1.2"),
        file(".wh..wh.aufs"),
        dir(".wh..wh.orph"),
        file("a"),
    ];
    becomes(&[&[file("b")], &entries], &["a f1", "b f0"]);
}

#[test]
fn an_opaque_marker_is_known_by_its_whole_name() {
    becomes(
        &[
            &[dir("d"), file("d/.wh..opqX"), file("d/low")],
            &[file("d/.wh..wh..opqX")],
        ],
        &["d d0", "d/low f0"],
    );
}

#[test]
fn a_name_that_only_contains_the_prefix_is_content() {
    becomes(&[&[file("a.wh.b"), file(".whx")]], &[".whx f0", "a.wh.b f0"]);
}

#[test]
fn whiteouts_do_not_follow_lower_symlinks() {
    let lower = [
        dir("usr"),
        dir("usr/lib"),
        file("usr/lib/low"),
        symlink("lib", "usr/lib"),
    ];
    let kept = ["lib l0 -> usr/lib", "usr d0", "usr/lib d0", "usr/lib/low f0"];
    becomes(&[&lower, &[file("lib/.wh..wh..opq")]], &kept);
    becomes(&[&lower, &[file("lib/.wh.low")]], &kept);
}

#[test]
fn whiteouts_follow_the_symlinks_of_their_own_layer() {
    let lower = [dir("usr"), dir("usr/lib"), file("usr/lib/low"), file("usr/lib/b")];
    let own = symlink("lib", "usr/./x/../lib");
    let marked = [own.clone(), file("lib/.wh.low")];
    becomes(
        &[&lower, &marked],
        &["lib l1 -> usr/./x/../lib", "usr d0", "usr/lib d0", "usr/lib/b f0"],
    );
    becomes(
        &[&lower, &[file("lib/.wh..wh..opq"), own]],
        &["lib l1 -> usr/./x/../lib", "usr d0", "usr/lib d0"],
    );
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
    assert_eq!(sizes, [4096, 5, 6]);
    assert_eq!(node_at(&layers, "l").mode, 0o777);
    let (tree, _) = merged(&[tar_layer(layers[0])], Whiteouts::Apply);
    let totals = tree.totals();
    assert_eq!((totals.nodes, totals.bytes), (4, 5));
}

#[test]
fn one_layer_alone_shows_its_whiteouts() {
    let entries = [
        file(".wh.a"),
        dir("d"),
        file("d/.wh..wh..opq"),
        file(".wh."),
        dir(".wh..wh.plnk"),
        file("a"),
        file("a"),
    ];
    let (lines, warnings) = shown(&[&entries], Whiteouts::Show);
    assert_eq!(
        lines,
        [
            ".wh. f0",
            ".wh..wh.plnk d0",
            ".wh.a f0",
            "a f0",
            "d d0",
            "d/.wh..wh..opq f0"
        ]
    );
    assert!(warnings.is_empty());
}
