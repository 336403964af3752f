//! What goes over the wire, to the request: how many requests a read costs, and the lookups that cost nothing.

use std::fs;
use std::process::Command;
use std::time::Duration;

use registryfs::demo::{Behaviour, Content, Record, Redirect, in_sequence, sample_content};

use crate::support::{file, image, with_tokens};
use crate::world::{World, finish, first_byte, noise, start};

/// An image of `count` layers, each too large for its index to come with everything else of it.
fn layers(count: u8) -> Content {
    let layer = |number: u8| {
        [
            file(&format!("small{number}"), vec![number; 100]),
            file(&format!("large{number}"), noise(600_000, u64::from(number))),
        ]
    };
    let layers: Vec<_> = (0..count).map(layer).collect();
    let slices: Vec<_> = layers.iter().map(<[_; 2]>::as_slice).collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&slices));
    content
}

fn summary(records: &[Record]) -> Vec<String> {
    let line = |record: &Record| {
        format!(
            "{:?} {} {} {:?} {} {:?}..{:?}",
            record.endpoint,
            record.method,
            record.path,
            record.range,
            record.status,
            record.started,
            record.ended
        )
    };
    records.iter().map(line).collect()
}

#[test]
fn the_first_byte_takes_three_round_trips_and_a_later_miss_one() {
    let world = World::new(layers(3)).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    // The registry takes its time, so that what could be parallel is, on a busy machine too.
    world
        .handle()
        .update(|behaviour| behaviour.latency = Duration::from_millis(500));
    let (byte, cold) = world.requests(|| first_byte(&rootfs.join("small0")));
    assert_eq!(byte, 0);
    assert_eq!((cold.len(), in_sequence(&cold)), (5, 3), "{:#?}", summary(&cold));
    assert!(cold[0].path.contains("/manifests/"), "{:#?}", summary(&cold));

    let (byte, miss) = world.requests(|| first_byte(&rootfs.join("small2")));
    assert_eq!((byte, miss.len()), (2, 1), "{:#?}", summary(&miss));
    let (_, again) = world.requests(|| first_byte(&rootfs.join("small2")));
    assert_eq!(again.len(), 0, "{:#?}", summary(&again));
}

#[test]
fn a_restarted_daemon_asks_nothing_for_what_it_knows() {
    let world = World::new(layers(3)).mounted();
    let tag = world.at("team/app/1.0");
    let rootfs = tag.join("rootfs");
    let before = fs::read(rootfs.join("large1")).unwrap();
    fs::read_dir(&tag).unwrap();
    world.restart();
    let (_, requests) = world.requests(|| {
        assert_eq!(crate::world::names(&rootfs).len(), 6);
        assert!(crate::world::names(&tag).contains(&"rootfs".to_owned()));
        assert_eq!(fs::read(rootfs.join("large1")).unwrap(), before);
        fs::metadata(rootfs.join("small2")).unwrap();
        fs::read(tag.join("manifest.json")).unwrap();
    });
    assert_eq!(requests.len(), 0, "{:#?}", summary(&requests));
}

#[test]
fn a_known_image_whose_tag_is_due_costs_one_request() {
    let world = World::new(layers(3)).configured("tag_ttl_s = 1\n").mounted();
    let small = world.at("team/app:1.0/rootfs/small0");
    first_byte(&small);
    world.restart();
    // Until the tag is due for a check, and the kernel's entry too.
    std::thread::sleep(Duration::from_millis(1200));
    let (_, requests) = world.requests(|| first_byte(&small));
    assert_eq!(requests.len(), 1, "{:#?}", summary(&requests));
    assert_eq!((requests[0].method.as_str(), requests[0].body_bytes), ("HEAD", 0));
}

#[test]
fn what_another_repository_has_brought_is_not_fetched_again() {
    let mut content = layers(3);
    let original = content.repository("team/app").unwrap();
    let digest = original.resolve("1.0").unwrap();
    let manifest = original.manifest(&digest).unwrap().clone();
    content.put_manifest("copy/app", manifest.media_type, manifest.bytes);
    content.tag("copy/app", "2.0", digest);
    let world = World::new(content).mounted();
    let of = |image: &str| world.at(image).join("rootfs/small0");
    assert_eq!(first_byte(&of("team/app/1.0")), 0);
    // The copy's blobs are not even there.
    let (byte, requests) = world.requests(|| first_byte(&of("copy/app/2.0")));
    assert_eq!((byte, requests.len()), (0, 1), "{:#?}", summary(&requests));
}

#[test]
fn tokens_and_redirects_cost_six_round_trips_for_any_number_of_layers() {
    for count in [1, 12] {
        let mut behaviour = with_tokens("user", "secret");
        behaviour.redirect = Some(Redirect::default());
        behaviour.latency = Duration::from_millis(300);
        // Whether the image is for everyone is asked beside, and is no part of the reader's way.
        let world = World::with(layers(count), behaviour, &["--credential", "user:secret"])
            .configured("share_private = true")
            .mounted();
        let small = world.at("team/app/1.0/rootfs/small0");
        let (byte, requests) = world.requests(|| first_byte(&small));
        assert_eq!(byte, 0);
        let sequence = in_sequence(&requests);
        assert!(
            sequence <= 6,
            "{count} layers: {sequence}: {:#?}",
            summary(&requests)
        );
        let large = world.at("team/app/1.0/rootfs/large0");
        let (_, miss) = world.requests(|| first_byte(&large));
        assert!(miss.len() <= 1, "{:#?}", summary(&miss));
    }
}

#[test]
fn looking_bare_names_up_asks_nothing() {
    let world = World::new(layers(1)).mounted();
    let (_, requests) = world.requests(|| {
        assert!(fs::metadata(world.at("a/b/c/12")).unwrap().is_dir());
        assert!(fs::metadata(world.at("team/app/1.0")).unwrap().is_dir());
        assert!(
            fs::metadata(world.root().join("registry.invalid/x/y"))
                .unwrap()
                .is_dir()
        );
    });
    assert_eq!(requests.len(), 0, "{:#?}", summary(&requests));
}

#[test]
fn listing_thousands_of_tags_asks_for_tag_pages_alone() {
    let world = World::with(sample_content().unwrap(), Behaviour::default(), &[]).mounted();
    for arguments in [&["-1"][..], &["-l"]] {
        let mut ls = Command::new("ls");
        ls.args(arguments).arg(world.at("ci/nightly"));
        let (listed, requests) = world.requests(|| finish(start(&mut ls)));
        assert!(listed.status.success());
        let lines = listed.stdout.iter().filter(|byte| **byte == b'\n').count();
        assert!(lines >= 5000, "{lines} lines");
        let others: Vec<_> = requests
            .iter()
            .filter(|record| record.path != "/v2/ci/nightly/tags/list")
            .collect();
        // Whether the last component is a tag of the repository above is one question.
        assert!(others.len() <= 1, "{:#?}", summary(&requests));
        assert!(
            others
                .iter()
                .all(|record| record.path == "/v2/ci/manifests/nightly"),
            "{:#?}",
            summary(&requests)
        );
    }
}
