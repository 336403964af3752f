//! Layouts that converting has written, and their layers, as other readers than ours see them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

use flate2::read::MultiGzDecoder;
use registryfs::digest::Digest;
use serde_json::Value;

use crate::world::World;

/// The entry of a layer's tar that holds the TOC.
pub(crate) const TOC: &str = "stargz.index.json";

/// A layout that a test has written to.
pub(crate) struct Layout(pub(crate) PathBuf);

impl Layout {
    pub(crate) fn of(world: &World) -> Self {
        Self(world.path("out"))
    }

    /// What names an image of it on the command line.
    pub(crate) fn image(&self, name: &str) -> String {
        format!("oci:{}:{name}", self.0.display())
    }

    pub(crate) fn blob(&self, digest: &Value) -> Vec<u8> {
        let digest: Digest = digest.as_str().unwrap().parse().unwrap();
        let bytes = std::fs::read(self.0.join("blobs/sha256").join(digest.hex())).unwrap();
        assert_eq!(Digest::of(&bytes), digest);
        bytes
    }

    pub(crate) fn json(&self, digest: &Value) -> Value {
        serde_json::from_slice(&self.blob(digest)).unwrap()
    }

    /// The descriptors of `index.json` by name.
    pub(crate) fn names(&self) -> BTreeMap<String, Value> {
        let index: Value =
            serde_json::from_slice(&std::fs::read(self.0.join("index.json")).unwrap()).unwrap();
        let manifests = index["manifests"].as_array().unwrap().clone();
        let name = |manifest: &Value| manifest["annotations"]["org.opencontainers.image.ref.name"].clone();
        manifests
            .into_iter()
            .map(|manifest| (name(&manifest).as_str().unwrap().to_owned(), manifest))
            .collect()
    }

    pub(crate) fn manifest(&self, name: &str) -> Value {
        self.json(&self.names()[name]["digest"])
    }

    /// The blob of a layer.
    pub(crate) fn layer(&self, name: &str, number: usize) -> Vec<u8> {
        self.blob(&self.manifest(name)["layers"][number]["digest"])
    }
}

/// A tar, entry by entry, as another reader than ours sees it.
pub(crate) fn entries(tar: &[u8]) -> Vec<(String, String)> {
    let mut archive = tar::Archive::new(tar);
    let entry = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
        let mut entry = entry.unwrap();
        let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let pax: Vec<String> = match entry.pax_extensions().unwrap() {
            Some(records) => records
                .map(|record| {
                    let record = record.unwrap();
                    format!("{:?}={:?}", record.key(), record.value_bytes())
                })
                .collect(),
            None => Vec::new(),
        };
        let link = entry
            .link_name_bytes()
            .map(std::borrow::Cow::into_owned)
            .unwrap_or_default();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let header = entry.header();
        let seen = format!(
            "{:?} {:o} {:?}:{:?} {:?} {:?} {} {} {pax:?}",
            header.entry_type(),
            header.mode().unwrap(),
            header.uid().unwrap(),
            header.gid().unwrap(),
            header.mtime().unwrap(),
            (
                header.device_major().unwrap_or(None),
                header.device_minor().unwrap_or(None)
            ),
            String::from_utf8_lossy(&link),
            Digest::of(&content),
        );
        (path, seen)
    };
    archive.entries().unwrap().map(entry).collect()
}

pub(crate) fn gunzip(blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    MultiGzDecoder::new(blob).read_to_end(&mut tar).unwrap();
    tar
}

/// The names in a layer's tar, in its order, without the TOC.
pub(crate) fn names(blob: &[u8]) -> Vec<String> {
    let names = entries(&gunzip(blob)).into_iter().map(|(name, _)| name);
    names.filter(|name| name != TOC).collect()
}

/// The entries of a layer's TOC.
pub(crate) fn toc(blob: &[u8]) -> Vec<Value> {
    let tar = gunzip(blob);
    let mut archive = tar::Archive::new(tar.as_slice());
    let mut entries = archive.entries().unwrap().map(Result::unwrap);
    let entry = entries
        .find(|entry| *entry.path_bytes() == *TOC.as_bytes())
        .unwrap();
    let toc: Value = serde_json::from_reader(entry).unwrap();
    toc["entries"].as_array().unwrap().clone()
}
