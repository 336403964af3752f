//! One layer in the store: its index, its data file and its chunk map, and the rules by which bytes get in and out.
//!
//! In: a chunk is decoded and verified elsewhere, written to its place, and only then marked. Out: whoever reads holds a
//! count ([`ReadGuard`]) from before it looks at the marks until it has the bytes. How chunks go again stands in
//! [`crate::store::eviction`]; both ways share `keeping`, because a mark must never be set on a place that is being
//! emptied.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::index::{Chunk, EntryRef, HEADER_BYTES, Index};
use crate::store::chunk_map::ChunkMap;
use crate::store::mapped::Mapped;

/// Readers are counted in this many stripes of neighbouring chunks: an evictor waits for a stripe, not for a layer.
const STRIPES: usize = 64;
/// Bytes read at a time where a suspect is verified.
const VERIFY_PIECE_BYTES: usize = 1 << 20;

/// Takes the place of a data file that cannot be had: no write to it succeeds, so no chunk is ever marked.
const NOWHERE: &str = "/dev/full";

/// A layer whose index is known.
#[derive(Debug)]
pub struct Layer {
    key: Digest,
    index: Index<Mapped>,
    data: File,
    map: ChunkMap,
    readers: [AtomicU32; STRIPES],
    complete: AtomicBool,
    /// How often chunks were evicted. Shared by who writes and marks, exclusive for who evicts.
    keeping: RwLock<u64>,
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
    pub(super) data: &'a File,
    pub(super) map: &'a ChunkMap,
    pub(super) complete: &'a AtomicBool,
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
            data,
            map,
            readers: [const { AtomicU32::new(0) }; STRIPES],
            keeping: RwLock::new(0),
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

    /// Whether every chunk is present.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Whether a chunk is present.
    #[must_use]
    pub fn is_present(&self, chunk: u32) -> bool {
        self.map.is_present(chunk)
    }

    /// Whether all of these chunks are present.
    #[must_use]
    pub fn all_present(&self, chunks: Range<u32>) -> bool {
        chunks.into_iter().all(|chunk| self.map.is_present(chunk))
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
        // SAFETY: `iov` names `len` writable bytes of the vector's capacity; the descriptor is open; the kernel says how
        // many bytes it wrote and no more are exposed.
        let read =
            unsafe { libc::preadv2(self.data.as_raw_fd(), &raw const iov, 1, offset, libc::RWF_NOWAIT) };
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
        self.data
            .read_exact_at(&mut buffer, data_offset)
            .map_err(|e| self.failed(&e))?;
        Ok(Some(buffer))
    }

    /// Puts a whole verified chunk to its place and marks it.
    ///
    /// # Errors
    /// [`Error::Io`], with ENOSPC when the disk is full.
    pub fn keep(&self, chunk: u32, data_offset: u64, bytes: &[u8]) -> Result<()> {
        let _keeping = self.keeping.read();
        self.write(data_offset, bytes)?;
        self.map.mark(chunk)
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
        self.data
            .write_all_at(bytes, data_offset)
            .map_err(|e| self.failed(&e))
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
            self.complete.store(true, Ordering::Release);
        }
    }

    /// Reads back what was written of a chunk that is not marked yet, for whoever wrote it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_back(&self, data_offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0; len];
        self.data
            .read_exact_at(&mut buffer, data_offset)
            .map_err(|e| self.failed(&e))?;
        Ok(buffer)
    }

    /// Verifies a chunk that was there before an unclean reboot. Returns whether it is present now.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for a damaged index.
    pub fn verify_suspect(&self, number: u32) -> Result<bool> {
        if !self.map.is_suspect(number) {
            return Ok(self.map.is_present(number));
        }
        let keeping = self.keeping.read();
        let _guard = self.hold(&(number..number + 1));
        let chunk = self.index.chunk(number)?;
        // What has no digest of its own cannot be looked at again, only fetched.
        if chunk.digest.is_some() && Some(self.digest_of(&chunk)?) == chunk.digest {
            self.map.mark(number)?;
            self.look_whether_complete(&keeping);
            return Ok(true);
        }
        tracing::warn!(layer = %self.key, chunk = number, "a chunk did not survive the reboot");
        self.map.drop_suspect(number);
        Ok(false)
    }

    /// Whether a chunk has to be verified before it can be used.
    #[must_use]
    pub fn is_suspect(&self, chunk: u32) -> bool {
        self.map.is_suspect(chunk)
    }

    fn digest_of(&self, chunk: &Chunk) -> Result<Digest> {
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; VERIFY_PIECE_BYTES.min(chunk.bytes as usize)];
        let mut at = 0;
        while at < chunk.bytes {
            let len = (chunk.bytes - at).min(VERIFY_PIECE_BYTES as u64) as usize;
            let piece = &mut buffer[..len];
            self.data
                .read_exact_at(piece, chunk.data_offset + at)
                .map_err(|e| self.failed(&e))?;
            hasher.update(piece);
            at += len as u64;
        }
        Ok(hasher.finish())
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
        self.map
            .make_clean(|| self.data.sync_data().map_err(|e| self.failed(&e)))
    }

    /// What eviction needs of a layer.
    pub(super) fn evicted(&self) -> Evicted<'_> {
        Evicted {
            keeping: self.keeping.write(),
            data: &self.data,
            map: &self.map,
            complete: &self.complete,
        }
    }

    pub(super) fn failed(&self, error: &std::io::Error) -> Error {
        Error::io(format!("data of layer {}", self.key), error)
    }
}

/// What an index is known by. Its header holds a checksum of all the rest, so the header's hash names the whole.
pub(super) fn index_id(index: &[u8]) -> u32 {
    crc32fast::hash(index.get(..HEADER_BYTES).unwrap_or_default())
}

/// The data file and the chunk map of the layer in `dir`.
fn open_files(dir: &Path, index: &Index<Mapped>, index_id: u32) -> Result<(File, ChunkMap)> {
    let failed = |e: std::io::Error| Error::io(dir.display().to_string(), &e);
    let mut options = File::options();
    let data = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join("data"));
    let data = data.map_err(failed)?;
    let data_bytes = index.summary().data_bytes;
    if data.metadata().map_err(failed)?.len() != data_bytes {
        // Another length means the data is not what the map describes: both begin anew.
        let _ = std::fs::remove_file(dir.join("map"));
        data.set_len(0)
            .and_then(|()| data.set_len(data_bytes))
            .map_err(failed)?;
    }
    let map = ChunkMap::open(&dir.join("map"), index.chunk_count(), index_id)?;
    Ok((data, map))
}

#[cfg(test)]
mod tests;
