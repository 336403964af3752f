//! A daemon's life from its first system call to its last: by `mount` in the background, by `mount -f`, or by
//! `registryfs daemon` under a service manager.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::connection::Connection;
use super::control;
use super::engine::Engine;
use super::log::{self, Verbosity};
use super::mounts::Mounts;
use super::protocol::MountRequest;
use super::server::{Server, listen};
use super::service::{Attempts, tell};
use super::socket::socket_path;
use super::source::MountSource;
use super::spawn::{Orders, Parent, log_file};
use crate::config::{Config, Loaded};
use crate::error::{Error, Result};
use crate::fuse::{Unmount, resolve_new_mountpoint};
use crate::store::lock::Lock;

/// How long work on other threads may go on after a daemon or a command has done its part.
pub const SHUTDOWN_WITHIN: Duration = Duration::from_secs(5);
/// How often a lock that a short command holds is tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// What ends a daemon, besides a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// The end of its last mount.
    WithLastMount,
    /// Nothing.
    OnlyBySignal,
}

/// A runtime for commands and daemons alike, in a process that may open as many files as it can get.
///
/// # Errors
/// [`Error::Io`] where the system gives no threads.
pub fn runtime() -> Result<Runtime> {
    super::descriptors::raise_limit();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("start of the runtime", &error))
}

