//! Which files of root filesystems were read, and in which order: what `registryfs record` tells.
//!
//! Every read passes here, so it costs a look at one bit, and only the first read of a file takes a lock. What is noted is
//! a layer and the number of an entry in its index, 8 bytes a file, in memory only: a record ends with the process. An
//! image that nobody reads has none. Two bounds keep the rest small: a record that is full notes no more, and when there
//! are too many the oldest one is given up, which both are told.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use crate::digest::Digest;

/// The most files in one record.
pub const FILES_MAX: usize = 100_000;
/// The most files in all records: 4 MB.
const ALL_FILES_MAX: usize = 5 * FILES_MAX;
/// The most images with a record.
const IMAGES_MAX: usize = 64;

/// A file: where its content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReadFile {
    /// The layer, base 0.
    pub layer: u16,
    /// The entry in its index.
    pub entry: u32,
}

/// The records of all images. A handle: clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Recorder(Arc<Records>);

#[derive(Debug, Default)]
struct Records {
    /// Those of the trees that are open, by their keys: whoever opens a tree again goes on with its record.
    open: Mutex<HashMap<Digest, Weak<Reads>>>,
    /// Those with files in them, the one that began first in front.
    begun: Mutex<VecDeque<Arc<Reads>>>,
    /// The files in all of them.
    files: AtomicUsize,
}

impl Recorder {
    /// The record of the merged tree that is stored under `tree`, as the image `manifest` with so many layers has it.
    #[must_use]
    pub fn reads(&self, tree: &Digest, manifest: &Digest, layers: usize) -> Arc<Reads> {
        let mut open = self.0.open.lock();
        if let Some(known) = open.get(tree).and_then(Weak::upgrade) {
            return known;
        }
        open.retain(|_, reads| reads.strong_count() > 0);
        let reads = Arc::new(Reads {
            manifest: *manifest,
            records: Arc::downgrade(&self.0),
            layers: (0..layers).map(|_| OfLayer::default()).collect(),
            list: Mutex::default(),
            is_given_up: AtomicBool::new(false),
            is_rough: AtomicBool::new(false),
        });
        open.insert(*tree, Arc::downgrade(&reads));
        reads
    }

    /// Whether an image has a record.
    #[must_use]
    pub fn has(&self, manifest: &Digest) -> bool {
        self.0
            .begun
            .lock()
            .iter()
            .any(|reads| reads.manifest == *manifest)
    }
}

impl Records {
    /// Makes a record one of those that are kept, and room for it.
    fn begin(&self, reads: &Arc<Reads>) {
        let mut given_up = Vec::new();
        {
            let mut begun = self.begun.lock();
            if begun.iter().any(|known| Arc::ptr_eq(known, reads)) {
                return;
            }
            let mut files = self.files.load(Ordering::Relaxed);
            while begun.len() >= IMAGES_MAX || files > ALL_FILES_MAX - FILES_MAX {
                let Some(oldest) = begun.pop_front() else { break };
                files = files.saturating_sub(oldest.list.lock().files.len());
                given_up.push(oldest);
            }
            begun.push_back(Arc::clone(reads));
        }
        for oldest in given_up {
            oldest.is_given_up.store(true, Ordering::Relaxed);
            oldest.clear(self);
        }
    }
}

/// The record of one image.
#[derive(Debug)]
pub struct Reads {
    manifest: Digest,
    records: Weak<Records>,
    layers: Vec<OfLayer>,
    list: Mutex<List>,
    is_given_up: AtomicBool,
    /// Whether files in it were read together with others.
    is_rough: AtomicBool,
}

/// What is known of reads in one layer.
#[derive(Debug, Default)]
struct OfLayer {
    /// A bit for each entry that is in the list. Made at the first read.
    noted: OnceLock<Box<[AtomicU64]>>,
    /// Whether the kernel reads it without us.
    is_lent: AtomicBool,
}

#[derive(Debug, Default)]
struct List {
    files: Vec<ReadFile>,
    is_full: bool,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The files in the order of their first reads.
    pub files: Vec<ReadFile>,
    /// Whether files were read that there was no room for.
    pub is_full: bool,
    /// Whether an earlier record was given up in favour of other images'.
    pub is_given_up: bool,
    /// Whether files may be among them that the kernel has read ahead only.
    pub is_rough: bool,
    /// The layers that the kernel has read by itself.
    pub unseen_layers: Vec<u16>,
}

