//! Gives memory back to the system when a burst of fetching is over.
//!
//! Decoding allocates buffers of megabytes on many threads, and the C library's allocator keeps what they free in an arena
//! for each thread. A daemon that has streamed an image once would hold tens of megabytes for the rest of its life.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use crate::fetch::Fetcher;

/// How often it is looked whether a burst is over.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Runs for as long as the daemon does.
pub(super) async fn give_back(fetcher: Arc<Fetcher>) {
    let mut given_back_at = 0;
    let mut before = 0;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let counters = fetcher.counters();
        let work = counters.reads + counters.decoded_bytes + counters.layers_indexed;
        let is_quiet = work == before && counters.in_flight == 0;
        before = work;
        if is_quiet && work != given_back_at {
            given_back_at = work;
            // It walks all arenas: not on a thread that serves.
            let _ = fetcher.runtime().spawn_blocking(trim).await;
        }
    }
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: malloc_trim(3) takes no pointer, locks what it touches, and may be called at any time.
    let released = unsafe { libc::malloc_trim(0) };
    tracing::debug!(released, "gave memory back");
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}
