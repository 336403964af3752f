//! The read-only questions, and the one code that answers them: for a command that holds the store itself as for the
//! clients of a daemon. Answers leave as bounded pieces, JSON documents and file contents alike.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::protocol::PIECE_BYTES_MAX;
use crate::error::{Error, Result};
use crate::fetch::PassProgress;
use crate::image::Images;
use crate::image::copy::Wanted;
use crate::image::platform::Platform;
use crate::image::select::Pattern;
use crate::kernel::Kernel;
use crate::registry::reference::{Reference, canonical_host};

/// How many pieces may wait for whoever takes them: what `cat` reads ahead, in MiB.
pub(super) const PIECES_WAITING_MAX: usize = 4;

/// A question. References are texts, so that every side checks them itself; paths are bytes, as in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// The repositories of a registry, as [`crate::image::answers::Listing`].
    Repos {
        /// The registry.
        host: String,
    },
    /// The tags of a repository, as [`crate::image::answers::Listing`].
    Tags {
        /// The repository.
        repository: String,
    },
    /// What a reference names, as [`crate::image::answers::Resolved`].
    Resolve {
        /// The reference.
        reference: String,
    },
    /// An image, as [`crate::image::answers::ImageInfo`].
    Info {
        /// The image.
        image: ImageName,
    },
    /// A file of an image, as [`crate::image::answers::FileInfo`].
    FileInfo {
        /// The image.
        image: ImageName,
        /// The path.
        path: Vec<u8>,
    },
    /// A directory of an image, as a list of [`crate::image::answers::FileInfo`].
    Ls {
        /// The image.
        image: ImageName,
        /// The path.
        path: Vec<u8>,
    },
    /// The bytes of the manifest or index under a reference.
    Manifest {
        /// The reference.
        reference: String,
    },
    /// The bytes of an image's configuration.
    Config {
        /// The image.
        image: ImageName,
    },
    /// The bytes of a file.
    Cat {
        /// The image.
        image: ImageName,
        /// The path.
        path: Vec<u8>,
    },
    /// What to write for patterns: see [`crate::image::plan`].
    Plan {
        /// The image.
        image: ImageName,
        /// The patterns.
        patterns: Vec<Vec<u8>>,
    },
    /// The contents of regular files, one behind the other.
    Contents {
        /// The image.
        image: ImageName,
        /// Their inodes in the merged tree.
        nodes: Vec<u32>,
    },
    /// Brings an image, or what patterns select of it, into the cache: see [`crate::image::copy::Prefetched`].
    Prefetch {
        /// The image.
        image: ImageName,
        /// The patterns; none for all of it.
        patterns: Vec<Vec<u8>>,
        /// An access profile in the store's directory, as [`crate::store::Store::incoming`] names one and
        /// [`crate::image::profile::pack`] makes it; then there are no patterns.
        profile: Option<PathBuf>,
        /// How often a request is made again that a network failure ended without anything having come.
        retries: u32,
    },
    /// What was read of an image in the mounts of this daemon, as [`crate::image::recorded::Recorded`].
    Record {
        /// The image.
        image: ImageName,
        /// Whether to begin anew afterwards.
        restart: bool,
    },
    /// Takes an image, or what patterns select of it, out of the cache: see [`crate::image::eviction::Evicted`].
    Evict {
        /// The image.
        image: ImageName,
        /// The patterns; none for all of it.
        patterns: Vec<Vec<u8>>,
    },
    /// The indexes of an image's plain layers: see [`crate::image::indexes`].
    ExportIndexes {
        /// The image.
        image: ImageName,
    },
    /// Takes indexes from a file in the store's directory for such, as [`crate::image::indexes::Imported`].
    ImportIndexes {
        /// The file, as [`crate::store::Store::incoming`] names one.
        file: PathBuf,
    },
    /// Mounts, cache, transfers and recent errors, as a JSON object.
    Status,
}

/// A reference and the platform to choose where it names an index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageName {
    /// The reference.
    pub reference: String,
    /// `OS/ARCH[/VARIANT]`; nothing means the host's.
    pub platform: Option<String>,
}

impl ImageName {
    fn parse(&self) -> Result<(Reference, Platform)> {
        let platform = match &self.platform {
            Some(text) => text.parse()?,
            None => Platform::host(),
        };
        Ok((self.reference.parse()?, platform))
    }
}

