//! Programs in other mount namespaces: those that get what is mounted later (services of systemd, `unshare`), and those that
//! do not (containers).

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use registryfs::demo::Content;

use crate::ground::{erofs_mounts, is_erofs, said};
use crate::support::{dir, file, image};
use crate::world::World;

/// A directory whose mounts go to other namespaces, as everything's do where systemd is.
struct Shared(PathBuf);

impl Shared {
    fn new(dir: &Path) -> Self {
        let shared = Self(dir.to_owned());
        mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        shared
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn world() -> (World, Shared) {
    let mut content = Content::new();
    for number in 0..4 {
        let entries = [dir("etc/"), file("etc/name", format!("image {number}\n"))];
        content.add_tagged_image("team/app", format!("{number}"), &image(&[&entries]));
    }
    let world = World::new(content).configured("kernel = \"require\"\n");
    let shared = Shared::new(world.root().parent().unwrap());
    world.mount();
    (world, shared)
}

/// `f_type` of EROFS and of FUSE (linux/magic.h).
const EROFS: &str = "e0f5e1e2";
const FUSE: &str = "65735546";

/// What is read of `path` in a namespace of its own, and `f_type` of where.
fn read_apart(propagation: &str, path: &Path) -> String {
    let script = format!(
        "unshare --mount --propagation {propagation} sh -ec 'cat \"$0/rootfs/etc/name\"; stat -f -c %t \"$0/rootfs\"' '{}'",
        path.display()
    );
    said(Path::new("/"), &script)
}

#[test]
fn a_namespace_that_gets_mounts_gets_those_of_images_too() {
    let (world, _shared) = world();
    for (number, propagation) in ["shared", "slave"].into_iter().enumerate() {
        let at = world.at(&format!("team/app:{number}"));
        assert_eq!(
            read_apart(propagation, &at),
            format!("image {number}\n{EROFS}\n"),
            "{propagation}: the first to look"
        );
        assert!(is_erofs(&at.join("rootfs")));
        assert_eq!(
            read_apart(propagation, &at),
            format!("image {number}\n{EROFS}\n"),
            "{propagation}: again"
        );
    }
    world.umount();
    assert!(erofs_mounts(&world.root()).is_empty());
}

#[test]
fn a_namespace_that_gets_no_mounts_reads_the_tree_underneath() {
    let (world, _shared) = world();
    let at = world.at("team/app:0");
    // Mounted after its namespace was made, so it cannot be there.
    assert_eq!(read_apart("private", &at), format!("image 0\n{FUSE}\n"));
    assert_eq!(
        fs::read_to_string(at.join("rootfs/etc/name")).unwrap(),
        "image 0\n"
    );
    assert!(is_erofs(&at.join("rootfs")));
    let at = world.at("team/app:1");
    assert!(is_erofs(&at.join("rootfs")));
    assert_eq!(
        read_apart("private", &at),
        format!("image 1\n{EROFS}\n"),
        "mounted before"
    );
}

#[test]
fn a_bind_mount_elsewhere_holds_an_image_and_goes_on() {
    let (world, _shared) = world();
    let rootfs = world.at("team/app:2/rootfs");
    let elsewhere = world.store().with_file_name("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    assert!(is_erofs(&rootfs));
    mount(
        Some(&rootfs),
        &elsewhere,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    nix::mount::umount2(&rootfs, MntFlags::empty()).unwrap();
    assert_eq!(
        fs::read_to_string(elsewhere.join("etc/name")).unwrap(),
        "image 2\n"
    );
    assert_eq!(fs::read_to_string(rootfs.join("etc/name")).unwrap(), "image 2\n");
    umount2(&elsewhere, MntFlags::empty()).unwrap();
    world.umount();
}
