//! Converting: what comes out is eStargz that says what went in, the same each time, wherever it goes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use bytes::Bytes;
use registryfs::demo::{
    Account, Auth, Behaviour, Content, Fault, Image, ImageBuilder, ImageIndex, Layer, Scope,
};
use registryfs::digest::Digest;
use registryfs::layer::entry::{Kind, Time};
use registryfs::layer::estargz::writer::Options;
use serde_json::{Value, json};

use crate::converted::{Layout, TOC, entries, gunzip, names, toc};
use crate::copies::noise;
use crate::support::{self, File, dir, file, link, with_tokens};
use crate::world::{self, World, code, errors, finish, start};

const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";

/// A layer with one of each kind of thing.
fn odd() -> Vec<File> {
    let mut large = file("data/large", noise(300_000, 3));
    large.0.mtime = Time {
        seconds: 1_600_000_000,
        nanos: 123_456_789,
    };
    large.0.xattrs = vec![(b"user.note".to_vec(), b"\x00\xff".to_vec())];
    let mut su = file("bin/su", noise(5000, 4));
    (su.0.mode, su.0.uid, su.0.gid) = (0o4755, 3_000_000, 7);
    let mut null = dir("null");
    (null.0.kind, null.0.rdev) = (Kind::Char, (1, 3));
    let long = format!("{}/file", "long".repeat(60));
    vec![
        dir("data/"),
        large,
        link("data/hard", Kind::Hardlink, "data/large"),
        dir("bin/"),
        su,
        link("sbin", Kind::Symlink, "bin"),
        file("empty", ""),
        file(".wh.gone", ""),
        null,
        file(&long, "deep"),
    ]
}

fn tar_of(layer: &Layer) -> Vec<u8> {
    layer.blob().to_vec()
}

fn zstd(entries: &[File]) -> Layer {
    let tar = tar_of(&Layer::tar(entries).unwrap());
    let mut layer = Layer::raw(zstd::encode_all(tar.as_slice(), 3).unwrap(), Digest::of(&tar));
    layer.media_type = Some("application/vnd.oci.image.layer.v1.tar+zstd".to_owned());
    layer
}

fn registry(images: &[(&str, Image)]) -> World {
    let mut content = Content::new();
    for (tag, image) in images {
        content.add_tagged_image("team/app", *tag, image);
    }
    World::of(content)
}

fn image_of(layer: Layer) -> Image {
    ImageBuilder::new(vec![layer]).build()
}

/// Converts `team/app:TAG` to an image of the layout.
fn convert(world: &World, tag: &str, name: &str, options: &[&str]) -> Output {
    let (source, to) = (
        world.image(&format!("team/app:{tag}")),
        Layout::of(world).image(name),
    );
    world.run(&[&["convert", &source, &to], options].concat())
}

fn converted(world: &World, tag: &str, name: &str, options: &[&str]) {
    let output = convert(world, tag, name, options);
    assert_eq!(code(&output), 0, "{}", errors(&output));
}

#[test]
fn every_format_becomes_the_same_estargz() {
    let odd = odd();
    let estargz = |chunk_bytes| {
        let options = Options {
            chunk_bytes,
            ..Options::default()
        };
        Layer::estargz(&odd, options).unwrap()
    };
    let world = registry(&[
        ("gzip", image_of(Layer::gzip(&odd).unwrap())),
        ("members", image_of(Layer::gzip_members(&odd, 70_000).unwrap())),
        ("tar", image_of(Layer::tar(&odd).unwrap())),
        ("zstd", image_of(zstd(&odd))),
        ("small", image_of(estargz(4096))),
        (
            "docker",
            ImageBuilder::new(vec![Layer::gzip(&odd).unwrap()])
                .docker()
                .build(),
        ),
        ("plain", image_of(estargz(4096).without_annotations())),
    ]);
    let layout = Layout::of(&world);
    let tags = ["gzip", "members", "tar", "zstd", "docker", "plain"];
    for tag in tags {
        converted(&world, tag, tag, &[]);
    }
    converted(&world, "small", "small", &["--force"]);
    let expected = &layout.manifest("gzip")["layers"][0];
    assert_eq!(
        expected["mediaType"],
        "application/vnd.oci.image.layer.v1.tar+gzip"
    );
    for tag in tags.iter().chain(&["small"]) {
        assert_eq!(&layout.manifest(tag)["layers"][0], expected, "{tag}");
    }
    assert_eq!(
        layout.names()["docker"]["digest"],
        layout.names()["gzip"]["digest"]
    );

    let (blob, tar) = (layout.layer("gzip", 0), gunzip(&layout.layer("gzip", 0)));
    let of_estargz = [TOC, ".no.prefetch.landmark"];
    let mut found = entries(&tar);
    assert_eq!(found[0].0, ".no.prefetch.landmark");
    found.retain(|(name, _)| !of_estargz.contains(&name.as_str()));
    assert_eq!(found, entries(&tar_of(&Layer::tar(&odd).unwrap())));
    assert_eq!(expected["annotations"][UNCOMPRESSED_SIZE], tar.len().to_string());
    let manifest = layout.manifest("gzip");
    let config = layout.json(&manifest["config"]["digest"]);
    assert_eq!(config["rootfs"]["diff_ids"], json!([Digest::of(&tar)]));
    // Our own reader finds the TOC with the digest that the annotation promises.
    let promised = expected["annotations"][TOC_DIGEST].as_str().unwrap();
    assert!(promised.parse::<Digest>().is_ok());
    assert!(toc(&blob).iter().any(|entry| entry["name"] == "data/large"));
}

