//! Each way in which tars say things, with bytes put together by hand.

use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::tar::tests::raw::{Raw, padded, pax, records, sparse};
use crate::layer::tar::tests::{Read, only, read};
use crate::layer::tar::{END_BYTES, checksums};

/// The only entry, without content.
fn entry(tar: &[u8]) -> Entry {
    let Read { entry, .. } = only(tar);
    entry
}

fn name(tar: &[u8]) -> Vec<u8> {
    entry(tar).path
}

fn file(typeflag: u8, name: &str) -> Vec<u8> {
    Raw::ustar(typeflag, name, 0).finish()
}

#[test]
fn an_empty_stream_and_an_empty_tar_have_no_entries() {
    assert_eq!(read(b"").unwrap(), []);
    assert_eq!(read(&[0; END_BYTES]).unwrap(), []);
    assert_eq!(read(&[0; 512]).unwrap(), []);
    let followed = [vec![0; END_BYTES], b"anything".to_vec(), vec![7; 5000]].concat();
    assert_eq!(read(&followed).unwrap(), []);
}

#[test]
fn a_tar_may_end_where_an_entry_could_start() {
    let tar = Raw::ustar(b'0', "f", 3).with(b"abc");
    for end in [0, 512, 1024, 1536] {
        let whole = [tar.clone(), vec![0; end]].concat();
        assert_eq!(only(&whole).content, b"abc", "{end} zeros at the end");
    }
    // Padding is worth nothing, and what belongs to no entry neither.
    assert_eq!(only(&tar[..515]).content, b"abc");
    assert_eq!(read(&pax(&[("path", "x")])).unwrap(), []);
}

#[test]
fn types_are_what_go_takes_them_for() {
    let cases = [
        (b'0', Kind::File),
        (0, Kind::File),
        (b'7', Kind::File),
        (b'1', Kind::Hardlink),
        (b'2', Kind::Symlink),
        (b'3', Kind::Char),
        (b'4', Kind::Block),
        (b'5', Kind::Dir),
        (b'6', Kind::Fifo),
    ];
    for (typeflag, kind) in cases {
        let found = entry(&Raw::ustar(typeflag, "n", 0).put(157, b"to").finish());
        let is_link = matches!(kind, Kind::Symlink | Kind::Hardlink);
        let expected = Entry {
            mode: 0o644,
            link: if is_link { b"to".to_vec() } else { Vec::new() },
            ..Entry::new("n", kind)
        };
        assert_eq!(found, expected, "{typeflag}");
    }
    // Only where there is no type does a slash make a directory.
    assert_eq!(entry(&file(0, "d/")).kind, Kind::Dir);
    assert_eq!(entry(&file(b'0', "d/")).kind, Kind::File);
}

#[test]
fn only_files_have_a_payload() {
    for typeflag in b'1'..=b'6' {
        let tar = [Raw::ustar(typeflag, "a", 5000).finish(), file(b'0', "b")].concat();
        let found = read(&tar).unwrap();
        assert_eq!(found.len(), 2, "{typeflag}");
        assert_eq!((found[0].entry.size, &found[1].entry.path[..]), (0, &b"b"[..]));
    }
    let legacy_dir = [Raw::v7(0, "d/", 700).finish(), file(b'0', "b")].concat();
    assert_eq!(read(&legacy_dir).unwrap().len(), 2);
    let contiguous = Raw::ustar(b'7', "f", 600).with(&[8; 600]);
    assert_eq!(only(&contiguous).content, [8; 600]);
}

