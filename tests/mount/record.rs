//! `record`, and what is made of its profile: what was read, in its order, through a mount that FUSE serves.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use registryfs::demo::{Content, ImageBuilder, Layer, Record};
use registryfs::layer::entry::Kind;
use serde_json::Value;

use crate::support::{File, dir, file, image, layer, link};
use crate::world::{World, finish, first_byte, noise, start, stderr};

const IMAGE: &str = "team/app:1.0";
/// Names that no line-by-line list could have.
const ODD: [&[u8]; 3] = [b"two\nlines", b"{\"path\":\"x\"}", b"na\xffme \xc3\xa4"];

fn odd(name: &[u8], payload: &str) -> File {
    let mut file = file("", payload);
    file.0.path = name.to_vec();
    file
}

fn content() -> Content {
    let mut lower = vec![dir("d/")];
    for number in 0..30 {
        lower.push(file(&format!("d/f{number:02}"), noise(100_000, number + 1)));
    }
    lower.push(file("hidden", "lower"));
    lower.push(file("empty", ""));
    let upper = [
        file("large", noise(300_000, 99)),
        link("hard", Kind::Hardlink, "large"),
        link("soft", Kind::Symlink, "d/f03"),
        file("hidden", "upper"),
    ];
    // No eStargz layer can say the last of these names.
    let odd = Layer::gzip(&ODD.map(|name| odd(name, "odd"))).unwrap();
    let layers = vec![layer(&lower), layer(&upper), odd];
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &ImageBuilder::new(layers).build());
    let other = [dir("d/"), file("d/f11", noise(100_000, 200))];
    content.add_tagged_image("team/app", "2.0", &image(&[&other]));
    content
}

fn world() -> World {
    World::new(content()).by_fuse().mounted()
}

fn name(world: &World) -> String {
    format!("{}/{IMAGE}", world.registry.host())
}

fn record(world: &World, options: &[&str]) -> Vec<u8> {
    let image = name(world);
    world.text_bytes(&[&["record", &image], options].concat())
}

/// The paths and layers in a profile.
fn lines(profile: &[u8]) -> Vec<(String, u64)> {
    let text = std::str::from_utf8(profile).unwrap();
    let line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(
            line["manifestDigest"].as_str().unwrap().starts_with("sha256:"),
            "{line}"
        );
        (
            line["path"].as_str().unwrap().to_owned(),
            line["layerIndex"].as_u64().unwrap(),
        )
    };
    text.lines().map(line).collect()
}

fn kept(world: &World, profile: &[u8]) -> PathBuf {
    let path = world.store().with_file_name("profile");
    fs::write(&path, profile).unwrap();
    path
}

