//! Hard links: within a layer, across layers, and those that lead nowhere.

use super::*;

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
