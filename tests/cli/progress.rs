//! Progress bars, on a terminal made for it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Output, Stdio};

use crate::copies::{IMAGE, content, noise};
use crate::support::file;
use crate::world::{World, code, errors, finish, until};

/// A pseudoterminal: its two ends.
fn terminal() -> (OwnedFd, File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap());
    (ours, theirs.unwrap())
}

/// Runs a command with a terminal as its standard error. What it wrote there, and its standard output.
fn on_terminal(world: &World, arguments: &[&str]) -> (String, String) {
    let (seen, output) = ending_on_terminal(world, arguments);
    assert_eq!(code(&output), 0, "{seen}");
    (seen, String::from_utf8_lossy(&output.stdout).into_owned())
}

/// As [`on_terminal`], however it ends.
fn ending_on_terminal(world: &World, arguments: &[&str]) -> (String, Output) {
    let (ours, theirs) = terminal();
    let mut command = world.command(arguments);
    let child = command
        .env("TERM", "xterm")
        .stdout(Stdio::piped())
        .stderr(theirs)
        .spawn()
        .unwrap();
    // The command holds the other end until it is dropped.
    drop(command);
    let reader = std::thread::spawn(move || {
        let (mut seen, mut ours) = (Vec::new(), File::from(ours));
        // It ends with EIO when nobody has the other end open any more.
        let _ = ours.read_to_end(&mut seen);
        String::from_utf8_lossy(&seen).into_owned()
    });
    let output = finish(child);
    (reader.join().unwrap(), output)
}

fn slow_world() -> World {
    let files: Vec<_> = (0..8)
        .map(|number| file(&format!("f{number}"), noise(200_000, number + 1)))
        .collect();
    let world = World::of(content(&[&files]));
    world
        .registry
        .handle()
        .update(|behaviour| behaviour.total_bytes_per_s = 1 << 20);
    world
}

#[test]
fn bars_show_bytes_rate_and_time_on_a_terminal_with_a_daemon_and_without() {
    for has_daemon in [false, true] {
        for command in ["get", "prefetch"] {
            let world = slow_world();
            let image = world.image(IMAGE);
            if has_daemon {
                world.text(&["mount", world.mountpoint("m").to_str().unwrap()]);
            }
            let copy = world.path("copy");
            let mut arguments = vec!["--format=json", command, &image, "."];
            if command == "get" {
                arguments.extend(["-o", copy.to_str().unwrap()]);
            }
            let (seen, out) = on_terminal(&world, &arguments);
            for part in [IMAGE, "/1.5", "KiB/s", " left"] {
                // Rates are small or large, as the machine is busy.
                let part_seen = seen.contains(part) || (part == "KiB/s" && seen.contains("MiB/s"));
                assert!(part_seen, "{command}: {part} is not in {seen:?}");
            }
            serde_json::from_str::<serde_json::Value>(&out).expect(&out);
        }
    }
}

#[test]
fn nothing_is_shown_where_nobody_wants_it() {
    let world = slow_world();
    let image = world.image(IMAGE);
    let copy = world.path("copy");
    let copy = copy.to_str().unwrap();
    let (seen, _) = on_terminal(&world, &["get", "--no-progress", &image, ".", "-o", copy]);
    assert_eq!(seen, "");
    let output = world.run(&["get", &image, ".", "-o", copy]);
    assert_eq!((code(&output), errors(&output).as_str()), (0, ""), "no terminal");
    let output = world.run(&["prefetch", &image]);
    assert_eq!((code(&output), errors(&output).as_str()), (0, ""), "no terminal");
    let (seen, _) = on_terminal(&world, &["cat", &image, "f0"]);
    assert_eq!(seen, "");
    until("the store is free", || world.holder().is_none());
}

#[test]
fn a_message_does_not_stand_in_a_bar() {
    let world = slow_world();
    let image = world.image(IMAGE);
    let lock = registryfs::store::lock::Lock::take(&world.store()).unwrap();
    let arguments = ["--timeout=2", "get", &image, "."];
    let (seen, output) = ending_on_terminal(&world, &arguments);
    drop(lock);
    assert_eq!(code(&output), 1, "{seen:?}");
    let (before, _) = seen.split_once("registryfs: waiting").expect(&seen);
    assert!(before.contains(IMAGE), "a bar is shown: {seen:?}");
    assert!(before.ends_with("\r\u{1b}[2K"), "its line is cleared: {seen:?}");
}
