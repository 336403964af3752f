//! The command as its users run it: exit codes, what goes where, and daemons that start, share and end. Mounts need root
//! and /dev/fuse.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

mod convert;
mod converted;
mod copies;
mod credentials;
mod daemon;
mod get;
mod get_faults;
mod helpers;
mod prefetch;
mod progress;
#[path = "../support/mod.rs"]
mod support;
mod world;

use std::io::Read;
use std::time::Duration;

use registryfs::demo::{Account, Auth, Behaviour};
use world::{World, code, errors, finish, start};

#[test]
fn what_cannot_be_meant_exits_2_and_says_why() {
    let world = World::new();
    let bad_file = world.file("bad.toml", "retries = 1\nretreis = 2\n");
    let bad_file = bad_file.to_str().unwrap();
    let bad_host = world.file("host.toml", "[registry.\"nohost\"]\ninsecure = true\n");
    let bad_host = bad_host.to_str().unwrap();
    let bad_layout = world.file("layout.toml", "[layout.\"nohost\"]\npath = \"x\"\n");
    let bad_layout = bad_layout.to_str().unwrap();
    let two_names = "[registry.\"A.b\"]\n[layout.\"a.b\"]\npath = \"x\"\n";
    let two_names = world.file("two.toml", two_names);
    let two_names = two_names.to_str().unwrap();
    let mountpoint = world.mountpoint("a");
    let mountpoint = mountpoint.to_str().unwrap();
    let cases: &[(&[&str], &str)] = &[
        (&["ls"], "REFERENCE"),
        (&["frobnicate"], "frobnicate"),
        (&["ls", "Debian"], "Debian"),
        (&["tags", "a//b"], "a//b"),
        (&["repos", "nodots"], "nodots"),
        (&["ls", "--platform", "amd64", "debian"], "amd64"),
        (&["ls", "--timeout", "0", "debian"], "timeout"),
        (
            &["ls", "--config", "/nonexistent.toml", "debian"],
            "/nonexistent.toml",
        ),
        (
            &["ls", "--config", bad_file, "debian"],
            "bad.toml:2: unknown field `retreis`",
        ),
        (
            &["ls", "--config", bad_host, "debian"],
            "host.toml: [registry.\"nohost\"]: ",
        ),
        (&["ls", "--credential", "hunter2", "debian"], "USER:PASS"),
        (&["mount", "-o", "ro,colour", mountpoint], "colour"),
        (&["mount", "oci:", mountpoint], "oci:PATH"),
        (&["mount", "Debian", mountpoint], "taken for an image"),
        (&["mount", "oci/", mountpoint], "\"oci\" is no registry host"),
        (&["ls", "oci:/srv/app:1"], "[layout.\"NAME\"]"),
        (&["ls", "--config", bad_layout, "debian"], "[layout.\"nohost\"]: "),
        (&["ls", "--config", two_names, "debian"], "\"a.b\" is the name"),
        (&["mount", "/nonexistent/a"], "mkdir -p /nonexistent/a"),
    ];
    for (arguments, word) in cases {
        let output = world.run(arguments);
        let text = errors(&output);
        assert_eq!(code(&output), 2, "{arguments:?}: {text}");
        assert!(text.contains(word), "{arguments:?}: {text}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
    assert!(!world.store().exists(), "a mistake leaves no traces");
}

#[test]
fn each_kind_of_failure_has_its_exit_code() {
    let world = World::new();
    let image = world.image("base/slim:11");
    assert_eq!(code(&world.run(&["digest", "--offline", &image])), 5, "offline");
    assert_eq!(code(&world.run(&["digest", &world.image("base/slim:nope")])), 4);
    assert_eq!(code(&world.run(&["cat", &image, "/nope"])), 4);
    assert_eq!(code(&world.run(&["cat", &image, "/etc"])), 1, "a directory");
    assert_eq!(code(&world.run(&["umount", "/nonexistent"])), 4);
    assert_eq!(code(&world.run(&["umount", "/"])), 2, "not ours");

    let user = Account::new("user", "hunter2");
    world
        .registry
        .handle()
        .update(|behaviour| behaviour.auth = Auth::Basic(user));
    let denied = world.run(&["tags", "--credential", "user:wrong", &world.image("base/tiny")]);
    assert_eq!(code(&denied), 3, "{}", errors(&denied));
    assert!(
        errors(&denied).contains("credentials of --credential"),
        "{}",
        errors(&denied)
    );
    let allowed = world.run(&["tags", "--credential", "user:hunter2", &world.image("base/tiny")]);
    assert_eq!(code(&allowed), 0, "{}", errors(&allowed));

    world.registry.handle().stop();
    let network = world.run(&["tags", "--retries", "0", &world.image("base/other")]);
    assert_eq!(code(&network), 5, "{}", errors(&network));
}

#[test]
fn authorities_that_cannot_be_read_exit_2_with_the_remedy() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let output = world.run(&["digest", "--ca", "/nonexistent.pem", &image]);
    let text = errors(&output);
    assert_eq!(code(&output), 2, "{text}");
    assert!(
        text.contains("/nonexistent.pem") && text.contains("correct --ca"),
        "{text}"
    );
}

#[test]
fn a_demo_registry_without_its_port_fails_at_once() {
    let world = World::new();
    let host = world.registry.host();
    let output = world.run(&["demo-registry", "--listen", &host]);
    let text = errors(&output);
    assert_eq!(code(&output), 1, "{text}");
    assert!(text.contains(&host) && text.contains("port is taken"), "{text}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_failure_is_told_once_and_the_rest_only_when_asked_for() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let verbose = world.run(&["-v", "digest", &image]);
    let text = errors(&verbose);
    assert!(text.contains("INFO") && text.contains("manifests=1"), "{text}");
    world.registry.handle().stop();
    let tags = world.image("base/tiny");
    let quiet = errors(&world.run(&["tags", "--retries", "0", &tags]));
    assert!(
        quiet.starts_with("registryfs: ") && quiet.lines().count() == 1,
        "{quiet}"
    );
    let verbose = errors(&world.run(&["-v", "tags", "--retries", "0", &tags]));
    assert!(
        verbose.contains("WARN") && verbose.contains("host is down"),
        "{verbose}"
    );
}

#[test]
fn a_registry_that_does_not_answer_in_time_exits_6() {
    let world = World::with(Behaviour {
        latency: Duration::from_secs(30),
        ..Behaviour::default()
    });
    let output = world.run(&["digest", "--timeout", "1", &world.image("base/slim:11")]);
    assert_eq!(code(&output), 6, "{}", errors(&output));
}

#[test]
fn an_interrupted_command_exits_130() {
    let world = World::with(Behaviour {
        latency: Duration::from_secs(30),
        ..Behaviour::default()
    });
    let child = start(&mut world.command(&["digest", &world.image("base/slim:11")]));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    world::until("it waits for the registry", || {
        !world.registry.handle().ledger().is_empty()
    });
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(code(&finish(child)), 130);
}

#[test]
fn data_goes_to_stdout_and_both_formats_say_the_same() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let digest = world.text(&["digest", &image]);
    let json: serde_json::Value =
        serde_json::from_str(&world.text(&["--format", "json", "digest", &image])).unwrap();
    assert_eq!(json["digest"], digest.trim());

    let manifest = world.run(&["manifest", &image]).stdout;
    assert_eq!(
        registryfs::digest::Digest::of(&manifest).to_string(),
        digest.trim(),
        "byte for byte"
    );
    let listing = world.text(&["ls", &image, "/etc"]);
    assert!(
        listing.contains("lrwxrwxrwx") && listing.contains("os-release -> ../usr/lib/os-release"),
        "{listing}"
    );
    // The link points upwards and is followed inside of the image.
    let content = world.run(&["cat", &image, "/etc/os-release"]).stdout;
    let file: serde_json::Value =
        serde_json::from_str(&world.text(&["info", "--format=json", &image, "/usr/lib/os-release"])).unwrap();
    assert_eq!(
        registryfs::digest::Digest::of(&content).to_string(),
        file["digest"].as_str().unwrap()
    );
    let info = world.text(&["info", &image]);
    assert!(info.contains(digest.trim()) && info.contains("estargz"), "{info}");
}

#[test]
fn what_is_cached_is_answered_offline() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let online = world.text(&["cat", &image, "/etc/os-release"]);
    world.registry.handle().stop();
    assert_eq!(
        world.text(&["--offline", "cat", &image, "/etc/os-release"]),
        online
    );
}

