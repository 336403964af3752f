//! The cache on disk: layer data, chunk maps, indexes, merged trees, documents, and the database of what is small and
//! relational.
//!
//! ```text
//! DIR/lock                    flock of the one process that owns the store, with its pid
//! DIR/VERSION                 layout version: another one is refused by name
//! DIR/state.db                SQLite: tags and when they were checked, listings, inode slots
//! DIR/documents/ab/abcd…      manifests and configs by digest, for ever
//! DIR/layers/KEY/index      what the layer was parsed into (memory-mapped)
//! DIR/layers/KEY/data       sparse: every regular file of the layer at its place
//! DIR/layers/KEY/map        which chunks of it are there (memory-mapped)
//! DIR/digests/                where chunks with which digests are (memory-mapped)
//! DIR/trees/KEY               merged trees (memory-mapped)
//! DIR/trees/KEY.erofs         the same as the kernel mounts them
//! DIR/tmp/                    what is being written; emptied at each start
//! DIR/incoming/               files that a command hands to whoever owns the store
//! ```
//! The key of a layer is a digest of everything that decides what its content is, and whoever opens it says it.
//! A file appears under its name only when it is complete (written aside, renamed); `data` and `map` are the exception
//! and their rules stand in [`layer`] and [`chunk_map`]. Everything is checked when it is read: a store that was damaged
//! is an error or a refetch, never wrong bytes.

pub mod chunk_map;
pub mod db;
pub mod digests;
pub mod documents;
mod eviction;
pub mod layer;
pub mod lending;
pub mod lock;
pub mod mapped;
mod scratch;
mod sigbus;
pub mod staged;
#[cfg(test)]
mod test_layer;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::spool::Scratch;
use crate::store::db::Db;
use crate::store::digests::{Claim, Digests};
use crate::store::documents::Documents;
use crate::store::layer::Layer;
use crate::store::lending::Lending;
use crate::store::lock::{Lock, make_dir};
use crate::store::mapped::Mapped;
use crate::store::scratch::ScratchDir;

/// Where commands put files for whoever owns the store: also a daemon in another mount namespace sees them there.
const INCOMING: &str = "incoming";
/// What is older has been forgotten by a command that was killed.
const INCOMING_AGE_MAX: Duration = Duration::from_secs(3600);

/// The layout described above.
const LAYOUT_VERSION: &str = "registryfs store 1\n";

/// How deep the store's directories are nested.
const DEPTH: u32 = 3;
/// So much of the disk is left to others by what can do without; of a small disk a part.
const FREE_BYTES_MIN: u64 = 512 << 20;
/// The part of the disk that is left at most: one in so many.
const FREE_PART_MAX: u64 = 20;

/// An open store. One process at a time.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    db: Db,
    documents: Documents,
    layers: Mutex<HashMap<Digest, Weak<Layer>>>,
    /// What layers in the making may write and have not written yet.
    granted_bytes: Mutex<u64>,
    lending: Arc<Lending>,
    digests: Arc<Digests>,
    lock: Lock,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.lending.end();
    }
}

impl Store {
    /// Opens the store in `dir`, which is made if it is missing, and takes its lock.
    ///
    /// # Errors
    /// [`Error::Busy`] naming the process that holds the lock; [`Error::Unsupported`] for another layout version;
    /// [`Error::Io`] when the directory cannot be used.
    pub fn open(dir: &Path) -> Result<Arc<Self>> {
        let lock = Lock::take(dir)?;
        Self::open_locked(dir, lock)
    }

    /// As [`Self::open`], with the lock in hand already.
    ///
    /// # Errors
    /// As [`Self::open`], but for the lock.
    pub fn open_locked(dir: &Path, lock: Lock) -> Result<Arc<Self>> {
        for sub in ["documents", "layers", "trees", "tmp", INCOMING] {
            make_dir(&dir.join(sub))?;
        }
        clear_incoming(&dir.join(INCOMING));
        check_version(dir)?;
        clear_dir(&dir.join("tmp"))?;
        let store = Self {
            dir: dir.to_owned(),
            db: Db::open(&dir.join("state.db"))?,
            documents: Documents::new(dir.join("documents"), dir.join("tmp")),
            layers: Mutex::default(),
            granted_bytes: Mutex::default(),
            lending: Arc::default(),
            digests: Digests::open(dir.join("digests")),
            lock,
        };
        Ok(Arc::new(store))
    }

