//! `kernel = off | auto | require`: what each means, and how users learn which one serves.

use std::fs;
use std::path::Path;

use registryfs::demo::Content;

use crate::ground::{erofs_mounts, is_erofs};
use crate::support::{dir, file, image};
use crate::world::{World, stderr};

fn content() -> Content {
    let mut content = Content::new();
    content.add_tagged_image(
        "team/app",
        "1.0",
        &image(&[&[dir("etc/"), file("etc/name", "name")]]),
    );
    content
}

fn assert_reads(rootfs: &Path) {
    assert_eq!(fs::read_to_string(rootfs.join("etc/name")).unwrap(), "name");
}

#[test]
fn each_mount_has_its_own_mode() {
    let world = World::new(content());
    let mut devices = Vec::new();
    for (mode, by_erofs) in [("off", false), ("auto", true), ("require", true)] {
        let place = world.mountpoint(mode);
        world.text(&["mount", "-o", &format!("kernel={mode}"), place.to_str().unwrap()]);
        let rootfs = place.join(world.registry.host()).join("team/app:1.0/rootfs");
        assert_reads(&rootfs);
        assert_eq!(is_erofs(&rootfs), by_erofs, "{mode}");
        assert_eq!(erofs_mounts(&place).len(), usize::from(by_erofs), "{mode}");
        devices.push(crate::ground::superblock(&rootfs));
    }
    assert_eq!(
        devices[1], devices[2],
        "one superblock an image, whichever mount it is in"
    );
}

#[test]
fn a_mode_that_is_none_is_refused_by_name() {
    let world = World::new(content());
    let root = world.root();
    let refused = world.run(&["mount", "-o", "kernel=maybe", root.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(2));
    let said = stderr(&refused);
    assert!(said.contains("maybe") && said.contains("require"), "{said}");
}

#[test]
fn users_learn_what_serves() {
    let world = World::new(content())
        .configured("kernel = \"require\"\n")
        .mounted();
    let rootfs = world.at("team/app:1.0/rootfs");
    assert_reads(&rootfs);
    let status = world.text(&["status"]);
    assert!(status.to_lowercase().contains("kernel"), "{status}");
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let info = world.text(&["info", &reference]);
    assert!(info.to_lowercase().contains("kernel"), "{info}");
}

#[test]
fn layers_alone_and_names_are_shown_by_us() {
    let world = World::new(content())
        .configured("kernel = \"require\"\n")
        .mounted();
    let at = world.at("team/app:1.0");
    assert!(!is_erofs(&at.join("layers/0/fs")));
    assert_reads(&at.join("layers/0/fs"));
    assert!(!is_erofs(&at));
    assert_eq!(erofs_mounts(&world.root()).len(), 0, "nobody was in the rootfs");
}

#[test]
fn what_erofs_cannot_say_is_shown_by_us_and_the_reason_is_told() {
    let mut odd = file("odd", "odd");
    // The kernel's own namespaces are stored as numbers, so a name of nothing else is none.
    odd.0.xattrs = vec![(b"user.".to_vec(), b"value".to_vec())];
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&[file("a", "a"), odd]]));
    let world = World::new(content);
    for mode in ["kernel=auto", "kernel=require"] {
        world.mount_with(&["-o", mode]);
        let rootfs = world.at("team/app:1.0/rootfs");
        assert_eq!(fs::read_to_string(rootfs.join("odd")).unwrap(), "odd");
        assert!(!is_erofs(&rootfs), "{mode}");
        assert!(world.errors().contains("EROFS"), "{}", world.errors());
        world.umount();
    }
}
