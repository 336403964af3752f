//! A hash table in a memory-mapped file: from eight bytes of a digest to chunks that may have it.
//!
//! It is a hint, and whoever asks checks every answer. So nothing here has to survive anything: no write is ordered or
//! synced, a reader beside the writer may see half of an entry, and a place that is full loses what it held. What has to hold
//! is that any bytes in the file are harmless: a look goes through at most [`WINDOW`] slots and returns numbers that the
//! caller takes as claims.
//!
//! Digests are uniform, so their first bits are the place of an entry, and the entries of a table stand in nearly the same
//! order in the one of twice its size: growing writes from front to back. Nobody takes entries away; those of a layer that
//! is gone are left out when the table grows, and written over where it may not.
//!
//! ```text
//! magic 8 | slots u64 | entries u64 | … | at 4096: slots of 16: key u64, layer number + 1 u32, chunk u32
//! ```
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;
use rustix::fs::{FallocateFlags, fallocate};

use crate::digest::Digest;
use crate::store::sigbus::Guard;

const MAGIC: [u8; 8] = *b"RFSDIGT1";
const SLOTS_AT: usize = 4096;
/// Where the header counts the entries, in words.
const ENTRIES_AT: usize = 2;
const SLOT_BYTES: usize = 16;
/// Slots that may hold an entry: those behind its place. 32 are eight lines of the processor's cache, one behind the other.
const WINDOW: u64 = 32;
/// As many chunks of one digest are known. One may be evicted while another is there; a hundred of them help nobody.
const SAME_MAX: usize = 4;
/// The smallest table: 128 KiB.
pub(super) const SLOTS_MIN: u64 = 1 << 13;
/// The largest: 512 MiB. From then on new entries take the places of others.
pub(super) const SLOTS_MAX: u64 = 1 << 25;

/// A chunk of a layer that goes by a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) layer: u32,
    pub(super) chunk: u32,
}

impl Entry {
    fn of_word(word: u64) -> Option<Self> {
        let layer = ((word >> 32) as u32).checked_sub(1)?;
        let chunk = word as u32;
        Some(Self { layer, chunk })
    }

    fn word(self) -> u64 {
        (u64::from(self.layer) + 1) << 32 | u64::from(self.chunk)
    }
}

/// The table. One writer at a time, any number of readers beside it.
#[derive(Debug)]
pub(super) struct Table {
    // Declared before the map, so that the guard ends first.
    _guard: Guard,
    map: MmapRaw,
    slots: u64,
}

