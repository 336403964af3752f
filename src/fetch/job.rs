//! One ranged request and what becomes of it: the body is cut into members as it streams in, the members are decoded and
//! verified on the cores, and each lands as soon as it is done, not when the request is.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::fetch::cut::Cut;
use crate::fetch::flight::Landing;
use crate::fetch::sink::StoreSink;
use crate::fetch::workbench::Workbench;
use crate::fetch::{Fetcher, Source};
use crate::layer::{self, Spare};
use crate::registry::{BlobBody, Provenance};
use crate::store::layer::Layer;

/// A batch goes to a core when it has this many compressed bytes, or when nothing more has arrived yet.
const BATCH_BYTES: usize = 256 << 10;
/// A longer member is decoded while it arrives instead of being collected.
const COLLECTED_MEMBER_BYTES_MAX: u64 = 16 << 20;
/// Pieces of the body that may wait for the decoder of a long member.
const PIECES_WAITING_MAX: usize = 16;

/// Whether somebody waits for what a request brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A reader does, or will soon.
    Awaited,
    /// Nobody does: whoever waits for something else comes first.
    Ahead,
}

/// After so many members it is written what they were decoded to, also if nobody waits for it.
const LANDINGS_MAX: usize = 64;

/// A request to be made.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) fetcher: Arc<Fetcher>,
    pub(super) urgency: Urgency,
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

/// A member that has arrived, in pieces.
type Arrived = (Landing, Vec<Bytes>);

impl Job {
    /// Makes the request. Every landing ends.
    pub(super) async fn run(self) {
        let Self {
            fetcher,
            urgency,
            source,
            layer,
            landings,
            range,
        } = self;
        let mut context = Context {
            fetcher,
            urgency,
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
        let (began, bytes) = (Instant::now(), range.end.saturating_sub(range.start));
        let streamed = context.stream(range, &mut arriving).await;
        if context.urgency == Urgency::Ahead && streamed.is_ok() {
            context.fetcher.background.measured(bytes, began.elapsed());
        }
        if let Err(error) = streamed.map_err(|error| context.source.blame(error)) {
            tracing::debug!(layer = %context.source.descriptor.digest, %error, "a request for chunks failed");
            for member in arriving {
                context.land(member.landing, Err(error.clone()));
            }
        }
    }
}

/// Members of one body that are complete and wait for a core.
#[derive(Default)]
struct Batch {
    members: Vec<Arrived>,
    bytes: usize,
}

#[derive(Clone)]
struct Context {
    fetcher: Arc<Fetcher>,
    urgency: Urgency,
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
        let (mut cut, mut batch) = (Cut::new(range.start), Batch::default());
        let mut body = self.fetcher.blob(&self.source, range).await?;
        self.provenance = body.provenance();
        loop {
            if self.stands_back() {
                self.dispatch(&mut batch).await;
                let is_awaited = || arriving.iter().any(|member| member.landing.is_awaited());
                self.give_way(&mut body, is_awaited).await;
            }
            let outcome = match body.next().await {
                Ok(Some(piece)) => {
                    self.count_fetched(&piece);
                    self.take_all(&mut cut, &mut batch, piece, arriving, &mut body)
                        .await
                }
                Ok(None) => break,
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                // What has arrived has arrived.
                self.dispatch(&mut batch).await;
                return Err(error);
            }
            if batch.members.iter().any(|(landing, _)| landing.is_awaited()) {
                self.dispatch(&mut batch).await;
            }
        }
        self.dispatch(&mut batch).await;
        match arriving.front() {
            None => Ok(()),
            Some(_) => Err(Error::malformed(
                self.what(),
                "the answer to a range request ended early",
            )),
        }
    }

    /// Takes from `piece` what belongs to the next members, and the gaps before them.
    async fn take_all(
        &self,
        cut: &mut Cut,
        batch: &mut Batch,
        mut piece: Bytes,
        arriving: &mut VecDeque<Arriving>,
        body: &mut BlobBody,
    ) -> Result<()> {
        while let Some(wanted) = arriving.front().map(|member| member.range.clone()) {
            if piece.is_empty() && !cut.has_reached(wanted.end) {
                break;
            }
            if !cut.has_reached(wanted.start) {
                cut.split(&mut piece, wanted.start);
            } else if wanted.end - wanted.start > COLLECTED_MEMBER_BYTES_MAX {
                self.dispatch(batch).await;
                self.stream_member(arriving, cut, &mut piece, body).await?;
            } else if let Some(whole) = cut.member(&mut piece, &wanted)? {
                batch.bytes += whole.iter().map(Bytes::len).sum::<usize>();
                let member = arriving.pop_front();
                batch.members.extend(member.map(|member| (member.landing, whole)));
                if batch.bytes >= BATCH_BYTES {
                    self.dispatch(batch).await;
                }
            }
        }
        Ok(())
    }

