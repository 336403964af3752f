//! The tree of names where things go wrong: a registry that refuses, falls silent or lost a part, tags that vanish, readers
//! of listings that change, and streams of blobs that nobody reads to their end.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use registryfs::demo::{Behaviour, Content, Fault, ImageBuilder, ImageIndex, Scope};

use crate::support::{dir, file, image, layer, with_tokens};
use crate::world::{World, errno, finish, first_byte, names, noise, start, stderr, until};

fn status(status: u16) -> Fault {
    Fault::Status {
        status,
        retry_after: None,
    }
}

fn silence() -> Fault {
    Fault::Stall {
        after_bytes: 0,
        pause: None,
    }
}

/// `team/app` with the tags 1.0 and 2.0, and `team/tools/deep`.
fn content() -> Content {
    let mut content = Content::new();
    for (repository, tag) in [("team/app", "1.0"), ("team/app", "2.0"), ("team/tools/deep", "1")] {
        content.add_tagged_image(repository, tag, &image(&[&[dir("etc/"), file("etc/tag", tag)]]));
    }
    content
}

/// The outcome of reading a whole directory.
fn listed(path: &Path) -> std::io::Result<usize> {
    fs::read_dir(path)?
        .collect::<Result<Vec<_>, _>>()
        .map(|entries| entries.len())
}

#[test]
fn a_platform_that_the_registry_lacks_for_a_moment_comes_back() {
    let of = |architecture: &str| {
        let layers = vec![layer(&[file("arch", architecture)])];
        ImageBuilder::new(layers).architecture(architecture).build()
    };
    let index = ImageIndex::new(vec![of("amd64"), of("arm64")]);
    let mut content = Content::new();
    let digest = content.add_index("team/multi", &index);
    content.tag("team/multi", "1", digest);
    let world = World::with(content, Behaviour::default(), &["--platform", "linux/amd64"]).mounted();
    let missing = index.images[0].digest().to_string();
    world.handle().inject(Scope::containing(missing), status(404));
    // Two spellings, since each decides by itself.
    let spellings = ["team/multi/1", "team/multi:1"].map(|spelling| world.at(spelling));
    for at in &spellings {
        assert_eq!(
            errno(fs::metadata(at.join("rootfs"))),
            libc::EIO,
            "{}",
            at.display()
        );
    }
    assert!(
        world.errors().contains("the index names it"),
        "{}",
        world.errors()
    );
    world.handle().clear_faults();
    for at in &spellings {
        assert_eq!(fs::read(at.join("rootfs/arch")).unwrap(), b"amd64");
    }
    // A platform that the index does not have stays absent, and its others are there.
    world.umount();
    world.mount_with(&["-o", "platform=linux/s390x"]);
    let at = world.at("team/multi/1");
    assert_eq!(errno(fs::metadata(at.join("rootfs"))), libc::ENOENT);
    assert_eq!(names(&at), ["digest", "index.json", "platforms"]);
    assert_eq!(
        fs::read(at.join("platforms/linux-arm64/rootfs/arch")).unwrap(),
        b"arm64"
    );
}

#[test]
fn a_listing_that_lacks_a_blob_is_an_error_and_not_empty() {
    let made = image(&[&[file("a", "a")]]);
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &made);
    content.remove_blob("team/app", &made.layers[0].digest());
    let world = World::new(content).mounted();
    let layer = world.at("team/app/1.0/layers/0");
    assert_eq!(errno(listed(&layer)), libc::EIO);
    for name in ["fs", "toc.json"] {
        assert_eq!(errno(fs::metadata(layer.join(name))), libc::EIO, "{name}");
    }
    assert_eq!(
        errno(fs::metadata(world.at("team/app/1.0/rootfs"))),
        libc::EIO,
        "in a directory that is an image already"
    );
    assert_eq!(
        errno(fs::metadata(world.at("team/app:1.0/rootfs"))),
        libc::EIO,
        "in one that just became one"
    );
}

