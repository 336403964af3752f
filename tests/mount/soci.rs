//! Layers with a SOCI index: read by spans, each of which is checked before it is decoded.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use registryfs::demo::{
    Behaviour, Content, Fault, Image, ImageBuilder, ImageIndex, Layer, LayerZtoc, Record, Scope, SociIndex,
};
use registryfs::digest::Digest;
use registryfs::layer::entry::{Kind, Time};
use registryfs::layer::soci::writer::{Layout, Options};

use crate::support::{File, dir, file, layer, link};
use crate::world::{self, World, errno, noise, until};

const SPAN_BYTES: u64 = 128 << 10;
const LARGE_BYTES: usize = 1_000_000;

fn options(layout: Layout) -> Options {
    Options {
        layout,
        span_bytes: SPAN_BYTES,
    }
}

/// A layer of several spans.
fn entries() -> Vec<File> {
    let mut special = file("etc/special", b"special".to_vec());
    special.0.mode = 0o4755;
    special.0.mtime = Time {
        seconds: 1_700_000_000,
        nanos: 250_000_000,
    };
    special.0.xattrs = vec![(b"user.a".to_vec(), b"value".to_vec())];
    vec![
        dir("etc/"),
        special,
        file("first", noise(300_000, 1)),
        file("large", noise(LARGE_BYTES, 2)),
        link("soft", Kind::Symlink, "large"),
        link("hard", Kind::Hardlink, "large"),
        file("text", b"a line of text\n".repeat(30_000)),
        file("last", b"last".to_vec()),
    ]
}

/// How a test wants its image.
struct Wanted {
    layer: Layer,
    layout: Layout,
    ztoc: Option<Vec<u8>>,
    is_v1: bool,
}

impl Wanted {
    fn gzip() -> Self {
        Self {
            layer: Layer::gzip(&entries()).unwrap(),
            layout: Layout::Gzip,
            ztoc: None,
            is_v1: false,
        }
    }
}

/// An image of one layer as `team/app:soci`, whose SOCI index the registry has.
fn content(wanted: Wanted) -> (Image, SociIndex, Content) {
    let mut ztoc = LayerZtoc::new(&wanted.layer, &entries(), options(wanted.layout)).unwrap();
    if let Some(other) = wanted.ztoc {
        ztoc.ztoc = other.into();
    }
    let mut builder = ImageBuilder::new(vec![wanted.layer]);
    let v2 = SociIndex::v2(&[ztoc.clone()]);
    if !wanted.is_v1 {
        builder.annotations = BTreeMap::from([v2.annotation()]);
    }
    let image = builder.build();
    let index = match wanted.is_v1 {
        true => SociIndex::v1(&[ztoc], &image),
        false => v2,
    };
    let mut content = Content::new();
    content.add_tagged_image("team/app", "soci", &image);
    index.add_to(&mut content, "team/app");
    (image, index, content)
}

/// The same content in a format that is read otherwise.
fn with_reference(content: &mut Content) {
    let image = ImageBuilder::new(vec![layer(&entries())]).build();
    content.add_tagged_image("team/app", "reference", &image);
}

fn blobs(requests: &[Record], digest: Digest) -> Vec<&Record> {
    let part = format!("/blobs/{digest}");
    let of = requests.iter().filter(|request| request.path.ends_with(&part));
    of.collect()
}

/// Everything below two directories is the same. Of times the reference has the seconds only.
fn assert_same(left: &Path, right: &Path) {
    for entry in entries() {
        let path = String::from_utf8(entry.0.path.clone()).unwrap();
        let (a, b) = (left.join(&path), right.join(&path));
        let [m, n] = [&a, &b].map(|path| fs::symlink_metadata(path).unwrap());
        assert_eq!(
            (m.mode(), m.len(), m.nlink()),
            (n.mode(), n.len(), n.nlink()),
            "{path}"
        );
        assert_eq!(
            (m.uid(), m.gid(), m.mtime()),
            (n.uid(), n.gid(), n.mtime()),
            "{path}"
        );
        if m.is_file() {
            assert!(fs::read(&a).unwrap() == fs::read(&b).unwrap(), "{path}");
        }
        if m.is_symlink() {
            assert_eq!(fs::read_link(&a).unwrap(), fs::read_link(&b).unwrap());
        }
    }
    assert_eq!(crate::world::names(left), crate::world::names(right));
}

