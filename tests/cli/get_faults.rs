//! `get` and `prefetch` when registries, networks, users and other processes misbehave.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use registryfs::demo::{Fault, RangeLie, Redirect, Scope};
use registryfs::layer::entry::Kind;

use crate::copies::{IMAGE, content, leftovers, noise, odd_image, picture};
use crate::support::{File, file, link};
use crate::world::{World, code, errors, finish, start, until};

/// Small files first, then large ones.
const FILES: usize = 30;
const SMALL_FILES: usize = 24;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn name(number: usize) -> String {
    format!("data/{number:02}")
}

fn content_of(number: usize) -> Vec<u8> {
    let bytes = if number < SMALL_FILES { 100_000 } else { 1_500_000 };
    noise(bytes, number as u64 + 1)
}

/// A world with an image of files that do not compress.
fn world() -> World {
    let files: Vec<File> = (0..FILES)
        .map(|number| file(&name(number), content_of(number)))
        .collect();
    World::of(content(&[&files]))
}

/// So slow that a copy is under way for a while.
fn slow_down(world: &World) {
    world
        .registry
        .handle()
        .update(|behaviour| behaviour.total_bytes_per_s = 3 << 20);
}

fn speed_up(world: &World) {
    world
        .registry
        .handle()
        .update(|behaviour| behaviour.total_bytes_per_s = 0);
}

/// Numbers of the files that are there, all of which are complete.
fn complete(copy: &Path) -> Vec<usize> {
    let numbers = 0..FILES;
    let there: Vec<usize> = numbers
        .filter(|&number| copy.join(name(number)).exists())
        .collect();
    for &number in &there {
        let content = fs::read(copy.join(name(number))).unwrap();
        assert!(content == content_of(number), "{number} is not what it should be");
    }
    there
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

fn blobs() -> Scope {
    Scope::containing("/blobs/")
}

fn blob_bytes(world: &World) -> u64 {
    let requests = world.registry.handle().requests_matching("/blobs/");
    requests.iter().map(|request| request.body_bytes).sum()
}

/// Starts a copy and waits until some of it is there, and some of it is under way.
fn start_slow_copy(world: &World, copy: &Path) -> Child {
    slow_down(world);
    let child = start(&mut world.command(&["get", &world.image(IMAGE), ".", "-o", text(copy)]));
    until("some files are there", || copy.join(name(3)).exists());
    until("a file is under way", || !leftovers_now(copy).is_empty());
    child
}

/// As [`leftovers`], while files come and go.
fn leftovers_now(copy: &Path) -> Vec<String> {
    let Ok(names) = fs::read_dir(copy.join("data")) else {
        return Vec::new();
    };
    let names = names.map(|name| name.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".part")).collect()
}

