//! What `index export` and `index import` ask of images: the indexes of plain layers, for other machines, as records of
//! [`crate::layer::exchange`].

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::image::images::Images;
use crate::image::platform::Platform;
use crate::layer::exchange;
use crate::registry::reference::Reference;
use crate::store::layer::Layer;

/// Largest file with indexes in bytes: it is held while it is looked at.
pub const FILE_BYTES_MAX: u64 = 2 << 30;

/// A layer whose index is handed on.
#[derive(Debug)]
pub struct Exported {
    runtime: Handle,
    digest: Digest,
    layer: Arc<Layer>,
}

impl Exported {
    /// The record.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index.
    pub async fn record(self) -> Result<Vec<u8>> {
        let Self {
            runtime,
            digest,
            layer,
        } = self;
        blocking(&runtime, move || {
            let index = layer.index().source();
            index.vouch("layer index", exchange::pack(&digest, index)?)
        })
        .await
    }
}

/// What came of an import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// The layers whose indexes are new.
    pub imported: Vec<Digest>,
    /// The layers that were known already.
    pub known: Vec<Digest>,
}

impl Images {
    /// The plain layers of an image, each once. Those that are not indexed yet are read now.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it has none; what keeps a layer from being read.
    pub async fn export_indexes(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<Vec<Exported>> {
        let image = self.chosen(reference, platform).await?;
        self.rootfs(&image).await?;
        let mut exported: Vec<Exported> = Vec::new();
        for source in image.sources() {
            let source = self.fetcher().settle(source).await?;
            let digest = source.descriptor.digest;
            let is_known = exported.iter().any(|known| known.digest == digest);
            if source.is_plain() && !is_known {
                let layer = self.fetcher().layer_as_it_is(&source).await?;
                let runtime = self.fetcher().runtime().clone();
                exported.push(Exported {
                    runtime,
                    digest,
                    layer,
                });
            }
        }
        if exported.is_empty() {
            let why = "none of its layers is plain: their own tables of contents are as good as an index";
            return Err(Error::not_found(format!("indexes of {reference}"), why));
        }
        Ok(exported)
    }

    /// Takes the indexes in a file that a command has handed over ([`crate::store::Store::incoming`]): all of them, or
    /// none if one is wrong.
    ///
    /// # Errors
    /// As [`exchange::unpack`]; [`Error::Io`].
    pub async fn import_indexes(self: &Arc<Self>, file: PathBuf) -> Result<Imported> {
        let store = Arc::clone(self.fetcher().store());
        let runtime = self.fetcher().runtime();
        let read = move || {
            let bytes = Bytes::from(store.take_incoming(&file, FILE_BYTES_MAX)?);
            let mut rest = bytes.as_ref();
            // At least one: an empty file is none. They are unpacked once more below, because together they may be much
            // larger than the file.
            exchange::unpack(&mut rest)?;
            while !rest.is_empty() {
                exchange::unpack(&mut rest)?;
            }
            Ok(bytes)
        };
        let mut bytes = blocking(runtime, read).await?;
        let (mut imported, mut known) = (Vec::new(), Vec::new());
        while !bytes.is_empty() {
            let unpack = move || {
                let mut rest = bytes.as_ref();
                let exchanged = exchange::unpack(&mut rest)?;
                let taken = bytes.len() - rest.len();
                Ok((exchanged, bytes.slice(taken..)))
            };
            let (exchanged, rest) = blocking(runtime, unpack).await?;
            bytes = rest;
            let layer = exchanged.layer;
            match self.fetcher().adopt_index(exchanged).await? {
                true => imported.push(layer),
                false => known.push(layer),
            }
        }
        Ok(Imported { imported, known })
    }
}
