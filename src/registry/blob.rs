//! Ranges of blobs. The range that comes is exactly the range that was asked, or an error: an answer that says
//! another one is a lie, a body that breaks off is resumed where it broke. The URL behind a redirect is asked
//! directly from the second range on, and resolved anew when it is no longer good.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};
use tokio::time::Instant;

use super::answer::refusal;
use super::endpoint::{Endpoint, Need, Provenance, Route};
use super::failure::{Cause, Failure};
use super::foreign::ForeignUrls;
use super::host::{Host, Kind};
use super::pace::{Pace, TooSlow};
use super::redirect::is_redirect;
use super::reference::Repository;
use super::request::{Core, Reached, Request, Target, pull_scope};
use super::retry::{Attempts, Patience};
use super::secret::one_line;
use super::transport::{Answer, Call, Destination, send};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Ranges up to this length end after a total time; longer ones are streams.
const SMALL_RANGE_BYTES_MAX: u64 = 4 << 20;
/// So much of a blob is read and thrown away where a registry sends all of it instead of a range.
const SKIP_BYTES_MAX: u64 = 8 << 20;
/// Largest range that is collected in memory.
pub(super) const COLLECTED_BYTES_MAX: u64 = 64 << 20;
/// More than this is not hashed on a thread that others wait for: it takes milliseconds.
const HASHED_AT_ONCE_BYTES_MAX: usize = 256 << 10;
/// How long the end of a body is waited for after its last byte, so that its connection can be used again.
const END_WAIT: Duration = Duration::from_secs(1);

/// Where a blob is to be had, and how large it is.
#[derive(Clone, Copy)]
pub(super) struct BlobAt<'a> {
    pub(super) repository: &'a Repository,
    pub(super) digest: &'a Digest,
    pub(super) blob_bytes: u64,
    /// What is asked where the registry does not have it.
    pub(super) foreign: &'a ForeignUrls,
}

/// The bytes of one range, as they come. Dropping it ends its request.
pub struct BlobBody {
    core: Arc<Core>,
    repository: Repository,
    digest: Digest,
    position: u64,
    end: u64,
    blob_bytes: u64,
    attempts: Attempts,
    route: Route,
    /// What is left to ask when the route ends.
    foreign: ForeignUrls,
    /// The patience for the mirror that is asked now, if it is one with a successor.
    bounded: Option<Attempts>,
    provenance: Provenance,
    pace: Pace,
    open: Option<Open>,
}

/// An answer under way.
struct Open {
    answer: Answer,
    /// Bytes before the range that are still to be thrown away.
    skip: u64,
    /// Whether the body ends where the range does.
    exact: bool,
}

/// Opens `range` of a blob; the answer's head has been checked when this returns.
pub(super) async fn open(core: &Arc<Core>, at: BlobAt<'_>, range: Range<u64>) -> Result<BlobBody> {
    let patience = match range.end.saturating_sub(range.start) <= SMALL_RANGE_BYTES_MAX {
        true => Patience::Total,
        false => Patience::Stream,
    };
    open_with(core, at, range, patience).await
}

/// All of a blob for somebody who takes it as it comes, however small it is.
pub(super) async fn stream(core: &Arc<Core>, at: BlobAt<'_>) -> Result<BlobBody> {
    open_with(core, at, 0..at.blob_bytes, Patience::Stream).await
}

async fn open_with(
    core: &Arc<Core>,
    at: BlobAt<'_>,
    range: Range<u64>,
    patience: Patience,
) -> Result<BlobBody> {
    let BlobAt {
        repository,
        digest,
        blob_bytes,
        foreign,
    } = at;
    let what = format!("{repository}@{digest}");
    if range.start > range.end || range.end > blob_bytes {
        let (start, end) = (range.start, range.end);
        let why = format!("bytes {start} to {end} of a blob of {blob_bytes} bytes");
        return Err(Error::malformed(what, why));
    }
    let attempts = core.begin(what, patience)?;
    let route = core.route(&attempts.what, repository.host(), Need::Pull).await?;
    let mut body = BlobBody {
        route: route.for_blob(repository, digest),
        foreign: foreign.clone(),
        bounded: None,
        provenance: Provenance::default(),
        core: Arc::clone(core),
        repository: repository.clone(),
        digest: *digest,
        position: range.start,
        end: range.end,
        blob_bytes,
        attempts,
        pace: Pace::default(),
        open: None,
    };
    if range.is_empty() {
        return Ok(body);
    }
    if !body.foreign.is_empty() && body.route.is_in_vain() {
        // Else every range would ask in vain first.
        let error = Error::not_found(&body.attempts.what, "the registry did not have it a moment ago");
        body.go_on(error).await?;
    }
    body.open = Some(body.ask().await?);
    Ok(body)
}

