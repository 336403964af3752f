//! The endpoints of a registry, and the way of one operation along them: mirrors in order, then the server. What goes
//! wrong at one that has a successor moves the operation on; what the last one says is final.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::HeaderMap;
use tokio::time::Instant;

use super::host::Host;
use super::hosts::{Capabilities, EndpointSpec};
use super::reference::Repository;
use super::retry::Attempts;
use super::secret::one_line;
use super::transport::{Destination, is_left_out};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Blobs that a mirror is known to lack.
const LACKING_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// Characters of what a mirror did that are shown when the server fails too.
const NOTE_CHARS_MAX: usize = 200;
/// Mirrors of which that is shown.
const NOTES_MAX: usize = 4;

/// What an operation asks for, which not every endpoint may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// What a digest names.
    Pull,
    /// What a tag names, or which tags there are.
    Resolve,
    /// What only the registry's own server knows.
    Server,
}

/// Someone to be asked for a registry.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) host: Arc<Host>,
    /// The path that stands for `/v2`.
    path: String,
    /// The registry that it stands for, where it is not the registry itself.
    namespace: Option<String>,
    capabilities: Capabilities,
    pub(super) headers: HeaderMap,
    /// Whether a certificate or headers of ours tell it who we are.
    pub(super) knows_us: bool,
    /// It is no registry: this is where a manifest says that a blob is to be had.
    foreign: Option<Url>,
    /// Blobs that it does not have (or not for us, or not in ranges), by repository, and until when that is believed.
    lacking: Mutex<LruCache<(String, Digest), Instant>>,
}

impl Endpoint {
    /// `host` is what `spec` says, for `registry`.
    pub(super) fn new(host: Arc<Host>, spec: &EndpointSpec, registry: &str) -> Self {
        Self {
            host,
            path: spec.base.path.clone(),
            namespace: (!spec.is_registry).then(|| registry.to_owned()),
            capabilities: spec.capabilities,
            headers: spec.settings.headers.clone(),
            knows_us: spec.settings.has_identity(),
            foreign: None,
            lacking: Mutex::new(LruCache::new(LACKING_MAX)),
        }
    }

    /// What gives a single blob at `url`, which is at `host`. It is told nothing of who asks.
    pub(super) fn foreign(host: Arc<Host>, url: Url) -> Self {
        Self {
            host,
            path: String::new(),
            namespace: None,
            capabilities: Capabilities::ALL,
            headers: HeaderMap::new(),
            knows_us: false,
            foreign: Some(url),
            lacking: Mutex::new(LruCache::new(LACKING_MAX)),
        }
    }

    /// Whether it is no registry but a URL that a manifest gave.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign.is_some()
    }

    /// Where `path`, which begins behind `/v2` and may have a query, is at this endpoint. A foreign one has but one thing.
    pub(super) fn destination(&self, path: &str) -> Destination {
        if let Some(url) = &self.foreign {
            return Destination::Url(url.clone());
        }
        let mut path = format!("{}{path}", self.path);
        if let Some(namespace) = &self.namespace {
            path.push(if path.contains('?') { '&' } else { '?' });
            path.push_str("ns=");
            path.extend(url::form_urlencoded::byte_serialize(namespace.as_bytes()));
        }
        Destination::Registry(path)
    }

    /// A URL that this endpoint gave as the next page: some forget whom they stand for.
    pub(super) fn page(&self, mut url: Url) -> Destination {
        if let Some(namespace) = &self.namespace
            && !url.query_pairs().any(|(key, _)| key == "ns")
        {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Destination::Url(url)
    }

    fn serves(&self, need: Need) -> bool {
        match need {
            Need::Pull => self.capabilities.pull,
            Need::Resolve => self.capabilities.resolve,
            Need::Server => true,
        }
    }

    fn lacks(&self, repository: &Repository, digest: &Digest) -> bool {
        let mut lacking = self.lacking.lock();
        let until = lacking.get(&(repository.path().to_owned(), *digest));
        until.is_some_and(|until| Instant::now() < *until)
    }

    fn note_lacking(&self, repository: &Repository, digest: &Digest) {
        let until = Instant::now() + self.host.timing().left_out;
        self.lacking
            .lock()
            .put((repository.path().to_owned(), *digest), until);
    }

    /// Leaves it out for a while, if what went wrong was a lie or a wait in vain.
    fn judge(&self, error: &Error) {
        match error {
            Error::Verification { .. } | Error::Malformed { .. } => self.host.lied(error),
            Error::Timeout { .. } => self.host.kept_waiting(error),
            _ => {
                tracing::debug!(mirror = %self.host.label(), %error, "the next endpoint is asked");
            }
        }
    }
}

