//! Redirects: which are followed, and for how long the URL behind one may be used again without asking the registry.
//! The signature in such a URL does not cover the range, so one URL serves all ranges of a blob.

use std::num::NonZeroUsize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lru::LruCache;
use parking_lot::Mutex;
use reqwest::header::{DATE, LOCATION};
use reqwest::{StatusCode, Url};
use tokio::time::Instant;

use super::challenge::is_metadata_service;
use super::host::Host;
use super::reference::Repository;
use super::secret::redact;
use super::transport::{Answer, Transport};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Redirects followed for one request.
pub(super) const HOPS_MAX: u32 = 5;
/// Blobs whose final URL is kept.
const BLOBS_MAX: NonZeroUsize = NonZeroUsize::new(4096).unwrap();
/// How long a URL is used that does not say how long it is good.
const GOOD_FOR_DEFAULT: Duration = Duration::from_secs(300);
/// No URL is used for longer, whatever it says.
const GOOD_FOR_MAX: Duration = Duration::from_secs(12 * 3600);
/// A URL is not used in the last part of its life, of at most this length.
const MARGIN_MAX: Duration = Duration::from_secs(20);

/// Final URLs of blobs, while they are good.
pub(super) struct Redirects(Mutex<LruCache<Key, (Url, Instant)>>);

/// Mirrors redirect to places of their own: the label of the host that did, and the blob.
type Key = (String, Repository, Digest);

impl Redirects {
    pub(super) fn new() -> Self {
        Self(Mutex::new(LruCache::new(BLOBS_MAX)))
    }

    pub(super) fn get(&self, from: &Host, repository: &Repository, digest: &Digest) -> Option<Url> {
        let mut known = self.0.lock();
        let key = key(from, repository, digest);
        let (url, ends) = known.get(&key)?;
        if *ends > Instant::now() {
            return Some(url.clone());
        }
        known.pop(&key);
        None
    }

    /// Keeps the URL that `answer` came from, to which `from` redirected. Its own life says for how long, by the server's clock.
    pub(super) fn put(&self, from: &Host, repository: &Repository, digest: &Digest, answer: &Answer) {
        let server_now = answer
            .header(DATE)
            .and_then(|text| httpdate::parse_http_date(text).ok())
            .unwrap_or_else(SystemTime::now);
        let good_for = good_for(answer.url(), server_now);
        if good_for.is_zero() {
            return;
        }
        let entry = (answer.url().clone(), Instant::now() + good_for);
        self.0.lock().put(key(from, repository, digest), entry);
    }

    /// Drops the URL of a blob, unless it has been replaced since.
    pub(super) fn forget(&self, from: &Host, repository: &Repository, digest: &Digest, url: &Url) {
        let mut known = self.0.lock();
        let key = key(from, repository, digest);
        if known.peek(&key).is_some_and(|(known, _)| known == url) {
            known.pop(&key);
        }
    }
}

fn key(from: &Host, repository: &Repository, digest: &Digest) -> Key {
    (from.label().to_owned(), repository.clone(), *digest)
}

/// Whether `status` sends us elsewhere.
pub(super) fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where `answer` sends us.
///
/// # Errors
/// [`Error::Malformed`] if it names no URL, [`Error::Denied`] if it is one that must not be followed: from https to
/// http (but on this machine, or where plain HTTP was asked for), to a cloud's metadata service, or from a stranger to where
/// no manifest may lead.
pub(super) fn target(transport: &Transport, what: &str, answer: &Answer) -> Result<Url> {
    let host = answer.host.peer();
    let location = answer.header(LOCATION);
    let url = location.and_then(|location| answer.url().join(location).ok());
    let url =
        url.ok_or_else(|| Error::malformed(what, format!("{host} answered a redirect without a valid URL")))?;
    allowed(transport, what, answer, url)
}

/// `url`, to which `answer` sends us, if it may be followed.
///
/// # Errors
/// [`Error::Denied`] as of [`target`].
pub(super) fn allowed(transport: &Transport, what: &str, answer: &Answer, url: Url) -> Result<Url> {
    let host = answer.host.peer();
    let refused = |why: &str| {
        let shown = redact(&url);
        Err(Error::denied(what, format!("{host} redirects to {shown}: {why}")))
    };
    if is_metadata_service(&url) {
        return refused("a cloud metadata service");
    }
    if let Some(stranger) = answer.host.stranger
        && let Err(why) = stranger.check_redirect(&transport.options, &url)
    {
        return refused(why);
    }
    match (answer.url().scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => Ok(url),
        ("https", "http") if transport.plain_allowed(&answer.host, &url) => Ok(url),
        _ => refused("not by https"),
    }
}

