//! Random tars, in random pieces, against what they were made from; and bytes changed at random.

use proptest::prelude::*;
use proptest::sample::Index;

use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::tar::tests::raw::{Raw, padded, pax, sparse};
use crate::layer::tar::tests::{Read, read, read_in};
use crate::layer::tar::write::tests::any_entry;
use crate::layer::tar::{END_BYTES, header};

/// Lengths of pieces, small and large.
fn any_pieces() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1..20usize, 500..530usize, 1..5000usize], 1..6)
}

fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..1500)
}

/// An entry and its content, of which it has some only if it is a file.
fn any_content() -> impl Strategy<Value = (Entry, Vec<u8>)> {
    (any_entry(), any_payload()).prop_map(|(entry, payload)| {
        let payload = if entry.kind == Kind::File {
            payload
        } else {
            Vec::new()
        };
        let size = payload.len() as u64;
        (Entry { size, ..entry }, payload)
    })
}

/// The ways in which a sparse file is written.
#[derive(Debug, Clone, Copy)]
enum Form {
    OldGnu,
    Pax0_0,
    Pax0_1,
    Pax1_0,
}

/// A sparse file in some form: its tar, and what it must read as.
fn any_sparse() -> impl Strategy<Value = (Vec<u8>, Read)> {
    let form = prop_oneof![
        Just(Form::OldGnu),
        Just(Form::Pax0_0),
        Just(Form::Pax0_1),
        Just(Form::Pax1_0)
    ];
    // The gap in front of each segment, and its length: either may be nothing.
    let parts = prop::collection::vec((0..50u64, 0..50u64), 0..60);
    (form, parts, 0..50u64).prop_map(|(form, parts, tail)| {
        let (mut segments, mut content, mut stored) = (Vec::new(), Vec::new(), Vec::new());
        let mut is_stored = Vec::new();
        for (gap, bytes) in parts {
            content.resize(content.len() + gap as usize, 0);
            is_stored.resize(content.len(), false);
            segments.push((content.len() as u64, bytes));
            for _ in 0..bytes {
                let byte = (stored.len() % 255) as u8 + 1;
                stored.push(byte);
                content.push(byte);
            }
            is_stored.resize(content.len(), true);
        }
        content.resize(content.len() + tail as usize, 0);
        is_stored.resize(content.len(), false);
        let tar = write(form, content.len() as u64, &segments, &stored);
        let mut holes: Vec<std::ops::Range<u64>> = Vec::new();
        for at in (0..content.len()).filter(|&at| !is_stored[at]) {
            match holes.last_mut() {
                Some(hole) if hole.end == at as u64 => hole.end += 1,
                _ => holes.push(at as u64..at as u64 + 1),
            }
        }
        let entry = Entry {
            size: content.len() as u64,
            ..Entry::new("sparse", Kind::File)
        };
        (
            tar,
            Read {
                entry,
                content,
                holes,
            },
        )
    })
}

fn write(form: Form, size: u64, segments: &[(u64, u64)], stored: &[u8]) -> Vec<u8> {
    let numbers: Vec<String> = segments
        .iter()
        .map(|(offset, bytes)| format!("{offset},{bytes}"))
        .collect();
    let mut of = vec![
        ("GNU.sparse.size", size.to_string()),
        ("GNU.sparse.numblocks", segments.len().to_string()),
    ];
    match form {
        Form::OldGnu => return old_gnu(size, segments, stored),
        Form::Pax1_0 => return sparse("sparse", size, segments, stored),
        Form::Pax0_1 => of.extend([
            ("GNU.sparse.major", "0".to_owned()),
            ("GNU.sparse.minor", "1".to_owned()),
            ("GNU.sparse.map", numbers.join(",")),
        ]),
        Form::Pax0_0 => {
            of.extend([
                ("GNU.sparse.major", "0".to_owned()),
                ("GNU.sparse.minor", "0".to_owned()),
            ]);
            for (offset, bytes) in segments {
                of.push(("GNU.sparse.offset", offset.to_string()));
                of.push(("GNU.sparse.numbytes", bytes.to_string()));
            }
        }
    }
    let file = Raw::ustar(b'0', "sparse", stored.len() as u64).with(stored);
    [pax(&of), file].concat()
}

fn old_gnu(size: u64, segments: &[(u64, u64)], stored: &[u8]) -> Vec<u8> {
    let table = |segments: &[(u64, u64)]| -> Vec<u8> {
        let texts = segments
            .iter()
            .map(|(offset, bytes)| format!("{offset:011o}\0{bytes:011o}\0"));
        texts.collect::<String>().into_bytes()
    };
    let (first, rest) = segments.split_at(segments.len().min(4));
    let mut blocks: Vec<Vec<u8>> = rest.chunks(21).map(table).collect();
    for block in &mut blocks {
        block.resize(512, 0);
        block[504] = 1;
    }
    if let Some(last) = blocks.last_mut() {
        last[504] = 0;
    }
    let head = Raw::gnu(b'S', "sparse", stored.len() as u64)
        .put(386, &table(first))
        .put(482, &[u8::from(!blocks.is_empty())])
        .put(483, format!("{size:011o}\0").as_bytes());
    [head.finish(), blocks.concat(), padded(stored)].concat()
}

