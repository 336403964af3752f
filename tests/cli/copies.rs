//! Images to copy, and what a copy of them has to look like.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use registryfs::demo::{Content, ImageBuilder, Layer};
use registryfs::layer::entry::{Entry, Kind, Time};

use crate::support::{self, File, dir, file, link};

/// The name of the image that [`content`] has.
pub(crate) const IMAGE: &str = "team/app:1.0";

/// Bytes that do not compress, different ones for each seed.
pub(crate) fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// A registry's content with one image of these layers, base first.
pub(crate) fn content(layers: &[&[File]]) -> Content {
    let layers: Vec<Layer> = layers.iter().map(|entries| support::layer(entries)).collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &ImageBuilder::new(layers).build());
    content
}

/// An image with one of each kind of thing, in two layers.
pub(crate) fn odd_image() -> [Vec<File>; 2] {
    let with = |(entry, payload): File, change: fn(&mut Entry)| {
        let mut entry = entry;
        change(&mut entry);
        (entry, payload)
    };
    let special = |path: &str, kind, rdev| {
        let mut entry = Entry::new(path, kind);
        entry.rdev = rdev;
        (entry, Vec::new())
    };
    let mut holes = vec![0; 300_000];
    holes[100_000] = 1;
    let lower = vec![
        with(dir("locked/"), |entry| entry.mode = 0o555),
        file("locked/inside", "in here"),
        with(dir("sticky/"), |entry| {
            (entry.mode, entry.uid, entry.gid) = (0o1777, 12, 34);
            entry.mtime = Time {
                seconds: 1_234_567_890,
                nanos: 0,
            };
            entry.xattrs = vec![(b"user.dir".to_vec(), b"\x00\xff".to_vec())];
        }),
        with(file("bin/su", noise(20_000, 1)), |entry| {
            (entry.mode, entry.uid, entry.gid) = (0o6755, 0, 7);
        }),
        with(file("bin/cap", "capable"), |entry| {
            let cap_net_raw =
                b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
            entry.xattrs = vec![
                (b"security.capability".to_vec(), cap_net_raw.to_vec()),
                (b"user.note".to_vec(), b"made up".to_vec()),
            ];
            (entry.uid, entry.gid) = (1000, 1000);
        }),
        with(file("readonly", "no one writes"), |entry| {
            entry.mode = 0o400;
            entry.mtime = Time { seconds: 1, nanos: 0 };
        }),
        file("empty", ""),
        file("holes", holes),
        file("replaced", "old"),
        file("deleted", "gone"),
        file(std::str::from_utf8(b"n\xc3\xa4me").unwrap(), "utf-8"),
    ];
    let mut raw = Entry::new(b"raw\xff\xfename".to_vec(), Kind::File);
    raw.uid = 5;
    let upper = vec![
        file("data/large", noise(2_500_000, 2)),
        link("bin/hard", Kind::Hardlink, "data/large"),
        link("data/also", Kind::Hardlink, "data/large"),
        link("sbin", Kind::Symlink, "bin"),
        link("absolute", Kind::Symlink, "/data/large"),
        link("dangling", Kind::Symlink, "nowhere/at/all"),
        with(link("owned", Kind::Symlink, "bin/su"), |entry| {
            (entry.uid, entry.gid) = (3, 4);
            entry.mtime = Time {
                seconds: 77,
                nanos: 0,
            };
        }),
        file("replaced", "new"),
        file(".wh.deleted", ""),
        special("null", Kind::Char, (1, 3)),
        special("loop", Kind::Block, (7, 300)),
        special("pipe", Kind::Fifo, (0, 0)),
        (raw, b"any bytes".to_vec()),
    ];
    [lower, upper]
}

/// Everything below a directory, by path, as one line each.
pub(crate) fn picture(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut seen = BTreeMap::new();
    let mut groups = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            let children = fs::read_dir(&path).unwrap().map(|child| child.unwrap().path());
            open.extend(children);
        } else {
            let inode: &mut Vec<Vec<u8>> = groups.entry(metadata.ino()).or_default();
            inode.push(relative(root, &path));
        }
        seen.insert(relative(root, &path), line(&path, &metadata));
    }
    for mut group in groups.into_values() {
        group.sort();
        for path in &group {
            let names: Vec<_> = group.iter().map(|name| String::from_utf8_lossy(name)).collect();
            seen.get_mut(path).unwrap().push_str(&format!(" names={names:?}"));
        }
    }
    seen
}

fn relative(root: &Path, path: &Path) -> Vec<u8> {
    path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec()
}

fn line(path: &Path, metadata: &Metadata) -> String {
    let kind = metadata.file_type();
    let content = match () {
        () if kind.is_file() => registryfs::digest::Digest::of(&fs::read(path).unwrap()).to_string(),
        () if kind.is_symlink() => format!("-> {:?}", fs::read_link(path).unwrap()),
        () if kind.is_char_device() || kind.is_block_device() => format!("device {:x}", metadata.rdev()),
        () => String::new(),
    };
    let size = if kind.is_dir() { 0 } else { metadata.size() };
    format!(
        "{:o} {}:{} {}.{} {size} {content} {:?}",
        metadata.mode(),
        metadata.uid(),
        metadata.gid(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        xattrs(path),
    )
}

/// The extended attributes of a path, a symlink not followed.
pub(crate) fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 4096];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..len]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 4096];
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        value.truncate(len);
        (String::from_utf8_lossy(name).into_owned(), value)
    };
    names.map(value).collect()
}

/// Names below a directory that are not to be there when nothing is under way.
pub(crate) fn leftovers(root: &Path) -> Vec<String> {
    let names = picture(root).into_keys();
    let names = names.map(|name| String::from_utf8_lossy(&name).into_owned());
    names.filter(|name| name.ends_with(".part")).collect()
}
