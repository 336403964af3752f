//! Layers that no writer makes, each by what is wrong with it.

use super::*;

type Case = (&'static str, fn(&mut Vec<Value>));

fn all_are_refused(version: Version, cases: &[Case]) {
    for (name, edit) in cases {
        let outcome = index_edited(version, edit);
        assert!(
            matches!(outcome, Err(Error::Malformed { .. })),
            "{name}: {outcome:?}"
        );
    }
}

#[test]
fn another_digest_is_refused_with_both() {
    for version in Version::ALL {
        let written = small(version);
        let checksum = format!(
            "{}{CHECKSUM}",
            if written.annotations.contains_key(&format!("{PREFIX}{CHECKSUM}")) {
                PREFIX
            } else {
                OLD_PREFIX
            }
        );
        for key in [checksum.as_str(), TOC_DIGEST_ANNOTATION] {
            let promised = Digest::of(b"another");
            let mut lying = written.clone();
            lying.annotations.insert(key.to_owned(), promised.to_string());
            let Err(Error::Verification {
                what,
                expected,
                actual,
            }) = index(&lying)
            else {
                panic!("{version:?}, {key}: not refused as unverified");
            };
            let toc = &written.blob[written.toc.start as usize..written.toc.end as usize];
            let of_what = if key == TOC_DIGEST_ANNOTATION {
                toc_of(&written)
            } else {
                toc.to_vec()
            };
            assert_eq!(
                (expected, actual),
                (promised.to_string(), Digest::of(&of_what).to_string())
            );
            assert!(what.contains("TOC of layer sha256:"), "{what}");
        }
    }
}

#[test]
fn a_digest_of_the_uncompressed_toc_is_checked_beside_the_other() {
    let mut written = small(Version::Storage1_50);
    let toc_digest = Digest::of(&toc_of(&written)).to_string();
    written
        .annotations
        .insert(TOC_DIGEST_ANNOTATION.to_owned(), toc_digest);
    assert!(index(&written).is_ok());
}

#[test]
fn annotations_that_disagree_with_the_media_type_are_refused() {
    let written = small(Version::Stargz);
    for media_type in [
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar",
    ] {
        let mut gzip = descriptor(&written);
        gzip.media_type = media_type.to_owned();
        let Err(Error::Malformed { why, .. }) = index_described(&gzip, &written) else {
            panic!("{media_type} is not refused");
        };
        assert!(why.contains("zstd:chunked") && why.contains(media_type), "{why}");
    }
}

#[test]
fn a_toc_that_is_something_else_is_refused() {
    let good = small(Version::Storage1_50);
    let json = toc_of(&good);
    let data = &good.blob[..good.toc.start as usize - 8];
    let sealed = |compressed: &[u8], bytes: usize| {
        seal(
            data.to_vec(),
            b"",
            &vec![b' '; bytes],
            compressed,
            b"",
            Version::Storage1_50,
        )
    };
    let packed = ::zstd::bulk::compress(&json, 1).unwrap();
    assert!(index(&sealed(&packed, json.len())).is_ok());
    let bomb = ::zstd::bulk::compress(&vec![b' '; 40 << 20], 1).unwrap();
    let cases = [
        ("no zstd", sealed(&json, json.len())),
        ("gzip", sealed(b"\x1f\x8b\x08\0\0\0\0\0\0\0", 10)),
        ("cut", sealed(&packed[..packed.len() - 1], json.len())),
        (
            "something behind it",
            sealed(&[&packed[..], b"x"].concat(), json.len()),
        ),
        ("shorter than promised", sealed(&packed, json.len() + 1)),
        ("longer than promised", sealed(&packed, json.len() - 1)),
        ("bomb", sealed(&bomb, 1000)),
        ("promised bomb", sealed(&bomb, 40 << 20)),
    ];
    for (name, written) in cases {
        let outcome = index(&written);
        assert!(
            matches!(outcome, Err(Error::Malformed { .. })),
            "{name}: {outcome:?}"
        );
    }
}

#[test]
fn bytes_that_were_not_asked_for_are_refused() {
    let written = small(Version::Storage1_50);
    let toc = &written.blob[written.toc.start as usize..written.toc.end as usize];
    for bytes in [None, Some(&toc[1..]), Some(&[][..])] {
        let mut indexer = indexer(&descriptor(&written), None, Arc::new(InMemory)).unwrap();
        indexer.step(None).unwrap();
        assert!(matches!(indexer.step(bytes), Err(Error::Malformed { .. })));
        assert!(indexer.step(Some(toc)).is_err());
    }
}

#[test]
fn odd_but_valid_records_are_accepted() {
    let accepted: [Case; 7] = [
        ("unknown key", |e| e[1]["x"] = json!({"y": []})),
        ("end in a chunk", |e| e[2]["endOffset"] = json!(7)),
        ("no digest of a file in chunks", |e| e[1]["digest"] = Value::Null),
        ("no digest of zeros", |e| e[4]["chunkDigest"] = Value::Null),
        ("a chunk with another name", |e| e[2]["name"] = json!("other")),
        ("tar type in the mode", |e| e[0]["mode"] = json!(0o40755)),
        ("both digests", |e| e[6]["chunkDigest"] = e[6]["digest"].clone()),
    ];
    for (name, edit) in accepted {
        let outcome = index_edited(Version::Storage1_50, edit);
        assert!(outcome.is_ok(), "{name}: {outcome:?}");
    }
    let two_names = index_edited(Version::Storage1_50, |e| {
        let mut copy = e[6].clone();
        copy["name"] = json!("copy");
        e.push(copy);
    });
    let index = two_names.unwrap();
    assert_eq!(Index::open(index.as_slice()).unwrap().member_count(), 5);
}

#[test]
fn frames_that_do_not_make_up_their_file_are_refused() {
    let refused: [Case; 22] = [
        ("ends before it starts", |e| e[6]["endOffset"] = json!(1)),
        ("ends where it starts", |e| {
            e[6]["endOffset"] = e[6]["offset"].clone();
        }),
        ("negative end", |e| e[6]["endOffset"] = json!(-1)),
        ("ends in the TOC", |e| e[6]["endOffset"] = json!(1_000_000)),
        ("ends nowhere", |e| e[6]["endOffset"] = json!(u64::MAX)),
        ("no end among others", |e| e[6]["endOffset"] = Value::Null),
        ("starts nowhere", |e| e[6]["offset"] = json!(u64::MAX)),
        ("starts at nothing", |e| e[6]["offset"] = Value::Null),
        ("frames out of order", |e| {
            let first = e[1]["offset"].clone();
            e[1]["offset"] = e[2]["offset"].clone();
            e[2]["offset"] = first;
        }),
        ("chunk behind the end", |e| {
            e[5]["offset"] = e[6]["offset"].clone();
        }),
        ("zeros behind the end", |e| e[4]["offset"] = json!(1u64 << 40)),
        ("one frame, two ends", |e| {
            let mut copy = e[6].clone();
            copy["endOffset"] = json!(copy["endOffset"].as_u64().unwrap() - 1);
            e.push(copy);
        }),
        ("frames that overlap", |e| {
            let mut copy = e[6].clone();
            copy["offset"] = json!(copy["offset"].as_u64().unwrap() + 1);
            e.push(copy);
        }),
        ("one frame, two digests", |e| {
            let mut copy = e[6].clone();
            copy["digest"] = json!(Digest::of(b"x"));
            e.push(copy);
        }),
        ("a place in the frame", |e| e[6]["innerOffset"] = json!(1)),
        ("unknown type of chunk", |e| e[4]["chunkType"] = json!("ones")),
        ("zeros beyond the file", |e| e[4]["chunkSize"] = json!(2004)),
        ("zeros without end", |e| e[4]["chunkSize"] = json!(u64::MAX)),
        ("zeros overlapping", |e| e[4]["chunkOffset"] = json!(9)),
        ("zeros missing", |e| drop(e.remove(4))),
        ("zeros of nothing", |e| e.swap(0, 4)),
        ("last chunk missing", |e| drop(e.remove(5))),
    ];
    all_are_refused(Version::Storage1_50, &refused);
}

#[test]
fn records_that_estargz_refuses_are_refused() {
    let refused: [Case; 14] = [
        ("chunk before any file", |e| e.swap(0, 2)),
        ("chunk after a whole file", |e| e.insert(7, e[5].clone())),
        ("negative size", |e| e[6]["size"] = json!(-1)),
        ("huge file", |e| e[6]["size"] = json!(i64::MAX)),
        ("huge chunk", |e| e[1]["chunkSize"] = json!(i64::MAX)),
        ("NUL in a name", |e| e[0]["name"] = json!("a\0b")),
        ("long component", |e| e[0]["name"] = json!("x".repeat(256))),
        ("deep path", |e| e[0]["name"] = json!("x/".repeat(1001))),
        ("large uid", |e| e[0]["uid"] = json!(1u64 << 32)),
        ("broken base64", |e| e[0]["xattrs"] = json!({"user.x": "A"})),
        ("another digest algorithm", |e| e[6]["digest"] = json!("md5:00")),
        ("unknown type", |e| e[0]["type"] = json!("whiteout")),
        ("no time", |e| e[0]["modtime"] = json!("yesterday")),
        ("key in another case", |e| e[6]["EndOffset"] = json!(3)),
    ];
    all_are_refused(Version::Storage1_50, &refused);
    let of_stargz: [Case; 3] = [
        ("zeros without ends", |e| e[1]["chunkType"] = json!("zeros")),
        ("an end among none", |e| {
            e.last_mut().unwrap()["endOffset"] = json!(900);
        }),
        ("data in the TOC", |e| e[1]["offset"] = json!(1_000_000)),
    ];
    for (name, edit) in of_stargz {
        let outcome = index_edited(Version::Stargz, |e| {
            e.truncate(e.len() - 1);
            edit(e);
        });
        assert!(
            matches!(outcome, Err(Error::Malformed { .. })),
            "{name}: {outcome:?}"
        );
    }
}

#[test]
fn a_toc_without_digests_is_read_as_plain_zstd() {
    let written = small(Version::Storage1_50);
    let mut toc: Value = serde_json::from_slice(&toc_of(&written)).unwrap();
    toc["entries"][6]["digest"] = Value::Null;
    let bare = with_toc(&written, &serde_json::to_vec(&toc).unwrap(), Version::Storage1_50);
    let mut indexer = indexer(&descriptor(&bare), None, Arc::new(InMemory)).unwrap();
    indexer.step(None).unwrap();
    let toc = &bare.blob[bare.toc.start as usize..bare.toc.end as usize];
    assert!(matches!(indexer.step(Some(toc)), Ok(Step::Pass)));
}

#[test]
fn without_annotations_it_is_plain_zstd() {
    let mut written = small(Version::Storage1_50);
    written.annotations.clear();
    let mut plain = indexer(&descriptor(&written), None, Arc::new(InMemory)).unwrap();
    assert!(matches!(plain.step(None), Ok(Step::Pass)));
    // A promise of an eStargz TOC alone says nothing of where a TOC is in zstd.
    let digest = Digest::of(b"toc").to_string();
    written
        .annotations
        .insert(TOC_DIGEST_ANNOTATION.to_owned(), digest);
    let mut plain = indexer(&descriptor(&written), None, Arc::new(InMemory)).unwrap();
    assert!(matches!(plain.step(None), Ok(Step::Pass)));
}

#[test]
fn a_hole_of_terabytes_costs_nothing() {
    let bytes = index_edited(Version::Storage1_50, |e| {
        e[1]["size"] = json!(13 + (4u64 << 40));
        e[4]["chunkSize"] = json!(3 + (4u64 << 40) - 3);
        e[5]["chunkOffset"] = json!(10 + (4u64 << 40));
    })
    .unwrap();
    let index = Index::open(bytes.as_slice()).unwrap();
    assert_eq!(index.entry(1).unwrap().size, 13 + (4 << 40));
    assert!(bytes.len() < 4000);
}
