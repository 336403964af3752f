//! How the demo registry behaves, and misbehaves: one [`Behaviour`] that can be changed while it runs, and [`Fault`]s
//! that are injected for some requests. Everything is decided from counts and a seed, never from chance, so that a
//! test sees the same failures each time.

use std::time::Duration;

/// Largest page of `tags/list` and `_catalog` by default, as in distribution 2.8 and later.
pub const PAGE_ENTRIES_MAX: usize = 1000;

/// The general behaviour of the registry. Change it at any time through
/// [`Handle::update`](super::Handle::update); requests that have begun keep what they began with.
#[derive(Debug, Clone)]
pub struct Behaviour {
    /// Waited before each answer.
    pub latency: Duration,
    /// Upper limit of each connection in body bytes a second; 0 is no limit.
    pub connection_bytes_per_s: u64,
    /// Upper limit of all connections together in body bytes a second; 0 is no limit.
    pub total_bytes_per_s: u64,
    /// The share of requests, 0 to 1, that fail: half of them with 503, a quarter by a reset connection, a quarter by
    /// a body cut in its middle. Which ones follows from [`Behaviour::seed`] and the request's sequence number.
    pub failure_rate: f64,
    /// The seed of everything that looks random.
    pub seed: u64,
    /// Who may read and write.
    pub auth: Auth,
    /// Where blobs are served from: `None` from the registry itself, else by a redirect to its storage listener.
    pub redirect: Option<Redirect>,
    /// Most entries of one page of `tags/list` and `_catalog`.
    pub page_entries_max: usize,
    /// Whether a larger `n` than [`Behaviour::page_entries_max`] is refused with `PAGINATION_NUMBER_INVALID`, as
    /// distribution does, or quietly lowered, as others do.
    pub refuse_large_pages: bool,
    /// Whether pages carry a `Link` header; without it a client has to go on from the last entry.
    pub link_header: bool,
    /// Whether there is a catalog; most public registries have none and answer 404.
    pub catalog: bool,
    /// Whether ranges are honoured; without, every read of a blob gets all of it with 200.
    pub ranges: bool,
    /// Most bytes that pushes may add in total.
    pub push_bytes_max: u64,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            latency: Duration::ZERO,
            connection_bytes_per_s: 0,
            total_bytes_per_s: 0,
            failure_rate: 0.0,
            seed: 0,
            auth: Auth::None,
            redirect: None,
            page_entries_max: PAGE_ENTRIES_MAX,
            refuse_large_pages: true,
            link_header: true,
            catalog: true,
            ranges: true,
            push_bytes_max: 256 << 20,
        }
    }
}

/// Who may use the registry.
#[derive(Debug, Clone)]
pub enum Auth {
    /// Everybody, for everything.
    None,
    /// The holder of one account, by HTTP basic authentication.
    Basic(Account),
    /// The holders of a token that the registry's own `/token` gives.
    Token(TokenAuth),
}

/// A user and a password, made up for a registry on loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The user's name.
    pub user: String,
    /// The password in clear text.
    pub password: String,
}

impl Account {
    /// An account.
    #[must_use]
    pub fn new(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            user: user.into(),
            password: password.into(),
        }
    }
}

/// The token flow of the distribution specification.
#[derive(Debug, Clone)]
pub struct TokenAuth {
    /// The account that gets tokens for everything.
    pub account: Account,
    /// Whether a request without credentials gets a token that may pull.
    pub anonymous_pull: bool,
    /// Repositories for which such a token allows nothing: they are the account's.
    pub private: Vec<String>,
    /// Lifetime of a token in seconds.
    pub expires_in_s: u64,
    /// Whether `expires_in` is told; without it a client has to assume 60 s.
    pub tell_expiry: bool,
    /// How the answer spells the token.
    pub spelling: TokenSpelling,
    /// Whether the POST form exists; without it a POST gets 404, as from registries that know only the GET form.
    pub post_form: bool,
}

impl TokenAuth {
    /// Tokens for `account` and, to pull, for everybody: 300 s long, both forms, both spellings.
    #[must_use]
    pub fn new(account: Account) -> Self {
        Self {
            account,
            anonymous_pull: true,
            private: Vec::new(),
            expires_in_s: 300,
            tell_expiry: true,
            spelling: TokenSpelling::Both,
            post_form: true,
        }
    }
}

/// The names that registries give the token in the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSpelling {
    /// `token`, the older one.
    Token,
    /// `access_token`, that of OAuth 2.
    AccessToken,
    /// Both, with the same value.
    Both,
}

