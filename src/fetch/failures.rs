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
/// For how long what cannot be otherwise the next time: a blob with the right digest whose tar is not the one that the image
/// promises. To find that out again all of the layer would have to be read.
pub(super) const FINAL_FAILURE_MEMORY: Duration = Duration::from_secs(3600);
/// The most failures remembered.
pub(super) const FAILURES_MAX: usize = 4096;

/// A member of a layer (by key) that a repository failed to give.
pub(super) type FailureKey = (Digest, u32, Repository);

/// The failures, and until when they hold; the oldest first to be forgotten.
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
        if let Some((until, error)) = failures.get(key) {
            if Instant::now() < *until {
                return Err(error.clone());
            }
            failures.pop(key);
        }
        Ok(())
    }

    pub(super) fn remember(&self, key: FailureKey, error: &Error) {
        self.remember_for(FAILURE_MEMORY, key, error);
    }

    /// As [`Self::remember`], for longer. What holds for longer already stays.
    pub(super) fn remember_for(&self, memory: Duration, key: FailureKey, error: &Error) {
        let until = Instant::now() + memory;
        let mut failures = self.0.lock();
        if failures.get(&key).is_none_or(|(known, _)| *known < until) {
            failures.put(key, (until, error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_final_outlasts_what_is_said_of_it_again() {
        let failures = Failures::default();
        let key = |member| {
            (
                Digest::of(b"layer"),
                member,
                Repository::new("h.io", "a").unwrap(),
            )
        };
        let (last, next) = (Error::not_found("tar", "final"), Error::not_found("tar", "again"));
        failures.remember_for(FINAL_FAILURE_MEMORY, key(0), &last);
        failures.remember(key(0), &next);
        assert_eq!(failures.recent(&key(0)), Err(last));
        failures.remember_for(Duration::ZERO, key(1), &next);
        assert_eq!(failures.recent(&key(1)), Ok(()), "it has passed");
    }
}
