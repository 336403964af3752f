//! The inodes of the tree of names: registries, repositories, images and what images own, all that is not the inside of a
//! merged tree. Each lives as long as the kernel holds it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fs::blob::BlobReader;
use crate::fs::ino;
use crate::fs::listings::Listings;
use crate::fs::ops::ROOT_INO;
use crate::fs::privacy::Privacy;
use crate::image::{Image, Named};

/// An image as it stands at a path: what its reference names, for good.
#[derive(Debug)]
pub(super) struct ImageAt {
    /// What the digest names: an image or an index.
    pub(super) named: Named,
    /// The image for the mount's platform (or of the platform directory), or why there is none.
    pub(super) image: Result<Arc<Image>>,
    /// Whether it is for the mount's owner only.
    pub(super) privacy: Privacy,
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
    /// When it turned out to be an image.
    pub(super) bound_since: OnceLock<Instant>,
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
    /// The root of a mount that shows all registries.
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
    /// The directory that it was last looked up in: one of those that are held for the path above.
    parent: AtomicU64,
    /// The path in the mount, without a leading slash.
    pub(super) path: String,
    /// The image that what is here depends on, for an image's own names.
    image: Option<Digest>,
    pub(super) kind: Kind,
    /// What readers of the directory are being given, page by page.
    pub(super) listings: Mutex<Listings>,
    lookups: AtomicU64,
}

impl NameNode {
    /// An inode that was looked up once.
    fn new(ino: u64, parent: u64, path: String, image: Option<Digest>, kind: Kind) -> Arc<Self> {
        Arc::new(Self {
            ino,
            parent: AtomicU64::new(parent),
            path,
            image,
            kind,
            listings: Mutex::default(),
            lookups: AtomicU64::new(1),
        })
    }

    /// The directory above.
    pub(super) fn parent(&self) -> u64 {
        self.parent.load(Ordering::Acquire)
    }

    /// The path in the mount, for messages.
    pub(super) fn shown(&self) -> &str {
        match self.path.as_str() {
            "" => "/",
            path => path,
        }
    }

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

/// How well a held inode answers what is looked up now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Likeness {
    /// It means something else.
    Different,
    /// Nobody has found out yet what it is.
    Open,
    /// It means the same.
    Same,
}

/// The table of name inodes.
#[derive(Debug)]
pub(super) struct Nodes {
    table: RwLock<Table>,
    /// Numbers for files that are made anew at each lookup.
    next_snapshot: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    by_ino: HashMap<u64, Arc<NameNode>>,
    /// The numbers that are held for each path, oldest first. Snapshot files are not in it: none is found by its path.
    by_path: HashMap<String, Vec<u64>>,
}

impl Table {
    /// The inodes that are held for a path, oldest first.
    fn held<'a>(&'a self, path: &str) -> impl DoubleEndedIterator<Item = &'a Arc<NameNode>> {
        let numbers = self.by_path.get(path).map_or(&[][..], Vec::as_slice);
        numbers.iter().filter_map(|number| self.by_ino.get(number))
    }

    fn remove(&mut self, ino: u64) {
        let Some(node) = self.by_ino.remove(&ino) else {
            return;
        };
        if let Some(numbers) = self.by_path.get_mut(&node.path) {
            numbers.retain(|number| *number != ino);
            if numbers.is_empty() {
                self.by_path.remove(&node.path);
            }
        }
    }
}

/// `.registryfs` has a fixed number: the slot of the tree of names, which no merged tree uses.
pub(super) const STATE_INO: u64 = 2;
/// Snapshot files count up from here, below slot 1.
const FIRST_SNAPSHOT_INO: u64 = 16;

impl Nodes {
    /// The table with the root, which is `root`, and `.registryfs` in it, which are held for good.
    pub(super) fn new(root: Kind) -> Self {
        let fixed = [
            NameNode::new(ROOT_INO, ROOT_INO, String::new(), None, root),
            NameNode::new(STATE_INO, ROOT_INO, ".registryfs".to_owned(), None, Kind::State),
        ];
        let by_ino = fixed.map(|node| (node.ino, node)).into();
        let by_path = HashMap::new();
        Self {
            table: RwLock::new(Table { by_ino, by_path }),
            next_snapshot: AtomicU64::new(FIRST_SNAPSHOT_INO),
        }
    }

    /// The inode with this number.
    pub(super) fn get(&self, ino: u64) -> Result<Arc<NameNode>> {
        let found = self.table.read().by_ino.get(&ino).cloned();
        found.ok_or_else(|| Error::posix(format!("inode {ino:#x}"), libc::ESTALE))
    }

    /// The number that a name which depends on no image has, or would have: for listings.
    pub(super) fn number_of(&self, path: &str) -> u64 {
        let table = self.table.read();
        let newest = table.held(path).next_back();
        newest.map_or_else(|| ino::of_name(path, None), |node| node.ino)
    }

    /// The inodes that are held for a path: more than one when a tag has moved.
    pub(super) fn held(&self, path: &str) -> Vec<Arc<NameNode>> {
        self.table.read().held(path).cloned().collect()
    }

