//! What is known of one host while the client lives: which protocol it speaks, whether it is up, whether it asked to
//! be left alone, and what was asked of it. Registries, token services and the stores that registries redirect to are
//! all hosts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::{HeaderMap, WARNING};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::absence::Absence;
use super::breaker::Breaker;
use super::failure::Failure;
use super::hosts::PemFile;
use super::options::Timing;
use super::proxy::Way;
use super::retry::unasked_hold;
use super::secret::{authority, one_line};
use super::stranger::Stranger;
use crate::error::{Error, Result};

/// Longest time that a host is left alone because it said so; then it is asked again.
const HOLD_MAX: Duration = Duration::from_secs(300);
/// Warnings kept of one host.
const WARNINGS_MAX: usize = 16;
/// Characters kept of a lie: two digests and what they are of.
const LIE_CHARS_MAX: usize = 600;
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
    Push,
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
    /// What has to do with pushing: blobs that are looked for, begun, sent, and manifests.
    pub pushes: u64,
}

/// The state of one host, for `registryfs status`. It holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostHealth {
    /// The registry, token service or blob store.
    pub host: String,
    /// The registry that it stands for as a mirror.
    pub mirror_for: Option<String>,
    /// The proxy on the way to it, without its password.
    pub proxy: Option<String>,
    /// `https`, `http`, or `undecided` for a loopback host that has not answered yet.
    pub scheme: String,
    /// For how long requests to it have failed at once, in milliseconds; `None` while it is up.
    pub down_for_ms: Option<u64>,
    /// The last outage, kept after it ended.
    pub last_error: Option<String>,
    /// For how long from now on it is left out, as a mirror that lied or did not answer, in milliseconds.
    pub left_out_for_ms: Option<u64>,
    /// How often it gave, as a mirror, what was not what it should be.
    pub lies: u64,
    /// The last of these.
    pub last_lie: Option<String>,
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
    kinds: [AtomicU64; 7],
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
    label: String,
    mirror_for: Option<String>,
    /// What holds for it if only a manifest has named it, or has sent us to who did.
    pub(super) stranger: Option<Stranger>,
    authority: String,
    probe_path: String,
    way: Way,
    /// Authorities that this host is trusted by besides the general ones; where it sends us, they count too.
    pub(super) ca: Arc<[PemFile]>,
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
    honours_ranges: AtomicBool,
    absence: Absence,
    used: Mutex<Option<Instant>>,
    hold: Mutex<Hold>,
    counters: Counters,
    notes: Mutex<Notes>,
}

/// How a host is to be talked to.
#[derive(Debug)]
pub(super) struct HostSetup {
    pub(super) http: reqwest::Client,
    pub(super) way: Way,
    pub(super) ca: Arc<[PemFile]>,
    /// `None`: it is this machine, and the protocol is found out.
    pub(super) scheme: Option<Scheme>,
    /// The registry that it is a mirror of.
    pub(super) mirror_for: Option<String>,
    /// Whether only a manifest has led to it.
    pub(super) stranger: Option<Stranger>,
    /// What it is asked after an outage; any answer will do.
    pub(super) probe_path: String,
    pub(super) concurrency: usize,
    pub(super) timing: Timing,
}

