//! The program under the names by which mount(8), umount(8) and systemd run it.

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use registryfs::store::lock::Lock;

use crate::world::{World, code, errors, finish, is_mounted, start, until};

/// Runs the command under another name.
fn run_as(world: &World, name: &str, arguments: &[&str]) -> Output {
    finish(start(world.command(arguments).arg0(name)))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `sleep` with its working directory in the mount.
fn user_of(mountpoint: &Path) -> std::process::Child {
    Command::new("sleep")
        .arg("600")
        .current_dir(mountpoint)
        .spawn()
        .unwrap()
}

#[test]
fn what_mount_runs_mounts_and_what_umount_runs_unmounts() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let options = "rw,_netdev,nofail,x-systemd.automount,x-systemd.idle-timeout=60,allow=*.example.org";
    let mounted = run_as(
        &world,
        "/sbin/mount.registryfs",
        &["none", text(&mountpoint), "-n", "-o", options],
    );
    assert_eq!((code(&mounted), errors(&mounted).as_str()), (0, ""));
    assert!(is_mounted(&mountpoint));
    let tags = mountpoint.join(world.image("base/slim"));
    assert!(std::fs::read_dir(tags).is_err(), "our own options are not lost");

    let mut user = user_of(&mountpoint);
    let busy = run_as(&world, "umount.fuse.registryfs", &[text(&mountpoint)]);
    assert_eq!(code(&busy), 32);
    assert!(
        errors(&busy).contains(&user.id().to_string()),
        "{}",
        errors(&busy)
    );
    user.kill().unwrap();
    user.wait().unwrap();
    let unmounted = run_as(
        &world,
        "umount.registryfs",
        &[text(&mountpoint), "-v", "-r", "-t", "fuse.registryfs"],
    );
    assert_eq!(code(&unmounted), 0, "{}", errors(&unmounted));
    assert!(!is_mounted(&mountpoint));
    Lock::take(&world.store()).expect("the daemon has ended when umount returns");
}

#[test]
fn what_is_wrong_exits_as_mount_does() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let mountpoint = text(&mountpoint);
    let cases: &[(&[&str], i32, &str)] = &[
        (&["none"], 1, "MOUNTPOINT"),
        (&["none", mountpoint, "-o", "ro,colour"], 1, "colour"),
        (&["none", mountpoint, "-t", "ext4"], 1, "ext4"),
        (&["none", "/nonexistent/a"], 1, "mkdir -p /nonexistent/a"),
        (
            &["none", mountpoint, "-N", "/nonexistent/ns"],
            32,
            "/nonexistent/ns",
        ),
        (&["none", mountpoint, "-f", "-s", "-o", "colour"], 0, ""),
    ];
    for (arguments, status, word) in cases {
        let output = run_as(&world, "mount.registryfs", arguments);
        let message = errors(&output);
        assert_eq!(code(&output), *status, "{arguments:?}: {message}");
        assert!(message.contains(word), "{arguments:?}: {message}");
    }
    assert!(!world.store().exists(), "neither a mistake nor -f leaves traces");
    assert_eq!(code(&run_as(&world, "umount.registryfs", &["/"])), 1, "not ours");
}

#[test]
fn another_mount_namespace_is_entered_on_request() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    let mut elsewhere = Command::new("unshare");
    let mut elsewhere = elsewhere
        .args(["--mount", "--propagation", "private", "sleep", "600"])
        .spawn()
        .unwrap();
    let namespace = format!("/proc/{}/ns/mnt", elsewhere.id());
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    until("it has a namespace of its own", || {
        std::fs::read_link(&namespace).unwrap() != own
    });
    let number = elsewhere.id().to_string();
    for name in [&number, &namespace] {
        let mounted = run_as(
            &world,
            "mount.registryfs",
            &["none", text(&mountpoint), "-N", name],
        );
        let table = std::fs::read_to_string(format!("/proc/{number}/mountinfo")).unwrap();
        let is_there = table.contains(text(&mountpoint));
        let unmounted = run_as(&world, "umount.registryfs", &[text(&mountpoint), "-N", name]);
        if !is_there || code(&unmounted) != 0 {
            elsewhere.kill().unwrap();
        }
        assert_eq!(code(&mounted), 0, "{}", errors(&mounted));
        assert!(
            is_there && !is_mounted(&mountpoint),
            "it is mounted there, and not here"
        );
        assert_eq!(code(&unmounted), 0, "{}", errors(&unmounted));
    }
    elsewhere.kill().unwrap();
    elsewhere.wait().unwrap();
}

