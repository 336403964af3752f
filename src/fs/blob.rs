//! `layers/N/blob`: the registry's bytes as they are.
//!
//! A range of a blob has no digest, so this is the one place that shows bytes before they are verified. A reader that goes
//! from start to end gets an error at the end if they were not what the manifest promises. To know that, and to cost one
//! request instead of one for each read, reads are served from one stream that goes forward, with a window behind it for
//! the kernel's reads that arrive out of order.
//!
//! What a reader gets is what is hashed, or the kernel may not keep it: else a reader who begins at the start could find
//! the pages of a lie in the page cache and come to an honest end. So the hash goes on from stream to stream, and after
//! bytes that it did not cover, and after a lie, the file has a new modification time, at which the kernel drops its pages.
//!
//! A stream holds one of the few answers that the registry may be sending at a time, and the kernel does not say when a
//! reader is gone. So a stream ends with the blob, when nobody reads it for a while, or when others were read since.

use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use lru::LruCache;
use tokio::sync::Mutex;

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Source};
use crate::registry::{BlobBody, Provenance};

/// Bytes kept behind the stream's position.
const WINDOW_BYTES: usize = 4 << 20;
/// A read this far ahead of the stream is reached by reading on; one beyond it begins a stream of its own.
const SKIP_BYTES_MAX: u64 = 4 << 20;
/// For so long what failed fails at once: the kernel repeats a read that fails, and the reads that waited meanwhile would
/// each wait as long again.
const FAILURE_MEMORY: Duration = Duration::from_secs(5);
/// A stream that nobody reads for so long is given up.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// Streams of one reader whose givers are remembered.
const GIVERS_MAX: usize = 64;
/// The most streams of a mount that are kept between reads.
const STREAMS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(7);

/// Reads one blob.
#[derive(Debug)]
pub(super) struct BlobReader {
    source: Arc<Source>,
    /// Shared with the others of the mount.
    streams: Arc<Streams>,
    state: Mutex<State>,
    changed: parking_lot::Mutex<Option<SystemTime>>,
    /// The blob is not what its digest says.
    lie: Recent,
    /// The registry could not be read.
    failure: Recent,
}

#[derive(Debug, Default)]
struct State {
    stream: Option<Stream>,
    prefix: Prefix,
    /// Whether somebody waits for the stream to fall idle.
    is_watched: bool,
}

/// An error that answers for a while.
#[derive(Debug, Default)]
struct Recent(parking_lot::Mutex<Option<(Instant, Error)>>);

impl Recent {
    fn note(&self, error: &Error) {
        *self.0.lock() = Some((Instant::now(), error.clone()));
    }

    fn check(&self) -> Result<()> {
        match &*self.0.lock() {
            Some((found, error)) if found.elapsed() < FAILURE_MEMORY => Err(error.clone()),
            _ => Ok(()),
        }
    }
}

/// The readers of a mount that keep a stream, by address, the one that was read last at the end.
#[derive(Debug)]
pub(super) struct Streams(parking_lot::Mutex<LruCache<usize, Weak<BlobReader>>>);

impl Default for Streams {
    fn default() -> Self {
        Self(parking_lot::Mutex::new(LruCache::new(STREAMS_MAX)))
    }
}

impl Streams {
    /// Notes that a reader keeps its stream, for which another may lose its own.
    fn keep(&self, reader: &Arc<BlobReader>) {
        let key = Arc::as_ptr(reader).addr();
        let pushed = self.0.lock().push(key, Arc::downgrade(reader));
        let surplus = pushed.filter(|(surplus, _)| *surplus != key);
        let Some(reader) = surplus.and_then(|(_, reader)| reader.upgrade()) else {
            return;
        };
        // One that is being read right now will be noted again.
        if let Ok(mut state) = reader.state.try_lock() {
            state.stream = None;
        }
    }

    fn remove(&self, reader: &BlobReader) {
        self.0.lock().pop(&std::ptr::from_ref(reader).addr());
    }
}

impl Drop for BlobReader {
    fn drop(&mut self) {
        self.streams.remove(self);
    }
}

