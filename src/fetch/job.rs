//! One ranged request and what becomes of it: the body is cut into members as it streams in, the members are decoded and
//! verified on the cores, and each lands as soon as it is done, not when the request is.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::fetch::flight::Landing;
use crate::fetch::sink::StoreSink;
use crate::fetch::{Fetcher, Source};
use crate::layer::{self, ChunkSink};
use crate::registry::{BlobBody, Provenance};
use crate::store::layer::Layer;

/// A batch goes to a core when it has this many compressed bytes, or when nothing more has arrived yet.
const BATCH_BYTES: usize = 256 << 10;
/// A longer member is decoded while it arrives instead of being collected.
const COLLECTED_MEMBER_BYTES_MAX: u64 = 16 << 20;
/// Pieces of the body that may wait for the decoder of a long member.
const PIECES_WAITING_MAX: usize = 16;

/// A request to be made.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) source: Arc<Source>,
    pub(super) layer: Arc<Layer>,
    /// The members it brings, in the order of the blob.
    pub(super) landings: Vec<Landing>,
    pub(super) range: Range<u64>,
}

/// A member that is arriving.
struct Arriving {
    landing: Landing,
    range: Range<u64>,
}

/// A member that has arrived.
type Arrived = (Landing, Bytes);

impl Job {
    /// Makes the request. Every landing ends.
    pub(super) async fn run(self) {
        let Self {
            fetcher,
            source,
            layer,
            landings,
            range,
        } = self;
        let mut context = Context {
            fetcher,
            source,
            layer,
            provenance: Provenance::default(),
        };
        let mut arriving = VecDeque::with_capacity(landings.len());
        for landing in landings {
            match context.layer.index().member(landing.member()) {
                Ok(member) => arriving.push_back(Arriving {
                    landing,
                    range: member.blob_range(),
                }),
                Err(error) => context.land(landing, Err(error)),
            }
        }
        let streamed = context.stream(range, &mut arriving).await;
        if let Err(error) = streamed.map_err(|error| context.source.blame(error)) {
            tracing::debug!(layer = %context.source.descriptor.digest, %error, "a request for chunks failed");
            for member in arriving {
                context.land(member.landing, Err(error.clone()));
            }
        }
    }
}

/// How far a body has been cut into members.
#[derive(Default)]
struct Cut {
    /// The position in the blob.
    at: u64,
    /// The byte before it: a member that starts within a byte shares it with the one before.
    last: u8,
    /// The beginning of a member whose rest has not come yet.
    collected: BytesMut,
    /// Members that are complete.
    batch: Vec<Arrived>,
    batch_bytes: usize,
}

impl Cut {
    /// Takes from `piece` what lies before `end`.
    fn split(&mut self, piece: &mut Bytes, end: u64) -> Bytes {
        let part = piece.split_to(end.saturating_sub(self.at).min(piece.len() as u64) as usize);
        self.at += part.len() as u64;
        self.last = part.last().copied().unwrap_or(self.last);
        part
    }

    /// What of a member that starts at `start` has come with the one before it.
    fn shared(&self, start: u64) -> Result<&[u8]> {
        match self.at.checked_sub(start) {
            None | Some(0) => Ok(&[]),
            Some(1) => Ok(std::slice::from_ref(&self.last)),
            Some(_) => Err(Error::malformed(
                "layer index",
                "members overlap by more than a byte",
            )),
        }
    }
}

#[derive(Clone)]
struct Context {
    fetcher: Arc<Fetcher>,
    source: Arc<Source>,
    layer: Arc<Layer>,
    /// Who gives the bytes.
    provenance: Provenance,
}

