//! The tree of names as operations on inodes: what the kernel asks and what it is answered, without a FUSE type in sight,
//! so that all of it is tested without a kernel.
//!
//! Two kinds of inodes ([`ino`]): the tree of names ([`nodes`], [`names`], [`own`], [`state`]), whose inodes live in memory
//! while the kernel holds them, and the inside of merged trees ([`slots`], [`merged`]), whose inodes cost nothing and wait for
//! contents only, once their tree is open ([`pending`]). Each wait has a deadline.

mod ahead;
mod blob;
mod cover;
pub mod devices;
mod grammar;
mod hosts;
mod ino;
pub mod journal;
mod listings;
mod merged;
mod names;
mod nodes;
pub mod ops;
mod own;
mod pending;
mod privacy;
mod root;
mod slots;
mod state;

use std::fmt;
use std::future::Future;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::config::BackgroundMode;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::single_flight::SingleFlight;
use crate::fs::blob::Streams;
use crate::fs::cover::Coverings;
pub use crate::fs::cover::{CoveredRoot, Covers, Work};
use crate::fs::hosts::Hosts;
use crate::fs::ino::{Place, place};
use crate::fs::journal::Journal;
use crate::fs::merged::no_attribute;
use crate::fs::nodes::{Kind, NameNode, Nodes};
use crate::fs::ops::{
    Answer, Attr, Caller, DirEntry, Entry, Expected, FOREVER, FileType, Lookup, Operations, ROOT_INO, Statfs,
};
pub use crate::fs::root::Root;
use crate::fs::root::Top;
use crate::fs::slots::{Held, Slots};
use crate::image::platform::Platform;
use crate::image::{Images, Rootfs};
use crate::layer::entry::Time;
use crate::registry::HostPatterns;
use crate::registry::reference::Repository;

/// The longest that a directory read or an attribute waits for the network: as a read of content.
const READDIR_WAIT: Duration = Duration::from_secs(60);
/// How long the kernel may keep the attributes of a directory whose listing changes.
const CHANGING_TTL: Duration = Duration::from_secs(1);
/// Tables of contents kept in memory for readers of `toc.json`.
const TOCS_MAX: usize = 2;

/// How a mount's tree behaves.
#[derive(Clone)]
pub struct Options {
    /// The platform whose images are shown.
    pub platform: Platform,
    /// Patterns (`*`: any text) of the registries that may be looked up; all if empty.
    pub allow: Vec<String>,
    /// Patterns of those that may not.
    pub deny: Vec<String>,
    /// Registries that the configuration names: they are listed, and open to all users.
    pub configured: Vec<String>,
    /// The mount's owner, to whom alone other registries are open.
    pub owner_uid: u32,
    /// Whether only the owner sees what needed credentials.
    pub hides_private: bool,
    /// The longest that a lookup waits for the network.
    pub lookup_wait: Duration,
    /// Failures kept for `.registryfs/errors`.
    pub journal_entries: usize,
    /// Mounts the kernel's own view over the root filesystems of this tree; none where it is not to.
    pub covers: Option<Arc<dyn Covers>>,
    /// Whether the rest of an image is brought once its root filesystem was touched.
    pub background: BackgroundMode,
    /// Makes the text of `.registryfs/status.json`.
    pub status: Arc<dyn Fn() -> String + Send + Sync>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("platform", &self.platform)
            .finish_non_exhaustive()
    }
}

/// Tables of contents for readers of `toc.json`, by the keys of their layers.
#[derive(Debug)]
struct Tocs {
    ready: Mutex<LruCache<Digest, Bytes>>,
    under_way: SingleFlight<(Repository, Digest), Bytes>,
}

/// The tree of one mount. A handle: clones are the same tree.
#[derive(Debug, Clone)]
pub struct Filesystem(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    images: Arc<Images>,
    options: Options,
    hosts: Hosts,
    nodes: Nodes,
    slots: Slots,
    /// Set before anyone gets the tree.
    top: OnceLock<Top>,
    journal: Journal,
    tocs: Tocs,
    streams: Arc<Streams>,
    coverings: Coverings,
    /// Lives as long as this tree: what is brought ahead for it ends with it.
    alive: Arc<()>,
    /// Shown as the time of what has none of its own.
    started: SystemTime,
}

impl Filesystem {
    /// A tree over `images` that shows `root`, which is resolved before this returns.
    ///
    /// # Errors
    /// [`Error::Denied`] for a registry that `allow` and `deny` leave out; all that keeps an image's root filesystem from
    /// being opened.
    pub async fn open(images: Arc<Images>, mut options: Options, root: &Root) -> Result<Self> {
        // Who mounts one registry means it for all who may enter the mount.
        options.configured.extend(root.host().map(str::to_owned));
        let filesystem = Self::new(images, options, root);
        filesystem.check_root(root)?;
        if let Root::Rootfs(reference) = root {
            let top = filesystem.open_top(reference).await?;
            filesystem.0.top.get_or_init(|| top);
        }
        Ok(filesystem)
    }

