//! Layers of zstd: zstd:chunked by ranges, verified chunk by chunk, its zeros never fetched.

use std::fs;
use std::os::unix::fs::FileExt;

use registryfs::demo::{Behaviour, Content, Fault, ImageBuilder, Layer, Record, Scope};
use registryfs::layer::zstd_chunked::writer::{Options, Version};

use crate::support::{File, dir, file};
use crate::world::{World, errno, noise};

/// Zeros between two pieces of data.
const HOLE_BYTES: usize = 3 << 20;
const DATA_BYTES: usize = 300_000;

fn sparse() -> Vec<u8> {
    [noise(DATA_BYTES, 1), vec![0; HOLE_BYTES], noise(DATA_BYTES, 2)].concat()
}

fn entries() -> Vec<File> {
    vec![
        dir("d"),
        file("d/small", b"small".to_vec()),
        file("d/sparse", sparse()),
        file("tail", noise(DATA_BYTES, 3)),
    ]
}

fn chunked(version: Version) -> Layer {
    let options = Options {
        version,
        ..Options::default()
    };
    Layer::zstd_chunked(&entries(), options).unwrap()
}

fn world(layer: Layer) -> World {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &ImageBuilder::new(vec![layer]).build());
    World::with(content, Behaviour::default(), &[]).mounted()
}

/// The ranges of blobs that were asked for and given, with how many bytes each had.
fn ranges(requests: &[Record]) -> Vec<u64> {
    let blobs = requests.iter().filter(|record| record.path.contains("/blobs/"));
    blobs
        .filter(|record| record.status == 206)
        .map(|record| record.body_bytes)
        .collect()
}

#[test]
fn every_version_is_read_by_ranges_and_its_index_is_one() {
    for version in Version::ALL {
        let layer = chunked(version);
        let position = layer
            .annotations
            .iter()
            .find(|(key, _)| key.ends_with("manifest-position"))
            .unwrap();
        let toc_bytes: u64 = position.1.split(':').nth(1).unwrap().parse().unwrap();
        let world = world(layer);
        let root = world.at("team/app/1.0/rootfs");
        let (size, requests) = world.requests(|| fs::metadata(root.join("d/sparse")).unwrap().len());
        assert_eq!(size, sparse().len() as u64, "{version:?}");
        // The TOC and nothing else: no footer, no data.
        assert_eq!(ranges(&requests), [toc_bytes], "{version:?}: {requests:?}");
        let read = fs::read(root.join("d/sparse")).unwrap();
        assert!(read == sparse(), "{version:?}");
        assert_eq!(fs::read(root.join("d/small")).unwrap(), b"small");
        assert!(fs::read(root.join("tail")).unwrap() == noise(DATA_BYTES, 3));
        let layer = world.at("team/app/1.0/layers/0");
        assert_eq!(
            fs::read_to_string(layer.join("format")).unwrap().lines().next(),
            Some("zstd:chunked")
        );
        let toc = fs::read(layer.join("toc.json")).unwrap();
        assert!(serde_json::from_slice::<serde_json::Value>(&toc).is_ok());
        // A known image is opened without asking for its TOC again.
        world.restart();
        let ((), requests) = world.requests(|| assert!(fs::read(root.join("d/sparse")).unwrap() == sparse()));
        assert_eq!(ranges(&requests), [0; 0]);
    }
}

#[test]
fn zeros_are_read_without_a_request() {
    let world = world(chunked(Version::Storage1_50));
    let path = world.at("team/app/1.0/rootfs/d/sparse");
    assert_eq!(fs::metadata(&path).unwrap().len(), sparse().len() as u64);
    let opened = fs::File::open(&path).unwrap();
    let mut bytes = vec![1; 4096];
    let ((), requests) = world.requests(|| {
        opened
            .read_exact_at(&mut bytes, (DATA_BYTES + (1 << 20)) as u64)
            .unwrap();
    });
    assert!(bytes.iter().all(|&byte| byte == 0));
    assert_eq!(ranges(&requests), [0; 0], "{requests:?}");
}

#[test]
fn a_lying_toc_is_refused_and_says_so() {
    let layer = chunked(Version::Storage1_50);
    let scope = Scope::containing(layer.digest().to_string());
    let world = world(layer);
    world.handle().inject(scope, Fault::FlipByte(9));
    let listing = fs::read_dir(world.at("team/app/1.0/rootfs"));
    assert!(
        listing
            .and_then(|mut entries| entries.next().transpose())
            .is_err()
    );
    let errors = world.errors();
    assert!(errors.contains("compressed TOC of layer sha256:"), "{errors}");
    assert!(
        errors.contains("verification failed: expected sha256:"),
        "{errors}"
    );
}

#[test]
fn a_lying_chunk_is_refused() {
    let world = world(chunked(Version::Storage1_50));
    let path = world.at("team/app/1.0/rootfs/tail");
    assert_eq!(fs::metadata(&path).unwrap().len(), DATA_BYTES as u64);
    world
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::FlipByte(2000));
    assert_eq!(errno(fs::read(&path)), libc::EIO);
    world.handle().clear_faults();
    crate::world::until("the file can be read", || fs::read(&path).is_ok());
    assert!(fs::read(&path).unwrap() == noise(DATA_BYTES, 3));
}

#[test]
fn annotations_that_disagree_are_refused() {
    let mut gzip = chunked(Version::Storage1_50);
    gzip.media_type = Some("application/vnd.oci.image.layer.v1.tar+gzip".to_owned());
    let mut elsewhere = chunked(Version::Storage1_50);
    for (key, value) in &mut elsewhere.annotations {
        if key.ends_with("manifest-position") {
            *value = "100:200:300:1".to_owned();
        }
    }
    for (layer, why) in [(gzip, "its media type says"), (elsewhere, "compressed TOC")] {
        let world = world(layer);
        let listing =
            fs::read_dir(world.at("team/app/1.0/rootfs")).and_then(|mut entries| entries.next().transpose());
        assert!(listing.is_err());
        assert!(world.errors().contains(why), "{}", world.errors());
    }
}

#[test]
fn plain_zstd_of_one_frame_and_of_many_is_read_as_a_whole_once() {
    let layers = [
        Layer::zstd(&entries()).unwrap(),
        Layer::zstd_frames(&entries(), 100_000).unwrap(),
        chunked(Version::Storage1_50).without_annotations(),
    ];
    for layer in layers {
        let digest = layer.digest().to_string();
        let world = world(layer);
        let root = world.at("team/app/1.0/rootfs");
        let check = || {
            assert!(
                fs::read(root.join("d/sparse")).unwrap() == sparse(),
                "{}",
                world.errors()
            );
            assert_eq!(fs::read(root.join("d/small")).unwrap(), b"small");
            assert!(fs::read(root.join("tail")).unwrap() == noise(DATA_BYTES, 3));
        };
        let ((), requests) = world.requests(check);
        let of_layer = |requests: &[Record]| {
            requests
                .iter()
                .filter(|record| record.path.contains(&digest))
                .count()
        };
        assert_eq!(of_layer(&requests), 1, "{requests:?}");
        let format = fs::read_to_string(world.at("team/app/1.0/layers/0/format")).unwrap();
        assert!(
            format.starts_with("zstd") && !format.starts_with("zstd:chunked"),
            "{format}"
        );
        world.restart();
        let ((), requests) = world.requests(check);
        assert_eq!(of_layer(&requests), 0, "{requests:?}");
    }
}
