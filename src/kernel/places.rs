//! Where superblocks are attached. The kernel and its users take mounts away without asking us (a directory above goes, a
//! lazy unmount, a container's end), so the mount table is watched; and what nobody uses is taken away by us.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::fetch::blocking;
use crate::fuse::{Attachment, Detach, MountTableWatch, mounted};
use crate::kernel::superblocks::Superblock;
use crate::kernel::{Covering, Inner, Kernel};

/// How often the mount table is looked at although the kernel reports no change.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);
/// How long changes of the mount table are gathered before it is read.
const GATHER: Duration = Duration::from_millis(100);
/// How often it is looked whether the kernel has given back what an unmounted image had: it does so within milliseconds.
const GIVEN_BACK_LOOKS: u32 = 20;
/// The pause between two looks.
const GIVEN_BACK_INTERVAL: Duration = Duration::from_millis(25);
/// How many more than those beyond the limit are unmounted at once, as a part of the limit: one in so many.
const SPARE_PART: usize = 16;

/// Whom a place belongs to.
#[derive(Debug, Clone)]
pub(super) enum Owner {
    /// The root of a merged tree in a mount of ours.
    Tree { covering: Weak<Covering>, slot: u32 },
    /// A mountpoint; told when it is gone.
    Mountpoint(watch::Sender<bool>),
}

#[derive(Debug)]
struct Place {
    attachment: Attachment,
    superblock: Arc<Superblock>,
    owner: Owner,
    since: Instant,
}

/// The places, by the numbers of their mounts.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<HashMap<u64, Place>>);

impl Places {
    /// Where a superblock is attached.
    pub(super) fn of(&self, superblock: &Arc<Superblock>) -> Vec<PathBuf> {
        let places = self.0.lock();
        let of_it = places
            .values()
            .filter(|place| Arc::ptr_eq(&place.superblock, superblock));
        let mut paths: Vec<_> = of_it.map(|place| place.attachment.mountpoint.clone()).collect();
        paths.sort();
        paths
    }

    /// The place over the root of a merged tree.
    pub(super) fn over(&self, covering: &Covering, slot: u32) -> Option<Attachment> {
        let places = self.0.lock();
        let is_it = |place: &&Place| match &place.owner {
            Owner::Tree {
                covering: of,
                slot: over,
            } => *over == slot && std::ptr::eq(of.as_ptr(), covering),
            Owner::Mountpoint(_) => false,
        };
        places.values().find(is_it).map(|place| place.attachment.clone())
    }

    /// How many roots of trees are mounted over in a mount of ours.
    pub(super) fn count(&self, covering: &Covering) -> usize {
        let is_its = |place: &&Place| is_in(place, covering);
        self.0.lock().values().filter(is_its).count()
    }

    fn all(&self) -> Vec<Attachment> {
        let places = self.0.lock();
        places.values().map(|place| place.attachment.clone()).collect()
    }

    /// Those over roots of trees, the oldest first.
    fn in_trees(&self, covering: Option<&Covering>) -> Vec<Attachment> {
        let places = self.0.lock();
        let mut found: Vec<_> = places
            .values()
            .filter(|place| match (&place.owner, covering) {
                (Owner::Tree { .. }, None) => true,
                (_, Some(covering)) => is_in(place, covering),
                (Owner::Mountpoint(_), None) => false,
            })
            .map(|place| (place.since, place.attachment.clone()))
            .collect();
        found.sort_by_key(|(since, _)| *since);
        found.into_iter().map(|(_, attachment)| attachment).collect()
    }
}

fn is_in(place: &Place, covering: &Covering) -> bool {
    match &place.owner {
        Owner::Tree { covering: of, .. } => std::ptr::eq(of.as_ptr(), covering),
        Owner::Mountpoint(_) => false,
    }
}

impl Kernel {
    /// Keeps account of a place from now on.
    pub(super) fn note_place(&self, attachment: Attachment, superblock: Arc<Superblock>, owner: Owner) {
        let place = Place {
            superblock,
            owner,
            since: Instant::now(),
            attachment: attachment.clone(),
        };
        let before = self.0.places.0.lock().insert(attachment.mount_id, place);
        // The kernel gives a number again only when its mount is gone.
        if let Some(before) = before {
            self.tell_gone(before);
        }
    }

    /// Notes that a mount is gone.
    pub(super) fn note_gone(&self, attachment: &Attachment) {
        let gone = {
            let mut places = self.0.places.0.lock();
            let is_it = places
                .get(&attachment.mount_id)
                .is_some_and(|place| place.attachment.device == attachment.device);
            is_it.then(|| places.remove(&attachment.mount_id)).flatten()
        };
        if let Some(gone) = gone {
            self.tell_gone(gone);
        }
    }

    /// Notes that a whole mount of ours is gone, and with it all that was mounted in it.
    pub(super) fn note_tree_gone(&self, covering: &Covering) {
        let mut places = self.0.places.0.lock();
        let gone: Vec<_> = places.extract_if(|_, place| is_in(place, covering)).collect();
        drop(places);
        drop(gone);
    }

    fn tell_gone(&self, place: Place) {
        match &place.owner {
            Owner::Tree { covering, slot } => {
                if let Some(covering) = covering.upgrade() {
                    covering.uncovered(*slot);
                }
            }
            Owner::Mountpoint(gone) => {
                gone.send_replace(true);
            }
        }
    }