/// Blobs answered by a redirect to a signed URL of the storage listener.
#[derive(Debug, Clone)]
pub struct Redirect {
    /// How long a signed URL works.
    pub expires_in: Duration,
    /// The status of the redirect: 301, 302, 303, 307 or 308.
    pub status: u16,
    /// How the URL tells its expiry.
    pub style: SignedStyle,
}

impl Default for Redirect {
    fn default() -> Self {
        Self {
            expires_in: Duration::from_secs(600),
            status: 307,
            style: SignedStyle::Amz,
        }
    }
}

/// The query parameters of a signed URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignedStyle {
    /// `X-Amz-Date`, `X-Amz-Expires` (seconds from then) and `X-Amz-Signature`.
    Amz,
    /// `Expires` (seconds since 1970) and `Signature`.
    Expires,
}

/// Which of the registry's listeners or services a request was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// The registry's API.
    Registry,
    /// The storage listener, where redirects lead.
    Storage,
    /// The token service, on the registry's listener.
    Token,
}

/// For which requests a fault happens: all conditions must hold.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Which path, without the query.
    pub path: PathMatch,
    /// Which method; `None` is any.
    pub method: Option<String>,
    /// Which endpoint; `None` is any.
    pub endpoint: Option<Endpoint>,
    /// How many of the requests for which the rest holds.
    pub times: Times,
}

impl Scope {
    /// Every request whose path contains `text`.
    #[must_use]
    pub fn containing(text: impl Into<String>) -> Self {
        Self {
            path: PathMatch::Contains(text.into()),
            method: None,
            endpoint: None,
            times: Times::Always,
        }
    }

    /// Every request.
    #[must_use]
    pub fn all() -> Self {
        Self::containing("")
    }

    /// Every request whose path is exactly `path`.
    #[must_use]
    pub fn exact(path: impl Into<String>) -> Self {
        Self {
            path: PathMatch::Exact(path.into()),
            ..Self::all()
        }
    }

    /// The same, for the next `count` requests only.
    #[must_use]
    pub fn next(self, count: u32) -> Self {
        Self {
            times: Times::Next(count),
            ..self
        }
    }

    /// The same, for each `k`-th request only.
    #[must_use]
    pub fn every(self, k: u32) -> Self {
        Self {
            times: Times::Every(k),
            ..self
        }
    }

    /// The same, for one method only.
    #[must_use]
    pub fn method(self, method: impl Into<String>) -> Self {
        Self {
            method: Some(method.into()),
            ..self
        }
    }

    /// The same, for one endpoint only.
    #[must_use]
    pub fn at(self, endpoint: Endpoint) -> Self {
        Self {
            endpoint: Some(endpoint),
            ..self
        }
    }
}

/// A condition on a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// It contains this text; the empty text is in every path.
    Contains(String),
    /// It is this text.
    Exact(String),
}

/// How often a fault happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// Each time.
    Always,
    /// The next so many times.
    Next(u32),
    /// Each k-th time: the k-th, the 2k-th, …; 0 is never.
    Every(u32),
}

/// What goes wrong with a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// Waits before the answer, on top of the latency.
    Delay(Duration),
    /// Sends the body at most at this rate in bytes a second.
    Throttle(u64),
    /// Closes the connection after so many bytes of the body; `Content-Length` promised all of it.
    Cut(u64),
    /// Closes the connection after half of the body.
    CutHalfway,
    /// Sends nothing more after so many bytes of the body: for ever, or for a time.
    Stall {
        /// Bytes before the stall.
        after_bytes: u64,
        /// How long; `None` until the connection ends.
        pause: Option<Duration>,
    },
    /// Lies in the answer to a range request; requests without a range are left alone.
    Range(RangeLie),
    /// Inverts the byte at this position of the body, where there is one.
    FlipByte(u64),
    /// Answers with this status and the error body that belongs to it, without doing anything.
    Status {
        /// The status.
        status: u16,
        /// The `Retry-After` header, if any.
        retry_after: Option<RetryAfter>,
    },
    /// Answers with the digest of something else in `Docker-Content-Digest`.
    WrongDigestHeader,
    /// Answers with this `Content-Type`.
    ContentType(String),
    /// Revokes all tokens given so far, before the request is looked at.
    ExpireTokens,
    /// Invalidates all signed URLs given so far, before the request is looked at.
    ExpireSignedUrls,
    /// Resets the connection without an answer.
    Reset,
}

/// How the answer to a range request is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeLie {
    /// 206 with the right bytes, and a `Content-Range` that starts one byte later.
    WrongHeader,
    /// 206 with the right header, and bytes from elsewhere.
    WrongBytes,
    /// 200 with the whole blob.
    WholeBody,
    /// 206 with the right header, and half of the bytes; `Content-Length` says so.
    ShortBody,
}

