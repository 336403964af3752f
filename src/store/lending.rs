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
//! of low priority does, a layer at a time.

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
/// The most layers that wait to be verified: those of a few images. Whoever is left out asks again at the next mount.
const WAITING_MAX: usize = 256;
/// The nice value of the thread that verifies.
const VERIFYING_NICE: i32 = 19;

/// What a store has lent, and what it verifies in order to lend it.
#[derive(Debug, Default)]
pub(super) struct Lending {
    /// The layers that are lent.
    accounts: Mutex<HashMap<Digest, Account>>,
    verification: Mutex<Verification>,
    is_over: AtomicBool,
}

/// What is lent of a layer.
#[derive(Debug)]
struct Account {
    /// What its data file takes up on the disk.
    bytes: u64,
    /// How often it is lent.
    count: u64,
}

/// Layers that wait to be verified.
#[derive(Debug, Default)]
struct Verification {
    waiting: VecDeque<Weak<Layer>>,
    is_running: bool,
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
            self.lending.verify(layer);
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
        accounts
            .entry(*layer.key())
            .or_insert(Account { bytes, count: 0 })
            .count += 1;
        drop(accounts);
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

    /// Has a layer verified in the background.
    fn verify(self: &Arc<Self>, layer: &Arc<Layer>) {
        let mut verification = self.verification.lock();
        let layer = Arc::downgrade(layer);
        let is_waiting = verification.waiting.iter().any(|waiting| waiting.ptr_eq(&layer));
        if is_waiting || verification.waiting.len() >= WAITING_MAX {
            return;
        }
        verification.waiting.push_back(layer);
        if verification.is_running {
            return;
        }
        let lending = Arc::clone(self);
        let thread = std::thread::Builder::new().name("verify".to_owned());
        match thread.spawn(move || lending.verify_waiting()) {
            Ok(_) => verification.is_running = true,
            Err(error) => tracing::warn!(%error, "layers of before the restart are not verified now"),
        }
    }

    /// Verifies one layer after the other until none waits.
    fn verify_waiting(&self) {
        if let Err(error) = rustix::process::setpriority_process(None, VERIFYING_NICE) {
            tracing::debug!(%error, "layers are verified at full priority");
        }
        loop {
            let mut verification = self.verification.lock();
            let next = verification.waiting.pop_front();
            verification.is_running = next.is_some();
            drop(verification);
            let Some(next) = next else { return };
            // Nobody uses one that is gone.
            let Some(layer) = next.upgrade() else { continue };
            match layer.verify_all(&self.is_over) {
                Ok(is_right) => tracing::debug!(layer = %layer.key(), is_right, "a layer was verified"),
                Err(error) => tracing::warn!(layer = %layer.key(), %error, "cannot be verified"),
            }
        }
    }

    /// Ends what goes on in the background.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.verification.lock().waiting.clear();
    }
}

#[cfg(test)]
mod tests;
