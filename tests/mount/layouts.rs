//! OCI image layouts on disk: mounted by their path, and as registries that the configuration names.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use registryfs::demo::{Content, Image, ImageBuilder, ImageIndex};
use serde_json::Value;

use crate::layout::{CONTAINERD_NAME, LayoutDir};
use crate::support::{file, image, layer};
use crate::world::{World, errno, names, noise, stderr, until};

/// An image with one file that tells it from others, and one of several chunks.
fn made(id: &str) -> Image {
    image(&[&[file("id", id), file("big", noise(100_000, 3))]])
}

/// A world with an empty layout in a directory of that name.
fn world_with(name: &str) -> (World, LayoutDir) {
    let world = World::new(Content::new());
    let layout = LayoutDir::create(&place(&world, name));
    (world, layout)
}

fn place(world: &World, name: &str) -> PathBuf {
    world
        .store()
        .canonicalize()
        .unwrap_or_else(|_| world.store())
        .with_file_name(name)
}

/// The same with the layout as the registry `images.local`, mounted in the tree.
fn configured(world: World, layout: &LayoutDir, more: &str) -> World {
    let toml = format!("{more}\n[layout.\"images.local\"]\npath = {:?}\n", layout.path());
    world.configured(&toml).mounted()
}

fn id(rootfs: &Path) -> String {
    fs::read_to_string(rootfs.join("id")).unwrap()
}

fn source(layout: &LayoutDir, name: &str) -> String {
    match name {
        "" => format!("oci:{}", layout.path().display()),
        name => format!("oci:{}:{name}", layout.path().display()),
    }
}

fn mount(world: &World, source: &str, name: &str) -> PathBuf {
    let at = world.mountpoint(name);
    world.text(&["mount", source, at.to_str().unwrap()]);
    at
}

#[test]
fn the_only_image_of_a_layout_is_mounted_and_one_of_several_by_its_name() {
    let (world, mut layout) = world_with("app");
    layout.add_named(&made("one"), "v1");
    let only = mount(&world, &source(&layout, ""), "only");
    assert_eq!(names(&only), ["big", "id"]);
    assert_eq!(id(&only), "one");
    assert_eq!(fs::read(only.join("big")).unwrap(), noise(100_000, 3));
    assert_eq!(errno(fs::write(only.join("new"), "")), libc::EROFS);

    layout.add_named(&made("two"), "debian:12");
    let (containerd, digest) = (made("three"), made("three").digest());
    layout.add(
        &containerd,
        &[
            (crate::layout::REF_NAME, "latest"),
            (CONTAINERD_NAME, "ghcr.io/Org/x:latest"),
        ],
    );
    layout.add_named(&made("four"), "not a name");
    for (number, (name, expected)) in [
        ("v1", "one"),
        ("app:v1", "one"),
        ("debian:12", "two"),
        ("latest", "three"),
        (&*digest.to_string(), "three"),
        ("not a name", "four"),
    ]
    .into_iter()
    .enumerate()
    {
        let at = mount(&world, &source(&layout, name), &format!("named{number}"));
        assert_eq!(id(&at), expected, "{name}");
    }
    let at = world.mountpoint("none");
    let output = world.run(&["mount", &source(&layout, "v9"), at.to_str().unwrap()]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("app:v1, debian:12"), "{text}");
    assert!(text.contains(&source(&layout, "v9")), "{text}");

    let status: Value = serde_json::from_str(&world.text(&["status", "--format", "json"])).unwrap();
    let mounts = status["mounts"].as_array().unwrap();
    let mount = mounts
        .iter()
        .find(|mount| mount["mountpoint"] == only.to_str().unwrap())
        .unwrap();
    assert_eq!(mount["source"], source(&layout, ""));
    assert_eq!(mount["digest"], made("one").digest().to_string());
    assert_eq!(
        status["hosts"],
        serde_json::json!([]),
        "nobody was asked over a network"
    );
    assert_eq!(status["transfers"]["requests"], 0);
    assert_eq!(status["transfers"]["fetched_bytes"], 0);
}