impl Host {
    /// `name` is whose credentials count; `authority` is what requests are sent to.
    pub(super) fn new(name: &str, authority: &str, setup: HostSetup) -> Self {
        let scheme = setup.scheme;
        let label = match (&setup.mirror_for, setup.stranger) {
            (Some(registry), _) => format!("{name} (for {registry})"),
            (None, Some(_)) => format!("{name} (named by a manifest)"),
            (None, None) => name.to_owned(),
        };
        let concurrency = setup.concurrency.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            name: name.to_owned(),
            label,
            mirror_for: setup.mirror_for,
            stranger: setup.stranger,
            authority: authority.to_owned(),
            probe_path: setup.probe_path,
            way: setup.way,
            ca: setup.ca,
            http: setup.http,
            plain_allowed: scheme != Some(Scheme::Https),
            protocol_is_found_out: scheme.is_none(),
            scheme: Mutex::new(scheme),
            scheme_gate: tokio::sync::Mutex::new(()),
            breaker: Breaker::new(setup.timing),
            permits: Arc::new(Semaphore::new(concurrency)),
            streams: Arc::new(Semaphore::new(concurrency.div_ceil(2))),
            timing: setup.timing,
            honours_ranges: AtomicBool::new(false),
            absence: Absence::default(),
            used: Mutex::default(),
            hold: Mutex::new(Hold::default()),
            counters: Counters::default(),
            notes: Mutex::new(Notes::default()),
        }
    }

    pub(super) fn timing(&self) -> &Timing {
        &self.timing
    }

    /// The host's canonical name, for credentials.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it stands for a registry that it is not.
    pub(super) fn is_mirror(&self) -> bool {
        self.mirror_for.is_some()
    }

    /// The name for people, which tells a mirror of one registry, or whom a manifest names, from the same host elsewhere.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// [`Self::label`] with the proxy on the way, which may be the one to blame.
    pub(super) fn peer(&self) -> String {
        match self.proxy() {
            Some(proxy) => format!("{} via proxy {proxy}", self.label),
            None => self.label.clone(),
        }
    }

    /// The proxy on the way, without its password.
    pub(super) fn proxy(&self) -> Option<String> {
        let scheme = self.scheme().unwrap_or(Scheme::Https);
        self.way.proxy_of(&self.url(scheme, "/").ok()?)
    }

    pub(super) fn probe_path(&self) -> &str {
        &self.probe_path
    }

    /// Whether `url` is at this host, by a protocol that it speaks.
    pub(super) fn is_at(&self, url: &Url) -> bool {
        let speaks = self.scheme().is_none_or(|scheme| scheme.name() == url.scheme());
        speaks && authority(url) == self.authority
    }

    /// A mirror gave what was not what it should be.
    pub(super) fn lied(&self, lie: &Error) {
        self.absence.note_lie(one_line(&lie.to_string(), LIE_CHARS_MAX));
        match self.absence.begin(self.timing.left_out) {
            Some(time) => {
                tracing::warn!(mirror = %self.label, error = %lie, seconds = time.as_secs(), "a mirror lies: left out for a while");
            }
            None => tracing::debug!(mirror = %self.label, error = %lie, "a mirror lies"),
        }
    }

    /// A mirror did not answer in its part of the time.
    pub(super) fn kept_waiting(&self, error: &Error) {
        if let Some(time) = self.absence.begin(self.timing.left_out) {
            tracing::warn!(mirror = %self.label, %error, seconds = time.as_secs(), "a mirror does not answer: left out for a while");
        }
    }

    /// It gave a range.
    pub(super) fn note_range(&self) {
        self.honours_ranges.store(true, Ordering::Relaxed);
    }

    /// Whether it ever gave a range.
    pub(super) fn honours_ranges(&self) -> bool {
        self.honours_ranges.load(Ordering::Relaxed)
    }

    /// Whether it is left out as a mirror.
    pub(super) fn is_absent(&self) -> bool {
        self.absence.remaining().is_some()
    }

    /// When it was last asked.
    pub(super) fn used(&self) -> Option<Instant> {
        *self.used.lock()
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
        Url::parse(&text)
            .map_err(|error| Error::malformed(format!("{}{path}", self.label), error.to_string()))
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
            tracing::warn!(host = %self.label, why = %failure.why, "host is down: requests to it fail at once until it answers");
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
        *self.used.lock() = Some(Instant::now());
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
                tracing::warn!(host = %self.label, "the registry warns: {text}");
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
        let (lies, last_lie) = self.absence.lies();
        let notes = self.notes.lock();
        HostHealth {
            host: self.name.clone(),
            mirror_for: self.mirror_for.clone(),
            proxy: self.proxy(),
            scheme: self.scheme().map_or("undecided", Scheme::name).to_owned(),
            down_for_ms: self.breaker.down_for().map(milliseconds),
            left_out_for_ms: self.absence.remaining().map(milliseconds),
            lies,
            last_lie,
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
                pushes: count(Kind::Push),
            },
            bytes: self.counters.bytes.load(Ordering::Relaxed),
            retries: self.counters.retries.load(Ordering::Relaxed),
            credentials: notes.credentials.clone(),
            rate_limit: notes.rate_limit.clone(),
            warnings: notes.warnings.clone(),
        }
    }
}
