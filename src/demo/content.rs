//! What the demo registry holds: repositories with their tags, manifests and blobs, all in memory.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::digest::Digest;

use super::images::{Image, ImageIndex};

/// A manifest or an index as it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub bytes: Bytes,
}

/// One repository. The bytes of its blobs are in the [`Content`], shared with the other repositories.
#[derive(Debug, Clone, Default)]
pub struct Repository {
    tags: BTreeMap<String, Digest>,
    manifests: HashMap<Digest, Manifest>,
    blobs: HashSet<Digest>,
}

impl Repository {
    /// The tags in the order of their bytes, as registries list them.
    pub fn tags(&self) -> impl Iterator<Item = (&str, Digest)> {
        self.tags.iter().map(|(tag, digest)| (tag.as_str(), *digest))
    }

    /// The digest that `reference`, a tag or a digest, names here.
    #[must_use]
    pub fn resolve(&self, reference: &str) -> Option<Digest> {
        match reference.parse::<Digest>() {
            Ok(digest) => Some(digest).filter(|digest| self.manifests.contains_key(digest)),
            Err(_) => self.tags.get(reference).copied(),
        }
    }

    /// What refers to the manifest `subject`, as the entries of an index; of one type of artifact where it is named.
    #[must_use]
    pub fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Vec<Value> {
        let mut referrers = Vec::new();
        for (digest, manifest) in &self.manifests {
            let read: Value = serde_json::from_slice(&manifest.bytes).unwrap_or_default();
            let own = read.get("artifactType").unwrap_or(&read["config"]["mediaType"]);
            if read["subject"]["digest"].as_str() == Some(&subject.to_string())
                && artifact_type.is_none_or(|wanted| own.as_str() == Some(wanted))
            {
                referrers.push((
                    *digest,
                    json!({
                        "mediaType": manifest.media_type,
                        "digest": digest.to_string(),
                        "size": manifest.bytes.len(),
                        "artifactType": own,
                    }),
                ));
            }
        }
        referrers.sort_by_key(|(digest, _)| digest.to_string());
        referrers.into_iter().map(|(_, descriptor)| descriptor).collect()
    }

    /// The manifest with that digest.
    #[must_use]
    pub fn manifest(&self, digest: &Digest) -> Option<&Manifest> {
        self.manifests.get(digest)
    }
}

/// Everything in a registry.
#[derive(Debug, Clone, Default)]
pub struct Content {
    repositories: BTreeMap<String, Repository>,
    blobs: HashMap<Digest, Bytes>,
}

impl Content {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The repositories' names in the order of their bytes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.repositories.keys().map(String::as_str)
    }

    /// The repository `name`.
    #[must_use]
    pub fn repository(&self, name: &str) -> Option<&Repository> {
        self.repositories.get(name)
    }

    /// The blob `digest` as far as repository `name` has it.
    #[must_use]
    pub fn blob(&self, name: &str, digest: &Digest) -> Option<Bytes> {
        let repository = self.repositories.get(name)?;
        repository
            .blobs
            .contains(digest)
            .then(|| self.blobs.get(digest).cloned())?
    }

    fn repository_mut(&mut self, name: &str) -> &mut Repository {
        self.repositories.entry(name.to_owned()).or_default()
    }

    /// Adds a blob to repository `name` and gives its digest.
    pub fn put_blob(&mut self, name: &str, bytes: Bytes) -> Digest {
        let digest = Digest::of(&bytes);
        self.insert_blob(name, digest, bytes);
        digest
    }

    fn insert_blob(&mut self, name: &str, digest: Digest, bytes: Bytes) {
        self.blobs.insert(digest, bytes);
        self.repository_mut(name).blobs.insert(digest);
    }

    /// Adds blob `digest` of repository `from` to repository `name`. Returns whether `from` has it.
    pub fn mount_blob(&mut self, name: &str, from: &str, digest: Digest) -> bool {
        let has = self.blob(from, &digest).is_some();
        if has {
            self.repository_mut(name).blobs.insert(digest);
        }
        has
    }

    /// Takes blob `digest` out of repository `name`.
    pub fn remove_blob(&mut self, name: &str, digest: &Digest) {
        if let Some(repository) = self.repositories.get_mut(name) {
            repository.blobs.remove(digest);
        }
    }

    /// Adds a manifest or an index to repository `name` and gives its digest.
    pub fn put_manifest(&mut self, name: &str, media_type: impl Into<String>, bytes: Bytes) -> Digest {
        let digest = Digest::of(&bytes);
        let media_type = media_type.into();
        let manifest = Manifest { media_type, bytes };
        self.repository_mut(name).manifests.insert(digest, manifest);
        digest
    }

    /// Lets `tag` of repository `name` name `digest`, whatever it named before.
    pub fn tag(&mut self, name: &str, tag: impl Into<String>, digest: Digest) {
        self.repository_mut(name).tags.insert(tag.into(), digest);
    }

    /// Takes a tag away.
    pub fn untag(&mut self, name: &str, tag: &str) {
        if let Some(repository) = self.repositories.get_mut(name) {
            repository.tags.remove(tag);
        }
    }

    /// Adds an image with its blobs to repository `name` and gives its manifest's digest.
    pub fn add_image(&mut self, name: &str, image: &Image) -> Digest {
        for (digest, blob) in image.blobs() {
            self.insert_blob(name, digest, blob);
        }
        self.put_manifest(name, image.media_type(), image.manifest.clone())
    }

    /// Adds an index with its images to repository `name` and gives the index's digest.
    pub fn add_index(&mut self, name: &str, index: &ImageIndex) -> Digest {
        for image in &index.images {
            self.add_image(name, image);
        }
        self.put_manifest(name, index.media_type(), index.bytes.clone())
    }

    /// Adds an image under a tag: [`Content::add_image`] and [`Content::tag`] in one.
    pub fn add_tagged_image(&mut self, name: &str, tag: impl Into<String>, image: &Image) -> Digest {
        let digest = self.add_image(name, image);
        self.tag(name, tag, digest);
        digest
    }
}
