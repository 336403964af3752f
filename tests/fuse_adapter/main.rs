//! The FUSE adapter on real mounts (root and /dev/fuse are needed), over a filesystem in memory.

// Helper functions may fail a test too; clippy.toml allows it in test functions only.
#![allow(clippy::unwrap_used, clippy::panic)]

mod fake;
mod killed;
mod mounted;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fake::{
    BIG_ENTRIES, HELD_FILE_BYTES, HELLO, LONG_XATTR_BYTES, big_ino, big_name, is_unknown, long_content,
};
use mounted::{Killed, Mounted, helper, options, output, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use registryfs::error::Error;
use registryfs::fuse::Mount;

/// How soon an interrupted program is free, with room for a machine that is busy with other tests.
const PROMPTLY: Duration = Duration::from_secs(3);

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_tree_is_shown_as_the_filesystem_says() {
    let mounted = Mounted::new();
    let root = mounted.path();
    within(move || {
        let hello = fs::metadata(root.join("hello")).unwrap();
        assert_eq!((hello.len(), hello.ino(), hello.mode()), (6, 3, 0o100_644));
        assert_eq!((hello.mtime(), hello.mtime_nsec()), (1_700_000_000, 123_456_789));
        assert_eq!(fs::read(root.join("link")).unwrap(), HELLO);
        assert_eq!(fs::read_link(root.join("link")).unwrap(), Path::new("hello"));
        assert_eq!(fs::read(root.join("dir/nested")).unwrap(), HELLO);
        assert_eq!(errno(fs::metadata(root.join("denied"))), Some(libc::EACCES));
        let stat = nix::sys::statvfs::statvfs(&root).unwrap();
        assert_eq!((stat.blocks(), stat.blocks_free(), stat.files()), (1000, 10, 77));
        assert_eq!((stat.name_max(), stat.block_size()), (255, 4096));
        let mut names: Vec<_> = fs::read_dir(&root)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            ["big", "dir", "expected", "held-file", "hello", "link", "long"]
        );
    });
}

#[test]
fn reads_are_complete_at_every_offset() {
    let mounted = Mounted::new();
    let path = mounted.path().join("long");
    let content = long_content();
    within(move || {
        let file = fs::File::open(&path).unwrap();
        for offset in [
            0,
            1,
            4095,
            131_071,
            1 << 20,
            content.len() - 5000,
            content.len() - 1,
        ] {
            let mut buffer = vec![0; 9000];
            let read = file.read_at(&mut buffer, offset as u64).unwrap();
            let expected = &content[offset..content.len().min(offset + 9000)];
            assert!(&buffer[..read] == expected, "at {offset}");
        }
        assert_eq!(file.read_at(&mut [0; 8], content.len() as u64).unwrap(), 0);
        assert!(fs::read(&path).unwrap() == content);
    });
    assert!(mounted.fake.largest_read.load(Ordering::SeqCst) <= 1 << 20);
}

#[test]
fn a_warm_tree_is_served_without_a_request() {
    let mounted = Mounted::new();
    let root = mounted.path().display().to_string();
    let walk = format!("find {root} -ls && cat {root}/long {root}/hello {root}/dir/nested | sha256sum");
    let cold = output(Command::new("sh").args(["-c", &walk]));
    let after_cold = mounted.counters();
    let warm = output(Command::new("sh").args(["-c", &walk]));
    let after_warm = mounted.counters();
    assert!(cold == warm, "a warm tree differs from the cold one");
    assert!(cold.lines().count() as u64 > BIG_ENTRIES);
    assert_eq!(after_cold, after_warm);
    // Opening was refused once for each, and never asked for again.
    assert!(after_warm.of("open") <= 1 && after_warm.of("opendir") <= 1);
    assert!(after_warm.of("flush") <= 1);
    // The listings brought the attributes of all entries that are known without waiting.
    assert!(after_cold.of("lookup") < BIG_ENTRIES / 6);
}

