//! A mirror that lies, hangs or goes away under a mount: the reader gets the right bytes, from the next endpoint.

use std::fs;
use std::time::Instant;

use registryfs::demo::{Behaviour, Content, DemoRegistry, Fault, Scope};

use crate::support::{file, image, says_what_is_wrong};
use crate::world::{LIMIT, World, noise};

const BYTES: usize = 400_000;

fn content() -> Content {
    let made = image(&[&[file("data", noise(BYTES, 1)), file("tail", noise(BYTES, 2))]]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &made);
    content
}

/// A world whose registry has a mirror with the same content.
fn mirrored() -> (World, DemoRegistry) {
    let mirror = DemoRegistry::start(content(), Behaviour::default()).unwrap();
    let world = World::new(content());
    let settings = format!(
        "[[registry.\"{}\".mirror]]\nurl = \"http://{}\"\n",
        world.registry.host(),
        mirror.host()
    );
    (world.configured(&settings).mounted(), mirror)
}

fn paths(registry: &DemoRegistry, text: &str) -> usize {
    registry.handle().requests_matching(text).len()
}

#[test]
fn chunks_that_do_not_verify_come_from_the_next_endpoint_within_the_same_read() {
    let (world, mirror) = mirrored();
    let data = world.at("team/app/1.0/rootfs/data");
    assert_eq!(fs::metadata(&data).unwrap().len(), BYTES as u64);
    assert_eq!(paths(&world.registry, "/"), 0, "a mirror that is well is enough");
    mirror
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::FlipByte(2000));
    mirror.handle().clear_ledger();
    assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1));
    assert_eq!(world.errors(), "", "no operation failed");
    assert!(paths(&world.registry, "/blobs/") > 0);

    let says_both = |line: &str| says_what_is_wrong(line, &noise(BYTES, 1));
    let lie = world
        .log()
        .lines()
        .find(|line| line.contains("a mirror lies"))
        .map(str::to_owned);
    assert!(lie.is_some_and(|line| says_both(&line)), "{}", world.log());
    let status = world.status();
    let hosts = status["hosts"].as_array().unwrap();
    let shown = hosts.iter().find(|host| host["host"] == mirror.host()).unwrap();
    assert!(says_both(shown["last_lie"].as_str().unwrap()), "{shown}");
    assert!(shown["left_out_for_ms"].as_u64().is_some(), "{shown}");

    let asked = paths(&mirror, "/blobs/");
    assert_eq!(
        fs::read(world.at("team/app/1.0/rootfs/tail")).unwrap(),
        noise(BYTES, 2)
    );
    assert_eq!(paths(&mirror, "/blobs/"), asked, "it is left out now");
}

#[test]
fn an_index_that_a_mirror_broke_comes_from_the_next_endpoint() {
    let (world, mirror) = mirrored();
    // Everywhere in the read at the end of the layer; the image's configuration is shorter.
    for kib in 5..200 {
        mirror
            .handle()
            .inject(Scope::containing("/blobs/"), Fault::FlipByte(kib << 10));
    }
    let data = world.at("team/app/1.0/rootfs/data");
    assert_eq!(fs::metadata(&data).unwrap().len(), BYTES as u64);
    assert_eq!(world.errors(), "", "no operation failed");
    assert!(world.log().contains("a mirror lies"), "{}", world.log());
    assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1));
}

#[test]
fn a_mirror_that_hangs_or_goes_away_does_not_fail_the_read() {
    let (world, mirror) = mirrored();
    let data = world.at("team/app/1.0/rootfs/data");
    assert_eq!(fs::metadata(&data).unwrap().len(), BYTES as u64);
    let hang = Fault::Stall {
        after_bytes: 1000,
        pause: None,
    };
    mirror.handle().inject(Scope::containing("/blobs/"), hang);
    let started = Instant::now();
    assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1));
    assert!(started.elapsed() < LIMIT / 2, "{:?}", started.elapsed());
    mirror.handle().stop();
    assert_eq!(
        fs::read(world.at("team/app/1.0/rootfs/tail")).unwrap(),
        noise(BYTES, 2)
    );
    assert_eq!(world.errors(), "");
}
