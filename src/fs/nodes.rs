//! The inodes of the tree of names: registries, repositories, images and what images own, all that is not the inside of a
//! merged tree. Each lives as long as the kernel holds it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::blob::BlobReader;
use crate::fs::ino;
use crate::fs::ops::{DirEntry, ROOT_INO};
use crate::image::{Image, Named};

/// An image as it stands at a path: what its reference names, for good.
#[derive(Debug)]
pub(super) struct ImageAt {
    /// What the digest names: an image or an index.
    pub(super) named: Named,
    /// The image for the mount's platform (or of the platform directory), or why there is none.
    pub(super) image: Result<Arc<Image>>,
}

impl ImageAt {
    /// The digest that the reference names.
    pub(super) fn digest(&self) -> &Digest {
        match &self.named {
            Named::Image(image) => image.digest(),
            Named::Index(index) => &index.digest,
        }
    }
}

/// What a bare name turned out to be, for as long as someone holds it.
#[derive(Debug, Clone)]
pub(super) enum Bound {
    /// A tag.
    Image(Arc<ImageAt>),
    /// A repository, or a prefix of some.
    Repository,
}

/// A directory that was reached by a bare name.
#[derive(Debug)]
pub(super) struct BareName {
    /// The registry.
    pub(super) host: String,
    /// The path of the repository that the name is a tag of, if it is one; none right below the registry.
    pub(super) parent: Option<String>,
    /// The name.
    pub(super) name: String,
    /// What it turned out to be.
    pub(super) bound: Mutex<Option<Bound>>,
}

impl BareName {
    /// The repository path, if the name is a component of one.
    pub(super) fn path(&self) -> String {
        match &self.parent {
            Some(parent) => format!("{parent}/{}", self.name),
            None => self.name.clone(),
        }
    }

    /// What it turned out to be, so far.
    pub(super) fn bound(&self) -> Option<Bound> {
        self.bound.lock().clone()
    }
}

/// A file of one of an image's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LayerName {
    Fs,
    Blob,
    Digest,
    MediaType,
    Size,
    Format,
    Toc,
}

impl LayerName {
    pub(super) const ALL: [Self; 7] = [
        Self::Fs,
        Self::Blob,
        Self::Digest,
        Self::MediaType,
        Self::Size,
        Self::Format,
        Self::Toc,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fs => "fs",
            Self::Blob => "blob",
            Self::Digest => "digest",
            Self::MediaType => "media_type",
            Self::Size => "size",
            Self::Format => "format",
            Self::Toc => "toc.json",
        }
    }
}

/// What an inode of the tree of names is.
#[derive(Debug)]
pub(super) enum Kind {
    /// The root.
    Root,
    /// `.registryfs`.
    State,
    /// A registry.
    Registry { host: String },
    /// A name that may be a tag or a repository component.
    Bare(BareName),
    /// An image by a reference that can mean nothing else.
    Image(Arc<ImageAt>),
    /// `platforms`.
    Platforms(Arc<ImageAt>),
    /// `layers`.
    Layers(Arc<ImageAt>),
    /// `layers/N`.
    Layer { at: Arc<ImageAt>, number: usize },
    /// A file whose content is in memory.
    Text(Bytes),
    /// `config.json`, fetched when it is read.
    Config { at: Arc<ImageAt>, size: u64 },
    /// `layers/N/blob`.
    Blob(Arc<BlobReader>),
    /// `layers/N/toc.json`, fetched when it is read.
    Toc {
        at: Arc<ImageAt>,
        number: usize,
        size: u64,
    },
}

/// An inode of the tree of names.
#[derive(Debug)]
pub(super) struct NameNode {
    pub(super) ino: u64,
    pub(super) parent: u64,
    /// The path in the mount, without a leading slash.
    pub(super) path: String,
    pub(super) kind: Kind,
    /// What a reader of the directory is being given, page by page, and when it was asked for.
    pub(super) listing: Mutex<Option<Snapshot>>,
    lookups: AtomicU64,
}

/// A directory listing as it was when a reader began.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) entries: Arc<Vec<DirEntry>>,
    pub(super) taken: SystemTime,
}

