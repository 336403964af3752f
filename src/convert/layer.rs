//! One layer's way: what it becomes, and how. Whatever computes or waits for a disk does so on threads for such work.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{OnceCell, Semaphore, mpsc};

use crate::convert::destination::Destination;
use crate::convert::order::{Order, Wanted};
use crate::convert::progress::{Meter, Progress};
use crate::convert::spool::{Intake, Spool, check_blob};
use crate::convert::{LayerReport, Request, on_thread};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::entry::Entry;
use crate::layer::estargz::writer::{Finished, Landmark, Options, Writer};
use crate::layer::estargz::{TOC_DIGEST_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION};
use crate::layer::index::Index;
use crate::layer::spool::InMemory;
use crate::layer::{Descriptor, Format, Step, indexer};
use crate::registry::reference::Repository;
use crate::registry::{BlobBody, Client, Provenance, unnamed_file};

/// Pieces of a blob that wait for the thread that takes them; a piece has some 16 KiB to 1 MiB.
const PIECES_MAX: usize = 8;
/// Ranges that are asked for to see whether a layer is eStargz.
const STEPS_MAX: usize = 4;
/// Bytes of a blob that are written at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// The largest chunk: a reader holds one in memory.
const CHUNK_BYTES_MAX: u64 = 256 << 20;
/// The largest least size of a member. What compresses best becomes a thousandth, and readers decode up to 1 GiB to get at a
/// chunk.
const MIN_CHUNK_BYTES_MAX: u64 = 512 << 10;

/// Everything that the layers of a conversion share.
pub(super) struct Work {
    pub(super) client: Client,
    /// Where the image is.
    pub(super) repository: Repository,
    pub(super) destination: Destination,
    /// What is to be prefetched.
    pub(super) wanted: Option<Wanted>,
    pub(super) progress: Arc<Progress>,
    pub(super) stop: Stop,
    settings: Settings,
    /// One for each layer that may be under way.
    slots: Semaphore,
    layers: Mutex<HashMap<Key, Arc<OnceCell<Made>>>>,
}

/// How layers are written.
#[derive(Debug)]
pub(super) struct Settings {
    options: Options,
    /// Layers may stay as they are: nothing is asked of them but to be eStargz.
    keeps: bool,
    scratch_dir: PathBuf,
}

impl Settings {
    /// What `request` asks for.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the option that is out of bounds.
    pub(super) fn of(request: &Request) -> Result<Self> {
        let asked = request.chunk_bytes.is_some()
            || request.min_chunk_bytes.is_some()
            || request.level.is_some()
            || request.prioritized.is_some();
        Ok(Self {
            options: options(request)?,
            keeps: !asked && !request.force,
            scratch_dir: request.scratch_dir.clone(),
        })
    }
}

/// A layer that is in an image twice, or in two images, is converted once.
type Key = (Digest, Option<String>);

/// Whether the conversion has ended, for the threads that work for it.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// If it has.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(io::Error::other("the conversion was given up")),
            false => Ok(()),
        }
    }
}

/// What was done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It was written anew.
    Converted,
    /// It was what was wanted.
    Kept,
}

/// What became of a layer.
#[derive(Debug, Clone)]
pub(super) struct Made {
    pub(super) report: LayerReport,
    pub(super) diff_id: Digest,
    /// The annotations that say what it is; `None`: those that it had.
    pub(super) annotations: Option<BTreeMap<&'static str, String>>,
}

