//! Indexes of plain layers that go from machine to machine in a file.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::process::Stdio;

use nix::sys::stat::Mode;
use registryfs::demo::{Content, Image, ImageBuilder, Layer, Record};

use crate::support::file;
use crate::world::{World, finish, names, noise, start, stderr};

fn image() -> Image {
    let base = [file("data", noise(600_000, 1)), file("small", "base")];
    let top = [file("small", "top")];
    ImageBuilder::new(vec![Layer::gzip(&base).unwrap(), Layer::tar(&top).unwrap()]).build()
}

fn world() -> World {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image());
    World::new(content)
}

fn reference(world: &World) -> String {
    format!("{}/team/app:1.0", world.registry.host())
}

/// The indexes of the image, as the command prints them.
fn exported(world: &World) -> Vec<u8> {
    let output = world.run(&["index", "export", &reference(world), "-"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout.len() > 200);
    output.stdout
}

#[test]
fn with_the_indexes_of_another_machine_no_layer_is_read_as_a_whole() {
    let giver = world();
    let indexes = exported(&giver);
    // With a daemon and without one, from a file and from a pipe.
    for is_mounted in [true, false] {
        let world = world();
        if is_mounted {
            world.mount();
        }
        let path = world.mountpoint("..").join("indexes");
        fs::write(&path, &indexes).unwrap();
        let mut import = world.command(&[
            "index",
            "import",
            if is_mounted { "-" } else { path.to_str().unwrap() },
        ]);
        import.stdin(File::open(&path).unwrap());
        let output = finish(start(&mut import));
        assert_eq!(
            output.stdout,
            b"imported 2, 0 were known\n",
            "{}",
            stderr(&output)
        );
        assert_eq!(
            world.text(&["index", "import", path.to_str().unwrap()]),
            "imported 0, 2 were known\n"
        );
        assert!(names(&world.store().join("incoming")).is_empty());
        if !is_mounted {
            world.mount();
        }
        let rootfs = world.at("team/app/1.0/rootfs");
        let ((), requests) = world.requests(|| {
            assert_eq!(names(&rootfs), ["data", "small"]);
            assert_eq!(fs::metadata(rootfs.join("data")).unwrap().len(), 600_000);
        });
        let layers = image().layers;
        let is_layer = |request: &&Record| {
            let mut digests = layers.iter().map(|layer| layer.digest().to_string());
            digests.any(|digest| request.path.contains(&digest))
        };
        assert_eq!(requests.iter().filter(is_layer).count(), 0, "{requests:#?}");
        assert_eq!(fs::read(rootfs.join("small")).unwrap(), b"top");
        assert!(fs::read(rootfs.join("data")).unwrap() == noise(600_000, 1));
    }
}

#[test]
fn an_export_takes_the_place_of_what_is_there() {
    let world = world();
    let expected = exported(&world);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let export = |name: &str| {
        let path = path(name);
        world.run(&["index", "export", &reference(&world), path.to_str().unwrap()])
    };
    // A private file stays private, and a link a link.
    fs::write(path("private"), "old").unwrap();
    fs::set_permissions(path("private"), fs::Permissions::from_mode(0o600)).unwrap();
    symlink("private", path("link")).unwrap();
    assert!(export("link").status.success());
    assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
    assert_eq!(fs::metadata(path("private")).unwrap().mode() & 0o777, 0o600);
    assert!(fs::read(path("private")).unwrap() == expected);
    // What is no file is written to.
    nix::unistd::mkfifo(&path("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
    let mut reader = std::process::Command::new("cat");
    let reader = start(reader.arg(path("pipe")).stdout(Stdio::piped()));
    assert!(export("pipe").status.success());
    assert!(finish(reader).stdout == expected);
    assert!(fs::symlink_metadata(path("pipe")).unwrap().file_type().is_fifo());
    // What fails changes nothing.
    let absent = format!("{}/team/app:2.0", world.registry.host());
    let output = world.run(&["index", "export", &absent, path("private").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(fs::read(path("private")).unwrap() == expected);
    assert_eq!(export("no/such/place").status.code(), Some(1));
    assert_eq!(names(dir.path()), ["link", "pipe", "private"]);
}

#[test]
fn what_is_no_file_of_indexes_is_refused_whole() {
    let giver = world();
    let good = exported(&giver);
    let world = world();
    let mut broken = good.clone();
    let last = broken.len() - 1;
    broken[last] ^= 1;
    for bytes in [
        &b""[..],
        b"nothing of the kind",
        &good[..last],
        &broken,
        &[&good[..], b"x"].concat(),
    ] {
        let mut import = world.command(&["index", "import", "-"]);
        let mut import = start(import.stdin(Stdio::piped()));
        import.stdin.take().unwrap().write_all(bytes).unwrap();
        let output = finish(import);
        assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
        assert!(names(&world.store().join("layers")).is_empty());
    }
    let output = world.run(&["index", "import", "/no/such/file"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("/no/such/file"), "{}", stderr(&output));
    assert!(names(&world.store().join("incoming")).is_empty());
}
