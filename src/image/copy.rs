//! What `get` and `prefetch` ask of images: which files there are to write, their contents, and everything in the cache.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::Sender;

use crate::error::{Error, Result};
use crate::fetch::FileAt;
use crate::fetch::in_order::{OfLayer, by_layer};
use crate::fetch::prefetch::{Pace, Part};
use crate::image::images::{Image, Images, Rootfs};
use crate::image::listed::Listed;
use crate::image::plan::{File, Head, Item, Name, What};
use crate::image::platform::Platform;
use crate::image::query::content_digest;
use crate::image::select::{Pattern, Selected, Selection};
use crate::image::tree::Node;
use crate::layer::entry::Kind;
use crate::registry::reference::Reference;

/// Bytes in one piece of an answer. Small files share a piece.
const PIECE_BYTES: usize = 1 << 20;
/// Requests under way for one stream of contents: several streams run side by side.
const STREAM_REQUESTS_MAX: usize = 4;
/// Requests under way for a prefetch: with ranges of 8 MiB enough to fill a long line.
const PREFETCH_REQUESTS_MAX: usize = 16;
/// How often a prefetch tells how far it is.
const TELL_INTERVAL: Duration = Duration::from_millis(100);

/// What a prefetch is to bring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// What these patterns select; without any, everything that can be read below the image, `layers` included.
    Patterns(Vec<Vec<u8>>),
    /// The files with these paths, in this order.
    Profile(Vec<Vec<u8>>),
}

/// What a prefetch says of itself: a JSON document a line, the last one [`Prefetched::Done`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefetched {
    /// How far it is.
    Progress {
        /// Compressed bytes that have come.
        done_bytes: u64,
        /// Compressed bytes that are to come.
        total_bytes: u64,
    },
    /// What was done.
    Done(Summary),
}

/// What a prefetch did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The image by its digest.
    pub reference: String,
    /// Why the tag could not be checked, where that is so and this is its last known image.
    pub stale: Option<String>,
    /// The patterns that matched nothing, and why.
    pub unmatched: Vec<Error>,
    /// The files of a profile that the image does not have: the first ones of them.
    pub missing: Vec<String>,
    /// How many these are altogether.
    pub missing_files: u64,
    /// The first failure that did not end it.
    pub failure: Option<Error>,
    /// Regular files that were asked for.
    pub files: u64,
    /// Compressed bytes that were fetched.
    pub fetched_bytes: u64,
    /// Bytes of files' contents that are in the cache now, of what was asked for.
    pub cached_bytes: u64,
    /// Those of them that were there before.
    pub cached_before_bytes: u64,
}

impl Images {
    /// Tells line by line what to write for `patterns`: see [`crate::image::plan`].
    ///
    /// # Errors
    /// As [`Self::rootfs`]; [`Error::Usage`] for a pattern; [`Error::Interrupted`] if nobody takes the lines.
    pub async fn plan(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        patterns: &[Vec<u8>],
        to: &Sender<Vec<u8>>,
    ) -> Result<()> {
        let (image, rootfs, stale) = self.opened(reference, platform).await?;
        let (selection, unmatched, file) = select(&rootfs, patterns)?;
        let mut nodes: Vec<(Vec<u8>, Node, bool)> = Vec::new();
        selection.each(
            rootfs.tree(),
            |Selected {
                 path,
                 node,
                 is_passage,
             }| {
                nodes.push((path.to_vec(), *node, is_passage));
                Ok(())
            },
        )?;
        let mut first_names = HashMap::new();
        let mut bytes = 0;
        let mut items = Vec::with_capacity(nodes.len());
        for (position, (path, node, is_passage)) in nodes.into_iter().enumerate() {
            let mut what = self.what(&rootfs, &node, is_passage).await?;
            if node.nlink > 1 && !node.is_dir() {
                match first_names.get(&node.number) {
                    Some(&to) => what = What::Link { to },
                    None => drop(first_names.insert(node.number, position as u64)),
                }
            }
            if let What::File(file) = &what {
                bytes += file.size;
            }
            let named = |(name, value): (&[u8], &[u8])| (Name(name.to_vec()), Name(value.to_vec()));
            items.push(Item {
                path: Name(path),
                what,
                mode: node.mode,
                uid: node.uid,
                gid: node.gid,
                mtime: (node.mtime.seconds, node.mtime.nanos),
                xattrs: rootfs.tree().xattrs(&node)?.into_iter().map(named).collect(),
            });
        }
        let head = Head {
            reference: format!("{}@{}", image.repository(), image.digest()),
            stale,
            unmatched,
            file,
            items: items.len() as u64,
            bytes,
        };
        rootfs.vouch(())?;
        let mut pieces = Pieces::new(to);
        pieces.line(&head).await?;
        for item in &items {
            pieces.line(item).await?;
        }
        pieces.flush().await
    }

