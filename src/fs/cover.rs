//! Root filesystems that the kernel serves by itself, seen from our tree: mounts over the roots of merged trees.
//!
//! The mount is made while the LOOKUP of the root's name is held, so whoever comes first is in it already. It cannot be made
//! at that name: the kernel keeps everyone away from a name that is being looked up. So the same directory inode is shown
//! under a second name, `.registryfs/stage-…`, which nobody knows, and the mount is made there. The kernel has one
//! dentry for a directory: when the LOOKUP is answered with that inode, it moves the dentry, and the mount on it, to the
//! name that was asked for. Whoever waits there walks on into the mount, by whatever path he came.
//!
//! Whatever fails, the LOOKUP is answered all the same, and the tree underneath serves, which has the same contents.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::single_flight::SingleFlight;
use crate::fs::Filesystem;
use crate::fs::journal::Failure;
use crate::fs::nodes::NameNode;
use crate::fs::ops::{Caller, Entry, FOREVER, Lookup};
use crate::fs::slots::Slot;
use crate::image::Rootfs;
use crate::image::tree::ROOT;

/// The longest that a LOOKUP is held for the mount.
const COVER_WAIT: Duration = Duration::from_secs(5);
/// How long the tree underneath serves alone after the mount failed.
const RETRY_AFTER: Duration = Duration::from_secs(30);
/// How long the kernel keeps the name of a root that could be covered and is not.
const UNCOVERED_TTL: Duration = Duration::from_secs(1);
/// Who mounts: only root can.
const HELPER_UID: u32 = 0;

/// Work whose end tells whether it was done.
pub type Work = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// Mounts the kernel's own view of merged trees.
pub trait Covers: Send + Sync + fmt::Debug {
    /// Mounts `root` at its stage.
    fn cover(&self, root: CoveredRoot) -> Work;

    /// Whether roots may be mounted over now: not before the tree is mounted, nor while it is being unmounted.
    fn is_open(&self) -> bool;

    /// Whether the mount over this root stands. Asked only where the kernel should not have had to ask us.
    fn stands(&self, slot: u32) -> bool;

    /// The reads that failed below our mounts: who read was told EIO by the kernel, and nothing else.
    fn failures(&self) -> Vec<Failure>;

    /// Walks to a root once, so that the kernel has moved what was staged to where it belongs, and tells all who watch mounts.
    fn settle(&self, path: String);
}

/// The root of a merged tree that is to be mounted over.
#[derive(Debug, Clone)]
pub struct CoveredRoot {
    /// What it is the root of.
    pub rootfs: Arc<Rootfs>,
    /// The number by which [`Filesystem::uncovered`] knows it.
    pub slot: u32,
    /// Where to mount, below the root of this mount.
    pub stage: String,
    /// Where it is seen when all is done.
    pub path: String,
}

/// What is known of a root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It is mounted over.
    Covered,
    /// Mounting failed.
    Failed(Instant),
}

/// The roots that are mounted over, or shall be.
#[derive(Debug, Default)]
pub(super) struct Coverings {
    states: Mutex<HashMap<u32, State>>,
    /// The directories that lead to the roots, by which the kernel knows their names.
    parents: Mutex<HashMap<u32, (u64, String)>>,
    stages: Mutex<HashMap<Vec<u8>, Arc<Slot>>>,
    under_way: SingleFlight<u32, ()>,
    staged: AtomicU64,
}

impl Coverings {
    fn note(&self, slot: u32, state: State) {
        let mut states = self.states.lock();
        // Failures of long ago say nothing, and roots that nobody comes to again are many.
        states.retain(|_, state| !matches!(state, State::Failed(at) if at.elapsed() >= RETRY_AFTER));
        states.insert(slot, state);
    }
}

/// A name under `.registryfs` for as long as a mount is being made there.
struct Stage {
    filesystem: Filesystem,
    name: String,
}

impl Stage {
    fn new(filesystem: &Filesystem, slot: &Arc<Slot>) -> Self {
        let coverings = filesystem.coverings();
        let number = coverings.staged.fetch_add(1, Ordering::Relaxed);
        // Nobody else may come there, so nobody can know it.
        let secret = Digest::of(format!("{number} {:p} {:?}", slot, Instant::now()).as_bytes());
        let name = format!("stage-{}", secret.hex());
        let key = name.clone().into_bytes();
        coverings.stages.lock().insert(key, Arc::clone(slot));
        Self {
            filesystem: filesystem.clone(),
            name,
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let coverings = self.filesystem.coverings();
        coverings.stages.lock().remove(self.name.as_bytes());
    }
}

impl Filesystem {
    fn coverings(&self) -> &Coverings {
        &self.0.coverings
    }

