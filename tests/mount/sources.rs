//! Mounts of one image and of one registry: what stands at the mountpoint itself.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use registryfs::demo::{Behaviour, Content, ImageBuilder, ImageIndex};
use registryfs::digest::Digest;
use registryfs::layer::entry::Kind;
use registryfs::store::lock::holder;
use rustix::fs::{getxattr, listxattr};

use crate::support::{File, dir, file, image, layer, link};
use crate::world::{World, errno, finish, names, noise, start, stderr, until};

fn files() -> Vec<File> {
    let mut root = dir("./");
    root.0.mode = 0o1751;
    root.0.uid = 7;
    root.0.gid = 8;
    root.0.mtime.seconds = 1_234_567;
    root.0.xattrs.push((b"user.of.root".to_vec(), b"value".to_vec()));
    let mut secret = file("etc/secret", "secret");
    secret.0.mode = 0o4711;
    vec![
        root,
        dir("etc/"),
        file("etc/os-release", "ID=one\n"),
        secret,
        file("big", noise(200_000, 1)),
        link("etc/alias", Kind::Hardlink, "big"),
        link("abs", Kind::Symlink, "/etc/os-release"),
        link("pipe", Kind::Fifo, ""),
    ]
}

fn content() -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&files()]));
    content
}

/// Mounts `source` at a mountpoint of its own.
fn mount(world: &World, source: &str, name: &str) -> PathBuf {
    let at = world.mountpoint(name);
    world.text(&["mount", source, at.to_str().unwrap()]);
    at
}

fn umount(world: &World, at: &Path) {
    world.text(&["umount", at.to_str().unwrap()]);
}

/// What `rsync` finds different, owners, hard links, attributes and contents included.
fn differences(a: &Path, b: &Path) -> String {
    let mut rsync = Command::new("rsync");
    rsync.args(["-naHAX", "--checksum", "--delete", "--itemize-changes"]);
    rsync.arg(a.join("")).arg(b.join(""));
    let output = finish(start(&mut rsync));
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_image_is_mounted_with_its_root_at_the_mountpoint() {
    let world = World::new(content()).mounted();
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let at = mount(&world, &reference, "image");
    assert_eq!(names(&at), ["abs", "big", "etc", "pipe"], "and nothing of ours");
    assert!(fs::symlink_metadata(at.join(".registryfs")).is_err());
    let root = fs::metadata(&at).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o1751, 7, 8));
    assert_eq!(root.mtime(), 1_234_567);
    let mut value = [0; 16];
    let length = getxattr(&at, "user.of.root", &mut value).unwrap();
    assert_eq!(&value[..length], b"value");
    let length = listxattr(&at, &mut value).unwrap();
    assert_eq!(&value[..length], b"user.of.root\0");
    let etc = fs::metadata(at.join("etc")).unwrap();
    assert_eq!(fs::metadata(at.join("etc/..")).unwrap().ino(), root.ino());
    assert_eq!(etc.dev(), root.dev());
    let (big, alias) = (
        fs::metadata(at.join("big")).unwrap(),
        fs::metadata(at.join("etc/alias")).unwrap(),
    );
    assert_eq!((big.ino(), big.nlink()), (alias.ino(), 2));
    assert!(fs::metadata(at.join("pipe")).unwrap().file_type().is_fifo());

    // Two mounts of one daemon show the same.
    let rootfs = world.at("team/app/1.0/rootfs");
    assert_eq!(differences(&at, &rootfs), "");
    assert_eq!(errno(fs::write(at.join("new"), "")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(at.join("big"))), libc::EROFS);
    let statfs = nix::sys::statvfs::statvfs(&at).unwrap();
    // EROFS counts its own blocks too.
    assert!(statfs.blocks() >= 200_016u64.div_ceil(4096));
    assert_eq!(statfs.blocks_free(), 0);
    assert!(statfs.files() >= 6);
    umount(&world, &at);
    assert_eq!(names(&at), [""; 0]);
    assert_eq!(fs::read(rootfs.join("big")).unwrap(), noise(200_000, 1));
}

