//! What images hold, case by case.

use std::process::Command;

use super::mounted::{Mounted, files, mount_and_compare};
use super::*;
use crate::error::Error;
use crate::image::erofs::{UUID_PREFIX, dir_bytes, probe, uuid};

fn linked(path: &str, kind: Kind, link: &[u8]) -> Entry {
    Entry {
        link: link.to_vec(),
        ..Entry::new(path, kind)
    }
}

fn file(path: impl Into<Vec<u8>>, size: u64) -> Entry {
    Entry {
        size,
        ..Entry::new(path, Kind::File)
    }
}

/// Something of everything.
fn various() -> Merged {
    let mut device = Entry::new("d/device", Kind::Char);
    device.rdev = (1, 3);
    let mut attributes = file("d/attributes", 4097);
    attributes.xattrs = vec![
        (b"user.a".to_vec(), b"1".to_vec()),
        (b"user.b".to_vec(), vec![7; 5000]),
    ];
    let same = Entry {
        path: b"d/same".to_vec(),
        ..attributes.clone()
    };
    let mut alone = Entry::new("e", Kind::Dir);
    alone.xattrs = vec![(b"user.c".to_vec(), vec![8; 3000])];
    let long = vec![b'l'; 4095];
    let lower = [
        file("d/file", 5000),
        file("d/empty", 0),
        linked("d/hard", Kind::Hardlink, b"d/file"),
        linked("d/link", Kind::Symlink, b"file"),
        linked("d/long", Kind::Symlink, &long),
        Entry::new("d/fifo", Kind::Fifo),
        Entry::new("d/block", Kind::Block),
        device,
        attributes,
    ];
    let upper = [same, alone, file("d/over", 3 << 20)];
    let plain = |entries: &[Entry]| entries.iter().map(|entry| (entry.clone(), Vec::new())).collect();
    Merged::new(&[plain(&lower), plain(&upper)])
}

#[test]
fn every_type_of_file_is_shown() {
    mount_and_compare(&various());
}

/// The tools of the format's authors.
#[test]
fn erofs_utils_accept_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let merged = various();
    let (image, devices) = files(&merged, &merged.image().unwrap(), &dir);
    let run = |command: &mut Command| {
        for device in &devices {
            command.arg(format!("--device={}", device.display()));
        }
        let output = command.arg(&image).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    let target = dir.path().join("extracted");
    run(Command::new("fsck.erofs").arg(format!("--extract={}", target.display())));
    let extracted = std::fs::read(target.join("d/over")).unwrap();
    let mounted = Mounted::new(&image, &devices).unwrap();
    assert!(extracted == std::fs::read(mounted.path(b"d/over")).unwrap());
    let said = run(&mut Command::new("dump.erofs"));
    assert!(
        said.contains("registryfs") || said.contains("rgstryfs") || said.contains("72677374"),
        "{said}"
    );
}

#[test]
fn files_of_all_sizes_lie_at_all_places() {
    const GIB: u64 = 1 << 30;
    let sizes = [
        1,
        4096,
        4097,
        64 << 10,
        (64 << 10) + 1,
        4 * GIB - 1,
        4 * GIB,
        4 * GIB + 1,
        4 << 40,
        (4 << 40) - 20 * GIB,
        5,
        GIB,
    ];
    let entries: Vec<Entry> = sizes
        .iter()
        .enumerate()
        .map(|(number, &size)| file(number.to_string(), size))
        .collect();
    let merged = Merged::of(&entries);
    assert!(merged.layers[0].summary().data_bytes > (8 << 40) - 20 * GIB);
    mount_and_compare(&merged);
    // However large, a file takes up one inode and one chunk.
    assert!(merged.image().unwrap().len() <= 4 * 4096);
}

#[test]
fn holes_are_not_read_from_the_device() {
    const MIB: u64 = 1 << 20;
    let sparse = vec![(file("sparse", 100 * MIB), vec![MIB, 98 * MIB])];
    let merged = Merged::new(&[sparse]);
    mount_and_compare(&merged);
    let dir = tempfile::tempdir().unwrap();
    let (image, devices) = files(&merged, &merged.image().unwrap(), &dir);
    // A device that would show its content in the hole shows that it is not asked.
    std::fs::write(&devices[1], vec![7; 100 << 20]).unwrap();
    let mounted = Mounted::new(&image, &devices).unwrap();
    let content = std::fs::read(mounted.path(b"sparse")).unwrap();
    let hole = MIB as usize..99 * MIB as usize;
    assert!(content[hole.clone()].iter().all(|&byte| byte == 0));
    assert!(
        content[..hole.start]
            .iter()
            .chain(&content[hole.end..])
            .all(|&byte| byte == 7)
    );
}

#[test]
fn a_table_of_holes_is_short_however_large_the_file() {
    let pieces = (0..1000).map(|_| 1 << 30).collect();
    let merged = Merged::new(&[vec![(file("sparse", 4 << 40), pieces)]]);
    mount_and_compare(&merged);
    assert!(merged.image().unwrap().len() <= 4 * 4096);
}

