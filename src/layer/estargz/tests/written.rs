//! What the writer wrote, byte for byte and as plain gzip and tar readers see it.

use std::io::Read;

use flate2::bufread::MultiGzDecoder;

use super::super::writer::{Landmark, Options, Variant, Writer, write_layer};
use super::super::*;
use super::{SMALL, file, gunzip_member, small_layer, toc_json};
use crate::layer::entry::{Entry, Kind, Time};

fn gunzip_all(blob: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    MultiGzDecoder::new(blob).read_to_end(&mut out).unwrap();
    out
}

#[test]
fn a_layer_is_a_tar_in_gzip_whose_digests_are_told() {
    let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
    let tar = gunzip_all(&blob);
    assert_eq!(
        (finished.blob_digest, finished.blob_bytes),
        (Digest::of(&blob), blob.len() as u64)
    );
    assert_eq!(
        (finished.diff_id, finished.unpacked_bytes),
        (Digest::of(&tar), tar.len() as u64)
    );
    assert_eq!(finished.toc_digest, Digest::of(&toc_json(&blob, &finished)));
    assert!(tar.ends_with(&[0; 1024]));
    let mut archive = ::tar::Archive::new(tar.as_slice());
    let mut found = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut payload = Vec::new();
        entry.read_to_end(&mut payload).unwrap();
        found.push((
            String::from_utf8(entry.path_bytes().into_owned()).unwrap(),
            payload,
        ));
    }
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["d/", "d/a", "b", "s", "h", "stargz.index.json"]);
    assert_eq!(
        (found[1].1.as_slice(), found[2].1.as_slice()),
        (&b"0123456789"[..], &b"bbb"[..])
    );
}

#[test]
fn the_toc_is_written_as_go_writes_it() {
    let mut device = Entry::new("nüll", Kind::Char);
    (device.rdev, device.uid, device.gid, device.mode) = ((1, 3), 7, 8, 0o666);
    device.mtime = Time {
        seconds: 1_577_836_799,
        nanos: 500_000_000,
    };
    device.xattrs = vec![
        (b"user.b".to_vec(), b"\0".to_vec()),
        (b"user.a".to_vec(), Vec::new()),
    ];
    let (blob, finished) = write_layer(
        &[(device, Vec::new()), file("f", b"12345678ab")],
        Options {
            chunk_bytes: 8,
            ..SMALL
        },
    )
    .unwrap();
    let offset = |from: usize| {
        (from..)
            .find(|&at| blob[at..].starts_with(&[0x1f, 0x8b, 8]))
            .unwrap()
    };
    let first = offset(1);
    let second = offset(first + 1);
    let [whole, full, rest] = [&b"12345678ab"[..], b"12345678", b"ab"].map(Digest::of);
    let expected = format!(
        r#"{{
	"version": 1,
	"entries": [
		{{
			"name": "nüll",
			"type": "char",
			"modtime": "2020-01-01T00:00:00Z",
			"mode": 438,
			"uid": 7,
			"gid": 8,
			"devMajor": 1,
			"devMinor": 3,
			"xattrs": {{
				"user.a": "",
				"user.b": "AA=="
			}}
		}},
		{{
			"name": "f",
			"type": "reg",
			"size": 10,
			"mode": 420,
			"offset": {first},
			"digest": "{whole}",
			"chunkSize": 8,
			"chunkDigest": "{full}"
		}},
		{{
			"name": "f",
			"type": "chunk",
			"offset": {second},
			"chunkOffset": 8,
			"chunkDigest": "{rest}"
		}}
	]
}}"#
    );
    assert_eq!(String::from_utf8(toc_json(&blob, &finished)).unwrap(), expected);
}

#[test]
fn a_member_starts_at_every_payload_chunk() {
    let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
    let toc: serde_json::Value = serde_json::from_slice(&toc_json(&blob, &finished)).unwrap();
    let start = |record: usize| {
        let offset = toc["entries"][record]["offset"].as_u64().unwrap();
        gunzip_member(&blob[offset as usize..])
    };
    assert_eq!((start(1), start(2)), (b"0123".to_vec(), b"4567".to_vec()));
    // Padding, and the header of the next entry, come with the last chunk.
    assert_eq!(
        (start(3).len(), start(3).starts_with(b"89\0")),
        (4 - 2 + 502 + 512, true)
    );
    assert_eq!(start(4).len(), 512 + 512 + 512);
}