#[test]
fn known_repositories_are_listed_without_their_registry() {
    let world = World::new(content())
        .configured("tag_ttl_s = 1\nretries = 0\n")
        .mounted();
    assert_eq!(names(&world.at("")), ["team"]);
    assert_eq!(names(&world.at("team/app")), ["1.0", "2.0"]);
    // Not `team/tools`: the catalog alone knows it.
    world.umount();
    world.mount_with(&["-o", "offline,tag_ttl=1"]);
    assert_eq!(names(&world.at("team/app")), ["1.0", "2.0"]);
    assert_eq!(names(&world.at("team/tools")), ["deep"]);
    assert_eq!(names(&world.at("team")), ["app", "tools"]);
    assert_eq!(errno(listed(&world.at("team/unknown"))), libc::EHOSTUNREACH);

    world.umount();
    world.mount();
    world.handle().stop();
    assert_eq!(names(&world.at("team/app")), ["1.0", "2.0"]);
    assert_eq!(names(&world.at("team/tools")), ["deep"]);
    assert_eq!(errno(listed(&world.at("team/unknown"))), libc::EIO);
}

#[test]
fn known_repositories_are_listed_while_their_registry_is_silent() {
    let world = World::new(content())
        .configured(
            "tag_ttl_s = 1
",
        )
        .mounted();
    assert_eq!(names(&world.at("")), ["team"]);
    assert_eq!(names(&world.at("team/app")), ["1.0", "2.0"]);
    world.restart();
    world.handle().inject(Scope::all(), silence());
    assert_eq!(names(&world.at("team/app")), ["1.0", "2.0"]);
    assert_eq!(names(&world.at("team/tools")), ["deep"]);
}

#[test]
fn a_tag_that_is_gone_is_gone_for_new_visitors_and_stays_for_those_inside() {
    let world = World::new(content()).configured("tag_ttl_s = 1\n").mounted();
    let tag = world.at("team/app/1.0");
    fs::metadata(tag.join("rootfs/etc")).unwrap();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "read go; cat etc/tag"])
        .current_dir(tag.join("rootfs"))
        .stdin(Stdio::piped());
    let shell = start(&mut shell);
    world.handle().edit(|content| content.untag("team/app", "1.0"));
    until("the tag is gone", || {
        errno(fs::metadata(tag.join("rootfs"))) == libc::ENOENT
    });
    assert_eq!(errno(listed(&tag)), libc::ENXIO);
    assert_eq!(finish(shell).stdout, b"1.0");
}

#[test]
fn a_check_of_a_held_tag_ends_at_the_deadline() {
    let world = World::new(content())
        .configured("tag_ttl_s = 1\nlookup_wait_s = 2\n")
        // A root that the kernel serves is thrown out with its tag, and then nobody holds the name.
        .by_fuse()
        .mounted();
    let tag = world.at("team/app/1.0");
    let _held = fs::File::open(tag.join("rootfs/etc")).unwrap();
    world.handle().edit(|content| content.untag("team/app", "1.0"));
    until("the tag is gone", || {
        errno(fs::metadata(tag.join("rootfs"))) == libc::ENOENT
    });
    // From now on no digest of it is known, so that its check has nothing to fall back on.
    let delay = Fault::Delay(Duration::from_secs(60));
    world.handle().inject(Scope::containing("/manifests/"), delay);
    let started = Instant::now();
    until("it is asked for again", || {
        errno(fs::metadata(&tag)) == libc::ETIMEDOUT
    });
    // "Absent" holds for 10 s.
    assert!(
        started.elapsed() < Duration::from_secs(40),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn a_table_of_contents_is_fetched_once_for_all_its_readers() {
    let entries: Vec<_> = (0..6000)
        .map(|n| file(&format!("directory-with-a-long-name/file-{n:05}"), "x"))
        .collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&entries]));
    let world = World::new(content).mounted();
    let toc = world.at("team/app/1.0/layers/0/toc.json");
    let size = fs::metadata(&toc).unwrap().len();
    assert!(size > 1 << 20, "{size}: more than one READ");
    world
        .handle()
        .update(|behaviour| behaviour.latency = Duration::from_millis(200));
    let (texts, requests) = world.requests(|| {
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|n| {
                    let toc = &toc;
                    scope.spawn(move || {
                        let mut bytes = vec![0; 1000];
                        let at = size / 4 * n;
                        fs::File::open(toc)
                            .unwrap()
                            .read_exact_at(&mut bytes, at)
                            .unwrap();
                    })
                })
                .collect();
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
        fs::read(&toc).unwrap()
    });
    assert_eq!(texts.len() as u64, size);
    serde_json::from_slice::<serde_json::Value>(&texts).unwrap();
    assert!(requests.len() <= 1, "{requests:#?}");
}

