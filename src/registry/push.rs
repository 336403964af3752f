//! Pushing: blobs and manifests into a registry, by the OCI distribution specification. Only the registry's own server is
//! pushed to, never a mirror.
//!
//! A blob that the repository has already is not sent, and one that another repository of the registry has is mounted from
//! there. What has to be sent goes in one piece, which every registry takes. If that breaks off, the registry is asked how
//! much has arrived, and the rest follows in pieces that say where they belong; a registry that cannot tell gets the blob
//! from its start. If a proxy finds a piece too large, smaller ones follow. A registry keeps what has come under a name of
//! its own until the last request, which states the digest, so nothing that is cut short is ever seen as the blob.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RANGE,
};
use reqwest::{Method, Url};

use super::endpoint::{Endpoint, Need};
use super::host::Kind;
use super::manifest::{MANIFEST_BYTES_MAX, name};
use super::payload::{FilePart, Payload};
use super::redirect;
use super::reference::{Repository, Target as Named};
use super::request::{Core, Reached, Request, Target, push_scope};
use super::retry::{Attempts, Patience};
use super::secret::one_line;
use super::transport::Answer;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// How often one blob is begun: again after the registry has lost what it had of it, or with smaller pieces.
const STARTS_MAX: u32 = 8;
/// How many steps of an upload may leave the registry with no more of the blob than it has had already.
const STEPS_IN_VAIN_MAX: u32 = 8;
/// The first pieces of a blob that does not go through at once: less than any proxy's limit that is known to be set.
const PIECE_BYTES: u64 = 64 << 20;
/// The smallest pieces. 1 MiB is the least limit that a proxy has without anybody setting it (nginx).
const PIECE_BYTES_MIN: u64 = 128 << 10;
/// What a registry wants a piece to have at least (OCI distribution specification).
const LENGTH_MIN: HeaderName = HeaderName::from_static("oci-chunk-min-length");
const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// A blob to push.
#[derive(Debug, Clone)]
pub struct BlobUpload {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// A file with exactly its bytes, which nobody changes.
    pub file: Arc<File>,
    /// A repository of the same registry that has it.
    pub mount_from: Option<Repository>,
    /// How many bytes have been sent, for whoever shows it. Goes back where something is sent again.
    pub sent_bytes: Arc<AtomicU64>,
}

/// How a blob came into its repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Present,
    /// It was in another repository of the registry.
    Mounted,
    /// It was sent.
    Sent,
}

/// One operation at the registry's own server.
struct Operation<'a> {
    core: &'a Core,
    repository: &'a Repository,
    endpoint: Arc<Endpoint>,
    attempts: Attempts,
}

/// What became of one step of an upload.
enum Step {
    /// The registry has all of the blob.
    Done,
    /// It has the first bytes, and says where to go on.
    At(Place),
    /// It does not know the upload any more.
    Lost,
    /// Such a large piece does not get through.
    TooLarge,
    /// It has not taken what was sent; it has to be asked how much it has.
    Unclear,
}

/// Where an upload goes on.
#[derive(Clone)]
struct Place {
    url: Url,
    /// Bytes that the registry has.
    offset: u64,
    /// The least size of a piece that is not the last.
    piece_min: u64,
}

/// Whether the repository has the blob, which has `blob_bytes` bytes.
pub(super) async fn has_blob(
    core: &Core,
    repository: &Repository,
    digest: &Digest,
    blob_bytes: u64,
) -> Result<bool> {
    let what = format!("{repository}@{digest}");
    let mut operation = Operation::new(core, repository, what, Patience::Total).await?;
    operation.has(digest, blob_bytes).await
}

