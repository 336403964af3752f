//! The end of a session as something to wait for, with or without an async runtime.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

/// Set once, when the session's threads have ended.
#[derive(Debug)]
pub(super) struct SessionEnd {
    ended: Mutex<bool>,
    changed: Condvar,
    async_side: watch::Sender<bool>,
}

impl SessionEnd {
    /// A session that runs.
    pub(super) fn new() -> Self {
        Self {
            ended: Mutex::new(false),
            changed: Condvar::new(),
            async_side: watch::Sender::new(false),
        }
    }

    /// Tells everyone who waits that the session is over.
    pub(super) fn set(&self) {
        *self.ended.lock() = true;
        self.changed.notify_all();
        self.async_side.send_replace(true);
    }

    /// Whether it is over.
    pub(super) fn is_set(&self) -> bool {
        *self.ended.lock()
    }

    /// Blocks until it is over, or for `limit`; says whether it is over.
    pub(super) fn wait_blocking(&self, limit: Duration) -> bool {
        let mut ended = self.ended.lock();
        self.changed.wait_while_for(&mut ended, |ended| !*ended, limit);
        *ended
    }

    /// A future that resolves when it is over.
    pub(super) fn wait(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut receiver = self.async_side.subscribe();
        async move {
            // An error means that the sender is gone, and with it the session.
            let _ = receiver.wait_for(|ended| *ended).await;
        }
    }
}
