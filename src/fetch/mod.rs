//! Which bytes to get when: what is missing for a read becomes as few ranged requests as make sense, each chunk fetched
//! and decoded once whoever asks, with read-ahead for readers that go on.
//!
//! A miss never belongs to the reader that caused it: the requests run as tasks of their own, so an interrupted reader
//! harms nobody else, and what arrives stays in the store.

pub mod background;
mod cut;
pub mod device;
mod documents;
mod external_toc;
mod failures;
mod file;
mod flight;
mod following;
mod foreground;
pub mod in_order;
mod indexing;
mod job;
mod options;
mod overflow;
mod pass;
pub mod plan;
pub mod prefetch;
mod read;
pub mod readahead;
mod reuse;
mod settle;
mod shared;
pub mod single_flight;
mod sink;
mod workbench;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::background::Background;
pub use crate::fetch::background::BackgroundOptions;
use crate::fetch::documents::Configs;
use crate::fetch::external_toc::TocImages;
use crate::fetch::failures::{FAILURES_MAX, FailureKey, Failures};
pub use crate::fetch::file::FileAt;
use crate::fetch::flight::{Flights, Landing, Mine, Waiter};
use crate::fetch::following::{Ahead, WINDOWS_MAX};
use crate::fetch::foreground::Foreground;
use crate::fetch::indexing::{ByRanges, Indexing};
use crate::fetch::job::{Job, Urgency};
pub use crate::fetch::options::{FetchOptions, PlainLimits};
use crate::fetch::overflow::Overflow;
use crate::fetch::pass::Passes;
pub use crate::fetch::pass::{Awaited, PassProgress};
use crate::fetch::readahead::Streams;
use crate::fetch::reuse::{Copying, Sources};
use crate::fetch::shared::SharedIndexes;
use crate::fetch::workbench::Workbenches;
use crate::layer::spool::InMemory;
use crate::layer::{self, Descriptor, Step, WHOLE_BLOB};
use crate::registry::Client;
use crate::registry::reference::Repository;
use crate::store::Store;
use crate::store::digests::Audience;
use crate::store::layer::Layer;

/// The most layers whose readers are followed for read-ahead.
const FOLLOWED_LAYERS_MAX: usize = 256;

/// Where a layer's blob is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The repository that serves it.
    pub repository: Repository,
    /// What the manifest says of it.
    pub descriptor: Descriptor,
    /// The blob that a SOCI index names for it, in the same repository.
    pub ztoc: Option<Descriptor>,
    /// The image in which it was found; `None` for a blob without one.
    pub place: Option<Place>,
}

fn key(layer: &Digest, size: u64, voucher: &str) -> Digest {
    Digest::of(format!("layer {layer} size {size} {voucher}").as_bytes())
}

/// Where a layer stands in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The image's manifest.
    pub manifest: Digest,
    /// The image's configuration, which says the digest of the layer's tar (DiffID).
    pub config: Descriptor,
    /// The layer's number, base first.
    pub number: usize,
    /// Whether the registry is known to give the image without credentials.
    pub is_open: bool,
}

impl Source {
    /// What the layer is stored under. Equal keys mean equal content, whoever serves it: what is in the key was checked
    /// before anything was stored under it. For a lazy reader that is not the blob's digest, but what the manifest promises
    /// of the index.
    #[must_use]
    pub fn key(&self) -> Digest {
        let Descriptor { digest, size, .. } = &self.descriptor;
        let voucher = layer::index_promise(&self.descriptor, self.ztoc.as_ref());
        key(digest, *size, &voucher)
    }

