//! `convert`: an image's layers written anew as eStargz, into a layout on disk or a registry.
//!
//! It needs no store and no daemon: it reads blobs from their first byte to their last, which the cache is not for, and
//! so works whoever holds a store. From a configuration it makes a registry client of its own.
//!
//! - Each layer goes through two files without a name. `spool` fetches the blob, decompresses it into the first one and
//!   notes where in its tar the entries stand; digest, size and DiffID are checked at its end, before anything is made of
//!   it. `layer` then writes the entries, in the order that `order` gives them, as eStargz into the second one, which
//!   `destination` takes. So a payload is never in memory, and files that are to be prefetched can come first wherever
//!   they stand. Several layers are under way at once, one for each core.
//! - A layer that is eStargz already, and of which nothing else is asked, is kept: `image` says so, and `destination` gets
//!   it from the registry itself where it can.
//! - `image` writes the configuration, the manifest and the index. Of these only what has to change does.
//! - The name is given last. An interruption leaves whole blobs, which the next run finds, and nothing else.
//!
//! The same image and options give the same bytes: nothing depends on a clock, on chance or on which layer was first.

mod destination;
mod image;
mod layer;
mod order;
mod progress;
mod spool;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use tokio::runtime::Handle;

use crate::config::Config;
use crate::daemon::{MountSource, client};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::image::manifest::{Document, IndexEntry, choose};
use crate::image::platform::Platform;
use crate::registry::reference::{Reference, Repository, Target, layout_host};
use crate::registry::{Client, ManifestBytes, OCI_INDEX, OCI_MANIFEST};

use destination::Destination;
pub use destination::Stored;
use image::Image;
pub use layer::How;
use layer::{Settings, Work};
use order::Wanted;
pub use progress::Progress;

/// What to convert, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// The image: a reference, or `oci:PATH[:TAG]`.
    pub source: String,
    /// Where it goes: a reference, or `oci:PATH[:TAG]`.
    pub destination: String,
    /// Convert the images of all platforms, and write an index.
    pub all_platforms: bool,
    /// Payload bytes in a chunk.
    pub chunk_bytes: Option<u64>,
    /// Compressed bytes that a member has at least, as far as there are enough.
    pub min_chunk_bytes: Option<u64>,
    /// Compression level, 0 to 9.
    pub level: Option<u32>,
    /// The paths of the files that are to be prefetched, in their order, as [`crate::image::profile::parse`] gives them;
    /// `None` for none.
    pub prioritized: Option<Vec<Vec<u8>>>,
    /// Write layers anew that are eStargz already.
    pub force: bool,
    /// A directory for temporary files, which take up as much as the layers under way do unpacked.
    pub scratch_dir: PathBuf,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The name that it has now.
    pub reference: String,
    /// The digest of its manifest or index.
    pub digest: Digest,
    /// The images: one, or those of an index.
    pub images: Vec<ImageReport>,
    /// Paths that were to be prefetched and that no layer has.
    pub missing: Vec<String>,
    /// What an index names besides images, and what therefore was left out: attestations of the images before.
    pub left_out: usize,
}

/// One image that was made.
#[derive(Debug, Clone, Serialize)]
pub struct ImageReport {
    /// The platform, where an index names it.
    pub platform: Option<String>,
    /// The digest of its manifest.
    pub digest: Digest,
    /// The layers, base first.
    pub layers: Vec<LayerReport>,
}

/// One layer that was made.
#[derive(Debug, Clone, Serialize)]
pub struct LayerReport {
    /// The digest of the blob that it was made of.
    pub source_digest: Digest,
    /// The size of that in bytes.
    pub source_bytes: u64,
    /// The digest of its blob.
    pub digest: Digest,
    /// The size of that in bytes.
    pub bytes: u64,
    /// What was done with it.
    pub how: How,
    /// How it came to its destination.
    pub stored: Stored,
}