#[test]
fn small_payloads_are_packed_until_a_member_is_large_enough() {
    let noise: Vec<u8> = (0..3000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let entries = [
        file("a", &noise),
        file("b", b"b"),
        file("c", b"c"),
        file("d", &noise),
    ];
    let places = |min_chunk_bytes, landmark| {
        let options = Options {
            min_chunk_bytes,
            landmark,
            chunk_bytes: 1 << 20,
            level: 1,
            variant: Variant::Estargz,
        };
        let (blob, finished) = write_layer(&entries, options).unwrap();
        let toc: serde_json::Value = serde_json::from_slice(&toc_json(&blob, &finished)).unwrap();
        let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
        let entries = toc["entries"].as_array().unwrap().clone();
        entries
            .iter()
            .map(|e| (number(&e["offset"]), number(&e["innerOffset"])))
            .collect::<Vec<_>>()
    };
    // All in the member at byte 0, behind one header each.
    assert_eq!(
        places(1 << 20, Landmark::None),
        [(0, 512), (0, 4096), (0, 5120), (0, 6144)]
    );
    // A landmark has a member of its own, and what follows joins it.
    let landmarked = places(1 << 20, Landmark::Prefetch(2));
    assert!(landmarked[2].0 > 0 && landmarked[2].1 == 0);
    assert_eq!(
        landmarked[3..],
        [(landmarked[2].0, 1024), (landmarked[2].0, 2048)]
    );
    // The large payload fills its member, so the next one starts another that the following ones share.
    let packed = places(1000, Landmark::None);
    assert_eq!(packed[0], (0, 512));
    assert!(packed[1].0 > 0 && packed[1].1 == 0);
    assert_eq!(packed[2..], [(packed[1].0, 1024), (packed[1].0, 2048)]);
}

#[test]
fn a_payload_of_another_size_is_refused() {
    for payload in [&b"12"[..], b"1234"] {
        let mut writer = Writer::new(Vec::new(), SMALL);
        let entry = Entry {
            size: 3,
            ..Entry::new("a", Kind::File)
        };
        assert!(matches!(
            writer.append(&entry, &mut &*payload),
            Err(Error::Malformed { .. })
        ));
    }
    let mut writer = Writer::new(Vec::new(), SMALL);
    let empty = Entry::new("a", Kind::File);
    assert!(matches!(
        writer.append(&empty, &mut &b"1"[..]),
        Err(Error::Malformed { .. })
    ));
}

#[test]
fn names_are_written_as_given() {
    let entries = [
        file("../evil", b"1"),
        file("/a//./b", b"2"),
        file("a/.wh.x", b""),
        file("a/.wh.x", b""),
    ];
    let (blob, finished) = write_layer(&entries, SMALL).unwrap();
    let toc: serde_json::Value = serde_json::from_slice(&toc_json(&blob, &finished)).unwrap();
    let names: Vec<_> = toc["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["name"].clone())
        .collect();
    assert_eq!(names, ["../evil", "/a//./b", "a/.wh.x", "a/.wh.x"]);
    assert!(gunzip_all(&blob).starts_with(b"../evil\0"));
}

#[test]
fn stargz_is_written_as_its_own_tool_wrote_it() {
    let options = Options {
        variant: Variant::Legacy,
        min_chunk_bytes: 1 << 20,
        ..SMALL
    };
    let (blob, finished) = write_layer(&[file("f", b"12345a")], options).unwrap();
    assert_eq!(blob[finished.toc_offset as usize..].first(), Some(&0x1f));
    let footer = footer::write_legacy(finished.toc_offset);
    assert!(blob.ends_with(&footer));
    let second = (1..)
        .filter(|&at| blob[at..].starts_with(&[0x1f, 0x8b, 8]))
        .nth(1)
        .unwrap();
    let first = (1..)
        .find(|&at| blob[at..].starts_with(&[0x1f, 0x8b, 8]))
        .unwrap();
    let whole = Digest::of(b"12345a");
    let expected = format!(
        r#"{{
	"version": 1,
	"entries": [
		{{
			"name": "f",
			"type": "reg",
			"size": 6,
			"mode": 420,
			"offset": {first},
			"NumLink": 0,
			"digest": "{whole}",
			"chunkSize": 4
		}},
		{{
			"name": "f",
			"type": "chunk",
			"offset": {second},
			"NumLink": 0,
			"chunkOffset": 4
		}}
	]
}}"#
    );
    assert_eq!(String::from_utf8(toc_json(&blob, &finished)).unwrap(), expected);
}

#[test]
fn an_external_toc_is_in_no_byte_of_the_layer() {
    let options = Options {
        variant: Variant::ExternalToc,
        ..SMALL
    };
    let (blob, finished) = write_layer(&small_layer(), options).unwrap();
    let tar = gunzip_all(&blob);
    assert_eq!(finished.diff_id, Digest::of(&tar));
    assert!(tar.ends_with(&[0; 1024]));
    let names: Vec<Vec<u8>> = ::tar::Archive::new(tar.as_slice())
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path_bytes().into_owned())
        .collect();
    assert_eq!(names, [&b"d/"[..], b"d/a", b"b", b"s", b"h"]);
    assert!(blob.ends_with(&footer::write_external()));
    let toc = finished.external_toc.unwrap();
    let toc = unpack_toc([&toc, &[]], Box::new(Vec::new())).unwrap();
    assert_eq!(Digest::of(&toc), finished.toc_digest);
    let (inside, with_toc) = write_layer(&small_layer(), SMALL).unwrap();
    assert_eq!(*toc, *toc_json(&inside, &with_toc));
}
