//! What programs do with files and directories beyond reading them: run them, map them, stack on them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use registryfs::demo::Content;

use crate::ground::{is_erofs, kernel_world, said, text};
use crate::support::{File, dir, file, image};
use crate::world::{World, errno, finish, noise, start, stderr};

fn program(path: &str, mode: u32) -> File {
    let mut program = file(path, fs::read("/bin/sh").unwrap());
    program.0.mode = mode;
    program
}

fn world() -> World {
    let entries = [
        dir("bin/"),
        program("bin/sh", 0o755),
        program("bin/su", 0o4755),
        dir("d/"),
        file("d/a", "lower"),
        file("d/large", noise(1_000_000, 1)),
    ];
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&entries, &[file("d/b", "b")]]));
    kernel_world(content, "")
}

#[test]
fn a_program_is_run_and_keeps_running_without_its_mount() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    let mut shell = Command::new(rootfs.join("bin/sh"));
    shell
        .args(["-c", "read go; echo $((6 * 7))"])
        .stdin(std::process::Stdio::piped());
    let mut shell = start(&mut shell);
    umount2(&rootfs, MntFlags::MNT_DETACH).unwrap();
    std::io::Write::write_all(&mut shell.stdin.take().unwrap(), b"\n").unwrap();
    assert_eq!(text(&finish(shell)), "42\n");
}

