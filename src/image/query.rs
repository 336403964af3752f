//! The read-only questions that commands ask about images, answered as plain data.

use std::sync::Arc;

use bytes::Bytes;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, FileAt, Source};
use crate::image::answers::{FileInfo, ImageInfo, IndexedLayer, LayerInfo, Listing, Resolved};
use crate::image::images::{Image, Images, Named, Rootfs};
use crate::image::manifest::choose;
use crate::image::platform::Platform;
use crate::image::tree::Node;
use crate::layer::entry::Kind;
use crate::layer::{self, Reading};
use crate::registry::reference::{Reference, Repository, Target, canonical_host};
use crate::store::layer::Layer;

/// A file of an image, open for reading.
#[derive(Debug)]
pub struct OpenFile {
    fetcher: Arc<Fetcher>,
    at: FileAt,
    size: u64,
}

impl OpenFile {
    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes `offset..offset + len`, cut at the end of the file.
    ///
    /// # Errors
    /// What kept the bytes from coming, or from being what the layer promises.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        match self.fetcher.read_now(&self.at, offset, len) {
            Some(bytes) => Ok(bytes),
            None => self.fetcher.read(&self.at, offset, len).await,
        }
    }
}

impl Images {
    /// The repositories of a registry: its catalog where it has one, and those that were visited.
    ///
    /// # Errors
    /// [`Error::Usage`] if `host` is none; the registry's refusal if nothing is known either.
    pub async fn repos(self: &Arc<Self>, host: &str) -> Result<Listing> {
        let host = canonical_host(host)?;
        let prefix = format!("{host}/");
        let visited = self.resolver().visited(&host).await?;
        let visited = visited
            .iter()
            .filter_map(|name| name.strip_prefix(&prefix))
            .map(str::to_owned);
        let visited: Vec<String> = visited.collect();
        let mut listing = match self.resolver().catalog(&host).await {
            Ok(listing) => listing,
            Err(error) if visited.is_empty() => return Err(error),
            Err(error) => Listing {
                names: Vec::new(),
                stale: error.is_network().then(|| error.to_string()),
            },
        };
        listing.names.extend(visited);
        listing.names.sort();
        listing.names.dedup();
        Ok(listing)
    }

    /// The tags of a repository.
    ///
    /// # Errors
    /// As [`crate::image::resolve::Resolver::tags`].
    pub async fn tags(self: &Arc<Self>, repository: &Repository) -> Result<Listing> {
        self.resolver().tags(repository).await
    }

    /// The digest that a reference names now, or what was last heard and why it could not be checked.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Denied`], and those of the network.
    pub async fn digest(self: &Arc<Self>, reference: &Reference) -> Result<(Digest, Option<String>)> {
        match reference.target() {
            Target::Digest(digest) => Ok((digest, None)),
            Target::Tag(tag) => {
                let answer = self.resolver().tag(&reference.repository, &tag).await?;
                Ok((answer.digest, answer.stale))
            }
        }
    }

    /// What a reference names now, and of which type it is.
    ///
    /// # Errors
    /// As [`Self::digest`].
    pub async fn resolve(self: &Arc<Self>, reference: &Reference) -> Result<Resolved> {
        let (digest, stale) = self.digest(reference).await?;
        self.resolver().document(&reference.repository, &digest).await?;
        let media_type = self.resolver().media_type(&digest).await?.unwrap_or_default();
        Ok(Resolved {
            reference: reference.to_string(),
            digest,
            media_type,
            stale,
        })
    }

    /// The bytes of the manifest or index that a reference names.
    ///
    /// # Errors
    /// As [`Self::digest`].
    pub async fn manifest(self: &Arc<Self>, reference: &Reference) -> Result<Bytes> {
        let (digest, _) = self.digest(reference).await?;
        self.resolver().document(&reference.repository, &digest).await
    }

    /// The bytes of an image's configuration.
    ///
    /// # Errors
    /// As [`Self::digest`], and [`Error::NotFound`] for a platform that the index does not have.
    pub async fn config(self: &Arc<Self>, reference: &Reference, platform: &Platform) -> Result<Bytes> {
        self.image_config(&*self.chosen(reference, platform).await?).await
    }

    /// The bytes of an opened image's configuration.
    ///
    /// # Errors
    /// Those of the network, and of its digest.
    pub async fn image_config(self: &Arc<Self>, image: &Image) -> Result<Bytes> {
        self.fetcher()
            .config(image.repository(), &image.manifest().config)
            .await
    }