impl Work {
    pub(super) fn new(
        client: Client,
        repository: Repository,
        destination: Destination,
        wanted: Option<Wanted>,
        settings: Settings,
        progress: &Arc<Progress>,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            client,
            repository,
            destination,
            wanted,
            progress: Arc::clone(progress),
            stop: Stop::default(),
            settings,
            slots: Semaphore::new(cores),
            layers: Mutex::default(),
        }
    }

    /// Brings a layer, whose tar has `diff_id` by the image's configuration, to the destination as eStargz.
    pub(super) async fn layer(&self, descriptor: &Descriptor, diff_id: &Digest) -> Result<Made> {
        let toc = descriptor.annotations.get(TOC_DIGEST_ANNOTATION);
        let key = (descriptor.digest, toc.cloned());
        let cell = Arc::clone(self.layers.lock().entry(key).or_default());
        let made = cell
            .get_or_try_init(|| async {
                // Never closed.
                let _slot = self.slots.acquire().await;
                let meter = self.progress.begin(descriptor.size);
                let made = match self.is_kept(descriptor).await? {
                    true => self.keep(descriptor, diff_id, &meter).await?,
                    false => self.convert(descriptor, diff_id, &meter).await?,
                };
                meter.finish();
                Ok::<Made, Error>(made)
            })
            .await?;
        Ok(made.clone())
    }

    /// Whether the layer is eStargz already, as its manifest says and its TOC proves, and nothing else is asked for.
    async fn is_kept(&self, descriptor: &Descriptor) -> Result<bool> {
        // This also refuses what is no layer at all.
        indexer(descriptor, None, Arc::new(InMemory))?;
        if !self.settings.keeps || !descriptor.annotations.contains_key(TOC_DIGEST_ANNOTATION) {
            return Ok(false);
        }
        loop {
            let mut given = Vec::new();
            let error = match self.is_estargz(descriptor, &mut given).await {
                Ok(is_estargz) => return Ok(is_estargz),
                Err(error) => error,
            };
            let distrusted = given.iter().fold(false, |found, (range, provenance)| {
                provenance.distrust(range, &error) || found
            });
            match error {
                _ if distrusted => {}
                // What cannot be read by ranges is written anew, if it is what it should be.
                Error::Malformed { .. } | Error::Verification { .. } | Error::Unsupported { .. } => {
                    return Ok(false);
                }
                error => return Err(error),
            }
        }
    }

    async fn is_estargz(
        &self,
        descriptor: &Descriptor,
        given: &mut Vec<(Range<u64>, Provenance)>,
    ) -> Result<bool> {
        let mut indexer = indexer(descriptor, None, Arc::new(InMemory))?;
        let mut have: Option<Bytes> = None;
        for _ in 0..STEPS_MAX {
            let step = on_thread(move || {
                let step = indexer.step(have.as_deref())?;
                Ok((step, indexer))
            });
            let (step, next) = step.await?;
            indexer = next;
            match step {
                Step::Need(range) => {
                    let bytes = self
                        .client
                        .layer_bytes(&self.repository, descriptor, range.clone());
                    let (bytes, provenance) = bytes.await?;
                    given.push((range, provenance));
                    have = Some(bytes);
                }
                Step::Done(index) => return Ok(Index::open(index)?.summary().format == Format::Estargz),
                // A TOC elsewhere does not come with the layer.
                _ => return Ok(false),
            }
        }
        Ok(false)
    }

    /// Brings the layer to the destination as it is.
    async fn keep(&self, descriptor: &Descriptor, diff_id: &Digest, meter: &Meter) -> Result<Made> {
        let (digest, size) = (descriptor.digest, descriptor.size);
        let stored = match self.destination.find(&digest, size, &self.repository).await? {
            Some(stored) => stored,
            None => {
                let file = self.copy(descriptor, meter).await?;
                self.destination.put(digest, size, file, &meter.stored).await?
            }
        };
        let report = LayerReport {
            source_digest: digest,
            source_bytes: size,
            digest,
            bytes: size,
            how: How::Kept,
            stored,
        };
        Ok(Made {
            report,
            diff_id: *diff_id,
            annotations: None,
        })
    }

    async fn convert(&self, descriptor: &Descriptor, diff_id: &Digest, meter: &Arc<Meter>) -> Result<Made> {
        let spool = self.spool(descriptor, diff_id, meter).await?;
        meter.written.of.store(spool.content_bytes, Ordering::Relaxed);
        let order = Order::of(
            spool.entries.iter().map(|spooled| &spooled.entry),
            self.wanted.as_ref(),
        );
        let landmark = match order.prefetched {
            0 => Landmark::NoPrefetch,
            entries => Landmark::Prefetch(entries),
        };
        let options = Options {
            landmark,
            ..self.settings.options
        };
        let file = self.destination.scratch().await?;
        let (stop, meter) = (self.stop.clone(), Arc::clone(meter));
        let read = Arc::clone(&meter);
        let written = on_thread(move || write(&spool, &order, options, file, &read, &stop));
        let (file, finished) = written.await?;
        let (digest, size) = (finished.blob_digest, finished.blob_bytes);
        let stored = self.destination.put(digest, size, file, &meter.stored).await?;
        let report = LayerReport {
            source_digest: descriptor.digest,
            source_bytes: descriptor.size,
            digest,
            bytes: size,
            how: How::Converted,
            stored,
        };
        let annotations = BTreeMap::from([
            (TOC_DIGEST_ANNOTATION, finished.toc_digest.to_string()),
            (UNCOMPRESSED_SIZE_ANNOTATION, finished.unpacked_bytes.to_string()),
        ]);
        Ok(Made {
            report,
            diff_id: finished.diff_id,
            annotations: Some(annotations),
        })
    }

    /// Fetches and unpacks a layer. Where a mirror gave what it is not, that is left out, and the next endpoint asked.
    async fn spool(&self, descriptor: &Descriptor, diff_id: &Digest, meter: &Meter) -> Result<Spool> {
        loop {
            let (body, provenance) = self.open(descriptor, meter).await?;
            let intake = Intake::new(self.scratch().await?);
            let (wanted, diff_id) = (descriptor.clone(), *diff_id);
            let take = |intake: &mut Intake, bytes: &[u8]| intake.push(bytes);
            let spool = match feed(body, meter, intake, take).await {
                Ok(intake) => on_thread(move || intake.finish(&wanted, &diff_id)).await,
                Err(error) => Err(error),
            };
            match spool {
                Err(error) if provenance.distrust(&(0..descriptor.size), &error) => {}
                spool => return spool,
            }
        }
    }

    /// Fetches a blob into a file for the destination.
    async fn copy(&self, descriptor: &Descriptor, meter: &Meter) -> Result<File> {
        loop {
            let (body, provenance) = self.open(descriptor, meter).await?;
            let copy = (self.destination.scratch().await?, Hasher::default());
            let take = |(file, hasher): &mut (File, Hasher), bytes: &[u8]| {
                hasher.update(bytes);
                file.write_all(bytes).map_err(|error| write_failed(&error))
            };
            let (file, hasher) = feed(body, meter, copy, take).await?;
            let bytes = meter.fetched.load(Ordering::Relaxed);
            match check_blob(descriptor, bytes, hasher) {
                Ok(()) => return Ok(file),
                Err(error) if provenance.distrust(&(0..descriptor.size), &error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn open(&self, descriptor: &Descriptor, meter: &Meter) -> Result<(BlobBody, Provenance)> {
        let body = self.client.layer_stream(&self.repository, descriptor).await?;
        meter.fetched.store(0, Ordering::Relaxed);
        let provenance = body.provenance();
        Ok((body, provenance))
    }

    /// A temporary file of the conversion's own.
    async fn scratch(&self) -> Result<File> {
        let dir = self.settings.scratch_dir.clone();
        on_thread(move || unnamed_file(&dir)).await
    }
}

/// Hands all of a body to `take`, which works on `state` on a thread of its own.
async fn feed<S: Send + 'static>(
    mut body: BlobBody,
    meter: &Meter,
    mut state: S,
    take: impl Fn(&mut S, &[u8]) -> Result<()> + Send + 'static,
) -> Result<S> {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(PIECES_MAX);
    let taken = on_thread(move || {
        while let Some(bytes) = receiver.blocking_recv() {
            take(&mut state, &bytes)?;
        }
        Ok(state)
    });
    let sent = async move {
        while let Some(bytes) = body.next().await? {
            meter.fetched.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            // It fails where the other side has: that tells why.
            if sender.send(bytes).await.is_err() {
                break;
            }
        }
        Ok::<(), Error>(())
    };
    let (sent, taken) = tokio::join!(sent, taken);
    sent.and(taken)
}

/// Writes a layer as eStargz.
fn write(
    spool: &Spool,
    order: &Order,
    options: Options,
    file: File,
    meter: &Meter,
    stop: &Stop,
) -> Result<(File, Finished)> {
    let mut writer = Writer::new(BufWriter::with_capacity(BUFFER_BYTES, file), options);
    for spooled in order
        .entries
        .iter()
        .filter_map(|number| spool.entries.get(*number))
    {
        check_text(&spooled.entry)?;
        let mut content = spool.content(spooled, &meter.written.done, stop);
        writer.append(&spooled.entry, &mut content)?;
        stop.check().map_err(|error| write_failed(&error))?;
    }
    let (out, finished) = writer.finish()?;
    let file = out.into_inner().map_err(|error| write_failed(error.error()))?;
    Ok((file, finished))
}

fn write_failed(error: &io::Error) -> Error {
    Error::io("temporary file of a layer", error)
}

/// The TOC is JSON, which has no other text than Unicode: a file would have another name than in the tar.
fn check_text(entry: &Entry) -> Result<()> {
    let names = entry.xattrs.iter().map(|(name, _)| name);
    let mut texts = [&entry.path, &entry.link].into_iter().chain(names);
    match texts.all(|text| std::str::from_utf8(text).is_ok()) {
        true => Ok(()),
        false => {
            let what = format!("entry {:?}", String::from_utf8_lossy(&entry.path));
            let why = "eStargz cannot say a name that is not UTF-8, so the image cannot be converted";
            Err(Error::unsupported(what, why))
        }
    }
}

fn options(request: &Request) -> Result<Options> {
    let default = Options::default();
    let options = Options {
        chunk_bytes: request.chunk_bytes.unwrap_or(default.chunk_bytes),
        min_chunk_bytes: request.min_chunk_bytes.unwrap_or(default.min_chunk_bytes),
        level: request.level.unwrap_or(default.level),
        ..default
    };
    let within = |name: &str, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(Error::usage(format!(
            "{name} {value}: {least} to {most} are possible"
        ))),
    };
    within("--chunk-size", options.chunk_bytes, 1, CHUNK_BYTES_MAX)?;
    within(
        "--min-chunk-size",
        options.min_chunk_bytes,
        0,
        MIN_CHUNK_BYTES_MAX,
    )?;
    within("--compression-level", u64::from(options.level), 0, 9)?;
    Ok(options)
}
