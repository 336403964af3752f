//! The breaker of a host: after an outage was seen, further requests fail at once instead of each waiting for its own
//! deadline, until a probe finds the host answering again. Nothing runs while nobody asks: a request that comes when
//! a probe is due starts one and waits for it a moment, so the first read after the host's return succeeds.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::options::Timing;

/// So many failures in a row, over [`Timing::unreachable`], open the breaker.
const CONSECUTIVE_MIN: u32 = 3;
/// Failures further apart than so many times [`Timing::unreachable`] have nothing to do with each other.
const MEMORY: u32 = 6;

/// Whether a host is worth a request.
#[derive(Debug)]
pub(super) struct Breaker {
    timing: Timing,
    state: Mutex<State>,
    probed: Notify,
}

#[derive(Debug, Default)]
struct State {
    failing_since: Option<Instant>,
    last_failure: Option<Instant>,
    consecutive: u32,
    open: bool,
    next_probe: Option<Instant>,
    probe_ends: Option<Instant>,
    last_error: Option<String>,
}

/// Why a request is not sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Down {
    /// For how long nothing but failures came.
    pub(super) since: Duration,
    /// The last failure.
    pub(super) why: String,
}

impl Breaker {
    pub(super) fn new(timing: Timing) -> Self {
        Self {
            timing,
            state: Mutex::new(State::default()),
            probed: Notify::new(),
        }
    }

    /// The host answered: whatever it said, it is alive.
    pub(super) fn alive(&self) {
        let mut state = self.state.lock();
        let was_open = state.open;
        *state = State {
            last_error: state.last_error.take(),
            ..State::default()
        };
        drop(state);
        if was_open {
            self.probed.notify_waiters();
        }
    }

    /// One exchange failed. `gave_up` says that its request will not be tried again: then the host counts as down
    /// without further proof. Returns whether this opened the breaker.
    pub(super) fn failed(&self, why: &str, gave_up: bool) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        let forgotten = state
            .last_failure
            .is_some_and(|last| now - last > self.timing.unreachable * MEMORY);
        if forgotten && !state.open {
            state.failing_since = None;
            state.consecutive = 0;
        }
        let since = *state.failing_since.get_or_insert(now);
        state.last_failure = Some(now);
        state.consecutive = state.consecutive.saturating_add(1);
        state.last_error = Some(why.to_owned());
        let proven = state.consecutive >= CONSECUTIVE_MIN && now - since >= self.timing.unreachable;
        let opens = !state.open && (gave_up || proven);
        if opens {
            state.open = true;
            state.next_probe = Some(now);
        }
        opens
    }

    /// Lets a request pass, or says why not. Where a probe is due, `start_probe` is called to start one; it must end
    /// in [`Self::alive`] or [`Self::probe_failed`].
    pub(super) async fn admit(&self, start_probe: impl FnOnce()) -> Result<(), Down> {
        let probed = self.probed.notified();
        tokio::pin!(probed);
        // Registered before the state is read: a probe that ends in between is not missed.
        probed.as_mut().enable();
        {
            let now = Instant::now();
            let mut state = self.state.lock();
            if !state.open {
                return Ok(());
            }
            let under_way = state.probe_ends.is_some_and(|ends| now < ends);
            if !under_way && state.next_probe.is_none_or(|due| now >= due) {
                state.probe_ends = Some(now + self.timing.probe_interval);
                state.next_probe = Some(now + self.timing.probe_interval);
                drop(state);
                start_probe();
            } else if !under_way {
                return Err(down(&state, now));
            }
        }
        let _ = tokio::time::timeout(self.timing.probe_wait, probed).await;
        let state = self.state.lock();
        match state.open {
            false => Ok(()),
            true => Err(down(&state, Instant::now())),
        }
    }

    /// Whether requests pass, for those who can go elsewhere: a probe that is due is started, and not waited for.
    pub(super) fn passes(&self, start_probe: impl FnOnce()) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        if !state.open {
            return true;
        }
        let under_way = state.probe_ends.is_some_and(|ends| now < ends);
        if !under_way && state.next_probe.is_none_or(|due| now >= due) {
            state.probe_ends = Some(now + self.timing.probe_interval);
            state.next_probe = Some(now + self.timing.probe_interval);
            drop(state);
            start_probe();
        }
        false
    }

    /// The probe found the host still down.
    pub(super) fn probe_failed(&self, why: &str) {
        let mut state = self.state.lock();
        state.probe_ends = None;
        state.last_failure = Some(Instant::now());
        state.last_error = Some(why.to_owned());
        drop(state);
        self.probed.notify_waiters();
    }

    /// For how long the host has been down, `None` where requests pass.
    pub(super) fn down_for(&self) -> Option<Duration> {
        let state = self.state.lock();
        state.open.then(|| down(&state, Instant::now()).since)
    }

    /// The last failure, kept after the host's return.
    pub(super) fn last_error(&self) -> Option<String> {
        self.state.lock().last_error.clone()
    }
}

