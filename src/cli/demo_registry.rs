//! `registryfs demo-registry`.

use std::net::SocketAddr;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::globals::Format;
use super::output::{Output, note};
use crate::config::parse_bytes;
use crate::demo::{Account, DemoAuth, DemoOptions, serve};
use crate::error::Result;

/// Serve made-up images on loopback, for trying and for tests, until it is interrupted; prints its host
#[derive(Debug, Args)]
pub(super) struct DemoRegistry {
    /// The loopback address to serve at; port 0 is any free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Wait so many milliseconds before each answer
    #[arg(long, value_name = "MS", default_value_t = 0)]
    latency_ms: u64,
    /// Send at most so much a second in total, such as 1MiB; 0 is no limit
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    rate_limit: u64,
    /// Let this share of the requests fail, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    failure_rate: f64,
    /// Who may pull
    #[arg(long, value_enum, default_value_t = Auth::None)]
    auth: Auth,
    /// The user that may
    #[arg(long, requires = "password")]
    user: Option<String>,
    /// The user's password
    #[arg(long, requires = "user")]
    password: Option<String>,
    /// Answer requests for blobs with redirects to signed URLs on another port
    #[arg(long)]
    redirect: bool,
    /// Decides which requests fail
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Kinds of authentication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Auth {
    /// Everybody
    None,
    /// The user, by HTTP basic authentication
    Basic,
    /// The user, or everybody where none is named, by tokens
    Token,
}

impl DemoRegistry {
    pub(super) async fn run(&self, out: &mut Output) -> Result<()> {
        let account = self.user.clone().zip(self.password.clone());
        let options = DemoOptions {
            listen: self.listen,
            latency_ms: self.latency_ms,
            rate_limit_bytes_per_s: self.rate_limit,
            failure_rate: self.failure_rate,
            auth: match self.auth {
                Auth::None => DemoAuth::None,
                Auth::Basic => DemoAuth::Basic,
                Auth::Token => DemoAuth::Token,
            },
            account: account.map(|(user, password)| Account::new(user, password)),
            redirect: self.redirect,
            seed: self.seed,
        };
        let announce = |host: &str| {
            let printed = match out.format {
                Format::Json => out.json(&json!({ "host": host })),
                Format::Text => out.line(host),
            };
            // It serves all the same: whoever gave it a fixed port knows the host.
            if let Err(error) = printed.and_then(|()| out.finish()) {
                note(&error.to_string());
            }
        };
        serve(&options, announce, std::future::pending()).await
    }
}
