//! Bringing a layer's index into the store: by the few ranges that its format asks for, or one pass over all of it, once,
//! whoever asks.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::external_toc::ExternalTocs;
use crate::fetch::failures::FailureKey;
use crate::fetch::pass::Known;
use crate::fetch::single_flight::SingleFlight;
use crate::fetch::{Fetcher, Source, blocking};
use crate::layer::index::Summary;
use crate::layer::{self, Step};
use crate::registry::reference::Repository;
use crate::registry::{BlobBody, Provenance};
use crate::store::layer::Layer;

/// The most things that a format may ask for before it has its index. External TOCs, of which one after the other is tried,
/// take the most: two for the layer's own bytes, one for each candidate, and one for there being no more.
const STEPS_MAX: usize = 12;
/// Stands for "the index" among the failures of a layer's members.
const INDEX_MEMBER: u32 = u32::MAX;

/// How often a layer is asked for anew that somebody else's attempt at it did not bring.
const ATTEMPTS_MAX: usize = 3;

/// What a layer being indexed is known by.
pub(super) type IndexingKey = (Digest, Repository);
/// The layers being indexed.
pub(super) type Indexing = SingleFlight<IndexingKey, Arc<Layer>>;
/// Those of them whose formats are asked for what they need: `None` is a pass.
pub(super) type ByRanges = SingleFlight<IndexingKey, Option<Arc<Layer>>>;

pub(super) fn key_of(source: &Source) -> IndexingKey {
    (source.key(), source.repository.clone())
}

impl Fetcher {
    /// The layer as its source says, indexed: from the store if it was indexed before, else with the requests that its
    /// format needs. Where that is one pass over all of it, this takes as long as bytes come. What a merged tree says of a
    /// layer holds for the way that was settled when it was merged and for no other.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what is no layer of files; [`Error::Denied`] for a pass that the configuration refuses;
    /// what the registry or the layer's bytes did wrong.
    pub async fn layer_as_it_is(self: &Arc<Self>, source: &Arc<Source>) -> Result<Arc<Layer>> {
        let mut attempt = 1;
        loop {
            let is_own = Arc::new(AtomicBool::new(false));
            match self.layer_once(source, &is_own).await {
                // A pass was given up just when we came to wait for it, or it was for an image that promises another tar.
                Err(Error::Interrupted | Error::Verification { .. })
                    if !is_own.load(Ordering::Relaxed) && attempt < ATTEMPTS_MAX =>
                {
                    attempt += 1;
                }
                outcome => {
                    return outcome.inspect(|layer| self.store.digests().offer(layer, source.audience()));
                }
            }
        }
    }

    async fn layer_once(
        self: &Arc<Self>,
        source: &Arc<Source>,
        is_own: &Arc<AtomicBool>,
    ) -> Result<Arc<Layer>> {
        if let Some(layer) = self.stored_as_it_is(source).await? {
            return Ok(layer);
        }
        if let Err(error) = self.recent_index_failure(source) {
            is_own.store(true, Ordering::Relaxed);
            return Err(error);
        }
        let (fetcher, source, is_own) = (Arc::clone(self), Arc::clone(source), Arc::clone(is_own));
        let key = key_of(&source);
        let work = async move {
            let _waiting = fetcher.foreground.enter();
            is_own.store(true, Ordering::Relaxed);
            // Another flight may have ended since the look above.
            if let Some(layer) = fetcher.stored_as_it_is(&source).await? {
                return Ok(layer);
            }
            let outcome = fetcher.index(&source).await.map_err(|error| source.blame(error));
            if let Err(error) = &outcome {
                fetcher.remember_index_failure(&source, error);
            }
            outcome
        };
        self.indexing.run(&self.runtime, key, Box::pin(work)).await
    }

    /// Failures of an index are those of an image: another one may promise another tar for the same blob.
    fn recent_index_failure(&self, source: &Source) -> Result<()> {
        self.failures.recent(&index_failure_key(source))
    }

    fn remember_index_failure(&self, source: &Source, error: &Error) {
        // Nobody waited any more; whoever comes next begins anew.
        if *error != Error::Interrupted {
            self.failures.remember(index_failure_key(source), error);
        }
    }

