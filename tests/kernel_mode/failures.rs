//! What goes wrong below EROFS: registries that die or lie, and a daemon that is killed. The kernel makes every failed read
//! an EIO; why it failed is in `errors`, and the next read tries again.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use registryfs::demo::{Content, Fault, Scope};
use registryfs::digest::Digest;
use registryfs::layer::entry::Kind;

use crate::ground::{Inside, erofs_mounts, is_erofs, kernel_world, make_local, text};
use crate::support::{File, dir, file, image, link};
use crate::world::{World, errno, finish, noise, start, until};

const FILES: u64 = 8;
const FILE_BYTES: usize = 700_000;

fn payload(number: u64) -> Vec<u8> {
    noise(FILE_BYTES, 10 + number)
}

/// What sha256sum(1) says of a file.
fn hex_of(number: u64) -> String {
    let digest = Digest::of(&payload(number)).to_string();
    digest.trim_start_matches("sha256:").to_owned()
}

/// Files in places of the blob that no read-ahead joins.
fn content() -> Content {
    let mut entries: Vec<File> = vec![dir("d/"), link("d/link", Kind::Symlink, "f0")];
    entries.extend((0..FILES).map(|n| file(&format!("d/f{n}"), payload(n))));
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&entries, &[file("top", "top")]]));
    content
}

fn world() -> World {
    kernel_world(content(), "retries = 0\n")
}

#[test]
fn a_registry_that_dies_fails_what_is_missing_alone_and_comes_back() {
    let world = world();
    let at = |number: u64| world.at(&format!("team/app:1.0/rootfs/d/f{number}"));
    assert!(fs::read(at(0)).unwrap() == payload(0));
    world.handle().stop();
    assert_eq!(errno(fs::read(at(5))), libc::EIO);
    let errors = world.errors();
    assert!(
        errors.contains(&world.registry.host()),
        "the reason is to be found: {errors}"
    );
    assert!(fs::read(at(0)).unwrap() == payload(0), "what is cached goes on");
    assert!(is_erofs(&at(0)));
    world.handle().restart().unwrap();
    until("what failed is read", || {
        fs::read(at(5)).is_ok_and(|bytes| bytes == payload(5))
    });
    assert!(fs::read(at(7)).unwrap() == payload(7));
}

#[test]
fn a_chunk_that_is_not_what_was_promised_is_never_kept() {
    let world = world();
    let at = |number: u64| world.at(&format!("team/app:1.0/rootfs/d/f{number}"));
    fs::metadata(at(0)).unwrap();
    for position in [0, 20_000, 300_000] {
        world
            .handle()
            .inject(Scope::containing("/blobs/"), Fault::FlipByte(position));
    }
    for number in 0..FILES {
        let read = fs::read(at(number));
        assert!(
            read.as_ref().is_err() || *read.as_ref().unwrap() == payload(number),
            "a lie was read: f{number}"
        );
    }
    assert_eq!(errno(fs::read(at(3))), libc::EIO);
    assert!(world.errors().contains("sha256:"), "{}", world.errors());
    world.handle().clear_faults();
    for number in 0..FILES {
        until("the truth is read", || {
            fs::read(at(number)).is_ok_and(|bytes| bytes == payload(number))
        });
    }
}

/// The kernel's own pages: a page that could not be filled must not stay, whichever it is. Nobody but its reader brings
/// anything of a file, so each of them waits for a registry that is refused for seconds, twice.
#[test]
fn a_read_that_fails_half_way_leaves_no_wrong_page() {
    let world = world();
    for (number, start) in [(0, 0), (3, 300_000), (6, 600_000)] {
        let path = world.at(&format!("team/app:1.0/rootfs/d/f{number}"));
        let open = fs::File::open(&path).unwrap();
        // Some of the file is there, the rest of it fails.
        let mut head = vec![0; 4096];
        open.read_exact_at(&mut head, start as u64).unwrap();
        let expected = payload(number);
        assert!(head == expected[start..start + 4096]);
        world.handle().stop();
        let whole = fs::read(&path);
        assert!(
            whole.as_ref().is_err() || *whole.as_ref().unwrap() == expected,
            "f{number}"
        );
        for at in (0..FILE_BYTES).step_by(4096) {
            let mut page = vec![0; 4096.min(FILE_BYTES - at)];
            if open.read_exact_at(&mut page, at as u64).is_ok() {
                assert!(page == expected[at..at + page.len()], "f{number} at {at}");
            }
        }
        world.handle().restart().unwrap();
        until("all of it is read", || {
            fs::read(&path).is_ok_and(|bytes| bytes == expected)
        });
    }
}