#[test]
fn a_directory_of_200_000_names_is_complete() {
    const COUNT: u32 = 200_000;
    let entries: Vec<_> = (0..COUNT)
        .map(|number| file(format!("d/{}", number.wrapping_mul(7919) % COUNT), 0))
        .collect();
    let merged = Merged::of(&entries);
    let dir = tempfile::tempdir().unwrap();
    let (image, devices) = files(&merged, &merged.image().unwrap(), &dir);
    let mounted = Mounted::new(&image, &devices).unwrap();
    let seen = std::fs::read_dir(mounted.path(b"d")).unwrap();
    let mut seen: Vec<u32> = seen
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..COUNT));
    for number in (0..COUNT).step_by(997) {
        let is_there = |name: String| mounted.path(name.as_bytes()).exists();
        assert!(is_there(format!("d/{number}")) && !is_there(format!("d/{number}x")));
    }
}

/// Numbers of names around those where a directory's content moves from behind its inode to blocks, and begins another.
#[test]
fn directories_of_every_size_are_complete() {
    let counts = (1..4).chain(248..256).chain(506..512);
    let entries: Vec<_> = counts
        .flat_map(|count| (0..count).map(move |name| file(format!("{count}/{name:04}"), 0)))
        .collect();
    mount_and_compare(&Merged::of(&entries));
}

#[test]
fn the_size_of_a_directory_is_decided_by_its_names() {
    let size = |names: &[&str]| dir_bytes(names.iter().map(|name| name.as_bytes()));
    assert_eq!(size(&[]), 27);
    assert_eq!(size(&["!"]), 40);
    let names: Vec<String> = (0..17).map(|number| format!("{number:0240}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    // 27 bytes and 16 times 252 are 4059, and one more does not fit.
    assert_eq!(size(&names[..16]), 4059);
    assert_eq!(size(&names), 4096 + 252);
}

#[test]
fn equal_attributes_are_kept_once() {
    let with = |number: usize, value: usize| Entry {
        xattrs: vec![(b"user.a".to_vec(), vec![value as u8; 3000])],
        ..Entry::new(format!("{number:04}"), Kind::File)
    };
    let same = Merged::of(&Vec::from_iter((0..100).map(|number| with(number, 0))));
    let different = Merged::of(&Vec::from_iter((0..100).map(|number| with(number, number))));
    let (same_bytes, different_bytes) = (same.image().unwrap().len(), different.image().unwrap().len());
    assert!(same_bytes < 24_000, "{same_bytes}");
    assert!(different_bytes > 300_000, "{different_bytes}");
    mount_and_compare(&same);
    mount_and_compare(&different);
}

#[test]
fn attributes_beyond_the_format_are_refused_by_path() {
    let refused = |xattrs: Vec<(Vec<u8>, Vec<u8>)>| {
        let entry = Entry {
            xattrs,
            ..Entry::new("d/f", Kind::File)
        };
        match Merged::of(&[entry]).image() {
            Err(Error::Unsupported { what, .. }) => assert_eq!(what, "/d/f"),
            outcome => panic!("{:?}", outcome.map(|image| image.len())),
        }
    };
    refused(vec![(b"user.big".to_vec(), vec![0; 1 << 16])]);
    refused(vec![(b"user.".to_vec(), vec![])]);
    let many = |count: usize| (0..count).map(|n| (format!("user.{n}").into_bytes(), vec![n as u8; 1500]));
    refused(many(256).collect());
    let fits = Entry {
        xattrs: many(255).collect(),
        ..Entry::new("d/f", Kind::File)
    };
    mount_and_compare(&Merged::of(&[fits]));
}

#[test]
fn many_layers_have_a_device_each() {
    let layers: Vec<_> = (0..127)
        .map(|number| vec![(file(format!("f{number}"), 5000), Vec::new())])
        .collect();
    mount_and_compare(&Merged::new(&layers));
    mount_and_compare(&Merged::new(&[]));
}

#[test]
fn the_probe_has_two_different_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let (image, device) = (dir.path().join("image"), dir.path().join("device"));
    std::fs::write(&image, probe::image().unwrap()).unwrap();
    std::fs::write(&device, probe::content()).unwrap();
    let mounted = Mounted::new(&image, &[device]).unwrap();
    let content = std::fs::read(mounted.path(probe::NAME.as_bytes())).unwrap();
    assert_eq!(content.len() as u64, probe::BYTES);
    assert!(content == probe::content());
    let (one, two) = content.split_at(4096);
    assert!(!content.contains(&0) && one.iter().zip(two).all(|(one, two)| one != two));
}

#[test]
fn an_image_can_be_recognised_by_its_uuid() {
    let image = various().image().unwrap();
    assert_eq!(image[1024 + 48..1024 + 64], uuid(&key()));
    assert!(uuid(&key()).starts_with(&UUID_PREFIX));
    assert_ne!(uuid(&key()), uuid(&Digest::of(b"other")));
}