#[test]
fn numbers_are_the_same_after_a_restart_and_names_below_the_root_are_found() {
    let world = World::new(content());
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let numbers = |at: &Path| -> Vec<u64> {
        let number = |name: &str| fs::symlink_metadata(at.join(name)).unwrap().ino();
        ["", "etc", "etc/os-release", "big", "etc/.."]
            .map(number)
            .to_vec()
    };
    let at = mount(&world, &reference, "image");
    let first = numbers(&at);
    umount(&world, &at);
    let at = mount(&world, &reference, "image");
    assert_eq!(numbers(&at), first);
    // The kernel asks for everything anew.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    assert_eq!(numbers(&at), first);
    let here = finish(start(
        Command::new("sh")
            .args(["-c", "cd etc/.. && ls && pwd -P"])
            .current_dir(&at),
    ));
    assert_eq!(
        String::from_utf8(here.stdout).unwrap(),
        format!("abs\nbig\netc\npipe\n{}\n", at.display())
    );
}

#[test]
fn an_image_stays_what_it_was_when_it_was_mounted() {
    let world = World::with(content(), Behaviour::default(), &[]).configured("tag_ttl_s = 0\n");
    let host = world.registry.host().to_owned();
    let reference = format!("{host}/team/app:1.0");
    let at = mount(&world, &reference, "image");
    let old = image(&[&files()]).digest();
    let new = image(&[&[file("new", "new")]]);
    world.handle().edit(|content| {
        content.add_tagged_image("team/app", "1.0", &new);
    });
    let status = |at: &Path| {
        let status: serde_json::Value =
            serde_json::from_str(&world.text(&["status", "--format", "json"])).unwrap();
        let mounts = status["mounts"].as_array().unwrap().clone();
        let mount = mounts
            .iter()
            .find(|mount| mount["mountpoint"] == at.to_str().unwrap())
            .unwrap()
            .clone();
        (
            mount["source"].as_str().unwrap().to_owned(),
            mount["digest"].as_str().unwrap().to_owned(),
        )
    };
    assert_eq!(fs::read_to_string(at.join("etc/os-release")).unwrap(), "ID=one\n");
    assert_eq!(status(&at), (reference.clone(), old.to_string()));
    let again = mount(&world, &reference, "again");
    assert_eq!(names(&again), ["new"]);
    assert_eq!(status(&again), (reference, new.digest().to_string()));
    let pinned = mount(&world, &format!("{host}/team/app@{old}"), "pinned");
    assert_eq!(names(&pinned), names(&at));
}

#[test]
fn a_known_image_is_mounted_without_its_registry() {
    let world = World::new(content());
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let at = mount(&world, &reference, "image");
    let read = |at: &Path| fs::read_to_string(at.join("etc/os-release")).unwrap();
    assert_eq!(read(&at), "ID=one\n");
    umount(&world, &at);
    world.handle().stop();
    let at = mount(&world, &reference, "down");
    assert_eq!(read(&at), "ID=one\n");
    umount(&world, &at);
    let at = world.mountpoint("offline");
    world.text(&["mount", "-o", "offline", &reference, at.to_str().unwrap()]);
    assert_eq!(read(&at), "ID=one\n");
}

#[test]
fn the_platform_is_chosen_for_the_mount() {
    let of = |architecture: &str| {
        let layer = layer(&[file("arch", architecture)]);
        ImageBuilder::new(vec![layer]).architecture(architecture).build()
    };
    let mut content = Content::new();
    let index = ImageIndex::new(vec![of("amd64"), of("arm64")]);
    let digest = content.add_index("team/app", &index);
    content.tag("team/app", "1.0", digest);
    let world = World::new(content);
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let (arm, other) = (world.mountpoint("arm"), world.mountpoint("other"));
    let mount = |platform: &str, at: &Path| {
        world.run(&[
            "mount",
            "-o",
            &format!("platform={platform}"),
            &reference,
            at.to_str().unwrap(),
        ])
    };
    assert!(mount("linux/arm64", &arm).status.success());
    assert_eq!(fs::read_to_string(arm.join("arch")).unwrap(), "arm64");
    let refused = mount("linux/riscv64", &other);
    assert_eq!(refused.status.code(), Some(4), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("linux/arm64"), "{}", stderr(&refused));
}