#[test]
fn with_the_daemon_killed_whoever_reads_complete_layers_goes_on() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    let expected = Digest::of(&archive_of(&rootfs));
    make_local(&world, &rootfs);
    let inside = Inside::new(
        &rootfs.join("d"),
        "ls -lR >/dev/null; sha256sum f7 link; getfattr -d f0; cd ..; cat top; /bin/pwd",
    );
    let open = fs::File::open(rootfs.join("d/f6")).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "-cf", "-", "."])
        .current_dir(&rootfs)
        .stdout(Stdio::piped());
    let mut tar = start(&mut tar);
    // It waits for its reader by now, and has most of its files before it.
    let mut archive = vec![0; 65_536];
    let mut output = tar.stdout.take().unwrap();
    output.read_exact(&mut archive).unwrap();
    fs::write("/proc/sys/vm/drop_caches", "3\n").unwrap();
    world.kill_daemon();
    output.read_to_end(&mut archive).unwrap();
    text(&finish(tar));
    assert_eq!(Digest::of(&archive), expected);
    let mut bytes = vec![0; FILE_BYTES];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == payload(6));
    let seen = text(&inside.go());
    assert_eq!(
        seen,
        format!(
            "{}  f7\n{}  link\ntop{}\n",
            hex_of(7),
            hex_of(0),
            rootfs.display()
        )
    );
    // The next daemon takes the place of what is dead, with everything below.
    let held =
        fs::File::open(Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&open).to_string()))
            .unwrap();
    world.mount();
    assert!(is_erofs(&rootfs));
    assert_eq!(Digest::of(&archive_of(&rootfs)), expected);
    assert_eq!(erofs_mounts(&world.root()).len(), 1);
    held.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == payload(6), "what the old daemon left is still served");
    drop((open, held));
    world.umount();
    assert!(erofs_mounts(&world.root()).is_empty());
}

fn archive_of(rootfs: &Path) -> Vec<u8> {
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "-cf", "-", "."]).current_dir(rootfs);
    let output = finish(start(&mut tar));
    assert!(output.status.success());
    output.stdout
}

#[test]
fn with_the_daemon_killed_what_it_would_have_fetched_fails_and_does_not_hang() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    let cached = rootfs.join("d/f0");
    assert!(fs::read(&cached).unwrap() == payload(0));
    let inside = Inside::new(
        &rootfs,
        "sha256sum <d/f0; cat d/f4 >/dev/null 2>&1 || echo failed; ls d | wc -l",
    );
    world.kill_daemon();
    assert_eq!(
        text(&inside.go()),
        format!("{}  -\nfailed\n{}\n", hex_of(0), FILES + 1)
    );
    world.mount();
    assert!(fs::read(rootfs.join("d/f4")).unwrap() == payload(4));
}

#[test]
fn a_reader_of_a_silent_registry_can_be_interrupted_and_the_image_unmounted() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    fs::metadata(rootfs.join("d/f3")).unwrap();
    let silence = Fault::Stall {
        after_bytes: 0,
        pause: None,
    };
    world.handle().inject(Scope::containing("/blobs/"), silence);
    let mut reader = start(Command::new("cat").arg(rootfs.join("d/f3")));
    world.handle().clear_ledger();
    until("the registry is asked", || !world.handle().ledger().is_empty());
    reader.kill().unwrap();
    reader.wait().unwrap();
    world.umount();
    assert!(erofs_mounts(&world.root()).is_empty());
}
