//! Finds the zTOCs of an image's layers: by the SOCI index that the image's manifest names (version 2), or that refers to
//! the image (version 1, off unless configured, because whoever may push can attach one).
//!
//! An index is a manifest whose layers are zTOCs, each with the digest of the layer that it is for. It only makes reading
//! cheaper: an image whose index is missing, refused or malformed is read as if it had none, and the log says so. But an
//! index with other bytes than its digest names, or one that could not be asked for, is an error: to go on without would
//! stream whole layers because of a lie or a passing failure.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Source, blocking};
use crate::image::manifest::{Document, Manifest};
use crate::image::resolve::Resolver;
use crate::layer::soci::ZTOC_BYTES_MAX;
use crate::layer::{Descriptor, takes_ztoc};
use crate::registry::reference::Repository;

/// The annotation of an image's manifest with the digest of its SOCI index.
const INDEX_ANNOTATION: &str = "com.amazon.soci.index-digest";
/// The annotation of a zTOC's descriptor with the digest of the layer that it is for.
const LAYER_ANNOTATION: &str = "com.amazon.soci.image-layer-digest";
/// What an index says that it is: the media type of its configuration.
const V1: &str = "application/vnd.amazon.soci.index.v1+json";
const V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// How long "nothing refers to it" holds.
const NO_REFERRER_TTL: Duration = Duration::from_secs(24 * 3600);

/// The zTOCs of an image by the digest of their layer.
pub(super) type Ztocs = HashMap<Digest, Descriptor>;

/// Finds SOCI indexes.
#[derive(Debug)]
pub(super) struct SociIndexes {
    fetcher: Arc<Fetcher>,
    resolver: Arc<Resolver>,
    /// Whether to ask for what refers to an image.
    v1: bool,
}

impl SociIndexes {
    pub(super) fn new(fetcher: Arc<Fetcher>, resolver: Arc<Resolver>, v1: bool) -> Self {
        Self {
            fetcher,
            resolver,
            v1,
        }
    }

