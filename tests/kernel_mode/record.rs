//! What is recorded of reads that the kernel makes: all of them, with what it reads ahead, or nothing, and then it says so.

use std::fs;
use std::path::Path;
use std::process::Output;

use registryfs::demo::Content;
use serde_json::Value;

use crate::ground::{is_erofs, kernel_world, make_local, said};
use crate::support::{dir, file, image};
use crate::world::{World, noise, stderr};

fn world() -> World {
    let mut lower = vec![dir("d/")];
    lower.extend((0..40).map(|number| file(&format!("d/f{number:02}"), noise(50_000, number))));
    let upper = [file("u", noise(200_000, 77))];
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &image(&[&lower, &upper]));
    kernel_world(content, "")
}

fn record(world: &World) -> Output {
    world.run(&["record", &format!("{}/team/app:1.0", world.registry.host())])
}

/// The paths that were recorded.
fn paths(output: &Output) -> Vec<String> {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    let text = std::str::from_utf8(&output.stdout).unwrap();
    let path = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["path"].as_str().unwrap().to_owned()
    };
    text.lines().map(path).collect()
}

fn read(rootfs: &Path, path: &str) {
    fs::read(rootfs.join(path)).unwrap();
}

#[test]
fn what_the_kernel_reads_through_us_is_there_in_its_order() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    assert!(is_erofs(&rootfs));
    let read_in_order = ["d/f30", "u", "d/f02", "d/f17"];
    for path in read_in_order {
        read(&rootfs, path);
    }
    let output = record(&world);
    let mut recorded = paths(&output);
    assert!(!stderr(&output).contains("missing"), "{}", stderr(&output));
    // It may have read ahead into the next files, and no further.
    assert!(recorded.len() < 16, "{recorded:?}");
    recorded.retain(|path| read_in_order.contains(&path.as_str()));
    assert_eq!(recorded, read_in_order);
    // In sequence most of it is read ahead, and none is missing.
    said(&rootfs, "cat d/* >/dev/null");
    assert_eq!(paths(&record(&world)).len(), 41);
}

#[test]
fn what_the_kernel_reads_without_us_is_said_to_be_unseen() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    make_local(&world, &rootfs);
    read(&rootfs, "d/f30");
    let output = record(&world);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(4), 0));
    let why = stderr(&output);
    assert!(why.contains("0, 1") && why.contains("-o kernel=off"), "{why}");

    // What helps is what it says.
    let place = world.mountpoint("by-fuse");
    let image = format!("{}/team/app:1.0", world.registry.host());
    world.text(&["mount", "-o", "kernel=off", &image, place.to_str().unwrap()]);
    read(&place, "d/f05");
    let output = record(&world);
    assert_eq!(paths(&output), ["d/f05"]);
    assert!(stderr(&output).contains("may be missing"), "{}", stderr(&output));
}
