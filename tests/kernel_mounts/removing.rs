//! How EROFS mounts go: idle, busy, moved, covered, with the mount they are on, without the daemon.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use registryfs::error::Error;
use registryfs::fs::ops::{
    Answer, Attr, Caller, DirEntry, Entry, FOREVER, FileType, Lookup, Operations, ROOT_INO, Statfs,
};
use registryfs::fuse::{Detach, Mount, MountOptions, mounted};
use registryfs::image::erofs::probe;
use registryfs::layer::entry::Time;

use crate::world::{World, attached_tree, within};

/// Set for the test binary when it plays a daemon that is to be killed: where it attaches a tree.
const DAEMON_PLACE: &str = "KERNEL_MOUNTS_TEST_DAEMON";

/// Two directories, `a` and `b`, which the kernel may keep for ever.
#[derive(Default)]
struct Dirs {
    lookups: AtomicU64,
}

fn dir(ino: u64) -> Attr {
    Attr {
        ino,
        size: 0,
        blocks: 0,
        mtime: Time { seconds: 0, nanos: 0 },
        kind: FileType::Dir,
        mode: 0o755,
        nlink: 2,
        uid: 0,
        gid: 0,
        rdev: 0,
    }
}

fn refused<T>(errno: i32) -> Answer<T> {
    Answer::Now(Err(Error::posix("two directories", errno)))
}

impl Operations for Dirs {
    fn lookup(&self, _: Caller, _: u64, name: &[u8]) -> Answer<Lookup> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        let ino = match name {
            b"a" => 2,
            b"b" => 3,
            _ => return Answer::Now(Ok(Lookup::Absent(Duration::ZERO))),
        };
        Answer::Now(Ok(Lookup::Found(Entry {
            attr: dir(ino),
            attr_ttl: FOREVER,
            entry_ttl: FOREVER,
        })))
    }
    fn forget(&self, _: u64, _: u64) {}
    fn getattr(&self, ino: u64) -> Answer<(Attr, Duration)> {
        Answer::Now(Ok((dir(ino), FOREVER)))
    }
    fn readlink(&self, _: u64) -> Answer<Vec<u8>> {
        refused(libc::EINVAL)
    }
    fn read(&self, _: Caller, _: u64, _: u64, _: u32) -> Answer<Vec<u8>> {
        refused(libc::EISDIR)
    }
    fn readdir(&self, _: Caller, _: u64, _: u64, _: usize) -> Answer<Vec<DirEntry>> {
        Answer::Now(Ok(Vec::new()))
    }
    fn remember(&self, _: u64, _: &DirEntry) -> Option<Entry> {
        None
    }
    fn getxattr(&self, _: u64, _: &[u8]) -> Answer<Vec<u8>> {
        refused(libc::ENODATA)
    }
    fn listxattr(&self, _: u64) -> Answer<Vec<u8>> {
        Answer::Now(Ok(Vec::new()))
    }
    fn statfs(&self) -> Answer<Statfs> {
        Answer::Now(Ok(Statfs {
            blocks: 0,
            blocks_free: 0,
            files: 3,
        }))
    }
}

fn dirs_at(world: &World, place: &Path) -> (Arc<Dirs>, Mount) {
    let dirs = Arc::new(Dirs::default());
    let mut options = MountOptions::new(place);
    options.helper = Some(env!("CARGO_BIN_EXE_registryfs").into());
    let mount = Mount::start(dirs.clone(), &options, world.handle()).unwrap();
    (dirs, mount)
}

