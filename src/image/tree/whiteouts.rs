//! Whiteouts: which names are markers, and what they hide in the tree of the layers below.

use std::ops::Deref;

use crate::error::Result;
use crate::image::tree::apply::Merger;
use crate::image::tree::arena::Arena;
use crate::image::tree::walk::{Step, Walk};
use crate::layer::entry::Kind;

const PREFIX: &[u8] = b".wh.";
/// Only this very name makes a directory opaque; a longer one is a whiteout of `.wh..opqSOMETHING`, or at the root AUFS' own.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS kept at the root of its layers for itself, and old images still have.
const AUFS: &[u8] = b".wh..wh.";
/// Where it kept files with several names: these are hard links to what is here.
pub(super) const PSEUDO_LINKS: &[u8] = b".wh..wh.plnk";

/// What an entry's name says that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role<'a> {
    /// To be shown.
    Content,
    /// It hides this name of the directory it is in.
    Hides(&'a [u8]),
    /// It hides all names of the directory it is in.
    Opaque,
    /// AUFS' own.
    Leftover,
    /// AUFS' own, and what hard links may lead to.
    PseudoLink,
    /// A whiteout of nothing, or something below a whiteout.
    Senseless,
}

/// Splits a cleaned path into directory and name; the root has neither.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&[], path),
    }
}

/// What the entry at a cleaned path is for.
pub(super) fn role(path: &[u8]) -> Role<'_> {
    let mut marked = path.split(|&byte| byte == b'/').enumerate();
    let Some((depth, first)) = marked.find(|(_, name)| name.starts_with(PREFIX)) else {
        return Role::Content;
    };
    if depth == 0 && first.starts_with(AUFS) && first != OPAQUE {
        let is_link = first == PSEUDO_LINKS && marked.next().is_some() && marked.next().is_none();
        return if is_link { Role::PseudoLink } else { Role::Leftover };
    }
    match first.strip_prefix(PREFIX) {
        _ if marked.next().is_some() => Role::Senseless,
        _ if first == OPAQUE => Role::Opaque,
        None | Some(b"") => Role::Senseless,
        Some(name) => Role::Hides(name),
    }
}

impl<'a, B: Deref<Target = [u8]>> Merger<'a, B> {
    /// Removes from the tree what layer `layer` hides of it.
    pub(super) fn hide(&mut self, layer: u16) -> Result<()> {
        let index = self.index(layer);
        let (mut markers, mut links) = (Vec::new(), false);
        for number in 0..index.entry_count() {
            let entry = index.entry(number)?;
            match role(entry.path) {
                Role::Hides(_) | Role::Opaque => markers.push(number),
                Role::Content => links |= entry.kind == Kind::Symlink,
                Role::Leftover | Role::PseudoLink | Role::Senseless => {}
            }
        }
        if markers.is_empty() {
            return Ok(());
        }
        // Only the layer's own symlinks may lead its markers elsewhere, and only unpacking tells what they are.
        let alone = if links { Some(self.alone(layer)?) } else { None };
        for number in markers {
            let path = index.entry(number)?.path;
            let Some(dir) = self.hidden_dir(alone.as_ref(), split(path).0)? else {
                continue;
            };
            if let Role::Hides(name) = role(path) {
                if let Some(slot) = self.arena.find(dir, name) {
                    self.arena.link(slot, None);
                }
            } else {
                self.arena.clear(dir)?;
            }
        }
        Ok(())
    }

    /// The directory of the layers below that a marker with the parent `path` is about, if they have it. `alone` is the
    /// marker's layer by itself.
    fn hidden_dir(&mut self, alone: Option<&Arena<'a>>, path: &'a [u8]) -> Result<Option<u32>> {
        let mut walk = Walk::new(path);
        // From the root down to where the walk is, in the layer itself and in those below; either may end before.
        let mut at = vec![(alone.map(Arena::root), Some(self.arena.root()))];
        while let Some(step) = walk.step() {
            let name = match step {
                Step::Stay => continue,
                Step::Up if at.len() > 1 => {
                    at.pop();
                    continue;
                }
                Step::Up => continue,
                Step::Name(name) => name,
            };
            let &(own, below) = at.last().unwrap_or(&(None, None));
            let own = alone.zip(own).and_then(|(alone, dir)| {
                let child = alone.lookup(dir, name)?;
                Some((child, alone.node(child)))
            });
            match own {
                Some((_, made)) if made.kind == Kind::Symlink => {
                    let target = self.link_target(made)?;
                    if !walk.follow(target) {
                        return Ok(None);
                    }
                    if target.starts_with(b"/") {
                        at.truncate(1);
                    }
                }
                _ => {
                    let below = below.and_then(|dir| self.arena.lookup(dir, name));
                    at.push((
                        own.filter(|(_, made)| made.kind == Kind::Dir)
                            .map(|(child, _)| child),
                        below.filter(|&child| self.arena.node(child).kind == Kind::Dir),
                    ));
                }
            }
        }
        Ok(at.last().and_then(|&(_, below)| below))
    }
}