proptest! {
    #[test]
    fn what_was_written_is_read_back(
        files in prop::collection::vec(prop_oneof![
            any_content().prop_map(|(entry, content)| {
                let tar = [header(&entry).unwrap(), padded(&content)].concat();
                (tar, Read { entry, content, holes: Vec::new() })
            }),
            any_sparse(),
        ], 0..5),
        pieces in any_pieces(),
    ) {
        let (tars, expected): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let tar = [tars.concat(), vec![0; END_BYTES]].concat();
        prop_assert_eq!(read_in(&tar, &pieces).unwrap(), expected);
    }

    #[test]
    fn what_another_writer_wrote_is_read(
        files in prop::collection::vec(any_content(), 0..5),
        is_gnu in any::<bool>(),
        pieces in any_pieces(),
    ) {
        let mut builder = ::tar::Builder::new(Vec::new());
        let mut expected = Vec::new();
        for (entry, content) in files {
            let entry = Entry { mtime: Time { seconds: entry.mtime.seconds.max(0), nanos: 0 }, ..entry };
            // The crate writes neither names above the root nor numbers that ustar has no room for.
            let path = format!("p{}x", String::from_utf8_lossy(&entry.path).replace("..", "_"));
            let entry = Entry { path: path.clone().into_bytes(), uid: entry.uid & 0xffff, gid: entry.gid & 0xffff, ..entry };
            let mut head = if is_gnu { ::tar::Header::new_gnu() } else { ::tar::Header::new_ustar() };
            head.set_entry_type(::tar::EntryType::new(match entry.kind {
                Kind::File => b'0',
                Kind::Hardlink => b'1',
                Kind::Symlink => b'2',
                Kind::Char => b'3',
                Kind::Block => b'4',
                Kind::Dir => b'5',
                Kind::Fifo => b'6',
            }));
            head.set_mode(entry.mode);
            head.set_uid(entry.uid.into());
            head.set_gid(entry.gid.into());
            head.set_mtime(entry.mtime.seconds as u64);
            head.set_size(entry.size);
            head.set_device_major(entry.rdev.0).unwrap();
            head.set_device_minor(entry.rdev.1).unwrap();
            let records: Vec<(String, &[u8])> = entry.xattrs.iter()
                .map(|(name, value)| (format!("SCHILY.xattr.{}", String::from_utf8_lossy(name)), &value[..]))
                .collect();
            builder.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), *value))).unwrap();
            let written = if matches!(entry.kind, Kind::Symlink | Kind::Hardlink) {
                builder.append_link(&mut head, &path, String::from_utf8_lossy(&entry.link).as_ref())
            } else {
                builder.append_data(&mut head, &path, &content[..])
            };
            // Ustar has no room for some names, and a part of the entry may be written then.
            if written.is_err() {
                return Ok(());
            }
            // It writes names as it has understood them.
            let is_same = |read: &Read| Entry { path: Vec::new(), link: Vec::new(), ..read.entry.clone() };
            expected.push((is_same(&Read { entry, content: Vec::new(), holes: Vec::new() }), path, content));
        }
        let tar = builder.into_inner().unwrap();
        let found = read_in(&tar, &pieces).unwrap();
        prop_assert_eq!(found.len(), expected.len());
        for (read, (entry, path, content)) in found.into_iter().zip(expected) {
            let parts = |path: &[u8]| crate::layer::entry::clean_path(path).path;
            prop_assert_eq!(parts(&read.entry.path), parts(path.as_bytes()));
            prop_assert_eq!(Entry { path: Vec::new(), link: Vec::new(), ..read.entry }, entry);
            prop_assert_eq!(read.content, content);
        }
    }

    #[test]
    fn changed_bytes_are_refused_or_read_the_same_in_all_pieces(
        files in prop::collection::vec(any_sparse(), 1..3),
        (entry, content) in any_content(),
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..4),
        cut in any::<Index>(),
        pieces in any_pieces(),
    ) {
        let mut tar: Vec<u8> = files.into_iter().flat_map(|(tar, _)| tar).collect();
        tar.extend(header(&entry).unwrap());
        tar.extend(padded(&content));
        for (at, byte) in changes {
            let at = at.index(tar.len());
            tar[at] = byte;
            // With a checksum that is right again, the change is understood and not just noticed.
            let block = at / 512 * 512;
            if let Some(block) = tar.get_mut(block..block + 512) {
                let fixed = Raw::of(block.try_into().unwrap()).finish();
                if block[257..262] == *b"ustar" {
                    block.copy_from_slice(&fixed);
                }
            }
        }
        prop_assert_eq!(read_in(&tar, &pieces).ok(), read(&tar).ok());
        tar.truncate(cut.index(tar.len()));
        prop_assert_eq!(read_in(&tar, &pieces).ok(), read(&tar).ok());
    }

    #[test]
    fn random_blocks_never_panic(
        blocks in prop::collection::vec((prop::collection::vec(any::<u8>(), 512), any::<u8>()), 1..5),
    ) {
        let block = |(bytes, typeflag): &(Vec<u8>, u8)| {
            let flags = b"0\x001234567xgLKS";
            let flag = flags[usize::from(*typeflag) % flags.len()];
            // A small size and a magic number let more than the first block be looked at.
            let block: [u8; 512] = bytes.clone().try_into().unwrap();
            Raw::of(block).put(156, &[flag]).put(257, b"ustar  \0").put(124, b"00000001000\0").finish()
        };
        let tar: Vec<u8> = blocks.iter().flat_map(block).collect();
        let _ = read(&tar);
    }
}
