//! A registry that lies, breaks off, limits, forgets and fails: bytes are right or there are none.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use registryfs::demo::{Behaviour, Content, Endpoint, Fault, Image, RangeLie, Redirect, RetryAfter, Scope};

use crate::support::{file, image, says_what_is_wrong, with_tokens};
use crate::world::{World, errno, first_byte, noise, until};

const BYTES: usize = 400_000;

/// One layer whose file is not among what its index comes with.
fn one_file() -> (Image, Content) {
    let made = image(&[&[file("data", noise(BYTES, 1)), file("tail", noise(BYTES, 2))]]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &made);
    (made, content)
}

/// A mounted world in which the layer is indexed but nothing of it read.
fn indexed(behaviour: Behaviour, options: &[&str]) -> (World, PathBuf) {
    let world = World::with(one_file().1, behaviour, options).mounted();
    let data = world.at("team/app/1.0/rootfs/data");
    assert_eq!(fs::metadata(&data).unwrap().len(), BYTES as u64);
    (world, data)
}

fn blobs() -> Scope {
    Scope::containing("/blobs/")
}

#[test]
fn a_flipped_byte_is_refused_and_forgotten_when_the_registry_heals() {
    let (world, data) = indexed(Behaviour::default(), &[]);
    world.handle().inject(blobs(), Fault::FlipByte(2000));
    assert_eq!(errno(fs::read(&data)), libc::EIO);
    for text in [world.errors(), world.log()] {
        let line = text
            .lines()
            .find(|line| line.contains("verification failed"))
            .unwrap();
        assert!(says_what_is_wrong(line, &noise(BYTES, 1)), "{line}");
    }
    for line in world.errors().lines() {
        assert!(
            line.contains("data: EIO: ") && line.contains(" layer sha256:"),
            "{line}"
        );
    }
    // What failed fails at once for a while, without asking again.
    let ((), requests) = world.requests(|| assert_eq!(errno(fs::read(&data)), libc::EIO));
    assert!(requests.len() <= 1, "{requests:?}");
    world.handle().clear_faults();
    let started = Instant::now();
    until("the file can be read", || fs::read(&data).is_ok());
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1));
}

#[test]
fn a_bad_chunk_fails_its_own_readers_only() {
    let (world, data) = indexed(Behaviour::default(), &[]);
    // In the part that comes along with the first chunk.
    world.handle().inject(blobs(), Fault::FlipByte(50_000));
    let file = fs::File::open(&data).unwrap();
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, noise(BYTES, 1)[..4096]);
    let results: Vec<bool> = (0..12)
        .map(|page| {
            let result = file.read_exact_at(&mut bytes, page * 4096);
            let start = usize::try_from(page).unwrap() * 4096;
            assert!(
                result.is_err() || bytes == noise(BYTES, 1)[start..start + 4096],
                "{page}"
            );
            result.is_ok()
        })
        .collect();
    assert_eq!(results, [true; 12], "{}", world.errors());
    assert!(world.log().contains("verification failed"), "{}", world.log());
}

#[test]
fn lying_ranges_are_refused() {
    for lie in [RangeLie::WrongHeader, RangeLie::WrongBytes, RangeLie::ShortBody] {
        let (world, data) = indexed(Behaviour::default(), &["--retries", "1"]);
        world.handle().inject(blobs(), Fault::Range(lie));
        assert_eq!(errno(fs::read(&data)), libc::EIO, "{lie:?}");
        world.handle().clear_faults();
        until("the file can be read", || fs::read(&data).is_ok());
        assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1), "{lie:?}");
    }
}

#[test]
fn a_registry_without_ranges_is_read_all_the_same() {
    let (world, data) = indexed(Behaviour::default(), &[]);
    world.handle().inject(blobs(), Fault::Range(RangeLie::WholeBody));
    assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1));
}

#[test]
fn passing_failures_are_not_seen_by_readers() {
    let status = |status, retry_after| Fault::Status { status, retry_after };
    let faults = [
        Fault::Cut(50_000),
        Fault::CutHalfway,
        Fault::Reset,
        status(500, None),
        status(503, None),
        status(429, Some(RetryAfter::Seconds(1))),
        Fault::Delay(Duration::from_millis(300)),
    ];
    let (world, data) = indexed(Behaviour::default(), &[]);
    for fault in faults {
        // Each fault meets an empty cache.
        world.umount();
        fs::remove_dir_all(world.store().join("layers")).unwrap();
        world.mount();
        fs::metadata(&data).unwrap();
        world.handle().inject(blobs().next(2), fault.clone());
        assert_eq!(fs::read(&data).unwrap(), noise(BYTES, 1), "{fault:?}");
        world.handle().clear_faults();
    }
    assert_eq!(world.errors(), "");
}

