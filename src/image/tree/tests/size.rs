//! Trees that are large, deep or built to be a burden.

use super::*;
use crate::error::Error;

fn linked(path: String, kind: Kind, link: String) -> Entry {
    Entry {
        link: link.into(),
        ..Entry::new(path, kind)
    }
}

#[test]
fn a_directory_of_200_000_names_is_listed_and_searched() {
    let count = 200_000u32;
    let entries: Vec<_> = (0..count)
        .map(|number| Entry::new(format!("d/{}", number.wrapping_mul(7919) % count), Kind::File))
        .collect();
    let (tree, _) = merged(&[layer(&entries)], Whiteouts::Apply);
    let dir = tree.lookup(0, b"d").unwrap().unwrap();
    let node = tree.node(dir).unwrap();
    assert_eq!(node.child_count, count);
    let name = |position| tree.child_at(&node, position).unwrap().unwrap();
    assert!((1..count).all(|position| name(position - 1).0 < name(position).0));
    for number in (0..count).step_by(997) {
        let file = tree.lookup(dir, number.to_string().as_bytes()).unwrap().unwrap();
        let entry = tree.node(file).unwrap().entry.unwrap();
        assert_eq!(entries[entry as usize].path, format!("d/{number}").into_bytes());
    }
}

#[test]
fn a_path_of_999_components_is_walked_up_and_down() {
    let path = vec!["d"; 999].join("/");
    let lower = layer(&[Entry::new(path.clone(), Kind::File)]);
    let upper = layer(&[Entry::new(format!("{path}/.wh..wh..opq"), Kind::File)]);
    let (tree, _) = merged(&[lower, upper], Whiteouts::Apply);
    let file = tree.resolve(path.as_bytes(), true).unwrap();
    assert_eq!(file, 999);
    assert_eq!(tree.path_of(file).unwrap(), path.into_bytes());
}

#[test]
fn a_long_chain_of_hard_links_is_bound() {
    let last = 100_000;
    let mut entries: Vec<_> = (0..last)
        .map(|number| linked(number.to_string(), Kind::Hardlink, (number + 1).to_string()))
        .collect();
    entries.push(Entry::new(last.to_string(), Kind::File));
    let (tree, warnings) = merged(&[layer(&entries)], Whiteouts::Apply);
    assert_eq!(tree.node_count(), 2);
    assert_eq!(tree.node(1).unwrap().nlink, last + 1);
    assert_eq!(warnings.len(), 0);
}

#[test]
fn a_long_circle_of_hard_links_ends_and_warnings_are_counted() {
    let count = 100_000;
    let entries: Vec<_> = (0..count)
        .map(|number| {
            linked(
                number.to_string(),
                Kind::Hardlink,
                ((number + 1) % count).to_string(),
            )
        })
        .collect();
    let (tree, warnings) = merged(&[layer(&entries)], Whiteouts::Apply);
    assert_eq!(tree.node_count(), 1);
    assert_eq!(warnings.len(), 101);
    assert_eq!(warnings[100], "and 99900 more");
}

/// Each path takes 3,200 steps over two symlinks: a small image that would keep a core busy for long.
#[test]
fn symlinks_that_make_every_path_long_are_refused() {
    let detour = "a/../".repeat(800);
    let mut entries = vec![Entry::new("a", Kind::Dir), Entry::new("d", Kind::Dir)];
    for number in 0..2 {
        let target = match number {
            0 => format!("{detour}d"),
            _ => format!("{detour}l{}", number - 1),
        };
        entries.push(linked(format!("l{number}"), Kind::Symlink, target));
    }
    for number in 0..1000 {
        entries.push(Entry::new(format!("l1/d{number}/f"), Kind::File));
    }
    let index = layer(&entries);
    let refused = merge(&[&index], &key(), Whiteouts::Apply).unwrap_err();
    assert!(matches!(refused, Error::Malformed { .. }), "{refused}");
}

#[test]
fn equal_xattrs_are_stored_once() {
    let with_value = |number: usize, value: &[u8]| Entry {
        xattrs: vec![(b"user.a".to_vec(), value.to_vec())],
        ..Entry::new(format!("{number:04}"), Kind::File)
    };
    let value = [7; 10_000];
    let same: Vec<_> = (0..100).map(|number| with_value(number, &value)).collect();
    let (tree, _) = merged(&[layer(&same)], Whiteouts::Apply);
    assert!(tree.tree_bytes() < 20_000, "{}", tree.tree_bytes());
    let node = tree.node(100).unwrap();
    assert_eq!(tree.xattrs(&node).unwrap(), [(&b"user.a"[..], &value[..])]);
}

#[test]
fn an_image_without_layers_is_an_empty_directory() {
    let (tree, _) = merged(&[], Whiteouts::Apply);
    let root = tree.node(0).unwrap();
    assert_eq!((tree.node_count(), root.nlink, root.mode), (1, 2, 0o755));
    assert_eq!(tree.child_at(&root, 0).unwrap(), None);
}
