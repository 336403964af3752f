//! Bringing much at once: whole layers, or what a copy of many files needs, in the order of the blob with large ranges,
//! bounded in how much is under way. Unlike a reader, who wants an answer soon, this goes on for as long as bytes come,
//! and outlives a registry that is away for a moment.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};

use crate::error::{Error, Result};
use crate::fetch::failures::FAILURE_MEMORY;
use crate::fetch::read::Reader;
use crate::fetch::{Fetcher, FileAt, Source, blocking, plan};
use crate::store::layer::Layer;

/// The first pause before something is tried again: what failed is remembered for less.
const PAUSE_MIN: Duration = Duration::from_secs(FAILURE_MEMORY.as_secs() + 1);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Parts of a position in a layer, to compare those of different layers.
const POSITIONS: u128 = 1 << 20;
/// So much of the blobs is under way at once where the order counts: more would come at the cost of what is due first.
const IN_ORDER_BYTES_MAX: u64 = 8 << 20;

/// Pauses between attempts that get longer, a bounded number of them in a row.
#[derive(Debug, Clone)]
pub struct Backoff {
    retries: u32,
    left: u32,
    pause: Duration,
}

impl Backoff {
    /// At most `retries` pauses without progress between them.
    #[must_use]
    pub fn new(retries: u32) -> Self {
        Self {
            retries,
            left: retries,
            pause: PAUSE_MIN,
        }
    }

    /// Something has come: the count begins anew.
    pub fn progress(&mut self) {
        *self = Self::new(self.retries);
    }

    /// Waits before the next attempt after `error`; false where there is to be none.
    pub async fn wait(&mut self, error: &Error) -> bool {
        let is_over = matches!(error, Error::Network { .. } | Error::Timeout { .. });
        if !is_over || self.left == 0 {
            return false;
        }
        tracing::warn!(%error, pause_s = self.pause.as_secs(), "trying again after a pause");
        tokio::time::sleep(self.pause).await;
        self.left -= 1;
        self.pause = PAUSE_MAX.min(self.pause * 3 / 2);
        true
    }
}

/// What is missing of a layer.
#[derive(Debug, Clone)]
pub struct Part {
    /// Where the layer is to be had.
    pub source: Arc<Source>,
    /// The layer.
    pub layer: Arc<Layer>,
    /// The members, in the order of the blob.
    members: Vec<u32>,
}

impl Part {
    /// Leaves out the members that `wanted` does not want.
    pub(super) fn retain(&mut self, mut wanted: impl FnMut(u32) -> bool) {
        self.members.retain(|&member| wanted(member));
    }

    /// The compressed bytes of it.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index.
    pub fn blob_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for &member in &self.members {
            bytes += member_bytes(&self.layer, member)?;
        }
        Ok(bytes)
    }
}

/// How to bring parts.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Whether the parts come one behind the other, not side by side.
    pub in_order: bool,
    /// The most requests under way.
    pub requests_max: usize,
    /// How often a request that a network failure ended is made again without anything having come.
    pub retries: u32,
}

impl Fetcher {
    /// What is missing of these chunks of a layer. Those that a crash made doubtful are looked at.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index; [`Error::Io`].
    pub async fn part(
        &self,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        chunks: Vec<Range<u32>>,
    ) -> Result<Part> {
        Ok(Part {
            source: Arc::clone(source),
            layer: Arc::clone(layer),
            members: self.missing(layer, chunks).await?,
        })
    }

