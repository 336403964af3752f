//! The order of a layer's entries when some files are to be prefetched: these first, in the order that was asked for. Pure.
//!
//! What is moved to the front must mean there what it means in its old place. Directories stand in front of what is in
//! them, a file in front of its hard links, and a whiteout of a name in front of the entry with that name, because engines
//! apply a layer entry by entry. Entries of one name keep their order, as the last of them wins.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layer::entry::{Entry, Kind, clean_path};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The files that are to be prefetched, in their order.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Each path in canonical form, and whether a layer has it.
    paths: Vec<(Vec<u8>, AtomicBool)>,
}

impl Wanted {
    /// The files with these paths, which are in canonical form.
    pub(super) fn new(paths: Vec<Vec<u8>>) -> Self {
        Self {
            paths: paths
                .into_iter()
                .map(|path| (path, AtomicBool::new(false)))
                .collect(),
        }
    }

    /// Those that no layer has had so far.
    pub(super) fn missing(&self) -> Vec<String> {
        let missing = self
            .paths
            .iter()
            .filter(|(_, found)| !found.load(Ordering::Relaxed));
        missing
            .map(|(path, _)| String::from_utf8_lossy(path).into_owned())
            .collect()
    }
}

/// An order of entries.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// The entries by their numbers.
    pub(super) entries: Vec<usize>,
    /// How many of them are to be prefetched.
    pub(super) prefetched: usize,
}

impl Order {
    /// The order of `entries` in which `wanted` come first, and notes which of them are there.
    pub(super) fn of<'a>(entries: impl Iterator<Item = &'a Entry>, wanted: Option<&Wanted>) -> Self {
        let entries: Vec<&Entry> = entries.collect();
        let Some(wanted) = wanted else {
            return Self {
                entries: (0..entries.len()).collect(),
                prefetched: 0,
            };
        };
        let mut mover = Mover::new(entries);
        for (path, found) in &wanted.paths {
            if mover.by_path.contains_key(path) {
                found.store(true, Ordering::Relaxed);
                mover.move_up(path);
            }
        }
        let prefetched = mover.order.len();
        let rest = (0..mover.entries.len()).filter(|number| !mover.is_moved(*number));
        let rest: Vec<usize> = rest.collect();
        mover.order.extend(rest);
        Self {
            entries: mover.order,
            prefetched,
        }
    }
}

struct Mover<'a> {
    entries: Vec<&'a Entry>,
    /// The entries of each canonical path, in their order.
    by_path: HashMap<Vec<u8>, Vec<usize>>,
    order: Vec<usize>,
    moved: Vec<bool>,
}

impl<'a> Mover<'a> {
    fn new(entries: Vec<&'a Entry>) -> Self {
        let mut by_path: HashMap<Vec<u8>, Vec<usize>> = HashMap::new();
        for (number, entry) in entries.iter().enumerate() {
            by_path
                .entry(clean_path(&entry.path).path)
                .or_default()
                .push(number);
        }
        Self {
            moved: vec![false; entries.len()],
            order: Vec::new(),
            entries,
            by_path,
        }
    }

    fn is_moved(&self, number: usize) -> bool {
        self.moved.get(number).copied().unwrap_or(true)
    }

    /// Moves the entries of `path` to the front, with all that must stand in front of them.
    fn move_up(&mut self, path: &[u8]) {
        // A chain of hard links is followed to its end first. One that is a circle has none, and stays.
        let mut chain = vec![path.to_vec()];
        let mut seen = HashSet::from([path.to_vec()]);
        while let Some(target) = chain.last().and_then(|path| self.link_of(path)) {
            if !seen.insert(target.clone()) {
                return;
            }
            chain.push(target);
        }
        if chain.iter().any(|path| !self.is_movable(path)) {
            return;
        }
        for path in chain.iter().rev() {
            self.put_parents(path);
            self.put(path, usize::MAX);
        }
    }

    /// The target of the hard link that `path` is, if the layer has it.
    fn link_of(&self, path: &[u8]) -> Option<Vec<u8>> {
        let number = self.by_path.get(path)?.last()?;
        let entry = self.entries.get(*number)?;
        let target = clean_path(&entry.link).path;
        (entry.kind == Kind::Hardlink && self.by_path.contains_key(&target)).then_some(target)
    }

    /// Whether it can be moved: it is a directory or has one entry only, and all above it that the layer has are
    /// directories. Of anything else the order in the layer may matter.
    fn is_movable(&self, path: &[u8]) -> bool {
        let kinds = |path: &[u8]| {
            let numbers = self.by_path.get(path).into_iter().flatten();
            numbers.filter_map(|number| Some(self.entries.get(*number)?.kind))
        };
        let is_one_thing = kinds(path).count() == 1 || kinds(path).all(|kind| kind == Kind::Dir);
        is_one_thing && parents(path).all(|parent| kinds(parent).all(|kind| kind == Kind::Dir))
    }

    /// Puts the directories above `path`, and the whiteouts in front of it that are about it or them.
    fn put_parents(&mut self, path: &[u8]) {
        let own = self
            .by_path
            .get(path)
            .and_then(|numbers| numbers.first().copied());
        let own = own.unwrap_or_default();
        let chain: Vec<Vec<u8>> = parents(path).map(<[u8]>::to_vec).collect();
        for parent in &chain {
            self.put(&whiteout(parent), own);
            self.put(parent, usize::MAX);
            self.put(&join(parent, OPAQUE), own);
        }
        self.put(&whiteout(path), own);
    }

    /// Puts the entries of a path that stand in front of entry `before`, unless they are put.
    fn put(&mut self, path: &[u8], before: usize) {
        let numbers = self.by_path.get(path).map(Vec::as_slice).unwrap_or_default();
        for &number in numbers.iter().filter(|number| **number < before) {
            if let Some(moved) = self.moved.get_mut(number).filter(|moved| !**moved) {
                *moved = true;
                self.order.push(number);
            }
        }
    }
}

