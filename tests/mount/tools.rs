//! What users run over mounted images, and who may.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use registryfs::demo::Content;
use registryfs::layer::entry::Kind;

use crate::support::{File, dir, file, image, link};
use crate::world::{World, finish, names, noise, start, stderr};

fn base() -> Vec<File> {
    vec![
        dir("etc/"),
        file("etc/hosts", "127.0.0.1 localhost\n"),
        file("etc/motd", "PermitRootLogin no\n"),
        dir("usr/"),
        dir("usr/bin/"),
        file("usr/bin/tool", noise(200_000, 1)),
        link("usr/bin/alias", Kind::Hardlink, "usr/bin/tool"),
        link("bin", Kind::Symlink, "usr/bin"),
        link("abs", Kind::Symlink, "/etc/hosts"),
    ]
}

/// Two releases with a common base: one file changed, one added, one taken away.
fn content() -> Content {
    let base = base();
    let next = [
        file("etc/motd", "PermitRootLogin yes\n"),
        file("etc/new", "new\n"),
        file("etc/.wh.hosts", ""),
    ];
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.4", &image(&[&base]));
    content.add_tagged_image("team/app", "1.5", &image(&[&base, &next]));
    content
}

fn shell(world: &World, script: &str) -> (Option<i32>, String, String) {
    let mut sh = Command::new("sh");
    sh.args(["-c", script]).current_dir(world.at("team/app"));
    let output = finish(start(sh.env("LC_ALL", "C")));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output.status.code(), text, stderr(&output))
}

#[test]
fn diff_over_two_images_shows_what_differs() {
    let world = World::new(content()).mounted();
    let script = "cd .. && diff -rq --no-dereference app:1.4/rootfs app:1.5/rootfs";
    let (code, text, errors) = shell(&world, script);
    assert_eq!(code, Some(1), "{text}{errors}");
    let differences = [
        "Only in app:1.4/rootfs/etc: hosts\n",
        "Files app:1.4/rootfs/etc/motd and app:1.5/rootfs/etc/motd differ\n",
        "Only in app:1.5/rootfs/etc: new\n",
    ];
    assert_eq!(text, differences.concat());
    assert_eq!(errors, "");
}

#[test]
fn tar_find_grep_and_du_read_a_whole_image() {
    let world = World::new(content()).mounted();
    let copy = world.store().with_file_name("copy");
    fs::create_dir(&copy).unwrap();
    let script = format!(
        "set -e
        tar -C 1.4/rootfs -cf - . | tar -C {copy} -xpf -
        diff -r --no-dereference 1.4/rootfs {copy}
        cmp 1.4/rootfs/usr/bin/tool {copy}/usr/bin/alias
        grep -r PermitRootLogin 1.5/rootfs/etc
        find 1.5/rootfs -type f -links 2 | sort
        cat 1.5/rootfs/bin/tool | wc -c
        test \"$(du -s --apparent-size 1.4/rootfs | cut -f1)\" -gt 190
        cd 1.4/rootfs/usr/bin/../../.. && ls -d rootfs && cd .. && ls -d 1.4",
        copy = copy.display()
    );
    let (code, text, errors) = shell(&world, &script);
    assert_eq!(code, Some(0), "{text}{errors}");
    let expected = "1.5/rootfs/etc/motd:PermitRootLogin yes\n1.5/rootfs/usr/bin/alias\n1.5/rootfs/usr/bin/tool\n200000\nrootfs\n1.4\n";
    assert_eq!(text, expected);
    assert_eq!(errors, "");
    // The archive's reader sees one file with two names.
    let linked = std::os::unix::fs::MetadataExt::nlink(&fs::metadata(copy.join("usr/bin/tool")).unwrap());
    assert_eq!(linked, 2);
}

#[test]
fn a_program_is_mapped_and_run_from_an_image() {
    let shell_bytes = fs::read("/bin/true").unwrap();
    let mut program = file("true", shell_bytes);
    program.0.mode = 0o755;
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&[program]]));
    let world = World::new(content).mounted();
    let output = finish(start(&mut Command::new(world.at("team/app/1.0/rootfs/true"))));
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn other_users_reach_configured_registries_and_what_modes_allow() {
    let mut secret = file("secret", "secret");
    secret.0.mode = 0o600;
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&[file("public", "public"), secret]]));
    let world = World::new(content);
    for path in [
        world.root().parent().unwrap().to_owned(),
        world.store().parent().unwrap().to_owned(),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let host = world.registry.host();
    let cat = |name: &str| {
        let mut cat = Command::new("cat");
        cat.arg(world.at("team/app/1.0/rootfs").join(name))
            .uid(65534)
            .gid(65534);
        finish(start(&mut cat))
    };
    world.mount();
    assert!(
        !cat("public").status.success(),
        "only configured registries are open to all"
    );
    assert_eq!(names(&world.at("team/app/1.0/rootfs")), ["public", "secret"]);
    assert!(
        !cat("public").status.success(),
        "nor when their owner has been there"
    );
    world.umount();
    world.mount_with(&["-o", &format!("allow={host}")]);
    let public = cat("public");
    assert_eq!(public.stdout, b"public", "{}", stderr(&public));
    let secret = cat("secret");
    assert!(
        stderr(&secret).contains("Permission denied"),
        "{}",
        stderr(&secret)
    );
    assert_eq!(
        fs::read_to_string(world.at("team/app/1.0/rootfs/secret")).unwrap(),
        "secret"
    );
}
