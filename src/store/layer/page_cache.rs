//! What is handed to the kernel is kept in memory by the kernel, under the file that was read. A second copy, in the page
//! cache of the data file, would be of use to nobody, so it is given up.
//!
//! Only that: what nobody has read stays, because whoever reads in no order comes back to its neighbours.
//!
//! Afterwards, and in large batches: `posix_fadvise` over what 8 MiB of reads went through takes some microseconds, and the
//! reads themselves stay what they were, with the kernel's read-ahead on the data file and answers from its page cache. The
//! other ways were measured and cost more. `RWF_DONTCACHE` doubles the time of reads of 4 KiB from a cold cache, because each
//! drops all of a large folio that the next one needs; O_DIRECT gives up read-ahead. Data that was just written stays until
//! it has been read: it mostly is read next, and reading it back from the disk takes longer than writing it did. Written
//! without a copy (`RWF_DONTCACHE` again), 512 MiB took 0.22 s instead of 0.15 s, and then had to come from the disk.

use std::ops::Range;

use rustix::fs::{Advice, fadvise};

use super::Layer;
use crate::layer::index::DATA_ALIGN_BYTES;

/// So much is handed on before its copy is given up.
const BATCH_BYTES: u64 = 8 << 20;
/// The most separate places in a batch: 16 KiB of memory a layer.
const BATCH_RANGES: usize = 1024;
/// Reads this close are one place: the padding between files.
const GAP_BYTES_MAX: u64 = DATA_ALIGN_BYTES;
/// A folio is given up only as a whole, and the last one of a batch may reach into the next: the largest on x86-64.
const FOLIO_BYTES_MAX: u64 = 2 << 20;

/// Places of the data file that the kernel has a copy of.
#[derive(Debug, Default)]
pub(super) struct HandedOn {
    ranges: Vec<Range<u64>>,
    bytes: u64,
    /// The places of the last batch, in order.
    last: Vec<Range<u64>>,
}

impl HandedOn {
    /// Adds a place; answers all of them when there are enough.
    fn add(&mut self, start: u64, len: u64) -> Option<Vec<Range<u64>>> {
        let end = start.saturating_add(len);
        match self.ranges.last_mut() {
            Some(last) if last.start <= start && start <= last.end.saturating_add(GAP_BYTES_MAX) => {
                last.end = last.end.max(end);
            }
            _ => self.ranges.push(start..end),
        }
        self.bytes += len;
        if self.bytes < BATCH_BYTES && self.ranges.len() < BATCH_RANGES {
            return None;
        }
        self.bytes = 0;
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, last| {
            let is_close = next.start <= last.end.saturating_add(GAP_BYTES_MAX);
            if is_close {
                last.end = last.end.max(next.end);
            }
            is_close
        });
        let last = std::mem::replace(&mut self.last, ranges.clone());
        for range in &mut ranges {
            let before = last[..last.partition_point(|place| place.end <= range.start)].last();
            if let Some(before) = before.filter(|before| range.start - before.end <= GAP_BYTES_MAX) {
                range.start = range.start.saturating_sub(FOLIO_BYTES_MAX).max(before.start);
            }
        }
        Some(ranges)
    }
}

impl Layer {
    /// Bytes of the data file were handed to the kernel, which keeps them. Answers now and then what to
    /// [forget](Self::forget).
    #[must_use]
    pub fn handed_on(&self, data_offset: u64, len: usize) -> Option<Vec<Range<u64>>> {
        self.handed_on.lock().add(data_offset, len as u64)
    }

    /// Gives up the copies of these places in the page cache. What the disk does not have yet is sent there, and stays for
    /// now.
    pub fn forget(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
        let data = self.data();
        for range in ranges {
            let len = std::num::NonZeroU64::new(range.end.saturating_sub(range.start));
            // Advice that is not taken costs memory that the kernel can take back by itself.
            let _ = fadvise(&*data, range.start, len, Advice::DontNeed);
        }
    }