impl Table {
    /// Opens a table; `None` where there is none of this form.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let file = File::options().read(true).write(true).open(path).ok()?;
        let len = file.metadata().ok()?.len();
        let slots = len.checked_sub(SLOTS_AT as u64)? / SLOT_BYTES as u64;
        let fits = slots.is_power_of_two() && (SLOTS_MIN..=SLOTS_MAX).contains(&slots);
        let table = fits.then(|| Self::map(&file, slots))??;
        let magic = table.word(0)?.load(Ordering::Relaxed);
        let header = (magic.to_ne_bytes(), table.word(1)?.load(Ordering::Relaxed));
        (len == file_bytes(slots) && header == (MAGIC, slots)).then_some(table)
    }

    /// A new table without entries.
    pub(super) fn create(path: &Path, slots: u64) -> std::io::Result<Self> {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true);
        let mut file = file.open(path)?;
        // Allocated, so that a full disk is an error here and not a signal later.
        fallocate(&file, FallocateFlags::empty(), 0, file_bytes(slots))?;
        file.write_all(&MAGIC)?;
        file.write_all(&slots.to_ne_bytes())?;
        Self::map(&file, slots).ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
    }

    fn map(file: &File, slots: u64) -> Option<Self> {
        let map = MmapRaw::map_raw(file).ok()?;
        let guard = Guard::new(map.as_ptr(), map.len())?;
        (map.len() as u64 == file_bytes(slots)).then_some(Self {
            _guard: guard,
            map,
            slots,
        })
    }

    /// Number of slots.
    pub(super) fn slots(&self) -> u64 {
        self.slots
    }

    /// Number of entries, as the file says.
    pub(super) fn entries(&self) -> u64 {
        let word = self.word(ENTRIES_AT);
        word.map_or(0, |entries| entries.load(Ordering::Relaxed))
    }

    /// Whether it should grow: then a look has to go through more and more slots.
    pub(super) fn is_full(&self) -> bool {
        self.entries() >= self.slots / 4 * 3
    }

    /// The chunks that may have this digest.
    pub(super) fn find(&self, digest: Digest) -> impl Iterator<Item = Entry> {
        let key = key(&digest);
        let occupied = (0..WINDOW).map_while(move |step| {
            let (slot_key, value) = self.slot(key, step)?;
            let entry = Entry::of_word(value.load(Ordering::Relaxed))?;
            Some((slot_key.load(Ordering::Relaxed) == key).then_some(entry))
        });
        occupied.flatten().take(SAME_MAX)
    }

    /// Adds a chunk. Of several in one layer the first is kept: it is mostly there before the others.
    pub(super) fn put(&self, digest: &Digest, entry: Entry) {
        self.put_key(key(digest), entry);
    }

    fn put_key(&self, key: u64, entry: Entry) {
        let (mut same, mut first) = (0, None);
        for step in 0..WINDOW {
            let Some((slot_key, value)) = self.slot(key, step) else {
                return;
            };
            let Some(there) = Entry::of_word(value.load(Ordering::Relaxed)) else {
                slot_key.store(key, Ordering::Relaxed);
                value.store(entry.word(), Ordering::Relaxed);
                if let Some(entries) = self.word(ENTRIES_AT) {
                    entries.fetch_add(1, Ordering::Relaxed);
                }
                return;
            };
            if slot_key.load(Ordering::Relaxed) != key {
                continue;
            }
            if there.layer == entry.layer {
                value.store(entry.word().min(there.word()), Ordering::Relaxed);
                return;
            }
            same += 1;
            first = first.or(Some(step));
            if same >= SAME_MAX {
                break;
            }
        }
        // Full: one of the same digest goes, else any.
        let step = first.unwrap_or(key % WINDOW);
        if let Some((slot_key, value)) = self.slot(key, step) {
            slot_key.store(key, Ordering::Relaxed);
            value.store(entry.word(), Ordering::Relaxed);
        }
    }

    /// Adds the entries of another table that `keep` wants.
    pub(super) fn put_all(&self, other: &Self, keep: impl Fn(Entry) -> bool) {
        for number in 0..other.slots {
            let Some((slot_key, value)) = other.slot_at(number) else {
                return;
            };
            let entry = Entry::of_word(value.load(Ordering::Relaxed)).filter(|entry| keep(*entry));
            if let Some(entry) = entry {
                self.put_key(slot_key.load(Ordering::Relaxed), entry);
            }
        }
    }

    /// The slot `step` behind the place of `key`.
    fn slot(&self, key: u64, step: u64) -> Option<(&AtomicU64, &AtomicU64)> {
        let place = key >> (u64::BITS - self.slots.trailing_zeros());
        self.slot_at((place + step) & (self.slots - 1))
    }

    fn slot_at(&self, number: u64) -> Option<(&AtomicU64, &AtomicU64)> {
        let word = SLOTS_AT / 8 + number as usize * 2;
        Some((self.word(word)?, self.word(word + 1)?))
    }

    fn word(&self, number: usize) -> Option<&AtomicU64> {
        if number >= self.map.len() / 8 {
            return None;
        }
        // SAFETY: the word lies within the map, which starts at a page and lives as long as `self`. The file is only ever
        // written by this process, which holds the store's lock, and through such atomics; any bytes are a valid word. Where
        // the file is cut short, the guard puts zeros in its place.
        Some(unsafe { &*self.map.as_ptr().cast::<AtomicU64>().add(number) })
    }
}

fn key(digest: &Digest) -> u64 {
    let (first, _) = digest.as_bytes().split_first_chunk().unwrap_or((&[0; 8], &[]));
    u64::from_be_bytes(*first)
}

fn file_bytes(slots: u64) -> u64 {
    SLOTS_AT as u64 + slots * SLOT_BYTES as u64
}
