//! What an image owns: `rootfs`, `layers`, its documents, its platforms. Everything here belongs to a digest and never
//! changes, so the kernel may keep it for ever.

use std::sync::Arc;

use bytes::Bytes;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::{Source, blocking};
use crate::fs::Filesystem;
use crate::fs::blob::BlobReader;
use crate::fs::grammar::OwnName;
use crate::fs::ino::{in_slot, of_name};
use crate::fs::names::missing_of_index;
use crate::fs::nodes::{ImageAt, Kind, LayerName, Likeness, NameNode};
use crate::fs::ops::{Answer, Caller, DirEntry, Entry, FOREVER, FileType, Lookup};
use crate::fs::pending::Unopened;
use crate::fs::privacy::Privacy;
use crate::image::answers::{IndexedLayer, LayerInfo};
use crate::image::platform::Platform;
use crate::image::{Image, Named};

impl Filesystem {
    /// One of an image's own names.
    pub(super) fn lookup_own(
        &self,
        caller: Caller,
        dir: &Arc<NameNode>,
        at: Arc<ImageAt>,
        own: OwnName,
    ) -> Answer<Lookup> {
        let digest_text = |at: &ImageAt| Bytes::from(format!("{}\n", at.digest()));
        match (own, &at.named) {
            (OwnName::Digest, _) => self.found(dir, &at, own.name(), Kind::Text(digest_text(&at))),
            (OwnName::Index, Named::Index(index)) => {
                self.found(dir, &at, own.name(), Kind::Text(index.bytes.clone()))
            }
            (OwnName::Platforms, Named::Index(_)) => {
                self.found(dir, &at, own.name(), Kind::Platforms(Arc::clone(&at)))
            }
            (OwnName::Index | OwnName::Platforms, Named::Image(_)) => {
                Answer::Now(Ok(Lookup::Absent(FOREVER)))
            }
            _ => match at.image.clone() {
                Ok(image) => self.lookup_of_image(caller, dir, at, image, own),
                Err(error) => {
                    self.journal()
                        .record("lookup", &dir.child_path(own.name()), &error);
                    Answer::Now(Ok(Lookup::Absent(FOREVER)))
                }
            },
        }
    }

    /// One of the names that need an image for the mount's platform.
    fn lookup_of_image(
        &self,
        caller: Caller,
        dir: &Arc<NameNode>,
        at: Arc<ImageAt>,
        image: Arc<Image>,
        own: OwnName,
    ) -> Answer<Lookup> {
        let kind = match own {
            OwnName::Rootfs => {
                let unopened = Unopened { image, layer: None };
                return self.lookup_tree(caller, dir, &at, own.name(), unopened);
            }
            OwnName::Layers => Kind::Layers(Arc::clone(&at)),
            OwnName::Manifest => Kind::Text(image.bytes().clone()),
            _ => Kind::Config {
                at: Arc::clone(&at),
                size: image.manifest().config.size,
            },
        };
        self.found(dir, &at, own.name(), kind)
    }

    /// A name inode below an image, which belongs to its digest for good.
    fn found(&self, dir: &NameNode, at: &ImageAt, name: &str, kind: Kind) -> Answer<Lookup> {
        Answer::Now(Ok(Lookup::Found(self.count_own(dir, at, name, kind))))
    }

    fn count_own(&self, dir: &NameNode, at: &ImageAt, name: &str, kind: Kind) -> Entry {
        let node = self.count_node(dir, at, name, kind);
        self.name_entry(&node, self.own_ttl(dir, at))
    }

    fn count_node(&self, dir: &NameNode, at: &ImageAt, name: &str, kind: Kind) -> Arc<NameNode> {
        self.nodes().count(
            dir.ino,
            dir.child_path(name),
            Some(at.digest()),
            |_| Likeness::Same,
            || kind,
        )
    }

    /// What the slot of a merged tree's directories is known by.
    pub(super) fn view_key(&self, path: &str, digest: &Digest) -> String {
        format!("dirs {path} {digest} {}", self.options().platform)
    }

    /// The number of the slot that is known by `key`, the same for ever.
    pub(super) async fn slot(&self, key: String) -> Result<u32> {
        let fetcher = self.images().fetcher();
        let store = Arc::clone(fetcher.store());
        blocking(fetcher.runtime(), move || store.db().slot(&key)).await
    }

