//! Layers without a table of contents: read as a whole once, checked at the end, and from then on like all others.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use registryfs::demo::{Behaviour, Content, Fault, Image, ImageBuilder, Layer, Record, Scope};
use registryfs::digest::Digest;

use crate::support::{File, dir, file};
use crate::world::{World, errno, finish, names, noise, pid, start, stderr, until};

const BYTES: usize = 1_500_000;

fn base() -> Vec<File> {
    let small = (0..40).map(|n| file(&format!("small/{n}"), format!("file {n}")));
    [
        dir("small/"),
        dir("bin/"),
        file("bin/large", noise(BYTES, 1)),
        file("empty", ""),
    ]
    .into_iter()
    .chain(small)
    .collect()
}

fn top() -> Vec<File> {
    vec![
        file("bin/.wh.large", ""),
        file("bin/other", noise(700_000, 2)),
        file("small/7", "changed"),
    ]
}

/// An image of plain gzip below plain tar.
fn plain_image() -> Image {
    ImageBuilder::new(vec![Layer::gzip(&base()).unwrap(), Layer::tar(&top()).unwrap()]).build()
}

fn content(image: &Image) -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    content
}

/// One layer of one large file, and what keeps it busy for a while.
fn slow_world(bytes_per_s: u64, options: &str) -> (World, Digest) {
    let layer = Layer::tar(&[file("data", noise(BYTES, 3)), file("last", "z")]).unwrap();
    let digest = layer.digest();
    let image = ImageBuilder::new(vec![layer]).build();
    let world = World::new(content(&image)).configured(options);
    let scope = Scope::containing(digest.to_string());
    world.handle().inject(scope, Fault::Throttle(bytes_per_s));
    (world.mounted(), digest)
}

/// The first line of a layer's `format`.
fn format_of(path: &std::path::Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.lines().next().unwrap_or_default().to_owned()
}

pub(crate) fn of_layers(requests: &[Record], image: &Image) -> Vec<usize> {
    let asked = |layer: &Layer| {
        let digest = layer.digest().to_string();
        requests
            .iter()
            .filter(|record| record.path.contains(&digest))
            .count()
    };
    image.layers.iter().map(asked).collect()
}

fn check(world: &World, repository: &str) {
    let rootfs = world.at(&format!("{repository}/1.0/rootfs"));
    assert_eq!(names(&rootfs), ["bin", "empty", "small"], "{}", world.errors());
    assert_eq!(names(&rootfs.join("bin")), ["other"]);
    assert!(fs::read(rootfs.join("bin/other")).unwrap() == noise(700_000, 2));
    for n in 0..40 {
        let expected = if n == 7 {
            "changed".to_owned()
        } else {
            format!("file {n}")
        };
        assert_eq!(
            fs::read_to_string(rootfs.join(format!("small/{n}"))).unwrap(),
            expected
        );
    }
    let below = world.at(&format!("{repository}/1.0/layers/0/fs/bin/large"));
    assert!(fs::read(below).unwrap() == noise(BYTES, 1));
}

/// The names that the store has of layers, finished or not.
pub(crate) fn kept(world: &World) -> Vec<String> {
    let aside = names(&world.store().join("tmp"));
    let aside = aside.into_iter().filter(|name| name.starts_with("layer"));
    names(&world.store().join("layers"))
        .into_iter()
        .chain(aside)
        .collect()
}

#[test]
fn plain_layers_are_read_once_for_ever_and_for_every_image() {
    let image = plain_image();
    let mut content = content(&image);
    content.add_tagged_image("team/copy", "1.0", &image);
    let other = ImageBuilder::new(vec![
        image.layers[0].clone(),
        Layer::tar(&[file("x", "y")]).unwrap(),
    ])
    .build();
    content.add_tagged_image("team/other", "1.0", &other);
    let world = World::new(content).mounted();
    let ((), requests) = world.requests(|| check(&world, "team/app"));
    assert_eq!(of_layers(&requests, &image), [1, 1], "{requests:#?}");
    assert_eq!(
        requests.len(),
        4,
        "manifest, configuration, two layers: {requests:#?}"
    );
    assert!(
        requests.iter().all(|record| record.range.is_none()),
        "{requests:#?}"
    );
    let ((), requests) = world.requests(|| {
        check(&world, "team/app");
        check(&world, "team/copy");
    });
    assert_eq!(of_layers(&requests, &image), [0, 0], "{requests:#?}");
    world.restart();
    let ((), requests) = world.requests(|| check(&world, "team/app"));
    assert!(requests.is_empty(), "{requests:#?}");
    let ((), requests) = world.requests(|| {
        let rootfs = world.at("team/other/1.0/rootfs");
        assert_eq!(fs::read_to_string(rootfs.join("x")).unwrap(), "y");
        assert!(fs::read(rootfs.join("bin/large")).unwrap() == noise(BYTES, 1));
    });
    assert_eq!(of_layers(&requests, &other), [0, 1], "{requests:#?}");
}

