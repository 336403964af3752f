//! Indexes of plain layers that machines leave each other in a directory, and what is done about those that are not of the
//! layer that an image promises.

use std::fs;
use std::path::Path;

use registryfs::demo::{Behaviour, Content, Image, ImageBuilder, Layer};
use registryfs::layer::exchange;
use registryfs::layer::scan::LayerScanner;
use registryfs::layer::{ContentSink, Format};

use crate::passes::of_layers;
use crate::support::file;
use crate::world::{World, errno, names, noise};

const BYTES: usize = 1_500_000;

fn image() -> Image {
    let files = [file("data", noise(BYTES, 1)), file("last", "z")];
    ImageBuilder::new(vec![Layer::tar(&files).unwrap()]).build()
}

fn world(image: &Image, settings: &str) -> World {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    World::with(content, Behaviour::default(), &[]).configured(settings)
}

fn check(world: &World) {
    let rootfs = world.at("team/app/1.0/rootfs");
    let listed = fs::read_dir(&rootfs).map(Iterator::count);
    assert_eq!(listed.ok(), Some(2), "{}", world.errors());
    assert_eq!(names(&rootfs), ["data", "last"]);
    assert_eq!(fs::read(rootfs.join("last")).unwrap(), b"z");
    assert!(fs::read(rootfs.join("data")).unwrap() == noise(BYTES, 1));
}

fn settings(dir: &Path, more: &str) -> String {
    format!("shared_index_dir = {:?}\n{more}", dir.to_str().unwrap())
}

/// The requests for the layer, each with its range.
fn ranges(world: &World, image: &Image, work: impl FnOnce()) -> Vec<bool> {
    let digest = image.layers[0].digest().to_string();
    let ((), requests) = world.requests(work);
    let of_layer = requests.iter().filter(|record| record.path.contains(&digest));
    of_layer.map(|record| record.range.is_some()).collect()
}

/// The index of a tar with one file of this name, said to be of the image's layer.
fn forged(image: &Image, name: &str) -> Vec<u8> {
    struct Nowhere;
    impl ContentSink for Nowhere {
        fn content(&mut self, _: u64, _: &[u8]) -> registryfs::error::Result<()> {
            Ok(())
        }
    }
    let other = Layer::tar(&[file(name, "forged")]).unwrap();
    let mut scanner = LayerScanner::new(Format::Tar);
    scanner.push(other.blob(), &mut Nowhere).unwrap();
    let index = scanner.finish(image.layers[0].blob().len() as u64).unwrap().index;
    exchange::pack(&image.layers[0].digest(), &index).unwrap()
}

fn path_in(dir: &Path, image: &Image) -> std::path::PathBuf {
    dir.join(format!("sha256-{}.index", image.layers[0].digest().hex()))
}

#[test]
fn a_directory_in_common_saves_all_but_one_the_reading() {
    let image = image();
    let dir = tempfile::tempdir().unwrap();
    let first = world(&image, &settings(dir.path(), "")).mounted();
    assert_eq!(ranges(&first, &image, || check(&first)), [false]);
    crate::world::until("the index is left for others", || {
        path_in(dir.path(), &image).exists()
    });
    // What may not be read as a whole need not be.
    let second = world(&image, &settings(dir.path(), "plain_layers = \"refuse\"\n")).mounted();
    let ranges = ranges(&second, &image, || check(&second));
    assert!(
        !ranges.is_empty() && ranges.iter().all(|&is_range| is_range),
        "{ranges:?}"
    );
    assert_eq!(names(dir.path()).len(), 1);
}

#[test]
fn an_index_of_another_tar_is_passed_over_and_replaced() {
    let image = image();
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(dir.path(), &image);
    fs::write(&path, forged(&image, "forged")).unwrap();
    let world = world(&image, &settings(dir.path(), "")).mounted();
    assert_eq!(ranges(&world, &image, || check(&world)), [false]);
    assert!(
        world.log().contains("a shared index is not used"),
        "{}",
        world.log()
    );
    crate::world::until("the right one is left for others", || {
        fs::read(&path).is_ok_and(|bytes| bytes != forged(&image, "forged"))
    });
}

#[test]
fn a_directory_that_is_missing_costs_the_reading_only() {
    let image = image();
    let dir = tempfile::tempdir().unwrap();
    let world = world(&image, &settings(&dir.path().join("none"), "")).mounted();
    assert_eq!(ranges(&world, &image, || check(&world)), [false]);
}

#[test]
fn an_index_that_is_imported_lifts_a_refusal() {
    let image = image();
    let first = world(&image, "").mounted();
    let name = |world: &World| format!("{}/team/app:1.0", world.registry.host());
    let dir = tempfile::tempdir().unwrap();
    let exported = dir.path().join("indexes");
    let exported = exported.to_str().unwrap();
    first.text(&["index", "export", &name(&first), exported]);
    let second = world(&image, "plain_layers = \"refuse\"\n").mounted();
    let rootfs = second.at("team/app/1.0/rootfs");
    assert_eq!(errno(fs::read_dir(&rootfs)), libc::EACCES);
    assert!(second.text(&["index", "import", exported]).contains("imported 1"));
    assert!(
        second
            .text(&["index", "import", exported])
            .contains("1 were known")
    );
    // The refusal is remembered for a moment, but not for what is known.
    let ranges = ranges(&second, &image, || check(&second));
    assert!(ranges.iter().all(|&is_range| is_range), "{ranges:?}");
}

#[test]
fn an_index_that_is_imported_must_be_of_the_tar_that_the_image_promises() {
    let image = image();
    let world = world(&image, "").mounted();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("forged");
    fs::write(&file, forged(&image, "forged")).unwrap();
    world.text(&["index", "import", file.to_str().unwrap()]);
    let ((), requests) = world.requests(|| {
        let rootfs = world.at("team/app/1.0/rootfs");
        assert_eq!(errno(fs::read_dir(rootfs)), libc::EIO);
    });
    assert!(world.errors().contains("DiffID"), "{}", world.errors());
    assert_eq!(of_layers(&requests, &image), [0], "{requests:#?}");
}
