//! Small layers with something of everything, as our own writers make them.

use std::collections::BTreeMap;
use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use registryfs::digest::Digest;
use registryfs::layer::Descriptor;
use registryfs::layer::entry::{Entry, Kind, Time};
use registryfs::layer::estargz::TOC_DIGEST_ANNOTATION;
use registryfs::layer::estargz::writer::{self as estargz, Landmark, Variant};
use registryfs::layer::index::Index;
use registryfs::layer::soci::writer as soci;
use registryfs::layer::tar;
use registryfs::layer::zstd_chunked::writer as zstd_chunked;

use crate::layers::{Beside, descriptor, index_of, pass};
use crate::mutate::Random;

pub(crate) type File = (Entry, Vec<u8>);

pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut random = Random::new(len as u64);
    (0..len).map(|_| random.next() as u8).collect()
}

fn file(path: &str, payload: impl Into<Vec<u8>>) -> File {
    let payload = payload.into();
    let mut entry = Entry::new(path, Kind::File);
    entry.size = payload.len() as u64;
    (entry, payload)
}

fn link(path: &str, kind: Kind, target: &str) -> File {
    let mut entry = Entry::new(path, kind);
    entry.link = target.into();
    (entry, Vec::new())
}

/// A layer's files.
pub(crate) fn entries() -> Vec<File> {
    let mut special = file("./d/special", "special");
    special.0.mode = 0o6755;
    (special.0.uid, special.0.gid) = (4_294_967_294, 1000);
    special.0.mtime = Time {
        seconds: 1_700_000_000,
        nanos: 0,
    };
    special.0.xattrs = vec![
        (b"user.a".to_vec(), b"\0\xff".to_vec()),
        (b"user.b".to_vec(), vec![]),
    ];
    let mut device = Entry::new("null", Kind::Char);
    device.rdev = (1, 3);
    vec![
        (Entry::new("d/", Kind::Dir), Vec::new()),
        special,
        file("d/text", b"a line of text\n".repeat(120)),
        file("empty", ""),
        file("noise", noise(900)),
        link("soft", Kind::Symlink, "../d"),
        link("hard", Kind::Hardlink, "./d/text"),
        (device, Vec::new()),
        (Entry::new("pipe", Kind::Fifo), Vec::new()),
        file("soft/through", "a link"),
        file("zeros", [&b"x"[..], &[0; 3000], b"y"].concat()),
        file("d/.wh.gone", ""),
        file("e/.wh..wh..opq", ""),
        file(&"long/".repeat(30), ""),
        file("noise", b"again".repeat(30)),
    ]
}

/// The tar of some files.
pub(crate) fn tar_of(entries: &[File]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (entry, payload) in entries {
        bytes.extend_from_slice(&tar::header(entry).unwrap());
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len() + tar::padding(entry.size), 0);
    }
    bytes.resize(bytes.len() + tar::END_BYTES, 0);
    bytes
}

pub(crate) fn gzip(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

/// A layer with all that is to be known of it.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) descriptor: Descriptor,
    pub(crate) blob: Vec<u8>,
    pub(crate) ztoc: Option<Vec<u8>>,
    pub(crate) external_toc: Option<Vec<u8>>,
    /// Where its TOC starts in the blob, or its data ends.
    pub(crate) data_end: u64,
}

impl Layer {
    fn new(media_type: &str, blob: Vec<u8>, annotations: BTreeMap<String, String>) -> Self {
        Self {
            descriptor: descriptor(media_type, &blob, annotations),
            data_end: blob.len() as u64,
            blob,
            ztoc: None,
            external_toc: None,
        }
    }

    pub(crate) fn beside(&self) -> Beside<'_> {
        Beside {
            ztoc: self.ztoc.as_deref(),
            external_toc: self.external_toc.as_deref(),
        }
    }

    /// Its index, by its table of contents or by a pass.
    pub(crate) fn index(&self) -> Vec<u8> {
        let index = index_of(&self.descriptor, &self.blob, self.beside()).unwrap();
        index.unwrap_or_else(|| pass(&self.blob, usize::MAX).0.unwrap().0.index.to_vec())
    }
}

pub(crate) fn estargz(variant: Variant, min_chunk_bytes: u64) -> Layer {
    let options = estargz::Options {
        chunk_bytes: if variant == Variant::Legacy { 4 << 20 } else { 700 },
        min_chunk_bytes,
        landmark: Landmark::Prefetch(3),
        variant,
        ..estargz::Options::default()
    };
    let (blob, finished) = estargz::write_layer(&entries(), options).unwrap();
    let promise = (TOC_DIGEST_ANNOTATION.to_owned(), finished.toc_digest.to_string());
    Layer {
        external_toc: finished.external_toc,
        data_end: finished.toc_offset,
        ..Layer::new(GZIP, blob, BTreeMap::from([promise]))
    }
}

pub(crate) fn zstd_chunked(version: zstd_chunked::Version) -> Layer {
    let options = zstd_chunked::Options {
        version,
        chunk_bytes: Some(700),
        ..zstd_chunked::Options::default()
    };
    let written = zstd_chunked::write_layer(&entries(), options).unwrap();
    Layer {
        data_end: written.toc.start,
        ..Layer::new(ZSTD, written.blob, written.annotations)
    }
}

/// A gzip layer of one member whose blocks, and so spans, start within bytes.
pub(crate) fn soci_within_bytes() -> Layer {
    let mut entries = entries();
    let letters = noise(50_000)
        .iter()
        .map(|byte| b'A' + byte % 50)
        .collect::<Vec<u8>>();
    entries.push(file("letters", letters));
    let blob = gzip(&tar_of(&entries), 6);
    let options = soci::Options {
        layout: soci::Layout::Gzip,
        span_bytes: 10_000,
    };
    let ztoc = soci::write_ztoc(&blob, &entries, options).unwrap();
    let layer = Layer {
        ztoc: Some(ztoc),
        ..Layer::new(GZIP, blob, BTreeMap::new())
    };
    let bytes = layer.index();
    let index = Index::open(bytes.as_slice()).unwrap();
    let mut members = (0..index.member_count()).map(|number| index.member(number).unwrap());
    assert!(
        members.any(|member| member.bits > 0),
        "all spans start with a byte"
    );
    layer
}

pub(crate) fn soci(layout: soci::Layout) -> Layer {
    let tar = tar_of(&entries());
    let (media_type, blob) = match layout {
        soci::Layout::Uncompressed => (TAR, tar),
        // Several deflate blocks, so that there are several spans.
        _ => (GZIP, tar.chunks(4096).flat_map(|part| gzip(part, 6)).collect()),
    };
    let options = soci::Options {
        layout,
        span_bytes: 3000,
    };
    let ztoc = soci::write_ztoc(&blob, &entries(), options).unwrap();
    Layer {
        ztoc: Some(ztoc),
        ..Layer::new(media_type, blob, BTreeMap::new())
    }
}

/// A layer that only a pass can read.
pub(crate) fn plain(blob: Vec<u8>) -> Layer {
    Layer::new(TAR, blob, BTreeMap::new())
}

/// A digest as text.
pub(crate) fn digest(number: u8) -> String {
    Digest::of(&[number]).to_string()
}
