//! Whole layers: what the writer wrote is read back, and what nobody should write is refused.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use super::writer::{Finished, Landmark, Options, Variant, write_layer};
use super::*;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::Index;
use crate::layer::kept::Kept;
use crate::layer::spool::InMemory;
use crate::layer::{decoder, indexer, tar};

mod hostile;
mod properties;
mod variants;
mod written;

const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn descriptor(blob: &[u8], toc_digest: Option<Digest>) -> Descriptor {
    let annotation = toc_digest.map(|digest| (TOC_DIGEST_ANNOTATION.to_owned(), digest.to_string()));
    Descriptor {
        media_type: GZIP_LAYER.into(),
        digest: Digest::of(blob),
        size: blob.len() as u64,
        annotations: annotation.into_iter().collect(),
        urls: Vec::new(),
    }
}

/// Indexes a blob and says which ranges that took.
fn index_blob(blob: &[u8], toc_digest: Option<Digest>) -> Result<(Vec<u8>, Vec<Range<u64>>)> {
    let mut indexer = indexer(&descriptor(blob, toc_digest), None, Arc::new(InMemory))?;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    loop {
        let wanted = ranges
            .last()
            .map(|range| &blob[range.start as usize..range.end as usize]);
        match indexer.step(wanted)? {
            Step::Need(range) => ranges.push(range),
            Step::Done(index) => return Ok((index.to_vec(), ranges)),
            Step::Pass => return Err(Error::unsupported("layer", "it takes a pass")),
            other => panic!("{other:?}"),
        }
        assert!(ranges.len() <= 2, "more than two reads: {ranges:?}");
    }
}

/// Indexes what the writer wrote, whichever variant it is.
fn index_written(blob: &[u8], finished: &Finished) -> Result<Vec<u8>> {
    let Some(toc) = &finished.external_toc else {
        return Ok(index_blob(blob, Some(finished.toc_digest))?.0);
    };
    let mut indexer = indexer(
        &descriptor(blob, Some(finished.toc_digest)),
        None,
        Arc::new(InMemory),
    )?;
    let Step::Need(tail) = indexer.step(None)? else {
        panic!("nothing is asked of the blob");
    };
    let mut step = indexer.step(Some(&blob[tail.start as usize..tail.end as usize]))?;
    if matches!(step, Step::NeedExternalToc) {
        step = indexer.step(Some(toc))?;
    }
    match step {
        Step::Done(index) => Ok(index.to_vec()),
        other => Err(Error::malformed("layer", format!("{other:?}"))),
    }
}

/// Decodes every member, pushed in pieces of `piece` bytes; members that fail contribute what was verified before.
fn decode_blob(index: &Index<&[u8]>, blob: &[u8], piece: usize) -> (BTreeMap<u32, Vec<u8>>, usize) {
    let mut chunks = Kept::default();
    let mut failed = 0;
    for number in 0..index.member_count() {
        let range = index.member(number).unwrap().blob_range();
        let bytes = &blob[range.start as usize..range.end as usize];
        let mut decoder = decoder(index, number).unwrap();
        let outcome = bytes
            .chunks(piece)
            .try_fold(false, |_, bytes| decoder.push(bytes, &mut chunks));
        failed += usize::from(outcome != Ok(true));
        chunks.open.clear();
    }
    (chunks.verified, failed)
}

/// The content of an entry, from its chunks.
fn content(index: &Index<&[u8]>, chunks: &BTreeMap<u32, Vec<u8>>, number: u32) -> Vec<u8> {
    index
        .entry(number)
        .unwrap()
        .chunk_range()
        .flat_map(|chunk| chunks[&chunk].clone())
        .collect()
}

fn gunzip_member(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    GzDecoder::new(bytes).read_to_end(&mut out).unwrap();
    out
}

/// The JSON of a layer's TOC.
fn toc_json(blob: &[u8], finished: &Finished) -> Vec<u8> {
    let member = gunzip_member(&blob[finished.toc_offset as usize..]);
    let size = tar::read_plain_header(member.first_chunk().unwrap(), TOC_NAME.as_bytes()).unwrap();
    member[512..512 + size as usize].to_vec()
}

/// A blob with these members and this TOC.
fn blob_with_toc(members: &[u8], json: &[u8]) -> Vec<u8> {
    let size = json.len() as u64;
    let header = tar::header(&Entry {
        size,
        ..Entry::new(TOC_NAME, Kind::File)
    })
    .unwrap();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder
        .write_all(&[&header, json, &vec![0; tar::padding(size) + 1024]].concat())
        .unwrap();
    let toc = encoder.finish().unwrap();
    [members, &toc, &footer::write(members.len() as u64)].concat()
}

