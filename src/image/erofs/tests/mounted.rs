//! Mounting images from files, as root, attached nowhere; and comparing what the kernel shows with the tree.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use tempfile::TempDir;

use super::*;
use crate::image::erofs::chunks::{DEVICES_PER_LAYER, SMALL_BYTES_MAX};
use crate::image::tree::Node;

/// So much of each end of a file has content that is compared.
const WINDOW: u64 = 20_000;
/// What an invalid owner is shown as.
const NOBODY: u32 = 65534;

/// A mount. It is gone when this is dropped.
pub(super) struct Mounted {
    root: OwnedFd,
}

impl Mounted {
    pub(super) fn new(image: &Path, devices: &[PathBuf]) -> rustix::io::Result<Self> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", image)?;
        fsconfig_set_flag(&context, "ro")?;
        for device in devices {
            fsconfig_set_string(&context, "device", device)?;
        }
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self { root })
    }

    pub(super) fn path(&self, inner: &[u8]) -> PathBuf {
        let root = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        root.join(OsStr::from_bytes(inner))
    }
}

/// A byte of a device that is not zero, and not the same in neighbours of any kind.
fn pattern(device: usize, offset: u64) -> u8 {
    let block = offset / 4096;
    ((offset + block * 131 + device as u64 * 17) % 255) as u8 + 1
}

/// The ranges of a file that are compared.
fn windows(size: u64) -> [(u64, u64); 2] {
    let start = size.min(WINDOW);
    [(0, start), (size.saturating_sub(WINDOW).max(start), size)]
}

/// What the tree and the indexes say that a file has in a range.
fn expected(merged: &Merged, node: &Node, (start, end): (u64, u64)) -> Vec<u8> {
    let mut bytes = vec![0; (end - start) as usize];
    let index = &merged.layers[usize::from(node.layer)];
    let entry = index.entry(node.entry.unwrap()).unwrap();
    for number in entry.chunk_range() {
        let chunk = index.chunk(number).unwrap();
        let at = chunk.data_offset - entry.data_offset;
        for position in at.max(start)..(at + chunk.bytes).min(end) {
            let place = entry.data_offset + position;
            bytes[(position - start) as usize] = pattern(usize::from(node.layer), place);
        }
    }
    bytes
}

/// The image and its devices as files, of which the devices have content where it is compared.
pub(super) fn files(merged: &Merged, image: &[u8], dir: &TempDir) -> (PathBuf, Vec<PathBuf>) {
    let path = dir.path().join("image");
    fs::write(&path, image).unwrap();
    let mut devices = Vec::new();
    let mut opened = Vec::new();
    let sizes = merged
        .layers
        .iter()
        .flat_map(|index| [index.summary().data_bytes.max(4096); DEVICES_PER_LAYER]);
    for (number, bytes) in sizes.chain([4096]).enumerate() {
        let device = dir.path().join(number.to_string());
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .open(&device)
            .unwrap();
        file.set_len(bytes).unwrap();
        opened.push(file);
        devices.push(device);
    }
    for number in 0..merged.tree.node_count() {
        let node = merged.tree.node(number).unwrap();
        if node.kind == Kind::File && node.size > 0 {
            let index = &merged.layers[usize::from(node.layer)];
            let place = index.entry(node.entry.unwrap()).unwrap().data_offset;
            // What is on the wrong one of the layer's devices is not found.
            let device = usize::from(node.layer) * DEVICES_PER_LAYER;
            let device = device + usize::from(node.size > SMALL_BYTES_MAX);
            for window in windows(node.size) {
                let bytes = expected(merged, &node, window);
                opened[device].write_all_at(&bytes, place + window.0).unwrap();
            }
        }
    }
    (path, devices)
}

/// Writes the image, mounts it, and compares everything.
pub(super) fn mount_and_compare(merged: &Merged) {
    let dir = tempfile::tempdir().unwrap();
    let image = merged.image().unwrap();
    let (image, devices) = files(merged, &image, &dir);
    let mounted = Mounted::new(&image, &devices).unwrap();
    compare(merged, &mounted);
}

fn compare(merged: &Merged, mounted: &Mounted) {
    let tree = &merged.tree;
    let mut inos: BTreeMap<u64, u32> = BTreeMap::new();
    let mut open = vec![(Vec::new(), tree.node(0).unwrap())];
    while let Some((path, node)) = open.pop() {
        let stat = fs::symlink_metadata(mounted.path(&path)).unwrap();
        let shown = String::from_utf8_lossy(&path).into_owned();
        assert_eq!(
            *inos.entry(stat.ino()).or_insert(node.number),
            node.number,
            "{shown}"
        );
        attributes(&node, &stat, &shown);
        xattrs(tree, &node, &mounted.path(&path), &shown);
        match node.kind {
            Kind::Dir => {
                let names = names(tree, &node, &mounted.path(&path), &shown);
                open.extend(names.into_iter().map(|(name, child)| {
                    let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                    ([&path, separator, &name].concat(), tree.node(child).unwrap())
                }));
            }
            Kind::Symlink => {
                let target = fs::read_link(mounted.path(&path)).unwrap();
                assert_eq!(
                    target.as_os_str().as_bytes(),
                    tree.link(&node).unwrap(),
                    "{shown}"
                );
            }
            Kind::File => content(merged, &node, &mounted.path(&path), &shown),
            _ => {}
        }
    }
    assert!(!inos.contains_key(&0), "an inode number that readdir leaves out");
    assert_eq!(inos.len(), tree.node_count() as usize);
}