#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let world = World::new();
    let names = world.text(&["repos", &world.registry.host()]);
    let many = names
        .lines()
        .find(|name| name.contains("nightly"))
        .map(|name| world.image(name))
        .unwrap();
    let mut child = start(&mut world.command(&["tags", "--format=json", &many]));
    let mut first = [0];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let output = finish(child);
    assert_eq!((code(&output), errors(&output).as_str()), (0, ""));
}

#[test]
fn commands_at_the_same_time_take_turns() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let children: Vec<_> = (0..6)
        .map(|_| start(&mut world.command(&["cat", &image, "/etc/os-release"])))
        .collect();
    let outputs: Vec<_> = children.into_iter().map(finish).collect();
    for output in &outputs {
        assert_eq!(code(output), 0, "{}", errors(output));
        assert_eq!(output.stdout, outputs[0].stdout);
    }
}

#[test]
fn a_store_in_use_is_waited_for_and_its_user_named() {
    let world = World::new();
    let lock = registryfs::store::lock::Lock::take(&world.store()).unwrap();
    let output = world.run(&["--timeout", "2", "status"]);
    assert_eq!(code(&output), 1);
    let own = std::process::id().to_string();
    let text = errors(&output);
    assert!(text.contains("waiting") && text.contains(&own), "{text}");
    assert!(text.contains("--cache-dir"), "the remedy: {text}");
    drop(lock);
    assert_eq!(code(&world.run(&["status"])), 0);
}