#[test]
fn absence_is_kept_for_as_long_as_it_holds() {
    let mounted = Mounted::new();
    let root = mounted.path();
    let lookups = |name: &'static str| {
        let before = mounted.counters().of("lookup");
        let path = root.join(name);
        within(move || {
            for _ in 0..3 {
                assert_eq!(errno(fs::metadata(&path)), Some(libc::ENOENT));
            }
        });
        mounted.counters().of("lookup") - before
    };
    assert_eq!(lookups("missing"), 1);
    assert_eq!(lookups("asked-again"), 3);
}

#[test]
fn nothing_can_be_written() {
    let mounted = Mounted::new();
    let root = mounted.path();
    within(move || {
        let hello = root.join("hello");
        let read_only = Some(libc::EROFS);
        assert_eq!(errno(fs::write(root.join("new"), b"x")), read_only);
        assert_eq!(errno(fs::OpenOptions::new().append(true).open(&hello)), read_only);
        assert_eq!(errno(fs::create_dir(root.join("new"))), read_only);
        assert_eq!(errno(fs::remove_file(&hello)), read_only);
        assert_eq!(errno(fs::remove_dir(root.join("dir"))), read_only);
        assert_eq!(errno(fs::rename(&hello, root.join("new"))), read_only);
        assert_eq!(errno(fs::hard_link(&hello, root.join("new"))), read_only);
        assert_eq!(
            errno(std::os::unix::fs::symlink("x", root.join("new"))),
            read_only
        );
        let mode = fs::Permissions::from_mode(0o600);
        assert_eq!(errno(fs::set_permissions(&hello, mode)), read_only);
        let set = rustix::fs::setxattr(&hello, "user.short", b"y", rustix::fs::XattrFlags::empty());
        assert_eq!(set, Err(rustix::io::Errno::ROFS));
    });
}

#[test]
fn a_mount_made_writable_from_outside_still_refuses() {
    let mounted = Mounted::new();
    let root = mounted.path();
    within(move || {
        let nothing = None::<&str>;
        let remount = nix::mount::MsFlags::MS_REMOUNT;
        nix::mount::mount(nothing, &root, nothing, remount, nothing).unwrap();
        let read_only = Some(libc::EROFS);
        assert_eq!(errno(fs::write(root.join("new"), b"x")), read_only);
        assert_eq!(errno(fs::write(root.join("hello"), b"x")), read_only);
        assert_eq!(errno(fs::remove_file(root.join("hello"))), read_only);
        assert_eq!(errno(fs::create_dir(root.join("new-dir"))), read_only);
        assert_eq!(fs::read(root.join("hello")).unwrap(), HELLO);
    });
}

#[test]
fn xattrs_follow_the_size_protocol() {
    let mounted = Mounted::new();
    let path = mounted.path().join("hello");
    within(move || {
        let get = |name: &str, room: usize| {
            let mut buffer = vec![0; room];
            rustix::fs::getxattr(&path, name, &mut buffer[..]).map(|length| (length, buffer))
        };
        let (length, value) = get("user.short", 5).unwrap();
        assert_eq!((length, &value[..]), (5, &b"value"[..]));
        let asked = rustix::fs::getxattr_query(&path, "user.long").unwrap();
        assert_eq!(asked, LONG_XATTR_BYTES);
        let too_small = get("user.long", LONG_XATTR_BYTES - 1);
        assert_eq!(too_small.unwrap_err(), rustix::io::Errno::RANGE);
        assert_eq!(get("user.none", 9).unwrap_err(), rustix::io::Errno::NODATA);

        let names = b"user.short\0user.long\0";
        let mut buffer = [0; 64];
        let length = rustix::fs::listxattr(&path, &mut buffer).unwrap();
        assert_eq!(&buffer[..length], names);
        assert_eq!(rustix::fs::listxattr_query(&path).unwrap(), names.len());
        let too_small = rustix::fs::listxattr(&path, &mut buffer[..names.len() - 1]);
        assert_eq!(too_small.unwrap_err(), rustix::io::Errno::RANGE);
    });
}

