//! The cache on disk through crashes, damage and a full disk: never wrong bytes, never a dead daemon.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, umount2};
use registryfs::demo::Content;
use registryfs::store::lock::Lock;

use crate::support::{File, dir, file, image};
use crate::world::{World, finish, names, noise, pid, start, stderr, until};

const FILES: u64 = 6;

fn content() -> Content {
    let mut content = Content::new();
    for (tag, seed) in [("1.0", 10), ("2.0", 20)] {
        let entries: Vec<File> = (0..FILES)
            .map(|n| file(&format!("d/f{n}"), noise(300_000, seed + n)))
            .chain([dir("d/e/")])
            .collect();
        content.add_tagged_image("team/app", tag, &image(&[&entries, &[file("top", tag)]]));
    }
    content
}

/// Reads all of an image; panics for a wrong byte.
fn check(world: &World, tag: &str, seed: u64) {
    let rootfs = world.at(&format!("team/app/{tag}/rootfs"));
    let listed = names(&rootfs.join("d"));
    assert_eq!(listed.len() as u64, FILES + 1, "{listed:?}");
    for n in 0..FILES {
        let bytes = fs::read(rootfs.join(format!("d/f{n}")));
        let bytes = bytes.unwrap_or_else(|error| panic!("{tag} f{n}: {error}: {}", world.errors()));
        assert!(bytes == noise(300_000, seed + n), "{tag} f{n}");
    }
    assert_eq!(fs::read_to_string(rootfs.join("top")).unwrap(), tag);
}

#[test]
fn a_killed_daemon_loses_nothing_and_its_mount_is_replaced() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    world.kill_daemon();
    let dead = fs::metadata(world.at("never-seen")).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(libc::ENOTCONN));
    let ((), requests) = world.requests(|| {
        world.mount();
        check(&world, "1.0", 10);
    });
    assert_eq!(requests.len(), 0, "{requests:#?}");
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = format!(" {} ", world.root().display());
    assert_eq!(
        table.matches(&root).count(),
        1,
        "nothing lies below the new mount"
    );
}

#[test]
fn two_mounts_of_one_daemon_are_independent() {
    let world = World::new(content());
    let (first, second) = (world.root(), world.mountpoint("other"));
    // At once, on a store without a daemon.
    let racing: Vec<_> = [&first, &second]
        .map(|at| start(&mut world.command(&["mount".as_ref(), at.as_os_str()])))
        .into_iter()
        .map(finish)
        .collect();
    assert!(racing.iter().all(|output| output.status.success()), "{racing:?}");
    let of = |root: &Path| root.join(world.registry.host()).join("team/app/1.0/rootfs/top");
    let ((), requests) = world.requests(|| {
        assert_eq!(fs::read_to_string(of(&first)).unwrap(), "1.0");
        assert_eq!(fs::read_to_string(of(&second)).unwrap(), "1.0");
    });
    assert_eq!(
        requests.len(),
        4,
        "the second mount has it from the first: {requests:#?}"
    );
    let in_use = start(
        Command::new("sleep")
            .arg("60")
            .current_dir(of(&first).parent().unwrap()),
    );
    let refused = world.run(&["umount".as_ref(), first.as_os_str()]);
    nix::sys::signal::kill(pid(in_use.id()), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = stderr(&refused);
    assert!(
        said.contains(&in_use.id().to_string()) && said.contains("sleep"),
        "{said}"
    );
    finish(in_use);
    world.umount();
    assert_eq!(fs::read_to_string(of(&second)).unwrap(), "1.0");
    assert!(Lock::take(&world.store()).is_err());
    world.text(&["umount".as_ref(), second.as_os_str()]);
    Lock::take(&world.store()).unwrap();
}

/// All files of the store below `sub`.
fn store_files(world: &World, sub: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => walk(&path, found),
                path => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    walk(&world.store().join(sub), &mut found);
    assert!(!found.is_empty(), "{sub}");
    found
}

fn garble(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    for byte in bytes.iter_mut().skip(7).step_by(97) {
        *byte ^= 0x5a;
    }
    fs::write(path, bytes).unwrap();
}

fn cut(path: &Path) {
    let bytes = fs::metadata(path).unwrap().len();
    fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(bytes / 2)
        .unwrap();
}

#[test]
fn damaged_files_are_made_anew() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    let is_named =
        |name: &'static str| move |path: &PathBuf| path.file_name().is_some_and(|file| file == name);
    for (kind, sub, name) in [
        ("index", "layers", Some("index")),
        ("map", "layers", Some("map")),
        ("tree", "trees", None),
        ("document", "documents", None),
    ] {
        for (how, damage) in [
            ("garbled", garble as fn(&Path)),
            ("cut", cut),
            ("empty", |path| {
                fs::write(path, "").unwrap();
            }),
        ] {
            world.umount();
            let files = store_files(&world, sub).into_iter();
            let files: Vec<_> = files
                .filter(|path| name.is_none_or(|name| is_named(name)(path)))
                .collect();
            assert!(!files.is_empty(), "{kind}");
            files.iter().for_each(|path| damage(path));
            world.mount();
            let before = world.daemon();
            check(&world, "1.0", 10);
            assert_eq!(world.daemon(), before, "{kind} {how}: the daemon survives");
        }
    }
}