/// Mounts a blob, which is not there yet, from another repository of the registry, without having it at hand; whether that was
/// possible.
pub(super) async fn mount(core: &Core, to: &Repository, digest: &Digest, from: &Repository) -> Result<bool> {
    let what = format!("mount of {from}@{digest} in {to}");
    let mut operation = Operation::new(core, to, what, Patience::Total).await?;
    let Some(place) = operation.begin(digest, Some(from)).await? else {
        return Ok(true);
    };
    operation.cancel(&place).await;
    Ok(false)
}

/// Brings a blob into a repository.
pub(super) async fn blob(core: &Core, repository: &Repository, upload: &BlobUpload) -> Result<Pushed> {
    let what = format!("push of {repository}@{}", upload.digest);
    let mut operation = Operation::new(core, repository, what, Patience::Stream).await?;
    if operation.has(&upload.digest, upload.size).await? {
        return Ok(Pushed::Present);
    }
    let mut mount_from = upload.mount_from.as_ref();
    let mut piece_bytes = None;
    for _ in 0..STARTS_MAX {
        let Some(place) = operation.begin(&upload.digest, mount_from.take()).await? else {
            return Ok(Pushed::Mounted);
        };
        if operation.send_blob(upload, place, &mut piece_bytes).await? {
            return Ok(Pushed::Sent);
        }
    }
    let why = format!(
        "{} lost what it had of the blob {STARTS_MAX} times",
        operation.endpoint.host.peer()
    );
    Err(Error::network(operation.attempts.what, why))
}

/// Puts a manifest or index of media type `media_type` under a tag or its digest.
pub(super) async fn manifest(
    core: &Core,
    repository: &Repository,
    target: &Named,
    media_type: &str,
    bytes: &Bytes,
) -> Result<()> {
    let what = format!("push of {}", name(repository, target));
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        let why = format!("a manifest has at most {MANIFEST_BYTES_MAX} bytes");
        return Err(Error::unsupported(what, why));
    }
    let digest = Digest::of(bytes);
    let mut operation = Operation::new(core, repository, what, Patience::Total).await?;
    let media_type = HeaderValue::try_from(media_type)
        .map_err(|error| Error::malformed(&operation.attempts.what, error.to_string()))?;
    let path = format!("/{}/manifests/{target}", repository.path());
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, media_type)]);
    let payload = Payload::Bytes(bytes.clone());
    let mut reached = operation
        .ask(Method::PUT, Target::Path(path), headers, Some(&payload))
        .await?;
    if !reached.answer.status().is_success() {
        return Err(operation.refuse(&mut reached).await);
    }
    operation.check_digest(&reached.answer, &digest)?;
    reached.answer.drain().await;
    Ok(())
}

impl<'a> Operation<'a> {
    async fn new(
        core: &'a Core,
        repository: &'a Repository,
        what: String,
        patience: Patience,
    ) -> Result<Self> {
        let attempts = core.begin(what, patience)?;
        let route = core
            .route(&attempts.what, repository.host(), Need::Server)
            .await?;
        Ok(Self {
            core,
            repository,
            endpoint: route.current()?,
            attempts,
        })
    }

    async fn ask(
        &mut self,
        method: Method,
        to: Target,
        headers: HeaderMap,
        payload: Option<&Payload>,
    ) -> Result<Reached> {
        let request = Request {
            method,
            to,
            headers,
            scope: push_scope(self.repository),
            kind: Kind::Push,
        };
        self.core
            .request_with(&self.endpoint, &request, payload, &mut self.attempts)
            .await
    }

    async fn refuse(&self, reached: &mut Reached) -> Error {
        self.core
            .refuse(&self.endpoint.host, &self.attempts.what, reached)
            .await
    }

    /// A registry that says what it has stored says the digest that was meant.
    fn check_digest(&self, answer: &Answer, digest: &Digest) -> Result<()> {
        let said = answer
            .header(DIGEST)
            .and_then(|text| text.trim().parse::<Digest>().ok());
        match said.filter(|said| said != digest) {
            Some(said) => Err(Error::mismatch(&self.attempts.what, digest, said)),
            None => Ok(()),
        }
    }