#[test]
fn a_large_directory_is_listed_completely_and_its_lookups_balance() {
    let mounted = Mounted::new();
    let big = mounted.path().join("big");
    let expected: BTreeMap<_, _> = (0..BIG_ENTRIES).map(|i| (big_name(i), big_ino(i))).collect();
    within(move || {
        let directory = rustix::fs::openat(
            rustix::fs::CWD,
            &big,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let mut buffer = Vec::with_capacity(1024);
        let mut listing = rustix::fs::RawDir::new(directory, buffer.spare_capacity_mut());
        let mut listed = BTreeMap::new();
        while let Some(entry) = listing.next() {
            let entry = entry.unwrap();
            let name = entry.file_name().to_str().unwrap().to_owned();
            if name != "." && name != ".." {
                assert_eq!(entry.file_type(), rustix::fs::FileType::RegularFile);
                assert_eq!(listed.insert(name, entry.ino()), None);
            }
        }
        assert!(listed == expected);
        // With the stats in between the kernel goes on asking for attributes too.
        for entry in fs::read_dir(&big).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().ino(), entry.ino());
        }
    });
    // The kernel gives the lookups back that it takes for granted, and the filesystem never hears of those.
    let unknown = (0..BIG_ENTRIES).filter(|&index| is_unknown(index)).count() as u64;
    assert!(unknown > 1000);
    mounted::wait_until("the kernel forgets", || {
        mounted.counters().of("forget") >= unknown
    });
    assert!(!mounted.fake.unbalanced.load(Ordering::SeqCst));
}

#[test]
fn a_listing_counts_one_lookup_for_each_entry_that_it_shows() {
    let mounted = Mounted::new();
    let big = mounted.path().join("big");
    // The buffer of read_dir has room for all that fits into one answer, so the kernel asks for nothing twice.
    let listed = within(move || fs::read_dir(&big).unwrap().count() as u64);
    assert_eq!(listed, BIG_ENTRIES);
    for index in 0..BIG_ENTRIES {
        let expected = u64::from(!is_unknown(index));
        assert_eq!(mounted.fake.lookups_of(big_ino(index)), expected, "{index}");
    }
}

#[test]
fn a_held_lookup_ends_with_a_signal() {
    let mounted = Mounted::new();
    let held = mounted.path().join("held");
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let stat = Command::new("stat")
            .arg(&held)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stat = Killed(stat);
        mounted.wait_for_held(1);
        kill(Pid::from_raw(stat.0.id().cast_signed()), signal).unwrap();
        let sent = Instant::now();
        stat.wait();
        assert!(sent.elapsed() < PROMPTLY, "{signal}");
        mounted.wait_for_held(0);
    }
}

#[test]
fn a_program_that_handles_the_signal_goes_on_with_eintr() {
    let mounted = Mounted::new();
    let script = format!(
        "trap 'echo caught; exit 3' INT; [ -e '{}' ]; echo not reached",
        mounted.path().join("held").display()
    );
    let mut bash = Command::new("bash");
    bash.args(["-c", &script]).stdout(Stdio::piped());
    let bash = Killed(bash.spawn().unwrap());
    mounted.wait_for_held(1);
    kill(Pid::from_raw(bash.0.id().cast_signed()), Signal::SIGINT).unwrap();
    let output = bash.output();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"caught\n");
}

#[test]
fn a_held_read_is_dropped_when_its_reader_is_gone() {
    let mounted = Mounted::new();
    let mut cat = Killed(
        Command::new("cat")
            .arg(mounted.path().join("held-file"))
            .spawn()
            .unwrap(),
    );
    mounted.wait_for_held(1);
    kill(Pid::from_raw(cat.0.id().cast_signed()), Signal::SIGINT).unwrap();
    cat.wait();
    mounted.wait_for_held(0);
}

