//! The tree of names as `README.md`, "The tree" has it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use registryfs::demo::{Behaviour, Content, Fault, ImageBuilder, ImageIndex, Scope};
use serde_json::Value;

use crate::support::{dir, file, image, layer, with_tokens};
use crate::world::{World, errno, finish, names, start, stderr};

/// `library/debian` with the tags 11 and 12, and a repository `library/debian/12` below.
fn content() -> (Content, String) {
    let mut content = Content::new();
    let release = |text: &str| image(&[&[dir("etc/"), file("etc/release", text)]]);
    let twelve = content.add_tagged_image("library/debian", "12", &release("12\n"));
    content.add_tagged_image("library/debian", "11", &release("11\n"));
    content.add_tagged_image("library/debian/12", "sub", &release("sub\n"));
    content.add_tagged_image("library/debian/12/rootfs-like", "x", &release("x\n"));
    (content, twelve.to_string())
}

#[test]
fn all_spellings_of_a_reference_show_the_same_image() {
    let (content, digest) = content();
    // EROFS numbers the inodes of an image by itself, alike at each path.
    let world = World::new(content).by_fuse().mounted();
    let spellings = [
        "library/debian/12".to_owned(),
        "library/debian:12".to_owned(),
        format!("library/debian@{digest}"),
        format!("library/debian/{digest}"),
        format!("library/debian:12@{digest}"),
    ];
    let mut dirs = Vec::new();
    let mut files = Vec::new();
    for spelling in &spellings {
        let image = world.at(spelling);
        let release = image.join("rootfs/etc/release");
        assert_eq!(fs::read_to_string(&release).unwrap(), "12\n", "{spelling}");
        assert_eq!(fs::read_to_string(image.join("digest")).unwrap().trim(), digest);
        dirs.push(fs::metadata(image.join("rootfs/etc")).unwrap().ino());
        files.push(fs::metadata(release).unwrap().ino());
    }
    files.dedup();
    assert_eq!(files.len(), 1, "a file is one inode whatever the spelling");
    dirs.sort_unstable();
    dirs.dedup();
    assert_eq!(
        dirs.len(),
        spellings.len(),
        "a directory is one inode for each path"
    );
}

#[test]
fn inode_numbers_outlive_the_daemon() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    let paths = [
        "",
        "/rootfs",
        "/rootfs/etc",
        "/rootfs/etc/release",
        "/manifest.json",
        "/layers/0/fs/etc",
    ];
    let numbers = || {
        let number = |path: &&str| {
            fs::metadata(world.at(&format!("library/debian:12{path}")))
                .unwrap()
                .ino()
        };
        paths.iter().map(number).collect::<Vec<_>>()
    };
    let before = numbers();
    world.restart();
    // Another order of visits must not matter.
    fs::metadata(world.at("library/debian:11/rootfs/etc/release")).unwrap();
    assert_eq!(numbers(), before);
}

#[test]
fn standing_in_one_spelling_survives_a_visit_of_the_other() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    let inside = world.at("library/debian/12/rootfs/etc");
    let other = world.at("library/debian:12/rootfs/etc");
    let script = format!(
        "ls {} >/dev/null && pwd -P && cat release && ls ..",
        other.display()
    );
    let output = finish(start(
        Command::new("sh").args(["-c", &script]).current_dir(&inside),
    ));
    assert!(output.status.success(), "{}", stderr(&output));
    let expected = format!("{}\n12\netc\n", inside.display());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn a_tag_that_is_a_repository_too_is_both() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    let both = world.at("library/debian/12");
    // Listed, it is the image; walked through, it is the repository too; own names belong to the image.
    assert_eq!(
        names(&both),
        ["config.json", "digest", "layers", "manifest.json", "rootfs"]
    );
    assert_eq!(
        fs::read_to_string(both.join("sub/rootfs/etc/release")).unwrap(),
        "sub\n"
    );
    assert_eq!(
        fs::read_to_string(world.at("library/debian/12:sub/rootfs/etc/release")).unwrap(),
        "sub\n"
    );
    assert_eq!(names(&both.join("rootfs")), ["etc"]);
}