    /// What an image's directory lists.
    pub(super) async fn own_entries(&self, dir: &NameNode, at: &ImageAt) -> Result<Vec<DirEntry>> {
        let is_index = matches!(at.named, Named::Index(_));
        let shown = |own: &OwnName| match own {
            OwnName::Digest => true,
            own if own.of_index() => is_index,
            _ => at.image.is_ok(),
        };
        let mut entries = Vec::new();
        for own in OwnName::ALL.into_iter().filter(shown) {
            entries.push(match own {
                OwnName::Rootfs => self.tree_entry(dir, at, own.name()).await?,
                own => own_entry(dir, at, own.name(), own.is_dir()),
            });
        }
        Ok(entries)
    }

    /// The entry of a merged tree's root, which has the number that a lookup would give it.
    async fn tree_entry(&self, dir: &NameNode, at: &ImageAt, name: &str) -> Result<DirEntry> {
        let slot = self
            .slot(self.view_key(&dir.child_path(name), at.digest()))
            .await?;
        Ok(DirEntry {
            ino: in_slot(slot, crate::image::tree::ROOT),
            ..own_entry(dir, at, name, true)
        })
    }

    pub(super) fn lookup_platform(
        &self,
        caller: Caller,
        dir: &Arc<NameNode>,
        at: &Arc<ImageAt>,
        name: &[u8],
    ) -> Answer<Lookup> {
        let Named::Index(index) = &at.named else {
            return Answer::Now(Ok(Lookup::Absent(FOREVER)));
        };
        let named = |platform: &Platform| platform.dir_name().as_bytes() == name;
        let Some(entry) = index.entries.iter().find(|entry| named(&entry.platform)) else {
            return Answer::Now(Ok(Lookup::Absent(FOREVER)));
        };
        let (filesystem, dir, outer) = (self.clone(), Arc::clone(dir), Arc::clone(at));
        let (repository, digest) = (index.repository.clone(), entry.digest);
        let name = entry.platform.dir_name();
        let path = dir.child_path(&name);
        let what = path.clone();
        let wait = self.options().lookup_wait;
        self.journaled("lookup", move || path, async move {
            let named =
                crate::fs::within(wait, || what, filesystem.images().named(&repository, &digest)).await;
            let named = named.map_err(missing_of_index)?;
            let Named::Image(image) = named.clone() else {
                return Err(Error::unsupported(
                    format!("{repository}@{digest}"),
                    "an index within an index",
                ));
            };
            let at = Arc::new(ImageAt {
                named,
                image: Ok(image),
                privacy: Privacy::new(filesystem.options().hides_private),
            });
            let node = filesystem.count_node(&dir, &outer, &name, Kind::Image(at));
            let entry_ttl = filesystem.own_ttl(&dir, &outer);
            Ok(Lookup::Found(
                filesystem.image_entry(caller, &node, entry_ttl).await,
            ))
        })
    }

    pub(super) fn platform_entries(&self, dir: &NameNode, at: &ImageAt) -> Vec<DirEntry> {
        let Named::Index(index) = &at.named else {
            return Vec::new();
        };
        let mut names: Vec<String> = index
            .entries
            .iter()
            .map(|entry| entry.platform.dir_name())
            .collect();
        names.sort();
        names.dedup();
        names.iter().map(|name| own_entry(dir, at, name, true)).collect()
    }

    pub(super) fn lookup_layer(&self, dir: &NameNode, at: &Arc<ImageAt>, name: &[u8]) -> Lookup {
        let number = std::str::from_utf8(name).ok().and_then(|text| {
            let number: usize = text.parse().ok()?;
            (number.to_string() == text && number < layer_count(at)).then_some(number)
        });
        let Some(number) = number else {
            return Lookup::Absent(FOREVER);
        };
        let kind = Kind::Layer {
            at: Arc::clone(at),
            number,
        };
        Lookup::Found(self.count_own(dir, at, &number.to_string(), kind))
    }

    pub(super) fn layer_entries(&self, dir: &NameNode, at: &ImageAt) -> Vec<DirEntry> {
        (0..layer_count(at))
            .map(|number| own_entry(dir, at, &number.to_string(), true))
            .collect()
    }

