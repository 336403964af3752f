//! Tags that move, and a registry that does not answer while they are checked.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use registryfs::demo::{Behaviour, Content, Fault, Image, Scope};

use crate::support::{File, dir, file, image};
use crate::world::{World, errno, finish, names, noise, start, until};

fn release(text: &str) -> Image {
    let entries: [File; 3] = [
        dir("etc/"),
        file("etc/release", text),
        file(format!("only-{text}").as_str(), noise(300_000, text.len() as u64)),
    ];
    image(&[&entries])
}

/// `team/app:1.0` as release `old`, with tags checked every second.
fn world() -> World {
    unmounted().mounted()
}

fn unmounted() -> World {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &release("old"));
    World::with(content, Behaviour::default(), &[]).configured("tag_ttl_s = 1\nretries = 1\n")
}

#[test]
fn a_moved_tag_shows_new_visitors_the_new_image_and_leaves_the_old_to_those_inside() {
    for (world, spelling) in [
        (unmounted(), "team/app/1.0"),
        (unmounted(), "team/app:1.0"),
        (unmounted().by_fuse(), "team/app/1.0"),
        (unmounted().by_fuse(), "team/app:1.0"),
    ] {
        let world = world.mounted();
        let rootfs = world.at(spelling).join("rootfs");
        let path = rootfs.join("etc/release");
        until("the tag has its old digest", || {
            fs::read_to_string(&path).is_ok_and(|text| text == "old")
        });
        let mut open = fs::File::open(&path).unwrap();
        // A shell that stands in the old image and goes on after a line on its input.
        let mut shell = Command::new("sh");
        shell
            .args([
                "-c",
                "read go; ls; cat etc/release only-old | head -c 3; cat ../digest",
            ])
            .current_dir(&rootfs)
            .stdin(Stdio::piped());
        let mut shell = start(&mut shell);
        let digest = world
            .handle()
            .edit(|content| content.add_tagged_image("team/app", "1.0", &release("new")));
        until("the tag has its new digest", || {
            fs::read_to_string(&path).unwrap() == "new"
        });
        assert_eq!(names(&rootfs), ["etc", "only-new"]);
        let shown = fs::read_to_string(world.at(spelling).join("digest")).unwrap();
        assert_eq!(shown, format!("{digest}\n"));
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(text, "old");
        std::io::Write::write_all(&mut shell.stdin.take().unwrap(), b"\n").unwrap();
        let output = finish(shell);
        let seen = String::from_utf8(output.stdout).unwrap();
        let old_digest = release("old").digest();
        // The kernel takes an old root that is a mount of its own out of the tree: nothing is above it any more.
        let is_detached = !seen.contains("sha256:") && world.is_by_kernel();
        let above = if is_detached {
            String::new()
        } else {
            format!("{old_digest}\n")
        };
        assert_eq!(seen, format!("etc\nonly-old\nold{above}"), "{spelling}");
    }
}

#[test]
fn those_in_the_new_image_stay_in_their_place_when_the_last_one_leaves_the_old() {
    for spelling in ["team/app/1.0", "team/app:1.0"] {
        let world = world();
        let rootfs = world.at(spelling).join("rootfs");
        let path = rootfs.join("etc/release");
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let waiting = |script: &str| {
            let mut shell = Command::new("sh");
            shell
                .args(["-c", &format!("read go; {script}")])
                .current_dir(&rootfs);
            // It goes on when the end of its input is closed, which waiting for its output does.
            start(shell.stdin(Stdio::piped()))
        };
        let in_old = waiting("cat etc/release");
        world
            .handle()
            .edit(|content| content.add_tagged_image("team/app", "1.0", &release("new")));
        until("the tag has its new digest", || {
            fs::read_to_string(&path).unwrap() == "new"
        });
        let in_new = waiting("/bin/pwd && cat etc/release");
        let number = |path: &Path| fs::metadata(path).unwrap().ino();
        let numbers = [number(&world.at(spelling)), number(&rootfs)];
        assert_eq!(finish(in_old).stdout, b"old");
        // Every lookup asks anew after the entry's time, of an inode that has become the path's only one.
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(400));
            assert_eq!(fs::read_to_string(&path).unwrap(), "new");
            assert_eq!(
                [number(&world.at(spelling)), number(&rootfs)],
                numbers,
                "{spelling}"
            );
        }
        let output = finish(in_new);
        let seen = String::from_utf8(output.stdout).unwrap();
        assert_eq!(seen, format!("{}\nnew", rootfs.display()), "{spelling}");
    }
}

#[test]
fn a_tag_that_is_taken_away_goes() {
    let world = world();
    let path = world.at("team/app:1.0/rootfs/etc/release");
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    world.handle().edit(|content| content.untag("team/app", "1.0"));
    until("the tag is gone", || errno(fs::metadata(&path)) == libc::ENOENT);
}

