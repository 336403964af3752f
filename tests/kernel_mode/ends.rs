//! How mounts end: by us, by umount(8) in all its ways, by whoever takes an EROFS away, and with the daemon. None is left
//! behind.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

use nix::mount::{MntFlags, umount2};
use registryfs::demo::Content;
use registryfs::store::lock::Lock;

use crate::ground::{Inside, erofs_mounts, is_erofs, kernel_world, make_local, said, superblock, text};
use crate::support::{dir, file, image};
use crate::world::{World, finish, start, stderr, until};

const IMAGES: usize = 6;

fn content() -> Content {
    let mut content = Content::new();
    for number in 0..IMAGES {
        let entries = [dir("etc/"), file("etc/name", format!("image {number}\n"))];
        content.add_tagged_image("team/app", format!("{number}"), &image(&[&entries]));
    }
    content
}

/// A world in which all images were visited, in two spellings each.
fn visited() -> World {
    let world = kernel_world(content(), "");
    for number in 0..IMAGES {
        for spelling in [format!("team/app:{number}"), format!("team/app/{number}")] {
            let name = world.at(&spelling).join("rootfs/etc/name");
            assert_eq!(fs::read_to_string(&name).unwrap(), format!("image {number}\n"));
            assert!(is_erofs(&name));
        }
    }
    assert_eq!(erofs_mounts(&world.root()).len(), 2 * IMAGES);
    world
}

/// Nothing is mounted any more, and nobody holds the store.
fn assert_ended(world: &World) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!table.contains(world.root().to_str().unwrap()), "{table}");
    until("the daemon has ended", || Lock::take(&world.store()).is_ok());
}

fn umount(world: &World) -> Output {
    world.run(&["umount", world.root().to_str().unwrap()])
}

fn system(program: &str, arguments: &[&str]) -> Output {
    finish(start(Command::new(program).args(arguments)))
}

#[test]
fn umount_takes_all_down() {
    let world = visited();
    assert_eq!(umount(&world).status.code(), Some(0));
    assert_ended(&world);
}

#[test]
fn umount_names_who_stands_in_an_image_and_all_goes_on() {
    let world = visited();
    let rootfs = world.at("team/app:2/rootfs");
    let inside = Inside::new(&rootfs.join("etc"), "cat name");
    let refused = umount(&world);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    let said_why = stderr(&refused);
    assert!(said_why.contains(&format!("pid {}", inside.pid())), "{said_why}");
    assert!(said_why.contains("team/app:2/rootfs"), "{said_why}");
    assert!(
        !said_why.contains("a erofs is mounted"),
        "that is ours, and in nobody's way: {said_why}"
    );
    // What was unmounted before it came to that comes again, once the kernel has let its names expire.
    for number in 0..IMAGES {
        let name = world.at(&format!("team/app:{number}/rootfs/etc/name"));
        until("the kernel serves it again", || {
            assert_eq!(fs::read_to_string(&name).unwrap(), format!("image {number}\n"));
            is_erofs(&name)
        });
    }
    assert_eq!(text(&inside.go()), "image 2\n");
    assert_eq!(umount(&world).status.code(), Some(0));
    assert_ended(&world);
}

#[test]
fn an_open_file_keeps_the_mount_busy_too() {
    let world = visited();
    let open = File::open(world.at("team/app:3/rootfs/etc/name")).unwrap();
    let refused = umount(&world);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains(&format!("pid {}", std::process::id())),
        "{}",
        stderr(&refused)
    );
    drop(open);
    assert_eq!(umount(&world).status.code(), Some(0));
    assert_ended(&world);
}