#[test]
fn a_mount_in_use_is_taken_away_lazily_and_its_place_taken_again() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let daemon = world.holder().unwrap().pid;
    let mut user = user_of(&mountpoint);
    let inside = format!("/proc/{}/cwd/.registryfs/version", user.id());
    let lazy = run_as(&world, "umount.registryfs", &[text(&mountpoint), "-l"]);
    let is_gone = !is_mounted(&mountpoint);
    let goes_on = std::fs::read_to_string(&inside).is_ok();
    let again = world.run(&["mount", text(&mountpoint)]);
    let forced = world.run(&["umount", "--force", text(&mountpoint)]);
    let holder = world.holder().map(|holder| holder.pid);
    let still_goes_on = std::fs::read_to_string(&inside).is_ok();
    user.kill().unwrap();
    user.wait().unwrap();
    assert_eq!(code(&lazy), 0, "{}", errors(&lazy));
    assert!(is_gone && goes_on);
    assert_eq!(code(&again), 0, "{}", errors(&again));
    assert_eq!(code(&forced), 0, "{}", errors(&forced));
    assert!(holder == Some(daemon) && still_goes_on, "it serves its last user");
    until("it ends with its last user", || {
        Lock::take(&world.store()).is_ok()
    });
    assert!(!is_mounted(&mountpoint));
}

#[test]
fn a_forced_unmount_fails_those_who_use_it() {
    let world = World::new();
    let mountpoint = world.mountpoint("m");
    world.text(&["mount", text(&mountpoint)]);
    let mut user = user_of(&mountpoint);
    let forced = run_as(&world, "umount.registryfs", &[text(&mountpoint), "-f"]);
    // What the kernel has not cached.
    let failure = std::fs::metadata(format!("/proc/{}/cwd/new.example.org", user.id())).unwrap_err();
    user.kill().unwrap();
    user.wait().unwrap();
    assert_eq!(code(&forced), 0, "{}", errors(&forced));
    assert_eq!(failure.raw_os_error(), Some(libc::ENOTCONN));
    assert!(!is_mounted(&mountpoint));
}

#[test]
fn all_dead_mounts_go_at_once_and_living_ones_stay() {
    let (dying, living) = (World::new(), World::new());
    let (dead, link, alive) = (
        dying.mountpoint("m"),
        dying.mountpoint("n"),
        living.mountpoint("m"),
    );
    dying.text(&["mount", text(&dead)]);
    dying.text(&["mount", text(&link)]);
    living.text(&["mount", text(&alive)]);
    let daemon = i32::try_from(dying.holder().unwrap().pid).unwrap();
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    until("the daemon is gone", || Lock::take(&dying.store()).is_ok());
    assert!(is_mounted(&dead) && is_mounted(&link));
    // In a mount namespace of its own, because other tests want their dead mounts.
    let own = dying.command(&["umount", "--dead"]);
    let mut apart = Command::new("unshare");
    apart
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .args(["\"$@\" && cat /proc/self/mountinfo", "sh"])
        .arg(own.get_program())
        .args(own.get_args())
        .env_clear()
        .envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = finish(start(&mut apart));
    assert_eq!(code(&output), 0, "{}", errors(&output));
    assert!(errors(&output).contains(text(&dead)), "{}", errors(&output));
    let table = String::from_utf8_lossy(&output.stdout);
    let stays = |mountpoint: &Path| table.contains(&format!(" {} ", mountpoint.display()));
    assert!(!stays(&dead) && !stays(&link) && stays(&alive), "{table}");
    dying.text(&["umount", text(&dead)]);
    dying.text(&["umount", text(&link)]);
    assert_eq!(code(&dying.run(&["umount"])), 2, "what to unmount must be said");
}

#[test]
fn the_name_counts_and_not_the_file() {
    let world = World::new();
    let link = world.mountpoint("links").join("mount.registryfs");
    symlink(env!("CARGO_BIN_EXE_registryfs"), &link).unwrap();
    let help = Command::new(&link).arg("--help").output().unwrap();
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("mount.registryfs"));
}
