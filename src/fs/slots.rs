//! Merged trees that the kernel holds inodes of, by slot. No inode of a tree costs memory here: a slot counts the lookups
//! of all its inodes together and lives as long as there are any.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, Result};
use crate::fs::ahead::Readers;
use crate::fs::ino::in_slot;
use crate::fs::ops::{Attr, FileType};
use crate::fs::pending::Pending;
use crate::image::Rootfs;
use crate::image::tree::Node;
use crate::layer::entry::Kind;

/// A merged tree under a slot number.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: u32,
    pub(super) rootfs: Arc<Rootfs>,
    /// For directories: the path at which the tree's root is seen, and the slot of the other inodes.
    pub(super) view: Option<View>,
    /// Who reads its files.
    pub(super) readers: Mutex<Readers>,
    lookups: AtomicU64,
}

/// What only the slot of a tree's directories has.
#[derive(Debug)]
pub(super) struct View {
    pub(super) path: String,
    pub(super) parent_ino: u64,
    pub(super) files: Arc<Slot>,
}

impl Slot {
    /// A slot for the inodes of a tree that are no directories.
    pub(super) fn files(number: u32, rootfs: Arc<Rootfs>) -> Arc<Self> {
        Arc::new(Self {
            number,
            rootfs,
            view: None,
            readers: Mutex::default(),
            lookups: AtomicU64::new(0),
        })
    }

    /// A slot for the directories of a tree as seen at `path`.
    pub(super) fn view(number: u32, path: String, parent_ino: u64, files: Arc<Self>) -> Arc<Self> {
        let rootfs = Arc::clone(&files.rootfs);
        let view = Some(View {
            path,
            parent_ino,
            files,
        });
        Arc::new(Self {
            number,
            rootfs,
            view,
            readers: Mutex::default(),
            lookups: AtomicU64::new(0),
        })
    }

    /// The slot that numbers an inode of this tree: this one for directories, the shared one for the rest.
    fn of(self: &Arc<Self>, node: &Node) -> &Arc<Self> {
        match &self.view {
            Some(view) if !node.is_dir() => &view.files,
            _ => self,
        }
    }

    /// The inode number of a node of this tree.
    pub(super) fn ino(self: &Arc<Self>, node: &Node) -> u64 {
        in_slot(self.of(node).number, node.number)
    }

    /// The attributes of a node of this tree.
    pub(super) fn attr(self: &Arc<Self>, node: &Node) -> Attr {
        Attr {
            ino: self.ino(node),
            size: node.size,
            blocks: node.sectors(),
            mtime: node.mtime,
            kind: file_type(node.kind),
            mode: (node.mode & 0o7777) as u16,
            nlink: node.nlink,
            uid: node.uid,
            gid: node.gid,
            rdev: node.device_number(),
        }
    }

    /// The path of a directory of this tree in the mount, for messages.
    pub(super) fn path_of(&self, node: u32) -> String {
        let inner = self.rootfs.tree().path_of(node).unwrap_or_default();
        let inner = String::from_utf8_lossy(&inner).into_owned();
        let inner = inner.trim_start_matches('/');
        match self.view.as_ref().map(|view| view.path.as_str()) {
            // A file's image is named beside it, and its path is that in the image.
            None => format!("/{inner}"),
            Some("") if inner.is_empty() => "/".to_owned(),
            Some("") => inner.to_owned(),
            Some(root) if inner.is_empty() => root.to_owned(),
            Some(root) => format!("{root}/{inner}"),
        }
    }
}

/// What the kernel holds inodes of.
#[derive(Debug, Clone)]
pub(super) enum Held {
    /// A tree.
    Open(Arc<Slot>),
    /// One that is to be opened; of it the kernel has the root only.
    Pending(Arc<Pending>),
}

impl Held {
    fn lookups(&self) -> &AtomicU64 {
        match self {
            Self::Open(slot) => &slot.lookups,
            Self::Pending(pending) => &pending.lookups,
        }
    }

