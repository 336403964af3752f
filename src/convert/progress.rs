//! How far a conversion is, for whoever shows it: each layer is fetched, written anew, and stored, and each of these
//! counts a third of the size that it had.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// How far a conversion is.
#[derive(Debug, Default)]
pub struct Progress {
    total_bytes: AtomicU64,
    layers: Mutex<Vec<Arc<Meter>>>,
}

impl Progress {
    /// The size of all layers as they were, 0 until it is known.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }

    /// How much of that is done.
    pub fn done_bytes(&self) -> u64 {
        let done: u64 = self.layers.lock().iter().map(|meter| meter.done_bytes()).sum();
        done.min(self.total_bytes())
    }

    /// Layers of these sizes are to be converted.
    pub(super) fn expect(&self, layers: impl Iterator<Item = u64>) {
        self.total_bytes.fetch_add(layers.sum(), Ordering::Relaxed);
    }

    /// The meter of a layer of `bytes` bytes that begins now.
    pub(super) fn begin(&self, bytes: u64) -> Arc<Meter> {
        let meter = Arc::new(Meter {
            bytes,
            ..Meter::default()
        });
        self.layers.lock().push(Arc::clone(&meter));
        meter
    }
}

/// How far one layer is.
#[derive(Debug, Default)]
pub(super) struct Meter {
    bytes: u64,
    /// Bytes that have come.
    pub(super) fetched: AtomicU64,
    pub(super) written: Part,
    pub(super) stored: Part,
    finished: AtomicU64,
}

/// A part of the work.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) done: Arc<AtomicU64>,
    pub(super) of: AtomicU64,
}

impl Part {
    fn share_of(&self, bytes: u64) -> u64 {
        let (done, of) = (self.done.load(Ordering::Relaxed), self.of.load(Ordering::Relaxed));
        match of {
            0 => 0,
            of => {
                u64::try_from(u128::from(bytes) * u128::from(done.min(of)) / u128::from(of)).unwrap_or(bytes)
            }
        }
    }
}

impl Meter {
    /// All of it is done, in whatever way.
    pub(super) fn finish(&self) {
        self.finished.store(self.bytes, Ordering::Relaxed);
    }

    fn done_bytes(&self) -> u64 {
        let fetched = self.fetched.load(Ordering::Relaxed).min(self.bytes);
        let parts = fetched + self.written.share_of(self.bytes) + self.stored.share_of(self.bytes);
        (parts / 3).max(self.finished.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_counts_by_thirds_and_whole_once_it_is_finished() {
        let progress = Progress::default();
        progress.expect([300, 60].into_iter());
        let meter = progress.begin(300);
        assert_eq!((progress.done_bytes(), progress.total_bytes()), (0, 360));
        meter.fetched.store(300, Ordering::Relaxed);
        meter.written.of.store(10, Ordering::Relaxed);
        meter.written.done.store(5, Ordering::Relaxed);
        assert_eq!(progress.done_bytes(), 150);
        meter.stored.of.store(1, Ordering::Relaxed);
        meter.stored.done.store(9, Ordering::Relaxed);
        assert_eq!(progress.done_bytes(), 250);
        meter.finish();
        assert_eq!(progress.done_bytes(), 300);
        progress.begin(60).finish();
        assert_eq!(progress.done_bytes(), 360);
    }
}
