//! Images by manifest digest: their layers, their merged trees, and the files in them.

use std::num::NonZeroUsize;
use std::sync::Arc;

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::config::BackgroundMode;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::background::{Alive, Touch};
use crate::fetch::device::DeviceAt;
use crate::fetch::single_flight::SingleFlight;
use crate::fetch::{Fetcher, FileAt, Place, Source, blocking};
use crate::image::kernel::Opened;
use crate::image::manifest::{Document, IndexEntry, Manifest, choose};
use crate::image::platform::Platform;
use crate::image::reads::{LayerReads, ReadFile, Reads, Recorder};
use crate::image::resolve::Resolver;
use crate::image::soci::{SociIndexes, Ztocs};
use crate::image::tree::{self, Node, Tree, Whiteouts};
use crate::layer::entry::Kind;
use crate::registry::reference::Repository;
use crate::store::layer::Layer;
use crate::store::mapped::Mapped;

/// Images kept ready; others are opened from the store again.
const IMAGES_READY_MAX: usize = 256;

/// A merged tree and the layers behind it.
#[derive(Debug)]
pub struct Rootfs {
    name: String,
    tree: Tree<Mapped>,
    key: Digest,
    layers: Vec<LayerAt>,
    /// What was read of an image; a layer alone has no record.
    reads: Option<Arc<Reads>>,
}

/// A layer that is opened when its content is first needed.
#[derive(Debug)]
struct LayerAt {
    source: Arc<Source>,
    layer: OnceCell<Arc<Layer>>,
}

impl Rootfs {
    /// The image or layer that it is of, for messages: of the first reference that opened it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was just read from the tree, unless its file turned out to be damaged.
    ///
    /// # Errors
    /// [`Error::Malformed`].
    pub fn vouch<T>(&self, read: T) -> Result<T> {
        self.tree.source().vouch(&self.name, read)
    }

    /// The merged tree.
    #[must_use]
    pub fn tree(&self) -> &Tree<Mapped> {
        &self.tree
    }

    /// What the tree is stored under: the same for images with the same layers.
    #[must_use]
    pub fn key(&self) -> &Digest {
        &self.key
    }

    /// The record of what is read of it, if it has one.
    #[must_use]
    pub fn reads(&self) -> Option<&Arc<Reads>> {
        self.reads.as_ref()
    }

    /// The record for what is read of its layer `number`.
    #[must_use]
    pub fn layer_reads(&self, number: usize) -> Option<LayerReads> {
        Some(LayerReads {
            reads: Arc::clone(self.reads.as_ref()?),
            layer: u16::try_from(number).ok()?,
        })
    }

    /// Notes that a program reads the content of a regular file, which is at `at`.
    pub fn note_read(&self, node: &Node, at: &FileAt) {
        if let Some(reads) = &self.reads {
            let file = ReadFile {
                layer: node.layer,
                entry: at.entry,
            };
            reads.note(file, || at.layer.index().entry_count());
        }
    }

    /// Where the content of a regular file is, if its layer is open already.
    #[must_use]
    pub fn file_now(&self, node: &Node) -> Option<FileAt> {
        let at = self.layers.get(usize::from(node.layer))?;
        let layer = Arc::clone(at.layer.get()?);
        Some(FileAt {
            source: Arc::clone(&at.source),
            layer,
            entry: node.entry?,
            size: node.size,
        })
    }

    /// Where the content of a regular file is.
    ///
    /// # Errors
    /// [`Error::Posix`] (EISDIR, EINVAL) for what is no regular file; what keeps its layer's index from being had.
    pub async fn file(&self, fetcher: &Arc<Fetcher>, node: &Node) -> Result<FileAt> {
        let entry = match (node.kind, node.entry) {
            (Kind::File, Some(entry)) => entry,
            (Kind::Dir, _) => return Err(Error::posix("directory", libc::EISDIR)),
            _ => return Err(Error::posix("special file", libc::EINVAL)),
        };
        let at = self.layers.get(usize::from(node.layer));
        let at = at.ok_or_else(|| {
            Error::malformed("merged tree", "a file of a layer that the image does not have")
        })?;
        let layer = at
            .layer
            .get_or_try_init(|| fetcher.layer_as_it_is(&at.source))
            .await?;
        Ok(FileAt {
            source: Arc::clone(&at.source),
            layer: Arc::clone(layer),
            entry,
            size: node.size,
        })
    }

