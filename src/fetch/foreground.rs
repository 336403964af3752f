//! Who waits for the network now. What is brought before anybody needs it looks here, and stands back.
//!
//! Everything counts that somebody waits for: a reader, the requests that were started for readers (read-ahead included), a
//! copy, an index, a pass.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// How often a request that stands still looks whether it is needed itself.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, Default)]
struct State {
    waiting: usize,
    /// When the last one had what it waited for.
    quiet_since: Option<Instant>,
}

/// The count of those who wait.
#[derive(Debug, Default)]
pub(super) struct Foreground(Arc<watch::Sender<State>>);

/// Somebody waits for as long as this lives.
#[derive(Debug)]
pub(super) struct Waiting(Arc<watch::Sender<State>>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.send_modify(|state| {
            state.waiting = state.waiting.saturating_sub(1);
            state.quiet_since = Some(Instant::now());
        });
    }
}

impl Foreground {
    /// Counts one more.
    pub(super) fn enter(&self) -> Waiting {
        self.0.send_modify(|state| state.waiting += 1);
        Waiting(Arc::clone(&self.0))
    }

    /// Whether anybody waits.
    pub(super) fn is_busy(&self) -> bool {
        self.0.borrow().waiting > 0
    }

    /// Whether nobody waits, and nobody has for `quiet`; waits for that, but not longer than `patience`.
    pub(super) async fn is_quiet(&self, quiet: Duration, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.quiet(quiet)).await.is_ok()
    }

    async fn quiet(&self, quiet: Duration) {
        let mut states = self.0.subscribe();
        loop {
            let Ok(state) = states
                .wait_for(|state| state.waiting == 0)
                .await
                .map(|state| *state)
            else {
                return;
            };
            let left = match state.quiet_since {
                Some(since) => quiet.saturating_sub(since.elapsed()),
                None => Duration::ZERO,
            };
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }

    /// Stands still while anybody waits, unless somebody waits for what stands still.
    pub(super) async fn give_way(&self, is_awaited: impl Fn() -> bool) {
        while !is_awaited() {
            if self.is_quiet(Duration::ZERO, LOOK_INTERVAL).await {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const NONE: Duration = Duration::ZERO;
    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn it_is_quiet_a_while_after_the_last_one() {
        let foreground = Foreground::default();
        assert!(foreground.is_quiet(LONG, SHORT).await, "nobody ever waited");
        let (first, second) = (foreground.enter(), foreground.enter());
        drop(first);
        assert!(foreground.is_busy());
        assert!(!foreground.is_quiet(NONE, SHORT).await);
        drop(second);
        assert!(!foreground.is_busy());
        assert!(foreground.is_quiet(NONE, NONE).await);
        assert!(!foreground.is_quiet(LONG, SHORT).await);
        assert!(foreground.is_quiet(SHORT, LONG).await);
    }

    #[tokio::test]
    async fn what_is_needed_does_not_stand_still() {
        let foreground = Foreground::default();
        let waiting = foreground.enter();
        let is_awaited = AtomicBool::new(false);
        let standing = foreground.give_way(|| is_awaited.load(Ordering::Relaxed));
        tokio::pin!(standing);
        assert!(tokio::time::timeout(SHORT, &mut standing).await.is_err());
        is_awaited.store(true, Ordering::Relaxed);
        standing.await;
        drop(waiting);
        foreground.give_way(|| false).await;
    }
}