    /// Counts a lookup of `path` (with `image`, where what is there depends on an image) in directory `parent`: of the
    /// inode that is held already and most like it, the newest of several, else of a new one.
    ///
    /// A path whose inode is held but means something else by now (a tag that has moved) gets a number of its own. Below
    /// it, what means the same is the same inode as before, in whichever of the two it was found first: the kernel gives
    /// a directory one place, and moves it to where it was looked up last.
    pub(super) fn count(
        &self,
        parent: u64,
        path: String,
        image: Option<&Digest>,
        like: impl Fn(&Kind) -> Likeness,
        kind: impl FnOnce() -> Kind,
    ) -> Arc<NameNode> {
        let mut table = self.table.write();
        let alike = table
            .held(&path)
            .filter(|held| held.image.as_ref() == image)
            .map(|held| (like(&held.kind), held))
            .filter(|(likeness, _)| *likeness > Likeness::Different)
            .max_by_key(|(likeness, _)| *likeness);
        if let Some((_, held)) = alike {
            held.lookups.fetch_add(1, Ordering::AcqRel);
            held.parent.store(parent, Ordering::Release);
            return Arc::clone(held);
        }
        let mut number = ino::of_name(&path, image);
        // Held by another meaning of the path, or (once in 2^63) by another path.
        while table.by_ino.contains_key(&number) {
            number = next_number(&path, number);
        }
        let node = NameNode::new(number, parent, path.clone(), image.copied(), kind());
        table.by_ino.insert(number, Arc::clone(&node));
        table.by_path.entry(path).or_default().push(number);
        node
    }

    /// A file that is made anew at each lookup, counted once.
    pub(super) fn snapshot(&self, parent: u64, path: String, content: Bytes) -> Arc<NameNode> {
        let mut table = self.table.write();
        // Slot 0 has 2^32 numbers; they are taken round and round.
        let number = loop {
            let next = self.next_snapshot.fetch_add(1, Ordering::Relaxed) & u64::from(u32::MAX);
            if next >= FIRST_SNAPSHOT_INO && !table.by_ino.contains_key(&next) {
                break next;
            }
        };
        let node = NameNode::new(number, parent, path, None, Kind::Text(content));
        table.by_ino.insert(number, Arc::clone(&node));
        node
    }

    /// Takes lookups back; an inode without any is forgotten.
    pub(super) fn forget(&self, ino: u64, lookups: u64) {
        if ino == ROOT_INO || ino == STATE_INO {
            return;
        }
        let mut table = self.table.write();
        let Some(node) = table.by_ino.get(&ino) else {
            return;
        };
        let take = |count: u64| Some(count.saturating_sub(lookups));
        let before = node
            .lookups
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .unwrap_or(0);
        if before <= lookups {
            table.remove(ino);
        }
    }

    /// Number of inodes held.
    pub(super) fn len(&self) -> usize {
        self.table.read().by_ino.len()
    }
}

/// The number to try for a path when another meaning of it, or another path, has `number`.
fn next_number(path: &str, number: u64) -> u64 {
    ino::of_name(path, Some(&Digest::of(&number.to_le_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts a lookup of a text file, which stands for any inode: what it says is what it means.
    fn count(nodes: &Nodes, parent: u64, path: &str, text: &'static str) -> u64 {
        let same = |kind: &Kind| match kind {
            Kind::Text(held) if held == text => Likeness::Same,
            Kind::Text(held) if held.is_empty() => Likeness::Open,
            _ => Likeness::Different,
        };
        let kind = || Kind::Text(Bytes::from_static(text.as_bytes()));
        nodes.count(parent, path.to_owned(), None, same, kind).ino
    }

    fn held(nodes: &Nodes, path: &str) -> Vec<u64> {
        nodes.held(path).iter().map(|node| node.ino).collect()
    }

    #[test]
    fn a_meaning_of_a_path_is_one_inode_whatever_is_forgotten_before() {
        let nodes = Nodes::new(Kind::Root);
        let old = count(&nodes, ROOT_INO, "a", "old");
        let new = count(&nodes, ROOT_INO, "a", "new");
        assert_ne!(old, new);
        assert_eq!(held(&nodes, "a"), [old, new]);
        nodes.forget(old, 1);
        assert_eq!(held(&nodes, "a"), [new]);
        assert_eq!(nodes.number_of("a"), new);
        assert_eq!(count(&nodes, ROOT_INO, "a", "new"), new, "it is found again");
        nodes.forget(new, 2);
        assert_eq!(held(&nodes, "a"), [0; 0]);
        assert!(nodes.table.read().by_path.is_empty());
        assert_eq!(
            count(&nodes, ROOT_INO, "a", "new"),
            old,
            "the number is that of the path again"
        );
    }

    #[test]
    fn below_two_meanings_of_a_directory_the_same_is_one_inode() {
        let nodes = Nodes::new(Kind::Root);
        let (old, new) = (count(&nodes, 1, "a", "old"), count(&nodes, 1, "a", "new"));
        let below = count(&nodes, old, "a/b", "b");
        assert_eq!(count(&nodes, new, "a/b", "b"), below);
        assert_eq!(nodes.get(below).unwrap().parent(), new);
        nodes.forget(below, 1);
        assert_eq!(held(&nodes, "a/b"), [below]);
    }

    #[test]
    fn what_means_the_same_goes_before_what_is_open() {
        let nodes = Nodes::new(Kind::Root);
        let (same, open) = (count(&nodes, 1, "a", "x"), count(&nodes, 1, "a", ""));
        assert_eq!(count(&nodes, 1, "a", "x"), same);
        assert_eq!(count(&nodes, 1, "a", "y"), open);
    }

    #[test]
    fn more_lookups_than_were_counted_are_taken_back_harmlessly() {
        let nodes = Nodes::new(Kind::Root);
        let ino = count(&nodes, ROOT_INO, "a", "x");
        nodes.forget(ino, u64::MAX);
        nodes.forget(ino, 1);
        nodes.forget(ROOT_INO, u64::MAX);
        assert_eq!(nodes.len(), 2, "the root and .registryfs");
    }
}