    /// Its layers, base first, all of them opened.
    ///
    /// # Errors
    /// What keeps one of the layers' indexes from being had.
    pub(super) async fn devices(&self, fetcher: &Arc<Fetcher>) -> Result<Vec<DeviceAt>> {
        let closed = self.layers.iter().filter(|at| !at.layer.initialized());
        let closed: Vec<&LayerAt> = closed.collect();
        let sources: Vec<Arc<Source>> = closed.iter().map(|at| Arc::clone(&at.source)).collect();
        for (at, layer) in closed.iter().zip(open_layers(fetcher, &sources).await?) {
            // A cell that is set already holds the same layer.
            let _ = at.layer.set(layer);
        }
        let devices = self.layers.iter().map(|at| {
            let layer = at.layer.get().map(Arc::clone);
            Ok(DeviceAt {
                source: Arc::clone(&at.source),
                layer: layer.ok_or_else(|| Error::malformed("layer", "not opened"))?,
            })
        });
        devices.collect()
    }

    /// Those of its layers that the store has, base first.
    async fn stored_layers(&self, fetcher: &Fetcher) -> Result<Vec<DeviceAt>> {
        let mut layers = Vec::with_capacity(self.layers.len());
        for at in &self.layers {
            let layer = match at.layer.get() {
                Some(layer) => Some(Arc::clone(layer)),
                None => fetcher.stored_layer(&at.source).await?,
            };
            let source = Arc::clone(&at.source);
            layers.extend(layer.map(|layer| DeviceAt { source, layer }));
        }
        Ok(layers)
    }
}

/// One image: a manifest and what follows from it.
#[derive(Debug)]
pub struct Image {
    repository: Repository,
    digest: Digest,
    bytes: Bytes,
    manifest: Manifest,
    sources: Vec<Arc<Source>>,
    rootfs: OnceCell<Arc<Rootfs>>,
    layer_trees: Vec<OnceCell<Arc<Rootfs>>>,
}

impl Image {
    /// The repository it was asked of.
    #[must_use]
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The manifest's digest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The manifest's bytes.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where the layers are to be had, base first.
    #[must_use]
    pub fn sources(&self) -> &[Arc<Source>] {
        &self.sources
    }

    /// The merged root filesystem, if somebody has opened it.
    pub(super) fn open_rootfs(&self) -> Option<&Arc<Rootfs>> {
        self.rootfs.get()
    }

    fn name(&self) -> String {
        format!("{}@{}", self.repository, self.digest)
    }
}

/// What a digest names.
#[derive(Debug, Clone)]
pub enum Named {
    /// One image.
    Image(Arc<Image>),
    /// An index: its own bytes, and an image for each of several platforms.
    Index(Arc<IndexDocument>),
}

/// An index.
#[derive(Debug)]
pub struct IndexDocument {
    /// The repository it was asked of.
    pub repository: Repository,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Bytes,
    /// Its images.
    pub entries: Vec<IndexEntry>,
}

/// Opens images and builds what reading them needs. Shared by all mounts.
#[derive(Debug)]
pub struct Images {
    fetcher: Arc<Fetcher>,
    resolver: Arc<Resolver>,
    soci: SociIndexes,
    recorder: Recorder,
    /// Kernel images that are opened or written now, by the key of their tree.
    kernel_images: SingleFlight<Digest, Arc<Opened>>,
    ready: Mutex<LruCache<(Repository, Digest), Named>>,
}

