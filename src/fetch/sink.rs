//! Where decoded chunks go: into the store once they are verified, or, the disk being full, into memory.
//!
//! Chunks come in the order of the blob, which mostly is that of the data file. So small ones are collected to a *run* of
//! neighbours that is written at once: each write takes the file's lock, for which all threads that decode the layer wait,
//! and the kernel gives larger folios to longer writes. Long chunks go to their place piece by piece, as they are decoded: to
//! collect one first takes memory that the kernel has to clear, and when it is complete, the processor's cache has lost its
//! beginning.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::fetch::Fetcher;
use crate::fetch::overflow::OVERFLOW_BYTES_MAX;
use crate::layer::ChunkSink;
use crate::layer::index::{Chunk, DATA_ALIGN_BYTES};
use crate::store::layer::Layer;

/// A longer chunk goes to its place on the disk while it is decoded instead of being collected.
const COLLECTED_CHUNK_BYTES_MAX: u64 = 256 << 10;
/// A run is not made longer than this by another chunk: it is to stay in the processor's cache until it is written.
const RUN_BYTES_MAX: usize = 512 << 10;

/// Puts verified chunks into the store. What is verified is there only after [`StoreSink::flush`].
pub(super) struct StoreSink<'a> {
    fetcher: &'a Arc<Fetcher>,
    layer: &'a Arc<Layer>,
    /// The chunks being received: more than one where the index names the same bytes several times.
    receiving: Vec<Receiving>,
    run: Run,
}

/// Chunks with consecutive numbers that lie one behind the other, less than a block apart.
#[derive(Default)]
struct Run {
    /// Place of its first byte in the data file.
    start: u64,
    /// The content of the chunks, zeros between them, and behind them what has come of one that is being received.
    bytes: Vec<u8>,
    /// The numbers of the chunks that are verified.
    chunks: Range<u32>,
    /// Where the last of these ends in `bytes`.
    end: usize,
    /// Where in `bytes` another one begins that is being received.
    open_at: Option<usize>,
}

impl Run {
    /// Begins to receive a chunk behind the others. Answers whether it belongs there.
    fn open(&mut self, number: u32, chunk: &Chunk) -> bool {
        if self.open_at.is_some() {
            return false;
        }
        if self.chunks.is_empty() {
            (self.start, self.end, self.open_at) = (chunk.data_offset, 0, Some(0));
            self.chunks = number..number;
            self.bytes.clear();
            return true;
        }
        let end = self.start.saturating_add(self.end as u64);
        let gap = chunk.data_offset.checked_sub(end);
        let bytes = |gap: u64| self.end as u64 + gap + chunk.bytes;
        let Some(gap) = gap.filter(|&gap| gap < DATA_ALIGN_BYTES && bytes(gap) <= RUN_BYTES_MAX as u64)
        else {
            return false;
        };
        // Between neighbours by number lies no other chunk, only a hole or the padding of a file.
        if number != self.chunks.end {
            return false;
        }
        self.bytes.truncate(self.end);
        self.bytes.resize(self.end + gap as usize, 0);
        self.open_at = Some(self.bytes.len());
        true
    }

    /// All of the chunk that is being received has come, and is verified.
    fn close(&mut self) {
        self.chunks.end = self.chunks.end.saturating_add(1);
        (self.end, self.open_at) = (self.bytes.len(), None);
    }

    /// Forgets the chunk that is being received.
    fn give_up(&mut self) {
        self.bytes.truncate(self.end);
        self.open_at = None;
    }

    /// Forgets the chunks that are verified.
    fn pass(&mut self) {
        let open_at = self.open_at.unwrap_or(self.bytes.len());
        self.bytes.drain(..open_at);
        self.start = self.start.saturating_add(open_at as u64);
        (self.chunks, self.end) = (self.chunks.end..self.chunks.end, 0);
        self.open_at = self.open_at.map(|_| 0);
    }
}

/// A chunk being received.
struct Receiving {
    number: u32,
    chunk: Chunk,
    state: State,
}

/// What becomes of a chunk's bytes.
enum State {
    /// They are collected at the end of the run until they are verified.
    InRun,
    /// They are collected apart until they are verified.
    Collected(Vec<u8>),
    /// They are written to their place and count once they are verified.
    Written {
        /// So many up to now.
        bytes: u64,
        /// [`Layer::evictions`] before the first.
        evictions: u64,
    },
    /// They are there already. Writing them again would put unverified bytes in the place of verified ones.
    Present,
}