#[test]
fn a_mistyped_reference_ends_at_rootfs() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    for wrong in [
        "library/debian/13",
        "library/debain/12",
        "library/debian",
        "library",
        "nope/nope",
    ] {
        assert_eq!(
            errno(fs::metadata(world.at(wrong).join("rootfs"))),
            libc::ENOENT,
            "{wrong}"
        );
        assert_eq!(
            errno(fs::metadata(world.at(wrong).join("manifest.json"))),
            libc::ENOENT,
            "{wrong}"
        );
    }
    assert_eq!(errno(fs::metadata(world.at("library/debian:13"))), libc::ENOENT);
    assert_eq!(
        errno(fs::metadata(
            world.at(&format!("library/debian@sha256:{}", "0".repeat(64)))
        )),
        libc::ENOENT
    );
    assert_eq!(
        errno(fs::metadata(world.at("library/debian:12/usr"))),
        libc::ENOENT
    );
    for impossible in [
        "library/Debian:12",
        "library/.git",
        "a b",
        ":12",
        "x:",
        "x@sha256:12",
    ] {
        assert_eq!(
            errno(fs::metadata(world.at(impossible))),
            libc::ENOENT,
            "{impossible}"
        );
    }
    assert!(world.errors().contains("library/debain/12"), "{}", world.errors());
}

#[test]
fn listings_hold_tags_and_repositories_and_fail_where_there_are_none() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    // The catalog tells which repositories there are.
    assert_eq!(names(&world.at("")), ["library"]);
    assert_eq!(names(&world.at("library")), ["debian"]);
    assert_eq!(names(&world.at("library/debian")), ["11", "12"]);
    assert_eq!(
        errno(fs::read_dir(world.at("nope/nope")).and_then(|mut dir| dir.next().unwrap())),
        libc::ENXIO
    );
    let ls = finish(start(Command::new("ls").arg(world.at("library/debain"))));
    assert!(!ls.status.success());
    assert!(
        stderr(&ls).contains("No such device or address"),
        "{}",
        stderr(&ls)
    );
    assert!(world.errors().contains("cannot be listed"), "{}", world.errors());
}

#[test]
fn only_hosts_are_looked_up_at_the_top_and_without_the_network() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    for host in [
        "docker.io",
        "registry.example.invalid",
        "localhost",
        "localhost:1",
        "10.1.2.3:5000",
    ] {
        assert!(fs::metadata(world.root().join(host)).unwrap().is_dir(), "{host}");
    }
    for nothing in [
        "debian",
        "library",
        ".git",
        ".hidden",
        "autorun.inf:x",
        "-x.y",
        "index.docker.io",
    ] {
        assert_eq!(
            errno(fs::metadata(world.root().join(nothing))),
            libc::ENOENT,
            "{nothing}"
        );
    }
    // What was visited is listed, what was only looked up is not.
    fs::metadata(world.at("library/debian/12/rootfs")).unwrap();
    assert_eq!(
        names(&world.root()),
        [".registryfs".to_owned(), world.registry.host()]
    );
}

#[test]
fn allow_and_deny_limit_the_registries() {
    let (content, _) = content();
    let world = World::new(content);
    let allow = format!(
        "allow={},allow=*.example.org,deny=bad.example.org",
        world.registry.host()
    );
    world.mount_with(&["-o", &allow]);
    let host = |name: &str| fs::metadata(world.root().join(name));
    assert!(host(&world.registry.host()).unwrap().is_dir());
    assert!(host("good.example.org").unwrap().is_dir());
    assert_eq!(errno(host("bad.example.org")), libc::EACCES);
    assert_eq!(errno(host("docker.io")), libc::EACCES);
    assert!(world.errors().contains("docker.io"), "{}", world.errors());
}

#[test]
fn a_refused_name_is_absent_and_a_refused_known_repository_says_so() {
    let (content, _) = content();
    let world = World::with(content, with_tokens("user", "secret"), &[]).mounted();
    // Without a password nobody can tell what is there.
    assert_eq!(
        errno(fs::metadata(world.at("library/debian/12/rootfs"))),
        libc::ENOENT
    );
    assert!(world.errors().contains("absent or private"), "{}", world.errors());
    assert_eq!(errno(fs::metadata(world.at("library/debian:12"))), libc::EACCES);

    let (content, _) = self::content();
    let world = World::new(content).mounted();
    assert_eq!(names(&world.at("library/debian")), ["11", "12"]);
    let refusal = Fault::Status {
        status: 403,
        retry_after: None,
    };
    world.handle().inject(Scope::containing("/manifests/"), refusal);
    assert_eq!(
        errno(fs::metadata(world.at("library/debian/12/rootfs"))),
        libc::EACCES
    );
    assert!(world.errors().contains("access denied"), "{}", world.errors());
}

