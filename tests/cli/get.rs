//! `get`: what a copy has, where it goes, and what it leaves alone.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use registryfs::layer::entry::Kind;

use crate::copies::{IMAGE, content, leftovers, odd_image, picture};
use crate::support::{dir, file, link};
use crate::world::{World, code, errors};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn odd_world() -> World {
    let [lower, upper] = odd_image();
    World::of(content(&[&lower, &upper]))
}

#[test]
fn a_copy_is_what_the_mount_shows_with_a_daemon_and_without() {
    let world = odd_world();
    let image = world.image(IMAGE);
    let (alone, asked) = (world.path("alone"), world.path("asked"));
    let summary = world.text(&["get", "--format=json", &image, ".", "-o", text(&alone)]);
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    for (what, count) in [
        ("directories", 5),
        ("files", 10),
        ("hard_links", 2),
        ("symlinks", 4),
        ("special_files", 3),
        ("failure_count", 0),
    ] {
        assert_eq!(summary[what], count, "{what}: {summary}");
    }

    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let rootfs = mountpoint.join(&image).join("rootfs");
    let expected = picture(&rootfs);
    assert_eq!(expected.len(), 24);
    assert_eq!(picture(&alone), expected);

    // What is there already is replaced; only the destination itself keeps its own attributes from then on.
    assert_eq!(world.text(&["get", &image, "/", "-o", text(&asked)]), "");
    world.text(&["get", &image, ".", "-o", text(&asked)]);
    let below = |mut picture: std::collections::BTreeMap<Vec<u8>, String>| {
        picture.remove(&b""[..]);
        picture
    };
    assert_eq!(below(picture(&asked)), below(expected));

    let holes = fs::metadata(alone.join("holes")).unwrap();
    assert_eq!(holes.size(), 300_000);
    assert!(
        holes.blocks() * 512 <= 8192,
        "zeros take up no space: {}",
        holes.blocks()
    );
}

#[test]
fn nanoseconds_owners_and_capabilities_are_the_image_s() {
    let world = odd_world();
    let copy = world.path("copy");
    world.text(&["get", &world.image(IMAGE), "**", "-o", text(&copy)]);
    let at = |name: &str| fs::symlink_metadata(copy.join(name)).unwrap();
    assert_eq!((at("bin/su").mode() & 0o7777, at("bin/su").gid()), (0o6755, 7));
    assert_eq!((at("sticky").mode() & 0o7777, at("sticky").uid()), (0o1777, 12));
    assert_eq!(at("sticky").mtime(), 1_234_567_890);
    assert_eq!(at("locked").mode() & 0o777, 0o555);
    assert_eq!(
        (at("owned").uid(), at("owned").gid(), at("owned").mtime()),
        (3, 4, 77)
    );
    let capable = crate::copies::xattrs(&copy.join("bin/cap"));
    assert_eq!(capable.len(), 2, "{capable:?}");
    assert_eq!(at("null").rdev(), nix::sys::stat::makedev(1, 3));
}

#[test]
fn patterns_select_and_keep_their_paths() {
    let world = odd_world();
    let image = world.image(IMAGE);
    let cases: &[(&[&str], &[&str])] = &[
        (&["bin/su"], &["bin", "bin/su"]),
        (&["/bin/s?"], &["bin", "bin/su"]),
        (&["sbin/su"], &["bin", "bin/su", "sbin"]),
        (
            &["bin/", "empty"],
            &["bin", "bin/cap", "bin/hard", "bin/su", "empty"],
        ),
        (
            &["**/[hi]*"],
            &["bin", "bin/hard", "holes", "locked", "locked/inside"],
        ),
        (&["absolute"], &["absolute", "data", "data/large"]),
        (&["abs*", "dangling"], &["absolute", "dangling"]),
    ];
    for (number, (patterns, expected)) in cases.iter().enumerate() {
        let copy = world.path(&format!("copy{number}"));
        let directory = format!("{}/", text(&copy));
        let arguments = [&["get", &image, "-o", &directory], *patterns].concat();
        world.text(&arguments);
        let found: Vec<String> = picture(&copy)
            .into_keys()
            .map(|name| String::from_utf8(name).unwrap())
            .filter(|name| !name.is_empty())
            .collect();
        assert_eq!(found, *expected, "{patterns:?}");
    }
}

