//! What failed fails at once for a while, so that one `read()`, which the kernel repeats, costs one deadline.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::registry::reference::Repository;

/// For how long.
pub(super) const FAILURE_MEMORY: Duration = Duration::from_secs(5);
/// The most failures remembered.
pub(super) const FAILURES_MAX: usize = 4096;

/// A member of a layer (by key) that a repository failed to give.
pub(super) type FailureKey = (Digest, u32, Repository);

/// The failures, the oldest first to be forgotten.
#[derive(Debug)]
pub(super) struct Failures(Mutex<LruCache<FailureKey, (Instant, Error)>>);

impl Default for Failures {
    fn default() -> Self {
        let failures_max = NonZeroUsize::MIN.saturating_add(FAILURES_MAX - 1);
        Self(Mutex::new(LruCache::new(failures_max)))
    }
}

impl Failures {
    /// # Errors
    /// What failed a moment ago.
    pub(super) fn recent(&self, key: &FailureKey) -> Result<()> {
        let mut failures = self.0.lock();
        if let Some((at, error)) = failures.get(key) {
            if at.elapsed() < FAILURE_MEMORY {
                return Err(error.clone());
            }
            failures.pop(key);
        }
        Ok(())
    }

    pub(super) fn remember(&self, key: FailureKey, error: &Error) {
        self.0.lock().put(key, (Instant::now(), error.clone()));
    }
}
