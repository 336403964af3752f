//! A layer's data file as a block device, of which the kernel reads ranges that know nothing of files.
//!
//! What is missing in a range is fetched, verified and stored like in any read of a file; what lies between files, in
//! holes and in the padding at the end is zeros, without a fetch.

use std::sync::Arc;

use crate::error::{Error, Result};
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
}

impl Fetcher {
    /// Bytes `offset..offset + len` of a device, cut at its end, if they are here and need no disk wait.
    pub fn read_device_now(self: &Arc<Self>, at: &DeviceAt, offset: u64, len: usize) -> Option<Vec<u8>> {
        let _ = (at, offset, len);
        None
    }

    /// Bytes `offset..offset + len` of a device, cut at its end.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub async fn read_device(self: &Arc<Self>, at: &DeviceAt, offset: u64, len: usize) -> Result<Vec<u8>> {
        let _ = (offset, len);
        Err(Error::unsupported(at.source.name(), "devices cannot be read yet"))
    }
}