#[test]
fn what_cannot_be_mounted_leaves_nothing_behind() {
    let mut encrypted = registryfs::demo::Layer::gzip(&[file("a", "a")]).unwrap();
    encrypted.media_type = Some("application/vnd.oci.image.layer.v1.tar+gzip+encrypted".to_owned());
    let mut content = content();
    let encrypted = ImageBuilder::new(vec![encrypted]).build();
    content.add_tagged_image("team/encrypted", "1.0", &encrypted);
    let broken = image(&[&[file("broken", "broken")]]);
    content.add_tagged_image("team/broken", "1.0", &broken);
    content.remove_blob("team/broken", &broken.layers[0].digest());
    let world = World::new(content);
    let at = world.mountpoint("image");
    let host = world.registry.host().to_owned();
    let denied = format!("deny={host}");
    for (source, options, code, word) in [
        ("team/app:9", "ro", 4, "team/app:9"),
        ("team/none:1.0", "ro", 4, "team/none"),
        ("team/broken:1.0", "ro", 7, "does not have it"),
        ("team/encrypted:1.0", "ro", 1, "encrypted"),
        ("team/app:1.0", &*denied, 3, "allow and deny"),
        ("", &*denied, 3, "allow and deny"),
        ("team/app:1.0", "allow=a.example", 3, &*host),
    ] {
        let source = format!("{host}/{source}");
        let output = world.run(&["mount", "-o", options, &source, at.to_str().unwrap()]);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{source}: {text}");
        assert!(text.contains(word), "{source}: {text}");
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!table.contains(at.to_str().unwrap()), "{source}");
        until("the daemon has ended", || {
            holder(&world.store()).is_none_or(|holder| holder.socket.is_none())
        });
    }
}

#[test]
fn a_registry_is_mounted_with_its_repositories_at_the_top() {
    let world = World::new(content());
    let host = world.registry.host().to_owned();
    let at = mount(&world, &host, "registry");
    assert_eq!(names(&at), [".registryfs", "team"]);
    assert_eq!(names(&at.join("team/app")), ["1.0"]);
    assert_eq!(
        fs::read_to_string(at.join("team/app:1.0/rootfs/etc/os-release")).unwrap(),
        "ID=one\n"
    );
    assert_eq!(errno(fs::metadata(at.join("team/app/9/rootfs"))), libc::ENOENT);
    let errors = fs::read_to_string(at.join(".registryfs/errors")).unwrap();
    assert!(errors.contains("lookup team/app/9/rootfs: ENOENT"), "{errors}");
    assert_eq!(
        errno(fs::metadata(at.join(&host))),
        libc::ENOENT,
        "no other registry is there"
    );
    assert_eq!(errno(fs::write(at.join(".new"), "")), libc::EROFS);
    // Others may look at what was mounted by name.
    assert_eq!(fs::metadata(&at).unwrap().mode() & 0o7777, 0o555);
    for path in [at.parent().unwrap(), world.store().parent().unwrap()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut cat = Command::new("cat");
    std::os::unix::process::CommandExt::uid(&mut cat, 65534);
    let output = finish(start(cat.arg(at.join("team/app/1.0/rootfs/etc/os-release"))));
    assert_eq!(output.stdout, b"ID=one\n", "{}", stderr(&output));
}

#[test]
fn docker_hubs_other_names_are_the_hub() {
    let world = World::with(content(), Behaviour::default(), &["--offline"]);
    let at = mount(&world, "index.docker.io", "hub");
    // Nothing is asked, so nothing is known; but the names are the Hub's.
    assert_eq!(errno(fs::metadata(at.join("debian:12"))), libc::EHOSTUNREACH);
    let errors = fs::read_to_string(at.join(".registryfs/errors")).unwrap();
    assert!(errors.contains("docker.io/library/debian:12"), "{errors}");
}

#[test]
fn a_mounted_image_costs_no_request_more_than_in_the_tree() {
    let world = World::new(content());
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let (at, requests) = world.requests(|| mount(&world, &reference, "image"));
    // A manifest and a layer's tail: everything else waits for a reader.
    assert_eq!(
        requests
            .iter()
            .filter(|request| request.status == 200 || request.status == 206)
            .count(),
        2
    );
    let (_, requests) = world.requests(|| fs::read(at.join("etc/os-release")).unwrap());
    assert_eq!(requests.len(), 1);
    assert_eq!(
        Digest::of(&fs::read(at.join("big")).unwrap()),
        Digest::of(&noise(200_000, 1))
    );
}
