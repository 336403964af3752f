//! Tars that break a rule, each refused for that rule.

use crate::error::Error;
use crate::layer::tar::tests::raw::{Raw, pax, records, sparse};
use crate::layer::tar::tests::{read, read_in};

const MIB: u64 = 1 << 20;

#[track_caller]
fn refused(tar: &[u8], why: &str) {
    let error = read(tar).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert!(error.to_string().contains(why), "{error}");
    assert_eq!(read_in(tar, &[100, 1]).unwrap_err(), error);
}

/// A file behind these PAX records.
fn with_records(of: &[(&str, &str)]) -> Vec<u8> {
    [pax(of), Raw::ustar(b'0', "name", 0).finish()].concat()
}

/// A file behind a PAX header with this payload.
fn with_payload(payload: &[u8]) -> Vec<u8> {
    let head = Raw::ustar(b'x', "x", payload.len() as u64).with(payload);
    [head, Raw::ustar(b'0', "name", 0).finish()].concat()
}

#[test]
fn a_tar_that_ends_within_an_entry_is_cut_short() {
    let file = Raw::ustar(b'0', "f", 600).with(&[1; 600]);
    for end in [1, 511, 513, 1111] {
        refused(&file[..end], "cut short");
    }
    let after_zeros = [vec![0; 512], vec![0; 100]].concat();
    refused(&after_zeros, "cut short");
    refused(&pax(&[("path", "x")])[..520], "cut short");
    let mapped = sparse("f", 100, &[(0, 1)], b"x");
    refused(&mapped[..mapped.len() - 513], "cut short");
    let extended = Raw::gnu(b'S', "f", 0).put(482, &[1]).finish();
    refused(&extended, "cut short");
}

#[test]
fn headers_that_are_none_are_refused() {
    refused(&[b'x'; 512], "no valid header checksum");
    let mut flipped = Raw::ustar(b'0', "f", 0).finish();
    flipped[0] ^= 1;
    refused(&flipped, "no valid header checksum");
    let mut no_number = Raw::ustar(b'0', "f", 0).finish();
    no_number[148] = b'x';
    refused(&no_number, "no valid header checksum");
    let file = Raw::ustar(b'0', "f", 0).finish();
    refused(&[vec![0; 512], file].concat(), "a single block of zeros");
}

#[test]
fn numbers_that_are_none_are_refused() {
    let fields: [(usize, &[u8]); 9] = [
        (100, b"000064x\0"),
        (108, b"0000008\0"),
        (116, b"-000001\0"),
        (124, b"0x000000000\0"),
        (136, b"1 000000000\0"),
        (329, b"minor\0"),
        (337, b"+0000001"),
        (124, b"\x80\0\0\0\x80\0\0\0\0\0\0\0"),
        (136, b"\x81\0\0\0\0\0\0\0\0\0\0\0"),
    ];
    for (at, field) in fields {
        refused(
            &Raw::ustar(b'5', "d", 0).put(at, field).finish(),
            "a number in its header is none",
        );
    }
    let star = Raw::ustar(b'5', "d", 0).put(508, b"tar\0").put(476, b"no time");
    refused(&star.finish(), "a number in its header is none");
    // What V7 does not have may be anything.
    assert!(read(&Raw::v7(b'5', "d", 0).put(329, b"minor\0").finish()).is_ok());
}

#[test]
fn numbers_that_no_file_can_have_are_refused() {
    let negative = Raw::gnu(b'0', "f", 0).put(124, &[0xff; 12]).finish();
    refused(&negative, "its size is negative");
    refused(&with_records(&[("size", "-1")]), "its size is negative");
    // The header's own size counts before what replaces it is looked at.
    refused(
        &[pax(&[("size", "0")]), negative].concat(),
        "its size is negative",
    );
    for key in ["uid", "gid"] {
        for id in ["-1", "4294967296"] {
            refused(&with_records(&[(key, id)]), "more than 32 bits");
        }
    }
    let device = Raw::gnu(b'3', "d", 0).put(329, b"\x80\0\0\x01\0\0\0\0");
    refused(&device.finish(), "device number");
}

#[test]
fn types_that_no_engine_unpacks_are_refused_by_name() {
    for typeflag in [b'V', b'M', b'D', b'N', b'8', b'X', b' ', 0xff] {
        let error = read(&Raw::gnu(typeflag, "thing", 0).finish()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains("\"thing\""), "{error}");
    }
}

