//! Layers scanned in random pieces with random checkpoints, and read back chunk by chunk with the decoder.

use proptest::prelude::*;

use crate::digest::Digest;
use crate::error::Result;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, DATA_ALIGN_BYTES, Index};
use crate::layer::scan::{LayerScanner, Scanned};
use crate::layer::tar::tests::raw::{padded, sparse};
use crate::layer::tar::{END_BYTES, header};
use crate::layer::{Checkpoint, ChunkSink, ContentSink, Format, decoder};

/// A data file in memory.
#[derive(Debug, Default, PartialEq)]
struct Data {
    bytes: Vec<u8>,
    /// Where the next content must start at the earliest.
    end: u64,
}

impl Data {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset as usize + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[offset as usize..end].copy_from_slice(bytes);
    }
}

impl ContentSink for Data {
    fn content(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        assert!(data_offset >= self.end && !bytes.is_empty());
        self.end = data_offset + bytes.len() as u64;
        self.write(data_offset, bytes);
        Ok(())
    }
}

fn checkpoint(blob_start: u64) -> Checkpoint {
    Checkpoint {
        blob_start,
        coding: Coding::Stored,
        bits: 0,
        window: Vec::new(),
    }
}

/// Scans a tar in pieces of these lengths, over and over, with a checkpoint in front of each piece if it is not a plain
/// tar. The blob is the tar itself.
fn scan(format: Format, tar: &[u8], pieces: &[usize]) -> Result<(Scanned, Data)> {
    let mut scanner = LayerScanner::new(format);
    let mut data = Data::default();
    let (mut at, mut lengths) = (0, pieces.iter().cycle());
    while at < tar.len() {
        if format != Format::Tar {
            scanner.checkpoint(checkpoint(at as u64))?;
        }
        let end = tar.len().min(at + lengths.next().unwrap());
        scanner.push(&tar[at..end], &mut data)?;
        at = end;
    }
    Ok((scanner.finish(tar.len() as u64)?, data))
}

/// What the decoder makes of all members of a blob.
struct Decoded<'a> {
    index: &'a Index<&'a [u8]>,
    data: Data,
    verified: Vec<u32>,
}

impl ChunkSink for Decoded<'_> {
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = self.index.chunk(chunk)?.data_offset + offset;
        self.data.write(place, bytes);
        Ok(())
    }

    fn verified(&mut self, chunk: u32) -> Result<()> {
        self.verified.push(chunk);
        Ok(())
    }
}

fn decode_all(index: &Index<&[u8]>, blob: &[u8]) -> Result<Vec<u8>> {
    let mut sink = Decoded {
        index,
        data: Data::default(),
        verified: Vec::new(),
    };
    for number in 0..index.member_count() {
        let range = index.member(number)?.blob_range();
        let mut member = decoder(index, number)?;
        let mut done = false;
        for piece in blob[range.start as usize..range.end as usize].chunks(700) {
            assert!(!done || index.summary().format != Format::Tar);
            done = member.push(piece, &mut sink)?;
        }
        assert!(done, "member {number}");
    }
    sink.verified.sort_unstable();
    let all: Vec<u32> = (0..index.chunk_count()).collect();
    assert_eq!(sink.verified, all);
    Ok(sink.data.bytes)
}

/// A file of a layer: its size, its segments, and what is in them.
#[derive(Debug, Clone)]
struct File {
    content: Vec<u8>,
    segments: Vec<(u64, u64)>,
}

fn any_file() -> impl Strategy<Value = File> {
    let segments = prop::collection::vec((0..3000u64, 1..2000u64), 0..5);
    (segments, 0..3000u64, any::<u8>()).prop_map(|(parts, tail, seed)| {
        let (mut at, mut segments) = (0, Vec::new());
        for (gap, bytes) in parts {
            segments.push((at + gap, bytes));
            at += gap + bytes;
        }
        let mut content = vec![0; (at + tail) as usize];
        for &(offset, bytes) in &segments {
            for (i, byte) in content[offset as usize..(offset + bytes) as usize]
                .iter_mut()
                .enumerate()
            {
                *byte = (i as u8).wrapping_mul(31).wrapping_add(seed);
            }
        }
        File { content, segments }
    })
}

