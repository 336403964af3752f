//! Looking again at what is on the disk: after an unclean restart of the machine at a chunk before it is used, and at all of
//! a layer before the kernel is given its data file.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Layer;
use crate::digest::{Digest, Hasher};
use crate::error::Result;
use crate::layer::index::Chunk;

/// Bytes read at a time.
const VERIFY_PIECE_BYTES: usize = 1 << 20;
/// After so many bytes their copies in the page cache are given up.
const FORGET_BYTES: u64 = 8 << 20;

impl Layer {
    /// Verifies a chunk that was there before an unclean reboot. Returns whether it is present now.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`]; [`crate::error::Error::Malformed`] for a damaged index.
    pub fn verify_suspect(&self, number: u32) -> Result<bool> {
        if !self.map.is_suspect(number) {
            return Ok(self.map.is_present(number));
        }
        let keeping = self.keeping.read();
        let _guard = self.hold(&(number..number + 1));
        let chunk = self.index.chunk(number)?;
        // What has no digest of its own cannot be looked at again, only fetched.
        if chunk.digest.is_some() && Some(self.digest_of(&chunk)?) == chunk.digest {
            self.map.mark(number)?;
            self.look_whether_complete(&keeping);
            return Ok(true);
        }
        tracing::warn!(layer = %self.key, chunk = number, "a chunk did not survive the reboot");
        self.map.drop_suspect(number);
        Ok(false)
    }

    /// Looks at every chunk of a layer of which all are marked. Answers whether all are right, which is then noted; false
    /// also where that cannot be found out, because some have no digest of their own, or `stop` came.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`]; [`crate::error::Error::Malformed`] for a damaged index.
    pub(in crate::store) fn verify_all(&self, stop: &AtomicBool) -> Result<bool> {
        let evictions = self.evictions();
        // What the disk has counts, not what memory still has of it.
        self.forget_all();
        for number in 0..self.index.chunk_count() {
            if self.index.chunk(number)?.digest.is_none() {
                return Ok(false);
            }
        }
        let (mut is_right, mut read_from) = (true, 0);
        for number in 0..self.index.chunk_count() {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            if self.is_suspect(number) {
                is_right &= self.verify_suspect(number)?;
                continue;
            }
            let chunk = self.index.chunk(number)?;
            if Some(self.digest_of(&chunk)?) != chunk.digest {
                self.index.source().vouch("layer index", ())?;
                if !self.refuse(number, evictions)? {
                    return Ok(false);
                }
                is_right = false;
            }
            // Nobody has asked for these bytes.
            let end = chunk.data_offset.saturating_add(chunk.bytes);
            if end.saturating_sub(read_from) >= FORGET_BYTES {
                self.forget(std::iter::once(read_from..end));
                read_from = end;
            }
        }
        let keeping = self.keeping.read();
        if is_right && *keeping == evictions && self.is_complete() {
            self.map.note_verified();
        }
        Ok(self.is_complete() && self.is_verified())
    }

    /// The disk has not taken something that was written, and does not say what: later reads would find there what was
    /// there before. So nothing of the layer stays but what a mount reads now, and that is not lent again unverified.
    pub(in crate::store) fn doubt(&self) {
        let mut keeping = self.keeping.write();
        // A verification under way has looked at what memory had.
        *keeping += 1;
        self.map.note_doubted();
        drop(keeping);
        let everything = 0..self.index.chunk_count();
        if let Err(error) = self.evict(std::slice::from_ref(&everything)) {
            tracing::error!(layer = %self.key, %error, "the disk has lost some of a layer that the kernel reads");
        }
    }

    /// Takes the mark from a chunk that is not what it should be, if nothing was evicted since: then that is why.
    pub(super) fn refuse(&self, chunk: u32, evictions: u64) -> Result<bool> {
        let keeping = self.keeping.write();
        if *keeping != evictions {
            return Ok(false);
        }
        if self.map.is_lent() {
            drop(keeping);
            // Its place cannot be written to: all that is worth keeping gets another file.
            self.evict(std::slice::from_ref(&(chunk..chunk.saturating_add(1))))?;
            return Ok(false);
        }
        tracing::warn!(layer = %self.key, chunk, "a chunk was damaged on the disk");
        self.complete.store(false, Ordering::SeqCst);
        self.map.clear(chunk).map(|_| true)
    }

    fn digest_of(&self, chunk: &Chunk) -> Result<Digest> {
        let (mut hasher, data) = (Hasher::default(), self.data());
        let mut buffer = vec![0; VERIFY_PIECE_BYTES.min(chunk.bytes as usize)];
        let mut at = 0;
        while at < chunk.bytes {
            let len = (chunk.bytes - at).min(VERIFY_PIECE_BYTES as u64) as usize;
            let piece = &mut buffer[..len];
            data.read_exact_at(piece, chunk.data_offset + at)
                .map_err(|e| self.failed(&e))?;
            hasher.update(piece);
            at += len as u64;
        }
        Ok(hasher.finish())
    }
}
