//! One image in every layer format: the same to whoever looks, and what looking costs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use registryfs::demo::{Record, sample_content};
use registryfs::digest::Digest;
use rustix::fs::{lgetxattr, llistxattr};

use crate::world::{World, first_byte};

/// What can be seen of one path.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    size: u64,
    rdev: u64,
    /// To the second: eStargz has no more.
    mtime: i64,
    /// Target of a symbolic link, digest of a file.
    content: String,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 4096];
    let length = llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 4096];
        let length = lgetxattr(path, name, &mut value[..]).unwrap();
        value[..length].to_vec()
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

fn look(path: &Path) -> Seen {
    let metadata = fs::symlink_metadata(path).unwrap();
    let kind = metadata.file_type();
    let content = match () {
        () if kind.is_symlink() => fs::read_link(path).unwrap().to_string_lossy().into_owned(),
        () if kind.is_file() => Digest::of(&fs::read(path).unwrap()).to_string(),
        () => String::new(),
    };
    Seen {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        links: metadata.nlink(),
        size: if kind.is_dir() { 0 } else { metadata.len() },
        rdev: metadata.rdev(),
        mtime: metadata.mtime(),
        content,
        xattrs: xattrs(path),
    }
}

/// Everything below `root`, by path.
fn tree(root: &Path) -> BTreeMap<Vec<u8>, Seen> {
    let mut seen = BTreeMap::from([(Vec::new(), look(root))]);
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
            seen.insert(name, look(&path));
            if entry.file_type().unwrap().is_dir() {
                open.push(path);
            }
        }
    }
    seen
}

/// Each format's repository, what `layers/N/format` says of it, and the requests from nothing to the first byte of a small
/// file.
const FORMATS: [(&str, &str, usize); 13] = [
    // The manifest, the tail of each layer, and the file.
    ("estargz", "estargz", 4),
    ("estargz-packed", "estargz", 4),
    ("stargz", "estargz", 4),
    // For each layer the image of TOCs and its TOC besides.
    ("external-toc", "estargz", 7),
    // The annotations say where the TOC is.
    ("zstd-chunked", "zstd:chunked", 4),
    ("zstd-chunked-stargz", "zstd:chunked", 4),
    // The manifest, the SOCI index, a zTOC for each layer, and one span.
    ("soci", "soci", 5),
    // The manifest, the configuration with the digests of the tars, and each layer once.
    ("tar", "tar", 4),
    ("gzip", "gzip", 4),
    ("gzip-members", "gzip", 4),
    ("zstd", "zstd", 4),
    ("zstd-frames", "zstd", 4),
    ("docker", "gzip", 4),
];

fn lines(records: &[Record]) -> Vec<String> {
    let line = |record: &Record| format!("{} {} {:?}", record.method, record.path, record.range);
    records.iter().map(line).collect()
}

#[test]
fn every_format_shows_the_same_tree() {
    let content = sample_content().unwrap();
    let known = content
        .names()
        .filter(|name| name.starts_with("formats/"))
        .count();
    assert_eq!(known, FORMATS.len());
    let world = World::new(content).mounted();
    let expected = tree(&world.at("formats/tar/1.0/rootfs"));
    assert!(expected.len() > 60, "{} paths", expected.len());
    for (name, format, _) in FORMATS {
        let image = world.at(&format!("formats/{name}/1.0"));
        let seen = tree(&image.join("rootfs"));
        for (path, seen) in &seen {
            let path_text = String::from_utf8_lossy(path);
            assert_eq!(Some(seen), expected.get(path), "{name}: {path_text}");
        }
        assert_eq!(seen.len(), expected.len(), "{name}");
        for layer in 0..2 {
            let said = fs::read_to_string(image.join(format!("layers/{layer}/format"))).unwrap();
            assert_eq!(said.lines().next(), Some(format), "{name}");
        }
    }
}

#[test]
fn a_small_file_costs_what_its_format_lets_it_cost() {
    let content = sample_content().unwrap();
    for (name, _, cost) in FORMATS {
        let world = World::new(content.clone()).mounted();
        let path = world.at(&format!("formats/{name}/1.0/rootfs/etc/hostname"));
        let (byte, cold) = world.requests(|| first_byte(&path));
        assert_eq!(byte, b'd');
        assert_eq!(cold.len(), cost, "{name}: {:#?}", lines(&cold));
        world.restart();
        let (_, again) = world.requests(|| first_byte(&path));
        assert_eq!(again.len(), 0, "{name}: {:#?}", lines(&again));
    }
}