#[test]
fn wrong_bytes_make_no_file_and_the_others_come() {
    let world = world();
    let copy = world.path("copy");
    // The index is there before the lies begin.
    world.text(&["info", &world.image(IMAGE)]);
    world
        .registry
        .handle()
        .inject(blobs(), Fault::FlipByte(1_000_000));
    let output = world.run(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    let said = errors(&output);
    assert_eq!(code(&output), 7, "{said}");
    assert!(said.contains("data/"), "the file is named: {said}");
    let there = complete(&copy);
    assert!(there.len() < FILES && there.len() > FILES / 2, "{there:?}");
    assert_eq!(leftovers(&copy), [""; 0]);

    world.registry.handle().clear_faults();
    until("the failure is forgotten", || {
        code(&world.run(&["get", &world.image(IMAGE), ".", "-o", text(&copy)])) == 0
    });
    assert_eq!(complete(&copy).len(), FILES);
}

#[test]
fn a_file_that_did_not_come_gets_no_further_name_from_what_was_there_before() {
    let entries = [file("a", noise(300_000, 1)), link("b", Kind::Hardlink, "a")];
    let world = World::of(content(&[&entries]));
    let copy = world.path("copy");
    fs::create_dir(&copy).unwrap();
    for name in ["a", "b"] {
        fs::write(copy.join(name), format!("old {name}")).unwrap();
    }
    let get = || world.run(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    world.text(&["info", &world.image(IMAGE)]);
    world.registry.handle().inject(blobs(), Fault::FlipByte(100_000));
    let output = get();
    assert_eq!(code(&output), 7, "{}", errors(&output));
    for name in ["a", "b"] {
        assert_eq!(
            fs::read_to_string(copy.join(name)).unwrap(),
            format!("old {name}")
        );
    }
    world.registry.handle().clear_faults();
    assert_eq!(code(&get()), 0);
    let at = |name: &str| fs::metadata(copy.join(name)).unwrap();
    assert_eq!((at("a").size(), at("a").ino()), (300_000, at("b").ino()));
}

#[test]
fn a_cache_that_was_damaged_makes_no_file() {
    let world = world();
    let copy = world.path("copy");
    world.text(&["prefetch", &world.image(IMAGE)]);
    let layer = fs::read_dir(world.store().join("layers"))
        .unwrap()
        .next()
        .unwrap();
    let data = fs::File::options()
        .write(true)
        .open(layer.unwrap().path().join("data"));
    std::os::unix::fs::FileExt::write_all_at(&data.unwrap(), b"damage", 50_000).unwrap();
    let output = world.run(&["get", &world.image(IMAGE), "data/0[01]", "-o", text(&copy)]);
    let said = errors(&output);
    assert_eq!(code(&output), 7, "{said}");
    assert!(said.contains("data/00: verification failed"), "{said}");
    assert_eq!(complete(&copy), [1]);
    assert_eq!(leftovers(&copy), [""; 0]);
}

#[test]
fn answers_that_break_off_are_gone_on_with() {
    for fault in [
        Fault::Cut(300_000),
        Fault::CutHalfway,
        Fault::Reset,
        Fault::Range(RangeLie::ShortBody),
        Fault::ExpireSignedUrls,
    ] {
        let world = world();
        let copy = world.path("copy");
        let handle = world.registry.handle();
        handle.update(|behaviour| behaviour.redirect = Some(Redirect::default()));
        world.registry.handle().inject(blobs().every(2), fault.clone());
        let output = world.run(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
        assert_eq!(code(&output), 0, "{fault:?}: {}", errors(&output));
        assert_eq!(complete(&copy).len(), FILES, "{fault:?}");
    }
}

#[test]
fn a_copy_that_was_cut_off_fetches_only_the_rest() {
    let world = world();
    let copy = world.path("copy");
    world.text(&["get", &world.image(IMAGE), "data/0*", "-o", text(&copy)]);
    world.registry.handle().inject(blobs(), Fault::Cut(500_000));
    let output = world.run(&["get", "--retries=0", &world.image(IMAGE), ".", "-o", text(&copy)]);
    assert_eq!(code(&output), 5, "{}", errors(&output));
    let there = complete(&copy);
    assert!((10..FILES).contains(&there.len()), "{there:?}");

    world.registry.handle().clear_faults();
    world.registry.handle().clear_ledger();
    world.text(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    assert_eq!(complete(&copy).len(), FILES);
    let missing = (0..FILES).filter(|number| !there.contains(number));
    let missing_bytes: usize = missing.map(|number| content_of(number).len()).sum();
    let fetched = blob_bytes(&world) as usize;
    assert!(
        fetched < missing_bytes * 11 / 10,
        "{fetched} bytes for {missing_bytes}"
    );
    world.registry.handle().clear_ledger();
    world.text(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    assert_eq!(blob_bytes(&world), 0);
}

#[test]
fn a_registry_that_comes_back_in_time_is_no_failure() {
    for command in ["get", "prefetch"] {
        let world = world();
        let image = world.image(IMAGE);
        let copy = world.path("copy");
        world.text(&["info", &image]);
        world.registry.handle().stop();
        let mut arguments = vec!["-v", command, &image, "."];
        if command == "get" {
            arguments.extend(["-o", text(&copy)]);
        }
        let mut child = start(&mut world.command(&arguments));
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().contains("trying again after a pause")),
            "{command} gives up"
        );
        world.registry.handle().restart().unwrap();
        // Whoever writes needs someone who reads.
        let rest = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>());
        let output = finish(child);
        assert_eq!(code(&output), 0, "{command}: {:?}", rest.join());
        let offline = world.run(&["--offline", "get", &image, ".", "-o", text(&copy)]);
        assert_eq!(code(&offline), 0, "{}", errors(&offline));
        assert_eq!(complete(&copy).len(), FILES);
    }
}

#[test]
fn what_ends_a_copy_has_its_exit_code() {
    let world = world();
    let image = world.image(IMAGE);
    let copy = world.path("copy");
    world.text(&["info", &image]);
    let run = |options: &[&str]| {
        let arguments = [options, &["get", &image, ".", "-o", text(&copy)]].concat();
        let output = world.run(&arguments);
        (code(&output), errors(&output))
    };
    let (exit, said) = run(&["--offline"]);
    assert_eq!(exit, 5, "{said}");
    assert!(said.contains("offline") && said.contains("data/00"), "{said}");

    let refusal = Fault::Status {
        status: 403,
        retry_after: None,
    };
    world.registry.handle().inject(blobs(), refusal);
    assert_eq!(run(&[]).0, 3);
    world.registry.handle().clear_faults();
    world.registry.handle().stop();
    let (exit, said) = run(&["--retries", "0"]);
    assert_eq!(exit, 5, "{said}");
    assert_eq!(complete(&copy), [0; 0]);
    assert_eq!(leftovers(&copy), [""; 0]);
}

#[test]
fn a_kill_leaves_no_half_file_under_its_name() {
    let world = world();
    let copy = world.path("copy");
    let child = start_slow_copy(&world, &copy);
    signal(&child, Signal::SIGKILL);
    finish(child);
    let there = complete(&copy);
    assert!(there.len() < FILES, "it was under way");
    speed_up(&world);
    world.text(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    assert_eq!(complete(&copy).len(), FILES);
}

#[test]
fn an_interrupted_copy_cleans_up_with_a_daemon_and_without() {
    for has_daemon in [false, true] {
        for how in [Signal::SIGINT, Signal::SIGTERM] {
            let world = world();
            let copy = world.path("copy");
            if has_daemon {
                world.text(&["mount", text(&world.mountpoint("m"))]);
            }
            let child = start_slow_copy(&world, &copy);
            signal(&child, how);
            let output = finish(child);
            assert_eq!(code(&output), 130, "{}", errors(&output));
            assert!(complete(&copy).len() < FILES, "it was under way");
            assert_eq!(leftovers(&copy), [""; 0]);
            let mode = fs::metadata(copy.join("data")).unwrap().mode() & 0o777;
            assert_eq!(mode, 0o755, "directories have their attributes all the same");
        }
    }
}

#[test]
fn a_daemon_that_dies_is_replaced() {
    let world = world();
    let copy = world.path("copy");
    world.text(&["mount", text(&world.mountpoint("m"))]);
    let child = start_slow_copy(&world, &copy);
    let daemon = world.holder().unwrap().pid;
    kill(Pid::from_raw(i32::try_from(daemon).unwrap()), Signal::SIGKILL).unwrap();
    speed_up(&world);
    let output = finish(child);
    assert_eq!(code(&output), 0, "{}", errors(&output));
    assert_eq!(complete(&copy).len(), FILES);
}

#[test]
fn ordinary_users_get_what_they_may_have_and_are_told_the_rest() {
    let [lower, upper] = odd_image();
    let world = World::of(content(&[&lower, &upper]));
    let nobody = 65534;
    let program = world.path("registryfs");
    fs::copy(env!("CARGO_BIN_EXE_registryfs"), &program).unwrap();
    let home = world.path("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(nobody), Some(nobody)).unwrap();
    fs::set_permissions(world.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let copy = home.join("copy");
    let run = || {
        let mut command = std::process::Command::new(&program);
        command
            .args(["get", &world.image(IMAGE), ".", "-o", text(&copy)])
            .env_clear()
            .env("HOME", &home)
            .env("REGISTRYFS_CACHE_DIR", home.join("cache"))
            .uid(nobody)
            .gid(nobody);
        finish(start(&mut command))
    };
    // Twice: what the first one made can be replaced, in a directory that says that nobody may write too.
    for _ in 0..2 {
        let output = run();
        let said = errors(&output);
        assert_eq!(code(&output), 0, "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        for part in ["owner", "setuid", "2 devices", "1 security.capability"] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
    let seen = picture(&copy);
    assert_eq!(seen.len(), 22, "all but two devices: {seen:#?}");
    let at = |name: &str| fs::symlink_metadata(copy.join(name)).unwrap();
    assert_eq!(
        (at("bin/su").uid(), at("bin/su").mode() & 0o7777),
        (nobody, 0o755)
    );
    assert_eq!(at("locked").mode() & 0o777, 0o555);
    assert_eq!(at("readonly").mode() & 0o777, 0o400);
    assert_eq!(at("sticky").mtime(), 1_234_567_890);
    assert_eq!(
        crate::copies::xattrs(&copy.join("bin/cap")).len(),
        1,
        "its own kind can be set"
    );
    assert_eq!(leftovers(&copy), [""; 0]);
}