#[test]
fn pax_records_that_are_none_are_refused() {
    let payloads: [&[u8]; 18] = [
        b"x",
        b"6 =ab\n",
        b"11 path=abc",
        b"11 path=abcd\n",
        b"13 path=abc\n",
        b"99 path=abc\n",
        b"0 path=abc\n",
        b"-12 path=abc\n",
        b"1x path=abc\n",
        b" path=abc\n",
        b"4 =\n",
        b"6 pat\n",
        b"3 a=b\n",
        b"99999999999999999999 path=abc\n",
        b"11 path=a\0\n",
        b"9 a\0b=c\n\0",
        b"12 path=abc\n\0",
        b"15 linkpath=\0x\n",
    ];
    for payload in payloads {
        refused(&with_payload(payload), "a PAX record before it is malformed");
        // Of global headers only what is not used differs.
        let global = Raw::ustar(b'g', "g", payload.len() as u64).with(payload);
        refused(&global, "a PAX record before it is malformed");
    }
}

#[test]
fn pax_values_that_are_none_are_refused() {
    for key in ["size", "uid", "gid"] {
        for value in ["x", "1.5", "0x10", " 1", "9223372036854775808"] {
            refused(
                &with_records(&[(key, value)]),
                "a number in its PAX records is none",
            );
        }
    }
    for key in ["mtime", "atime", "ctime"] {
        for value in ["x", ".5", "1.x", "1.-5", "1.5.5", "1e3", "-9223372036854775808.5"] {
            refused(
                &with_records(&[(key, value)]),
                "a time in its PAX records is none",
            );
        }
    }
}

#[test]
fn what_belongs_to_the_next_entry_is_bounded() {
    for typeflag in [b'x', b'g', b'L', b'K'] {
        let head = Raw::gnu(typeflag, "head", MIB + 1);
        refused(&head.finish(), "longer than 1 MiB");
        // Exactly that much is read.
        let head = Raw::gnu(typeflag, "head", MIB).with(&vec![b'x'; MIB as usize]);
        let read = read(&head);
        assert_eq!(read.is_ok(), matches!(typeflag, b'L' | b'K'), "{typeflag}");
    }
}

#[test]
fn sparse_files_of_other_formats_and_types_are_refused() {
    refused(&Raw::ustar(b'S', "f", 0).finish(), "another format than GNU's");
    refused(&Raw::v7(b'S', "f", 0).finish(), "another format than GNU's");
    let map = [("GNU.sparse.map", "0,1"), ("GNU.sparse.numblocks", "1")];
    for typeflag in b'1'..=b'6' {
        let link = Raw::ustar(typeflag, "l", 0).put(157, b"to").finish();
        refused(&[pax(&map), link].concat(), "which its type is not");
    }
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    /// Size, segments, payload, and the rule that they break.
    type Case<'a> = (u64, &'a [(u64, u64)], &'a [u8], &'a str);
    let cases: [Case<'_>; 9] = [
        (10, &[(0, 3), (2, 3)], b"abcdef", "overlap or are out of order"),
        (10, &[(5, 1), (0, 1)], b"ab", "overlap or are out of order"),
        (10, &[(8, 3)], b"abc", "beyond the end of the file"),
        (10, &[(11, 0)], b"", "beyond the end of the file"),
        (u64::MAX, &[], b"", "a number in its PAX records is none"),
        (
            1 << 62,
            &[(1 << 62, i64::MAX as u64)],
            b"",
            "beyond the end of the file",
        ),
        (10, &[(0, 3)], b"ab", "another length than its data"),
        (10, &[(0, 3)], b"abcd", "another length than its data"),
        (10, &[], b"x", "another length than its data"),
    ];
    for (size, segments, payload, why) in cases {
        refused(&sparse("f", size, segments, payload), why);
    }
}

#[test]
fn sparse_maps_of_gnu_that_lie_are_refused() {
    let raw = || Raw::gnu(b'S', "f", 1);
    let size = |raw: Raw| raw.put(483, b"00000000010\0");
    let segment = |raw: Raw, text: &[u8]| size(raw.put(386, text)).with(b"x");
    assert!(read(&segment(raw(), b"00000000000\x0000000000001\0")).is_ok());
    refused(
        &segment(raw(), b"0000000000x\x0000000000001\0"),
        "not made of numbers",
    );
    refused(&segment(raw(), &[0xff; 24]), "negative numbers");
    refused(
        &segment(raw(), b"00000000010\x0000000000001\0"),
        "beyond the end of the file",
    );
    refused(&raw().put(483, b"x").finish(), "its sparse file has no size");
    refused(
        &raw().put(483, &[0xff; 12]).finish(),
        "the size of its sparse file is negative",
    );
}

