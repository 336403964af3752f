//! Makes images: layers from entries, the configuration with their `diff_id`s, the manifest or index around them. For
//! the demo's content and for tests, which want images that no well-meaning tool makes.

use std::collections::BTreeMap;
use std::io::Write as _;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::entry::Entry;
use crate::layer::estargz::writer::{Options, write_layer};
use crate::layer::estargz::{LAYER_DIGEST_ANNOTATION, TOC_DIGEST_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION};
use crate::layer::tar;
use crate::layer::zstd_chunked::writer as zstd_chunked;

/// Which family of media types an image uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schema {
    /// `application/vnd.oci.image.…`
    #[default]
    Oci,
    /// `application/vnd.docker.distribution.…`, schema 2.
    Docker,
}

impl Schema {
    fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    fn index(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.index.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self, compression: LayerCompression) -> &'static str {
        match (self, compression) {
            (Self::Oci, LayerCompression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, LayerCompression::None) => "application/vnd.oci.image.layer.v1.tar",
            (_, LayerCompression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::Docker, LayerCompression::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Self::Docker, LayerCompression::None) => "application/vnd.docker.image.rootfs.diff.tar",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LayerCompression {
    None,
    Gzip,
    /// Docker's own media types know no such layers; its tools use those of OCI.
    Zstd,
}

/// A finished layer.
#[derive(Debug, Clone)]
pub struct Layer {
    blob: Bytes,
    /// Kept, because a base layer is in many images.
    digest: Digest,
    /// The digest of its tar.
    pub diff_id: Digest,
    /// The annotations of its descriptor.
    pub annotations: BTreeMap<String, String>,
    /// The media type of its descriptor; `None` is the one that belongs to its compression.
    pub media_type: Option<String>,
    /// The `urls` of its descriptor: where else it is to be had.
    pub urls: Vec<String>,
    /// The blob with its TOC, of eStargz whose TOC is in another image: see [`toc_image`].
    external_toc: Option<Bytes>,
    compression: LayerCompression,
}

impl Layer {
    /// An eStargz layer with the annotations that its writers give it. A regular file has the size of its payload.
    ///
    /// # Errors
    /// [`Error::Malformed`] for an entry that tar or the TOC cannot say.
    pub fn estargz(entries: &[(Entry, Vec<u8>)], options: Options) -> Result<Self> {
        let (blob, finished) = write_layer(entries, options)?;
        let annotations = [
            (TOC_DIGEST_ANNOTATION, finished.toc_digest.to_string()),
            (UNCOMPRESSED_SIZE_ANNOTATION, finished.unpacked_bytes.to_string()),
        ];
        Ok(Self {
            blob: blob.into(),
            digest: finished.blob_digest,
            diff_id: finished.diff_id,
            annotations: annotations.map(|(key, value)| (key.to_owned(), value)).into(),
            media_type: None,
            urls: Vec::new(),
            external_toc: finished.external_toc.map(Bytes::from),
            compression: LayerCompression::Gzip,
        })
    }

    /// A plain gzip layer, of one member as most tools write it.
    ///
    /// # Errors
    /// As [`Layer::estargz`].
    pub fn gzip(entries: &[(Entry, Vec<u8>)]) -> Result<Self> {
        Self::gzip_members(entries, usize::MAX)
    }

    /// A plain gzip layer with a member for every `member_bytes` bytes (at least 1) of its tar, as parallel compressors
    /// write it.
    ///
    /// # Errors
    /// As [`Layer::estargz`].
    pub fn gzip_members(entries: &[(Entry, Vec<u8>)], member_bytes: usize) -> Result<Self> {
        let tar = plain_tar(entries)?;
        let mut blob = Vec::new();
        for piece in tar.chunks(member_bytes.max(1)) {
            let mut encoder = GzEncoder::new(blob, Compression::default());
            blob = encoder
                .write_all(piece)
                .and_then(|()| encoder.finish())
                .map_err(|e| Error::io("gzip layer", &e))?;
        }
        Ok(Self::plain(blob, &tar, LayerCompression::Gzip))
    }

    /// A plain zstd layer, of one frame that does not say its size, as most tools write it.
    ///
    /// # Errors
    /// As [`Layer::estargz`].
    pub fn zstd(entries: &[(Entry, Vec<u8>)]) -> Result<Self> {
        let tar = plain_tar(entries)?;
        let blob = zstd::stream::encode_all(tar.as_slice(), zstd::DEFAULT_COMPRESSION_LEVEL)
            .map_err(|e| Error::io("zstd layer", &e))?;
        Ok(Self::plain(blob, &tar, LayerCompression::Zstd))
    }

    /// A layer that is not compressed.
    ///
    /// # Errors
    /// As [`Layer::estargz`].
    pub fn tar(entries: &[(Entry, Vec<u8>)]) -> Result<Self> {
        let tar = plain_tar(entries)?;
        Ok(Self::plain(tar.clone(), &tar, LayerCompression::None))
    }

    /// A plain zstd layer with a frame for every `frame_bytes` bytes (at least 1) of its tar, as parallel compressors write
    /// it.
    ///
    /// # Errors
    /// As [`Layer::estargz`].
    pub fn zstd_frames(entries: &[(Entry, Vec<u8>)], frame_bytes: usize) -> Result<Self> {
        let tar = plain_tar(entries)?;
        let mut blob = Vec::new();
        for piece in tar.chunks(frame_bytes.max(1)) {
            let frame = zstd::stream::encode_all(piece, zstd::DEFAULT_COMPRESSION_LEVEL);
            blob.extend(frame.map_err(|e| Error::io("zstd layer", &e))?);
        }
        Ok(Self::plain(blob, &tar, LayerCompression::Zstd))
    }

    /// A zstd:chunked layer with the annotations that its writers give it.
    ///
    /// # Errors
    /// As [`Layer::estargz`].
    pub fn zstd_chunked(entries: &[(Entry, Vec<u8>)], options: zstd_chunked::Options) -> Result<Self> {
        let written = zstd_chunked::write_layer(entries, options)?;
        Ok(Self {
            annotations: written.annotations,
            compression: LayerCompression::Zstd,
            ..Self::raw(written.blob, written.diff_id)
        })
    }

    /// A gzip layer of any bytes, honest or not, for tests of readers.
    #[must_use]
    pub fn raw(blob: impl Into<Bytes>, diff_id: Digest) -> Self {
        let blob = blob.into();
        Self {
            digest: Digest::of(&blob),
            blob,
            diff_id,
            annotations: BTreeMap::new(),
            media_type: None,
            urls: Vec::new(),
            external_toc: None,
            compression: LayerCompression::Gzip,
        }
    }

    fn plain(blob: Vec<u8>, tar: &[u8], compression: LayerCompression) -> Self {
        Self {
            compression,
            ..Self::raw(blob, Digest::of(tar))
        }
    }

    /// The same without annotations: its TOC has no digest in the manifest then.
    #[must_use]
    pub fn without_annotations(self) -> Self {
        Self {
            annotations: BTreeMap::new(),
            ..self
        }
    }

    /// The blob.
    #[must_use]
    pub fn blob(&self) -> &Bytes {
        &self.blob
    }

    /// The digest of the blob.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    fn descriptor(&self, schema: Schema) -> Value {
        let media_type = self.media_type.as_deref();
        let media_type = media_type.unwrap_or_else(|| schema.layer(self.compression));
        let mut descriptor = descriptor(media_type, self.digest, self.blob.len());
        if !self.annotations.is_empty() {
            descriptor["annotations"] = json!(self.annotations);
        }
        if !self.urls.is_empty() {
            descriptor["urls"] = json!(self.urls);
        }
        descriptor
    }
}

/// The image of TOCs of those layers that have an external one, to be tagged as their image with `-esgztoc` behind.
#[must_use]
pub fn toc_image(layers: &[Layer]) -> Image {
    let tocs = layers.iter().filter_map(|layer| {
        // Its writers do not say a `diff_id`; nobody unpacks it.
        let toc = Layer::raw(layer.external_toc.clone()?, layer.digest);
        let annotation = (LAYER_DIGEST_ANNOTATION.to_owned(), layer.digest.to_string());
        Some(Layer {
            annotations: BTreeMap::from([annotation]),
            ..toc
        })
    });
    ImageBuilder::new(tocs.collect()).build()
}

fn plain_tar(entries: &[(Entry, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (entry, payload) in entries {
        let entry = Entry {
            size: payload.len() as u64,
            ..entry.clone()
        };
        bytes.extend_from_slice(&tar::header(&entry)?);
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len() + tar::padding(entry.size), 0);
    }
    bytes.resize(bytes.len() + tar::END_BYTES, 0);
    Ok(bytes)
}

fn descriptor(media_type: &str, digest: Digest, size: usize) -> Value {
    json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size })
}

