//! Blobs of any frames decompress to what they were made from, and from every checkpoint again; what is broken is refused.

use std::collections::BTreeMap;
use std::io::Write;

use ::zstd::stream::write::Encoder;
use proptest::prelude::*;

use super::frames::{Header, WINDOW_BYTES_MAX, parse};
use super::*;
use crate::digest::Digest;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Index, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};
use crate::layer::kept::Kept;
use crate::layer::{Checkpoint, Decoded, Format, MemberDecoder, decoder, decompressor};

/// A frame without content size.
fn frame(content: &[u8]) -> Vec<u8> {
    frame_of(content, true, 17)
}

fn frame_of(content: &[u8], checksum: bool, window_log: u32) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(checksum).unwrap();
    encoder.window_log(window_log).unwrap();
    // What is flushed once cannot get its size into the header any more.
    encoder.flush().unwrap();
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn skippable(bytes: usize) -> Vec<u8> {
    let len = (bytes as u32).to_le_bytes();
    [&[0x5e, 0x2a, 0x4d, 0x18], &len[..], &vec![7; bytes]].concat()
}

/// Bytes that do not repeat, and compress by half.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 60) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A tar, and its checkpoints by their place in it.
type Decompressed = (Vec<u8>, Vec<(usize, Checkpoint)>);

/// What comes out of a blob pushed in pieces of `piece` bytes.
fn decompress(blob: &[u8], piece: usize) -> Result<Decompressed> {
    let mut decompressor = decompressor(blob);
    assert_eq!(decompressor.format(), Format::Zstd);
    let (mut tar, mut checkpoints) = (Vec::new(), Vec::new());
    let mut out = |decoded: Decoded<'_>| {
        match decoded {
            Decoded::Bytes(bytes) => tar.extend_from_slice(bytes),
            Decoded::Checkpoint(checkpoint) => checkpoints.push((tar.len(), checkpoint)),
        }
        Ok(())
    };
    for piece in blob.chunks(piece) {
        decompressor.push(piece, &mut out)?;
    }
    decompressor.finish(&mut out)?;
    Ok((tar, checkpoints))
}

/// An index of one file for each chunk (member's range in the blob, place in the member, content).
fn index(blob_bytes: usize, chunks: &[(std::ops::Range<u64>, u64, &[u8])]) -> Vec<u8> {
    let mut builder = IndexBuilder::new(Coding::Zstd);
    let mut told = Vec::new();
    for (number, (member, inner_offset, content)) in chunks.iter().enumerate() {
        if !told.contains(&member.start) {
            told.push(member.start);
            builder
                .member(NewMember {
                    blob_start: member.start,
                    blob_end: member.end,
                    coding: Coding::Zstd,
                    bits: 0,
                    window: Vec::new(),
                    check: None,
                })
                .unwrap();
        }
        let size = content.len() as u64;
        builder
            .entry(&Entry {
                size,
                ..Entry::new(number.to_string(), Kind::File)
            })
            .unwrap();
        builder
            .chunk(NewChunk {
                bytes: size,
                blob_offset: member.start,
                inner_offset: *inner_offset,
                digest: Some(Digest::of(content)),
            })
            .unwrap();
    }
    let blob_bytes = blob_bytes as u64;
    builder
        .finish(Summary::of(Format::Zstd, blob_bytes), blob_bytes)
        .unwrap()
        .to_vec()
}

/// Decodes every member in pieces of `piece` bytes, one by one and all at once, which must come to the same.
fn decode(index: &[u8], blob: &[u8], piece: usize) -> Result<BTreeMap<u32, Vec<u8>>> {
    let index = Index::open(index).unwrap();
    let (mut kept, mut kept_at_once) = (Kept::default(), Kept::default());
    for number in 0..index.member_count() {
        let range = index.member(number).unwrap().blob_range();
        let member = &blob[range.start as usize..range.end as usize];
        let pieces: Vec<&[u8]> = member.chunks(piece).collect();
        let outcome = decode_pieces(&mut *decoder(&index, number)?, &pieces, &mut kept);
        let at_once = decoder(&index, number)?.push_all(&pieces, &mut kept_at_once);
        assert_eq!(outcome.is_ok(), at_once == Ok(true), "{outcome:?} {at_once:?}");
        outcome?;
    }
    assert!(kept.verified == kept_at_once.verified);
    Ok(kept.verified)
}