/// The blob's bytes from its start on, as far as they were hashed.
#[derive(Debug, Default)]
struct Prefix {
    hasher: Hasher,
    bytes: u64,
    /// Who gave them.
    givers: Vec<Provenance>,
}

/// An answer under way.
#[derive(Debug)]
struct Stream {
    /// None once all of it has come.
    body: Option<BlobBody>,
    /// The last bytes that came, ending at `position`.
    window: BytesMut,
    position: u64,
    /// Where the bytes of this stream begin that are hashed.
    hashed_from: Option<u64>,
    used: Instant,
}

impl Prefix {
    /// Bytes came that belong at `position`.
    fn take(&mut self, position: u64, piece: &[u8]) {
        let end = position + piece.len() as u64;
        if position <= self.bytes && self.bytes < end {
            let known = (self.bytes - position) as usize;
            self.hasher.update(piece.get(known..).unwrap_or_default());
            self.bytes = end;
        }
    }
}

impl BlobReader {
    pub(super) fn new(source: Arc<Source>, streams: Arc<Streams>) -> Self {
        Self {
            source,
            streams,
            state: Mutex::default(),
            changed: parking_lot::Mutex::default(),
            lie: Recent::default(),
            failure: Recent::default(),
        }
    }

    /// Size of the blob in bytes.
    pub(super) fn size(&self) -> u64 {
        self.source.descriptor.size
    }

    /// When the kernel last got bytes that it must not keep.
    pub(super) fn changed(&self) -> Option<SystemTime> {
        *self.changed.lock()
    }

    /// Bytes `offset..offset + len`, cut at the end of the blob.
    ///
    /// # Errors
    /// Those of the network; [`Error::Verification`] at the end of a blob that was read from its start and is not what
    /// its digest says.
    pub(super) async fn read(
        self: &Arc<Self>,
        fetcher: &Fetcher,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        let end = offset.saturating_add(len as u64).min(self.size());
        if offset >= end {
            return Ok(Vec::new());
        }
        let mut state = self.state.lock().await;
        if end == self.size() {
            self.lie.check()?;
        }
        let State { stream, prefix, .. } = &mut *state;
        // A stream is put back only after a read that went well: one that broke off is begun anew.
        let mut current = match stream.take().filter(|stream| stream.reaches(offset)) {
            Some(stream) => stream,
            None => self.noting(self.open(fetcher, prefix, offset)).await?,
        };
        self.noting(self.advance(&mut current, prefix, end)).await?;
        if end == self.size() {
            self.verify(prefix)?;
        }
        if current.hashed_from.is_none_or(|from| offset < from) {
            self.note_change();
        }
        let start = current.window_start();
        let range = (offset - start) as usize..(end - start) as usize;
        let bytes = current.window.get(range).map(<[u8]>::to_vec);
        current.trim();
        current.used = Instant::now();
        *stream = Some(current);
        if !std::mem::replace(&mut state.is_watched, true) {
            fetcher.runtime().spawn(give_up_when_idle(Arc::downgrade(self)));
        }
        drop(state);
        self.streams.keep(self);
        bytes.ok_or_else(|| Error::malformed(self.what(), "a read outside of the window"))
    }

    /// Reads a stream on until it is at `end`.
    async fn advance(&self, stream: &mut Stream, prefix: &mut Prefix, end: u64) -> Result<()> {
        while let Some(body) = stream.body.as_mut().filter(|_| stream.position < end) {
            let piece = body.next().await?;
            let piece = piece.ok_or_else(|| Error::malformed(self.what(), "the answer ended early"))?;
            prefix.take(stream.position, &piece);
            stream.window.extend_from_slice(&piece);
            stream.position += piece.len() as u64;
        }
        if stream.position == self.size()
            && let Some(mut body) = stream.body.take()
        {
            // So that its connection can be used again; what the bytes are worth says their digest.
            let _ = body.next().await;
        }
        Ok(())
    }

