//! A store, a mountpoint or two, and the command, for one test: nothing of it outlives the test, however that ends.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use registryfs::demo::{Behaviour, Content, DemoRegistry, sample_content};
use registryfs::store::lock::{Holder, holder};

/// What takes longer hangs for ever.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Compressing it takes longer than most tests.
static CONTENT: LazyLock<Content> = LazyLock::new(|| sample_content().unwrap());

pub(crate) struct World {
    dir: tempfile::TempDir,
    pub(crate) registry: DemoRegistry,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(Behaviour::default())
    }

    pub(crate) fn with(behaviour: Behaviour) -> Self {
        Self::start(CONTENT.clone(), behaviour)
    }

    /// A world whose registry has this content.
    pub(crate) fn of(content: Content) -> Self {
        Self::start(content, Behaviour::default())
    }

    fn start(content: Content, behaviour: Behaviour) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            registry: DemoRegistry::start(content, behaviour).unwrap(),
        }
    }

    /// A path in the directory of the test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the layers in the store take up on disk.
    pub(crate) fn disk_bytes(&self) -> u64 {
        let Ok(layers) = std::fs::read_dir(self.store().join("layers")) else {
            return 0;
        };
        let data = layers.map(|layer| layer.unwrap().path().join("data"));
        data.filter_map(|data| data.metadata().ok())
            .map(|metadata| metadata.blocks() * 512)
            .sum()
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A fresh directory to mount at, without symbolic links in its path.
    pub(crate) fn mountpoint(&self, name: &str) -> PathBuf {
        let path = self.dir.path().canonicalize().unwrap().join("mnt").join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// A reference in the demo registry.
    pub(crate) fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.host())
    }

    /// The command with an environment of its own.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_registryfs"));
        command
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.dir.path())
            .env("REGISTRYFS_CACHE_DIR", self.store())
            .stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Output {
        finish(start(&mut self.command(arguments)))
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub(crate) fn text<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> String {
        let output = self.run(arguments);
        assert_eq!(code(&output), 0, "{}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Who holds the store's lock, if he is still there.
    pub(crate) fn holder(&self) -> Option<Holder> {
        let holder = holder(&self.store())?;
        let alive = Path::new("/proc").join(holder.pid.to_string()).exists();
        alive.then_some(holder)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.store().join("daemon.log")).unwrap_or_default()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let Ok(mountpoints) = std::fs::read_dir(self.dir.path().join("mnt")) else {
            return;
        };
        for mountpoint in mountpoints.flatten() {
            let _ = nix::mount::umount2(&mountpoint.path(), nix::mount::MntFlags::MNT_DETACH);
        }
        // The daemon works in the directory that is about to be removed.
        until("the daemon ends", || {
            self.holder().is_none_or(|holder| holder.socket.is_none())
        });
    }
}

pub(crate) fn start(command: &mut Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

pub(crate) fn finish(child: Child) -> Output {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match receiver.recv_timeout(LIMIT) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            panic!("the command hangs");
        }
    }
}

pub(crate) fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

pub(crate) fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits for something that another process does.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(
            started.elapsed() < LIMIT || std::thread::panicking(),
            "waited too long until {what}"
        );
        if started.elapsed() > LIMIT {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let text = format!(" {} ", path.display());
    table.contains(&text)
}
