//! Adding a layer to the tree: its entries in the order of its tar, then its hard links.

use std::ops::Deref;

use crate::error::{Error, Result};
use crate::image::tree::Whiteouts;
use crate::image::tree::arena::{Arena, Made};
use crate::image::tree::format::NONE;
use crate::image::tree::walk::{Step, Walk};
use crate::image::tree::warnings::Warnings;
use crate::image::tree::whiteouts::{PSEUDO_LINKS, Role, role, split};
use crate::layer::entry::Kind;
use crate::layer::index::{EntryRef, Index};
use crate::layer::index_builder::NAME_BYTES_MAX;

/// What a hard link's `slot` says while its target is being looked for.
const SEEKING: u32 = NONE - 1;

/// How many components symlink targets may add to the paths of an image: enough for any that was meant.
fn link_steps_max(entries: u64) -> u64 {
    1_000_000 + 16 * entries
}

/// Merges layers one after the other.
#[derive(Debug)]
pub(super) struct Merger<'a, B> {
    layers: &'a [&'a Index<B>],
    whiteouts: Whiteouts,
    pub(super) arena: Arena<'a>,
    warnings: Warnings,
    /// The parent path of the last entry and its directory: a tar mostly goes on in the same one.
    last_parent: Option<(&'a [u8], u32)>,
    link_steps_left: u64,
}

/// Why a hard link cannot be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unbound {
    Missing,
    Directory,
    Cycle,
}

