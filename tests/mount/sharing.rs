//! A mount of root's that all users may enter: what they see of registries that nobody configured, and of what came with
//! root's credentials.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use registryfs::demo::{Account, Auth, Behaviour, Content, ImageIndex, Record, TokenAuth};

use crate::support::{file, image};
use crate::users_stage::{ONE, Stage};
use crate::world::{World, finish, names, start, stderr, until};

const CREDENTIAL: &str = "user:hunter2";

/// A registry with an open and a private repository, whose tokens are given to everyone or, also for the open one, only
/// to the account.
fn world(is_open_to_all: bool, options: &[&str]) -> World {
    world_of(content(), is_open_to_all, options)
}

fn content() -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/open", "1.0", &image(&[&[file("a", "open")]]));
    content.add_tagged_image("team/secret", "1.0", &image(&[&[file("a", "secret")]]));
    content.add_tagged_image("team/secret", "2.0", &image(&[&[file("a", "secret 2")]]));
    content.add_tagged_image("lib/other", "1.0", &image(&[&[file("a", "other")]]));
    content
}

fn world_of(content: Content, is_open_to_all: bool, options: &[&str]) -> World {
    let auth = TokenAuth {
        anonymous_pull: is_open_to_all,
        private: vec!["team/secret".to_owned()],
        ..TokenAuth::new(Account::new("user", "hunter2"))
    };
    let behaviour = Behaviour {
        auth: Auth::Token(auth),
        ..Behaviour::default()
    };
    let world = World::with(content, behaviour, options);
    for path in [world.root().parent().unwrap(), world.store().parent().unwrap()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    world
}

/// Mounts with root's credentials, the registry open to all users.
fn mount(world: &World, options: &str) {
    let host = world.registry.host();
    let options = format!("allow={host}{options}");
    let root = world.root();
    let mut mount = world.command(&["mount", "-o", &options, root.to_str().unwrap()]);
    let mounted = finish(start(mount.env("REGISTRYFS_CREDENTIAL", CREDENTIAL)));
    assert!(mounted.status.success(), "{}", stderr(&mounted));
}

fn stranger(script: &str, path: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(path).current_dir("/");
    command.uid(65_534).gid(65_534).stdin(Stdio::null());
    command
}

/// What another user reads, or nothing where permission is denied. The first walk of the path counts: a second one finds
/// what the first has changed.
fn read(path: &Path) -> Option<String> {
    let script = "cat \"$1\" 2>&1 || { test -d \"$1\" && ls \"$1\"; }";
    let output = finish(start(&mut stranger(script, path)));
    let said = String::from_utf8(output.stdout.clone()).unwrap();
    if said.contains("Permission denied") || stderr(&output).contains("Permission denied") {
        return None;
    }
    assert!(output.status.success(), "{said}");
    let listed = said
        .split_once(": Is a directory\n")
        .map(|(_, listed)| listed.to_owned());
    Some(listed.unwrap_or(said))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// Every way to a private image, seen by another user. Whoever looked before makes no difference.
fn assert_closed(world: &World) {
    let digest = fs::read_to_string(world.at("team/secret/1.0/digest")).unwrap();
    let digest = digest.trim();
    for image in [
        "team/secret/1.0",
        "team/secret:1.0",
        &format!("team/secret/{digest}"),
        &format!("team/secret@{digest}"),
    ] {
        let image = world.at(image);
        for below in [
            "",
            "rootfs",
            "rootfs/a",
            "layers/0/fs/a",
            "layers/0/blob",
            "digest",
            "manifest.json",
            "config.json",
        ] {
            assert_eq!(read(&image.join(below)), None, "{}/{below}", image.display());
        }
        until("the kernel knows its mode", || mode(&image) == 0o500);
        assert_eq!(
            fs::read_to_string(image.join("rootfs/a")).unwrap(),
            "secret",
            "root sees all"
        );
        assert_eq!(
            mode(&image.join("rootfs")),
            0o755,
            "what the image says stays exact"
        );
        // Now it is in the kernel's cache.
        assert_eq!(read(&image.join("rootfs/a")), None);
    }
}

fn manifests(records: &[Record]) -> usize {
    records
        .iter()
        .filter(|record| record.path.contains("/manifests/"))
        .count()
}

#[test]
fn what_needed_roots_credentials_is_roots_and_what_is_open_is_for_all() {
    let world = world(true, &[]);
    mount(&world, "");
    // Nobody was there before: another user is the first to look.
    assert_eq!(read(&world.at("team/secret/1.0/rootfs/a")), None);
    assert_eq!(read(&world.at("team/secret:2.0/rootfs/a")), None);
    assert_eq!(read(&world.at("team/open/1.0/rootfs/a")).unwrap(), "open");
    assert_eq!(read(&world.at("team/open:1.0/rootfs/a")).unwrap(), "open");
    assert_closed(&world);
    world.umount();
    mount(&world, "");
    assert_closed(&world);
    assert_eq!(read(&world.at("team/open/1.0/rootfs/a")).unwrap(), "open");
    world.umount();
    // Without a registry to ask, what is in the cache is as private as it was.
    mount(&world, ",offline");
    assert_closed(&world);
    assert_eq!(read(&world.at("team/open:1.0/rootfs/a")).unwrap(), "open");
}

#[test]
fn what_is_open_turns_out_to_be_so_without_a_wait_for_root() {
    let world = world(true, &[]);
    mount(&world, "");
    let open = world.at("team/open:1.0");
    let ((), requests) = world.requests(|| {
        assert_eq!(fs::read_to_string(open.join("rootfs/a")).unwrap(), "open");
        until("the image is known to be open", || mode(&open) == 0o555);
    });
    // Root's, and one without credentials that only asks whether it is there, each with the challenge before.
    assert_eq!(manifests(&requests), 4);
    assert_eq!(read(&open.join("rootfs/a")).unwrap(), "open");
    // It is asked once.
    world.umount();
    mount(&world, "");
    let (text, requests) = world.requests(|| read(&open.join("rootfs/a")));
    assert_eq!((text.as_deref(), manifests(&requests)), (Some("open"), 0));
}

#[test]
fn a_registry_that_is_only_for_who_is_known_is_roots() {
    let world = world(false, &[]);
    mount(&world, "");
    assert_eq!(read(&world.at("team/open/1.0/rootfs/a")), None);
    assert_closed(&world);
    world.umount();
    mount(&world, ",share_private");
    assert_eq!(read(&world.at("team/open/1.0/rootfs/a")).unwrap(), "open");
    assert_eq!(read(&world.at("team/secret/1.0/rootfs/a")).unwrap(), "secret");
    assert_eq!(read(&world.at("team/secret")).unwrap(), "1.0\n2.0\n");
    world.umount();
    mount(&world, "");
    assert_closed(&world);
}

#[test]
fn an_image_mounted_alone_is_for_all_only_if_it_is_open() {
    let world = world(true, &[]);
    let mountpoint = world.mountpoint("image");
    for (name, options, is_shared) in [
        ("team/open:1.0", "ro", true),
        ("team/secret:1.0", "ro", false),
        ("team/secret:1.0", "share_private", true),
    ] {
        let reference = format!("{}/{name}", world.registry.host());
        let place = mountpoint.to_str().unwrap();
        let mut mount = world.command(&["mount", "-o", options, &reference, place]);
        let mounted = finish(start(mount.env("REGISTRYFS_CREDENTIAL", CREDENTIAL)));
        assert!(mounted.status.success(), "{}", stderr(&mounted));
        assert_eq!(
            read(&mountpoint.join("a")).is_some(),
            is_shared,
            "{name} {options}"
        );
        assert!(fs::read_to_string(mountpoint.join("a")).is_ok());
        world.text(&["umount", place]);
    }
}

#[test]
fn what_is_open_in_one_repository_is_private_in_another_and_so_are_its_platforms() {
    let mut content = content();
    let secret = image(&[&[file("a", "secret")]]);
    content.add_tagged_image("team/copy", "1.0", &secret);
    let index = ImageIndex::new(vec![secret]);
    for repository in ["team/copy", "team/secret"] {
        let digest = content.add_index(repository, &index);
        content.tag(repository, "index", digest);
    }
    let world = world_of(content, true, &[]);
    mount(&world, "");
    let below = ["rootfs/a", "platforms/linux-amd64/rootfs/a"];
    for image in ["team/copy:index", "team/copy/index"] {
        for below in below {
            assert_eq!(
                read(&world.at(image).join(below)).unwrap(),
                "secret",
                "{image}/{below}"
            );
        }
    }
    assert_eq!(read(&world.at("team/copy:1.0/rootfs/a")).unwrap(), "secret");
    assert_closed(&world);
    for image in ["team/secret:index", "team/secret/index"] {
        for below in below {
            let path = world.at(image).join(below);
            assert_eq!(read(&path), None, "{image}/{below}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "secret");
            assert_eq!(read(&path), None, "{image}/{below}");
        }
    }
}

#[test]
fn of_two_mounts_of_one_daemon_the_one_that_shares_opens_nothing_in_the_other() {
    let world = world(true, &[]);
    let sharing = world.mountpoint("sharing");
    let place = sharing.to_str().unwrap();
    let options = format!("share_private,allow={}", world.registry.host());
    let mut command = world.command(&["mount", "-o", &options, place]);
    let mounted = finish(start(command.env("REGISTRYFS_CREDENTIAL", CREDENTIAL)));
    assert!(mounted.status.success(), "{}", stderr(&mounted));
    mount(&world, "");
    for image in ["team/secret:1.0", "team/secret/1.0"] {
        let shared = sharing.join(world.registry.host()).join(image);
        assert_eq!(read(&shared.join("rootfs/a")).unwrap(), "secret");
    }
    assert_closed(&world);
    world.text(&["umount", place]);
}

#[test]
fn a_tag_that_moves_to_what_is_private_is_closed() {
    let world = world(true, &[]);
    mount(&world, ",tag_ttl=0");
    let paths = ["team/open/1.0/rootfs/a", "team/open:1.0/rootfs/a"].map(|path| world.at(path));
    for path in &paths {
        assert_eq!(read(path).unwrap(), "open");
    }
    world.handle().update(|behaviour| {
        if let Auth::Token(auth) = &mut behaviour.auth {
            auth.private.push("team/open".to_owned());
        }
    });
    world.handle().expire_tokens();
    world.handle().edit(|content| {
        content.add_tagged_image("team/open", "1.0", &image(&[&[file("a", "new")]]));
    });
    for path in &paths {
        until("root sees the new image", || {
            fs::read_to_string(path).is_ok_and(|text| text == "new")
        });
        assert_eq!(read(path), None, "{}", path.display());
    }
}

#[test]
fn the_key_of_the_configuration_shares_too() {
    let world = world(false, &[]).configured("share_private = true\n");
    mount(&world, "");
    assert_eq!(read(&world.at("team/secret:1.0/rootfs/a")).unwrap(), "secret");
    assert!(read(&world.root().join(".registryfs/errors")).is_some());
}

#[test]
fn a_mount_without_credentials_hides_nothing_and_asks_no_more_than_before() {
    let world = world(true, &[]);
    let options = format!("allow={}", world.registry.host());
    world.mount_with(&["-o", &options]);
    let path = world.at("team/open:1.0/rootfs/a");
    let (text, requests) = world.requests(|| read(&path));
    assert_eq!(text.as_deref(), Some("open"));
    assert_eq!(manifests(&requests), 2, "the challenge, and the manifest");
    assert_eq!(read(&world.at("team/open")).unwrap(), "1.0\n");
    assert_eq!(mode(&world.at("team/open")), 0o555);
    world.umount();
    // After a restart nothing has to be asked to know that: the kernel may keep what it is told.
    world.mount_with(&["-o", &options]);
    assert_eq!(read(&path).as_deref(), Some("open"));
    let getattrs = || {
        world.status()["mounts"][0]["requests"]["getattr"]
            .as_u64()
            .unwrap_or(0)
    };
    let before = getattrs();
    for _ in 0..20 {
        assert_eq!(fs::read_to_string(&path).unwrap(), "open");
    }
    assert!(getattrs() - before < 20, "{} requests", getattrs() - before);
}

#[test]
fn the_first_listing_with_credentials_is_in_nobodys_reach() {
    let world = world(true, &[]);
    mount(&world, "");
    // The kernel has been told of the directory a moment ago, and keeps the listing.
    assert_eq!(names(&world.at("")), ["lib", "team"]);
    assert_eq!(read(&world.at("")), None);
}

#[test]
fn names_that_needed_credentials_are_listed_for_root_alone() {
    let world = world(true, &[]);
    mount(&world, "");
    // Whoever looks first.
    assert_eq!(read(&world.at("team/secret")), None);
    assert_eq!(names(&world.at("team/secret")), ["1.0", "2.0"]);
    assert_eq!(names(&world.at("team")), ["open", "secret"]);
    assert_eq!(names(&world.at("")), ["lib", "team"]);
    let assert_closed = || {
        for closed in ["team/secret", "team/open", "team", ""] {
            assert_eq!(read(&world.at(closed)), None, "{closed}");
            assert_eq!(
                mode(&world.at(closed)),
                0o511,
                "it can be walked through: {closed}"
            );
        }
    };
    assert_closed();
    assert_eq!(read(&world.at("team/open/1.0/rootfs/a")).unwrap(), "open");
    world.umount();
    mount(&world, "");
    assert_closed();
    // The reasons for failures name what failed.
    let _ = fs::read_dir(world.at("team/nothing"));
    for report in ["errors", "status.json"] {
        let report = world.root().join(".registryfs").join(report);
        assert_eq!(read(&report), None);
        assert_eq!(mode(&report), 0o400);
        assert!(fs::read_to_string(&report).is_ok());
    }
    assert!(
        read(&world.root().join(".registryfs/version"))
            .unwrap()
            .starts_with("registryfs")
    );
}

/// Another user who went into a directory before anybody knew what it was.
struct Squatter(Child);

impl Squatter {
    fn new(dir: &Path) -> Self {
        let script = "cd \"$1\" && echo in && read go && { cat rootfs/a; ls; true; }";
        let mut command = stranger(script, dir);
        let mut child = start(command.stdin(Stdio::piped()));
        let mut said = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        Self(child)
    }

    fn look(mut self) -> String {
        std::io::Write::write_all(&mut self.0.stdin.take().unwrap(), b"go\n").unwrap();
        String::from_utf8(finish(self.0).stdout).unwrap()
    }
}

#[test]
fn who_is_in_a_directory_before_it_is_an_image_sees_no_more() {
    let world = world(true, &[]);
    mount(&world, "");
    // The registry is known, so the kernel keeps for a second what it is told of directories.
    assert_eq!(
        fs::read_to_string(world.at("team/open:1.0/rootfs/a")).unwrap(),
        "open"
    );
    let image = world.at("team/secret/1.0");
    let squatters = [Squatter::new(&image), Squatter::new(&image)];
    let [first, second] = squatters;
    assert_eq!(fs::read_to_string(image.join("rootfs/a")).unwrap(), "secret");
    // At once, while the kernel still believes what it was told of the directory, and later.
    assert_eq!(first.look(), "");
    until("the kernel knows better", || mode(&image) == 0o500);
    assert_eq!(second.look(), "");
    assert_eq!(
        fs::read_to_string(image.join("rootfs/a")).unwrap(),
        "secret",
        "root goes on"
    );
}

#[test]
fn registries_that_nobody_configured_are_the_owners_also_from_the_kernels_cache() {
    let open = world(true, &[]);
    let other = world(true, &[]);
    mount(&open, "");
    // The other registry is reached through this mount by root, who is not logged in there.
    let path = open
        .root()
        .join(other.registry.host())
        .join("team/open:1.0/rootfs/a");
    open.umount();
    open.mount_with(&["-o", "allow_other"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "open");
    assert_eq!(read(&path), None);
    assert_eq!(read(path.parent().unwrap()), None);
    assert_eq!(mode(&open.root().join(other.registry.host())), 0o500);
}

#[test]
fn a_user_who_lets_others_in_hides_the_same_and_is_bound_by_modes() {
    let stage = Stage::new();
    stage.replace("/etc/fuse.conf", "user_allow_other\n");
    let world = world(true, &[]);
    let user = stage.user(ONE);
    let options = format!("allow_other,allow={}", world.registry.host());
    let mut mount = user.registryfs(&["mount", "-o", &options, user.mountpoint.to_str().unwrap()]);
    let mounted = finish(start(mount.env("REGISTRYFS_CREDENTIAL", CREDENTIAL)));
    assert!(mounted.status.success(), "{}", stderr(&mounted));
    let at = |path: &str| user.mountpoint.join(world.registry.host()).join(path);
    assert_eq!(user.said("cat \"$1\"", &at("team/secret/1.0/rootfs/a")), "secret");
    assert_eq!(read(&at("team/secret/1.0/rootfs/a")), None);
    assert_eq!(read(&at("team/open/1.0/rootfs/a")).unwrap(), "open");
    assert_eq!(
        fs::read_to_string(at("team/secret/1.0/rootfs/a")).unwrap(),
        "secret",
        "root may"
    );
}