/// A range of at most [`COLLECTED_BYTES_MAX`] as one piece.
pub(super) async fn collect(body: BlobBody) -> Result<Bytes> {
    let length = body.remaining();
    if length > COLLECTED_BYTES_MAX {
        let why = format!("{length} bytes in one piece; at most {COLLECTED_BYTES_MAX} are held in memory");
        return Err(Error::unsupported(&body.attempts.what, why));
    }
    in_one_piece(body).await
}

async fn in_one_piece(mut body: BlobBody) -> Result<Bytes> {
    let first = body.next().await?.unwrap_or_default();
    if body.remaining() == 0 {
        body.next().await?;
        return Ok(first);
    }
    // The length comes from outside: it is believed as the bytes come.
    let mut all = BytesMut::from(first);
    while let Some(piece) = body.next().await? {
        all.extend_from_slice(&piece);
    }
    Ok(all.freeze())
}

/// A whole blob, verified. Whoever asks knows that its size is one that can be held in memory.
pub(super) async fn whole_verified(core: &Arc<Core>, at: BlobAt<'_>) -> Result<Bytes> {
    let BlobAt {
        repository,
        digest,
        blob_bytes,
        ..
    } = at;
    let what = || format!("{repository}@{digest}");
    loop {
        let body = open(core, at, 0..blob_bytes).await?;
        let provenance = body.provenance();
        let bytes = in_one_piece(body).await?;
        let actual = digest_of(bytes.clone()).await?;
        if actual == *digest {
            return Ok(bytes);
        }
        let error = Error::mismatch(what(), digest, actual);
        // Each round leaves out a mirror for longer than it takes, so it ends at the server.
        if !provenance.distrust(&(0..blob_bytes), &error) {
            return Err(error);
        }
    }
}

/// The digest of bytes, taken on a thread for such work if it takes a while.
async fn digest_of(bytes: Bytes) -> Result<Digest> {
    if bytes.len() <= HASHED_AT_ONCE_BYTES_MAX {
        return Ok(Digest::of(&bytes));
    }
    let hashing = tokio::task::spawn_blocking(move || Digest::of(&bytes)).await;
    hashing.map_err(|error| Error::Io {
        what: "hashing a blob".to_owned(),
        errno: libc::EIO,
        why: error.to_string(),
    })
}