fn attributes(node: &Node, stat: &fs::Metadata, shown: &str) {
    let kind = match stat.mode() & libc::S_IFMT {
        libc::S_IFDIR => Kind::Dir,
        libc::S_IFREG => Kind::File,
        libc::S_IFLNK => Kind::Symlink,
        libc::S_IFCHR => Kind::Char,
        libc::S_IFBLK => Kind::Block,
        libc::S_IFIFO => Kind::Fifo,
        other => panic!("{shown}: type {other:o}"),
    };
    let id = |id: u32| if id == u32::MAX { NOBODY } else { id };
    let rdev = (stat.rdev() >> 8 & 0xfff) as u32;
    let minor = (stat.rdev() & 0xff | stat.rdev() >> 12 & 0xfff00) as u32;
    let is = (kind, stat.mode() & 0o7777, stat.uid(), stat.gid(), stat.nlink());
    let owner = (id(node.uid), id(node.gid));
    assert_eq!(
        is,
        (node.kind, node.mode, owner.0, owner.1, u64::from(node.nlink)),
        "{shown}"
    );
    let is = (
        stat.size(),
        stat.blocks(),
        stat.mtime(),
        stat.mtime_nsec(),
        (rdev, minor),
    );
    let time = (node.mtime.seconds, i64::from(node.mtime.nanos));
    let device = (node.rdev.0 & 0xfff, node.rdev.1 & 0xf_ffff);
    assert_eq!(is, (node.size, node.sectors(), time.0, time.1, device), "{shown}");
}

fn xattrs(tree: &Tree<Vec<u8>>, node: &Node, path: &Path, shown: &str) {
    let wanted = tree.xattrs(node).unwrap();
    let mut names = vec![0; 1 << 17];
    let bytes = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut names: Vec<&[u8]> = names[..bytes].split(|&byte| byte == 0).collect();
    assert_eq!(names.pop(), Some(&b""[..]));
    let wanted_names: Vec<&[u8]> = wanted.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, wanted_names, "{shown}");
    for (name, value) in wanted {
        let mut read = vec![0; 1 << 17];
        // The VFS keeps `user.` of other types from everyone.
        if name.starts_with(b"user.") && !matches!(node.kind, Kind::File | Kind::Dir) {
            continue;
        }
        let result = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut read[..]);
        match result {
            Ok(bytes) => assert_eq!(&read[..bytes], value, "{shown} {name:?}"),
            // On a symlink no ACL is ever looked at.
            Err(rustix::io::Errno::OPNOTSUPP) if node.kind == Kind::Symlink => {}
            Err(error) => panic!("{shown} {:?}: {error}", String::from_utf8_lossy(name)),
        }
    }
    let absent = rustix::fs::lgetxattr(path, "security.absent", &mut [0u8; 16][..]);
    assert_eq!(absent.unwrap_err(), rustix::io::Errno::NODATA, "{shown}");
}

/// Compares the names in a directory, and looks up some that are not there.
fn names(tree: &Tree<Vec<u8>>, dir: &Node, path: &Path, shown: &str) -> Vec<(Vec<u8>, u32)> {
    let mut wanted = Vec::new();
    while let Some((name, child)) = tree.child_at(dir, wanted.len() as u32).unwrap() {
        wanted.push((name.to_vec(), child));
    }
    let fd = rustix::fs::openat(
        CWD,
        path,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    );
    let mut seen: Vec<(Vec<u8>, u64)> = rustix::fs::Dir::read_from(fd.unwrap())
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().to_bytes().to_vec(), entry.ino())
        })
        .collect();
    assert!(seen.is_sorted(), "{shown}");
    let ino = |name: &[u8]| {
        fs::symlink_metadata(path.join(OsStr::from_bytes(name)))
            .unwrap()
            .ino()
    };
    for (name, number) in &seen {
        assert!(name == b".." || *number == ino(name), "{shown}/{name:?}");
    }
    seen.retain(|(name, _)| name != b"." && name != b"..");
    assert_eq!(seen.len(), wanted.len(), "{shown}");
    assert!(
        seen.iter().zip(&wanted).all(|(seen, wanted)| seen.0 == wanted.0),
        "{shown}"
    );
    for (name, _) in wanted.iter().take(20) {
        let shorter = name[..name.len() - 1].to_vec();
        let mut other = name.clone();
        *other.last_mut().unwrap() ^= 1;
        let longer = [name, &b"x"[..]].concat();
        for absent in [shorter, other, longer] {
            let is_name = !absent.is_empty() && absent.len() < 256 && !absent.contains(&0);
            let is_name = is_name && !absent.contains(&b'/') && absent != b"." && absent != b"..";
            if is_name && wanted.binary_search_by(|(name, _)| name.cmp(&absent)).is_err() {
                let error = fs::symlink_metadata(path.join(OsStr::from_bytes(&absent))).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{shown}/{absent:?}");
            }
        }
    }
    wanted
}

fn content(merged: &Merged, node: &Node, path: &Path, shown: &str) {
    let file = File::open(path).unwrap();
    for window in windows(node.size) {
        let wanted = if node.size > 0 {
            expected(merged, node, window)
        } else {
            Vec::new()
        };
        let mut read = vec![0; wanted.len()];
        file.read_exact_at(&mut read, window.0).unwrap();
        assert!(read == wanted, "{shown}: {window:?} of {}", node.size);
    }
    assert_eq!(file.read_at(&mut [0; 16], node.size).unwrap(), 0, "{shown}");
}
