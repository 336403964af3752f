//! Decoders of members: a registry sends other bytes than those that the index was made for.

use std::collections::BTreeMap;

use registryfs::digest::Digest;
use registryfs::layer::estargz::writer::Variant;
use registryfs::layer::index::Index;
use registryfs::layer::soci::writer::Layout;
use registryfs::layer::zstd_chunked::writer::Version;

use crate::engine::{Shape, Target};
use crate::layers::decode;
use crate::samples::{
    Layer, entries, estargz, gzip, plain, soci, soci_within_bytes, tar_of, zstd, zstd_chunked,
};

struct Indexed {
    index: Vec<u8>,
    blob_bytes: usize,
    chunks: BTreeMap<u32, Digest>,
}

pub(crate) fn targets() -> Vec<Target> {
    let tar = tar_of(&entries());
    let parts = |compress: fn(&[u8]) -> Vec<u8>| tar.chunks(3000).flat_map(compress).collect();
    let layers: [(&'static str, Vec<Layer>); 3] = [
        (
            "members-gzip",
            vec![
                estargz(Variant::Estargz, 0),
                estargz(Variant::Estargz, 600),
                estargz(Variant::Legacy, 0),
            ],
        ),
        (
            "members-deflate",
            vec![
                soci(Layout::Gzip),
                soci(Layout::GzipV1),
                soci_within_bytes(),
                plain(gzip(&tar, 6)),
                plain(parts(|part| gzip(part, 1))),
            ],
        ),
        (
            "members-zstd",
            vec![
                zstd_chunked(Version::Storage1_50),
                zstd_chunked(Version::Stargz),
                plain(zstd(&tar)),
                plain(parts(zstd)),
            ],
        ),
    ];
    layers
        .into_iter()
        .map(|(name, layers)| target(name, layers))
        .collect()
}

/// The first byte of an input says which layer the rest is said to be.
fn target(name: &'static str, layers: Vec<Layer>) -> Target {
    let seed = |(number, layer): (usize, &Layer)| [&[number as u8], layer.blob.as_slice()].concat();
    let seeds = layers.iter().enumerate().map(seed).collect();
    let indexed: Vec<Indexed> = layers.iter().map(indexed).collect();
    Target {
        name,
        seeds,
        words: &[
            b"\x1f\x8b\x08\x00",
            b"\x28\xb5\x2f\xfd",
            b"\x50\x2a\x4d\x18",
            b"\x00\x00\xff\xff",
        ],
        run: Box::new(move |input| {
            let mut shape = Shape::default();
            if let Some((&number, blob)) = input.split_first() {
                let layer = &indexed[usize::from(number) % indexed.len()];
                // A registry that sends too few bytes is found out before they come here.
                let mut blob = blob.to_vec();
                blob.resize(layer.blob_bytes, 0);
                let index = Index::open(layer.index.as_slice()).unwrap();
                let taken = decode(&index, &blob, &mut shape);
                shape.note(taken.len());
                for (chunk, digest) in taken {
                    assert_eq!(layer.chunks.get(&chunk), Some(&digest), "chunk {chunk}");
                }
            }
            shape
        }),
    }
}

fn indexed(layer: &Layer) -> Indexed {
    let index = layer.index();
    let opened = Index::open(index.as_slice()).unwrap();
    let chunks = decode(&opened, &layer.blob, &mut Shape::default());
    assert_eq!(
        chunks.len(),
        opened.chunk_count() as usize,
        "a sample that cannot be read"
    );
    Indexed {
        blob_bytes: layer.blob.len(),
        chunks,
        index,
    }
}