#[test]
fn cut_data_is_fetched_anew() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    world.umount();
    for path in store_files(&world, "layers") {
        if path.ends_with("data") {
            cut(&path);
        }
    }
    world.mount();
    check(&world, "1.0", 10);
}

#[test]
fn a_damaged_database_costs_requests_only() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    for damage in [garble as fn(&Path), cut, |path| {
        fs::write(path, vec![b'x'; 20_000]).unwrap();
    }] {
        world.umount();
        damage(&world.store().join("state.db"));
        world.mount();
        check(&world, "1.0", 10);
        check(&world, "2.0", 20);
    }
}

#[test]
fn files_cut_under_the_mount_do_not_end_the_daemon() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    world.restart();
    // Opened and mapped, but nothing of it looked at but for the root.
    let rootfs = world.at("team/app/1.0/rootfs");
    fs::read_dir(&rootfs).unwrap();
    let daemon = world.daemon();
    for path in store_files(&world, "layers")
        .into_iter()
        .chain(store_files(&world, "trees"))
    {
        if !path.ends_with("data") {
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(0)
                .unwrap();
        }
    }
    // Errors are allowed, wrong bytes are not.
    for n in 0..FILES {
        if let Ok(bytes) = fs::read(rootfs.join(format!("d/f{n}"))) {
            assert!(bytes == noise(300_000, 10 + n), "f{n}: {} bytes", bytes.len());
        }
    }
    check(&world, "2.0", 20);
    assert_eq!(world.daemon(), daemon);
    fs::metadata(world.at("team")).unwrap();
    world.restart();
    check(&world, "1.0", 10);
}

/// Makes the chunk maps those of an earlier boot: the boot's id stands in bytes 24 to 40 of each.
fn pretend_a_reboot(world: &World) {
    let maps = store_files(world, "layers").into_iter();
    for path in maps.filter(|path| path.ends_with("map")) {
        let map = fs::File::options().write(true).open(path).unwrap();
        map.write_all_at(&[0xee; 16], 24).unwrap();
    }
}

#[test]
fn after_a_crash_of_the_machine_nothing_is_believed_unseen() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    world.kill_daemon();
    pretend_a_reboot(&world);
    // Of the data some did not reach the disk.
    for path in store_files(&world, "layers") {
        if path.ends_with("data") {
            let data = fs::File::options().write(true).open(&path).unwrap();
            data.write_all_at(&[0; 5000], 0).unwrap();
            data.write_all_at(&[0; 100], data.metadata().unwrap().len() / 2)
                .unwrap();
        }
    }
    let ((), requests) = world.requests(|| {
        world.mount();
        check(&world, "1.0", 10);
    });
    let fetched: u64 = requests.iter().map(|record| record.body_bytes).sum();
    assert!(
        fetched > 0 && fetched < 1_200_000,
        "what survived is kept: {fetched} of 1.8 million bytes"
    );
}

#[test]
fn after_an_orderly_end_and_a_reboot_everything_is_believed() {
    let world = World::new(content()).mounted();
    check(&world, "1.0", 10);
    world.umount();
    pretend_a_reboot(&world);
    let ((), requests) = world.requests(|| {
        world.mount();
        check(&world, "1.0", 10);
    });
    assert_eq!(requests.len(), 0, "{requests:#?}");
}