impl fmt::Debug for BlobBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobBody")
            .field("blob", &self.attempts.what)
            .field("position", &self.position)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl BlobBody {
    /// How many bytes are still to come.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.end - self.position
    }

    /// Who gives the bytes: whoever finds them wrong tells it, and asks again.
    #[must_use]
    pub fn provenance(&self) -> Provenance {
        self.provenance.clone()
    }

    /// As [`crate::registry::BlobBody::rested`].
    pub(crate) fn rested(&mut self, time: Duration) {
        let both = self.bounded.iter_mut().chain([&mut self.attempts]);
        both.for_each(|attempts| attempts.rested(time));
    }

    /// As [`crate::registry::BlobBody::next`].
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        self.patience().wait_anew();
        while self.position < self.end {
            let mut open = match self.open.take() {
                Some(open) => open,
                None => self.ask().await?,
            };
            let waiting = Instant::now();
            let failure = match open.answer.chunk(self.patience().attempt_deadline()).await {
                Ok(Some(bytes)) => {
                    let paced = self.keep_pace(bytes.len() as u64, waiting.elapsed());
                    match paced.and_then(|()| self.accept(&mut open, bytes)) {
                        Ok(bytes) => {
                            self.open = Some(open);
                            match bytes.is_empty() {
                                true => continue,
                                false => return Ok(Some(bytes)),
                            }
                        }
                        Err(error) => {
                            self.pass(error).await?;
                            continue;
                        }
                    }
                }
                Ok(None) => {
                    let why = format!("the body ended {} bytes before its time", self.remaining());
                    Failure::new(Cause::Cut, why)
                }
                Err(failure) => failure,
            };
            let host = Arc::clone(&open.answer.host);
            drop(open);
            if let Err(error) = self.patience().pause(&host, &failure).await {
                self.pass(error).await?;
            }
        }
        self.finish().await?;
        Ok(None)
    }

    /// The patience for whom is asked now.
    fn patience(&mut self) -> &mut Attempts {
        self.bounded.as_mut().unwrap_or(&mut self.attempts)
    }

    /// What was asked last failed: goes on to the next endpoint, if there is one.
    async fn pass(&mut self, error: Error) -> Result<()> {
        if let Err(error) = self.route.pass(error) {
            self.go_on(error).await?;
        }
        self.bounded = None;
        self.pace = Pace::default();
        self.attempts.wait_anew();
        Ok(())
    }

    /// Nobody along the route gives the blob, because of `error`: goes on to the URLs of its descriptor, if that may help.
    async fn go_on(&mut self, error: Error) -> Result<()> {
        let urls = std::mem::take(&mut self.foreign);
        let Some(last) = self.route.current().ok().filter(|_| urls.may_help(&error)) else {
            return Err(error);
        };
        let endpoints = urls
            .endpoints(&self.core.transport, &last.host, error.clone())
            .await?;
        self.route.go_on(&error, endpoints);
        Ok(())
    }

    /// Cuts from `bytes` what is not of the range.
    fn accept(&mut self, open: &mut Open, mut bytes: Bytes) -> Result<Bytes> {
        let skipped = open.skip.min(bytes.len() as u64);
        open.skip -= skipped;
        bytes.advance(usize::try_from(skipped).unwrap_or(usize::MAX).min(bytes.len()));
        let remaining = self.remaining();
        if bytes.len() as u64 > remaining {
            if open.exact {
                return Err(self.lie(open, "more bytes came than were asked for"));
            }
            bytes.truncate(usize::try_from(remaining).unwrap_or(usize::MAX));
        }
        self.position += bytes.len() as u64;
        Ok(bytes)
    }

    fn keep_pace(&mut self, bytes: u64, waited: Duration) -> Result<()> {
        self.patience().progressed(bytes);
        if self.attempts.patience == Patience::Total {
            return Ok(());
        }
        let timing = self.core.options().timing;
        let kept = self.pace.keep(bytes, waited, &timing);
        kept.map_err(|TooSlow { waited_ms, bytes }| Error::Timeout {
            what: format!("{}: only {bytes} bytes came in time", self.attempts.what),
            waited_ms,
        })
    }

    /// After the last byte: reads the end of the body, so that the connection can be used again.
    async fn finish(&mut self) -> Result<()> {
        let Some(mut open) = self.open.take().filter(|open| open.exact) else {
            return Ok(());
        };
        match open.answer.chunk(Instant::now() + END_WAIT).await {
            Ok(Some(bytes)) if !bytes.is_empty() => {
                Err(self.lie(&open, "more bytes came than were asked for"))
            }
            _ => Ok(()),
        }
    }

    fn lie(&self, open: &Open, why: &str) -> Error {
        Error::malformed(&self.attempts.what, format!("{}: {why}", open.answer.host.peer()))
    }

    /// Asks the endpoints in turn for what is missing.
    async fn ask(&mut self) -> Result<Open> {
        loop {
            let endpoint = self.route.current()?;
            if self.bounded.is_none() {
                self.bounded = self.route.bounded(&self.attempts);
            }
            match self.ask_at(&endpoint).await {
                Ok(open) => {
                    let has_next = self.route.has_next();
                    self.provenance.note(self.position, &endpoint, has_next);
                    return Ok(open);
                }
                Err(error) => self.pass(error).await?,
            }
        }
    }

    /// Asks one endpoint, at the URL behind its last redirect if there is one.
    async fn ask_at(&mut self, endpoint: &Endpoint) -> Result<Open> {
        let whole = self.position == 0 && self.end == self.blob_bytes;
        let mut headers = HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]);
        if !whole {
            let range = format!("bytes={}-{}", self.position, self.end - 1);
            let range = HeaderValue::try_from(range)
                .map_err(|error| Error::malformed(&self.attempts.what, error.to_string()))?;
            headers.insert(RANGE, range);
        }
        loop {
            let answer = match self.ask_directly(&endpoint.host, &headers).await? {
                Some(answer) => answer,
                None => self.ask_registry(endpoint, &headers).await?,
            };
            let range = self.position..self.end;
            if !is_whole_instead(&answer, &range, self.blob_bytes) {
                return check(&self.attempts.what, answer, range, self.blob_bytes);
            }
            let host = Arc::clone(&answer.host);
            drop(answer);
            let why =
                "does not honour ranges: it sends the whole blob instead, as caches do until they hold it";
            self.patience()
                .pause(&host, &Failure::new(Cause::Whole, why))
                .await?;
        }
    }

    /// Asks the endpoint itself, and keeps the URL that it redirects to.
    async fn ask_registry(&mut self, endpoint: &Endpoint, headers: &HeaderMap) -> Result<Answer> {
        let request = Request {
            method: Method::GET,
            to: Target::Path(format!("/{}/blobs/{}", self.repository.path(), self.digest)),
            headers: headers.clone(),
            scope: pull_scope(&self.repository),
            kind: Kind::Blob,
        };
        let attempts = self.bounded.as_mut().unwrap_or(&mut self.attempts);
        let mut reached = self.core.request(endpoint, &request, attempts).await?;
        let host = &endpoint.host;
        if !is_range_answer(reached.answer.status()) {
            return Err(match endpoint.is_foreign() {
                true => {
                    let how = "it was asked without credentials, as a URL in a manifest is";
                    refusal(&self.attempts.what, &mut reached.answer, how).await
                }
                false => self.core.refuse(host, &self.attempts.what, &mut reached).await,
            });
        }
        let Reached {
            answer, elsewhere, ..
        } = reached;
        if elsewhere && answer.status().is_success() {
            self.core
                .redirects
                .put(host, &self.repository, &self.digest, &answer);
        }
        Ok(answer)
    }

    /// Asks the known final URL. `None` if there is none, or it is no longer good.
    async fn ask_directly(&mut self, from: &Arc<Host>, headers: &HeaderMap) -> Result<Option<Answer>> {
        let (repository, digest) = (&self.repository, &self.digest);
        let Some(url) = self.core.redirects.get(from, repository, digest) else {
            return Ok(None);
        };
        let host = self.core.transport.peer(from, &url).await?;
        let call = Call::get(Destination::Url(url.clone()), headers.clone(), Kind::Blob);
        let attempts = self.bounded.as_mut().unwrap_or(&mut self.attempts);
        let answer = send(&host, &call, attempts).await;
        let good = answer
            .as_ref()
            .is_ok_and(|answer| is_range_answer(answer.status()));
        if good {
            return answer.map(Some);
        }
        self.core.redirects.forget(from, repository, digest, &url);
        let mut answer = answer?;
        // A store that moved its objects answers 404 where the registry now points elsewhere.
        let expired = matches!(answer.status().as_u16(), 400 | 401 | 403 | 404 | 410);
        if expired || is_redirect(answer.status()) {
            answer.drain().await;
            return Ok(None);
        }
        let mut reached = Reached {
            answer,
            elsewhere: true,
            with_credentials: false,
            scope: pull_scope(repository),
        };
        Err(self.core.refuse(from, &self.attempts.what, &mut reached).await)
    }
}

