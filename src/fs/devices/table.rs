//! The files of the tree of devices, and who still needs them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::watch;

use super::super::ops::{Access, ROOT_INO};
use crate::fetch::device::DeviceAt;
use crate::image::reads::LayerReads;

/// What a file holds.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// A layer's data, and how the kernel is to read it.
    Layer(DeviceAt, Access, Option<LayerReads>),
    /// Nothing but zeros.
    Zeros,
    /// A pattern, of which the second block can be read once this is set.
    Probe(Arc<AtomicBool>),
    /// What nobody shows or has open any more.
    Gone,
}

/// How a file is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Use {
    shown: usize,
    open: u64,
    was_opened: bool,
}

impl Use {
    /// Whether it is not open, and was or will not be.
    pub(super) fn is_over(&self) -> bool {
        self.open == 0 && (self.was_opened || self.shown == 0)
    }

    fn is_needed(&self) -> bool {
        self.open > 0 || self.shown > 0
    }
}

/// A file.
#[derive(Debug)]
pub(super) struct File {
    name: String,
    /// Its size.
    pub(super) bytes: u64,
    /// What it holds by who shows it: equal bytes, which may come from several places.
    contents: Vec<(u64, Content)>,
    lookups: u64,
    usage: watch::Sender<Use>,
}

impl File {
    /// The records of all who show it.
    pub(super) fn reads(&self) -> Vec<LayerReads> {
        let of = |(_, content): &(u64, Content)| match content {
            Content::Layer(_, _, reads) => reads.clone(),
            _ => None,
        };
        self.contents.iter().filter_map(of).collect()
    }

    /// What it holds, as the one says who shows it last.
    pub(super) fn content(&self) -> Content {
        self.contents
            .last()
            .map_or(Content::Gone, |(_, content)| content.clone())
    }
}

/// All files by number and, those that are shown, by name.
#[derive(Debug)]
pub(super) struct Table {
    files: HashMap<u64, File>,
    by_name: HashMap<String, u64>,
    next_ino: u64,
    next_number: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            files: HashMap::new(),
            by_name: HashMap::new(),
            next_ino: ROOT_INO + 1,
            next_number: 0,
        }
    }
}

impl Table {
    /// A name that no file had or will have.
    pub(super) fn unique_name(&mut self, prefix: &str) -> String {
        self.next_number += 1;
        format!("{prefix}-{}", self.next_number)
    }

    /// Shows a file under `name`: its number, a number for [`Self::hide`], and how it is used. One that the kernel still
    /// knows is the same again.
    pub(super) fn show(
        &mut self,
        name: &str,
        bytes: u64,
        content: Content,
    ) -> (u64, u64, watch::Receiver<Use>) {
        self.next_number += 1;
        let number = self.next_number;
        let known = self.by_name.get(name).copied();
        let same = known.filter(|ino| self.files.get(ino).is_some_and(|file| file.bytes == bytes));
        let ino = same.unwrap_or_else(|| {
            let ino = self.next_ino;
            self.next_ino += 1;
            self.by_name.insert(name.to_owned(), ino);
            ino
        });
        let file = self.files.entry(ino).or_insert_with(|| File {
            name: name.to_owned(),
            bytes,
            contents: Vec::new(),
            lookups: 0,
            usage: watch::Sender::default(),
        });
        file.usage.send_modify(|usage| {
            if !usage.is_needed() {
                usage.was_opened = false;
            }
            usage.shown += 1;
        });
        file.contents.push((number, content));
        (ino, number, file.usage.subscribe())
    }

    /// Ends one showing of a file.
    pub(super) fn hide(&mut self, ino: u64, number: u64) {
        let Some(file) = self.files.get_mut(&ino) else {
            return;
        };
        // Who has it open goes on reading it from the last place it was shown from.
        if file.contents.len() > 1 || file.usage.borrow().open == 0 {
            file.contents.retain(|(shown, _)| *shown != number);
        }
        file.usage
            .send_modify(|usage| usage.shown = usage.shown.saturating_sub(1));
        self.clean_up(ino);
    }

    /// Counts a lookup of a file that is shown.
    pub(super) fn look_up<T>(&mut self, name: &[u8], answer: impl FnOnce(u64, &File) -> T) -> Option<T> {
        let ino = *self.by_name.get(std::str::from_utf8(name).ok()?)?;
        let file = self.files.get_mut(&ino)?;
        if file.usage.borrow().shown == 0 {
            return None;
        }
        file.lookups += 1;
        Some(answer(ino, file))
    }