impl Reads {
    /// Notes that a file is read. `entries` is how many entries its layer's index has, and is asked for only once.
    pub fn note(self: &Arc<Self>, file: ReadFile, entries: impl FnOnce() -> u32) {
        let Some(layer) = self.layers.get(usize::from(file.layer)) else {
            return;
        };
        let new = || (0..entries().div_ceil(u64::BITS)).map(|_| AtomicU64::new(0));
        layer.noted.get_or_init(|| new().collect());
        let Some((word, bit)) = self.mark(file) else {
            return;
        };
        // Looked at first, because writing would take the word from the other cores.
        let is_noted = word.load(Ordering::Relaxed) & bit != 0;
        if !is_noted && word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            self.add(file);
        }
    }

    fn add(self: &Arc<Self>, file: ReadFile) {
        let Some(records) = self.records.upgrade() else {
            return;
        };
        if self.list.lock().files.is_empty() {
            records.begin(self);
        }
        let mut list = self.list.lock();
        if list.files.len() >= FILES_MAX || records.files.load(Ordering::Relaxed) >= ALL_FILES_MAX {
            list.is_full = true;
            return;
        }
        records.files.fetch_add(1, Ordering::Relaxed);
        list.files.push(file);
    }

    /// Notes that the kernel was given a layer, which it reads without asking from now on.
    pub fn note_lent(&self, layer: u16) {
        if let Some(layer) = self.layers.get(usize::from(layer)) {
            layer.is_lent.store(true, Ordering::Relaxed);
        }
    }

    /// Notes that files were read together, of which perhaps only one is wanted.
    pub fn note_rough(&self) {
        if !self.is_rough.load(Ordering::Relaxed) {
            self.is_rough.store(true, Ordering::Relaxed);
        }
    }

    /// What there is so far.
    #[must_use]
    pub fn record(&self) -> Record {
        let is_lent = |layer: &OfLayer| layer.is_lent.load(Ordering::Relaxed);
        let numbered = self.layers.iter().zip(0..);
        let list = self.list.lock();
        Record {
            files: list.files.clone(),
            is_full: list.is_full,
            is_given_up: self.is_given_up.load(Ordering::Relaxed),
            is_rough: self.is_rough.load(Ordering::Relaxed),
            unseen_layers: numbered
                .filter(|(layer, _)| is_lent(layer))
                .map(|(_, number)| number)
                .collect(),
        }
    }

    /// Begins anew behind what `told` says: what was read since then stays, and what is read from now on counts as read first.
    pub fn restart(&self, told: &Record) {
        let Some(records) = self.records.upgrade() else {
            return;
        };
        self.is_given_up.store(false, Ordering::Relaxed);
        self.is_rough.store(false, Ordering::Relaxed);
        let mut list = self.list.lock();
        // Another may have begun it anew meanwhile.
        if !list.files.starts_with(&told.files) {
            return;
        }
        records.files.fetch_sub(told.files.len(), Ordering::Relaxed);
        list.files.drain(..told.files.len());
        list.is_full = false;
        // Those that there was no room for were marked as well.
        self.unmark();
        for file in &list.files {
            if let Some((word, bit)) = self.mark(*file) {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Where it is marked that a file is in the list.
    fn mark(&self, file: ReadFile) -> Option<(&AtomicU64, u64)> {
        let words = self.layers.get(usize::from(file.layer))?.noted.get()?;
        let word = words.get((file.entry / u64::BITS) as usize)?;
        Some((word, 1 << (file.entry % u64::BITS)))
    }

    fn unmark(&self) {
        for word in self.layers.iter().filter_map(|layer| layer.noted.get()).flatten() {
            word.store(0, Ordering::Relaxed);
        }
    }

    fn clear(&self, records: &Records) {
        let mut list = self.list.lock();
        records.files.fetch_sub(list.files.len(), Ordering::Relaxed);
        *list = List::default();
        self.is_rough.store(false, Ordering::Relaxed);
        self.unmark();
    }
}

/// A layer of an image, whose reads are noted in its record.
#[derive(Debug, Clone)]
pub struct LayerReads {
    /// The image's record.
    pub reads: Arc<Reads>,
    /// The layer's number in it.
    pub layer: u16,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn digest(number: usize) -> Digest {
        Digest::of(number.to_string().as_bytes())
    }

    fn file(layer: u16, entry: u32) -> ReadFile {
        ReadFile { layer, entry }
    }

    fn reads(recorder: &Recorder, image: usize) -> Arc<Reads> {
        recorder.reads(&digest(image), &digest(image), 2)
    }

    fn read_first(reads: &Arc<Reads>, files: u32) {
        for entry in 0..files {
            reads.note(file(0, entry), || files);
        }
    }

    #[test]
    fn a_tree_that_is_opened_again_goes_on_with_its_record() {
        let recorder = Recorder::default();
        let first = reads(&recorder, 1);
        assert!(!recorder.has(&digest(1)), "nothing was read");
        first.note(file(1, 5), || 10);
        first.note_lent(0);
        drop(first);
        assert!(recorder.has(&digest(1)));
        let again = reads(&recorder, 1);
        again.note(file(1, 5), || 10);
        again.note(file(0, 0), || 1);
        let record = again.record();
        assert_eq!(record.files, [file(1, 5), file(0, 0)]);
        assert_eq!(record.unseen_layers, [0]);
        assert!(!record.is_full && !record.is_given_up);
    }

    #[test]
    fn a_record_that_is_full_says_so_and_stays() {
        let recorder = Recorder::default();
        let reads = reads(&recorder, 1);
        let files = FILES_MAX as u32;
        read_first(&reads, files);
        assert!(!reads.record().is_full);
        reads.note(file(1, 0), || 1);
        let record = reads.record();
        assert!(record.is_full);
        assert_eq!(record.files.len(), FILES_MAX);
        assert_eq!(record.files.last(), Some(&file(0, files - 1)));
        reads.restart(&record);
        reads.note(file(1, 0), || 1);
        assert_eq!(reads.record().files, [file(1, 0)], "there is room for it now");
    }

    #[test]
    fn the_oldest_records_are_given_up_for_new_ones() {
        let recorder = Recorder::default();
        let all: Vec<_> = (0..IMAGES_MAX + 1).map(|image| reads(&recorder, image)).collect();
        for reads in &all {
            read_first(reads, 3);
        }
        assert!(!recorder.has(&digest(0)) && recorder.has(&digest(1)));
        assert_eq!(all[0].record().files, []);
        assert!(all[0].record().is_given_up);
        // It begins anew with what is read next, and is the newest then.
        read_first(&all[0], 3);
        assert_eq!(all[0].record().files.len(), 3);
        assert!(!recorder.has(&digest(1)) && recorder.has(&digest(0)));

        let large: Vec<_> = (100..106).map(|image| reads(&recorder, image)).collect();
        for reads in &large {
            read_first(reads, FILES_MAX as u32);
        }
        let kept = large.iter().map(|reads| reads.record().files.len());
        assert!(kept.sum::<usize>() <= ALL_FILES_MAX);
        assert_eq!(
            large[5].record().files.len(),
            FILES_MAX,
            "the newest has all of its room"
        );
        assert_eq!(large[0].record().files.len(), 0);
    }

    #[test]
    fn a_record_can_begin_anew() {
        let recorder = Recorder::default();
        let reads = reads(&recorder, 1);
        read_first(&reads, 3);
        let told = reads.record();
        reads.note(file(1, 0), || 1);
        reads.restart(&told);
        assert_eq!(reads.record().files, [file(1, 0)], "it was not told");
        reads.note(file(0, 2), || 3);
        reads.restart(&told);
        assert_eq!(reads.record().files, [file(1, 0), file(0, 2)]);
        assert_eq!(recorder.0.files.load(Ordering::Relaxed), 2);
    }

    proptest! {
        /// Whatever is read, how often ever: each file is there once, at its first place, and nothing else is.
        #[test]
        fn a_record_is_the_order_of_first_reads(read in prop::collection::vec((0..3u16, 0..200u32), 0..300)) {
            let recorder = Recorder::default();
            let reads = reads(&recorder, 1);
            let (mut seen, mut expected) = (BTreeSet::new(), Vec::new());
            for (layer, entry) in read {
                // There is no layer 2, and no entry from 192 on: 150 of them take up three words.
                reads.note(file(layer, entry), || 150);
                if layer < 2 && entry < 192 && seen.insert((layer, entry)) {
                    expected.push(file(layer, entry));
                }
            }
            prop_assert_eq!(reads.record().files, expected);
        }
    }
}