    /// Whether the repository has the blob. One of another size is a broken one, and is sent again.
    async fn has(&mut self, digest: &Digest, blob_bytes: u64) -> Result<bool> {
        let path = format!("/{}/blobs/{digest}", self.repository.path());
        let mut reached = self
            .ask(Method::HEAD, Target::Path(path), HeaderMap::new(), None)
            .await?;
        match reached.answer.status().as_u16() {
            200..=299 => {
                // Some proxies take the length out of the answer to HEAD, or say 0.
                let said = reached.answer.length_stated().filter(|said| *said > 0);
                Ok(said.is_none_or(|said| said == blob_bytes))
            }
            // It redirects to where the blob is; that place need not like HEAD.
            401 | 403 | 405 if reached.elsewhere => Ok(true),
            401 | 403 => Err(self.refuse(&mut reached).await),
            _ => Ok(false),
        }
    }

    /// Begins an upload, or mounts the blob from another repository: then there is nothing to upload.
    async fn begin(&mut self, digest: &Digest, from: Option<&Repository>) -> Result<Option<Place>> {
        let path = format!("/{}/blobs/uploads/", self.repository.path());
        let from = from.filter(|from| from.host() == self.repository.host() && *from != self.repository);
        if let Some(from) = from {
            let query = url::form_urlencoded::Serializer::new(String::new())
                .append_pair("mount", &digest.to_string())
                .append_pair("from", from.path())
                .finish();
            let mut reached = self.post(format!("{path}?{query}")).await?;
            match reached.answer.status().as_u16() {
                201 => {
                    reached.answer.drain().await;
                    return Ok(None);
                }
                202 => return self.place(&mut reached, 0, 0).await.map(Some),
                // Whoever may not read from there, or knows no mounts, may still upload.
                _ => reached.answer.drain().await,
            }
        }
        let mut reached = self.post(path).await?;
        match reached.answer.status().as_u16() {
            202 => self.place(&mut reached, 0, 0).await.map(Some),
            _ => Err(self.refuse(&mut reached).await),
        }
    }

    async fn post(&mut self, path: String) -> Result<Reached> {
        let headers = HeaderMap::from_iter([(CONTENT_LENGTH, HeaderValue::from_static("0"))]);
        let nothing = Payload::Bytes(Bytes::new());
        self.ask(Method::POST, Target::Path(path), headers, Some(&nothing))
            .await
    }

    /// Where an answer says that the upload goes on. The last place holds where it says nothing.
    async fn place(&self, reached: &mut Reached, offset: u64, piece_min: u64) -> Result<Place> {
        let answer = &mut reached.answer;
        let what = &self.attempts.what;
        let location = match answer.header(LOCATION) {
            Some(location) => answer.url().join(location).ok(),
            None => Some(answer.url().clone()),
        };
        let mut url = location.ok_or_else(|| {
            let why = format!("{} names no valid URL to upload to", self.endpoint.host.peer());
            Error::malformed(what, why)
        })?;
        // A registry behind a proxy for TLS often does not know of it.
        let same_host = url.host() == answer.url().host();
        if same_host && answer.url().scheme() == "https" && url.scheme() == "http" {
            let mut secure = answer.url().clone();
            secure.set_path(url.path());
            secure.set_query(url.query());
            url = secure;
        }
        let url = redirect::allowed(&self.core.transport, what, answer, url)?;
        let said = answer
            .header(LENGTH_MIN)
            .and_then(|text| text.trim().parse().ok());
        let place = Place {
            url,
            offset,
            piece_min: said.unwrap_or(piece_min),
        };
        answer.drain().await;
        Ok(place)
    }

