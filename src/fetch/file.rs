//! Files as places in the layers that hold them.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fetch::Source;
use crate::store::layer::Layer;

/// A regular file in a layer.
#[derive(Debug, Clone)]
pub struct FileAt {
    /// Where the layer is to be had.
    pub source: Arc<Source>,
    /// The layer.
    pub layer: Arc<Layer>,
    /// The entry in its index.
    pub entry: u32,
    /// Its size in bytes, as whoever names the entry knows it.
    pub size: u64,
}

/// A piece of a file, as places in the layer.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(super) chunks: Range<u32>,
    pub(super) data_offset: u64,
    pub(super) len: usize,
}

impl FileAt {
    /// The place of bytes `offset..offset + len`, cut at the end of the file; `None` where nothing is left.
    pub(super) fn span(&self, offset: u64, len: usize) -> Result<Option<Span>> {
        let entry = self.layer.index().entry(self.entry)?;
        if entry.size != self.size {
            return Err(Error::malformed(
                self.source.name(),
                "its index is not the one that the image was built from",
            ));
        }
        let end = offset.saturating_add(len as u64).min(entry.size);
        if offset >= end {
            return Ok(None);
        }
        let chunks = self.layer.chunks_of(&entry, offset, end)?;
        let chunks = self.layer.index().source().vouch("layer index", chunks)?;
        let data_offset = entry.data_offset.saturating_add(offset);
        Ok(Some(Span {
            chunks,
            data_offset,
            len: (end - offset) as usize,
        }))
    }

    /// Bytes of the file that are in the store.
    ///
    /// # Errors
    /// `Malformed` for a damaged index.
    pub fn cached_bytes(&self) -> Result<u64> {
        let entry = self.layer.index().entry(self.entry)?;
        self.layer.present_bytes(entry.chunk_range())
    }
}
