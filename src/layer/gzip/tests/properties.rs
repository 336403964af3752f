//! Whatever gzip files are put together, in whatever pieces they come.

use flate2::write::DeflateEncoder;
use proptest::prelude::*;

use super::bits::BitWriter;
use super::*;

/// A member and what it decodes to.
type Member = (Vec<u8>, Vec<u8>);

fn any_plain() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (0..90_000usize).prop_map(text),
        (0..40_000usize).prop_map(noise),
        (any::<u8>(), 0..500_000usize).prop_map(|(byte, len)| vec![byte; len]),
        prop::collection::vec(any::<u8>(), 0..20),
    ]
}

prop_compose! {
    fn compressed()(
        plain in any_plain(),
        level in 0..=9u32,
        flush_every in prop_oneof![Just(usize::MAX), 1000..50_000usize],
        extra in prop::option::of(prop::collection::vec(any::<u8>(), 0..300)),
        name in prop::option::of("[a-z]{1,80}"),
        comment in prop::option::of("[a-z]{1,80}"),
        mtime in any::<u32>(),
    ) -> Member {
        let mut builder = GzBuilder::new().mtime(mtime);
        builder = match extra { Some(extra) => builder.extra(extra), None => builder };
        builder = match name { Some(name) => builder.filename(name), None => builder };
        builder = match comment { Some(comment) => builder.comment(comment), None => builder };
        let mut encoder = builder.write(Vec::new(), Compression::new(level));
        for part in plain.chunks(flush_every) {
            encoder.write_all(part).unwrap();
            encoder.flush().unwrap();
        }
        (encoder.finish().unwrap(), plain)
    }
}

prop_compose! {
    fn hand_made()(
        blocks in prop::collection::vec((any::<bool>(), prop::collection::vec(0..144u8, 0..300)), 0..20),
    ) -> Member {
        let mut writer = BitWriter::default();
        let mut plain = Vec::new();
        for (is_stored, literals) in blocks {
            if is_stored { writer.stored(&literals, false) } else { writer.fixed(&literals, false) }
            plain.extend(literals);
        }
        writer.fixed(b"", true);
        (writer.member(&plain), plain)
    }
}

fn any_file() -> impl Strategy<Value = Member> {
    let members = prop::collection::vec(prop_oneof![3 => compressed(), 1 => hand_made()], 1..5);
    let padding = prop_oneof![3 => Just(0), 1 => 1..600usize];
    (members, padding).prop_map(|(members, padding)| {
        let (mut blob, mut plain) = (Vec::new(), Vec::new());
        for (member, content) in members {
            blob.extend(member);
            plain.extend(content);
        }
        blob.resize(blob.len() + padding, 0);
        (blob, plain)
    })
}