#[test]
fn a_reader_of_a_listing_is_not_disturbed_by_another() {
    let mut content = Content::new();
    let one = image(&[&[file("a", "a")]]);
    for number in 0..2000 {
        content.add_tagged_image("team/app", format!("t{number:05}"), &one);
    }
    let world = World::new(content).configured("tag_ttl_s = 0\n").mounted();
    let path = world.at("team/app");
    let mut slow = fs::read_dir(&path).unwrap();
    let mut seen: Vec<_> = slow.by_ref().take(10).map(|e| e.unwrap().file_name()).collect();
    // Names before those that the slow reader comes to next.
    world.handle().edit(|content| {
        for number in 0..100 {
            content.add_tagged_image("team/app", format!("a{number:05}"), &one);
        }
    });
    until("another reader has seen the new names", || {
        names(&path).len() == 2100
    });
    seen.extend(slow.map(|entry| entry.unwrap().file_name()));
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!((count, seen.len()), (2000, 2000), "each name once");
}

#[test]
fn the_numbers_in_a_listing_are_those_of_the_inodes() {
    // A listing has the number of the directory that is mounted over, for any mount.
    let world = World::new(content()).by_fuse().mounted();
    let listing = |path: &Path| -> BTreeMap<_, _> {
        let entries = fs::read_dir(path).unwrap().map(Result::unwrap);
        entries
            .map(|entry| (entry.file_name(), (entry.ino(), entry.path())))
            .collect()
    };
    for at in ["team/app/1.0", "team/app:1.0"] {
        for below in ["", "layers", "layers/0"] {
            for (name, (number, path)) in listing(&world.at(at).join(below)) {
                // It is made anew, with another number, each time that it is looked up.
                if name == "format" {
                    continue;
                }
                assert_eq!(fs::metadata(path).unwrap().ino(), number, "{at}/{below}/{name:?}");
            }
        }
    }
}

#[test]
fn a_prefix_is_listed_by_whoever_asks_for_it_first() {
    let world = World::new(content()).mounted();
    assert_eq!(names(&world.at("team")), ["app", "tools"]);
    assert_eq!(names(&world.at("team/tools")), ["deep"]);
    assert_eq!(errno(listed(&world.at("nobody"))), libc::ENXIO);
}

#[test]
fn a_wrong_password_is_no_empty_registry() {
    let world = World::with(
        content(),
        with_tokens("user", "secret"),
        &["--credential", "user:wrong"],
    )
    .mounted();
    let ls = finish(start(Command::new("ls").arg(world.at(""))));
    assert!(!ls.status.success());
    assert!(stderr(&ls).contains("Permission denied"), "{}", stderr(&ls));
    assert!(world.errors().contains("access denied"), "{}", world.errors());

    // What is known is listed, and the refusal can be found all the same.
    let world = World::new(content()).mounted();
    fs::metadata(world.at("team/app:1.0")).unwrap();
    world.handle().inject(Scope::containing("/_catalog"), status(403));
    assert_eq!(names(&world.at("")), ["team"]);
    assert!(world.errors().contains("access denied"), "{}", world.errors());
}

