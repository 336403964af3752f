//! How long one operation goes on: its deadline, its retries, its pauses. Two kinds of patience: a small
//! request ends after a total time, a stream when nothing more comes.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use super::failure::{Cause, Failure};
use super::host::Host;
use super::options::ClientOptions;
use super::options::Timing;
use crate::error::{Error, Result};

/// A stream that brought so many bytes since the last failure has its retries back.
const PROGRESS_BYTES: u64 = 64 << 10;

/// What ends an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// The total time, [`ClientOptions::timeout`].
    Total,
    /// No progress for [`Timing::stall`].
    Stream,
}

/// One operation and what it has been through.
#[derive(Debug)]
pub(super) struct Attempts {
    /// What is asked for, for messages.
    pub(super) what: String,
    pub(super) patience: Patience,
    timing: Timing,
    retries: u32,
    /// There is another endpoint to ask.
    gives_way: bool,
    queue: Duration,
    total: Duration,
    started: Instant,
    deadline: Instant,
    attempt_started: Instant,
    failures: u32,
    unreachable_since: Option<Instant>,
    whole_since: Option<Instant>,
    progress: u64,
    may_go_on: bool,
}

impl Attempts {
    pub(super) fn new(what: String, patience: Patience, options: &ClientOptions) -> Self {
        let started = Instant::now();
        let deadline = match patience {
            Patience::Total => started + options.timeout,
            Patience::Stream => started + options.timing.stall,
        };
        Self {
            what,
            patience,
            timing: options.timing,
            retries: options.retries,
            gives_way: false,
            queue: options.timeout,
            total: options.timeout,
            started,
            deadline,
            attempt_started: started,
            failures: 0,
            unreachable_since: None,
            whole_since: None,
            progress: 0,
            may_go_on: false,
        }
    }

    /// The same operation's side request, such as for a token: it has a name and retries of its own but the same
    /// deadline.
    pub(super) fn side(&self, what: String) -> Self {
        Self {
            what,
            patience: self.patience,
            timing: self.timing,
            retries: self.retries,
            gives_way: self.gives_way,
            queue: self.queue,
            total: self.total,
            started: self.started,
            deadline: self.deadline,
            attempt_started: self.started,
            failures: 0,
            unreachable_since: None,
            whole_since: None,
            progress: 0,
            may_go_on: false,
        }
    }

    /// The same operation at one of `mirrors` mirrors that have a successor: nothing is tried twice, the next byte is
    /// waited for a short time only, and time is left for the successor. Begins now.
    pub(super) fn bounded(&self, mirrors: u32) -> Self {
        let mut bounded = self.side(self.what.clone());
        let wait = self.timing.mirrors.min(self.total / 2) / mirrors.max(1);
        bounded.timing.stall = bounded.timing.stall.min(wait);
        bounded.retries = 0;
        bounded.gives_way = true;
        bounded.started = Instant::now();
        bounded.attempt_started = bounded.started;
        bounded.deadline = match self.patience {
            Patience::Total => self.deadline.checked_sub(self.total / 4).unwrap_or(self.deadline),
            Patience::Stream => bounded.started + bounded.timing.stall,
        };
        bounded
    }

    /// Why a mirror is not asked now, if it is not: it has gone wrong since this operation chose it, or those before it
    /// took all the time. It is not to blame for this operation.
    pub(super) fn passes_over(&self, host: &Host) -> Option<Error> {
        let why = match (self.gives_way, Instant::now() >= self.deadline) {
            (true, _) if host.is_absent() => "is left out for a while",
            (true, true) => "was not asked: no time was left for it",
            _ => return None,
        };
        Some(Error::network(&self.what, format!("{} {why}", host.peer())))
    }

    /// When the operation must have ended or, as a stream, made progress.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// When the exchange that begins now must have brought its next byte.
    pub(super) fn attempt_deadline(&mut self) -> Instant {
        self.attempt_started = Instant::now();
        self.deadline.min(self.attempt_started + self.timing.stall)
    }

    /// Until when the operation waits for its turn among those of its host. A stream's own clock does not run then.
    pub(super) fn queue_deadline(&self) -> Instant {
        match self.patience {
            Patience::Total => self.deadline,
            Patience::Stream => Instant::now() + self.queue,
        }
    }

    /// Bytes came.
    pub(super) fn progressed(&mut self, bytes: u64) {
        self.progress = self.progress.saturating_add(bytes);
        if self.progress >= PROGRESS_BYTES {
            self.progress = 0;
            self.failures = 0;
            self.unreachable_since = None;
            self.whole_since = None;
        }
        self.wait_anew();
    }

    /// A stream's wait begins now: the time its consumer took does not count.
    pub(super) fn wait_anew(&mut self) {
        if self.patience == Patience::Stream {
            self.started = Instant::now();
            self.deadline = self.started + self.timing.stall;
        }
    }

    /// Nothing was waited for meanwhile: that time does not count.
    pub(super) fn rested(&mut self, time: Duration) {
        self.deadline += time;
    }

