//! One ranged request and what becomes of it: the body is cut into members as it streams in, the members are decoded and
//! verified on the cores, and each lands as soon as it is done, not when the request is.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::fetch::flight::Landing;
use crate::fetch::{Fetcher, Source};
use crate::layer::index::Chunk;
use crate::layer::{self, ChunkSink};
use crate::store::layer::Layer;

/// A batch goes to a core when it has this many compressed bytes, or when nothing more has arrived yet.
const BATCH_BYTES: usize = 256 << 10;
/// A longer member is decoded while it arrives instead of being collected.
const COLLECTED_MEMBER_BYTES_MAX: u64 = 16 << 20;
/// A longer chunk goes to its place on the disk while it is decoded instead of being collected.
const COLLECTED_CHUNK_BYTES_MAX: u64 = 8 << 20;
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
        let context = Context {
            fetcher,
            source,
            layer,
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
        if let Err(error) = context.stream(range, &mut arriving).await {
            tracing::debug!(layer = %context.layer.digest(), %error, "a request for chunks failed");
            for member in arriving {
                context.land(member.landing, Err(error.clone()));
            }
        }
    }
}

#[derive(Clone)]
struct Context {
    fetcher: Arc<Fetcher>,
    source: Arc<Source>,
    layer: Arc<Layer>,
}

impl Context {
    /// Streams the body and takes the members off `arriving` as they are complete.
    async fn stream(&self, range: Range<u64>, arriving: &mut VecDeque<Arriving>) -> Result<()> {
        let Source {
            repository,
            descriptor,
        } = &*self.source;
        let counters = &self.fetcher.counters;
        counters.requests.fetch_add(1, Ordering::Relaxed);
        let mut at = range.start;
        let mut body = self
            .fetcher
            .client
            .blob(repository, &descriptor.digest, range, descriptor.size)
            .await?;
        let mut collected = BytesMut::new();
        let mut batch: Vec<Arrived> = Vec::new();
        let mut batch_bytes = 0;
        while let Some(mut piece) = body.next().await? {
            counters
                .fetched_bytes
                .fetch_add(piece.len() as u64, Ordering::Relaxed);
            while !piece.is_empty() {
                let Some(member) = arriving.front() else {
                    return Ok(());
                };
                let wanted = member.range.clone();
                if at < wanted.start {
                    let gap = piece.split_to((wanted.start - at).min(piece.len() as u64) as usize);
                    at += gap.len() as u64;
                    continue;
                }
                if wanted.end - wanted.start > COLLECTED_MEMBER_BYTES_MAX {
                    self.dispatch(&mut batch, &mut batch_bytes).await;
                    self.stream_member(arriving, &mut at, &mut piece, &mut body)
                        .await?;
                    continue;
                }
                let part = piece.split_to((wanted.end - at).min(piece.len() as u64) as usize);
                at += part.len() as u64;
                let whole = match (collected.is_empty(), at == wanted.end) {
                    (true, true) => part,
                    (_, complete) => {
                        collected.extend_from_slice(&part);
                        if !complete {
                            continue;
                        }
                        collected.split().freeze()
                    }
                };
                batch_bytes += whole.len();
                batch.extend(arriving.pop_front().map(|member| (member.landing, whole)));
                if batch_bytes >= BATCH_BYTES {
                    self.dispatch(&mut batch, &mut batch_bytes).await;
                }
            }
            if batch.iter().any(|(landing, _)| landing.is_awaited()) {
                self.dispatch(&mut batch, &mut batch_bytes).await;
            }
        }
        self.dispatch(&mut batch, &mut batch_bytes).await;
        match arriving.front() {
            None => Ok(()),
            Some(_) => Err(Error::malformed(
                self.what(),
                "the answer to a range request ended early",
            )),
        }
    }

