//! The client as the rest of the program sees it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::auth::Auth;
use super::blob::{self, BlobBody};
use super::endpoint::Provenance;
use super::host::HostHealth;
use super::manifest::{self, ManifestBytes};
use super::options::ClientOptions;
use super::paging::Pager;
use super::redirect::Redirects;
use super::reference::{Repository, Target};
use super::request::Core;
use super::transport::Transport;
use crate::digest::Digest;
use crate::error::Result;

/// Talks to registries. Cheap to clone: all clones share connections, tokens and what is known of hosts.
#[derive(Clone)]
pub struct Client {
    core: Arc<Core>,
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
    pub fn new(options: ClientOptions) -> Result<Self> {
        Ok(Self {
            core: Arc::new(Core {
                transport: Transport::new(options)?,
                auth: Auth::new(),
                redirects: Redirects::new(),
            }),
        })
    }

    /// The manifest or index that `target` names, at most 4 MiB. Its digest is verified against the target's, or for
    /// a tag against the one that the registry states.
    ///
    /// # Errors
    /// [`crate::error::Error::NotFound`], [`crate::error::Error::Denied`], [`crate::error::Error::Verification`],
    /// [`crate::error::Error::Malformed`], [`crate::error::Error::Unsupported`] (Docker schema 1 and unknown types),
    /// and those of the network.
    pub async fn manifest(&self, repository: &Repository, target: &Target) -> Result<ManifestBytes> {
        manifest::fetch(&self.core, repository, target).await
    }

    /// The digest that a tag names now, `None` if there is no such tag.
    ///
    /// # Errors
    /// As [`Self::manifest`].
    pub async fn tag_digest(&self, repository: &Repository, tag: &str) -> Result<Option<Digest>> {
        manifest::tag_digest(&self.core, repository, tag).await
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
        blob::open(&self.core, repository, digest, range, blob_bytes).await
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
        let from = self.blob_bytes_from(repository, digest, range, blob_bytes);
        from.await.map(|(bytes, _)| bytes)
    }

    /// The same, and who gave it: for callers that can tell whether the bytes are what they should be.
    ///
    /// # Errors
    /// As [`Self::blob`].
    pub async fn blob_bytes_from(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: Range<u64>,
        blob_bytes: u64,
    ) -> Result<(Bytes, Provenance)> {
        let body = self.blob(repository, digest, range, blob_bytes).await?;
        let provenance = body.provenance();
        Ok((blob::collect(body).await?, provenance))
    }

    /// A whole blob of at most 8 MiB, such as an image's configuration, verified against its digest.
    ///
    /// # Errors
    /// As [`Self::blob`], and [`crate::error::Error::Verification`].
    pub async fn small_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        blob_bytes: u64,
    ) -> Result<Bytes> {
        blob::whole_verified(&self.core, repository, digest, blob_bytes).await
    }

    /// The tags of a repository, in pages.
    #[must_use]
    pub fn tags(&self, repository: &Repository) -> Pager {
        Pager::tags(&self.core, repository)
    }

    /// The repositories of the registry with the canonical name `host`, in pages. Many registries have no such list:
    /// then the first page is [`crate::error::Error::NotFound`], [`crate::error::Error::Denied`] or
    /// [`crate::error::Error::Unsupported`].
    #[must_use]
    pub fn catalog(&self, host: &str) -> Pager {
        Pager::catalog(&self.core, host)
    }

    /// Every host that was talked to, most recent first.
    #[must_use]
    pub fn health(&self) -> Vec<HostHealth> {
        self.core.transport.health()
    }
}
