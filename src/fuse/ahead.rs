//! Hands the kernel the contents of small files before it asks for them.
//!
//! A question for a small file costs more than its answer: the thread that asks goes to sleep, one of ours wakes up, and
//! both again for the answer. Where the filesystem expects what is read next and has it at hand, a thread writes it into the
//! kernel's page cache (FUSE_NOTIFY_STORE), in which the reader then finds it.
//!
//! The kernel holds such a write for as long as a READ of the same file waits, and nothing interrupts it, not even SIGKILL.
//! So this is no thread of the session, of which some must go on answering, and there is one: what it has no time for, the
//! kernel asks for. And somebody else watches who could end the connection if this process is killed meanwhile
//! ([`DeathWatch`]).
//!
//! Kernels before 6.11 leave what memory held before behind the end of a file that is stored so, where a program that maps the
//! file sees it (CVE-2024-44947), and programs rely on zeros there. Some were mended since, but do not say so: none of them
//! is handed anything.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::adapter::caught;
use super::counters::Op;
use super::death_watch::DeathWatch;
use super::helper_process::Helper;
use super::notify;
use crate::fs::ops::{Expected, Operations};

/// Where the kernel says which one it is.
const KERNEL_RELEASE: &str = "/proc/sys/kernel/osrelease";
/// The first version that fills the last page of what is stored.
const KERNEL_MIN: (u32, u32) = (6, 11);

/// The connection for as long as it is served.
type Device = Arc<Mutex<Option<OwnedFd>>>;

/// The thread, from when it is needed first until this ends.
pub(super) struct Ahead {
    fs: Arc<dyn Operations>,
    device: Device,
    helper: Helper,
    /// `major:minor` of the mount.
    device_number: String,
    /// None where no thread can be had.
    batches: OnceLock<Option<SyncSender<Vec<Expected>>>>,
}

impl Ahead {
    pub(super) fn new(
        fs: Arc<dyn Operations>,
        device: Device,
        helper: Helper,
        device_number: String,
    ) -> Self {
        Self {
            fs,
            device,
            helper,
            device_number,
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
        let release = fs::read_to_string(KERNEL_RELEASE).unwrap_or_default();
        if !fills_pages(&release) {
            tracing::debug!(
                release,
                "small files are not handed to this kernel ahead of their readers"
            );
            return None;
        }
        // One batch is handed on while the next waits.
        let (sender, receiver) = sync_channel(1);
        let (fs, device) = (Arc::clone(&self.fs), Arc::clone(&self.device));
        let (helper, device_number) = (self.helper.clone(), self.device_number.clone());
        let work = move || match DeathWatch::start(&helper, &device_number) {
            Ok(_watch) => run(&*fs, &receiver, &device),
            Err(error) => tracing::debug!(%error, "small files are not handed on ahead of their readers"),
        };
        let thread = std::thread::Builder::new().name("fuse-ahead".into()).spawn(work);
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
    let mut store = |content: &[u8]| notify::store(device, expected.ino, content).is_ok();
    caught(Op::Read, || fs.hand_on(expected, &mut store)).unwrap_or(false)
}

/// Whether a kernel of this release leaves nothing of its memory behind the end of a file that is stored.
fn fills_pages(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_may_show_what_memory_held_are_handed_nothing() {
        for old in [
            "",
            "6",
            "x.y",
            "6.1.0-28-amd64\n",
            "5.15.0",
            "6.10.14",
            "4.19.321",
        ] {
            assert!(!fills_pages(old), "{old}");
        }
        for new in ["6.11.0-rc4+\n", "6.18.44", "6.11\n", "7.0.0-1-generic"] {
            assert!(fills_pages(new), "{new}");
        }
    }
}