fn tar_of(files: &[File]) -> Vec<u8> {
    let mut tar = header(&Entry::new("dir", Kind::Dir)).unwrap();
    for (number, file) in files.iter().enumerate() {
        let size = file.content.len() as u64;
        if number % 2 == 0 {
            let stored: Vec<u8> = file
                .segments
                .iter()
                .flat_map(|&(offset, bytes)| &file.content[offset as usize..(offset + bytes) as usize])
                .copied()
                .collect();
            tar.extend(sparse(&number.to_string(), size, &file.segments, &stored));
        } else {
            let entry = Entry {
                size,
                ..Entry::new(number.to_string(), Kind::File)
            };
            tar.extend(header(&entry).unwrap());
            tar.extend(padded(&file.content));
        }
    }
    tar.extend([0; END_BYTES]);
    tar
}

proptest! {
    #[test]
    fn every_chunk_is_decoded_again_to_what_the_pass_saw(
        files in prop::collection::vec(any_file(), 0..6),
        pieces in prop::collection::vec(1..4000usize, 1..8),
        is_plain in any::<bool>(),
    ) {
        let format = if is_plain { Format::Tar } else { Format::Gzip };
        let tar = tar_of(&files);
        let (scanned, data) = scan(format, &tar, &pieces).unwrap();
        prop_assert_eq!(scanned.diff_id, Digest::of(&tar));
        let index = Index::open(&scanned.index[..]).unwrap();
        prop_assert_eq!(index.summary().passed(), Some(scanned.diff_id));
        prop_assert_eq!((index.summary().tar_bytes, index.summary().blob_bytes), (tar.len() as u64, tar.len() as u64));
        prop_assert_eq!(index.entry_count() as usize, files.len() + 1);
        // What the pass hands on, what is decoded later, and what was written are the same.
        prop_assert_eq!(&decode_all(&index, &tar).unwrap(), &data.bytes);
        for (number, file) in files.iter().enumerate() {
            let entry = index.entry(number as u32 + 1).unwrap();
            let size = file.content.len();
            prop_assert_eq!((entry.size, entry.data_offset % DATA_ALIGN_BYTES), (size as u64, 0));
            let mut content: Vec<u8> = data.bytes.iter().skip(entry.data_offset as usize).take(size).copied().collect();
            content.resize(size, 0);
            prop_assert!(content == file.content);
            // Holes are in no chunk.
            let stored: u64 = entry.chunk_range().map(|chunk| index.chunk(chunk).unwrap().bytes).sum();
            let written = if number % 2 == 0 { file.segments.iter().map(|(_, bytes)| bytes).sum() } else { size as u64 };
            prop_assert_eq!(stored, written);
        }
    }
}

fn one_file(content: &[u8]) -> Vec<u8> {
    let entry = Entry {
        size: content.len() as u64,
        ..Entry::new("file", Kind::File)
    };
    [header(&entry).unwrap(), padded(content), vec![0; END_BYTES]].concat()
}

#[test]
fn long_files_are_cut() {
    let content: Vec<u8> = (0..(9 << 20) + 5u32).map(|i| (i / 77) as u8).collect();
    let tar = one_file(&content);
    let lengths = |format, pieces: &[usize]| -> Vec<u64> {
        let (scanned, data) = scan(format, &tar, pieces).unwrap();
        assert!(data.bytes == content);
        let index = Index::open(&scanned.index[..]).unwrap();
        assert!(decode_all(&index, &tar).unwrap() == content);
        (0..index.chunk_count())
            .map(|chunk| index.chunk(chunk).unwrap().bytes)
            .collect()
    };
    let mut plain = vec![256 << 10; 36];
    plain.push(5);
    assert_eq!(lengths(Format::Tar, &[100_000]), plain);
    assert_eq!(
        lengths(Format::Gzip, &[tar.len()]),
        [4 << 20, 4 << 20, (1 << 20) + 5]
    );
    let cut = 512 + (5 << 20);
    assert_eq!(lengths(Format::Gzip, &[cut]), [4 << 20, 1 << 20, 4 << 20, 5]);
}

