//! How chunks leave a layer's data file.
//!
//! A chunk goes in this order: its mark is cleared, the readers that may have seen the mark are waited for, then the hole
//! is punched. A reader that saw the mark and then read a hole would leave zeros in the kernel's page cache for ever.
//! Meanwhile nobody else marks anything in the layer (`Layer::keeping`): a chunk that comes again between the steps would
//! be marked and then punched. Where the filesystem cannot punch, only a whole layer can go.
//!
//! What the kernel was given in this boot ([`crate::store::lending`]) is neither punched nor cut short, because a mount that
//! outlived the process that made it would show zeros. While it is lent by this process, nothing of it goes. Otherwise what
//! stays of the layer is copied into another file, which takes the place of the old one under its name; the old one's
//! space comes free when the last mount has let go of it.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, copy_file_range, fallocate};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::store::layer::{Evicted, Layer, new_data};

/// Chunks that go at once: while they do, nobody can store what came for this layer.
const BATCH_CHUNKS: u32 = 256;
/// How long readers are waited for. They copy from the disk to memory, so this is a disk that hangs.
const READERS_WAIT: Duration = Duration::from_secs(5);
/// How often the readers' counts are looked at.
const READERS_LOOK_INTERVAL: Duration = Duration::from_micros(200);

impl Layer {
    /// Takes the chunks of these ranges out of the store. Answers how many bytes have gone.
    ///
    /// # Errors
    /// [`Error::Busy`] while the kernel reads it by itself or when readers do not come to an end, [`Error::Unsupported`] when the filesystem cannot punch holes
    /// and this is not the whole layer, [`Error::Malformed`] for a damaged index, [`Error::Io`]. What is present then can
    /// be read as before.
    pub fn evict(&self, ranges: &[Range<u32>]) -> Result<u64> {
        let gone_bytes = self.evict_ranges(ranges);
        // What could not be evicted may be all of it.
        self.note_progress();
        gone_bytes
    }

