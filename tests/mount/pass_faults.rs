//! What goes wrong while a layer is read as a whole, and what it costs to read a layer again that has no other way.

use std::fs;
use std::process::Command;

use registryfs::demo::{Behaviour, Content, DemoRegistry, Fault, Image, ImageBuilder, Layer, Scope};
use registryfs::digest::Digest;

use crate::passes::{kept, of_layers};
use crate::store::SmallDisk;
use crate::support::{File, file};
use crate::world::{World, errno, finish, names, noise, start, stderr, until};

const BYTES: usize = 1_500_000;

fn files(count: u64, bytes: usize) -> Vec<File> {
    (0..count)
        .map(|n| file(&format!("f{n}"), noise(bytes, n)))
        .collect()
}

fn content(image: &Image) -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    content
}

fn image_of(layer: Layer) -> Image {
    ImageBuilder::new(vec![layer]).build()
}

#[test]
fn a_layer_that_a_mirror_broke_comes_from_the_next_endpoint() {
    // In a file's content, where only the digest shows it, and in the type of a file, which no reader knows then.
    for at in [100_000, 156] {
        let image = image_of(Layer::tar(&files(1, BYTES)).unwrap());
        let mirror = DemoRegistry::start(content(&image), Behaviour::default()).unwrap();
        let world = World::new(content(&image));
        let settings = format!(
            "[[registry.\"{}\".mirror]]\nurl = \"http://{}\"\n",
            world.registry.host(),
            mirror.host()
        );
        let world = world.configured(&settings).mounted();
        let layer = Scope::containing(image.layers[0].digest().to_string());
        mirror.handle().inject(layer, Fault::FlipByte(at));
        let rootfs = world.at("team/app/1.0/rootfs");
        let listed = fs::read_dir(&rootfs).map(Iterator::count);
        assert_eq!(listed.ok(), Some(1), "{at}: {}", world.errors());
        assert!(fs::read(rootfs.join("f0")).unwrap() == noise(BYTES, 0));
        assert_eq!(world.errors(), "", "no operation failed");
        assert!(world.log().contains("a mirror lies"), "{}", world.log());
    }
}

#[test]
fn a_stream_that_stalls_ends_and_leaves_nothing_behind() {
    let image = image_of(Layer::tar(&files(1, BYTES)).unwrap());
    let world = World::new(content(&image)).mounted();
    let stall = Fault::Stall {
        after_bytes: 300_000,
        pause: None,
    };
    let layer = Scope::containing(image.layers[0].digest().to_string());
    world.handle().inject(layer, stall);
    let rootfs = world.at("team/app/1.0/rootfs");
    assert_eq!(
        errno(fs::read_dir(&rootfs)),
        libc::ETIMEDOUT,
        "{}",
        world.errors()
    );
    assert!(kept(&world).is_empty(), "{:?}", kept(&world));
    assert!(
        world.status()["passes"].as_array().is_some_and(Vec::is_empty),
        "{}",
        world.status()
    );
    world.handle().clear_faults();
    until("the layer can be read", || fs::read_dir(&rootfs).is_ok());
    assert!(fs::read(rootfs.join("f0")).unwrap() == noise(BYTES, 0));
}

#[test]
fn a_disk_that_fills_up_in_the_middle_fails_no_read() {
    // Declared first, so dropped last.
    let disk;
    let image = image_of(Layer::gzip(&files(6, BYTES / 2)).unwrap());
    let world = World::new(content(&image));
    let layer = Scope::containing(image.layers[0].digest().to_string());
    world.handle().inject(layer, Fault::Throttle(BYTES as u64));
    disk = SmallDisk::new(&world, 8 << 20);
    world.mount();
    let rootfs = world.at("team/app/1.0/rootfs");
    let listing = start(Command::new("ls").arg(&rootfs));
    until("content is kept aside", || {
        world.status()["passes"][0]["done_bytes"]
            .as_u64()
            .is_some_and(|done| done > BYTES as u64)
    });
    disk.fill();
    let output = finish(listing);
    assert!(output.status.success(), "{}", stderr(&output));
    world.handle().clear_faults();
    let check = || {
        for n in 0..6 {
            let bytes = fs::read(rootfs.join(format!("f{n}")));
            assert!(bytes.unwrap() == noise(BYTES / 2, n), "f{n}: {}", world.errors());
        }
    };
    check();
    let aside = names(&world.store().join("tmp"));
    assert!(aside.is_empty(), "nothing half-written stays: {aside:?}");
    disk.empty();
    world.restart();
    check();
    world.umount();
}

