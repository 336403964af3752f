//! The documents of a converted image: configuration, manifest, index. What need not change stays as it is written, members
//! that nobody here knows included.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use crate::convert::ImageReport;
use crate::convert::layer::{Made, Work};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::manifest::{Document, Manifest, is_image};
use crate::image::platform::Platform;
use crate::registry::document::Object;
use crate::registry::{ManifestBytes, OCI_INDEX, OCI_MANIFEST};

/// Media types of the OCI image specification.
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// What configurations of images are called; those of other artifacts have no layers of files.
const CONFIGS: [&str; 2] = [OCI_CONFIG, "application/vnd.docker.container.image.v1+json"];
/// Annotations of a layer that say how the blob of before was to be read.
const STALE_OF_LAYER: [&str; 4] = [
    "containerd.io/snapshot/stargz/",
    "io.containers.estargz.",
    "io.containers.zstd-chunked.",
    "io.github.containers.zstd-chunked.",
];
/// Annotations of a manifest that lead to an index of the layers of before.
const STALE_OF_MANIFEST: &str = "com.amazon.soci.";

/// An image that is to be converted.
pub(super) struct Image {
    what: String,
    text: Object,
    manifest: Manifest,
    config: Bytes,
    /// By the configuration, base first.
    diff_ids: Vec<Digest>,
}

impl Image {
    /// Reads an image's documents.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`], and those of the network.
    pub(super) async fn read(work: &Work, found: &ManifestBytes) -> Result<Self> {
        let what = format!("{}@{}", work.repository, found.digest);
        let Document::Manifest(manifest) = Document::parse(&what, &found.bytes)? else {
            return Err(Error::unsupported(what, "an index within an index"));
        };
        let config_type = &manifest.config.media_type;
        if !CONFIGS.contains(&config_type.as_str()) {
            let why = format!("its configuration is of type {config_type:?}: it is no image of files");
            return Err(Error::unsupported(what, why));
        }
        let (digest, size) = (manifest.config.digest, manifest.config.size);
        let config = work.client.small_blob(&work.repository, &digest, size).await?;
        let diff_ids = diff_ids(&what, &config)?;
        if diff_ids.len() != manifest.layers.len() {
            let (ids, layers) = (diff_ids.len(), manifest.layers.len());
            let why = format!("it has {layers} layers, but its configuration has {ids} DiffIDs");
            return Err(Error::malformed(what, why));
        }
        Ok(Self {
            text: Object::parse(&what, &found.bytes)?,
            what,
            manifest,
            config,
            diff_ids,
        })
    }

    /// The sizes of its layers in bytes.
    pub(super) fn layers(&self) -> impl Iterator<Item = u64> {
        self.manifest.layers.iter().map(|layer| layer.size)
    }

    /// Brings its layers and its configuration to the destination. Returns its manifest, which is still to be brought.
    ///
    /// # Errors
    /// As [`super::convert`].
    pub(super) async fn convert(self, work: &Arc<Work>) -> Result<(Bytes, ImageReport)> {
        let layers = self.convert_layers(work).await?;
        let diff_ids: Vec<Digest> = layers.iter().map(|made| made.diff_id).collect();
        let config = match diff_ids == self.diff_ids {
            true => self.config.clone(),
            false => with_diff_ids(&self.what, &self.config, &diff_ids)?,
        };
        work.destination.put_bytes(&config).await?;
        let manifest = self.manifest(&config, &layers)?;
        let report = ImageReport {
            platform: None,
            digest: Digest::of(&manifest),
            layers: layers.into_iter().map(|made| made.report).collect(),
        };
        Ok((manifest, report))
    }

    async fn convert_layers(&self, work: &Arc<Work>) -> Result<Vec<Made>> {
        let mut tasks = JoinSet::new();
        let pairs = self.manifest.layers.iter().zip(&self.diff_ids);
        for (number, (descriptor, diff_id)) in pairs.enumerate() {
            let (work, descriptor, diff_id) = (Arc::clone(work), descriptor.clone(), *diff_id);
            tasks.spawn(async move { (number, work.layer(&descriptor, &diff_id).await) });
        }
        let mut made = BTreeMap::new();
        while let Some(done) = tasks.join_next().await {
            let (number, layer) = done.map_err(|error| Error::Io {
                what: self.what.clone(),
                errno: libc::EIO,
                why: error.to_string(),
            })?;
            made.insert(number, layer?);
        }
        Ok(made.into_values().collect())
    }