impl Images {
    /// Images on top of what fetches their parts and what resolves their names. `soci_v1`: as in the configuration.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>, resolver: Arc<Resolver>, soci_v1: bool) -> Arc<Self> {
        let ready = LruCache::new(NonZeroUsize::MIN.saturating_add(IMAGES_READY_MAX - 1));
        Arc::new(Self {
            soci: SociIndexes::new(Arc::clone(&fetcher), Arc::clone(&resolver), soci_v1),
            fetcher,
            resolver,
            recorder: Recorder::default(),
            kernel_images: SingleFlight::default(),
            ready: Mutex::new(ready),
        })
    }

    /// What fetches the parts of images.
    #[must_use]
    pub fn fetcher(&self) -> &Arc<Fetcher> {
        &self.fetcher
    }

    pub(super) fn kernel_images(&self) -> &SingleFlight<Digest, Arc<Opened>> {
        &self.kernel_images
    }

    /// What was read of images.
    pub(super) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// What resolves names.
    #[must_use]
    pub fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }

    /// What a digest names in a repository.
    ///
    /// # Errors
    /// As [`Resolver::document`]; [`Error::Malformed`] for a document that is none.
    pub async fn named(self: &Arc<Self>, repository: &Repository, digest: &Digest) -> Result<Named> {
        let key = (repository.clone(), *digest);
        if let Some(named) = self.ready.lock().get(&key) {
            return Ok(named.clone());
        }
        let bytes = self.resolver.document(repository, digest).await?;
        let what = format!("{repository}@{digest}");
        let named = match Document::parse(&what, &bytes)? {
            Document::Manifest(manifest) => {
                let ztocs = self.soci.ztocs(repository, digest, &manifest).await?;
                let openness = self.resolver.openness();
                let is_open = openness.are_open(std::slice::from_ref(&key)).await;
                let image = image(repository, digest, bytes, manifest, &ztocs, is_open);
                Named::Image(Arc::new(image))
            }
            Document::Index(entries) => {
                let (repository, digest) = key.clone();
                Named::Index(Arc::new(IndexDocument {
                    repository,
                    digest,
                    bytes,
                    entries,
                }))
            }
        };
        // Somebody may have been faster; then his is the one, so that its tree is built once.
        let mut ready = self.ready.lock();
        Ok(ready.get_or_insert(key, || named).clone())
    }

    /// The image for a platform that a digest names: itself, or a choice from its index.
    ///
    /// # Errors
    /// As [`Self::named`]; [`Error::NotFound`] naming the platforms that there are.
    pub async fn image(
        self: &Arc<Self>,
        repository: &Repository,
        digest: &Digest,
        platform: &Platform,
    ) -> Result<Arc<Image>> {
        let index = match self.named(repository, digest).await? {
            Named::Image(image) => return Ok(image),
            Named::Index(index) => index,
        };
        let entry = choose(&index.entries, platform).ok_or_else(|| {
            let offered: Vec<String> = index
                .entries
                .iter()
                .map(|entry| entry.platform.to_string())
                .collect();
            let offered = if offered.is_empty() {
                "no images".to_owned()
            } else {
                offered.join(", ")
            };
            Error::not_found(
                format!("{repository}@{digest} for {platform}"),
                format!("the index has {offered}; choose with --platform"),
            )
        })?;
        match self.named(repository, &entry.digest).await? {
            Named::Image(image) => Ok(image),
            Named::Index(_) => Err(Error::unsupported(
                format!("{repository}@{digest}"),
                "an index within an index",
            )),
        }
    }

    /// The merged root filesystem of an image: from the store, or built from its layers, which are indexed in parallel.
    ///
    /// # Errors
    /// What keeps one of the layers from being indexed, and [`Error::Malformed`] from the merge.
    pub async fn rootfs(self: &Arc<Self>, image: &Arc<Image>) -> Result<Arc<Rootfs>> {
        let build = || async {
            let sources = self.settled(&image.sources).await?;
            let layers: Vec<String> = sources.iter().map(|source| source.key().hex()).collect();
            let key = Digest::of(format!("rootfs {}", layers.join(" ")).as_bytes());
            let mut rootfs = self.build(image.name(), key, sources, Whiteouts::Apply).await?;
            let layers = rootfs.layers.len();
            rootfs.reads = Some(self.recorder.reads(&key, &image.digest, layers));
            self.checked(rootfs).await
        };
        image.rootfs.get_or_try_init(build).await.cloned()
    }

    /// Notes that a mount shows a root filesystem: what its image says is read first is brought, and what `mode` says.
    pub fn touched(&self, rootfs: &Arc<Rootfs>, mode: BackgroundMode, mount: Alive) {
        let touch = Touch {
            image: rootfs.name().to_owned(),
            key: *rootfs.key(),
            mode,
            mount,
        };
        let (fetcher, rootfs) = (Arc::clone(&self.fetcher), Arc::clone(rootfs));
        let layers = move || async move { rootfs.stored_layers(&fetcher).await };
        self.fetcher.touched(touch, layers);
    }

    /// Layer `number` of an image alone, with its whiteouts as files.
    ///
    /// # Errors
    /// As [`Self::rootfs`]; [`Error::NotFound`] if there is no such layer.
    pub async fn layer_tree(self: &Arc<Self>, image: &Arc<Image>, number: usize) -> Result<Arc<Rootfs>> {
        let what = format!("{} layer {number}", image.name());
        let (Some(cell), Some(source)) = (image.layer_trees.get(number), image.sources.get(number)) else {
            return Err(Error::not_found(
                what,
                format!("the image has {} layers", image.sources.len()),
            ));
        };
        let build = || async {
            let source = self.fetcher.settle(source).await?;
            let key = Digest::of(format!("layer {}", source.key().hex()).as_bytes());
            let layer = self.build(what, key, vec![source], Whiteouts::Show);
            self.checked(layer.await?).await
        };
        cell.get_or_try_init(build).await.cloned()
    }

    async fn build(
        self: &Arc<Self>,
        what: String,
        key: Digest,
        sources: Vec<Arc<Source>>,
        whiteouts: Whiteouts,
    ) -> Result<Rootfs> {
        let layers = sources.iter().map(|source| LayerAt {
            source: Arc::clone(source),
            layer: OnceCell::new(),
        });
        let layers: Vec<LayerAt> = layers.collect();
        if let Some(tree) = self.stored_tree(key).await? {
            return Ok(Rootfs {
                name: what,
                tree,
                key,
                layers,
                reads: None,
            });
        }
        let opened = open_layers(&self.fetcher, &sources).await?;
        for (at, layer) in layers.iter().zip(&opened) {
            // A cell that is set already holds the same layer.
            let _ = at.layer.set(Arc::clone(layer));
        }
        let (store, name) = (Arc::clone(self.fetcher.store()), what.clone());
        let merge = move || {
            let indexes: Vec<_> = opened.iter().map(|layer| layer.index()).collect();
            let merged = tree::merge(&indexes, &key, whiteouts)?;
            for warning in &merged.warnings {
                tracing::warn!(image = name, "{warning}");
            }
            store.db().put_warnings(&key, &merged.warnings)?;
            Tree::open(store.put_tree(&key, &merged.bytes)?, &key)
        };
        let tree = blocking(self.fetcher.runtime(), merge).await?;
        Ok(Rootfs {
            name: what,
            tree,
            key,
            layers,
            reads: None,
        })
    }

    /// A tree whose layers are what this image's configuration promises: they may have been read for another one.
    async fn checked(&self, rootfs: Rootfs) -> Result<Arc<Rootfs>> {
        let may_have_passed = |at: &&LayerAt| at.layer.initialized() || at.source.needs_pass();
        for at in rootfs.layers.iter().filter(may_have_passed) {
            let layer = match at.layer.get() {
                Some(layer) => Some(Arc::clone(layer)),
                None => self.fetcher.stored_layer(&at.source).await?,
            };
            // One that is gone from the store is checked when it comes.
            if let Some(layer) = layer {
                self.fetcher.check_diff_id(&at.source, &layer).await?;
            }
        }
        Ok(Arc::new(rootfs))
    }

    async fn stored_tree(&self, key: Digest) -> Result<Option<Tree<Mapped>>> {
        let store = Arc::clone(self.fetcher.store());
        let open = move || match store.tree(&key)?.map(|mapped| Tree::open(mapped, &key)) {
            None => Ok(None),
            Some(Ok(tree)) => Ok(Some(tree)),
            Some(Err(error)) => {
                tracing::warn!(%error, "a merged tree is damaged and will be built anew");
                store.remove_tree(&key);
                Ok(None)
            }
        };
        blocking(self.fetcher.runtime(), open).await
    }

    /// The ways by which the layers are read, settled in parallel.
    async fn settled(&self, sources: &[Arc<Source>]) -> Result<Vec<Arc<Source>>> {
        let mut settled = sources.to_vec();
        let mut tasks = JoinSet::new();
        for (number, source) in sources.iter().enumerate().filter(|(_, s)| s.ztoc.is_some()) {
            let (fetcher, source) = (Arc::clone(&self.fetcher), Arc::clone(source));
            let settle = async move { (number, fetcher.settle(&source).await) };
            tasks.spawn_on(settle, self.fetcher.runtime());
        }
        while let Some(done) = tasks.join_next().await {
            let (number, source) = done.map_err(|e| Error::malformed("layer", e.to_string()))?;
            settled[number] = source?;
        }
        Ok(settled)
    }
}

