//! What goes through the pass comes out as it was, and every checkpoint leads back to the bytes behind it.

use std::collections::BTreeMap;
use std::io::Write;

use flate2::write::GzEncoder;
use flate2::{Compression, GzBuilder};

use super::decompress::GzipPass;
use super::window;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Index, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk, NewMember};
use crate::layer::kept::Kept;
use crate::layer::{self, Checkpoint, ChunkSink, Decoded, Decompressor, Format};

mod bits;
mod hostile;
mod properties;
mod whole;

/// As it comes from a pass.
#[derive(Debug, Default)]
struct Passed {
    tar: Vec<u8>,
    /// With how many bytes of the tar came before.
    checkpoints: Vec<(u64, Checkpoint)>,
}

/// The most bytes that a pass may hand over at a time.
const PIECE_BYTES_MAX: usize = 256 << 10;

/// Sends a blob through `pass` in pieces of these sizes, over and over.
fn send(mut pass: Box<dyn Decompressor>, blob: &[u8], pieces: &[usize]) -> Result<Passed> {
    let mut passed = Passed::default();
    let mut out = |decoded: Decoded<'_>| {
        match decoded {
            Decoded::Bytes(bytes) => {
                assert!(!bytes.is_empty() && bytes.len() <= PIECE_BYTES_MAX);
                passed.tar.extend_from_slice(bytes);
            }
            Decoded::Checkpoint(checkpoint) => {
                passed.checkpoints.push((passed.tar.len() as u64, checkpoint));
            }
        }
        Ok(())
    };
    for piece in cut(blob, pieces) {
        pass.push(piece, &mut out)?;
    }
    pass.finish(&mut out)?;
    Ok(passed)
}

/// Sends a blob through the pass that its first bytes ask for.
fn pass(blob: &[u8], pieces: &[usize]) -> Result<Passed> {
    let pass = layer::decompressor(blob.get(..12).unwrap_or(blob));
    assert_eq!(pass.format(), Format::Gzip);
    send(pass, blob, pieces)
}

/// Cuts `bytes` into pieces of these sizes, over and over.
fn cut<'b>(mut bytes: &'b [u8], pieces: &[usize]) -> Vec<&'b [u8]> {
    let mut cut = Vec::new();
    for &size in pieces.iter().cycle() {
        if bytes.is_empty() {
            break;
        }
        let (piece, rest) = bytes.split_at(size.clamp(1, bytes.len()));
        cut.push(piece);
        bytes = rest;
    }
    cut
}

/// How the spans of an index are to be.
#[derive(Debug, Clone, Copy, Default)]
struct Spans {
    /// Whether their compressed bytes have the digest instead of the chunks.
    checked: bool,
    /// Whether each reaches to the end of the blob, and not to the next checkpoint.
    to_the_end: bool,
}

/// An index whose files are the spans behind each checkpoint, in chunks of different sizes with small gaps between them.
/// Returns the chunks' contents too.
fn index(blob: &[u8], passed: &Passed, spans: Spans) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let mut contents = Vec::new();
    for (number, (tar_start, checkpoint)) in passed.checkpoints.iter().enumerate() {
        let next = passed.checkpoints.get(number + 1).filter(|_| !spans.to_the_end);
        let (tar_end, blob_end) = next.map_or((passed.tar.len(), blob.len() as u64), |(tar_end, next)| {
            (*tar_end as usize, next.blob_start + u64::from(next.bits > 0))
        });
        let compressed = &blob[checkpoint.blob_start as usize..blob_end as usize];
        let member = NewMember {
            blob_start: checkpoint.blob_start,
            blob_end,
            coding: checkpoint.coding,
            bits: checkpoint.bits,
            window: checkpoint.window.clone(),
            check: spans.checked.then(|| Digest::of(compressed)),
        };
        builder.member(member).unwrap();
        let span = &passed.tar[*tar_start as usize..tar_end];
        let mut at = 0;
        while at < span.len() {
            let len = (1 + number * 7 + at * 2).min(span.len() - at);
            let content = span[at..at + len].to_vec();
            builder
                .entry(&Entry {
                    size: len as u64,
                    ..Entry::new(contents.len().to_string(), Kind::File)
                })
                .unwrap();
            let chunk = NewChunk {
                bytes: len as u64,
                blob_offset: checkpoint.blob_start,
                inner_offset: at as u64,
                digest: (!spans.checked).then(|| Digest::of(&content)),
            };
            builder.chunk(chunk).unwrap();
            contents.push(content);
            at += len + at % 3;
        }
    }
    let blob_bytes = blob.len() as u64;
    let summary = Summary::of(Format::Gzip, blob_bytes);
    (builder.finish(summary, blob_bytes).unwrap().to_vec(), contents)
}