impl Query {
    /// The registry that the question is about, where it names one: the one that a credential is for.
    #[must_use]
    pub fn host(&self) -> Option<String> {
        let of_reference = |text: &str| {
            let reference: Reference = text.parse().ok()?;
            Some(reference.repository.host().to_owned())
        };
        match self {
            Self::Repos { host } => canonical_host(host).ok(),
            Self::Tags { repository } => Reference::parse_repository(repository)
                .ok()
                .map(|repository| repository.host().to_owned()),
            Self::Resolve { reference } | Self::Manifest { reference } => of_reference(reference),
            Self::Info { image }
            | Self::FileInfo { image, .. }
            | Self::Ls { image, .. }
            | Self::Config { image }
            | Self::Cat { image, .. }
            | Self::Plan { image, .. }
            | Self::Contents { image, .. }
            | Self::Prefetch { image, .. }
            | Self::Record { image, .. }
            | Self::Evict { image, .. }
            | Self::ExportIndexes { image } => of_reference(&image.reference),
            Self::ImportIndexes { .. } | Self::Status => None,
        }
    }

    /// The repository of the image that the question is about.
    pub(super) fn repository(&self) -> Option<String> {
        match self {
            Self::Info { image }
            | Self::FileInfo { image, .. }
            | Self::Ls { image, .. }
            | Self::Cat { image, .. }
            | Self::Plan { image, .. }
            | Self::Contents { image, .. }
            | Self::Prefetch { image, .. }
            | Self::Record { image, .. }
            | Self::Evict { image, .. }
            | Self::ExportIndexes { image } => repository_of(&image.reference),
            _ => None,
        }
    }

    /// Checks what can be checked without asking anyone, so that a mistyped argument costs no wait for a lock.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Repos { host } => canonical_host(host).map(drop),
            Self::Tags { repository } => Reference::parse_repository(repository).map(drop),
            Self::Resolve { reference } | Self::Manifest { reference } => {
                reference.parse::<Reference>().map(drop)
            }
            Self::Info { image }
            | Self::FileInfo { image, .. }
            | Self::Ls { image, .. }
            | Self::Config { image }
            | Self::Cat { image, .. }
            | Self::Contents { image, .. }
            | Self::Record { image, .. }
            | Self::ExportIndexes { image } => image.parse().map(drop),
            Self::Plan { image, patterns }
            | Self::Prefetch { image, patterns, .. }
            | Self::Evict { image, patterns } => {
                image.parse()?;
                patterns
                    .iter()
                    .try_for_each(|text| Pattern::parse(text).map(drop))
            }
            Self::ImportIndexes { .. } | Self::Status => Ok(()),
        }
    }

    /// Whether the answer lasts as long as there is something to send, and whoever asked takes it.
    pub(super) fn is_stream(&self) -> bool {
        matches!(
            self,
            Self::Cat { .. }
                | Self::Plan { .. }
                | Self::Contents { .. }
                | Self::Prefetch { .. }
                | Self::Record { .. }
                | Self::ExportIndexes { .. }
        )
    }
}

/// The repository of a reference.
pub(super) fn repository_of(reference: &str) -> Option<String> {
    let reference: Reference = reference.parse().ok()?;
    Some(reference.repository.to_string())
}

/// The passes over layers of a repository.
pub(super) fn passes_of(images: &Images, repository: &str) -> Vec<PassProgress> {
    let mut passes = images.fetcher().passes();
    passes.retain(|pass| pass.repository == repository);
    passes
}

/// The way of an answer to whoever asked.
pub(super) type Pieces = mpsc::Sender<Vec<u8>>;

/// Who serves root filesystems.
#[derive(Debug)]
pub(super) enum Serving {
    /// Nobody: nothing is mounted by this process.
    Nobody,
    /// We do.
    Fuse,
    /// The kernel, of some or all mounts.
    Kernel(Kernel),
}