    /// The image that a reference and a platform choose.
    ///
    /// # Errors
    /// As [`Self::config`].
    pub async fn chosen(self: &Arc<Self>, reference: &Reference, platform: &Platform) -> Result<Arc<Image>> {
        let (digest, _) = self.digest(reference).await?;
        self.image(&reference.repository, &digest, platform).await
    }

    /// All about an image.
    ///
    /// # Errors
    /// As [`Self::rootfs`].
    pub async fn info(self: &Arc<Self>, reference: &Reference, platform: &Platform) -> Result<ImageInfo> {
        let resolved = self.resolve(reference).await?;
        let image = self
            .image(&reference.repository, &resolved.digest, platform)
            .await?;
        let (platforms, chosen) = match self.named(&reference.repository, &resolved.digest).await? {
            Named::Image(_) => (Vec::new(), None),
            Named::Index(index) => {
                let chosen = choose(&index.entries, platform).map(|entry| entry.platform.clone());
                (
                    index.entries.iter().map(|entry| entry.platform.clone()).collect(),
                    chosen,
                )
            }
        };
        let platform = match chosen {
            Some(platform) => platform,
            None => config_platform(&self.image_config(&image).await?).unwrap_or_else(|| platform.clone()),
        };
        let mut layers = Vec::with_capacity(image.sources().len());
        for source in image.sources() {
            layers.push(self.layer_info(source).await?);
        }
        let (mut inodes, mut bytes, mut warnings, mut tree) = (None, None, Vec::new(), None);
        if layers.iter().all(|layer| layer.indexed.is_some()) {
            let rootfs = self.rootfs(&image).await?;
            let totals = rootfs.tree().totals();
            (inodes, bytes, tree) = (Some(totals.nodes), Some(totals.bytes), Some(*rootfs.key()));
            let (store, key) = (Arc::clone(self.fetcher().store()), *rootfs.key());
            let read = move || store.db().warnings(&key);
            warnings = crate::fetch::blocking(self.fetcher().runtime(), read).await?;
        }
        Ok(ImageInfo {
            resolved,
            manifest: *image.digest(),
            platform,
            platforms,
            layers,
            inodes,
            bytes,
            warnings,
            tree,
            served_by: None,
        })
    }

    /// What is known of a layer without reading all of it.
    ///
    /// # Errors
    /// Those of the network, for a layer whose index takes a few ranges.
    pub async fn layer_info(&self, source: &Arc<Source>) -> Result<LayerInfo> {
        // What is wrong with a zTOC is said below.
        let settled = self.fetcher().settle(source).await;
        let source = settled.as_ref().unwrap_or(source);
        let found = self.fetcher().layer_without_pass(source).await;
        let mut info = self.known_layer_info(source).await?;
        match found {
            Err(error) if error.is_network() => return Err(error),
            Err(error) => info.refused = Some(error.to_string()),
            // What its manifest says of it may have turned out to be of no use.
            Ok(None) => info.reading = Reading::PassNeeded.name().to_owned(),
            Ok(Some(_)) => {}
        }
        Ok(info)
    }