    /// The operation ended without an answer in its time.
    pub(super) fn timed_out(&self) -> Error {
        let waited_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Error::Timeout {
            what: self.what.clone(),
            waited_ms,
        }
    }

    /// No turn came among those of `host`. A mirror did nothing wrong by that.
    pub(super) fn no_turn(&self, host: &Host) -> Error {
        match self.gives_way {
            true => Error::network(
                &self.what,
                format!("{} has too many requests under way", host.peer()),
            ),
            false => self.timed_out(),
        }
    }

    /// After a failed exchange with `host`: pauses until the next one may be sent, or gives up with the error.
    pub(super) async fn pause(&mut self, host: &Host, failure: &Failure) -> Result<()> {
        let now = Instant::now();
        self.failures += 1;
        let mut ends = self.deadline;
        if failure.cause == Cause::Unreachable {
            let since = *self.unreachable_since.get_or_insert(self.attempt_started);
            ends = ends.min(since + self.timing.unreachable);
        } else {
            self.unreachable_since = None;
        }
        let wait = match failure.retry_after {
            // The host as a whole is held back, in its gate.
            Some(_) => Duration::ZERO,
            None => backoff(&self.timing, self.failures),
        };
        let mut tried_enough = self.failures > self.retries;
        if failure.cause == Cause::Whole {
            let since = *self.whole_since.get_or_insert(self.attempt_started);
            ends = ends.min(match host.honours_ranges() {
                true => since + self.total,
                // It may be one that never gives ranges.
                false => since + self.timing.stall,
            });
            // How long a cache takes to fill itself has nothing to do with how often it is asked.
            tried_enough = self.retries == 0;
        }
        let over = !failure.may_pass() || tried_enough || now + wait >= ends;
        if failure.is_outage() {
            // One try for a mirror proves nothing of a token service or a blob store, which others may need too.
            host.outage(failure, over && (!self.gives_way || host.is_mirror()));
        }
        if over {
            return Err(self.error(host, failure));
        }
        host.count_retry();
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// The error of a part of a blob that may have arrived in part, after the pause.
    pub(super) fn interrupted(&mut self, host: &Host, failure: &Failure) -> Error {
        self.may_go_on = true;
        self.error(host, failure)
    }

    /// Whether the last error was [`Self::interrupted`]: then the operation has retries left. Asking takes it back.
    pub(super) fn may_go_on(&mut self) -> bool {
        std::mem::take(&mut self.may_go_on)
    }

    fn error(&self, host: &Host, failure: &Failure) -> Error {
        if matches!(failure.cause, Cause::Timeout | Cause::Stalled) {
            return match (self.timed_out(), host.peer()) {
                (Error::Timeout { what, waited_ms }, peer) if peer != host.name() => Error::Timeout {
                    what: format!("{what} from {peer}"),
                    waited_ms,
                },
                (error, _) => error,
            };
        }
        let tries = match self.failures {
            0 | 1 => String::new(),
            tries => format!(", after {tries} tries"),
        };
        match failure.cause {
            Cause::Whole => Error::unsupported(&self.what, format!("{} {}{tries}", host.peer(), failure.why)),
            _ => Error::network(&self.what, format!("{}: {}{tries}", host.peer(), failure.why)),
        }
    }
}

/// The pause before try number `failures` + 1: a random part of a limit that doubles each time ("full jitter"), so
/// that clients that failed together do not come back together.
fn backoff(timing: &Timing, failures: u32) -> Duration {
    let limit = timing
        .backoff
        .saturating_mul(1 << failures.saturating_sub(1).min(16));
    limit.min(timing.backoff_max).mul_f64(random_fraction())
}

/// The limit of the pause that is put on a host that asked for one without saying how long.
pub(super) fn unasked_hold(timing: &Timing, times: u32) -> Duration {
    let limit = timing.backoff.saturating_mul(5 << times.min(16));
    limit.min(timing.backoff_max)
}

/// A number from 0 to 1. Spreading pauses needs no better source than the hasher's keys.
pub(super) fn random_fraction() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_within_their_limits_and_differ() {
        let timing = Timing::default();
        let mut distinct = std::collections::HashSet::new();
        for failures in 1..200 {
            let pause = backoff(&timing, failures);
            let limit = timing.backoff.saturating_mul(1 << (failures - 1).min(10));
            assert!(pause <= limit.min(timing.backoff_max), "{failures}: {pause:?}");
            distinct.insert(pause);
        }
        assert!(distinct.len() > 100, "{} distinct pauses of 199", distinct.len());
    }

    #[test]
    fn only_a_stream_gets_a_new_deadline_by_progress() {
        let options = ClientOptions::default();
        let mut total = Attempts::new("x".into(), Patience::Total, &options);
        let before = total.deadline();
        total.progressed(1);
        assert_eq!(total.deadline(), before);
        let mut stream = Attempts::new("x".into(), Patience::Stream, &options);
        let before = stream.deadline();
        std::thread::sleep(Duration::from_millis(2));
        stream.progressed(1);
        assert!(stream.deadline() > before);
    }
}
