//! Which files the readers of a merged tree will probably read next.
//!
//! Who reads many files of a tree (`tar`, `grep -r`, `diff -r`, `cp -r`) reads them in the order of its listings, which is
//! the order of its inodes' numbers. After a few files that order is known, and small files that follow can be handed to
//! the kernel before they are asked for: a file of a few KiB costs less than the question for it, which two threads wait
//! for. Only files of directories that were listed are inodes that the kernel knows, so what is expected ends at the next
//! directory.

use std::sync::Arc;

use crate::fs::Filesystem;
use crate::fs::ino::{Place, in_slot, place};
use crate::fs::ops::Expected;
use crate::fs::slots::{Held, Slot};
use crate::layer::entry::Kind;

/// So many times a reader goes on before anything is expected: a program that reads some files of a directory is none, and
/// what is handed on counts as read (`image/reads.rs`).
const STEPS_MIN: u32 = 4;
/// How many inodes are expected first.
const WINDOW_MIN: u32 = 4;
/// The most that are expected at once.
const WINDOW_MAX: u32 = 64;
/// The most bytes of them.
const BYTES_MAX: u64 = 1 << 20;
/// A larger file has read-ahead of its own.
const FILE_BYTES_MAX: u64 = 128 << 10;
/// A reader skips so many inodes and still goes on.
const SKIP_MAX: u32 = 64;
/// The most readers told apart in one tree.
const READERS_MAX: usize = 8;

/// One reader.
#[derive(Debug, Clone, Copy)]
struct Reader {
    /// The inode that it read last.
    last: u32,
    /// The inode behind those that were expected of it.
    end: u32,
    /// How often it went on.
    steps: u32,
    /// How many were expected last.
    window: u32,
    /// When it was last seen, in observations.
    seen: u64,
}

/// The readers of one tree.
#[derive(Debug, Default)]
pub(super) struct Readers {
    readers: Vec<Reader>,
    now: u64,
}

impl Readers {
    /// Somebody asks for the start of file `number`. How many inodes behind it to expect, none if it is not a reader who
    /// goes on, or those that come next were expected before.
    fn observe(&mut self, number: u32) -> u32 {
        self.now += 1;
        let now = self.now;
        let goes_on = |reader: &&mut Reader| {
            let furthest = reader.end.max(reader.last).saturating_add(SKIP_MAX);
            reader.last < number && number <= furthest
        };
        if let Some(reader) = self.readers.iter_mut().find(goes_on) {
            (reader.last, reader.seen) = (number, now);
            reader.steps = reader.steps.saturating_add(1);
            if number < reader.end || reader.steps < STEPS_MIN {
                return 0;
            }
            reader.window = (reader.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
            return reader.window;
        }
        let reader = Reader {
            last: number,
            end: number,
            steps: 0,
            window: 0,
            seen: now,
        };
        let full = self.readers.len() >= READERS_MAX;
        match self.readers.iter_mut().min_by_key(|reader| reader.seen) {
            Some(oldest) if full => *oldest = reader,
            _ => self.readers.push(reader),
        }
        0
    }

    /// The inodes up to `end` are expected of the reader who asked for `number` last.
    fn expect(&mut self, number: u32, end: u32) {
        if let Some(reader) = self.readers.iter_mut().find(|reader| reader.last == number) {
            reader.end = end;
        }
    }
}

impl Filesystem {
    /// See [`Operations::read_next`](crate::fs::ops::Operations::read_next).
    pub(super) fn expected_after(&self, ino: u64) -> Vec<Expected> {
        let Place::Slot { slot, node } = place(ino) else {
            return Vec::new();
        };
        let Ok(Held::Open(slot)) = self.slots().held(slot) else {
            return Vec::new();
        };
        let window = slot.readers.lock().observe(node);
        if window == 0 {
            return Vec::new();
        }
        let (end, expected) = expected(&slot, node, window);
        slot.readers.lock().expect(node, end);
        expected
    }

