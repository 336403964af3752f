//! How chunks leave a layer's data file.
//!
//! A chunk goes in this order: its mark is cleared, the readers that may have seen the mark are waited for, then the hole
//! is punched. A reader that saw the mark and then read a hole would leave zeros in the kernel's page cache for ever.
//! Meanwhile nobody else marks anything in the layer (`Layer::keeping`): a chunk that comes again between the steps would
//! be marked and then punched. Where the filesystem cannot punch, only a whole layer can go.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::store::layer::{Evicted, Layer};

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
    /// [`Error::Busy`] when readers do not come to an end, [`Error::Unsupported`] when the filesystem cannot punch holes
    /// and this is not the whole layer, [`Error::Malformed`] for a damaged index, [`Error::Io`]. What is present then can
    /// be read as before.
    pub fn evict(&self, ranges: &[Range<u32>]) -> Result<u64> {
        let is_all = is_all(ranges, self.index().chunk_count());
        let mut gone_bytes = 0;
        for range in ranges {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start.saturating_add(BATCH_CHUNKS));
                match self.evict_batch(start..end) {
                    Err(Error::Unsupported { .. }) if is_all => return Ok(gone_bytes + self.evict_whole()?),
                    gone => gone_bytes += gone?,
                }
                start = end;
            }
        }
        Ok(gone_bytes)
    }

    fn evict_batch(&self, chunks: Range<u32>) -> Result<u64> {
        let mut evicted = self.evicted();
        let cleared = self.clear(&mut evicted, &chunks)?;
        let (mut gone_bytes, mut failure) = (0, Ok(()));
        for &(number, was_present) in &cleared {
            let chunk = self.index().chunk(number)?;
            let punched = match failure {
                Ok(()) => punch(&evicted, chunk.data_offset, chunk.bytes),
                Err(_) => Err(Errno::CANCELED),
            };
            match punched {
                Ok(()) => gone_bytes += chunk.bytes,
                // Nothing has happened to its bytes.
                Err(errno) => {
                    mark_again(&evicted, number, was_present)?;
                    failure = failure.and(Err(errno));
                }
            }
        }
        failure.map_err(|errno| self.cannot_punch(errno))?;
        Ok(gone_bytes)
    }

    /// Empties the data file of a layer of which nothing is to stay.
    fn evict_whole(&self) -> Result<u64> {
        let mut evicted = self.evicted();
        let cleared = self.clear(&mut evicted, &(0..self.index().chunk_count()))?;
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

    /// Takes the marks away and waits until nobody reads who may have seen them. Answers the chunks that had one,
    /// and whether it was worth something: what a crash made doubtful is not.
    fn clear(&self, evicted: &mut Evicted<'_>, chunks: &Range<u32>) -> Result<Vec<(u32, bool)>> {
        *evicted.keeping += 1;
        evicted.complete.store(false, Ordering::Release);
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

fn punch(evicted: &Evicted<'_>, offset: u64, bytes: u64) -> std::result::Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(evicted.data, flags, offset, bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::digest::Digest;
    use crate::layer::Format;
    use crate::layer::entry::{Entry, Kind};
    use crate::layer::index::{Coding, Summary};
    use crate::layer::index_builder::{IndexBuilder, NewChunk};
    use crate::store::Store;

    const CHUNK_BYTES: u64 = 64 << 10;

    fn content(chunk: u32) -> Vec<u8> {
        vec![chunk as u8 + 1; CHUNK_BYTES as usize]
    }

    /// A store with a layer of one file of so many chunks, all of them there.
    fn world(chunks: u32) -> (tempfile::TempDir, Arc<Store>, Arc<Layer>) {
        let mut builder = IndexBuilder::new(Coding::Stored);
        let size = u64::from(chunks) * CHUNK_BYTES;
        let file = Entry {
            size,
            ..Entry::new("file", Kind::File)
        };
        builder.entry(&file).unwrap();
        for chunk in 0..chunks {
            let new = NewChunk {
                bytes: CHUNK_BYTES,
                blob_offset: u64::from(chunk) * CHUNK_BYTES,
                inner_offset: 0,
                digest: Some(Digest::of(&content(chunk))),
            };
            builder.chunk(new).unwrap();
        }
        let index = builder.finish(Summary::of(Format::Tar, size), size).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let layer = store.add_layer(&Digest::of(b"key"), &index).unwrap();
        (0..chunks).for_each(|chunk| keep(&layer, chunk));
        layer.note_progress();
        (dir, store, layer)
    }

    fn keep(layer: &Layer, chunk: u32) {
        let place = layer.index().chunk(chunk).unwrap().data_offset;
        layer.keep(chunk, place, &content(chunk)).unwrap();
    }

    fn evict(layer: &Layer, chunks: Range<u32>) -> u64 {
        layer.evict(std::slice::from_ref(&chunks)).unwrap()
    }

    fn read(layer: &Layer, chunk: u32) -> Option<Vec<u8>> {
        let place = layer.index().chunk(chunk).unwrap().data_offset;
        layer
            .read(&(chunk..chunk + 1), place, CHUNK_BYTES as usize)
            .unwrap()
    }

    fn blocks(dir: &tempfile::TempDir) -> u64 {
        let layer = dir.path().join("layers").join(Digest::of(b"key").hex());
        std::fs::metadata(layer.join("data")).unwrap().blocks()
    }

    #[test]
    fn what_is_evicted_is_gone_from_the_disk_and_the_rest_stays() {
        let (dir, _store, layer) = world(16);
        let before = blocks(&dir);
        assert_eq!(layer.evict(&[2..4, 10..11]).unwrap(), 3 * CHUNK_BYTES);
        assert!(!layer.is_complete());
        assert_eq!(blocks(&dir), before - 3 * CHUNK_BYTES / 512);
        for chunk in 0..16 {
            let expected = (!matches!(chunk, 2 | 3 | 10)).then(|| content(chunk));
            assert_eq!(read(&layer, chunk), expected, "chunk {chunk}");
        }
        assert_eq!(evict(&layer, 2..4), 0, "they are gone already");
        keep(&layer, 3);
        assert_eq!(read(&layer, 3), Some(content(3)), "and come again");
    }

    #[test]
    fn a_chunk_that_comes_piece_by_piece_over_an_eviction_is_not_marked() {
        let (_dir, _store, layer) = world(2);
        evict(&layer, 0..1);
        let evictions = layer.evictions();
        layer.write(0, &content(0)).unwrap();
        evict(&layer, 1..2);
        layer.mark_written(0, evictions).unwrap();
        assert_eq!(read(&layer, 0), None);
        layer.write(0, &content(0)).unwrap();
        layer.mark_written(0, layer.evictions()).unwrap();
        assert_eq!(read(&layer, 0), Some(content(0)));
    }

    #[test]
    fn a_restart_does_not_bring_evicted_chunks_back() {
        let (dir, store, layer) = world(4);
        store.close();
        evict(&layer, 1..2);
        drop((layer, store));
        let store = Store::open(dir.path()).unwrap();
        let layer = store.layer(&Digest::of(b"key")).unwrap().unwrap();
        assert_eq!(read(&layer, 1), None);
        assert_eq!(read(&layer, 2), Some(content(2)));
    }

    #[test]
    fn a_layer_is_not_complete_of_which_something_was_evicted() {
        let (_dir, _store, layer) = world(8);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Whoever brings chunks looks after each of them whether it was the last.
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        layer.note_progress();
                    }
                });
            }
            for round in 0..300 {
                let chunk = round % 8;
                evict(&layer, chunk..chunk + 1);
                std::thread::yield_now();
                if layer.is_complete() {
                    over.store(true, Ordering::Relaxed);
                    panic!("complete without chunk {chunk}");
                }
                keep(&layer, chunk);
                layer.note_progress();
            }
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn no_reader_ever_sees_a_hole() {
        let (_dir, _store, layer) = world(8);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        for chunk in 0..8 {
                            let place = layer.index().chunk(chunk).unwrap().data_offset;
                            let chunks = chunk..chunk + 1;
                            let now = layer.read_now(&chunks, place, CHUNK_BYTES as usize);
                            for bytes in [now, read(&layer, chunk)].into_iter().flatten() {
                                assert!(bytes == content(chunk), "a hole in chunk {chunk}");
                            }
                        }
                    }
                });
            }
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    (0..8)
                        .filter(|&chunk| !layer.is_present(chunk))
                        .for_each(|chunk| keep(&layer, chunk));
                }
            });
            for round in 0..200 {
                let chunk = round % 8;
                evict(&layer, chunk..chunk + 1);
            }
            over.store(true, Ordering::Relaxed);
        });
    }
}