#[test]
fn the_documents_change_only_where_they_must() {
    let mut builder = ImageBuilder::new(vec![Layer::gzip(&odd()).unwrap(), Layer::gzip(&[]).unwrap()]);
    builder.config = json!({ "Env": ["A=1"], "x-unknown": { "z": 1, "a": 2 } });
    builder.annotations = BTreeMap::from([
        ("org.example.kept".to_owned(), "1".to_owned()),
        ("com.amazon.soci.index-digest".to_owned(), "sha256:0".to_owned()),
    ]);
    let image = builder.build();
    let world = registry(&[("1", image.clone())]);
    converted(&world, "1", "1", &[]);
    let layout = Layout::of(&world);
    let manifest = layout.manifest("1");
    assert_eq!(manifest["annotations"], json!({ "org.example.kept": "1" }));
    let mut config = layout.json(&manifest["config"]["digest"]);
    let mut expected: Value = serde_json::from_slice(&image.config).unwrap();
    for number in 0..2 {
        let diff_id = json!(Digest::of(&gunzip(&layout.layer("1", number))));
        assert_eq!(config["rootfs"]["diff_ids"][number], diff_id);
    }
    config["rootfs"]["diff_ids"].take();
    expected["rootfs"]["diff_ids"].take();
    assert_eq!(config, expected);
}

#[test]
fn chunks_have_the_size_that_is_asked_for_and_small_files_go_together() {
    let files: Vec<File> = (0..40_u64)
        .map(|number| file(&format!("f{number:02}"), noise(1000, number + 1)))
        .collect();
    let entries = [files, vec![file("large", noise(100_000, 99))]].concat();
    let world = registry(&[("1", image_of(Layer::gzip(&entries).unwrap()))]);
    converted(&world, "1", "default", &[]);
    converted(&world, "1", "small", &["--chunk-size", "16KiB"]);
    converted(&world, "1", "packed", &["--min-chunk-size", "10kB"]);
    converted(&world, "1", "level", &["--compression-level", "0"]);
    let layout = Layout::of(&world);
    let toc_of = |name: &str| toc(&layout.layer(name, 0));
    let chunks = |name: &str| {
        toc_of(name)
            .iter()
            .filter(|entry| entry["name"] == "large")
            .count()
    };
    assert_eq!((chunks("default"), chunks("small")), (1, 7));
    let members = |name: &str| {
        let offsets = toc_of(name)
            .into_iter()
            .filter_map(|entry| entry["offset"].as_u64());
        offsets.collect::<std::collections::BTreeSet<u64>>().len()
    };
    assert_eq!(members("default"), 42);
    assert!(members("packed") < 10, "{}", members("packed"));
    assert!(
        toc_of("packed")
            .iter()
            .any(|entry| entry["innerOffset"].as_u64() > Some(0))
    );
    let size = |name: &str| layout.layer(name, 0).len();
    assert!(size("packed") < size("default") && size("default") < size("level"));
    // Each of them is read by ranges, and is what it was.
    let config = format!("[layout.\"out.local\"]\npath = {:?}\n", layout.0);
    let config = world.file("layouts.toml", &config);
    for name in ["default", "small", "packed", "level"] {
        let image = format!("out.local/out:{name}");
        for path in ["f07", "large"] {
            let read = world.run(&["--config", config.to_str().unwrap(), "cat", &image, path]);
            let expected = entries.iter().find(|(entry, _)| entry.path == path.as_bytes());
            assert_eq!(read.stdout, expected.unwrap().1, "{name}: {}", errors(&read));
        }
    }
}