    /// The contents of regular files of an image, one behind the other. What is missing is fetched ahead.
    ///
    /// # Errors
    /// As [`Self::rootfs`]; what keeps the first of the files that did not come whole from coming.
    pub async fn contents(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        nodes: &[u32],
        to: &Sender<Vec<u8>>,
    ) -> Result<()> {
        let (_, rootfs, _) = self.opened(reference, platform).await?;
        let mut files = Vec::with_capacity(nodes.len());
        for &number in nodes {
            let node = rootfs.tree().node(number)?;
            files.push(rootfs.file(self.fetcher(), &node).await?);
        }
        let ahead = self.fetch_ahead(&files);
        let reading = self.send_files(&files, to);
        tokio::pin!(ahead, reading);
        let mut is_ahead = false;
        loop {
            tokio::select! {
                outcome = &mut reading => return outcome,
                // Whoever needs what did not come gets to know why.
                _ = &mut ahead, if !is_ahead => is_ahead = true,
            }
        }
    }

    async fn fetch_ahead(self: &Arc<Self>, files: &[FileAt]) -> Result<()> {
        let fetcher = self.fetcher();
        if !fetcher.keeps_what_comes() {
            return Ok(());
        }
        let parts = self.parts(by_layer(files)?).await?;
        let pace = Pace {
            in_order: false,
            requests_max: STREAM_REQUESTS_MAX,
            retries: 0,
        };
        fetcher.bring_parts(&parts, pace, &Arc::default()).await
    }

    async fn send_files(&self, files: &[FileAt], to: &Sender<Vec<u8>>) -> Result<()> {
        let mut pieces = Pieces::new(to);
        for file in files {
            let mut offset = 0;
            while offset < file.size {
                let bytes = match self.fetcher().read_whole_now(file, offset, PIECE_BYTES) {
                    Some(bytes) => bytes,
                    None => {
                        // What is there can be written while the rest is waited for.
                        pieces.flush().await?;
                        self.fetcher().read_whole(file, offset, PIECE_BYTES).await?
                    }
                };
                if bytes.is_empty() {
                    return Err(Error::malformed(
                        file.source.name(),
                        "a file ended before its size",
                    ));
                }
                offset += bytes.len() as u64;
                pieces.push(bytes).await?;
            }
        }
        pieces.flush().await
    }

