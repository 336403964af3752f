//! Kernel mode: merged trees that the kernel's EROFS serves, with us behind its devices.
//!
//! The tree that `fs` shows stays underneath and is equal. Nothing here is needed for a read to be right, only for it to
//! be fast: where anything fails, the tree underneath serves.
//!
//! An image is one superblock ([`superblocks`]): one page cache, whatever paths lead to it. Its devices are the layers'
//! data files: the local ones where a layer is complete, else files of a connection of our own that is attached nowhere.
//! Places ([`places`]) get copies of its mount: a mountpoint ([`direct`]), or the root of a merged tree in a mount of ours
//! ([`covering`]).

mod covering;
mod direct;
mod places;
pub mod probe;
mod superblocks;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::devices::Devices;
use crate::fs::journal::Failure;
use crate::fuse::{DetachedMount, Helper};
use crate::image::Images;
pub use crate::kernel::covering::Covering;
pub use crate::kernel::direct::{DirectOptions, KernelMount};
use crate::kernel::places::Places;
use crate::kernel::superblocks::Superblocks;

/// How far the kernel reads ahead in a device, in KiB: the kernel knows devices, not files, so what it reads ahead is the
/// next files, whoever wants them. Measured from an empty cache with 16, 128 and 1024 KiB: `tar` of all takes 2.1, 1.8 and
/// 1.8 s; `cat` of one small file fetches the same with each, because a read that stands alone has none ahead.
const DEVICE_READ_AHEAD_KIB: u32 = 128;

/// How often second copies are given up. What is read ahead in between is lost, which is little in a second.
const FORGET_INTERVAL: Duration = Duration::from_secs(1);

/// What is done at once behind lookups and unmounts that have been answered: each may wait for a lookup in our own tree.
const BACKGROUND_MAX: usize = 16;

/// What bounds kernel mode.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a root in a tree of ours stays mounted over that nobody uses.
    pub idle: Duration,
    /// How many of them stay so at once, those in use aside.
    pub mounts_max: usize,
    /// The cache's budget in bytes, of which a part may be lent to the kernel.
    pub budget_bytes: Option<u64>,
    /// How many failed reads are remembered.
    pub journal_entries: usize,
}

/// Kernel mode in a process that has a store. A handle: clones are the same.
#[derive(Clone)]
pub struct Kernel(Arc<Inner>);

struct Inner {
    images: Arc<Images>,
    helper: Helper,
    runtime: Handle,
    options: Options,
    superblocks: Superblocks,
    places: Places,
    background: Semaphore,
    devices: Devices,
    connection: DetachedMount,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").finish_non_exhaustive()
    }
}

impl Kernel {
    /// Finds out whether the kernel can be relied on, and makes the connection that shows devices. Blocks.
    ///
    /// # Errors
    /// Why kernel mode cannot be had here.
    pub fn start(images: Arc<Images>, options: Options, runtime: &Handle) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::unsupported("kernel mode", "only root can mount EROFS"));
        }
        let helper = Helper::this_program();
        let devices = Devices::new(Arc::clone(images.fetcher()), options.journal_entries);
        let tree = Arc::new(devices.clone());
        let connection = DetachedMount::start(tree, &helper, DEVICE_READ_AHEAD_KIB, runtime)?;
        let dir = images.fetcher().store().scratch_dir();
        probe::try_out(&helper, &devices, &connection, &dir)?;
        let kernel = Self(Arc::new(Inner {
            images,
            helper,
            runtime: runtime.clone(),
            options,
            superblocks: Superblocks::default(),
            places: Places::default(),
            background: Semaphore::new(BACKGROUND_MAX),
            devices,
            connection,
        }));
        kernel.watch_mount_table()?;
        kernel.unmount_idle_ones();
        kernel.forget_second_copies();
        Ok(kernel)
    }

    /// Does work that blocks when it is its turn. Nobody waits for it.
    fn in_background(&self, work: impl FnOnce() + Send + 'static) {
        let kernel = self.clone();
        self.0.runtime.spawn(async move {
            let _turn = kernel.0.background.acquire().await;
            // A panic has been logged, and nobody counts on the work.
            let _ = kernel.0.runtime.spawn_blocking(work).await;
        });
    }

    /// Gives up, over and over, what the page cache has of lent files besides what EROFS has of them. Ends with the last
    /// handle.
    fn forget_second_copies(&self) {
        let weak = Arc::downgrade(&self.0);
        self.0.runtime.spawn(async move {
            loop {
                tokio::time::sleep(FORGET_INTERVAL).await;
                let Some(kernel) = weak.upgrade() else { return };
                let store = Arc::clone(kernel.images.fetcher().store());
                if store.lent_bytes() > 0 {
                    // A panic is one pass less.
                    let _ = kernel.runtime.spawn_blocking(move || store.forget_lent()).await;
                }
            }
        });
    }

    /// Superblocks that the kernel has, those included that only a program inside of one keeps alive: without us they lose
    /// what is not complete.
    #[must_use]
    pub fn superblocks(&self) -> watch::Receiver<usize> {
        self.0.superblocks.live()
    }

    /// How the root filesystem that is stored under `key` is served, in words.
    #[must_use]
    pub fn serving(&self, key: &Digest) -> String {
        match self.0.superblocks.find(key) {
            Some(superblock) => superblock.served_by(),
            None => "kernel (EROFS) once it is accessed: it is not mounted now".to_owned(),
        }
    }

    /// The state of all superblocks and places.
    #[must_use]
    pub fn status(&self) -> Value {
        let images: Vec<Value> = self
            .0
            .superblocks
            .all()
            .iter()
            .map(|superblock| {
                let mut status = superblock.status();
                if let Some(fields) = status.as_object_mut() {
                    fields.insert("mounted_at".to_owned(), json!(self.0.places.of(superblock)));
                }
                status
            })
            .collect();
        json!({
            "state": "serves",
            "superblocks": *self.superblocks().borrow(),
            "lent_bytes": self.0.images.fetcher().store().lent_bytes(),
            "device_requests": self.0.connection.counters().by_operation,
            "images": images,
        })
    }

    /// The last failed reads of devices: the programs were told EIO.
    #[must_use]
    pub fn errors(&self) -> Vec<Failure> {
        self.0.devices.journal().entries()
    }
}