    /// Whether somebody waits for something else.
    fn stands_back(&self) -> bool {
        let fetcher = &self.fetcher;
        self.urgency == Urgency::Ahead
            && fetcher.options.background.may_stand_still()
            && fetcher.foreground.is_busy()
    }

    /// Stands still while it has to, unless somebody waits for what it brings.
    async fn give_way(&self, body: &mut BlobBody, is_awaited: impl Fn() -> bool) {
        if self.stands_back() {
            let since = Instant::now();
            self.fetcher.foreground.give_way(is_awaited).await;
            // Or its time would be over, and who then waits for it would be told so.
            body.rested(since.elapsed());
        }
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
    async fn dispatch(&self, batch: &mut Batch) {
        let Batch { members, .. } = std::mem::take(batch);
        if members.is_empty() {
            return;
        }
        let turn = match self.urgency {
            Urgency::Awaited => None,
            Urgency::Ahead => Some(self.fetcher.background.decoders().acquire_owned().await),
        };
        let permit = Arc::clone(&self.fetcher.decoders).acquire_owned().await;
        let context = self.clone();
        self.fetcher.runtime.spawn_blocking(move || {
            context.decode_all(members);
            drop((permit, turn));
        });
    }

    /// Decodes members and lets them land, together where nobody waits for them.
    fn decode_all(&self, members: Vec<Arrived>) {
        let Workbench { mut spare, room } = self.fetcher.workbenches.take();
        let mut sink = StoreSink::new(&self.fetcher, &self.layer, room);
        let mut decoded: Vec<Landing> = Vec::new();
        for (landing, pieces) in members {
            let outcome = self.decode(landing.member(), &mut spare, &mut sink, |decoder, sink| {
                let pieces: Vec<&[u8]> = pieces.iter().map(|piece| &piece[..]).collect();
                decoder.push_all(&pieces, sink)
            });
            match outcome {
                Ok(()) => decoded.push(landing),
                Err(error) => self.land(landing, Err(error)),
            }
            if decoded.len() >= LANDINGS_MAX || decoded.iter().any(Landing::is_awaited) {
                sink.flush();
                decoded.drain(..).for_each(|landing| self.land(landing, Ok(())));
            }
        }
        sink.flush();
        decoded.into_iter().for_each(|landing| self.land(landing, Ok(())));
        let room = sink.into_room();
        self.fetcher.workbenches.put_back(Workbench { spare, room });
    }

    /// Decodes a long member while it arrives: what came before and what is left of `piece` first, then the body, up to the
    /// member's end.
    async fn stream_member(
        &self,
        arriving: &mut VecDeque<Arriving>,
        cut: &mut Cut,
        piece: &mut Bytes,
        body: &mut BlobBody,
    ) -> Result<()> {
        let shared = match arriving.front() {
            Some(member) => cut.shared(member.range.start)?,
            None => Bytes::new(),
        };
        let Some(member) = arriving.pop_front() else {
            return Ok(());
        };
        let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES_WAITING_MAX);
        let context = self.clone();
        let number = member.landing.member();
        let decoding = self.fetcher.runtime.spawn_blocking(move || {
            let mut sink = StoreSink::new(&context.fetcher, &context.layer, Vec::new());
            context.decode(number, &mut Spare::default(), &mut sink, |decoder, sink| {
                while let Some(bytes) = receiver.blocking_recv() {
                    let is_done = decoder.push(&bytes, sink);
                    // More may take a while to come, and somebody may need no more.
                    sink.flush();
                    if is_done? {
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
                if cut.has_reached(member.range.end) {
                    drop(sender);
                    return Ok(());
                }
                let behind = || arriving.iter().any(|member| member.landing.is_awaited());
                self.give_way(body, || member.landing.is_awaited() || behind())
                    .await;
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
        spare: &mut Spare,
        sink: &mut StoreSink<'_>,
        feed: impl FnOnce(&mut dyn layer::MemberDecoder, &mut StoreSink<'_>) -> Result<bool>,
    ) -> Result<()> {
        let mut decoder = layer::decoder_with(self.layer.index(), member, std::mem::take(spare))?;
        let fed = feed(&mut *decoder, sink);
        sink.end_member();
        *spare = decoder.into_spare();
        match fed? {
            true => Ok(()),
            false => Err(Error::malformed(self.what(), "a compressed member ends early")),
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
            urgency: self.urgency,
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