    /// Hands a batch to a core; waits while all are busy.
    async fn dispatch(&self, batch: &mut Vec<Arrived>, batch_bytes: &mut usize) {
        *batch_bytes = 0;
        if batch.is_empty() {
            return;
        }
        let batch = std::mem::take(batch);
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
        at: &mut u64,
        piece: &mut Bytes,
        body: &mut crate::registry::BlobBody,
    ) -> Result<()> {
        let Some(member) = arriving.pop_front() else {
            return Ok(());
        };
        let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES_WAITING_MAX);
        let context = self.clone();
        let number = member.landing.member();
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
            let mut wanted_more = true;
            loop {
                let part = piece.split_to((member.range.end - *at).min(piece.len() as u64) as usize);
                *at += part.len() as u64;
                // The decoder ends before the member's bytes do, or at the first error; the rest is passed over.
                wanted_more = wanted_more && (part.is_empty() || sender.send(part).await.is_ok());
                if *at == member.range.end {
                    drop(sender);
                    return Ok(());
                }
                let next = body.next().await?;
                *piece = next.ok_or_else(|| Error::malformed(self.what(), "the answer ended early"))?;
                let counters = &self.fetcher.counters;
                counters
                    .fetched_bytes
                    .fetch_add(piece.len() as u64, Ordering::Relaxed);
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
        let mut sink = StoreSink {
            context: self,
            current: None,
        };
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
        if let Err(error) = &outcome {
            if matches!(error, Error::Verification { .. } | Error::Malformed { .. }) {
                tracing::warn!(repository = %self.source.repository, layer = %self.layer.digest(), %error, "refused bytes");
            }
            if landing.is_awaited() {
                self.fetcher
                    .remember_failure(self.layer.digest(), landing.member(), error);
            }
        }
        landing.done(outcome);
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
        format!("{} layer {}", self.source.repository, self.layer.digest())
    }
}

/// Puts verified chunks into the store.
struct StoreSink<'a> {
    context: &'a Context,
    current: Option<Current>,
}

/// The chunk being received.
struct Current {
    number: u32,
    chunk: Chunk,
    collected: Vec<u8>,
}

impl StoreSink<'_> {
    fn current(&mut self, number: u32) -> Result<&mut Current> {
        let fresh = self
            .current
            .as_ref()
            .is_none_or(|current| current.number != number);
        if fresh {
            let chunk = self.context.layer.index().chunk(number)?;
            let room = if chunk.bytes <= COLLECTED_CHUNK_BYTES_MAX {
                chunk.bytes as usize
            } else {
                0
            };
            self.current = Some(Current {
                number,
                chunk,
                collected: Vec::with_capacity(room),
            });
        }
        self.current
            .as_mut()
            .ok_or_else(|| Error::malformed("chunk", "none is being received"))
    }
}

impl ChunkSink for StoreSink<'_> {
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let context = self.context;
        let current = self.current(chunk)?;
        if current.chunk.bytes > COLLECTED_CHUNK_BYTES_MAX {
            return context
                .layer
                .write(current.chunk.data_offset.saturating_add(offset), bytes);
        }
        current.collected.extend_from_slice(bytes);
        Ok(())
    }

    fn verified(&mut self, chunk: u32) -> Result<()> {
        let Some(current) = self.current.take().filter(|current| current.number == chunk) else {
            return Err(Error::malformed("chunk", "verified without having been received"));
        };
        let Context { fetcher, layer, .. } = self.context;
        fetcher.counters.chunks_decoded.fetch_add(1, Ordering::Relaxed);
        fetcher
            .counters
            .decoded_bytes
            .fetch_add(current.chunk.bytes, Ordering::Relaxed);
        if current.chunk.bytes > COLLECTED_CHUNK_BYTES_MAX {
            return layer.mark(chunk);
        }
        let kept = layer
            .write(current.chunk.data_offset, &current.collected)
            .and_then(|()| layer.mark(chunk));
        if let Err(error) = kept {
            // A full or broken disk must not fail the read.
            tracing::warn!(layer = %layer.digest(), %error, "a chunk stays in memory");
            fetcher
                .overflow
                .put(layer.digest(), chunk, Bytes::from(current.collected));
        }
        Ok(())
    }
}