/// What a command says that works on another cache, as on another machine.
fn elsewhere(world: &World, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_registryfs"));
    command
        .arg("--cache-dir")
        .arg(world.store().with_file_name("other"))
        .args(arguments)
        .env_clear()
        .env("HOME", world.store())
        .env("REGISTRYFS_KERNEL", "off")
        .stdin(Stdio::null());
    let output = finish(start(&mut command));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn prefetch(world: &World, profile: &Path, tag: &str) -> Value {
    let image = format!("{}/team/app:{tag}", world.registry.host());
    let profile = profile.to_str().unwrap();
    let said = elsewhere(
        world,
        &["--format=json", "prefetch", "--profile", profile, &image],
    );
    serde_json::from_str(&said).unwrap()
}

#[test]
fn what_was_read_is_told_once_in_the_order_of_the_first_reads() {
    let world = world();
    let rootfs = world.at(IMAGE).join("rootfs");
    for path in [
        "d/f20", "soft", "hard", "hidden", "d/f20", "large", "d/f07", "empty",
    ] {
        fs::read(rootfs.join(path)).unwrap();
    }
    // Neither of these reads what is in a file of the root filesystem.
    fs::metadata(rootfs.join("d/f01")).unwrap();
    fs::read(world.at(IMAGE).join("layers/0/fs/d/f02")).unwrap();
    world.text_bytes(&["cat", &name(&world), "d/f05"]);
    let expected = ["d/f20", "d/f03", "hard", "hidden", "d/f07"];
    let expected: Vec<_> = expected
        .map(str::to_owned)
        .into_iter()
        .zip([0, 0, 1, 1, 0])
        .collect();
    assert_eq!(lines(&record(&world, &[])), expected);

    // Another path to the same image is the same record; it goes on until the daemon ends.
    let digest = world.text(&["digest", &name(&world)]);
    first_byte(
        &world
            .at(&format!("team/app/{}", digest.trim()))
            .join("rootfs/d/f00"),
    );
    assert_eq!(lines(&record(&world, &[])).len(), expected.len() + 1);
    world.restart();
    let output = world.run(&["record", &name(&world)]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(4), 0));
    assert!(
        stderr(&output).contains("no file of it has been read"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn who_reads_neighbours_by_name_has_none_that_he_did_not_read() {
    let world = World::new(content()).by_fuse();
    world.text(&["prefetch", &name(&world)]);
    let world = world.mounted();
    let rootfs = world.at(IMAGE).join("rootfs");
    let read: Vec<_> = (3..13).map(|number| (format!("d/f{number:02}"), 0)).collect();
    for (path, _) in &read {
        fs::read(rootfs.join(path)).unwrap();
        // What is handed to the kernel ahead of a reader is, if at all, soon.
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(lines(&record(&world, &[])), read);
}

#[test]
fn a_record_can_begin_anew_and_be_written_to_a_file() {
    let world = world();
    let rootfs = world.at(IMAGE).join("rootfs");
    first_byte(&rootfs.join("d/f20"));
    let file = world.store().with_file_name("written");
    let said = String::from_utf8(record(&world, &["--restart", "-o", file.to_str().unwrap()])).unwrap();
    assert_eq!(said, "1 files were read\n");
    assert_eq!(lines(&fs::read(&file).unwrap()), [("d/f20".to_owned(), 0)]);
    first_byte(&rootfs.join("d/f21"));
    assert_eq!(lines(&record(&world, &[])), [("d/f21".to_owned(), 0)]);
}

#[test]
fn a_profile_brings_its_files_and_nothing_else_in_its_order() {
    let world = world();
    let rootfs = world.at(IMAGE).join("rootfs");
    // Far from each other, so that none comes because it stands between two.
    let read = ["d/f20", "large", "d/f02", "d/f11"];
    for path in read {
        fs::read(rootfs.join(path)).unwrap();
    }
    for name in ODD {
        fs::read(rootfs.join(std::ffi::OsStr::from_bytes(name))).unwrap();
    }
    let profile = kept(&world, &record(&world, &[]));
    let (summary, _) = world.requests(|| prefetch(&world, &profile, "1.0"));
    let bytes = 3 * 100_000 + 300_000 + 9;
    assert_eq!(summary["files"], 7);
    assert_eq!(summary["cached_bytes"], bytes);
    let fetched = summary["fetched_bytes"].as_u64().unwrap();
    // Noise does not compress, and each chunk of 4 KiB has a header.
    assert!((600_000..630_000).contains(&fetched), "{summary}");
    assert_eq!(summary["missing_files"], 0);
    assert_eq!(prefetch(&world, &profile, "1.0")["fetched_bytes"], 0);

    // All of it is there without the registry, and only that.
    world.umount();
    let (root, image) = (world.root(), name(&world));
    elsewhere(&world, &["--offline", "mount", &image, root.to_str().unwrap()]);
    for path in read {
        assert_eq!(fs::read(root.join(path)).unwrap().len() % 100_000, 0);
    }
    for name in ODD {
        assert_eq!(
            fs::read(root.join(std::ffi::OsStr::from_bytes(name))).unwrap(),
            b"odd"
        );
    }
    let mut byte = [0];
    let absent = fs::File::open(root.join("d/f05"))
        .unwrap()
        .read_exact_at(&mut byte, 0);
    assert!(absent.is_err(), "nobody asked for it");
    elsewhere(&world, &["umount", root.to_str().unwrap()]);
}

#[test]
fn what_another_version_of_the_image_lacks_is_skipped_and_told() {
    let world = world();
    let rootfs = world.at(IMAGE).join("rootfs");
    for path in ["d/f12", "d/f11", "large"] {
        first_byte(&rootfs.join(path));
    }
    let profile = kept(&world, &record(&world, &[]));
    let summary = prefetch(&world, &profile, "2.0");
    assert_eq!(
        (&summary["files"], &summary["missing_files"]),
        (&1.into(), &2.into())
    );
    assert_eq!(summary["missing"], serde_json::json!(["d/f12", "hard"]));
    assert_eq!(summary["cached_bytes"], 100_000);

    // None at all is a mistake.
    let (profile, image) = (
        kept(&world, b"x\ny\n"),
        format!("{}/team/app:2.0", world.registry.host()),
    );
    let output = world.run(&["prefetch", "--profile", profile.to_str().unwrap(), &image]);
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr(&output).contains("does not have y"), "{}", stderr(&output));
}

#[test]
fn a_profile_is_handed_over_by_whatever_path_the_cache_is_known() {
    let world = world();
    std::os::unix::fs::symlink(world.store(), world.store().with_file_name("other")).unwrap();
    let profile = kept(&world, b"d/f05\n");
    assert_eq!(prefetch(&world, &profile, "1.0")["files"], 1);
    first_byte(&world.at(IMAGE).join("rootfs/d/f05"));
    assert_eq!(
        world.status()["transfers"]["misses"],
        0,
        "its daemon has brought it"
    );
}

#[test]
fn steps_of_a_profile_come_one_behind_the_other() {
    let large = |number: u64| file(&format!("f{number}"), noise(5_000_000, number + 1));
    let files: Vec<File> = (0..4).map(large).collect();
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&files]));
    let world = World::new(content);
    // By hand, with a directory in it, which has no content.
    let profile = kept(&world, b"/f3\nf1\n/\n./f0\nf3\n");
    let (summary, requests) = world.requests(|| prefetch(&world, &profile, "1.0"));
    assert_eq!(summary["files"], 3);
    // Each file has chunks of 4 KiB with a header; the TOC stands behind all of them.
    let of_file = |record: &Record| {
        let first = record.range.as_ref()?.strip_prefix("bytes=")?.split('-').next()?;
        let file = (first.parse::<u64>().ok()? + 1_000_000) / 5_030_000;
        (file < 4).then_some((record.started, file))
    };
    let mut started: Vec<_> = requests.iter().filter_map(of_file).collect();
    started.sort_unstable();
    let order: Vec<u64> = started.into_iter().map(|(_, file)| file).collect();
    assert_eq!(order, [3, 1, 0]);
}

#[test]
fn a_profile_that_is_wrong_is_refused_before_anything_is_asked() {
    let world = World::new(content());
    let profile = kept(&world, b"d/f01\n{\"path\":7}\n");
    let (profile, image) = (profile.to_str().unwrap(), name(&world));
    let (refused, requests) = world.requests(|| {
        let prefetch = world.run(&["prefetch", "--profile", profile, &image]);
        [
            prefetch,
            world.run(&["convert", "--profile", profile, &image, "oci:out"]),
        ]
    });
    for output in refused {
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("line 2: "), "{}", stderr(&output));
        assert!(
            stderr(&output).contains("registryfs record"),
            "{}",
            stderr(&output)
        );
    }
    assert_eq!(requests.len(), 0);
    // Nothing is mounted, so nothing was read.
    let output = world.run(&["record", &image]);
    assert_eq!(output.status.code(), Some(4));
    assert!(
        stderr(&output).contains("nothing is mounted"),
        "{}",
        stderr(&output)
    );
}
