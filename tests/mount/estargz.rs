//! The variants of eStargz: what a read costs in each, and TOCs that are in another image.

use std::fs;
use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use registryfs::demo::{Behaviour, Content, Image, ImageBuilder, ImageIndex, Layer, Record, toc_image};
use registryfs::digest::Digest;
use registryfs::layer::estargz::TOC_DIGEST_ANNOTATION;
use registryfs::layer::estargz::writer::{Options, Variant};

use crate::support::{File, file};
use crate::world::{World, first_byte, names, noise};

fn of_variant(variant: Variant) -> Options {
    Options {
        variant,
        chunk_bytes: 64 << 10,
        ..Options::default()
    }
}

fn build(entries: &[File], options: Options) -> Image {
    ImageBuilder::new(vec![Layer::estargz(entries, options).unwrap()]).build()
}

fn tagged(name: &str, tag: &str, image: &Image) -> Content {
    let mut content = Content::new();
    content.add_tagged_image(name, tag, image);
    content
}

/// Forty small files, each of its own byte, around a large one.
fn small_files() -> Vec<File> {
    let small = |number: u8| file(&format!("d/{number:02}"), vec![number; 300]);
    let large = file("large", noise(400_000, 7));
    (0..20)
        .map(small)
        .chain([large])
        .chain((20..40).map(small))
        .collect()
}

fn check_small_files(world: &World, image: &str) {
    for number in 0..40u8 {
        let path = world.at(image).join(format!("rootfs/d/{number:02}"));
        assert_eq!(fs::read(path).unwrap(), vec![number; 300]);
    }
}

fn paths(records: &[Record]) -> Vec<String> {
    let line = |record: &Record| {
        format!(
            "{} {} {:?} {}",
            record.method, record.path, record.range, record.status
        )
    };
    records.iter().map(line).collect()
}

#[test]
fn one_request_brings_all_small_files_of_a_member() {
    let entries = small_files();
    let options = Options {
        min_chunk_bytes: 50_000,
        ..of_variant(Variant::Estargz)
    };
    let packed = build(&entries, options);
    let world = World::new(tagged("team/app", "1.0", &packed)).mounted();
    let (_, cold) = world.requests(|| first_byte(&world.at("team/app/1.0/rootfs/d/00")));
    // The manifest, the tail with the TOC, and the member.
    assert_eq!(cold.len(), 3, "{:#?}", paths(&cold));
    let first_half = || {
        for number in 0..20u8 {
            let small = world.at(&format!("team/app/1.0/rootfs/d/{number:02}"));
            assert_eq!(first_byte(&small), number);
        }
    };
    let (_, again) = world.requests(first_half);
    assert_eq!(again.len(), 0, "{:#?}", paths(&again));
    assert_eq!(
        fs::read(world.at("team/app/1.0/rootfs/large")).unwrap(),
        noise(400_000, 7)
    );
    check_small_files(&world, "team/app/1.0");
}

#[test]
fn stargz_is_read_by_ranges() {
    let entries = small_files();
    let options = Options {
        chunk_bytes: 1 << 20,
        ..of_variant(Variant::Legacy)
    };
    let world = World::new(tagged("team/app", "1.0", &build(&entries, options))).mounted();
    let (_, cold) = world.requests(|| first_byte(&world.at("team/app/1.0/rootfs/d/00")));
    assert_eq!(cold.len(), 3, "{:#?}", paths(&cold));
    check_small_files(&world, "team/app/1.0");
    let own = world.at("team/app/1.0/layers/0");
    assert!(
        fs::read_to_string(own.join("format"))
            .unwrap()
            .starts_with("estargz\nread: ranges\n")
    );
    assert!(
        fs::read_to_string(own.join("toc.json"))
            .unwrap()
            .contains("NumLink")
    );
}

/// A registry with an image whose TOC is in `TAG-esgztoc`, and the image.
fn external(tag: &str) -> (Content, Image) {
    let image = build(&small_files(), of_variant(Variant::ExternalToc));
    let mut content = tagged("team/app", tag, &image);
    content.add_tagged_image("team/app", format!("{tag}-esgztoc"), &toc_image(&image.layers));
    (content, image)
}

#[test]
fn an_external_toc_is_found_beside_the_tag() {
    let (content, image) = external("1.0");
    let world = World::new(content).mounted();
    let (_, cold) = world.requests(|| first_byte(&world.at("team/app/1.0/rootfs/d/00")));
    // The manifest, the tail with the footer, the image of TOCs and the TOC in it, and the member.
    assert_eq!(cold.len(), 5, "{:#?}", paths(&cold));
    assert!(cold.iter().all(|record| !record.path.ends_with("/tags/list")));
    check_small_files(&world, "team/app/1.0");
    let own = world.at("team/app/1.0/layers/0");
    assert!(names(&own).contains(&"toc.json".to_owned()));
    let toc = fs::read(own.join("toc.json")).unwrap();
    assert_eq!(
        Digest::of(&toc).to_string(),
        image.layers[0].annotations[TOC_DIGEST_ANNOTATION]
    );
    let size = fs::metadata(own.join("toc.json")).unwrap().len();
    assert_eq!(size, toc.len() as u64);
}