    /// The store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name under which a command can hand a file of its own to whoever owns the store in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory for it cannot be made.
    pub fn incoming(dir: &Path) -> Result<PathBuf> {
        let incoming = dir.join(INCOMING);
        make_dir(dir).and_then(|()| make_dir(&incoming))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let unique = format!("{}-{}", std::process::id(), now.unwrap_or_default().as_nanos());
        Ok(incoming.join(unique))
    }

    /// Takes a file that a command has handed over: its bytes, if it is not larger than `bytes_max`. It is gone then.
    ///
    /// # Errors
    /// [`Error::Malformed`] for one that is too large; [`Error::Io`].
    pub fn take_incoming(&self, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
        let what = || path.display().to_string();
        let absent = || Error::malformed(what(), "it was not handed over");
        // Who hands it over may know this directory by another path, as through a link.
        let name = path.file_name().ok_or_else(absent)?;
        let path = &self.dir.join(INCOMING).join(name);
        let take = || {
            // Neither a pipe nor a link to somewhere else is waited for or followed.
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            let file = fs::File::options().read(true).custom_flags(flags).open(path)?;
            fs::remove_file(path)?;
            let len = file.metadata()?.len();
            let mut bytes = Vec::new();
            if len <= bytes_max {
                file.take(bytes_max).read_to_end(&mut bytes)?;
            }
            Ok((len, bytes))
        };
        match take().map_err(|e: std::io::Error| Error::io(what(), &e))? {
            (len, bytes) if len <= bytes_max => Ok(bytes),
            (len, _) => Err(Error::malformed(what(), format!("{len} bytes are too many"))),
        }
    }