    /// What is known of a layer now, without asking anybody.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn known_layer_info(&self, source: &Source) -> Result<LayerInfo> {
        let (format, reading) = layer::expected(&source.descriptor, source.ztoc.as_ref());
        let mut info = LayerInfo {
            digest: source.descriptor.digest,
            media_type: source.descriptor.media_type.clone(),
            format: format.name().to_owned(),
            reading: reading.name().to_owned(),
            blob_bytes: source.descriptor.size,
            indexed: None,
            refused: None,
        };
        if let Some(layer) = self.fetcher().stored_layer(source).await? {
            describe_index(&mut info, &layer)?;
        }
        Ok(info)
    }

    /// One path of an image, the last component not followed.
    ///
    /// # Errors
    /// As [`Self::rootfs`]; [`Error::NotFound`] and [`Error::Posix`] for the path.
    pub async fn file_info(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        path: &[u8],
    ) -> Result<FileInfo> {
        let rootfs = self.rootfs(&self.chosen(reference, platform).await?).await?;
        let node = rootfs.tree().node(rootfs.tree().resolve(path, false)?)?;
        self.describe(&rootfs, &node, path).await
    }

    /// A directory of an image, sorted by name; a file alone.
    ///
    /// # Errors
    /// As [`Self::file_info`].
    pub async fn ls(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        path: &[u8],
    ) -> Result<Vec<FileInfo>> {
        let rootfs = self.rootfs(&self.chosen(reference, platform).await?).await?;
        let tree = rootfs.tree();
        let node = tree.node(tree.resolve(path, true)?)?;
        if !node.is_dir() {
            return Ok(vec![self.describe(&rootfs, &node, path).await?]);
        }
        let mut listed = Vec::with_capacity(node.child_count as usize);
        for position in 0..node.child_count {
            let Some((name, child)) = tree.child_at(&node, position)? else {
                break;
            };
            listed.push(self.describe(&rootfs, &tree.node(child)?, name).await?);
        }
        Ok(listed)
    }

    /// A regular file of an image, symlinks resolved as in a chroot.
    ///
    /// # Errors
    /// As [`Self::file_info`]; [`Error::Posix`] for what is no regular file.
    pub async fn open_file(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        path: &[u8],
    ) -> Result<OpenFile> {
        let image = self.chosen(reference, platform).await?;
        let rootfs = self.rootfs(&image).await?;
        let node = rootfs.tree().node(rootfs.tree().resolve(path, true)?)?;
        let name = String::from_utf8_lossy(path);
        let at = rootfs
            .file(self.fetcher(), &node)
            .await
            .map_err(|error| match error {
                Error::Posix { errno, .. } => Error::posix(name, errno),
                other => other,
            })?;
        Ok(OpenFile {
            fetcher: Arc::clone(self.fetcher()),
            at,
            size: node.size,
        })
    }

    async fn describe(&self, rootfs: &Arc<Rootfs>, node: &Node, name: &[u8]) -> Result<FileInfo> {
        let mut info = FileInfo {
            name: String::from_utf8_lossy(name).into_owned(),
            kind: kind_name(node.kind).to_owned(),
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            size: node.size,
            mtime: node.mtime.seconds,
            nlink: node.nlink,
            target: None,
            rdev: None,
            layer: u32::from(node.layer),
            digest: None,
            cached_bytes: 0,
        };
        match node.kind {
            Kind::Symlink => {
                info.target = Some(String::from_utf8_lossy(rootfs.tree().link(node)?).into_owned());
            }
            Kind::Char | Kind::Block => info.rdev = Some(node.rdev),
            Kind::File => {
                let at = rootfs.file(self.fetcher(), node).await?;
                info.digest = content_digest(&at)?;
                info.cached_bytes = at.cached_bytes()?;
            }
            _ => {}
        }
        Ok(info)
    }
}

/// The platform that an image's configuration says it is for.
fn config_platform(config: &[u8]) -> Option<Platform> {
    serde_json::from_slice(config).ok()
}

/// The digest of a file's content: what the layer says of the whole, or the digest of its only chunk.
///
/// # Errors
/// [`Error::Malformed`] for a damaged index.
pub fn content_digest(at: &FileAt) -> Result<Option<Digest>> {
    let index = at.layer.index();
    let entry = index.entry(at.entry)?;
    if entry.size == 0 {
        return Ok(Some(Digest::of(b"")));
    }
    let chunks = entry.chunk_range();
    if let Some(digest) = index.content_digest(&entry)? {
        return Ok(Some(digest));
    }
    if chunks.len() != 1 {
        return Ok(None);
    }
    let chunk = index.chunk(chunks.start)?;
    Ok(chunk.digest.filter(|_| chunk.bytes == entry.size))
}

/// Says of a layer what its index says.
fn describe_index(info: &mut LayerInfo, layer: &Layer) -> Result<()> {
    let summary = layer.index().summary();
    info.format = summary.format.name().to_owned();
    info.reading = layer::reading(layer.index()).name().to_owned();
    info.indexed = Some(IndexedLayer {
        unpacked_bytes: summary.unpacked_bytes,
        index_bytes: layer.index().index_bytes(),
        cached_bytes: layer.cached_bytes()?,
        entries: u64::from(layer.index().entry_count()),
    });
    Ok(())
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Dir => "dir",
        Kind::File | Kind::Hardlink => "file",
        Kind::Symlink => "symlink",
        Kind::Char => "char",
        Kind::Block => "block",
        Kind::Fifo => "fifo",
    }
}
