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

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Source};
use crate::registry::BlobBody;

/// Bytes kept behind the stream's position.
const WINDOW_BYTES: usize = 4 << 20;
/// A read this far ahead of the stream is reached by reading on; one beyond it begins a stream of its own.
const SKIP_BYTES_MAX: u64 = 4 << 20;
/// For so long nobody reads to the end of a blob that was found wrong: the kernel repeats a read that fails.
const LIE_MEMORY: Duration = Duration::from_secs(5);

/// Reads one blob.
#[derive(Debug)]
pub(super) struct BlobReader {
    source: Arc<Source>,
    state: Mutex<State>,
    changed: parking_lot::Mutex<Option<SystemTime>>,
    lie: parking_lot::Mutex<Option<(Instant, Error)>>,
}

#[derive(Debug, Default)]
struct State {
    stream: Option<Stream>,
    prefix: Prefix,
}

/// The blob's bytes from its start on, as far as they were hashed.
#[derive(Debug, Default)]
struct Prefix {
    hasher: Hasher,
    bytes: u64,
}

/// An answer under way.
#[derive(Debug)]
struct Stream {
    body: BlobBody,
    /// The last bytes that came, ending at `position`.
    window: BytesMut,
    position: u64,
    /// Where the bytes of this stream begin that are hashed.
    hashed_from: Option<u64>,
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
    pub(super) fn new(source: Arc<Source>) -> Self {
        Self {
            source,
            state: Mutex::default(),
            changed: parking_lot::Mutex::default(),
            lie: parking_lot::Mutex::default(),
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
    pub(super) async fn read(&self, fetcher: &Fetcher, offset: u64, len: usize) -> Result<Vec<u8>> {
        let end = offset.saturating_add(len as u64).min(self.size());
        if offset >= end {
            return Ok(Vec::new());
        }
        let mut state = self.state.lock().await;
        if end == self.size() {
            self.recent_lie()?;
        }
        let State { stream, prefix } = &mut *state;
        // A stream is put back only after a read that went well: one that broke off is begun anew.
        let mut current = match stream.take().filter(|stream| stream.reaches(offset)) {
            Some(stream) => stream,
            None => self.open(fetcher, prefix, offset).await?,
        };
        while current.position < end {
            let piece = self.next(&mut current.body).await?;
            prefix.take(current.position, &piece);
            current.window.extend_from_slice(&piece);
            current.position += piece.len() as u64;
        }
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
        *stream = Some(current);
        bytes.ok_or_else(|| Error::malformed(self.what(), "a read outside of the window"))
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
        Ok(Stream {
            body: self.body(fetcher, position).await?,
            window: BytesMut::new(),
            position,
            hashed_from: (position <= prefix.bytes).then_some(prefix.bytes),
        })
    }

    fn note_change(&self) {
        *self.changed.lock() = Some(SystemTime::now());
    }

    async fn body(&self, fetcher: &Fetcher, start: u64) -> Result<BlobBody> {
        let Source {
            repository,
            descriptor,
        } = &*self.source;
        let range = start..descriptor.size;
        fetcher
            .client()
            .blob(repository, &descriptor.digest, range, descriptor.size)
            .await
    }

    async fn next(&self, body: &mut BlobBody) -> Result<Bytes> {
        let piece = body.next().await?;
        piece.ok_or_else(|| Error::malformed(self.what(), "the answer ended early"))
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
        *prefix = Prefix::default();
        let error = Error::mismatch(self.what(), expected, actual);
        *self.lie.lock() = Some((Instant::now(), error.clone()));
        self.note_change();
        Err(error)
    }

    fn recent_lie(&self) -> Result<()> {
        match &*self.lie.lock() {
            Some((found, error)) if found.elapsed() < LIE_MEMORY => Err(error.clone()),
            _ => Ok(()),
        }
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