/// What an image is made from; see [`ImageBuilder::build`].
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    /// The layers, base first.
    pub layers: Vec<Layer>,
    /// The family of media types.
    pub schema: Schema,
    /// `os` of the platform.
    pub os: String,
    /// `architecture` of the platform.
    pub architecture: String,
    /// `variant` of the platform, if any.
    pub variant: Option<String>,
    /// `config` of the configuration: `Env`, `Cmd`, `Labels` and so on.
    pub config: Value,
    /// The manifest's annotations (OCI only).
    pub annotations: BTreeMap<String, String>,
    /// When the configuration says that it was made.
    pub created: String,
}

impl ImageBuilder {
    /// An OCI image for linux/amd64 of these layers.
    #[must_use]
    pub fn new(layers: Vec<Layer>) -> Self {
        Self {
            layers,
            schema: Schema::Oci,
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            variant: None,
            config: json!({}),
            annotations: BTreeMap::new(),
            created: "2024-01-01T00:00:00Z".to_owned(),
        }
    }

    /// The same with the media types of Docker.
    #[must_use]
    pub fn docker(self) -> Self {
        Self {
            schema: Schema::Docker,
            ..self
        }
    }

    /// The same for another architecture.
    #[must_use]
    pub fn architecture(self, architecture: impl Into<String>) -> Self {
        Self {
            architecture: architecture.into(),
            ..self
        }
    }

