//! Whiteouts, opaque directories, and what only looks like them.

use super::*;

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
        file(".wh..wh.plnk/1.2/3"),
        symlink(".wh..wh.plnk/4", "a"),
        file(".wh..wh.aufs"),
        dir(".wh..wh.orph"),
        file(".wh..wh.orph/x"),
        dir(".wh..wh.orph/y/z"),
        file(".wh..wh.anything"),
        file(".wh..wh..opqX"),
        file("a"),
    ];
    becomes(&[&[file("b")], &entries], &["a f1", "b f0"]);
    becomes(&[&entries, &[file("b")]], &["a f0", "b f1"]);
}

#[test]
fn names_of_one_file_of_aufs_are_hard_links() {
    let entries = [
        dir(".wh..wh.plnk"),
        sized(".wh..wh.plnk/1.2", 3),
        hardlink("a", ".wh..wh.plnk/1.2"),
        hardlink("b", "/.wh..wh.plnk/1.2"),
    ];
    becomes(&[&entries], &["a f0 3 x2 #1", "b f0 3 x2 #1"]);
    // They are of one layer.
    becomes_with_warning(
        &[
            &entries,
            &[file("a"), file("b"), hardlink("c", ".wh..wh.plnk/1.2")],
        ],
        &["a f1", "b f1"],
        "a hard link to what is not there",
    );
}

#[test]
fn what_aufs_left_leads_nowhere() {
    let entries = [
        symlink(".wh..wh.plnk", "etc"),
        sized(".wh..wh.plnk/passwd", 3),
        dir("etc"),
    ];
    becomes(&[&[file("etc/passwd")], &entries], &["etc d1", "etc/passwd f0"]);
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
fn whiteouts_follow_absolute_symlinks_from_the_root() {
    let lower = [dir("d"), file("d/low"), dir("e"), dir("e/d"), file("e/d/low")];
    let upper = [symlink("e/l", "/d"), file("e/l/.wh.low")];
    becomes(
        &[&lower, &upper],
        &["d d0", "e d0", "e/d d0", "e/d/low f0", "e/l l1 -> /d"],
    );
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
