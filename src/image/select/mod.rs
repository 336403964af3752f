//! Which paths of a merged tree a set of patterns means.
//!
//! What is selected is always a part of the image's own tree: a path that leads through symlinks selects what it ends at,
//! under its real path, and the links on the way with it. So several patterns never contradict each other, and the
//! path that was asked for leads to the file in the copy as it does in the image.
//!
//! A directory is selected with all that is below it. A symlink that a pattern without wildcards names, or one with a
//! slash at its end, is followed; one that a wildcard meets is selected itself.

mod pattern;

use std::collections::{HashMap, HashSet};
use std::ops::Deref;

use crate::error::{Error, Result};
use crate::image::tree::{Node, ROOT, Tree};
use crate::layer::entry::Kind;

use pattern::Part;
pub use pattern::Pattern;

/// Directories nested deeper than this are refused, so that walking them is bounded by more than the image's word.
pub const DEPTH_MAX: usize = 1024;

/// What the patterns meant, taken together.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Directories with all that is below them, by inode number.
    whole: HashSet<u32>,
    /// Names that are no directories, by the directory that they are in.
    single: HashMap<u32, HashSet<Vec<u8>>>,
}

/// What one pattern meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matched {
    /// Whether it meant anything.
    pub any: bool,
    /// The regular file that it leads to, if it is without wildcards and leads to one.
    pub file: Option<u32>,
}

impl Selection {
    /// Adds what `pattern` means in `tree`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged tree; [`Error::Unsupported`] where it is nested too deep.
    pub fn add<B: Deref<Target = [u8]>>(&mut self, tree: &Tree<B>, pattern: &Pattern) -> Result<Matched> {
        let mut walk = Walk {
            tree,
            pattern,
            selection: self,
            known: HashMap::new(),
            file: None,
        };
        let any = walk.at(ROOT, 0)?;
        let file = walk.file.filter(|_| any && pattern.is_plain());
        Ok(Matched { any, file })
    }

    /// The selected names in the order of the tree, parents first, with the directories that lead to them.
    ///
    /// # Errors
    /// As [`Self::add`], and whatever `each` returns.
    pub fn each<B: Deref<Target = [u8]>>(
        &self,
        tree: &Tree<B>,
        mut each: impl FnMut(Selected<'_>) -> Result<()>,
    ) -> Result<()> {
        let needed = self.needed(tree)?;
        let mut path = Vec::new();
        // A directory, how long its path is, its depth, whether it is selected, and the next position in it.
        let mut open: Vec<(Node, usize, bool, u32)> = Vec::new();
        if !needed.contains(&ROOT) {
            return Ok(());
        }
        let whole = self.whole.contains(&ROOT);
        let root = tree.node(ROOT)?;
        each(Selected {
            path: &path,
            node: &root,
            is_passage: !whole,
        })?;
        open.push((root, 0, whole, 0));
        while let Some((dir, path_len, whole, position)) = open.last_mut() {
            path.truncate(*path_len);
            let Some((name, child)) = tree.child_at(dir, *position)? else {
                open.pop();
                continue;
            };
            *position += 1;
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            let whole = *whole || self.whole.contains(&child);
            let of_dir = dir.number;
            let child = tree.node(child)?;
            let is_selected = match child.is_dir() {
                true => whole || needed.contains(&child.number),
                false => whole || self.single.get(&of_dir).is_some_and(|names| names.contains(name)),
            };
            if !is_selected {
                continue;
            }
            each(Selected {
                path: &path,
                node: &child,
                is_passage: child.is_dir() && !whole,
            })?;
            if child.is_dir() {
                not_too_deep(open.len())?;
                open.push((child, path.len(), whole, 0));
            }
        }
        Ok(())
    }

    /// The directories that are selected or lead to what is.
    fn needed<B: Deref<Target = [u8]>>(&self, tree: &Tree<B>) -> Result<HashSet<u32>> {
        let mut needed = HashSet::new();
        for &selected in self.whole.iter().chain(self.single.keys()) {
            let mut dir = selected;
            while needed.insert(dir) {
                dir = tree.node(dir)?.parent;
            }
        }
        Ok(needed)
    }
}

/// A selected name.
#[derive(Debug)]
pub struct Selected<'a> {
    /// Its path from the root, without a slash at its beginning; empty for the root.
    pub path: &'a [u8],
    /// The inode.
    pub node: &'a Node,
    /// Whether it is a directory that is there only because it leads to something selected.
    pub is_passage: bool,
}

fn not_too_deep(depth: usize) -> Result<()> {
    if depth < DEPTH_MAX {
        return Ok(());
    }
    let why = format!("directories are nested more than {DEPTH_MAX} deep");
    Err(Error::unsupported("image", why))
}

/// One pattern on its way down a tree.
struct Walk<'a, B> {
    tree: &'a Tree<B>,
    pattern: &'a Pattern,
    selection: &'a mut Selection,
    /// Whether the rest of the pattern, from a component on, matches anything in a directory. Wildcards and links reach
    /// the same place in many ways; each is walked once.
    known: HashMap<(u32, usize), bool>,
    /// The regular file that was selected last.
    file: Option<u32>,
}