#[test]
fn members_reach_into_the_byte_that_they_share() {
    let tar = one_file(&[1; 3000]);
    let mut scanner = LayerScanner::new(Format::Gzip);
    let mut data = Data::default();
    let deflate = |blob_start, bits| Checkpoint {
        coding: Coding::Deflate,
        bits,
        window: vec![bits; 3],
        ..checkpoint(blob_start)
    };
    scanner.checkpoint(deflate(10, 0)).unwrap();
    scanner.push(&tar[..1000], &mut data).unwrap();
    scanner.checkpoint(deflate(200, 3)).unwrap();
    scanner.push(&tar[1000..2000], &mut data).unwrap();
    scanner.checkpoint(deflate(300, 0)).unwrap();
    scanner.push(&tar[2000..], &mut data).unwrap();
    // One of which no chunk is ends the one before it all the same.
    scanner.checkpoint(deflate(400, 5)).unwrap();
    let scanned = scanner.finish(500).unwrap();
    let index = Index::open(&scanned.index[..]).unwrap();
    let members: Vec<_> = (0..index.member_count())
        .map(|number| index.member(number).unwrap())
        .collect();
    let ranges: Vec<_> = members
        .iter()
        .map(|member| (member.blob_range(), member.bits))
        .collect();
    assert_eq!(ranges, [(10..201, 0), (200..300, 3), (300..401, 0)]);
    assert_eq!(index.window(&members[1]).unwrap(), [3; 3]);
    let inner: Vec<u64> = (0..3)
        .map(|chunk| index.chunk(chunk).unwrap().inner_offset)
        .collect();
    assert_eq!(inner, [512, 0, 0]);
}

#[test]
fn an_empty_layer_has_an_index_without_entries() {
    for format in [Format::Tar, Format::Gzip, Format::Zstd] {
        let scanned = LayerScanner::new(format).finish(0).unwrap();
        assert_eq!((scanned.diff_id, scanned.tar_bytes), (Digest::of(b""), 0));
        let index = Index::open(&scanned.index[..]).unwrap();
        assert_eq!((index.entry_count(), index.summary().format), (0, format));
    }
}

#[test]
fn what_cannot_be_decoded_again_is_refused() {
    let tar = one_file(b"abc");
    let mut scanner = LayerScanner::new(Format::Gzip);
    scanner.push(&tar, &mut Data::default()).unwrap();
    let error = scanner.finish(100).unwrap_err().to_string();
    assert!(
        error.contains("no place is known from which to decode it"),
        "{error}"
    );
    // Places that do not follow one another in the blob.
    let mut scanner = LayerScanner::new(Format::Gzip);
    scanner.checkpoint(checkpoint(50)).unwrap();
    scanner.push(&tar, &mut Data::default()).unwrap();
    assert!(scanner.checkpoint(checkpoint(50)).is_err());
    // A tar that is cut short.
    let mut scanner = LayerScanner::new(Format::Tar);
    scanner.push(&tar[..514], &mut Data::default()).unwrap();
    let error = scanner.finish(514).unwrap_err().to_string();
    assert!(error.contains("cut short"), "{error}");
}

#[test]
fn files_that_are_left_out_leave_nothing_behind() {
    let file = |path: &str, content: &[u8]| {
        let mut entry = Entry::new(path, Kind::File);
        entry.size = content.len() as u64;
        [header(&entry).unwrap(), padded(content)].concat()
    };
    let dir = header(&Entry::new("own/", Kind::Dir)).unwrap();
    let tar = [
        file("a", b"a"),
        file("./own", b"left out"),
        dir,
        file("own/own", b"stays"),
        vec![0; END_BYTES],
    ]
    .concat();
    let mut scanner = LayerScanner::new(Format::Tar).leaving_out(&["own"]);
    let mut data = Data::default();
    for piece in tar.chunks(7) {
        scanner.push(piece, &mut data).unwrap();
    }
    let scanned = scanner.finish(tar.len() as u64).unwrap();
    assert_eq!(scanned.diff_id, Digest::of(&tar));
    let index = Index::open(scanned.index.as_slice()).unwrap();
    let paths: Vec<&[u8]> = (0..index.entry_count())
        .map(|number| index.entry(number).unwrap().path)
        .collect();
    assert_eq!(paths, [b"a".as_slice(), b"own", b"own/own"]);
    assert_eq!(index.chunk_count(), 2);
    let place = index.entry(2).unwrap().data_offset as usize;
    assert_eq!(&data.bytes[place..], b"stays");
}