#[test]
fn images_at_the_same_time_share_a_pass() {
    let image = plain_image();
    let world = World::new(content(&image)).mounted();
    for layer in &image.layers {
        let scope = Scope::containing(layer.digest().to_string());
        world
            .handle()
            .inject(scope, Fault::Delay(Duration::from_millis(300)));
    }
    let ((), requests) = world.requests(|| {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| check(&world, "team/app"));
            }
            scope.spawn(|| {
                let lower = world
                    .at("team/app@sha256:")
                    .with_file_name(format!("app@{}", image.digest()));
                assert_eq!(names(&lower.join("layers/0/fs/bin")), ["large"]);
            });
        });
    });
    assert_eq!(of_layers(&requests, &image), [1, 1], "{requests:#?}");
}

#[test]
fn what_can_be_said_of_a_layer_without_reading_it_is() {
    let image = plain_image();
    let world = World::new(content(&image)).mounted();
    let ((), requests) = world.requests(|| {
        let of = world.at("team/app/1.0");
        names(&of);
        for (number, format) in [("0", "gzip"), ("1", "tar")] {
            let layer = of.join("layers").join(number);
            assert_eq!(
                names(&layer),
                ["blob", "digest", "format", "fs", "media_type", "size"]
            );
            assert_eq!(format_of(&layer.join("format")), format);
            assert_eq!(
                fs::metadata(layer.join("toc.json")).unwrap_err().raw_os_error(),
                Some(libc::ENOENT)
            );
        }
    });
    assert_eq!(of_layers(&requests, &image), [0, 0], "{requests:#?}");
    let ((), requests) = world.requests(|| {
        names(&world.at("team/app/1.0/layers/1/fs"));
    });
    assert_eq!(
        of_layers(&requests, &image),
        [0, 1],
        "only that layer is needed: {requests:#?}"
    );
}

#[test]
fn another_blob_than_was_promised_leaves_nothing_behind() {
    let image = plain_image();
    let world = World::new(content(&image)).mounted();
    let lied_about = image.layers[1].digest().to_string();
    // In the content of a file, where nothing but the digest shows it.
    world
        .handle()
        .inject(Scope::containing(&lied_about), Fault::FlipByte(100_000));
    let fs1 = world.at("team/app/1.0/layers/1/fs");
    assert_eq!(errno(fs::read_dir(&fs1)), libc::EIO);
    assert!(kept(&world).is_empty(), "{:?}", kept(&world));
    let errors = world.errors();
    assert!(
        errors.contains(&format!("expected {lied_about}, got sha256:")),
        "{errors}"
    );
    // What failed fails at once for a while, without asking again.
    let ((), requests) = world.requests(|| assert_eq!(errno(fs::read_dir(&fs1)), libc::EIO));
    assert!(requests.is_empty(), "{requests:#?}");
    world.handle().clear_faults();
    until("the layer can be read", || fs::read_dir(&fs1).is_ok());
    check(&world, "team/app");
}

#[test]
fn an_image_that_promises_another_tar_is_refused_alone() {
    let honest = plain_image();
    let mut layers = honest.layers.clone();
    layers[0].diff_id = Digest::of(b"another tar");
    let liar = ImageBuilder::new(layers).build();
    let mut content = content(&honest);
    content.add_tagged_image("team/liar", "1.0", &liar);
    content.add_tagged_image("team/late", "1.0", &liar);
    let world = World::new(content).mounted();
    let lower = "1.0/layers/0/fs";
    assert_eq!(errno(fs::read_dir(world.at("team/liar").join(lower))), libc::EIO);
    assert!(world.errors().contains("DiffID"), "{}", world.errors());
    assert!(kept(&world).is_empty(), "{:?}", kept(&world));
    check(&world, "team/app");
    // The layer is known now, and is still not the one that this image promises.
    let ((), requests) = world.requests(|| {
        assert_eq!(errno(fs::read_dir(world.at("team/late").join(lower))), libc::EIO);
        assert_eq!(errno(fs::read_dir(world.at("team/late/1.0/rootfs"))), libc::EIO);
    });
    assert_eq!(of_layers(&requests, &honest), [0, 0], "{requests:#?}");
    assert_eq!(
        fs::read_to_string(world.at("team/late/1.0/layers/1/fs/small/7")).unwrap(),
        "changed"
    );
}