#[test]
fn a_pattern_that_matches_nothing_is_told_and_the_others_are_got() {
    let world = odd_world();
    let image = world.image(IMAGE);
    let copy = world.path("copy");
    let output = world.run(&["get", &image, "nothing*", "empty", "bin/nope", "-o", text(&copy)]);
    let said = errors(&output);
    assert_eq!(code(&output), 4, "{said}");
    assert!(said.contains("nothing*") && said.contains("bin/nope"), "{said}");
    assert!(copy.join("empty").exists());
    let other = world.path("other");
    let output = world.run(&["get", &image, "bin/su/", "-o", text(&other)]);
    assert_eq!(
        code(&output),
        4,
        "a slash asks for a directory: {}",
        errors(&output)
    );
    assert!(!other.exists(), "nothing is made for nothing");
    for wrong in [vec!["get", &image, "[a"], vec!["get", &image, "empty", "-o", "-"]] {
        assert_eq!(code(&world.run(&wrong)), 2, "{wrong:?}");
    }
}

#[test]
fn one_file_can_be_given_another_name() {
    let world = odd_world();
    let image = world.image(IMAGE);
    let target = world.path("renamed");
    world.text(&["get", &image, "absolute", "-o", text(&target)]);
    assert_eq!(
        fs::metadata(&target).unwrap().len(),
        2_500_000,
        "links are followed to it"
    );
    assert_eq!(fs::metadata(&target).unwrap().nlink(), 1);
    world.text(&["get", &image, "empty", "-o", text(&target)]);
    assert_eq!(fs::metadata(&target).unwrap().len(), 0, "it is replaced");

    // A directory stays one, and a slash makes one.
    let dir = world.path("dir/");
    world.text(&["get", &image, "empty", "-o", &format!("{}/", text(&dir))]);
    world.text(&["get", &image, "replaced", "-o", text(&dir)]);
    assert_eq!(fs::read(dir.join("replaced")).unwrap(), b"new");
    assert!(dir.join("empty").is_file());

    // More than one file needs a directory.
    let output = world.run(&["get", &image, "bin", "-o", text(&target)]);
    assert_eq!(code(&output), 1);
    assert!(errors(&output).contains("renamed"), "{}", errors(&output));
    let output = world.run(&["get", &image, "empty", "-o", text(&world.path("no/such/file"))]);
    assert_eq!(code(&output), 4, "{}", errors(&output));
}

#[test]
fn without_a_destination_it_is_the_working_directory() {
    let world = odd_world();
    let here = world.path("here");
    fs::create_dir(&here).unwrap();
    fs::set_permissions(&here, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let mut command = world.command(&["get", &world.image(IMAGE), "."]);
    let output = command.current_dir(&here).output().unwrap();
    assert_eq!(code(&output), 0, "{}", errors(&output));
    assert!(here.join("data/large").is_file());
    let mode = fs::metadata(&here).unwrap().mode() & 0o777;
    assert_eq!(mode, 0o711, "what was there before keeps its own attributes");
}

#[test]
fn what_is_in_the_way_is_replaced_or_named() {
    let world = odd_world();
    let image = world.image(IMAGE);
    let copy = world.path("copy");
    let outside = world.path("outside");
    fs::create_dir_all(copy.join("replaced/deep")).unwrap();
    fs::create_dir_all(copy.join("empty")).unwrap();
    fs::write(copy.join("sticky"), "a file where a directory goes").unwrap();
    fs::create_dir(&outside).unwrap();
    symlink(&outside, copy.join("data")).unwrap();
    symlink(&outside, copy.join("holes")).unwrap();
    let output = world.run(&["get", &image, ".", "-o", text(&copy)]);
    let said = errors(&output);
    assert_eq!(code(&output), 1, "{said}");
    for name in ["replaced: a directory that is not empty", "sticky", "data/large"] {
        assert!(said.contains(name), "{name}: {said}");
    }
    assert!(copy.join("replaced/deep").is_dir());
    assert!(
        copy.join("empty").is_file(),
        "an empty directory is in nobody's way"
    );
    assert!(copy.join("holes").symlink_metadata().unwrap().is_file());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "no link was followed");
    assert_eq!(
        fs::read(copy.join("locked/inside")).unwrap(),
        b"in here",
        "the rest is there"
    );
    assert_eq!(leftovers(&copy), [""; 0]);
}