/// The endpoints that one operation tries, and how far it is.
#[derive(Debug)]
pub(super) struct Route {
    endpoints: Vec<Arc<Endpoint>>,
    at: usize,
    blob: Option<(Repository, Digest)>,
    /// What the endpoints did that were passed.
    notes: Vec<String>,
}

impl Route {
    /// The way along `all` for `need`: without endpoints that must not be asked for it, and without mirrors that are
    /// left out now.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if nobody may be asked.
    pub(super) fn new(what: &str, all: &[Arc<Endpoint>], need: Need) -> Result<Self> {
        let all: &[_] = match need {
            Need::Server => all.get(all.len().saturating_sub(1)..).unwrap_or_default(),
            _ => all,
        };
        let able: Vec<_> = all.iter().filter(|endpoint| endpoint.serves(need)).collect();
        let last = able.len().saturating_sub(1);
        let usable = |(at, endpoint): &(usize, &Arc<Endpoint>)| *at == last || !is_left_out(&endpoint.host);
        let endpoints: Vec<_> = able
            .into_iter()
            .enumerate()
            .filter(usable)
            .map(|(_, endpoint)| Arc::clone(endpoint))
            .collect();
        if endpoints.is_empty() {
            let word = if need == Need::Resolve { "resolve" } else { "pull" };
            let why = format!("no endpoint of this registry has the capability {word}; see its hosts.toml");
            return Err(Error::unsupported(what, why));
        }
        Ok(Self {
            endpoints,
            at: 0,
            blob: None,
            notes: Vec::new(),
        })
    }

    /// The same for a blob: mirrors that are known to lack it are passed over.
    pub(super) fn for_blob(mut self, repository: &Repository, digest: &Digest) -> Self {
        let last = self.endpoints.len().saturating_sub(1);
        let mut at = 0;
        self.endpoints.retain(|endpoint| {
            at += 1;
            at > last || !endpoint.lacks(repository, digest)
        });
        self.blob = Some((repository.clone(), *digest));
        self
    }

    /// Whether whoever is left to ask is known to lack the blob that this is the way to.
    pub(super) fn is_in_vain(&self) -> bool {
        let lacks = |endpoint: &Arc<Endpoint>| {
            let blob = self.blob.as_ref();
            blob.is_some_and(|(repository, digest)| endpoint.lacks(repository, digest))
        };
        self.endpoints.iter().all(lacks)
    }

    /// The way ends here: nobody along it gives the blob, the last one because of `error`. Goes on along `foreign`, of
    /// which there is at least one.
    pub(super) fn go_on(&mut self, error: &Error, foreign: Vec<Arc<Endpoint>>) {
        if let (Some((repository, digest)), Some(last)) = (&self.blob, self.endpoints.last()) {
            last.note_lacking(repository, digest);
        }
        self.note(error);
        self.endpoints = foreign;
        self.at = 0;
    }

    /// Whom to ask now.
    pub(super) fn current(&self) -> Result<Arc<Endpoint>> {
        let endpoint = self.endpoints.get(self.at).cloned();
        endpoint.ok_or_else(|| Error::malformed("endpoints", "there is none"))
    }

