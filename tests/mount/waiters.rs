//! Several who wait for one layer that is being read as a whole: each is on its own.

use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use registryfs::demo::{Behaviour, Content, DemoRegistry, Fault, Image, ImageBuilder, Layer, Scope};
use registryfs::digest::Digest;
use registryfs::layer::entry::Time;

use crate::support::{dir, file};
use crate::users_stage::{ONE, Stage};
use crate::world::{World, errno, finish, noise, pid, start, stderr, until};

const BYTES: usize = 1_500_000;
const ROOT_MTIME: i64 = 1_234_567_890;

/// One layer with a large file, and a root directory like no other.
fn layer() -> Layer {
    let mut root = dir("./");
    root.0.mode = 0o2751;
    root.0.uid = 7;
    root.0.gid = 8;
    root.0.mtime = Time {
        seconds: ROOT_MTIME,
        nanos: 0,
    };
    Layer::tar(&[root, file("data", noise(BYTES, 3)), file("last", "z")]).unwrap()
}

fn content(image: &Image) -> Content {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", image);
    content
}

/// How fast a layer comes that takes so long.
fn within_s(seconds: u64) -> Fault {
    Fault::Throttle(BYTES as u64 / seconds)
}

fn slow_world(layer: Layer, seconds: u64) -> World {
    let scope = Scope::containing(layer.digest().to_string());
    let world = World::new(content(&ImageBuilder::new(vec![layer]).build()))
        // The inode numbers that are compared are those of FUSE.
        .by_fuse()
        .mounted();
    world.handle().inject(scope, within_s(seconds));
    world
}

fn is_passing(world: &World) -> bool {
    world.status()["passes"][0].is_object()
}

/// Lets processes get where they wait: nothing outside of them shows that they are there.
fn let_them_wait() {
    std::thread::sleep(Duration::from_millis(800));
}

fn stat(path: &Path) -> Command {
    let mut command = Command::new("stat");
    command.args(["--format", "%F %a %u %g %Y %i"]).arg(path);
    command
}

fn of(program: &str, path: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg(path);
    command
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The number that a directory lists for a name.
fn listed(dir: &Path, name: &str) -> u64 {
    let mut entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.find(|entry| entry.file_name() == name).unwrap().ino()
}

/// Ends those that wait, in this order, while the pass goes on.
fn end_all(waiting: Vec<Child>, signals: &[Signal]) {
    for (child, signal) in waiting.iter().zip(signals.iter().cycle()) {
        kill(pid(child.id()), *signal).unwrap();
    }
    for child in waiting {
        assert!(!finish(child).status.success());
    }
}

fn each_is_on_its_own(root: &str, reverse: bool) {
    let world = slow_world(layer(), 8);
    let root = world.at(root);
    let number = listed(
        root.parent().unwrap(),
        root.file_name().unwrap().to_str().unwrap(),
    );
    let statting = start(&mut stat(&root));
    let mut waiting: Vec<Child> = [
        of("ls", &root),
        stat(&root),
        of("cat", &root.join("last")),
        of("find", &root),
        of("ls", &root),
        of("cat", &root.join("last")),
    ]
    .iter_mut()
    .map(start)
    .collect();
    let reading = start(&mut of("cat", &root.join("last")));
    until("the pass has begun", || is_passing(&world));
    let_them_wait();
    if reverse {
        waiting.reverse();
    }
    end_all(waiting, &[Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM]);
    assert!(is_passing(&world), "they have waited for the pass");
    assert_eq!(said(&finish(reading)), "z");
    let true_attributes = format!("directory 2751 7 8 {ROOT_MTIME} {number}\n");
    assert_eq!(said(&finish(statting)), true_attributes);
    assert_eq!(said(&finish(start(&mut stat(&root)))), true_attributes);
    assert_eq!(fs::metadata(&root).unwrap().ino(), number);
    assert_eq!(
        listed(
            root.parent().unwrap(),
            root.file_name().unwrap().to_str().unwrap()
        ),
        number
    );
    assert_eq!(
        said(&finish(start(of("ls", &root).arg("-a")))),
        ".\n..\ndata\nlast\n"
    );
    // It is forgotten and found again.
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    assert_eq!(said(&finish(start(&mut stat(&root)))), true_attributes);
}

#[test]
fn who_waits_for_a_rootfs_is_on_its_own() {
    each_is_on_its_own("team/app/1.0/rootfs", false);
}

#[test]
fn who_waits_for_a_layer_is_on_its_own() {
    each_is_on_its_own("team/app:1.0/layers/0/fs", true);
}

#[test]
fn an_error_is_told_to_all_who_waited_and_passes() {
    let honest = layer();
    let mut liar = honest.clone();
    liar.diff_id = Digest::of(b"another tar");
    let world = slow_world(liar, 2);
    let root = world.at("team/app/1.0/rootfs");
    let waiting: Vec<Child> = [of("ls", &root), stat(&root), of("cat", &root.join("last"))]
        .iter_mut()
        .map(start)
        .collect();
    for child in waiting {
        let output = finish(child);
        assert!(!output.status.success());
        assert!(
            stderr(&output).contains("Input/output error"),
            "{}",
            stderr(&output)
        );
    }
    assert!(world.errors().contains("DiffID"), "{}", world.errors());
    assert_eq!(errno(fs::metadata(&root)), libc::EIO);
    // What was known of it does not let anybody in.
    assert_eq!(errno(fs::read_dir(&root)), libc::EIO);
    assert_eq!(errno(fs::read(root.join("last"))), libc::EIO);
    fs::read(world.at("team/app/1.0/config.json")).unwrap();
}

#[test]
fn a_user_who_waits_in_a_mount_of_his_own_is_on_his_own() {
    let stage = Stage::new();
    let layer = layer();
    let scope = Scope::containing(layer.digest().to_string());
    let image = ImageBuilder::new(vec![layer]).build();
    let registry = DemoRegistry::start(content(&image), Behaviour::default()).unwrap();
    registry.handle().inject(scope, within_s(8));
    let user = stage.user(ONE);
    user.mount();
    let root = user.mountpoint.join(registry.host()).join("team/app/1.0/rootfs");
    let is_passing = || {
        let output = user.run(&["status", "--format", "json"]);
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        status["passes"][0].is_object()
    };
    let run = |program: &str, path: &Path| start(user.command(program).arg(path));
    let last = root.join("last");
    let reading = run("cat", &last);
    until("the pass has begun", is_passing);
    let waiting = vec![
        run("cat", &last),
        run("ls", &root),
        run("cat", &last),
        run("stat", &last),
        run("find", &root),
    ];
    let_them_wait();
    end_all(waiting, &[Signal::SIGINT, Signal::SIGKILL]);
    assert!(is_passing(), "they have waited for the pass");
    assert_eq!(said(&finish(reading)), "z");
    assert_eq!(user.said("ls \"$1\"", &root), "data\nlast\n");
}
