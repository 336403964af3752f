//! Where decoded chunks go: into the store once they are verified, or, the disk being full, into memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::fetch::Fetcher;
use crate::fetch::overflow::OVERFLOW_BYTES_MAX;
use crate::layer::ChunkSink;
use crate::layer::index::Chunk;
use crate::store::layer::Layer;

/// A longer chunk goes to its place on the disk while it is decoded instead of being collected.
const COLLECTED_CHUNK_BYTES_MAX: u64 = 8 << 20;

/// Puts verified chunks into the store.
pub(super) struct StoreSink<'a> {
    fetcher: &'a Arc<Fetcher>,
    layer: &'a Arc<Layer>,
    /// The chunks being received: more than one where the index names the same bytes several times.
    receiving: Vec<Receiving>,
}

/// A chunk being received.
struct Receiving {
    number: u32,
    chunk: Chunk,
    state: State,
}

/// What becomes of a chunk's bytes.
enum State {
    /// They are collected until they are verified.
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
    pub(super) fn new(fetcher: &'a Arc<Fetcher>, layer: &'a Arc<Layer>) -> Self {
        Self {
            fetcher,
            layer,
            receiving: Vec::new(),
        }
    }

    fn receiving(&mut self, number: u32) -> Result<&mut Receiving> {
        let known = self
            .receiving
            .iter()
            .position(|receiving| receiving.number == number);
        let position = match known {
            Some(position) => position,
            None => {
                let index = self.layer.index();
                let chunk = index.source().vouch("layer index", index.chunk(number)?)?;
                let state = match () {
                    () if self.layer.is_present(number) => State::Present,
                    () if chunk.bytes > COLLECTED_CHUNK_BYTES_MAX => State::Written {
                        bytes: 0,
                        evictions: self.layer.evictions(),
                    },
                    () => State::Collected(Vec::with_capacity(chunk.bytes as usize)),
                };
                self.receiving.push(Receiving { number, chunk, state });
                self.receiving.len() - 1
            }
        };
        self.receiving
            .get_mut(position)
            .ok_or_else(|| Error::malformed("chunk", "none is being received"))
    }
}

impl ChunkSink for StoreSink<'_> {
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let layer = self.layer;
        let receiving = self.receiving(chunk)?;
        match &mut receiving.state {
            State::Present => {}
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
        let position = self
            .receiving
            .iter()
            .position(|receiving| receiving.number == chunk);
        let Some(position) = position else {
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
            State::Written { evictions, .. } => self.layer.mark_written(chunk, evictions),
            State::Collected(collected) => {
                let place = received.chunk.data_offset;
                if let Err(error) = self.layer.keep(chunk, place, &collected) {
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
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let layer = store.add_layer(&Digest::of(b"key"), &index).unwrap();
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
        let mut sink = StoreSink::new(&world.fetcher, &world.layer);
        for (offset, piece) in [(0, &b"sa"[..]), (2, b"me")] {
            sink.piece(0, offset, piece).unwrap();
            sink.piece(1, offset, piece).unwrap();
        }
        sink.verified(0).unwrap();
        sink.verified(1).unwrap();
        assert_eq!(world.content(0).unwrap(), b"same");
        assert_eq!(world.content(1).unwrap(), b"same");
        assert_eq!(world.content(2), None);
    }

    #[test]
    fn what_is_verified_is_never_written_over() {
        let large = vec![7; COLLECTED_CHUNK_BYTES_MAX as usize + 1];
        let world = world(&[(0, &large)]);
        let mut sink = StoreSink::new(&world.fetcher, &world.layer);
        sink.piece(0, 0, &large).unwrap();
        assert_eq!(world.content(0), None, "written is not verified");
        sink.verified(0).unwrap();
        // The same member comes once more, with other bytes, and is never verified.
        let mut again = StoreSink::new(&world.fetcher, &world.layer);
        again.piece(0, 0, &vec![8; large.len()]).unwrap();
        assert!(world.content(0).unwrap() == large);
    }

    #[test]
    fn nothing_is_verified_that_was_not_received() {
        let world = world(&[(0, b"same")]);
        assert!(StoreSink::new(&world.fetcher, &world.layer).verified(0).is_err());
    }
}
