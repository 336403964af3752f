//! What every index of a layer must keep to, wherever it came from, and the ways in which layers are read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use registryfs::digest::{Digest, Hasher};
use registryfs::error::{Error, Result};
use registryfs::image::tree::{self, Tree, Whiteouts};
use registryfs::layer::entry::{Kind, clean_path};
use registryfs::layer::index::Index;
use registryfs::layer::scan::Scanned;
use registryfs::layer::spool::InMemory;
use registryfs::layer::{self, ChunkSink, ContentSink, Decoded, Descriptor, Step};
use registryfs::layer::{exchange, indexer};

use crate::engine::Shape;

/// Members of one index that are decoded in one execution.
const MEMBERS_MAX: u32 = 40;
/// Decoded bytes after which a pass is broken off: what they cost is known by then.
const DECODED_BYTES_MAX: u64 = 16 << 20;
/// Steps of an indexer: none needs as many.
const STEPS_MAX: usize = 10;

/// Two sizes of pieces to push an input in: all at once, and small ones.
pub(crate) fn pieces(input: &[u8]) -> [usize; 2] {
    [usize::MAX, 1 + input.len() * 31 % 700]
}

/// What a layer's index is made from besides its blob.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Beside<'b> {
    pub(crate) ztoc: Option<&'b [u8]>,
    pub(crate) external_toc: Option<&'b [u8]>,
}

pub(crate) const NOTHING: Beside<'static> = Beside {
    ztoc: None,
    external_toc: None,
};

pub(crate) fn descriptor(media_type: &str, blob: &[u8], annotations: BTreeMap<String, String>) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(b"layer"),
        size: blob.len() as u64,
        annotations,
        urls: Vec::new(),
    }
}

/// The index of a layer by its table of contents; `None` where it wants a pass.
pub(crate) fn index_of(layer: &Descriptor, blob: &[u8], beside: Beside<'_>) -> Result<Option<Vec<u8>>> {
    let ztoc = beside.ztoc.map(|ztoc| Descriptor {
        digest: Digest::of(ztoc),
        ..descriptor("application/octet-stream", ztoc, BTreeMap::new())
    });
    let mut indexer = indexer(layer, ztoc.as_ref(), Arc::new(InMemory))?;
    let mut external_toc = beside.external_toc;
    let mut given: Option<&[u8]> = None;
    for _ in 0..STEPS_MAX {
        match indexer.step(given.take())? {
            Step::Need(range) => given = Some(part(blob, &range).expect("a range beyond the blob")),
            Step::NeedBlob(wanted) => {
                assert_eq!(Some(&wanted), ztoc.as_ref());
                given = beside.ztoc;
            }
            Step::NeedExternalToc => given = external_toc.take(),
            Step::Done(index) => return Ok(Some(index.to_vec())),
            Step::Pass => return Ok(None),
        }
    }
    panic!("the indexer does not come to an end");
}

fn part<'b>(blob: &'b [u8], range: &Range<u64>) -> Option<&'b [u8]> {
    blob.get(range.start as usize..range.end as usize)
}

/// Checks all that holds for an index of our own making.
pub(crate) fn check_index(bytes: &[u8], shape: &mut Shape) {
    let index = Index::open(bytes).expect("an index that cannot be opened");
    let summary = *index.summary();
    let mut chunks_end = 0;
    for number in 0..index.entry_count() {
        let entry = index.entry(number).unwrap();
        assert_eq!(
            clean_path(entry.path).path,
            entry.path,
            "a name that is not clean"
        );
        assert!(!entry.path.contains(&0) && entry.path.split(|&b| b == b'/').all(|name| name.len() < 256));
        index.xattrs(&entry).unwrap();
        index.content_digest(&entry).unwrap();
        assert!(entry.kind == Kind::File || entry.chunks.1 == 0);
        let mut at = entry.data_offset;
        assert!(entry.data_offset + entry.size <= summary.data_bytes);
        assert_eq!(entry.chunks.0, chunks_end, "chunks without an entry");
        chunks_end += entry.chunks.1;
        for chunk in entry.chunk_range() {
            let chunk = index.chunk(chunk).unwrap();
            assert!(chunk.data_offset >= at && chunk.bytes > 0 && chunk.entry == number);
            at = chunk.data_offset + chunk.bytes;
            assert!(at <= entry.data_offset + entry.size, "a chunk beyond its file");
            let member = index.member(chunk.member).unwrap();
            assert!(chunk.digest.is_some() || index.check(&member).unwrap().is_some());
        }
        shape.note((entry.kind as u8, entry.clamped));
        shape.count(entry.size);
    }
    assert_eq!(chunks_end, index.chunk_count());
    for number in 0..index.member_count() {
        let member = index.member(number).unwrap();
        assert!(member.blob_range().end <= summary.blob_bytes);
        index.window(&member).unwrap();
        assert_eq!(index.member_chunks(&member).unwrap().len(), member.count as usize);
        for chunk in index.member_chunks(&member).unwrap() {
            assert_eq!(index.chunk(chunk).unwrap().member, number);
        }
    }
    shape.count(u64::from(index.chunk_count()));
    shape.count(u64::from(index.member_count()));
    shape.note(layer::reading(&index).name());
    check_exchange(bytes, &index);
    check_tree(&index, shape);
}

