//! One layer in the store: its index, its data file and its chunk map, and the rules by which bytes get in and out.
//!
//! In: a chunk is decoded and verified elsewhere, written to its place, and only then marked. Out: whoever reads holds a
//! count ([`ReadGuard`]) from before it looks at the marks until it has the bytes. How chunks go again stands in
//! [`crate::store::eviction`]; both ways share `keeping`, because a mark must never be set on a place that is being
//! emptied. A data file that the kernel was given ([`crate::store::lending`]) is never written to again; eviction puts
//! another file in its place, so whoever reads takes the file after the marks.
#![allow(unsafe_code)]

mod copying;
mod files;
mod page_cache;
mod verification;

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::index::{EntryRef, HEADER_BYTES, Index};
use crate::store::chunk_map::ChunkMap;
pub use crate::store::layer::copying::Copied;
pub(super) use crate::store::layer::files::new_data;
use crate::store::layer::files::{DATA_ASIDE, open_files};
use crate::store::layer::page_cache::HandedOn;
use crate::store::mapped::Mapped;

/// Readers are counted in this many stripes of neighbouring chunks: an evictor waits for a stripe, not for a layer.
const STRIPES: usize = 64;

/// How long it is waited to lend a layer for those who mark or evict something in it.
const LEND_WAIT: Duration = Duration::from_millis(100);

/// Takes the place of a data file that cannot be had: no write to it succeeds, so no chunk is ever marked.
const NOWHERE: &str = "/dev/full";

/// A layer whose index is known.
#[derive(Debug)]
pub struct Layer {
    key: Digest,
    index: Index<Mapped>,
    index_id: u32,
    /// Where its files are.
    dir: PathBuf,
    data: RwLock<Arc<File>>,
    map: ChunkMap,
    readers: [AtomicU32; STRIPES],
    complete: AtomicBool,
    /// How often chunks were evicted. Shared by who writes and marks, exclusive for who evicts or lends.
    keeping: RwLock<u64>,
    /// How often the data file is lent now. Only raised while `keeping` is held exclusively.
    lent: AtomicU32,
    handed_on: Mutex<HandedOn>,
    /// When something was last written to the data file.
    written: Mutex<Option<Instant>>,
}

/// A count on some stripes of a layer: while it lives, none of their chunks is punched out.
#[derive(Debug)]
pub struct ReadGuard<'a> {
    layer: &'a Layer,
    stripes: (usize, usize),
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        for stripe in self.stripes.0..=self.stripes.1 {
            self.layer.readers[stripe].fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// The parts of a layer that eviction changes, while nobody else marks or writes whole chunks.
#[derive(Debug)]
pub(super) struct Evicted<'a> {
    pub(super) keeping: RwLockWriteGuard<'a, u64>,
    pub(super) data: Arc<File>,
    pub(super) map: &'a ChunkMap,
    pub(super) complete: &'a AtomicBool,
    layer: &'a Layer,
}

impl Evicted<'_> {
    /// Puts another data file in the place of the one that was lent. What is marked must be in it.
    pub(super) fn replace(&self, aside: &Path, data: File) -> std::io::Result<()> {
        std::fs::rename(aside, self.layer.dir.join("data"))?;
        *self.layer.data.write() = Arc::new(data);
        self.map.forget_lent();
        Ok(())
    }
}

impl Layer {
    /// Opens the layer in `dir`; `None` if it has no index.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index; [`Error::Io`].
    pub(super) fn open(dir: &Path, key: Digest) -> Result<Option<Self>> {
        let Some(mapped) = Mapped::open(&dir.join("index"))? else {
            return Ok(None);
        };
        Self::of_index(dir, key, mapped).map(Some)
    }

    /// The layer in `dir` whose index no file could take.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index; [`Error::Io`].
    pub(super) fn unkept(dir: &Path, key: Digest, index: &[u8]) -> Result<Self> {
        Self::of_index(dir, key, Mapped::owned(index.to_vec()))
    }