/// Nobody has to write the same of one blob.
#[test]
fn two_images_with_one_blob_have_each_the_toc_that_it_promises() {
    let (mut content, image) = external("1.0");
    let layer = &image.layers[0];
    let mut tocs = toc_image(&image.layers).layers;
    let mut tar = Vec::new();
    MultiGzDecoder::new(tocs[0].blob().as_ref())
        .read_to_end(&mut tar)
        .unwrap();
    // The header of the tar has 512 bytes, and the size of the JSON stays.
    let json_bytes = usize::from_str_radix(std::str::from_utf8(&tar[124..135]).unwrap(), 8).unwrap();
    let json = &mut tar[512..512 + json_bytes];
    let name = json.windows(6).position(|text| text == b"\"d/00\"").unwrap();
    json[name + 4] = b'x';
    let mut promised = layer.annotations.clone();
    promised.insert(TOC_DIGEST_ANNOTATION.to_owned(), Digest::of(json).to_string());
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&tar).unwrap();
    let mut other_toc = Layer::raw(gzip.finish().unwrap(), layer.digest());
    other_toc.annotations = tocs[0].annotations.clone();
    tocs[0] = other_toc;
    let mut other = layer.clone();
    other.annotations = promised;
    content.add_tagged_image("team/other", "1.0", &ImageBuilder::new(vec![other]).build());
    content.add_tagged_image("team/other", "1.0-esgztoc", &ImageBuilder::new(tocs).build());
    let world = World::new(content).mounted();
    for (image, first) in [("team/app", "00"), ("team/other", "0x")] {
        let own = world.at(&format!("{image}/1.0/layers/0"));
        let toc = fs::read_to_string(own.join("toc.json")).unwrap();
        assert!(toc.contains(&format!("\"d/{first}\"")), "{image}");
        assert!(names(&own.join("fs/d")).contains(&first.to_owned()), "{image}");
    }
}

#[test]
fn the_image_of_tocs_is_asked_for_once_for_all_layers() {
    let layer = |path: &str| {
        build(&[file(path, path)], of_variant(Variant::ExternalToc))
            .layers
            .remove(0)
    };
    let image = ImageBuilder::new(["a", "b", "c"].map(layer).to_vec()).build();
    let mut content = tagged("team/app", "1.0", &image);
    content.add_tagged_image("team/app", "1.0-esgztoc", &toc_image(&image.layers));
    let world = World::new(content).mounted();
    let (_, cold) = world.requests(|| assert_eq!(names(&world.at("team/app/1.0/rootfs")), ["a", "b", "c"]));
    let asked = cold.iter().filter(|record| record.path.ends_with("1.0-esgztoc"));
    assert_eq!(asked.count(), 1, "{:#?}", paths(&cold));
}

#[test]
fn a_question_about_a_layer_without_its_toc_reads_no_layer_as_a_whole() {
    let image = build(&small_files(), of_variant(Variant::ExternalToc));
    let world = World::new(tagged("team/app", "1.0", &image)).mounted();
    let name = format!("{}/team/app:1.0", world.registry.host());
    let (said, requests) = world.requests(|| world.text(&["info", &name]));
    assert!(said.contains("one pass needed"), "{said}");
    let blob = image.layers[0].digest().to_string();
    let whole = |record: &&Record| record.path.contains(&blob) && record.range.is_none();
    assert_eq!(
        requests.iter().filter(whole).count(),
        0,
        "{:#?}",
        paths(&requests)
    );
    // Who needs its files gets them all the same.
    check_small_files(&world, "team/app/1.0");
    assert!(world.text(&["info", &name]).contains("pass done"));
}

#[test]
fn an_external_toc_is_found_for_an_image_in_an_index() {
    let (_, image) = external("1.0");
    let other = ImageBuilder::new(Vec::new()).architecture("arm64").build();
    let index = ImageIndex::new(vec![image.clone(), other]);
    let mut content = Content::new();
    let digest = content.add_index("team/app", &index);
    content.tag("team/app", "1.0", digest);
    content.add_tagged_image("team/app", "1.0-esgztoc", &toc_image(&image.layers));
    let world = World::new(content).mounted();
    let (_, cold) = world.requests(|| first_byte(&world.at("team/app/1.0/rootfs/d/00")));
    assert!(
        cold.iter().all(|record| !record.path.ends_with("/tags/list")),
        "{:#?}",
        paths(&cold)
    );
    check_small_files(&world, "team/app/1.0");
}

#[test]
fn an_external_toc_is_found_among_the_tags_for_an_image_by_digest() {
    let (mut content, image) = external("1.0");
    let digest = image.digest();
    // Others that end the same but are about other layers, hold another TOC, or are no images at all.
    let other = build(&[file("a", "other")], of_variant(Variant::ExternalToc));
    content.add_tagged_image("team/app", "0.1-esgztoc", &toc_image(&other.layers));
    let mut lie = toc_image(&other.layers).layers.remove(0);
    let about = image.layers[0].digest().to_string();
    lie.annotations
        .insert("containerd.io/snapshot/stargz/layer.digest".to_owned(), about);
    content.add_tagged_image("team/app", "0.2-esgztoc", &ImageBuilder::new(vec![lie]).build());
    content.tag("team/app", "0.3-esgztoc", Digest::of(b"nothing"));
    let index = ImageIndex::new(vec![image]);
    let index = content.add_index("team/app", &index);
    content.tag("team/app", "0.4-esgztoc", index);
    let world = World::with(content, Behaviour::default(), &[]).mounted();
    let image = format!("team/app@{digest}");
    let (_, cold) = world.requests(|| first_byte(&world.at(&image).join("rootfs/d/00")));
    let listed = cold
        .iter()
        .filter(|record| record.path.ends_with("/tags/list"))
        .count();
    assert_eq!(listed, 1, "{:#?}", paths(&cold));
    check_small_files(&world, &image);
}