    /// Bytes `range` of a layer's blob as the registry has them, **not verified**.
    ///
    /// # Errors
    /// Those of the registry client; [`Error::Malformed`] if the registry does not have the blob.
    pub async fn blob(&self, source: &Source, range: Range<u64>) -> Result<BlobBody> {
        let body = self
            .client
            .layer(&source.repository, &source.descriptor, range)
            .await;
        body.map_err(|error| source.blame(error))
    }

    /// The layer's table of contents as the registry has it, verified by the digest that was noted when it was indexed.
    ///
    /// # Errors
    /// As [`Self::layer`], and [`Error::Verification`].
    pub async fn toc(self: &Arc<Self>, source: &Arc<Source>) -> Result<Bytes> {
        let Source {
            repository,
            descriptor,
            ..
        } = &**source;
        let summary = *self.layer(source).await?.index().summary();
        let range = summary.toc_start..summary.toc_end;
        if range.is_empty() {
            return self.external_toc(source, summary).await;
        }
        loop {
            let (compressed, provenance) = self
                .client
                .layer_bytes(repository, descriptor, range.clone())
                .await
                .map_err(|error| source.blame(error))?;
            let toc = blocking(&self.runtime, move || layer::toc(summary.format, &compressed));
            let toc = toc.await.and_then(|toc| match Digest::of(&toc) {
                actual if actual == summary.toc_digest => Ok(toc),
                actual => {
                    let what = format!("{repository} layer {}, table of contents", descriptor.digest);
                    Err(Error::mismatch(what, summary.toc_digest, actual))
                }
            });
            match toc {
                Err(error) if provenance.distrust(&range, &error) => {}
                toc => return toc.map(Bytes::from),
            }
        }
    }

    /// The layer's table of contents from where it was found when it was indexed: another image.
    async fn external_toc(self: &Arc<Self>, source: &Source, summary: Summary) -> Result<Bytes> {
        let mut tocs = ExternalTocs::default();
        while let Some(compressed) = tocs.next(self, source).await? {
            let unpack = move || Ok(layer::toc(summary.format, &compressed).ok());
            let toc = blocking(&self.runtime, unpack).await?;
            if let Some(toc) = toc.filter(|toc| Digest::of(toc) == summary.toc_digest) {
                return Ok(Bytes::from(toc));
            }
        }
        let what = format!("{}, table of contents", source.name());
        Err(Error::malformed(what, "the image that had it is no longer there"))
    }

    async fn stored_as_it_is(&self, source: &Source) -> Result<Option<Arc<Layer>>> {
        let (store, key) = (Arc::clone(&self.store), source.key());
        blocking(&self.runtime, move || store.layer(&key)).await
    }

    /// Brings the index. Where a mirror gave bytes that are none, it is left out, and the next endpoint asked.
    async fn index(self: &Arc<Self>, source: &Arc<Source>) -> Result<Arc<Layer>> {
        if let Some(layer) = self.layer_by_ranges(source).await? {
            return Ok(layer);
        }
        loop {
            let mut given = Vec::new();
            // Boxed, because it is large and most layers do without.
            let passed = Box::pin(self.pass(source, &mut given)).await;
            match passed.map_err(|error| name(&source.name(), error)) {
                Err(error) if distrust(&given, &error) => {}
                outcome => return outcome,
            }
        }
    }

    /// The layer, indexed, if it was so before or takes no more than a few ranges; `None` where all of it must be read once,
    /// which this does not begin: for questions about a layer, which are not worth that.
    ///
    /// # Errors
    /// As [`Self::layer`].
    pub async fn layer_without_pass(self: &Arc<Self>, source: &Arc<Source>) -> Result<Option<Arc<Layer>>> {
        let source = self.settle(source).await?;
        match self.known(&source).await? {
            Known::Indexed(layer) => Ok(Some(layer)),
            Known::Pass => Ok(None),
            Known::Ranges => self.layer_by_ranges(&source).await,
        }
    }

    /// The layer, indexed by what its format asks for; `None` where that is one pass.
    async fn layer_by_ranges(self: &Arc<Self>, source: &Arc<Source>) -> Result<Option<Arc<Layer>>> {
        self.recent_index_failure(source)?;
        let (fetcher, source) = (Arc::clone(self), Arc::clone(source));
        let key = key_of(&source);
        let work = async move {
            let _waiting = fetcher.foreground.enter();
            let outcome = loop {
                let mut given = Vec::new();
                match fetcher.by_ranges(&source, &mut given).await {
                    Err(error) if distrust(&given, &error) => {}
                    outcome => break outcome.map_err(|error| source.blame(error)),
                }
            };
            if let Err(error) = &outcome {
                fetcher.remember_index_failure(&source, error);
            }
            outcome
        };
        self.by_ranges.run(&self.runtime, key, Box::pin(work)).await
    }