    /// Takes places away, as far as nobody uses them. Blocks.
    pub(super) fn detach(&self, attachments: &[Attachment], how: Detach) -> Result<Vec<Result<()>>> {
        let outcomes = self.0.helper.detach_erofs(attachments, how)?;
        for (attachment, outcome) in attachments.iter().zip(&outcomes) {
            match outcome {
                Ok(()) => self.note_gone(attachment),
                Err(error) => {
                    tracing::debug!(place = %attachment.mountpoint.display(), %error, "stays mounted");
                }
            }
        }
        Ok(outcomes)
    }

    /// Unmounts the oldest roots beyond the limit that nobody uses.
    pub(super) fn keep_below_limit(&self, covering: &Arc<Covering>) {
        let limit = self.0.options.mounts_max;
        if self.0.places.count(covering) <= limit || !covering.begin_trimming() {
            return;
        }
        let (kernel, covering) = (self.clone(), Arc::clone(covering));
        self.0.runtime.spawn_blocking(move || {
            // Those that came meanwhile have left the work to us.
            loop {
                let unmounted = kernel.unmount_surplus(&covering);
                covering.end_trimming();
                let is_done = unmounted == 0 || kernel.0.places.count(&covering) <= limit;
                if is_done || !covering.begin_trimming() {
                    break;
                }
            }
        });
    }

    /// Unmounts the oldest roots beyond the limit and a few more, and returns how many. Blocks.
    fn unmount_surplus(&self, covering: &Covering) -> usize {
        let limit = self.0.options.mounts_max;
        let mounted = self.0.places.in_trees(Some(covering));
        let surplus = mounted.len().saturating_sub(limit - limit / SPARE_PART);
        let mut unmounted = 0;
        for batch in mounted.chunks(SPARE_PART) {
            if covering.is_paused() {
                break;
            }
            let wanted = surplus.saturating_sub(unmounted).min(batch.len());
            let Some(batch) = batch.get(..wanted).filter(|batch| !batch.is_empty()) else {
                break;
            };
            match self.detach(batch, Detach::Unused) {
                Ok(outcomes) => unmounted += outcomes.iter().filter(|outcome| outcome.is_ok()).count(),
                Err(error) => {
                    tracing::warn!(%error, "cannot unmount idle root filesystems");
                    break;
                }
            }
        }
        unmounted
    }

    /// Unmounts, over and over, the roots in trees that nobody has used for so long. Ends with the last handle.
    pub(super) fn unmount_idle_ones(&self) {
        let (weak, idle) = (Arc::downgrade(&self.0), self.0.options.idle);
        let runtime = self.0.runtime.clone();
        self.0.runtime.spawn(async move {
            loop {
                // The kernel marks a mount when it is asked to unmount it, and does so when it is asked again and nobody has
                // used it in between.
                tokio::time::sleep(idle).await;
                let Some(kernel) = weak.upgrade().map(Kernel) else {
                    return;
                };
                let mounted = kernel.0.places.in_trees(None);
                let detach = move || kernel.detach(&mounted, Detach::Expired).map(drop);
                if let Err(error) = blocking(&runtime, detach).await {
                    tracing::warn!(%error, "cannot unmount idle root filesystems");
                }
            }
        });
    }

    /// Does what was refused because of layers that the kernel reads by itself, after unmounting the roots in trees that
    /// nobody uses.
    ///
    /// # Errors
    /// What `work` returns, when it is refused still.
    pub async fn once_idle<T, W>(&self, work: impl Fn() -> W) -> Result<T>
    where
        W: Future<Output = Result<T>>,
    {
        let (kernel, mounted) = (self.clone(), self.0.places.in_trees(None));
        let detach = move || kernel.detach(&mounted, Detach::Unused).map(drop);
        blocking(&self.0.runtime, detach).await?;
        for _ in 0..GIVEN_BACK_LOOKS {
            match work().await {
                Err(Error::Busy { .. }) => tokio::time::sleep(GIVEN_BACK_INTERVAL).await,
                done => return done,
            }
        }
        work().await
    }

    /// Starts a thread that notices mounts which are gone. It ends with the last handle.
    pub(super) fn watch_mount_table(&self) -> Result<()> {
        let table = MountTableWatch::new()?;
        let weak = Arc::downgrade(&self.0);
        std::thread::Builder::new()
            .name("mount-table".into())
            .spawn(move || watch(table, &weak))
            .map(drop)
            .map_err(|error| Error::io("a thread for the mount table", &error))
    }
}

fn watch(table: MountTableWatch, kernel: &Weak<Inner>) {
    loop {
        if let Err(error) = table.wait(LOOK_INTERVAL) {
            tracing::warn!(%error, "cannot watch the mount table");
            std::thread::sleep(LOOK_INTERVAL);
        }
        std::thread::sleep(GATHER);
        let Some(kernel) = kernel.upgrade().map(Kernel) else {
            return;
        };
        let known = kernel.0.places.all();
        if known.is_empty() {
            continue;
        }
        match mounted(&known) {
            Ok(found) => {
                for (attachment, place) in known.iter().zip(found) {
                    if place.is_none() {
                        kernel.note_gone(attachment);
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "cannot read the mount table"),
        }
    }
}