#[test]
fn sparse_records_that_lie_are_refused() {
    let refused = |of: &[(&str, &str)], why| refused(&with_records(of), why);
    let count = "GNU.sparse.numblocks";
    let another = "another number of segments";
    refused(&[("GNU.sparse.map", "0,0")], another);
    refused(&[("GNU.sparse.map", "0,0"), (count, "2")], another);
    refused(&[("GNU.sparse.map", "0,0,0"), (count, "1")], another);
    refused(&[("GNU.sparse.map", "0,0"), (count, "-1")], another);
    refused(
        &[("GNU.sparse.map", "0,0"), (count, "9223372036854775807")],
        another,
    );
    refused(&[("GNU.sparse.map", "0,x"), (count, "1")], "not made of numbers");
    refused(
        &[("GNU.sparse.map", "0,0"), (count, "1"), ("GNU.sparse.size", "x")],
        "a number in its PAX records",
    );
    refused(
        &[("GNU.sparse.map", "0,0"), (count, "1"), ("GNU.sparse.size", "-1")],
        "is negative",
    );
    let order = "out of order";
    refused(&[("GNU.sparse.numbytes", "0")], order);
    refused(&[("GNU.sparse.offset", "0"), ("GNU.sparse.offset", "0")], order);
    refused(&[("GNU.sparse.offset", "0,0")], order);
}

#[test]
fn sparse_maps_in_front_of_the_data_that_lie_are_refused() {
    let file = |map: &[u8]| {
        let head = pax(&[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.realsize", "9"),
        ]);
        [head, Raw::ustar(b'0', "f", map.len() as u64).with(map)].concat()
    };
    let block = |text: &str| {
        let mut block = text.as_bytes().to_vec();
        block.resize(512, 0);
        block
    };
    assert!(read(&file(&block("1\n9\n0\n"))).is_ok());
    refused(&file(b""), "longer than its payload");
    refused(&file(b"0\n"), "longer than its payload");
    refused(&file(&block("2\n0\n0\n")), "longer than its payload");
    refused(
        &file(&block("9223372036854775807\n0\n0\n")),
        "longer than its payload",
    );
    refused(
        &file(&block("9223372036854775808\n0\n0\n")),
        "not made of numbers",
    );
    refused(&file(&block("-1\n")), "not made of numbers");
    refused(&file(&block("\n")), "not made of numbers");
    refused(&file(&block("1\n0x9\n0\n")), "not made of numbers");
    refused(&file(&[block("1\n"), block("")].concat()), "not made of numbers");
    let endless = "1\n".repeat(MIB as usize);
    refused(
        &file(format!("4000000\n{endless}").as_bytes()),
        "longer than 1 MiB",
    );
}

#[test]
fn sparse_maps_of_gnu_are_bounded() {
    let mut extension = Vec::new();
    for i in 0..21 {
        extension.extend_from_slice(format!("{i:011o}\0{:011o}\0", 0).as_bytes());
    }
    extension.resize(512, 0);
    extension[504] = 1;
    let header = Raw::gnu(b'S', "f", 0)
        .put(482, &[1])
        .put(483, b"00000000100\0")
        .finish();
    let endless = [header.clone(), extension.repeat(2200)].concat();
    refused(&endless, "longer than 1 MiB");
    // Blocks without a segment are no way around that.
    let mut empty = vec![0; 512];
    empty[504] = 1;
    refused(&[header, empty.repeat(2200)].concat(), "longer than 1 MiB");
}

#[test]
fn all_sparse_files_together_are_bounded() {
    let numbers: Vec<String> = (0..100_000).map(|i| format!("{},1", i * 2)).collect();
    let payload = vec![b'x'; 100_000];
    let head = records(&[
        ("GNU.sparse.size", "200000".to_owned()),
        ("GNU.sparse.numblocks", "100000".to_owned()),
        ("GNU.sparse.map", numbers.join(",")),
    ]);
    let head = Raw::ustar(b'x', "x", head.len() as u64).with(&head);
    let one = [head, Raw::ustar(b'0', "f", payload.len() as u64).with(&payload)].concat();
    assert_eq!(read(&one.repeat(10)).unwrap().len(), 10);
    let error = read(&one.repeat(11)).unwrap_err().to_string();
    assert!(error.contains("more than a million segments"), "{error}");
}
