//! Ordinary users beside root. Here `/dev/fuse` may be closed to them, and the program in a place that they cannot reach, so
//! the test's own thread gets a mount namespace in which neither is so. Every process that it starts lives there too.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::Sender;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use registryfs::store::lock::{Lock, holder};

use crate::world::{finish, pid, start, stderr, until, watchdog};

/// Users that every system has: fusermount3 asks for their names.
pub(crate) const ONE: u32 = 1;
pub(crate) const TWO: u32 = 2;

fn bind(what: &Path, at: &Path) {
    mount(Some(what), at, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
}

/// The namespace, and a directory that all users reach.
pub(crate) struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    pub(crate) fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let program = dir.path().join("registryfs");
        fs::write(&program, "").unwrap();
        bind(Path::new(env!("CARGO_BIN_EXE_registryfs")), &program);
        // A filesystem of its own, because that of the directory may take no devices.
        let devices = dir.path().join("devices");
        fs::create_dir(&devices).unwrap();
        mount(
            Some("none"),
            &devices,
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let fuse = devices.join("fuse");
        mknod(
            &fuse,
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o666),
            makedev(10, 229),
        )
        .unwrap();
        fs::set_permissions(&fuse, PermissionsExt::from_mode(0o666)).unwrap();
        bind(&fuse, Path::new("/dev/fuse"));
        Self { dir }
    }

    /// A file with this text in place of one of the system's.
    pub(crate) fn replace(&self, file: &str, text: &str) {
        let own = self.dir.path().join(file.replace('/', "_"));
        fs::write(&own, text).unwrap();
        bind(&own, Path::new(file));
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap()
    }

    /// A user with a home.
    pub(crate) fn user(&self, uid: u32) -> User {
        let home = self.dir().join(format!("home-{uid}"));
        fs::create_dir(&home).unwrap();
        let mountpoint = home.join("mnt");
        fs::create_dir(&mountpoint).unwrap();
        for dir in [&home, &mountpoint] {
            chown(dir, Some(uid), Some(uid)).unwrap();
        }
        User {
            uid,
            program: self.dir().join("registryfs"),
            _watchdog: watchdog(home.join(".cache/registryfs")),
            home,
            mountpoint,
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for name in ["registryfs", "devices"] {
            let _ = umount2(&self.dir.path().join(name), MntFlags::MNT_DETACH);
        }
    }
}

pub(crate) struct User {
    uid: u32,
    program: PathBuf,
    home: PathBuf,
    pub(crate) mountpoint: PathBuf,
    _watchdog: Sender<()>,
}

impl User {
    pub(crate) fn store(&self) -> PathBuf {
        self.home.join(".cache/registryfs")
    }

    /// A program run by this user.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.home)
            .env("TMPDIR", &self.home)
            .current_dir("/")
            .uid(self.uid)
            .gid(self.uid)
            .stdin(Stdio::null());
        command
    }

    /// Our command, not started yet.
    pub(crate) fn registryfs(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(self.program.to_str().unwrap());
        command.args(arguments);
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        finish(start(&mut self.registryfs(arguments)))
    }

    pub(crate) fn mount(&self) {
        self.mount_with(&[]);
    }

    pub(crate) fn mount_with(&self, options: &[&str]) {
        let place = self.mountpoint.to_str().unwrap();
        let arguments: Vec<&str> = ["mount"]
            .into_iter()
            .chain(options.iter().copied())
            .chain([place])
            .collect();
        let output = self.run(&arguments);
        assert!(output.status.success(), "{}", stderr(&output));
    }

    pub(crate) fn umount(&self) -> Output {
        self.run(&["umount", self.mountpoint.to_str().unwrap()])
    }

    /// The error of a mount that must fail with exit code 2.
    pub(crate) fn refused_mount(&self, options: &[&str], path: Option<&Path>) -> String {
        let place = self.mountpoint.to_str().unwrap();
        let arguments: Vec<&str> = ["mount"]
            .into_iter()
            .chain(options.iter().copied())
            .chain([place])
            .collect();
        let mut command = self.registryfs(&arguments);
        if let Some(path) = path {
            command.env("PATH", path);
        }
        let output = finish(start(&mut command));
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(mounted_at(&self.mountpoint).is_none(), "nothing stays mounted");
        stderr(&output)
    }

    /// Runs a shell script with the path as `$1`.
    pub(crate) fn sh(&self, script: &str, path: &Path) -> Output {
        finish(start(self.command("sh").args(["-c", script, "sh"]).arg(path)))
    }

    /// What a script prints that must succeed without a word on standard error.
    pub(crate) fn said(&self, script: &str, path: &Path) -> String {
        let output = self.sh(script, path);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{script}: {}",
            stderr(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Whether the user can look into the path: read a file, list a directory.
    pub(crate) fn may(&self, path: &Path) -> bool {
        let output = self.sh("if test -d \"$1\"; then ls \"$1\"; else cat \"$1\"; fi", path);
        let said = stderr(&output);
        assert!(
            output.status.success() || said.contains("Permission denied"),
            "{said}"
        );
        output.status.success()
    }

    /// Ends the daemon as a crash would.
    pub(crate) fn kill_daemon(&self) {
        kill(pid(holder(&self.store()).unwrap().pid), Signal::SIGKILL).unwrap();
        until("the lock is free", || Lock::take(&self.store()).is_ok());
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if mounted_at(&self.mountpoint).is_some() {
            let _ = umount2(&self.mountpoint, MntFlags::MNT_DETACH);
        }
        until("the daemon of a user has ended", || {
            !self.store().exists() || Lock::take(&self.store()).is_ok()
        });
    }
}

/// The line of the mount table, as `/proc/mounts` has it, of what is mounted there.
pub(crate) fn mounted_at(mountpoint: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let place = format!(" {} ", mountpoint.display());
    table
        .lines()
        .rfind(|line| line.contains(&place))
        .map(str::to_owned)
}