    pub(super) fn lookup_layer_name(
        &self,
        caller: Caller,
        dir: &Arc<NameNode>,
        at: Arc<ImageAt>,
        number: usize,
        name: &[u8],
    ) -> Answer<Lookup> {
        let own = LayerName::ALL
            .into_iter()
            .find(|own| own.name().as_bytes() == name);
        let image = at.image.as_ref().ok().cloned();
        let source = image
            .as_ref()
            .and_then(|image| image.sources().get(number))
            .cloned();
        let (Some(own), Some(image), Some(source)) = (own, image, source) else {
            return Answer::Now(Ok(Lookup::Absent(FOREVER)));
        };
        let line = |text: String| Kind::Text(Bytes::from(text + "\n"));
        let kind = match own {
            LayerName::Fs => {
                let layer = Some(number);
                return self.lookup_tree(caller, dir, &at, own.name(), Unopened { image, layer });
            }
            LayerName::Blob => Kind::Blob(Arc::new(BlobReader::new(source, Arc::clone(self.streams())))),
            LayerName::Digest => line(source.descriptor.digest.to_string()),
            LayerName::MediaType => line(source.descriptor.media_type.clone()),
            LayerName::Size => line(source.descriptor.size.to_string()),
            LayerName::Format => return self.lookup_format(dir, source),
            LayerName::Toc => return self.lookup_toc(dir, at, number, source),
        };
        self.found(dir, &at, own.name(), kind)
    }

    /// What is known of a layer now, without asking anybody.
    fn lookup_format(&self, dir: &Arc<NameNode>, source: Arc<Source>) -> Answer<Lookup> {
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let path = dir.child_path(LayerName::Format.name());
        let journal_path = path.clone();
        self.journaled("lookup", move || journal_path, async move {
            let known = filesystem.images().known_layer_info(&source).await?;
            let text = Bytes::from(format_text(&known));
            Ok(Lookup::Found(filesystem.snapshot(dir.ino, path, text)))
        })
    }

    /// The table of contents of a layer that has one. A layer that must be read as a whole has none, nor has one with a zTOC,
    /// of which reading that would tell whether it must be.
    fn lookup_toc(
        &self,
        dir: &Arc<NameNode>,
        at: Arc<ImageAt>,
        number: usize,
        source: Arc<Source>,
    ) -> Answer<Lookup> {
        let (filesystem, dir) = (self.clone(), Arc::clone(dir));
        let path = dir.child_path(LayerName::Toc.name());
        let what = path.clone();
        let wait = self.options().lookup_wait;
        self.journaled("lookup", move || path, async move {
            let fetcher = filesystem.images().fetcher();
            if source.ztoc.is_some() {
                return Ok(Lookup::Absent(FOREVER));
            }
            let layer = match crate::fs::within(wait, || what, fetcher.layer_without_pass(&source)).await {
                Err(Error::Unsupported { .. }) => return Ok(Lookup::Absent(FOREVER)),
                layer => layer?,
            };
            let Some(layer) = layer else {
                return Ok(Lookup::Absent(FOREVER));
            };
            let size = layer.index().summary().toc_bytes;
            if size == 0 {
                return Ok(Lookup::Absent(FOREVER));
            }
            let kind = Kind::Toc {
                at: Arc::clone(&at),
                number,
                size,
            };
            let entry = filesystem.count_own(&dir, &at, LayerName::Toc.name(), kind);
            Ok(Lookup::Found(entry))
        })
    }

    pub(super) async fn layer_name_entries(
        &self,
        dir: &NameNode,
        at: &ImageAt,
        number: usize,
    ) -> Result<Vec<DirEntry>> {
        let source = at
            .image
            .as_ref()
            .ok()
            .and_then(|image| image.sources().get(number));
        let has_toc = match source {
            Some(source) => self.has_toc(source).await?,
            None => false,
        };
        let shown = LayerName::ALL
            .into_iter()
            .filter(|own| has_toc || *own != LayerName::Toc);
        let mut entries = Vec::new();
        for own in shown {
            entries.push(match own {
                LayerName::Fs => self.tree_entry(dir, at, own.name()).await?,
                own => own_entry(dir, at, own.name(), false),
            });
        }
        Ok(entries)
    }

