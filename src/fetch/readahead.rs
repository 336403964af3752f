//! Read-ahead: which part of the blob to fetch beyond what a reader asks for.
//!
//! Readers of a layer are told apart by where in the blob they are. A new place gets a small window; a reader that goes on
//! where its window ends gets twice as much, up to [`WINDOW_BYTES_MAX`], and gets it before it arrives there. So one small
//! file costs little more than itself, and a reader in sequence soon streams.

use std::ops::Range;

/// The window at a new place: what one read of a small file may cost beyond itself.
pub const WINDOW_BYTES_MIN: u64 = 128 << 10;
/// The largest window.
pub const WINDOW_BYTES_MAX: u64 = 32 << 20;
/// A reader that starts at most this far behind a window's end goes on in it: small files are skipped over.
const SKIP_BYTES_MAX: u64 = 256 << 10;
/// The most readers told apart in one layer.
const STREAMS_MAX: usize = 16;

/// One reader's window.
#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Where the reader was first seen or last went on from.
    start: u64,
    /// The end of what was asked for ahead of it.
    end: u64,
    /// How much comes next.
    window: u64,
    /// When it was last seen, in observations.
    seen: u64,
}

/// The readers of one layer.
#[derive(Debug, Default)]
pub struct Streams {
    streams: Vec<Stream>,
    now: u64,
}

impl Streams {
    /// A reader needs bytes `start..end` of the blob, and `missed` some of them. Answers what to fetch ahead of it.
    pub fn observe(&mut self, start: u64, end: u64, missed: bool) -> Option<Range<u64>> {
        self.now += 1;
        let now = self.now;
        let within = |stream: &&mut Stream| {
            (stream.start..=stream.end.saturating_add(SKIP_BYTES_MAX)).contains(&start)
        };
        if let Some(stream) = self.streams.iter_mut().find(within) {
            stream.seen = now;
            // `window` is what comes next, twice the last one: more is due in the last half of what was fetched.
            let due = stream.end.saturating_sub(stream.window / 4);
            if end < due {
                return None;
            }
            let from = stream.end.max(end);
            stream.start = start;
            stream.end = from.saturating_add(stream.window);
            stream.window = (stream.window * 2).min(WINDOW_BYTES_MAX);
            return Some(from..stream.end);
        }
        if !missed {
            return None;
        }
        let stream = Stream {
            start,
            end: end.saturating_add(WINDOW_BYTES_MIN),
            window: WINDOW_BYTES_MIN * 2,
            seen: now,
        };
        let full = self.streams.len() >= STREAMS_MAX;
        match self.streams.iter_mut().min_by_key(|stream| stream.seen) {
            Some(oldest) if full => *oldest = stream,
            _ => self.streams.push(stream),
        }
        Some(end..stream.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_in_sequence_soon_gets_large_windows_ahead_of_itself() {
        let mut streams = Streams::default();
        let (mut fetched, mut at, mut windows) = (0, 0, Vec::new());
        while at < 200 << 20 {
            let end = at + (64 << 10);
            if let Some(ahead) = streams.observe(at, end, end > fetched) {
                assert!(ahead.start >= fetched.min(end), "nothing is asked for twice");
                windows.push(ahead.end - ahead.start);
                fetched = fetched.max(ahead.end);
            }
            assert!(fetched >= end, "the reader never overtakes its window");
            at = end;
        }
        assert_eq!(windows[0], WINDOW_BYTES_MIN);
        assert!(windows.windows(2).all(|pair| pair[1] >= pair[0]));
        assert_eq!(windows.last(), Some(&WINDOW_BYTES_MAX));
    }

    #[test]
    fn single_reads_far_apart_cost_a_small_window_each() {
        let mut streams = Streams::default();
        for place in (0..100).map(|i| i * (10 << 20)) {
            let ahead = streams.observe(place, place + 4096, true).unwrap();
            assert_eq!(ahead, place + 4096..place + 4096 + WINDOW_BYTES_MIN);
        }
        assert_eq!(streams.streams.len(), STREAMS_MAX);
    }

    #[test]
    fn hits_at_unknown_places_ask_for_nothing() {
        assert_eq!(Streams::default().observe(0, 4096, false), None);
    }

    #[test]
    fn readers_side_by_side_keep_their_windows() {
        let mut streams = Streams::default();
        let far = 1 << 30;
        for i in 0..20 {
            for base in [0, far] {
                let at = base + i * (256 << 10);
                streams.observe(at, at + (256 << 10), true);
            }
        }
        assert_eq!(streams.streams.len(), 2);
        assert!(streams.streams.iter().all(|stream| stream.window > 1 << 20));
    }
}
