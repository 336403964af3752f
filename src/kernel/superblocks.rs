//! Images as superblocks of EROFS.
//!
//! A superblock is a mount that is attached nowhere, from which places get copies. It goes when nothing of all that is left,
//! which the kernel says by closing its last device, the witness: also a program that stands in a place which was unmounted
//! lazily, or in another mount namespace, keeps it, and with it what is lent to it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::fetch::device::DeviceAt;
use crate::fetch::single_flight::SingleFlight;
use crate::fs::devices::Shown;
use crate::fs::ops::Access;
use crate::fuse::{Attachment, ErofsDevice, NewErofs, Place};
use crate::image::Rootfs;
use crate::image::kernel::KernelImage;
use crate::image::reads::LayerReads;
use crate::kernel::Kernel;
use crate::store::lending::Lent;

/// Processes that mount at once. A `find` over thousands of images would start one for each that is looked at.
const HELPERS_MAX: usize = 16;

/// What decides whether two mounts can share a superblock: the merged tree, and whether programs of it can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    tree: Digest,
    no_exec: bool,
}

/// A superblock. Dropping it lets it go as soon as nothing else has it.
#[derive(Debug)]
pub(super) struct Superblock {
    /// What the mount table shows as its source.
    source: String,
    mount: Option<OwnedFd>,
    /// For each layer whether its device is the local file.
    local: Vec<bool>,
    since: Instant,
    runtime: tokio::runtime::Handle,
}

impl Superblock {
    /// The mount to copy.
    pub(super) fn mount(&self) -> Option<BorrowedFd<'_>> {
        self.mount.as_ref().map(AsFd::as_fd)
    }

    /// In words, how it is served.
    pub(super) fn served_by(&self) -> String {
        let local = self.local.iter().filter(|local| **local).count();
        match (local, self.local.len()) {
            (local, all) if local == all => "kernel (EROFS), all layers from local files".to_owned(),
            (0, _) => "kernel (EROFS), all layers through registryfs".to_owned(),
            (local, all) => {
                format!(
                    "kernel (EROFS), {local} of {all} layers from local files, the others through registryfs"
                )
            }
        }
    }

    pub(super) fn status(&self) -> Value {
        json!({
            "image": self.source,
            "layers": self.local.len(),
            "local_layers": self.local.iter().filter(|local| **local).count(),
            "mounted_s": self.since.elapsed().as_secs(),
        })
    }
}

impl Drop for Superblock {
    fn drop(&mut self) {
        // Closing the last reference makes the kernel take the superblock down, which is not for a thread that others wait
        // for.
        if let Some(mount) = self.mount.take() {
            self.runtime.spawn_blocking(move || drop(mount));
        }
    }
}

/// Where a superblock is to be attached.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) mountpoint: PathBuf,
    /// Another way there, where autofs guards it.
    pub(super) guarded: Option<PathBuf>,
    pub(super) deadline: Duration,
}

impl Target {
    fn place(&self) -> Place<'_> {
        Place {
            mountpoint: &self.mountpoint,
            guarded: self.guarded.as_deref(),
            deadline: self.deadline,
        }
    }
}

/// A superblock, and the place where it was attached at once.
#[derive(Debug, Clone)]
pub(super) struct Made {
    pub(super) superblock: Arc<Superblock>,
    attached: Option<(PathBuf, Attachment)>,
}

/// The superblocks that there are.
#[derive(Debug)]
pub(super) struct Superblocks {
    known: Mutex<HashMap<Key, Weak<Superblock>>>,
    under_way: SingleFlight<Key, Made>,
    /// One for each helper that may be at work.
    helpers: Semaphore,
    live: watch::Sender<usize>,
}

impl Default for Superblocks {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            under_way: SingleFlight::default(),
            helpers: Semaphore::new(HELPERS_MAX),
            live: watch::channel(0).0,
        }
    }
}

impl Superblocks {
    /// How many the kernel has.
    pub(super) fn live(&self) -> watch::Receiver<usize> {
        self.live.subscribe()
    }

    /// One of a merged tree.
    pub(super) fn find(&self, tree: &Digest) -> Option<Arc<Superblock>> {
        let known = self.known.lock();
        let mut found = known.iter().filter(|(key, _)| key.tree == *tree);
        found.find_map(|(_, superblock)| superblock.upgrade())
    }

    /// All of them, by their sources.
    pub(super) fn all(&self) -> Vec<Arc<Superblock>> {
        let mut all: Vec<_> = self.known.lock().values().filter_map(Weak::upgrade).collect();
        all.sort_by(|a, b| a.source.cmp(&b.source));
        all
    }

    fn get(&self, key: &Key) -> Option<Arc<Superblock>> {
        self.known.lock().get(key).and_then(Weak::upgrade)
    }

    fn add(&self, key: Key, superblock: &Arc<Superblock>) {
        let mut known = self.known.lock();
        known.retain(|_, superblock| superblock.strong_count() > 0);
        known.insert(key, Arc::downgrade(superblock));
    }
}

/// What stays until the kernel is done with a superblock: the devices that it has.
struct Devices {
    shown: Vec<Shown>,
    lent: Vec<Lent>,
}