    /// Whether a layer has a table of contents. To find out, none is read as a whole.
    async fn has_toc(&self, source: &Arc<Source>) -> Result<bool> {
        // What is read by a zTOC has no table of contents of its own.
        if source.ztoc.is_some() {
            return Ok(false);
        }
        match self.images().fetcher().layer_without_pass(source).await {
            Ok(layer) => Ok(layer.is_some_and(|layer| layer.index().summary().toc_bytes > 0)),
            Err(Error::Unsupported { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a file of the tree of names.
    pub(super) fn read_own(&self, node: &Arc<NameNode>, offset: u64, len: usize) -> Answer<Vec<u8>> {
        if let Kind::Text(content) = &node.kind {
            return Answer::Now(Ok(slice(content, offset, len)));
        }
        if node.is_dir() {
            return Answer::Now(Err(Error::posix(node.path.as_str(), libc::EISDIR)));
        }
        let (filesystem, node) = (self.clone(), Arc::clone(node));
        let path = node.path.clone();
        self.journaled("read", move || path, async move {
            let fetcher = filesystem.images().fetcher();
            match &node.kind {
                Kind::Blob(blob) => blob.read(fetcher, offset, len).await,
                Kind::Config { at, .. } => {
                    let image = at.image.clone()?;
                    Ok(slice(
                        &filesystem.images().image_config(&image).await?,
                        offset,
                        len,
                    ))
                }
                Kind::Toc { at, number, .. } => {
                    let image = at.image.clone()?;
                    let source = image.sources().get(*number);
                    let source =
                        source.ok_or_else(|| Error::not_found(node.path.as_str(), "no such layer"))?;
                    Ok(slice(&filesystem.toc(source).await?, offset, len))
                }
                _ => Err(Error::posix(node.path.as_str(), libc::EINVAL)),
            }
        })
    }

    /// A layer's table of contents, as the registry has it, verified; fetched and unpacked once for all who read it. It is known
    /// by what the layer is stored under: one blob can be promised different ones, where they are in other images.
    async fn toc(&self, source: &Arc<Source>) -> Result<Bytes> {
        let key = source.key();
        if let Some(toc) = self.tocs().ready.lock().get(&key) {
            return Ok(toc.clone());
        }
        let (filesystem, source) = (self.clone(), Arc::clone(source));
        let flight = (source.repository.clone(), key);
        let work = async move {
            // The one before may have ended in between.
            if let Some(toc) = filesystem.tocs().ready.lock().get(&key) {
                return Ok(toc.clone());
            }
            let toc = filesystem.images().fetcher().toc(&source).await?;
            filesystem.tocs().ready.lock().put(key, toc.clone());
            Ok(toc)
        };
        let runtime = self.images().fetcher().runtime();
        self.tocs().under_way.run(runtime, flight, work).await
    }
}

/// The entry of a name inode below an image.
fn own_entry(dir: &NameNode, at: &ImageAt, name: &str, is_dir: bool) -> DirEntry {
    DirEntry {
        name: name.as_bytes().to_vec(),
        ino: of_name(&dir.child_path(name), Some(at.digest())),
        kind: if is_dir { FileType::Dir } else { FileType::File },
        next: 0,
    }
}

/// A layer's format on a line of its own, and below it how it is read and what that costs; `-` for what nobody knows yet.
fn format_text(layer: &LayerInfo) -> String {
    let of_index = |of: fn(&IndexedLayer) -> u64| match &layer.indexed {
        Some(indexed) => of(indexed).to_string(),
        None => "-".to_owned(),
    };
    let values = [
        ("read", layer.reading.clone()),
        ("blob_bytes", layer.blob_bytes.to_string()),
        ("unpacked_bytes", of_index(|indexed| indexed.unpacked_bytes)),
        ("index_bytes", of_index(|indexed| indexed.index_bytes)),
        ("cached_bytes", of_index(|indexed| indexed.cached_bytes)),
    ];
    let lines = values.map(|(name, value)| format!("{name}: {value}\n"));
    format!("{}\n{}", layer.format, lines.concat())
}

fn layer_count(at: &ImageAt) -> usize {
    at.image.as_ref().map_or(0, |image| image.sources().len())
}

fn slice(content: &Bytes, offset: u64, len: usize) -> Vec<u8> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
    let end = start.saturating_add(len).min(content.len());
    content.get(start..end).unwrap_or_default().to_vec()
}
