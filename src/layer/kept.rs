//! A receiver of chunks for the tests of all decoders: strict about what it is handed, and it keeps only what was verified.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::layer::ChunkSink;

/// Collects pieces, and keeps what was verified.
#[derive(Default)]
pub(super) struct Kept {
    /// Chunks of which pieces came that are not verified.
    pub(super) open: BTreeMap<u32, Vec<u8>>,
    /// Chunks that were verified, each once.
    pub(super) verified: BTreeMap<u32, Vec<u8>>,
}

impl ChunkSink for Kept {
    fn piece(&mut self, chunk: u32, offset: u64, bytes: &[u8]) -> Result<()> {
        let open = self.open.entry(chunk).or_default();
        assert_eq!(open.len() as u64, offset, "pieces follow one another");
        open.extend_from_slice(bytes);
        Ok(())
    }

    fn verified(&mut self, chunk: u32) -> Result<()> {
        let bytes = self.open.remove(&chunk).unwrap();
        assert_eq!(self.verified.insert(chunk, bytes), None);
        Ok(())
    }
}
