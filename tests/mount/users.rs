//! Ordinary users: mounts of their own through fusermount3, in which everything can be read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use registryfs::demo::{Behaviour, Content, DemoRegistry, Image};

use crate::support::{File, dir, file, image};
use crate::users_stage::{ONE, Stage, TWO, mounted_at};
use crate::world::{World, names, stderr};

fn with_mode((mut entry, payload): File, mode: u32, owner: u32) -> File {
    entry.mode = mode;
    entry.uid = owner;
    entry.gid = owner;
    (entry, payload)
}

/// An image of root's in which nothing is for others.
fn closed_image() -> Image {
    image(&[&[
        with_mode(dir("root"), 0o700, 0),
        with_mode(file("root/key", "secret of the image\n"), 0o000, 0),
        with_mode(dir("srv"), 0o000, 7),
        with_mode(dir("srv/deep"), 0o700, 7),
        with_mode(file("srv/deep/shadow", "shadow of the image\n"), 0o600, 7),
        with_mode(file("run.sh", "#!/bin/sh\necho ran\n"), 0o100, 0),
        with_mode(file("plain.sh", "#!/bin/sh\necho ran\n"), 0o644, 0),
    ]])
}

fn content() -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &closed_image());
    content
}

#[test]
fn everything_can_be_read_in_a_users_own_mount_and_modes_stay_exact() {
    let stage = Stage::new();
    let registry = DemoRegistry::start(content(), Behaviour::default()).unwrap();
    let user = stage.user(ONE);
    user.mount();
    let line = mounted_at(&user.mountpoint).unwrap();
    assert!(
        line.starts_with("registryfs ") && line.contains(" fuse.registryfs ro,nosuid,nodev,noatime,"),
        "{line}"
    );
    assert!(
        line.contains("user_id=1,") && !line.contains("default_permissions"),
        "{line}"
    );

    let rootfs = user.mountpoint.join(registry.host()).join("team/app/1.0/rootfs");
    let modes = user.said("cd \"$1\" && find . -printf '%m %U %p\\n' | sort -k3", &rootfs);
    let expected = "755 0 .\n644 0 ./plain.sh\n700 0 ./root\n0 0 ./root/key\n100 0 ./run.sh\n0 7 ./srv\n700 7 ./srv/deep\n600 7 ./srv/deep/shadow\n";
    assert_eq!(modes, expected);
    assert_eq!(
        user.said("cat \"$1\"", &rootfs.join("root/key")),
        "secret of the image\n"
    );
    user.said("tar -C \"$1\" -cf - . | tar -tf - > /dev/null", &rootfs);
    user.said("cp -r \"$1\" ~/copy && test -s ~/copy/run.sh", &rootfs);
    assert_eq!(user.said("grep -rl image \"$1\" | wc -l", &rootfs), "2\n");
    assert_eq!(
        user.said("cd \"$1/srv/deep\" && pwd -P | grep -c deep", &rootfs),
        "1\n"
    );
    // Root's own access is not part of the bargain: FUSE keeps everybody else out.
    assert!(fs::read_dir(&user.mountpoint).is_err());
    let output = user.umount();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(mounted_at(&user.mountpoint), None);
}

#[test]
fn only_what_has_an_x_is_a_program() {
    let stage = Stage::new();
    let registry = DemoRegistry::start(content(), Behaviour::default()).unwrap();
    let user = stage.user(ONE);
    user.mount();
    let rootfs = user.mountpoint.join(registry.host()).join("team/app/1.0/rootfs");
    assert_eq!(user.said("\"$1/run.sh\"", &rootfs), "ran\n");
    let denied = user.sh("\"$1/plain.sh\"", &rootfs);
    assert!(
        stderr(&denied).contains("Permission denied"),
        "{}",
        stderr(&denied)
    );
    let tested = "for f in run.sh plain.sh root srv root/key; do test -x \"$1/$f\" && echo $f; done; true";
    assert_eq!(user.said(tested, &rootfs), "run.sh\nroot\nsrv\n");
    let tested = "for f in run.sh plain.sh root srv root/key; do test -r \"$1/$f\" || echo $f; test -w \"$1/$f\" && echo $f; done; true";
    assert_eq!(user.said(tested, &rootfs), "");
}