fn file(path: &str, payload: &[u8]) -> (Entry, Vec<u8>) {
    (Entry::new(path, Kind::File), payload.to_vec())
}

fn link(path: &str, kind: Kind, target: &str) -> (Entry, Vec<u8>) {
    let link = target.as_bytes().to_vec();
    (
        Entry {
            link,
            ..Entry::new(path, kind)
        },
        Vec::new(),
    )
}

/// Records 0 `d`, 1 to 3 `d/a` in chunks of 4, 4 and 2 bytes, 4 `b`, 5 a symbolic and 6 a hard link.
fn small_layer() -> Vec<(Entry, Vec<u8>)> {
    vec![
        (Entry::new("d/", Kind::Dir), Vec::new()),
        file("d/a", b"0123456789"),
        file("b", b"bbb"),
        link("s", Kind::Symlink, "d/a"),
        link("h", Kind::Hardlink, "d/a"),
    ]
}

const SMALL: Options = Options {
    chunk_bytes: 4,
    min_chunk_bytes: 0,
    level: 1,
    landmark: Landmark::None,
    variant: Variant::Estargz,
};

/// Indexes the small layer with its TOC edited.
fn index_edited(edit: impl FnOnce(&mut Vec<Value>)) -> Result<Vec<u8>> {
    let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
    let mut toc: Value = serde_json::from_slice(&toc_json(&blob, &finished)).unwrap();
    edit(toc["entries"].as_array_mut().unwrap());
    let json = serde_json::to_vec(&toc).unwrap();
    let blob = blob_with_toc(&blob[..finished.toc_offset as usize], &json);
    Ok(index_blob(&blob, Some(Digest::of(&json)))?.0)
}

#[test]
fn one_read_finds_the_toc_of_a_usual_layer() {
    let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
    let (bytes, ranges) = index_blob(&blob, Some(finished.toc_digest)).unwrap();
    assert_eq!(ranges, std::slice::from_ref(&(0..finished.blob_bytes)));
    let index = Index::open(bytes.as_slice()).unwrap();
    let summary = index.summary();
    assert_eq!(summary.toc_digest, finished.toc_digest);
    assert_eq!(
        (summary.toc_start, summary.toc_end),
        (finished.toc_offset, finished.blob_bytes - 51)
    );
    assert_eq!(summary.toc_bytes, toc_json(&blob, &finished).len() as u64);
    assert_eq!((summary.format, summary.unpacked_bytes), (Format::Estargz, 13));
}

#[test]
fn a_toc_that_is_longer_than_the_tail_takes_a_second_read() {
    let members = vec![0; 1000];
    let mut entries = Vec::new();
    for n in 0..4000u64 {
        // Names without a pattern, so that the TOC does not compress below the tail.
        entries.push(json!({"name": Digest::of(&n.to_le_bytes()).hex(), "type": "dir", "mode": 0o40755}));
    }
    let json = serde_json::to_vec(&json!({"version": 1, "entries": entries})).unwrap();
    let blob = blob_with_toc(&members, &json);
    let size = blob.len() as u64;
    assert!(size > 100 << 10);
    let (bytes, ranges) = index_blob(&blob, Some(Digest::of(&json))).unwrap();
    assert_eq!(ranges, [size - (64 << 10)..size, 1000..size - (64 << 10)]);
    let index = Index::open(bytes.as_slice()).unwrap();
    assert_eq!(
        (index.entry_count(), index.entry(3999).unwrap().mode),
        (4000, 0o755)
    );
}

#[test]
fn bytes_that_were_not_asked_for_are_refused() {
    let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
    for bytes in [None, Some(&blob[1..]), Some(&[][..])] {
        let mut indexer = indexer(
            &descriptor(&blob, Some(finished.toc_digest)),
            None,
            Arc::new(InMemory),
        )
        .unwrap();
        indexer.step(None).unwrap();
        assert!(matches!(indexer.step(bytes), Err(Error::Malformed { .. })));
        assert!(indexer.step(Some(&blob)).is_err());
    }
}

#[test]
fn a_toc_with_another_digest_is_refused_with_both() {
    let (blob, finished) = write_layer(&small_layer(), SMALL).unwrap();
    let promised = Digest::of(b"another");
    let Err(Error::Verification { expected, actual, .. }) = index_blob(&blob, Some(promised)) else {
        panic!("not refused as unverified");
    };
    assert_eq!(
        [expected, actual],
        [promised.to_string(), finished.toc_digest.to_string()]
    );
}