impl<'a, B: Deref<Target = [u8]>> Merger<'a, B> {
    pub(super) fn new(layers: &'a [&'a Index<B>], whiteouts: Whiteouts) -> Self {
        let entries = layers.iter().map(|index| u64::from(index.entry_count())).sum();
        Self::over(layers, whiteouts, entries)
    }

    /// With an empty tree that has room for `entries`.
    fn over(layers: &'a [&'a Index<B>], whiteouts: Whiteouts, entries: u64) -> Self {
        Self {
            layers,
            whiteouts,
            arena: Arena::new(entries as usize),
            warnings: Warnings::default(),
            last_parent: None,
            link_steps_left: link_steps_max(entries),
        }
    }

    pub(super) fn into_parts(self) -> (Arena<'a>, Warnings) {
        (self.arena, self.warnings)
    }

    pub(super) fn index(&self, layer: u16) -> &'a Index<B> {
        self.layers[usize::from(layer)]
    }

    /// Adds the next layer.
    pub(super) fn layer(&mut self, layer: u16) -> Result<()> {
        if self.whiteouts == Whiteouts::Apply && layer > 0 {
            self.hide(layer)?;
        }
        self.add_all(layer)
    }

    /// What layer `layer` would be without those below.
    pub(super) fn alone(&self, layer: u16) -> Result<Arena<'a>> {
        let entries = u64::from(self.index(layer).entry_count());
        let mut merger = Self::over(self.layers, self.whiteouts, entries);
        merger.add_all(layer)?;
        Ok(merger.arena)
    }

    fn add_all(&mut self, layer: u16) -> Result<()> {
        // Which symlinks are followed depends on the layer.
        self.last_parent = None;
        let index = self.index(layer);
        let mut links = Vec::new();
        for number in 0..index.entry_count() {
            let entry = index.entry(number)?;
            if self.is_content(layer, &entry)
                && let Some(slot) = self.add(layer, number, &entry)?
                && entry.kind == Kind::Hardlink
            {
                links.push(slot);
            }
        }
        for slot in links {
            self.bind(slot)?;
        }
        // What hard links lead to is in the tree under their names.
        if self.whiteouts == Whiteouts::Apply
            && let Some(slot) = self.arena.find(self.arena.root(), PSEUDO_LINKS)
        {
            self.arena.link(slot, None);
        }
        Ok(())
    }

    /// Whether an entry is to be in the tree, by its name.
    fn is_content(&mut self, layer: u16, entry: &EntryRef<'a>) -> bool {
        let role = match self.whiteouts {
            Whiteouts::Apply => role(entry.path),
            Whiteouts::Show => Role::Content,
        };
        if role == Role::Senseless {
            let why = "is left out: a whiteout without a name, or below one";
            self.warnings.entry(layer, entry.path, why);
        }
        role == Role::Content || (role == Role::PseudoLink && entry.kind == Kind::File)
    }

    /// Adds one entry. Returns where, unless it is left out.
    fn add(&mut self, layer: u16, number: u32, entry: &EntryRef<'a>) -> Result<Option<u32>> {
        if entry.clamped {
            let why = "is held at the root, its name leads above";
            self.warnings.entry(layer, entry.path, why);
        }
        if entry.path.is_empty() {
            if entry.kind == Kind::Dir {
                self.arena.set_source(self.arena.root(), layer, number);
            } else {
                let why = "is left out: the root is a directory";
                self.warnings.entry(layer, entry.path, why);
            }
            return Ok(None);
        }
        let (parent, name) = split(entry.path);
        let Some(dir) = self.parent(layer, parent)? else {
            let why = "is left out: the symlinks to its directory have no end, or a name over 255 bytes";
            self.warnings.entry(layer, entry.path, why);
            return Ok(None);
        };
        let slot = self.arena.slot(dir, name)?;
        match self.arena.child(slot) {
            Some(child) if entry.kind == Kind::Dir && self.arena.node(child).kind == Kind::Dir => {
                self.arena.set_source(child, layer, number);
            }
            _ => drop(self.put(slot, layer, number, entry.kind)?),
        }
        Ok(Some(slot))
    }

    /// Makes an inode at `slot`, in place of whatever is there.
    fn put(&mut self, slot: u32, layer: u16, entry: u32, kind: Kind) -> Result<u32> {
        let replaced = self.arena.child(slot).map(|child| self.arena.node(child).kind);
        if matches!(replaced, Some(Kind::Dir | Kind::Symlink)) {
            self.last_parent = None;
        }
        let made = Made {
            entry,
            slot,
            layer,
            kind,
        };
        self.arena.put(slot, made)
    }

    /// The directory at `path` for an entry of `layer`, made where it is missing. None when the layer's symlinks never
    /// get there.
    fn parent(&mut self, layer: u16, path: &'a [u8]) -> Result<Option<u32>> {
        if let Some((last, dir)) = self.last_parent
            && last == path
        {
            return Ok(Some(dir));
        }
        let mut walk = Walk::new(path);
        let mut at = self.arena.root();
        while let Some(step) = walk.step() {
            let name = match step {
                Step::Stay => continue,
                Step::Up => {
                    at = self.arena.parent(at);
                    continue;
                }
                // Only a symlink's target can have one.
                Step::Name(name) if name.len() > NAME_BYTES_MAX => return Ok(None),
                Step::Name(name) => name,
            };
            let slot = self.arena.slot(at, name)?;
            let child = self.arena.child(slot);
            match child.map(|child| (child, self.arena.node(child))) {
                Some((child, made)) if made.kind == Kind::Dir => at = child,
                Some((_, made)) if made.kind == Kind::Symlink && made.layer == layer => {
                    let target = self.link_target(made)?;
                    if !walk.follow(target) {
                        return Ok(None);
                    }
                    if target.starts_with(b"/") {
                        at = self.arena.root();
                    }
                }
                _ => at = self.put(slot, layer, NONE, Kind::Dir)?,
            }
        }
        self.last_parent = Some((path, at));
        Ok(Some(at))
    }

    /// The target of a symlink that a walk is about to follow.
    pub(super) fn link_target(&mut self, made: Made) -> Result<&'a [u8]> {
        let target = self.index(made.layer).entry(made.entry)?.link;
        let steps = target.split(|&byte| byte == b'/').count() as u64;
        self.link_steps_left = self
            .link_steps_left
            .checked_sub(steps)
            .ok_or_else(|| Error::malformed("image", "its symlinks make its paths too long"))?;
        Ok(target)
    }

    /// Binds the hard link at `slot`, and those that it leads over, to an inode. Each is looked at once, however long
    /// the chains.
    fn bind(&mut self, slot: u32) -> Result<()> {
        let mut chain = Vec::new();
        let mut at = slot;
        let target = loop {
            let Some(child) = self.arena.child(at) else {
                break Err(Unbound::Missing);
            };
            let made = self.arena.node(child);
            match made.kind {
                Kind::Hardlink if made.slot == SEEKING => break Err(Unbound::Cycle),
                Kind::Hardlink => {}
                Kind::Dir => break Err(Unbound::Directory),
                _ => break Ok(child),
            }
            self.arena.set_slot(child, SEEKING);
            chain.push((at, made));
            let path = self.index(made.layer).entry(made.entry)?.link;
            match self.target(path)? {
                Some(next) => at = next,
                None => break Err(Unbound::Missing),
            }
        };
        for (slot, link) in chain {
            self.arena.link(slot, target.ok());
            self.warn_of_link(link, target)?;
        }
        Ok(())
    }

    /// The name at the cleaned path `path`, its parents' symlinks followed as in a chroot.
    fn target(&mut self, path: &'a [u8]) -> Result<Option<u32>> {
        let (parent, name) = split(path);
        let mut walk = Walk::new(parent);
        let mut at = self.arena.root();
        while let Some(step) = walk.step() {
            let name = match step {
                Step::Stay => continue,
                Step::Up => {
                    at = self.arena.parent(at);
                    continue;
                }
                Step::Name(name) => name,
            };
            let Some(child) = self.arena.lookup(at, name) else {
                return Ok(None);
            };
            let made = self.arena.node(child);
            match made.kind {
                Kind::Dir => at = child,
                Kind::Symlink => {
                    let target = self.link_target(made)?;
                    if !walk.follow(target) {
                        return Ok(None);
                    }
                    if target.starts_with(b"/") {
                        at = self.arena.root();
                    }
                }
                _ => return Ok(None),
            }
        }
        Ok(self.arena.find(at, name))
    }

    fn warn_of_link(&mut self, link: Made, target: std::result::Result<u32, Unbound>) -> Result<()> {
        let entry = self.index(link.layer).entry(link.entry)?;
        let why = match target {
            Ok(target) => {
                let target = self.arena.node(target);
                let target = self.index(target.layer).entry(target.entry)?;
                let attributes = |entry: &EntryRef<'_>| (entry.mode, entry.uid, entry.gid);
                if attributes(&entry) == attributes(&target) {
                    return Ok(());
                }
                "has other attributes than the file it is a hard link to, which count"
            }
            Err(Unbound::Missing) => "is left out: a hard link to what is not there",
            Err(Unbound::Directory) => "is left out: a hard link to a directory",
            Err(Unbound::Cycle) => "is left out: a hard link to itself",
        };
        self.warnings.entry(link.layer, entry.path, why);
        Ok(())
    }
}
