//! A layer's data file as a block device, of which the kernel reads ranges that know nothing of files.
//!
//! What is missing in a range is fetched, verified and stored like in any read of a file; what lies between files, in
//! holes and in the padding at the end is zeros, without a fetch.
//!
//! Nothing in a request says which part of it a program waits for, and which the kernel reads ahead. So nothing here tries
//! to guess:
//!
//! - *All of a range is answered at once, by as few requests as there can be.* A short answer would cut the file
//!   (a fact of FUSE), and files that are neighbours in the data file are neighbours in the blob, so what is missing of a
//!   range is nearly always one ranged request. A stranger's chunk in it costs its own bytes, not a round trip.
//! - *The kernel's window is what bounds the strangers.* On the device of small files it reads ahead only behind pages that it
//!   has, so a small file at a new place (`cat small`) is a request of just its blocks. Where it goes on (`tar`), the window
//!   grows up to the device's read-ahead, which is chosen where the device is mounted. Up to
//!   [`readahead::WINDOW_BYTES_MIN`] it brings nothing along that our own read-ahead would not have brought: this follows
//!   devices as it follows files, by places in the blob.
//! - *Large files have no strangers.* They are on a device of their own, of which the kernel reads what it needs of a file,
//!   read-ahead included, and nothing beyond its end.
//! - *A stranger that fails does not fail its neighbour.* The kernel repeats a failed read-ahead block by block for the
//!   pages that are wanted, and files share no block.
//!
//! [`readahead::WINDOW_BYTES_MIN`]: crate::fetch::readahead::WINDOW_BYTES_MIN

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fetch::file::Span;
use crate::fetch::read::Reader;
use crate::fetch::{Fetcher, Source};
use crate::layer::index::DATA_ALIGN_BYTES;
use crate::store::layer::Layer;

/// A layer whose data is to be read.
#[derive(Debug, Clone)]
pub struct DeviceAt {
    /// Where the layer is to be had.
    pub source: Arc<Source>,
    /// The layer.
    pub layer: Arc<Layer>,
}

impl DeviceAt {
    /// The device's size in bytes: that of the layer's data file, and a block where that is empty.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.layer.index().summary().data_bytes.max(DATA_ALIGN_BYTES)
    }

    /// The place of bytes `offset..offset + len`, cut at the end of the device; `None` where nothing is left.
    fn span(&self, offset: u64, len: usize) -> Result<Option<Span>> {
        let end = offset.saturating_add(len as u64).min(self.bytes());
        if offset >= end {
            return Ok(None);
        }
        let chunks = self.layer.chunks_in(offset..end)?;
        let chunks = self.layer.index().source().vouch("layer index", chunks)?;
        Ok(Some(Span {
            chunks,
            data_offset: offset,
            len: (end - offset) as usize,
        }))
    }
}

impl Fetcher {
    /// Bytes `offset..offset + len` of a device, cut at its end, if they are here and need no disk wait.
    pub fn read_device_now(self: &Arc<Self>, at: &DeviceAt, offset: u64, len: usize) -> Option<Vec<u8>> {
        match at.span(offset, len).ok()? {
            Some(span) => self.read_span_now(&at.source, &at.layer, &span),
            None => Some(Vec::new()),
        }
    }

    /// Bytes `offset..offset + len` of a device, cut at its end.
    ///
    /// # Errors
    /// As [`Self::read`], naming a file that could not be had: nobody else knows which files lie in a range.
    pub async fn read_device(self: &Arc<Self>, at: &DeviceAt, offset: u64, len: usize) -> Result<Vec<u8>> {
        let Some(span) = at.span(offset, len)? else {
            return Ok(Vec::new());
        };
        let bytes = self.read_span(Reader::Lazy, &at.source, &at.layer, &span).await;
        bytes.map_err(|error| self.name_file(error, at, &span))
    }

    /// Says in an error which file of the layer it befell: the first one of the span of which something just failed, else
    /// the first one of which something is missing.
    fn name_file(&self, error: Error, at: &DeviceAt, span: &Span) -> Error {
        let index = at.layer.index();
        let missing = |number: &u32| !at.layer.is_present(*number) && !self.overflow.has(&at.layer, *number);
        let has_failed = |&number: &u32| {
            let member = index.chunk(number).map(|chunk| chunk.member);
            member.is_ok_and(|member| self.recent_failure(&at.source, &[member]).is_err())
        };
        let culprit = span
            .chunks
            .clone()
            .filter(missing)
            .find(has_failed)
            .or_else(|| span.chunks.clone().find(missing));
        let path = culprit.and_then(|number| {
            let entry = index.entry(index.chunk(number).ok()?.entry).ok()?;
            Some(String::from_utf8_lossy(entry.path).into_owned())
        });
        match path {
            Some(path) => error.of_part(&format!("file {path:?}")),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests;