/// Whether the status is one that [`check`] judges.
fn is_range_answer(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 206 | 416)
}

/// Whether all of a blob comes, and too much of it before `range` to be read and thrown away. A registry that gives no
/// ranges does so each time, one that is a cache until it holds the blob.
fn is_whole_instead(answer: &Answer, range: &Range<u64>, blob_bytes: u64) -> bool {
    let honest = answer.content_length().is_none_or(|length| length == blob_bytes);
    honest && answer.status() == StatusCode::OK && range.start > SKIP_BYTES_MAX
}

/// Judges the head of an answer to a request for `range` of a blob of `blob_bytes` bytes.
fn check(what: &str, answer: Answer, range: Range<u64>, blob_bytes: u64) -> Result<Open> {
    let host = answer.host.peer();
    let lie = |why: String| Err(Error::malformed(what, format!("{host}: {why}")));
    let encoding = answer
        .header(CONTENT_ENCODING)
        .filter(|text| !text.trim().eq_ignore_ascii_case("identity"));
    if let Some(encoding) = encoding {
        let encoding = one_line(encoding, 40);
        return lie(format!(
            "the blob comes with Content-Encoding {encoding}, which nobody asked for"
        ));
    }
    let whole = range.start == 0 && range.end == blob_bytes;
    let length = answer.content_length();
    match answer.status().as_u16() {
        206 if !whole => {
            let said = answer.header(CONTENT_RANGE).unwrap_or("nothing");
            let honest = parse_content_range(said)
                .is_some_and(|(sent, total)| sent == range && total.is_none_or(|total| total == blob_bytes));
            if !honest {
                let (first, last) = (range.start, range.end - 1);
                let said = one_line(said, 100);
                return lie(format!(
                    "asked for bytes {first}-{last}/{blob_bytes}, it says that it sends {said}"
                ));
            }
            let asked = range.end - range.start;
            if let Some(length) = length.filter(|&length| length != asked) {
                return lie(format!("asked for {asked} bytes, it says that it sends {length}"));
            }
            answer.host.note_range();
            Ok(Open {
                answer,
                skip: 0,
                exact: true,
            })
        }
        200 => {
            if let Some(length) = length.filter(|&length| length != blob_bytes) {
                return lie(format!(
                    "the blob has {blob_bytes} bytes by its descriptor, {length} by the registry"
                ));
            }
            Ok(Open {
                answer,
                skip: range.start,
                exact: range.end == blob_bytes,
            })
        }
        416 => lie(format!("the blob has no bytes {}-{}", range.start, range.end - 1)),
        status => lie(format!("answered {status} to a request without a range")),
    }
}