    /// Asks the network, unless that failed just now.
    async fn noting<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.failure.check()?;
        let result = work.await;
        if let Err(error) = &result {
            self.failure.note(error);
        }
        result
    }

    /// A stream for a read at `offset`. Near the hashed bytes it goes on with them: the kernel's first reads may arrive
    /// out of order.
    async fn open(&self, fetcher: &Fetcher, prefix: &mut Prefix, offset: u64) -> Result<Stream> {
        if offset == 0 && prefix.bytes > 0 {
            *prefix = Prefix::default();
            self.note_change();
        }
        let follows = (prefix.bytes..=prefix.bytes.saturating_add(SKIP_BYTES_MAX)).contains(&offset);
        let position = if follows { prefix.bytes } else { offset };
        let body = fetcher.blob(&self.source, position..self.size()).await?;
        if prefix.givers.len() < GIVERS_MAX {
            prefix.givers.push(body.provenance());
        }
        Ok(Stream {
            body: Some(body),
            window: BytesMut::new(),
            position,
            hashed_from: (position <= prefix.bytes).then_some(prefix.bytes),
            used: Instant::now(),
        })
    }

    fn note_change(&self) {
        *self.changed.lock() = Some(SystemTime::now());
    }

    /// Compares the digests, where all bytes were hashed.
    fn verify(&self, prefix: &mut Prefix) -> Result<()> {
        if prefix.bytes < self.size() {
            return Ok(());
        }
        let expected = self.source.descriptor.digest;
        let actual: Digest = prefix.hasher.clone().finish();
        if actual == expected {
            return Ok(());
        }
        let error = Error::mismatch(self.what(), expected, actual);
        for giver in std::mem::take(prefix).givers {
            // The reader has seen the bytes already: only the next one profits.
            let _ = giver.distrust(&(0..self.size()), &error);
        }
        self.lie.note(&error);
        self.note_change();
        Err(error)
    }

    fn what(&self) -> String {
        format!(
            "{} blob {}",
            self.source.repository, self.source.descriptor.digest
        )
    }
}

impl Stream {
    fn window_start(&self) -> u64 {
        self.position - self.window.len() as u64
    }

    fn reaches(&self, offset: u64) -> bool {
        (self.window_start()..=self.position.saturating_add(SKIP_BYTES_MAX)).contains(&offset)
    }

    fn trim(&mut self) {
        let surplus = self.window.len().saturating_sub(WINDOW_BYTES);
        let _ = self.window.split_to(surplus);
    }
}

/// Ends a reader's stream when nobody reads it for a while.
async fn give_up_when_idle(reader: Weak<BlobReader>) {
    loop {
        tokio::time::sleep(IDLE_MAX).await;
        let Some(reader) = reader.upgrade() else { return };
        let mut state = reader.state.lock().await;
        let is_read = |stream: &Stream| stream.used.elapsed() < IDLE_MAX;
        if !state.stream.as_ref().is_some_and(is_read) {
            state.stream = None;
            state.is_watched = false;
            reader.streams.remove(&reader);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::layer::Descriptor;
    use crate::registry::reference::Repository;

    use super::*;

    #[test]
    fn the_streams_that_were_read_last_are_kept() {
        let descriptor = Descriptor {
            media_type: String::new(),
            digest: Digest::of(b""),
            size: 1,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
        };
        let source = Arc::new(Source {
            repository: Repository::new("localhost", "a").unwrap(),
            descriptor,
            ztoc: None,
            place: None,
        });
        let streams = Arc::new(Streams::default());
        let reader = |_| Arc::new(BlobReader::new(Arc::clone(&source), Arc::clone(&streams)));
        let readers: Vec<_> = (0..STREAMS_MAX.get() + 3).map(reader).collect();
        for reader in [&readers[..], &readers[3..4]].concat() {
            reader.state.try_lock().unwrap().stream = Some(Stream {
                body: None,
                window: BytesMut::new(),
                position: 0,
                hashed_from: None,
                used: Instant::now(),
            });
            streams.keep(&reader);
        }
        let has_stream = |reader: &Arc<BlobReader>| reader.state.try_lock().unwrap().stream.is_some();
        let kept: Vec<bool> = readers.iter().map(has_stream).collect();
        assert_eq!(kept[..3], [false; 3]);
        assert_eq!(kept[3..], [true; STREAMS_MAX.get()]);
        drop(readers);
        assert!(streams.0.lock().is_empty(), "a reader that is gone keeps nothing");
    }
}