fn decode_pieces(decoder: &mut dyn MemberDecoder, pieces: &[&[u8]], kept: &mut Kept) -> Result<()> {
    let mut is_done = false;
    for piece in pieces {
        is_done = decoder.push(piece, kept)?;
    }
    match is_done {
        true => Ok(()),
        false => Err(Error::malformed("member", "not done")),
    }
}

/// Decodes one member that holds these chunks (place in it, content).
fn decode_one(member: &[u8], chunks: &[(u64, &[u8])], piece: usize) -> Result<BTreeMap<u32, Vec<u8>>> {
    let blob = [b"x", member].concat();
    let range = 1..blob.len() as u64;
    let chunks: Vec<_> = chunks
        .iter()
        .map(|(inner_offset, content)| (range.clone(), *inner_offset, *content))
        .collect();
    decode(&index(blob.len(), &chunks), &blob, piece)
}

/// The part of a blob that has content, or none.
#[derive(Debug, Clone)]
enum Part {
    Frame {
        bytes: usize,
        checksum: bool,
        window_log: u32,
    },
    Skippable(usize),
}

fn any_part() -> impl Strategy<Value = Part> {
    let bytes = prop_oneof![0..2000usize, 100_000..700_000usize];
    prop_oneof![
        4 => (bytes, any::<bool>(), 10..=27u32)
            .prop_map(|(bytes, checksum, window_log)| Part::Frame { bytes, checksum, window_log }),
        1 => (0..100usize).prop_map(Part::Skippable),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_frames_decompress_and_decode_again_from_every_checkpoint(
        parts in prop::collection::vec(any_part(), 1..12),
        piece in prop_oneof![1..50usize, 1000..400_000usize],
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 2..12),
    ) {
        let (mut blob, mut tar) = (Vec::new(), Vec::new());
        for (number, part) in parts.iter().enumerate() {
            match *part {
                Part::Frame { bytes, checksum, window_log } => {
                    let content = noise(bytes, number as u64);
                    blob.extend_from_slice(&frame_of(&content, checksum, window_log));
                    tar.extend_from_slice(&content);
                }
                Part::Skippable(bytes) => blob.extend_from_slice(&skippable(bytes)),
            }
        }
        let (found, checkpoints) = decompress(&blob, piece).unwrap();
        prop_assert!(found == tar);
        prop_assert_eq!((checkpoints[0].0, checkpoints[0].1.blob_start), (0, 0));
        for pair in checkpoints.windows(2) {
            prop_assert!(pair[1].0 - pair[0].0 >= 1 << 20);
        }
        // Files anywhere in the tar, cut at the checkpoints.
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(tar.len() + 1)).collect();
        cuts.extend(checkpoints.iter().map(|(at, _)| *at));
        cuts.sort_unstable();
        let mut chunks = Vec::new();
        for pair in cuts.windows(2).filter(|pair| pair[0] < pair[1]) {
            let number = checkpoints.partition_point(|(at, _)| *at <= pair[0]) - 1;
            let (at, checkpoint) = &checkpoints[number];
            let end = checkpoints.get(number + 1).map_or(blob.len() as u64, |(_, next)| next.blob_start);
            let range = checkpoint.blob_start..end;
            chunks.push((range, (pair[0] - at) as u64, &tar[pair[0]..pair[1]]));
        }
        let verified = decode(&index(blob.len(), &chunks), &blob, piece).unwrap();
        prop_assert_eq!(verified.len(), chunks.len());
        for (number, (_, _, content)) in chunks.iter().enumerate() {
            prop_assert!(verified[&(number as u32)] == *content);
        }
    }
}

