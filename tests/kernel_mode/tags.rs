//! Tags above a mounted image: they move, vanish, and cannot be asked for.

use std::fs;
use std::time::{Duration, Instant};

use registryfs::demo::{Content, Fault, Image, Scope};

use crate::ground::{Inside, erofs_mounts, is_erofs, kernel_world, superblock, text, until_none_is_left};
use crate::support::{dir, file, image};
use crate::world::{World, errno, noise, until};

/// The time after which a tag is asked for again.
const TAG_TTL: Duration = Duration::from_secs(1);

fn release(name: &str) -> Image {
    let large = (0..4).map(|n| file(&format!("large{n}"), noise(700_000, n + name.len() as u64)));
    let entries: Vec<_> = [dir("etc/"), file("etc/release", name)]
        .into_iter()
        .chain(large)
        .collect();
    image(&[&entries])
}

fn world() -> World {
    let mut content = Content::new();
    content.add_tagged_image("team/app", "1.0", &release("old"));
    kernel_world(content, "tag_ttl_s = 1\nretries = 1\n")
}

/// Looks at a path until tags have been asked for at least twice more.
fn look_for_a_while(mut look: impl FnMut()) {
    let started = Instant::now();
    while started.elapsed() < 3 * TAG_TTL {
        look();
        std::thread::sleep(TAG_TTL / 8);
    }
}

#[test]
fn a_tag_that_moves_is_the_new_image_and_who_stands_in_the_old_one_stays() {
    for spelling in ["team/app:1.0", "team/app/1.0"] {
        let world = world();
        let rootfs = world.at(spelling).join("rootfs");
        let release_file = rootfs.join("etc/release");
        assert_eq!(fs::read_to_string(&release_file).unwrap(), "old");
        let old = superblock(&rootfs);
        let inside = Inside::new(
            &rootfs,
            "ls; cat etc/release; sha256sum < large3; cat etc/nothing 2>&1 || true",
        );
        world
            .handle()
            .edit(|content| content.add_tagged_image("team/app", "1.0", &release("newer")));
        until("the tag is the new image", || {
            fs::read_to_string(&release_file).unwrap() == "newer"
        });
        assert!(is_erofs(&rootfs), "{spelling}");
        assert_ne!(superblock(&rootfs), old);
        // A file that was not read before the tag moved.
        let expected = registryfs::digest::Digest::of(&noise(700_000, 3 + 3)).to_string();
        let (_, hex) = expected.split_once(':').unwrap();
        let seen = text(&inside.go());
        let names = "etc\nlarge0\nlarge1\nlarge2\nlarge3\n";
        assert_eq!(
            seen,
            format!("{names}old{hex}  -\ncat: etc/nothing: No such file or directory\n"),
            "{spelling}"
        );
        until("the old one is gone", || erofs_mounts(&world.root()).len() == 1);
        assert_eq!(fs::read_to_string(&release_file).unwrap(), "newer");
        world.umount();
        assert!(erofs_mounts(&world.root()).is_empty());
    }
}

#[test]
fn an_outage_throws_nobody_out_however_often_tags_are_asked_for() {
    let world = world();
    let rootfs = world.at("team/app/1.0/rootfs");
    // It is cached, so only its name can fail.
    assert_eq!(fs::read_to_string(rootfs.join("etc/release")).unwrap(), "old");
    let device = superblock(&rootfs);
    let mounted = erofs_mounts(&world.root());
    let inside = Inside::new(&rootfs.join("etc"), "/bin/pwd; cat release");
    for outage in 0..3 {
        match outage {
            0 => world.handle().stop(),
            1 => {
                world.handle().restart().unwrap();
                let silence = Fault::Stall {
                    after_bytes: 0,
                    pause: None,
                };
                world.handle().inject(Scope::all(), silence);
            }
            _ => {
                world.handle().clear_faults();
                let broken = Fault::Status {
                    status: 500,
                    retry_after: None,
                };
                world.handle().inject(Scope::all(), broken);
            }
        }
        look_for_a_while(|| {
            assert_eq!(
                fs::read_to_string(rootfs.join("etc/release")).unwrap(),
                "old",
                "outage {outage}"
            );
            assert_eq!(superblock(&rootfs), device, "outage {outage}");
        });
        assert_eq!(erofs_mounts(&world.root()), mounted, "outage {outage}");
    }
    assert_eq!(text(&inside.go()), format!("{}/etc\nold", rootfs.display()));
}

#[test]
fn a_tag_that_stays_keeps_its_mount() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    let device = superblock(&rootfs);
    world.handle().clear_ledger();
    look_for_a_while(|| assert_eq!(superblock(&rootfs), device));
    assert!(
        !world.handle().requests_matching("/manifests/1.0").is_empty(),
        "the tag was not asked for"
    );
    assert_eq!(erofs_mounts(&world.root()).len(), 1);
}

#[test]
fn a_tag_that_is_taken_away_takes_its_mount_with_it() {
    let world = world();
    let rootfs = world.at("team/app:1.0/rootfs");
    assert!(is_erofs(&rootfs));
    let inside = Inside::new(&rootfs, "cat etc/release");
    world.handle().edit(|content| content.untag("team/app", "1.0"));
    until("the tag is gone", || errno(fs::metadata(&rootfs)) == libc::ENOENT);
    until_none_is_left(&world.root());
    assert_eq!(text(&inside.go()), "old");
    world.umount();
}

#[test]
fn what_is_below_a_digest_is_never_asked_for_again() {
    let world = world();
    let digest = release("old").digest();
    let rootfs = world.at(&format!("team/app@{digest}/rootfs"));
    assert!(is_erofs(&rootfs));
    let device = superblock(&rootfs);
    world
        .handle()
        .edit(|content| content.add_tagged_image("team/app", "1.0", &release("newer")));
    let ((), requests) = world.requests(|| look_for_a_while(|| assert_eq!(superblock(&rootfs), device)));
    assert_eq!(requests.len(), 0, "{requests:#?}");
}
