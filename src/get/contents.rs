//! Getting contents: batches of files, several at a time, each asked for again where a failure of the network cut it
//! off.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::daemon::{ImageName, Query, Session};
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::fetch::prefetch::Backoff;
use crate::get::Shared;
use crate::get::writer::{Written, write};
use crate::image::plan::{File, Item, What};

/// Batches under way.
const WORKERS: usize = 8;
/// How many batches there are for each worker, if the files are many: none has to wait long for the last one.
const BATCHES_PER_WORKER: u64 = 4;
/// A batch ends with the file that makes it as large as this; small requests waste round trips.
const BATCH_BYTES_MIN: u64 = 1 << 20;
/// Larger batches gain nothing.
const BATCH_BYTES_MAX: u64 = 16 << 20;
/// The most files in a batch.
const BATCH_FILES_MAX: usize = 512;
/// Pieces that may wait to be written, each at most 1 MiB.
const PIECES_WAITING_MAX: usize = 4;
/// Parts of a position in a layer, to compare those of different layers.
const POSITIONS: u128 = 1 << 20;

type Batches = Arc<Mutex<VecDeque<VecDeque<Item>>>>;

/// Gets the contents of all files among `items` that have any.
pub(super) async fn get(
    session: &Arc<Session>,
    image: &ImageName,
    retries: u32,
    shared: &Arc<Shared>,
    items: &[Item],
) -> Result<()> {
    let batches: Batches = Arc::new(Mutex::new(batches(items).into()));
    let mut workers = JoinSet::new();
    for _ in 0..WORKERS {
        let worker = Worker {
            session: Arc::clone(session),
            image: image.clone(),
            retries,
            shared: Arc::clone(shared),
        };
        let batches = Arc::clone(&batches);
        workers.spawn(async move {
            loop {
                // Not in the condition of the loop, where the lock would be held all the while.
                let next = batches.lock().pop_front();
                let Some(batch) = next else { return Ok(()) };
                worker.batch(batch).await?;
            }
        });
    }
    while let Some(done) = workers.join_next().await {
        done.unwrap_or_else(|error| Err(Error::malformed("get", error.to_string())))?;
    }
    Ok(())
}

/// Files with content in batches, each of one layer and in the order of its blob, all layers at the same pace.
fn batches(items: &[Item]) -> Vec<VecDeque<Item>> {
    let mut layers: BTreeMap<u16, Vec<(&File, &Item)>> = BTreeMap::new();
    let mut total = 0;
    for item in items {
        if let What::File(file) = &item.what
            && file.size > 0
        {
            layers.entry(file.layer).or_default().push((file, item));
            total += file.size;
        }
    }
    let batch_bytes = (total / (WORKERS as u64 * BATCHES_PER_WORKER)).clamp(BATCH_BYTES_MIN, BATCH_BYTES_MAX);
    let mut batches: Vec<(u128, VecDeque<Item>)> = Vec::new();
    for mut files in layers.into_values() {
        files.sort_by_key(|(file, _)| file.entry);
        let of_layer: u64 = files.iter().map(|(file, _)| file.size).sum();
        let (mut before, mut bytes) = (0, 0);
        let mut batch = VecDeque::new();
        for (file, item) in files {
            if bytes >= batch_bytes || batch.len() >= BATCH_FILES_MAX {
                batches.push((position(before, of_layer), std::mem::take(&mut batch)));
                before += std::mem::take(&mut bytes);
            }
            bytes += file.size;
            batch.push_back(item.clone());
        }
        batches.push((position(before, of_layer), batch));
    }
    batches.sort_by_key(|(position, _)| *position);
    batches.into_iter().map(|(_, batch)| batch).collect()
}

fn position(before: u64, of_layer: u64) -> u128 {
    u128::from(before) * POSITIONS / u128::from(of_layer.max(1))
}

struct Worker {
    session: Arc<Session>,
    image: ImageName,
    retries: u32,
    shared: Arc<Shared>,
}

impl Worker {
    /// Gets a batch. A file whose content cannot be had is noted and passed over.
    async fn batch(&self, mut files: VecDeque<Item>) -> Result<()> {
        let mut backoff = Backoff::new(self.retries);
        while !files.is_empty() {
            let (outcome, written) = self.attempt(files).await?;
            files = written.left;
            if let Some(failure) = written.failure {
                return Err(failure);
            }
            if written.any {
                backoff.progress();
            }
            let error = match outcome {
                Ok(()) if files.is_empty() => return Ok(()),
                Ok(()) => Error::malformed("contents", "they end early"),
                Err(error) => error,
            };
            match error {
                // What of it is cached can be had all the same, and the next file too.
                Error::Offline { .. }
                | Error::Verification { .. }
                | Error::Malformed { .. }
                | Error::Unsupported { .. }
                | Error::Io { .. } => {
                    if let Some(file) = files.pop_front() {
                        self.shared.fail(about(&file, error));
                    }
                }
                // The daemon has ended; whoever has the store now answers.
                Error::Busy { .. } if written.any => {}
                error if backoff.wait(&error).await => {}
                error => return Err(error),
            }
        }
        Ok(())
    }

    /// Asks for contents and writes what comes.
    async fn attempt(&self, files: VecDeque<Item>) -> Result<(Result<()>, Written)> {
        let node = |item: &Item| match &item.what {
            What::File(file) => Some(file.node),
            _ => None,
        };
        let query = Query::Contents {
            image: self.image.clone(),
            nodes: files.iter().filter_map(node).collect(),
        };
        let (sender, receiver) = mpsc::channel(PIECES_WAITING_MAX);
        let shared = Arc::clone(&self.shared);
        let runtime = Handle::current();
        let writing = blocking(&runtime, move || Ok(write(&shared, files, receiver)));
        let (outcome, written) = tokio::join!(self.session.answer(query, sender), writing);
        Ok((outcome, written?))
    }
}

/// Says in an error which file it kept from coming.
fn about(item: &Item, error: Error) -> Error {
    let path = crate::get::shown(&item.path.0);
    let of = |what: String| format!("{path} ({what})");
    match error {
        Error::Offline { what } => Error::Offline { what: of(what) },
        Error::Verification {
            what,
            expected,
            actual,
        } => Error::Verification {
            what: of(what),
            expected,
            actual,
        },
        Error::Malformed { what, why } => Error::Malformed { what: of(what), why },
        Error::Unsupported { what, why } => Error::Unsupported { what: of(what), why },
        Error::Io { what, errno, why } => Error::Io {
            what: of(what),
            errno,
            why,
        },
        other => other,
    }
}