/// Parses `bytes FIRST-LAST/LENGTH` (RFC 9110); the length is `None` where it is `*`.
pub(super) fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, length) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |text: &str| match text.bytes().all(|b| b.is_ascii_digit()) {
        true => text.parse::<u64>().ok(),
        false => None,
    };
    let length = match length {
        "*" => None,
        length => Some(number(length)?),
    };
    let (first, last) = (number(first)?, number(last)?);
    let valid = unit.eq_ignore_ascii_case("bytes") && first <= last;
    valid.then_some((first..last.checked_add(1)?, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 0-0/1"), Some((0..1, Some(1))));
        assert_eq!(parse_content_range("Bytes 5-9/*"), Some((5..10, None)));
        for text in [
            "",
            "bytes",
            "bytes */9",
            "bytes 5-4/9",
            "items 0-1/2",
            "bytes 0-18446744073709551615/*",
            "bytes +0-1/2",
            "bytes 0-1",
        ] {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_range_that_can_be_written_is_read(start in 0..u64::MAX - 1, length in 1u64..1000, total: u64) {
            let end = start.saturating_add(length);
            let text = format!("bytes {start}-{}/{total}", end - 1);
            prop_assert_eq!(parse_content_range(&text), Some((start..end, Some(total))));
        }

        #[test]
        fn any_text_is_survived(text in "\\PC{0,40}") {
            let _ = parse_content_range(&text);
        }
    }
}
