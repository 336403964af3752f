//! What is built is read back, damage is noticed, and what no layer may contain is refused.

use super::*;
use crate::layer::entry::Entry;
use crate::layer::index_builder::{INNER_OFFSET_MAX, IndexBuilder, NewChunk, NewMember};

fn summary() -> Summary {
    Summary {
        toc_digest: Digest::of(b"toc"),
        toc_start: 900,
        toc_end: 990,
        toc_bytes: 400,
        ..Summary::of(Format::Estargz, 1000)
    }
}

fn chunk(bytes: u64, blob_offset: u64, inner_offset: u64) -> NewChunk {
    NewChunk {
        bytes,
        blob_offset,
        inner_offset,
        digest: Some(Digest::of(&bytes.to_le_bytes())),
    }
}

fn file(path: &str, size: u64) -> Entry {
    Entry {
        size,
        ..Entry::new(path, Kind::File)
    }
}

#[test]
fn what_was_built_is_read_back() {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    let mut first = file("./usr/bin/a", 5000);
    first.xattrs = vec![
        (b"user.b".to_vec(), b"2".to_vec()),
        (b"user.a".to_vec(), Vec::new()),
    ];
    first.digest = Some(Digest::of(b"whole"));
    first.mtime = Time {
        seconds: -5,
        nanos: 7,
    };
    builder.entry(&first).unwrap();
    builder.chunk(chunk(4096, 100, 0)).unwrap();
    builder.chunk(chunk(904, 50, 0)).unwrap();
    builder.entry(&file("small", 10)).unwrap();
    builder.chunk(chunk(10, 50, 1024)).unwrap();
    let bytes = builder.finish(summary(), 900).unwrap().to_vec();
    let index = Index::open(bytes.as_slice()).unwrap();
    let entry = index.entry(0).unwrap();
    assert_eq!(
        (entry.path, entry.size, entry.mtime),
        (&b"usr/bin/a"[..], 5000, first.mtime)
    );
    assert_eq!(index.content_digest(&entry).unwrap(), first.digest);
    let xattrs = index.xattrs(&entry).unwrap();
    assert_eq!(xattrs, [(&b"user.a"[..], &b""[..]), (&b"user.b"[..], &b"2"[..])]);
    assert_eq!(index.entry(1).unwrap().data_offset, 8192);
    assert_eq!(index.summary().data_bytes, 12288);
    // Two chunks of different files share the member at 50; it ends where the one at 100 starts.
    let member = index.member(index.chunk(1).unwrap().member).unwrap();
    assert_eq!(member.blob_range(), 50..100);
    assert_eq!(index.member_chunks(&member).unwrap(), [1, 2]);
    assert_eq!(
        index.member(index.chunk(0).unwrap().member).unwrap().blob_range(),
        100..900
    );
    assert!(index.entry(2).is_err() && index.chunk(3).is_err() && index.member(2).is_err());
}

#[test]
fn every_damaged_byte_is_noticed() {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    builder.entry(&file("a", 10)).unwrap();
    builder.chunk(chunk(10, 1, 0)).unwrap();
    let good = builder.finish(summary(), 900).unwrap().to_vec();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(Index::open(bad.as_slice()).is_err(), "byte {at}");
    }
    for len in 0..good.len() {
        assert!(Index::open(&good[..len]).is_err(), "cut to {len}");
    }
}

