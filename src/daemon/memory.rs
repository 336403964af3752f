//! Gives memory back to the system when a burst of fetching is over.
//!
//! Decoding allocates buffers of megabytes on many threads, and the C library's allocator keeps what they free in an arena
//! for each thread, up to a threshold that grows with the largest buffer ever freed. A daemon that has streamed one image
//! would hold 80 MB for the rest of its life; with the limits below and a trim after each burst it is a few.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use crate::fetch::Fetcher;

/// How often it is looked whether a burst is over.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Buffers from this size on are mapped one by one and unmapped when they are freed: chunks, but not the answer to a read.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES_MIN: i32 = (1 << 20) + (1 << 16);
/// Free memory at the end of an arena from this size on goes back at once. What is less stays for as long as a burst lasts,
/// which would only take it again, page by page.
#[cfg(target_env = "gnu")]
const ARENA_TOP_BYTES_MAX: i32 = 16 << 20;
/// Threads share so many arenas.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: i32 = 4;

/// Limits what the allocator keeps. To be called before there are other threads.
pub(super) fn limit() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN),
        (libc::M_TRIM_THRESHOLD, ARENA_TOP_BYTES_MAX),
        (libc::M_ARENA_MAX, ARENAS_MAX),
    ] {
        // SAFETY: mallopt(3) takes two numbers and no pointer.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Runs for as long as the daemon does.
pub(super) async fn give_back(fetcher: Arc<Fetcher>) {
    let mut given_back_at = 0;
    let mut before = 0;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let counters = fetcher.counters();
        let work = counters.reads + counters.decoded_bytes + counters.reused_bytes + counters.layers_indexed;
        let is_quiet = work == before && counters.in_flight == 0;
        before = work;
        if is_quiet && work != given_back_at {
            given_back_at = work;
            fetcher.give_up_memory();
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