    fn manifest(&self, config: &[u8], layers: &[Made]) -> Result<Bytes> {
        let what = &self.what;
        let mut manifest = self.text.clone();
        manifest.set("mediaType", OCI_MANIFEST)?;
        let mut descriptor: Object = required(what, &manifest, "config")?;
        describe(
            &mut descriptor,
            OCI_CONFIG,
            &Digest::of(config),
            config.len() as u64,
        )?;
        manifest.set("config", &descriptor)?;
        let mut descriptors: Vec<Object> = required(what, &manifest, "layers")?;
        for (descriptor, made) in descriptors.iter_mut().zip(layers) {
            describe(descriptor, OCI_LAYER, &made.report.digest, made.report.bytes)?;
            if let Some(annotations) = &made.annotations {
                annotate(what, descriptor, annotations)?;
            }
        }
        manifest.set("layers", &descriptors)?;
        if let Some(mut annotations) = manifest.get::<Object>(what, "annotations")? {
            annotations.retain(|key| !key.starts_with(STALE_OF_MANIFEST));
            manifest.set("annotations", &annotations)?;
        }
        manifest.to_bytes().map(Bytes::from)
    }
}

/// The index that `found` becomes when the manifests with these digests become others, and how many of its entries are no
/// images and are left out: they are about the images of before, by digest.
///
/// # Errors
/// [`Error::Malformed`].
pub(super) fn index(found: &ManifestBytes, made: &[(Digest, Bytes)]) -> Result<(Bytes, usize)> {
    let what = format!("index {}", found.digest);
    let mut index = Object::parse(&what, &found.bytes)?;
    index.set("mediaType", OCI_INDEX)?;
    let all: Vec<Object> = required(&what, &index, "manifests")?;
    let all_count = all.len();
    let mut kept = Vec::new();
    for mut descriptor in all {
        let platform: Option<Platform> = descriptor.get(&what, "platform")?;
        let artifact: Option<String> = descriptor.get(&what, "artifactType")?;
        if !is_image(platform.as_ref(), artifact.as_deref()) {
            continue;
        }
        let digest: Digest = required(&what, &descriptor, "digest")?;
        if let Some((_, manifest)) = made.iter().find(|(old, _)| *old == digest) {
            describe(
                &mut descriptor,
                OCI_MANIFEST,
                &Digest::of(manifest),
                manifest.len() as u64,
            )?;
            kept.push(descriptor);
        }
    }
    let left_out = all_count - kept.len();
    index.set("manifests", &kept)?;
    Ok((index.to_bytes()?.into(), left_out))
}

/// The DiffIDs that a configuration names.
fn diff_ids(what: &str, config: &[u8]) -> Result<Vec<Digest>> {
    let what = format!("configuration of {what}");
    let config = Object::parse(&what, config)?;
    let rootfs: Object = required(&what, &config, "rootfs")?;
    // Go writes an empty list as null.
    Ok(rootfs.get(&what, "diff_ids")?.unwrap_or_default())
}

fn with_diff_ids(what: &str, config: &[u8], diff_ids: &[Digest]) -> Result<Bytes> {
    let what = format!("configuration of {what}");
    let mut config = Object::parse(&what, config)?;
    let mut rootfs: Object = required(&what, &config, "rootfs")?;
    rootfs.set("diff_ids", diff_ids)?;
    config.set("rootfs", &rootfs)?;
    config.to_bytes().map(Bytes::from)
}

fn required<T: DeserializeOwned>(what: &str, object: &Object, key: &str) -> Result<T> {
    let value = object.get(what, key)?;
    value.ok_or_else(|| Error::malformed(what, format!("it has no {key:?}")))
}

/// Makes a descriptor that of another blob. Where else the old one is to be had, and a copy of it, do not belong to it.
fn describe(descriptor: &mut Object, media_type: &str, digest: &Digest, size: u64) -> Result<()> {
    descriptor.set("mediaType", media_type)?;
    descriptor.set("digest", digest)?;
    descriptor.set("size", &size)?;
    descriptor.retain(|key| !matches!(key, "urls" | "data"));
    Ok(())
}

