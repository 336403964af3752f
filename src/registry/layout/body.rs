//! A range of a blob's file, read piece by piece on threads for blocking work.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::files::{BlobFile, shown};
use super::on_thread;
use crate::error::{Error, Result};

/// Bytes read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// The bytes of one range, as they are asked for.
#[derive(Debug)]
pub struct LayoutBody {
    blob: Arc<BlobFile>,
    position: u64,
    end: u64,
}

impl LayoutBody {
    /// A body for `range` of a blob that has `blob_bytes` bytes by its descriptor; `what` names it.
    ///
    /// # Errors
    /// [`Error::Malformed`] where the file has another size, or the range lies outside of it.
    pub(super) fn new(what: &str, blob: BlobFile, range: Range<u64>, blob_bytes: u64) -> Result<Self> {
        blob.check_size(what, blob_bytes)?;
        if range.start > range.end || range.end > blob_bytes {
            let (start, end) = (range.start, range.end);
            let why = format!("bytes {start} to {end} of a blob of {blob_bytes} bytes");
            return Err(Error::malformed(what, why));
        }
        Ok(Self {
            blob: Arc::new(blob),
            position: range.start,
            end: range.end,
        })
    }

    pub(crate) fn remaining(&self) -> u64 {
        self.end - self.position
    }

    /// All of it as one piece, of at most `bytes_max`.
    pub(crate) async fn collect(mut self, bytes_max: u64) -> Result<Bytes> {
        let length = self.remaining();
        if length > bytes_max {
            let why = format!("{length} bytes in one piece; at most {bytes_max} are held in memory");
            return Err(Error::unsupported(shown(&self.blob.path), why));
        }
        let mut all = BytesMut::new();
        while let Some(piece) = self.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        let length = self.remaining().min(PIECE_BYTES);
        if length == 0 {
            return Ok(None);
        }
        let (blob, offset) = (Arc::clone(&self.blob), self.position);
        let path = self.blob.path.clone();
        let piece = on_thread(&path, move || {
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            let read = blob.file.read_exact_at(&mut piece, offset);
            read.map(|()| Bytes::from(piece))
                .map_err(|error| match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => {
                        Error::malformed(shown(&blob.path), "it was cut short while it was read")
                    }
                    _ => Error::io(shown(&blob.path), &error),
                })
        })
        .await?;
        self.position += piece.len() as u64;
        Ok(Some(piece))
    }
}
