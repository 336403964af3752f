//! A mount for a test: always cleaned up, never waited for without a limit.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use registryfs::fs::ops::Operations;
use registryfs::fuse::{Counters, Helper, Mount, MountOptions};
use tokio::runtime::{Handle, Runtime};

use crate::fake::{Fake, FakeFs};

/// What hangs longer than this hangs for ever.
const LIMIT: Duration = Duration::from_secs(40);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// Tests that look at the whole process must not run beside others.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

thread_local! {
    static TURN: MutexGuard<'static, ()> = ONE_AT_A_TIME.lock();
}

pub(crate) fn handle() -> &'static Handle {
    RUNTIME.handle()
}

pub(crate) fn helper() -> Helper {
    Helper::at(env!("CARGO_BIN_EXE_registryfs"))
}

pub(crate) fn options(mountpoint: &Path) -> MountOptions {
    TURN.with(|_| ());
    let mut options = MountOptions::new(mountpoint);
    options.helper = Some(env!("CARGO_BIN_EXE_registryfs").into());
    options
}

pub(crate) fn no_fs() -> Arc<dyn Operations> {
    Arc::new(FakeFs(Fake::new()))
}

/// Runs what may hang on a thread of its own.
pub(crate) fn within<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let result = work();
        let _ = sender.send(());
        result
    });
    match receiver.recv_timeout(LIMIT) {
        Err(RecvTimeoutError::Timeout) => panic!("it hangs"),
        Ok(()) | Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        },
    }
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The output of a command that must succeed.
pub(crate) fn output(command: &mut Command) -> String {
    let child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let output = Killed(child).output();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// A child that does not outlive its test.
pub(crate) struct Killed(pub(crate) Child);

impl Killed {
    pub(crate) fn wait(&mut self) {
        wait_until("the child ends", || self.0.try_wait().unwrap().is_some());
    }

    /// Waits for its end and takes its output, whose pipe it must have.
    pub(crate) fn output(mut self) -> Output {
        let mut stdout = self.0.stdout.take().unwrap();
        let bytes = within(move || {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut stdout, &mut bytes).unwrap();
            bytes
        });
        self.wait();
        Output {
            status: self.0.wait().unwrap(),
            stdout: bytes,
            stderr: Vec::new(),
        }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Mounted {
    pub(crate) fake: Arc<Fake>,
    mount: Option<Mount>,
    mountpoint: PathBuf,
    _dir: Option<tempfile::TempDir>,
}

impl Mounted {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut mounted = Self::at(dir.path());
        mounted._dir = Some(dir);
        mounted
    }

    pub(crate) fn at(mountpoint: &Path) -> Self {
        Self::with(options(mountpoint))
    }

    pub(crate) fn with(options: MountOptions) -> Self {
        let fake = Fake::new();
        let fs = Arc::new(FakeFs(fake.clone()));
        let mountpoint = options.mountpoint.clone();
        let mount = within(move || Mount::start(fs, &options, handle()).unwrap());
        Self {
            fake,
            mount: Some(mount),
            mountpoint,
            _dir: None,
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.mountpoint.clone()
    }

    pub(crate) fn mount(&self) -> &Mount {
        self.mount.as_ref().unwrap()
    }

    pub(crate) fn unmount_by_drop(&mut self) {
        let mount = self.mount.take();
        within(move || drop(mount));
    }

    pub(crate) fn counters(&self) -> Counters {
        self.mount().counters()
    }

    pub(crate) fn wait_for_held(&self, count: usize) {
        wait_until("requests are held", || {
            let held = self.fake.held.load(std::sync::atomic::Ordering::SeqCst);
            if count == 0 { held == 0 } else { held >= count }
        });
    }

    pub(crate) fn has_ended(&self) -> bool {
        let ended = self.mount().ended();
        handle()
            .block_on(async { tokio::time::timeout(Duration::ZERO, ended).await })
            .is_ok()
    }

    pub(crate) fn wait_for_end(&self) {
        let ended = self.mount().ended();
        let in_time = handle().block_on(async { tokio::time::timeout(LIMIT, ended).await });
        assert!(in_time.is_ok(), "the session does not end");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount_by_drop();
    }
}