    /// Has the root of a tree mounted over, if it can be, and says how long its name holds.
    pub(super) async fn cover(&self, slot: &Arc<Slot>, dir: &NameNode, name: &str) -> Duration {
        let (Some(covers), Some(view)) = (self.options().covers.clone(), &slot.view) else {
            return FOREVER;
        };
        let number = slot.number;
        let state = self.coverings().states.lock().get(&number).copied();
        match state {
            Some(State::Covered) if covers.stands(number) => return self.kept(number, dir, name),
            Some(State::Failed(at)) if at.elapsed() < RETRY_AFTER => return UNCOVERED_TTL,
            _ if !covers.is_open() => return UNCOVERED_TTL,
            _ => {}
        }
        let (filesystem, slot, path) = (self.clone(), Arc::clone(slot), view.path.clone());
        let work = {
            let (covers, path) = (Arc::clone(&covers), path.clone());
            async move { filesystem.mount_over(covers, slot, path).await }
        };
        let runtime = self.images().fetcher().runtime();
        let flight = self.coverings().under_way.run(runtime, number, work);
        match tokio::time::timeout(COVER_WAIT, flight).await {
            Ok(Ok(())) => {
                covers.settle(path);
                self.kept(number, dir, name)
            }
            // It has been written down, or goes on: later lookups find out.
            Ok(Err(_)) | Err(_) => UNCOVERED_TTL,
        }
    }

    /// Notes that the kernel will keep the name of a root for as long as it is mounted over: how long that is.
    fn kept(&self, slot: u32, dir: &NameNode, name: &str) -> Duration {
        let parent = (dir.ino, name.to_owned());
        self.coverings().parents.lock().insert(slot, parent);
        FOREVER
    }

    async fn mount_over(&self, covers: Arc<dyn Covers>, slot: Arc<Slot>, path: String) -> Result<()> {
        let stage = Stage::new(self, &slot);
        let root = CoveredRoot {
            rootfs: Arc::clone(&slot.rootfs),
            slot: slot.number,
            stage: format!(".registryfs/{}", stage.name),
            path: path.clone(),
        };
        let mounted = covers.cover(root).await;
        let state = match &mounted {
            Ok(()) => State::Covered,
            Err(error) => {
                self.journal().record("mount", &path, error);
                State::Failed(Instant::now())
            }
        };
        self.coverings().note(slot.number, state);
        drop(stage);
        // Whoever looked the root up has been answered without, or was interrupted: the mount is where it was staged still.
        if mounted.is_ok() && self.coverings().under_way.waiters(&slot.number) == 0 {
            covers.settle(path);
        }
        mounted
    }

    /// Notes that a root is not mounted over any more. Answers the directory that leads to it and its name there, which the
    /// kernel still holds for good.
    pub fn uncovered(&self, slot: u32) -> Option<(u64, String)> {
        self.coverings().states.lock().remove(&slot);
        self.coverings().parents.lock().remove(&slot)
    }

    /// The directory that is being mounted over, under the name that it has for that. The mount table shows that name to
    /// everyone, and no mode keeps anyone out there.
    pub(super) fn lookup_stage(&self, caller: Caller, name: &[u8]) -> Option<Result<Lookup>> {
        let slot = self.coverings().stages.lock().get(name).cloned()?;
        if caller.uid != HELPER_UID {
            // Other errors would throw out what is mounted there.
            return Some(Err(Error::posix(
                "a directory that is being mounted over",
                libc::ENOMEM,
            )));
        }
        let root = slot
            .rootfs
            .tree()
            .node(ROOT)
            .and_then(|root| slot.rootfs.vouch(root));
        Some(root.map(|root| {
            Lookup::Found(Entry {
                entry_ttl: Duration::ZERO,
                ..self.merged_entry(&slot, &root)
            })
        }))
    }

    /// The reads that failed in roots which are mounted over.
    pub(super) fn covers_failures(&self) -> Vec<Failure> {
        let covers = self.options().covers.as_ref();
        covers.map(|covers| covers.failures()).unwrap_or_default()
    }

    /// Whether roots are covered at all.
    pub(super) fn covers_roots(&self) -> bool {
        self.options().covers.is_some()
    }

    /// The merged tree that is at the root of this mount, if it is one.
    #[must_use]
    pub fn top_rootfs(&self) -> Option<&Arc<Rootfs>> {
        self.top().rootfs()
    }
}
