//! `prefetch`: what it brings, and what it says.

use registryfs::demo::Fault;
use registryfs::demo::Scope;
use serde_json::Value;

use crate::copies::{IMAGE, content, noise, odd_image, picture};
use crate::support::{File, file};
use crate::world::{World, code, errors, finish, start, until};

fn summary(world: &World, arguments: &[&str]) -> Value {
    let image = world.image(IMAGE);
    let arguments = [&["--format=json", "prefetch", &image], arguments].concat();
    serde_json::from_str(&world.text(&arguments)).unwrap()
}

fn files_world() -> World {
    let files: Vec<File> = (0..30)
        .map(|number| {
            file(
                &format!("d{}/{number:02}", number % 3),
                noise(300_000, number + 1),
            )
        })
        .collect();
    World::of(content(&[&files]))
}

#[test]
fn after_it_everything_can_be_read_without_the_registry() {
    let [lower, upper] = odd_image();
    let world = World::of(content(&[&lower, &upper]));
    let image = world.image(IMAGE);
    let said = world.text(&["prefetch", &image]);
    assert!(
        said.starts_with("fetched ") && said.lines().count() == 1,
        "{said}"
    );
    world.registry.handle().stop();

    let mountpoint = world.mountpoint("m");
    world.text(&["mount", mountpoint.to_str().unwrap()]);
    let root = mountpoint.join(&image);
    assert_eq!(picture(&root.join("rootfs")).len(), 24);
    // What a layer above hides is part of the image too.
    assert_eq!(std::fs::read(root.join("layers/0/fs/deleted")).unwrap(), b"gone");
    assert!(std::fs::read(root.join("config.json")).unwrap().starts_with(b"{"));
    let copy = world.path("copy");
    world.text(&["get", &image, ".", "-o", copy.to_str().unwrap()]);
    assert_eq!(picture(&copy), picture(&root.join("rootfs")));
}

#[test]
fn what_is_there_is_not_fetched_again_and_the_summary_says_so() {
    let world = files_world();
    let part = summary(&world, &["d1/", "d2/*5"]);
    assert_eq!(part["files"], 11);
    assert_eq!(part["cached_bytes"], 11 * 300_000);
    assert_eq!(part["cached_before_bytes"], 0);
    let fetched = part["fetched_bytes"].as_u64().unwrap();
    assert!((11 * 300_000..12 * 300_000).contains(&fetched), "{part}");

    let whole = summary(&world, &[]);
    assert_eq!(whole["files"], 30);
    assert_eq!(whole["cached_bytes"], 30 * 300_000);
    assert!(
        whole["cached_before_bytes"].as_u64().unwrap() >= 11 * 300_000,
        "{whole}"
    );
    let rest = whole["fetched_bytes"].as_u64().unwrap();
    assert!(rest < 20 * 300_000, "{whole}");

    world.registry.handle().clear_ledger();
    assert_eq!(summary(&world, &[])["fetched_bytes"], 0);
    assert!(world.registry.handle().requests_matching("/blobs/").is_empty());
}

#[test]
fn large_ranges_bring_it_with_few_requests() {
    let world = files_world();
    world.text(&["info", &world.image(IMAGE)]);
    world.registry.handle().clear_ledger();
    summary(&world, &[]);
    let requests = world.registry.handle().requests_matching("/blobs/");
    assert!(requests.len() <= 3, "9 MB in {} requests", requests.len());
}