impl<'a> StoreSink<'a> {
    /// A sink that collects in `room`, whatever is in it.
    pub(super) fn new(fetcher: &'a Arc<Fetcher>, layer: &'a Arc<Layer>, room: Vec<u8>) -> Self {
        Self {
            fetcher,
            layer,
            receiving: Vec::new(),
            run: Run {
                bytes: room,
                ..Run::default()
            },
        }
    }

    /// Forgets what came of chunks that were not verified: the next one is of another member.
    pub(super) fn end_member(&mut self) {
        self.receiving.clear();
        self.run.give_up();
    }

    /// Puts into the store what is verified. Readers find it there when this returns.
    pub(super) fn flush(&mut self) {
        let run = &mut self.run;
        let chunks = run.chunks.clone();
        let content = run.bytes.get(..run.end).unwrap_or_default();
        if !chunks.is_empty()
            && let Err(error) = self.layer.keep(chunks.clone(), run.start, content)
        {
            // A full or broken disk must not fail the read.
            for number in chunks {
                let Ok(chunk) = self.layer.index().chunk(number) else {
                    continue;
                };
                let at = chunk.data_offset.saturating_sub(run.start) as usize;
                let bytes = content.get(at..at.saturating_add(chunk.bytes as usize));
                let bytes = Bytes::copy_from_slice(bytes.unwrap_or_default());
                self.fetcher.keep_in_memory(self.layer, number, bytes, &error);
            }
        }
        run.pass();
        self.layer.note_progress();
    }

    /// The memory to collect in. What was not flushed is lost.
    pub(super) fn into_room(self) -> Vec<u8> {
        self.run.bytes
    }

    /// Where in `receiving` a chunk stands. Its first piece brings it there.
    fn receiving(&mut self, number: u32) -> Result<usize> {
        if let Some(known) = self.position(number) {
            return Ok(known);
        }
        let index = self.layer.index();
        let chunk = index.source().vouch("layer index", index.chunk(number)?)?;
        let state = self.begin(number, &chunk);
        self.receiving.push(Receiving { number, chunk, state });
        Ok(self.receiving.len() - 1)
    }

    fn position(&self, number: u32) -> Option<usize> {
        let is_it = |receiving: &Receiving| receiving.number == number;
        self.receiving.iter().position(is_it)
    }

    /// What is to become of a chunk.
    fn begin(&mut self, number: u32, chunk: &Chunk) -> State {
        // What a crash made doubtful is looked at here: a reader who did it meanwhile would mark what is written over.
        if self.layer.verify_suspect(number).unwrap_or(false) {
            return State::Present;
        }
        if chunk.bytes > COLLECTED_CHUNK_BYTES_MAX {
            return State::Written {
                bytes: 0,
                evictions: self.layer.evictions(),
            };
        }
        if self.run.open(number, chunk) {
            return State::InRun;
        }
        if self.run.open_at.is_none() {
            self.flush();
            if self.run.open(number, chunk) {
                return State::InRun;
            }
        }
        State::Collected(Vec::with_capacity(chunk.bytes as usize))
    }
}

