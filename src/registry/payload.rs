//! What a request carries. A request may have to be sent again, so whatever it carries can be read again: text and bytes
//! are in memory, and a part of a file is read anew each time, piece by piece, as the connection takes it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::task::{JoinHandle, spawn_blocking};

/// Bytes of a file that are read at once.
const PIECE_BYTES: u64 = 256 << 10;

/// What a request carries.
#[derive(Clone)]
pub(super) enum Payload {
    /// A form.
    Text(String),
    /// A document.
    Bytes(Bytes),
    /// A part of a blob. A request with one is sent once: where to go on after a failure only its sender knows.
    Part(FilePart),
}

impl Payload {
    /// The same as a body to send now.
    pub(super) fn body(&self) -> reqwest::Body {
        match self {
            Self::Text(text) => text.clone().into(),
            Self::Bytes(bytes) => bytes.clone().into(),
            Self::Part(part) => reqwest::Body::wrap(FileBody {
                part: part.clone(),
                position: part.range.start,
                reading: None,
            }),
        }
    }

    /// The part of a file, if it is one.
    pub(super) fn part(&self) -> Option<&FilePart> {
        match self {
            Self::Part(part) => Some(part),
            Self::Text(_) | Self::Bytes(_) => None,
        }
    }
}

/// Bytes `range` of a file.
#[derive(Debug, Clone)]
pub(super) struct FilePart {
    pub(super) file: Arc<File>,
    pub(super) range: Range<u64>,
    /// How far into the file the connection has taken it; goes back when it is sent again.
    pub(super) taken: Arc<AtomicU64>,
}

impl FilePart {
    /// Whether the connection has taken all of it.
    pub(super) fn is_taken(&self) -> bool {
        self.taken_to() >= self.range.end
    }

    pub(super) fn taken_to(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

/// A part of a file on its way.
struct FileBody {
    part: FilePart,
    position: u64,
    reading: Option<JoinHandle<io::Result<Bytes>>>,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let (position, end) = (self.position, self.part.range.end);
        self.part.taken.store(position, Ordering::Relaxed);
        if position >= end {
            return Poll::Ready(None);
        }
        let file = Arc::clone(&self.part.file);
        let reading = self.reading.get_or_insert_with(|| {
            spawn_blocking(move || {
                let length = usize::try_from((end - position).min(PIECE_BYTES)).unwrap_or(0);
                let mut piece = vec![0; length];
                file.read_exact_at(&mut piece, position)?;
                Ok(Bytes::from(piece))
            })
        });
        let read = ready!(Pin::new(reading).poll(context));
        self.reading = None;
        let piece = read.map_err(io::Error::other).flatten()?;
        self.position += piece.len() as u64;
        // The last piece is asked for nothing more, so it counts at once.
        if self.position >= end {
            self.part.taken.store(end, Ordering::Relaxed);
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.position >= self.part.range.end
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.part.range.end - self.position)
    }
}