impl NameNode {
    /// The path of a name in this directory.
    pub(super) fn child_path(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}/{name}", self.path)
        }
    }

    /// The image that this directory is, if it is one.
    pub(super) fn image(&self) -> Option<Arc<ImageAt>> {
        match &self.kind {
            Kind::Image(at) => Some(Arc::clone(at)),
            Kind::Bare(bare) => match bare.bound() {
                Some(Bound::Image(at)) => Some(at),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether it is a directory.
    pub(super) fn is_dir(&self) -> bool {
        !matches!(
            self.kind,
            Kind::Text(_) | Kind::Config { .. } | Kind::Blob(_) | Kind::Toc { .. }
        )
    }
}

/// The inodes that are held.
#[derive(Debug)]
struct Table {
    nodes: HashMap<u64, Arc<NameNode>>,
    /// By path, the numbers that are not the path's first choice. They outlive the inode that had that.
    displaced: HashMap<String, Vec<u64>>,
}

impl Table {
    /// The inodes whose number follows from `path` and `image`, the first choice first.
    fn of_path(&self, path: &str, image: Option<&Digest>) -> impl Iterator<Item = &Arc<NameNode>> {
        let first = std::iter::once(ino::of_name(path, image));
        let others = self.displaced.get(path).into_iter().flatten().copied();
        let held = first.chain(others).filter_map(|number| self.nodes.get(&number));
        held.filter(move |node| node.path == path)
    }
}

/// The table of name inodes.
#[derive(Debug)]
pub(super) struct Nodes {
    table: RwLock<Table>,
    /// Numbers for files that are made anew at each lookup.
    next_snapshot: AtomicU64,
}

/// `.registryfs` has a fixed number: the slot of the tree of names, which no merged tree uses.
pub(super) const STATE_INO: u64 = 2;
/// Snapshot files count up from here, below slot 1.
const FIRST_SNAPSHOT_INO: u64 = 16;

impl Nodes {
    /// The table with the root and `.registryfs` in it, which are held for good.
    pub(super) fn new() -> Self {
        let node = |ino, path: &str, kind| {
            let (path, listing, lookups) = (path.to_owned(), Mutex::default(), AtomicU64::new(1));
            (
                ino,
                Arc::new(NameNode {
                    ino,
                    parent: ROOT_INO,
                    path,
                    kind,
                    listing,
                    lookups,
                }),
            )
        };
        let fixed = [
            node(ROOT_INO, "", Kind::Root),
            node(STATE_INO, ".registryfs", Kind::State),
        ];
        let table = Table {
            nodes: fixed.into(),
            displaced: HashMap::new(),
        };
        Self {
            table: RwLock::new(table),
            next_snapshot: AtomicU64::new(FIRST_SNAPSHOT_INO),
        }
    }

    /// The inode with this number.
    pub(super) fn get(&self, ino: u64) -> Result<Arc<NameNode>> {
        let found = self.table.read().nodes.get(&ino).cloned();
        found.ok_or_else(|| Error::posix(format!("inode {ino:#x}"), libc::ESTALE))
    }

    /// The number that a name would have: for listings.
    pub(super) fn number_of(path: &str) -> u64 {
        ino::of_name(path, None)
    }

    /// The inodes that are held for a path: more than one when a tag has moved.
    pub(super) fn held(&self, path: &str) -> Vec<Arc<NameNode>> {
        self.table.read().of_path(path, None).cloned().collect()
    }

    /// Counts a lookup of `path` (with `image`, where what is there depends on an image) in directory `parent`: of the
    /// inode that is held already if `same` accepts it, else of a new one.
    ///
    /// A path whose inode is held but means something else by now (a tag that has moved) gets a number of its own.
    pub(super) fn count(
        &self,
        parent: u64,
        path: String,
        image: Option<&Digest>,
        same: impl Fn(&Kind) -> bool,
        kind: impl FnOnce() -> Kind,
    ) -> Arc<NameNode> {
        let mut table = self.table.write();
        let held = table
            .of_path(&path, image)
            .find(|held| held.parent == parent && same(&held.kind));
        if let Some(held) = held {
            held.lookups.fetch_add(1, Ordering::AcqRel);
            return Arc::clone(held);
        }
        let first_choice = ino::of_name(&path, image);
        let mut number = first_choice;
        // Held by another meaning of the path, or (once in 2^63) by another path.
        while table.nodes.contains_key(&number) {
            number = next_number(&path, number);
        }
        if number != first_choice {
            table.displaced.entry(path.clone()).or_default().push(number);
        }
        let (listing, lookups) = (Mutex::default(), AtomicU64::new(1));
        let node = Arc::new(NameNode {
            ino: number,
            parent,
            path,
            kind: kind(),
            listing,
            lookups,
        });
        table.nodes.insert(number, Arc::clone(&node));
        node
    }

    /// A file that is made anew at each lookup, counted once.
    pub(super) fn snapshot(&self, parent: u64, path: String, content: Bytes) -> Arc<NameNode> {
        let nodes = &mut self.table.write().nodes;
        // Slot 0 has 2^32 numbers; they are taken round and round.
        let number = loop {
            let next = self.next_snapshot.fetch_add(1, Ordering::Relaxed) & u64::from(u32::MAX);
            if next >= FIRST_SNAPSHOT_INO && !nodes.contains_key(&next) {
                break next;
            }
        };
        let (listing, lookups) = (Mutex::default(), AtomicU64::new(1));
        let kind = Kind::Text(content);
        let node = Arc::new(NameNode {
            ino: number,
            parent,
            path,
            kind,
            listing,
            lookups,
        });
        nodes.insert(number, Arc::clone(&node));
        node
    }

    /// Takes lookups back; an inode without any is forgotten.
    pub(super) fn forget(&self, ino: u64, lookups: u64) {
        if ino == ROOT_INO || ino == STATE_INO {
            return;
        }
        let mut table = self.table.write();
        let Some(node) = table.nodes.get(&ino) else { return };
        let take = |count: u64| Some(count.saturating_sub(lookups));
        let before = node
            .lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .unwrap_or(0);
        if before > lookups {
            return;
        }
        let Some(node) = table.nodes.remove(&ino) else {
            return;
        };
        if let Some(numbers) = table.displaced.get_mut(&node.path) {
            numbers.retain(|number| *number != ino);
            if numbers.is_empty() {
                table.displaced.remove(&node.path);
            }
        }
    }

    /// Number of inodes held.
    pub(super) fn len(&self) -> usize {
        self.table.read().nodes.len()
    }
}

/// The number to try for a path when another meaning of it, or another path, has `number`.
fn next_number(path: &str, number: u64) -> u64 {
    ino::of_name(path, Some(&Digest::of(&number.to_le_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &'static str) -> Kind {
        Kind::Text(Bytes::from_static(content.as_bytes()))
    }

    fn is(content: &'static str) -> impl Fn(&Kind) -> bool {
        move |kind| matches!(kind, Kind::Text(text) if text == content)
    }

    fn count(nodes: &Nodes, content: &'static str) -> u64 {
        let path = "host/a:1".to_owned();
        nodes
            .count(ROOT_INO, path, None, is(content), || text(content))
            .ino
    }

    #[test]
    fn a_new_meaning_of_a_path_stays_itself_when_the_old_one_is_forgotten() {
        let nodes = Nodes::new();
        let old = count(&nodes, "old");
        let new = count(&nodes, "new");
        assert_ne!(old, new);
        assert_eq!((count(&nodes, "old"), count(&nodes, "new")), (old, new));
        assert_eq!(nodes.held("host/a:1").len(), 2);
        nodes.forget(old, 2);
        assert_eq!(count(&nodes, "new"), new);
        assert_eq!(nodes.held("host/a:1").len(), 1);
        // The number is free again for what comes next.
        assert_eq!(count(&nodes, "newest"), old);
        nodes.forget(old, 1);
        nodes.forget(new, 3);
        assert_eq!(nodes.len(), 2, "the root and .registryfs");
        assert!(nodes.table.read().displaced.is_empty());
        assert!(nodes.get(new).is_err());
    }

    #[test]
    fn more_lookups_than_were_counted_are_taken_back_harmlessly() {
        let nodes = Nodes::new();
        let ino = count(&nodes, "x");
        nodes.forget(ino, u64::MAX);
        nodes.forget(ino, 1);
        nodes.forget(ROOT_INO, u64::MAX);
        assert_eq!(nodes.len(), 2);
    }
}
