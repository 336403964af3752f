//! What stands at a path: names, parents that no entry names, symlinks on the way, one thing replacing another.

use super::*;
use crate::layer::entry::Time;

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
fn a_symlinked_parent_with_a_name_that_no_filesystem_has_leaves_its_entries_out() {
    let (fits, long) = ("x".repeat(255), "x".repeat(256));
    let entries = [symlink("a", &fits), file("a/f"), symlink("b", &long), file("b/f")];
    let lines = [
        format!("a l0 -> {fits}"),
        format!("b l0 -> {long}"),
        format!("{fits} D0"),
        format!("{fits}/f f0"),
    ];
    becomes_with_warning(&[&entries], &lines.each_ref().map(String::as_str), "255 bytes");
}

#[test]
fn a_symlinked_parent_that_leads_nowhere_leaves_its_entries_out() {
    let entries = [symlink("a", "b"), symlink("b", "a"), file("a/f")];
    becomes_with_warning(&[&entries], &["a l0 -> b", "b l0 -> a"], "no end");
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
