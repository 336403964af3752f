//! Files and indexes that somebody made to break a reader, one by one.

use super::*;
use crate::layer::index::HEADER_BYTES;

/// A file of two members with a checkpoint at the start and one within a byte, and an index of it.
fn sample(spans: Spans) -> (Vec<u8>, Passed, Vec<u8>) {
    let blob = [gzip(&text(120_000), 6), gzip(&text(5000), 6)].concat();
    let passed = send(Box::new(GzipPass::with_spacing(50_000, 1 << 30)), &blob, &[9999]).unwrap();
    let inside = passed.checkpoints.iter().filter(|(_, at)| at.bits > 0);
    assert!(inside.count() == 1 && passed.checkpoints.len() == 2);
    let (index, _) = index(&blob, &passed, spans);
    (blob, passed, index)
}

fn is_malformed<T>(outcome: &Result<T>) -> bool {
    matches!(outcome, Err(Error::Malformed { .. }))
}

#[test]
fn a_wrong_trailer_is_a_failed_verification() {
    let good = gzip(b"content", 6);
    for at in good.len() - 8..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        bad.extend(gzip(b"behind", 6));
        assert!(
            matches!(pass(&bad, &[3]), Err(Error::Verification { .. })),
            "byte {at}"
        );
    }
}

#[test]
fn what_follows_the_last_member_must_be_zeros() {
    let good = gzip(b"content", 6);
    let cases: [(&str, &[u8]); 5] = [
        ("text", b"garbage"),
        ("half a magic number", &[0x1f]),
        ("a header", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0]),
        ("zeros, then not", &[0, 0, 0, 1]),
        ("zeros, then a member", &[&[0; 512][..], &good].concat()),
    ];
    for (name, behind) in cases {
        for pieces in [&[1][..], &[usize::MAX]] {
            assert!(is_malformed(&pass(&[&good, behind].concat(), pieces)), "{name}");
        }
    }
}

#[test]
fn a_header_without_end_is_refused_before_it_is_read_to_its_end() {
    let mut pass = GzipPass::default();
    let mut out = |_: Decoded<'_>| Ok(());
    pass.push(&[0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0], &mut out)
        .unwrap();
    let pushed = (0..100)
        .take_while(|_| pass.push(&[b'n'; 1000], &mut out).is_ok())
        .count();
    assert!(pushed < 6, "{pushed}");
}

#[test]
fn a_file_with_no_deflate_in_it_is_refused() {
    for (name, at, byte) in [
        ("another method", 2, 7),
        ("reserved flag", 3, 0x20),
        ("block type 3", 10, 0xff),
    ] {
        let mut bad = gzip(&text(1000), 6);
        bad[at] = byte;
        assert!(is_malformed(&pass(&bad, &[1])), "{name}");
    }
}

#[test]
fn an_error_of_whoever_takes_the_bytes_ends_the_pass() {
    let full = Error::busy("disk", "full");
    let mut pass = GzipPass::default();
    let mut out = |decoded: Decoded<'_>| match decoded {
        Decoded::Bytes(_) => Err(full.clone()),
        Decoded::Checkpoint(_) => Ok(()),
    };
    let pushed = pass.push(&gzip(&vec![0; 1 << 20], 6), &mut out);
    assert_eq!(pushed, Err(full.clone()));
}

#[test]
fn a_window_that_is_none_or_another_yields_nothing() {
    let (blob, mut passed, _) = sample(Spans::default());
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
    let windows = [
        (true, b"no zstd".to_vec()),
        (true, bomb),
        (true, zstd::bulk::compress(&[0; (32 << 10) + 1], 3).unwrap()),
        (true, passed.checkpoints[1].1.window[..100].to_vec()),
        // These are windows, but not the right ones: the digests notice, or deflate itself.
        (false, Vec::new()),
        (false, window::pack(&noise(32 << 10)).unwrap()),
        (false, window::pack(b"short").unwrap()),
    ];
    for (is_refused, window) in windows {
        passed.checkpoints[1].1.window = window;
        let (index, _) = index(&blob, &passed, Spans::default());
        let index = Index::open(index.as_slice()).unwrap();
        let decoder = layer::decoder(&index, 1);
        assert_eq!(decoder.is_err(), is_refused);
        let Ok(mut decoder) = decoder else { continue };
        let range = index.member(1).unwrap().blob_range();
        let mut kept = Kept::default();
        let outcome = decoder.push(&blob[range.start as usize..range.end as usize], &mut kept);
        assert!(matches!(
            outcome,
            Err(Error::Verification { .. } | Error::Malformed { .. })
        ));
        let again = decoder.push(&blob, &mut kept);
        assert_eq!(
            again,
            Err(Error::malformed(
                format!("gzip span at {}", range.start),
                "it failed before"
            ))
        );
    }
}

