//! What a daemon leaves behind that is killed.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use registryfs::error::Error;
use registryfs::fuse::Mount;

use crate::fake::HELLO;
use crate::mounted::{Killed, Mounted, handle, helper, no_fs, options, wait_until, within};

/// Set for the test binary when it plays a daemon that is to be killed: its mountpoint.
const DAEMON_MOUNTPOINT: &str = "FUSE_ADAPTER_TEST_DAEMON";

/// A daemon that is another process, once it has mounted.
fn daemon_at(mountpoint: &Path) -> Killed {
    let mut daemon = Command::new(std::env::current_exe().unwrap());
    daemon
        .args(["--ignored", "--exact", "killed::plays_a_daemon_until_killed"])
        .env(DAEMON_MOUNTPOINT, mountpoint)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let daemon = Killed(daemon.spawn().unwrap());
    wait_until("the other daemon mounts", || {
        helper().is_mounted(mountpoint).unwrap()
    });
    daemon
}

#[test]
fn a_dead_mount_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = daemon_at(dir.path());
    let taken = Mount::start(no_fs(), &options(dir.path()), handle()).unwrap_err();
    assert!(matches!(taken, Error::Busy { .. }), "{taken}");

    daemon.0.kill().unwrap();
    daemon.wait();
    let dead = within({
        let path = dir.path().to_owned();
        move || nix::sys::statvfs::statvfs(&path).err()
    });
    assert_eq!(dead, Some(nix::errno::Errno::ENOTCONN));
    assert!(!helper().is_mounted(dir.path()).unwrap());

    let mounted = Mounted::at(dir.path());
    let hello = mounted.path().join("hello");
    assert_eq!(within(move || fs::read(hello).unwrap()), HELLO);
    mounted.mount().unmount(false).unwrap();
    let left = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn nobody_waits_for_a_daemon_that_was_killed_while_it_handed_contents_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = daemon_at(dir.path());
    let (expected, hello) = (dir.path().join("expected"), dir.path().join("hello"));
    let mut reader = Killed(
        Command::new("cat")
            .arg(expected)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let waits = |process: u32, function: &str| {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
        let stacks = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stack")).ok());
        stacks.into_iter().any(|stack| stack.contains(function))
    };
    wait_until("the reader waits", || waits(reader.0.id(), "folio_wait"));
    assert_eq!(within(move || fs::read(hello).unwrap()), HELLO);
    // Its page is locked for the answer that never comes.
    wait_until("the daemon waits for him", || {
        waits(daemon.0.id(), "fuse_dev_do_write")
    });
    daemon.0.kill().unwrap();
    daemon.wait();
    reader.wait();
}

/// Not a test of its own: the process of [`daemon_at`].
#[test]
#[ignore = "a part of tests that kill it"]
fn plays_a_daemon_until_killed() {
    if let Some(mountpoint) = std::env::var_os(DAEMON_MOUNTPOINT) {
        let _mounted = Mounted::at(Path::new(&mountpoint));
        std::thread::sleep(Duration::from_secs(60));
    }
}
