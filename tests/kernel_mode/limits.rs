//! Bounds on what is mounted at once: more images than may be, idle ones, and what eviction does to mounted ones.

use std::fs;

use registryfs::demo::Content;

use crate::ground::{Inside, erofs_mounts, is_erofs, kernel_world, make_local, said, superblock, text};
use crate::support::{dir, file, image};
use crate::world::{noise, until};

fn content(images: usize) -> Content {
    let mut content = Content::new();
    for number in 0..images {
        let entries = [dir("etc/"), file("etc/name", format!("image {number}\n"))];
        content.add_tagged_image("team/app", format!("{number}"), &image(&[&entries]));
    }
    content
}

/// Visits so many images while one is stood in all the time, and returns the most mounts at once.
fn visit(images: usize, mounts_max: usize) -> usize {
    let world = kernel_world(content(images), &format!("kernel_mounts_max = {mounts_max}\n"));
    let at = |number: usize| world.at(&format!("team/app:{number}/rootfs"));
    let assert_reads = |number: usize| {
        let read = fs::read_to_string(at(number).join("etc/name"));
        assert_eq!(read.unwrap(), format!("image {number}\n"));
    };
    let inside = Inside::new(&at(0), "cat etc/name; /bin/pwd");
    let device = superblock(&at(0));
    let (mut in_erofs, mut most) = (0, 0);
    for number in 0..images {
        assert_reads(number);
        in_erofs += usize::from(is_erofs(&at(number)));
        most = most.max(erofs_mounts(&world.root()).len());
    }
    assert!(in_erofs > images * 9 / 10, "{in_erofs}");
    until("the surplus is gone", || {
        erofs_mounts(&world.root()).len() <= mounts_max
    });
    // Those that had to go come again.
    for number in (0..images).step_by(60) {
        assert_reads(number);
    }
    assert_eq!(superblock(&at(0)), device);
    assert_eq!(text(&inside.go()), format!("image 0\n{}\n", at(0).display()));
    let daemon = format!("/proc/{}/status", world.daemon());
    let memory = fs::read_to_string(daemon).unwrap();
    let memory = memory.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    eprintln!("{images} images: at most {most} mounts at once, {memory}");
    world.umount();
    assert!(erofs_mounts(&world.root()).is_empty());
    most
}

#[test]
fn hundreds_of_images_are_visited_with_few_mounts() {
    // They are unmounted while others come, so there are more at times.
    let most = visit(300, 16);
    assert!(most < 150, "{most}");
}

#[test]
#[ignore = "takes long: run it after changes of what bounds mounts"]
fn thousands_of_images_are_visited() {
    let most = visit(2000, 256);
    assert!(most < 512, "{most}");
}

#[test]
fn idle_ones_go_and_come_again() {
    let world = kernel_world(content(3), "kernel_idle_s = 1\n");
    let at = |number: usize| world.at(&format!("team/app:{number}/rootfs"));
    for number in 0..3 {
        assert!(is_erofs(&at(number)));
    }
    let inside = Inside::new(&at(1).join("etc"), "cat name");
    let is_left = || erofs_mounts(&world.root()) == [at(1).to_str().unwrap()];
    until("the idle ones are gone", is_left);
    for number in [0, 2, 0] {
        assert_eq!(said(&at(number), "cat etc/name"), format!("image {number}\n"));
        assert!(is_erofs(&at(number)), "image {number}");
    }
    assert_eq!(text(&inside.go()), "image 1\n");
    until("all are gone", || erofs_mounts(&world.root()).is_empty());
    assert_eq!(said(&at(1), "cat etc/name"), "image 1\n");
    world.umount();
}

/// Data of images that are mounted leaves the cache like any other, and readers never see what is left of it.
#[test]
fn eviction_takes_the_data_of_mounted_images_and_no_reader_sees_a_hole() {
    const FILES: u64 = 6;
    let mut content = Content::new();
    let entries: Vec<_> = (0..FILES)
        .map(|n| file(&format!("f{n}"), noise(700_000, n)))
        .collect();
    content.add_tagged_image("team/app", "1.0", &image(&[&entries]));
    let world = kernel_world(content, "");
    let rootfs = world.at("team/app:1.0/rootfs");
    let reference = format!("{}/team/app:1.0", world.registry.host());
    let check = |what: &str| {
        fs::write("/proc/sys/vm/drop_caches", "1\n").unwrap();
        for number in 0..FILES {
            assert!(
                fs::read(rootfs.join(format!("f{number}"))).unwrap() == noise(700_000, number),
                "{what}: f{number}"
            );
        }
    };
    check("through us");
    let inside = Inside::new(&rootfs, "sha256sum f3 | cut -c-64");
    for round in 0..3 {
        // Refused or done, as long as somebody has it.
        world.run(&["cache", "evict", &reference]);
        check(&format!("evicted while it is mounted, {round}"));
    }
    text(&inside.go());
    make_local(&world, &rootfs);
    let inside = Inside::new(&rootfs, "true");
    world.run(&["cache", "evict", &reference]);
    world.run(&["cache", "gc"]);
    check("evicted while it is local");
    text(&inside.go());
    world.run(&["cache", "evict", &reference]);
    check("evicted while nobody is in it");
    world.umount();
}