#[test]
fn files_of_a_profile_come_first_and_missing_ones_are_told() {
    let lower = [
        dir("etc/"),
        file("etc/a", "a"),
        file("etc/b", "b"),
        dir("usr/"),
        file("usr/x", "x"),
    ];
    let upper = [file("only", "1"), file("other", "2")];
    let layers = vec![Layer::gzip(&lower).unwrap(), Layer::gzip(&upper).unwrap()];
    let world = registry(&[("1", ImageBuilder::new(layers).build())]);
    let list = world.file("list", "/usr/x\n\netc/b\nno/such\n");
    let output = convert(&world, "1", "1", &["--profile", list.to_str().unwrap()]);
    assert_eq!(code(&output), 0);
    assert!(
        errors(&output).contains("no layer has the file no/such of the profile"),
        "{}",
        errors(&output)
    );
    let layout = Layout::of(&world);
    assert_eq!(
        names(&layout.layer("1", 0)),
        ["usr/", "usr/x", "etc/", "etc/b", ".prefetch.landmark", "etc/a"]
    );
    assert_eq!(
        names(&layout.layer("1", 1)),
        [".no.prefetch.landmark", "only", "other"]
    );
}

#[test]
fn what_was_read_of_an_image_comes_first_in_its_order() {
    let mut lower = vec![dir("d/")];
    lower.extend((0..9).map(|number| file(&format!("d/f{number}"), noise(9000, number))));
    let mut name = file("", "odd");
    name.0.path = b"d/two\nlines".to_vec();
    lower.push(name);
    let upper = [file("a", "a"), file("u", "u"), link("hard", Kind::Hardlink, "u")];
    let layers = vec![Layer::gzip(&lower).unwrap(), Layer::gzip(&upper).unwrap()];
    let world = registry(&[("1", ImageBuilder::new(layers).build())]);
    let (source, mountpoint) = (world.image("team/app:1"), world.mountpoint("m"));
    let place = mountpoint.to_str().unwrap();
    world.text(&["mount", "-o", "kernel=off", &source, place]);
    for path in ["d/f7", "u", "d/two\nlines", "d/f3", "d/f7"] {
        std::fs::read(mountpoint.join(path)).unwrap();
    }
    let profile = world.path("profile");
    world.text(&["record", &source, "-o", profile.to_str().unwrap()]);
    world.text(&["umount", place]);
    converted(&world, "1", "1", &["--profile", profile.to_str().unwrap()]);
    let layout = Layout::of(&world);
    let first = |number: usize| -> Vec<String> {
        let entries = toc(&layout.layer("1", number)).into_iter();
        let names = entries.filter(|entry| entry["type"] != "chunk");
        let names = names.map(|entry| entry["name"].as_str().unwrap().to_owned());
        names.take_while(|name| name != ".prefetch.landmark").collect()
    };
    assert_eq!(first(0), ["d/", "d/f7", "d/two\nlines", "d/f3"]);
    // A file with two names is known by the first one, which is a link to the other.
    assert_eq!(first(1), ["u", "hard"]);
}

#[test]
fn layers_that_are_what_is_wanted_stay_and_nothing_is_sent_twice() {
    let world = registry(&[("1", support::image(&[&odd(), &[file("b", "b")]]))]);
    let source = world.image("team/app:1");
    let report = |to: &str, options: &[&str]| {
        let to = world.image(to);
        let arguments = [&["--format", "json", "convert", &source, &to], options].concat();
        let report: Value = serde_json::from_str(&world.text(&arguments)).unwrap();
        let layers = report["images"][0]["layers"].as_array().unwrap().clone();
        let ways = layers.iter().map(|layer| {
            let text = |key: &str| layer[key].as_str().unwrap().to_owned();
            format!("{} {}", text("how"), text("stored"))
        });
        ways.collect::<Vec<_>>()
    };
    world.registry.handle().clear_ledger();
    assert_eq!(report("other/app:1", &[]), ["kept mounted", "kept mounted"]);
    let fetched = |method: &str, part: &str| {
        let ledger = world.registry.handle().ledger();
        let wanted = ledger
            .iter()
            .filter(|record| record.method == method && record.path.contains(part));
        wanted.filter(|record| !record.query.contains("mount=")).count()
    };
    // Only the configuration is sent, which is not mounted; it is as it was.
    assert_eq!(fetched("PUT", "/blobs/uploads/"), 1);
    assert_eq!(
        report("other/app:2", &["--force"]),
        ["converted written", "converted written"]
    );
    world.registry.handle().clear_ledger();
    assert_eq!(
        report("other/app:3", &["--force"]),
        ["converted present", "converted present"]
    );
    assert_eq!(fetched("PUT", "/blobs/uploads/"), 0);
    assert_eq!(fetched("PUT", "/manifests/"), 1);
    let digest = |tag: &str| world.text(&["digest", &world.image(tag)]);
    assert_eq!(digest("other/app:2"), digest("other/app:3"));
    // It is read by ranges from where it was pushed.
    let read = world.run(&["cat", &world.image("other/app:3"), "data/hard"]);
    assert_eq!(read.stdout, odd()[1].1, "{}", errors(&read));
}