    /// Brings parts into the store. What lands is added to `landed_bytes`, in compressed bytes.
    ///
    /// # Errors
    /// A failure of the network that outlasts the retries, a refusal, or a disk that does not keep what comes, which end
    /// all; else the first that befell a part of it.
    pub async fn bring_parts(
        self: &Arc<Self>,
        parts: &[Part],
        pace: Pace,
        landed_bytes: &Arc<AtomicU64>,
    ) -> Result<()> {
        let _waiting = self.foreground.enter();
        let mut requests = planned(parts, pace.in_order)?.into_iter().peekable();
        let mut under_way = JoinSet::new();
        let mut under_way_bytes = 0_u64;
        let mut first_failure = Ok(());
        loop {
            while under_way.len() < pace.requests_max.max(1) {
                let is_due = |next: &Planned<'_>| {
                    let bytes = under_way_bytes.saturating_add(next.bytes);
                    !pace.in_order || under_way.is_empty() || bytes <= IN_ORDER_BYTES_MAX
                };
                let Some(Planned { part, members, bytes }) = requests.next_if(is_due) else {
                    break;
                };
                under_way_bytes += bytes;
                let (fetcher, part, landed) = (Arc::clone(self), part.clone(), Arc::clone(landed_bytes));
                let work = async move {
                    let done = fetcher.persist(&part, members, pace.retries, &landed).await;
                    (bytes, done)
                };
                under_way.spawn_on(work, &self.runtime);
            }
            let Some(done) = under_way.join_next().await else {
                return first_failure;
            };
            let panicked = |error: JoinError| (0, Err(Error::malformed("prefetch", error.to_string())));
            let (bytes, done) = done.unwrap_or_else(panicked);
            under_way_bytes -= bytes;
            match done {
                Ok(()) => {}
                // The next request would meet the same.
                Err(
                    error @ (Error::Network { .. }
                    | Error::Timeout { .. }
                    | Error::Denied { .. }
                    | Error::NoCredentials { .. }
                    | Error::Io { .. }),
                ) => {
                    return Err(error);
                }
                Err(error) => first_failure = first_failure.and(Err(error)),
            }
        }
    }

    /// Brings members of a part, which make one request, again and again if need be.
    async fn persist(
        self: &Arc<Self>,
        part: &Part,
        members: Vec<u32>,
        retries: u32,
        landed_bytes: &AtomicU64,
    ) -> Result<()> {
        let mut backoff = Backoff::new(retries);
        let all = members.clone();
        let mut left = members;
        loop {
            let before = left.len();
            let (failed, error) = self.attempt(part, &left, landed_bytes).await;
            let Some(error) = error else {
                return is_kept(&part.layer, &all);
            };
            if failed.len() < before {
                backoff.progress();
            }
            left = failed;
            if !backoff.wait(&error).await {
                return Err(error);
            }
        }
    }

    /// Brings members once. Answers those that did not come, and the first reason. What somebody else fetches, from a
    /// source that refuses him, is asked of our own.
    async fn attempt(
        self: &Arc<Self>,
        part: &Part,
        members: &[u32],
        landed_bytes: &AtomicU64,
    ) -> (Vec<u32>, Option<Error>) {
        let mut left = members.to_vec();
        let landed = |layer: &Layer, member| {
            let bytes = member_bytes(layer, member).unwrap_or(0);
            landed_bytes.fetch_add(bytes, Ordering::Relaxed);
        };
        for _ in 0..2 {
            let waiters = match self.launch(&part.source, &part.layer, &left, None) {
                Ok(waiters) => waiters,
                Err(error) => return (left, Some(error)),
            };
            let awaited: HashSet<u32> = waiters.iter().map(|waiter| waiter.member).collect();
            left.iter()
                .filter(|member| !awaited.contains(member))
                .for_each(|&member| landed(&part.layer, member));
            let (mut failed, mut first, mut only_elsewhere) = (Vec::new(), None, true);
            for waiter in waiters {
                match waiter.arrival.await {
                    Ok(()) => landed(&part.layer, waiter.member),
                    Err(error) => {
                        let is_refusal = matches!(
                            error,
                            Error::Denied { .. } | Error::Malformed { .. } | Error::Verification { .. }
                        );
                        only_elsewhere &= waiter.foreign && is_refusal;
                        failed.push(waiter.member);
                        first.get_or_insert(error);
                    }
                }
            }
            left = failed;
            if first.is_none() || !only_elsewhere {
                return (left, first);
            }
        }
        let error = Error::network(part.source.name(), "who else fetches it is refused");
        (left, Some(error))
    }

    /// Brings members for as long as bytes come, once.
    pub(super) async fn bring_members(
        self: &Arc<Self>,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        members: Vec<u32>,
    ) -> Result<()> {
        let part = Part {
            source: Arc::clone(source),
            layer: Arc::clone(layer),
            members,
        };
        let (_, error) = self.attempt(&part, &part.members, &AtomicU64::new(0)).await;
        error.map_or(Ok(()), Err)
    }

    /// The members of these chunks that are not there, in the order of the blob. Suspects are verified first.
    pub(super) async fn missing(&self, layer: &Arc<Layer>, chunks: Vec<Range<u32>>) -> Result<Vec<u32>> {
        let is_suspect = |chunks: &Range<u32>| chunks.clone().any(|chunk| layer.is_suspect(chunk));
        if chunks.iter().any(is_suspect) {
            let (layer, chunks) = (Arc::clone(layer), chunks.clone());
            let verify = move || {
                let mut suspects = chunks
                    .into_iter()
                    .flatten()
                    .filter(|&chunk| layer.is_suspect(chunk));
                suspects.try_for_each(|chunk| layer.verify_suspect(chunk).map(drop))
            };
            blocking(&self.runtime, verify).await?;
        }
        let mut members = Vec::new();
        for chunk in chunks
            .into_iter()
            .flatten()
            .filter(|&chunk| !layer.is_present(chunk))
        {
            let member = layer.index().chunk(chunk)?.member;
            if members.last() != Some(&member) {
                members.push(member);
            }
        }
        members.sort_unstable();
        members.dedup();
        Ok(members)
    }

    /// Bytes `offset..offset + len` of a file, cut at its end, for someone who copies whole files: nothing beyond them is
    /// fetched, and they may take as long as bytes come.
    ///
    /// # Errors
    /// What kept the bytes from coming, or from being what the layer promises.
    pub async fn read_whole(self: &Arc<Self>, at: &FileAt, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.read_as(Reader::Whole, at, offset, len).await
    }

    /// As [`Self::read_whole`], if the bytes are here and need no disk wait.
    #[must_use]
    pub fn read_whole_now(&self, at: &FileAt, offset: u64, len: usize) -> Option<Vec<u8>> {
        let span = at.span(offset, len).ok()??;
        at.layer.read_now(&span.chunks, span.data_offset, span.len)
    }

    /// Whether the disk takes what is fetched. Where it does not, fetching ahead would push out of memory what is needed
    /// next.
    #[must_use]
    pub fn keeps_what_comes(&self) -> bool {
        !self.overflow.is_in_use()
    }
}

