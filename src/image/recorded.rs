//! What was read of an image, as an access profile.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::image::images::{Images, Rootfs};
use crate::image::plan::Name;
use crate::image::platform::Platform;
use crate::image::reads::{FILES_MAX, ReadFile, Record};
use crate::layer::entry::Kind;
use crate::registry::reference::Reference;

/// What was read of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// The image by its digest.
    pub reference: String,
    /// Its manifest.
    pub manifest: Digest,
    /// Why the tag could not be checked, where that is so and this is its last known image.
    pub stale: Option<String>,
    /// The files in the order in which they were first read: the path, without a leading slash, and the layer.
    pub files: Vec<(Name, u16)>,
    /// Why files may be missing that were read, and what helps.
    pub gaps: Vec<String>,
    /// Whether files may be among them that the kernel has read ahead only.
    pub is_rough: bool,
}

impl Images {
    /// What was read of an image in mounts of this process, and with `restart` nothing of it is known afterwards.
    ///
    /// # Errors
    /// As [`Self::digest`]; [`Error::NotFound`] if nothing was read.
    pub async fn recorded(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        restart: bool,
    ) -> Result<Recorded> {
        let (digest, stale) = self.digest(reference).await?;
        let image = self.image(&reference.repository, &digest, platform).await?;
        let name = format!("{}@{}", image.repository(), image.digest());
        // Opening an image that nobody has opened could take long, and would find nothing.
        let is_open = image.open_rootfs().is_some() || self.recorder().has(image.digest());
        if !is_open {
            return Err(nothing(&name, &[]));
        }
        let rootfs = self.rootfs(&image).await?;
        let Some(reads) = rootfs.reads() else {
            return Err(nothing(&name, &[]));
        };
        let record = reads.record();
        let (gaps, is_rough) = (gaps(&record), record.is_rough);
        let (of, read) = (Arc::clone(&rootfs), record.files.clone());
        let files = blocking(self.fetcher().runtime(), move || named(&of, &read)).await?;
        if files.is_empty() {
            return Err(nothing(&name, &gaps));
        }
        if restart {
            reads.restart(&record);
        }
        Ok(Recorded {
            reference: name,
            manifest: *image.digest(),
            stale,
            files,
            gaps,
            is_rough,
        })
    }
}

fn nothing(name: &str, gaps: &[String]) -> Error {
    let why = "no file of it has been read through a mount of this daemon; run a program on the mounted image first, \
               and ask again while it is mounted";
    let why = gaps
        .iter()
        .fold(why.to_owned(), |why, gap| format!("{why}. {gap}"));
    Error::not_found(format!("record of {name}"), why)
}

/// Why a record may not say all.
fn gaps(record: &Record) -> Vec<String> {
    let mut gaps = Vec::new();
    if !record.unseen_layers.is_empty() {
        let layers: Vec<String> = record.unseen_layers.iter().map(ToString::to_string).collect();
        gaps.push(format!(
            "The kernel reads these layers from the cache's own files, where nobody sees what: {}. \
             To see it, mount with -o kernel=off and run the program there",
            layers.join(", ")
        ));
    }
    if record.is_full {
        gaps.push(format!(
            "There was no room for all: at most {FILES_MAX} files of an image are noted"
        ));
    }
    if record.is_given_up {
        gaps.push("What was read at first was given up in favour of other images; mount anew and run the program again".to_owned());
    }
    gaps
}

/// The names that files of layers have in the merged tree. What has none is not in it: a layer above hides it.
fn named(rootfs: &Rootfs, files: &[ReadFile]) -> Result<Vec<(Name, u16)>> {
    let mut places: HashMap<ReadFile, usize> = HashMap::with_capacity(files.len());
    for (place, file) in files.iter().enumerate() {
        places.entry(*file).or_insert(place);
    }
    let tree = rootfs.tree();
    let mut named = Vec::with_capacity(places.len());
    for number in 0..tree.node_count() {
        let node = tree.node(number)?;
        let (Kind::File, Some(entry)) = (node.kind, node.entry) else {
            continue;
        };
        let file = ReadFile {
            layer: node.layer,
            entry,
        };
        if let Some(place) = places.remove(&file) {
            named.push((place, tree.path_of(number)?, node.layer));
        }
    }
    named.sort_unstable_by_key(|(place, ..)| *place);
    let named = named.into_iter().map(|(_, path, layer)| (Name(path), layer));
    rootfs.vouch(named.collect())
}