#[test]
fn a_resumed_body_is_not_fetched_from_its_start() {
    let (world, data) = indexed(Behaviour::default(), &[]);
    world.handle().inject(blobs().next(1), Fault::Cut(50_000));
    let (byte, requests) = world.requests(|| {
        let byte = first_byte(&data);
        until("the body is resumed", || world.handle().ledger().len() > 1);
        byte
    });
    assert_eq!(byte, noise(1, 1)[0]);
    let ranges: Vec<_> = requests
        .iter()
        .map(|record| record.range.clone().unwrap())
        .collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
    let from = |range: &str| -> u64 {
        range
            .trim_start_matches("bytes=")
            .split('-')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert_eq!(from(&ranges[1]), from(&ranges[0]) + 50_000, "{ranges:?}");
}

#[test]
fn a_registry_that_asks_for_patience_gets_it() {
    let (world, data) = indexed(Behaviour::default(), &[]);
    let limit = Fault::Status {
        status: 429,
        retry_after: Some(RetryAfter::Seconds(2)),
    };
    world.handle().inject(blobs().next(1), limit);
    let (_, requests) = world.requests(|| first_byte(&data));
    assert_eq!(requests.len(), 2, "{requests:?}");
    let pause = requests[1].started - requests[0].started;
    assert!(pause >= Duration::from_millis(1900), "{pause:?}");
}

#[test]
fn expired_tokens_and_signed_urls_are_renewed() {
    let mut behaviour = with_tokens("user", "secret");
    behaviour.redirect = Some(Redirect::default());
    let (world, data) = indexed(behaviour, &["--credential", "user:secret"]);
    let handle = world.handle();
    handle.expire_tokens();
    handle.expire_signed_urls();
    let (bytes, requests) = world.requests(|| fs::read(&data).unwrap());
    assert_eq!(bytes, noise(BYTES, 1));
    let count = |endpoint| {
        requests
            .iter()
            .filter(|record| record.endpoint == endpoint)
            .count()
    };
    assert_eq!(count(Endpoint::Token), 1, "{requests:?}");
    assert!(
        requests
            .iter()
            .filter(|r| r.endpoint == Endpoint::Storage)
            .all(|r| !r.had_authorization)
    );
    assert_eq!(fs::read(data.with_file_name("tail")).unwrap(), noise(BYTES, 2));
    assert_eq!(world.errors(), "");
}

#[test]
fn a_registry_that_fails_now_and_then_serves_a_whole_tree() {
    let behaviour = Behaviour {
        failure_rate: 0.15,
        seed: 7,
        ..Behaviour::default()
    };
    let files: Vec<_> = (0..20)
        .map(|n| file(&format!("f{n:02}"), noise(300_000, n)))
        .collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&files[..10], &files[10..]]));
    let world = World::with(content, behaviour, &["--retries", "10"]).mounted();
    for n in 0..20 {
        let path = world.at(&format!("team/app:1.0/rootfs/f{n:02}"));
        assert_eq!(fs::read(path).unwrap(), noise(300_000, n), "{n}");
    }
}

#[test]
fn a_manifest_that_is_not_what_its_digest_says_is_refused() {
    let (made, content) = one_file();
    let world = World::new(content).mounted();
    world
        .handle()
        .inject(Scope::containing("/manifests/"), Fault::FlipByte(10));
    let at = world.at(&format!("team/app@{}", made.digest()));
    assert_eq!(errno(fs::metadata(&at)), libc::EIO);
    assert!(
        world.errors().contains(&made.digest().to_string()),
        "{}",
        world.errors()
    );
    world.handle().clear_faults();
    until("it is right again", || {
        fs::read(at.join("manifest.json")).is_ok_and(|bytes| bytes == made.manifest)
    });
}

#[test]
fn a_config_that_is_not_what_its_digest_says_is_refused() {
    let (made, content) = one_file();
    let world = World::new(content).mounted();
    let config = world.at("team/app/1.0/config.json");
    fs::metadata(&config).unwrap();
    world.handle().inject(blobs(), Fault::FlipByte(10));
    assert_eq!(errno(fs::read(&config)), libc::EIO);
    world.handle().clear_faults();
    until("it is right again", || {
        fs::read(&config).is_ok_and(|bytes| bytes == made.config)
    });
}

#[test]
fn a_registry_that_gives_no_ranges_says_nothing_about_its_layers() {
    let made = image(&[&[file("large", noise(9 << 20, 1)), file("small", "x")]]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &made);
    let behaviour = Behaviour {
        ranges: false,
        ..Behaviour::default()
    };
    let world = World::with(content, behaviour, &["--retries", "0"]).mounted();
    let layer = world.at("team/app/1.0/layers/0");
    let (toc, format) = (layer.join("toc.json"), layer.join("format"));
    assert_eq!(errno(fs::metadata(&toc)), libc::EIO);
    let said = fs::read_to_string(&format).unwrap();
    assert!(
        said.starts_with("estargz\n") && said.contains("unpacked_bytes: -\n"),
        "{said}"
    );
    assert!(
        world.errors().contains("does not honour ranges"),
        "{}",
        world.errors()
    );
    world.handle().update(|behaviour| behaviour.ranges = true);
    until("the layer is looked at again", || fs::metadata(&toc).is_ok());
    let said = fs::read_to_string(&format).unwrap();
    assert!(!said.contains("unpacked_bytes: -\n"), "{said}");
}