#[test]
fn a_layer_with_a_ztoc_has_the_files_of_its_tar() {
    let members = Layer::gzip_members(&entries(), 333_333).unwrap();
    let cases = [
        Wanted::gzip(),
        Wanted {
            layout: Layout::GzipV1,
            ..Wanted::gzip()
        },
        Wanted {
            layer: members,
            ..Wanted::gzip()
        },
        Wanted {
            layer: Layer::tar(&entries()).unwrap(),
            layout: Layout::Uncompressed,
            ..Wanted::gzip()
        },
    ];
    for wanted in cases {
        let (_, _, mut content) = content(wanted);
        with_reference(&mut content);
        let world = World::new(content).mounted();
        assert_same(
            &world.at("team/app/soci/rootfs"),
            &world.at("team/app/reference/rootfs"),
        );
        let special = world.at("team/app/soci/rootfs/etc/special");
        assert_eq!(fs::metadata(&special).unwrap().mtime_nsec(), 250_000_000);
        let format = fs::read_to_string(world.at("team/app/soci/layers/0/format")).unwrap();
        assert!(format.starts_with("soci\n"), "{format}");
    }
}

#[test]
fn a_file_costs_one_range_of_about_a_span_and_a_known_image_nothing() {
    let (image, index, content) = content(Wanted::gzip());
    let layer = image.layers[0].digest();
    let world = World::new(content).mounted();
    let (size, requests) = world.requests(|| {
        fs::metadata(world.at("team/app/soci/rootfs/large"))
            .unwrap()
            .len()
    });
    assert_eq!(size, LARGE_BYTES as u64);
    assert_eq!(
        blobs(&requests, layer).len(),
        0,
        "metadata needs nothing of the layer"
    );
    assert_eq!(blobs(&requests, Digest::of(&index.ztocs[0])).len(), 1);
    let manifests = requests
        .iter()
        .filter(|request| request.path.contains("/manifests/"));
    assert_eq!(manifests.count(), 2, "the image's and the index's: {requests:?}");

    let (byte, requests) = world.requests(|| {
        let file = fs::File::open(world.at("team/app/soci/rootfs/etc/special")).unwrap();
        let mut bytes = [0; 7];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    });
    assert_eq!(&byte, b"special");
    let asked = blobs(&requests, layer);
    assert_eq!((asked.len(), requests.len()), (1, 1), "{requests:?}");
    assert!(asked[0].body_bytes < 4 * SPAN_BYTES, "{requests:?}");

    world.restart();
    let (files, requests) = world.requests(|| crate::world::names(&world.at("team/app/soci/rootfs")));
    assert_eq!(files.len(), 7);
    assert!(requests.is_empty(), "{requests:?}");
}

#[test]
fn a_span_that_lies_is_never_seen() {
    let (_, _, content) = content(Wanted::gzip());
    let world = World::new(content).mounted();
    let large = world.at("team/app/soci/rootfs/large");
    assert_eq!(fs::metadata(&large).unwrap().len(), LARGE_BYTES as u64);
    world
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::FlipByte(20_000));
    assert_eq!(errno(fs::read(&large)), libc::EIO);
    let errors = world.errors();
    assert!(
        errors.contains("verification failed") && errors.contains("span"),
        "{errors}"
    );
    world.handle().clear_faults();
    until("the file can be read", || fs::read(&large).is_ok());
    assert!(fs::read(&large).unwrap() == noise(LARGE_BYTES, 2));
}

#[test]
fn a_ztoc_with_other_bytes_than_its_digest_names_is_refused() {
    let (image, index, content) = content(Wanted::gzip());
    let world = World::new(content).mounted();
    let ztoc = Digest::of(&index.ztocs[0]);
    let scope = Scope::containing(format!("/blobs/{ztoc}"));
    world.handle().inject(scope, Fault::FlipByte(500));
    let rootfs = world.at("team/app/soci/rootfs");
    let (refused, requests) = world.requests(|| errno(fs::metadata(rootfs.join("large"))));
    assert_eq!(refused, libc::EIO);
    assert_eq!(
        blobs(&requests, image.layers[0].digest()).len(),
        0,
        "nothing is streamed because of a lie"
    );
    assert!(world.errors().contains(&ztoc.to_string()), "{}", world.errors());
    // The image's own names do not depend on it.
    let manifest = fs::read(world.at("team/app/soci/manifest.json")).unwrap();
    assert_eq!(Digest::of(&manifest), image.digest());
    world.handle().clear_faults();
    until("the zTOC is believed", || {
        fs::metadata(rootfs.join("large")).is_ok()
    });
}

