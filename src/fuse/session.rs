//! The threads that answer the kernel's requests on one connection, from its greeting to its end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use parking_lot::Mutex;

use super::adapter::Adapter;
use super::ahead::Ahead;
use super::counters::{Counters, Requests};
use super::helper_process::Helper;
use super::notify;
use super::session_end::SessionEnd;
use crate::error::{Error, Result};
use crate::fs::ops::Operations;

/// How long the end of a session is waited for after its mount is gone. The kernel ends it as soon as nobody, in any
/// mount namespace, has it.
pub(super) const END_WAIT: Duration = Duration::from_secs(5);
/// Session threads: more only wake each other, because work that waits is not done on them.
const THREADS: std::ops::RangeInclusive<usize> = 2..=8;

/// Threads that take requests from the kernel: one a core, within bounds.
pub(super) fn threads_by_default() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.clamp(*THREADS.start(), *THREADS.end())
}

/// A connection that is served, or not yet.
#[derive(Debug)]
pub(super) struct Served {
    /// What it is called in messages.
    what: String,
    requests: Arc<Requests>,
    end: Arc<SessionEnd>,
    /// A copy of the descriptor, to send what no request asks for. It is closed when the threads end: while it is open
    /// the kernel takes the connection for a living one.
    device: Arc<Mutex<Option<OwnedFd>>>,
    /// What contents that nobody has asked for are handed on with: the helper, and `major:minor` of the mount.
    hands_on: Option<(Helper, String)>,
    thread: Option<JoinHandle<()>>,
}

impl Default for Served {
    fn default() -> Self {
        Self {
            what: String::new(),
            requests: Arc::default(),
            end: Arc::new(SessionEnd::new()),
            device: Arc::default(),
            hands_on: None,
            thread: None,
        }
    }
}

impl Served {
    /// A connection over which the kernel is handed what is read next.
    pub(super) fn handing_on(helper: Helper, device_number: String) -> Self {
        Self {
            hands_on: Some((helper, device_number)),
            ..Self::default()
        }
    }

    /// Greets the kernel and starts the threads. Where this fails the session has ended. `enforces_permissions` says
    /// whether the kernel does for this mount.
    pub(super) fn start(
        &mut self,
        fs: Arc<dyn Operations>,
        device: OwnedFd,
        what: String,
        enforces_permissions: bool,
        threads: usize,
        runtime: &tokio::runtime::Handle,
    ) -> Result<()> {
        self.what = what;
        let failed = |error: &std::io::Error| {
            self.device.lock().take();
            self.end.set();
            Error::io(self.what.as_str(), error)
        };
        *self.device.lock() = Some(device.try_clone().map_err(|error| failed(&error))?);
        let (requests, runtime) = (self.requests.clone(), runtime.clone());
        let ahead = self.hands_on.take().map(|(helper, device_number)| {
            Ahead::new(Arc::clone(&fs), Arc::clone(&self.device), helper, device_number)
        });
        let adapter = Adapter::new(
            fs,
            enforces_permissions,
            requests,
            runtime,
            self.end.clone(),
            ahead,
        );
        let mut config = Config::default();
        config.n_threads = Some(threads.max(1));
        // Who may enter is the kernel's decision, by the mount's own options.
        let session =
            Session::from_fd(adapter, device, SessionACL::All, config).map_err(|error| failed(&error))?;
        let (end, copy) = (self.end.clone(), self.device.clone());
        let thread = std::thread::Builder::new()
            .name("fuse-session".into())
            .spawn(move || {
                if let Err(error) = session.run() {
                    tracing::error!(%error, "the FUSE session failed");
                }
                copy.lock().take();
                end.set();
            })
            .map_err(|error| failed(&error))?;
        self.thread = Some(thread);
        Ok(())
    }

    /// Sends the kernel what no request asked for. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`]; also when the session has ended.
    pub(super) fn notify(&self, message: &[u8]) -> Result<()> {
        // The kernel may hold the call for long, so it is made on a copy and not under the lock.
        let copy = self.device.lock().as_ref().map(OwnedFd::try_clone);
        let gone = || std::io::Error::from_raw_os_error(libc::ENOTCONN);
        let sent = copy
            .unwrap_or_else(|| Err(gone()))
            .and_then(|device| notify::send(device.as_fd(), message));
        sent.map_err(|error| Error::io(self.what.as_str(), &error))
    }

    /// Whether the session has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.end.is_set()
    }

    /// Blocks until it has ended, or for `limit`; says whether it has.
    pub(super) fn wait_blocking(&self, limit: Duration) -> bool {
        self.end.wait_blocking(limit)
    }

    /// A future that resolves when it has ended.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.end.wait()
    }

    /// Waits for its end for `limit`, and then for its threads.
    pub(super) fn join(&mut self, limit: Duration) {
        let what = self.what.as_str();
        if !self.end.wait_blocking(limit) {
            // Joining might take for ever; the session ends with this process at the latest.
            tracing::warn!(what, "still in use; it goes on");
            return;
        }
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!(what, "it panicked");
        }
    }

    /// The requests so far.
    pub(super) fn counters(&self) -> Counters {
        self.requests.snapshot()
    }
}