fn check_sized(path: &Path) -> String {
    let file = fs::File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let text = std::io::read_to_string(file).unwrap();
    assert_eq!(text.len() as u64, size, "{}", path.display());
    text
}

#[test]
fn the_mount_says_what_it_is_and_what_failed() {
    let (content, _) = content();
    let world = World::new(content).mounted();
    let state = world.root().join(".registryfs");
    assert_eq!(names(&state), ["errors", "status.json", "version"]);
    let version = format!("registryfs {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(check_sized(&state.join("version")), version);
    assert_eq!(check_sized(&state.join("errors")), "");
    let before: Value = serde_json::from_str(&check_sized(&state.join("status.json"))).unwrap();
    assert_eq!(before["mounts"][0]["mountpoint"], world.root().to_str().unwrap());
    fs::read(world.at("library/debian/12/rootfs/etc/release")).unwrap();
    fs::metadata(world.at("library/debian:13")).unwrap_err();
    // Each lookup is a snapshot of its own, also of one that is still open.
    let old = fs::File::open(state.join("errors")).unwrap();
    let errors = check_sized(&state.join("errors"));
    assert!(errors.contains("library/debian:13"), "{errors}");
    fs::metadata(world.at("library/debian:14")).unwrap_err();
    assert!(check_sized(&state.join("errors")).contains("library/debian:14"));
    assert_eq!(std::io::read_to_string(old).unwrap(), errors);
    let after: Value = serde_json::from_str(&check_sized(&state.join("status.json"))).unwrap();
    assert_eq!(after["transfers"]["layers_indexed"], 1);
}

#[test]
fn each_platform_of_an_index_is_an_image() {
    let of = |architecture: &str| {
        let layers = vec![layer(&[file("arch", architecture)])];
        ImageBuilder::new(layers).architecture(architecture).build()
    };
    let index = ImageIndex::new(vec![of("amd64"), of("arm64")]);
    let mut content = Content::new();
    let digest = content.add_index("team/multi", &index);
    content.tag("team/multi", "1", digest);
    // EROFS numbers the inodes of an image by itself, alike at each path.
    let world = World::with(content, Behaviour::default(), &["--platform", "linux/arm64"])
        .by_fuse()
        .mounted();
    let at = world.at("team/multi/1");
    assert_eq!(
        names(&at),
        [
            "config.json",
            "digest",
            "index.json",
            "layers",
            "manifest.json",
            "platforms",
            "rootfs"
        ]
    );
    assert_eq!(fs::read(at.join("index.json")).unwrap(), index.bytes);
    assert_eq!(
        fs::read_to_string(at.join("digest")).unwrap(),
        format!("{digest}\n")
    );
    assert_eq!(fs::read_to_string(at.join("rootfs/arch")).unwrap(), "arm64");
    assert_eq!(
        fs::read(at.join("manifest.json")).unwrap(),
        index.images[1].manifest
    );
    assert_eq!(names(&at.join("platforms")), ["linux-amd64", "linux-arm64"]);
    let amd64 = at.join("platforms/linux-amd64");
    assert_eq!(
        names(&amd64),
        ["config.json", "digest", "layers", "manifest.json", "rootfs"]
    );
    assert_eq!(fs::read_to_string(amd64.join("rootfs/arch")).unwrap(), "amd64");
    assert_eq!(
        fs::read_to_string(amd64.join("digest")).unwrap(),
        format!("{}\n", index.images[0].digest())
    );
    assert_eq!(
        errno(fs::metadata(at.join("platforms/linux-s390x"))),
        libc::ENOENT
    );
    // Below a platform's own directory its files are those of the mount's choice, its directories are not.
    let ino = |path: &Path| fs::metadata(path).unwrap().ino();
    let arm64 = at.join("platforms/linux-arm64/rootfs");
    assert_ne!(ino(&arm64), ino(&at.join("rootfs")));
    assert_eq!(ino(&arm64.join("arch")), ino(&at.join("rootfs/arch")));
}
