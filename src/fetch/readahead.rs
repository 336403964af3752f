//! Read-ahead: which part of the blob to fetch beyond what a reader asks for. Pure.
//!
//! Readers of a layer are told apart by where they are. What they get ahead of them is what they have earned:
//!
//! - *A new place* gets [`WINDOW_BYTES_MIN`] where a file begins, because small files are mostly read with their
//!   neighbours, and nothing inside of a file: who jumps there reads a piece.
//! - *A reader that goes on* gets as much as it has read, up to a floor, and beyond it a part of what it has read, so that
//!   where it stops little has come in vain. What is ahead is asked for in halves: while it reads the one, the other is under
//!   way.
//! - *A reader that began where a file does* mostly reads all of it, and the files behind it: it gets twice as much, up to a
//!   floor that is high, and the next member of the file even if that is more than it has earned. One that began inside of a
//!   file reads a range, and what comes with a range is bounded.
//! - *One file ends where it ends.* Nothing behind it comes for a reader that has gone on in it alone, however much it has
//!   earned: a program that reads one large file reads nothing else. Who has gone on into the next file gets what follows.
//! - *A layer that is read at many places*, in whatever order, is soon read as a whole. The more of such places there were,
//!   measured by the size of the layer, the larger is the window at the next: in random order each costs a round trip.

use std::ops::Range;

/// The window where a file begins at a new place: what one read of a small file may cost beyond itself.
pub const WINDOW_BYTES_MIN: u64 = 128 << 10;
/// The window at a new place of a layer that is read everywhere.
pub const WINDOW_BYTES_MAX: u64 = 4 << 20;
/// Up to so much a reader of a range gets as much ahead as it has read: it fills a line of 50 ms and 300 Mbit/s.
pub const RANGE_AHEAD_BYTES_FLOOR: u64 = 2 << 20;
/// The same of a reader that began where a file does: two chunks of 4 MiB and some more, so that while one comes the next is
/// under way, although they share the line.
pub const AHEAD_BYTES_FLOOR: u64 = 12 << 20;
/// So many times what it has read is ahead of a reader that began where a file does, up to its floor: it gets there sooner
/// and with fewer requests, each of which costs a registry and a wait.
const FROM_START_TIMES: u64 = 2;
/// The most that is ahead of one reader.
pub const AHEAD_BYTES_MAX: u64 = 32 << 20;
/// Beyond its floor a reader gets this part of what it has read.
const AHEAD_PART: u64 = 20;
/// So many new places say nothing of a layer yet.
const PLACES_FREE: u64 = 16;
/// A reader that starts a file at most this far beyond what was asked for ahead of it goes on: small files are skipped over.
const SKIP_BYTES_MAX: u64 = 256 << 10;
/// Inside of a file a reader goes on at most this far from where it was: the kernel's own read-ahead comes in any order.
const DISORDER_BYTES_MAX: u64 = 1 << 20;
/// A reader that began where the file does gets a member of it ahead that has at most this many times what was read.
const MEMBER_TIMES_MAX: u64 = 16;
/// The most readers told apart in one layer.
const STREAMS_MAX: usize = 16;

/// One read of a layer.
#[derive(Debug, Clone)]
pub struct Read {
    /// Its bytes in the layer's data file.
    pub data: Range<u64>,
    /// The members that these are decoded from, as bytes of the blob.
    pub blob: Range<u64>,
    /// Whether it starts where a file does.
    pub is_at_start: bool,
    /// The file in which it ends.
    pub file: u32,
    /// Where in the blob the last member of that file ends.
    pub file_end: u64,
    /// Whether some of it was missing.
    pub missed: bool,
}

/// What is worth to be fetched ahead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Bytes of the blob.
    pub blob: Range<u64>,
    /// The next member, if it is of the same file and has at most so many bytes, is worth it however far it reaches: the
    /// reader would have to wait for all of it, with nothing under way before.
    pub next_bytes_max: u64,
    /// Whether nothing says yet that the reader goes on.
    pub is_new_place: bool,
}

/// One reader.
#[derive(Debug, Clone, Default)]
struct Stream {
    /// Where in the data file it is.
    data_end: u64,
    /// Where in the blob it began.
    blob_start: u64,
    /// How far in the blob it has come.
    blob_end: u64,
    /// The end of what was asked for ahead of it.
    asked_end: u64,
    /// How much it has read, as bytes of the data file.
    data_bytes: u64,
    /// The same as bytes of the blob, in whole members.
    blob_bytes: u64,
    /// Whether it began where a file does.
    began_at_start: bool,
    /// The file in which its first read ended.
    first_file: u32,
    /// Whether it has gone on from there into another.
    reads_files: bool,
    /// When it was last seen, in observations.
    seen: u64,
}

impl Stream {
    fn has_read_bytes(&self) -> u64 {
        self.data_bytes.min(self.blob_bytes)
    }

    /// The most that it gets ahead, where windows at new places have so many bytes.
    fn ahead_bytes_max(&self, window_bytes: u64) -> u64 {
        let (least, floor, times) = match self.began_at_start {
            true => (window_bytes, AHEAD_BYTES_FLOOR, FROM_START_TIMES),
            false => (WINDOW_BYTES_MIN, RANGE_AHEAD_BYTES_FLOOR, 1),
        };
        let read = self.has_read_bytes();
        let part = (read / AHEAD_PART).min(AHEAD_BYTES_MAX);
        read.saturating_mul(times).min(floor).max(part).max(least)
    }