impl Kernel {
    /// A superblock of a merged tree, attached at `target`. The mount table shows the `source` of whoever comes first.
    pub(super) async fn attached(
        &self,
        rootfs: &Arc<Rootfs>,
        source: &str,
        no_exec: bool,
        target: Target,
    ) -> Result<(Arc<Superblock>, Attachment)> {
        let tree = *rootfs.key();
        let key = Key { tree, no_exec };
        let superblocks = &self.0.superblocks;
        let made = match superblocks.get(&key) {
            Some(superblock) => Made {
                superblock,
                attached: None,
            },
            None => {
                let (kernel, rootfs, target) = (self.clone(), Arc::clone(rootfs), target.clone());
                let source = source.to_owned();
                let work = async move { kernel.make(key, &rootfs, source, target).await };
                superblocks.under_way.run(&self.0.runtime, key, work).await?
            }
        };
        if let Some((at, attachment)) = made.attached
            && at == target.mountpoint
        {
            return Ok((made.superblock, attachment));
        }
        let (helper, superblock) = (self.0.helper.clone(), Arc::clone(&made.superblock));
        let attach = move || match superblock.mount() {
            Some(mount) => helper.attach_erofs(mount, &target.place()),
            None => Err(Error::busy(
                target.mountpoint.display().to_string(),
                "its mount is gone",
            )),
        };
        let _turn = superblocks.helpers.acquire().await;
        let attachment = blocking(&self.0.runtime, attach).await?;
        Ok((made.superblock, attachment))
    }

    async fn make(&self, key: Key, rootfs: &Arc<Rootfs>, source: String, target: Target) -> Result<Made> {
        // The one before may have ended in between.
        if let Some(superblock) = self.0.superblocks.get(&key) {
            return Ok(Made {
                superblock,
                attached: None,
            });
        }
        let image = self.0.images.kernel_image(rootfs).await?;
        let kernel = self.clone();
        let make = move || kernel.make_blocking(key, image, source, target);
        let turn = self.0.superblocks.helpers.acquire().await;
        let (made, devices, witness) = blocking(&self.0.runtime, make).await?;
        drop(turn);
        self.0.superblocks.live.send_modify(|live| *live += 1);
        let kernel = self.clone();
        self.0.runtime.spawn(async move {
            witness.closed().await;
            drop(devices);
            kernel.0.superblocks.live.send_modify(|live| *live -= 1);
        });
        Ok(made)
    }

    fn make_blocking(
        &self,
        key: Key,
        image: KernelImage,
        source: String,
        target: Target,
    ) -> Result<(Made, Devices, Shown)> {
        let inner = &self.0;
        let layers = image.layers.iter().zip(&image.reads);
        let places = layers.map(|(device, reads)| self.place(device, reads.as_ref()));
        let places = places.collect::<Result<Vec<_>>>()?;
        let witness = inner.devices.show_witness();
        let named = places.iter().flat_map(LayerPlace::devices);
        let witness_device = ErofsDevice::Shown(witness.name().to_owned());
        let local: Vec<bool> = places
            .iter()
            .map(|place| matches!(place, LayerPlace::Local(_)))
            .collect();
        let new = NewErofs {
            image: image.file.as_fd(),
            devices: named.chain([witness_device]).collect(),
            shown_root: inner.connection.root(),
            source: source.clone(),
            no_exec: key.no_exec,
        };
        let (mount, attachment) = inner.helper.make_and_attach_erofs(&new, &target.place())?;
        drop(new);
        let superblock = Arc::new(Superblock {
            source,
            mount: Some(mount),
            local,
            since: Instant::now(),
            runtime: inner.runtime.clone(),
        });
        inner.superblocks.add(key, &superblock);
        let mut devices = Devices {
            shown: Vec::new(),
            lent: Vec::new(),
        };
        for place in places {
            match place {
                LayerPlace::Shown(shown) => devices.shown.extend(shown),
                LayerPlace::Local(lent) => devices.lent.push(lent),
            }
        }
        let made = Made {
            superblock,
            attached: Some((target.mountpoint, attachment)),
        };
        Ok((made, devices, witness))
    }

    /// Where the kernel reads a layer: its own file, if that may be, else through us.
    fn place(&self, device: &DeviceAt, reads: Option<&LayerReads>) -> Result<LayerPlace> {
        let store = self.0.images.fetcher().store();
        Ok(match store.lend(&device.layer, self.0.options.budget_bytes)? {
            Some(lent) => {
                if let Some(of) = reads {
                    of.reads.note_lent(of.layer);
                }
                LayerPlace::Local(lent)
            }
            None => LayerPlace::Shown(
                ACCESSES.map(|access| self.0.devices.show(device.clone(), access, reads.cloned())),
            ),
        })
    }
}

/// How the two devices of a layer are read that come from us: see [`erofs::write`](crate::image::erofs::write).
const ACCESSES: [Access; 2] = [Access::Cached, Access::Direct];

/// Where the data of a layer is.
enum LayerPlace {
    Shown([Shown; 2]),
    Local(Lent),
}

impl LayerPlace {
    /// The layer's devices.
    fn devices(&self) -> [ErofsDevice<'_>; 2] {
        match self {
            Self::Shown(shown) => shown
                .each_ref()
                .map(|shown| ErofsDevice::Shown(shown.name().to_owned())),
            Self::Local(lent) => [0, 1].map(|_| ErofsDevice::Local(lent.file().as_fd())),
        }
    }
}