    /// Takes lookups back.
    pub(super) fn forget(&mut self, ino: u64, lookups: u64) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.lookups = file.lookups.saturating_sub(lookups);
            self.clean_up(ino);
        }
    }

    /// A file by its number.
    pub(super) fn file(&self, ino: u64) -> Option<&File> {
        self.files.get(&ino)
    }

    /// Counts an open. How the file is to be read.
    pub(super) fn opened(&mut self, ino: u64) -> Access {
        let Some(file) = self.files.get(&ino) else {
            return Access::Cached;
        };
        file.usage.send_modify(|usage| {
            usage.open += 1;
            usage.was_opened = true;
        });
        match file.content() {
            Content::Layer(_, access, _) => access,
            _ => Access::Cached,
        }
    }

    /// Takes an open back.
    pub(super) fn closed(&mut self, ino: u64) {
        if let Some(file) = self.files.get(&ino) {
            file.usage
                .send_modify(|usage| usage.open = usage.open.saturating_sub(1));
            self.clean_up(ino);
        }
    }

    /// How many files there are, and their bytes.
    pub(super) fn totals(&self) -> (u64, u64) {
        let bytes = self
            .files
            .values()
            .map(|file| file.bytes)
            .fold(0, u64::saturating_add);
        (self.files.len() as u64, bytes)
    }

    /// Lets go of what nobody needs: the content first, and the number when the kernel has forgotten it.
    fn clean_up(&mut self, ino: u64) {
        let Some(file) = self.files.get_mut(&ino) else {
            return;
        };
        if file.usage.borrow().is_needed() {
            return;
        }
        file.contents.clear();
        if file.lookups == 0 {
            if self.by_name.get(&file.name) == Some(&ino) {
                self.by_name.remove(&file.name);
            }
            self.files.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_over(usage: &watch::Receiver<Use>) -> bool {
        // A file that is gone has no sender, and its last word stays.
        usage.borrow().is_over()
    }

    #[test]
    fn a_file_stays_while_it_is_shown_open_or_known() {
        let mut table = Table::default();
        let (ino, number, usage) = table.show("a", 4096, Content::Zeros);
        assert_eq!(table.look_up(b"a", |ino, _| ino), Some(ino));
        assert_eq!(table.look_up(b"b", |ino, _| ino), None);
        table.opened(ino);
        table.hide(ino, number);
        assert_eq!(table.look_up(b"a", |ino, _| ino), None, "nobody shows it");
        assert!(
            matches!(table.file(ino).unwrap().content(), Content::Zeros),
            "it is open"
        );
        assert!(!is_over(&usage));
        table.closed(ino);
        assert!(is_over(&usage));
        assert!(matches!(table.file(ino).unwrap().content(), Content::Gone));
        table.forget(ino, 1);
        assert!(table.file(ino).is_none());
        assert_eq!(table.totals(), (0, 0));
    }

    #[test]
    fn what_was_never_opened_is_over_when_nobody_shows_it() {
        let mut table = Table::default();
        let (ino, first, usage) = table.show("a", 4096, Content::Zeros);
        let (same, second, _) = table.show("a", 4096, Content::Zeros);
        assert_eq!(ino, same);
        table.hide(ino, first);
        assert!(!is_over(&usage));
        table.hide(ino, second);
        assert!(is_over(&usage) && table.file(ino).is_none());
    }

    #[test]
    fn a_number_is_never_given_again_and_a_known_file_keeps_its_own() {
        let mut table = Table::default();
        let (first, number, _) = table.show("a", 4096, Content::Zeros);
        table.hide(first, number);
        let (second, number, _) = table.show("a", 4096, Content::Zeros);
        assert_ne!(first, second);
        table.look_up(b"a", |_, _| ());
        table.hide(second, number);
        let (again, _, usage) = table.show("a", 4096, Content::Zeros);
        assert_eq!(second, again, "the kernel knows it still");
        assert!(!is_over(&usage));
        let (other, ..) = table.show("a", 8192, Content::Zeros);
        assert_ne!(other, again, "another size is another file");
    }

    #[test]
    fn the_content_is_that_of_the_one_who_showed_it_last() {
        let mut table = Table::default();
        let (ino, first, _) = table.show("a", 4096, Content::Zeros);
        let (_, second, _) = table.show("a", 4096, Content::Probe(Arc::default()));
        table.opened(ino);
        assert!(matches!(table.file(ino).unwrap().content(), Content::Probe(_)));
        table.hide(ino, second);
        assert!(matches!(table.file(ino).unwrap().content(), Content::Zeros));
        table.hide(ino, first);
        assert!(
            matches!(table.file(ino).unwrap().content(), Content::Zeros),
            "it is open"
        );
    }

    #[test]
    fn opens_and_closes_of_what_is_not_there_change_nothing() {
        let mut table = Table::default();
        table.opened(7);
        table.closed(7);
        table.forget(7, 3);
        table.hide(7, 1);
        let (ino, _, usage) = table.show("a", 1, Content::Zeros);
        table.closed(ino);
        assert!(!is_over(&usage), "it was never open");
    }
}
