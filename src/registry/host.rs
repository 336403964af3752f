//! What is known of one host while the client lives: which protocol it speaks, whether it is up, whether it asked to
//! be left alone, and what was asked of it. Registries, token services and the stores that registries redirect to are
//! all hosts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::{HeaderMap, WARNING};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::breaker::Breaker;
use super::failure::Failure;
use super::options::Timing;
use super::retry::unasked_hold;
use super::secret::one_line;
use crate::error::{Error, Result};

/// Longest time that a host is left alone because it said so; then it is asked again.
const HOLD_MAX: Duration = Duration::from_secs(300);
/// Warnings kept of one host.
const WARNINGS_MAX: usize = 16;
/// Characters kept of a header that is only shown.
const SHOWN_CHARS_MAX: usize = 200;

/// What a request is for; the counters tell these apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Manifest,
    Blob,
    Tags,
    Catalog,
    Token,
    Probe,
}

/// How many requests of each kind were sent to a host, retries and redirected ones included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RequestCounts {
    /// Manifests, HEAD requests included.
    pub manifests: u64,
    /// Blobs and ranges of them.
    pub blobs: u64,
    /// Pages of tags.
    pub tags: u64,
    /// Pages of the catalog.
    pub catalog: u64,
    /// Tokens.
    pub tokens: u64,
    /// Probes of a host that was down.
    pub probes: u64,
}

/// The state of one host, for `registryfs status`. It holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostHealth {
    /// The registry, token service or blob store.
    pub host: String,
    /// `https`, `http`, or `undecided` for a loopback host that has not answered yet.
    pub scheme: String,
    /// For how long requests to it have failed at once, in milliseconds; `None` while it is up.
    pub down_for_ms: Option<u64>,
    /// The last outage, kept after it ended.
    pub last_error: Option<String>,
    /// For how long it asked to be left alone from now on, in milliseconds.
    pub held_for_ms: Option<u64>,
    /// The requests sent to it.
    pub requests: RequestCounts,
    /// Body bytes received from it.
    pub bytes: u64,
    /// How many requests were sent again.
    pub retries: u64,
    /// Where the credentials came from that were used last; never the secret.
    pub credentials: Option<String>,
    /// The rate limit headers of its last answer that had some, such as `limit 100;w=21600, remaining 76;w=21600`.
    pub rate_limit: Option<String>,
    /// What it warned of (`Warning: 299`), each once.
    pub warnings: Vec<String>,
}

/// http or https.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    Https,
    Http,
}

impl Scheme {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Https => "https",
            Self::Http => "http",
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    kinds: [AtomicU64; 6],
    bytes: AtomicU64,
    retries: AtomicU64,
}

#[derive(Debug, Default)]
struct Notes {
    credentials: Option<String>,
    rate_limit: Option<String>,
    warnings: Vec<String>,
}

/// When the next request may be sent, after the host said that it had too many.
#[derive(Debug, Default)]
struct Hold {
    until: Option<Instant>,
    times: u32,
    why: String,
}

/// One host.
#[derive(Debug)]
pub(super) struct Host {
    name: String,
    authority: String,
    pub(super) http: reqwest::Client,
    pub(super) plain_allowed: bool,
    protocol_is_found_out: bool,
    scheme: Mutex<Option<Scheme>>,
    /// Held while the first request finds out which protocol a loopback host speaks.
    pub(super) scheme_gate: tokio::sync::Mutex<()>,
    pub(super) breaker: Breaker,
    /// One for every request under way.
    pub(super) permits: Arc<Semaphore>,
    /// One more for every stream, so that streams leave half of the permits to others.
    pub(super) streams: Arc<Semaphore>,
    timing: Timing,
    hold: Mutex<Hold>,
    counters: Counters,
    notes: Mutex<Notes>,
}

/// How a host is to be talked to.
#[derive(Debug)]
pub(super) struct HostSetup {
    pub(super) http: reqwest::Client,
    /// Plain HTTP was asked for.
    pub(super) plain: bool,
    /// It is this machine: the protocol is found out.
    pub(super) loopback: bool,
    pub(super) concurrency: usize,
    pub(super) timing: Timing,
}

