//! Merged trees in the form that the kernel mounts by itself: EROFS images of metadata only, written once and kept in the
//! store, and the layers whose data files are their devices.

use std::fs::File;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fetch::device::DeviceAt;
use crate::image::images::{Images, Rootfs};

/// What the kernel needs to serve a merged tree.
#[derive(Debug)]
pub struct KernelImage {
    /// The EROFS image, open for reading, verified when it was opened.
    pub file: File,
    /// Its devices but the last: one a layer, base first. The last one is of one block that is never read: who shows it
    /// learns when the kernel is done with the image.
    pub devices: Vec<DeviceAt>,
}

impl Images {
    /// The EROFS image of a merged tree: from the store, or written now.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tree that EROFS cannot express; what keeps one of the layers from being opened.
    pub async fn kernel_image(self: &Arc<Self>, rootfs: &Arc<Rootfs>) -> Result<KernelImage> {
        Err(Error::unsupported(
            rootfs.name(),
            "no EROFS image can be written yet",
        ))
    }
}