#[test]
fn names_are_joined_as_each_format_has_them() {
    let long = "n".repeat(100);
    let prefix = [b'p'; 155];
    let joined = |prefix: &[u8]| [prefix, b"/", long.as_bytes()].concat();
    let ustar = Raw::ustar(b'0', &long, 0).put(345, &prefix);
    assert_eq!(name(&ustar.finish()), joined(&prefix));
    let star = Raw::ustar(b'0', &long, 0)
        .put(345, &prefix[..131])
        .put(508, b"tar\0");
    assert_eq!(name(&star.finish()), joined(&prefix[..131]));
    let star_times = Raw::ustar(b'0', "n", 0)
        .put(345, b"dir")
        .put(476, b"00000000001 00000000002 ");
    assert_eq!(name(&star_times.put(508, b"tar\0").finish()), b"dir/n");
    // V7 has no prefix, GNU has times in its place.
    assert_eq!(name(&Raw::v7(b'0', "n", 0).put(345, b"dir").finish()), b"n");
    let times = Raw::gnu(b'0', "n", 0).put(345, b"00000000001\x0000000000002\0");
    assert_eq!(name(&times.finish()), b"n");
    // But Go once wrote a prefix over them.
    assert_eq!(
        name(&Raw::gnu(b'0', "n", 0).put(345, b"some/dir").finish()),
        b"some/dir/n"
    );
    assert_eq!(name(&Raw::gnu(b'0', "n", 0).put(345, b"d\xffr").finish()), b"n");
}

#[test]
fn names_are_bytes() {
    let raw = b"caf\xe9/\xff\xfe";
    assert_eq!(name(&Raw::gnu(b'0', "", 0).put(0, raw).finish()), raw);
    let mut link = Raw::ustar(b'2', "l", 0).put(157, raw);
    assert_eq!(entry(&link.clone().finish()).link, raw);
    let tar = [
        pax(&[("path", &raw[..]), ("linkpath", b"\x80")]),
        link.clone().finish(),
    ]
    .concat();
    let found = entry(&tar);
    assert_eq!((&found.path[..], &found.link[..]), (&raw[..], &b"\x80"[..]));
    link = link.put(157, b"cut\0here");
    assert_eq!(entry(&link.finish()).link, b"cut");
}

#[test]
fn long_names_of_gnu_come_in_front() {
    let long = |typeflag: u8, text: &str| {
        let text = format!("{text}\0");
        Raw::gnu(typeflag, "././@LongLink", text.len() as u64).with(text.as_bytes())
    };
    let (name, target) = ("d/".repeat(300) + "name", "t/".repeat(400) + "target");
    let link = Raw::gnu(b'2', "short", 0).put(157, b"short").finish();
    let found = entry(&[long(b'K', &target), long(b'L', &name), link.clone()].concat());
    assert_eq!(
        (found.path, found.link),
        (name.clone().into_bytes(), target.into_bytes())
    );
    // They count more than PAX records, in whatever order.
    let records = pax(&[("path", "pax")]);
    for order in [[long(b'L', &name), records.clone()], [records, long(b'L', &name)]] {
        assert_eq!(
            entry(&[order.concat(), link.clone()].concat()).path,
            name.as_bytes()
        );
    }
    // An empty one is none.
    assert_eq!(entry(&[long(b'L', ""), link.clone()].concat()).path, b"short");
    // They are for one entry.
    let two = [long(b'L', &name), link.clone(), link].concat();
    assert_eq!(read(&two).unwrap()[1].entry.path, b"short");
}

#[test]
fn pax_records_replace_what_the_header_says() {
    let records = pax(&[
        ("path", "other"),
        ("size", "3"),
        ("uid", "4294967295"),
        ("gid", "3000000"),
        ("uname", "ignored"),
        ("comment", "ignored"),
        ("mtime", "1.5"),
        ("SCHILY.xattr.user.a", "first"),
        ("SCHILY.xattr.user.a", "value=with\nanything\0"),
        ("SCHILY.xattr.security.empty", ""),
    ]);
    let found = only(&[records, Raw::ustar(b'0', "name", 0).with(b"abc")].concat());
    let expected = Entry {
        uid: u32::MAX,
        gid: 3_000_000,
        size: 3,
        mtime: Time {
            seconds: 1,
            nanos: 500_000_000,
        },
        xattrs: vec![
            (b"security.empty".to_vec(), Vec::new()),
            (b"user.a".to_vec(), b"value=with\nanything\0".to_vec()),
        ],
        ..Entry::new("other", Kind::File)
    };
    assert_eq!((found.entry, &found.content[..]), (expected, &b"abc"[..]));
}