    /// Makes configuration and manifest.
    #[must_use]
    pub fn build(self) -> Image {
        let diff_ids: Vec<String> = self
            .layers
            .iter()
            .map(|layer| layer.diff_id.to_string())
            .collect();
        let mut platform = json!({ "os": self.os, "architecture": self.architecture });
        if let Some(variant) = &self.variant {
            platform["variant"] = json!(variant);
        }
        let mut config = platform.clone();
        config["created"] = json!(self.created);
        config["config"] = self.config;
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        config["history"] = json!(vec![json!({ "created": self.created }); diff_ids.len()]);
        let config = Bytes::from(config.to_string());
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|layer| layer.descriptor(self.schema))
            .collect();
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": self.schema.manifest(),
            "config": descriptor(self.schema.config(), Digest::of(&config), config.len()),
            "layers": layers,
        });
        if !self.annotations.is_empty() {
            manifest["annotations"] = json!(self.annotations);
        }
        Image {
            manifest: Bytes::from(manifest.to_string()),
            config,
            layers: self.layers,
            schema: self.schema,
            platform,
        }
    }
}

/// A finished image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The manifest's bytes.
    pub manifest: Bytes,
    /// The configuration's bytes.
    pub config: Bytes,
    /// The layers, base first.
    pub layers: Vec<Layer>,
    schema: Schema,
    platform: Value,
}