#[test]
fn who_may_not_push_is_refused_before_anything_is_sent() {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1", &image_of(Layer::gzip(&odd()).unwrap()));
    for behaviour in [
        with_tokens("user", "hunter2"),
        Behaviour {
            auth: Auth::Basic(Account::new("user", "hunter2")),
            ..Behaviour::default()
        },
    ] {
        let world = World::of(content.clone());
        let layout = Layout::of(&world);
        converted(&world, "1", "1", &[]);
        world.registry.handle().update(|now| *now = behaviour.clone());
        let to = world.image("new/app:1");
        let refused = world.run(&["convert", &layout.image("1"), &to]);
        let text = errors(&refused);
        assert_eq!(code(&refused), 3, "{text}");
        assert!(
            text.contains("new/app") && text.contains("no credentials"),
            "{text}"
        );
        let wrong = world.run(&["convert", "--credential", "user:wrong", &layout.image("1"), &to]);
        assert_eq!(code(&wrong), 3, "{}", errors(&wrong));
        let puts = world.registry.handle().ledger();
        assert!(
            puts.iter()
                .all(|record| record.method != "PUT" || record.status == 401)
        );
        let right = ["--credential", "user:hunter2"];
        world.text(&[&["convert"], &right[..], &[&layout.image("1"), &to]].concat());
        let read = world.run(&[&["cat"], &right[..], &[&to, "bin/su"]].concat());
        assert_eq!(read.stdout, odd()[4].1, "{}", errors(&read));
    }
}

#[test]
fn an_upload_goes_on_after_failures() {
    let world = registry(&[("1", image_of(Layer::gzip(&odd()).unwrap()))]);
    let handle = world.registry.handle();
    handle.inject(
        Scope::containing("/blobs/uploads/").method("PUT").next(2),
        Fault::Reset,
    );
    let unavailable = Fault::Status {
        status: 503,
        retry_after: None,
    };
    handle.inject(
        Scope::containing("/blobs/uploads/").method("POST").next(1),
        unavailable,
    );
    handle.inject(
        Scope::containing("/manifests/1").method("PUT").next(1),
        Fault::Reset,
    );
    let (source, to) = (world.image("team/app:1"), world.image("new/app:1"));
    world.text(&["convert", &source, &to]);
    assert_eq!(world.run(&["cat", &to, "bin/su"]).stdout, odd()[4].1);
}

#[test]
fn of_an_index_one_platform_is_converted_or_all() {
    let image = |text: &str, architecture: &str| {
        let layers = vec![
            Layer::gzip(&[file("arch", text)]).unwrap(),
            Layer::gzip(&odd()).unwrap(),
        ];
        ImageBuilder::new(layers).architecture(architecture).build()
    };
    let index = ImageIndex::new(vec![image("amd64", "amd64"), image("arm64", "arm64")]);
    let mut content = Content::new();
    let digest = content.add_index("team/app", &index);
    content.tag("team/app", "1", digest);
    let world = World::of(content);
    converted(&world, "1", "arm", &["--platform", "linux/arm64"]);
    converted(&world, "1", "all", &["--all-platforms"]);
    let layout = Layout::of(&world);
    let names = layout.names();
    assert_eq!(
        names["all"]["mediaType"],
        "application/vnd.oci.image.index.v1+json"
    );
    let all = layout.json(&names["all"]["digest"]);
    assert_eq!(all["manifests"][1]["digest"], names["arm"]["digest"]);
    assert_eq!(all["manifests"][1]["platform"]["architecture"], "arm64");
    let amd64 = layout.json(&all["manifests"][0]["digest"]);
    let tar = gunzip(&layout.blob(&amd64["layers"][0]["digest"]));
    assert!(
        entries(&tar)
            .iter()
            .any(|(_, seen)| seen.contains(&Digest::of(b"amd64").to_string()))
    );
    assert_eq!(amd64["layers"][1], layout.manifest("arm")["layers"][1]);
    let none = convert(&world, "1", "none", &["--platform", "linux/riscv64"]);
    assert_eq!(code(&none), 4, "{}", errors(&none));

    let to = world.image("new/app:all");
    world.text(&["convert", "--all-platforms", &world.image("team/app:1"), &to]);
    let read = world.run(&["cat", "--platform", "linux/arm64", &to, "arch"]);
    assert_eq!(read.stdout, b"arm64", "{}", errors(&read));
}

