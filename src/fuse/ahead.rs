//! Hands the kernel the contents of small files before it asks for them.
//!
//! A question for a small file costs more than its answer: the thread that asks goes to sleep, one of ours wakes up, and
//! both again for the answer. Where the filesystem expects what is read next and has it at hand, a thread writes it into the
//! kernel's page cache (FUSE_NOTIFY_STORE), in which the reader then finds it.
//!
//! The kernel may hold such a write for as long as a READ of the same file waits. So this is no thread of the session, of
//! which some must go on answering, and there is one: what it has no time for, the kernel asks for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::adapter::caught;
use super::counters::Op;
use super::notify;
use crate::fs::ops::{Answer, Caller, Expected, Operations};

/// What we ask for ourselves.
const NOBODY: Caller = Caller {
    pid: 0,
    uid: 0,
    gid: 0,
};

/// The connection for as long as it is served.
type Device = Arc<Mutex<Option<OwnedFd>>>;

/// The thread, from when it is needed first until this ends.
pub(super) struct Ahead {
    fs: Arc<dyn Operations>,
    device: Device,
    /// None where no thread can be had.
    batches: OnceLock<Option<SyncSender<Vec<Expected>>>>,
}

impl Ahead {
    pub(super) fn new(fs: Arc<dyn Operations>, device: Device) -> Self {
        Self {
            fs,
            device,
            batches: OnceLock::new(),
        }
    }

    /// The start of a file was asked for: hands on what is expected to be asked for next, unless the thread is busy.
    pub(super) fn follow(&self, ino: u64) {
        let expected = caught(Op::Read, || self.fs.read_next(ino)).unwrap_or_default();
        if expected.is_empty() {
            return;
        }
        if let Some(batches) = self.batches.get_or_init(|| self.start()) {
            let _ = batches.try_send(expected);
        }
    }

    fn start(&self) -> Option<SyncSender<Vec<Expected>>> {
        // One batch is handed on while the next waits.
        let (sender, receiver) = sync_channel(1);
        let (fs, device) = (Arc::clone(&self.fs), Arc::clone(&self.device));
        let thread = std::thread::Builder::new()
            .name("fuse-ahead".into())
            .spawn(move || run(&*fs, &receiver, &device));
        if let Err(error) = &thread {
            tracing::warn!(%error, "small files are not handed on ahead of their readers");
        }
        thread.ok().map(|_| sender)
    }
}

fn run(fs: &dyn Operations, batches: &Receiver<Vec<Expected>>, device: &Mutex<Option<OwnedFd>>) {
    for batch in batches {
        // A copy for one batch: while anybody has the connection open the kernel takes it for a living one.
        let copy = device.lock().as_ref().map(OwnedFd::try_clone);
        let Some(Ok(copy)) = copy else { continue };
        for expected in batch {
            if !hand_on(fs, copy.as_fd(), expected) {
                break;
            }
        }
    }
}

/// Whether the kernel took it. Else it knows none of what follows either, or that is not at hand.
fn hand_on(fs: &dyn Operations, device: BorrowedFd<'_>, expected: Expected) -> bool {
    let content = caught(Op::Read, || fs.read(NOBODY, expected.ino, 0, expected.bytes));
    match content {
        // Less than all of it would be taken for all of it.
        Ok(Answer::Now(Ok(content))) if content.len() == expected.bytes as usize => {
            notify::store(device, expected.ino, &content).is_ok()
        }
        _ => false,
    }
}
