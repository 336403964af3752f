//! Reading a merged tree from its bytes, which are a cache from outside the process: every number in them is checked
//! where it is used, so a damaged file ends in an error and never in a panic or a loop.

use std::cmp::Ordering;
use std::ops::Deref;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::erofs::BLOCK_BYTES;
use crate::image::tree::format::{
    CRC_AT, DIRENT_BYTES, Detail, DirentRecord, HEADER_BYTES, Header, NODE_BYTES, NONE, NodeRecord,
};
use crate::image::tree::{ROOT, damaged};
use crate::layer::entry::{Kind, Time};
use crate::layer::xattrs;

/// An inode of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Its number: dense, from [`ROOT`], the same each time the image is merged.
    pub number: u32,
    /// The type, never [`Kind::Hardlink`].
    pub kind: Kind,
    /// Permission bits (0o7777); 0o777 for symlinks.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, within 1970 and 2262.
    pub mtime: Time,
    /// Size in bytes: of a file's content, of a symlink's target, of a directory as EROFS lays out its names, else 0.
    pub size: u64,
    /// Names of it in the tree; for a directory 2 and its subdirectories.
    pub nlink: u32,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// The directory of its first name (a directory has only one); the root's is the root.
    pub parent: u32,
    /// The layer that provides it, base 0: for a directory the one that gave it its attributes.
    pub layer: u16,
    /// The entry of that layer's index that it is made from: for a file, where its chunks are. None for a directory that
    /// no layer has an entry for.
    pub entry: Option<u32>,
    /// Number of names in a directory.
    pub child_count: u32,
    /// The first of them in the dirent section.
    first_child: u32,
    /// Place and length of a symlink's target in the string section.
    link: (u64, u16),
    /// Place and length in the xattr section.
    xattrs: (u32, u32),
    /// The dirent of its first name; [`NONE`] for the root.
    name: u32,
}

impl Node {
    fn from_record(number: u32, record: &NodeRecord) -> Self {
        let NodeRecord { kind, detail, .. } = *record;
        let of = |wanted: &[Kind]| {
            let detail = if wanted.contains(&kind) { detail } else { Detail(0) };
            (detail.0, detail.split())
        };
        let (_, (first_child, child_count)) = of(&[Kind::Dir]);
        let link_len = if kind == Kind::Symlink { record.link_len } else { 0 };
        Self {
            number,
            kind,
            mode: u32::from(record.mode),
            uid: record.uid,
            gid: record.gid,
            mtime: record.mtime,
            size: match kind {
                Kind::Dir => u64::from(record.dir_bytes),
                Kind::Symlink => u64::from(link_len),
                _ => of(&[Kind::File]).0,
            },
            nlink: record.nlink,
            rdev: of(&[Kind::Char, Kind::Block]).1,
            parent: record.parent,
            layer: record.layer,
            entry: Some(record.entry).filter(|&entry| entry != NONE),
            child_count,
            first_child,
            link: (of(&[Kind::Symlink]).0, link_len),
            xattrs: record.xattrs,
            name: record.name,
        }
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Dir
    }

    /// The number of a device as the kernel packs it (`new_encode_dev`): 12 bits of major, 20 of minor. 0 for what is no
    /// device.
    #[must_use]
    pub fn device_number(&self) -> u32 {
        let (major, minor) = self.rdev;
        (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
    }

    /// The space that it takes up in units of 512 bytes: as in EROFS, its size in whole blocks, whatever is a hole.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.size.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES / 512)
    }

    /// What tells its extended attributes from those of other inodes: equal ones are kept once. None without any.
    pub(in crate::image) fn xattr_place(&self) -> Option<(u32, u32)> {
        Some(self.xattrs).filter(|&(_, len)| len > 0)
    }
}

/// What the tree holds altogether, for statfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Number of inodes.
    pub nodes: u64,
    /// Sum of the sizes of all regular files in bytes, hard links counted once.
    pub bytes: u64,
}

/// A merged tree over its bytes, which may be a memory map.
#[derive(Debug)]
pub struct Tree<B> {
    bytes: B,
    header: Header,
}

impl<B: Deref<Target = [u8]>> Tree<B> {
    /// Checks header, section bounds and CRC, and that the tree was merged under `key`.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the bytes are no tree of this version, are damaged, or are of something else: the tree
    /// is to be merged anew.
    pub fn open(bytes: B, key: &Digest) -> Result<Self> {
        let (header, crc) = Header::read(&bytes)?;
        if header.key != *key {
            return Err(damaged("it is of another image"));
        }
        if crc32fast::hash(bytes.get(CRC_AT + 4..).unwrap_or_default()) != crc {
            return Err(damaged("wrong checksum"));
        }
        let tree = Self { bytes, header };
        if !tree.node(ROOT)?.is_dir() {
            return Err(damaged("its root is no directory"));
        }
        Ok(tree)
    }

    /// The bytes that the tree stands on.
    #[must_use]
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// The header, which differs where anything else in the tree does: it has a checksum of it.
    #[must_use]
    pub fn head(&self) -> &[u8] {
        self.bytes.get(..HEADER_BYTES).unwrap_or_default()
    }

    /// Size in bytes of all extended attributes, equal ones counted once.
    #[must_use]
    pub fn xattr_bytes(&self) -> u64 {
        self.header.xattr_bytes
    }