/// Converts an image.
///
/// # Errors
/// [`Error::Usage`]; [`Error::Verification`] and [`Error::Malformed`] for layers that are not what the image promises;
/// [`Error::Unsupported`]; [`Error::Denied`] also without the right to push; those of the network and of the disk.
pub async fn convert(config: &Config, request: &Request, progress: &Arc<Progress>) -> Result<Report> {
    let wanted = request.prioritized.clone().map(Wanted::new);
    let settings = Settings::of(request)?;
    let place = destination::Place::parse(&request.destination)?;
    let source = MountSource::parse(&request.source)?;
    // Credentials on the command line are for one registry: the one that is written to, if there is one.
    let credential_host = match (place.host(), &source) {
        (Some(host), _) => Some(host.to_owned()),
        (None, MountSource::Image(reference)) => {
            Some(reference.parse::<Reference>()?.repository.host().to_owned())
        }
        (None, _) => None,
    };
    let client = client(config, credential_host.as_deref())?;
    let platform = match &config.platform {
        Some(text) => text.parse()?,
        None => Platform::host(),
    };
    let (repository, target) = find(&client, &request.source, source).await?;
    let found = client.manifest(&repository, &target).await?;
    let destination = Destination::open(&client, place, &request.scratch_dir).await?;
    let work = Work::new(client, repository, destination, wanted, settings, progress);
    let conversion = Conversion { work: Arc::new(work) };
    match Document::parse(&request.source, &found.bytes)? {
        Document::Manifest(_) => conversion.image(&found, None).await,
        Document::Index(entries) if request.all_platforms => conversion.index(&found, &entries).await,
        Document::Index(entries) => {
            let entry = choose(&entries, &platform).ok_or_else(|| {
                let why =
                    format!("the index has no image for {platform}; see --platform and --all-platforms");
                Error::not_found(&request.source, why)
            })?;
            let found = conversion.manifest_of(entry).await?;
            conversion.image(&found, Some(entry)).await
        }
    }
}

/// Does what computes, or waits for a disk, on a thread for such work.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    blocking(&Handle::current(), work).await
}

/// The image that `source` means.
async fn find(client: &Client, text: &str, source: MountSource) -> Result<(Repository, Target)> {
    let reference = match source {
        MountSource::Image(reference) => reference.parse::<Reference>()?,
        MountSource::Layout { path, name } => {
            let host = layout_host(&path.display().to_string());
            let found = client.find_in_layout(&host, name.as_deref()).await?;
            found.ok_or_else(|| {
                Error::usage(format!(
                    "{text}: the layout has not exactly one image; name one: {text}:TAG"
                ))
            })?
        }
        MountSource::Registries | MountSource::Registry(_) => {
            return Err(Error::usage(format!(
                "{text:?} is no image: a reference or oci:PATH[:TAG] is needed"
            )));
        }
    };
    let target = reference.target();
    Ok((reference.repository, target))
}

/// One conversion under way. Dropping it ends what works for it on other threads.
struct Conversion {
    work: Arc<Work>,
}

impl Drop for Conversion {
    fn drop(&mut self) {
        self.work.stop.now();
    }
}

impl Conversion {
    async fn manifest_of(&self, entry: &IndexEntry) -> Result<ManifestBytes> {
        let target = Target::Digest(entry.digest);
        self.work.client.manifest(&self.work.repository, &target).await
    }

    /// Converts one image, and gives it the name.
    async fn image(&self, found: &ManifestBytes, entry: Option<&IndexEntry>) -> Result<Report> {
        let image = Image::read(&self.work, found).await?;
        self.work.progress.expect(image.layers());
        let (made, mut report) = image.convert(&self.work).await?;
        report.platform = entry.map(|entry| entry.platform.to_string());
        self.work.destination.name(OCI_MANIFEST, &made).await?;
        Ok(self.report(Digest::of(&made), vec![report], 0))
    }

    /// Converts all images of an index, and gives the index the name.
    async fn index(&self, found: &ManifestBytes, entries: &[IndexEntry]) -> Result<Report> {
        let mut images = Vec::new();
        for entry in entries {
            let found = self.manifest_of(entry).await?;
            let image = Image::read(&self.work, &found).await?;
            self.work.progress.expect(image.layers());
            images.push((entry, image));
        }
        let mut made = Vec::new();
        let mut reports = Vec::new();
        for (entry, image) in images {
            let (manifest, mut report) = image.convert(&self.work).await?;
            self.work.destination.put_manifest(&manifest).await?;
            report.platform = Some(entry.platform.to_string());
            reports.push(report);
            made.push((entry.digest, manifest));
        }
        let (index, left_out) = image::index(found, &made)?;
        self.work.destination.name(OCI_INDEX, &index).await?;
        Ok(self.report(Digest::of(&index), reports, left_out))
    }

    fn report(&self, digest: Digest, images: Vec<ImageReport>, left_out: usize) -> Report {
        let missing = self.work.wanted.as_ref().map(Wanted::missing).unwrap_or_default();
        Report {
            reference: self.work.destination.to_string(),
            digest,
            images,
            missing,
            left_out,
        }
    }
}