/// Answers a question; `status` is what [`Query::Status`] is answered with, because only the caller knows its mounts.
pub(super) async fn answer(
    images: &Arc<Images>,
    serving: Serving,
    status: impl FnOnce() -> serde_json::Value,
    query: Query,
    to: &Pieces,
) -> Result<()> {
    match query {
        Query::Repos { host } => {
            let host = canonical_host(&host)?;
            send_document(&images.repos(&host).await?, to).await
        }
        Query::Tags { repository } => {
            let repository = Reference::parse_repository(&repository)?;
            send_document(&images.tags(&repository).await?, to).await
        }
        Query::Resolve { reference } => send_document(&images.resolve(&reference.parse()?).await?, to).await,
        Query::Info { image } => {
            let (reference, platform) = image.parse()?;
            let mut info = images.info(&reference, &platform).await?;
            info.served_by = match (serving, &info.tree) {
                (Serving::Kernel(kernel), Some(tree)) => Some(kernel.serving(tree)),
                (Serving::Fuse, _) => Some("FUSE; `registryfs status` says why".to_owned()),
                _ => None,
            };
            send_document(&info, to).await
        }
        Query::FileInfo { image, path } => {
            let (reference, platform) = image.parse()?;
            send_document(&images.file_info(&reference, &platform, &path).await?, to).await
        }
        Query::Ls { image, path } => {
            let (reference, platform) = image.parse()?;
            send_document(&images.ls(&reference, &platform, &path).await?, to).await
        }
        Query::Manifest { reference } => send_bytes(&images.manifest(&reference.parse()?).await?, to).await,
        Query::Config { image } => {
            let (reference, platform) = image.parse()?;
            send_bytes(&images.config(&reference, &platform).await?, to).await
        }
        Query::Cat { image, path } => cat(images, &image, &path, to).await,
        Query::Plan { image, patterns } => {
            let (reference, platform) = image.parse()?;
            images.plan(&reference, &platform, &patterns, to).await
        }
        Query::Contents { image, nodes } => {
            let (reference, platform) = image.parse()?;
            images.contents(&reference, &platform, &nodes, to).await
        }
        Query::Prefetch {
            image,
            patterns,
            profile,
            retries,
        } => {
            let wanted = match profile {
                Some(file) => Wanted::Profile(images.profile(file).await?),
                None => Wanted::Patterns(patterns),
            };
            prefetch(images, &image, &wanted, retries, to).await
        }
        Query::Record { image, restart } => record(images, &serving, &image, restart, to).await,
        Query::Evict { image, patterns } => {
            let (reference, platform) = image.parse()?;
            let evict = || images.evict(&reference, &platform, &patterns);
            let evicted = match (evict().await, serving) {
                (Err(Error::Busy { .. }), Serving::Kernel(kernel)) => kernel.once_idle(evict).await?,
                (evicted, _) => evicted?,
            };
            send_document(&evicted, to).await
        }
        Query::ExportIndexes { image } => export_indexes(images, &image, to).await,
        Query::ImportIndexes { file } => send_document(&images.import_indexes(file).await?, to).await,
        Query::Status => send_document(&status(), to).await,
    }
}

async fn cat(images: &Arc<Images>, image: &ImageName, path: &[u8], to: &Pieces) -> Result<()> {
    let (reference, platform) = image.parse()?;
    let file = images.open_file(&reference, &platform, path).await?;
    let mut offset = 0;
    while offset < file.size() {
        let bytes = file.read(offset, PIECE_BYTES_MAX).await?;
        if bytes.is_empty() {
            return Err(Error::malformed(&image.reference, "a file ended before its size"));
        }
        offset += bytes.len() as u64;
        send(bytes, to).await?;
    }
    Ok(())
}

async fn prefetch(
    images: &Arc<Images>,
    image: &ImageName,
    wanted: &Wanted,
    retries: u32,
    to: &Pieces,
) -> Result<()> {
    let (reference, platform) = image.parse()?;
    images.prefetch(&reference, &platform, wanted, retries, to).await
}

async fn record(
    images: &Arc<Images>,
    serving: &Serving,
    image: &ImageName,
    restart: bool,
    to: &Pieces,
) -> Result<()> {
    let (reference, platform) = image.parse()?;
    if matches!(serving, Serving::Nobody) {
        let why = "nothing is mounted from this cache, and a record ends with its daemon; mount the image and run a \
                   program on it first";
        return Err(Error::not_found(format!("record of {reference}"), why));
    }
    let recorded = images.recorded(&reference, &platform, restart).await?;
    send_document(&recorded, to).await
}

async fn export_indexes(images: &Arc<Images>, image: &ImageName, to: &Pieces) -> Result<()> {
    let (reference, platform) = image.parse()?;
    for layer in images.export_indexes(&reference, &platform).await? {
        send_bytes(&layer.record().await?, to).await?;
    }
    Ok(())
}

/// Sends a JSON document.
pub(super) async fn send_document(document: &impl Serialize, to: &Pieces) -> Result<()> {
    let bytes =
        serde_json::to_vec(document).map_err(|error| Error::malformed("answer", error.to_string()))?;
    send_bytes(&bytes, to).await
}

async fn send_bytes(bytes: &[u8], to: &Pieces) -> Result<()> {
    for piece in bytes.chunks(PIECE_BYTES_MAX) {
        send(piece.to_vec(), to).await?;
    }
    Ok(())
}

async fn send(piece: Vec<u8>, to: &Pieces) -> Result<()> {
    // Whoever asked has gone away, and nobody reads this error.
    to.send(piece).await.map_err(|_| Error::Interrupted)
}
