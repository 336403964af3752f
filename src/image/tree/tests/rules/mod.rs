//! The rules of merging, one test a case of the table of measured container engines (and the cases that implementers
//! were bitten by), under its column "recommended". Each layer is written as a tar, in eStargz, and read from its bytes,
//! but for what eStargz cannot say: names that are not UTF-8, and parts of a second.
//!
//! A tree is written as one line a name: path, type, layer; `D` is a directory that no entry stands for. Then, where
//! there is something to say, `->` the symlink's target, the size of a file, `x` the link count and `#` the number of
//! an inode with several names.

mod attributes;
mod hard_links;
mod parents;
mod whiteouts;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::layer::entry::Time;
use crate::layer::estargz::TOC_DIGEST_ANNOTATION;
use crate::layer::estargz::writer::{Options, write_layer};
use crate::layer::spool::InMemory;
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
        urls: Vec::new(),
    };
    let mut indexer = indexer(&descriptor, None, Arc::new(InMemory)).unwrap();
    let mut step = indexer.step(None).unwrap();
    loop {
        match step {
            Step::Need(range) => {
                let bytes = &blob[range.start as usize..range.end as usize];
                step = indexer.step(Some(bytes)).unwrap();
            }
            Step::Done(index) => return Index::open(index.to_vec()).unwrap(),
            other => panic!("{other:?}"),
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
