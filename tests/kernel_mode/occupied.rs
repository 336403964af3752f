//! Mountpoints that have a mount of ours already: none is stacked on it, where nobody would find it again.

use std::fs;

use registryfs::demo::Content;

use crate::ground::{erofs_mounts, is_erofs, kernel_world};
use crate::support::{dir, file, image};
use crate::world::stderr;

#[test]
fn an_image_is_mounted_over_no_mount_of_ours_served_or_not() {
    let mut content = Content::new();
    let entries = [dir("etc/"), file("etc/name", "image\n")];
    content.add_tagged_image("team/app", "1", &image(&[&entries]));
    let world = kernel_world(content, "");
    let reference = format!("{}/team/app:1", world.registry.host());
    let place = world.mountpoint("image");
    let at = place.to_str().unwrap();
    world.text(&["mount", &reference, at]);
    world.kill_daemon();

    // What a killed daemon left may still be read by somebody, and cannot be told from what is served.
    let refused = world.run(&["mount", &reference, at]);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    assert!(
        stderr(&refused).contains("unmount it first: registryfs umount"),
        "{}",
        stderr(&refused)
    );
    assert_eq!(erofs_mounts(&place).len(), 1);
    world.text(&["umount", at]);
    assert!(erofs_mounts(&place).is_empty());

    // A dead tree gives way.
    let root = world.root();
    let at = root.to_str().unwrap();
    world.text(&["mount", &reference, at]);
    assert!(is_erofs(&root));
    assert_eq!(fs::read_to_string(root.join("etc/name")).unwrap(), "image\n");
    world.text(&["umount", at]);
    assert!(erofs_mounts(&root).is_empty());
}
