//! One pass over a layer that has no table of contents: the whole blob streams through once, is hashed, decompressed and
//! scanned, and leaves an index behind from which every later read is a range. Its content goes into the store on the way,
//! as far as the budget allows.
//!
//! Nothing of it is to be seen before the end, because only the end tells whether the blob has its digest and the tar the
//! one that the image's configuration says. Then the layer is there, with all that was kept; else there is nothing of it.
//!
//! A pass belongs to nobody: who is interrupted ends nothing for others. One that nobody has waited for in
//! [`ALONE_MAX`] is given up, so that a `find` that was interrupted does not go on reading terabytes.

mod pipeline;
mod table;
mod wait;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

pub use self::table::PassProgress;
pub(super) use self::table::Passes;
pub use self::wait::Awaited;

use self::pipeline::{Passed, Pipeline};
use self::table::Pass;
use crate::config::PlainLayers;
use crate::error::{Error, Result};
use crate::fetch::failures::FINAL_FAILURE_MEMORY;
use crate::fetch::indexing::{Given, index_failure_key, of_registry};
use crate::fetch::{Fetcher, Source, blocking};
use crate::store::layer::Layer;
use crate::store::staged::Staged;

/// For how long a pass goes on that nobody waits for: whoever was interrupted may come back soon.
const ALONE_MAX: Duration = Duration::from_secs(60);

/// Whom a failed pass is the fault of.
enum Fault {
    /// The blob, or who gave it.
    Blob(Error),
    /// The image in which the layer was found.
    Image(Error),
}

impl Fault {
    fn into_error(self) -> Error {
        match self {
            Self::Blob(error) | Self::Image(error) => error,
        }
    }
}

/// What is known of a layer without asking anybody.
#[derive(Debug, Clone)]
pub(super) enum Known {
    /// It is indexed.
    Indexed(Arc<Layer>),
    /// Its format has a table of contents: a few ranges bring its index.
    Ranges,
    /// All of it must be read once.
    Pass,
}

impl Fetcher {
    /// What is known of a layer. Asks the network nothing and starts nothing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) async fn known(&self, source: &Source) -> Result<Known> {
        Ok(match self.stored_layer(source).await? {
            Some(layer) => Known::Indexed(layer),
            None if source.needs_pass() || self.is_without_ztoc(source) => Known::Pass,
            None => Known::Ranges,
        })
    }

    /// The passes under way and those that wait for their turn.
    #[must_use]
    pub fn passes(&self) -> Vec<PassProgress> {
        let progress = |pass: &Arc<Pass>| pass.progress(self.waiters(pass));
        self.passes.all().iter().map(progress).collect()
    }

    fn waiters(&self, pass: &Pass) -> usize {
        self.indexing.waiters(&(pass.key, pass.repository.clone()))
    }

    /// Refuses what the configuration leaves out.
    fn check_allowed(&self, source: &Source) -> Result<()> {
        let bytes = source.descriptor.size;
        let limits = &self.options.plain;
        let what = || {
            format!(
                "{}, which would have to be read as a whole ({bytes} bytes)",
                source.name()
            )
        };
        if limits.plain_layers == PlainLayers::Refuse {
            let why = "the configuration says plain_layers = \"refuse\"; with \"index\" it is read once, or take an image whose layers are lazy";
            return Err(Error::denied(what(), why));
        }
        match limits.bytes_max {
            Some(bytes_max) if bytes > bytes_max => Err(Error::denied(
                what(),
                format!(
                    "the configuration says plain_layer_bytes_max = {bytes_max}; raise it to read this one"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Reads a layer once, and keeps what that gives.
    pub(super) async fn pass(
        self: &Arc<Self>,
        source: &Source,
        given: &mut Vec<Given>,
    ) -> Result<Arc<Layer>> {
        if let Some(layer) = self.shared_layer(source).await? {
            return Ok(layer);
        }
        self.check_allowed(source)?;
        let under_way = self.passes.enter(source);
        let pass = &under_way.pass;
        let _turn = self.passes.turn().await?;
        if self.waiters(pass) == 0 {
            return Err(Error::Interrupted);
        }
        pass.begin();
        tracing::info!(layer = %source.descriptor.digest, repository = %source.repository, bytes = source.descriptor.size, "reading a layer as a whole, once");
        let promise = async {
            let promise = self.promise(source).await?;
            pass.note_layers(promise.map_or(0, |promise| promise.layers));
            Ok(promise)
        };
        let streaming = async {
            self.stream_through(source, pass, given)
                .await
                .map_err(Fault::Blob)
        };
        let joined = tokio::try_join!(streaming, async { promise.await.map_err(Fault::Image) });
        if !matches!(joined, Err(Fault::Blob(_))) {
            // From here on whoever gave the blob is not to blame.
            given.clear();
        }
        let (Passed { scanned, staged }, promise) = joined.map_err(Fault::into_error)?;
        let checked = promise.map_or(Ok(()), |promise| promise.check(source, scanned.diff_id));
        if let Err(error) = checked {
            let key = index_failure_key(source);
            self.failures.remember_for(FINAL_FAILURE_MEMORY, key, &error);
            return Err(error);
        }
        let key = source.key();
        let layer = blocking(&self.runtime, move || staged.commit(&key, &scanned.index));
        let layer = layer.await?;
        self.counters.layers_indexed.fetch_add(1, Ordering::Relaxed);
        self.share(source, &layer);
        Ok(layer)
    }

    async fn stream_through(
        self: &Arc<Self>,
        source: &Source,
        pass: &Pass,
        given: &mut Vec<Given>,
    ) -> Result<Passed> {
        let (store, budget_bytes) = (Arc::clone(&self.store), self.options.budget_bytes);
        let staged = blocking(&self.runtime, move || Ok(Staged::new(&store, budget_bytes))).await?;
        let (pieces, pipeline) = Pipeline::start(&self.runtime, &source.descriptor, staged);
        let fed = self.feed(source, pass, pieces, given).await;
        let ended = pipeline.end(&self.runtime).await;
        fed.and(ended)
    }

    /// Streams the blob, for as long as somebody takes it and somebody waits for it.
    async fn feed(
        self: &Arc<Self>,
        source: &Source,
        pass: &Pass,
        to: mpsc::Sender<Bytes>,
        given: &mut Vec<Given>,
    ) -> Result<()> {
        let is_remote = self.is_remote(source);
        if is_remote {
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
        }
        let range = 0..source.descriptor.size;
        let body = self.client.layer_stream(&source.repository, &source.descriptor);
        let mut body = body.await.map_err(|error| of_registry(source.blame(error)))?;
        given.push((range, body.provenance()));
        let mut awaited = Instant::now();
        while let Some(piece) = body.next().await.map_err(of_registry)? {
            let bytes = piece.len() as u64;
            if is_remote {
                self.counters.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            if to.send(piece).await.is_err() {
                return Ok(());
            }
            pass.note_bytes(bytes);
            if self.waiters(pass) > 0 {
                awaited = Instant::now();
            } else if awaited.elapsed() > ALONE_MAX {
                tracing::info!(layer = %source.descriptor.digest, "nobody waits for a layer any more: it is given up");
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }
}
