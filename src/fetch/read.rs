//! How reads are answered: from the store where everything is there, else after what is missing was brought.
//!
//! A read of a file and a read of a device (see [`crate::fetch::device`]) are both reads of a [`Span`], a piece of a
//! layer's data file with the chunks that lie in it. From here on they are the same.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::fetch::file::Span;
use crate::fetch::{Fetcher, FileAt, Source, blocking};
use crate::store::layer::Layer;

/// Reads of at most this many compressed bytes have a total deadline; larger ones the rules of streams.
const DEADLINE_BYTES_MAX: u64 = 4 << 20;
/// How often a reader of a long member looks whether his part of it has come.
const LONG_MEMBER_LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// After so long what was just written is sent to the disk, and after as long again it is there mostly and can be given up.
/// To send it while more is fetched takes from the cores that decode.
const SETTLING: Duration = Duration::from_secs(5);
/// How often a read starts over when its chunks were evicted before it could copy them.
const EVICTED_RETRIES: usize = 3;

/// Who reads a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// Someone who needs these bytes, soon, and perhaps the ones behind them.
    Lazy,
    /// Someone who copies whole files and has what he needs fetched himself: it may take as long as bytes come.
    Whole,
}

impl Fetcher {
    /// Bytes `offset..offset + len` of file `entry`, cut at its end, if they are here and need no disk wait.
    pub fn read_now(self: &Arc<Self>, at: &FileAt, offset: u64, len: usize) -> Option<Vec<u8>> {
        match at.span(offset, len).ok()? {
            Some(span) => self.read_span_now(&at.source, &at.layer, &span),
            None => Some(Vec::new()),
        }
    }

    /// Bytes `offset..offset + len` of file `entry`, cut at its end.
    ///
    /// # Errors
    /// What kept the bytes from coming, or from being what the layer promises.
    pub async fn read(self: &Arc<Self>, at: &FileAt, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.read_as(Reader::Lazy, at, offset, len).await
    }

    pub(super) async fn read_as(
        self: &Arc<Self>,
        reader: Reader,
        at: &FileAt,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        match at.span(offset, len)? {
            Some(span) => self.read_span(reader, &at.source, &at.layer, &span).await,
            None => Ok(Vec::new()),
        }
    }

    /// A piece of a layer's data, if it is here and needs no disk wait.
    pub(super) fn read_span_now(
        self: &Arc<Self>,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        span: &Span,
    ) -> Option<Vec<u8>> {
        let bytes = layer.read_now(&span.chunks, span.data_offset, span.len)?;
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        // Holes are nowhere in the blob.
        if !layer.is_complete() && !span.chunks.is_empty() {
            self.follow_hit(source, layer, span);
        }
        self.hand_on(layer, span);
        Some(bytes)
    }

    /// A piece of a layer's data. What is missing of it is brought.
    pub(super) async fn read_span(
        self: &Arc<Self>,
        reader: Reader,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        span: &Span,
    ) -> Result<Vec<u8>> {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        for attempt in 0..=EVICTED_RETRIES {
            if attempt > 0 {
                let needed = self.missing(layer, vec![span.chunks.clone()]).await?;
                match reader {
                    Reader::Lazy => self.ensure(source, layer, needed, span).await?,
                    Reader::Whole => {
                        let _waiting = self.foreground.enter();
                        self.bring_members(source, layer, needed).await?;
                    }
                }
            }
            if let Some(bytes) = self.copy(layer, span).await? {
                if reader == Reader::Lazy {
                    self.hand_on(layer, span);
                }
                return Ok(bytes);
            }
            // Looked at before anything is fetched: on a full disk a chunk serves many reads from there.
            if let Some(bytes) = self.overflow.assemble(layer, span)? {
                return Ok(bytes);
            }
        }
        Err(Error::Io {
            what: source.name(),
            errno: libc::ENOSPC,
            why: "the cache cannot keep what was fetched".to_owned(),
        })
    }