    /// Whether nothing but the blob's digest vouches for the layer's index. Then it is the same index wherever the blob is,
    /// and can be handed on under that digest.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        layer::index_promise(&self.descriptor, self.ztoc.as_ref()) == WHOLE_BLOB
    }

    /// Whether all of the layer has to be read once before anything of it is known.
    #[must_use]
    pub fn needs_pass(&self) -> bool {
        let indexer = layer::indexer(&self.descriptor, self.ztoc.as_ref(), Arc::new(InMemory));
        indexer.is_ok_and(|mut indexer| matches!(indexer.step(None), Ok(Step::Pass)))
    }

    /// Whom the layer's content may be shown to.
    #[must_use]
    pub fn audience(&self) -> Audience {
        match &self.place {
            Some(place) if place.is_open => Audience::everyone(),
            _ => Audience::repository(&self.repository.to_string()),
        }
    }

    /// The layer in words, for messages.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{} layer {}", self.repository, self.descriptor.digest)
    }

    /// A blob that the registry does not have although a manifest names it is broken content, not an absent name.
    pub(crate) fn blame(&self, error: Error) -> Error {
        match error {
            Error::NotFound { why, .. } => Error::malformed(
                self.name(),
                format!("the manifest names it, but the registry does not have it: {why}"),
            ),
            other => other,
        }
    }
}

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    misses: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) chunks_decoded: AtomicU64,
    pub(crate) decoded_bytes: AtomicU64,
    pub(crate) reused_chunks: AtomicU64,
    pub(crate) reused_bytes: AtomicU64,
    pub(crate) layers_indexed: AtomicU64,
}

/// The counters as numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CounterValues {
    /// Reads of file content that reached the daemon.
    pub reads: u64,
    /// Those of them that had to wait for the network.
    pub misses: u64,
    /// Ranged requests for chunks.
    pub requests: u64,
    /// Compressed bytes that these brought.
    pub fetched_bytes: u64,
    /// Chunks decoded and verified.
    pub chunks_decoded: u64,
    /// Bytes of these chunks.
    pub decoded_bytes: u64,
    /// Chunks copied from elsewhere in the cache and verified, instead of being fetched.
    pub reused_chunks: u64,
    /// Bytes of these chunks.
    pub reused_bytes: u64,
    /// Layers parsed into an index.
    pub layers_indexed: u64,
    /// Members being fetched now.
    pub in_flight: usize,
}

/// Brings chunks and indexes into the store. Shared by all images and mounts.
#[derive(Debug)]
pub struct Fetcher {
    client: Client,
    store: Arc<Store>,
    runtime: Handle,
    options: FetchOptions,
    flights: Flights,
    indexing: Indexing,
    by_ranges: ByRanges,
    passes: Passes,
    shared_indexes: Option<Arc<SharedIndexes>>,
    configs: Configs,
    toc_images: TocImages,
    failures: Failures,
    /// The keys of layers that are read without the zTOC that they are said to have.
    unusable_ztocs: Mutex<LruCache<Digest, ()>>,
    followed: Mutex<LruCache<Digest, Streams>>,
    overflow: Overflow,
    sources: Sources,
    /// One permit for each batch being decoded: the cores are busy and the memory bounded.
    decoders: Arc<Semaphore>,
    workbenches: Workbenches,
    read_ahead: Arc<Semaphore>,
    foreground: Foreground,
    background: Background,
    counters: Counters,
}