#[test]
fn a_daemon_killed_while_it_fetches_leaves_right_bytes_only() {
    let world = World::new(content()).mounted();
    world
        .handle()
        .update(|behaviour| behaviour.total_bytes_per_s = 2_000_000);
    for round in 0..3 {
        let mut readers: Vec<_> = (0..FILES)
            .map(|n| start(Command::new("cat").arg(world.at(&format!("team/app/1.0/rootfs/d/f{n}")))))
            .collect();
        let fetched = || {
            world
                .handle()
                .ledger()
                .iter()
                .map(|record| record.body_bytes)
                .sum::<u64>()
        };
        let before = fetched();
        until("something was fetched", || {
            fetched() > before + 100_000
                || readers
                    .iter_mut()
                    .all(|reader| reader.try_wait().unwrap().is_some())
        });
        world.kill_daemon();
        for (n, reader) in (0..).zip(readers) {
            let output = finish(reader);
            let expected = noise(300_000, 10 + n);
            assert!(expected.starts_with(&output.stdout), "round {round}, f{n}");
            assert!(
                !output.status.success() || output.stdout == expected,
                "round {round}, f{n}"
            );
        }
        world.mount();
    }
    check(&world, "1.0", 10);
}

/// A small filesystem for the store, gone with the test, but not before the daemon that works on it.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(crate) fn new(world: &World, bytes: usize) -> Self {
        let at = world.store();
        fs::create_dir(&at).unwrap();
        let size = format!("size={bytes}");
        nix::mount::mount(
            Some("tmpfs"),
            &at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        )
        .unwrap();
        Self(at)
    }

    /// Takes up all of it.
    pub(crate) fn fill(&self) {
        let filler = fs::File::create(self.0.join("filler")).unwrap();
        let mut at = 0;
        while filler.write_at(&[7; 4096], at).is_ok_and(|written| written > 0) {
            at += 4096;
        }
    }

    /// Gives back what [`Self::fill`] took.
    pub(crate) fn empty(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        // What could not be removed as long as it was mounted.
        let _ = self.0.parent().map(fs::remove_dir_all);
    }
}

#[test]
fn a_full_disk_fails_no_read() {
    // Declared first, so dropped last.
    let disk;
    let world = World::new(content());
    disk = SmallDisk::new(&world, 1 << 20);
    world.mount();
    check(&world, "1.0", 10);
    world.restart();
    check(&world, "1.0", 10);
    // Full to the last byte: an image that was never seen is read all the same.
    disk.fill();
    check(&world, "2.0", 20);
    let mut tmp = fs::read_dir(disk.0.join("tmp")).unwrap();
    assert!(tmp.next().is_none(), "nothing half-written stays");
    disk.empty();
    world.restart();
    check(&world, "2.0", 20);
    until("all is unmounted", || {
        world
            .run(&["umount".as_ref(), world.root().as_os_str()])
            .status
            .success()
    });
}

#[test]
fn on_a_full_disk_a_chunk_is_fetched_once_for_all_its_reads() {
    let disk;
    let payload = noise(3_500_000, 5);
    let options = registryfs::layer::estargz::writer::Options::default();
    let layer = registryfs::demo::Layer::estargz(&[file("big", payload.clone())], options).unwrap();
    let mut content = content();
    let big = registryfs::demo::ImageBuilder::new(vec![layer]).build();
    content.add_tagged_image("team/big", "1", &big);
    let world = World::new(content);
    disk = SmallDisk::new(&world, 1 << 20);
    world.mount();
    let path = world.at("team/big/1/rootfs/big");
    fs::metadata(&path).unwrap();
    disk.fill();
    let (bytes, requests) = world.requests(|| {
        let mut bytes = vec![0; payload.len()];
        let big = fs::File::open(&path).unwrap();
        // Pieces far enough apart that the kernel asks for each on its own.
        for start in (0..payload.len()).step_by(500_000).rev() {
            let end = payload.len().min(start + 500_000);
            big.read_exact_at(&mut bytes[start..end], start as u64).unwrap();
        }
        bytes
    });
    assert!(bytes == payload);
    assert_eq!(requests.len(), 1, "{requests:#?}");
    world.umount();
}