#[test]
fn patterns_deny_whatever_they_match_and_allowed_hosts_are_listed() {
    let world = World::new(content());
    let options = format!(
        "allow={},allow=registry.example.org,allow=*.lan:50*,deny=*bad*,deny=OLD.*",
        world.registry.host()
    );
    world.mount_with(&["-o", &options]);
    let host = |name: &str| errno(fs::metadata(world.root().join(name)));
    assert_eq!(host("a.lan:5000"), 0);
    for denied in ["a.lan:6000", "docker.io", "a.bad.lan:5000", "old.lan:5000"] {
        assert_eq!(host(denied), libc::EACCES, "{denied}");
    }
    let mut expected = [
        ".registryfs".to_owned(),
        world.registry.host(),
        "registry.example.org".to_owned(),
    ];
    expected.sort();
    assert_eq!(names(&world.root()), expected);
}

/// Images with one layer each, whose blobs are more than sockets take in.
fn large_blobs(count: u64) -> Content {
    let mut content = Content::new();
    for number in 0..count {
        let made = image(&[&[file("a", noise(20_000_000, number))]]);
        content.add_tagged_image("team/app", format!("v{number}"), &made);
    }
    content
}

#[test]
fn a_blob_that_is_open_but_not_read_keeps_nobody_from_the_registry() {
    let options = ["--concurrency", "1", "--timeout", "20", "--retries", "0"];
    let world = World::with(large_blobs(2), Behaviour::default(), &options).mounted();
    let blob = |tag: &str| fs::File::open(world.at(&format!("team/app/{tag}/layers/0/blob"))).unwrap();
    let (idle, other) = (blob("v0"), blob("v1"));
    let mut byte = [0];
    idle.read_exact_at(&mut byte, 0).unwrap();
    other.read_exact_at(&mut byte, 0).unwrap();
    // The one that was given up goes on, and its end is still told from a lie.
    let bytes = fs::read(world.at("team/app/v0/layers/0/blob")).unwrap();
    assert_eq!(
        bytes,
        *image(&[&[file("a", noise(20_000_000, 0))]]).layers[0].blob()
    );
    assert_eq!(world.errors(), "");
}

#[test]
fn blobs_that_nobody_reads_on_are_given_up() {
    let world = World::new(large_blobs(12)).mounted();
    let open: Vec<_> = (0..12)
        .map(|n| fs::File::open(world.at(&format!("team/app/v{n}/layers/0/blob"))).unwrap())
        .collect();
    world.handle().clear_ledger();
    for blob in &open {
        blob.read_exact_at(&mut [0], 0).unwrap();
    }
    assert_eq!(world.handle().ledger().len(), 12);
    let under_way = || {
        let ledger = world.handle().ledger();
        ledger.iter().filter(|record| record.ended.is_none()).count()
    };
    let started = Instant::now();
    until("all are given up", || under_way() == 0);
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn readers_of_a_silent_blob_wait_once_together() {
    let options = ["--timeout", "3", "--retries", "0"];
    let world = World::with(large_blobs(1), Behaviour::default(), &options).mounted();
    let path = world.at("team/app/v0/layers/0/blob");
    let size = fs::metadata(&path).unwrap().len();
    world.handle().inject(Scope::containing("/blobs/"), silence());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..6 {
            let path = &path;
            scope.spawn(move || {
                let blob = fs::File::open(path).unwrap();
                assert_ne!(errno(blob.read_at(&mut [0], size / 6 * number)), 0);
            });
        }
    });
    let took = started.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    world.handle().clear_faults();
    until("it can be read", || {
        fs::File::open(&path).unwrap().read_at(&mut [0], 0).is_ok()
    });
    assert_eq!(first_byte(&path), 0x1f);
}