/// A name in a directory.
#[derive(Clone, Copy)]
struct Name<'a> {
    dir: u32,
    name: &'a [u8],
    /// The inode that it is of.
    number: u32,
}

impl<B: Deref<Target = [u8]>> Walk<'_, B> {
    /// Selects what the pattern's components from `part` on mean in directory `dir`; answers whether that is anything.
    fn at(&mut self, dir: u32, part: usize) -> Result<bool> {
        if let Some(&known) = self.known.get(&(dir, part)) {
            return Ok(known);
        }
        let (tree, pattern) = (self.tree, self.pattern);
        let is_last = part + 1 == pattern.parts.len();
        let found = match pattern.parts.get(part) {
            None => self.whole(dir),
            Some(Part::Up) => self.at(tree.node(dir)?.parent, part + 1)?,
            Some(Part::Name(name)) => match tree.lookup(dir, name)? {
                Some(number) => self.name(Name { dir, name, number }, part)?,
                None => false,
            },
            Some(Part::Any) if is_last => self.whole(dir),
            Some(Part::Any) => self.any(dir, part)?,
            Some(Part::Glob(glob)) => {
                let mut found = false;
                let node = tree.node(dir)?;
                for position in 0..node.child_count {
                    let child = tree.child_at(&node, position)?;
                    if let Some((name, number)) = child.filter(|(name, _)| Part::matches(glob, name)) {
                        found |= self.name(Name { dir, name, number }, part)?;
                    }
                }
                found
            }
        };
        self.known.insert((dir, part), found);
        Ok(found)
    }

    /// As [`Self::at`], for a component that stands for any number of directories: the rest is tried in `dir` and in every
    /// directory below it. Links are not followed.
    fn any(&mut self, dir: u32, part: usize) -> Result<bool> {
        let tree = self.tree;
        // Directories whose children are being tried: the next child's position, and whether anything was found.
        let mut open = vec![(tree.node(dir)?, 0, self.at(dir, part + 1)?)];
        let mut found_below = false;
        while let Some((dir, position, found)) = open.last_mut() {
            *found |= std::mem::take(&mut found_below);
            let Some((_, child)) = tree.child_at(dir, *position)? else {
                found_below = *found;
                self.known.insert((dir.number, part), found_below);
                open.pop();
                continue;
            };
            *position += 1;
            let child = tree.node(child)?;
            if !child.is_dir() {
                continue;
            }
            match self.known.get(&(child.number, part)) {
                Some(known) => found_below = *known,
                None => {
                    not_too_deep(open.len())?;
                    open.push((child, 0, self.at(child.number, part + 1)?));
                }
            }
        }
        Ok(found_below)
    }

    /// As [`Self::at`], for a name that component `part` matches.
    fn name(&mut self, at: Name<'_>, part: usize) -> Result<bool> {
        let node = self.tree.node(at.number)?;
        let is_last = part + 1 == self.pattern.parts.len();
        match node.kind {
            Kind::Dir => self.at(node.number, part + 1),
            Kind::Symlink if !is_last || self.pattern.wants_dir || self.pattern.is_plain() => {
                self.link(at, &node, part)
            }
            _ if is_last && !self.pattern.wants_dir => {
                self.single(at, &node);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// As [`Self::name`], for a symlink that is followed. If nothing is found where it leads to, it counts as itself.
    fn link(&mut self, at: Name<'_>, node: &Node, part: usize) -> Result<bool> {
        let mut passed = Vec::new();
        let end = self.tree.follow(at.dir, node, &mut |dir, name, number| {
            passed.push((dir, name.to_vec(), number));
        })?;
        let is_last = part + 1 == self.pattern.parts.len();
        let is_dir = match end {
            Some(end) => self.tree.node(end)?.is_dir(),
            None => false,
        };
        let found = match end {
            Some(end) if is_dir => self.at(end, part + 1)?,
            // What was passed last is where it ends.
            Some(_) => is_last && !self.pattern.wants_dir,
            None => false,
        };
        if found {
            for (dir, name, number) in passed {
                let name = Name {
                    dir,
                    name: &name,
                    number,
                };
                self.single(name, &self.tree.node(number)?);
            }
        }
        if found || (is_last && !self.pattern.wants_dir) {
            self.add(at);
            return Ok(true);
        }
        Ok(false)
    }

    fn whole(&mut self, dir: u32) -> bool {
        self.selection.whole.insert(dir);
        true
    }

    fn single(&mut self, at: Name<'_>, node: &Node) {
        self.add(at);
        if node.kind == Kind::File {
            self.file = Some(node.number);
        }
    }

    fn add(&mut self, at: Name<'_>) {
        self.selection
            .single
            .entry(at.dir)
            .or_default()
            .insert(at.name.to_vec());
    }
}

#[cfg(test)]
mod tests;
