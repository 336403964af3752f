//! The options that every command takes.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use crate::config::{Credential, Layer};
use crate::daemon::log::Verbosity;

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// The global options.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct Globals {
    /// Read this configuration file too
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The cache to work on
    #[arg(long, global = true, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// The platform to choose from indexes [default: the host's]
    #[arg(long, global = true, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<String>,
    /// Speak plain HTTP
    #[arg(long, global = true)]
    plain_http: bool,
    /// Accept any certificate
    #[arg(long, global = true)]
    insecure: bool,
    /// Trust the certificate authorities of this PEM file too
    #[arg(long, global = true, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// Log in with this user and password; REGISTRYFS_CREDENTIAL keeps it out of the process list
    #[arg(long, global = true, value_name = "USER:PASS")]
    credential: Option<Credential>,
    /// Send a failed request again at most so many times [default: 5]
    #[arg(long, global = true, value_name = "N")]
    retries: Option<u32>,
    /// Give a request up after so many seconds, retries included [default: 60]
    #[arg(long, global = true, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Have at most so many requests under way to a host [default: 32]
    #[arg(long, global = true, value_name = "N")]
    concurrency: Option<usize>,
    /// Send nothing; answer from the cache
    #[arg(long, global = true)]
    offline: bool,
    /// Show no progress
    #[arg(long, global = true)]
    pub(super) no_progress: bool,
    /// How to print what is not just bytes
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    pub(super) format: Format,
    /// Log what is done
    #[arg(short, long, global = true, action = ArgAction::SetTrue)]
    verbose: bool,
    /// Log what is done, and why
    #[arg(long, global = true)]
    debug: bool,
}

impl Globals {
    /// The options as settings.
    pub(super) fn layer(&self) -> Layer {
        Layer {
            cache_dir: self.cache_dir.clone(),
            platform: self.platform.clone(),
            retries: self.retries,
            timeout_s: self.timeout,
            concurrency: self.concurrency,
            offline: self.offline.then_some(true),
            plain_http: self.plain_http.then_some(true),
            insecure: self.insecure.then_some(true),
            ca: (!self.ca.is_empty()).then(|| self.ca.clone()),
            credential: self.credential.clone(),
            ..Layer::default()
        }
    }

    /// How much to log.
    pub(super) fn verbosity(&self) -> Verbosity {
        match self {
            Self { debug: true, .. } => Verbosity::Debug,
            Self { verbose: true, .. } => Verbosity::Verbose,
            _ => Verbosity::Quiet,
        }
    }
}