/// Decodes every member of an index from its own range of the blob, in pieces of these sizes.
fn decode(index: &[u8], blob: &[u8], pieces: &[usize]) -> Result<BTreeMap<u32, Vec<u8>>> {
    let index = Index::open(index).unwrap();
    let mut kept = Kept::default();
    for number in 0..index.member_count() {
        let range = index.member(number)?.blob_range();
        let mut decoder = layer::decoder(&index, number)?;
        let mut done = false;
        for piece in cut(&blob[range.start as usize..range.end as usize], pieces) {
            done = decoder.push(piece, &mut kept)?;
        }
        if !done {
            return Err(Error::malformed(format!("member {number}"), "cut short"));
        }
    }
    Ok(kept.verified)
}

/// Fails unless every checkpoint of the pass leads back to what came behind it.
fn check_every_checkpoint(blob: &[u8], passed: &Passed, pieces: &[usize]) {
    for checked in [false, true] {
        for to_the_end in [false, true] {
            let (index, contents) = index(blob, passed, Spans { checked, to_the_end });
            let decoded = decode(&index, blob, pieces).unwrap();
            assert_eq!(decoded.len(), contents.len());
            for (chunk, content) in decoded {
                assert!(content == contents[chunk as usize], "chunk {chunk}");
            }
        }
    }
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(next).collect()
}

/// Bytes that compress about as programs and texts do, with references as far back as deflate goes.
fn text(len: usize) -> Vec<u8> {
    let noise = noise(len);
    let mut text = Vec::with_capacity(len + 64);
    while text.len() < len {
        let at = text.len();
        let (far, run) = (
            usize::from(noise[at]) * 128 + 1,
            usize::from(noise[at / 2]) % 64 + 4,
        );
        if far <= at && noise[at / 3] > 60 {
            let from = at - far;
            text.extend_from_within(from..from + run.min(far));
        } else {
            text.extend(noise[at..].iter().take(8).map(|byte| b'a' + byte % 20));
        }
    }
    text.truncate(len);
    text
}