#[test]
fn a_layout_of_several_images_is_mounted_as_a_registry() {
    let (world, mut layout) = world_with("My Images");
    layout.add_named(&made("one"), "v1");
    layout.add_named(&made("two"), "debian:12");
    layout.add_named(&made("three"), "docker.io/library/busybox");
    layout.add_named(&made("four"), "localhost:5000/a/b:1");
    let unnamed = made("five");
    layout.add(&unnamed, &[]);
    let at = mount(&world, &source(&layout, ""), "registry");
    assert_eq!(
        names(&at),
        [
            ".registryfs",
            "debian",
            "docker.io",
            "localhost_5000",
            "my-images"
        ]
    );
    let digest = unnamed.digest().to_string();
    assert_eq!(names(&at.join("my-images")), [digest.as_str(), "v1"]);
    for (path, expected) in [
        ("my-images/v1", "one"),
        ("debian:12", "two"),
        ("docker.io/library/busybox/latest", "three"),
        ("localhost_5000/a/b:1", "four"),
    ] {
        assert_eq!(id(&at.join(path).join("rootfs")), expected, "{path}");
    }
    assert_eq!(id(&at.join("my-images").join(&digest).join("rootfs")), "five");
    assert_eq!(errno(fs::metadata(at.join("debian:13"))), libc::ENOENT);
    let errors = fs::read_to_string(at.join(".registryfs/errors")).unwrap();
    let path = layout.path().display().to_string();
    assert!(
        errors.contains(&format!("the layout {path} has no such image")),
        "{errors}"
    );
}

#[test]
fn a_named_layout_is_a_registry_for_tree_and_commands() {
    let (world, mut layout) = world_with("images");
    let two = made("two");
    layout.add_named(&made("one"), "app:1");
    layout.add_named(&two, "app:2");
    let world = configured(world, &layout, "allow = [\"a.example\"]\noffline = true");
    let root = world.root();
    assert_eq!(names(&root), [".registryfs", "a.example", "images.local"]);
    let at = root.join("images.local");
    assert_eq!(names(&at.join("app")), ["1", "2"]);
    assert_eq!(id(&at.join("app/1/rootfs")), "one");
    let two_at = at.join("app:2");
    assert_eq!(fs::read(two_at.join("manifest.json")).unwrap(), two.manifest);
    assert_eq!(fs::read(two_at.join("config.json")).unwrap(), two.config);
    assert_eq!(
        fs::read(two_at.join("layers/0/blob")).unwrap(),
        *two.layers[0].blob()
    );
    let commands = |world: &World| {
        assert_eq!(world.text(&["repos", "images.local"]), "app\n");
        assert_eq!(world.text(&["tags", "images.local/app"]), "1\n2\n");
        assert_eq!(world.text(&["cat", "images.local/app:2", "/id"]), "two");
        assert!(world.text(&["ls", "images.local/app:2"]).contains("big"));
        assert_eq!(
            world.text(&["digest", "images.local/app:2"]),
            format!("{}\n", two.digest())
        );
        assert_eq!(
            world.text(&["manifest", "images.local/app:2"]).as_bytes(),
            &two.manifest[..]
        );
        assert!(world.text(&["info", "images.local/app:2"]).contains("estargz"));
        let absent = world.run(&["ls", "images.local/app:3"]);
        assert_eq!(absent.status.code(), Some(4));
        assert!(
            stderr(&absent).contains(layout.path().to_str().unwrap()),
            "{}",
            stderr(&absent)
        );
    };
    commands(&world);
    let at = mount(&world, "images.local/app:1", "image");
    assert_eq!(id(&at), "one");
    let at = mount(&world, "images.local", "registry");
    assert_eq!(names(&at), [".registryfs", "app"]);
    for mountpoint in [
        world.mountpoint("image"),
        world.mountpoint("registry"),
        world.root(),
    ] {
        world.text(&["umount", mountpoint.to_str().unwrap()]);
    }
    commands(&world);
}

