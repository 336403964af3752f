//! A demo registry, a store and mountpoints for one test, used through system calls as a user would. Nothing of it outlives
//! the test: a watchdog kills a daemon that leaves a test waiting, and with it every system call that waits for it.

// Each test binary uses its own part of this.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use registryfs::demo::{Behaviour, Content, DemoRegistry, Handle, Record};
use registryfs::store::lock::{Lock, holder};
use serde_json::Value;

/// What takes longer hangs for ever.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct World {
    dir: tempfile::TempDir,
    pub(crate) registry: DemoRegistry,
    /// Global options of every command.
    options: Vec<String>,
    /// The setting `kernel`.
    kernel: &'static str,
    _watchdog: Sender<()>,
}

impl World {
    pub(crate) fn new(content: Content) -> Self {
        Self::with(content, Behaviour::default(), &[])
    }

    /// A world whose every command has these global options.
    pub(crate) fn with(content: Content, behaviour: Behaviour, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let watchdog = watchdog(dir.path().join("store"));
        Self {
            dir,
            registry: DemoRegistry::start(content, behaviour).unwrap(),
            options: options.iter().map(ToString::to_string).collect(),
            kernel: default_mode(),
            _watchdog: watchdog,
        }
    }

    /// The same with the settings of a configuration file.
    pub(crate) fn configured(mut self, toml: &str) -> Self {
        let file = self.dir.path().join("config.toml");
        std::fs::write(&file, toml).unwrap();
        let file = file.to_str().unwrap().to_owned();
        self.options.extend(["--config".to_owned(), file]);
        self
    }

    /// The same with every root filesystem served by FUSE, for what the kernel's own view of one does not have by design
    /// (README, "Kernel mode"): each use says what that is.
    pub(crate) fn by_fuse(mut self) -> Self {
        self.kernel = "off";
        self
    }

    /// The same with every root filesystem served by the kernel, or not at all.
    pub(crate) fn by_kernel(mut self) -> Self {
        self.kernel = "require";
        self
    }

    /// Whether the kernel may serve root filesystems.
    pub(crate) fn is_by_kernel(&self) -> bool {
        self.kernel != "off"
    }

    /// The same with a registry that is mounted already.
    pub(crate) fn mounted(self) -> Self {
        self.mount();
        self
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.registry.handle()
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Where [`Self::mount`] mounts, without symbolic links.
    pub(crate) fn root(&self) -> PathBuf {
        self.mountpoint("main")
    }

    pub(crate) fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.dir.path().canonicalize().unwrap().join("mnt").join(name);
        // A dead mount cannot be made anew, nor need it be.
        let _ = std::fs::create_dir(&path);
        path
    }

    /// A path below the registry's directory.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.root().join(self.registry.host()).join(path)
    }

    /// The command with an environment of its own.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registryfs"));
        command
            .arg("--cache-dir")
            .arg(self.store())
            .args(&self.options)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.dir.path())
            .env("REGISTRYFS_KERNEL", self.kernel)
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        finish(start(&mut self.command(arguments)))
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub(crate) fn text<S: AsRef<OsStr>>(&self, arguments: &[S]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, where that is no text.
    pub(crate) fn text_bytes<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Vec<u8> {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output.stdout
    }

    pub(crate) fn mount(&self) {
        self.mount_with(&[]);
    }

    pub(crate) fn mount_with(&self, options: &[&str]) {
        let root = self.root();
        let arguments = options.iter().copied().chain([root.to_str().unwrap()]);
        self.text(&std::iter::once("mount").chain(arguments).collect::<Vec<_>>());
    }

    pub(crate) fn umount(&self) {
        self.text(&["umount", self.root().to_str().unwrap()]);
    }

    /// Ends the daemon in order and starts the next one on the same store.
    pub(crate) fn restart(&self) {
        self.umount();
        self.mount();
    }

    pub(crate) fn daemon(&self) -> Pid {
        pid(holder(&self.store()).unwrap().pid)
    }

    /// Ends the daemon as a crash would.
    pub(crate) fn kill_daemon(&self) {
        kill(self.daemon(), Signal::SIGKILL).unwrap();
        until("the lock is free", || Lock::take(&self.store()).is_ok());
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.store().join("daemon.log")).unwrap_or_default()
    }

    /// What `.registryfs/errors` says.
    pub(crate) fn errors(&self) -> String {
        std::fs::read_to_string(self.root().join(".registryfs/errors")).unwrap()
    }

    /// What `.registryfs/status.json` says.
    pub(crate) fn status(&self) -> Value {
        let text = std::fs::read_to_string(self.root().join(".registryfs/status.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// The requests that `work` causes, with what it returns.
    pub(crate) fn requests<T>(&self, work: impl FnOnce() -> T) -> (T, Vec<Record>) {
        self.settle();
        self.handle().clear_ledger();
        let result = work();
        self.settle();
        (result, self.handle().ledger())
    }

    /// Waits until no answer is under way any more.
    fn settle(&self) {
        until("the registry is at rest", || {
            self.handle().ledger().iter().all(|record| record.ended.is_some())
        });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for mountpoint in std::fs::read_dir(self.dir.path().join("mnt"))
            .into_iter()
            .flatten()
        {
            let _ = mountpoint.map(|entry| umount2(&entry.path(), MntFlags::MNT_DETACH));
        }
        let started = Instant::now();
        // The daemon works in the directory that is about to be removed.
        while let Some(socket_holder) = holder(&self.store()).filter(|holder| holder.socket.is_some()) {
            if Lock::take(&self.store()).is_ok() {
                break;
            }
            if started.elapsed() > Duration::from_secs(10) {
                let _ = kill(pid(socket_holder.pid), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Kills whoever holds the store when the sender still lives after [`LIMIT`].
pub(crate) fn watchdog(store: PathBuf) -> Sender<()> {
    let (sender, receiver) = channel::<()>();
    std::thread::spawn(move || {
        if receiver.recv_timeout(LIMIT) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        eprintln!("the test hangs: killing its daemon");
        if let Some(holder) = holder(&store) {
            let _ = kill(pid(holder.pid), Signal::SIGKILL);
        }
    });
    sender
}

pub(crate) fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap())
}

pub(crate) fn start(command: &mut Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The end of a child, which is killed when it does not come.
pub(crate) fn finish(child: Child) -> Output {
    let number = pid(child.id());
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(LIMIT) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            let _ = kill(number, Signal::SIGKILL);
            panic!("a command hangs");
        }
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits for something that happens elsewhere.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < LIMIT, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The errno of a system call that must fail.
pub(crate) fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

/// Who serves root filesystems where a test does not say: `REGISTRYFS_KERNEL=off` runs all of them by FUSE, which stays what
/// ordinary users and other kernels have.
fn default_mode() -> &'static str {
    match std::env::var("REGISTRYFS_KERNEL") {
        Ok(mode) if mode == "off" => "off",
        _ => "auto",
    }
}

/// The first byte of a file, with as little read-ahead as the kernel does.
pub(crate) fn first_byte(file: &Path) -> u8 {
    let mut byte = [0];
    std::fs::File::open(file)
        .unwrap()
        .read_exact_at(&mut byte, 0)
        .unwrap();
    byte[0]
}

/// Bytes that do not compress.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
