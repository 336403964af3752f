//! Layers in odd clothes: media types that say something else than the bytes, layers with nothing in them, and layers that
//! occur more than once.

use std::fs;

use bytes::Bytes;
use registryfs::demo::{Content, Image, ImageBuilder, Layer, Record};
use registryfs::digest::Digest;

use crate::support::{File, dir, file};
use crate::world::{World, errno, names, noise};

/// The layer that Docker writes for every instruction that changes no file: two zero blocks in gzip, of digest `a3ed95ca…`.
const DOCKERS_EMPTY_LAYER: [u8; 32] = [
    31, 139, 8, 0, 0, 9, 110, 136, 0, 255, 98, 24, 5, 163, 96, 20, 140, 88, 0, 8, 0, 0, 255, 255, 46, 175,
    181, 239, 0, 4, 0, 0,
];

fn tagged(images: &[(&str, &Image)]) -> Content {
    let mut content = Content::new();
    for (name, image) in images {
        let (repository, tag) = name.split_once(':').unwrap();
        content.add_tagged_image(repository, tag, image);
    }
    content
}

fn of_type(mut layer: Layer, media_type: &str) -> Layer {
    layer.media_type = Some(media_type.to_owned());
    layer
}

fn some_files() -> Vec<File> {
    vec![
        dir("d"),
        file("d/small", "small"),
        file("large", noise(300_000, 3)),
    ]
}

/// The requests for blobs that are layers of `image`, by layer.
fn of_layers(requests: &[Record], image: &Image) -> Vec<usize> {
    let of = |layer: &Layer| {
        let ending = layer.digest().to_string();
        requests
            .iter()
            .filter(|record| record.path.ends_with(&ending))
            .count()
    };
    image.layers.iter().map(of).collect()
}

fn check(world: &World, image: &str) {
    let rootfs = world.at(image).join("rootfs");
    assert_eq!(fs::read(rootfs.join("d/small")).unwrap(), b"small");
    assert_eq!(fs::read(rootfs.join("large")).unwrap(), noise(300_000, 3));
}

#[test]
fn the_bytes_decide_whatever_the_media_type_says() {
    let entries = some_files();
    let gzip = || Layer::gzip(&entries).unwrap();
    let oci = "application/vnd.oci.image.layer.v1.tar";
    let docker = "application/vnd.docker.image.rootfs.diff.tar";
    let cases = [
        ("gzip-as-tar", of_type(gzip(), oci), "gzip"),
        ("gzip-as-zstd", of_type(gzip(), &format!("{oci}+zstd")), "gzip"),
        ("gzip-as-docker-tar", of_type(gzip(), docker), "gzip"),
        (
            "tar-as-gzip",
            of_type(Layer::tar(&entries).unwrap(), &format!("{oci}+gzip")),
            "tar",
        ),
        (
            "zstd-as-gzip",
            of_type(Layer::zstd(&entries).unwrap(), &format!("{docker}.gzip")),
            "zstd",
        ),
        (
            "foreign",
            of_type(
                gzip(),
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            ),
            "gzip",
        ),
        (
            "nondistributable",
            of_type(
                gzip(),
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            ),
            "gzip",
        ),
        (
            "in-capitals",
            of_type(gzip(), "Application/VND.oci.image.layer.v1.TAR+GZIP"),
            "gzip",
        ),
    ];
    for (name, layer, format) in cases {
        let image = ImageBuilder::new(vec![layer]).build();
        let world = World::new(tagged(&[(&format!("team/{name}:1"), &image)])).mounted();
        check(&world, &format!("team/{name}/1"));
        let own = world.at(&format!("team/{name}/1/layers/0"));
        let said = fs::read_to_string(own.join("format")).unwrap();
        assert_eq!(said.lines().next(), Some(format), "{name}");
    }
}