#[test]
fn empty_pax_values_leave_what_the_header_says() {
    let keys = [
        "path",
        "linkpath",
        "size",
        "uid",
        "gid",
        "mtime",
        "GNU.sparse.map",
        "GNU.sparse.major",
    ];
    let records = pax(&keys.map(|key| (key, "")));
    let link = Raw::ustar(b'2', "name", 0).put(157, b"to").put(108, b"0000007\0");
    let found = entry(&[records, link.finish()].concat());
    assert_eq!(
        (&found.path[..], &found.link[..], found.uid),
        (&b"name"[..], &b"to"[..], 7)
    );
}

#[test]
fn only_the_last_extended_header_counts() {
    let tar = [
        pax(&[("path", "first"), ("uid", "1")]),
        pax(&[("path", "second")]),
        file(b'0', "name"),
        file(b'0', "next"),
    ];
    let found = read(&tar.concat()).unwrap();
    assert_eq!(
        (&found[0].entry.path[..], found[0].entry.uid),
        (&b"second"[..], 0)
    );
    assert_eq!(found[1].entry.path, b"next");
}

#[test]
fn global_headers_are_ignored() {
    let global = records(&[
        ("path", "global"),
        ("uid", "77"),
        ("mtime", "no time"),
        ("comment", "git"),
    ]);
    let global = Raw::ustar(b'g', "pax_global_header", global.len() as u64).with(&global);
    let tar = [global.clone(), file(b'0', "a"), file(b'0', "b")].concat();
    let found = read(&tar).unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!((&found[0].entry.path[..], found[0].entry.uid), (&b"a"[..], 0));
    // To Go a global header is an entry: what was in front of it is its own.
    assert_eq!(
        name(&[pax(&[("path", "x")]), global, file(b'0', "a")].concat()),
        b"a"
    );
}

#[test]
fn times_have_fractions_and_signs() {
    let cases = [
        ("1700000000", 1_700_000_000, 0),
        ("1700000000.123456789", 1_700_000_000, 123_456_789),
        ("1700000000.1234567899", 1_700_000_000, 123_456_789),
        ("+5.", 5, 0),
        ("5.03", 5, 30_000_000),
        ("-5", -5, 0),
        ("-5.25", -6, 750_000_000),
        ("-0.5", -1, 500_000_000),
        ("-0.0000000001", 0, 0),
        ("99999999999", 99_999_999_999, 0),
        ("-9223372036854775808", i64::MIN, 0),
    ];
    for (text, seconds, nanos) in cases {
        let found = entry(&[pax(&[("mtime", text)]), file(b'0', "f")].concat());
        assert_eq!(found.mtime, Time { seconds, nanos }, "{text}");
    }
}