#[test]
fn a_warm_tree_of_a_user_needs_no_request() {
    let stage = Stage::new();
    let registry = DemoRegistry::start(content(), Behaviour::default()).unwrap();
    let user = stage.user(ONE);
    user.mount();
    let rootfs = user.mountpoint.join(registry.host()).join("team/app:1.0/rootfs");
    let read = "cat \"$1/srv/deep/shadow\" \"$1/root/key\" \"$1/run.sh\" > /dev/null && ls -U \"$1/srv\" > /dev/null";
    let requests = || -> serde_json::Value {
        let output = user.run(&["status", "--format", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        status["mounts"][0]["requests"].clone()
    };
    user.said(read, &rootfs);
    let before = requests();
    user.said(read, &rootfs);
    assert_eq!(requests()["read"], before["read"]);
    assert_eq!(requests()["lookup"], before["lookup"]);
    assert_eq!(requests()["access"], before["access"]);
    assert_eq!(requests()["readdirplus"], before["readdirplus"]);
}

#[test]
fn users_and_root_mount_side_by_side() {
    let stage = Stage::new();
    let world = World::new(content()).mounted();
    let users = [stage.user(ONE), stage.user(TWO)];
    for user in &users {
        user.mount();
    }
    for (user, other) in [(&users[0], &users[1]), (&users[1], &users[0])] {
        let key = Path::new(&world.registry.host()).join("team/app/1.0/rootfs/root/key");
        assert_eq!(
            user.said("cat \"$1\"", &user.mountpoint.join(&key)),
            "secret of the image\n"
        );
        assert!(!user.may(&other.mountpoint), "a mount is its user's alone");
        // The caches are apart, and closed.
        assert!(!user.may(&other.store()));
        let mode = fs::metadata(user.store()).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        let status = user.run(&["status", "--format", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        assert_eq!(status["mounts"].as_array().unwrap().len(), 1);
        assert_eq!(status["store"].as_str(), user.store().to_str());
    }
    let others = users[0].run(&["umount", users[1].mountpoint.to_str().unwrap()]);
    assert_ne!(others.status.code(), Some(0));
    assert!(mounted_at(&users[1].mountpoint).is_some());
    assert!(users[0].umount().status.success());
    assert_eq!(names(&world.at("team/app")), ["1.0"], "root's mount goes on");
    assert!(users[1].may(&users[1].mountpoint), "and that of the other user");
}

#[test]
fn the_dead_mount_of_a_user_is_replaced_and_can_be_removed() {
    let stage = Stage::new();
    let registry = DemoRegistry::start(content(), Behaviour::default()).unwrap();
    let user = stage.user(ONE);
    user.mount();
    user.kill_daemon();
    let dead = user.sh("ls \"$1\"", &user.mountpoint);
    assert!(stderr(&dead).contains("not connected"), "{}", stderr(&dead));
    user.mount();
    let key = user
        .mountpoint
        .join(registry.host())
        .join("team/app/1.0/rootfs/root/key");
    assert_eq!(user.said("cat \"$1\"", &key), "secret of the image\n");
    user.kill_daemon();
    let output = user.umount();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(mounted_at(&user.mountpoint), None);
}

#[test]
fn a_busy_mount_of_a_user_says_who_is_busy() {
    let stage = Stage::new();
    let user = stage.user(ONE);
    user.mount();
    let mut sleeper = user.command("sh");
    let mut sleeper = sleeper.args(["-c", "cd \"$1\" && echo in && exec sleep 60", "sh"]);
    sleeper = sleeper.arg(&user.mountpoint).stdout(std::process::Stdio::piped());
    let mut sleeper = sleeper.spawn().unwrap();
    let mut said = [0; 3];
    std::io::Read::read_exact(sleeper.stdout.as_mut().unwrap(), &mut said).unwrap();
    let output = user.umount();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("working directory"),
        "{}",
        stderr(&output)
    );
    assert!(user.umount().status.success());
}

#[test]
fn what_keeps_a_user_from_mounting_is_said_with_the_remedy() {
    let stage = Stage::new();
    let user = stage.user(ONE);
    let empty = stage.dir().join("empty");
    fs::create_dir(&empty).unwrap();
    let said = user.refused_mount(&[], Some(&empty));
    assert!(said.contains("install the package fuse3"), "{said}");

    // A copy is not setuid.
    let copied = Command::new("sh")
        .args([
            "-c",
            "cp --no-preserve=mode \"$(command -v fusermount3)\" \"$1\" && chmod 755 \"$1/fusermount3\"",
            "sh",
        ])
        .arg(&empty)
        .status()
        .unwrap();
    assert!(copied.success());
    fs::set_permissions(&empty, PermissionsExt::from_mode(0o755)).unwrap();
    let said = user.refused_mount(&[], Some(&empty));
    assert!(said.contains("not setuid root"), "{said}");

    let said = user.refused_mount(&["-o", "allow_other"], None);
    assert!(
        said.contains("user_allow_other") && said.contains("leave allow_other out"),
        "{said}"
    );

    let foreign = stage.dir().join("foreign");
    fs::create_dir(&foreign).unwrap();
    let output = user.run(&["mount", foreign.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("directory of your own"),
        "{}",
        stderr(&output)
    );

    stage.replace("/etc/fuse.conf", "mount_max = 0\n");
    let said = user.refused_mount(&[], None);
    assert!(said.contains("higher mount_max"), "{said}");
    fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o600)).unwrap();
    let said = user.refused_mount(&[], None);
    assert!(said.contains("chmod 666 /dev/fuse"), "{said}");
}
