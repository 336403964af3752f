//! SOCI indexes for images: a manifest with a zTOC for each layer that gets one.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::error::Result;
use crate::layer::entry::Entry;
use crate::layer::soci::writer::{Options, write_ztoc};

use super::content::Content;
use super::images::{Image, Layer};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The configuration of an index, which says its version by its media type alone.
const CONFIG: &[u8] = b"{}";

/// A SOCI index and what it consists of.
#[derive(Debug, Clone)]
pub struct SociIndex {
    /// The manifest.
    pub manifest: Bytes,
    /// The zTOCs.
    pub ztocs: Vec<Bytes>,
}

/// The zTOC of one layer.
#[derive(Debug, Clone)]
pub struct LayerZtoc {
    /// The digest of the layer.
    pub layer: Digest,
    /// Its zTOC.
    pub ztoc: Bytes,
    span_bytes: u64,
}

impl LayerZtoc {
    /// The zTOC of `layer`, which is made of `entries`.
    ///
    /// # Errors
    /// As [`write_ztoc`].
    pub fn new(layer: &Layer, entries: &[(Entry, Vec<u8>)], options: Options) -> Result<Self> {
        Ok(Self {
            layer: layer.digest(),
            ztoc: write_ztoc(layer.blob(), entries, options)?.into(),
            span_bytes: options.span_bytes,
        })
    }
}

impl SociIndex {
    /// An index of version 2, which an image's manifest names: see [`Self::annotation`].
    #[must_use]
    pub fn v2(ztocs: &[LayerZtoc]) -> Self {
        Self::new("application/vnd.amazon.soci.index.v2+json", ztocs, None)
    }

    /// An index of version 1, which refers to an image.
    #[must_use]
    pub fn v1(ztocs: &[LayerZtoc], image: &Image) -> Self {
        let subject = json!({
            "mediaType": image.media_type(),
            "digest": image.digest().to_string(),
            "size": image.manifest.len(),
        });
        Self::new("application/vnd.amazon.soci.index.v1+json", ztocs, Some(subject))
    }

    fn new(artifact_type: &str, ztocs: &[LayerZtoc], subject: Option<Value>) -> Self {
        let layers: Vec<Value> = ztocs
            .iter()
            .map(|of| {
                json!({
                    "mediaType": "application/octet-stream",
                    "digest": Digest::of(&of.ztoc).to_string(),
                    "size": of.ztoc.len(),
                    "annotations": {
                        "com.amazon.soci.image-layer-digest": of.layer.to_string(),
                        "com.amazon.soci.image-layer-mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                        "com.amazon.soci.span-size": of.span_bytes.to_string(),
                    },
                })
            })
            .collect();
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": artifact_type,
                "digest": Digest::of(CONFIG).to_string(),
                "size": CONFIG.len(),
            },
            "layers": layers,
            "annotations": { "com.amazon.soci.build-tool-identifier": "registryfs demo" },
        });
        if let Some(subject) = subject {
            manifest["subject"] = subject;
        }
        Self {
            manifest: Bytes::from(manifest.to_string()),
            ztocs: ztocs.iter().map(|of| of.ztoc.clone()).collect(),
        }
    }

    /// The annotation by which an image's manifest names this index.
    #[must_use]
    pub fn annotation(&self) -> (String, String) {
        let digest = Digest::of(&self.manifest).to_string();
        ("com.amazon.soci.index-digest".to_owned(), digest)
    }

    /// Adds it to repository `name` and gives its digest.
    pub fn add_to(&self, content: &mut Content, name: &str) -> Digest {
        content.put_blob(name, Bytes::from_static(CONFIG));
        for ztoc in &self.ztocs {
            content.put_blob(name, ztoc.clone());
        }
        content.put_manifest(name, OCI_MANIFEST, self.manifest.clone())
    }
}
