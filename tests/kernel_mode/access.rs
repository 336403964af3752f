//! Every way by which a program comes to a root filesystem for the first time: it lands in EROFS at the first try, and sees
//! no sign of a change.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use registryfs::demo::{Content, ImageBuilder, ImageIndex};

use crate::ground::{erofs_mounts, is_erofs, kernel_world, said, superblock};
use crate::support::{dir, file, image, layer};
use crate::world::{World, names};

/// So many images that each test has a new one for each of its ways.
const IMAGES: usize = 12;

fn content() -> Content {
    let mut content = Content::new();
    for number in 0..IMAGES {
        let entries = [
            dir("etc/"),
            file("etc/name", format!("image {number}\n")),
            file("top", "top"),
        ];
        content.add_tagged_image("team/app", format!("{number}"), &image(&[&entries]));
    }
    content
}

fn open_at(dir: &File, path: &str, flags: i32) -> File {
    let path = Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(path);
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
}

#[test]
fn programs_come_by_every_way() {
    let world = kernel_world(content(), "");
    let image = |number: usize| world.at(&format!("team/app:{number}"));
    let read = |path: PathBuf| fs::read_to_string(path).unwrap();
    assert_eq!(
        read(image(0).join("rootfs/etc/name")),
        "image 0\n",
        "by absolute path"
    );
    assert_eq!(
        said(&image(1), "cat rootfs/etc/name"),
        "image 1\n",
        "by relative path"
    );
    assert_eq!(said(&image(2), "cd rootfs; pwd; ls; cat etc/name"), {
        let rootfs = image(2).join("rootfs");
        format!("{}\netc\ntop\nimage 2\n", rootfs.display())
    });
    assert_eq!(
        said(
            &image(3),
            "cd rootfs/etc; /bin/pwd; cd ..; /bin/pwd; cd ..; cat rootfs/top"
        ),
        {
            let rootfs = image(3).join("rootfs");
            format!("{0}/etc\n{0}\ntop", rootfs.display())
        }
    );
    assert_eq!(
        said(&image(4), "find . -path './rootfs/*' -type f | sort"),
        "./rootfs/etc/name\n./rootfs/top\n"
    );
    assert_eq!(
        said(&image(5), "ls; ls -l >/dev/null; ls rootfs").lines().last(),
        Some("top")
    );
    let open = File::open(image(6)).unwrap();
    assert_eq!(
        read(PathBuf::from(format!(
            "/proc/self/fd/{}/rootfs/etc/name",
            open.as_raw_fd()
        ))),
        "image 6\n"
    );
    // Component by component, as systemd follows paths.
    let open = open_at(
        &open_at(
            &File::open(world.root()).unwrap(),
            &world.registry.host(),
            libc::O_PATH,
        ),
        "team",
        libc::O_PATH,
    );
    let open = open_at(
        &open,
        "app:7",
        libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY,
    );
    let rootfs = open_at(
        &open,
        "rootfs",
        libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY,
    );
    let device = rootfs.metadata().unwrap().dev();
    assert_eq!(device, superblock(&image(7).join("rootfs")));
    assert_ne!(device, open.metadata().unwrap().dev());
    std::os::unix::fs::symlink(image(8).join("rootfs"), world.store().with_file_name("link")).unwrap();
    assert_eq!(
        read(world.store().with_file_name("link/etc/name")),
        "image 8\n",
        "by a link from outside"
    );
    for number in 0..9 {
        let rootfs = image(number).join("rootfs");
        assert!(is_erofs(&rootfs), "image {number}");
        assert!(
            erofs_mounts(&rootfs) == [rootfs.to_str().unwrap()],
            "image {number}"
        );
        assert!(!is_erofs(&image(number)), "image {number}");
        assert!(!is_erofs(&image(number).join("layers/0/fs")), "image {number}");
    }
    // Whoever follows no mounts sees that one begins there.
    assert_eq!(said(&image(0), "find . -xdev -path './rootfs/*'"), "");
}

#[test]
fn many_at_once_find_one_and_the_same() {
    let world = kernel_world(content(), "");
    world
        .handle()
        .update(|behaviour| behaviour.latency = Duration::from_millis(50));
    for number in 0..3 {
        let rootfs = world.at(&format!("team/app:{number}/rootfs"));
        let image = rootfs.parent().unwrap();
        let found: Vec<(u64, String)> = std::thread::scope(|scope| {
            let walkers: Vec<_> = (0..24)
                .map(|walker| {
                    let rootfs = &rootfs;
                    scope.spawn(move || {
                        let said = match walker % 3 {
                            0 => fs::read_to_string(rootfs.join("etc/name")).unwrap(),
                            1 => said(
                                Path::new("/"),
                                &format!("cd '{}'; cat rootfs/etc/name", image.display()),
                            ),
                            _ => said(
                                Path::new("/"),
                                &format!("cat \"$(find '{}/rootfs' -name name)\"", image.display()),
                            ),
                        };
                        (superblock(rootfs), said)
                    })
                })
                .collect();
            walkers.into_iter().map(|walker| walker.join().unwrap()).collect()
        });
        assert!(is_erofs(&rootfs));
        let device = superblock(&rootfs);
        assert!(
            found
                .iter()
                .all(|(at, text)| *at == device && *text == format!("image {number}\n")),
            "{found:?}"
        );
        assert_eq!(erofs_mounts(image).len(), 1);
    }
}

