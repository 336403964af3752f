//! What manifests and indexes say, of OCI and of Docker schema 2: only the fields that reading an image needs.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::platform::Platform;
use crate::layer::Descriptor;

/// The most layers an image may have; engines stop at 127, or at 500 with new overlayfs options.
const LAYERS_MAX: usize = 1024;
/// The most manifests an index may have.
const MANIFESTS_MAX: usize = 4096;
/// The most URLs of one descriptor that are kept: real ones have one, and each may cost a request.
const URLS_MAX: usize = 8;
/// Longest URL that is kept, in bytes: what servers commonly take.
const URL_BYTES_MAX: usize = 8192;

/// What an entry of an index has that is the SOCI index of an image: that image's digest.
const SOCI_IMAGE_ANNOTATION: &str = "com.amazon.soci.image-manifest-digest";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    urls: Option<Vec<String>>,
}

impl RawDescriptor {
    fn into_descriptor(self) -> Descriptor {
        let media_type = self
            .media_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        let annotations = self.annotations.unwrap_or_default();
        let mut urls = self.urls.unwrap_or_default();
        urls.truncate(URLS_MAX);
        urls.retain(|url| url.len() <= URL_BYTES_MAX);
        Descriptor {
            media_type,
            digest: self.digest,
            size: self.size,
            annotations,
            urls,
        }
    }
}

#[derive(Deserialize)]
struct RawDocument {
    #[serde(default)]
    config: Option<RawDescriptor>,
    #[serde(default)]
    layers: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    manifests: Option<Vec<RawDescriptor>>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    subject: Option<RawDescriptor>,
}

/// An image's manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The image's configuration.
    pub config: Descriptor,
    /// Its layers, base first.
    pub layers: Vec<Descriptor>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// The manifest that it refers to, if it is something that is attached to an image.
    pub subject: Option<Digest>,
}

/// One platform's manifest in an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// The manifest.
    pub digest: Digest,
    /// The platform it is for.
    pub platform: Platform,
}

/// What a reference may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// An image for each of several platforms, in the index's order, attestations and the like left out.
    Index(Vec<IndexEntry>),
}

impl Document {
    /// Parses a manifest or index.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming `what`.
    pub fn parse(what: &str, bytes: &[u8]) -> Result<Self> {
        let malformed = |why: &str| Error::malformed(what, why);
        let raw: RawDocument = serde_json::from_slice(bytes).map_err(|e| malformed(&e.to_string()))?;
        match raw {
            // Something that is both would be one image to one reader and another to the next.
            RawDocument {
                layers: Some(_),
                manifests: Some(_),
                ..
            } => Err(malformed("it has layers and manifests")),
            RawDocument {
                config: Some(config),
                layers: Some(layers),
                annotations,
                subject,
                ..
            } => {
                if layers.len() > LAYERS_MAX {
                    return Err(malformed("it has more than 1024 layers"));
                }
                let layers = layers.into_iter().map(RawDescriptor::into_descriptor).collect();
                Ok(Self::Manifest(Manifest {
                    config: config.into_descriptor(),
                    layers,
                    annotations: annotations.unwrap_or_default(),
                    subject: subject.map(|subject| subject.digest),
                }))
            }
            RawDocument {
                manifests: Some(manifests),
                ..
            } => {
                if manifests.len() > MANIFESTS_MAX {
                    return Err(malformed("it has more than 4096 manifests"));
                }
                Ok(Self::Index(
                    manifests.into_iter().filter_map(index_entry).collect(),
                ))
            }
            _ => Err(malformed(
                "it is neither a manifest with config and layers nor an index",
            )),
        }
    }
}

/// An entry that names an image: with a platform, and not an attestation (whose platform is `unknown`), an artifact, or the
/// SOCI index of another entry.
fn index_entry(raw: RawDescriptor) -> Option<IndexEntry> {
    let is_soci = |annotations: &BTreeMap<_, _>| annotations.contains_key(SOCI_IMAGE_ANNOTATION);
    let is_image = is_image(raw.platform.as_ref(), raw.artifact_type.as_deref())
        && !raw.annotations.as_ref().is_some_and(is_soci);
    Some(IndexEntry {
        digest: raw.digest,
        platform: raw.platform.filter(|_| is_image)?,
    })
}