#[test]
fn checkpoints_are_frames_a_mebibyte_apart() {
    let content = noise(400_000, 1);
    let one = frame(&content);
    let blob = one.repeat(8);
    let (tar, checkpoints) = decompress(&blob, 1 << 16).unwrap();
    assert_eq!(tar.len(), 8 * content.len());
    let places: Vec<_> = checkpoints
        .iter()
        .map(|(at, checkpoint)| (*at, checkpoint.blob_start as usize))
        .collect();
    let every_third = |n: usize| (n * 3 * content.len(), n * 3 * one.len());
    assert_eq!(places, [every_third(0), every_third(1), every_third(2)]);
    // One frame is one member, however long.
    let (_, checkpoints) = decompress(&frame(&noise(5 << 20, 1)), 1 << 16).unwrap();
    assert_eq!(checkpoints.len(), 1);
}

#[test]
fn a_blob_that_is_cut_or_changed_is_refused() {
    let blob = [
        frame(b"first"),
        skippable(3),
        frame(&noise(1000, 1)),
        skippable(0),
    ]
    .concat();
    assert_eq!(decompress(&blob, 7).unwrap().0.len(), 1005);
    let ends = [frame(b"first").len(), frame(b"first").len() + 11, blob.len() - 8];
    for len in 4..blob.len() {
        let outcome = decompress(&blob[..len], 100);
        assert_eq!(outcome.is_ok(), ends.contains(&len), "cut to {len}");
        assert!(outcome.is_ok() || matches!(outcome, Err(Error::Malformed { .. })));
    }
    let first = frame(b"first");
    for at in 6..first.len() {
        let mut bad = first.clone();
        bad[at] ^= 0x20;
        assert!(decompress(&bad, 100).is_err(), "byte {at}");
    }
    for behind in [&b"x"[..], &[0; 512], &[0x28, 0xb5, 0x2f, 0xfe]] {
        let outcome = decompress(&[&first, behind].concat(), 100);
        assert!(matches!(outcome, Err(Error::Malformed { .. })), "{behind:?}");
    }
}

#[test]
fn what_a_header_claims_is_bounded() {
    let header = |descriptor: u8, rest: &[u8]| [&[0x28, 0xb5, 0x2f, 0xfd, descriptor], rest].concat();
    let refused: [(&str, Vec<u8>, &str); 8] = [
        ("window of 256 MiB", header(0, &[18 << 3]), "window of 268435456"),
        (
            "window of 144 MiB",
            header(0, &[17 << 3 | 1]),
            "window of 150994944",
        ),
        ("largest window", header(0, &[0xff]), "window"),
        (
            "long single segment",
            header(0xa0, &[1, 0, 0, 8]),
            "window of 134217729",
        ),
        ("longest single segment", header(0xe0, &[0xff; 8]), "window"),
        ("dictionary", header(1, &[0, 9]), "dictionary"),
        ("long dictionary", header(3, &[0, 0, 0, 0, 1]), "dictionary"),
        ("reserved bit", header(8, &[0]), "bit"),
    ];
    for (name, bytes, why) in refused {
        assert!(parse(&bytes).unwrap_err().contains(why), "{name}");
        let Err(Error::Malformed { why: told, .. }) = decompress(&bytes, 1) else {
            panic!("{name} is not refused");
        };
        assert!(told.contains(why), "{name}: {told}");
    }
    assert_eq!(WINDOW_BYTES_MAX, 128 << 20);
    let accepted = [
        header(0, &[17 << 3]),
        header(0x20, &[0]),
        header(0x60, &[1, 0]),
        header(0xa0, &[0, 0, 0, 8]),
        header(3, &[0, 0, 0, 0, 0]),
        header(0xc0, &[0; 9]),
    ];
    for bytes in accepted {
        assert_eq!(parse(&bytes), Ok(Some(Header::Frame)), "{bytes:x?}");
        for len in 0..bytes.len() {
            assert_eq!(parse(&bytes[..len]), Ok(None), "{bytes:x?} cut to {len}");
        }
    }
    assert_eq!(parse(&skippable(9)), Ok(Some(Header::Skippable(9))));
}