impl ChunkSink for StoreSink<'_> {
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let layer = self.layer;
        let position = self.receiving(chunk)?;
        let Some(receiving) = self.receiving.get_mut(position) else {
            return Err(Error::malformed("chunk", "none is being received"));
        };
        match &mut receiving.state {
            State::Present => {}
            State::InRun => self.run.bytes.extend_from_slice(bytes),
            State::Collected(collected) => collected.extend_from_slice(bytes),
            State::Written {
                bytes: written,
                evictions,
            } => {
                let place = receiving.chunk.data_offset;
                match layer.write(place.saturating_add(offset), bytes) {
                    Ok(()) => *written += bytes.len() as u64,
                    Err(error) if receiving.chunk.bytes > OVERFLOW_BYTES_MAX as u64 => return Err(error),
                    Err(error) => {
                        // The disk is full: the rest is collected, and what it took is read back, if it is all there still.
                        let taken = layer.read_back(place, *written as usize, *evictions)?;
                        let mut collected = taken.ok_or(error)?;
                        collected.extend_from_slice(bytes);
                        receiving.state = State::Collected(collected);
                    }
                }
            }
        }
        Ok(())
    }

    fn verified(&mut self, chunk: u32) -> Result<()> {
        let Some(position) = self.position(chunk) else {
            return Err(Error::malformed("chunk", "verified without having been received"));
        };
        let received = self.receiving.swap_remove(position);
        let counters = &self.fetcher.counters;
        counters.chunks_decoded.fetch_add(1, Ordering::Relaxed);
        counters
            .decoded_bytes
            .fetch_add(received.chunk.bytes, Ordering::Relaxed);
        match received.state {
            State::Present => Ok(()),
            State::InRun => {
                self.run.close();
                Ok(())
            }
            State::Written { evictions, .. } => self.layer.mark_written(chunk, evictions),
            State::Collected(collected) => {
                let place = received.chunk.data_offset;
                let number = chunk..chunk.saturating_add(1);
                if let Err(error) = self.layer.keep(number, place, &collected) {
                    // A full or broken disk must not fail the read.
                    self.fetcher
                        .keep_in_memory(self.layer, chunk, Bytes::from(collected), &error);
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::layer::Format;
    use crate::layer::entry::{Entry, Kind};
    use crate::layer::index::{Coding, Summary};
    use crate::layer::index_builder::{IndexBuilder, NewChunk};
    use crate::registry::{Client, ClientOptions};
    use crate::store::Store;

    /// A store with a layer of files whose only chunks stand at these places of one member.
    struct World {
        _dir: tempfile::TempDir,
        runtime: tokio::runtime::Runtime,
        fetcher: Arc<Fetcher>,
        layer: Arc<Layer>,
    }

    fn world(chunks: &[(u64, &[u8])]) -> World {
        let mut builder = IndexBuilder::new(Coding::Gzip);
        for (number, (inner_offset, bytes)) in chunks.iter().enumerate() {
            let size = bytes.len() as u64;
            builder
                .entry(&Entry {
                    size,
                    ..Entry::new(number.to_string(), Kind::File)
                })
                .unwrap();
            let (inner_offset, digest) = (*inner_offset, Some(Digest::of(bytes)));
            builder
                .chunk(NewChunk {
                    bytes: size,
                    blob_offset: 10,
                    inner_offset,
                    digest,
                })
                .unwrap();
        }
        let summary = Summary {
            toc_start: 900,
            toc_end: 1000,
            toc_bytes: 1,
            ..Summary::of(Format::Estargz, 1000)
        };
        let index = builder.finish(summary, 900).unwrap().to_vec();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.add_layer(&Digest::of(b"key"), &index).unwrap();
        drop(store);
        open(dir, tokio::runtime::Runtime::new().unwrap())
    }

    /// The world of a store that has the layer.
    fn open(dir: tempfile::TempDir, runtime: tokio::runtime::Runtime) -> World {
        let store = Store::open(dir.path()).unwrap();
        let layer = store.layer(&Digest::of(b"key")).unwrap().unwrap();
        let client = Client::new(ClientOptions::default()).unwrap();
        let fetcher = Fetcher::new(
            client,
            store,
            runtime.handle().clone(),
            crate::fetch::FetchOptions::default(),
        );
        World {
            _dir: dir,
            runtime,
            fetcher,
            layer,
        }
    }

    impl World {
        fn content(&self, chunk: u32) -> Option<Vec<u8>> {
            let _entered = self.runtime.enter();
            let record = self.layer.index().chunk(chunk).unwrap();
            self.layer
                .read(&(chunk..chunk + 1), record.data_offset, record.bytes as usize)
                .unwrap()
        }
    }

    #[test]
    fn chunks_that_are_the_same_bytes_are_received_side_by_side() {
        let world = world(&[(0, b"same"), (0, b"same"), (4, b"next")]);
        let mut sink = StoreSink::new(&world.fetcher, &world.layer, Vec::new());
        for (offset, piece) in [(0, &b"sa"[..]), (2, b"me")] {
            sink.piece(0, offset, piece).unwrap();
            sink.piece(1, offset, piece).unwrap();
        }
        sink.verified(0).unwrap();
        sink.verified(1).unwrap();
        sink.flush();
        assert_eq!(world.content(0).unwrap(), b"same");
        assert_eq!(world.content(1).unwrap(), b"same");
        assert_eq!(world.content(2), None);
    }

    #[test]
    fn what_is_verified_is_never_written_over() {
        let large = vec![7; COLLECTED_CHUNK_BYTES_MAX as usize + 1];
        let world = world(&[(0, &large)]);
        let mut sink = StoreSink::new(&world.fetcher, &world.layer, Vec::new());
        sink.piece(0, 0, &large).unwrap();
        assert_eq!(world.content(0), None, "written is not verified");
        sink.verified(0).unwrap();
        // The same member comes once more, with other bytes, and is never verified.
        let mut again = StoreSink::new(&world.fetcher, &world.layer, Vec::new());
        again.piece(0, 0, &vec![8; large.len()]).unwrap();
        assert!(world.content(0).unwrap() == large);
    }

    #[test]
    fn what_survived_a_crash_is_not_written_over_either() {
        let large = vec![7; COLLECTED_CHUNK_BYTES_MAX as usize + 1];
        let World {
            _dir: dir,
            runtime,
            fetcher,
            layer,
        } = world(&[(0, &large)]);
        let mut sink = StoreSink::new(&fetcher, &layer, Vec::new());
        sink.piece(0, 0, &large).unwrap();
        sink.verified(0).unwrap();
        let map = dir.path().join("layers").join(layer.key().hex()).join("map");
        drop((fetcher, layer));
        let map = std::fs::File::options().write(true).open(map).unwrap();
        // Another boot's.
        std::os::unix::fs::FileExt::write_all_at(&map, &[9; 16], 24).unwrap();
        let world = open(dir, runtime);
        assert!(world.layer.is_suspect(0));
        let mut sink = StoreSink::new(&world.fetcher, &world.layer, Vec::new());
        sink.piece(0, 0, &large[..9]).unwrap();
        // Somebody reads it while it comes once more, with other bytes.
        assert!(world.layer.verify_suspect(0).unwrap());
        sink.piece(0, 9, &vec![8; large.len() - 9]).unwrap();
        assert!(world.content(0).unwrap() == large);
    }

    #[test]
    fn nothing_is_verified_that_was_not_received() {
        let world = world(&[(0, b"same")]);
        assert!(
            StoreSink::new(&world.fetcher, &world.layer, Vec::new())
                .verified(0)
                .is_err()
        );
    }

    proptest::proptest! {
        #![proptest_config(proptest::test_runner::Config::with_cases(24))]
        #[test]
        fn what_is_verified_is_in_its_place_after_a_flush_and_nothing_else_is(
            chunks in proptest::collection::vec(
                (0..4_u8, 1..20_000_usize, proptest::bool::weighted(0.8), proptest::bool::weighted(0.1)),
                1..40,
            ),
            piece_bytes in 1..100_000_usize,
        ) {
            let contents: Vec<Vec<u8>> = chunks
                .iter()
                .enumerate()
                // Some are long enough to be written piece by piece.
                .map(|(number, &(kind, bytes, ..))| vec![number as u8 + 1; bytes + 600_000 * usize::from(kind == 3)])
                .collect();
            let mut inner_offset = 0;
            let places: Vec<(u64, &[u8])> = contents
                .iter()
                .map(|content| {
                    inner_offset += content.len() as u64;
                    (inner_offset - content.len() as u64, content.as_slice())
                })
                .collect();
            let world = world(&places);
            let mut sink = StoreSink::new(&world.fetcher, &world.layer, vec![0xee; 77]);
            for (number, &(_, _, is_good, is_flushed)) in chunks.iter().enumerate() {
                let content = &contents[number];
                // What fails comes with other bytes, and not all of them.
                let (end, xor) = if is_good { (content.len(), 0) } else { (content.len() / 2, 0x80) };
                for (at, piece) in content[..end].chunks(piece_bytes).enumerate() {
                    let piece: Vec<u8> = piece.iter().map(|byte| byte ^ xor).collect();
                    sink.piece(number as u32, (at * piece_bytes) as u64, &piece).unwrap();
                    if is_flushed {
                        sink.flush();
                    }
                }
                if is_good {
                    sink.verified(number as u32).unwrap();
                }
                sink.end_member();
                if is_flushed {
                    sink.flush();
                    for (number, (content, &(_, _, is_good, _))) in contents.iter().zip(&chunks).enumerate().take(number + 1) {
                        proptest::prop_assert!(world.content(number as u32).as_ref() == is_good.then_some(content));
                    }
                }
            }
            sink.flush();
            for (number, (content, &(_, _, is_good, _))) in contents.iter().zip(&chunks).enumerate() {
                proptest::prop_assert!(world.content(number as u32).as_ref() == is_good.then_some(content));
            }
            let is_complete = chunks.iter().all(|&(_, _, is_good, _)| is_good);
            proptest::prop_assert_eq!(world.layer.is_complete(), is_complete);
        }
    }
}
