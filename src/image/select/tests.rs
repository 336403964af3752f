//! What patterns select, against the plainest way to say it: every path of the tree, tried one by one.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::image::tree::Whiteouts;
use crate::image::tree::tests::{layer, merged};
use crate::layer::entry::Entry;

fn tree_of(entries: &[(&str, Kind, &str)]) -> Tree<Vec<u8>> {
    let entry = |(path, kind, link): &(&str, Kind, &str)| Entry {
        link: (*link).into(),
        ..Entry::new(*path, *kind)
    };
    let entries: Vec<Entry> = entries.iter().map(entry).collect();
    merged(&[layer(&entries)], Whiteouts::Apply).0
}

/// The selected paths; those of directories that only lead there end with `?`.
fn selected(tree: &Tree<Vec<u8>>, patterns: &[&str]) -> Vec<String> {
    let mut selection = Selection::default();
    for pattern in patterns {
        let pattern = Pattern::parse(pattern.as_bytes()).unwrap();
        selection.add(tree, &pattern).unwrap();
    }
    let mut paths = Vec::new();
    let each = |selected: Selected<'_>| {
        let mark = if selected.is_passage { "?" } else { "" };
        paths.push(format!("{}{mark}", String::from_utf8_lossy(selected.path)));
        Ok(())
    };
    selection.each(tree, each).unwrap();
    paths
}

fn image() -> Tree<Vec<u8>> {
    tree_of(&[
        ("usr/bin/dash", Kind::File, ""),
        ("usr/bin/sh", Kind::Symlink, "dash"),
        ("usr/bin/grep", Kind::File, ""),
        ("usr/bin/egrep", Kind::File, ""),
        ("usr/lib/.hidden", Kind::File, ""),
        ("usr/lib/a/b/grep", Kind::File, ""),
        ("usr/lib/loop", Kind::Symlink, "."),
        ("bin", Kind::Symlink, "/usr/bin"),
        ("also", Kind::Symlink, "bin"),
        ("nowhere", Kind::Symlink, "gone/away"),
        ("etc/passwd", Kind::File, ""),
        ("etc/a*b", Kind::File, ""),
        ("etc/axb", Kind::File, ""),
    ])
}

#[test]
fn patterns_mean_what_a_shell_in_the_image_would_make_of_them() {
    let tree = image();
    let cases: &[(&[&str], &[&str])] = &[
        (&["etc"], &["?", "etc", "etc/a*b", "etc/axb", "etc/passwd"]),
        (&["/etc/"], &["?", "etc", "etc/a*b", "etc/axb", "etc/passwd"]),
        (&["etc/passwd"], &["?", "etc?", "etc/passwd"]),
        (&["etc/passwd/"], &[]),
        (&["etc/passwd/."], &[]),
        (&["etc/a\\*b"], &["?", "etc?", "etc/a*b"]),
        (&["etc/a*b"], &["?", "etc?", "etc/a*b", "etc/axb"]),
        (&["usr/../etc/p*"], &["?", "etc?", "etc/passwd"]),
        // A link on the way comes along, as do all links behind it.
        (
            &["bin/*grep"],
            &["?", "bin", "usr?", "usr/bin?", "usr/bin/egrep", "usr/bin/grep"],
        ),
        (
            &["also/dash"],
            &["?", "also", "bin", "usr?", "usr/bin?", "usr/bin/dash"],
        ),
        // One that is named is followed, one that is met is not.
        (
            &["bin/sh"],
            &["?", "bin", "usr?", "usr/bin?", "usr/bin/dash", "usr/bin/sh"],
        ),
        (&["usr/bin/s*"], &["?", "usr?", "usr/bin?", "usr/bin/sh"]),
        (&["b*"], &["?", "bin"]),
        (
            &["b*/"],
            &[
                "?",
                "bin",
                "usr?",
                "usr/bin",
                "usr/bin/dash",
                "usr/bin/egrep",
                "usr/bin/grep",
                "usr/bin/sh",
            ],
        ),
        (&["nowhere"], &["?", "nowhere"]),
        (&["nowhere/"], &[]),
        (&["nowhere/x"], &[]),
        (
            &["**/grep"],
            &[
                "?",
                "usr?",
                "usr/bin?",
                "usr/bin/grep",
                "usr/lib?",
                "usr/lib/a?",
                "usr/lib/a/b?",
                "usr/lib/a/b/grep",
            ],
        ),
        (
            &["usr/lib/*"],
            &[
                "?",
                "usr?",
                "usr/lib?",
                "usr/lib/.hidden",
                "usr/lib/a",
                "usr/lib/a/b",
                "usr/lib/a/b/grep",
                "usr/lib/loop",
            ],
        ),
        (
            &["[!aeu]*", "etc/passwd"],
            &["?", "bin", "etc?", "etc/passwd", "nowhere"],
        ),
        (&["gone", "etc/shadow"], &[]),
    ];
    for (patterns, expected) in cases {
        assert_eq!(selected(&tree, patterns), *expected, "{patterns:?}");
    }
    let everything = selected(&tree, &["."]);
    assert_eq!(everything.len(), 20);
    for all in ["/", "", "**", "usr/..", "./."] {
        assert_eq!(selected(&tree, &[all]), everything, "{all:?}");
    }
}