fn down(state: &State, now: Instant) -> Down {
    Down {
        since: state
            .failing_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since)),
        why: state.last_error.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
    }

    fn timing() -> Timing {
        Timing {
            unreachable: Duration::from_secs(60),
            probe_interval: Duration::from_millis(20),
            probe_wait: Duration::from_millis(5),
            ..Timing::default()
        }
    }

    #[test]
    fn a_row_of_failures_over_some_time_opens() {
        let unreachable = Duration::from_millis(5);
        let breaker = Breaker::new(Timing {
            unreachable,
            ..timing()
        });
        let began = Instant::now();
        let mut failures = 1;
        while !breaker.failed("reset", false) {
            failures += 1;
            assert!(failures < 1_000_000);
        }
        assert!(failures >= CONSECUTIVE_MIN && began.elapsed() >= unreachable);
    }

    #[test]
    fn single_failures_do_not_close_the_way() {
        let breaker = Breaker::new(timing());
        for _ in 0..10 {
            assert!(!breaker.failed("reset", false));
        }
        runtime().block_on(async { assert_eq!(breaker.admit(|| ()).await, Ok(())) });
    }

    #[test]
    fn giving_up_opens_and_an_answer_closes() {
        let breaker = Breaker::new(timing());
        assert!(breaker.failed("refused", true));
        runtime().block_on(async {
            let down = breaker.admit(|| ()).await.unwrap_err();
            assert_eq!(down.why, "refused");
            breaker.alive();
            assert_eq!(breaker.admit(|| ()).await, Ok(()));
        });
    }

    #[test]
    fn many_requests_share_one_probe_and_its_answer() {
        let breaker = Arc::new(Breaker::new(Timing {
            probe_wait: Duration::from_secs(60),
            ..timing()
        }));
        breaker.failed("refused", true);
        let probes = Arc::new(AtomicU32::new(0));
        runtime().block_on(async {
            let ask = || {
                let (breaker, probes) = (Arc::clone(&breaker), Arc::clone(&probes));
                async move {
                    let inner = Arc::clone(&breaker);
                    breaker
                        .admit(move || {
                            probes.fetch_add(1, Ordering::Relaxed);
                            tokio::spawn(async move { inner.alive() });
                        })
                        .await
                }
            };
            assert_eq!(tokio::join!(ask(), ask(), ask()), (Ok(()), Ok(()), Ok(())));
        });
        assert_eq!(probes.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn between_probes_requests_fail_at_once() {
        let breaker = Breaker::new(Timing {
            probe_interval: Duration::from_secs(60),
            ..timing()
        });
        breaker.failed("refused", true);
        runtime().block_on(async {
            assert!(breaker.admit(|| breaker.probe_failed("refused")).await.is_err());
            let second = breaker.admit(|| unreachable!("no probe is due")).await;
            assert!(second.is_err());
        });
    }
}
