//! Where each inode stands, before anything is written: a directory names inodes that come later.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::image::erofs::chunks::Chunks;
use crate::image::erofs::disk::{
    BLOCK_BYTES, CHUNK_BYTES, DEVICE_BYTES, DEVICES_AT, INODE_BYTES, ROOT_NID, SLOT_BYTES,
};
use crate::image::erofs::xattrs::{Refusal, Sets};
use crate::image::tree::{Node, Tree};
use crate::layer::entry::Kind;
use crate::layer::index::Index;

/// The longest target of a symlink: the kernel ends it in the first block.
const LINK_BYTES_MAX: u64 = BLOCK_BYTES - 1;

/// What an image is written from.
#[derive(Debug)]
pub(super) struct Source<'a, B, L> {
    pub(super) tree: &'a Tree<B>,
    pub(super) layers: &'a [&'a Index<L>],
}

impl<B: Deref<Target = [u8]>, L> Source<'_, B, L> {
    /// What is in the way of writing a node, with the node's path.
    pub(super) fn refused(&self, number: u32, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Damage(error) => error,
            Refusal::Beyond(why) => {
                let path = self.tree.path_of(number).unwrap_or_default();
                Error::unsupported(format!("/{}", String::from_utf8_lossy(&path)), why)
            }
        }
    }
}

/// What stands behind an inode and its attributes.
#[derive(Debug)]
pub(super) enum Content {
    Nothing,
    /// Of a directory or a symlink.
    Flat {
        /// Whole blocks elsewhere.
        blocks: u64,
        /// Bytes of the last, partial block where it stands behind the inode, else 0.
        tail_bytes: u64,
    },
    Chunks(Chunks),
}

/// An inode and all that belongs to it.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) xattr_bytes: u64,
    pub(super) content: Content,
}

impl Shape {
    /// The shape of a node. To be asked for in the order of the nodes.
    pub(super) fn of<B, L>(
        source: &Source<'_, B, L>,
        sets: &mut Sets,
        node: &Node,
    ) -> std::result::Result<Self, Refusal>
    where
        B: Deref<Target = [u8]>,
        L: Deref<Target = [u8]>,
    {
        let xattr_bytes = sets.body_bytes(source.tree, node)?;
        let content = match node.kind {
            Kind::Dir => flat(node.size, xattr_bytes),
            Kind::Symlink if node.size > LINK_BYTES_MAX => {
                return Err("a symbolic link target over 4095 bytes".into());
            }
            Kind::Symlink => flat(node.size, xattr_bytes),
            Kind::File if node.size > 0 => {
                let index = source.layers.get(usize::from(node.layer));
                let missing = || Error::malformed("merged tree", "a file of a layer that there is not");
                Content::Chunks(Chunks::of(index.ok_or_else(missing)?, node)?)
            }
            _ => Content::Nothing,
        };
        Ok(Self { xattr_bytes, content })
    }

    /// Where the inode starts if what is before it ends at `at`.
    fn start(&self, at: u64) -> u64 {
        let at = at.next_multiple_of(SLOT_BYTES);
        let in_one_block = match self.content {
            Content::Flat { tail_bytes, .. } if tail_bytes > 0 => self.end(0),
            _ => INODE_BYTES,
        };
        if at % BLOCK_BYTES + in_one_block > BLOCK_BYTES {
            at.next_multiple_of(BLOCK_BYTES)
        } else {
            at
        }
    }

    /// Where what belongs to it ends.
    fn end(&self, start: u64) -> u64 {
        let end = start + INODE_BYTES + self.xattr_bytes;
        match &self.content {
            Content::Nothing => end,
            Content::Flat { tail_bytes, .. } => end + tail_bytes,
            Content::Chunks(chunks) => end.next_multiple_of(CHUNK_BYTES) + chunks.table_bytes(),
        }
    }

    /// Number of blocks elsewhere.
    fn blocks(&self) -> u64 {
        match self.content {
            Content::Flat { blocks, .. } => blocks,
            _ => 0,
        }
    }
}

/// What is less than a block stands behind the inode where all of that is in one block: then the kernel has a symlink's
/// target with the inode.
fn flat(size: u64, xattr_bytes: u64) -> Content {
    let tail_bytes = size % BLOCK_BYTES;
    if tail_bytes > 0 && INODE_BYTES + xattr_bytes + tail_bytes <= BLOCK_BYTES {
        Content::Flat {
            blocks: size / BLOCK_BYTES,
            tail_bytes,
        }
    } else {
        Content::Flat {
            blocks: size.div_ceil(BLOCK_BYTES),
            tail_bytes: 0,
        }
    }
}

/// Where everything stands.
#[derive(Debug)]
pub(super) struct Layout {
    /// The slot of each node's inode, counted from the first inode block: what EROFS numbers it.
    slots: Vec<u32>,
    /// The first block of inodes.
    pub(super) inodes_block: u32,
    /// The first block of content.
    pub(super) content_block: u32,
    /// The first block of shared attributes.
    pub(super) xattrs_block: u32,
    /// Size of the image in blocks.
    pub(super) blocks: u32,
}

impl Layout {
    /// Lays out the nodes of a tree, in the order of their numbers, behind a table of so many devices.
    pub(super) fn of<B, L>(source: &Source<'_, B, L>, sets: &mut Sets, devices: u16) -> Result<Self>
    where
        B: Deref<Target = [u8]>,
        L: Deref<Target = [u8]>,
    {
        let too_large = || Error::unsupported("image", "its metadata is larger than an EROFS image can be");
        let mut slots = Vec::with_capacity(source.tree.node_count() as usize);
        let (mut at, mut content_blocks) = (ROOT_NID * SLOT_BYTES, 0);
        // Directories that share names, as only damage makes them, would be more together than the tree is.
        let mut names_left = source.tree.name_count();
        for number in 0..source.tree.node_count() {
            let node = source.tree.node(number)?;
            let shape = Shape::of(source, sets, &node).map_err(|why| source.refused(number, why))?;
            names_left = names_left
                .checked_sub(u64::from(node.child_count))
                .ok_or_else(|| Error::malformed("merged tree", "directories that share names"))?;
            let start = shape.start(at);
            slots.push(u32::try_from(start / SLOT_BYTES).map_err(|_| too_large())?);
            at = shape.end(start);
            content_blocks += shape.blocks();
        }
        let inodes_block = (DEVICES_AT + u64::from(devices) * DEVICE_BYTES).div_ceil(BLOCK_BYTES);
        let content_block = inodes_block + at.div_ceil(BLOCK_BYTES);
        let xattrs_block = content_block + content_blocks;
        let blocks = xattrs_block + sets.shared_bytes().div_ceil(BLOCK_BYTES);
        // The last number stands for no block.
        let blocks = u32::try_from(blocks).ok().filter(|&blocks| blocks < u32::MAX);
        Ok(Self {
            slots,
            inodes_block: inodes_block as u32,
            content_block: content_block as u32,
            xattrs_block: xattrs_block as u32,
            blocks: blocks.ok_or_else(too_large)?,
        })
    }

    /// What EROFS numbers a node.
    pub(super) fn nid(&self, number: u32) -> Result<u64> {
        let slot = self.slots.get(number as usize).copied();
        let beyond = || Error::malformed("merged tree", "an inode number beyond the last");
        slot.map(u64::from).ok_or_else(beyond)
    }

    /// Where a node's inode starts in the image, in bytes.
    pub(super) fn start(&self, number: u32) -> Result<u64> {
        Ok(u64::from(self.inodes_block) * BLOCK_BYTES + self.nid(number)? * SLOT_BYTES)
    }
}