/// The directories above a canonical path, the root first.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = path
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'/')
        .map(|(at, _)| at);
    let root = (!path.is_empty()).then_some(0);
    root.into_iter()
        .chain(ends)
        .map(|end| path.get(..end).unwrap_or_default())
}

/// The whiteout of the name at the end of a canonical path.
fn whiteout(path: &[u8]) -> Vec<u8> {
    let name_at = path.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
    let (dir, name) = path.split_at(name_at);
    [dir, WHITEOUT, name].concat()
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match dir {
        b"" => name.to_vec(),
        dir => [dir, b"/", name].concat(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(text: &str) -> Entry {
        match text.split_once(" => ") {
            Some((path, target)) => {
                let mut entry = Entry::new(path, Kind::Hardlink);
                entry.link = target.into();
                entry
            }
            None if text.ends_with('/') => Entry::new(text, Kind::Dir),
            None => Entry::new(text, Kind::File),
        }
    }

    /// The entries in their new order, `|` behind those that are to be prefetched; and what is missing.
    fn ordered(entries: &[&str], wanted: &[&str]) -> (String, Vec<String>) {
        let parsed: Vec<Entry> = entries.iter().map(|text| entry(text)).collect();
        let wanted = Wanted::new(wanted.iter().map(|path| path.as_bytes().to_vec()).collect());
        let order = Order::of(parsed.iter(), Some(&wanted));
        let (first, rest) = order.entries.split_at(order.prefetched);
        let text = |numbers: &[usize]| {
            let names: Vec<&str> = numbers.iter().map(|number| entries[*number]).collect();
            names.join(", ")
        };
        (format!("{} | {}", text(first), text(rest)), wanted.missing())
    }

    #[test]
    fn wanted_files_come_first_in_their_order_below_their_directories() {
        let (order, missing) = ordered(
            &["./", "a/", "a/x", "a/y", "b/", "b/c/", "b/c/z", "w"],
            &["b/c/z", "nope", "a/y", "b/c/z"],
        );
        assert_eq!(order, "./, b/, b/c/, b/c/z, a/, a/y | a/x, w");
        assert_eq!(missing, ["nope"]);
    }

    #[test]
    fn a_hard_link_follows_its_target() {
        let (order, missing) = ordered(&["l2 => ./l1", "l1 => d/f", "d/", "d/f", "e"], &["l2"]);
        assert_eq!(order, "d/, d/f, l1 => d/f, l2 => ./l1 | e");
        assert!(missing.is_empty());
        let (order, _) = ordered(&["e", "a => b", "b => a", "l => lower"], &["a", "l"]);
        assert_eq!(order, "l => lower | e, a => b, b => a");
    }

    #[test]
    fn whiteouts_stay_in_front_of_what_replaces_the_old() {
        let (order, _) = ordered(
            &[".wh.d", "d/", "d/.wh..wh..opq", "d/x", "d/.wh.f", "d/f"],
            &["d/f"],
        );
        assert_eq!(order, ".wh.d, d/, d/.wh..wh..opq, d/.wh.f, d/f | d/x");
        let (order, _) = ordered(&["e", "f", ".wh.f"], &["f"]);
        assert_eq!(order, "f | e, .wh.f");
    }

    #[test]
    fn names_that_are_two_things_stay_where_they_are() {
        let (order, missing) = ordered(&["e", "d", "d/", "d/f", "f", "f"], &["d/f", "d", "f"]);
        assert_eq!(order, " | e, d, d/, d/f, f, f");
        assert!(missing.is_empty());
    }

    #[test]
    fn without_a_list_nothing_moves() {
        let entries = [entry("b"), entry("a")];
        let order = Order::of(entries.iter(), None);
        assert_eq!(
            (order.entries.as_slice(), order.prefetched),
            ([0, 1].as_slice(), 0)
        );
    }

    proptest! {
        /// Whatever the layer: every entry is there once, entries of a name keep their order, and what was behind its
        /// directory or its target still is.
        #[test]
        fn an_order_loses_and_breaks_nothing(
            layer in prop::collection::vec("(\\.wh\\.)?[ab](/[ab]){0,2}(/| => [ab](/[ab])?)?", 0..12),
            wanted in prop::collection::vec("[ab](/[ab]){0,2}", 0..5),
        ) {
            let entries: Vec<Entry> = layer.iter().map(|text| entry(text)).collect();
            let wanted = Wanted::new(wanted.into_iter().map(String::into_bytes).collect());
            let order = Order::of(entries.iter(), Some(&wanted));
            let mut sorted = order.entries.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..entries.len()).collect::<Vec<_>>());
            let place = |number: usize| order.entries.iter().position(|&at| at == number).unwrap();
            let path = |number: usize| clean_path(&entries[number].path).path;
            // What is a whiteout by its name links to nothing.
            let is_link_to = |late: usize, early: usize| {
                let is_whiteout = path(late).rsplit(|&byte| byte == b'/').next().unwrap().starts_with(WHITEOUT);
                let is_link = entries[late].kind == Kind::Hardlink && !is_whiteout;
                is_link && clean_path(&entries[late].link).path == path(early)
            };
            for early in 0..entries.len() {
                for late in early + 1..entries.len() {
                    let keeps = path(early) == path(late)
                        || parents(&path(late)).any(|parent| parent == path(early))
                        || is_link_to(late, early);
                    if keeps && entries[early].kind != Kind::Hardlink {
                        prop_assert!(place(early) < place(late), "{} {}", layer[early], layer[late]);
                    }
                }
            }
        }
    }
}
