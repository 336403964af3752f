//! Starting the daemon that outlives its command. Its settings go through a pipe, because the arguments of a process
//! are there for everyone to read and the settings may hold a password; its readiness, or why it failed, comes back
//! through another.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::log::Verbosity;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::store::lock::make_dir;

/// How long a daemon may take from its start to its readiness.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Largest such message in bytes.
const READY_BYTES_MAX: u64 = 1 << 20;

/// What the daemon is told through its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Orders {
    /// Its settings, the secret among them included.
    pub(super) config: Config,
    /// How much it logs.
    pub(super) verbosity: Verbosity,
}

/// The log file of a store's daemon.
pub(super) fn log_file(cache_dir: &Path) -> PathBuf {
    cache_dir.join("daemon.log")
}

/// Starts a daemon and waits until it listens on its socket.
///
/// # Errors
/// Its own error, such as [`Error::Busy`] where another process took the lock first; [`Error::Timeout`].
pub(super) async fn spawn(orders: &Orders) -> Result<()> {
    let log = log_file(&orders.config.cache_dir);
    let mut child = start(&log)?;
    let written = hand_over(&mut child, orders);
    let ready = match child.stdout.take() {
        Some(stdout) => wait_until_ready(stdout.into(), &log).await,
        None => Err(Error::usage("the daemon has no standard output")),
    };
    let result = written.and(ready);
    if result.is_err() {
        // It has most likely ended by itself; one that hangs must not come up after its failure was reported.
        let _ = child.kill();
        let _ = child.wait();
    }
    result
}

fn start(log: &Path) -> Result<Child> {
    let dir = log.parent().unwrap_or(Path::new("/"));
    make_dir(dir)?;
    let stderr = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)
        .map_err(|error| Error::io(log.display().to_string(), &error))?;
    let program = std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        // The program was replaced since it was started: this name still leads to it.
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let mut command = Command::new(program);
    // A mount unit has no home directory in its environment, and credentials are looked for there.
    if std::env::var_os("HOME").is_none()
        && let Ok(Some(user)) = nix::unistd::User::from_uid(nix::unistd::geteuid())
    {
        command.env("HOME", user.dir);
    }
    // The daemon looks for credentials where its command would, but works in another directory.
    for name in ["REGISTRY_AUTH_FILE", "DOCKER_CONFIG"] {
        if let Some(Ok(path)) = std::env::var_os(name)
            .filter(|path| !path.is_empty())
            .map(std::path::absolute)
        {
            command.env(name, path);
        }
    }
    command
        .args(["daemon", "--spawned"])
        // It is not the service that its command may be part of, and must not speak for it.
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .map_err(|error| Error::io("start of the daemon", &error))
}

fn hand_over(child: &mut Child, orders: &Orders) -> Result<()> {
    let failed = |error: io::Error| Error::io("orders for the daemon", &error);
    let text = serde_json::to_vec(orders).map_err(|error| failed(error.into()))?;
    match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(&text).map_err(failed),
        None => Err(Error::usage("the daemon has no standard input")),
    }
}

async fn wait_until_ready(stdout: OwnedFd, log: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io("readiness of the daemon", &error);
    let mut report = Vec::new();
    let mut pipe = pipe::Receiver::from_owned_fd(stdout)
        .map_err(failed)?
        .take(READY_BYTES_MAX);
    match timeout(READY_WITHIN, pipe.read_to_end(&mut report)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(failed(error)),
        Err(_) => {
            return Err(Error::Timeout {
                what: "the start of the daemon".to_owned(),
                waited_ms: u64::try_from(READY_WITHIN.as_millis()).unwrap_or(u64::MAX),
            });
        }
    }
    serde_json::from_slice::<std::result::Result<(), Error>>(&report).unwrap_or_else(|_| {
        Err(Error::Io {
            what: "daemon".to_owned(),
            errno: 0,
            why: format!("ended without a word; see {}", log.display()),
        })
    })
}

/// The daemon's side of the pipes: reads its orders, and reports once.
#[derive(Debug)]
pub(super) struct Parent;

impl Parent {
    /// Reads the orders.
    pub(super) fn orders() -> Result<Orders> {
        let mut text = Vec::new();
        let bytes_max = 16 << 20;
        io::Read::read_to_end(&mut io::Read::take(io::stdin().lock(), bytes_max), &mut text)
            .map_err(|error| Error::io("orders", &error))?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::usage(format!("--spawned is for registryfs itself: {error}")))
    }

    /// Tells the parent that the daemon listens, or why it ends, and lets go of the pipe.
    pub(super) fn report(self, result: &Result<()>) -> Result<()> {
        let failed = |error: io::Error| Error::io("readiness", &error);
        let text = serde_json::to_vec(result).map_err(|error| failed(error.into()))?;
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(&text)
            .and_then(|()| stdout.flush())
            .map_err(failed)?;
        let null = fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .map_err(failed)?;
        nix::unistd::dup2_stdout(null).map_err(|errno| failed(errno.into()))
    }
}