#[test]
fn what_an_image_does_not_promise_is_not_converted() {
    let layer = Layer::gzip(&odd()).unwrap();
    let other = Layer::raw(layer.blob().clone(), Digest::of(b"another tar"));
    let cut: Bytes = layer.blob().slice(..layer.blob().len() / 2);
    let cut = Layer::raw(cut, layer.diff_id);
    let mut encrypted = layer.clone();
    encrypted.media_type = Some("application/vnd.oci.image.layer.v1.tar+gzip+encrypted".to_owned());
    let raw = {
        let mut raw = file("x", "x");
        raw.0.path = b"raw\xff".to_vec();
        Layer::gzip(&[raw]).unwrap()
    };
    let cases = [
        ("diff", other, 7),
        ("cut", cut, 7),
        ("encrypted", encrypted, 1),
        ("raw", raw, 1),
    ];
    let images: Vec<_> = cases
        .iter()
        .map(|(tag, layer, _)| (*tag, image_of(layer.clone())))
        .collect();
    let world = registry(&images);
    for (tag, _, expected) in &cases {
        let output = convert(&world, tag, tag, &[]);
        assert_eq!(code(&output), *expected, "{tag}: {}", errors(&output));
    }
    let wrong = image_of(layer.clone());
    world.registry.handle().edit(|content| {
        content.add_tagged_image("team/app", "wrong", &wrong);
    });
    let blobs = format!("/blobs/{}", layer.digest());
    world
        .registry
        .handle()
        .inject(Scope::containing(blobs), Fault::FlipByte(2000));
    let output = convert(&world, "wrong", "wrong", &[]);
    assert_eq!(code(&output), 7, "{}", errors(&output));
    let layout = Layout::of(&world);
    assert!(layout.names().is_empty(), "nothing got a name");
}

#[test]
fn an_interruption_leaves_neither_a_name_nor_temporary_files() {
    let world = World::with(Behaviour {
        connection_bytes_per_s: 20_000,
        ..Behaviour::default()
    });
    let image = image_of(Layer::gzip(&odd()).unwrap());
    world.registry.handle().edit(|content| {
        content.add_tagged_image("team/app", "1", &image);
    });
    let temporary = world.path("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let layout = Layout::of(&world);
    let arguments = ["convert", &world.image("team/app:1"), &layout.image("1")];
    let child = start(world.command(&arguments).env("TMPDIR", &temporary));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    let blob = format!("/blobs/{}", image.layers[0].digest());
    world::until("the layer is on its way", || {
        let ledger = world.registry.handle().ledger();
        ledger.iter().any(|record| record.path.contains(&blob))
    });
    std::thread::sleep(Duration::from_millis(100));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(code(&finish(child)), 130);
    let list = |path: &Path| std::fs::read_dir(path).unwrap().count();
    assert_eq!(list(&temporary), 0);
    assert_eq!(list(&layout.0.join("blobs/sha256")), 0);
    assert!(layout.names().is_empty());
}

#[test]
fn what_cannot_be_meant_is_told_before_anything_is_asked() {
    let world = World::new();
    let image = world.image("base/slim:11");
    let digest = format!("{image}@{}", Digest::of(b""));
    let other = world.path("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("file"), "x").unwrap();
    let other = format!("oci:{}", other.display());
    let out = Layout::of(&world).image("x");
    let cases: &[(&[&str], &str)] = &[
        (&[&image, &digest], "name a tag"),
        (&[&image, "oci:"], "oci:PATH"),
        (&["localhost:5000", &out], "is no image"),
        (&[&image, &out, "--chunk-size", "0"], "--chunk-size 0"),
        (&[&image, &out, "--min-chunk-size", "1GiB"], "--min-chunk-size"),
        (
            &[&image, &out, "--compression-level", "10"],
            "--compression-level 10",
        ),
        (&[&image, &out, "--profile", "/nonexistent"], "/nonexistent"),
        (&[&image, &other], "neither empty nor"),
    ];
    for (arguments, word) in cases {
        let output = world.run(&[&["convert"], *arguments].concat());
        let text = errors(&output);
        assert_eq!(code(&output), 2, "{arguments:?}: {text}");
        assert!(text.contains(word), "{arguments:?}: {text}");
    }
    assert!(!world.path("out").exists());
}