    /// See [`Operations::hand_on`](crate::fs::ops::Operations::hand_on). `None` where the content is not at hand.
    pub(super) fn hand_on_merged(
        &self,
        expected: Expected,
        take: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Option<bool> {
        let Place::Slot { slot, node } = place(expected.ino) else {
            return None;
        };
        let Ok(Held::Open(slot)) = self.slots().held(slot) else {
            return None;
        };
        let rootfs = &slot.rootfs;
        let node = rootfs
            .tree()
            .node(node)
            .and_then(|node| rootfs.vouch(node))
            .ok()?;
        let at = rootfs.file_now(&node)?;
        let bytes = expected.bytes as usize;
        let content = self.images().fetcher().read_now(&at, 0, bytes)?;
        // Less than all of it would be taken for all of it.
        let is_taken = content.len() == bytes && take(&content);
        if is_taken {
            rootfs.note_read(&node, &at);
        }
        Some(is_taken)
    }
}

/// What of the `window` inodes behind `number` are small files with content, and the first inode that the reader will ask for
/// himself.
fn expected(slot: &Arc<Slot>, number: u32, window: u32) -> (u32, Vec<Expected>) {
    let (mut found, mut bytes) = (Vec::new(), 0_u64);
    let mut next = number.saturating_add(1);
    let end = next.saturating_add(window);
    while next < end {
        let Ok(node) = slot.rootfs.tree().node(next) else {
            break;
        };
        bytes = bytes.saturating_add(node.size);
        if node.is_dir() || node.size > FILE_BYTES_MAX || bytes > BYTES_MAX {
            break;
        }
        if node.size > 0 && node.kind == Kind::File {
            found.push(Expected {
                ino: in_slot(slot.number, next),
                bytes: node.size as u32,
            });
        }
        next += 1;
    }
    (next, found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The questions of a reader of all inodes in order, where all that is expected is at hand.
    fn asked(readers: &mut Readers, inodes: std::ops::Range<u32>) -> Vec<u32> {
        let (mut asked, mut known) = (Vec::new(), inodes.start);
        for number in inodes {
            if number < known {
                continue;
            }
            asked.push(number);
            let window = readers.observe(number);
            if window > 0 {
                known = number + 1 + window;
                readers.expect(number, known);
            }
        }
        asked
    }

    #[test]
    fn a_reader_in_order_soon_asks_for_few() {
        let asked = asked(&mut Readers::default(), 10..10_010);
        assert_eq!(asked[..7], [10, 11, 12, 13, 14, 19, 28], "windows of 4, 8, 16, …");
        assert!(asked.len() < 10_000 / WINDOW_MAX as usize + 10, "{}", asked.len());
    }

    #[test]
    fn single_files_far_apart_lead_to_nothing() {
        let mut readers = Readers::default();
        let step = SKIP_MAX + 1;
        assert!((0..1000).all(|file| readers.observe(file * step) == 0));
        assert_eq!(readers.readers.len(), READERS_MAX);
    }

    #[test]
    fn what_was_expected_and_is_asked_for_all_the_same_is_not_expected_again() {
        let mut readers = Readers::default();
        assert!((1..=STEPS_MIN).all(|number| readers.observe(number) == 0));
        assert_eq!(readers.observe(STEPS_MIN + 1), WINDOW_MIN);
        readers.expect(STEPS_MIN + 1, 10);
        assert!((STEPS_MIN + 2..10).all(|number| readers.observe(number) == 0));
        assert_eq!(readers.observe(10), 2 * WINDOW_MIN);
    }

    #[test]
    fn readers_side_by_side_are_told_apart() {
        let mut readers = Readers::default();
        for step in 0..10 {
            for base in [0, 1 << 20, 1 << 24] {
                let window = readers.observe(base + step);
                assert_eq!(window > 0, step >= STEPS_MIN);
                readers.expect(base + step, base + step + 1);
            }
        }
    }

    proptest! {
        #[test]
        fn any_questions_are_bounded_in_windows_and_memory(numbers in prop::collection::vec(any::<u32>(), 0..200)) {
            let mut readers = Readers::default();
            for number in numbers {
                let window = readers.observe(number);
                prop_assert!(window <= WINDOW_MAX);
                readers.expect(number, number.saturating_add(window));
                prop_assert!(readers.readers.len() <= READERS_MAX);
            }
        }
    }
}