fn busy(result: Result<(), Error>) -> String {
    match result {
        Err(error @ Error::Busy { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_busy_tree_stays_and_says_who_uses_it() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let attachment = world.make_at("a.b/c:1", &place).attachment.unwrap();
    let mut sleeper = Command::new("sleep")
        .arg("600")
        .current_dir(&place)
        .spawn()
        .unwrap();
    let said = busy(world.detach(&attachment, Detach::Idle));
    let is_in_use = busy(world.detach(&attachment, Detach::Expired));
    let pid = sleeper.id();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(said.contains(&format!("pid {pid} (sleep)")), "{said}");
    assert!(is_in_use.contains("in use"), "{is_in_use}");
    world.detach(&attachment, Detach::Idle).unwrap();
}

#[test]
fn a_tree_expires_when_nobody_used_it_since_it_was_asked() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let attachment = world.make_at("a.b/c:1", &place).attachment.unwrap();
    assert!(busy(world.detach(&attachment, Detach::Expired)).contains("used"));
    fs::metadata(place.join(probe::NAME)).unwrap();
    assert!(
        busy(world.detach(&attachment, Detach::Expired)).contains("used"),
        "it was looked at"
    );
    world.detach(&attachment, Detach::Expired).unwrap();
    assert!(attached_tree(&place).is_none());
}

#[test]
fn a_tree_whose_directory_moved_is_found_and_one_that_is_covered_is_left() {
    let world = World::new();
    let (place, moved) = (world.new_dir("old/mnt"), world.dir().join("new/mnt"));
    let attachment = world.make_at("a.b/c:1", &place).attachment.unwrap();
    fs::rename(world.dir().join("old"), world.dir().join("new")).unwrap();
    assert_eq!(
        mounted(std::slice::from_ref(&attachment)).unwrap(),
        [Some(moved.clone())]
    );
    let none: Option<&str> = None;
    mount(Some("foreign"), &moved, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let said = busy(world.detach(&attachment, Detach::Idle));
    assert!(said.contains("mounted over it"), "{said}");
    assert!(
        attached_tree(&moved).unwrap().contains(&"foreign".to_owned()),
        "it stays"
    );
    umount2(&moved, MntFlags::empty()).unwrap();
    world.detach(&attachment, Detach::Idle).unwrap();
    assert!(attached_tree(&moved).is_none());
}

#[test]
fn unmounting_takes_the_trees_below_along_unless_one_is_busy() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let (_, fuse) = dirs_at(&world, &place);
    let (a, b) = (place.join("a"), place.join("b"));
    let first = world.make_at("a.b/c:1", &a).attachment.unwrap();
    let second = world.make_at("a.b/c:2", &b).attachment.unwrap();
    assert_eq!((&first.mountpoint, &second.mountpoint), (&a, &b));
    let open = File::open(a.join(probe::NAME)).unwrap();
    let said = busy(world.helper.unmount(&place, false));
    assert!(said.contains(&*a.to_string_lossy()), "{said}");
    assert_eq!(
        mounted(&[first.clone(), second]).unwrap(),
        [Some(a.clone()), None],
        "what is idle has gone"
    );
    drop(open);
    world.helper.unmount(&place, false).unwrap();
    assert_eq!(mounted(&[first]).unwrap(), [None]);
    assert!(attached_tree(&place).is_none());
    drop(fuse);
}

#[test]
fn a_mount_of_somebody_else_below_keeps_everything_but_our_trees() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let (_, fuse) = dirs_at(&world, &place);
    let tree = world.make_at("a.b/c:1", &place.join("a")).attachment.unwrap();
    let foreign = place.join("b");
    let none: Option<&str> = None;
    mount(Some("foreign"), &foreign, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    let said = busy(world.helper.unmount(&place, false));
    assert!(said.contains("a tmpfs is mounted on"), "{said}");
    assert_eq!(mounted(&[tree]).unwrap(), [None]);
    assert!(attached_tree(&foreign).is_some());
    world.helper.unmount(&place, true).unwrap();
    assert!(attached_tree(&place).is_none() && attached_tree(&foreign).is_none());
    drop(fuse);
}

#[test]
fn a_name_that_expired_is_asked_for_again_and_keeps_what_is_mounted_there() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let (dirs, fuse) = dirs_at(&world, &place);
    let tree = world.make_at("a.b/c:1", &place.join("a")).attachment.unwrap();
    let lookups = || {
        let before = dirs.lookups.load(Ordering::SeqCst);
        let file = place.join("a").join(probe::NAME);
        within(move || fs::metadata(file).unwrap());
        dirs.lookups.load(Ordering::SeqCst) - before
    };
    assert_eq!(lookups(), 0, "the kernel knows it");
    fuse.expire_entry(ROOT_INO, b"a").unwrap();
    assert_eq!(lookups(), 1);
    assert_eq!(lookups(), 0);
    assert!(mounted(&[tree]).unwrap()[0].is_some());
    fuse.expire_entry(ROOT_INO, b"unknown").unwrap();
    fuse.expire_attributes(2).unwrap();
    world.helper.unmount(&place, false).unwrap();
    within(move || {
        while !fuse.has_ended() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(fuse.expire_entry(ROOT_INO, b"a").is_err());
    });
}

/// Not a test: a daemon that has attached a tree, read its first block, and waits to be killed.
#[test]
fn play_daemon() {
    let Some(place) = std::env::var_os(DAEMON_PLACE) else {
        return;
    };
    let world = World::new();
    let _tree = world.make_at("a.b/c:1", Path::new(&place));
    eprintln!("attached");
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_tree_outlives_its_daemon_for_what_is_cached_and_is_unmounted_by_its_path() {
    let world = World::new();
    let place = world.new_dir("mnt");
    let mut daemon = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "removing::play_daemon", "--nocapture"])
        .env(DAEMON_PLACE, &place)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    while attached_tree(&place).is_none() {
        assert!(daemon.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let path = place.join(probe::NAME);
    let read = move |length: usize| {
        let path = path.clone();
        within(move || {
            let mut bytes = vec![0; length];
            let read = std::os::unix::fs::FileExt::read_at(&File::open(path).unwrap(), &mut bytes, 0);
            read.map(|read| bytes[..read].to_vec())
        })
    };
    let first = read(4096).unwrap();
    assert!(first[..] == probe::content()[..4096]);
    let open = File::open(place.join(probe::NAME)).unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(read(4096).unwrap() == first, "it is cached");
    let rest = within(move || std::os::unix::fs::FileExt::read_at(&open, &mut [0; 4096], 4096));
    assert_eq!(rest.unwrap_err().raw_os_error(), Some(libc::EIO));
    let program = env!("CARGO_BIN_EXE_registryfs");
    let cache = world.new_dir("cache");
    let status = Command::new(program)
        .arg("--cache-dir")
        .arg(cache)
        .arg("umount")
        .arg(&place)
        .status();
    assert!(status.unwrap().success());
    assert!(attached_tree(&place).is_none());
}
