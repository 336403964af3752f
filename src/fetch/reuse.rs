//! What is missing in a layer and is elsewhere in the store, in another layer or at another place of the same one, is
//! copied and not fetched.
//!
//! Whether that may be so is looked up for every member that is about to be requested, by the digests of its chunks: a
//! fraction of a microsecond each, on the thread that plans the requests, with nothing opened and nothing read but mapped
//! memory. So those who have nothing to copy pay nearly nothing. The copying itself, which opens layers and waits for the
//! disk, is done on threads for such work, by as many as may decode. What it turns out not to find is requested then.
//!
//! A member is copied only if all of it that is missing can be: otherwise it has to come anyway.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::{AcquireError, OwnedSemaphorePermit};

use crate::digest::Digest;
use crate::error::Result;
use crate::fetch::flight::{Landing, Mine};
use crate::fetch::job::Urgency;
use crate::fetch::{Fetcher, Source, blocking};
use crate::store::digests::{Audience, Look};
use crate::store::layer::{Copied, Layer};

/// Copied in one go: a reader of the first of it does not wait for all of it.
const BATCH_BYTES: u64 = 4 << 20;
/// Members copied in one go.
const BATCH_MEMBERS: usize = 256;
/// Layers that were copied from are kept open, because opening one checks all of its index.
const SOURCES_MAX: usize = 64;

/// Layers that were copied from lately.
#[derive(Debug)]
pub(super) struct Sources(Mutex<LruCache<Digest, Arc<Layer>>>);

impl Default for Sources {
    fn default() -> Self {
        let at_most = NonZeroUsize::MIN.saturating_add(SOURCES_MAX - 1);
        Self(Mutex::new(LruCache::new(at_most)))
    }
}

impl Sources {
    /// Keeps a layer open that was copied from into `layer`, unless it is not in order.
    fn keep(&self, layer: &Layer, from: Arc<Layer>, is_right: bool) {
        let key = *from.key();
        match is_right && key != *layer.key() {
            true => self.0.lock().put(key, from),
            false => self.0.lock().pop(&key),
        };
    }
}

/// Takes the members out of `members` that can probably be copied; answers them in batches.
///
/// # Errors
/// `Malformed` for a damaged index.
pub(super) fn take_copyable(
    fetcher: &Fetcher,
    source: &Source,
    layer: &Layer,
    members: &mut Vec<u32>,
) -> Result<Vec<Vec<u32>>> {
    let Some(look) = fetcher.store.digests().look() else {
        return Ok(Vec::new());
    };
    let audience = source.audience();
    let (mut batches, mut batch, mut batch_bytes) = (Vec::new(), Vec::new(), 0);
    let mut left = Vec::with_capacity(members.len());
    for &member in &*members {
        let Some(bytes) = copyable_bytes(&look, layer, member, audience)? else {
            left.push(member);
            continue;
        };
        batch.push(member);
        batch_bytes += bytes;
        if batch_bytes >= BATCH_BYTES || batch.len() >= BATCH_MEMBERS {
            batches.push(std::mem::take(&mut batch));
            batch_bytes = 0;
        }
    }
    batches.extend((!batch.is_empty()).then_some(batch));
    *members = left;
    Ok(batches)
}

/// The bytes that are missing of a member, if they can probably be copied.
fn copyable_bytes(look: &Look<'_>, layer: &Layer, member: u32, audience: Audience) -> Result<Option<u64>> {
    let index = layer.index();
    let mut bytes = 0;
    for number in index.member_chunks(&index.member(member)?)? {
        if layer.is_present(number) {
            continue;
        }
        let chunk = index.chunk(number)?;
        let Some(digest) = chunk.digest else {
            return Ok(None);
        };
        let is_there = look.claims(digest, audience).any(|claim| {
            if claim.key == *layer.key() && claim.chunk == number {
                return false;
            }
            // What is not open is looked at by whoever copies.
            claim.open_layer().is_none_or(|from| {
                let found = from.index().chunk(claim.chunk);
                let may_be_there = from.is_present(claim.chunk) || from.is_suspect(claim.chunk);
                may_be_there && found.is_ok_and(|found| found.digest == chunk.digest)
            })
        });
        if !is_there {
            return Ok(None);
        }
        bytes += chunk.bytes;
    }
    Ok(Some(bytes))
}

