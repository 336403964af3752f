//! The log: what is written on standard error, by whom, and how much of it is kept.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Size at which a daemon's log file is put aside, in bytes. One older file is kept.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// Who writes on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// A command, which ends in an answer or an error: its log would only say the same again.
    Command,
    /// A daemon, which has nothing but its log to say what went wrong.
    Daemon,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verbosity {
    /// What nobody else tells: a command's errors, a daemon's warnings too.
    #[default]
    Quiet,
    /// What is done.
    Verbose,
    /// And why.
    Debug,
}

impl Verbosity {
    /// Only this crate speaks up: the libraries below the registry client would show headers and signed URLs.
    fn filter(self, speaker: Speaker) -> EnvFilter {
        EnvFilter::new(match (self, speaker) {
            (Self::Quiet, Speaker::Command) => "error",
            (Self::Quiet, Speaker::Daemon) => "error,registryfs=warn",
            (Self::Verbose, _) => "error,registryfs=info",
            (Self::Debug, _) => "error,registryfs=debug",
        })
    }

    /// As much as the daemon logs, whose log is read when something has gone wrong already.
    pub(super) fn for_daemon(self) -> Self {
        match self {
            Self::Quiet => Self::Verbose,
            other => other,
        }
    }
}

/// Logs of a command and of a daemon in the foreground: lines on standard error.
pub fn to_stderr(verbosity: Verbosity, speaker: Speaker) {
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(verbosity.filter(speaker))
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(io::stderr);
    // A second call would be refused, and the first one's choice stands.
    let _ = subscriber.try_init();
}

/// Logs of a daemon without a terminal, whose standard error is the file at `path` already.
pub(super) fn to_file(verbosity: Verbosity, path: &Path) {
    let file = LogFile::new(path);
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(verbosity.filter(Speaker::Daemon))
        .with_ansi(false)
        .with_target(false)
        // It would complain on standard error, which is this file, and panic where that fails: on a full disk a line of
        // the log would cost a read.
        .log_internal_errors(false)
        .with_writer(move || file.clone());
    let _ = subscriber.try_init();
}

/// Standard error as a file that does not grow without end. It stays descriptor 2, so that a panic's message and the
/// words of a C library end up in it too.
#[derive(Debug, Clone)]
struct LogFile {
    path: PathBuf,
    written_bytes: Arc<Mutex<u64>>,
}

impl LogFile {
    fn new(path: &Path) -> Self {
        let written_bytes = fs::metadata(path).map_or(0, |metadata| metadata.len());
        Self {
            path: path.to_owned(),
            written_bytes: Arc::new(Mutex::new(written_bytes)),
        }
    }

    fn rotate(&self) -> io::Result<()> {
        fs::rename(&self.path, rotated(&self.path))?;
        let fresh = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)?;
        nix::unistd::dup2_stderr(fresh).map_err(io::Error::from)
    }
}

/// Where the file before the current one is.
fn rotated(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut written_bytes = self.written_bytes.lock();
        if *written_bytes > LOG_BYTES_MAX {
            // Where it cannot be put aside it grows on: losing the log would be worse.
            let _ = self.rotate();
            *written_bytes = 0;
        }
        *written_bytes += bytes.len() as u64;
        io::stderr().lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}