    fn new(images: Arc<Images>, options: Options, root: &Root) -> Self {
        let journal = Journal::new(options.journal_entries);
        let hosts = Hosts {
            allow: HostPatterns::new(&options.allow),
            deny: HostPatterns::new(&options.deny),
            configured: HostPatterns::new(&options.configured),
        };
        Self(Arc::new(Inner {
            images,
            options,
            hosts,
            nodes: Nodes::new(root.kind()),
            slots: Slots::default(),
            top: OnceLock::new(),
            journal,
            tocs: Tocs {
                ready: Mutex::new(LruCache::new(NonZeroUsize::MIN.saturating_add(TOCS_MAX - 1))),
                under_way: SingleFlight::default(),
            },
            streams: Arc::default(),
            coverings: Coverings::default(),
            alive: Arc::default(),
            started: SystemTime::now(),
        }))
    }

    /// The failed operations of this mount.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.0.journal
    }

    fn images(&self) -> &Arc<Images> {
        &self.0.images
    }

    fn options(&self) -> &Options {
        &self.0.options
    }

    fn hosts(&self) -> &Hosts {
        &self.0.hosts
    }

    fn nodes(&self) -> &Nodes {
        &self.0.nodes
    }

    fn top(&self) -> &Top {
        self.0.top.get().unwrap_or(&Top::Names)
    }

    fn slots(&self) -> &Slots {
        &self.0.slots
    }

    fn streams(&self) -> &Arc<Streams> {
        &self.0.streams
    }

    fn tocs(&self) -> &Tocs {
        &self.0.tocs
    }

    /// Notes that an image's root filesystem is seen here.
    fn touch(&self, rootfs: &Arc<Rootfs>) {
        let mount = Arc::downgrade(&self.0.alive);
        self.images().touched(rootfs, self.options().background, mount);
    }

    fn status_text(&self) -> String {
        (self.0.options.status)()
    }

    /// Work whose failure is written into the journal, under a path that is made only then.
    fn journaled<T: 'static>(
        &self,
        operation: &'static str,
        path: impl FnOnce() -> String + Send + 'static,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Answer<T> {
        let filesystem = self.clone();
        Answer::later(async move {
            let result = work.await;
            if let Err(error) = &result {
                filesystem.journal().record(operation, &path(), error);
            }
            result
        })
    }

    /// The attributes of a name inode.
    fn name_attr(&self, node: &NameNode) -> Attr {
        let (kind, size) = match &node.kind {
            Kind::Text(content) => (FileType::File, content.len() as u64),
            Kind::Config { size, .. } | Kind::Toc { size, .. } => (FileType::File, *size),
            Kind::Blob(blob) => (FileType::File, blob.size()),
            _ => (FileType::Dir, 4096),
        };
        Attr {
            ino: node.ino,
            size,
            blocks: size.div_ceil(512),
            mtime: to_time(self.name_mtime(node)),
            kind,
            mode: self.mode_of(node),
            nlink: if kind == FileType::Dir { 2 } else { 1 },
            uid: self.options().owner_uid,
            gid: 0,
            rdev: 0,
        }
    }

    /// The kernel keeps a directory's listing until its modification time changes. So a directory that is due to be listed
    /// anew says that it was changed just now.
    fn name_mtime(&self, node: &NameNode) -> SystemTime {
        if let Kind::Blob(blob) = &node.kind {
            return blob.changed().unwrap_or(self.0.started);
        }
        if !self.is_changing(node) {
            return self.0.started;
        }
        // What the kernel has of a listing that is not for all must be given by it to nobody.
        if self.is_owners_list(node) {
            return SystemTime::now();
        }
        let taken = node.listings.lock().taken();
        let ttl = self.images().resolver().tag_ttl();
        taken
            .filter(|taken| taken.elapsed().is_ok_and(|age| age < ttl))
            .unwrap_or_else(SystemTime::now)
    }

    fn name_attr_ttl(&self, node: &NameNode) -> Duration {
        match &node.kind {
            // Its modification time is asked for before each read, for the reason that is told there.
            Kind::Blob(_) => Duration::ZERO,
            // It may turn out to be open to all.
            _ if node.image().is_some_and(|at| at.privacy.is_hidden()) => CHANGING_TTL,
            _ if self.is_unsettled(node) => Duration::ZERO,
            _ if self.is_changing(node) => CHANGING_TTL,
            _ => FOREVER,
        }
    }

    /// Whether a directory's listing may change while it is held.
    fn is_changing(&self, node: &NameNode) -> bool {
        match &node.kind {
            Kind::Root | Kind::Registry { .. } => true,
            Kind::Bare(_) => node.image().is_none(),
            _ => false,
        }
    }
}

fn to_time(time: SystemTime) -> Time {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time {
        seconds: i64::try_from(since.as_secs()).unwrap_or(0),
        nanos: since.subsec_nanos(),
    }
}

/// Ends work that waits longer than `wait`.
async fn within<T>(
    wait: Duration,
    what: impl FnOnce() -> String,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::time::timeout(wait, work).await.unwrap_or_else(|_| {
        let waited_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        Err(Error::Timeout {
            what: what(),
            waited_ms,
        })
    })
}