    /// The kernel is given a span and keeps it: the copy in the page cache of the data file is given up, in time.
    fn hand_on(&self, layer: &Arc<Layer>, span: &Span) {
        let Some(ranges) = layer.handed_on(span.data_offset, span.len) else {
            return;
        };
        let first = match layer.was_written_within(SETTLING) {
            true => SETTLING,
            false => Duration::ZERO,
        };
        let (layer, runtime) = (Arc::downgrade(layer), self.runtime.clone());
        self.runtime.spawn(async move {
            for pause in [first, SETTLING] {
                tokio::time::sleep(pause).await;
                let (Some(layer), ranges) = (layer.upgrade(), ranges.clone()) else {
                    return;
                };
                let forgotten = blocking(&runtime, move || {
                    layer.forget(ranges);
                    Ok(())
                });
                // It only costs memory if it fails.
                let _ = forgotten.await;
            }
        });
    }

    /// Copies a span out of the store, where the disk may have to be waited for.
    async fn copy(&self, layer: &Arc<Layer>, span: &Span) -> Result<Option<Vec<u8>>> {
        if !layer.all_present(span.chunks.clone()) {
            return Ok(None);
        }
        // What has just come is in memory: to wake another thread would take longer than to copy it.
        if let Some(bytes) = layer.read_now(&span.chunks, span.data_offset, span.len) {
            return Ok(Some(bytes));
        }
        let (layer, span) = (Arc::clone(layer), span.clone());
        blocking(&self.runtime, move || {
            layer.read(&span.chunks, span.data_offset, span.len)
        })
        .await
    }

    /// Sees to it that members are in the store (or, the disk being full, in the overflow), within a reader's deadline.
    async fn ensure(
        self: &Arc<Self>,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        needed: Vec<u32>,
        span: &Span,
    ) -> Result<()> {
        let (Some(&first), Some(&last)) = (needed.first(), needed.last()) else {
            return Ok(());
        };
        self.counters.misses.fetch_add(1, Ordering::Relaxed);
        let _waiting = self.foreground.enter();
        let start = layer.index().member(first)?.blob_start;
        let end = layer.index().member(last)?.blob_end;
        let arrival = self.bring(source, layer, &needed, span);
        if end.saturating_sub(start) > DEADLINE_BYTES_MAX {
            // A member may be as long as its layer: nobody waits for its end who has what he needs.
            return tokio::select! {
                arrived = arrival => arrived,
                () = self.all_here(layer, &span.chunks) => Ok(()),
            };
        }
        let arrived = tokio::time::timeout(self.options.timeout, arrival).await;
        arrived.unwrap_or_else(|_| {
            let waited_ms = u64::try_from(self.options.timeout.as_millis()).unwrap_or(u64::MAX);
            let error = Error::Timeout {
                what: source.name(),
                waited_ms,
            };
            for member in needed {
                self.remember_failure(source, member, &error);
            }
            Err(error)
        })
    }

    /// Waits until chunks have come with a long member, be it that the disk took them or not: those that it did not take
    /// are soon pushed out of memory by the rest of the member. It is looked for them now and then, because who brings them
    /// does not know who waits.
    async fn all_here(&self, layer: &Layer, chunks: &Range<u32>) {
        let is_here = |chunk| layer.is_present(chunk) || self.overflow.has(layer, chunk);
        while !chunks.clone().all(is_here) {
            tokio::time::sleep(LONG_MEMBER_LOOK_INTERVAL).await;
        }
    }

    /// Waits for the members that a span needs. One that somebody else fetches, from a source that refuses him, is asked of
    /// our own.
    async fn bring(
        self: &Arc<Self>,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        needed: &[u32],
        span: &Span,
    ) -> Result<()> {
        let ahead = self.follow(layer, span, true);
        let mut refused_elsewhere = false;
        for waiter in self.launch(source, layer, needed, ahead)? {
            match waiter.arrival.await {
                Err(
                    Error::Denied { .. }
                    | Error::NoCredentials { .. }
                    | Error::Malformed { .. }
                    | Error::Verification { .. },
                ) if waiter.foreign => {
                    refused_elsewhere = true;
                }
                outcome => outcome?,
            }
        }
        if refused_elsewhere {
            for waiter in self.launch(source, layer, needed, None)? {
                waiter.arrival.await?;
            }
        }
        Ok(())
    }
}