/// Whether an entry of an index with this platform and type of artifact is an image.
#[must_use]
pub fn is_image(platform: Option<&Platform>, artifact_type: Option<&str>) -> bool {
    platform.is_some_and(|platform| platform.os != "unknown") && artifact_type.is_none()
}

/// The entry of an index that someone who wants `platform` means: one that names the same variant before one that leaves
/// it open, else the first.
#[must_use]
pub fn choose<'a>(entries: &'a [IndexEntry], platform: &Platform) -> Option<&'a IndexEntry> {
    let exact = entries.iter().find(|entry| entry.platform == *platform);
    exact.or_else(|| entries.iter().find(|entry| platform.accepts(&entry.platform)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(platform: &str, digest: &[u8]) -> IndexEntry {
        IndexEntry {
            digest: Digest::of(digest),
            platform: platform.parse().unwrap(),
        }
    }

    #[test]
    fn an_index_leaves_out_what_is_no_image() {
        let digest = Digest::of(b"1");
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[
                {{"mediaType":"m","digest":"{digest}","size":1,"platform":{{"os":"linux","architecture":"arm","variant":"v7"}}}},
                {{"mediaType":"m","digest":"{digest}","size":1,"platform":{{"os":"unknown","architecture":"unknown"}}}},
                {{"mediaType":"m","digest":"{digest}","size":1}},
                {{"mediaType":"m","digest":"{digest}","size":1,"artifactType":"x","platform":{{"os":"linux","architecture":"amd64"}}}},
                {{"mediaType":"m","digest":"{digest}","size":1,"annotations":{{"com.amazon.soci.image-manifest-digest":"{digest}"}},
                  "platform":{{"os":"linux","architecture":"amd64"}}}}
            ]}}"#
        );
        let parsed = Document::parse("x", text.as_bytes()).unwrap();
        assert_eq!(parsed, Document::Index(vec![entry("linux/arm/v7", b"1")]));
    }

    #[test]
    fn urls_are_kept_within_bounds() {
        let digest = Digest::of(b"1");
        let parse = |urls: &[String]| {
            let layer = serde_json::json!({ "digest": digest, "size": 1, "urls": urls });
            let text = serde_json::json!({ "config": { "digest": digest, "size": 1 }, "layers": [layer] });
            match Document::parse("x", text.to_string().as_bytes()).unwrap() {
                Document::Manifest(manifest) => manifest.layers[0].urls.clone(),
                Document::Index(_) => panic!("an index"),
            }
        };
        let url = "https://a.example/x".to_owned();
        assert_eq!(parse(std::slice::from_ref(&url)), std::slice::from_ref(&url));
        assert_eq!(parse(&vec![url.clone(); 100]).len(), 8);
        assert_eq!(parse(&["x".repeat(8193), url.clone()]), [url]);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let digest = Digest::of(b"1");
        let config = format!(r#""config":{{"mediaType":"c","digest":"{digest}","size":1}}"#);
        for text in [
            "{}".to_owned(),
            "[]".to_owned(),
            format!("{{{config}}}"),
            format!(r#"{{{config},"layers":[],"manifests":[]}}"#),
            format!(r#"{{{config},"layers":[{{"digest":"sha512:00","size":1}}]}}"#),
            format!(r#"{{{config},"layers":[{{"digest":"{digest}","size":-1}}]}}"#),
        ] {
            let error = Document::parse("x", text.as_bytes()).unwrap_err();
            assert_eq!(error.exit_code(), 7, "{text}");
        }
        assert!(Document::parse("x", format!(r#"{{{config},"layers":[]}}"#).as_bytes()).is_ok());
    }

    #[test]
    fn the_platform_that_is_meant_is_chosen() {
        let entries = [
            entry("linux/arm/v6", b"6"),
            entry("linux/arm/v7", b"7"),
            entry("linux/amd64", b"a"),
            entry("linux/arm64/v8", b"8"),
        ];
        let chosen = |text: &str| choose(&entries, &text.parse().unwrap()).map(|entry| entry.digest);
        assert_eq!(chosen("linux/arm/v7"), Some(Digest::of(b"7")));
        assert_eq!(chosen("linux/arm"), Some(Digest::of(b"6")));
        assert_eq!(chosen("linux/arm64"), Some(Digest::of(b"8")));
        assert_eq!(chosen("linux/riscv64"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_document_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Document::parse("x", &bytes);
        }
    }
}
