//! A registry that dies or falls silent under the mount: nothing hangs, nothing that is cached is lost.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use registryfs::demo::{Behaviour, Content, DemoRegistry, Fault, Scope};

use crate::support::{dir, file, image};
use crate::world::{World, errno, finish, noise, pid, start, until};

/// Two images, each with files in places of the blob that no read-ahead joins.
fn content() -> Content {
    let mut content = Content::new();
    for (tag, seed) in [("1.0", 10), ("2.0", 20)] {
        let mut entries = vec![dir("d/")];
        entries.extend((0..8).map(|n| file(&format!("d/f{n}"), noise(700_000, seed + n))));
        content.add_tagged_image("team/app", tag, &image(&[&entries]));
    }
    content
}

#[test]
fn a_registry_that_is_killed_costs_one_deadline_and_comes_back() {
    let world = World::new(content()).mounted();
    let at = |name: &str| world.at("team/app/1.0/rootfs/d").join(name);
    let cached = fs::read(at("f0")).unwrap();
    world.handle().stop();
    let miss = |name: &str| {
        let started = Instant::now();
        (
            errno(
                fs::File::open(at(name))
                    .and_then(|file| std::os::unix::fs::FileExt::read_at(&file, &mut [0], 0)),
            ),
            started.elapsed(),
        )
    };
    let (first, took) = miss("f4");
    assert_eq!(first, libc::EIO);
    assert!(took < Duration::from_secs(10), "the first miss takes {took:?}");
    let (second, took) = miss("f6");
    assert_eq!(second, libc::EIO);
    assert!(
        took < Duration::from_millis(1500),
        "a further miss takes {took:?}"
    );
    // What is cached goes on, also when the kernel asks anew and after a restart.
    assert_eq!(fs::read(at("f0")).unwrap(), cached);
    let status = world.status();
    assert!(
        status["hosts"].to_string().contains(&world.registry.host()),
        "{status}"
    );
    world.restart();
    assert_eq!(fs::read(at("f0")).unwrap(), cached);
    assert_eq!(miss("f4").0, libc::EIO);

    world.handle().restart().unwrap();
    let started = Instant::now();
    until("misses are served again", || miss("f7").0 == 0);
    assert!(
        started.elapsed() < Duration::from_secs(10),
        "{:?}",
        started.elapsed()
    );
    until("what failed can be read", || {
        fs::read(at("f4")).is_ok_and(|bytes| bytes == noise(700_000, 14))
    });
}

#[test]
fn a_lookup_without_an_answer_can_be_interrupted() {
    let world = World::new(content()).mounted();
    let silence = Fault::Stall {
        after_bytes: 0,
        pause: None,
    };
    world.handle().inject(Scope::containing("/manifests/"), silence);
    for (command, path) in [("ls", "team/app/1.0/rootfs"), ("stat", "team/app:2.0")] {
        let waiting = start(Command::new(command).arg(world.at(path)));
        let number = pid(waiting.id());
        until("the registry is asked", || !world.handle().ledger().is_empty());
        std::thread::sleep(Duration::from_millis(400));
        let started = Instant::now();
        kill(number, Signal::SIGINT).unwrap();
        let output = finish(waiting);
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{command}: {:?}",
            started.elapsed()
        );
        assert_eq!(output.status.signal(), Some(libc::SIGINT), "{command}");
        world.handle().clear_ledger();
    }
    // Others were not held up.
    fs::metadata(world.at("some/other/name")).unwrap();
}

#[test]
fn a_lookup_without_an_answer_ends_at_its_deadline() {
    let world = World::with(content(), Behaviour::default(), &[])
        .configured("lookup_wait_s = 2\n")
        .mounted();
    let silence = Fault::Stall {
        after_bytes: 0,
        pause: None,
    };
    world.handle().inject(Scope::containing("/manifests/"), silence);
    let started = Instant::now();
    assert_eq!(errno(fs::metadata(world.at("team/app:1.0"))), libc::ETIMEDOUT);
    let took = started.elapsed();
    assert!(
        took >= Duration::from_secs(2) && took < Duration::from_secs(5),
        "{took:?}"
    );
    assert!(world.errors().contains("ETIMEDOUT"), "{}", world.errors());
    world.handle().clear_faults();
    until("it is found", || fs::metadata(world.at("team/app:1.0")).is_ok());
}