fn gzip(plain: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_large_blob_has_a_checkpoint_every_few_megabytes() {
    let kinds = [
        ("text", text(14 << 20), 6),
        ("text, faster", text(14 << 20), 3),
        ("noise", noise(9 << 20), 6),
        ("stored", noise(9 << 20), 0),
        ("zeros", vec![0; 40 << 20], 9),
    ];
    for (kind, plain, level) in kinds {
        let blob = gzip(&plain, level);
        let passed = pass(&blob, &[64 << 10, 1, 10_000]).unwrap();
        assert!(passed.tar == plain, "{kind}");
        let places: Vec<u64> = passed.checkpoints.iter().map(|(place, _)| *place).collect();
        assert_eq!(places[0], 0, "{kind}");
        let gaps: Vec<u64> = places.windows(2).map(|pair| pair[1] - pair[0]).collect();
        // A block of zeros is long: 16383 symbols of up to 258 bytes.
        assert!(
            !gaps.is_empty() && gaps.iter().all(|gap| (4 << 20..9 << 20).contains(gap)),
            "{kind}: {gaps:?}"
        );
        check_every_checkpoint(&blob, &passed, &[64 << 10]);
    }
}

#[test]
fn every_level_and_flush_can_be_started_at() {
    let plain = text(300_000);
    for level in 0..=9 {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
        for part in plain.chunks(70_000) {
            encoder.write_all(part).unwrap();
            encoder.flush().unwrap();
        }
        let blob = encoder.finish().unwrap();
        let passed = send(Box::new(GzipPass::with_spacing(20_000, 1)), &blob, &[5000]).unwrap();
        assert!(
            passed.tar == plain && passed.checkpoints.len() > 4,
            "level {level}"
        );
        check_every_checkpoint(&blob, &passed, &[777]);
    }
}

#[test]
fn members_follow_one_another_and_their_starts_need_no_window() {
    let parts = [
        text(100),
        noise(3 << 20),
        Vec::new(),
        text(2 << 20),
        vec![0; 5 << 20],
        b"end".to_vec(),
    ];
    let named = GzBuilder::new()
        .filename("name")
        .extra(vec![7; 300])
        .comment("comment");
    let mut encoder = named.write(Vec::new(), Compression::best());
    encoder.write_all(&parts[0]).unwrap();
    let mut blob = encoder.finish().unwrap();
    let mut starts = Vec::new();
    for part in &parts[1..] {
        starts.push(blob.len() as u64 + 10);
        blob.extend(gzip(part, 6));
    }
    let passed = pass(&blob, &[4096]).unwrap();
    assert!(passed.tar == parts.concat());
    let at_members: Vec<_> = passed
        .checkpoints
        .iter()
        .filter(|(_, checkpoint)| starts.contains(&checkpoint.blob_start))
        .collect();
    // Not at the second: 100 bytes are no distance. Not at the fourth: the third was empty. Not at the last: a block of the
    // zeros has ended shortly before.
    let at_members_starts: Vec<u64> = at_members.iter().map(|(_, at)| at.blob_start).collect();
    assert_eq!(at_members_starts, [starts[1], starts[3]]);
    assert!(
        at_members
            .iter()
            .all(|(_, at)| at.window.is_empty() && at.bits == 0)
    );
    check_every_checkpoint(&blob, &passed, &[100_000]);
}

#[test]
fn thousands_of_small_members_come_to_few_checkpoints() {
    let parts: Vec<Vec<u8>> = (0..3000).map(|n| text(n % 900)).collect();
    let blob: Vec<u8> = parts.iter().flat_map(|part| gzip(part, 6)).collect();
    let passed = pass(&blob, &[10_000]).unwrap();
    assert!(passed.tar == parts.concat());
    assert_eq!(passed.checkpoints.len(), 2);
    check_every_checkpoint(&blob, &passed, &[10_000]);
}

#[test]
fn zeros_behind_the_last_member_are_padding() {
    let blob = [gzip(b"one", 6), gzip(b"two", 6), vec![0; 10_000]].concat();
    for pieces in [&[1][..], &[3, 100], &[usize::MAX]] {
        assert_eq!(pass(&blob, pieces).unwrap().tar, b"onetwo");
    }
}

#[test]
fn an_empty_member_is_an_empty_tar() {
    let passed = pass(&gzip(b"", 6), &[1]).unwrap();
    assert!(passed.tar.is_empty() && passed.checkpoints.len() == 1);
}

#[test]
fn what_bytes_say_decides_and_not_who_says_what_they_are() {
    let formats = [
        (&gzip(b"x", 6)[..12], Format::Gzip),
        (&[0x1f, 0x8b], Format::Gzip),
        (&[0x1f], Format::Tar),
        (&[], Format::Tar),
        (b"etc/passwd\0\0", Format::Tar),
    ];
    for (first, format) in formats {
        assert_eq!(layer::decompressor(first).format(), format);
    }
}