impl Context {
    /// Streams the body and takes the members off `arriving` as they are complete.
    async fn stream(&mut self, range: Range<u64>, arriving: &mut VecDeque<Arriving>) -> Result<()> {
        if self.is_remote() {
            self.fetcher.counters.requests.fetch_add(1, Ordering::Relaxed);
        }
        let mut cut = Cut {
            at: range.start,
            ..Cut::default()
        };
        let mut body = self.fetcher.blob(&self.source, range).await?;
        self.provenance = body.provenance();
        loop {
            match body.next().await {
                Ok(Some(mut piece)) => {
                    self.count_fetched(&piece);
                    while !piece.is_empty() && !arriving.is_empty() {
                        self.take(&mut cut, &mut piece, arriving, &mut body).await?;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    // What has arrived has arrived.
                    self.dispatch(&mut cut).await;
                    return Err(error);
                }
            }
            if cut.batch.iter().any(|(landing, _)| landing.is_awaited()) {
                self.dispatch(&mut cut).await;
            }
        }
        self.dispatch(&mut cut).await;
        match arriving.front() {
            None => Ok(()),
            Some(_) => Err(Error::malformed(
                self.what(),
                "the answer to a range request ended early",
            )),
        }
    }

    /// Takes from `piece` what belongs to the next member, or the gap before it.
    async fn take(
        &self,
        cut: &mut Cut,
        piece: &mut Bytes,
        arriving: &mut VecDeque<Arriving>,
        body: &mut BlobBody,
    ) -> Result<()> {
        let Some(wanted) = arriving.front().map(|member| member.range.clone()) else {
            return Ok(());
        };
        if cut.at < wanted.start {
            cut.split(piece, wanted.start);
            return Ok(());
        }
        if wanted.end - wanted.start > COLLECTED_MEMBER_BYTES_MAX {
            self.dispatch(cut).await;
            return self.stream_member(arriving, cut, piece, body).await;
        }
        if cut.collected.is_empty() {
            let shared = cut.shared(wanted.start)?.to_vec();
            cut.collected.extend_from_slice(&shared);
        }
        let part = cut.split(piece, wanted.end);
        let whole = match (cut.collected.is_empty(), cut.at == wanted.end) {
            (true, true) => part,
            (_, complete) => {
                cut.collected.extend_from_slice(&part);
                if !complete {
                    return Ok(());
                }
                cut.collected.split().freeze()
            }
        };
        cut.batch_bytes += whole.len();
        cut.batch
            .extend(arriving.pop_front().map(|member| (member.landing, whole)));
        if cut.batch_bytes >= BATCH_BYTES {
            self.dispatch(cut).await;
        }
        Ok(())
    }

    fn is_remote(&self) -> bool {
        self.fetcher.is_remote(&self.source)
    }

    fn count_fetched(&self, piece: &Bytes) {
        if self.is_remote() {
            let fetched = &self.fetcher.counters.fetched_bytes;
            fetched.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    }

    /// Hands what is complete to a core; waits while all are busy.
    async fn dispatch(&self, cut: &mut Cut) {
        cut.batch_bytes = 0;
        if cut.batch.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut cut.batch);
        let permit = Arc::clone(&self.fetcher.decoders).acquire_owned().await;
        let context = self.clone();
        self.fetcher.runtime.spawn_blocking(move || {
            for (landing, bytes) in batch {
                let outcome = context.decode(landing.member(), |decoder, sink| decoder.push(&bytes, sink));
                context.land(landing, outcome);
            }
            drop(permit);
        });
    }

    /// Decodes a long member while it arrives: what is left of `piece` first, then the body, up to the member's end.
    async fn stream_member(
        &self,
        arriving: &mut VecDeque<Arriving>,
        cut: &mut Cut,
        piece: &mut Bytes,
        body: &mut BlobBody,
    ) -> Result<()> {
        let Some(member) = arriving.pop_front() else {
            return Ok(());
        };
        let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES_WAITING_MAX);
        let context = self.clone();
        let number = member.landing.member();
        let shared = Bytes::copy_from_slice(cut.shared(member.range.start)?);
        let decoding = self.fetcher.runtime.spawn_blocking(move || {
            context.decode(number, |decoder, sink| {
                while let Some(bytes) = receiver.blocking_recv() {
                    if decoder.push(&bytes, sink)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            })
        });
        let feeding = async {
            let mut wanted_more = shared.is_empty() || sender.send(shared).await.is_ok();
            loop {
                let part = cut.split(piece, member.range.end);
                // The decoder ends before the member's bytes do, or at the first error; the rest is passed over.
                wanted_more = wanted_more && (part.is_empty() || sender.send(part).await.is_ok());
                if cut.at == member.range.end {
                    drop(sender);
                    return Ok(());
                }
                let next = body.next().await?;
                *piece = next.ok_or_else(|| Error::malformed(self.what(), "the answer ended early"))?;
                self.count_fetched(piece);
            }
        };
        let fed: Result<()> = feeding.await;
        let decoded = decoding
            .await
            .unwrap_or_else(|e| Err(Error::malformed(self.what(), e.to_string())));
        self.land(member.landing, fed.clone().and(decoded));
        fed
    }

    /// Decodes a member with `feed`, which pushes its bytes and answers whether the member was complete.
    fn decode(
        &self,
        member: u32,
        feed: impl FnOnce(&mut dyn layer::MemberDecoder, &mut dyn ChunkSink) -> Result<bool>,
    ) -> Result<()> {
        let mut decoder = layer::decoder(self.layer.index(), member)?;
        let mut sink = StoreSink::new(&self.fetcher, &self.layer);
        let complete = feed(&mut *decoder, &mut sink)?;
        self.layer.note_progress();
        if complete {
            Ok(())
        } else {
            Err(Error::malformed(self.what(), "a compressed member ends early"))
        }
    }

    fn land(&self, landing: Landing, outcome: Result<()>) {
        let outcome = outcome.map_err(|error| self.name_layer(error));
        let landing = match &outcome {
            Ok(()) => landing,
            Err(error) => match self.ask_elsewhere(landing, error) {
                Some(landing) => landing,
                None => return,
            },
        };
        if let Err(error) = &outcome {
            if matches!(error, Error::Verification { .. } | Error::Malformed { .. }) {
                tracing::warn!(repository = %self.source.repository, layer = %self.source.descriptor.digest, %error, "refused bytes");
            }
            if landing.is_awaited() {
                self.fetcher
                    .remember_failure(&self.source, landing.member(), error);
            }
        }
        landing.done(outcome);
    }

    /// Where a mirror gave the bytes that are wrong: asks for the member again, which then asks somebody else, because
    /// the mirror is left out for longer than that takes. Else gives the landing back.
    fn ask_elsewhere(&self, landing: Landing, error: &Error) -> Option<Landing> {
        let Ok(member) = self.layer.index().member(landing.member()) else {
            return Some(landing);
        };
        let range = member.blob_range();
        if !self.provenance.distrust(&range, error) {
            return Some(landing);
        }
        let job = Job {
            fetcher: Arc::clone(&self.fetcher),
            source: Arc::clone(&self.source),
            layer: Arc::clone(&self.layer),
            landings: vec![landing],
            range,
        };
        // Boxed, because a job that may start a job has no size.
        let again: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(job.run());
        self.fetcher.runtime.spawn(again);
        None
    }

    /// Says in an error about bytes which layer they belong to.
    fn name_layer(&self, error: Error) -> Error {
        let name = |what: String| format!("{}, {what}", self.what());
        match error {
            Error::Verification {
                what,
                expected,
                actual,
            } => Error::Verification {
                what: name(what),
                expected,
                actual,
            },
            Error::Malformed { what, why } if !what.contains("layer sha256:") => Error::Malformed {
                what: name(what),
                why,
            },
            other => other,
        }
    }

    fn what(&self) -> String {
        self.source.name()
    }
}