    /// The zTOCs for the layers of the image `digest`. Asks for nothing that the store has, nor where no layer could use
    /// them or each was indexed without already.
    ///
    /// # Errors
    /// [`Error::Verification`], and what keeps a registry from being asked.
    pub(super) async fn ztocs(
        &self,
        repository: &Repository,
        digest: &Digest,
        manifest: &Manifest,
    ) -> Result<Ztocs> {
        let named = manifest.annotations.get(INDEX_ANNOTATION);
        let usable = manifest.layers.iter().any(takes_ztoc);
        if !usable || (named.is_none() && !self.v1) {
            return Ok(Ztocs::new());
        }
        let image = format!("{repository}@{digest}");
        if !self.is_known(&image, named).await? && self.is_indexed(repository, manifest).await? {
            return Ok(Ztocs::new());
        }
        match self.find(repository, digest, named).await {
            Ok(Some(index)) => Ok(ztocs_of(&image, index)),
            Ok(None) => Ok(Ztocs::new()),
            Err(
                error @ (Error::NotFound { .. }
                | Error::Denied { .. }
                | Error::Malformed { .. }
                | Error::Unsupported { .. }),
            ) => {
                tracing::warn!(image, %error, "the image is read without its SOCI index");
                Ok(Ztocs::new())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether all layers that could use a zTOC are in the store as plain layers.
    async fn is_indexed(&self, repository: &Repository, manifest: &Manifest) -> Result<bool> {
        let store = Arc::clone(self.fetcher.store());
        let plain = |descriptor: &Descriptor| Source {
            repository: repository.clone(),
            descriptor: descriptor.clone(),
            ztoc: None,
            place: None,
        };
        let layers = manifest.layers.iter().filter(|layer| takes_ztoc(layer));
        let keys: Vec<Digest> = layers.map(|layer| plain(layer).key()).collect();
        let all = move || Ok(keys.iter().all(|key| store.has_layer(key)));
        blocking(self.fetcher.runtime(), all).await
    }

    /// Whether the store has the image's SOCI index.
    async fn is_known(&self, image: &str, named: Option<&String>) -> Result<bool> {
        let store = Arc::clone(self.fetcher.store());
        let of = listing_of(image);
        let named = named.map(|text| text.parse::<Digest>()).transpose();
        let find = move || {
            let digest = match named {
                Ok(Some(named)) => Some(named),
                Ok(None) => store.db().listing(&of)?.and_then(|known| first_of(&known.names)),
                Err(_) => None,
            };
            match digest {
                Some(digest) => Ok(store.documents().get(&digest)?.is_some()),
                None => Ok(false),
            }
        };
        blocking(self.fetcher.runtime(), find).await
    }

    /// The SOCI index of an image.
    async fn find(
        &self,
        repository: &Repository,
        image: &Digest,
        named: Option<&String>,
    ) -> Result<Option<Manifest>> {
        let (digest, version) = match named {
            Some(named) => (Some(named.parse()?), V2),
            None => (self.referrer(repository, image).await?, V1),
        };
        let Some(digest) = digest else { return Ok(None) };
        let what = format!("SOCI index {repository}@{digest}");
        let bytes = self.resolver.document(repository, &digest).await?;
        let Document::Manifest(index) = Document::parse(&what, &bytes)? else {
            return Err(Error::malformed(what, "it is an image index"));
        };
        if index.config.media_type != version {
            let why = format!("it is a {:?}, not a {version}", index.config.media_type);
            return Err(Error::unsupported(what, why));
        }
        if version == V1 && index.subject != Some(*image) {
            return Err(Error::malformed(what, "it does not refer to this image"));
        }
        Ok(Some(index))
    }

    /// The first SOCI index of version 1 that refers to an image. One that was found is asked for no more: the image would
    /// change its face while it is read, and a restart must cost no request.
    async fn referrer(&self, repository: &Repository, image: &Digest) -> Result<Option<Digest>> {
        let of = listing_of(&format!("{repository}@{image}"));
        let (store, key) = (Arc::clone(self.fetcher.store()), of.clone());
        let known = blocking(self.fetcher.runtime(), move || store.db().listing(&key)).await?;
        match known {
            Some(known) if !known.names.is_empty() => return Ok(first_of(&known.names)),
            Some(known) if known.age() < NO_REFERRER_TTL => return Ok(None),
            _ => {}
        }
        let referrers = self.fetcher.client().referrers(repository, image, V1).await?;
        let first = referrers.first().copied();
        let names: Vec<String> = first.iter().map(Digest::to_string).collect();
        let store = Arc::clone(self.fetcher.store());
        let keep = move || store.db().put_listing(&of, &names);
        if let Err(error) = blocking(self.fetcher.runtime(), keep).await {
            tracing::warn!(%error, "cannot keep what refers to an image");
        }
        Ok(first)
    }
}

/// What the answer to "which SOCI index refers to it" is kept under.
fn listing_of(image: &str) -> String {
    format!("soci {image}")
}

fn first_of(names: &[String]) -> Option<Digest> {
    names.first().and_then(|name| name.parse().ok())
}

/// The zTOCs that an index names, of each layer the first. What else it has, such as lists of spans to prefetch, is for no
/// layer.
fn ztocs_of(image: &str, index: Manifest) -> Ztocs {
    let mut ztocs = Ztocs::new();
    for blob in index.layers {
        let layer = blob.annotations.get(LAYER_ANNOTATION).map(|text| text.parse());
        match layer {
            Some(Ok(layer))
                if blob.size <= ZTOC_BYTES_MAX && blob.media_type == "application/octet-stream" =>
            {
                ztocs.entry(layer).or_insert(blob);
            }
            _ => tracing::debug!(image, blob = %blob.digest, "not a zTOC that can be used"),
        }
    }
    ztocs
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn blob(number: u8, media_type: &str, layer: Option<&str>) -> Descriptor {
        let annotation = layer.map(|layer| (LAYER_ANNOTATION.to_owned(), layer.to_owned()));
        Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(&[number]),
            size: 1000,
            annotations: BTreeMap::from_iter(annotation),
            urls: Vec::new(),
        }
    }

    #[test]
    fn only_ztocs_of_layers_are_taken() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let (in_a, in_b) = (a.to_string(), b.to_string());
        let ztoc = "application/octet-stream";
        let mut huge = blob(6, ztoc, Some(&in_b));
        huge.size = ZTOC_BYTES_MAX + 1;
        let index = Manifest {
            config: blob(0, V2, None),
            layers: vec![
                blob(1, ztoc, Some(&in_a)),
                blob(2, ztoc, Some(&in_a)),
                blob(3, ztoc, None),
                blob(4, ztoc, Some("sha256:00")),
                blob(5, "application/vnd.amazon.soci.prefetch.v1+json", Some(&in_b)),
                huge,
            ],
            annotations: BTreeMap::new(),
            subject: None,
        };
        let ztocs = ztocs_of("image", index);
        assert_eq!(ztocs.len(), 1);
        assert_eq!(ztocs[&a].digest, Digest::of(&[1]));
    }
}