    /// Sends all of the data file to the disk and gives up its copy in the page cache.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    pub(in crate::store) fn write_back(&self) -> crate::error::Result<()> {
        let synced = self.data().sync_data().map_err(|e| self.failed(&e));
        match synced {
            Ok(()) => self.forget_all(),
            Err(_) => self.doubt(),
        }
        synced
    }

    /// Gives up all of the data file's copy in the page cache.
    pub(in crate::store) fn forget_all(&self) {
        self.forget(std::iter::once(0..self.index().summary().data_bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_in_sequence_is_one_place_and_every_byte_is_forgotten() {
        let mut handed = HandedOn::default();
        let (mut at, mut forgotten) = (0, 0);
        while at < 5 * BATCH_BYTES {
            if let Some(ranges) = handed.add(at, 100_000) {
                assert_eq!(ranges.len(), 1, "{ranges:?}");
                assert!(ranges[0].start <= forgotten + GAP_BYTES_MAX);
                forgotten = ranges[0].end;
            }
            at += 100_000 + DATA_GAP;
        }
        assert!(
            at - forgotten < BATCH_BYTES + BATCH_BYTES / 4,
            "{forgotten} of {at}"
        );
    }

    const DATA_GAP: u64 = 2400;

    #[test]
    fn readers_side_by_side_are_few_places() {
        let mut handed = HandedOn::default();
        let mut batches = Vec::new();
        for step in 0..BATCH_BYTES / 8192 {
            for base in [7 << 30, 0, 1 << 30] {
                batches.extend(handed.add(base + step * 8192, 8192));
            }
        }
        assert!(!batches.is_empty());
        assert!(batches.iter().all(|ranges| ranges.len() <= 3), "{batches:?}");
    }

    #[test]
    fn the_folio_that_two_batches_of_one_reader_share_is_given_up_with_the_second() {
        let mut handed = HandedOn::default();
        let steps = (0..2 * BATCH_BYTES).step_by(64 << 10);
        let batches: Vec<_> = steps.filter_map(|at| handed.add(at, 64 << 10)).collect();
        let second = BATCH_BYTES - FOLIO_BYTES_MAX..2 * BATCH_BYTES;
        assert_eq!(batches.concat(), [0..BATCH_BYTES, second]);
    }

    #[test]
    fn what_nobody_has_read_beside_what_was_read_stays() {
        let mut handed = HandedOn::default();
        for place in 0..10_000_u64 {
            let read = place * (1 << 20)..place * (1 << 20) + 4096;
            let forgotten = handed.add(read.start, 4096).unwrap_or_default();
            assert!(forgotten.iter().all(|range| range.end - range.start == 4096));
        }
    }

    #[test]
    fn of_files_that_are_read_in_any_order_none_is_forgotten_before_it_was_read() {
        const FILE_BYTES: u64 = 20_000;
        const FILE_PLACE_BYTES: u64 = 20_480;
        const FILES: u64 = 16_381;
        let mut handed = HandedOn::default();
        let (mut read, mut forgotten) = (vec![false; FILES as usize], 0);
        for file in (0..FILES).map(|step| step * 7919 % FILES) {
            read[file as usize] = true;
            let ranges = handed.add(file * FILE_PLACE_BYTES, FILE_BYTES);
            for range in ranges.unwrap_or_default() {
                forgotten += range.end - range.start;
                let files = range.start / FILE_PLACE_BYTES..range.end.div_ceil(FILE_PLACE_BYTES);
                assert!(files.into_iter().all(|file| read[file as usize]), "{range:?}");
            }
        }
        assert!(forgotten >= (FILES - 2 * BATCH_BYTES / FILE_BYTES) * FILE_BYTES);
    }

    #[test]
    fn scattered_reads_take_bounded_memory() {
        let mut handed = HandedOn::default();
        let mut forgotten = 0;
        for place in 0..10_000_u64 {
            forgotten += handed
                .add(place * (1 << 30), 4096)
                .map_or(0, |ranges| ranges.len());
            assert!(handed.ranges.len() < BATCH_RANGES);
        }
        assert!(forgotten >= 9000);
    }
}
