//! How large the requests of the background are, and how many bytes a second they may bring. Pure.
//!
//! A reader who comes while some are under way shares the line with them until they end. So they are as long as the line
//! brings in a moment, whatever the line: what they take is measured, and the next ones are longer or shorter.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest request, and the first: a member that is longer is asked for alone.
pub(super) const REQUEST_BYTES_MIN: u64 = 128 << 10;
/// The longest request, except for a member that is longer.
pub(super) const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// Requests that end sooner may be longer. On a line of 50 ms and 100 Mbit/s two requests of this keep two thirds of it busy.
const SHORT: Duration = Duration::from_millis(100);
/// Requests that take longer are too long.
const LONG: Duration = Duration::from_millis(200);

/// The longest that one request is paid off, however low the rate is.
const WAIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// The length of the next request.
#[derive(Debug)]
pub(super) struct RequestSize(u64);

impl Default for RequestSize {
    fn default() -> Self {
        Self(REQUEST_BYTES_MIN)
    }
}

impl RequestSize {
    /// The most bytes of the next request.
    pub(super) fn bytes(&self) -> u64 {
        self.0
    }

    /// A request of `bytes` took `took`.
    pub(super) fn measured(&mut self, bytes: u64, took: Duration) {
        // A request that was short for want of members says nothing about long ones.
        if took < SHORT && bytes > self.0 / 2 {
            self.0 = (self.0 * 2).min(REQUEST_BYTES_MAX);
        } else if took > LONG {
            self.0 = (self.0 / 2).max(REQUEST_BYTES_MIN);
        }
    }
}

/// Keeps a stream of requests below so many bytes a second: what was asked for is paid off by waiting.
#[derive(Debug)]
pub(super) struct RateLimit {
    bytes_per_s: Option<u64>,
    paid_at: Option<Instant>,
}

impl RateLimit {
    /// No limit where there is no number, or a zero.
    pub(super) fn new(bytes_per_s: Option<u64>) -> Self {
        Self {
            bytes_per_s: bytes_per_s.filter(|&rate| rate > 0),
            paid_at: None,
        }
    }

    /// How long nothing may be asked for from `now` on.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.paid_at
            .map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    /// So many bytes are asked for now.
    pub(super) fn spend(&mut self, now: Instant, bytes: u64) {
        if let Some(rate) = self.bytes_per_s {
            let from = self.paid_at.map_or(now, |at| at.max(now));
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
            let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            self.paid_at = Some(from + cost.min(WAIT_MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A line: what a request of so many bytes takes on it.
    fn took(bytes: u64, round_trip: Duration, bytes_per_s: u64) -> Duration {
        round_trip + Duration::from_secs_f64(bytes as f64 / bytes_per_s as f64)
    }

    #[test]
    fn requests_are_as_long_as_the_line_brings_in_a_moment() {
        let lines = [
            (50, 12_500_000, 512 << 10..(1 << 20) + 1),
            (0, 1_000_000_000, REQUEST_BYTES_MAX..REQUEST_BYTES_MAX + 1),
            (300, 1_000_000, REQUEST_BYTES_MIN..REQUEST_BYTES_MIN + 1),
        ];
        for (round_trip_ms, bytes_per_s, expected) in lines {
            let mut size = RequestSize::default();
            for _ in 0..100 {
                let bytes = size.bytes();
                size.measured(
                    bytes,
                    took(bytes, Duration::from_millis(round_trip_ms), bytes_per_s),
                );
            }
            assert!(expected.contains(&size.bytes()), "{} bytes", size.bytes());
        }
    }

    #[test]
    fn a_small_request_says_nothing_about_large_ones() {
        let mut size = RequestSize::default();
        size.measured(1000, Duration::from_millis(1));
        assert_eq!(size.bytes(), REQUEST_BYTES_MIN);
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        for rate in [None, Some(0)] {
            let (mut limit, now) = (RateLimit::new(rate), Instant::now());
            limit.spend(now, u64::MAX);
            assert_eq!(limit.wait(now), Duration::ZERO);
        }
    }

    proptest! {
        /// Whoever waits as told has, at any time, asked for no more than the rate gives and one request.
        #[test]
        fn the_rate_holds(
            rate in 1_u64..1 << 30,
            requests in prop::collection::vec((1_u64..8 << 20, 0_u64..3000), 1..50),
        ) {
            let start = Instant::now();
            let (mut limit, mut now, mut asked) = (RateLimit::new(Some(rate)), start, 0);
            for (bytes, idle_ms) in requests {
                now += Duration::from_millis(idle_ms) + limit.wait(now);
                prop_assert_eq!(limit.wait(now), Duration::ZERO);
                let allowed = (now - start).as_secs_f64() * rate as f64;
                prop_assert!(asked as f64 <= allowed * 1.000_001 + 1.0, "{} of {}", asked, allowed);
                limit.spend(now, bytes);
                asked += bytes;
            }
        }
    }
}
