//! What `cache evict` asks of images: that their files leave the cache. What is known of them (manifests, indexes, trees)
//! stays, so that a file comes again with one request.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::fetch::in_order::by_layer;
use crate::image::copy::select;
use crate::image::images::Images;
use crate::image::platform::Platform;
use crate::registry::reference::Reference;

/// What went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    /// The image by its digest.
    pub reference: String,
    /// Why the tag could not be checked, where that is so and this is its last known image.
    pub stale: Option<String>,
    /// The patterns that matched nothing, and why.
    pub unmatched: Vec<Error>,
    /// Bytes of files' contents that left the cache. Other images with the same layers miss them too.
    pub evicted_bytes: u64,
}

impl Images {
    /// Takes an image, or what patterns select of it, out of the cache.
    ///
    /// # Errors
    /// [`Error::NotFound`] for patterns in an image that is not known yet: finding out what they mean would fill the cache;
    /// [`Error::Usage`] for a pattern; those of [`crate::store::layer::Layer::evict`].
    pub async fn evict(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        patterns: &[Vec<u8>],
    ) -> Result<Evicted> {
        let (digest, stale) = self.digest(reference).await?;
        let image = self.image(&reference.repository, &digest, platform).await?;
        let mut layers = Vec::new();
        for source in image.sources() {
            if let Some(layer) = self.fetcher().stored_layer(source).await? {
                let chunks = 0..layer.index().chunk_count();
                layers.push((Arc::clone(source), layer, vec![chunks]));
            }
        }
        let mut unmatched = Vec::new();
        if !patterns.is_empty() {
            if layers.len() < image.sources().len() {
                let why = "it has not been opened yet, so no file of it can be evicted";
                return Err(Error::not_found(reference.to_string(), why));
            }
            let rootfs = self.rootfs(&image).await?;
            let (selection, nothing, _) = select(&rootfs, patterns)?;
            layers = by_layer(&self.selected_files(&rootfs, &selection).await?)?;
            unmatched = nothing;
        }
        let mut evicted_bytes = 0;
        for (source, layer, chunks) in layers {
            let evicted = blocking(self.fetcher().runtime(), move || layer.evict(&chunks)).await;
            evicted_bytes += evicted.map_err(|error| match error {
                // The store knows a layer by its key, which is nowhere to be seen.
                Error::Busy { why, .. } => Error::busy(source.name(), why),
                error => error,
            })?;
        }
        Ok(Evicted {
            reference: format!("{}@{}", image.repository(), image.digest()),
            stale,
            unmatched,
            evicted_bytes,
        })
    }
}