#[test]
fn a_hit_is_answered_while_hundreds_of_reads_wait() {
    const WAITING: u64 = 256;
    let mounted = Mounted::new();
    let root = mounted.path();
    let _held = within({
        let root = root.clone();
        move || {
            let file = fs::File::open(root.join("held-file")).unwrap();
            let willneed = rustix::fs::Advice::WillNeed;
            let length = std::num::NonZeroU64::new(4096);
            for number in 0..WAITING {
                // What read() would ask for as well, without a thread for each.
                let offset = number * (HELD_FILE_BYTES / WAITING);
                rustix::fs::fadvise(&file, offset, length, willneed).unwrap();
            }
            file
        }
    });
    mounted.wait_for_held(WAITING as usize);
    assert_eq!(within(move || fs::read(root.join("hello")).unwrap()), HELLO);
}

#[test]
fn a_panic_fails_one_request_and_the_mount_lives_on() {
    let mounted = Mounted::new();
    let root = mounted.path();
    within(move || {
        for name in ["panics", "panics-later", "panics"] {
            assert_eq!(errno(fs::metadata(root.join(name))), Some(libc::EIO), "{name}");
        }
        assert_eq!(fs::read(root.join("hello")).unwrap(), HELLO);
    });
}

#[test]
fn a_busy_mount_names_who_uses_it() {
    let mounted = Mounted::new();
    let mut sleep = Command::new("sleep");
    sleep.arg("60").current_dir(mounted.path().join("dir"));
    let mut sleep = Killed(sleep.spawn().unwrap());
    let pid = sleep.0.id();
    let refused = mounted.mount().unmount(false).unwrap_err();
    let text = refused.to_string();
    assert!(matches!(refused, Error::Busy { .. }), "{text}");
    assert!(text.contains(&format!("pid {pid} (sleep)")), "{text}");
    assert!(text.contains("working directory"), "{text}");
    let inherited: Vec<_> = descriptors(pid)
        .into_iter()
        .filter(|path| is_fuse_device(path))
        .collect();
    assert!(inherited.is_empty());

    mounted.mount().unmount(true).unwrap();
    assert!(!helper().is_mounted(&mounted.path()).unwrap());
    assert!(!mounted.has_ended());
    sleep.0.kill().unwrap();
    sleep.wait();
    mounted.wait_for_end();
}

#[test]
fn a_reader_and_a_mount_below_are_named_too() {
    let mounted = Mounted::new();
    let root = mounted.path();
    let file = within({
        let root = root.clone();
        move || fs::File::open(root.join("hello")).unwrap()
    });
    let reader = Killed(Command::new("sleep").arg("60").stdin(file).spawn().unwrap());
    let below = root.join("dir");
    let bound = Command::new("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(&below)
        .status();
    assert!(bound.unwrap().success());
    let refused = mounted.mount().unmount(false).unwrap_err().to_string();
    assert!(Command::new("umount").arg(&below).status().unwrap().success());
    assert!(
        refused.contains(&format!("tmpfs is mounted on {}", below.display())),
        "{refused}"
    );
    assert!(
        refused.contains(&format!("pid {} (sleep) has", reader.0.id())),
        "{refused}"
    );
    assert!(refused.contains("hello open"), "{refused}");
    drop(reader);
    mounted.mount().unmount(false).unwrap();
    assert!(mounted.has_ended());
}

#[test]
fn an_unmount_from_outside_ends_the_session() {
    let mounted = Mounted::new();
    assert!(!mounted.has_ended());
    assert!(
        Command::new("umount")
            .arg(mounted.path())
            .status()
            .unwrap()
            .success()
    );
    mounted.wait_for_end();
    mounted.mount().unmount(false).unwrap();
}

#[test]
fn the_end_of_an_old_mount_spares_a_new_one_at_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut old = Mounted::at(dir.path());
    helper().unmount(dir.path(), false).unwrap();
    old.wait_for_end();
    let new = Mounted::at(dir.path());
    old.mount().unmount(false).unwrap();
    old.unmount_by_drop();
    assert!(helper().is_mounted(&new.path()).unwrap());
    assert!(!new.has_ended());
}