/// A request that is to be made.
struct Planned<'a> {
    part: &'a Part,
    members: Vec<u32>,
    /// Bytes of the blob in it.
    bytes: u64,
}

/// The requests for parts, one part behind the other if `in_order`. Else all layers come at the same pace: a copy that goes
/// through them side by side finds what it needs.
fn planned(parts: &[Part], in_order: bool) -> Result<Vec<Planned<'_>>> {
    let mut all = Vec::new();
    for part in parts {
        let requests = plan::requests(part.layer.index(), &part.members, |_| Some(plan::GAP_BYTES_MAX))?;
        let Some((first, last)) = requests.first().zip(requests.last()) else {
            continue;
        };
        let (start, end) = (first.range.start, last.range.end);
        let part_bytes = u128::from(end.saturating_sub(start).max(1));
        for plan::Request { range, members } in requests {
            let position = u128::from(range.start - start) * POSITIONS / part_bytes;
            let bytes = range.end.saturating_sub(range.start);
            all.push((position, Planned { part, members, bytes }));
        }
    }
    if !in_order {
        all.sort_by_key(|(position, _)| *position);
    }
    Ok(all.into_iter().map(|(_, request)| request).collect())
}

/// Whether the store has these members, which came: a full disk fails no read, but keeps nothing for later.
pub(super) fn is_kept(layer: &Layer, members: &[u32]) -> Result<()> {
    let index = layer.index();
    for &member in members {
        let chunks = index.member_chunks(&index.member(member)?)?;
        if !chunks.iter().all(|&chunk| layer.is_present(chunk)) {
            return Err(Error::Io {
                what: "the cache".to_owned(),
                errno: libc::ENOSPC,
                why: "its disk does not take what is fetched; make room, or use another --cache-dir"
                    .to_owned(),
            });
        }
    }
    Ok(())
}

fn member_bytes(layer: &Layer, member: u32) -> Result<u64> {
    let range = layer.index().member(member)?.blob_range();
    Ok(range.end.saturating_sub(range.start))
}
