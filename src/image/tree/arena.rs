//! The tree while it is being merged: inodes and names in two vectors, found by number, and one hash table over the
//! names. Some 50 bytes an inode, so that a million of them stay well below what the finished tree takes.
//!
//! Nothing is ever freed: what is removed is only unlinked, its name kept for the next to come. So dropping a subtree
//! costs the same whatever is in it, and what nobody can reach any more is left behind when the tree is written.

use std::hash::{BuildHasher, RandomState};

use crate::error::Result;
use crate::image::tree::format::NONE;
use crate::image::tree::too_large;
use crate::layer::entry::Kind;

/// The most inodes that a merge may make, those dropped again included.
const NODES_MAX: usize = 32_000_000;

/// An inode being merged: its attributes stand in the layer index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Made {
    /// The entry it is made from, [`NONE`] for a directory without one.
    pub(super) entry: u32,
    /// The name that a directory stands under, [`NONE`] for the root. Of other inodes it says nothing.
    pub(super) slot: u32,
    /// The layer that made it or gave it its attributes.
    pub(super) layer: u16,
    /// The type. A hard link that is not bound yet is an inode of its own.
    pub(super) kind: Kind,
}

/// A name in a directory, and what it names at the moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slot<'a> {
    /// The directory's number.
    pub(super) dir: u32,
    /// The inode's number, [`NONE`] when the name is free.
    child: u32,
    pub(super) name: &'a [u8],
}

/// Inodes and names by number.
#[derive(Debug)]
pub(super) struct Arena<'a> {
    nodes: Vec<Made>,
    slots: Vec<Slot<'a>>,
    /// Numbers of slots by the hash of directory and name, open addressing; its length is a power of two.
    table: Vec<u32>,
    /// Keyed, so that no image can be made to collide.
    hasher: RandomState,
    root: u32,
}

impl<'a> Arena<'a> {
    /// A root without children, and room for `expected` inodes.
    pub(super) fn new(expected: usize) -> Self {
        let expected = expected.min(NODES_MAX);
        let mut nodes = Vec::with_capacity(expected + 1);
        nodes.push(Made {
            entry: NONE,
            slot: NONE,
            layer: 0,
            kind: Kind::Dir,
        });
        Self {
            nodes,
            slots: Vec::with_capacity(expected),
            table: vec![NONE; (expected + expected / 2).next_power_of_two().max(16)],
            hasher: RandomState::new(),
            root: 0,
        }
    }

    pub(super) fn root(&self) -> u32 {
        self.root
    }

    pub(super) fn node_count(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node(&self, number: u32) -> Made {
        self.nodes[number as usize]
    }

    pub(super) fn slots(&self) -> &[Slot<'a>] {
        &self.slots
    }

    /// What a name stands for.
    pub(super) fn child(&self, slot: u32) -> Option<u32> {
        self.slots[slot as usize].child()
    }

    /// The directory above a directory; the root's is the root.
    pub(super) fn parent(&self, dir: u32) -> u32 {
        match self.node(dir).slot {
            NONE => dir,
            slot => self.slots[slot as usize].dir,
        }
    }

    /// The slot of `name` in `dir`, if there ever was one.
    pub(super) fn find(&self, dir: u32, name: &[u8]) -> Option<u32> {
        match self.table[self.place(dir, name)] {
            NONE => None,
            slot => Some(slot),
        }
    }

    /// What `name` stands for in `dir`.
    pub(super) fn lookup(&self, dir: u32, name: &[u8]) -> Option<u32> {
        self.child(self.find(dir, name)?)
    }

    /// The slot of `name` in `dir`, made if there was none.
    pub(super) fn slot(&mut self, dir: u32, name: &'a [u8]) -> Result<u32> {
        let place = self.place(dir, name);
        if self.table[place] != NONE {
            return Ok(self.table[place]);
        }
        if self.slots.len() >= NODES_MAX {
            return Err(too_large("more than 32,000,000 names"));
        }
        let slot = self.slots.len() as u32;
        let child = NONE;
        self.slots.push(Slot { dir, child, name });
        self.table[place] = slot;
        // Probing stays short up to three quarters.
        if self.slots.len() > self.table.len() / 4 * 3 {
            self.grow();
        }
        Ok(slot)
    }

    /// Makes an inode and lets `slot` stand for it; whatever it stood for is unlinked.
    pub(super) fn put(&mut self, slot: u32, made: Made) -> Result<u32> {
        let number = self.make(Made { slot, ..made })?;
        self.link(slot, Some(number));
        Ok(number)
    }

    fn make(&mut self, made: Made) -> Result<u32> {
        if self.nodes.len() >= NODES_MAX {
            return Err(too_large("more than 32,000,000 inodes"));
        }
        self.nodes.push(made);
        Ok((self.nodes.len() - 1) as u32)
    }

    /// Lets `slot` stand for `child`, or for nothing.
    pub(super) fn link(&mut self, slot: u32, child: Option<u32>) {
        self.slots[slot as usize].child = child.unwrap_or(NONE);
    }

    /// Gives an inode the attributes of another entry.
    pub(super) fn set_source(&mut self, number: u32, layer: u16, entry: u32) {
        let node = &mut self.nodes[number as usize];
        (node.layer, node.entry) = (layer, entry);
    }

    /// Notes another slot with an inode that is no directory.
    pub(super) fn set_slot(&mut self, number: u32, slot: u32) {
        self.nodes[number as usize].slot = slot;
    }

    /// Takes all children from a directory, which gets another number by that.
    pub(super) fn clear(&mut self, dir: u32) -> Result<()> {
        let made = self.node(dir);
        let number = self.make(made)?;
        match made.slot {
            NONE => self.root = number,
            slot => self.link(slot, Some(number)),
        }
        Ok(())
    }

    /// Frees the hash table: nothing can be found by name any more.
    pub(super) fn freeze(&mut self) {
        self.table = Vec::new();
    }

    /// Where in the table a name stands or would stand. The table always has free places, so the search ends.
    fn place(&self, dir: u32, name: &[u8]) -> usize {
        let mask = self.table.len() - 1;
        let mut place = self.hasher.hash_one((dir, name)) as usize & mask;
        while let Some(slot) = self.slots.get(self.table[place] as usize) {
            if slot.dir == dir && slot.name == name {
                break;
            }
            place = (place + 1) & mask;
        }
        place
    }

    fn grow(&mut self) {
        self.table = vec![NONE; self.table.len() * 2];
        for number in 0..self.slots.len() {
            let Slot { dir, name, .. } = self.slots[number];
            let place = self.place(dir, name);
            self.table[place] = number as u32;
        }
    }
}

impl Slot<'_> {
    /// What it stands for.
    pub(super) fn child(&self) -> Option<u32> {
        Some(self.child).filter(|&child| child != NONE)
    }
}
