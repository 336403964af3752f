//! Whether a stream comes as fast as it has to.

use std::time::Duration;

use super::options::Timing;

/// What a stream brought in the time that its consumer waited.
#[derive(Debug, Default)]
pub(super) struct Pace {
    waited: Duration,
    bytes: u64,
}

/// A stream was too slow.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooSlow {
    pub(super) waited_ms: u64,
    pub(super) bytes: u64,
}

impl Pace {
    /// Counts bytes that were waited for so long. Judges, and begins anew, each time that [`Timing::stall`] was waited.
    pub(super) fn keep(&mut self, bytes: u64, waited: Duration, timing: &Timing) -> Result<(), TooSlow> {
        self.bytes = self.bytes.saturating_add(bytes);
        self.waited += waited;
        if self.waited < timing.stall {
            return Ok(());
        }
        let Self { waited, bytes } = std::mem::take(self);
        let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        let wanted_bytes = timing.bytes_per_second_min.saturating_mul(waited_ms) / 1000;
        match bytes >= wanted_bytes {
            true => Ok(()),
            false => Err(TooSlow { waited_ms, bytes }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_judged_by_what_came_while_it_was_waited_for() {
        let timing = Timing {
            stall: Duration::from_secs(10),
            bytes_per_second_min: 1000,
            ..Timing::default()
        };
        let mut pace = Pace::default();
        let mut wait = |bytes, seconds| pace.keep(bytes, Duration::from_secs(seconds), &timing);
        assert_eq!(wait(1, 9), Ok(()), "it is too early to say");
        assert_eq!(wait(9999, 1), Ok(()));
        assert_eq!(wait(0, 9), Ok(()), "what came before does not count any more");
        let slow = TooSlow {
            waited_ms: 12_000,
            bytes: 11_999,
        };
        assert_eq!(wait(11_999, 3), Err(slow));
        assert_eq!(wait(1, 9), Ok(()), "it begins anew");
    }
}
