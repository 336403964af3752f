//! The two threads of a pass. The first hashes the blob and decompresses it, the second reads the tar, hashes it and its
//! chunks, and keeps the content: about half of the work each. Buffers go round between them, and all queues are short.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use bytes::{Bytes, BytesMut};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::digest::Hasher;
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::layer::scan::Scanned;
use crate::layer::{self, Checkpoint, Decoded, Decompressor, Descriptor, Format};
use crate::store::staged::Staged;

/// Pieces of the body that may wait to be decompressed; hyper's are at most 400 KiB long.
const PIECES_WAITING_MAX: usize = 16;
/// The tar goes from thread to thread in buffers of this size.
const TAR_BYTES: usize = 1 << 20;
/// Events that may wait for the second thread: most are such buffers.
const EVENTS_WAITING_MAX: usize = 4;
/// So many bytes tell what a blob is compressed with.
const FIRST_BYTES: usize = 16;

/// What the first thread tells the second.
enum Event {
    Format(Format),
    Checkpoint(Checkpoint),
    Tar(Vec<u8>),
    /// The blob has ended, and is what was promised.
    End,
}

/// What a pass makes of a layer.
pub(super) struct Passed {
    pub(super) scanned: Scanned,
    pub(super) staged: Staged,
}

/// A pass at work. Where its pieces end before the blob does, all of it comes to nothing.
pub(super) struct Pipeline {
    unpacking: JoinHandle<Result<()>>,
    scanning: JoinHandle<Result<Option<Passed>>>,
}

impl Pipeline {
    /// Starts the threads. What comes through the channel must be the blob, from its first byte to its last.
    pub(super) fn start(
        runtime: &Handle,
        descriptor: &Descriptor,
        staged: Staged,
    ) -> (mpsc::Sender<Bytes>, Self) {
        let (pieces, incoming) = mpsc::channel(PIECES_WAITING_MAX);
        let (events, to_scan) = sync_channel(EVENTS_WAITING_MAX);
        let (used, spare) = channel();
        let (descriptor, scanned) = (descriptor.clone(), descriptor.clone());
        let unpacking =
            runtime.spawn_blocking(move || unpack(incoming, &descriptor, Unpacked::new(events, spare)));
        let scanning = runtime.spawn_blocking(move || scan(&to_scan, &used, staged, &scanned));
        (pieces, Self { unpacking, scanning })
    }

    /// The end of both threads.
    ///
    /// # Errors
    /// [`Error::Verification`] for another blob than was promised, [`Error::Malformed`] for one that is no layer, and
    /// [`Error::Interrupted`] where the pieces ended early.
    pub(super) async fn end(self, runtime: &Handle) -> Result<Passed> {
        let panicked = |error: tokio::task::JoinError| Error::Io {
            what: "reading a layer".to_owned(),
            errno: libc::EIO,
            why: error.to_string(),
        };
        let unpacked = self.unpacking.await.map_err(panicked).and_then(|outcome| outcome);
        let scanned = self.scanning.await.map_err(panicked).and_then(|outcome| outcome);
        match (unpacked, scanned) {
            // What the second found wrong is why the first could not go on.
            (_, Err(error)) | (Err(error), Ok(None)) => Err(error),
            (Ok(()), Ok(Some(passed))) => Ok(passed),
            (_, Ok(passed)) => {
                // Its files are removed, and that may take a while.
                blocking(runtime, move || {
                    drop(passed);
                    Ok(())
                })
                .await?;
                Err(Error::Interrupted)
            }
        }
    }
}

/// The way of the tar to the second thread.
struct Unpacked {
    events: SyncSender<Event>,
    spare: Receiver<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Unpacked {
    fn new(events: SyncSender<Event>, spare: Receiver<Vec<u8>>) -> Self {
        Self {
            events,
            spare,
            buffer: Vec::with_capacity(TAR_BYTES),
        }
    }

    fn send(&self, event: Event) -> Result<()> {
        // Who listened has found something wrong, and says what.
        self.events.send(event).map_err(|_| Error::Interrupted)
    }

    fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let mut next = self
            .spare
            .try_recv()
            .unwrap_or_else(|_| Vec::with_capacity(TAR_BYTES));
        next.clear();
        let full = std::mem::replace(&mut self.buffer, next);
        self.send(Event::Tar(full))
    }

    fn take(&mut self, decoded: Decoded<'_>) -> Result<()> {
        match decoded {
            Decoded::Checkpoint(checkpoint) => {
                self.flush()?;
                self.send(Event::Checkpoint(checkpoint))
            }
            Decoded::Bytes(mut bytes) => {
                while !bytes.is_empty() {
                    let room = TAR_BYTES.saturating_sub(self.buffer.len()).min(bytes.len());
                    let (now, rest) = bytes.split_at(room);
                    self.buffer.extend_from_slice(now);
                    bytes = rest;
                    if self.buffer.len() >= TAR_BYTES {
                        self.flush()?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// The first thread.
fn unpack(mut pieces: mpsc::Receiver<Bytes>, promised: &Descriptor, mut out: Unpacked) -> Result<()> {
    let mut hasher = Hasher::default();
    let mut hashed_bytes = 0;
    let mut first = BytesMut::new();
    let mut decompressor = None;
    while let Some(piece) = pieces.blocking_recv() {
        hasher.update(&piece);
        hashed_bytes += piece.len() as u64;
        if let Some(decompressor) = &mut decompressor {
            push(decompressor, &piece, &mut out)?;
            continue;
        }
        first.extend_from_slice(&piece);
        if first.len() >= FIRST_BYTES {
            let begun = decompressor.insert(begin(&first, &out)?);
            push(begun, &first.split(), &mut out)?;
        }
    }
    if hashed_bytes != promised.size {
        return Err(Error::Interrupted);
    }
    let actual = hasher.finish();
    if actual != promised.digest {
        return Err(Error::mismatch("blob", promised.digest, actual));
    }
    let mut decompressor = match decompressor {
        Some(decompressor) => decompressor,
        None => {
            let mut begun = begin(&first, &out)?;
            push(&mut begun, &first, &mut out)?;
            begun
        }
    };
    decompressor.finish(&mut |decoded| out.take(decoded))?;
    out.flush()?;
    out.send(Event::End)
}

fn begin(first: &[u8], out: &Unpacked) -> Result<Box<dyn Decompressor>> {
    let decompressor = layer::decompressor(first);
    out.send(Event::Format(decompressor.format()))?;
    Ok(decompressor)
}

fn push(decompressor: &mut Box<dyn Decompressor>, blob: &[u8], out: &mut Unpacked) -> Result<()> {
    decompressor.push(blob, &mut |decoded| out.take(decoded))
}

/// The second thread. `None` where the first one broke off.
fn scan(
    events: &Receiver<Event>,
    used: &Sender<Vec<u8>>,
    mut staged: Staged,
    descriptor: &Descriptor,
) -> Result<Option<Passed>> {
    let Ok(Event::Format(format)) = events.recv() else {
        return Ok(None);
    };
    let mut scanner = layer::scanner(descriptor, format, staged.scratch());
    while let Ok(event) = events.recv() {
        match event {
            Event::Checkpoint(checkpoint) => scanner.checkpoint(checkpoint)?,
            Event::Tar(tar) => {
                scanner.push(&tar, &mut staged)?;
                // Towards the end nobody needs it any more.
                let _ = used.send(tar);
            }
            Event::End => {
                let scanned = scanner.finish(descriptor.size)?;
                return Ok(Some(Passed { scanned, staged }));
            }
            Event::Format(_) => return Err(Error::malformed("pass", "a second format")),
        }
    }
    Ok(None)
}