#[test]
fn a_reader_without_an_answer_can_be_killed_and_ends_at_the_deadline() {
    let world = World::with(
        content(),
        Behaviour::default(),
        &["--timeout", "4", "--retries", "0"],
    )
    .mounted();
    let file = world.at("team/app/1.0/rootfs/d/f0");
    fs::metadata(&file).unwrap();
    let silence = Fault::Stall {
        after_bytes: 0,
        pause: None,
    };
    world.handle().inject(Scope::containing("/blobs/"), silence);
    let reader = start(Command::new("cat").arg(&file));
    until("the registry is asked", || {
        world.handle().ledger().last().unwrap().ended.is_none()
    });
    let started = Instant::now();
    kill(pid(reader.id()), Signal::SIGINT).unwrap();
    assert_eq!(finish(reader).status.signal(), Some(libc::SIGINT));
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    let started = Instant::now();
    // EROFS makes EIO of each failure: why is written down.
    let expected = match world.is_by_kernel() {
        true => libc::EIO,
        false => libc::ETIMEDOUT,
    };
    assert_eq!(errno(fs::read(&file)), expected);
    assert!(world.errors().contains("ETIMEDOUT"), "{}", world.errors());
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "{:?}",
        started.elapsed()
    );
    world.handle().clear_faults();
    until("it can be read", || {
        fs::read(&file).is_ok_and(|bytes| bytes == noise(700_000, 10))
    });
}

#[test]
fn offline_serves_what_is_cached_and_says_what_is_not() {
    let world = World::new(content()).mounted();
    let known = world.at("team/app/1.0/rootfs/d/f0");
    let bytes = fs::read(&known).unwrap();
    world.umount();
    world.mount_with(&["-o", "offline,tag_ttl=1"]);
    let ((), requests) = world.requests(|| {
        assert_eq!(fs::read(&known).unwrap(), bytes);
        assert_eq!(errno(fs::metadata(world.at("team/app:2.0"))), libc::EHOSTUNREACH);
        assert!(fs::read(known.with_file_name("f5")).is_err());
    });
    assert_eq!(requests.len(), 0);
    assert!(world.errors().contains("offline"), "{}", world.errors());
}

#[test]
fn those_who_wait_for_a_silent_registry_hold_nobody_up() {
    let many: Vec<_> = (0..300)
        .map(|n| file(&format!("f{n:03}"), noise(5000, n)))
        .collect();
    let mut silent = Content::new();
    silent.add_tagged_image("team/app", "1.0", &image(&[&many]));
    let silent = DemoRegistry::start(silent, Behaviour::default()).unwrap();
    let world = World::new(content()).mounted();
    let cached = world.at("team/app/1.0/rootfs/d/f0");
    fs::read(&cached).unwrap();
    let cold = world.at("team/app/1.0/rootfs/d/f6");
    // With an empty page cache, so that the kernel has to ask for all of it.
    world.restart();
    let rootfs = world.root().join(silent.host()).join("team/app/1.0/rootfs");
    fs::metadata(rootfs.join("f000")).unwrap();
    let silence = Fault::Stall {
        after_bytes: 0,
        pause: None,
    };
    silent.handle().inject(Scope::all(), silence);
    let mut waiting: Vec<_> = (0..150)
        .map(|n| match n % 3 {
            0 => start(Command::new("stat").arg(world.root().join(silent.host()).join(format!("x{n}:1")))),
            _ => start(Command::new("cat").arg(rootfs.join(format!("f{n:03}")))),
        })
        .collect();
    until("all wait", || {
        let requests = world.status()["mounts"][0]["requests"].clone();
        let count = |name: &str| requests[name].as_u64().unwrap();
        count("read") >= 100 && count("lookup") >= 150
    });
    let started = Instant::now();
    assert_eq!(fs::read(&cached).unwrap(), noise(700_000, 10));
    assert_eq!(fs::read(&cold).unwrap(), noise(700_000, 16));
    let took = started.elapsed();
    // All at once: each dies when its own wait is next looked at.
    waiting.iter_mut().for_each(|child| child.kill().unwrap());
    for mut child in waiting {
        child.wait().unwrap();
    }
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn an_unmount_does_not_wait_for_a_silent_registry() {
    let world = World::new(content()).mounted();
    let rootfs = world.at("team/app/1.0/rootfs/d");
    fs::metadata(rootfs.join("f0")).unwrap();
    let silence = Fault::Stall {
        after_bytes: 0,
        pause: None,
    };
    world.handle().inject(Scope::all(), silence);
    for path in [rootfs.join("f0"), world.at("team/app:2.0"), rootfs.join("f5")] {
        let mut reader = start(Command::new("cat").arg(&path));
        world.handle().clear_ledger();
        until("the registry is asked", || !world.handle().ledger().is_empty());
        reader.kill().unwrap();
        reader.wait().unwrap();
    }
    let started = Instant::now();
    world.umount();
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
}