#[test]
fn others_unmount_all_at_once() {
    for arguments in [["-l", "--"], ["-R", "--"]] {
        let world = visited();
        let root = world.root();
        let output = system("umount", &[arguments[0], arguments[1], root.to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_ended(&world);
        // And once more from the beginning.
        world.mount();
        assert!(is_erofs(&world.at("team/app:0/rootfs")));
        world.umount();
        assert_ended(&world);
    }
}

#[test]
fn who_stands_in_an_image_stays_when_the_tree_is_taken_away() {
    let world = kernel_world(content(), "");
    let rootfs = world.at("team/app:1/rootfs");
    make_local(&world, &rootfs);
    let inside = Inside::new(&rootfs, "cat etc/name; ls");
    let output = system("umount", &["-l", world.root().to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(text(&inside.go()), "image 1\netc\n");
    assert_ended(&world);
}

#[test]
fn an_image_that_somebody_unmounts_comes_again() {
    let world = visited();
    let rootfs = world.at("team/app:4/rootfs");
    for flags in [MntFlags::empty(), MntFlags::MNT_DETACH, MntFlags::empty()] {
        // The helper may just be on its last walk there.
        until("nobody is in it", || umount2(&rootfs, flags).is_ok());
        until("it is mounted again at an access", || {
            assert_eq!(fs::read_to_string(rootfs.join("etc/name")).unwrap(), "image 4\n");
            is_erofs(&rootfs)
        });
    }
    assert_eq!(erofs_mounts(&rootfs).len(), 1);
    assert_eq!(umount(&world).status.code(), Some(0));
    assert_ended(&world);
}

#[test]
fn mounts_of_others_in_an_image_are_named_and_left_alone() {
    let world = visited();
    let place = world.at("team/app:5/rootfs/etc");
    nix::mount::mount(
        Some("none"),
        &place,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        None::<&str>,
    )
    .unwrap();
    let refused = umount(&world);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains(place.to_str().unwrap()),
        "{}",
        stderr(&refused)
    );
    umount2(&place, MntFlags::empty()).unwrap();
    assert_eq!(umount(&world).status.code(), Some(0));
    assert_ended(&world);
}

#[test]
fn a_killed_daemon_s_mounts_are_cleared_by_the_next_one() {
    let world = visited();
    let rootfs = world.at("team/app:0/rootfs");
    let old = superblock(&rootfs);
    let inside = Inside::new(&rootfs, "ls; cat etc/nothing 2>/dev/null || echo absent");
    world.kill_daemon();
    world.mount();
    assert_eq!(
        erofs_mounts(&world.root()),
        Vec::<String>::new(),
        "none is mounted before somebody looks"
    );
    assert_eq!(fs::read_to_string(rootfs.join("etc/name")).unwrap(), "image 0\n");
    assert!(is_erofs(&rootfs));
    assert_ne!(
        superblock(&rootfs),
        old,
        "of the dead one's devices none must serve"
    );
    assert_eq!(text(&inside.go()), "etc\nabsent\n");
    assert_eq!(umount(&world).status.code(), Some(0));
    assert_ended(&world);
}

#[test]
fn dead_mounts_are_taken_away_on_request() {
    let world = visited();
    world.kill_daemon();
    let output = world.run(&["umount", "--dead"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(erofs_mounts(&world.root()).is_empty());
}

#[test]
fn an_image_alone_is_mounted_and_unmounted_by_every_command() {
    let world = kernel_world(content(), "");
    let place = world.mountpoint("image");
    let at = place.to_str().unwrap();
    let reference = format!("{}/team/app:3", world.registry.host());
    for command in [["registryfs", "umount"], ["umount", "--"], ["umount", "-l"]] {
        world.text(&["mount", &reference, at]);
        assert!(is_erofs(&place));
        assert_eq!(
            said(&place, "cat etc/name; ls -a; /bin/pwd"),
            format!("image 3\n.\n..\netc\n{at}\n")
        );
        let output = match command {
            ["registryfs", verb] => world.run(&[verb, at]),
            [program, option] => system(program, &[option, at]),
        };
        assert!(output.status.success(), "{}", stderr(&output));
        until("it is gone", || erofs_mounts(&place).is_empty());
        assert!(!is_mounted(&place));
    }
    world.text(&["mount", &reference, at]);
    let inside = Inside::new(&place, "true");
    let refused = world.run(&["umount", at]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains(&format!("pid {}", inside.pid())),
        "{}",
        stderr(&refused)
    );
    text(&inside.go());
    world.text(&["umount", at]);
    world.umount();
    assert_ended(&world);
}

fn is_mounted(place: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.contains(&format!(" {} ", place.display()))
}