impl Fetcher {
    /// A fetcher that runs its work on `runtime`.
    #[must_use]
    pub fn new(client: Client, store: Arc<Store>, runtime: Handle, options: FetchOptions) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        Arc::new(Self {
            client,
            store,
            runtime,
            shared_indexes: options.shared_index_dir.clone().map(SharedIndexes::new),
            options,
            flights: Flights::default(),
            indexing: Indexing::default(),
            by_ranges: ByRanges::default(),
            passes: Passes::default(),
            configs: Configs::default(),
            toc_images: TocImages::default(),
            failures: Failures::default(),
            unusable_ztocs: Mutex::new(LruCache::new(NonZeroUsize::MIN.saturating_add(FAILURES_MAX - 1))),
            followed: Mutex::new(LruCache::new(
                NonZeroUsize::MIN.saturating_add(FOLLOWED_LAYERS_MAX - 1),
            )),
            overflow: Overflow::default(),
            sources: Sources::default(),
            decoders: Arc::new(Semaphore::new(cores * 2)),
            workbenches: Workbenches::new(cores * 2),
            read_ahead: Arc::new(Semaphore::new(WINDOWS_MAX)),
            foreground: Foreground::default(),
            background: Background::new(cores),
            counters: Counters::default(),
        })
    }

    /// The registry client, for questions that are not about layers.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The runtime on which work goes on.
    #[must_use]
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The counters' values now.
    #[must_use]
    pub fn counters(&self) -> CounterValues {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        CounterValues {
            reads: value(&c.reads),
            misses: value(&c.misses),
            requests: value(&c.requests),
            fetched_bytes: value(&c.fetched_bytes),
            chunks_decoded: value(&c.chunks_decoded),
            decoded_bytes: value(&c.decoded_bytes),
            reused_chunks: value(&c.reused_chunks),
            reused_bytes: value(&c.reused_bytes),
            layers_indexed: value(&c.layers_indexed),
            in_flight: self.flights.len(),
        }
    }

    /// Starts requests for the needed members that nobody fetches yet, and for those in `ahead` that are missing. What is
    /// elsewhere in the store is copied instead. Returns what to wait for.
    fn launch(
        self: &Arc<Self>,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        needed: &[u32],
        ahead: Option<Ahead>,
    ) -> Result<Vec<Waiter>> {
        self.launch_as(Urgency::Awaited, source, layer, needed, ahead)
    }

    /// As [`Self::launch`], also for what nobody waits for but who brings it.
    fn launch_as(
        self: &Arc<Self>,
        urgency: Urgency,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        needed: &[u32],
        ahead: Option<Ahead>,
    ) -> Result<Vec<Waiter>> {
        if urgency == Urgency::Awaited {
            self.recent_failure(source, needed)?;
        }
        let mut candidates = needed.to_vec();
        if let Some(ahead) = &ahead {
            candidates.extend(ahead.members.clone());
        }
        candidates.sort_unstable();
        candidates.dedup();
        let (waiters, mut mine) = self.flights.join(layer, needed, &candidates)?;
        if urgency == Urgency::Ahead {
            mine.values_mut().for_each(Landing::disregard_one);
        }
        let mut members: Vec<u32> = mine.keys().copied().collect();
        members.sort_unstable();
        let all = members.clone();
        let permit = ahead.map(|ahead| Arc::new(ahead.permit));
        for batch in reuse::take_copyable(self, source, layer, &mut members)? {
            let landings = batch.iter().filter_map(|member| mine.remove(member)).collect();
            let copying = Copying {
                fetcher: Arc::clone(self),
                urgency,
                source: Arc::clone(source),
                layer: Arc::clone(layer),
                landings,
            };
            self.runtime.spawn(copying.run(permit.clone()));
        }
        let requests = self.requests(layer, &members, &all)?;
        self.request(urgency, source, layer, requests, mine, permit.as_ref());
        Ok(waiters)
    }

    /// The requests that bring `members`, where others bring what is under way and not among `ours` (sorted), and the rest of
    /// ours is copied.
    fn requests(&self, layer: &Layer, members: &[u32], ours: &[u32]) -> Result<Vec<plan::Request>> {
        let gap_with = |member| match ours.binary_search(&member) {
            Ok(_) => Some(plan::COPIED_GAP_BYTES_MAX),
            Err(_) => (!self.flights.has(layer, member)).then_some(plan::GAP_BYTES_MAX),
        };
        plan::requests(layer.index(), members, gap_with)
    }

    /// Starts requests for members, all of which are `mine`.
    fn request(
        self: &Arc<Self>,
        urgency: Urgency,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        requests: Vec<plan::Request>,
        mut mine: Mine,
        permit: Option<&Arc<OwnedSemaphorePermit>>,
    ) {
        for request in requests {
            let job = Job {
                fetcher: Arc::clone(self),
                urgency,
                source: Arc::clone(source),
                layer: Arc::clone(layer),
                landings: request
                    .members
                    .iter()
                    .filter_map(|member| mine.remove(member))
                    .collect(),
                range: request.range,
            };
            let permit = permit.cloned();
            let awaited = (urgency == Urgency::Awaited).then(|| self.foreground.enter());
            self.runtime.spawn(async move {
                job.run().await;
                drop((permit, awaited));
            });
        }
    }

    /// Gives up memory that is only kept because more may have to be decoded soon.
    pub fn give_up_memory(&self) {
        self.workbenches.clear();
    }

    /// Keeps a verified chunk that the disk would not take.
    fn keep_in_memory(&self, layer: &Layer, chunk: u32, bytes: bytes::Bytes, error: &Error) {
        // The first one says it; a full disk makes thousands.
        if self.overflow.put(layer, chunk, bytes) {
            tracing::warn!(%error, "the cache cannot keep what is fetched: it stays in memory for the moment");
        }
    }

    fn recent_failure(&self, source: &Source, members: &[u32]) -> Result<()> {
        let mut keys = members.iter().map(|&member| failure_key(source, member));
        keys.try_for_each(|key| self.failures.recent(&key))
    }

    fn remember_failure(&self, source: &Source, member: u32, error: &Error) {
        self.failures.remember(failure_key(source, member), error);
    }

    /// Whether a layer comes over the network, not from a layout on disk.
    fn is_remote(&self, source: &Source) -> bool {
        self.client.layout_path(source.repository.host()).is_none()
    }
}