#[test]
fn what_is_written_while_it_is_mounted_is_seen() {
    let (world, mut layout) = world_with("images");
    layout.add_named(&made("one"), "app:1");
    let world = configured(world, &layout, "");
    let at = world.root().join("images.local");
    assert_eq!(id(&at.join("app:1/rootfs")), "one");
    let held = fs::File::open(at.join("app:1/rootfs/id")).unwrap();
    assert_eq!(errno(fs::metadata(at.join("app:3"))), libc::ENOENT);
    layout.clear();
    layout.add_named(&made("two"), "app:1");
    layout.add_named(&made("three"), "app:3");
    until("the new one is found", || at.join("app:3").exists());
    assert_eq!(id(&at.join("app:3/rootfs")), "three");
    until("the tag has moved", || id(&at.join("app:1/rootfs")) == "two");
    assert_eq!(std::io::read_to_string(held).unwrap(), "one");
    // A command asks at once, and so does a new mount.
    layout.clear();
    layout.add_named(&made("four"), "app:1");
    assert_eq!(world.text(&["cat", "images.local/app:1", "id"]), "four");
    assert_eq!(id(&mount(&world, &source(&layout, "app:1"), "image")), "four");
    // A layout may be replaced as a whole.
    fs::rename(layout.path(), layout.path().with_extension("old")).unwrap();
    let gone = world.run(&["tags", "images.local/app"]);
    assert_eq!(gone.status.code(), Some(4), "{}", stderr(&gone));
    let mut layout = LayoutDir::create(layout.path());
    layout.add_named(&made("five"), "app:1");
    assert_eq!(world.text(&["cat", "images.local/app:1", "id"]), "five");
}

#[test]
fn platforms_and_media_types_are_those_of_registries() {
    let (world, mut layout) = world_with("images");
    let of = |architecture: &str| {
        let layer = layer(&[file("id", architecture)]);
        ImageBuilder::new(vec![layer])
            .docker()
            .architecture(architecture)
            .build()
    };
    layout.add_index(&ImageIndex::new(vec![of("arm64"), of("amd64")]), "multi");
    let at = mount(&world, &source(&layout, ""), "image");
    assert_eq!(id(&at), "amd64");
    let arm = world.mountpoint("arm");
    world.text(&[
        "mount",
        "-o",
        "platform=linux/arm64",
        &source(&layout, "multi"),
        arm.to_str().unwrap(),
    ]);
    assert_eq!(id(&arm), "arm64");
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let (world, mut layout) = world_with("images");
    let images: Vec<Image> = ["lie", "short", "gone", "fine", "manifest"].map(made).to_vec();
    for image in &images {
        layout.add_named(image, &format!("app:{}", &image.digest().hex()[..12]));
    }
    let sha512 = format!("sha512:{}", "0".repeat(128));
    layout.describe(
        "application/vnd.oci.image.manifest.v1+json",
        &sha512,
        100,
        &[(crate::layout::REF_NAME, "app:sha512")],
    );
    layout.describe(
        "application/vnd.oci.image.manifest.v1+json",
        "sha256:../../../etc/passwd",
        100,
        &[(crate::layout::REF_NAME, "app:escape")],
    );
    let [lie, short, gone, fine, manifest] = &images[..] else {
        panic!()
    };
    let blob = |image: &Image| layout.blob(&image.layers[0].digest());
    let mut bytes = lie.layers[0].blob().to_vec();
    // All but the table of contents, which is at the end.
    bytes.iter_mut().take(50_000).for_each(|byte| *byte ^= 1);
    fs::write(blob(lie), bytes).unwrap();
    fs::write(blob(short), &short.layers[0].blob()[..1000]).unwrap();
    fs::remove_file(blob(gone)).unwrap();
    fs::write(
        layout.blob(&manifest.digest()),
        vec![b' '; manifest.manifest.len()],
    )
    .unwrap();
    let world = configured(world, &layout, "");
    let failure = |name: &str, code: i32, word: &str| {
        let output = world.run(&["cat", &format!("images.local/app:{name}"), "/id"]);
        assert_eq!(output.status.code(), Some(code), "{name}: {}", stderr(&output));
        assert!(stderr(&output).contains(word), "{name}: {}", stderr(&output));
    };
    let name = |image: &Image| image.digest().hex()[..12].to_owned();
    failure(&name(lie), 7, "images.local/app");
    failure(&name(short), 7, blob(short).to_str().unwrap());
    failure(&name(gone), 7, blob(gone).to_str().unwrap());
    failure(
        &name(manifest),
        7,
        layout.blob(&manifest.digest()).to_str().unwrap(),
    );
    failure("sha512", 1, "sha512");
    failure("escape", 7, "etc/passwd");
    assert_eq!(
        world.text(&["cat", &format!("images.local/app:{}", name(fine)), "/id"]),
        "fine"
    );
    let at = world
        .root()
        .join("images.local")
        .join(format!("app:{}", name(lie)));
    assert_eq!(errno(fs::read(at.join("rootfs/id"))), libc::EIO);
    assert_eq!(errno(fs::read(at.join("layers/0/blob"))), libc::EIO);
}

