//! Configurations of images, and the documents that are kept: what a layer's tar must be is said by the configuration, so
//! it is needed down here too.

use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::single_flight::SingleFlight;
use crate::fetch::{Fetcher, Place, Source, blocking};
use crate::layer::Descriptor;
use crate::registry::reference::Repository;
use crate::store::layer::Layer;

/// The configurations being fetched.
pub(super) type Configs = SingleFlight<(Repository, Digest), Bytes>;

/// The media types of configurations that must say the digests of all layers' tars, as the image specification and
/// Docker's have it. Other artifacts may have anything in this place.
const IMAGE_CONFIGS: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

/// What is read of a configuration here.
#[derive(Debug, Default, Deserialize)]
struct ImageConfig {
    #[serde(default)]
    rootfs: RootfsOfConfig,
}

#[derive(Debug, Default, Deserialize)]
struct RootfsOfConfig {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// What an image's configuration says of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Promise {
    /// The digest of its tar; `None` where nothing is said, or in another algorithm than ours.
    pub(super) diff_id: Option<Digest>,
    /// How many layers the configuration knows.
    pub(super) layers: usize,
}

impl Fetcher {
    /// The bytes of an image's configuration: from the store, or from the registry, verified.
    ///
    /// # Errors
    /// As the registry client's `small_blob`.
    pub async fn config(self: &Arc<Self>, repository: &Repository, config: &Descriptor) -> Result<Bytes> {
        if let Some(bytes) = self.kept_document(&config.digest).await? {
            return Ok(bytes);
        }
        let key = (repository.clone(), config.digest);
        let (fetcher, repository, config) = (Arc::clone(self), repository.clone(), config.clone());
        let work = async move {
            let Descriptor {
                digest,
                size,
                media_type,
                ..
            } = config;
            let bytes = fetcher.client.small_blob(&repository, &digest, size).await?;
            fetcher.keep_document(digest, bytes.clone(), media_type).await;
            Ok(bytes)
        };
        self.configs.run(&self.runtime, key, work).await
    }

    /// A document, if it is kept.
    pub(crate) async fn kept_document(&self, digest: &Digest) -> Result<Option<Bytes>> {
        let (store, digest) = (Arc::clone(&self.store), *digest);
        blocking(&self.runtime, move || store.documents().get(&digest)).await
    }

    /// Keeps a document that was verified. A full disk must not keep an image from being read.
    pub(crate) async fn keep_document(&self, digest: Digest, bytes: Bytes, media_type: String) {
        let store = Arc::clone(&self.store);
        let keep = move || {
            store.documents().put(&digest, &bytes)?;
            store.db().put_media_type(&digest, &media_type)
        };
        if let Err(error) = blocking(&self.runtime, keep).await {
            tracing::warn!(%digest, %error, "cannot keep a document");
        }
    }

    /// What the image in which a layer was found says of it; `None` for a layer without an image.
    ///
    /// # Errors
    /// As [`Self::config`]; [`Error::Malformed`] for an image's configuration that does not know the layer.
    pub(super) async fn promise(self: &Arc<Self>, source: &Source) -> Result<Option<Promise>> {
        let Some(place) = &source.place else {
            return Ok(None);
        };
        let config = self.config(&source.repository, &place.config).await;
        let config = config.map_err(|error| source.blame(error))?;
        promise(place, &config).map(Some)
    }

    /// Checks a layer that is known already against the image in which it was found now: it may have come with another
    /// one. Layers whose tar nobody has seen have nothing to compare.
    ///
    /// # Errors
    /// [`Error::Verification`]; as [`Self::config`].
    pub async fn check_diff_id(self: &Arc<Self>, source: &Source, layer: &Layer) -> Result<()> {
        let Some(actual) = layer.index().summary().passed() else {
            return Ok(());
        };
        match self.promise(source).await? {
            Some(promise) => promise.check(source, actual),
            None => Ok(()),
        }
    }
}

impl Promise {
    /// Compares the digest of a layer's tar.
    ///
    /// # Errors
    /// [`Error::Verification`].
    pub(super) fn check(&self, source: &Source, actual: Digest) -> Result<()> {
        match self.diff_id {
            Some(expected) if expected != actual => {
                let what = format!("{}, its tar by the image's configuration (DiffID)", source.name());
                Err(Error::mismatch(what, expected, actual))
            }
            _ => Ok(()),
        }
    }
}

/// What a configuration says of the layer at `place`.
///
/// A configuration of an image must know each layer, as engines demand. In that of another artifact nothing is demanded,
/// and nothing is lost: the manifest vouches for the blob, and so for the tar in it. The same goes for a digest in an
/// algorithm other than sha256.
fn promise(place: &Place, config: &[u8]) -> Result<Promise> {
    let what = || format!("configuration {}", place.config.digest);
    let is_image = IMAGE_CONFIGS.contains(&place.config.media_type.as_str());
    let parsed: ImageConfig = match serde_json::from_slice(config) {
        Ok(parsed) => parsed,
        Err(error) if is_image => return Err(Error::malformed(what(), error.to_string())),
        Err(_) => ImageConfig::default(),
    };
    let diff_ids = parsed.rootfs.diff_ids;
    let text = diff_ids.get(place.number).map(String::as_str);
    if text.is_none() && is_image {
        let why = format!(
            "it says the digests of {} layers; the manifest has more",
            diff_ids.len()
        );
        return Err(Error::malformed(what(), why));
    }
    Ok(Promise {
        diff_id: text.and_then(|text| text.parse().ok()),
        layers: diff_ids.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(media_type: &str, number: usize) -> Place {
        Place {
            manifest: Digest::of(b"manifest"),
            config: Descriptor {
                media_type: media_type.to_owned(),
                digest: Digest::of(b"config"),
                size: 6,
                annotations: std::collections::BTreeMap::new(),
                urls: Vec::new(),
            },
            number,
            is_open: true,
        }
    }

    #[test]
    fn an_images_configuration_must_know_each_layer() {
        let first = Digest::of(b"tar");
        let text = format!(r#"{{"rootfs":{{"diff_ids":["{first}","sha512:00"]}}}}"#);
        for media_type in IMAGE_CONFIGS {
            let of = |number| promise(&place(media_type, number), text.as_bytes());
            assert_eq!(of(0).unwrap().diff_id, Some(first));
            assert_eq!(
                of(1).unwrap().diff_id,
                None,
                "another algorithm promises nothing to us"
            );
            for bad in [
                of(2),
                promise(&place(media_type, 0), b"{}"),
                promise(&place(media_type, 0), b"no"),
            ] {
                assert_eq!(bad.unwrap_err().exit_code(), 7);
            }
        }
    }

    #[test]
    fn an_artifact_may_have_anything_for_a_configuration() {
        for config in [&b"{}"[..], b"\x7fELF", br#"{"rootfs":7}"#] {
            let promised = promise(&place("application/vnd.oci.empty.v1+json", 0), config).unwrap();
            assert_eq!(promised.diff_id, None);
        }
    }
}