/// A `Retry-After` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryAfter {
    /// A number of seconds.
    Seconds(u64),
    /// The date that is so many seconds from now.
    DateIn(u64),
}

/// What a fault's scope is compared with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) endpoint: Endpoint,
    pub(super) method: &'a str,
    pub(super) path: &'a str,
}

/// Injected faults with their counts.
#[derive(Debug, Default)]
pub(super) struct Faults {
    injected: Vec<Injected>,
}

#[derive(Debug)]
struct Injected {
    scope: Scope,
    fault: Fault,
    seen: u32,
}

impl Faults {
    pub(super) fn inject(&mut self, scope: Scope, fault: Fault) {
        self.injected.push(Injected {
            scope,
            fault,
            seen: 0,
        });
    }

    pub(super) fn clear(&mut self) {
        self.injected.clear();
    }

    /// The faults that happen to `subject`, in the order of injection. Counts it, and forgets what is used up.
    pub(super) fn take(&mut self, subject: Subject<'_>) -> Vec<Fault> {
        let mut happening = Vec::new();
        self.injected.retain_mut(|injected| {
            if !injected.scope.covers(subject) {
                return true;
            }
            injected.seen = injected.seen.saturating_add(1);
            let (happens, stays) = match injected.scope.times {
                Times::Always => (true, true),
                Times::Next(count) => (injected.seen <= count, injected.seen < count),
                Times::Every(k) => (k > 0 && injected.seen.is_multiple_of(k), true),
            };
            if happens {
                happening.push(injected.fault.clone());
            }
            stays
        });
        happening
    }
}

impl Scope {
    fn covers(&self, subject: Subject<'_>) -> bool {
        let path = match &self.path {
            PathMatch::Contains(text) => subject.path.contains(text.as_str()),
            PathMatch::Exact(text) => subject.path == text,
        };
        path && self
            .method
            .as_deref()
            .is_none_or(|method| method == subject.method)
            && self.endpoint.is_none_or(|endpoint| endpoint == subject.endpoint)
    }
}

impl Behaviour {
    /// The fault that the failure rate has in store for request `sequence`, if any.
    pub(super) fn chance(&self, sequence: u64) -> Option<Fault> {
        let roll = super::seeded::mix(self.seed ^ sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        // 53 bits are what a double holds exactly.
        if ((roll >> 11) as f64) >= self.failure_rate * (1_u64 << 53) as f64 {
            return None;
        }
        Some(match super::seeded::mix(roll) % 4 {
            0 => Fault::Reset,
            1 => Fault::CutHalfway,
            _ => Fault::Status {
                status: 503,
                retry_after: None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(path: &str) -> Subject<'_> {
        Subject {
            endpoint: Endpoint::Registry,
            method: "GET",
            path,
        }
    }

    #[test]
    fn faults_happen_as_often_as_their_scope_says() {
        let mut faults = Faults::default();
        faults.inject(Scope::containing("/blobs/").next(2), Fault::Reset);
        faults.inject(Scope::exact("/v2/").every(3), Fault::Cut(1));
        faults.inject(Scope::all().method("HEAD"), Fault::Cut(2));
        faults.inject(Scope::all().at(Endpoint::Storage), Fault::Cut(3));
        let happened: Vec<_> = (0..3)
            .map(|_| faults.take(subject("/v2/a/blobs/x")).len())
            .collect();
        assert_eq!(happened, [1, 1, 0]);
        let happened: Vec<_> = (0..6).map(|_| faults.take(subject("/v2/")).len()).collect();
        assert_eq!(happened, [0, 0, 1, 0, 0, 1]);
        faults.clear();
        assert!((0..3).all(|_| faults.take(subject("/v2/")).is_empty()));
    }

    #[test]
    fn failures_follow_the_rate_and_the_seed() {
        let failing = |failure_rate, seed| {
            let behaviour = Behaviour {
                failure_rate,
                seed,
                ..Behaviour::default()
            };
            (0..10_000)
                .filter(|&n| behaviour.chance(n).is_some())
                .collect::<Vec<u64>>()
        };
        assert_eq!(failing(0.0, 1).len(), 0);
        assert_eq!(failing(1.0, 1).len(), 10_000);
        assert!((800..1200).contains(&failing(0.1, 1).len()));
        assert_eq!(failing(0.1, 1), failing(0.1, 1));
        assert_ne!(failing(0.1, 1), failing(0.1, 2));
    }
}
