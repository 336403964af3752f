//! Damage: to images, which is noticed when they are opened; and to what they are made from, which ends in an error or in
//! an image on which the kernel does not stumble.

use std::fs;
use std::os::unix::ffi::OsStrExt;

use super::mounted::Mounted;
use super::*;
use crate::error::Error;
use crate::image::erofs::{identity, verify};
use crate::image::tree::Node;

/// Where the checksum is in trees and indexes; it covers everything behind itself.
const CRC_AT: usize = 12;
/// What EROFS says in the kernel's log of an image that is not as it should be.
const COMPLAINTS: [&str; 9] = [
    "bogus",
    "corrupt",
    "invalid",
    "unsupported",
    "negative",
    "across",
    "failed to",
    "WARNING",
    "BUG",
];

fn small() -> Merged {
    let mut attributes = Entry::new("d/x", Kind::File);
    (attributes.size, attributes.xattrs) = (9000, vec![(b"user.a".to_vec(), b"1".to_vec())]);
    let same = Entry {
        path: b"y".to_vec(),
        ..attributes.clone()
    };
    let link = |path: &str, kind, link: &str| Entry {
        link: link.into(),
        ..Entry::new(path, kind)
    };
    let entries = [
        (attributes, vec![4096, 4096]),
        (same, Vec::new()),
        (link("d/hard", Kind::Hardlink, "y"), Vec::new()),
        (link("soft", Kind::Symlink, "d/x"), Vec::new()),
        (Entry::new("null", Kind::Char), Vec::new()),
    ];
    Merged::new(&[entries.to_vec()])
}

fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let (head, covered) = bytes.split_at_mut(CRC_AT + 4);
    head[CRC_AT..].copy_from_slice(&crc32fast::hash(covered).to_le_bytes());
    bytes
}

#[test]
fn every_changed_byte_and_every_cut_of_an_image_is_noticed() {
    let merged = small();
    let indexes: Vec<_> = merged.layers.iter().collect();
    let identity = identity(&merged.tree, &indexes, &key());
    let good = merged.image().unwrap();
    verify(&mut good.as_slice(), &identity).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let noticed = verify(&mut bad.as_slice(), &identity);
        assert!(matches!(noticed, Err(Error::Malformed { .. })), "byte {at}");
    }
    for len in (0..good.len()).step_by(61) {
        assert!(verify(&mut &good[..len], &identity).is_err(), "cut to {len}");
    }
    assert!(verify(&mut good.as_slice(), &Digest::of(b"other")).is_err());
}

/// What is in the places of the files changes with the index, also where the tree stays.
#[test]
fn an_image_is_of_one_index() {
    let merged = small();
    let mut file = Entry::new("before", Kind::File);
    file.size = 1;
    let other = layer(&[(file, Vec::new())]);
    let of = |index: &Index<Vec<u8>>| identity(&merged.tree, &[index], &key());
    assert_ne!(of(&merged.layers[0]), of(&other));
}

/// What the kernel has said since its log was opened, if it is about an image.
struct Complaints(fs::File);

impl Complaints {
    fn new() -> Self {
        use std::io::{Seek, SeekFrom};
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = fs::File::options();
        let mut log = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .unwrap();
        log.seek(SeekFrom::End(0)).unwrap();
        Self(log)
    }

    fn read(&mut self) -> Vec<String> {
        use std::io::Read;
        let (mut record, mut complaints) = (vec![0; 16 << 10], Vec::new());
        loop {
            match self.0.read(&mut record) {
                Ok(bytes) => {
                    let line = String::from_utf8_lossy(&record[..bytes]).into_owned();
                    if line.contains("erofs") && COMPLAINTS.iter().any(|word| line.contains(word)) {
                        complaints.push(line);
                    }
                }
                // Records were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => return complaints,
            }
        }
    }
}

/// Reads all there is in a mount.
fn read_all(tree: &Tree<Vec<u8>>, mounted: &Mounted) {
    let mut open: Vec<(Vec<u8>, Node)> = vec![(Vec::new(), tree.node(0).unwrap())];
    while let Some((path, node)) = open.pop() {
        let place = mounted.path(&path);
        let stat = fs::symlink_metadata(&place).unwrap();
        let _ = rustix::fs::llistxattr(&place, &mut [0u8; 4096][..]);
        let _ = rustix::fs::lgetxattr(&place, "user.a", &mut [0u8; 4096][..]);
        match node.kind {
            Kind::Dir => {
                let names: Vec<_> = fs::read_dir(&place)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name())
                    .collect();
                assert_eq!(names.len(), node.child_count as usize);
                for name in names {
                    let child = tree.lookup(node.number, name.as_bytes()).unwrap().unwrap();
                    let path = if path.is_empty() {
                        Vec::new()
                    } else {
                        [&path[..], b"/"].concat()
                    };
                    open.push(([&path[..], name.as_bytes()].concat(), tree.node(child).unwrap()));
                }
            }
            Kind::Symlink => drop(fs::read_link(&place).unwrap()),
            Kind::File if stat.len() < 1 << 20 => drop(fs::read(&place).unwrap()),
            _ => {}
        }
    }
}

/// Changes each byte of a file that images are made from, and mounts what comes out.
fn try_changes(good: &[u8], make: &dyn Fn(Vec<u8>) -> Option<Merged>) {
    let dir = tempfile::tempdir().unwrap();
    let mut complaints = Complaints::new();
    let device = dir.path().join("device");
    let mut mounted_count = 0;
    for at in CRC_AT + 4..good.len() {
        for change in [0x01, 0xff] {
            let mut bad = good.to_vec();
            bad[at] ^= change;
            let Some(merged) = make(sealed(bad)) else { continue };
            let image = match merged.image() {
                Ok(image) => image,
                Err(Error::Malformed { .. } | Error::Unsupported { .. }) => continue,
                Err(error) => panic!("byte {at}: {error}"),
            };
            let path = dir.path().join("image");
            fs::write(&path, image).unwrap();
            let file = fs::File::create(&device).unwrap();
            file.set_len(merged.layers[0].summary().data_bytes.min(1 << 40))
                .unwrap();
            let mounted = Mounted::new(&path, &[device.clone(), device.clone(), device.clone()]).unwrap();
            read_all(&merged.tree, &mounted);
            mounted_count += 1;
            assert_eq!(complaints.read(), Vec::<String>::new(), "byte {at} ^ {change:x}");
        }
    }
    assert!(
        mounted_count > good.len() / 10,
        "{mounted_count} of {}",
        good.len()
    );
}

#[test]
fn the_kernel_does_not_stumble_on_a_changed_tree() {
    let merged = small();
    try_changes(merged.tree.source(), &|bytes| {
        let tree = Tree::open(bytes, &key()).ok()?;
        Some(Merged {
            tree,
            layers: small().layers,
        })
    });
}

#[test]
fn the_kernel_does_not_stumble_on_a_changed_index() {
    let merged = small();
    try_changes(merged.layers[0].source(), &|bytes| {
        let layers = vec![Index::open(bytes).ok()?];
        Some(Merged {
            tree: small().tree,
            layers,
        })
    });
}