/// Replaces the annotations that said how the old blob was to be read by those of the new one.
fn annotate(what: &str, descriptor: &mut Object, annotations: &BTreeMap<&str, String>) -> Result<()> {
    let mut all = descriptor.get::<Object>(what, "annotations")?.unwrap_or_default();
    all.retain(|key| !STALE_OF_LAYER.iter().any(|prefix| key.starts_with(prefix)));
    for (key, value) in annotations {
        all.set(key, value)?;
    }
    descriptor.set("annotations", &all)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn value(object: &Object) -> Value {
        serde_json::from_slice(&object.to_bytes().unwrap()).unwrap()
    }

    #[test]
    fn only_what_is_about_the_old_blob_leaves_a_descriptor() {
        let text = json!({
            "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "digest": Digest::of(b"old"), "size": 3, "urls": ["https://h.example/"], "data": "b2xk", "x-ours": [1],
            "annotations": {
                "ours": "1",
                "containerd.io/snapshot/stargz/toc.digest": "old",
                "io.github.containers.zstd-chunked.manifest-position": "1:2:3:1",
                "io.containers.zstd-chunked.manifest-checksum": "sha256:00",
            },
        });
        let mut descriptor = Object::parse("x", text.to_string().as_bytes()).unwrap();
        describe(&mut descriptor, OCI_LAYER, &Digest::of(b"new"), 4).unwrap();
        let toc = "containerd.io/snapshot/stargz/toc.digest";
        annotate("x", &mut descriptor, &BTreeMap::from([(toc, "new".to_owned())])).unwrap();
        let expected = json!({
            "mediaType": OCI_LAYER, "digest": Digest::of(b"new"), "size": 4, "x-ours": [1],
            "annotations": { "ours": "1", toc: "new" },
        });
        assert_eq!(value(&descriptor), expected);
    }

    #[test]
    fn a_configuration_changes_in_its_diff_ids_alone() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let text = |id: &Digest| {
            format!(
                r#"{{"os":"linux","x":1.0,"rootfs":{{"type":"layers","diff_ids":["{id}"]}},"history":[{{"created_by":"a"}}]}}"#
            )
        };
        assert_eq!(diff_ids("x", text(&old).as_bytes()).unwrap(), [old]);
        let changed = with_diff_ids("x", text(&old).as_bytes(), &[new]).unwrap();
        assert_eq!(changed, text(&new));
        for bad in ["{}", r#"{"rootfs":1}"#, r#"{"rootfs":{"diff_ids":["sha512:0"]}}"#] {
            assert_eq!(diff_ids("x", bad.as_bytes()).unwrap_err().exit_code(), 7, "{bad}");
        }
        assert!(
            diff_ids("x", br#"{"rootfs":{"diff_ids":null}}"#)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn an_index_keeps_its_images_and_what_it_says_of_them() {
        let (amd64, arm64) = (Digest::of(b"amd64"), Digest::of(b"arm64"));
        let text = json!({
            "schemaVersion": 2,
            "manifests": [
                { "mediaType": "d", "digest": amd64, "size": 5, "platform": { "os": "linux", "architecture": "amd64", "x": 1 } },
                { "digest": Digest::of(b"proof"), "size": 1, "platform": { "os": "unknown", "architecture": "unknown" } },
                { "mediaType": "d", "digest": arm64, "size": 5, "platform": { "os": "linux", "architecture": "arm64" } },
            ],
            "annotations": { "a": "1" },
        });
        let found = ManifestBytes {
            bytes: text.to_string().into(),
            media_type: OCI_INDEX.to_owned(),
            digest: Digest::of(b""),
            with_credentials: false,
        };
        let made = [
            (amd64, Bytes::from_static(b"one")),
            (arm64, Bytes::from_static(b"other")),
        ];
        let (index, left_out) = index(&found, &made).unwrap();
        assert_eq!(left_out, 1);
        let expected = json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [
                { "mediaType": OCI_MANIFEST, "digest": Digest::of(b"one"), "size": 3, "platform": { "os": "linux", "architecture": "amd64", "x": 1 } },
                { "mediaType": OCI_MANIFEST, "digest": Digest::of(b"other"), "size": 5, "platform": { "os": "linux", "architecture": "arm64" } },
            ],
            "annotations": { "a": "1" },
        });
        assert_eq!(serde_json::from_slice::<Value>(&index).unwrap(), expected);
    }
}