    /// Whether a read goes on where this reader is.
    fn goes_on_with(&self, read: &Read, window_bytes: u64) -> bool {
        if read.is_at_start {
            let ahead = self.asked_end.max(self.blob_end).saturating_add(SKIP_BYTES_MAX);
            let behind = self.blob_end.saturating_sub(self.ahead_bytes_max(window_bytes));
            return (behind.max(self.blob_start)..=ahead).contains(&read.blob.start)
                || self.has_overtaken(read);
        }
        let disorder = self.data_bytes.min(DISORDER_BYTES_MAX);
        read.data.start <= self.data_end.saturating_add(disorder)
            && self.data_end <= read.data.end.saturating_add(disorder)
    }

    /// Whether it was taken for one that began inside of a file, because the first piece of the file, `read`, was overtaken
    /// by the next.
    fn has_overtaken(&self, read: &Read) -> bool {
        read.is_at_start
            && read.file == self.first_file
            && !self.began_at_start
            && (read.data.start..=read.data.end.saturating_add(DISORDER_BYTES_MAX)).contains(&self.data_end)
    }

    fn take(&mut self, read: &Read) {
        if self.has_overtaken(read) {
            self.began_at_start = true;
            self.blob_start = self.blob_start.min(read.blob.start);
        }
        self.data_bytes = self
            .data_bytes
            .saturating_add(read.data.end.saturating_sub(read.data.start));
        let new = read.blob.end.saturating_sub(self.blob_end.max(read.blob.start));
        self.blob_bytes = self.blob_bytes.saturating_add(new);
        self.data_end = match read.is_at_start {
            true => read.data.end,
            false => self.data_end.max(read.data.end),
        };
        self.blob_end = self.blob_end.max(read.blob.end);
        self.reads_files |= read.file != self.first_file;
    }

    /// What to fetch ahead of it now, which is behind `read`.
    fn wish(&self, read: &Read, window_bytes: u64) -> Option<Wish> {
        let most = self.ahead_bytes_max(window_bytes);
        let from = self.asked_end.max(self.blob_end);
        let end = self.blob_end.saturating_add(most);
        let is_due = end.saturating_sub(from) >= most.div_ceil(2);
        let blob = match self.reads_files {
            true => from..end,
            false => from..end.min(read.file_end),
        };
        let is_due = is_due && !blob.is_empty();
        is_due.then(|| Wish {
            blob,
            next_bytes_max: match self.began_at_start {
                true => self.has_read_bytes().saturating_mul(MEMBER_TIMES_MAX),
                false => 0,
            },
            is_new_place: false,
        })
    }
}

/// The readers of one layer.
#[derive(Debug)]
pub struct Streams {
    streams: Vec<Stream>,
    /// The one that was observed last.
    latest: usize,
    layer_bytes: u64,
    /// New places at which files began.
    places: u64,
    now: u64,
}

impl Streams {
    /// Of a layer whose blob has so many bytes.
    #[must_use]
    pub fn new(layer_bytes: u64) -> Self {
        Self {
            streams: Vec::new(),
            latest: 0,
            layer_bytes: layer_bytes.max(1),
            places: 0,
            now: 0,
        }
    }

    /// Takes note of a read; answers what to fetch ahead. Whoever asks for that says so, with [`Self::asked`].
    pub fn observe(&mut self, read: &Read) -> Option<Wish> {
        self.now += 1;
        let window_bytes = self.window_bytes();
        let mut streams = self.streams.iter();
        if let Some(latest) = streams.position(|stream| stream.goes_on_with(read, window_bytes)) {
            self.latest = latest;
            let stream = self.streams.get_mut(latest)?;
            stream.seen = self.now;
            stream.take(read);
            return stream.wish(read, window_bytes);
        }
        if !read.missed {
            return None;
        }
        let mut stream = Stream {
            seen: self.now,
            blob_start: read.blob.start,
            began_at_start: read.is_at_start,
            first_file: read.file,
            ..Stream::default()
        };
        stream.take(read);
        let oldest = self
            .streams
            .iter()
            .enumerate()
            .min_by_key(|(_, stream)| stream.seen);
        match oldest.map(|(at, _)| at) {
            Some(oldest) if self.streams.len() >= STREAMS_MAX => {
                self.latest = oldest;
                self.streams[oldest] = stream;
            }
            _ => {
                self.latest = self.streams.len();
                self.streams.push(stream);
            }
        }
        read.is_at_start.then(|| {
            self.places += 1;
            Wish {
                blob: read.blob.end..read.blob.end.saturating_add(window_bytes),
                next_bytes_max: 0,
                is_new_place: true,
            }
        })
    }

    /// What was wished last has been asked for, up to this byte of the blob.
    pub fn asked(&mut self, end: u64) {
        if let Some(stream) = self.streams.get_mut(self.latest) {
            stream.asked_end = stream.asked_end.max(end);
        }
    }

    /// The window at a new place: grows from the smallest to the largest until windows of the smallest size at the places so
    /// far would be half of the layer.
    fn window_bytes(&self) -> u64 {
        let places = self.places.saturating_sub(PLACES_FREE);
        let covered = places.saturating_mul(2 * WINDOW_BYTES_MIN).min(self.layer_bytes);
        let growth = u128::from(WINDOW_BYTES_MAX - WINDOW_BYTES_MIN) * u128::from(covered);
        let growth = u64::try_from(growth / u128::from(self.layer_bytes)).unwrap_or(0);
        WINDOW_BYTES_MIN + growth
    }
}

#[cfg(test)]
mod tests;