#[test]
fn a_stream_that_breaks_off_goes_on_where_it_was() {
    let image = plain_image();
    let world = World::new(content(&image)).mounted();
    for layer in &image.layers {
        let scope = Scope::containing(layer.digest().to_string());
        world.handle().inject(scope.next(2), Fault::Cut(300_000));
    }
    let ((), requests) = world.requests(|| check(&world, "team/app"));
    assert_eq!(of_layers(&requests, &image), [3, 3], "{requests:#?}");
    let bytes: u64 = requests.iter().map(|record| record.body_bytes).sum();
    let blobs: usize = image.layers.iter().map(|layer| layer.blob().len()).sum();
    assert!(
        bytes < blobs as u64 + 100_000,
        "nothing comes twice: {bytes} of {blobs}"
    );
}

#[test]
fn a_registry_that_gives_a_part_only_leaves_nothing_behind() {
    let image = plain_image();
    let world = World::with(content(&image), Behaviour::default(), &["--retries", "1"]).mounted();
    let scope = Scope::containing(image.layers[0].digest().to_string());
    world.handle().inject(scope, Fault::Cut(30_000));
    assert_eq!(
        errno(fs::read_dir(world.at("team/app/1.0/layers/0/fs"))),
        libc::EIO
    );
    assert!(kept(&world).is_empty(), "{:?}", kept(&world));
    world.handle().clear_faults();
    until("the layer can be read", || {
        fs::read_dir(world.at("team/app/1.0/rootfs")).is_ok()
    });
    check(&world, "team/app");
}

#[test]
fn a_reader_waits_as_long_as_bytes_come_and_status_shows_it() {
    // Longer than any lookup may wait otherwise.
    let (world, digest) = slow_world(BYTES as u64 / 4, "lookup_wait_s = 1\n");
    let rootfs = world.at("team/app/1.0/rootfs");
    let listing = start(std::process::Command::new("ls").arg(&rootfs));
    until("the pass is half done", || {
        let passes = world.status()["passes"].clone();
        passes[0]["done_bytes"]
            .as_u64()
            .is_some_and(|done| done > BYTES as u64 / 2)
    });
    let pass = world.status()["passes"][0].clone();
    assert_eq!(pass["layer"], digest.to_string(), "{pass}");
    assert_eq!(
        (pass["number"].as_u64(), pass["layers"].as_u64()),
        (Some(0), Some(1)),
        "{pass}"
    );
    assert_eq!(pass["waiters"], 1, "{pass}");
    assert!(pass["left_s"].as_u64().is_some_and(|left| left < 10), "{pass}");
    let text = world.text(&["status"]);
    assert!(text.contains("passes:") && text.contains("/s"), "{text}");
    // Nobody else has to wait.
    assert_eq!(format_of(&world.at("team/app/1.0/layers/0/format")), "tar");
    let output = finish(listing);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "data\nlast\n");
    until("the pass has left the status", || {
        world.status()["passes"].as_array().is_some_and(Vec::is_empty)
    });
}