#[test]
fn what_no_layer_may_contain_is_refused() {
    type Step = fn(&mut IndexBuilder) -> Result<()>;
    let cases: [(&str, Step); 10] = [
        ("copies", |b| {
            (0..17).try_for_each(|i| {
                b.entry(&file(&i.to_string(), 9))?;
                b.chunk(chunk(9, 1, 0))
            })
        }),
        ("gap", |b| {
            b.entry(&file("a", 9)).and_then(|()| b.chunk(chunk(8, 1, 0)))
        }),
        ("beyond the file", |b| {
            b.entry(&file("a", 9)).and_then(|()| b.chunk(chunk(10, 1, 0)))
        }),
        ("beyond the data", |b| {
            b.entry(&file("a", 9)).and_then(|()| b.chunk(chunk(9, 900, 0)))
        }),
        ("chunk first", |b| b.chunk(chunk(1, 1, 0))),
        ("deep member", |b| {
            b.entry(&file("a", 9))
                .and_then(|()| b.chunk(chunk(9, 1, 1 << 31)))
        }),
        ("overlap", |b| {
            b.entry(&file("a", 9))?;
            b.chunk(chunk(5, 1, 0))?;
            b.chunk(chunk(4, 1, 4))
        }),
        ("huge", |b| b.entry(&file("a", u64::MAX))),
        ("long name", |b| b.entry(&file(&"x".repeat(256), 0))),
        ("NUL", |b| b.entry(&file("a\0b", 0))),
    ];
    for (name, step) in cases {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        let refused = step(&mut builder).and_then(|()| builder.finish(summary(), 900).map(drop));
        assert!(refused.is_err(), "{name}");
    }
}

/// A member as a pass or a zTOC tells of it.
fn told(blob_start: u64, blob_end: u64) -> NewMember {
    NewMember {
        blob_start,
        blob_end,
        coding: Coding::Deflate,
        bits: 0,
        window: Vec::new(),
        check: None,
    }
}

#[test]
fn holes_belong_to_files_without_chunks_of_their_own() {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    builder.entry(&file("sparse", 10_000)).unwrap();
    builder.hole(4000).unwrap();
    builder.chunk(chunk(1000, 100, 0)).unwrap();
    builder.hole(5000).unwrap();
    builder.entry(&file("only-hole", 5)).unwrap();
    builder.hole(5).unwrap();
    assert_eq!(builder.last_place(), Some((12_288, 5)));
    let bytes = builder.finish(summary(), 900).unwrap().to_vec();
    let index = Index::open(bytes.as_slice()).unwrap();
    assert_eq!((index.chunk_count(), index.member_count()), (1, 1));
    let chunk = index.chunk(0).unwrap();
    assert_eq!((chunk.data_offset, chunk.bytes, chunk.entry), (4000, 1000, 0));
    assert_eq!(index.entry(0).unwrap().chunk_range(), 0..1);
    assert!(index.entry(1).unwrap().chunk_range().is_empty());
    assert_eq!(index.summary().unpacked_bytes, 10_005);
}

#[test]
fn a_hole_beyond_its_file_is_refused() {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    assert!(builder.hole(1).is_err(), "before any entry");
    builder.entry(&file("a", 10)).unwrap();
    assert!(builder.hole(11).is_err());
    builder.hole(10).unwrap();
    assert!(builder.hole(1).is_err());
    builder.entry(&Entry::new("d", Kind::Dir)).unwrap();
    assert!(builder.hole(1).is_err(), "in a directory");
    builder.entry(&file("short", 10)).unwrap();
    builder.hole(9).unwrap();
    assert!(builder.finish(summary(), 900).is_err(), "a byte is in nothing");
}

