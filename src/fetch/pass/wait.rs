//! Waiting for something that may need passes: no deadline of ours ends it while they get on, because they end by
//! themselves when no more bytes come.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Source};

/// How often it is looked whether a pass is under way.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// The passes that somebody waits for.
#[derive(Debug)]
pub enum Awaited {
    /// Any.
    All,
    /// Those over layers with these keys.
    Of(HashSet<Digest>),
}

impl Awaited {
    /// Those over these layers, also where one turns out to be read without its zTOC.
    #[must_use]
    pub fn of(sources: &[Arc<Source>]) -> Self {
        let keys = sources
            .iter()
            .flat_map(|source| [source.key(), source.plain().key()]);
        Self::Of(keys.collect())
    }

    fn has(&self, key: &Digest) -> bool {
        match self {
            Self::All => true,
            Self::Of(keys) => keys.contains(key),
        }
    }
}

impl Fetcher {
    /// Whether an awaited pass is under way.
    #[must_use]
    pub fn is_passing(&self, awaited: &Awaited) -> bool {
        self.passes.all().iter().any(|pass| awaited.has(&pass.key))
    }

    /// Ends work that waits longer than `wait`, not counting the time in which an awaited pass is under way.
    ///
    /// # Errors
    /// Those of `work`; [`Error::Timeout`].
    pub async fn within<T>(
        &self,
        wait: Duration,
        awaited: &Awaited,
        what: impl FnOnce() -> String,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut work = Box::pin(work);
        let mut deadline = Instant::now() + wait;
        loop {
            let look = deadline.min(Instant::now() + LOOK_INTERVAL);
            if let Ok(result) = tokio::time::timeout_at(look, &mut work).await {
                return result;
            }
            if self.is_passing(awaited) {
                deadline = Instant::now() + wait;
            } else if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    what: what(),
                    waited_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                });
            }
        }
    }
}