#[test]
fn a_small_member_takes_no_window_whatever_its_frame_claims() {
    let content = noise(60_000, 3);
    let mut member = frame(&content);
    // Over what streaming accepts, so that decoding it proves that it was not streamed.
    member[5] = 20 << 3;
    for piece in [1000, usize::MAX] {
        assert_eq!(decode_one(&member, &[(0, &content)], piece).unwrap()[&0], content);
    }
    assert!(decompress(&member, 1000).is_err());
    // Headers of files that follow still fit; what does not is streamed, and so may not claim that much.
    let long = [&content[..], &vec![0; 60 << 10]].concat();
    let mut member = frame(&long);
    member[5] = 20 << 3;
    assert!(decode_one(&member, &[(0, &content)], 1000).is_ok());
    let mut member = frame(&noise(200_000, 3));
    assert!(decode_one(&member, &[(0, &noise(200_000, 3)[..100])], 1000).is_ok());
    member[5] = 20 << 3;
    assert!(decode_one(&member, &[(0, &noise(200_000, 3)[..100])], 1000).is_err());
}

#[test]
fn what_follows_the_last_chunk_is_not_looked_at() {
    let content = noise(6 << 20, 9);
    let tail = noise(100_000, 5);
    // Small enough to be decoded at one go, and streamed.
    for len in [10, 300_000, content.len()] {
        let chunk = &content[..len];
        let mut member = frame(&[chunk, &tail].concat());
        let whole = member.clone();
        member.extend_from_slice(b"no frame at all");
        for piece in [999, usize::MAX] {
            assert!(
                decode_one(&member, &[(0, chunk)], piece).unwrap()[&0] == chunk,
                "{len}"
            );
            let inner = [(1, &chunk[1..5]), (5, &chunk[5..])];
            assert_eq!(decode_one(&whole, &inner, piece).unwrap().len(), 2, "{len}");
        }
    }
}

#[test]
fn a_member_that_cannot_hold_its_chunks_is_refused() {
    for len in [700, 5 << 20] {
        let content = noise(len, 2);
        let good = frame(&content);
        let mut wrong = content.clone();
        wrong[len / 2] ^= 1;
        let refused = decode_one(&frame(&wrong), &[(0, &content)], 10_000);
        assert!(matches!(refused, Err(Error::Verification { .. })), "{len}");
        let mut changed = good.clone();
        changed[len / 4] ^= 0xff;
        let cases = [
            ("cut", good[..good.len() - 9].to_vec()),
            ("short", frame(&content[1..])),
            ("changed", changed),
            ("no frame", content.clone()),
            ("nothing", skippable(9)),
        ];
        for (name, member) in cases {
            for piece in [10_000, usize::MAX] {
                let outcome = decode_one(&member, &[(0, &content)], piece);
                assert!(outcome.is_err(), "{name}, {len} bytes in pieces of {piece}");
            }
        }
        assert_eq!(decode_one(&good, &[(0, &content)], 10_000).unwrap().len(), 1);
    }
}

#[test]
fn a_failed_member_takes_no_more() {
    let content = noise(5 << 20, 2);
    let blob = [b"x".to_vec(), noise(content.len(), 8)].concat();
    let bytes = index(blob.len(), &[(1..blob.len() as u64, 0, &content)]);
    let mut decoder = decoder(&Index::open(bytes.as_slice()).unwrap(), 0).unwrap();
    let mut kept = Kept::default();
    assert!(decoder.push(&blob[1..], &mut kept).is_err());
    let again = decoder.push(&frame(&content), &mut kept);
    assert_eq!(
        again,
        Err(Error::malformed("zstd frames at 1", "it failed before"))
    );
    assert!(kept.verified.is_empty());
}

#[test]
fn unpacking_stops_at_its_bound() {
    let spool = || Box::new(Vec::new());
    let bomb = frame(&vec![0; 20 << 20]);
    assert!(bomb.len() < 4000);
    assert_eq!(unpack("x", &bomb, 20 << 20, spool()).unwrap().len(), 20 << 20);
    let refused = unpack("x", &bomb, (20 << 20) - 1, spool())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("too many"), "{refused}");
    for broken in [
        &bomb[..bomb.len() - 9],
        b"text",
        &[bomb.as_slice(), b"x"].concat(),
    ] {
        assert!(matches!(
            unpack("x", broken, 21 << 20, spool()),
            Err(Error::Malformed { .. })
        ));
    }
}