    /// Number of names, in all directories together.
    #[must_use]
    pub fn name_count(&self) -> u64 {
        self.header.dirents
    }

    /// Number of inodes.
    #[must_use]
    pub fn node_count(&self) -> u32 {
        self.header.nodes as u32
    }

    /// What the tree holds altogether.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            nodes: self.header.nodes,
            bytes: self.header.file_bytes,
        }
    }

    /// Size of the tree in bytes.
    #[must_use]
    pub fn tree_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Inode `number`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a number beyond the last inode and for a damaged tree, here and below.
    pub fn node(&self, number: u32) -> Result<Node> {
        if number >= self.node_count() {
            return Err(damaged("an inode number beyond the last"));
        }
        let start = Header::node_start(number);
        let record = self.bytes.get(start..start + NODE_BYTES);
        let record = record.ok_or_else(|| damaged("an inode beyond the end"))?;
        let node = Node::from_record(number, &NodeRecord::read(record)?);
        // Numbers that fall towards the root are what makes every way up end there.
        if node.parent >= number && number != ROOT {
            return Err(damaged("an inode above its parent"));
        }
        let children_end = u64::from(node.first_child) + u64::from(node.child_count);
        if children_end > self.header.dirents {
            return Err(damaged("names beyond their section"));
        }
        Ok(node)
    }

    /// The target of a symlink, verbatim; empty for anything else.
    ///
    /// # Errors
    /// As [`Self::node`].
    pub fn link(&self, node: &Node) -> Result<&[u8]> {
        self.string(node.link.0, node.link.1)
    }

    /// The inode that `name` is in directory `dir`, if it is there.
    ///
    /// # Errors
    /// `ENOTDIR` when `dir` is no directory; else as [`Self::node`].
    pub fn lookup(&self, dir: u32, name: &[u8]) -> Result<Option<u32>> {
        let dir = self.node(dir)?;
        if !dir.is_dir() {
            return Err(Error::posix(format!("inode {}", dir.number), libc::ENOTDIR));
        }
        let (mut low, mut high) = (0, dir.child_count);
        while low < high {
            let middle = low + (high - low) / 2;
            let position = dir.first_child + middle;
            let dirent = self.dirent(position)?;
            match self.string(u64::from(dirent.name.0), dirent.name.1)?.cmp(name) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return self.child(&dir, position).map(Some),
            }
        }
        Ok(None)
    }

    /// The name and the inode at `position` of a directory, sorted by name, from 0. None at and beyond its end, and for
    /// what is no directory.
    ///
    /// # Errors
    /// As [`Self::node`].
    pub fn child_at(&self, dir: &Node, position: u32) -> Result<Option<(&[u8], u32)>> {
        if position >= dir.child_count {
            return Ok(None);
        }
        let position = dir.first_child + position;
        let dirent = self.dirent(position)?;
        let name = self.string(u64::from(dirent.name.0), dirent.name.1)?;
        Ok(Some((name, self.child(dir, position)?)))
    }

    /// The extended attributes that the tree shows of an inode, name and value, sorted by name.
    ///
    /// # Errors
    /// As [`Self::node`].
    pub fn xattrs(&self, node: &Node) -> Result<Vec<(&[u8], &[u8])>> {
        let start = self.header.xattrs_start() + u64::from(node.xattrs.0);
        let end = start + u64::from(node.xattrs.1);
        let encoded = self.bytes.get(start as usize..end as usize);
        xattrs::decode(encoded.ok_or_else(|| damaged("xattrs beyond the end"))?)
    }

    /// A path from the root to an inode, without a leading slash: that of its first name, if it has several.
    ///
    /// # Errors
    /// As [`Self::node`].
    pub fn path_of(&self, number: u32) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut node = self.node(number)?;
        while node.number != ROOT {
            let dirent = self.dirent(node.name)?;
            names.push(self.string(u64::from(dirent.name.0), dirent.name.1)?);
            node = self.node(node.parent)?;
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    fn dirent(&self, position: u32) -> Result<DirentRecord> {
        if u64::from(position) >= self.header.dirents {
            return Err(damaged("a name beyond its section"));
        }
        let start = self.header.dirent_start(position);
        let record = self.bytes.get(start..start + DIRENT_BYTES);
        record
            .map(DirentRecord::read)
            .ok_or_else(|| damaged("a name beyond the end"))
    }

    /// The inode that the dirent at `position` names in `dir`. A directory is refused under any but its one name, and the
    /// root, whose parent is not below it, under any: so no damage makes a walk down go round.
    fn child(&self, dir: &Node, position: u32) -> Result<u32> {
        let child = self.node(self.dirent(position)?.node)?;
        if child.is_dir() && (child.parent != dir.number || child.name != position || child.number == ROOT) {
            return Err(damaged("a directory with two names"));
        }
        Ok(child.number)
    }

    fn string(&self, offset: u64, len: u16) -> Result<&[u8]> {
        let start = self.header.strings_start().saturating_add(offset);
        let end = start.saturating_add(u64::from(len));
        if end > self.header.xattrs_start() {
            return Err(damaged("a string beyond its section"));
        }
        let bytes = self.bytes.get(start as usize..end as usize);
        bytes.ok_or_else(|| damaged("a string beyond the end"))
    }
}