    /// Puts an open tree in the place of one that is not, with the lookups counted so far. The table must be locked.
    fn opened(&mut self, slot: &Arc<Slot>) -> Arc<Slot> {
        if let Self::Pending(pending) = self {
            let counted = pending.lookups.load(Ordering::Acquire);
            slot.lookups.fetch_add(counted, Ordering::AcqRel);
            *self = Self::Open(Arc::clone(slot));
        }
        match self {
            Self::Open(held) => Arc::clone(held),
            Self::Pending(_) => Arc::clone(slot),
        }
    }
}

/// The table of slots.
#[derive(Debug, Default)]
pub(super) struct Slots(RwLock<HashMap<u32, Held>>);

impl Slots {
    /// What has this number, which the kernel holds inodes of.
    pub(super) fn held(&self, number: u32) -> Result<Held> {
        let found = self.0.read().get(&number).cloned();
        found.ok_or_else(|| Error::posix(format!("inode slot {number}"), libc::ESTALE))
    }

    /// Counts one lookup of a node as seen from `slot`.
    pub(super) fn count(&self, slot: &Arc<Slot>, node: &Node) {
        let slot = slot.of(node);
        if let Some(Held::Open(known)) = self.0.read().get(&slot.number) {
            known.lookups.fetch_add(1, Ordering::AcqRel);
            return;
        }
        let mut slots = self.0.write();
        let held = slots
            .entry(slot.number)
            .or_insert_with(|| Held::Open(Arc::clone(slot)));
        held.opened(slot).lookups.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts one lookup of the root of a tree that is not open. False, and none, if somebody opened it meanwhile.
    pub(super) fn count_pending(&self, pending: &Arc<Pending>) -> bool {
        let mut slots = self.0.write();
        let held = slots
            .entry(pending.number)
            .or_insert_with(|| Held::Pending(Arc::clone(pending)));
        let is_pending = matches!(held, Held::Pending(_));
        if is_pending {
            held.lookups().fetch_add(1, Ordering::AcqRel);
        }
        is_pending
    }

    /// Puts a tree that is open now in its place, if the kernel holds its root, and says which one to use.
    pub(super) fn open(&self, slot: Arc<Slot>) -> Arc<Slot> {
        match self.0.write().get_mut(&slot.number) {
            Some(held) => held.opened(&slot),
            None => slot,
        }
    }

    /// Takes lookups back; a slot without any is forgotten.
    pub(super) fn forget(&self, number: u32, lookups: u64) {
        let left = {
            let slots = self.0.read();
            let Some(held) = slots.get(&number) else { return };
            let take = |count: u64| Some(count.saturating_sub(lookups));
            let before = held
                .lookups()
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, take);
            before.unwrap_or(0).saturating_sub(lookups)
        };
        if left == 0 {
            let mut slots = self.0.write();
            if slots
                .get(&number)
                .is_some_and(|held| held.lookups().load(Ordering::Acquire) == 0)
            {
                slots.remove(&number);
            }
        }
    }

    /// Inodes and bytes of all trees that are held now.
    pub(super) fn totals(&self) -> (u64, u64) {
        let slots = self.0.read();
        let views = slots.values().filter_map(|held| match held {
            Held::Open(slot) if slot.view.is_some() => Some(slot),
            _ => None,
        });
        let totals = views.map(|slot| slot.rootfs.tree().totals());
        totals.fold((0, 0), |(nodes, bytes), totals| {
            (nodes + totals.nodes, bytes + totals.bytes)
        })
    }
}

/// The type that stat(2) shows.
pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Dir => FileType::Dir,
        Kind::File | Kind::Hardlink => FileType::File,
        Kind::Symlink => FileType::Symlink,
        Kind::Char => FileType::Char,
        Kind::Block => FileType::Block,
        Kind::Fifo => FileType::Fifo,
    }
}
