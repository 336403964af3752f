//! Verified chunks that the disk would not take: kept in memory for the moment, so that a full disk slows reads down but
//! does not fail them.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::digest::Digest;
use crate::error::Result;
use crate::fetch::file::Span;
use crate::store::layer::Layer;

/// Memory for such chunks. One larger than this cannot be served from a full disk.
pub(super) const OVERFLOW_BYTES_MAX: usize = 64 << 20;
/// Bound on their number.
const OVERFLOW_CHUNKS_MAX: usize = 8192;

/// For how long a disk that refused a chunk is taken to be full: room may have been made since.
const REFUSAL_MEMORY: Duration = Duration::from_secs(60);

/// A chunk: the layer, what its index is known by, and the number in that.
type Key = (Digest, u32, u32);

fn key(layer: &Layer, chunk: u32) -> Key {
    (*layer.key(), layer.index_id(), chunk)
}

/// The chunks, least recently used first to go.
#[derive(Debug)]
pub(super) struct Overflow(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    chunks: LruCache<Key, Bytes>,
    bytes: usize,
    /// When the last one came.
    refused_at: Option<Instant>,
}

impl Default for Overflow {
    fn default() -> Self {
        let chunks = LruCache::new(NonZeroUsize::MIN.saturating_add(OVERFLOW_CHUNKS_MAX - 1));
        Self(Mutex::new(Kept {
            chunks,
            bytes: 0,
            refused_at: None,
        }))
    }
}

impl Overflow {
    /// Keeps a chunk. Answers whether it is the first one here.
    pub(super) fn put(&self, layer: &Layer, chunk: u32, bytes: Bytes) -> bool {
        let mut kept = self.0.lock();
        let is_first = kept.chunks.is_empty();
        kept.refused_at = Some(Instant::now());
        kept.bytes += bytes.len();
        if let Some((_, old)) = kept.chunks.push(key(layer, chunk), bytes) {
            kept.bytes -= old.len();
        }
        while kept.bytes > OVERFLOW_BYTES_MAX {
            let Some((_, oldest)) = kept.chunks.pop_lru() else {
                break;
            };
            kept.bytes -= oldest.len();
        }
        is_first
    }

    /// Whether a chunk is kept here. It counts as used then.
    pub(super) fn has(&self, layer: &Layer, chunk: u32) -> bool {
        self.0.lock().chunks.get(&key(layer, chunk)).is_some()
    }

    /// Whether the disk has refused a chunk lately.
    pub(super) fn is_in_use(&self) -> bool {
        let refused_at = self.0.lock().refused_at;
        refused_at.is_some_and(|at| at.elapsed() < REFUSAL_MEMORY)
    }

    /// Puts a span together from chunks kept here and, for the others, from the store. `None` if one is in neither, or
    /// all are in the store (which then serves it in one piece).
    pub(super) fn assemble(&self, layer: &Layer, span: &Span) -> Result<Option<Vec<u8>>> {
        if layer.all_present(span.chunks.clone()) {
            return Ok(None);
        }
        let end = span.data_offset + span.len as u64;
        // What no chunk covers is a hole.
        let mut bytes = vec![0; span.len];
        for number in span.chunks.clone() {
            let chunk = layer.index().chunk(number)?;
            let from = span.data_offset.max(chunk.data_offset);
            let to = end.min(chunk.data_offset.saturating_add(chunk.bytes));
            let Some(len) = to.checked_sub(from).map(|len| len as usize) else {
                continue;
            };
            let here = self.0.lock().chunks.get(&key(layer, number)).cloned();
            let start = (from - chunk.data_offset) as usize;
            let piece = match here.as_ref().and_then(|kept| kept.get(start..start + len)) {
                Some(piece) => Some(piece.to_vec()),
                None => layer.read(&(number..number + 1), from, len)?,
            };
            let Some(piece) = piece else { return Ok(None) };
            let at = (from - span.data_offset) as usize;
            if let Some(place) = bytes.get_mut(at..at + len) {
                place.copy_from_slice(&piece);
            }
        }
        Ok(Some(bytes))
    }
}

#[cfg(test)]
mod tests;