/// All layers, whose ways are settled, indexed in parallel: their tail reads share one round trip.
async fn open_layers(fetcher: &Arc<Fetcher>, sources: &[Arc<Source>]) -> Result<Vec<Arc<Layer>>> {
    let mut tasks = JoinSet::new();
    for (number, source) in sources.iter().enumerate() {
        let (fetcher_of_task, source) = (Arc::clone(fetcher), Arc::clone(source));
        let open = async move { (number, fetcher_of_task.layer_as_it_is(&source).await) };
        tasks.spawn_on(open, fetcher.runtime());
    }
    let mut opened = vec![None; sources.len()];
    while let Some(done) = tasks.join_next().await {
        let (number, layer) = done.map_err(|e| Error::malformed("layer", e.to_string()))?;
        opened[number] = Some(layer?);
    }
    opened
        .into_iter()
        .map(|layer| layer.ok_or_else(|| Error::malformed("layer", "not opened")))
        .collect()
}

fn image(
    repository: &Repository,
    digest: &Digest,
    bytes: Bytes,
    manifest: Manifest,
    ztocs: &Ztocs,
    is_open: bool,
) -> Image {
    let source = |(number, descriptor): (usize, &crate::layer::Descriptor)| {
        Arc::new(Source {
            repository: repository.clone(),
            descriptor: descriptor.clone(),
            ztoc: ztocs.get(&descriptor.digest).cloned(),
            place: Some(Place {
                manifest: *digest,
                config: manifest.config.clone(),
                number,
                is_open,
            }),
        })
    };
    Image {
        repository: repository.clone(),
        digest: *digest,
        bytes,
        sources: manifest.layers.iter().enumerate().map(source).collect(),
        rootfs: OnceCell::new(),
        layer_trees: manifest.layers.iter().map(|_| OnceCell::new()).collect(),
        manifest,
    }
}