#[test]
fn an_index_of_version_1_is_asked_for_only_where_it_is_configured() {
    let is_referrers = |request: &&Record| request.path.contains("/referrers/");
    let wanted = || Wanted {
        is_v1: true,
        ..Wanted::gzip()
    };
    let (_, _, off) = content(wanted());
    let world = World::new(off).mounted();
    let (_, requests) = world.requests(|| fs::read(world.at("team/app/soci/manifest.json")).unwrap());
    assert_eq!(requests.iter().filter(is_referrers).count(), 0, "{requests:?}");

    let (_, _, mut on) = content(wanted());
    with_reference(&mut on);
    let world = World::with(on, Behaviour::default(), &[])
        .configured("soci_v1 = true\n")
        .mounted();
    assert_same(
        &world.at("team/app/soci/rootfs"),
        &world.at("team/app/reference/rootfs"),
    );
    let format = fs::read_to_string(world.at("team/app/soci/layers/0/format")).unwrap();
    assert_eq!(format.lines().next(), Some("soci"));
    world.restart();
    let (_, requests) = world.requests(|| fs::metadata(world.at("team/app/soci/rootfs/large")).unwrap());
    assert!(
        requests.is_empty(),
        "what was found holds over restarts: {requests:?}"
    );
}

#[test]
fn an_index_among_platforms_is_no_platform() {
    let (image, soci, mut content) = content(Wanted::gzip());
    let mut index: serde_json::Value =
        serde_json::from_slice(&ImageIndex::new(vec![image.clone()]).bytes).unwrap();
    let entry = serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": Digest::of(&soci.manifest).to_string(),
        "size": soci.manifest.len(),
        "annotations": { "com.amazon.soci.image-manifest-digest": image.digest().to_string() },
        "platform": { "os": "linux", "architecture": "amd64" },
    });
    index["manifests"].as_array_mut().unwrap().insert(0, entry);
    let digest = content.put_manifest(
        "team/app",
        "application/vnd.oci.image.index.v1+json",
        index.to_string().into(),
    );
    content.tag("team/app", "index", digest);
    let world = World::with(content, Behaviour::default(), &["--platform", "linux/amd64"]).mounted();
    assert_eq!(fs::read(world.at("team/app/index/rootfs/last")).unwrap(), b"last");
    assert_eq!(
        crate::world::names(&world.at("team/app/index/platforms")),
        ["linux-amd64"]
    );
}

#[test]
fn looking_at_a_layer_with_a_broken_ztoc_reads_none_of_it() {
    let (image, _, content) = content(Wanted {
        ztoc: Some(b"no zTOC".to_vec()),
        ..Wanted::gzip()
    });
    let world = World::new(content).mounted();
    let layer = world.at("team/app/soci/layers/0");
    let (_, requests) = world.requests(|| {
        let listed = world::names(&layer);
        assert_eq!(listed, ["blob", "digest", "format", "fs", "media_type", "size"]);
        assert_eq!(errno(fs::metadata(layer.join("toc.json"))), libc::ENOENT);
        assert!(
            fs::read_to_string(layer.join("format"))
                .unwrap()
                .starts_with("soci\n")
        );
    });
    assert_eq!(
        blobs(&requests, image.layers[0].digest()).len(),
        0,
        "{requests:?}"
    );
}

#[test]
fn a_layer_whose_ztoc_is_missing_or_broken_is_read_as_a_plain_one() {
    for case in ["no zTOC", "broken zTOC", "no index"] {
        let wanted = Wanted {
            ztoc: (case == "broken zTOC").then(|| b"not a FlatBuffer".to_vec()),
            ..Wanted::gzip()
        };
        let (image, index, mut content) = content(wanted);
        match case {
            "no zTOC" => content.remove_blob("team/app", &Digest::of(&index.ztocs[0])),
            "no index" => {
                content = Content::new();
                content.add_tagged_image("team/app", "soci", &image);
            }
            _ => {}
        }
        with_reference(&mut content);
        let world = World::new(content).mounted();
        assert_same(
            &world.at("team/app/soci/rootfs"),
            &world.at("team/app/reference/rootfs"),
        );
        let format = fs::read_to_string(world.at("team/app/soci/layers/0/format")).unwrap();
        assert_eq!(format.lines().next(), Some("gzip"), "{case}");
        assert!(
            world.log().contains("read without its"),
            "{case}: {}",
            world.log()
        );
        world.restart();
        let (bytes, requests) = world.requests(|| fs::read(world.at("team/app/soci/rootfs/large")).unwrap());
        assert!(bytes == noise(LARGE_BYTES, 2));
        assert!(requests.is_empty(), "{case}: {requests:?}");
    }
}