    /// Brings an image, or what is wanted of it, into the cache, and tells line by line how far it is: see [`Prefetched`].
    ///
    /// # Errors
    /// As [`Self::rootfs`]; a failure of the network that outlasts the retries, or a refusal.
    pub async fn prefetch(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
        wanted: &Wanted,
        retries: u32,
        to: &Sender<Vec<u8>>,
    ) -> Result<()> {
        let (image, rootfs, stale) = self.opened(reference, platform).await?;
        self.image_config(&image).await?;
        let (mut unmatched, mut listed) = (Vec::new(), Listed::default());
        let files = match wanted {
            Wanted::Patterns(patterns) => {
                let all = [b"/".to_vec()];
                let patterns = if patterns.is_empty() { &all[..] } else { patterns };
                let (selection, without_match, _) = select(&rootfs, patterns)?;
                unmatched = without_match;
                self.selected_files(&rootfs, &selection).await?
            }
            Wanted::Profile(paths) => {
                listed = self.listed(&rootfs, paths).await?;
                std::mem::take(&mut listed.files)
            }
        };
        let layers = match wanted {
            Wanted::Patterns(patterns) if patterns.is_empty() => self.whole_layers(&image).await?,
            _ => by_layer(&files)?,
        };
        let cached_before_bytes = cached_bytes(&layers)?;
        let in_order = matches!(wanted, Wanted::Profile(_));
        let parts = match in_order {
            true => self.fetcher().parts_in_order(&files).await?,
            false => self.parts(layers.clone()).await?,
        };
        let pace = Pace {
            in_order,
            requests_max: PREFETCH_REQUESTS_MAX,
            retries,
        };
        let landed_bytes = Arc::new(AtomicU64::new(0));
        let failure = self.bring_telling(&parts, pace, &landed_bytes, to).await?;
        let summary = Summary {
            reference: format!("{}@{}", image.repository(), image.digest()),
            stale,
            unmatched,
            missing: listed.missing,
            missing_files: listed.missing_files,
            failure,
            files: files.len() as u64,
            fetched_bytes: landed_bytes.load(Ordering::Relaxed),
            cached_bytes: cached_bytes(&layers)?,
            cached_before_bytes,
        };
        let mut pieces = Pieces::new(to);
        pieces.line(&Prefetched::Done(summary)).await?;
        pieces.flush().await
    }

    /// All layers of an image, as a whole.
    async fn whole_layers(&self, image: &Image) -> Result<Vec<OfLayer>> {
        let mut layers = Vec::with_capacity(image.sources().len());
        for source in image.sources() {
            let layer = self.fetcher().layer(source).await?;
            let chunks = 0..layer.index().chunk_count();
            layers.push((Arc::clone(source), layer, vec![chunks]));
        }
        Ok(layers)
    }

    /// Brings parts and tells how far it is. Answers the first failure that did not end it.
    async fn bring_telling(
        &self,
        parts: &[Part],
        pace: Pace,
        landed_bytes: &Arc<AtomicU64>,
        to: &Sender<Vec<u8>>,
    ) -> Result<Option<Error>> {
        let mut total_bytes = 0;
        for part in parts {
            total_bytes += part.blob_bytes()?;
        }
        let bringing = self.fetcher().bring_parts(parts, pace, landed_bytes);
        tokio::pin!(bringing);
        let mut pieces = Pieces::new(to);
        let mut interval = tokio::time::interval(TELL_INTERVAL);
        loop {
            tokio::select! {
                outcome = &mut bringing => return match outcome {
                    Ok(()) => Ok(None),
                    Err(error)
                        if error.is_network()
                            || matches!(error, Error::Denied { .. } | Error::NoCredentials { .. }) =>
                    {
                        Err(error)
                    }
                    Err(error) => Ok(Some(error)),
                },
                _ = interval.tick() => {
                    let done_bytes = landed_bytes.load(Ordering::Relaxed);
                    pieces.line(&Prefetched::Progress { done_bytes, total_bytes }).await?;
                    pieces.flush().await?;
                }
            }
        }
    }

    /// The image that a reference chooses, its tree, and why that is only what was known before.
    pub(super) async fn opened(
        self: &Arc<Self>,
        reference: &Reference,
        platform: &Platform,
    ) -> Result<(Arc<Image>, Arc<Rootfs>, Option<String>)> {
        let (digest, stale) = self.digest(reference).await?;
        let image = self.image(&reference.repository, &digest, platform).await?;
        let rootfs = self.rootfs(&image).await?;
        Ok((image, rootfs, stale))
    }

