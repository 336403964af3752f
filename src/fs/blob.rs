//! `layers/N/blob`: the registry's bytes as they are.
//!
//! A range of a blob has no digest, so this is the one place that shows bytes before they are verified. A reader that goes
//! from start to end gets an error at the end if they were not what the manifest promises. To know that, and to cost one
//! request instead of one for each read, reads are served from one stream that goes forward, with a window behind it for
//! the kernel's reads that arrive out of order.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;

use crate::digest::Hasher;
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Source};
use crate::registry::BlobBody;

/// Bytes kept behind the stream's position.
const WINDOW_BYTES: usize = 4 << 20;
/// A read this far ahead of the stream is reached by reading on; one beyond it begins a stream of its own.
const SKIP_BYTES_MAX: u64 = 4 << 20;

/// Reads one blob.
#[derive(Debug)]
pub(super) struct BlobReader {
    source: Arc<Source>,
    stream: Mutex<Option<Stream>>,
}

/// An answer under way.
#[derive(Debug)]
struct Stream {
    body: BlobBody,
    /// The last bytes that came, ending at `position`.
    window: BytesMut,
    position: u64,
    /// Of everything that came, if the stream began at the start.
    hasher: Option<Hasher>,
}

impl BlobReader {
    pub(super) fn new(source: Arc<Source>) -> Self {
        Self {
            source,
            stream: Mutex::default(),
        }
    }

    /// Size of the blob in bytes.
    pub(super) fn size(&self) -> u64 {
        self.source.descriptor.size
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
        let mut guard = self.stream.lock().await;
        // A stream is put back only after a read that went well: one that broke off is begun anew.
        let mut stream = match guard.take().filter(|stream| stream.reaches(offset)) {
            Some(stream) => stream,
            None => self.open(fetcher, offset).await?,
        };
        while stream.position < end {
            let piece = stream.body.next().await?;
            let piece = piece.ok_or_else(|| Error::malformed(self.what(), "the answer ended early"))?;
            self.take(&mut stream, &piece)?;
        }
        let start = stream.window_start();
        let range = (offset - start) as usize..(end - start) as usize;
        let bytes = stream.window.get(range).map(<[u8]>::to_vec);
        stream.trim();
        *guard = Some(stream);
        bytes.ok_or_else(|| Error::malformed(self.what(), "a read outside of the window"))
    }

    async fn open(&self, fetcher: &Fetcher, offset: u64) -> Result<Stream> {
        let Source {
            repository,
            descriptor,
        } = &*self.source;
        let range = offset..descriptor.size;
        let body = fetcher
            .client()
            .blob(repository, &descriptor.digest, range, descriptor.size)
            .await?;
        let hasher = (offset == 0).then(Hasher::default);
        Ok(Stream {
            body,
            window: BytesMut::new(),
            position: offset,
            hasher,
        })
    }

    fn take(&self, stream: &mut Stream, piece: &Bytes) -> Result<()> {
        stream.window.extend_from_slice(piece);
        stream.position += piece.len() as u64;
        if let Some(hasher) = &mut stream.hasher {
            hasher.update(piece);
        }
        if stream.position < self.size() {
            return Ok(());
        }
        match stream.hasher.take().map(Hasher::finish) {
            Some(actual) if actual != self.source.descriptor.digest => Err(Error::mismatch(
                self.what(),
                self.source.descriptor.digest,
                actual,
            )),
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