fn failure_key(source: &Source, member: u32) -> FailureKey {
    (source.key(), member, source.repository.clone())
}

/// Runs what may wait for the disk or takes long on a thread for such work.
///
/// # Errors
/// What `work` returns; [`Error::Io`] when it panicked.
pub async fn blocking<T: Send + 'static>(
    runtime: &Handle,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    runtime.spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::Io {
            what: "background work".to_owned(),
            errno: libc::EIO,
            why: error.to_string(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(repository: &str, digest: &[u8], promise: Option<&str>) -> Source {
        let annotation = |toc: &str| {
            (
                "containerd.io/snapshot/stargz/toc.digest".to_owned(),
                toc.to_owned(),
            )
        };
        let descriptor = Descriptor {
            media_type: String::new(),
            digest: Digest::of(digest),
            size: 10,
            annotations: promise.map(annotation).into_iter().collect(),
            urls: Vec::new(),
        };
        Source {
            repository: Repository::new("h.io", repository).unwrap(),
            descriptor,
            ztoc: None,
            place: None,
        }
    }

    #[test]
    fn layers_are_shared_only_where_the_same_content_is_promised() {
        let mine = source("mine", b"blob", Some("toc"));
        assert_eq!(
            mine.key(),
            source("yours", b"blob", Some("toc")).key(),
            "the promise vouches, whoever serves it"
        );
        for other in [
            source("mine", b"blob", Some("another")),
            source("mine", b"other", Some("toc")),
        ] {
            assert_ne!(mine.key(), other.key());
        }
        // Without a promise one pass checks the blob's digest.
        let unpromised = source("mine", b"blob", None);
        assert_ne!(unpromised.key(), mine.key());
        assert_eq!(unpromised.key(), source("yours", b"blob", None).key());
        let mut with_ztoc = unpromised.clone();
        with_ztoc.ztoc = Some(mine.descriptor);
        assert_ne!(with_ztoc.key(), unpromised.key());
    }

    #[test]
    fn a_blob_that_is_missing_is_broken_content() {
        let missing = source("mine", b"blob", None).blame(Error::not_found("blob", "404"));
        assert_eq!((missing.errno(), missing.exit_code()), (libc::EIO, 7));
    }
}