    fn of_index(dir: &Path, key: Digest, mapped: Mapped) -> Result<Self> {
        let index_id = index_id(&mapped);
        let index = Index::open(mapped)?;
        let (data, map) = match open_files(dir, &index, index_id) {
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(layer = %key, %error, "nothing of a layer can be kept");
                let data = File::options().read(true).write(true).open(NOWHERE);
                let data = data.map_err(|e| Error::io(NOWHERE, &e))?;
                (data, ChunkMap::in_memory(index.chunk_count())?)
            }
        };
        Ok(Self {
            key,
            complete: AtomicBool::new(map.count() == index.chunk_count()),
            index,
            index_id,
            dir: dir.to_owned(),
            data: RwLock::new(Arc::new(data)),
            map,
            readers: [const { AtomicU32::new(0) }; STRIPES],
            keeping: RwLock::new(0),
            lent: AtomicU32::new(0),
            handed_on: Mutex::default(),
            written: Mutex::default(),
        })
    }

    /// The key that the layer is stored under.
    #[must_use]
    pub fn key(&self) -> &Digest {
        &self.key
    }

    /// What the layer was parsed into.
    #[must_use]
    pub fn index(&self) -> &Index<Mapped> {
        &self.index
    }

    /// What tells the index from others of the same layer. Places in the data file and numbers of chunks mean something only
    /// together with it: an index that is made anew, by other rules or from another's, may say others.
    #[must_use]
    pub fn index_id(&self) -> u32 {
        self.index_id
    }

    /// Whether every chunk is present.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        // As strictly ordered against a reader's count as the marks are.
        self.complete.load(Ordering::SeqCst)
    }

    /// Whether a chunk is present.
    #[must_use]
    pub fn is_present(&self, chunk: u32) -> bool {
        self.map.is_present(chunk)
    }

    /// Whether all of these chunks are present.
    #[must_use]
    pub fn all_present(&self, chunks: Range<u32>) -> bool {
        self.is_complete() || chunks.into_iter().all(|chunk| self.map.is_present(chunk))
    }

    /// The chunks of a file that hold its bytes `offset..end`, which must not be empty nor reach beyond its size. None, where
    /// these are a hole.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index.
    pub fn chunks_of(&self, entry: &EntryRef<'_>, offset: u64, end: u64) -> Result<Range<u32>> {
        let place = |position: u64| entry.data_offset.saturating_add(position);
        self.chunks_among(entry.chunk_range(), place(offset)..place(end))
    }

    /// The chunks that lie in these bytes of the data file, which must not be empty, whatever files they are of. None, where
    /// there are only holes and what lies between files.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index.
    pub fn chunks_in(&self, data: Range<u64>) -> Result<Range<u32>> {
        self.chunks_among(0..self.index.chunk_count(), data)
    }

    /// Those of `all` chunks, which stand in the order of the data file, that lie in these bytes of it.
    fn chunks_among(&self, all: Range<u32>, data: Range<u64>) -> Result<Range<u32>> {
        let starts_at_or_before = |place: u64, from: u32| -> Result<u32> {
            let (mut low, mut high) = (from, all.end);
            while low < high {
                let middle = low + (high - low) / 2;
                if self.index.chunk(middle)?.data_offset <= place {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            Ok(low)
        };
        let mut first = starts_at_or_before(data.start, all.start)?
            .saturating_sub(1)
            .max(all.start);
        let last = starts_at_or_before(data.end.saturating_sub(1), first)?;
        if first < last {
            let chunk = self.index.chunk(first)?;
            first += u32::from(chunk.data_offset.saturating_add(chunk.bytes) <= data.start);
        }
        Ok(first..last)
    }

    /// Holds the chunks in place while they are looked at and read.
    #[must_use]
    pub fn hold(&self, chunks: &Range<u32>) -> ReadGuard<'_> {
        let stripes = self.stripes(chunks);
        for counter in &self.readers[stripes.0..=stripes.1] {
            // Ordered against the marks that are looked at next: an evictor that clears a mark first and looks at the
            // counts then, both as strictly, sees either this count or is seen by this reader.
            counter.fetch_add(1, Ordering::SeqCst);
        }
        ReadGuard { layer: self, stripes }
    }

    fn stripes(&self, chunks: &Range<u32>) -> (usize, usize) {
        let stripe = |chunk: u32| {
            let of = u64::from(self.index.chunk_count().max(1));
            (u64::from(chunk) * STRIPES as u64 / of).min(STRIPES as u64 - 1) as usize
        };
        (
            stripe(chunks.start),
            stripe(chunks.end.saturating_sub(1).max(chunks.start)),
        )
    }

    /// Whether nobody reads in the stripes of these chunks.
    pub(super) fn is_unread(&self, chunks: &Range<u32>) -> bool {
        let (first, last) = self.stripes(chunks);
        self.readers[first..=last]
            .iter()
            .all(|count| count.load(Ordering::SeqCst) == 0)
    }

    /// Reads from the data file if that needs no disk: everything present and in the page cache.
    #[must_use]
    pub fn read_now(&self, chunks: &Range<u32>, data_offset: u64, len: usize) -> Option<Vec<u8>> {
        if chunks.is_empty() {
            return Some(vec![0; len]);
        }
        let _guard = self.hold(chunks);
        if !self.all_present(chunks.clone()) {
            return None;
        }
        let mut buffer: Vec<u8> = Vec::with_capacity(len);
        let iov = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: len,
        };
        let offset = libc::off_t::try_from(data_offset).ok()?;
        let data = self.data();
        // SAFETY: `iov` names `len` writable bytes of the vector's capacity; the descriptor is open; the kernel says how
        // many bytes it wrote and no more are exposed.
        let read = unsafe { libc::preadv2(data.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT) };
        if usize::try_from(read).ok()? != len {
            return None;
        }
        // SAFETY: all `len` bytes were written by the kernel.
        unsafe { buffer.set_len(len) };
        Some(buffer)
    }

    /// Reads from the data file; `None` if not everything is present.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, chunks: &Range<u32>, data_offset: u64, len: usize) -> Result<Option<Vec<u8>>> {
        // A hole is no chunk's, so nothing keeps the data file from being emptied meanwhile.
        if chunks.is_empty() {
            return Ok(Some(vec![0; len]));
        }
        let _guard = self.hold(chunks);
        if !self.all_present(chunks.clone()) {
            return Ok(None);
        }
        let mut buffer = vec![0; len];
        self.data()
            .read_exact_at(&mut buffer, data_offset)
            .map_err(|e| self.failed(&e))?;
        Ok(Some(buffer))
    }

    /// Puts verified chunks, which lie one behind the other in the data file with less than a block between them, to their
    /// place with one write, and marks them. What stands between them in `bytes` must be zeros.
    ///
    /// # Errors
    /// [`Error::Io`], with ENOSPC when the disk is full.
    pub fn keep(&self, chunks: Range<u32>, data_offset: u64, bytes: &[u8]) -> Result<()> {
        let keeping = self.keeping.read();
        self.write_while(&keeping, data_offset, bytes)?;
        chunks.into_iter().try_for_each(|chunk| self.map.mark(chunk))
    }

    /// How often chunks were evicted, for [`Self::mark_written`].
    #[must_use]
    pub fn evictions(&self) -> u64 {
        *self.keeping.read()
    }

    /// Writes a piece of a chunk to its place. It counts only once [`Self::mark_written`] says so.
    ///
    /// # Errors
    /// [`Error::Io`], with ENOSPC when the disk is full.
    pub fn write(&self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        self.write_while(&self.keeping.read(), data_offset, bytes)
    }

    fn write_while(&self, _keeping: &RwLockReadGuard<'_, u64>, data_offset: u64, bytes: &[u8]) -> Result<()> {
        if self.map.is_lent() {
            return Err(self.is_given());
        }
        *self.written.lock() = Some(Instant::now());
        self.data()
            .write_all_at(bytes, data_offset)
            .map_err(|e| self.failed(&e))
    }

    /// Whether something was written to the data file in the last `time`, so that the disk may not have it.
    #[must_use]
    pub fn was_written_within(&self, time: Duration) -> bool {
        self.written
            .lock()
            .is_some_and(|written| written.elapsed() < time)
    }

    fn is_given(&self) -> Error {
        let why = "the kernel has been given this file, so nothing is written to it";
        Error::busy(format!("data of layer {}", self.key), why)
    }

    /// Marks a chunk whose verified bytes were written piece by piece, if nothing was evicted since `evictions` was looked
    /// at, before the first piece. Else a piece may have gone again: the chunk stays missing, and whoever needs it
    /// fetches it anew.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn mark_written(&self, chunk: u32, evictions: u64) -> Result<()> {
        let keeping = self.keeping.read();
        match *keeping == evictions {
            true => self.map.mark(chunk),
            false => Ok(()),
        }
    }

    /// Looks whether the layer has become complete.
    pub fn note_progress(&self) {
        if !self.is_complete() {
            self.look_whether_complete(&self.keeping.read());
        }
    }

    /// Only while nothing is evicted: else the marks that were counted may be gone when that is noted.
    fn look_whether_complete(&self, _keeping: &RwLockReadGuard<'_, u64>) {
        if self.map.count() == self.index.chunk_count() {
            self.complete.store(true, Ordering::SeqCst);
        }
    }

    /// Reads back what was written of a chunk that is not marked yet, for whoever wrote it; `None` if something was evicted
    /// since `evictions` was looked at, as in [`Self::mark_written`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_back(&self, data_offset: u64, len: usize, evictions: u64) -> Result<Option<Vec<u8>>> {
        let keeping = self.keeping.read();
        if *keeping != evictions {
            return Ok(None);
        }
        let mut buffer = vec![0; len];
        self.data()
            .read_exact_at(&mut buffer, data_offset)
            .map_err(|e| self.failed(&e))?;
        Ok(Some(buffer))
    }

    /// Whether a chunk has to be verified before it can be used.
    #[must_use]
    pub fn is_suspect(&self, chunk: u32) -> bool {
        self.map.is_suspect(chunk)
    }

    /// Bytes of these chunks that are present.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index.
    pub fn present_bytes(&self, chunks: Range<u32>) -> Result<u64> {
        let mut bytes = 0;
        for number in chunks.filter(|&number| self.map.is_present(number)) {
            bytes += self.index.chunk(number)?.bytes;
        }
        Ok(bytes)
    }

    /// Bytes of the layer that are present.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index.
    pub fn cached_bytes(&self) -> Result<u64> {
        if self.is_complete() {
            return Ok(self.index.summary().unpacked_bytes);
        }
        self.present_bytes(0..self.index.chunk_count())
    }

    /// Syncs data and map, then says in the map that they can be trusted after a reboot.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync_clean(&self) -> Result<()> {
        let mut synced = Ok(());
        let outcome = self.map.make_clean(|| {
            synced = self.data().sync_data().map_err(|e| self.failed(&e));
            synced.clone()
        });
        if synced.is_err() {
            self.doubt();
        }
        outcome
    }

    /// What eviction needs of a layer.
    ///
    /// # Errors
    /// [`Error::Busy`] while the kernel reads the data file.
    pub(super) fn evicted(&self) -> Result<Evicted<'_>> {
        let keeping = self.keeping.write();
        if self.lent.load(Ordering::Acquire) > 0 {
            let why = "the kernel reads it for mounted images; unmount those with this layer first";
            return Err(Error::busy(format!("data of layer {}", self.key), why));
        }
        Ok(Evicted {
            keeping,
            data: self.data(),
            map: &self.map,
            complete: &self.complete,
            layer: self,
        })
    }

    /// The name for a data file that is to take the place of the present one.
    pub(super) fn aside(&self) -> PathBuf {
        self.dir.join(DATA_ASIDE)
    }

    /// The data file. To be taken after it was seen that something is present.
    pub(super) fn data(&self) -> Arc<File> {
        Arc::clone(&self.data.read())
    }

    /// Whether every chunk that is present was verified since the machine started.
    #[must_use]
    pub fn is_verified(&self) -> bool {
        self.map.is_verified()
    }

    /// Whether it only has to be verified to be lent.
    pub(super) fn is_to_verify(&self) -> bool {
        self.map.is_to_verify()
    }

    /// Counts the data file as lent, and notes on the disk that it was; `None` where it may not be.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn lend(&self) -> Result<Option<Arc<File>>> {
        let Some(_keeping) = self.keeping.try_write_for(LEND_WAIT) else {
            return Ok(None);
        };
        let data = self.data();
        let len = data.metadata().map_err(|e| self.failed(&e))?.len();
        if len != self.index.summary().data_bytes || !self.is_complete() || !self.is_verified() {
            return Ok(None);
        }
        self.map.note_lent()?;
        self.lent.fetch_add(1, Ordering::AcqRel);
        Ok(Some(data))
    }

    /// Takes back one of what [`Self::lend`] gave.
    pub(super) fn take_back(&self) {
        self.lent.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn failed(&self, error: &std::io::Error) -> Error {
        Error::io(format!("data of layer {}", self.key), error)
    }
}

/// What an index is known by. Its header holds a checksum of all the rest, so the header's hash names the whole.
pub(super) fn index_id(index: &[u8]) -> u32 {
    crc32fast::hash(index.get(..HEADER_BYTES).unwrap_or_default())
}

#[cfg(test)]
mod tests;