impl Image {
    /// The manifest's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// The manifest's media type.
    #[must_use]
    pub fn media_type(&self) -> &'static str {
        self.schema.manifest()
    }

    /// Configuration and layers with their digests.
    pub fn blobs(&self) -> impl Iterator<Item = (Digest, Bytes)> {
        let layers = self.layers.iter().map(|layer| (layer.digest, layer.blob.clone()));
        std::iter::once((Digest::of(&self.config), self.config.clone())).chain(layers)
    }
}

/// An index of images for several platforms.
#[derive(Debug, Clone)]
pub struct ImageIndex {
    /// The index's bytes.
    pub bytes: Bytes,
    /// The images, in the order of the index.
    pub images: Vec<Image>,
    schema: Schema,
}

impl ImageIndex {
    /// An index of `images`, each for the platform that it was made for, with the media type that belongs to the first.
    #[must_use]
    pub fn new(images: Vec<Image>) -> Self {
        let schema = images.first().map_or(Schema::Oci, |image| image.schema);
        let manifests: Vec<Value> = images
            .iter()
            .map(|image| {
                let mut descriptor = descriptor(image.media_type(), image.digest(), image.manifest.len());
                descriptor["platform"] = image.platform.clone();
                descriptor
            })
            .collect();
        let index = json!({
            "schemaVersion": 2,
            "mediaType": schema.index(),
            "manifests": manifests,
        });
        Self {
            bytes: Bytes::from(index.to_string()),
            images,
            schema,
        }
    }

    /// The index's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// The index's media type.
    #[must_use]
    pub fn media_type(&self) -> &'static str {
        self.schema.index()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::MultiGzDecoder;

    use super::*;
    use crate::layer::entry::Kind;

    #[test]
    fn an_image_describes_its_layers_truly() {
        let entries = [
            (Entry::new("d/", Kind::Dir), Vec::new()),
            (Entry::new("d/f", Kind::File), vec![b'x'; 10_000]),
        ];
        let layers = vec![
            Layer::estargz(&entries, Options::default()).unwrap(),
            Layer::gzip(&entries).unwrap(),
            Layer::tar(&entries).unwrap(),
        ];
        let image = ImageBuilder::new(layers).architecture("arm64").build();
        let config: Value = serde_json::from_slice(&image.config).unwrap();
        let manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        for (number, layer) in image.layers.iter().enumerate() {
            let mut tar = Vec::new();
            match number {
                2 => tar = layer.blob().to_vec(),
                _ => drop(
                    MultiGzDecoder::new(layer.blob().as_ref())
                        .read_to_end(&mut tar)
                        .unwrap(),
                ),
            }
            let diff_id = Digest::of(&tar).to_string();
            assert_eq!(config["rootfs"]["diff_ids"][number], json!(diff_id));
            let descriptor = &manifest["layers"][number];
            assert_eq!(descriptor["digest"], json!(Digest::of(layer.blob()).to_string()));
            assert_eq!(descriptor["size"], json!(layer.blob().len()));
            let annotated = descriptor["annotations"].get(TOC_DIGEST_ANNOTATION).is_some();
            assert_eq!(annotated, number == 0);
        }
        assert_eq!(
            manifest["config"]["digest"],
            json!(Digest::of(&image.config).to_string())
        );
        let index: Value = serde_json::from_slice(&ImageIndex::new(vec![image.clone()]).bytes).unwrap();
        let described = &index["manifests"][0];
        assert_eq!(described["digest"], json!(image.digest().to_string()));
        assert_eq!(
            described["platform"],
            json!({ "os": "linux", "architecture": "arm64" })
        );
    }

    #[test]
    fn docker_images_use_dockers_media_types() {
        let layer = Layer::gzip(&[]).unwrap();
        let image = ImageBuilder::new(vec![layer]).docker().build();
        let manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        let index = ImageIndex::new(vec![image]);
        for media_type in [
            &manifest["mediaType"],
            &manifest["config"]["mediaType"],
            &manifest["layers"][0]["mediaType"],
            &json!(index.media_type()),
        ] {
            let text = media_type.as_str().unwrap();
            assert!(text.starts_with("application/vnd.docker."), "{text}");
        }
    }
}