#[test]
fn docker_s_own_manifests_are_read() {
    let entries = some_files();
    let layers = vec![
        Layer::gzip(&entries).unwrap(),
        Layer::tar(&[file("top", "top")]).unwrap(),
    ];
    let image = ImageBuilder::new(layers).docker().build();
    let world = World::new(tagged(&[("team/app:1", &image)])).mounted();
    check(&world, "team/app/1");
    assert_eq!(fs::read(world.at("team/app/1/rootfs/top")).unwrap(), b"top");
    let media_type = fs::read_to_string(world.at("team/app/1/layers/0/media_type")).unwrap();
    assert_eq!(media_type, "application/vnd.docker.image.rootfs.diff.tar.gzip\n");
}

#[test]
fn layers_with_nothing_in_them_are_layers() {
    let nothing = Digest::of(b"");
    let zeros = Digest::of(&[0; 1024]);
    let empty = [
        Layer::gzip(&[]).unwrap(),
        Layer::raw(Bytes::from_static(&DOCKERS_EMPTY_LAYER), zeros),
        Layer::tar(&[]).unwrap(),
        Layer::zstd(&[]).unwrap(),
        // A descriptor of size 0.
        Layer::raw(Bytes::new(), nothing),
    ];
    assert!(
        empty[1]
            .digest()
            .to_string()
            .starts_with("sha256:a3ed95caeb02ffe6")
    );
    let files = Layer::gzip(&some_files()).unwrap();
    for (number, layer) in empty.into_iter().enumerate() {
        let image = ImageBuilder::new(vec![files.clone(), layer.clone()]).build();
        let alone = ImageBuilder::new(vec![layer]).build();
        let world = World::new(tagged(&[("team/app:1", &image), ("team/app:alone", &alone)])).mounted();
        check(&world, "team/app/1");
        assert_eq!(names(&world.at("team/app/1/layers/1/fs")), [""; 0], "{number}");
        assert_eq!(names(&world.at("team/app/alone/rootfs")), [""; 0], "{number}");
        let blob = fs::metadata(world.at("team/app/alone/layers/0/blob")).unwrap();
        assert_eq!(blob.len(), alone.layers[0].blob().len() as u64, "{number}");
    }
}

#[test]
fn a_layer_that_an_image_has_twice_is_read_once() {
    let files = Layer::gzip(&some_files()).unwrap();
    let hides = Layer::gzip(&[file(".wh.large", ""), file("d/.wh.small", "")]).unwrap();
    let image = ImageBuilder::new(vec![files.clone(), hides.clone(), files, hides.clone(), hides]).build();
    let again = ImageBuilder::new(image.layers[..3].to_vec()).build();
    let world = World::new(tagged(&[("team/app:1", &image), ("team/app:2", &again)])).mounted();
    let (_, requests) = world.requests(|| names(&world.at("team/app/1/rootfs")));
    assert_eq!(of_layers(&requests, &image), [1; 5], "{requests:#?}");
    let large = world.at("team/app/1/rootfs/large");
    assert_eq!(errno(fs::metadata(large)), libc::ENOENT);
    let (_, requests) = world.requests(|| check(&world, "team/app/2"));
    assert_eq!(of_layers(&requests, &again), [0; 3], "{requests:#?}");
    assert_eq!(
        fs::read(world.at("team/app/2/layers/2/fs/large")).unwrap(),
        noise(300_000, 3)
    );
}

#[test]
fn a_layer_of_two_repositories_is_read_once() {
    let shared = Layer::gzip(&some_files()).unwrap();
    let image = |name: &str| {
        let own = Layer::gzip(&[file(name, name)]).unwrap();
        ImageBuilder::new(vec![shared.clone(), own]).build()
    };
    let (one, two) = (image("one"), image("two"));
    let content = tagged(&[("team/one:1", &one), ("team/two:1", &two)]);
    let world = World::new(content).mounted();
    let (_, requests) = world.requests(|| check(&world, "team/one/1"));
    assert_eq!(of_layers(&requests, &one), [1, 1], "{requests:#?}");
    let (_, requests) = world.requests(|| {
        check(&world, "team/two/1");
        assert_eq!(fs::read(world.at("team/two/1/rootfs/two")).unwrap(), b"two");
    });
    assert_eq!(of_layers(&requests, &two), [0, 1], "{requests:#?}");
}