    /// Brings the index by what its format asks for; `None` where that is one pass.
    async fn by_ranges(
        self: &Arc<Self>,
        source: &Source,
        given: &mut Vec<Given>,
    ) -> Result<Option<Arc<Layer>>> {
        let Source {
            repository,
            descriptor,
            ..
        } = source;
        let what = source.name();
        let mut indexer = layer::indexer(descriptor, source.ztoc.as_ref(), self.store.scratch())
            .map_err(|error| name(&what, error))?;
        let mut have = None;
        let mut tocs = ExternalTocs::default();
        for _ in 0..STEPS_MAX {
            let step = blocking(&self.runtime, move || {
                let step = indexer.step(have.as_deref())?;
                Ok((step, indexer))
            });
            let (step, next) = step.await.map_err(|error| match source.ztoc {
                Some(_) => name(&what, of_ztoc(error)),
                None => name(&what, error),
            })?;
            indexer = next;
            match step {
                Step::Need(range) => {
                    let bytes = self.client.layer_bytes(repository, descriptor, range.clone());
                    let (bytes, provenance) = bytes.await.map_err(of_registry)?;
                    given.push((range, provenance));
                    have = Some(bytes);
                }
                Step::NeedExternalToc => {
                    have = tocs.next(self, source).await?;
                    if have.is_none() {
                        tracing::info!(layer = what, "no image of TOCs has the TOC of this layer");
                    }
                }
                Step::NeedBlob(blob) => {
                    have = Some(self.whole_blob(source, &blob).await?);
                }
                Step::Pass => return Ok(None),
                Step::Done(index) => {
                    self.counters.layers_indexed.fetch_add(1, Ordering::Relaxed);
                    let (store, key) = (Arc::clone(&self.store), source.key());
                    let layer = blocking(&self.runtime, move || store.add_layer(&key, &index));
                    return layer.await.map(Some);
                }
            }
        }
        Err(Error::malformed(what, "its index takes too many requests"))
    }
}

pub(super) fn index_failure_key(source: &Source) -> FailureKey {
    let place = source.place.as_ref();
    let place = place.map_or(String::new(), |place| {
        format!("{} {}", place.config.digest, place.number)
    });
    let key = Digest::of(format!("{} {place}", source.key()).as_bytes());
    (key, INDEX_MEMBER, source.repository.clone())
}

/// A range of a blob, and who gave it.
pub(super) type Given = (Range<u64>, Provenance);

/// Whether `error` may come from what mirrors gave, which are then left out.
fn distrust(given: &[Given], error: &Error) -> bool {
    let given = given.iter();
    // What is found while a layer is read once is found in bytes that nobody has verified yet.
    let error = &match error {
        Error::Unsupported { what, why } => Error::malformed(what, why),
        other => other.clone(),
    };
    // All of them are told: which range was wrong only the index that it should have been would say.
    given.fold(false, |found, (range, provenance)| {
        provenance.distrust(range, error) || found
    })
}

/// A zTOC that has its digest and is wrong all the same stays wrong: it is of no use, and the layer is read without it.
fn of_ztoc(error: Error) -> Error {
    match error {
        Error::Malformed { what, why } => Error::Unsupported { what, why },
        other => other,
    }
}

/// What a registry cannot do is nothing that the layer is: another day it can.
pub(super) fn of_registry(error: Error) -> Error {
    match error {
        Error::Unsupported { what, why } => Error::Network { what, why },
        other => other,
    }
}

/// Says in an error from a pure parser which layer it is about, and of which repository.
fn name(layer: &str, error: Error) -> Error {
    let named = |what: String| {
        if what.starts_with("layer sha256:") {
            layer.to_owned()
        } else if what.starts_with(layer) {
            what
        } else {
            format!("{layer}, {what}")
        }
    };
    match error {
        Error::Malformed { what, why } => Error::Malformed {
            what: named(what),
            why,
        },
        Error::Unsupported { what, why } => Error::Unsupported {
            what: named(what),
            why,
        },
        Error::Verification {
            what,
            expected,
            actual,
        } => Error::Verification {
            what: named(what),
            expected,
            actual,
        },
        other => other,
    }
}
