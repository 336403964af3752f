//! Which way a layer is read that a SOCI index names a zTOC for.
//!
//! A layer is stored under what vouches for its index (`Source::key`), and two ways of reading it number its entries
//! differently. So the way is settled before anything is built on it, and then stays: what the store has already, else the
//! zTOC, else one pass as for any plain layer.
//!
//! A zTOC that the registry does not have, or that its builder got wrong, would be of no use tomorrow either: then the layer
//! is plain. One whose bytes are not those that its digest names is another matter. Somebody is lying or something is
//! broken, and another answer may be right; a whole layer must not be streamed because of it, nor the lie go unnoticed. It
//! is an error, as is a registry that cannot be reached.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::fetch::indexing::of_registry;
use crate::fetch::{Fetcher, Source, blocking};
use crate::layer::Descriptor;
use crate::layer::soci::ZTOC_BYTES_MAX;
use crate::store::layer::Layer;

impl Source {
    /// The same layer without a zTOC.
    pub(super) fn plain(&self) -> Self {
        Self {
            ztoc: None,
            ..self.clone()
        }
    }
}

impl Fetcher {
    /// The layer, indexed: from the store if it was indexed before, else with the requests that its format needs.
    ///
    /// # Errors
    /// As [`Self::layer_as_it_is`].
    pub async fn layer(self: &Arc<Self>, source: &Arc<Source>) -> Result<Arc<Layer>> {
        let settled = self.settle(source).await?;
        self.layer_as_it_is(&settled).await
    }

    /// The layer, if it was indexed before. Asks the network nothing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn stored_layer(&self, source: &Source) -> Result<Option<Arc<Layer>>> {
        let store = Arc::clone(&self.store);
        let keys = [
            Some(source.key()),
            source.ztoc.as_ref().map(|_| source.plain().key()),
        ];
        let find = move || {
            let mut found = keys.iter().flatten().map(|key| store.layer(key));
            found.find(|layer| !matches!(layer, Ok(None))).unwrap_or(Ok(None))
        };
        blocking(&self.runtime, find).await
    }

    /// The source by which a layer is read from now on: this one, or the same without a zTOC.
    ///
    /// # Errors
    /// What keeps the zTOC from being had, if nothing is in the store yet.
    pub async fn settle(self: &Arc<Self>, source: &Arc<Source>) -> Result<Arc<Source>> {
        if source.ztoc.is_none() {
            return Ok(Arc::clone(source));
        }
        let plain = Arc::new(source.plain());
        let keys = [source.key(), plain.key()];
        if self.is_without_ztoc(source) {
            return Ok(plain);
        }
        let store = Arc::clone(&self.store);
        let stored = move || Ok(keys.map(|key| store.has_layer(&key)));
        match blocking(&self.runtime, stored).await? {
            [true, _] => return Ok(Arc::clone(source)),
            [false, true] => return Ok(plain),
            [false, false] => {}
        }
        match self.layer_as_it_is(source).await {
            Ok(_) => Ok(Arc::clone(source)),
            Err(error @ Error::Unsupported { .. }) => {
                tracing::warn!(layer = source.name(), %error, "the layer is read without its zTOC");
                self.unusable_ztocs.lock().put(keys[0], ());
                Ok(plain)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the zTOC of a layer turned out to be of no use.
    pub(super) fn is_without_ztoc(&self, source: &Source) -> bool {
        self.unusable_ztocs.lock().contains(&source.key())
    }

    /// All of another blob than a layer's, verified.
    pub(super) async fn whole_blob(&self, source: &Source, blob: &Descriptor) -> Result<Bytes> {
        let Descriptor { digest, size, .. } = blob;
        let what = format!("{}, its zTOC {digest}", source.name());
        if !(1..=ZTOC_BYTES_MAX).contains(size) {
            return Err(Error::unsupported(
                what,
                format!("{size} bytes are none or too many"),
            ));
        }
        let blob = self
            .client
            .whole_blob(&source.repository, digest, *size, ZTOC_BYTES_MAX);
        match blob.await.map_err(of_registry) {
            Err(Error::NotFound { why, .. }) => Err(Error::unsupported(what, why)),
            Err(Error::Verification { expected, actual, .. }) => Err(Error::Verification {
                what,
                expected,
                actual,
            }),
            bytes => bytes,
        }
    }
}
