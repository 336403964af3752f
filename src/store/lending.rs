//! Data files that the kernel reads by itself.
//!
//! A mounted EROFS cannot change its devices, and a hole punched in one of them reads as zeros without an error. So only a
//! complete layer that was verified since this boot is lent, what is lent is pinned until it comes back, and at most half
//! of the budget may be pinned so.
//!
//! A mount outlives the process that made it, and with it the data file that the mount reads. So that a file was lent is
//! noted in its chunk map, with the boot's id, before it is handed out, and from then on nothing is written to it, punched
//! out of it or cut off it, by whichever process, until the machine starts anew. It can only be replaced
//! ([`crate::store::eviction`]): a mount keeps the bytes that it was made with.
//!
//! A layer that came over a restart of the machine is served through us until it has been verified again, which one thread
//! of low priority does, a layer at a time. The same thread sends to the disk what is lent and not there yet: the kernel
//! keeps copies under the files of the mounted image, and those in the page cache of the data file, a second one of all that
//! was read, can only be given up once the disk has it.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::digest::Digest;
use crate::error::Result;
use crate::store::Store;
use crate::store::layer::Layer;

/// The part of the budget that may be lent: one in so many.
const BUDGET_PART: u64 = 2;
/// The most chores that wait: those of a few images. What is left out is asked for again at the next mount.
const WAITING_MAX: usize = 256;
/// The nice value of the thread that does them.
const CHORES_NICE: i32 = 19;

/// What a store has lent, and what it verifies in order to lend it.
#[derive(Debug, Default)]
pub(super) struct Lending {
    /// The layers that are lent.
    accounts: Mutex<HashMap<Digest, Account>>,
    chores: Mutex<Chores>,
    is_over: AtomicBool,
}

/// What is lent of a layer.
#[derive(Debug)]
struct Account {
    layer: Arc<Layer>,
    /// What its data file takes up on the disk.
    bytes: u64,
    /// How often it is lent.
    count: u64,
}

/// What is to be done with layers when there is time.
#[derive(Debug, Default)]
struct Chores {
    waiting: VecDeque<(Chore, Weak<Layer>)>,
    is_running: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chore {
    Verify,
    WriteBack,
}

/// A layer's data file, for as long as the kernel has it. Dropping it gives it back.
#[derive(Debug)]
pub struct Lent {
    file: File,
    layer: Arc<Layer>,
    lending: Arc<Lending>,
}

impl Lent {
    /// The data file, read-only, of the size that its index says.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.lending.give_back(&self.layer);
    }
}

impl Store {
    /// Lends the data file of a layer; `None` where it may not be: it is not complete, not verified since this boot, or
    /// too much of `budget_bytes` is lent already. May wait for the disk.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    pub fn lend(self: &Arc<Self>, layer: &Arc<Layer>, budget_bytes: Option<u64>) -> Result<Option<Lent>> {
        if layer.index().summary().data_bytes == 0 {
            return Ok(None);
        }
        if layer.is_to_verify() {
            self.lending.ask(Chore::Verify, layer);
        }
        if !layer.is_complete() || !layer.is_verified() {
            return Ok(None);
        }
        let mut accounts = self.lending.accounts.lock();
        let failed = |e: std::io::Error| layer.failed(&e);
        let bytes = layer.data().metadata().map_err(failed)?.blocks() * 512;
        let lent_bytes: u64 = accounts.values().map(|account| account.bytes).sum();
        let is_lent = accounts.contains_key(layer.key());
        let part_bytes = budget_bytes.map(|budget| budget / BUDGET_PART);
        if !is_lent && part_bytes.is_some_and(|part| lent_bytes.saturating_add(bytes) > part) {
            return Ok(None);
        }
        let Some(data) = layer.lend()? else {
            return Ok(None);
        };
        // Counted before anything can fail, so that it is given back in every case.
        let account = accounts.entry(*layer.key());
        let new = || Account {
            layer: Arc::clone(layer),
            bytes,
            count: 0,
        };
        account.or_insert_with(new).count += 1;
        drop(accounts);
        if !is_lent {
            self.lending.ask(Chore::WriteBack, layer);
        }
        let again = File::open(format!("/proc/self/fd/{}", data.as_raw_fd()));
        match again {
            Ok(file) => Ok(Some(Lent {
                file,
                layer: Arc::clone(layer),
                lending: Arc::clone(&self.lending),
            })),
            Err(error) => {
                self.lending.give_back(layer);
                Err(failed(error))
            }
        }
    }

    /// Gives up what the page cache has of data files that are lent: the kernel keeps what it has read of them under the
    /// files that it shows, so it is a second copy, which is of use only to read-ahead, and only for a moment. The
    /// other way, reading them past the page cache, has no read-ahead at all.
    pub fn forget_lent(&self) {
        let accounts = self.lending.accounts.lock();
        let layers: Vec<_> = accounts
            .values()
            .map(|account| Arc::clone(&account.layer))
            .collect();
        drop(accounts);
        for layer in layers {
            layer.forget_all();
        }
    }

    /// Bytes of data files that are lent now.
    #[must_use]
    pub fn lent_bytes(&self) -> u64 {
        let accounts = self.lending.accounts.lock();
        accounts.values().map(|account| account.bytes).sum()
    }
}

impl Lending {
    fn give_back(&self, layer: &Layer) {
        let mut accounts = self.accounts.lock();
        layer.take_back();
        let is_last = accounts.get_mut(layer.key()).is_some_and(|account| {
            account.count = account.count.saturating_sub(1);
            account.count == 0
        });
        if is_last {
            accounts.remove(layer.key());
        }
    }

    /// Has something done with a layer in the background.
    fn ask(self: &Arc<Self>, chore: Chore, layer: &Arc<Layer>) {
        let mut chores = self.chores.lock();
        let layer = Arc::downgrade(layer);
        let mut waiting = chores.waiting.iter();
        let is_known = waiting.any(|(known, waiting)| *known == chore && waiting.ptr_eq(&layer));
        if is_known || chores.waiting.len() >= WAITING_MAX {
            return;
        }
        chores.waiting.push_back((chore, layer));
        if chores.is_running {
            return;
        }
        let lending = Arc::clone(self);
        let thread = std::thread::Builder::new().name("chores".to_owned());
        match thread.spawn(move || lending.do_waiting()) {
            Ok(_) => chores.is_running = true,
            Err(error) => tracing::warn!(%error, "layers are not verified now"),
        }
    }

    /// Does one chore after the other until none waits.
    fn do_waiting(&self) {
        if let Err(error) = rustix::process::setpriority_process(None, CHORES_NICE) {
            tracing::debug!(%error, "layers are verified at full priority");
        }
        loop {
            let mut chores = self.chores.lock();
            let next = chores.waiting.pop_front();
            chores.is_running = next.is_some();
            drop(chores);
            let Some((chore, layer)) = next else { return };
            // Nobody uses one that is gone.
            let Some(layer) = layer.upgrade() else { continue };
            let done = match chore {
                Chore::Verify => layer.verify_all(&self.is_over),
                Chore::WriteBack => layer.write_back().map(|()| true),
            };
            match done {
                Ok(is_right) => tracing::debug!(layer = %layer.key(), ?chore, is_right, "done"),
                Err(error) => tracing::warn!(layer = %layer.key(), %error, ?chore, "failed"),
            }
        }
    }

    /// Ends what goes on in the background.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.chores.lock().waiting.clear();
    }
}

#[cfg(test)]
mod tests;