#[test]
fn a_plain_path_tells_which_file_it_leads_to() {
    let tree = image();
    let file = |pattern: &str| {
        let pattern = Pattern::parse(pattern.as_bytes()).unwrap();
        Selection::default().add(&tree, &pattern).unwrap().file
    };
    let dash = tree.resolve(b"usr/bin/dash", false).ok();
    assert!(dash.is_some());
    for leads_there in ["usr/bin/dash", "/bin/sh", "also/../bin/sh"] {
        assert_eq!(file(leads_there), dash, "{leads_there}");
    }
    for does_not in ["usr/bin/das?", "bin", "usr", "nowhere", "gone", "bin/sh/"] {
        assert_eq!(file(does_not), None, "{does_not}");
    }
}

#[test]
fn wildcards_that_meet_everywhere_end() {
    let mut entries = vec![("l".to_owned(), Kind::Symlink, ".")];
    let mut path = String::new();
    for _ in 0..60 {
        path.push_str("a/");
        entries.push((format!("{path}up"), Kind::Symlink, ".."));
    }
    let entries: Vec<_> = entries
        .iter()
        .map(|(path, kind, link)| (path.as_str(), *kind, *link))
        .collect();
    let tree = tree_of(&entries);
    assert_eq!(
        selected(&tree, &["**/*/**/*/**/*/**/up/**/*/**/up/nothing"]),
        [""; 0]
    );
    assert_eq!(
        selected(&tree, &["l/l/l/l/*/up/l/**/up/l"]),
        ["?", "a?", "a/up", "l"]
    );
}

#[test]
fn trees_that_are_nested_without_end_are_refused() {
    // A path alone cannot be so deep, but one behind a link of the same layer can.
    let (upper, lower) = ("a/".repeat(900), format!("link/{}", "b/".repeat(900)));
    let tree = tree_of(&[
        (&upper, Kind::Dir, ""),
        ("link", Kind::Symlink, &upper),
        (&lower, Kind::Dir, ""),
    ]);
    let mut selection = Selection::default();
    let all = Pattern::parse(b"**/x").unwrap();
    assert_eq!(selection.add(&tree, &all).unwrap_err().exit_code(), 1);
    selection.add(&tree, &Pattern::parse(b".").unwrap()).unwrap();
    assert!(selection.each(&tree, |_| Ok(())).is_err());
}

/// Whether a pattern's components match a path's, without links.
fn naive(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        (["**", rest @ ..], _) => (0..=path.len()).any(|at| naive(rest, &path[at..])),
        ([glob, rest @ ..], [name, below @ ..]) => letters(glob, name) && naive(rest, below),
        _ => false,
    }
}

fn letters(glob: &str, name: &str) -> bool {
    match (glob.chars().next(), name.chars().next()) {
        (None, None) => true,
        (Some('*'), _) => (0..=name.len()).any(|at| letters(&glob[1..], &name[at..])),
        (Some('?'), Some(_)) => letters(&glob[1..], &name[1..]),
        (Some(a), Some(b)) => a == b && letters(&glob[1..], &name[1..]),
        _ => false,
    }
}

proptest! {
    #[test]
    fn a_tree_without_links_is_selected_as_path_by_path(
        files in prop::collection::btree_set("[ab]{1,2}(/[ab]{1,2}){0,3}", 1..12),
        patterns in prop::collection::vec("(\\*\\*|[ab?*]{1,2})(/(\\*\\*|[ab?*]{1,2})){0,3}", 1..3),
    ) {
        let entries: Vec<_> = files.iter().map(|path| (path.as_str(), Kind::File, "")).collect();
        let tree = tree_of(&entries);
        let every = selected(&tree, &["."]);
        let is_dir = |path: &str| tree.node(tree.resolve(path.as_bytes(), false).unwrap()).unwrap().is_dir();
        // What is below a match is selected with it. `**` at the end is all that is below a directory.
        let is_match = |path: &&String| {
            let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
            patterns.iter().any(|text| {
                let of_dir = text.trim_end_matches("/**").trim_end_matches("**");
                let pattern: Vec<&str> = of_dir.split('/').filter(|part| !part.is_empty()).collect();
                let is_whole = of_dir.len() == text.len();
                (0..=parts.len()).any(|cut| {
                    naive(&pattern, &parts[..cut]) && (is_whole || is_dir(&parts[..cut].join("/")))
                })
            })
        };
        let expected: BTreeSet<String> = every.iter().filter(is_match).cloned().collect();
        let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
        let found: BTreeSet<String> = selected(&tree, &patterns)
            .into_iter()
            .filter(|path| !path.ends_with('?'))
            .collect();
        prop_assert_eq!(found, expected);
    }
}
