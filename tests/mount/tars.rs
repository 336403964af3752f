//! What tars say in ways that our own writer never does: sparse files of each kind, names and times of GNU, and layers
//! that end without an end. Seen in plain tar and in gzip.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};

use registryfs::demo::{Content, ImageBuilder, Layer};
use registryfs::digest::Digest;

use crate::world::World;

const SIZE: u64 = 3_000_000;
/// What is stored of the sparse files: places and lengths.
const SEGMENTS: [(u64, u64); 3] = [(0, 700), (1_000_001, 300_000), (2_999_000, 999)];

/// A block and its payload, padded. `edit` has the last word on the block.
fn entry(typeflag: u8, name: &[u8], payload: &[u8], edit: impl FnOnce(&mut [u8; 512])) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o640);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_700_000_000);
    header.set_size(payload.len() as u64);
    let block = header.as_mut_bytes();
    block[156] = typeflag;
    block[..name.len()].copy_from_slice(name);
    edit(block);
    header.set_cksum();
    let mut bytes = [header.as_bytes(), payload].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn pax(records: &[(&str, String)]) -> Vec<u8> {
    let mut payload = String::new();
    for (key, value) in records {
        // All of them are of two digits' length.
        payload += &format!("{:02} {key}={value}\n", key.len() + value.len() + 5);
    }
    entry(b'x', b"PaxHeader", payload.as_bytes(), |_| ())
}

fn content() -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    for (offset, bytes) in SEGMENTS {
        for at in offset..offset + bytes {
            content[at as usize] = (at % 251) as u8 + 1;
        }
    }
    content
}

fn stored() -> Vec<u8> {
    let content = content();
    let part = |(offset, bytes): (u64, u64)| content[offset as usize..(offset + bytes) as usize].to_vec();
    SEGMENTS.into_iter().flat_map(part).collect()
}

fn layer() -> Vec<u8> {
    let in_header = entry(b'S', b"gnu", &stored(), |block| {
        for (number, (offset, bytes)) in SEGMENTS.into_iter().enumerate() {
            let text = format!("{offset:011o}\0{bytes:011o}\0");
            block[386 + number * 24..410 + number * 24].copy_from_slice(text.as_bytes());
        }
        block[483..495].copy_from_slice(format!("{SIZE:011o}\0").as_bytes());
    });
    let mut map = format!("{}\n", SEGMENTS.len());
    for (offset, bytes) in SEGMENTS {
        map += &format!("{offset}\n{bytes}\n");
    }
    let mut in_front = map.into_bytes();
    in_front.resize(512, 0);
    in_front.extend(stored());
    let records = [
        ("GNU.sparse.major", "1".to_owned()),
        ("GNU.sparse.minor", "0".to_owned()),
        ("GNU.sparse.name", "pax".to_owned()),
        ("GNU.sparse.realsize", SIZE.to_string()),
        ("mtime", "1600000000.123456789".to_owned()),
    ];
    let hole = entry(b'S', b"hole", b"", |block| {
        block[483..495].copy_from_slice(format!("{SIZE:011o}\0").as_bytes());
    });
    let long = "n".repeat(200) + "\0";
    [
        in_header,
        pax(&records),
        entry(b'0', b"GNUSparseFile.1/pax", &in_front, |_| ()),
        hole,
        entry(b'L', b"././@LongLink", long.as_bytes(), |_| ()),
        entry(0, b"short", b"long", |_| ()),
        entry(0, b"dir/", b"", |_| ()),
        // A link has no payload, whatever its size says, and there is no end.
        entry(b'1', b"dir/caf\xe9", b"", |block| {
            block[157..160].copy_from_slice(b"gnu");
            block[124..135].copy_from_slice(b"00000777777");
        }),
    ]
    .concat()
}

/// A world with the layer as the only one of images `team/tar:1` and `team/gzip:1`.
fn world() -> World {
    let tar = layer();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&tar).unwrap();
    let diff_id = Digest::of(&tar);
    let mut content = Content::new();
    for (name, blob) in [("team/gzip", gzip.finish().unwrap()), ("team/tar", tar)] {
        let image = ImageBuilder::new(vec![Layer::raw(blob, diff_id)]).build();
        content.add_tagged_image(name, "1", &image);
    }
    World::new(content).mounted()
}

#[test]
fn sparse_files_have_their_holes() {
    let world = world();
    let content = content();
    for image in ["team/tar", "team/gzip"] {
        let rootfs = world.at(image).join("1/rootfs");
        for name in ["gnu", "pax"] {
            let file = fs::File::open(rootfs.join(name)).unwrap();
            assert_eq!(file.metadata().unwrap().len(), SIZE);
            // Inside of holes, across their borders, and at the end.
            for (offset, len) in [
                (800, 10),
                (690, 20),
                (999_990, 20),
                (1_300_000, 5000),
                (SIZE - 3, 3),
            ] {
                let mut part = vec![1; len];
                file.read_exact_at(&mut part, offset).unwrap();
                assert!(
                    part == content[offset as usize..][..len],
                    "{image} {name} at {offset}"
                );
            }
            assert!(fs::read(rootfs.join(name)).unwrap() == content, "{image} {name}");
        }
        assert!(fs::read(rootfs.join("hole")).unwrap() == vec![0; SIZE as usize]);
    }
}

#[test]
fn what_gnu_tar_says_is_understood() {
    let world = world();
    for image in ["team/tar", "team/gzip"] {
        let rootfs = world.at(image).join("1/rootfs");
        assert_eq!(fs::read(rootfs.join("n".repeat(200))).unwrap(), b"long");
        assert!(fs::metadata(rootfs.join("dir")).unwrap().is_dir());
        let named = fs::metadata(rootfs.join("dir").join(OsStr::from_bytes(b"caf\xe9"))).unwrap();
        let target = fs::metadata(rootfs.join("gnu")).unwrap();
        assert_eq!((named.ino(), named.nlink()), (target.ino(), 2));
        assert_eq!(
            (target.mode() & 0o7777, target.uid(), target.gid()),
            (0o640, 7, 8)
        );
        assert_eq!(target.mtime(), 1_700_000_000);
        let exact = fs::metadata(rootfs.join("pax")).unwrap();
        assert_eq!((exact.mtime(), exact.mtime_nsec()), (1_600_000_000, 123_456_789));
    }
}
