//! A layer in the making: while one pass goes over a blob, the content of its files is written aside, and the layer gets its
//! name once all of the blob has turned out to be what it should be. Until then nobody finds it, and a process that dies
//! leaves a directory in `tmp`, which the next start removes.
//!
//! Keeping content is a favour to later readers, never a condition: where the budget or the disk is used up, the rest is
//! passed over, and the layer is known all the same. What is kept is the beginning of the layer's data, so its chunks are
//! the first ones of the index. The order of writing is that of every chunk: bytes, then marks. Neither is synced; after a
//! crash of the machine the marks are suspects as others are. Only the index is synced, before it gets its name.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::ContentSink;
use crate::layer::index::{DATA_ALIGN_BYTES, Index};
use crate::layer::spool::Scratch;
use crate::store::Store;
use crate::store::chunk_map::ChunkMap;
use crate::store::layer::{Layer, index_id};
use crate::store::lock::make_dir;

/// Small files are collected up to here: one system call for hundreds of them.
const WRITE_BYTES: usize = 1 << 20;
/// After so many bytes it is looked anew what the budget and the disk have left: others write too.
const GRANT_BYTES_MAX: u64 = 64 << 20;
/// At least so much is taken at once, if it is there: what is written at once is shorter.
const GRANT_BYTES_MIN: u64 = 2 * WRITE_BYTES as u64;

/// Leave to write so many bytes. What is left of it counts as taken until it is dropped, so that several passes together
/// stay within the budget.
#[derive(Debug)]
struct Grant {
    store: Arc<Store>,
    left_bytes: u64,
}

impl Grant {
    fn new(store: &Arc<Store>, budget_bytes: Option<u64>) -> Self {
        let mut granted_bytes = store.granted_bytes.lock();
        let room_bytes = store.room_bytes(budget_bytes).saturating_sub(*granted_bytes);
        // A part, because others may begin; but of the last bit all, so that it is used.
        let left_bytes = (room_bytes / 4)
            .clamp(GRANT_BYTES_MIN, GRANT_BYTES_MAX)
            .min(room_bytes);
        *granted_bytes += left_bytes;
        drop(granted_bytes);
        Self {
            store: Arc::clone(store),
            left_bytes,
        }
    }

    /// Uses some of it, if there is so much: from now on the disk shows it.
    fn take(&mut self, bytes: u64) -> bool {
        let Some(left_bytes) = self.left_bytes.checked_sub(bytes) else {
            return false;
        };
        self.give_back(bytes);
        self.left_bytes = left_bytes;
        true
    }

    fn give_back(&self, bytes: u64) {
        let mut granted_bytes = self.store.granted_bytes.lock();
        *granted_bytes = granted_bytes.saturating_sub(bytes);
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.give_back(self.left_bytes);
    }
}

/// A layer in the making.
#[derive(Debug)]
pub struct Staged {
    store: Arc<Store>,
    dir: PathBuf,
    writing: Option<Writing>,
    /// All content before this place in the data file was written.
    kept_end: u64,
}

/// The data file, while content is kept.
#[derive(Debug)]
struct Writing {
    data: File,
    budget_bytes: Option<u64>,
    /// What may be written before the budget is looked at again.
    grant: Option<Grant>,
    /// Content that was not written yet, and its place.
    collected: Vec<u8>,
    start: u64,
}

impl Staged {
    /// A layer without content. A store that takes nothing now only means that no content is kept.
    #[must_use]
    pub fn new(store: &Arc<Store>, budget_bytes: Option<u64>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("layer-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut staged = Self {
            store: Arc::clone(store),
            dir: store.dir().join("tmp").join(name),
            writing: None,
            kept_end: 0,
        };
        match open_data(&staged.dir) {
            Ok(data) => {
                staged.writing = Some(Writing {
                    data,
                    budget_bytes,
                    grant: None,
                    collected: Vec::with_capacity(WRITE_BYTES),
                    start: 0,
                });
            }
            Err(error) => tracing::warn!(%error, "no content of a layer is kept while it is read"),
        }
        staged
    }

    /// Where its index can be built.
    #[must_use]
    pub fn scratch(&self) -> Arc<dyn Scratch> {
        self.store.scratch()
    }

    /// Gives the layer its name, with what was kept. Where the disk does not even take the index, the layer lives in memory
    /// for as long as somebody uses it.
    ///
    /// # Errors
    /// [`Error::Malformed`] when `index` is none; [`Error::Io`].
    pub fn commit(mut self, key: &Digest, index: &[u8]) -> Result<Arc<Layer>> {
        self.flush();
        let adopted = self
            .complete(index)
            .and_then(|()| self.store.adopt(key, &self.dir));
        match adopted {
            Err(error @ Error::Io { .. }) => {
                tracing::warn!(%key, %error, "what was kept of a layer is lost");
                self.store.add_layer(key, index)
            }
            outcome => outcome,
        }
    }