impl Host {
    /// `name` is shown; `authority` is what requests are sent to.
    pub(super) fn new(name: &str, authority: &str, setup: HostSetup) -> Self {
        let scheme = match (setup.plain, setup.loopback) {
            (true, _) => Some(Scheme::Http),
            (false, true) => None,
            (false, false) => Some(Scheme::Https),
        };
        let concurrency = setup.concurrency.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            name: name.to_owned(),
            authority: authority.to_owned(),
            http: setup.http,
            plain_allowed: setup.plain || setup.loopback,
            protocol_is_found_out: scheme.is_none(),
            scheme: Mutex::new(scheme),
            scheme_gate: tokio::sync::Mutex::new(()),
            breaker: Breaker::new(setup.timing),
            permits: Arc::new(Semaphore::new(concurrency)),
            streams: Arc::new(Semaphore::new(concurrency.div_ceil(2))),
            timing: setup.timing,
            hold: Mutex::new(Hold::default()),
            counters: Counters::default(),
            notes: Mutex::new(Notes::default()),
        }
    }

    pub(super) fn timing(&self) -> &Timing {
        &self.timing
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The protocol, `None` while it is not known.
    pub(super) fn scheme(&self) -> Option<Scheme> {
        *self.scheme.lock()
    }

    /// Remembers the protocol. TLS once seen is never given up: whoever takes over a port of this machine later must
    /// not get by plain HTTP what was meant for the TLS server.
    pub(super) fn decide(&self, scheme: Scheme) {
        *self.scheme.lock() = Some(scheme);
    }

    /// The URL of `path` (which begins with a slash and may have a query) by `scheme`.
    pub(super) fn url(&self, scheme: Scheme, path: &str) -> Result<Url> {
        let text = format!("{}://{}{path}", scheme.name(), self.authority);
        Url::parse(&text).map_err(|error| Error::malformed(format!("{}{path}", self.name), error.to_string()))
    }

    /// An answer came.
    pub(super) fn alive(&self) {
        self.breaker.alive();
        self.hold.lock().times = 0;
    }

    /// An exchange failed as it would with a host that is gone.
    pub(super) fn outage(&self, failure: &Failure, gave_up: bool) {
        if self.breaker.failed(&failure.why, gave_up) {
            self.forget_plain_http();
            tracing::warn!(host = %self.name, why = %failure.why, "host is down: requests to it fail at once until it answers");
        }
    }

    /// A loopback host that spoke no TLS may do so when it is back.
    fn forget_plain_http(&self) {
        if self.protocol_is_found_out {
            let mut scheme = self.scheme.lock();
            *scheme = scheme.filter(|scheme| *scheme == Scheme::Https);
        }
    }

    /// The host had too many requests: none is sent to it for `asked`, or a growing time where it did not say.
    pub(super) fn hold_back(&self, asked: Option<Duration>, why: &str) {
        let now = Instant::now();
        let mut hold = self.hold.lock();
        let wait = asked.unwrap_or_else(|| unasked_hold(&self.timing, hold.times));
        let until = now + wait.min(HOLD_MAX);
        // Requests that were under way together are refused together: that is one refusal.
        if hold.until.is_none_or(|known| known <= now) {
            hold.times = hold.times.saturating_add(1);
        }
        why.clone_into(&mut hold.why);
        hold.until = Some(hold.until.map_or(until, |known| known.max(until)));
    }

    /// Until when the host is to be left alone, and why.
    pub(super) fn held(&self) -> Option<(Instant, String)> {
        let hold = self.hold.lock();
        let until = hold.until.filter(|until| *until > Instant::now())?;
        Some((until, hold.why.clone()))
    }

    pub(super) fn count_request(&self, kind: Kind) {
        if let Some(counter) = self.counters.kinds.get(kind as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes back a request that never got as far as HTTP.
    pub(super) fn uncount_request(&self, kind: Kind) {
        if let Some(counter) = self.counters.kinds.get(kind as usize) {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn count_bytes(&self, bytes: u64) {
        self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn count_retry(&self) {
        self.counters.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_credentials(&self, source: Option<&str>) {
        self.notes.lock().credentials = source.map(str::to_owned);
    }

    /// Keeps what an answer's headers say to the user: rate limits, and warnings, each shown once.
    pub(super) fn note_headers(&self, headers: &HeaderMap) {
        let shown = |name: &str| {
            let text = headers.get(name)?.to_str().ok()?;
            Some(one_line(text, SHOWN_CHARS_MAX))
        };
        let limits: Vec<String> = [
            ("limit", "ratelimit-limit"),
            ("remaining", "ratelimit-remaining"),
            ("counted for", "docker-ratelimit-source"),
        ]
        .into_iter()
        .filter_map(|(label, header)| Some(format!("{label} {}", shown(header)?)))
        .collect();
        if !limits.is_empty() {
            self.notes.lock().rate_limit = Some(limits.join(", "));
        }
        for value in headers.get_all(WARNING) {
            let text = value
                .to_str()
                .ok()
                .and_then(|text| text.trim().strip_prefix("299 - "));
            let Some(text) = text else { continue };
            let text = one_line(text.trim_matches('"'), SHOWN_CHARS_MAX);
            let mut notes = self.notes.lock();
            if notes.warnings.len() < WARNINGS_MAX && !notes.warnings.contains(&text) {
                tracing::warn!(host = %self.name, "the registry warns: {text}");
                notes.warnings.push(text);
            }
        }
    }

    /// For `status`.
    pub(super) fn health(&self) -> HostHealth {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let count = |kind: Kind| {
            let counter = self.counters.kinds.get(kind as usize);
            counter.map_or(0, |counter| counter.load(Ordering::Relaxed))
        };
        let notes = self.notes.lock();
        HostHealth {
            host: self.name.clone(),
            scheme: self.scheme().map_or("undecided", Scheme::name).to_owned(),
            down_for_ms: self.breaker.down_for().map(milliseconds),
            last_error: self.breaker.last_error(),
            held_for_ms: self
                .held()
                .map(|(until, _)| milliseconds(until.saturating_duration_since(Instant::now()))),
            requests: RequestCounts {
                manifests: count(Kind::Manifest),
                blobs: count(Kind::Blob),
                tags: count(Kind::Tags),
                catalog: count(Kind::Catalog),
                tokens: count(Kind::Token),
                probes: count(Kind::Probe),
            },
            bytes: self.counters.bytes.load(Ordering::Relaxed),
            retries: self.counters.retries.load(Ordering::Relaxed),
            credentials: notes.credentials.clone(),
            rate_limit: notes.rate_limit.clone(),
            warnings: notes.warnings.clone(),
        }
    }
}