/// The first steps for a layer that is described like this: what is asked of its blob, then what comes of that.
fn first_steps(descriptor: &Descriptor, blob: &[u8]) -> Result<Step> {
    let mut indexer = indexer(descriptor, None, Arc::new(InMemory))?;
    match indexer.step(None)? {
        Step::Need(_) => indexer.step(Some(blob)),
        other => Ok(other),
    }
}

#[test]
fn a_layer_without_a_promise_is_not_even_looked_at() {
    let (blob, _) = write_layer(&small_layer(), SMALL).unwrap();
    let mut indexer = indexer(&descriptor(&blob, None), None, Arc::new(InMemory)).unwrap();
    assert!(matches!(indexer.step(None), Ok(Step::Pass)));
    assert!(EstargzIndexer::new(&descriptor(&blob, None), Arc::new(InMemory)).is_err());
}

#[test]
fn only_what_has_no_files_or_is_encrypted_is_refused_by_its_media_type() {
    let (blob, _) = write_layer(&small_layer(), SMALL).unwrap();
    let of_type = |media_type: &str| Descriptor {
        media_type: media_type.into(),
        ..descriptor(&blob, None)
    };
    for media_type in [
        GZIP_LAYER,
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.oci.image.layer.v1.tar",
        "APPLICATION/VND.OCI.IMAGE.LAYER.V1.TAR+GZIP",
    ] {
        let step = first_steps(&of_type(media_type), &blob);
        assert!(matches!(step, Ok(Step::Pass)), "{media_type}: {step:?}");
    }
    for (media_type, named) in [
        (
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "encrypted",
        ),
        ("text/plain", "text/plain"),
        ("application/vnd.example+gzip", "vnd.example"),
        ("", "artifact"),
    ] {
        match first_steps(&of_type(media_type), &blob) {
            Err(Error::Unsupported { why, .. }) => assert!(why.contains(named), "{media_type}: {why}"),
            other => panic!("{media_type}: {other:?}"),
        }
    }
}

#[test]
fn a_promise_that_the_blob_does_not_keep_is_refused() {
    let gzip = vec![0x1f; 100];
    let promised = descriptor(&gzip, Some(Digest::of(b"")));
    assert!(matches!(
        first_steps(&promised, &gzip),
        Err(Error::Malformed { .. })
    ));
    let mut broken = descriptor(&gzip, None);
    broken
        .annotations
        .insert(TOC_DIGEST_ANNOTATION.into(), "md5:00".into());
    assert!(matches!(
        first_steps(&broken, &gzip),
        Err(Error::Malformed { .. })
    ));
}

#[test]
fn landmarks_and_the_toc_are_hidden_at_the_root_only() {
    let mut entries = small_layer();
    entries.push(file("d/.prefetch.landmark", b"x"));
    entries.push((Entry::new(".no.prefetch.landmark/", Kind::Dir), Vec::new()));
    entries.push(file("./stargz.index.json", b"{}"));
    entries.push(file("x/../stargz.index.json/.", b"{}"));
    for (landmark, ends) in [
        (Landmark::Prefetch(2), true),
        (Landmark::Prefetch(99), true),
        (Landmark::NoPrefetch, false),
    ] {
        let options = Options { landmark, ..SMALL };
        let (blob, finished) = write_layer(&entries, options).unwrap();
        let (bytes, _) = index_blob(&blob, Some(finished.toc_digest)).unwrap();
        let index = Index::open(bytes.as_slice()).unwrap();
        let paths: Vec<_> = (0..index.entry_count())
            .map(|n| index.entry(n).unwrap().path)
            .collect();
        let expected: [&[u8]; 7] = [
            b"d",
            b"d/a",
            b"b",
            b"s",
            b"h",
            b"d/.prefetch.landmark",
            b".no.prefetch.landmark",
        ];
        assert_eq!(paths, expected);
        // The prefetched part ends where the landmark's own member starts, which holds its one byte.
        let end = index.summary().prefetch_end as usize;
        if ends {
            assert_eq!(gunzip_member(&blob[end..])[0], LANDMARK_BYTE);
        } else {
            assert!(gunzip_member(&blob).starts_with(NO_PREFETCH_LANDMARK.as_bytes()));
        }
        assert_eq!(decode_blob(&index, &blob, 100).1, 0);
    }
}