    /// Sends the blob. `false` if it has to be begun anew: then in pieces, if that was why.
    async fn send_blob(
        &mut self,
        upload: &BlobUpload,
        mut place: Place,
        piece_bytes: &mut Option<u64>,
    ) -> Result<bool> {
        let (mut furthest, mut in_vain) = (place.offset, 0);
        loop {
            let step = match (*piece_bytes, place.offset) {
                (None, 0) => self.put(upload, &place, 0..upload.size).await?,
                (_, offset) if offset >= upload.size => self.put(upload, &place, offset..upload.size).await?,
                (piece, _) => {
                    let piece = piece.unwrap_or(PIECE_BYTES).max(place.piece_min);
                    self.patch(upload, &place, piece).await?
                }
            };
            let step = match step {
                Step::Unclear => self.look(upload, &place).await?,
                step => step,
            };
            match step {
                Step::Done => return Ok(true),
                Step::At(next) => {
                    let arrived = next.offset.saturating_sub(furthest);
                    self.attempts.progressed(arrived);
                    furthest = furthest.max(next.offset);
                    in_vain = if arrived == 0 { in_vain + 1 } else { 0 };
                    if in_vain > STEPS_IN_VAIN_MAX {
                        let why = format!(
                            "{} has {furthest} bytes of the blob and takes no more",
                            self.endpoint.host.peer()
                        );
                        return Err(Error::network(&self.attempts.what, why));
                    }
                    place = next;
                }
                Step::TooLarge => {
                    let tried = piece_bytes.unwrap_or(PIECE_BYTES * 4).min(upload.size.max(1));
                    let smaller = (tried / 4).max(place.piece_min);
                    if smaller >= tried || smaller < PIECE_BYTES_MIN {
                        let why = format!(
                            "{} takes no piece of {tried} bytes; a proxy before it may have a limit",
                            self.endpoint.host.peer()
                        );
                        return Err(Error::unsupported(&self.attempts.what, why));
                    }
                    *piece_bytes = Some(smaller);
                    self.cancel(&place).await;
                    return Ok(false);
                }
                Step::Lost | Step::Unclear => return Ok(false),
            }
        }
    }

    /// Sends bytes `range` of the blob, the last ones, and ends the upload.
    async fn put(&mut self, upload: &BlobUpload, place: &Place, range: std::ops::Range<u64>) -> Result<Step> {
        let mut url = place.url.clone();
        url.query_pairs_mut()
            .append_pair("digest", &upload.digest.to_string());
        let headers = HeaderMap::from_iter([
            (CONTENT_TYPE, OCTETS),
            (CONTENT_LENGTH, HeaderValue::from(range.end - range.start)),
        ]);
        let payload = part(upload, range);
        let mut reached = match self
            .ask(Method::PUT, Target::Page(url), headers, Some(&payload))
            .await
        {
            Ok(reached) => reached,
            Err(_) if self.attempts.may_go_on() => return Ok(Step::Unclear),
            Err(error) => return Err(error),
        };
        match reached.answer.status().as_u16() {
            200..=299 => {
                self.check_digest(&reached.answer, &upload.digest)?;
                reached.answer.drain().await;
                Ok(Step::Done)
            }
            404 => Ok(Step::Lost),
            413 => Ok(Step::TooLarge),
            416 => Ok(Step::Unclear),
            _ => Err(self.refuse(&mut reached).await),
        }
    }

