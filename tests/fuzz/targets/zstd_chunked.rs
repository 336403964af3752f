//! zstd:chunked: the TOC's JSON, its compressed bytes, and the annotations.

use std::collections::BTreeMap;

use registryfs::digest::Digest;
use registryfs::layer::index::Index;
use registryfs::layer::zstd_chunked::writer::Version;
use registryfs::layer::zstd_chunked::{CHECKSUM, POSITION, PREFIX};
use registryfs::layer::{self, Format};

use super::estargz::TOC_WORDS;
use crate::engine::{Shape, Target};
use crate::layers::{NOTHING, check_index, decode, descriptor, index_of};
use crate::samples::{Layer, ZSTD, zstd, zstd_chunked};

/// Size of a skippable frame's header in bytes.
const SKIPPABLE_BYTES: usize = 8;

pub(crate) fn targets() -> Vec<Target> {
    let layers = Version::ALL.map(zstd_chunked);
    let compressed: Vec<Vec<u8>> = layers.iter().map(toc).collect();
    let json = |toc: &Vec<u8>| layer::toc(Format::ZstdChunked, toc).unwrap();
    let jsons: Vec<Vec<u8>> = compressed.iter().map(json).collect();
    let annotations = layers
        .iter()
        .map(|layer| lines(&layer.descriptor.annotations))
        .collect();
    let (of_json, of_compressed, of_annotations) = (layers.clone(), layers.clone(), layers);
    vec![
        Target {
            name: "zstd-chunked-toc",
            seeds: jsons,
            words: &TOC_WORDS,
            run: Box::new(move |json| try_out(&of_json[json.len() % 5], &zstd(json), json.len())),
        },
        Target {
            name: "zstd-chunked-frame",
            seeds: compressed,
            words: &[b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"],
            run: Box::new(move |toc| {
                let json_bytes = layer::toc(Format::ZstdChunked, toc).map_or(1000, |json| json.len());
                try_out(&of_compressed[toc.len() % 5], toc, json_bytes)
            }),
        },
        Target {
            name: "zstd-chunked-annotations",
            seeds: annotations,
            words: &[
                b"io.github.containers.zstd-chunked.",
                b"io.containers.zstd-chunked.",
                b"manifest-checksum",
                b"manifest-position",
                b"sha256:",
                b":",
                b"=",
                b"\n",
            ],
            run: Box::new(move |text| {
                let layer = &of_annotations[0];
                let text = String::from_utf8_lossy(text);
                let pairs = text.lines().filter_map(|line| line.split_once('='));
                let annotations = pairs
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .collect();
                index(&layer.blob, annotations)
            }),
        },
    ]
}

/// The compressed TOC of a layer: where its annotation says.
fn toc(layer: &Layer) -> Vec<u8> {
    let position = layer
        .descriptor
        .annotations
        .iter()
        .find(|(key, _)| key.ends_with(POSITION));
    let mut numbers = position
        .unwrap()
        .1
        .split(':')
        .map(|number| number.parse::<usize>().unwrap());
    let (start, bytes) = (numbers.next().unwrap(), numbers.next().unwrap());
    layer.blob[start..start + bytes].to_vec()
}

fn lines(annotations: &BTreeMap<String, String>) -> Vec<u8> {
    let line = |(key, value): (&String, &String)| format!("{key}={value}\n");
    annotations.iter().map(line).collect::<String>().into_bytes()
}

/// The data of a layer with another TOC behind it, which its manifest promises.
fn try_out(base: &Layer, toc: &[u8], json_bytes: usize) -> Shape {
    let header = [&[0x50, 0x2a, 0x4d, 0x18], &(toc.len() as u32).to_le_bytes()[..]].concat();
    let data = &base.blob[..base.data_end as usize - SKIPPABLE_BYTES];
    let blob = [data, &header, toc].concat();
    let position = format!("{}:{}:{json_bytes}:1", base.data_end, toc.len());
    let annotations = BTreeMap::from([
        (format!("{PREFIX}{CHECKSUM}"), Digest::of(toc).to_string()),
        (format!("{PREFIX}{POSITION}"), position),
    ]);
    index(&blob, annotations)
}

fn index(blob: &[u8], annotations: BTreeMap<String, String>) -> Shape {
    let mut shape = Shape::default();
    let layer = descriptor(ZSTD, blob, annotations);
    shape.result(index_of(&layer, blob, NOTHING), |shape, index| match index {
        Some(index) => {
            check_index(&index, shape);
            decode(&Index::open(index.as_slice()).unwrap(), blob, shape);
        }
        None => shape.note("pass"),
    });
    shape
}