#[test]
fn a_layer_of_one_frame_is_fetched_once_for_all_that_left_the_cache() {
    let image = image_of(Layer::zstd(&files(4, 2 << 20)).unwrap());
    let blob_bytes = image.layers[0].blob().len() as u64;
    let world = World::new(content(&image)).mounted();
    let name = format!("{}/team/app:1.0", world.registry.host());
    assert_eq!(names(&world.at("team/app/1.0/rootfs")).len(), 4);
    // Through the daemon each time: the kernel keeps what it has read.
    let cat = |n: u64| world.text_bytes(&["cat", &name, &format!("f{n}")]);
    let whole = |requests: &[registryfs::demo::Record]| {
        let bytes = requests.iter().map(|record| record.body_bytes).sum::<u64>();
        assert_eq!(of_layers(requests, &image), [1], "{requests:#?}");
        assert_eq!(bytes, blob_bytes, "{requests:#?}");
    };
    world.text(&["cache", "evict", &name, "f1"]);
    let ((), requests) = world.requests(|| {
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| assert!(cat(1) == noise(2 << 20, 1)));
            }
        });
    });
    whole(&requests);
    // One file that is missed brings all the others back.
    world.text(&["cache", "evict", &name]);
    let ((), requests) = world.requests(|| assert!(cat(0) == noise(2 << 20, 0)));
    whole(&requests);
    let ((), requests) = world.requests(|| {
        for n in 0..4 {
            assert!(cat(n) == noise(2 << 20, n), "f{n}");
        }
    });
    assert_eq!(of_layers(&requests, &image), [0], "{requests:#?}");
}

#[test]
fn on_a_full_disk_a_reader_gets_his_part_of_a_layer_of_one_frame() {
    let disk;
    // Together more than is kept in memory of what the disk does not take.
    let image = image_of(Layer::zstd(&files(10, 10 << 20)).unwrap());
    let world = World::new(content(&image));
    disk = SmallDisk::new(&world, 1 << 20);
    world.mount();
    let rootfs = world.at("team/app/1.0/rootfs");
    assert_eq!(names(&rootfs).len(), 10);
    // Slow enough that nobody has to hurry.
    let layer = Scope::containing(image.layers[0].digest().to_string());
    world.handle().inject(layer, Fault::Throttle(30 << 20));
    let first = crate::world::first_byte(&rootfs.join("f2"));
    assert_eq!(first, noise(1, 2)[0], "{}", world.errors());
    assert!(world.log().contains("stays in memory"), "{}", world.log());
    world.umount();
    drop(disk);
}

#[test]
fn a_tar_with_what_no_engine_unpacks_is_no_failure_of_the_network() {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.as_mut_bytes()[156] = b'Q';
    header.as_mut_bytes()[0] = b'x';
    header.set_cksum();
    let tar = [header.as_bytes().as_slice(), &[0; 1024]].concat();
    let diff_id = Digest::of(&tar);
    let image = image_of(Layer::raw(tar, diff_id));
    let world = World::new(content(&image)).mounted();
    let name = format!("{}/team/app:1.0", world.registry.host());
    let (output, requests) = world.requests(|| world.run(&["ls", &name]));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("of type 'Q'"), "{}", stderr(&output));
    assert_eq!(of_layers(&requests, &image), [1], "{requests:#?}");
    assert!(kept(&world).is_empty(), "{:?}", kept(&world));
}