impl Operations for Filesystem {
    fn lookup(&self, caller: Caller, parent: u64, name: &[u8]) -> Answer<Lookup> {
        match self.place(parent) {
            Place::Slot { slot, node } => self.lookup_in_tree(caller, slot, node, name),
            Place::Name => match self.nodes().get(parent) {
                Ok(dir) => self.lookup_name(caller, &dir, name),
                Err(error) => Answer::Now(Err(error)),
            },
        }
    }

    fn forget(&self, ino: u64, lookups: u64) {
        if ino == ROOT_INO {
            return;
        }
        match self.place(ino) {
            Place::Slot { slot, .. } => self.slots().forget(slot, lookups),
            Place::Name => self.nodes().forget(ino, lookups),
        }
    }

    fn getattr(&self, ino: u64) -> Answer<(Attr, Duration)> {
        match self.place(ino) {
            Place::Slot { slot, node } => self.in_tree("getattr", slot, move |_, slot| {
                let attr = || {
                    let node = slot.rootfs.tree().node(node)?;
                    slot.rootfs.vouch((slot.attr(&node), FOREVER))
                };
                Answer::Now(attr())
            }),
            Place::Name => {
                let node = self.nodes().get(ino);
                Answer::Now(node.map(|node| (self.name_attr(&node), self.name_attr_ttl(&node))))
            }
        }
    }

    fn readlink(&self, ino: u64) -> Answer<Vec<u8>> {
        match self.place(ino) {
            Place::Slot { slot, node } => self.in_tree("readlink", slot, move |_, slot| {
                let target = || {
                    let tree = slot.rootfs.tree();
                    slot.rootfs.vouch(tree.link(&tree.node(node)?)?.to_vec())
                };
                Answer::Now(target())
            }),
            Place::Name => Answer::Now(Err(Error::posix(format!("inode {ino:#x}"), libc::EINVAL))),
        }
    }

    fn read(&self, _caller: Caller, ino: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        match self.place(ino) {
            Place::Slot { slot, node } => self.in_tree("read", slot, move |filesystem, slot| {
                filesystem.read_merged(slot, node, offset, size as usize)
            }),
            Place::Name => match self.nodes().get(ino) {
                Ok(node) => self.read_own(&node, offset, size as usize),
                Err(error) => Answer::Now(Err(error)),
            },
        }
    }

    fn read_next(&self, ino: u64) -> Vec<Expected> {
        self.expected_after(ino)
    }

    fn hand_on(&self, expected: Expected, take: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.hand_on_merged(expected, take).unwrap_or(false)
    }

    fn readdir(&self, caller: Caller, ino: u64, offset: u64, limit: usize) -> Answer<Vec<DirEntry>> {
        match self.place(ino) {
            Place::Slot { slot, node } => self.in_tree("readdir", slot, move |filesystem, slot| {
                Answer::Now(filesystem.readdir_merged(slot, node, offset, limit))
            }),
            Place::Name => match self.nodes().get(ino) {
                Ok(dir) => self.readdir_name(caller, &dir, offset, limit),
                Err(error) => Answer::Now(Err(error)),
            },
        }
    }

    fn remember(&self, parent: u64, entry: &DirEntry) -> Option<Entry> {
        match self.place(parent) {
            Place::Slot { slot, .. } => {
                let (Ok(Held::Open(slot)), Place::Slot { node, .. }) =
                    (self.slots().held(slot), place(entry.ino))
                else {
                    return None;
                };
                Some(self.merged_entry(&slot, &slot.rootfs.tree().node(node).ok()?))
            }
            Place::Name => self.remember_name(&self.nodes().get(parent).ok()?, &entry.name),
        }
    }

    fn getxattr(&self, ino: u64, name: &[u8]) -> Answer<Vec<u8>> {
        match self.place(ino) {
            Place::Slot { slot, node } => {
                let name = name.to_vec();
                self.in_tree("getxattr", slot, move |filesystem, slot| {
                    filesystem.getxattr_merged(slot, node, &name)
                })
            }
            Place::Name => {
                let image = self.nodes().get(ino).map(|node| node.image());
                Answer::Now(match (image, name) {
                    (Ok(Some(image)), b"user.registryfs.digest") => {
                        Ok(image.digest().to_string().into_bytes())
                    }
                    (Ok(_), _) => Err(no_attribute(name)),
                    (Err(error), _) => Err(error),
                })
            }
        }
    }

    fn listxattr(&self, ino: u64) -> Answer<Vec<u8>> {
        match self.place(ino) {
            Place::Slot { slot, node } => self.in_tree("listxattr", slot, move |filesystem, slot| {
                Answer::Now(filesystem.listxattr_merged(slot, node))
            }),
            Place::Name => Answer::Now(Ok(Vec::new())),
        }
    }

    fn statfs(&self) -> Answer<Statfs> {
        let (inodes, bytes) = self.slots().totals();
        let files = inodes + self.nodes().len() as u64;
        Answer::Now(Ok(Statfs {
            blocks: bytes.div_ceil(4096),
            blocks_free: 0,
            files,
        }))
    }
}