/// Members of a layer to be copied.
pub(super) struct Copying {
    pub(super) fetcher: Arc<Fetcher>,
    /// That of what has to be requested after all.
    pub(super) urgency: Urgency,
    pub(super) source: Arc<Source>,
    pub(super) layer: Arc<Layer>,
    /// In the order of the blob.
    pub(super) landings: Vec<Landing>,
}

impl Copying {
    /// Copies, and has the rest requested, all with the permit of the window that they are in. Every landing ends.
    pub(super) async fn run(self, permit: Option<Arc<OwnedSemaphorePermit>>) {
        let (fetcher, source, layer) = (
            Arc::clone(&self.fetcher),
            Arc::clone(&self.source),
            Arc::clone(&self.layer),
        );
        let urgency = self.urgency;
        let turn = match urgency {
            Urgency::Awaited => None,
            Urgency::Ahead => Some(self.turn().await),
        };
        let core = Arc::clone(&fetcher.decoders).acquire_owned().await;
        let left = blocking(&fetcher.runtime, move || {
            let left = self.copy_all();
            drop((core, turn));
            Ok(left)
        });
        // Where the copying did not come to its end, its landings have ended as failures.
        let Ok(left) = left.await else { return };
        let members: Vec<u32> = left.iter().map(Landing::member).collect();
        let left: Mine = left
            .into_iter()
            .map(|landing| (landing.member(), landing))
            .collect();
        match fetcher.requests(&layer, &members, &members) {
            Ok(requests) => fetcher.request(urgency, &source, &layer, requests, left, permit.as_ref()),
            Err(error) => {
                tracing::warn!(layer = %source.descriptor.digest, %error, "what was not copied cannot be requested");
            }
        }
    }

    /// Waits for a turn among what nobody waits for. Readers come first, also at the disk: one request may become many
    /// copies, which would have all the decoders until a slow disk has read them. Nobody stands still with a turn in hand,
    /// as others who need one may be waited for.
    async fn turn(&self) -> std::result::Result<OwnedSemaphorePermit, AcquireError> {
        let Fetcher {
            foreground,
            background,
            ..
        } = &*self.fetcher;
        let is_awaited = || self.landings.iter().any(Landing::is_awaited);
        loop {
            foreground.give_way(is_awaited).await;
            let turn = background.decoders().acquire_owned().await;
            if is_awaited() || !foreground.is_busy() {
                return turn;
            }
        }
    }

    /// Answers the landings of what cannot be copied.
    fn copy_all(self) -> Vec<Landing> {
        let mut left = Vec::new();
        let audience = self.source.audience();
        for landing in self.landings {
            match copy_member(&self.fetcher, &self.layer, landing.member(), audience) {
                Ok(true) => {
                    self.layer.note_progress();
                    landing.done(Ok(()));
                }
                Ok(false) => left.push(landing),
                Err(error) => {
                    tracing::debug!(layer = %self.layer.key(), %error, "what was to be copied is fetched");
                    left.push(landing);
                }
            }
        }
        left
    }
}

/// Copies what is missing of a member; false if something of it is nowhere.
fn copy_member(fetcher: &Fetcher, layer: &Layer, member: u32, audience: Audience) -> Result<bool> {
    let index = layer.index();
    for number in index.member_chunks(&index.member(member)?)? {
        if !layer.is_present(number) && !copy_chunk(fetcher, layer, number, audience)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn copy_chunk(fetcher: &Fetcher, layer: &Layer, number: u32, audience: Audience) -> Result<bool> {
    let chunk = layer.index().chunk(number)?;
    let Some((digest, look)) = chunk.digest.zip(fetcher.store.digests().look()) else {
        return Ok(false);
    };
    let claims: Vec<_> = look.claims(digest, audience).collect();
    drop(look);
    let claims = claims
        .iter()
        .filter(|claim| claim.key != *layer.key() || claim.chunk != number);
    for claim in claims {
        let Some(from) = fetcher.store.claimed(claim) else {
            continue;
        };
        let copied = layer.copy_chunk(number, &from, claim.chunk);
        fetcher.sources.keep(layer, from, copied.is_ok());
        match copied? {
            Copied::Gone => continue,
            Copied::Kept => {}
            Copied::Unkept(bytes, error) => {
                fetcher.keep_in_memory(layer, number, Bytes::from(bytes), &error);
            }
        }
        let counters = &fetcher.counters;
        counters.reused_chunks.fetch_add(1, Ordering::Relaxed);
        counters.reused_bytes.fetch_add(chunk.bytes, Ordering::Relaxed);
        return Ok(true);
    }
    Ok(false)
}
