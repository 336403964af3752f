//! TOCs of eStargz layers that are in an image of their own: a manifest whose layers are the TOCs, tagged as the image that
//! they belong to with `-esgztoc` behind.
//!
//! What fetches a layer knows its image by digest. The tags that are known to lead there are tried first, then whatever
//! the repository lists with that ending. Anyone may have pushed such an image, so what is found here are candidates,
//! whole blobs by their own digest: the promise in the image's manifest decides which is the one.
//!
//! The layers of an image are looked for at the same time, and all in the same places: each is asked once, and its answer
//! holds for a moment.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::single_flight::Recent;
use crate::fetch::{Fetcher, Source, blocking};
use crate::layer::estargz::LAYER_DIGEST_ANNOTATION;
use crate::registry::reference::{Repository, Target, is_tag};

/// What the tag of an image of TOCs ends in.
const TAG_SUFFIX: &str = "-esgztoc";
/// The most images of TOCs that are looked into for one layer.
const TOC_IMAGES_MAX: usize = 32;
/// The most known tags of a repository that are asked whether they lead to the image.
const KNOWN_TAGS_MAX: u32 = 256;
/// The most pages of a repository's tags that are read: some 50,000 names.
const PAGES_MAX: usize = 50;
/// For how long an answer holds: while the layers of an image are indexed.
const ANSWER_TTL: Duration = Duration::from_secs(30);
/// The most images of TOCs, and the most repositories, whose answers are held.
const ANSWERS_MAX: usize = 256;
/// The most candidates for one layer. A repository that was converted anew has as many as was done so.
const CANDIDATES_MAX: usize = 4;
/// Largest blob with a TOC: it is held in memory, and 64 MiB are a million entries.
const TOC_BLOB_BYTES_MAX: u64 = 64 << 20;

/// The blobs that are said to be the TOC of one layer, each once.
#[derive(Debug, Default)]
pub(super) struct ExternalTocs {
    stage: Stage,
    tags: VecDeque<String>,
    blobs: VecDeque<Candidate>,
    /// Tags and blobs that were already found.
    seen: HashSet<String>,
    images: usize,
    candidates: usize,
}

/// What images of TOCs and repositories answered a moment ago.
#[derive(Debug)]
pub(super) struct TocImages {
    /// The TOCs in the image of a tag.
    candidates: Recent<(Repository, String), Arc<[Candidate]>>,
    /// The tags of a repository that are named like those of images of TOCs.
    tags: Recent<Repository, Arc<[String]>>,
}

impl Default for TocImages {
    fn default() -> Self {
        Self {
            candidates: Recent::new(ANSWER_TTL, ANSWERS_MAX),
            tags: Recent::new(ANSWER_TTL, ANSWERS_MAX),
        }
    }
}

/// A blob that is said to be the TOC of a layer.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    layer: Digest,
    digest: Digest,
    size: u64,
}

/// Where tags come from next.
#[derive(Debug, Default)]
enum Stage {
    #[default]
    Known,
    Listed,
    End,
}

/// What is read of a manifest or index. Everything may be missing: it is not known what it will turn out to be.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    layers: Vec<Blob>,
    #[serde(default)]
    manifests: Vec<Blob>,
}

/// A descriptor.
#[derive(Debug, Deserialize)]
struct Blob {
    digest: Digest,
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

impl ExternalTocs {
    /// The next candidate, `None` after the last.
    ///
    /// # Errors
    /// Those of the network: what was not found today may be there tomorrow. A registry that has or gives nothing, or
    /// something else, is no error.
    pub(super) async fn next(&mut self, fetcher: &Fetcher, source: &Source) -> Result<Option<Bytes>> {
        while self.candidates < CANDIDATES_MAX {
            if let Some(blob) = self.blobs.pop_front() {
                self.candidates += 1;
                let blob = fetcher.client.whole_blob(
                    &source.repository,
                    &blob.digest,
                    blob.size,
                    TOC_BLOB_BYTES_MAX,
                );
                if let Some(bytes) = given(blob.await)? {
                    return Ok(Some(bytes));
                }
            } else if let Some(tag) = self.tags.pop_front() {
                self.look_into(fetcher, source, tag).await?;
            } else {
                let found = match self.stage {
                    Stage::Known => known_tags(fetcher, source).await?,
                    Stage::Listed => listed_tags(fetcher, source).await?,
                    Stage::End => return Ok(None),
                };
                self.stage = match self.stage {
                    Stage::Known => Stage::Listed,
                    _ => Stage::End,
                };
                let fresh = found.into_iter().filter(|tag| self.seen.insert(tag.clone()));
                self.tags.extend(fresh);
            }
        }
        Ok(None)
    }