fn any_pieces() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        Just(vec![usize::MAX]),
        prop::collection::vec(1..50usize, 1..9),
        prop::collection::vec(1..30_000usize, 1..9),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_checkpoint_of_every_file_leads_back(
        (blob, plain) in any_file(),
        pieces in any_pieces(),
        spacing in prop_oneof![1..100u64, 100..100_000u64],
        member_spacing in 1..100_000u64,
    ) {
        let passed = send(Box::new(GzipPass::with_spacing(spacing, member_spacing)), &blob, &pieces).unwrap();
        prop_assert!(passed.tar == plain);
        prop_assert_eq!(passed.checkpoints[0].0, 0);
        for pair in passed.checkpoints.windows(2) {
            prop_assert!(pair[1].0 - pair[0].0 >= spacing.min(member_spacing));
            prop_assert!(pair[1].1.blob_start > pair[0].1.blob_start);
        }
        // Reaching from each to the end costs the square of their number.
        if passed.checkpoints.len() < 20 {
            check_every_checkpoint(&blob, &passed, &pieces);
        } else {
            let (index, contents) = index(&blob, &passed, Spans::default());
            let decoded = decode(&index, &blob, &pieces).unwrap();
            prop_assert!(decoded.into_values().eq(contents));
        }
    }

    #[test]
    fn a_changed_byte_is_noticed_by_the_pass(
        (blob, plain) in any_file(),
        at in any::<prop::sample::Index>(),
        change in 1..=255u8,
    ) {
        let mut bad = blob.clone();
        bad[at.index(blob.len())] ^= change;
        // What means nothing, such as a name in a header, may change; what is decoded may not. A header may also come to
        // an end elsewhere; then what follows is no deflate stream of that checksum.
        if let Ok(passed) = send(Box::new(GzipPass::default()), &bad, &[1000]) {
            prop_assert!(passed.tar == plain);
        }
    }

    #[test]
    fn a_changed_span_yields_nothing_else(
        (blob, _) in any_file(),
        at in any::<prop::sample::Index>(),
        change in 1..=255u8,
        checked in any::<bool>(),
    ) {
        let passed = send(Box::new(GzipPass::with_spacing(5000, 5000)), &blob, &[1000]).unwrap();
        let (index, contents) = index(&blob, &passed, Spans { checked, to_the_end: false });
        let mut bad = blob.clone();
        bad[at.index(blob.len())] ^= change;
        let index_over = Index::open(index.as_slice()).unwrap();
        let mut kept = Kept::default();
        for number in 0..index_over.member_count() {
            let range = index_over.member(number).unwrap().blob_range();
            let bytes = &bad[range.start as usize..range.end as usize];
            let touched = bytes != &blob[range.start as usize..range.end as usize];
            let outcome = layer::decoder(&index_over, number).unwrap().push(bytes, &mut kept);
            prop_assert!(touched || outcome == Ok(true));
            let is_refused = matches!(outcome, Err(Error::Verification { .. }));
            prop_assert!(is_refused || !(touched && checked));
            kept.open.clear();
        }
        for (chunk, content) in kept.verified {
            prop_assert!(content == contents[chunk as usize]);
        }
    }

    #[test]
    fn a_file_that_ends_anywhere_else_is_refused(
        (member, plain) in compressed(),
        keep in any::<prop::sample::Index>(),
        pieces in any_pieces(),
    ) {
        let blob = [gzip(b"first", 6), member].concat();
        let first_end = gzip(b"first", 6).len();
        let cut_to = keep.index(blob.len());
        let passed = send(Box::new(GzipPass::default()), &blob[..cut_to], &pieces);
        if cut_to == first_end {
            prop_assert_eq!(passed.unwrap().tar, b"first");
        } else {
            let is_malformed = matches!(passed, Err(Error::Malformed { .. }));
            prop_assert!(is_malformed, "{} of {}", cut_to, plain.len());
        }
    }

    #[test]
    fn anything_may_follow_a_header(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        flags in 0..32u8,
        pieces in any_pieces(),
        spacing in 1..1000u64,
    ) {
        let blob = [&[0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 0][..], &bytes].concat();
        // Random bytes have no right CRC.
        prop_assert!(send(Box::new(GzipPass::with_spacing(spacing, spacing)), &blob, &pieces).is_err());
    }

    #[test]
    fn anything_may_stand_in_a_span(
        bytes in prop::collection::vec(any::<u8>(), 1..3000),
        window_bytes in prop::collection::vec(any::<u8>(), 0..300),
        is_packed in any::<bool>(),
        bits in 0..8u8,
        pieces in any_pieces(),
        is_deflate in any::<bool>(),
    ) {
        let bytes = if is_deflate {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(&bytes).unwrap();
            [encoder.finish().unwrap(), bytes].concat()
        } else {
            bytes
        };
        let window = if is_packed { window::pack(&window_bytes).unwrap() } else { window_bytes };
        let checkpoint = Checkpoint { blob_start: 0, coding: Coding::Deflate, bits, window };
        let promised = Passed { tar: noise(10_000), checkpoints: vec![(0, checkpoint)] };
        let (index, contents) = index(&bytes, &promised, Spans::default());
        let over = Index::open(index.as_slice()).unwrap();
        let mut kept = Kept::default();
        if let Ok(mut decoder) = layer::decoder(&over, 0) {
            let _ = cut(&bytes, &pieces).into_iter().try_for_each(|piece| decoder.push(piece, &mut kept).map(drop));
        }
        // One byte may come out right by chance, and has its digest then.
        prop_assert!(kept.verified.iter().all(|(&chunk, content)| *content == contents[chunk as usize]));
    }
}
