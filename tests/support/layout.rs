//! OCI image layouts on disk, written by the book (OCI image specification), or broken on purpose.

// Each test binary uses its own part of this.
#![allow(dead_code)]
// Helpers outside of test functions are tests too.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use registryfs::demo::{Image, ImageIndex};
use registryfs::digest::Digest;
use serde_json::{Value, json};

pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
pub(crate) const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// A layout that is being written.
pub(crate) struct LayoutDir {
    path: PathBuf,
    manifests: Vec<Value>,
}

impl LayoutDir {
    /// An empty layout.
    pub(crate) fn create(path: &Path) -> Self {
        std::fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        let layout = Self {
            path: path.to_owned(),
            manifests: Vec::new(),
        };
        std::fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        layout.write_index();
        layout
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where a blob is.
    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn put_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blob(&digest), bytes).unwrap();
        digest
    }

    fn put_image(&self, image: &Image) {
        for (_, bytes) in image.blobs() {
            self.put_blob(&bytes);
        }
        self.put_blob(&image.manifest);
    }

    /// Adds an image under these annotations.
    pub(crate) fn add(&mut self, image: &Image, annotations: &[(&str, &str)]) {
        self.put_image(image);
        self.describe(
            image.media_type(),
            &image.digest().to_string(),
            image.manifest.len(),
            annotations,
        );
    }

    /// Adds an image under what umoci, skopeo and buildah call a name.
    pub(crate) fn add_named(&mut self, image: &Image, name: &str) {
        self.add(image, &[(REF_NAME, name)]);
    }

    /// Adds an index under a name.
    pub(crate) fn add_index(&mut self, index: &ImageIndex, name: &str) {
        index.images.iter().for_each(|image| self.put_image(image));
        self.put_blob(&index.bytes);
        let digest = index.digest().to_string();
        self.describe(
            index.media_type(),
            &digest,
            index.bytes.len(),
            &[(REF_NAME, name)],
        );
    }

    /// Adds an entry to `index.json` alone.
    pub(crate) fn describe(
        &mut self,
        media_type: &str,
        digest: &str,
        size: usize,
        annotations: &[(&str, &str)],
    ) {
        let mut descriptor = json!({ "mediaType": media_type, "digest": digest, "size": size });
        for (name, value) in annotations {
            descriptor["annotations"][name] = json!(value);
        }
        self.manifests.push(descriptor);
        self.write_index();
    }

    /// Takes all entries out of `index.json`.
    pub(crate) fn clear(&mut self) {
        self.manifests.clear();
        self.write_index();
    }

    fn write_index(&self) {
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        let aside = self.path.join("index.json.new");
        std::fs::write(&aside, index.to_string()).unwrap();
        std::fs::rename(aside, self.path.join("index.json")).unwrap();
    }
}