#[test]
fn every_spelling_of_an_image_has_a_mount_and_all_share_a_superblock() {
    let world = kernel_world(content(), "");
    let digest = fs::read_to_string(world.at("team/app:3/digest")).unwrap();
    let digest = digest.trim();
    let spellings = [
        "team/app:3".to_owned(),
        "team/app/3".to_owned(),
        format!("team/app@{digest}"),
        format!("team/app/{digest}"),
    ];
    let places = spellings.map(|spelling| world.at(&spelling).join("rootfs"));
    let devices = places.each_ref().map(|place| superblock(&place.join("etc")));
    assert_eq!(devices, [devices[0]; 4]);
    let mounted = erofs_mounts(&world.root());
    for place in &places {
        assert!(is_erofs(place));
        assert_eq!(fs::read_to_string(place.join("etc/name")).unwrap(), "image 3\n");
        // Each is where it was looked up, also when another one was looked up later.
        assert_eq!(
            said(place, "cd etc; /bin/pwd"),
            format!("{}/etc\n", place.display())
        );
        assert!(
            mounted.contains(&place.to_str().unwrap().to_owned()),
            "{mounted:?}"
        );
    }
    assert_eq!(mounted.len(), 4);
    assert_ne!(
        superblock(&world.at("team/app:4/rootfs")),
        devices[0],
        "another image is another filesystem"
    );
}

#[test]
fn every_platform_of_an_index_has_its_own() {
    let of = |architecture: &str| {
        let layers = vec![layer(&[file("architecture", architecture)])];
        ImageBuilder::new(layers).architecture(architecture).build()
    };
    let mut content = Content::new();
    let index = ImageIndex::new(vec![of("amd64"), of("arm64")]);
    let digest = content.add_index("team/app", &index);
    content.tag("team/app", "1.0", digest);
    let world = kernel_world(content, "");
    let at = world.at("team/app/1.0");
    let arm = at.join("platforms/linux-arm64/rootfs");
    assert_eq!(fs::read_to_string(arm.join("architecture")).unwrap(), "arm64");
    let amd = at.join("platforms/linux-amd64/rootfs");
    assert_eq!(said(amd.parent().unwrap(), "cat rootfs/architecture"), "amd64");
    assert_eq!(
        fs::read_to_string(at.join("rootfs/architecture")).unwrap(),
        "amd64"
    );
    for place in [&arm, &amd, &at.join("rootfs")] {
        assert!(is_erofs(place), "{}", place.display());
    }
    assert_eq!(superblock(&amd), superblock(&at.join("rootfs")));
    assert_ne!(superblock(&amd), superblock(&arm));
    assert_eq!(names(&at.join("platforms")), ["linux-amd64", "linux-arm64"]);
}

#[test]
fn the_hidden_place_of_mounts_is_seen_by_nobody() {
    let world = kernel_world(content(), "");
    let rootfs = world.at("team/app:0/rootfs");
    assert!(is_erofs(&rootfs));
    assert_eq!(
        names(&world.root().join(".registryfs")),
        ["errors", "status.json", "version"]
    );
    assert_eq!(erofs_mounts(&world.root()), [rootfs.to_str().unwrap()]);
    assert!(fs::symlink_metadata(world.root().join(".registryfs/stage-0")).is_err());
}

/// What stands in the tree where EROFS is mounted shows the same, to whoever was in it before.
#[test]
fn a_program_that_was_inside_before_keeps_what_it_has() {
    let world: World = kernel_world(content(), "");
    let rootfs = world.at("team/app:5/rootfs");
    // Where the mount is taken away, the tree underneath is there.
    assert!(is_erofs(&rootfs));
    let open = File::open(rootfs.join("etc/name")).unwrap();
    let below = File::open(&rootfs).unwrap();
    nix::mount::umount2(&rootfs, nix::mount::MntFlags::MNT_DETACH).unwrap();
    assert_eq!(std::io::read_to_string(open).unwrap(), "image 5\n");
    assert_eq!(
        said(
            &PathBuf::from(format!("/proc/self/fd/{}", below.as_raw_fd())),
            "cat etc/name"
        ),
        "image 5\n"
    );
    assert_eq!(fs::read_to_string(rootfs.join("etc/name")).unwrap(), "image 5\n");
    assert_eq!(names(&rootfs), ["etc", "top"]);
}