#[test]
fn failures_are_told_and_the_rest_is_brought() {
    let world = files_world();
    let image = world.image(IMAGE);
    let output = world.run(&["prefetch", &image, "nothing", "d0/00"]);
    assert_eq!(code(&output), 4);
    assert!(errors(&output).contains("nothing"), "{}", errors(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 files"));

    world
        .registry
        .handle()
        .inject(Scope::containing("/blobs/"), Fault::FlipByte(1_000_000));
    let output = world.run(&["prefetch", &image]);
    assert_eq!(code(&output), 7, "{}", errors(&output));
    world.registry.handle().clear_faults();
    let rest = summary(&world, &[]);
    assert!(rest["fetched_bytes"].as_u64().unwrap() < 3_000_000, "{rest}");
    world.registry.handle().stop();
    assert_eq!(
        code(&world.run(&["prefetch", "--retries=0", &image])),
        0,
        "all is there"
    );
    let other = world.image("team/other");
    assert_eq!(code(&world.run(&["prefetch", "--retries=0", &other])), 5);
}

#[test]
fn what_came_before_an_interruption_stays_with_a_daemon_and_without() {
    for has_daemon in [false, true] {
        let world = files_world();
        let image = world.image(IMAGE);
        world.text(&["info", &image]);
        if has_daemon {
            world.text(&["mount", world.mountpoint("m").to_str().unwrap()]);
        }
        let limit = |bytes_per_s| {
            let handle = world.registry.handle();
            handle.update(|behaviour| behaviour.total_bytes_per_s = bytes_per_s);
        };
        limit(2 << 20);
        let child = start(&mut world.command(&["prefetch", &image]));
        let cached = || world.disk_bytes();
        let before = cached();
        until("some of it is there", || cached() > before + 2_000_000);
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        let output = finish(child);
        assert_eq!(code(&output), 130, "{}", errors(&output));
        limit(0);
        let rest = summary(&world, &[]);
        assert!(
            rest["cached_before_bytes"].as_u64().unwrap() >= 1_500_000,
            "{rest}"
        );
        assert_eq!(rest["cached_bytes"], 30 * 300_000);
    }
}

/// A disk of its own for the cache, which goes away when this is dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn of(world: &World, bytes: usize) -> Self {
        let path = world.store();
        std::fs::create_dir_all(&path).unwrap();
        let size = format!("size={bytes}");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some(size.as_str())).unwrap();
        Self(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_disk_too_small_for_it_is_a_failure_with_a_remedy_that_ends_it_early() {
    let files: Vec<File> = (0..120)
        .map(|number| file(&format!("{number:03}"), noise(1 << 20, number + 1)))
        .collect();
    let world = World::of(content(&[&files]));
    let _disk = SmallDisk::of(&world, 6 << 20);
    let image = world.image(IMAGE);
    let output = world.run(&["--format=json", "prefetch", &image]);
    let said = errors(&output);
    assert_eq!(code(&output), 1, "{said}");
    assert!(said.contains("--cache-dir"), "{said}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(summary["cached_bytes"].as_u64().unwrap() < 6 << 20, "{summary}");
    // It is no failure of a copy, which needs the cache for nothing but speed.
    let copy = world.path("copy");
    world.text(&["get", &image, ".", "-o", copy.to_str().unwrap()]);
    assert_eq!(std::fs::read(copy.join("099")).unwrap(), noise(1 << 20, 100));
}

#[test]
fn what_is_evicted_is_fetched_again_and_nothing_else() {
    let world = files_world();
    let image = world.image(IMAGE);
    world.text(&["prefetch", &image]);
    let evict = |arguments: &[&str]| world.text(&[&["cache", "evict", &image], arguments].concat());
    assert_eq!(evict(&["d1/01", "d1/04"]).trim_end(), "evicted 585.9 KiB");
    assert_eq!(evict(&["d1/01"]).trim_end(), "evicted 0 B");
    let again = summary(&world, &[]);
    assert_eq!(again["cached_before_bytes"], 28 * 300_000);
    assert_eq!(again["cached_bytes"], 30 * 300_000);

    world.registry.handle().clear_ledger();
    assert_eq!(evict(&[]).trim_end(), "evicted 8.5 MiB");
    let output = world.run(&["cache", "evict", &image, "d1/01", "nothing"]);
    assert_eq!(code(&output), 4, "{}", errors(&output));
    assert!(errors(&output).contains("nothing"), "{}", errors(&output));
    let requests = world.registry.handle().requests_matching("/blobs/");
    assert!(requests.is_empty(), "{requests:?}");
    assert_eq!(world.run(&["cat", &image, "d1/01"]).stdout, noise(300_000, 2));
}

#[test]
fn files_of_an_image_that_was_never_opened_cannot_be_evicted() {
    let world = files_world();
    let output = world.run(&["cache", "evict", &world.image(IMAGE), "d1/01"]);
    assert_eq!(code(&output), 4, "{}", errors(&output));
    assert!(errors(&output).contains("not been opened"), "{}", errors(&output));
    assert_eq!(
        world.text(&["cache", "evict", &world.image(IMAGE)]),
        "evicted 0 B\n"
    );
}