#[test]
fn numbers_are_octal_or_base_256_and_may_be_negative() {
    let with = |at: usize, field: &[u8]| entry(&Raw::gnu(b'0', "f", 0).put(at, field).finish());
    let octal: [(&[u8], u32); 7] = [
        (b"0000017\0", 0o17),
        (b"     17 ", 0o17),
        (b"17\0\0\0\0\0\0", 0o17),
        (b"\0\0 17 \0\0", 0o17),
        (b"17\0junk\0", 0o17),
        (b"77777777", 0o77_777_777),
        (b"\0 \0 \0 \0 ", 0),
    ];
    for (field, uid) in octal {
        assert_eq!(with(108, field).uid, uid, "{field:?}");
    }
    assert_eq!(with(108, b"\x80\0\0\0\xff\xff\xff\xff").uid, u32::MAX);
    assert_eq!(with(116, b"\x80\0\0\0\0\x03\0\0").gid, 0x30000);
    let mtime = |field: &[u8]| with(136, field).mtime.seconds;
    assert_eq!(mtime(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), -1);
    assert_eq!(mtime(b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0"), i64::MIN);
    assert_eq!(mtime(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), i64::MAX);
    // Only permissions are kept of a mode.
    assert_eq!(with(100, b"0106755\0").mode, 0o6755);
    // A size of more than 33 bits: the tar ends in its content, but not before that was understood.
    let large = Raw::gnu(b'0', "f", 0)
        .put(124, b"\x80\0\0\0\0\0\0\x02\0\0\0\0")
        .finish();
    assert!(read(&large).unwrap_err().to_string().contains("cut short"));
}

#[test]
fn device_numbers_are_those_of_formats_that_have_them() {
    let device = |raw: Raw| entry(&raw.put(329, b"0000010\x000000003\0").finish()).rdev;
    assert_eq!(device(Raw::ustar(b'3', "d", 0)), (8, 3));
    assert_eq!(device(Raw::gnu(b'4', "d", 0)), (8, 3));
    assert_eq!(device(Raw::v7(b'4', "d", 0)), (0, 0));
    assert_eq!(device(Raw::ustar(b'0', "f", 0)), (0, 0));
    let binary = Raw::gnu(b'3', "d", 0).put(329, b"\x80\0\0\0\xff\xff\xff\xff");
    assert_eq!(entry(&binary.finish()).rdev, (u32::MAX, 0));
}

#[test]
fn checksums_may_be_of_signed_bytes() {
    let block: [u8; 512] = Raw::gnu(b'0', "caf\u{e9}", 0).finish().try_into().unwrap();
    let (unsigned, signed) = checksums(&block);
    assert_eq!(unsigned as i64 - signed, 512);
    let signed = Raw::gnu(b'0', "caf\u{e9}", 0).put(148, format!("{signed:06o}\0 ").as_bytes());
    let Read { entry, .. } = only(&signed_block(signed));
    assert_eq!(entry.path, "caf\u{e9}".as_bytes());
}

/// The block as it is, without a checksum of our own.
fn signed_block(raw: Raw) -> Vec<u8> {
    let finished = raw.clone().finish();
    let stored = finished[148..156].to_vec();
    let as_is = raw.put(0, b"");
    let mut bytes = as_is.finish();
    assert_eq!(bytes[148..156], stored[..]);
    let (unsigned, signed) = checksums(&bytes.clone().try_into().unwrap());
    assert_ne!(unsigned as i64, signed);
    bytes[148..156].copy_from_slice(format!("{signed:06o}\0 ").as_bytes());
    bytes
}

/// What every form of the sparse file of the next tests reads as: 2000 bytes, of which `abc` at 10 and 600 of `x` at 1000.
fn check_sparse(tar: &[u8]) {
    let found = only(tar);
    let mut content = vec![0; 2000];
    content[10..13].copy_from_slice(b"abc");
    content[1000..1600].fill(b'x');
    assert_eq!(found.entry.path, b"dir/file");
    assert_eq!(found.content, content);
    assert_eq!(found.holes, [0..10, 13..1000, 1600..2000]);
    assert_eq!(found.entry.kind, Kind::File);
}

fn sparse_payload() -> Vec<u8> {
    [&b"abc"[..], &[b'x'; 600]].concat()
}

#[test]
fn sparse_files_of_old_gnu_tar_have_their_map_in_the_header() {
    let raw = Raw::gnu(b'S', "dir/file", 603)
        .put(386, b"00000000012\x0000000000003\0")
        .put(410, b"00000001750\x0000000001130\0")
        .put(483, b"00000003720\0");
    check_sparse(&raw.with(&sparse_payload()));
}

#[test]
fn sparse_maps_of_old_gnu_tar_go_on_in_further_blocks() {
    let segment = |offset: u64, bytes: u64| format!("{offset:011o}\0{bytes:011o}\0");
    let header = Raw::gnu(b'S', "dir/file", 603)
        .put(
            386,
            (segment(10, 1) + &segment(11, 1) + &segment(12, 1) + &segment(13, 0)).as_bytes(),
        )
        .put(482, &[1])
        .put(483, b"00000003720\0");
    let pieces: String = (0..21).map(|i| segment(1000 + i * 10, 10)).collect();
    let mut full = pieces.into_bytes();
    full.resize(512, 0);
    full[504] = 1;
    // A block without segments may still say that one more follows.
    let mut empty = vec![0; 512];
    empty[504] = 1;
    let mut last = (segment(1210, 390) + &segment(2000, 0)).into_bytes();
    last.resize(512, 0);
    check_sparse(&[header.finish(), full, empty, last, padded(&sparse_payload())].concat());
}

#[test]
fn sparse_files_of_pax_have_their_map_in_the_records_or_in_front_of_the_data() {
    let stored = || Raw::ustar(b'0', "GNUSparseFile.1/file", 603).with(&sparse_payload());
    let version0_0 = pax(&[
        ("GNU.sparse.size", "2000"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.offset", "10"),
        ("GNU.sparse.numbytes", "3"),
        ("GNU.sparse.offset", "1000"),
        ("GNU.sparse.numbytes", "600"),
        ("path", "dir/file"),
    ]);
    check_sparse(&[version0_0, stored()].concat());
    let version0_1 = pax(&[
        ("GNU.sparse.size", "2000"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.name", "dir/file"),
        ("GNU.sparse.map", "10,3,1000,600"),
    ]);
    check_sparse(&[version0_1, stored()].concat());
    check_sparse(&sparse(
        "dir/file",
        2000,
        &[(10, 3), (1000, 600)],
        &sparse_payload(),
    ));
}

#[test]
fn a_sparse_map_in_front_of_the_data_takes_as_many_blocks_as_it_needs() {
    let segments: Vec<(u64, u64)> = (0..500).map(|i| (i * 20 + 7, 5)).collect();
    let payload: Vec<u8> = (0..2500).map(|i| (i % 251) as u8 + 1).collect();
    let found = only(&sparse("f", 10_000, &segments, &payload));
    assert_eq!((found.content.len(), found.holes.len()), (10_000, 501));
    let kept: Vec<u8> = found.content.into_iter().filter(|&byte| byte != 0).collect();
    assert_eq!(kept, payload);
}

#[test]
fn files_that_are_one_hole_or_have_none() {
    const WHOLE: std::ops::Range<u64> = 0..5000;
    let hole = only(&sparse("f", 5000, &[], b""));
    assert_eq!((&hole.holes[..], hole.content), (&[WHOLE][..], vec![0; 5000]));
    // GNU tar ends every map with an empty segment at the end of the file.
    let ended = only(&sparse("f", 5000, &[(5000, 0)], b""));
    assert_eq!(ended.holes[..], [WHOLE]);
    let solid = only(&sparse("f", 6, &[(0, 3), (3, 3)], b"abcdef"));
    assert_eq!((&solid.content[..], solid.holes), (&b"abcdef"[..], vec![]));
    assert_eq!(only(&sparse("f", 0, &[], b"")).entry.size, 0);
}

#[test]
fn sparse_records_of_unknown_versions_are_ignored() {
    let records = pax(&[
        ("GNU.sparse.major", "2"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.realsize", "9"),
    ]);
    let found = only(&[records, Raw::ustar(b'0', "f", 3).with(b"abc")].concat());
    assert_eq!(
        (&found.entry.path[..], &found.content[..]),
        (&b"f"[..], &b"abc"[..])
    );
}