    fn evict_ranges(&self, ranges: &[Range<u32>]) -> Result<u64> {
        let is_all = is_all(ranges, self.index().chunk_count());
        let mut gone_bytes = 0;
        for range in ranges {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start.saturating_add(BATCH_CHUNKS));
                let mut evicted = self.evicted()?;
                if evicted.map.is_lent() {
                    return Ok(gone_bytes + self.evict_lent(&mut evicted, ranges)?);
                }
                let gone = self.evict_batch(&mut evicted, start..end);
                drop(evicted);
                match gone {
                    Err(Error::Unsupported { .. }) if is_all => return Ok(gone_bytes + self.evict_whole()?),
                    gone => gone_bytes += gone?,
                }
                start = end;
            }
        }
        Ok(gone_bytes)
    }

    fn evict_batch(&self, evicted: &mut Evicted<'_>, chunks: Range<u32>) -> Result<u64> {
        let cleared = self.clear(evicted, &chunks)?;
        let (mut gone_bytes, mut failure) = (0, Ok(()));
        for &(number, was_present) in &cleared {
            let chunk = self.index().chunk(number)?;
            let punched = match failure {
                Ok(()) => punch(evicted, chunk.data_offset, chunk.bytes),
                Err(_) => Err(Errno::CANCELED),
            };
            match punched {
                Ok(()) => gone_bytes += chunk.bytes,
                // Nothing has happened to its bytes.
                Err(errno) => {
                    mark_again(evicted, number, was_present)?;
                    failure = failure.and(Err(errno));
                }
            }
        }
        failure.map_err(|errno| self.cannot_punch(errno))?;
        Ok(gone_bytes)
    }

    /// Empties the data file of a layer of which nothing is to stay.
    fn evict_whole(&self) -> Result<u64> {
        let mut evicted = self.evicted()?;
        let everything = 0..self.index().chunk_count();
        if evicted.map.is_lent() {
            return self.evict_lent(&mut evicted, &[everything]);
        }
        let cleared = self.clear(&mut evicted, &everything)?;
        let data_bytes = self.index().summary().data_bytes;
        let emptied = evicted
            .data
            .set_len(0)
            .and_then(|()| evicted.data.set_len(data_bytes));
        emptied.map_err(|error| self.failed(&error))?;
        let mut gone_bytes = 0;
        for (number, _) in cleared {
            gone_bytes += self.index().chunk(number)?.bytes;
        }
        Ok(gone_bytes)
    }

    /// Evicts from a data file that the kernel may have: what stays goes into another file.
    fn evict_lent(&self, evicted: &mut Evicted<'_>, ranges: &[Range<u32>]) -> Result<u64> {
        let (mut cleared, mut outcome) = (Vec::new(), Ok(()));
        for range in ranges {
            match self.clear(evicted, range) {
                Ok(more) => cleared.extend(more),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        // Whoever reads a chunk that stays may go on in the old file, or find the new one: both have it.
        let outcome = outcome.and_then(|()| self.replace_by_copy(evicted));
        let mut gone_bytes = 0;
        for (number, was_present) in cleared {
            match outcome {
                Ok(()) => gone_bytes += self.index().chunk(number)?.bytes,
                Err(_) => mark_again(evicted, number, was_present)?,
            }
        }
        outcome.map(|()| gone_bytes)
    }

    fn replace_by_copy(&self, evicted: &Evicted<'_>) -> Result<()> {
        let aside = self.aside();
        let data_bytes = self.index().summary().data_bytes;
        let copy = || -> Result<()> {
            let new = new_data(&aside, data_bytes).map_err(|e| self.failed(&e))?;
            let present = (0..self.index().chunk_count()).filter(|&number| evicted.map.is_present(number));
            for number in present {
                let chunk = self.index().chunk(number)?;
                let copied = copy_range(&evicted.data, &new, chunk.data_offset, chunk.bytes);
                copied.map_err(|e| self.failed(&e))?;
            }
            let replaced = evicted.replace(&aside, new);
            replaced.map_err(|e| self.failed(&e))
        };
        let copied = copy();
        if copied.is_err() {
            let _ = std::fs::remove_file(&aside);
        }
        copied
    }

    /// Takes the marks away and waits until nobody reads who may have seen them. Answers the chunks that had one,
    /// and whether it was worth something: what a crash made doubtful is not.
    fn clear(&self, evicted: &mut Evicted<'_>, chunks: &Range<u32>) -> Result<Vec<(u32, bool)>> {
        *evicted.keeping += 1;
        evicted.complete.store(false, Ordering::SeqCst);
        let mut cleared = Vec::new();
        for number in chunks.clone() {
            let is_present = evicted.map.is_present(number);
            if evicted.map.clear(number)? {
                cleared.push((number, is_present));
            }
        }
        let started = Instant::now();
        while !self.is_unread(chunks) {
            if started.elapsed() > READERS_WAIT {
                for &(number, was_present) in &cleared {
                    mark_again(evicted, number, was_present)?;
                }
                let why = "it is being read for longer than 5 s; is its disk in order?";
                return Err(Error::busy(format!("data of layer {}", self.key()), why));
            }
            std::thread::sleep(READERS_LOOK_INTERVAL);
        }
        Ok(cleared)
    }

    fn cannot_punch(&self, errno: Errno) -> Error {
        let what = format!("data of layer {}", self.key());
        match errno {
            Errno::OPNOTSUPP | Errno::NOSYS => Error::unsupported(
                what,
                "the cache's filesystem cannot punch holes: only whole images can be evicted",
            ),
            errno => Error::io(what, &errno.into()),
        }
    }
}

/// The bytes of a chunk have stayed as they were.
fn mark_again(evicted: &Evicted<'_>, chunk: u32, was_present: bool) -> Result<()> {
    match was_present {
        true => evicted.map.mark(chunk),
        false => Ok(()),
    }
}

/// Whether the ranges, which do not overlap, are all chunks that there are.
fn is_all(ranges: &[Range<u32>], chunks: u32) -> bool {
    ranges
        .iter()
        .map(|range| u64::from(range.end.saturating_sub(range.start)))
        .sum::<u64>()
        >= u64::from(chunks)
}

/// Copies bytes to the same place in another file of the same filesystem, which shares them where it can.
fn copy_range(from: &File, to: &File, offset: u64, bytes: u64) -> std::io::Result<()> {
    let (mut from_at, mut to_at, end) = (offset, offset, offset.saturating_add(bytes));
    while to_at < end {
        let left = usize::try_from(end - to_at).unwrap_or(usize::MAX);
        if copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), left)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn punch(evicted: &Evicted<'_>, offset: u64, bytes: u64) -> std::result::Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&*evicted.data, flags, offset, bytes)
}

#[cfg(test)]
mod tests;
