//! OCI image layouts on disk, as registries: the same questions as the network is asked, answered from a directory.
//!
//! A layout has the host name that the configuration gives it, or, mounted by its path, what
//! [`crate::registry::reference::layout_host`] makes of that. Nothing is kept of a layout but its parsed `index.json`,
//! which is read again when the file changes; every blob is opened anew, so a layout may be replaced at any time.
//!
//! What is read is not trusted more than what comes from a registry: manifests and configurations are checked against their
//! digests here, chunks of layers above. What can block runs on threads for blocking work. `write` adds images to a layout.

mod body;
mod files;
mod index;
mod unnamed;
mod write;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

pub(super) use body::LayoutBody;
pub(super) use index::Names;
pub use unnamed::unnamed_file;
pub use write::LayoutWriter;

use self::files::{BlobFile, Dir, Stamp, shown};
use self::index::{Entry, own_name};
use super::manifest::{MANIFEST_BYTES_MAX, ManifestBytes, media_type, name};
use super::reference::{Reference, Repository, Target, layout_path};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// The most layouts without a name whose `index.json` is kept.
const UNNAMED_MAX: usize = 64;

/// Longest wait for one step: for a piece of a blob, a manifest, `index.json`.
const DISK_WAIT: Duration = Duration::from_secs(60);

/// The layouts by host.
#[derive(Debug)]
pub(super) struct Layouts {
    named: BTreeMap<String, Arc<Layout>>,
    unnamed: Mutex<LruCache<String, Arc<Layout>>>,
}

impl Layouts {
    /// The layouts that the configuration names: paths by host.
    pub(super) fn new(named: BTreeMap<String, PathBuf>) -> Self {
        let layout = |(host, path): (String, PathBuf)| (host, Arc::new(Layout::new(path)));
        Self {
            named: named.into_iter().map(layout).collect(),
            unnamed: Mutex::new(LruCache::new(NonZeroUsize::MIN.saturating_add(UNNAMED_MAX - 1))),
        }
    }

    /// The layout that has this host name; none if it is a registry.
    pub(super) fn get(&self, host: &str) -> Option<Arc<Layout>> {
        if let Some(layout) = self.named.get(host) {
            return Some(Arc::clone(layout));
        }
        let path = layout_path(host)?;
        let mut unnamed = self.unnamed.lock();
        let layout = unnamed.get_or_insert_ref(host, || Arc::new(Layout::new(path.to_owned())));
        Some(Arc::clone(layout))
    }
}

/// One layout.
#[derive(Debug)]
pub(super) struct Layout {
    path: PathBuf,
    known: Mutex<Option<(Stamp, Arc<Names>)>>,
}

impl Layout {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            known: Mutex::default(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the layout holds now.
    async fn names(self: &Arc<Self>) -> Result<Arc<Names>> {
        let layout = Arc::clone(self);
        on_thread(&self.path, move || layout.read_names()).await
    }

    fn read_names(&self) -> Result<Arc<Names>> {
        let dir = Dir::open(&self.path)?;
        let file = dir.open_index()?;
        let stamp = file.stamp;
        if let Some((known, names)) = &*self.known.lock()
            && *known == stamp
        {
            return Ok(Arc::clone(names));
        }
        dir.check_version()?;
        let path = shown(&file.path);
        let own = own_name(&self.path.file_name().unwrap_or_default().to_string_lossy());
        let is_recent = stamp.is_recent(SystemTime::now());
        let names = Arc::new(Names::parse(&path, &own, &file.read()?)?);
        for warning in &names.warnings {
            tracing::warn!(layout = path, "{warning}");
        }
        *self.known.lock() = (!is_recent).then(|| (stamp, Arc::clone(&names)));
        Ok(names)
    }

    /// As [`crate::registry::Client::manifest`].
    pub(super) async fn manifest(
        self: &Arc<Self>,
        repository: &Repository,
        target: &Target,
    ) -> Result<ManifestBytes> {
        let names = self.names().await?;
        let what = name(repository, target);
        let Some(tags) = names.tags(repository.path()) else {
            let why = format!("the layout {} has no such repository", shown(&self.path));
            return Err(Error::not_found(what, why));
        };
        let (digest, entry) = match target {
            Target::Digest(digest) => (*digest, None),
            Target::Tag(tag) => match names.tagged(repository.path(), tag) {
                Some(entry) => (entry.digest(&what)?, Some(entry.clone())),
                None => {
                    let why = format!(
                        "the layout {} has {} other tags there",
                        shown(&self.path),
                        tags.len()
                    );
                    return Err(Error::not_found(what, why));
                }
            },
        };
        let layout = Arc::clone(self);
        on_thread(&self.path, move || {
            layout.read_manifest(&what, digest, entry.as_ref())
        })
        .await
    }

    fn read_manifest(&self, what: &str, digest: Digest, entry: Option<&Entry>) -> Result<ManifestBytes> {
        let blob = self.open_blob(what, &digest)?;
        if let Some(entry) = entry {
            blob.check_size(what, entry.size)?;
        }
        let bytes = Bytes::from(files::whole(blob.file, &blob.path, MANIFEST_BYTES_MAX)?);
        verify(what, &blob.path, &digest, &bytes)?;
        if serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).is_err() {
            let why = format!("{} is no manifest", shown(&blob.path));
            return Err(Error::malformed(what, why));
        }
        let stated = entry.and_then(|entry| entry.media_type.as_deref());
        let media_type = media_type(what, stated, &bytes)?;
        Ok(ManifestBytes {
            bytes,
            media_type,
            digest,
            with_credentials: false,
        })
    }