    /// Takes the candidates out of the image of TOCs that has this tag, if there is one.
    async fn look_into(&mut self, fetcher: &Fetcher, source: &Source, tag: String) -> Result<()> {
        if self.images >= TOC_IMAGES_MAX {
            return Ok(());
        }
        self.images += 1;
        let layer = source.descriptor.digest;
        let (client, repository) = (fetcher.client.clone(), source.repository.clone());
        let key = (repository.clone(), tag.clone());
        let ask = async move {
            let manifest = client.manifest(&repository, &Target::Tag(tag)).await;
            let manifest = given(manifest)?.map(|manifest| candidates(&manifest.bytes));
            Ok(manifest.unwrap_or_default().into())
        };
        let in_image = fetcher
            .toc_images
            .candidates
            .get(&fetcher.runtime, key, ask)
            .await?;
        let of_layer = in_image.iter().filter(|candidate| candidate.layer == layer);
        let fresh = of_layer.filter(|candidate| self.seen.insert(candidate.digest.to_string()));
        self.blobs.extend(fresh);
        Ok(())
    }
}

/// The TOCs that a manifest names. What is no manifest has none.
fn candidates(manifest: &[u8]) -> Vec<Candidate> {
    let Ok(Document { layers, .. }) = serde_json::from_slice(manifest) else {
        return Vec::new();
    };
    let candidate = |blob: Blob| {
        let layer = blob.annotations.as_ref()?.get(LAYER_DIGEST_ANNOTATION)?;
        Some(Candidate {
            layer: layer.parse().ok()?,
            digest: blob.digest,
            size: blob.size,
        })
    };
    layers.into_iter().filter_map(candidate).collect()
}

/// What was asked for, `None` if it is not to be had from this registry.
fn given<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(given) => Ok(Some(given)),
        Err(
            error @ (Error::NotFound { .. }
            | Error::Denied { .. }
            | Error::NoCredentials { .. }
            | Error::Unsupported { .. }
            | Error::Malformed { .. }
            | Error::Verification { .. }),
        ) => {
            tracing::debug!(%error, "no TOC from there");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn toc_tag(tag: &str) -> Option<String> {
    Some(format!("{tag}{TAG_SUFFIX}")).filter(|tag| is_tag(tag))
}

/// The images of TOCs of the tags that are known to name the layer's image, or an index with it.
async fn known_tags(fetcher: &Fetcher, source: &Source) -> Result<Vec<String>> {
    let Some(place) = &source.place else {
        return Ok(Vec::new());
    };
    let (store, repository, manifest) = (
        Arc::clone(&fetcher.store),
        source.repository.to_string(),
        place.manifest,
    );
    blocking(&fetcher.runtime, move || {
        let mut tags = Vec::new();
        for (tag, digest) in store.db().tags_of(&repository, KNOWN_TAGS_MAX)? {
            let leads_there = || {
                let index = store.documents().get(&digest)?;
                Ok::<_, Error>(index.is_some_and(|bytes| is_index_of(&bytes, &manifest)))
            };
            if digest == manifest || leads_there()? {
                tags.extend(toc_tag(&tag));
            }
        }
        Ok(tags)
    })
    .await
}

fn is_index_of(bytes: &[u8], manifest: &Digest) -> bool {
    let document: std::result::Result<Document, _> = serde_json::from_slice(bytes);
    document.is_ok_and(|index| index.manifests.iter().any(|entry| entry.digest == *manifest))
}

/// The tags of the repository that are named like those of images of TOCs.
async fn listed_tags(fetcher: &Fetcher, source: &Source) -> Result<Vec<String>> {
    let (client, repository) = (fetcher.client.clone(), source.repository.clone());
    let list = async move {
        let mut tags = Vec::new();
        let mut pager = client.tags(&repository);
        for _ in 0..PAGES_MAX {
            let Some(Some(page)) = given(pager.next_page().await)? else {
                break;
            };
            tags.extend(page.into_iter().filter(|tag| tag.ends_with(TAG_SUFFIX)));
            if tags.len() >= TOC_IMAGES_MAX {
                break;
            }
        }
        Ok(tags.into())
    };
    let key = source.repository.clone();
    let tags: Arc<[String]> = fetcher.toc_images.tags.get(&fetcher.runtime, key, list).await?;
    Ok(tags.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_known_by_its_manifests() {
        let digest = Digest::of(b"1");
        let index = format!(r#"{{"manifests":[{{"digest":"{digest}","size":1,"annotations":null}}]}}"#);
        assert!(is_index_of(index.as_bytes(), &digest));
        assert!(!is_index_of(index.as_bytes(), &Digest::of(b"2")));
        for other in ["", "[]", "{}", r#"{"manifests":null}"#] {
            assert!(!is_index_of(other.as_bytes(), &digest), "{other}");
        }
    }

    #[test]
    fn a_tag_without_room_for_the_ending_has_no_toc_image() {
        assert_eq!(toc_tag("1.0").as_deref(), Some("1.0-esgztoc"));
        assert_eq!(toc_tag(&"x".repeat(125)), None);
    }
}