#[test]
fn members_are_what_the_builder_was_told_of_them() {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    let window = vec![7; 300];
    // Neighbours that share a byte; told of before and after their chunks. The one at 400 has no chunk.
    builder
        .member(NewMember {
            coding: Coding::Zstd,
            ..told(10, 200)
        })
        .unwrap();
    builder.entry(&file("a", 30)).unwrap();
    builder.chunk(chunk(10, 10, 0)).unwrap();
    builder.chunk(chunk(20, 199, 1 << 40)).unwrap();
    builder
        .member(NewMember {
            bits: 3,
            window: window.clone(),
            ..told(199, 401)
        })
        .unwrap();
    builder.member(told(400, 500)).unwrap();
    builder.entry(&file("b", 1)).unwrap();
    builder.chunk(chunk(1, 600, 0)).unwrap();
    let bytes = builder.finish(summary(), 900).unwrap().to_vec();
    let index = Index::open(bytes.as_slice()).unwrap();
    let members: Vec<Member> = (0..index.member_count())
        .map(|number| index.member(number).unwrap())
        .collect();
    let ranges: Vec<_> = members.iter().map(Member::blob_range).collect();
    assert_eq!(ranges, [10..200, 199..401, 600..900]);
    let codings: Vec<_> = members
        .iter()
        .map(|member| (member.coding, member.bits))
        .collect();
    assert_eq!(
        codings,
        [(Coding::Zstd, 0), (Coding::Deflate, 3), (Coding::Gzip, 0)]
    );
    assert_eq!(index.window(&members[1]).unwrap(), window);
    assert!(index.window(&members[0]).unwrap().is_empty() && index.window(&members[2]).unwrap().is_empty());
}

#[test]
fn a_check_vouches_for_chunks_without_a_digest_and_nothing_else_does() {
    let bare = |blob_offset| NewChunk {
        digest: None,
        ..chunk(5, blob_offset, 0)
    };
    let check = Some(Digest::of(b"compressed bytes"));
    let mut builder = IndexBuilder::new(Coding::Gzip);
    builder.entry(&file("a", 10)).unwrap();
    builder.chunk(bare(100)).unwrap();
    builder.chunk(chunk(5, 200, 0)).unwrap();
    builder
        .member(NewMember {
            check,
            ..told(100, 200)
        })
        .unwrap();
    let bytes = builder.finish(summary(), 900).unwrap().to_vec();
    let index = Index::open(bytes.as_slice()).unwrap();
    assert_eq!(index.chunk(0).unwrap().digest, None);
    assert_eq!(index.check(&index.member(0).unwrap()).unwrap(), check);
    assert_eq!(index.check(&index.member(1).unwrap()).unwrap(), None);
    for is_told in [false, true] {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        builder.entry(&file("a", 5)).unwrap();
        builder.chunk(bare(100)).unwrap();
        if is_told {
            builder.member(told(100, 200)).unwrap();
        }
        assert!(builder.finish(summary(), 900).is_err());
    }
}

#[test]
fn one_small_chunk_costs_at_most_a_gib_unless_the_member_was_told_of() {
    let build = |inner_offset, is_told| {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        builder.entry(&file("a", 5)).unwrap();
        builder.chunk(chunk(5, 100, inner_offset)).unwrap();
        if is_told {
            builder.member(told(100, 200)).unwrap();
        }
        builder.finish(summary(), 900)
    };
    assert!(build(INNER_OFFSET_MAX, false).is_ok());
    assert!(build(INNER_OFFSET_MAX + 1, false).is_err());
    assert!(build(INNER_OFFSET_MAX + 1, true).is_ok());
}

#[test]
fn members_that_cannot_be_are_refused() {
    let mut builder = IndexBuilder::new(Coding::Gzip);
    let refused = [
        ("empty", told(100, 100)),
        ("backwards", told(100, 99)),
        (
            "eight bits",
            NewMember {
                bits: 8,
                ..told(100, 200)
            },
        ),
        (
            "bits in gzip",
            NewMember {
                bits: 1,
                coding: Coding::Gzip,
                ..told(100, 200)
            },
        ),
    ];
    for (name, member) in refused {
        assert!(builder.member(member).is_err(), "{name}");
    }
    builder.member(told(100, 200)).unwrap();
    assert!(builder.member(told(100, 300)).is_err(), "twice");
    assert!(builder.member(told(50, 60)).is_err(), "after one behind it");
    builder.member(told(800, 901)).unwrap();
    builder.entry(&file("a", 5)).unwrap();
    builder.chunk(chunk(5, 800, 0)).unwrap();
    assert!(builder.finish(summary(), 900).is_err(), "beyond the data");
}