#[test]
fn a_dropped_mount_frees_who_waits_and_leaves_nothing() {
    let mut mounted = Mounted::new();
    let held = mounted.path().join("held");
    let mut stat = Killed(
        Command::new("stat")
            .arg(held)
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    mounted.wait_for_held(1);
    mounted.unmount_by_drop();
    stat.wait();
    assert!(!helper().is_mounted(&mounted.path()).unwrap());
    // Without this the kernel would keep the connection, and with it the requests that wait on it.
    mounted::wait_until("the device is closed", || {
        !descriptors(std::process::id())
            .iter()
            .any(|path| is_fuse_device(path))
    });
}

#[test]
fn odd_characters_in_the_mountpoint_change_nothing() {
    let base = tempfile::tempdir().unwrap();
    let odd = base.path().join("a b,fd=3,\\040,\n\"x\"");
    fs::create_dir(&odd).unwrap();
    let mounted = Mounted::at(&odd);
    assert_eq!(
        mounted.mount().mountpoint(),
        fs::canonicalize(base.path())
            .unwrap()
            .join(odd.file_name().unwrap())
    );
    assert!(helper().is_mounted(&odd).unwrap());
    mounted.mount().unmount(false).unwrap();
    assert!(!helper().is_mounted(&odd).unwrap());
}

#[test]
fn a_mountpoint_that_cannot_be_one_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    for (path, reason) in [
        (file, "is not a directory"),
        (dir.path().join("none"), "mkdir -p"),
    ] {
        let error = Mount::start(mounted::no_fs(), &options(&path), mounted::handle()).unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    }
    let unmounted = helper().unmount(dir.path(), false).unwrap_err();
    assert!(unmounted.to_string().contains("no registryfs is mounted"));
    let mut nowhere = options(dir.path());
    nowhere.helper = Some("/nonexistent/registryfs".into());
    let error = Mount::start(mounted::no_fs(), &nowhere, mounted::handle()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/registryfs"), "{error}");
}

#[test]
fn what_is_missing_for_a_mount_is_said_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let mountpoint = dir.path().join("mnt");
    fs::create_dir(&mountpoint).unwrap();
    let binary = env!("CARGO_BIN_EXE_registryfs");
    let powerless = format!("exec setpriv --bounding-set=-sys_admin {binary} \"$@\"");
    let without_device =
        format!("exec unshare -m sh -c 'mount -t tmpfs none /dev; exec {binary} \"$@\"' sh \"$@\"");
    for (script, remedy) in [(powerless, "CAP_SYS_ADMIN"), (without_device, "modprobe fuse")] {
        let mut options = options(&mountpoint);
        options.helper = Some(mounted::shell_script(dir.path(), &script));
        let error = Mount::start(mounted::no_fs(), &options, mounted::handle()).unwrap_err();
        assert!(error.to_string().contains(remedy), "{error}");
        assert!(!helper().is_mounted(&mountpoint).unwrap());
    }
}

#[test]
fn a_mount_that_does_not_answer_is_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let fake = fake::Fake::new();
    fake.fails.store(true, Ordering::SeqCst);
    let fs = std::sync::Arc::new(fake::FakeFs(fake));
    let error = within({
        let options = options(dir.path());
        move || Mount::start(fs, &options, mounted::handle()).unwrap_err()
    });
    assert!(error.to_string().contains("does not answer"), "{error}");
    assert!(!helper().is_mounted(dir.path()).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn other_users_enter_only_if_allowed() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for allowed in [true, false] {
        let mut options = options(dir.path());
        options.allow_other = allowed;
        let mounted = Mounted::with(options);
        let mut ls = Command::new("ls");
        ls.arg(mounted.path()).uid(65_534).gid(65_534);
        let status = ls.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert_eq!(status.success(), allowed);
        mounted.mount().unmount(false).unwrap();
    }
}

fn descriptors(pid: u32) -> Vec<PathBuf> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .collect()
}

fn is_fuse_device(path: &Path) -> bool {
    path == Path::new("/dev/fuse")
}