#[test]
fn no_image_writes_outside_of_the_destination() {
    let world = World::of(content(&[
        &[
            file("../../escape", "up"),
            file("/absolute", "from the top"),
            link("out", Kind::Symlink, "/tmp"),
            link("up", Kind::Symlink, "../../.."),
            file("out/through", "a link"),
            dir("turns"),
        ],
        &[
            link("turns", Kind::Symlink, "/"),
            file("up/through", "another link"),
            link("hard", Kind::Hardlink, "../../../etc/passwd"),
        ],
    ]));
    let copy = world.path("a/b/copy");
    let before = picture(&world.path(""));
    assert!(!before.is_empty());
    let marker = Path::new("/tmp/through");
    assert!(!marker.exists());
    for _ in 0..2 {
        let output = world.run(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
        assert_eq!(code(&output), 0, "{}", errors(&output));
    }
    assert!(!marker.exists());
    let names: Vec<_> = fs::read_dir(world.path("a")).unwrap().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(fs::read_dir(world.path("a/b")).unwrap().count(), 1);
    assert_eq!(fs::read(copy.join("escape")).unwrap(), b"up", "held at the root");
    assert!(!copy.join("hard").exists());
}

#[test]
fn a_directory_never_goes_through_the_link_of_an_earlier_image() {
    let world = World::of(content(&[&[link("lib", Kind::Symlink, "/tmp")]]));
    let copy = world.path("copy");
    world.text(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    let name = format!("registryfs-{}-escape", std::process::id());
    let next = content(&[&[file(&format!("lib/{name}"), "escaped")]]);
    world.registry.handle().edit(|content| *content = next);
    fs::remove_dir_all(world.store()).unwrap();
    let output = world.run(&["get", &world.image(IMAGE), ".", "-o", text(&copy)]);
    assert_eq!(code(&output), 1, "{}", errors(&output));
    assert!(errors(&output).contains("lib"), "{}", errors(&output));
    assert!(!Path::new("/tmp").join(name).exists());
}

#[test]
fn names_may_be_long_and_odd_and_a_message_stays_on_its_line() {
    let longest = "ä".repeat(127) + "x";
    assert_eq!(longest.len(), 255);
    // With the destination before it, longer than a path can be in one system call.
    let deep = vec!["d".repeat(254); 16].join("/");
    let odd = "od\nd\u{1b}[31m";
    let world = World::of(content(&[&[
        file(&longest, "long"),
        link("l", Kind::Hardlink, &longest),
        file(&format!("{deep}/f"), "deep"),
        file(odd, "odd"),
    ]]));
    let image = world.image(IMAGE);
    let copy = world.path("copy");
    fs::create_dir_all(copy.join(odd).join("in the way")).unwrap();
    let output = world.run(&["get", "--format=json", &image, ".", "-o", text(&copy)]);
    let said = errors(&output);
    assert_eq!((code(&output), said.lines().count()), (1, 1), "{said:?}");
    assert!(said.contains("od?d?[31m: a directory"), "{said:?}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&summary["files"], &summary["hard_links"]),
        (&2.into(), &1.into()),
        "{summary}"
    );
    assert_eq!(fs::read(copy.join(&longest)).unwrap(), b"long");
    let mut dir = fs::File::open(&copy).unwrap();
    for name in deep.split('/') {
        let flags = rustix::fs::OFlags::DIRECTORY;
        dir = rustix::fs::openat(&dir, name, flags, rustix::fs::Mode::empty())
            .unwrap()
            .into();
    }
    assert_eq!(
        rustix::fs::statat(&dir, "f", rustix::fs::AtFlags::empty())
            .unwrap()
            .st_size,
        4
    );
}