#[test]
fn a_layout_and_a_mountpoint_do_not_lie_in_each_other() {
    let (world, mut layout) = world_with("images");
    layout.add_named(&made("one"), "app:1");
    let outer = layout.path().parent().unwrap().to_owned();
    let refused = |source: &str, at: &Path, world: &World| {
        let output = world.run(&["mount", source, at.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(
            stderr(&output).contains(layout.path().to_str().unwrap()),
            "{}",
            stderr(&output)
        );
    };
    refused(&source(&layout, ""), layout.path(), &world);
    refused(&source(&layout, ""), &outer, &world);
    let at = mount(&world, &source(&layout, ""), "image");
    refused("none", &outer, &world);
    let inside = format!("oci:{}", at.display());
    let output = world.run(&["mount", &inside, world.mountpoint("other").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(id(&at), "one");
}

#[test]
fn shared_blobs_behind_links_are_read_and_relative_paths_are_the_callers() {
    let (world, mut layout) = world_with("images");
    layout.add_named(&made("one"), "app:1");
    let (blobs, shared) = (
        layout.path().join("blobs"),
        layout.path().with_file_name("shared"),
    );
    fs::rename(&blobs, &shared).unwrap();
    symlink(&shared, &blobs).unwrap();
    let at = world.mountpoint("image");
    let mut command = world.command(&["mount", "oci:images:app:1", at.to_str().unwrap()]);
    let output = crate::world::finish(crate::world::start(
        command.current_dir(layout.path().parent().unwrap()),
    ));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(id(&at), "one");
}

#[test]
fn a_daemon_mounts_the_sources_that_its_configuration_names() {
    let (world, mut layout) = world_with("images");
    layout.add_named(&made("one"), "app:1");
    let (image, registry) = (world.mountpoint("image"), world.mountpoint("registry"));
    let toml = format!(
        "[layout.\"images.local\"]\npath = \"images\"\n\
         [[mount]]\nmountpoint = {image:?}\nsource = \"oci:images:app:1\"\n\
         [[mount]]\nmountpoint = {registry:?}\nsource = \"images.local\"\n"
    );
    let world = world.configured(&toml);
    let mut daemon = crate::world::start(&mut world.command(&["daemon"]));
    until("the mounts answer", || {
        registry.join("app").exists() && image.join("id").exists()
    });
    assert_eq!(id(&image), "one");
    assert_eq!(names(&registry.join("app")), ["1"]);
    nix::sys::signal::kill(crate::world::pid(daemon.id()), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}