    /// Writes what belongs beside the data: the map of what is there, and the index.
    fn complete(&mut self, index: &[u8]) -> Result<()> {
        let failed = |error: std::io::Error| Error::io(self.dir.display().to_string(), &error);
        make_dir(&self.dir)?;
        let parsed = Index::open(index)?;
        let data = match self.writing.take() {
            Some(writing) => writing.data,
            None => open_data(&self.dir)?,
        };
        data.set_len(parsed.summary().data_bytes).map_err(failed)?;
        let map = ChunkMap::open(&self.dir.join("map"), parsed.chunk_count(), index_id(index))?;
        for number in 0..parsed.chunk_count() {
            let chunk = parsed.chunk(number)?;
            if chunk.data_offset.saturating_add(chunk.bytes) > self.kept_end {
                break;
            }
            map.mark(number)?;
        }
        let path = self.dir.join("index");
        fs::write(&path, index)
            .and_then(|()| File::open(&path)?.sync_data())
            .map_err(failed)
    }

    /// Writes what was collected. What goes wrong ends the keeping, not the pass.
    fn flush(&mut self) {
        let Some(writing) = &mut self.writing else { return };
        match writing.flush(&self.store) {
            Ok(end) => self.kept_end = self.kept_end.max(end),
            Err(why) => {
                tracing::info!(
                    kept_bytes = self.kept_end,
                    "the rest of a layer is not kept: {why}"
                );
                self.writing = None;
            }
        }
    }
}

impl ContentSink for Staged {
    fn content(&mut self, data_offset: u64, bytes: &[u8]) -> Result<()> {
        let Some(writing) = &mut self.writing else {
            return Ok(());
        };
        if !writing.continues_at(data_offset) || writing.collected.len() >= WRITE_BYTES {
            self.flush();
        }
        if let Some(writing) = &mut self.writing {
            writing.collect(data_offset, bytes);
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.writing = None;
        // Nothing is there any more when it has got its name.
        if let Err(error) = fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a layer in the making is left behind until the next start");
        }
    }
}

impl Writing {
    /// Whether content at this place can be collected behind what is there: what lies between them is shorter than a
    /// block, so that writing zeros there fills no hole.
    fn continues_at(&self, data_offset: u64) -> bool {
        let end = self.start + self.collected.len() as u64;
        data_offset
            .checked_sub(end)
            .is_some_and(|gap| gap < DATA_ALIGN_BYTES)
    }

    fn collect(&mut self, data_offset: u64, bytes: &[u8]) {
        if self.collected.is_empty() {
            self.start = data_offset;
        }
        let padded = data_offset.saturating_sub(self.start) as usize;
        self.collected.resize(padded, 0);
        self.collected.extend_from_slice(bytes);
    }

    /// Writes what was collected. Answers up to where all is written now.
    fn flush(&mut self, store: &Arc<Store>) -> std::result::Result<u64, String> {
        let bytes = self.collected.len() as u64;
        if !self.grant.as_mut().is_some_and(|grant| grant.take(bytes)) {
            // What is left of the last one is not to count against the next.
            self.grant = None;
            let mut grant = Grant::new(store, self.budget_bytes);
            if !grant.take(bytes) {
                return Err("the budget or the disk is used up".to_owned());
            }
            self.grant = Some(grant);
        }
        self.data
            .write_all_at(&self.collected, self.start)
            .map_err(|error| error.to_string())?;
        self.start += bytes;
        self.collected.clear();
        Ok(self.start)
    }
}

fn open_data(dir: &Path) -> Result<File> {
    make_dir(dir)?;
    let path = dir.join("data");
    let mut options = File::options();
    let file = options.write(true).create(true).truncate(false).open(&path);
    file.map_err(|error| Error::io(path.display().to_string(), &error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn layers_in_the_making_keep_to_the_budget_together() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let budget_bytes = store.disk_bytes() + 4 * MIB as u64 + 512 * 1024;
        let mut all: Vec<Staged> = (0..3).map(|_| Staged::new(&store, Some(budget_bytes))).collect();
        for round in 0..4 {
            for staged in &mut all {
                let at = (round * MIB) as u64;
                staged.content(at, &vec![1; MIB]).unwrap();
                staged.flush();
            }
        }
        let kept = |staged: &Staged| fs::metadata(staged.dir.join("data")).unwrap().blocks() * 512;
        let kept_bytes: u64 = all.iter().map(kept).sum();
        assert!(kept_bytes >= 3 * MIB as u64, "{kept_bytes}");
        assert!(kept_bytes <= 4 * MIB as u64 + 512 * 1024, "{kept_bytes}");
        drop(all);
        assert_eq!(*store.granted_bytes.lock(), 0, "what was not used is given back");
        let mut next = Staged::new(&store, Some(budget_bytes));
        next.content(0, &vec![1; MIB]).unwrap();
        next.flush();
        assert_eq!(next.kept_end, MIB as u64, "and can be used by the next one");
    }
}