#[test]
fn commands_wait_too_and_say_for_what() {
    let (world, _) = slow_world(BYTES as u64 / 3, "");
    let image = format!("{}/team/app:1.0", world.registry.host());
    let output = world.run(&["cat", &image, "last"]);
    assert_eq!(output.stdout, b"z", "{}", stderr(&output));
    assert!(
        stderr(&output).contains("reading layer 1 of 1"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn who_is_interrupted_ends_nothing_for_others() {
    let (world, digest) = slow_world(BYTES as u64 / 3, "");
    let rootfs = world.at("team/app/1.0/rootfs");
    let impatient = start(std::process::Command::new("ls").arg(&rootfs));
    until("the pass has begun", || {
        world.status()["passes"][0]["done_bytes"].as_u64() > Some(0)
    });
    kill(pid(impatient.id()), Signal::SIGINT).unwrap();
    let interrupted = Instant::now();
    assert!(!finish(impatient).status.success());
    assert!(
        world.status()["passes"][0].is_object(),
        "it ended after {:?}",
        interrupted.elapsed()
    );
    assert_eq!(names(&rootfs), ["data", "last"]);
    let asked = world.handle().requests_matching(&digest.to_string());
    assert_eq!(asked.len(), 1, "{asked:#?}");
}

#[test]
fn a_daemon_that_is_killed_in_a_pass_leaves_nothing_behind() {
    let (world, _) = slow_world(BYTES as u64 / 2, "");
    let rootfs = world.at("team/app/1.0/rootfs");
    let listing = start(std::process::Command::new("ls").arg(&rootfs));
    until("content is kept aside", || !kept(&world).is_empty());
    world.kill_daemon();
    finish(listing);
    world.handle().clear_faults();
    world.mount();
    assert!(kept(&world).is_empty(), "{:?}", kept(&world));
    assert_eq!(names(&rootfs), ["data", "last"]);
    assert!(fs::read(rootfs.join("data")).unwrap() == noise(BYTES, 3));
}

#[test]
fn what_the_budget_does_not_hold_is_not_kept_but_can_be_read() {
    let files: Vec<File> = (0..12)
        .map(|n| file(&format!("f{n:02}"), noise(1 << 20, n)))
        .collect();
    let image = ImageBuilder::new(vec![Layer::tar(&files).unwrap()]).build();
    let world = World::new(content(&image))
        .configured("budget = \"5MB\"\n")
        .mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    assert_eq!(names(&rootfs).len(), 12);
    let layers = world.store().join("layers");
    let data = layers.join(&names(&layers)[0]).join("data");
    let on_disk = fs::metadata(&data).unwrap().blocks() * 512;
    assert!((1 << 20..6 << 20).contains(&on_disk), "{on_disk}");
    let ((), requests) = world.requests(|| {
        assert!(
            fs::read(rootfs.join("f00")).unwrap() == noise(1 << 20, 0),
            "{}",
            world.errors()
        );
    });
    assert!(requests.is_empty(), "{requests:#?}");
    for n in 0..12 {
        let bytes = fs::read(rootfs.join(format!("f{n:02}")));
        assert!(bytes.unwrap() == noise(1 << 20, n), "f{n}: {}", world.errors());
    }
}

/// Text that compresses as text does, so that its places to start at lie within bytes.
fn prose(bytes: usize, seed: u64) -> Vec<u8> {
    let words = noise(bytes / 4, seed);
    let lines = words
        .chunks(8)
        .enumerate()
        .map(|(n, word)| format!("line {n} of {seed}: {word:02x?}\n"));
    let mut text: Vec<u8> = lines.flat_map(String::into_bytes).take(bytes).collect();
    text.resize(bytes, b'.');
    text
}

#[test]
fn what_left_the_cache_comes_again_by_ranges() {
    let files: Vec<File> = (0..5)
        .map(|n| file(&format!("f{n}"), prose(3 << 20, n)))
        .collect();
    let image = ImageBuilder::new(vec![
        Layer::gzip(&files).unwrap(),
        Layer::tar(&[file("t", noise(BYTES, 9))]).unwrap(),
    ])
    .build();
    let world = World::new(content(&image)).mounted();
    let rootfs = world.at("team/app/1.0/rootfs");
    names(&rootfs);
    let name = format!("{}/team/app:1.0", world.registry.host());
    world.text(&["cache", "evict", &name]);
    let (all, requests) = world.requests(|| world.text(&["cat", &name, "f3"]).into_bytes());
    assert!(all == prose(3 << 20, 3));
    assert!(
        requests.iter().all(|record| record.range.is_some()),
        "{requests:#?}"
    );
    assert!(
        requests.iter().map(|record| record.body_bytes).sum::<u64>() < image.layers[0].blob().len() as u64
    );
    // All of it at once: neighbours share bytes.
    world.text(&["cache", "evict", &name]);
    let ((), requests) = world.requests(|| drop(world.text(&["prefetch", &name])));
    assert_eq!(of_layers(&requests, &image), [1, 1], "{requests:#?}");
    for (n, file) in files.iter().enumerate() {
        assert!(
            fs::read(rootfs.join(format!("f{n}"))).unwrap() == file.1,
            "f{n}: {}",
            world.errors()
        );
    }
    assert!(fs::read(rootfs.join("t")).unwrap() == noise(BYTES, 9));
}

#[test]
fn the_configuration_can_refuse_to_read_whole_layers() {
    // One layer: of several any may be the first to be refused.
    let image = ImageBuilder::new(plain_image().layers[..1].to_vec()).build();
    let large = image.layers[0].blob().len();
    for (toml, said) in [
        ("plain_layers = \"refuse\"\n".to_owned(), "plain_layers"),
        (
            format!("plain_layer_bytes_max = {}\n", large - 1),
            "plain_layer_bytes_max",
        ),
    ] {
        let world = World::new(content(&image)).configured(&toml).mounted();
        let ((), requests) = world.requests(|| {
            assert_eq!(errno(fs::read_dir(world.at("team/app/1.0/rootfs"))), libc::EACCES);
        });
        assert_eq!(of_layers(&requests, &image)[0], 0, "{requests:#?}");
        let errors = world.errors();
        for part in [said, &image.layers[0].digest().to_string(), &large.to_string()] {
            assert!(errors.contains(part), "{part}: {errors}");
        }
        assert_eq!(errors.lines().count(), 1, "{errors}");
        assert!(!errors.contains(" times)"), "it was one lookup: {errors}");
        // The documents can be read all the same.
        fs::read(world.at("team/app/1.0/config.json")).unwrap();
        assert_eq!(format_of(&world.at("team/app/1.0/layers/0/format")), "gzip");
    }
}

#[test]
fn an_image_is_mounted_alone_however_long_its_layers_take() {
    let (world, _) = slow_world(BYTES as u64 / 3, "");
    let image = format!("{}/team/app:1.0", world.registry.host());
    let alone = world.mountpoint("alone");
    let output = world.run(&["mount", &image, alone.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut byte = [0];
    fs::File::open(alone.join("last"))
        .unwrap()
        .read_exact_at(&mut byte, 0)
        .unwrap();
    assert_eq!(&byte, b"z");
}

/// Many wait for a pass, each in a request of its own, and everyone else gets on.
#[test]
fn others_get_on_while_many_wait() {
    const WAITERS: usize = 100;
    let layer = Layer::tar(&[file("data", noise(BYTES, 3)), file("last", "z")]).unwrap();
    let digest = layer.digest();
    let lazy = ImageBuilder::new(vec![crate::support::layer(&[file("lazy", noise(500_000, 4))])]).build();
    let mut content = Content::new();
    for number in 0..WAITERS {
        // Those who wait for one image wait as one.
        let own = Layer::tar(&[file("own", number.to_string())]).unwrap();
        let image = ImageBuilder::new(vec![layer.clone(), own]).build();
        content.add_tagged_image("team/app", format!("1.{number}"), &image);
    }
    content.add_tagged_image("team/lazy", "1.0", &lazy);
    let world = World::new(content).mounted();
    let scope = Scope::containing(digest.to_string());
    world.handle().inject(scope, Fault::Throttle(BYTES as u64 / 20));
    let listings: Vec<_> = (0..WAITERS)
        .map(|number| {
            let rootfs = world.at(&format!("team/app:1.{number}/rootfs"));
            start(std::process::Command::new("ls").arg(rootfs))
        })
        .collect();
    let waiters = || {
        let status = world.status();
        let passes = status["passes"].as_array().unwrap().clone();
        let of_layer = passes.iter().find(|pass| pass["layer"] == digest.to_string());
        of_layer.map(|pass| pass["waiters"].as_u64().unwrap())
    };
    until("all wait", || waiters() == Some(WAITERS as u64));
    assert!(fs::read(world.at("team/lazy/1.0/rootfs/lazy")).unwrap() == noise(500_000, 4));
    assert_eq!(format_of(&world.at("team/app/1.0/layers/0/format")), "tar");
    assert!(names(&world.at("team/app")).len() >= WAITERS);
    assert!(waiters().is_some(), "this has not waited for the pass");
    for listing in &listings {
        kill(pid(listing.id()), Signal::SIGINT).unwrap();
    }
    for listing in listings {
        assert!(!finish(listing).status.success());
    }
    assert_eq!(waiters(), Some(0), "it goes on for a while");
    world.handle().clear_faults();
}