#[test]
fn what_is_absent_is_asked_for_again_after_a_while_only() {
    let world = world();
    let path = world.at("team/app:2.0");
    assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);
    world
        .handle()
        .edit(|content| content.add_tagged_image("team/app", "2.0", &release("two")));
    let ((), requests) = world.requests(|| {
        assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);
        assert_eq!(errno(fs::metadata(world.at("team/app/2.0/rootfs"))), libc::ENOENT);
    });
    assert_eq!(requests.len(), 0, "{requests:?}");
    let started = Instant::now();
    until("it is found", || path.join("rootfs").exists());
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn with_the_registry_gone_tags_are_served_stale_and_marked() {
    let world = world();
    let tag = world.at("team/app/1.0");
    let rootfs = tag.join("rootfs");
    assert_eq!(fs::read_to_string(rootfs.join("etc/release")).unwrap(), "old");
    assert_eq!(names(&world.at("team/app")), ["1.0"]);
    assert_eq!(world.status()["stale"].as_array().unwrap().len(), 0);
    world.handle().stop();
    let stale = |world: &World| {
        let status = world.status();
        let stale = status["stale"].as_array().unwrap();
        stale
            .iter()
            .any(|name| name.as_str().unwrap().ends_with("team/app:1.0"))
    };
    until("the tag is checked in vain", || {
        assert_eq!(fs::read_to_string(rootfs.join("etc/release")).unwrap(), "old");
        stale(&world)
    });
    assert_eq!(names(&tag).len(), 5);
    assert_eq!(names(&world.at("team/app")), ["1.0"]);
    assert_eq!(names(&world.at("")), ["team"]);
    // After a restart too; the wait for the check is bounded.
    world.restart();
    let started = Instant::now();
    assert_eq!(fs::read_to_string(rootfs.join("etc/release")).unwrap(), "old");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    assert!(stale(&world));

    world.handle().restart().unwrap();
    world
        .handle()
        .edit(|content| content.add_tagged_image("team/app", "1.0", &release("new")));
    until("the new image is seen", || {
        fs::read_to_string(rootfs.join("etc/release")).unwrap() == "new"
    });
    until("the mark is gone", || !stale(&world));
}

#[test]
fn a_check_without_an_answer_holds_a_known_tag_up_for_half_a_second() {
    let world = world();
    let release = world.at("team/app:1.0/rootfs/etc/release");
    assert_eq!(fs::read_to_string(&release).unwrap(), "old");
    let stall = Fault::Delay(Duration::from_secs(8));
    world.handle().inject(Scope::containing("/manifests/"), stall);
    // Longer than the tag's time to live: the next lookup has to ask.
    std::thread::sleep(Duration::from_millis(1100));
    let started = Instant::now();
    assert_eq!(fs::read_to_string(&release).unwrap(), "old");
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn a_registry_that_refuses_head_does_not_lose_its_tags() {
    let world = world();
    let path = world.at("team/app:1.0/rootfs/etc/release");
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    for status in [405, 400, 501] {
        let refusal = Fault::Status {
            status,
            retry_after: None,
        };
        world
            .handle()
            .inject(Scope::containing("/manifests/").method("HEAD"), refusal);
        let text = format!("after {status}");
        world
            .handle()
            .edit(|content| content.add_tagged_image("team/app", "1.0", &release(&text)));
        until("the new image is seen", || {
            fs::read_to_string(&path).unwrap() == text
        });
        world.handle().clear_faults();
    }
}

#[test]
fn a_directory_that_is_held_never_mixes_two_images() {
    let behaviour = Behaviour {
        failure_rate: 0.05,
        seed: 11,
        ..Behaviour::default()
    };
    let version = |number: u64| {
        let entries: Vec<File> = (0..5)
            .map(|n| file(&format!("d/f{n}"), noise(20_000, number * 10 + n)))
            .chain([file("version", number.to_string())])
            .collect();
        image(&[&entries])
    };
    let versions: Vec<Image> = (0..6).map(version).collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &versions[0]);
    let world = World::with(content, behaviour, &["--retries", "10"])
        .configured("tag_ttl_s = 0\n")
        .mounted();
    let done = AtomicBool::new(false);
    let seen = parking_lot::Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for spelling in ["team/app/1.0", "team/app:1.0", "team/app/1.0", "team/app:1.0"] {
            let (done, seen, rootfs) = (&done, &seen, world.at(spelling).join("rootfs"));
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let held = fs::File::open(&rootfs).unwrap();
                    let at = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
                    let number: u64 = fs::read_to_string(at.join("version")).unwrap().parse().unwrap();
                    for n in 0..5 {
                        let bytes = fs::read(at.join(format!("d/f{n}"))).unwrap();
                        assert!(
                            bytes == noise(20_000, number * 10 + n),
                            "{spelling}: {number} f{n}"
                        );
                    }
                    seen.lock().insert((spelling, number));
                }
            });
        }
        for (number, version) in (0..).zip(&versions) {
            world
                .handle()
                .edit(|content| content.add_tagged_image("team/app", "1.0", version));
            until("both spellings show the version", || {
                let seen = seen.lock();
                seen.contains(&("team/app/1.0", number)) && seen.contains(&("team/app:1.0", number))
            });
        }
        done.store(true, Ordering::Relaxed);
    });
}