#[test]
fn bits_that_are_none_are_refused() {
    let (_, _, mut index) = sample(Spans::default());
    let member_bits = {
        let over = Index::open(index.as_slice()).unwrap();
        // Behind the entries (96 bytes) and the chunks (64 bytes), the second member (48 bytes), its last but six bytes.
        HEADER_BYTES + over.entry_count() as usize * 96 + over.chunk_count() as usize * 64 + 48 + 41
    };
    for bits in [8, 15, 255] {
        index[member_bits] = bits;
        let crc = crc32fast::hash(&index[16..]);
        index[12..16].copy_from_slice(&crc.to_le_bytes());
        let over = Index::open(index.as_slice()).unwrap();
        assert_eq!(over.member(1).unwrap().bits, bits);
        assert!(is_malformed(&layer::decoder(&over, 1)));
    }
}

#[test]
fn compressed_bytes_with_a_digest_are_decoded_only_when_they_have_it() {
    struct Untouched;
    impl ChunkSink for Untouched {
        fn piece(&mut self, _: u32, _: u64, _: &[u8]) -> Result<()> {
            panic!("decoded before it was checked");
        }

        fn verified(&mut self, _: u32) -> Result<()> {
            panic!("decoded before it was checked");
        }
    }
    let checked = Spans {
        checked: true,
        to_the_end: false,
    };
    let (blob, _, index) = sample(checked);
    let index = Index::open(index.as_slice()).unwrap();
    for number in 0..index.member_count() {
        let range = index.member(number).unwrap().blob_range();
        let good = &blob[range.start as usize..range.end as usize];
        for pieces in [&[1][..], &[1000], &[usize::MAX]] {
            // Cut short: nothing is decoded, and the decoder is not done.
            let mut decoder = layer::decoder(&index, number).unwrap();
            for piece in cut(&good[..good.len() - 1], pieces) {
                assert_eq!(decoder.push(piece, &mut Untouched), Ok(false));
            }
            // Changed in the last byte, which may mean nothing to deflate.
            let mut bad = good.to_vec();
            *bad.last_mut().unwrap() ^= 0x80;
            let mut decoder = layer::decoder(&index, number).unwrap();
            let outcome = cut(&bad, pieces)
                .into_iter()
                .map(|piece| decoder.push(piece, &mut Untouched))
                .last();
            let what = format!("gzip span at {}", range.start);
            assert_eq!(
                outcome,
                Some(Err(Error::mismatch(what, Digest::of(good), Digest::of(&bad))))
            );
        }
    }
}

#[test]
fn a_span_too_long_to_be_checked_first_is_refused() {
    let mut builder = IndexBuilder::new(Coding::Deflate);
    let entry = Entry {
        size: 1,
        ..Entry::new("file", Kind::File)
    };
    builder.entry(&entry).unwrap();
    let chunk = NewChunk {
        bytes: 1,
        blob_offset: 0,
        inner_offset: 0,
        digest: None,
    };
    builder.chunk(chunk).unwrap();
    let blob_end = (64 << 20) + 1;
    let member = NewMember {
        blob_start: 0,
        blob_end,
        coding: Coding::Deflate,
        bits: 0,
        window: Vec::new(),
        check: Some(Digest::of(b"")),
    };
    builder.member(member).unwrap();
    let index = builder
        .finish(Summary::of(Format::Soci, blob_end), blob_end)
        .unwrap();
    assert!(is_malformed(&layer::decoder(
        &Index::open(index.as_slice()).unwrap(),
        0
    )));
}

#[test]
fn a_span_that_ends_before_its_chunks_is_not_done_or_refused() {
    let (blob, _, index) = sample(Spans::default());
    let index = Index::open(index.as_slice()).unwrap();
    let last = index.member_count() - 1;
    let range = index.member(last).unwrap().blob_range();
    let good = &blob[range.start as usize..range.end as usize];
    // Cut anywhere, over the end of a member too, the last chunk is never there.
    for cut_to in (0..good.len() - 12).step_by(97) {
        let mut kept = Kept::default();
        let pushed = layer::decoder(&index, last)
            .unwrap()
            .push(&good[..cut_to], &mut kept);
        assert_eq!(pushed, Ok(false), "cut to {cut_to}");
    }
    // Something else than a member where the next one should begin.
    let first_end = gzip(&text(120_000), 6).len() - range.start as usize;
    let mut bad = good.to_vec();
    bad[first_end] = 0;
    let pushed = layer::decoder(&index, last)
        .unwrap()
        .push(&bad, &mut Kept::default());
    assert!(is_malformed(&pushed));
}