/// How long from now on `url` is good, less a margin. `server_now` is the time by its server's clock: ours may differ.
fn good_for(url: &Url, server_now: SystemTime) -> Duration {
    let parameter = |name: &str| {
        let mut pairs = url.query_pairs();
        pairs
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.into_owned())
    };
    let seconds = |name: &str| parameter(name)?.parse::<u64>().ok();
    let ends = |prefix: &str| {
        let signed = parse_time(&parameter(&format!("x-{prefix}-date"))?)?;
        signed.checked_add(Duration::from_secs(seconds(&format!("x-{prefix}-expires"))?))
    };
    let ends = ends("amz")
        .or_else(|| ends("goog"))
        .or_else(|| UNIX_EPOCH.checked_add(Duration::from_secs(seconds("expires")?)))
        .or_else(|| parse_time(&parameter("se")?));
    let life = match ends {
        Some(ends) => ends.duration_since(server_now).unwrap_or_default(),
        None => GOOD_FOR_DEFAULT,
    };
    life.min(GOOD_FOR_MAX).saturating_sub((life / 4).min(MARGIN_MAX))
}

/// Parses `2026-08-22T10:15:00Z` and the same without separators, the two ways in which signed URLs write a time.
fn parse_time(text: &str) -> Option<SystemTime> {
    let digits: String = text.chars().filter(|c| !matches!(c, '-' | ':')).collect();
    let (date, time) = digits.strip_suffix('Z')?.split_once('T')?;
    let number = |text: &str, from: usize, to: usize| text.get(from..to)?.parse::<u64>().ok();
    let (year, month, day) = (number(date, 0, 4)?, number(date, 4, 6)?, number(date, 6, 8)?);
    let (hour, minute, second) = (number(time, 0, 2)?, number(time, 2, 4)?, number(time, 4, 6)?);
    let valid = year >= 1970 && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !valid || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, not before 1970. Years are counted from March, so that
/// the leap day is the last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = match month {
        1 | 2 => (year - 1, month + 9),
        _ => (year, month - 3),
    };
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SystemTime {
        parse_time(text).unwrap()
    }

    #[test]
    fn times_as_signed_urls_write_them() {
        let seconds = |text: &str| at(text).duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert_eq!(seconds("1970-01-01T00:00:00Z"), 0);
        assert_eq!(seconds("20000229T000000Z"), 951_782_400);
        assert_eq!(seconds("2026-08-22T10:15:30Z"), 1_787_393_730);
        for text in [
            "",
            "T",
            "Z",
            "20260822T101530",
            "2026-13-01T00:00:00Z",
            "20260822T2515Z",
            "äöüßäöTäöüZ",
        ] {
            assert_eq!(parse_time(text), None, "{text}");
        }
    }

    #[test]
    fn a_url_is_used_as_long_as_it_says_less_a_margin() {
        let now = at("20260822T101500Z");
        let epoch = now.duration_since(UNIX_EPOCH).unwrap().as_secs();
        let life = |query: &str| {
            let url = Url::parse(&format!("https://cdn.example/blob?{query}")).unwrap();
            good_for(&url, now).as_secs()
        };
        assert_eq!(life("X-Amz-Date=20260822T101400Z&X-Amz-Expires=1200"), 1120);
        assert_eq!(life("X-Goog-Date=20260822T101500Z&X-Goog-Expires=600"), 580);
        assert_eq!(life(&format!("Expires={}", epoch + 100)), 80);
        assert_eq!(life("se=2026-08-22T10%3A16%3A00Z&sig=x"), 45);
        assert_eq!(life("se=2020-01-01T00%3A00%3A00Z"), 0);
        assert_eq!(life("verify=1"), 280);
        assert_eq!(
            life("Expires=18446744073709551615"),
            280,
            "a time beyond all clocks says nothing"
        );
    }
}