/// What one machine exports another one takes as it is.
fn check_exchange(bytes: &[u8], index: &Index<&[u8]>) {
    if index.summary().passed().is_some() {
        let record = exchange::pack(&Digest::of(b"layer"), bytes).unwrap();
        let taken = exchange::unpack(&mut record.as_slice()).expect("an index that is not taken");
        assert!(taken.index == bytes);
    }
}

/// Whether an error says that the image is to blame.
fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Malformed { .. } | Error::Unsupported { .. })
}

fn check_tree(index: &Index<&[u8]>, shape: &mut Shape) {
    let key = Digest::of(b"key");
    for whiteouts in [Whiteouts::Apply, Whiteouts::Show] {
        match tree::merge(&[index, index], &key, whiteouts) {
            Ok(merged) => {
                let tree = Tree::open(merged.bytes.as_slice(), &key).unwrap();
                shape.count(walk(&tree).expect("a tree that cannot be read"));
                shape.count(merged.warnings.len() as u64);
            }
            Err(error) => {
                assert!(is_refusal(&error), "{error}");
                shape.error(&error);
            }
        }
    }
}

/// Reads all of a tree from its root and says how many names it has.
pub(crate) fn walk(tree: &Tree<&[u8]>) -> Result<u64> {
    let (mut names, mut open) = (0, vec![tree.node(tree::ROOT)?]);
    while let Some(dir) = open.pop() {
        for position in 0..dir.child_count {
            let Some((name, child)) = tree.child_at(&dir, position)? else {
                continue;
            };
            names += 1;
            let node = tree.node(child)?;
            assert_eq!(tree.lookup(dir.number, name)?, Some(child));
            tree.link(&node)?;
            tree.xattrs(&node)?;
            if node.is_dir() {
                tree.path_of(child)?;
                open.push(node);
            }
        }
    }
    Ok(names)
}

/// Takes what a decoder hands over, and holds it to what the index says.
struct Taken<'i> {
    index: &'i Index<&'i [u8]>,
    open: BTreeMap<u32, (u64, Hasher)>,
    verified: BTreeMap<u32, Digest>,
}

impl ChunkSink for Taken<'_> {
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let (at, hasher) = self.open.entry(chunk).or_default();
        assert_eq!(*at, offset, "a piece that does not follow");
        *at += bytes.len() as u64;
        assert!(
            *at <= self.index.chunk(chunk).unwrap().bytes,
            "more than the chunk"
        );
        hasher.update(bytes);
        Ok(())
    }

    fn verified(&mut self, chunk: u32) -> Result<()> {
        let (bytes, hasher) = self.open.remove(&chunk).expect("a chunk without bytes");
        let promised = self.index.chunk(chunk).unwrap();
        let actual = hasher.finish();
        assert_eq!(bytes, promised.bytes, "not all of the chunk");
        assert!(
            promised.digest.is_none_or(|promised| promised == actual),
            "not what was promised"
        );
        assert!(self.verified.insert(chunk, actual).is_none(), "verified twice");
        Ok(())
    }
}

/// Decodes members of a layer, in pieces of several sizes, and says what their chunks are.
pub(crate) fn decode(index: &Index<&[u8]>, blob: &[u8], shape: &mut Shape) -> BTreeMap<u32, Digest> {
    let mut all = BTreeMap::new();
    for number in 0..index.member_count().min(MEMBERS_MAX) {
        let Some(bytes) = part(blob, &index.member(number).unwrap().blob_range()) else {
            continue;
        };
        let mut whole = None;
        for piece in pieces(bytes) {
            let (outcome, verified) = decode_member(index, number, bytes, piece);
            let is_done = matches!(outcome, Ok(true));
            if let Some((was_done, before)) = &whole {
                assert_eq!(is_done, *was_done, "pieces of {piece}: {outcome:?}");
                assert!(!is_done || verified == *before, "pieces of {piece}");
            } else {
                shape.result(outcome, Shape::note);
                whole = Some((is_done, verified.clone()));
            }
            all.extend(verified);
        }
        check_against_checksum(index, number, bytes, &all);
    }
    all
}