    /// The file of blob `what`, which is named where it is missing.
    fn open_blob(&self, what: &str, digest: &Digest) -> Result<BlobFile> {
        let opened = Dir::open(&self.path)?.open_blob(digest);
        opened.map_err(|error| match error {
            Error::NotFound { what: file, .. } => Error::not_found(what, format!("{file} is missing")),
            error => error,
        })
    }

    /// As [`crate::registry::Client::tag_digest`].
    pub(super) async fn tag_digest(
        self: &Arc<Self>,
        repository: &Repository,
        tag: &str,
    ) -> Result<Option<Digest>> {
        let names = self.names().await?;
        let entry = names.tagged(repository.path(), tag);
        entry
            .map(|entry| entry.digest(&format!("{repository}:{tag}")))
            .transpose()
    }

    /// As [`crate::registry::Client::blob`].
    pub(super) async fn blob(
        self: &Arc<Self>,
        repository: &Repository,
        digest: &Digest,
        range: Range<u64>,
        blob_bytes: u64,
    ) -> Result<LayoutBody> {
        let (layout, what, digest) = (Arc::clone(self), format!("{repository}@{digest}"), *digest);
        on_thread(&self.path, move || {
            let blob = layout.open_blob(&what, &digest)?;
            LayoutBody::new(&what, blob, range, blob_bytes)
        })
        .await
    }

    /// As [`crate::registry::Client::whole_blob`].
    pub(super) async fn whole_blob(
        self: &Arc<Self>,
        repository: &Repository,
        digest: &Digest,
        blob_bytes: u64,
        bytes_max: u64,
    ) -> Result<Bytes> {
        let (layout, what, digest) = (Arc::clone(self), format!("{repository}@{digest}"), *digest);
        on_thread(&self.path, move || {
            let blob = layout.open_blob(&what, &digest)?;
            let path = blob.path.clone();
            blob.check_size(&what, blob_bytes)?;
            let bytes = Bytes::from(files::whole(blob.file, &path, bytes_max)?);
            verify(&what, &path, &digest, &bytes)?;
            Ok(bytes)
        })
        .await
    }

    /// The images of a repository that have no tag.
    pub(super) async fn unnamed(self: &Arc<Self>, repository: &Repository) -> Result<Vec<Digest>> {
        Ok(self.names().await?.unnamed(repository.path()))
    }

    /// The image that `name` means, behind the layout's path; without a name its only image, if it has but one. `host` is
    /// what the layout is called.
    pub(super) async fn find(self: &Arc<Self>, host: &str, name: Option<&str>) -> Result<Option<Reference>> {
        let names = self.names().await?;
        let (what, entry) = match name {
            Some(name) => {
                let what = format!("oci:{}:{name}", shown(&self.path));
                let entry = names.meant(&what, name)?;
                (what, entry)
            }
            None => match names.only() {
                Some(entry) => (format!("oci:{}", shown(&self.path)), entry),
                None => return Ok(None),
            },
        };
        let (path, tag) = names.place(entry);
        Ok(Some(Reference {
            repository: Repository::new(host, &path)?,
            tag,
            digest: Some(entry.digest(&what)?),
        }))
    }
}

/// The names of one list.
#[derive(Debug)]
pub struct LayoutList {
    layout: Arc<Layout>,
    /// The repository whose tags they are; without one they are the repositories.
    tags_of: Option<Repository>,
}

impl LayoutList {
    /// A list that is not read yet.
    pub(super) fn new(layout: Arc<Layout>, tags_of: Option<Repository>) -> Self {
        Self { layout, tags_of }
    }

    pub(super) async fn read(self) -> Result<Vec<String>> {
        let names = self.layout.names().await?;
        let Some(repository) = self.tags_of else {
            return Ok(names.repositories());
        };
        names.tags(repository.path()).ok_or_else(|| {
            let why = format!("the layout {} has no such repository", shown(&self.layout.path));
            Error::not_found(repository.to_string(), why)
        })
    }
}

fn verify(what: &str, path: &Path, digest: &Digest, bytes: &[u8]) -> Result<()> {
    let actual = Digest::of(bytes);
    match actual == *digest {
        true => Ok(()),
        false => Err(Error::mismatch(
            format!("{what} ({})", shown(path)),
            digest,
            actual,
        )),
    }
}

/// Runs what may wait for a disk on a thread for such work. A disk, or a server of files, that says nothing is given up;
/// its thread is lost to it.
async fn on_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::time::timeout(DISK_WAIT, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(Error::Io {
            what: shown(path),
            errno: libc::EIO,
            why: error.to_string(),
        }),
        Err(_) => Err(Error::Timeout {
            what: shown(path),
            waited_ms: u64::try_from(DISK_WAIT.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}