/// `registryfs daemon`: mounts what the configuration names and stays until a signal ends it. `notice` shows
/// a line to the user.
///
/// # Errors
/// [`Error::Busy`] where the store has an owner already; whatever makes one of the mounts fail.
pub fn daemon(config: &Config, notice: fn(&str)) -> Result<()> {
    let requests = config
        .mounts
        .iter()
        .map(|entry| {
            Ok(MountRequest {
                mountpoint: resolve_new_mountpoint(&entry.mountpoint)?,
                source: MountSource::parse(entry.source.as_deref().unwrap_or_default())?,
                platform: entry.platform.clone().or_else(|| config.platform.clone()),
                allow_other: entry.allow_other.unwrap_or_else(allow_other_default),
                shown_source: entry.source.clone(),
                no_exec: false,
                place: None,
                allow: config.allow.clone(),
                deny: config.deny.clone(),
                share_private: entry.share_private.unwrap_or(config.share_private),
                kernel: entry.kernel.unwrap_or(config.kernel),
                background: entry.background.unwrap_or(config.background),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let lock = Lock::take(&config.cache_dir)?;
    let is_idle = requests.is_empty();
    live(config, lock, Ending::OnlyBySignal, requests, |ready| {
        if is_idle && ready.is_ok() {
            notice("no [[mount]] in the configuration: waiting for `registryfs mount`");
        }
        Ok(())
    })
}

/// Whether others reach a mount where nobody says: root mounts for the whole machine.
#[must_use]
pub fn allow_other_default() -> bool {
    nix::unistd::geteuid().is_root()
}

/// `registryfs daemon --spawned`: the process that [`super::mount`] started. Reports once through standard output.
///
/// # Errors
/// Those that it has reported.
pub fn spawned() -> Result<()> {
    let parent = Parent;
    close_inherited();
    // A session of its own, so that no terminal's signals reach it.
    let detached = nix::unistd::setsid().map_err(|errno| Error::io("setsid", &errno.into()));
    let orders = match detached.and_then(|_| Parent::orders()) {
        Ok(orders) => orders,
        Err(error) => return parent.report(&Err(error)),
    };
    let Orders { config, verbosity } = orders;
    log::to_file(verbosity, &log_file(&config.cache_dir));
    match Lock::take(&config.cache_dir) {
        Ok(lock) => live(&config, lock, Ending::WithLastMount, Vec::new(), |ready| {
            parent.report(ready)
        }),
        Err(error) => parent.report(&Err(error)),
    }
}

/// Closes what a careless parent left open: a daemon that holds someone's pipe or lock keeps them waiting for ever. Runs
/// before this process opens anything itself.
fn close_inherited() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let names: Vec<_> = open.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    let numbers = names.iter().filter_map(|name| name.to_str()?.parse::<i32>().ok());
    for number in numbers.filter(|&number| number > 2) {
        // The descriptor of the listing itself is among them, and gone already.
        let _ = nix::unistd::close(number);
    }
}

/// `registryfs mount -f`: mounts and returns when the mount is gone. Where a daemon owns the store already, it mounts,
/// and this process only waits.
///
/// # Errors
/// Those of [`super::mount`].
pub fn foreground(loaded: &Loaded, request: MountRequest, verbosity: Verbosity) -> Result<()> {
    let config = &loaded.config;
    let started = Instant::now();
    loop {
        let busy = match Lock::take(&config.cache_dir) {
            Ok(lock) => return live(config, lock, Ending::WithLastMount, vec![request], |_| Ok(())),
            Err(busy @ Error::Busy { .. }) => busy,
            Err(error) => return Err(error),
        };
        let runtime = runtime()?;
        if runtime
            .block_on(Connection::to_store(&config.cache_dir))?
            .is_some()
        {
            return runtime.block_on(through_daemon(loaded, &request, verbosity));
        }
        if started.elapsed() > config.timeout {
            return Err(busy);
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}

async fn through_daemon(loaded: &Loaded, request: &MountRequest, verbosity: Verbosity) -> Result<()> {
    let mut signals = Signals::new()?;
    control::mount(loaded, request, verbosity, |_| {}).await?;
    tokio::select! {
        result = control::wait_for_end(loaded, &request.mountpoint) => result,
        () = signals.next() => control::unmount(loaded, &request.mountpoint, Unmount::Idle).await,
    }
}

/// Runs a daemon whose lock was taken. `report` is told once whether it listens.
fn live(
    config: &Config,
    lock: Lock,
    ending: Ending,
    requests: Vec<MountRequest>,
    report: impl FnOnce(&Result<()>) -> Result<()>,
) -> Result<()> {
    super::memory::limit();
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        match Daemon::prepare(config, lock, ending) {
            Ok(daemon) => match report(&Ok(())) {
                Ok(()) => daemon.run(requests).await,
                Err(error) => Err(error),
            },
            Err(error) => {
                let result = Err(error);
                report(&result)?;
                result.map(|()| Vec::new())
            }
        }
    });
    // The lock is free once the last task is gone; only then may those who wait for it see the end.
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    result.map(drop::<Vec<UnixStream>>)
}

/// A daemon that listens.
struct Daemon {
    engine: Arc<Engine>,
    mounts: Arc<Mounts>,
    server: Arc<Server>,
    listener: tokio::net::UnixListener,
    socket: std::path::PathBuf,
    signals: Signals,
}

impl Daemon {
    fn prepare(config: &Config, lock: Lock, ending: Ending) -> Result<Self> {
        let engine = Arc::new(Engine::open(config, lock, None, &Handle::current())?);
        let mounts = Mounts::new(engine.clone(), ending);
        let server = Server::new(config.clone(), engine.clone(), mounts.clone());
        let signals = Signals::new()?;
        let socket = socket_path(&config.cache_dir)?;
        let listener = listen(&socket)?;
        engine.publish(Some(&socket))?;
        tracing::info!(store = %config.cache_dir.display(), socket = %socket.display(), "listening");
        Ok(Self {
            engine,
            mounts,
            server,
            listener,
            socket,
            signals,
        })
    }

    /// Mounts, serves, and cleans up after itself whatever happened.
    async fn run(self, requests: Vec<MountRequest>) -> Result<Vec<UnixStream>> {
        let Self {
            engine,
            mounts,
            server,
            listener,
            socket,
            mut signals,
        } = self;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async {
            // A sender that is gone means the same.
            let _ = stopped.await;
        };
        let serving = tokio::spawn(server.clone().run(listener, stopped));
        let giving_back = tokio::spawn(super::memory::give_back(engine.images().fetcher().clone()));
        let attempts = Attempts::start(&server, requests);
        let is_up = tokio::select! {
            result = attempts.settle() => result.map(|()| true),
            () = signals.next() => Ok(false),
        };
        if is_up == Ok(true) {
            tell(&[NotifyState::Ready]);
            tokio::select! {
                () = attempts.report(&mounts) => {}
                () = mounts.over() => {}
                () = signals.next() => {}
            }
        }
        tell(&[NotifyState::Stopping]);
        drop(attempts);
        giving_back.abort();
        withdraw(&engine, &socket);
        mounts.unmount_all().await;
        drop(stop);
        let farewells = serving.await.unwrap_or_default();
        engine.close();
        tracing::info!("ended");
        is_up.map(|_| farewells)
    }
}

/// Makes new clients look elsewhere. The socket is removed while the lock is held, so it is certainly our own.
fn withdraw(engine: &Engine, socket: &Path) {
    if let Err(error) = engine.publish(None) {
        tracing::warn!(%error, "cannot withdraw from the lock file");
    }
    if let Err(error) = std::fs::remove_file(socket) {
        tracing::warn!(%error, socket = %socket.display(), "cannot remove the socket");
    }
}

/// The signals that end a daemon in order.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> Result<Self> {
        let on = |kind| signal(kind).map_err(|error| Error::io("signals", &error));
        Ok(Self([
            on(SignalKind::terminate())?,
            on(SignalKind::interrupt())?,
            on(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