    /// A directory of this store for what lives no longer than this process.
    #[must_use]
    pub fn scratch_dir(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// Where is room for what is too much to be held in memory, and for nobody else to see.
    #[must_use]
    pub fn scratch(&self) -> Arc<dyn Scratch> {
        Arc::new(ScratchDir::new(self.scratch_dir()))
    }

    /// The lock, to note in it how the owner can be reached.
    #[must_use]
    pub fn lock(&self) -> &Lock {
        &self.lock
    }

    /// The database. Never to be touched on a FUSE thread.
    #[must_use]
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Manifests and configs by digest.
    #[must_use]
    pub fn documents(&self) -> &Documents {
        &self.documents
    }

    /// Where chunks with which digests are.
    #[must_use]
    pub fn digests(&self) -> &Arc<Digests> {
        &self.digests
    }

    /// The layer in which a claim says that a chunk is; `None` if it is gone. May wait for the disk.
    #[must_use]
    pub fn claimed(&self, claim: &Claim) -> Option<Arc<Layer>> {
        if let Some(layer) = claim.open_layer() {
            return Some(layer);
        }
        let layer = match self.layer(&claim.key) {
            Ok(layer) => layer.filter(|layer| claim.is_of(layer)),
            Err(error) => {
                tracing::debug!(layer = %claim.key, %error, "nothing is copied from a layer");
                None
            }
        };
        match &layer {
            Some(layer) => self.digests.note_open(claim, layer),
            None => self.digests.note_gone(claim),
        }
        layer
    }

    /// The layer under this key, if its index is in the store. An index or map that turns out to be damaged is
    /// removed, and the layer counts as unknown.
    ///
    /// # Errors
    /// [`Error::Io`] when the files cannot be read.
    pub fn layer(&self, key: &Digest) -> Result<Option<Arc<Layer>>> {
        let mut layers = self.layers.lock();
        if let Some(layer) = layers.get(key).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let dir = self.layer_dir(key);
        match Layer::open(&dir, *key) {
            Ok(Some(layer)) => {
                let layer = Arc::new(layer);
                layers.retain(|_, known| known.strong_count() > 0);
                layers.insert(*key, Arc::downgrade(&layer));
                Ok(Some(layer))
            }
            Ok(None) => Ok(None),
            Err(error @ Error::Malformed { .. }) => {
                tracing::warn!(%key, %error, "the index of a layer is damaged and will be built anew");
                self.discard_layer(&dir)?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the layer under this key was indexed before, without opening it.
    #[must_use]
    pub fn has_layer(&self, key: &Digest) -> bool {
        let is_open = self
            .layers
            .lock()
            .get(key)
            .is_some_and(|layer| layer.strong_count() > 0);
        is_open || self.layer_dir(key).join("index").exists()
    }

    /// Keeps a layer's index, and opens the layer with an empty data file. What the disk does not take is kept in memory
    /// for as long as somebody uses the layer.
    ///
    /// # Errors
    /// [`Error::Malformed`] when `index` is none; [`Error::Io`].
    pub fn add_layer(&self, key: &Digest, index: &[u8]) -> Result<Arc<Layer>> {
        let dir = self.layer_dir(key);
        {
            // Under the lock, so that nobody opens the layer between the steps.
            let mut layers = self.layers.lock();
            if layers.get(key).and_then(Weak::upgrade).is_none() {
                let kept = make_dir(&dir)
                    .and_then(|()| write_whole(&self.dir.join("tmp"), &dir.join("index"), index));
                if let Err(error) = kept {
                    tracing::warn!(%key, %error, "the index of a layer stays in memory");
                    let layer = Arc::new(Layer::unkept(&dir, *key, index)?);
                    layers.insert(*key, Arc::downgrade(&layer));
                    return Ok(layer);
                }
            }
        }
        self.layer(key)?
            .ok_or_else(|| Error::malformed(format!("layer {key}"), "its new index is unreadable"))
    }

    /// Takes over a layer that is complete in a directory aside. One that is known already stays as it is.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] when it cannot be read back.
    fn adopt(&self, key: &Digest, aside: &Path) -> Result<Arc<Layer>> {
        let dir = self.layer_dir(key);
        {
            // Under the lock, so that nobody opens the layer between the steps.
            let layers = self.layers.lock();
            let is_known = layers.get(key).and_then(Weak::upgrade).is_some() || dir.join("index").exists();
            if !is_known {
                // What has no index belongs to nothing.
                if dir.exists() {
                    self.discard_layer(&dir)?;
                }
                fs::rename(aside, &dir).map_err(|e| Error::io(dir.display().to_string(), &e))?;
            }
        }
        self.layer(key)?
            .ok_or_else(|| Error::malformed(format!("layer {key}"), "its new index is unreadable"))
    }

    /// The space on disk that the store takes up. Looks at every file of it, so this is not for a thread that others wait
    /// for.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        disk_bytes(&self.dir, DEPTH)
    }

    /// How much content may still be kept that nobody has asked for: what is left of the budget, and of the disk without a
    /// reserve for others. As [`Self::disk_bytes`], it takes a while.
    #[must_use]
    pub fn room_bytes(&self, budget_bytes: Option<u64>) -> u64 {
        let free = match rustix::fs::statvfs(&self.dir) {
            Ok(disk) => {
                let reserve = FREE_BYTES_MIN.min(disk.f_blocks.saturating_mul(disk.f_frsize) / FREE_PART_MAX);
                disk.f_bavail
                    .saturating_mul(disk.f_frsize)
                    .saturating_sub(reserve)
            }
            Err(_) => 0,
        };
        match budget_bytes {
            Some(budget) => budget.saturating_sub(self.disk_bytes()).min(free),
            None => free,
        }
    }

    /// Removes a damaged layer. Its data goes with its index: without the one, nobody knows what the other holds.
    fn discard_layer(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().unwrap_or_default();
        let aside = self.dir.join("tmp").join(name);
        fs::rename(dir, &aside)
            .and_then(|()| fs::remove_dir_all(&aside))
            .map_err(|e| Error::io(dir.display().to_string(), &e))
    }

    /// The stored tree under `key`, unchecked: the reader checks it.
    ///
    /// # Errors
    /// [`Error::Io`] when it is there but cannot be mapped.
    pub fn tree(&self, key: &Digest) -> Result<Option<Mapped>> {
        Mapped::open(&self.tree_path(key))
    }

    /// Keeps a merged tree; in memory, where the disk does not take it.
    ///
    /// # Errors
    /// [`Error::Io`] when it was written but cannot be mapped.
    pub fn put_tree(&self, key: &Digest, bytes: &[u8]) -> Result<Mapped> {
        let path = self.tree_path(key);
        if let Err(error) = write_whole(&self.dir.join("tmp"), &path, bytes) {
            tracing::warn!(%error, "a merged tree stays in memory");
            return Ok(Mapped::owned(bytes.to_vec()));
        }
        Mapped::open(&path)?
            .ok_or_else(|| Error::not_found(path.display().to_string(), "it was just written"))
    }

    /// Removes a stored tree that turned out to be damaged.
    pub fn remove_tree(&self, key: &Digest) {
        let _ = fs::remove_file(self.tree_path(key));
    }

    /// The stored kernel image of the tree under `key`, unchecked: the reader checks it.
    ///
    /// # Errors
    /// [`Error::Io`] when it is there but cannot be opened.
    pub fn kernel_image(&self, key: &Digest) -> Result<Option<fs::File>> {
        let path = self.kernel_image_path(key);
        match fs::File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path.display().to_string(), &error)),
        }
    }

