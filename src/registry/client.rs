//! The client as the rest of the program sees it.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::auth::Auth;
use super::blob::BlobAt;
use super::endpoint::Provenance;
use super::foreign::ForeignUrls;
use super::host::HostHealth;
use super::layout::{LayoutList, Layouts};
use super::manifest::{self, ManifestBytes};
use super::options::ClientOptions;
use super::push::{self, BlobUpload, Pushed};
use super::redirect::Redirects;
use super::reference::{Reference, Repository, Target};
use super::request::Core;
use super::source::{BlobBody, Pager};
use super::transport::Transport;
use super::{blob, paging, referrers};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::Descriptor;

/// Largest blob of the kinds that every image has, such as its configuration.
const SMALL_BLOB_BYTES_MAX: u64 = 8 << 20;

/// Talks to registries, and reads layouts on disk as if they were some. Cheap to clone: all clones share connections,
/// tokens and what is known of hosts.
#[derive(Clone)]
pub struct Client {
    core: Arc<Core>,
    layouts: Arc<Layouts>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// Sets the client up; nothing is sent.
    ///
    /// # Errors
    /// [`crate::error::Error::Usage`] for certificates, mirrors and proxies that cannot be meant.
    pub fn new(mut options: ClientOptions) -> Result<Self> {
        let layouts = Layouts::new(std::mem::take(&mut options.layouts));
        let transport = Transport::new(options)?;
        Ok(Self {
            layouts: Arc::new(layouts),
            core: Arc::new(Core {
                auth: Auth::new(&transport.options),
                transport,
                redirects: Redirects::new(),
            }),
        })
    }