#[test]
fn a_program_that_runs_keeps_the_mount_busy_and_is_named() {
    let world = world();
    let mut shell = Command::new(world.at("team/app:1.0/rootfs/bin/sh"));
    shell
        .args(["-c", "read go"])
        .current_dir("/")
        .stdin(std::process::Stdio::piped());
    let shell = start(&mut shell);
    let refused = world.run(&["umount", world.root().to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains(&format!("pid {}", shell.id())),
        "{}",
        stderr(&refused)
    );
    // Waiting for its output closes its input.
    finish(shell);
    world.umount();
}

#[test]
fn neither_devices_nor_setuid_programs_work() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    assert_eq!(
        fs::metadata(rootfs.join("bin/su")).unwrap().mode() & 0o7777,
        0o4755,
        "shown as it is"
    );
    for place in [world.root(), rootfs.clone()] {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mine = format!(" {} ", place.display());
        let line = table.lines().find(|line| line.contains(&mine)).unwrap();
        for option in ["ro", "nosuid", "nodev"] {
            assert!(
                line.split([' ', ',']).any(|word| word == option),
                "{option}: {line}"
            );
        }
    }
    let place = world.mountpoint("noexec");
    world.text(&["mount", "-o", "noexec,kernel=require", place.to_str().unwrap()]);
    let program = place
        .join(world.registry.host())
        .join("team/app:1.0/rootfs/bin/sh");
    assert!(is_erofs(&program));
    assert_eq!(errno(Command::new(program).spawn()), libc::EACCES);
    assert!(
        Command::new(rootfs.join("bin/sh"))
            .args(["-c", "true"])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn overlayfs_stacks_on_an_image() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    let dirs = ["upper", "work", "merged"].map(|name| {
        let dir = world.store().with_file_name(name);
        fs::create_dir(&dir).unwrap();
        dir
    });
    let [upper, work, merged] = dirs.each_ref().map(|dir| dir.display());
    // A colon would begin the next of its layers.
    let lower = world.store().with_file_name("lower");
    std::os::unix::fs::symlink(&rootfs, &lower).unwrap();
    let options = format!("lowerdir={},upperdir={upper},workdir={work}", lower.display());
    mount(
        Some("overlay"),
        &dirs[2],
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .unwrap();
    let script = "cat d/a; echo upper >d/a; rm d/b; cat d/a; ls d; sha256sum <d/large; echo more >>d/large; wc -c <d/large";
    let outcome = std::panic::catch_unwind(|| said(&dirs[2], script));
    umount2(&dirs[2], MntFlags::empty()).unwrap();
    let hash = registryfs::digest::Digest::of(&noise(1_000_000, 1)).to_string();
    let hash = hash.trim_start_matches("sha256:");
    assert_eq!(
        outcome.unwrap(),
        format!("lowerupper\na\nlarge\n{hash}  -\n1000005\n"),
        "{merged}"
    );
    assert_eq!(fs::read_to_string(rootfs.join("d/a")).unwrap(), "lower");
    world.umount();
}

#[test]
fn files_are_mapped() {
    let world = world();
    let large = world.at("team/app:1.0/rootfs/d/large");
    // git maps what it compares.
    let copy = world.store().with_file_name("copy");
    let mut bytes = noise(1_000_000, 1);
    fs::write(&copy, &bytes).unwrap();
    let compare = || {
        let mut git = Command::new("git");
        git.args([
            "-c",
            "core.bigFileThreshold=1g",
            "diff",
            "--no-index",
            "--binary",
            "--stat",
        ])
        .arg(&copy)
        .arg(&large);
        finish(start(&mut git)).status.code()
    };
    assert_eq!(compare(), Some(0));
    bytes[777_777] ^= 1;
    fs::write(&copy, &bytes).unwrap();
    assert_eq!(compare(), Some(1));
    assert!(is_erofs(&large));
}

#[test]
fn nothing_can_be_written() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    let a = rootfs.join("d/a");
    assert_eq!(errno(fs::write(&a, "b")), libc::EROFS);
    assert_eq!(errno(fs::write(rootfs.join("new"), "b")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(&a)), libc::EROFS);
    assert_eq!(errno(fs::rename(&a, rootfs.join("b"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(rootfs.join("e"))), libc::EROFS);
    assert_eq!(errno(std::os::unix::fs::chown(&a, Some(1), None)), libc::EROFS);
    assert_eq!(fs::read_to_string(&a).unwrap(), "lower");
}

#[test]
fn modes_hold_for_other_users() {
    let mut secret = file("d/secret", "secret");
    secret.0.mode = 0o600;
    let mut closed = dir("closed/");
    closed.0.mode = 0o700;
    let mut content = Content::new();
    let entries = [
        dir("d/"),
        secret,
        file("d/public", "public"),
        closed,
        file("closed/a", "a"),
    ];
    content.add_tagged_image("team/app", "1.0", &image(&[&entries]));
    let world = World::new(content).configured("kernel = \"require\"\n");
    for path in [
        world.root().parent().unwrap().to_owned(),
        world.store().parent().unwrap().to_owned(),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let host = world.registry.host();
    let read = |path: &str| {
        let mut cat = Command::new("cat");
        cat.arg(world.at("team/app:1.0/rootfs").join(path))
            .uid(65_534)
            .gid(65_534)
            .current_dir("/");
        let output = finish(start(&mut cat));
        output
            .status
            .success()
            .then(|| String::from_utf8(output.stdout).unwrap())
    };
    world.mount();
    assert_eq!(
        read("d/public"),
        None,
        "only configured registries are open to all"
    );
    assert!(is_erofs(&world.at("team/app:1.0/rootfs")));
    assert_eq!(read("d/public"), None, "nor when their owner has been there");
    world.umount();
    world.mount_with(&["-o", &format!("allow={host}")]);
    assert_eq!(
        read("d/public").as_deref(),
        Some("public"),
        "another user is the first to look"
    );
    assert!(is_erofs(&world.at("team/app:1.0/rootfs")));
    assert_eq!(read("d/secret"), None);
    assert_eq!(read("closed/a"), None);
}

#[test]
fn readers_at_once_of_one_cold_file_get_it_fetched_once() {
    let world = world();
    let large = world.at("team/app:1.0/rootfs/d/large");
    fs::metadata(&large).unwrap();
    let (sums, requests) = world.requests(|| {
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..20)
                .map(|_| scope.spawn(|| fs::read(&large).unwrap() == noise(1_000_000, 1)))
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .collect::<Vec<_>>()
        })
    });
    assert!(sums.iter().all(|is_right| *is_right));
    let mut ranges: Vec<(u64, u64)> = requests
        .iter()
        .filter_map(|record| {
            record
                .range
                .as_deref()?
                .strip_prefix("bytes=")?
                .split_once('-')
                .map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap()))
        })
        .collect();
    ranges.sort_unstable();
    assert!(!ranges.is_empty());
    assert!(
        ranges.windows(2).all(|pair| pair[0].1 < pair[1].0),
        "nothing is asked for twice: {ranges:?}"
    );
}