/// Where the compressed bytes have a digest, nothing is taken of others.
fn check_against_checksum(index: &Index<&[u8]>, number: u32, bytes: &[u8], verified: &BTreeMap<u32, Digest>) {
    let member = index.member(number).unwrap();
    let promised = index.check(&member).unwrap();
    if promised.is_some_and(|promised| promised != Digest::of(bytes)) {
        let chunks = index.member_chunks(&member).unwrap();
        assert!(
            !chunks.iter().any(|chunk| verified.contains_key(chunk)),
            "unverified"
        );
    }
}

fn decode_member(
    index: &Index<&[u8]>,
    number: u32,
    bytes: &[u8],
    piece: usize,
) -> (Result<bool>, BTreeMap<u32, Digest>) {
    let mut taken = Taken {
        index,
        open: BTreeMap::new(),
        verified: BTreeMap::new(),
    };
    let mut decode = || {
        let mut decoder = layer::decoder(index, number)?;
        let mut is_done = false;
        for bytes in bytes.chunks(piece) {
            is_done = decoder.push(bytes, &mut taken)?;
        }
        Ok(is_done)
    };
    let outcome = decode();
    (outcome, taken.verified)
}

/// The content of files, by its place in the data file, in runs.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Content(BTreeMap<u64, Vec<u8>>);

impl ContentSink for Content {
    fn content(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        if let Some((start, run)) = self.0.last_entry().map(|last| (*last.key(), last.into_mut())) {
            let end = start + run.len() as u64;
            assert!(data_offset >= end, "content goes back");
            if end == data_offset {
                run.extend_from_slice(bytes);
                return Ok(());
            }
        }
        self.0.insert(data_offset, bytes.to_vec());
        Ok(())
    }
}

impl Content {
    /// Checks that each chunk has the digest of what was handed over for it.
    pub(crate) fn check(&self, index: &Index<&[u8]>) {
        for number in 0..index.chunk_count() {
            let chunk = index.chunk(number).unwrap();
            let (start, run) = self
                .0
                .range(..=chunk.data_offset)
                .next_back()
                .expect("no content");
            let from = (chunk.data_offset - start) as usize;
            let bytes = run
                .get(from..from + chunk.bytes as usize)
                .expect("content is missing");
            assert_eq!(chunk.digest, Some(Digest::of(bytes)));
        }
    }
}

/// Streams a layer once, in pieces of this size. Tells how many bytes were decoded too.
pub(crate) fn pass(blob: &[u8], piece: usize) -> (Result<(Scanned, Content)>, u64) {
    let mut decoded_bytes = 0;
    let passed = counted_pass(blob, piece, &mut decoded_bytes);
    (passed, decoded_bytes)
}

fn counted_pass(blob: &[u8], piece: usize, decoded_bytes: &mut u64) -> Result<(Scanned, Content)> {
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar", blob, BTreeMap::new());
    let mut decompressor = layer::decompressor(&blob[..blob.len().min(16)]);
    let mut scanner = layer::scanner(&layer, decompressor.format(), Arc::new(InMemory));
    let mut content = Content::default();
    let mut out = |decoded: Decoded<'_>| match decoded {
        Decoded::Checkpoint(checkpoint) => scanner.checkpoint(checkpoint),
        Decoded::Bytes(tar) => {
            *decoded_bytes += tar.len() as u64;
            if *decoded_bytes > DECODED_BYTES_MAX {
                return Err(Error::unsupported("layer", "it goes on for long"));
            }
            scanner.push(tar, &mut content)
        }
    };
    for bytes in blob.chunks(piece) {
        decompressor.push(bytes, &mut out)?;
    }
    decompressor.finish(&mut out)?;
    Ok((scanner.finish(blob.len() as u64)?, content))
}

/// Streams a layer in pieces of several sizes, checks what comes of it, and reads it back by ranges.
pub(crate) fn check_pass(blob: &[u8]) -> Shape {
    let mut shape = Shape::default();
    let [whole, small] = pieces(blob);
    let (first, decoded_bytes) = pass(blob, whole);
    shape.count(decoded_bytes);
    match (&first, pass(blob, small).0) {
        (Ok((scanned, content)), Ok((other, other_content))) => {
            assert!(
                *scanned.index == *other.index && *content == other_content,
                "pieces of {small}"
            );
        }
        (Err(_), Err(_)) => {}
        (first, other) => panic!("pieces of {small}: {:?}, {:?}", first.as_ref().err(), other.err()),
    }
    shape.result(first, |shape, (scanned, content)| {
        check_index(&scanned.index, shape);
        let index = Index::open(scanned.index.as_slice()).unwrap();
        assert_eq!(index.summary().passed(), Some(scanned.diff_id));
        content.check(&index);
        let verified = decode(&index, blob, shape);
        let expected: u32 = (0..index.member_count().min(MEMBERS_MAX))
            .map(|member| index.member(member).unwrap().count)
            .sum();
        assert_eq!(
            verified.len(),
            expected as usize,
            "what a pass has read cannot be read again"
        );
    });
    shape
}