    /// A client with the same settings that has no credentials. It shares nothing with this one.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn without_credentials(&self) -> Result<Self> {
        Self::new(self.core.options().without_credentials())
    }

    /// The manifest or index that `target` names, at most 4 MiB. Its digest is verified against the target's, or for
    /// a tag against the one that the registry states.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`], [`crate::error::Error::Denied`], [`crate::error::Error::Verification`],
    /// [`crate::error::Error::Malformed`], [`crate::error::Error::Unsupported`] (Docker schema 1 and unknown types),
    /// and those of the network.
    pub async fn manifest(&self, repository: &Repository, target: &Target) -> Result<ManifestBytes> {
        if let Some(layout) = self.layouts.get(repository.host()) {
            return layout.manifest(repository, target).await;
        }
        manifest::fetch(&self.core, repository, target).await
    }

    /// Whether the registry gives this manifest to a client without credentials, as which this one was made
    /// ([`Self::without_credentials`]). Asks with HEAD, which counts against no limit.
    ///
    /// # Errors
    /// As [`Self::manifest`], but for an absent one.
    pub async fn is_open(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        let target = Target::Digest(*digest);
        let found = manifest::find(&self.core, repository, &target).await?;
        Ok(found.is_some_and(|found| found.digest == *digest && !found.with_credentials))
    }

    /// The digest that a tag names now, `None` if there is no such tag.
    ///
    /// # Errors
    /// As [`Self::manifest`].
    pub async fn tag_digest(&self, repository: &Repository, tag: &str) -> Result<Option<Digest>> {
        if let Some(layout) = self.layouts.get(repository.host()) {
            return layout.tag_digest(repository, tag).await;
        }
        let target = Target::Tag(tag.to_owned());
        let found = manifest::find(&self.core, repository, &target).await?;
        Ok(found.map(|found| found.digest))
    }

    /// The manifests of type `artifact_type` that refer to the manifest `digest`, in the registry's order. A layout on disk
    /// is not searched for them.
    ///
    /// # Errors
    /// As [`Self::manifest`], but for an absent list, which is empty.
    pub async fn referrers(
        &self,
        repository: &Repository,
        digest: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Digest>> {
        if self.layouts.get(repository.host()).is_some() {
            return Ok(Vec::new());
        }
        referrers::fetch(&self.core, repository, digest, artifact_type).await
    }

    /// Bytes `range` of a blob that has `blob_bytes` bytes by its descriptor. They are **not** verified: a range has
    /// no digest.
    ///
    /// # Errors
    /// As [`BlobBody::next`]; [`crate::error::Error::Malformed`] also for a range beyond the blob's end.
    pub async fn blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: Range<u64>,
        blob_bytes: u64,
    ) -> Result<BlobBody> {
        if let Some(layout) = self.layouts.get(repository.host()) {
            let body = layout.blob(repository, digest, range, blob_bytes).await?;
            return Ok(BlobBody::Layout(body));
        }
        let at = BlobAt {
            repository,
            digest,
            blob_bytes,
            foreign: &ForeignUrls::default(),
        };
        let body = blob::open(&self.core, at, range).await?;
        Ok(BlobBody::Registry(Box::new(body)))
    }

    /// The same of a layer, which may be at the URLs of its descriptor where the registry does not have it.
    ///
    /// # Errors
    /// As [`Self::blob`].
    pub async fn layer(
        &self,
        repository: &Repository,
        descriptor: &Descriptor,
        range: Range<u64>,
    ) -> Result<BlobBody> {
        if self.layouts.get(repository.host()).is_some() {
            return self
                .blob(repository, &descriptor.digest, range, descriptor.size)
                .await;
        }
        let foreign = ForeignUrls::new(&descriptor.media_type, &descriptor.urls);
        let at = layer_at(repository, descriptor, &foreign);
        let body = blob::open(&self.core, at, range).await?;
        Ok(BlobBody::Registry(Box::new(body)))
    }

    /// All of a layer for somebody who takes it as it comes. However small it is, it may take as long as bytes come, and
    /// ends when none do; [`Self::layer`] gives small ranges a time in total.
    ///
    /// # Errors
    /// As [`Self::blob`].
    pub async fn layer_stream(&self, repository: &Repository, descriptor: &Descriptor) -> Result<BlobBody> {
        let Descriptor { digest, size, .. } = descriptor;
        if self.layouts.get(repository.host()).is_some() {
            return self.blob(repository, digest, 0..*size, *size).await;
        }
        let foreign = ForeignUrls::new(&descriptor.media_type, &descriptor.urls);
        let body = blob::stream(&self.core, layer_at(repository, descriptor, &foreign)).await?;
        Ok(BlobBody::Registry(Box::new(body)))
    }

    /// [`Self::blob`] in one piece, of at most 64 MiB.
    ///
    /// # Errors
    /// As [`Self::blob`].
    pub async fn blob_bytes(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: Range<u64>,
        blob_bytes: u64,
    ) -> Result<Bytes> {
        let body = self.blob(repository, digest, range, blob_bytes).await?;
        body.collect().await
    }

    /// [`Self::layer`] in one piece, of at most 64 MiB, and who gave it: for callers that can tell whether the bytes are
    /// what they should be.
    ///
    /// # Errors
    /// As [`Self::blob`].
    pub async fn layer_bytes(
        &self,
        repository: &Repository,
        descriptor: &Descriptor,
        range: Range<u64>,
    ) -> Result<(Bytes, Provenance)> {
        let body = self.layer(repository, descriptor, range).await?;
        let provenance = body.provenance();
        Ok((body.collect().await?, provenance))
    }

    /// A whole blob of at most 8 MiB, such as an image's configuration, verified against its digest.
    ///
    /// # Errors
    /// As [`Self::whole_blob`].
    pub async fn small_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        blob_bytes: u64,
    ) -> Result<Bytes> {
        self.whole_blob(repository, digest, blob_bytes, SMALL_BLOB_BYTES_MAX)
            .await
    }

    /// A whole blob of at most `bytes_max` bytes, which are held in memory, verified against its digest.
    ///
    /// # Errors
    /// As [`Self::blob`]; [`crate::error::Error::Malformed`] for a larger one, and [`crate::error::Error::Verification`].
    pub async fn whole_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        blob_bytes: u64,
        bytes_max: u64,
    ) -> Result<Bytes> {
        if blob_bytes > bytes_max {
            let why = format!("{blob_bytes} bytes; a blob of its kind has at most {bytes_max}");
            return Err(Error::malformed(format!("{repository}@{digest}"), why));
        }
        if let Some(layout) = self.layouts.get(repository.host()) {
            return layout.whole_blob(repository, digest, blob_bytes, bytes_max).await;
        }
        let at = BlobAt {
            repository,
            digest,
            blob_bytes,
            foreign: &ForeignUrls::default(),
        };
        blob::whole_verified(&self.core, at).await
    }

    /// The tags of a repository, in pages.
    #[must_use]
    pub fn tags(&self, repository: &Repository) -> Pager {
        match self.layouts.get(repository.host()) {
            Some(layout) => Pager::Layout(Some(LayoutList::new(layout, Some(repository.clone())))),
            None => Pager::Registry(Box::new(paging::Pager::tags(&self.core, repository))),
        }
    }

    /// The repositories of the registry with the canonical name `host`, in pages. Many registries have no such list:
    /// then the first page is [`crate::error::Error::NotFound`], [`crate::error::Error::Denied`] or
    /// [`crate::error::Error::Unsupported`].
    #[must_use]
    pub fn catalog(&self, host: &str) -> Pager {
        match self.layouts.get(host) {
            Some(layout) => Pager::Layout(Some(LayoutList::new(layout, None))),
            None => Pager::Registry(Box::new(paging::Pager::catalog(&self.core, host))),
        }
    }

    /// The images of a repository that have no tag: a layout may have such, of a registry nobody can tell.
    ///
    /// # Errors
    /// As [`Self::manifest`].
    pub async fn unnamed(&self, repository: &Repository) -> Result<Vec<Digest>> {
        match self.layouts.get(repository.host()) {
            Some(layout) => layout.unnamed(repository).await,
            None => Ok(Vec::new()),
        }
    }

    /// The path of the layout on disk that has this host name; none if it is a registry.
    #[must_use]
    pub fn layout_path(&self, host: &str) -> Option<PathBuf> {
        Some(self.layouts.get(host)?.path().to_owned())
    }

    /// The image of a layout that `name` means, written as behind the layout's path (`README.md`, "Layouts"), by its
    /// digest; without a name its only image, `None` if it has not exactly one.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`] naming what there is, also if `host` is no layout;
    /// [`crate::error::Error::Usage`] if the name means several; as [`Self::manifest`].
    pub async fn find_in_layout(&self, host: &str, name: Option<&str>) -> Result<Option<Reference>> {
        match self.layouts.get(host) {
            Some(layout) => layout.find(host, name).await,
            None => Err(Error::not_found(host, "it is no layout")),
        }
    }

    /// Whether a repository has a blob of `blob_bytes` bytes. Layouts are written with [`super::LayoutWriter`].
    ///
    /// # Errors
    /// As [`Self::push_blob`].
    pub async fn has_blob(&self, repository: &Repository, digest: &Digest, blob_bytes: u64) -> Result<bool> {
        push::has_blob(&self.core, repository, digest, blob_bytes).await
    }

    /// Mounts a blob of `from`, a repository of the same registry, in `to`, which does not have it; whether that was possible.
    ///
    /// # Errors
    /// As [`Self::push_blob`].
    pub async fn mount_blob(&self, to: &Repository, digest: &Digest, from: &Repository) -> Result<bool> {
        push::mount(&self.core, to, digest, from).await
    }

    /// Brings a blob into a repository, by the least that is needed.
    ///
    /// # Errors
    /// [`crate::error::Error::Denied`] without the right to push, [`crate::error::Error::Verification`] if the registry
    /// says that it has stored something else, [`crate::error::Error::Malformed`],
    /// [`crate::error::Error::Unsupported`], and those of the network.
    pub async fn push_blob(&self, repository: &Repository, upload: &BlobUpload) -> Result<Pushed> {
        push::blob(&self.core, repository, upload).await
    }

    /// Puts a manifest or index of media type `media_type` under a tag or its digest. Its blobs have to be there.
    ///
    /// # Errors
    /// As [`Self::push_blob`].
    pub async fn push_manifest(
        &self,
        repository: &Repository,
        target: &Target,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<()> {
        push::manifest(&self.core, repository, target, media_type, bytes).await
    }

    /// Every host that was talked to, most recent first.
    #[must_use]
    pub fn health(&self) -> Vec<HostHealth> {
        self.core.transport.health()
    }
}

fn layer_at<'a>(
    repository: &'a Repository,
    descriptor: &'a Descriptor,
    foreign: &'a ForeignUrls,
) -> BlobAt<'a> {
    BlobAt {
        repository,
        digest: &descriptor.digest,
        blob_bytes: descriptor.size,
        foreign,
    }
}