    /// Whether another endpoint could be asked after the current one.
    pub(super) fn has_next(&self) -> bool {
        self.at + 1 < self.endpoints.len()
    }

    /// The patience for the current endpoint: a mirror that has a successor gets a bounded part of `main`, and none of
    /// its retries.
    pub(super) fn bounded(&self, main: &Attempts) -> Option<Attempts> {
        let mirrors = self.endpoints.len().saturating_sub(1);
        self.has_next()
            .then(|| main.bounded(u32::try_from(mirrors).unwrap_or(u32::MAX)))
    }

    /// The current endpoint failed: goes on to the next.
    ///
    /// # Errors
    /// The failure, if there is no other endpoint.
    pub(super) fn pass(&mut self, error: Error) -> Result<()> {
        if !self.has_next() || matches!(error, Error::Offline { .. } | Error::Usage { .. }) {
            return Err(self.finish(error));
        }
        let endpoint = self.current()?;
        endpoint.judge(&error);
        match &error {
            Error::NotFound { .. } | Error::Denied { .. } | Error::Unsupported { .. } => {
                if let Some((repository, digest)) = &self.blob {
                    endpoint.note_lacking(repository, digest);
                }
            }
            _ => {}
        }
        if !matches!(error, Error::NotFound { .. }) || endpoint.is_foreign() {
            self.note(&error);
        }
        self.at += 1;
        Ok(())
    }

    fn note(&mut self, error: &Error) {
        if self.notes.len() < NOTES_MAX {
            let why = match error {
                Error::Network { why, .. } | Error::Denied { why, .. } | Error::NotFound { why, .. } => {
                    why.clone()
                }
                other => other.to_string(),
            };
            self.notes.push(one_line(&why, NOTE_CHARS_MAX));
        }
    }

    /// The last endpoint's error, with what the mirrors did before: one of them might have helped.
    fn finish(&self, error: Error) -> Error {
        if self.notes.is_empty() {
            return error;
        }
        let before = format!("; before it: {}", self.notes.join("; "));
        match error {
            Error::Network { what, why } => Error::Network {
                what,
                why: why + &before,
            },
            Error::Denied { what, why } => Error::Denied {
                what,
                why: why + &before,
            },
            Error::NotFound { what, why } if self.current().is_ok_and(|last| last.is_foreign()) => {
                Error::NotFound {
                    what,
                    why: why + &before,
                }
            }
            other => other,
        }
    }
}

/// Who gave the bytes of a blob, by where each began to. Who finds them wrong says so with [`Provenance::distrust`].
#[derive(Debug, Clone, Default)]
pub struct Provenance(Arc<Mutex<Vec<(u64, Giver)>>>);

/// An endpoint, and whether it is one that can be left out.
type Giver = (Arc<Endpoint>, bool);

/// Changes of the endpoint within one body; more than a mirror list can cause.
const GIVERS_MAX: usize = 64;

impl Provenance {
    /// From `position` on the bytes come from `endpoint`.
    pub(super) fn note(&self, position: u64, endpoint: &Arc<Endpoint>, has_next: bool) {
        let mut givers = self.0.lock();
        if givers.len() < GIVERS_MAX {
            givers.push((position, (Arc::clone(endpoint), has_next)));
        }
    }

    /// Bytes `range` of the blob turned out to be not what was promised, or `error` says how. Leaves out the mirrors
    /// that gave some of them, and says whether there were such: then asking again asks somebody else.
    #[must_use]
    pub fn distrust(&self, range: &std::ops::Range<u64>, error: &Error) -> bool {
        if !matches!(error, Error::Verification { .. } | Error::Malformed { .. }) {
            return false;
        }
        let givers = self.0.lock();
        let mut found = false;
        for (at, (start, (endpoint, has_next))) in givers.iter().enumerate() {
            let end = givers.get(at + 1).map_or(u64::MAX, |(next, _)| *next);
            if *has_next && *start < range.end && range.start < end {
                endpoint.judge(error);
                found = true;
            }
        }
        found
    }
}