    /// Keeps the kernel image that `write` writes, in place of one that may be there: who has that open keeps it. Answers
    /// the new one, open for reading.
    ///
    /// # Errors
    /// What `write` returns; [`Error::Io`] when the disk does not take it. Nothing is left behind then.
    pub fn put_kernel_image(
        &self,
        key: &Digest,
        write: impl FnOnce(&mut fs::File) -> Result<()>,
    ) -> Result<fs::File> {
        let path = self.kernel_image_path(key);
        write_aside(&self.dir.join("tmp"), &path, write)?;
        fs::File::open(&path).map_err(|e| Error::io(path.display().to_string(), &e))
    }

    /// Syncs what is open and marks it clean, so that the next start trusts it without looking.
    pub fn close(&self) {
        self.digests.settle();
        let open: Vec<_> = self.layers.lock().values().filter_map(Weak::upgrade).collect();
        for layer in open {
            if let Err(error) = layer.sync_clean() {
                tracing::warn!(layer = %layer.key(), %error, "cannot mark a layer clean");
            }
        }
    }

    fn layer_dir(&self, key: &Digest) -> PathBuf {
        self.dir.join("layers").join(key.hex())
    }

    fn tree_path(&self, key: &Digest) -> PathBuf {
        self.dir.join("trees").join(key.hex())
    }

    fn kernel_image_path(&self, key: &Digest) -> PathBuf {
        self.dir.join("trees").join(format!("{}.erofs", key.hex()))
    }
}

/// The space that the files below `dir` occupy, holes left out. Files that vanish meanwhile count nothing.
fn disk_bytes(dir: &Path, depth: u32) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let bytes_of = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() && depth > 0 => disk_bytes(&entry.path(), depth - 1),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(bytes_of).sum()
}

fn check_version(dir: &Path) -> Result<()> {
    let path = dir.join("VERSION");
    match fs::read_to_string(&path) {
        Ok(text) if text == LAYOUT_VERSION => Ok(()),
        Ok(text) => Err(Error::unsupported(
            dir.display().to_string(),
            format!(
                "it holds {:?}, this program writes {LAYOUT_VERSION:?}; use another --cache-dir",
                text.trim()
            ),
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            write_whole(&dir.join("tmp"), &path, LAYOUT_VERSION.as_bytes())
        }
        Err(error) => Err(Error::io(path.display().to_string(), &error)),
    }
}

/// Removes what was handed over and never taken. What cannot be removed does no harm.
fn clear_incoming(dir: &Path) {
    let is_old = |path: &Path| {
        let modified = fs::metadata(path).and_then(|stat| stat.modified());
        modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > INCOMING_AGE_MAX))
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if is_old(&entry.path()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn clear_dir(dir: &Path) -> Result<()> {
    let failed = |e: std::io::Error| Error::io(dir.display().to_string(), &e);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(failed)?;
    }
    Ok(())
}

/// Writes a file aside, syncs it, and gives it its name: whoever finds the name finds all of it, also after a crash.
fn write_whole(tmp: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    write_aside(tmp, path, |file| {
        file.write_all(bytes)
            .map_err(|e| Error::io(path.display().to_string(), &e))
    })
}

/// A name in `tmp` that nothing else has while this process lives.
fn new_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed).to_string()
}

/// As [`write_whole`], of what `write` writes.
fn write_aside(tmp: &Path, path: &Path, write: impl FnOnce(&mut fs::File) -> Result<()>) -> Result<()> {
    let aside = tmp.join(new_name());
    let failed = |e: std::io::Error| Error::io(path.display().to_string(), &e);
    let written = fs::File::create(&aside).map_err(failed).and_then(|mut file| {
        write(&mut file)?;
        file.sync_data().map_err(failed)
    });
    let named = written.and_then(|()| fs::rename(&aside, path).map_err(failed));
    named.inspect_err(|_| {
        let _ = fs::remove_file(&aside);
    })
}
