//! The passes under way: how far they are, and whose turn it is.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::Source;
use crate::registry::reference::Repository;

/// Layers that are read at the same time; others wait for their turn. More would not be faster on a few cores, and each
/// holds up to 16 MB of buffers besides its index.
const PASSES_MAX: usize = 4;

/// How far the pass over a layer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassProgress {
    /// The repository that serves the layer.
    pub repository: String,
    /// The digest of the blob.
    pub layer: Digest,
    /// The layer's number in the image for which it is read, as in `layers/N`.
    pub number: Option<usize>,
    /// How many layers that image has, once its configuration is known.
    pub layers: Option<usize>,
    /// Compressed bytes that have come.
    pub done_bytes: u64,
    /// The size of the blob.
    pub total_bytes: u64,
    /// Bytes a second since its beginning; 0 while it waits for its turn.
    pub rate_bytes_per_s: u64,
    /// Seconds until its end at that rate.
    pub left_s: Option<u64>,
    /// How many wait for it.
    pub waiters: usize,
}

/// The passes.
#[derive(Debug)]
pub(in crate::fetch) struct Passes {
    under_way: Mutex<Vec<Arc<Pass>>>,
    turns: Semaphore,
}

impl Default for Passes {
    fn default() -> Self {
        Self {
            under_way: Mutex::default(),
            turns: Semaphore::new(PASSES_MAX),
        }
    }
}

/// One pass, from the moment that it waits for its turn.
#[derive(Debug)]
pub(in crate::fetch) struct Pass {
    /// What the layer is stored under.
    pub(in crate::fetch) key: Digest,
    pub(in crate::fetch) repository: Repository,
    layer: Digest,
    number: Option<usize>,
    layers: AtomicUsize,
    total_bytes: u64,
    done_bytes: AtomicU64,
    began: OnceLock<Instant>,
}

/// Takes a pass out of the table at its end.
#[derive(Debug)]
pub(in crate::fetch) struct UnderWay<'a> {
    passes: &'a Passes,
    pub(super) pass: Arc<Pass>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut under_way = self.passes.under_way.lock();
        under_way.retain(|pass| !Arc::ptr_eq(pass, &self.pass));
    }
}

impl Passes {
    /// Notes a pass over a layer.
    pub(super) fn enter(&self, source: &Source) -> UnderWay<'_> {
        let pass = Arc::new(Pass {
            key: source.key(),
            repository: source.repository.clone(),
            layer: source.descriptor.digest,
            number: source.place.as_ref().map(|place| place.number),
            layers: AtomicUsize::new(0),
            total_bytes: source.descriptor.size,
            done_bytes: AtomicU64::new(0),
            began: OnceLock::new(),
        });
        self.under_way.lock().push(Arc::clone(&pass));
        UnderWay { passes: self, pass }
    }

    /// Waits for the turn of a pass.
    pub(super) async fn turn(&self) -> Result<SemaphorePermit<'_>> {
        // Nobody closes it.
        self.turns.acquire().await.map_err(|_| Error::Interrupted)
    }

    /// All of them, in the order in which they came.
    pub(in crate::fetch) fn all(&self) -> Vec<Arc<Pass>> {
        self.under_way.lock().clone()
    }
}

impl Pass {
    /// Its turn has come. What an endpoint gave before that is not counted again.
    pub(super) fn begin(&self) {
        self.began.get_or_init(Instant::now);
        self.done_bytes.store(0, Ordering::Relaxed);
    }

    pub(super) fn note_layers(&self, layers: usize) {
        self.layers.store(layers, Ordering::Relaxed);
    }

    pub(super) fn note_bytes(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How far it is.
    pub(in crate::fetch) fn progress(&self, waiters: usize) -> PassProgress {
        let done_bytes = self.done_bytes.load(Ordering::Relaxed);
        let elapsed_ms = self.began.get().map_or(0, |began| began.elapsed().as_millis());
        let rate = u128::from(done_bytes) * 1000 / elapsed_ms.max(1);
        let rate_bytes_per_s = u64::try_from(rate).unwrap_or(u64::MAX);
        let left_bytes = self.total_bytes.saturating_sub(done_bytes);
        PassProgress {
            repository: self.repository.to_string(),
            layer: self.layer,
            number: self.number,
            layers: Some(self.layers.load(Ordering::Relaxed)).filter(|&layers| layers > 0),
            done_bytes,
            total_bytes: self.total_bytes,
            rate_bytes_per_s,
            left_s: left_bytes.checked_div(rate_bytes_per_s),
            waiters,
        }
    }
}
