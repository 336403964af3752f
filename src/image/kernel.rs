//! Merged trees in the form that the kernel mounts by itself: EROFS images of metadata only, written once and kept in the
//! store, and the layers whose data files are their devices.

use std::fs::File;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::fetch::device::DeviceAt;
use crate::image::erofs;
use crate::image::images::{Images, Rootfs};
use crate::image::reads::LayerReads;
use crate::image::tree::Tree;
use crate::store::Store;
use crate::store::layer::Layer;
use crate::store::mapped::Mapped;

/// What the kernel needs to serve a merged tree.
#[derive(Debug)]
pub struct KernelImage {
    /// The EROFS image, open for reading, verified when it was opened.
    pub file: File,
    /// Its layers, base first, each of which is two devices ([`erofs::write`]). Behind them is a device of one block that is
    /// never read: who shows it learns when the kernel is done with the image.
    pub layers: Vec<DeviceAt>,
    /// For each of these the record of what is read of it.
    pub reads: Vec<Option<LayerReads>>,
}

/// An image that was opened, with the layers whose indexes it says the places of. Whoever asks for it while they are held
/// has the same ones: the store opens no layer twice.
#[derive(Debug)]
pub(super) struct Opened {
    file: File,
    _layers: Vec<Arc<Layer>>,
}

impl Images {
    /// The EROFS image of a merged tree: from the store, or written now.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tree that EROFS cannot express; what keeps one of the layers from being opened;
    /// [`Error::Io`] where the disk does not take it; [`Error::Malformed`] for a damaged tree or index.
    pub async fn kernel_image(self: &Arc<Self>, rootfs: &Arc<Rootfs>) -> Result<KernelImage> {
        let devices = rootfs.devices(self.fetcher()).await?;
        let (store, of) = (Arc::clone(self.fetcher().store()), Arc::clone(rootfs));
        let layers: Vec<Arc<Layer>> = devices.iter().map(|at| Arc::clone(&at.layer)).collect();
        let runtime = self.fetcher().runtime().clone();
        let open = move || {
            let file = open_or_write(&store, of.name(), of.tree(), of.key(), &layers)?;
            Ok(Arc::new(Opened {
                file,
                _layers: layers,
            }))
        };
        let open = async move { blocking(&runtime, open).await };
        let opened = self
            .kernel_images()
            .run(self.fetcher().runtime(), *rootfs.key(), open);
        let file = opened.await?.file.try_clone();
        Ok(KernelImage {
            file: file.map_err(|e| Error::io(rootfs.name(), &e))?,
            reads: (0..devices.len())
                .map(|number| rootfs.layer_reads(number))
                .collect(),
            layers: devices,
        })
    }
}

/// The image in the store if it is whole and of this tree and these indexes, else a new one in its place. `name` is for
/// messages.
fn open_or_write(
    store: &Store,
    name: &str,
    tree: &Tree<Mapped>,
    key: &Digest,
    layers: &[Arc<Layer>],
) -> Result<File> {
    let indexes: Vec<_> = layers.iter().map(|layer| layer.index()).collect();
    let identity = erofs::identity(tree, &indexes, key);
    if let Some(mut file) = store.kernel_image(key)? {
        match erofs::verify(&mut file, &identity) {
            Ok(()) => return Ok(file),
            Err(error) => tracing::warn!(image = name, %error, "a kernel image is written anew"),
        }
    }
    store.put_kernel_image(key, |file| {
        erofs::write(tree, &indexes, key, file)?;
        // Zeros may have been read in place of what is gone from the disk.
        for index in &indexes {
            index.source().vouch("layer index", ())?;
        }
        tree.source().vouch(name, ())
    })
}

#[cfg(test)]
mod tests;
