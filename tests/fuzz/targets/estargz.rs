//! eStargz: the whole blob with its footer, and the TOC's JSON alone, which a compressor would hide from mutations.

use std::collections::BTreeMap;

use registryfs::digest::Digest;
use registryfs::layer::entry::{Entry, Kind};
use registryfs::layer::estargz::TOC_DIGEST_ANNOTATION;
use registryfs::layer::estargz::writer::Variant;
use registryfs::layer::index::Index;
use registryfs::layer::{self, Format};

use crate::engine::{Shape, Target};
use crate::layers::{Beside, check_index, decode, descriptor, index_of};
use crate::samples::{GZIP, Layer, estargz, gzip, tar_of};

/// Sizes of the footers: today's, and that of stargz.
const FOOTERS: [usize; 2] = [51, 47];

pub(crate) fn targets() -> Vec<Target> {
    let layers = [
        estargz(Variant::Estargz, 0),
        estargz(Variant::Estargz, 600),
        estargz(Variant::Legacy, 0),
        estargz(Variant::ExternalToc, 0),
    ];
    let external_toc = layers[3].external_toc.clone().unwrap();
    let external_json = layer::toc(Format::Estargz, &external_toc).unwrap();
    let jsons = layers[..3]
        .iter()
        .map(|layer| json(&layer.blob).unwrap())
        .collect();
    let bases = layers.clone();
    vec![
        Target {
            name: "estargz-blob",
            seeds: layers.iter().map(|layer| layer.blob.clone()).collect(),
            words: &[
                b"\x1f\x8b\x08\x04",
                b"STARGZ",
                b"STARGZEXTERNALTOC",
                b"SG\x16\x00",
                b"stargz.index.json",
            ],
            run: Box::new(move |blob| {
                let json = json(blob).unwrap_or_else(|| external_json.clone());
                try_out(blob, &json, &external_toc)
            }),
        },
        Target {
            name: "estargz-toc",
            seeds: jsons,
            words: &TOC_WORDS,
            run: Box::new(move |json| {
                let base = &bases[json.len() % 3];
                try_out(&with_toc(base, json), json, &[])
            }),
        },
    ]
}

pub(crate) const TOC_WORDS: [&[u8]; 38] = [
    b"\"version\":1,",
    b"\"entries\":[",
    b"\"name\":\"",
    b"\"type\":\"reg\"",
    b"\"type\":\"chunk\"",
    b"\"type\":\"dir\"",
    b"\"type\":\"symlink\"",
    b"\"type\":\"hardlink\"",
    b"\"type\":\"char\"",
    b"\"type\":\"fifo\"",
    b"\"size\":",
    b"\"offset\":",
    b"\"endOffset\":",
    b"\"innerOffset\":",
    b"\"chunkOffset\":",
    b"\"chunkSize\":",
    b"\"chunkDigest\":\"",
    b"\"chunkType\":\"zeros\"",
    b"\"digest\":\"sha256:",
    b"\"linkName\":\"",
    b"\"modtime\":\"2020-01-01T00:00:00Z\"",
    b"\"mode\":",
    b"\"uid\":",
    b"\"devMajor\":",
    b"\"xattrs\":{\"user.x\":\"AAAA\"}",
    b"null",
    b"{",
    b"}",
    b"},{",
    b"]",
    b",",
    b"\\u0000",
    b"../",
    b".wh.",
    b"/",
    b".prefetch.landmark",
    b"-",
    b"\"userName\":\"",
];

/// The TOC that a blob's footer leads to.
fn json(blob: &[u8]) -> Option<Vec<u8>> {
    FOOTERS.iter().find_map(|bytes| {
        let footer = blob.len().checked_sub(*bytes)?;
        let digits = blob.get(footer + bytes - 35..footer + bytes - 19)?;
        let start = usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        layer::toc(Format::Estargz, blob.get(start..footer)?).ok()
    })
}

/// The data of a layer with another TOC behind it.
fn with_toc(base: &Layer, json: &[u8]) -> Vec<u8> {
    let mut entry = Entry::new("stargz.index.json", Kind::File);
    entry.size = json.len() as u64;
    let toc = gzip(&tar_of(&[(entry, json.to_vec())]), 0);
    let footer = &base.blob[base.blob.len() - if is_legacy(base) { FOOTERS[1] } else { FOOTERS[0] }..];
    [&base.blob[..base.data_end as usize], &toc, footer].concat()
}

fn is_legacy(base: &Layer) -> bool {
    !base.blob[base.blob.len() - FOOTERS[0]..].starts_with(&[0x1f, 0x8b])
}

/// Indexes a blob whose TOC the manifest promises, and reads all of it.
fn try_out(blob: &[u8], json: &[u8], external_toc: &[u8]) -> Shape {
    let mut shape = Shape::default();
    let promise = (TOC_DIGEST_ANNOTATION.to_owned(), Digest::of(json).to_string());
    let layer = descriptor(GZIP, blob, BTreeMap::from([promise]));
    let beside = Beside {
        ztoc: None,
        external_toc: Some(external_toc),
    };
    shape.result(index_of(&layer, blob, beside), |shape, index| match index {
        Some(index) => {
            check_index(&index, shape);
            decode(&Index::open(index.as_slice()).unwrap(), blob, shape);
        }
        None => shape.note("pass"),
    });
    shape
}