    async fn what(&self, rootfs: &Rootfs, node: &Node, is_passage: bool) -> Result<What> {
        Ok(match node.kind {
            Kind::Dir => What::Dir { is_passage },
            Kind::Symlink => What::Symlink {
                target: Name(rootfs.tree().link(node)?.to_vec()),
            },
            Kind::Char => What::Char { rdev: node.rdev },
            Kind::Block => What::Block { rdev: node.rdev },
            Kind::Fifo => What::Fifo,
            Kind::File | Kind::Hardlink => {
                let at = rootfs.file(self.fetcher(), node).await?;
                What::File(File {
                    node: node.number,
                    size: node.size,
                    layer: node.layer,
                    entry: at.entry,
                    digest: content_digest(&at)?,
                })
            }
        })
    }

    /// The regular files among what is selected, each once.
    pub(super) async fn selected_files(&self, rootfs: &Rootfs, selection: &Selection) -> Result<Vec<FileAt>> {
        let mut nodes = HashMap::new();
        selection.each(rootfs.tree(), |selected| {
            if selected.node.kind == Kind::File {
                nodes.insert(selected.node.number, *selected.node);
            }
            Ok(())
        })?;
        let mut files = Vec::with_capacity(nodes.len());
        for node in nodes.values() {
            files.push(rootfs.file(self.fetcher(), node).await?);
        }
        Ok(files)
    }

    async fn parts(&self, layers: Vec<OfLayer>) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(layers.len());
        for (source, layer, chunks) in layers {
            parts.push(self.fetcher().part(&source, &layer, chunks).await?);
        }
        Ok(parts)
    }
}

/// What the patterns select of a tree, those that select nothing, and the file that the only one leads to.
pub(super) fn select(rootfs: &Rootfs, patterns: &[Vec<u8>]) -> Result<(Selection, Vec<Error>, Option<u32>)> {
    let mut selection = Selection::default();
    let mut unmatched = Vec::new();
    let mut file = None;
    for text in patterns {
        let pattern = Pattern::parse(text)?;
        let matched = selection.add(rootfs.tree(), &pattern)?;
        if !matched.any {
            unmatched.push(Error::not_found(pattern.shown(), "the image has nothing there"));
        }
        file = matched.file.filter(|_| patterns.len() == 1);
    }
    rootfs.vouch((selection, unmatched, file))
}

fn cached_bytes(layers: &[OfLayer]) -> Result<u64> {
    let mut bytes = 0;
    for (_, layer, chunks) in layers {
        for chunks in chunks {
            bytes += layer.present_bytes(chunks.clone())?;
        }
    }
    Ok(bytes)
}

/// An answer on its way, in pieces that are neither tiny nor large.
struct Pieces<'a> {
    to: &'a Sender<Vec<u8>>,
    waiting: Vec<u8>,
}

impl<'a> Pieces<'a> {
    fn new(to: &'a Sender<Vec<u8>>) -> Self {
        Self {
            to,
            waiting: Vec::new(),
        }
    }

    async fn line(&mut self, document: &impl Serialize) -> Result<()> {
        let mut line =
            serde_json::to_vec(document).map_err(|error| Error::malformed("answer", error.to_string()))?;
        line.push(b'\n');
        self.push(line).await
    }

    async fn push(&mut self, bytes: Vec<u8>) -> Result<()> {
        if self.waiting.len() + bytes.len() > PIECE_BYTES {
            self.flush().await?;
        }
        // A whole piece goes on as it is.
        if self.waiting.is_empty() && bytes.len() > PIECE_BYTES / 2 {
            self.waiting = bytes;
            return self.flush().await;
        }
        self.waiting.extend_from_slice(&bytes);
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let piece = std::mem::take(&mut self.waiting);
        // Whoever asked has gone away, and nobody reads this error.
        self.to.send(piece).await.map_err(|_| Error::Interrupted)
    }
}
