//! Roots of merged trees in one mount of ours, mounted over by the kernel's own view of them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::fs::journal::Failure;
use crate::fs::{CoveredRoot, Covers, Filesystem, Work};
use crate::fuse::{Mount, mounted};
use crate::kernel::Kernel;
use crate::kernel::places::Owner;
use crate::kernel::superblocks::Target;

/// How long the helper may take to mount at a stage, for which a LOOKUP is held.
const STAGE_DEADLINE: Duration = Duration::from_secs(5);
/// How long an unmount waits for surplus roots that are being unmounted: a helper that looks at one keeps it busy.
const TRIMMING_WAIT: Duration = Duration::from_secs(5);

/// What covers the roots of one tree.
#[derive(Debug)]
pub struct Covering {
    kernel: Kernel,
    no_exec: bool,
    own: Weak<Self>,
    /// Set while the tree is mounted.
    mounted: Mutex<Option<MountedTree>>,
    /// Set while the tree is about to be unmounted.
    is_paused: AtomicBool,
    is_trimming: Mutex<bool>,
    /// Told when it is over.
    trimmed: Condvar,
}

#[derive(Debug, Clone)]
struct MountedTree {
    mountpoint: PathBuf,
    tree: Filesystem,
    mount: Weak<Mount>,
}

impl Covering {
    /// One for a tree that is about to be mounted.
    #[must_use]
    pub fn new(kernel: Kernel, no_exec: bool) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            kernel,
            no_exec,
            own: Weak::clone(own),
            mounted: Mutex::default(),
            is_paused: AtomicBool::new(false),
            is_trimming: Mutex::new(false),
            trimmed: Condvar::new(),
        })
    }

    /// From now on roots are mounted over.
    pub fn begin(&self, tree: &Filesystem, mount: &Arc<Mount>) {
        *self.mounted.lock() = Some(MountedTree {
            mountpoint: mount.mountpoint().to_owned(),
            tree: tree.clone(),
            mount: Arc::downgrade(mount),
        });
    }

    /// From now on none is: before an unmount, which new mounts below would make fail. Waits for those that are being
    /// unmounted.
    pub fn pause(&self) {
        self.is_paused.store(true, Ordering::Release);
        let mut is_trimming = self.is_trimming.lock();
        let waited = self
            .trimmed
            .wait_while_for(&mut is_trimming, |is_trimming| *is_trimming, TRIMMING_WAIT);
        if waited.timed_out() {
            tracing::debug!("surplus root filesystems are still being unmounted");
        }
    }

    /// From now on roots are mounted over again: the unmount has failed.
    pub fn resume(&self) {
        self.is_paused.store(false, Ordering::Release);
    }

    /// Lets go of the tree, which is not mounted any more, and neither is what was mounted in it.
    pub fn end(&self) {
        self.pause();
        *self.mounted.lock() = None;
        self.kernel.note_tree_gone(self);
    }

    /// How many roots are mounted over now.
    #[must_use]
    pub fn count(&self) -> usize {
        self.kernel.0.places.count(self)
    }

    fn mounted(&self) -> Result<MountedTree> {
        let mounted = self.mounted.lock().clone();
        mounted.filter(|_| !self.is_paused()).ok_or_else(|| {
            Error::busy(
                "root filesystem",
                "its tree is not mounted, or about to be unmounted",
            )
        })
    }

    /// Notes that a root is not mounted over any more: the kernel shall ask for it again.
    pub(super) fn uncovered(&self, slot: u32) {
        let Some(mounted) = self.mounted.lock().clone() else {
            return;
        };
        if let (Some((parent, name)), Some(mount)) = (mounted.tree.uncovered(slot), mounted.mount.upgrade()) {
            // It takes the directory's lock, for which it may have to wait.
            self.kernel.in_background(move || {
                if let Err(error) = mount.expire_entry(parent, name.as_bytes()) {
                    tracing::debug!(%error, name, "the kernel does not let a name expire");
                }
            });
        }
    }

    /// Whether nobody else is at work to keep the mounts below their limit, and it is to be kept; from now on we are.
    pub(super) fn begin_trimming(&self) -> bool {
        let mut is_trimming = self.is_trimming.lock();
        !self.is_paused() && !std::mem::replace(&mut is_trimming, true)
    }

    pub(super) fn end_trimming(&self) {
        *self.is_trimming.lock() = false;
        self.trimmed.notify_all();
    }

    /// Whether the tree is about to be unmounted.
    pub(super) fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Acquire)
    }

    async fn cover_now(self: Arc<Self>, root: CoveredRoot) -> Result<()> {
        let mounted = self.mounted()?;
        let stage = Target {
            mountpoint: mounted.mountpoint.join(&root.stage),
            guarded: None,
            deadline: STAGE_DEADLINE,
        };
        let kernel = self.kernel.clone();
        let source = root.rootfs.name();
        let (superblock, mut attachment) = kernel.attached(&root.rootfs, source, self.no_exec, stage).await?;
        attachment.mountpoint = mounted.mountpoint.join(&root.path);
        let owner = Owner::Tree {
            covering: Arc::downgrade(&self),
            slot: root.slot,
        };
        kernel.note_place(attachment, superblock, owner);
        if self.mounted.lock().is_none() {
            kernel.note_tree_gone(&self);
        }
        kernel.keep_below_limit(&self);
        Ok(())
    }
}

impl Covers for Covering {
    fn cover(&self, root: CoveredRoot) -> Work {
        let own = self.own.upgrade();
        Box::pin(async move {
            match own {
                Some(own) => own.cover_now(root).await,
                None => Err(Error::Interrupted),
            }
        })
    }

    fn is_open(&self) -> bool {
        self.mounted().is_ok()
    }

    fn stands(&self, slot: u32) -> bool {
        let Some(attachment) = self.kernel.0.places.over(self, slot) else {
            return false;
        };
        match mounted(std::slice::from_ref(&attachment)) {
            Ok(found) if found.iter().any(Option::is_some) => true,
            Ok(_) => {
                self.kernel.note_gone(&attachment);
                false
            }
            // What cannot be read counts as there.
            Err(_) => true,
        }
    }

    fn failures(&self) -> Vec<Failure> {
        self.kernel.errors()
    }

    fn settle(&self, path: String) {
        let Ok(mounted) = self.mounted() else { return };
        let helper = self.kernel.0.helper.clone();
        self.kernel.in_background(move || {
            if let Err(error) = helper.settle(&mounted.mountpoint.join(path)) {
                tracing::debug!(%error, "a mounted root has not been settled");
            }
        });
    }
}
