//! Mirrors that are left out for a while: one that lied, or that let us wait in vain. A lie costs a fetch and a wait
//! costs seconds, so each further time it stays out twice as long, until it has been good for a while.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Longest absence, and how long a mirror must be good until its past is forgotten.
const LONGEST: Duration = Duration::from_secs(3600);

/// Whether a mirror is left out.
#[derive(Debug, Default)]
pub(super) struct Absence(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    until: Option<Instant>,
    times: u32,
    lies: u64,
    last_lie: Option<String>,
}

impl Absence {
    /// Leaves the mirror out, at the first time for `first`. What goes wrong while it is out already was under way
    /// before. Returns for how long, where this is news.
    pub(super) fn begin(&self, first: Duration) -> Option<Duration> {
        let now = Instant::now();
        let mut state = self.0.lock();
        if state.until.is_some_and(|until| now < until) {
            return None;
        }
        if state.until.is_none_or(|until| now - until > LONGEST) {
            state.times = 0;
        }
        let time = first.saturating_mul(1 << state.times.min(16)).min(LONGEST);
        state.times = state.times.saturating_add(1);
        state.until = Some(now + time);
        Some(time)
    }

    /// Counts a lie.
    pub(super) fn note_lie(&self, lie: String) {
        let mut state = self.0.lock();
        state.lies = state.lies.saturating_add(1);
        state.last_lie = Some(lie);
    }

    /// For how long from now on the mirror is left out.
    pub(super) fn remaining(&self) -> Option<Duration> {
        let left = self.0.lock().until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// How often the mirror lied, and the last time in words.
    pub(super) fn lies(&self) -> (u64, Option<String>) {
        let state = self.0.lock();
        (state.lies, state.last_lie.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_further_time_is_twice_as_long_and_what_happens_at_once_counts_once() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let long = Absence::default();
            assert_eq!(long.begin(LONGEST * 9), Some(LONGEST));
            let absence = Absence::default();
            let first = Duration::from_millis(100);
            let mut expected = first;
            for _ in 0..3 {
                // A busy machine may stop us between the two, for longer than the first absence.
                let began = Instant::now();
                assert_eq!(absence.begin(first), Some(expected));
                let again = absence.begin(first);
                assert!(again.is_none() || began.elapsed() >= expected, "{again:?}");
                if again.is_some() {
                    return;
                }
                while let Some(left) = absence.remaining() {
                    tokio::time::sleep(left).await;
                }
                expected *= 2;
            }
        });
    }
}