    /// Sends the next piece.
    async fn patch(&mut self, upload: &BlobUpload, place: &Place, piece_bytes: u64) -> Result<Step> {
        let range = place.offset..upload.size.min(place.offset.saturating_add(piece_bytes));
        let said = format!("{}-{}", range.start, range.end.saturating_sub(1));
        let said = HeaderValue::try_from(said)
            .map_err(|error| Error::malformed(&self.attempts.what, error.to_string()))?;
        let headers = HeaderMap::from_iter([
            (CONTENT_TYPE, OCTETS),
            (CONTENT_RANGE, said),
            (CONTENT_LENGTH, HeaderValue::from(range.end - range.start)),
        ]);
        let payload = part(upload, range.clone());
        let to = Target::Page(place.url.clone());
        let mut reached = match self.ask(Method::PATCH, to, headers, Some(&payload)).await {
            Ok(reached) => reached,
            Err(_) if self.attempts.may_go_on() => return Ok(Step::Unclear),
            Err(error) => return Err(error),
        };
        match reached.answer.status().as_u16() {
            200..=299 => {
                let arrived = arrived(&reached.answer).unwrap_or(range.end);
                self.check_offset(arrived, range.start, range.end)?;
                let next = self.place(&mut reached, arrived, place.piece_min).await?;
                Ok(Step::At(next))
            }
            404 => Ok(Step::Lost),
            413 => Ok(Step::TooLarge),
            416 => Ok(Step::Unclear),
            _ => Err(self.refuse(&mut reached).await),
        }
    }

    /// Asks how much of the blob has arrived. That of the first byte alone cannot be told from nothing.
    async fn look(&mut self, upload: &BlobUpload, place: &Place) -> Result<Step> {
        let to = Target::Page(place.url.clone());
        let mut reached = self.ask(Method::GET, to, HeaderMap::new(), None).await?;
        let answer = &reached.answer;
        if answer.status().is_success()
            && let Some(arrived) = arrived(answer).filter(|arrived| *arrived > 1)
        {
            self.check_offset(arrived, 0, upload.size)?;
            let next = self.place(&mut reached, arrived, place.piece_min).await?;
            return Ok(Step::At(next));
        }
        let is_open = answer.status().is_success();
        reached.answer.drain().await;
        drop(reached);
        // The request that broke off may have been the last one and done its work.
        if self.has(&upload.digest, upload.size).await? {
            return Ok(Step::Done);
        }
        if is_open {
            self.cancel(place).await;
        }
        Ok(Step::Lost)
    }

    fn check_offset(&self, arrived: u64, from: u64, to: u64) -> Result<()> {
        if (from..=to).contains(&arrived) {
            return Ok(());
        }
        let why = format!(
            "{} says that it has {arrived} bytes of the blob, after bytes {from} to {to} were sent",
            self.endpoint.host.peer()
        );
        Err(Error::malformed(&self.attempts.what, why))
    }

    /// Tells the registry that an upload is given up; it forgets it by itself, later, if it does not hear that.
    async fn cancel(&mut self, place: &Place) {
        let to = Target::Page(place.url.clone());
        if let Ok(mut reached) = self.ask(Method::DELETE, to, HeaderMap::new(), None).await {
            reached.answer.drain().await;
        }
    }
}

fn part(upload: &BlobUpload, range: std::ops::Range<u64>) -> Payload {
    upload.sent_bytes.store(range.start, Ordering::Relaxed);
    Payload::Part(FilePart {
        file: Arc::clone(&upload.file),
        range,
        taken: Arc::clone(&upload.sent_bytes),
    })
}

/// How many bytes have arrived, by an answer's `Range: 0-LAST`.
fn arrived(answer: &Answer) -> Option<u64> {
    parse_range(answer.header(RANGE)?)
}

fn parse_range(text: &str) -> Option<u64> {
    let text = one_line(text, 60);
    let text = text.trim();
    let range = text.strip_prefix("bytes=").unwrap_or(text);
    let last = range.strip_prefix("0-")?;
    let digits = !last.is_empty() && last.bytes().all(|byte| byte.is_ascii_digit());
    last.parse::<u64>().ok().filter(|_| digits)?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_registries_write_them() {
        for (text, arrived) in [
            ("0-0", Some(1)),
            ("0-99", Some(100)),
            ("bytes=0-99", Some(100)),
            (" 0-99 ", Some(100)),
            ("1-99", None),
            ("0-", None),
            ("0-+9", None),
            ("0--1", None),
            ("", None),
            ("0-18446744073709551615", None),
        ] {
            assert_eq!(parse_range(text), arrived, "{text}");
        }
    }
}
