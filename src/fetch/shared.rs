//! A directory in which machines leave each other the indexes of plain layers, perhaps on a network: who finds one there
//! need not read the whole layer.
//!
//! What stands there is checked like anything from outside ([`crate::layer::exchange`]), but whether an index tells the
//! truth about its layer nobody can check without the whole layer. So a directory or file that everyone may write to is
//! not used. A directory that hangs is given up after a moment: then this is a cache miss like any other.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::{Fetcher, Source, blocking, key};
use crate::layer::exchange::{self, Exchanged, PACKED_BYTES_MAX};
use crate::layer::index::Index;
use crate::layer::{Descriptor, WHOLE_BLOB};
use crate::store::layer::Layer;

/// How long the directory is waited for.
const WAIT: Duration = Duration::from_secs(5);
/// For how long it is left alone after that.
const LEFT_ALONE: Duration = Duration::from_secs(300);
/// Threads that are in the directory at the same time: one that hangs may do so for ever, and there are not many.
const THREADS_MAX: usize = 4;
/// Bytes of a file beside the packed index, with room.
const REST_BYTES: u64 = 4096;
/// The permission of everyone to write.
const OTHERS_WRITE: u32 = 0o002;
/// Others may not remove what is not theirs.
const STICKY: u32 = 0o1000;

/// The directory.
#[derive(Debug)]
pub(super) struct SharedIndexes {
    dir: PathBuf,
    wait: Duration,
    hung_at: Mutex<Option<Instant>>,
    /// One permit for each thread in the directory.
    threads: Arc<Semaphore>,
}

impl SharedIndexes {
    pub(super) fn new(dir: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            dir,
            wait: WAIT,
            hung_at: Mutex::new(None),
            threads: Arc::new(Semaphore::new(THREADS_MAX)),
        })
    }

    /// The index of a layer, if there is a good one. Whatever is wrong is said in the log.
    async fn find(self: &Arc<Self>, runtime: &Handle, layer: Digest, size: u64) -> Option<Vec<u8>> {
        let path = self.path(&layer);
        let reading = path.clone();
        let found = self.bounded(runtime, move |_| read(&reading, &layer, size)).await;
        match found {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a shared index is not used");
                None
            }
        }
    }

    /// Leaves the index of a layer for others. Whatever goes wrong is said in the log.
    async fn leave(self: &Arc<Self>, runtime: &Handle, digest: Digest, layer: Arc<Layer>) {
        let path = self.path(&digest);
        let writing = path.clone();
        let left = self.bounded(runtime, move |shared| {
            let index = layer.index();
            let known = read(&writing, &digest, index.summary().blob_bytes);
            // What is of no use to us, or says something else than the whole blob did, is of no use to others.
            if known.is_ok_and(|known| known.is_some_and(|known| known == index.source()[..])) {
                return Ok(());
            }
            let index = index.source();
            let record = index.vouch("layer index", exchange::pack(&digest, index)?)?;
            write(&shared.dir, &writing, &record)
        });
        if let Err(error) = left.await {
            tracing::warn!(path = %path.display(), %error, "an index cannot be left for others");
        }
    }

    fn path(&self, layer: &Digest) -> PathBuf {
        self.dir.join(format!("sha256-{}.index", layer.hex()))
    }

    async fn bounded<T: Send + 'static>(
        self: &Arc<Self>,
        runtime: &Handle,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if self.hung_at.lock().is_some_and(|at| at.elapsed() < LEFT_ALONE) {
            return Err(Error::busy(
                self.dir.display().to_string(),
                "it did not answer a moment ago",
            ));
        }
        let shared = Arc::clone(self);
        let working = async {
            // Nobody closes it.
            let permit = Arc::clone(&self.threads).acquire_owned().await;
            let permit = permit.map_err(|_| Error::Interrupted)?;
            blocking(runtime, move || {
                let outcome = work(&shared);
                drop(permit);
                outcome
            })
            .await
        };
        tokio::time::timeout(self.wait, working)
            .await
            .unwrap_or_else(|_| {
                *self.hung_at.lock() = Some(Instant::now());
                let waited_ms = u64::try_from(self.wait.as_millis()).unwrap_or(u64::MAX);
                Err(Error::Timeout {
                    what: self.dir.display().to_string(),
                    waited_ms,
                })
            })
    }
}

impl Fetcher {
    /// A layer whose index another machine has left. One of another tar than the image promises is passed over: it would
    /// stand in the way of the right one for ever.
    ///
    /// # Errors
    /// [`Error::Io`]; as [`Self::promise`].
    pub(super) async fn shared_layer(self: &Arc<Self>, source: &Source) -> Result<Option<Arc<Layer>>> {
        let Some(shared) = self.shared_indexes.as_ref().filter(|_| source.is_plain()) else {
            return Ok(None);
        };
        let Descriptor { digest, size, .. } = source.descriptor;
        let Some(index) = shared.find(&self.runtime, digest, size).await else {
            return Ok(None);
        };
        let tar = Index::open(index.as_slice())?.summary().passed();
        let promise = self.promise(source).await?;
        if let (Some(promise), Some(tar)) = (promise, tar)
            && let Err(error) = promise.check(source, tar)
        {
            tracing::warn!(%error, "a shared index is not used");
            return Ok(None);
        }
        tracing::info!(layer = %digest, "another machine has read this layer: its index is taken");
        let (store, key) = (Arc::clone(&self.store), source.key());
        let layer = blocking(&self.runtime, move || store.add_layer(&key, &index)).await?;
        self.counters.layers_indexed.fetch_add(1, Ordering::Relaxed);
        Ok(Some(layer))
    }

    /// Leaves the index of a layer for other machines. Nobody waits for that.
    pub(super) fn share(&self, source: &Source, layer: &Arc<Layer>) {
        let Some(shared) = self.shared_indexes.clone().filter(|_| source.is_plain()) else {
            return;
        };
        let (runtime, digest, layer) = (self.runtime.clone(), source.descriptor.digest, Arc::clone(layer));
        self.runtime
            .spawn(async move { shared.leave(&runtime, digest, layer).await });
    }

    /// Puts an index that came from somebody else into the store, who vouches for it. Answers whether it was missing.
    ///
    /// # Errors
    /// [`Error::Malformed`] for what is no index; [`Error::Io`].
    pub async fn adopt_index(&self, exchanged: Exchanged) -> Result<bool> {
        let store = Arc::clone(&self.store);
        blocking(&self.runtime, move || {
            let Exchanged { layer, index } = exchanged;
            let size = Index::open(index.as_slice())?.summary().blob_bytes;
            let key = key(&layer, size, WHOLE_BLOB);
            if store.layer(&key)?.is_some() {
                return Ok(false);
            }
            store.add_layer(&key, &index).map(|_| true)
        })
        .await
    }
}

/// Reads and checks the index of a layer; `None` where there is none.
fn read(path: &Path, layer: &Digest, size: u64) -> Result<Option<Vec<u8>>> {
    let failed = |error: std::io::Error| Error::io(path.display().to_string(), &error);
    let mut options = File::options();
    // Neither a pipe nor a link to somewhere else is waited for or followed.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = match options.read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    let stat = file.metadata().map_err(failed)?;
    let refuse = |why: &str| Err(Error::malformed(path.display().to_string(), why));
    if !stat.is_file() || stat.len() > PACKED_BYTES_MAX + REST_BYTES {
        return refuse("it is no file, or too large to be an index");
    }
    let dir = fs::metadata(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
    let is_for_all = dir.mode() & OTHERS_WRITE != 0;
    if stat.mode() & OTHERS_WRITE != 0 || (is_for_all && dir.mode() & STICKY == 0) {
        return refuse("everyone may write to it or to its directory; take that permission away");
    }
    let trusted = [0, rustix::process::geteuid().as_raw(), dir.uid()];
    if is_for_all && !trusted.contains(&stat.uid()) {
        return refuse("everyone may put files into its directory, and it is a stranger's");
    }
    let mut bytes = Vec::with_capacity(stat.len() as usize);
    file.take(stat.len()).read_to_end(&mut bytes).map_err(failed)?;
    let mut rest = bytes.as_slice();
    let Exchanged { layer: named, index } = exchange::unpack(&mut rest)?;
    if !rest.is_empty() || named != *layer || Index::open(index.as_slice())?.summary().blob_bytes != size {
        return refuse("it is the index of another layer");
    }
    Ok(Some(index))
}

/// Writes a file aside and gives it its name, so that others find all of it or nothing.
fn write(dir: &Path, path: &Path, record: &[u8]) -> Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // Several machines write here: the name must be one that no other has.
    let unique = Digest::of(
        format!(
            "{:?} {number} {}",
            std::time::SystemTime::now(),
            std::process::id()
        )
        .as_bytes(),
    );
    let aside = dir.join(format!(".{}.part", &unique.hex()[..32]));
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&aside)
        .and_then(|mut file| {
            file.write_all(record)?;
            file.sync_data()
        })
        .and_then(|()| fs::rename(&aside, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&aside);
        Error::io(path.display().to_string(), &error)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::layer::Format;
    use crate::layer::index::{Coding, Summary};
    use crate::layer::index_builder::IndexBuilder;

    const SIZE: u64 = 900;

    fn layer() -> Digest {
        Digest::of(b"layer")
    }

    /// The layer in a store of its own.
    fn stored() -> (tempfile::TempDir, Arc<Layer>) {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(dir.path()).unwrap();
        let layer = store.add_layer(&Digest::of(b"key"), &index()).unwrap();
        (dir, layer)
    }

    fn index() -> Vec<u8> {
        let summary = Summary {
            diff_id: Digest::of(b"tar"),
            ..Summary::of(Format::Gzip, SIZE)
        };
        IndexBuilder::new(Coding::Deflate)
            .finish(summary, SIZE)
            .unwrap()
            .to_vec()
    }

    fn directory() -> (tempfile::TempDir, Arc<SharedIndexes>) {
        let dir = tempfile::tempdir().unwrap();
        let shared = SharedIndexes::new(dir.path().to_owned());
        (dir, shared)
    }

    #[tokio::test]
    async fn what_one_leaves_another_finds() {
        let (dir, shared) = directory();
        let runtime = Handle::current();
        assert_eq!(shared.find(&runtime, layer(), SIZE).await, None);
        let (_store, stored) = stored();
        shared.leave(&runtime, layer(), stored).await;
        assert_eq!(shared.find(&runtime, layer(), SIZE).await, Some(index()));
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[tokio::test]
    async fn what_is_not_this_layers_or_anyones_to_change_is_not_used() {
        let (dir, shared) = directory();
        let runtime = Handle::current();
        let (_store, stored) = stored();
        shared.leave(&runtime, layer(), Arc::clone(&stored)).await;
        let path = shared.path(&layer());
        assert_eq!(
            shared.find(&runtime, layer(), SIZE + 1).await,
            None,
            "another size"
        );
        let other = Digest::of(b"other");
        fs::copy(&path, shared.path(&other)).unwrap();
        assert_eq!(shared.find(&runtime, other, SIZE).await, None, "another layer");

        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        chmod(&path, 0o666);
        assert_eq!(
            shared.find(&runtime, layer(), SIZE).await,
            None,
            "a file for everyone"
        );
        chmod(&path, 0o644);
        chmod(dir.path(), 0o777);
        assert_eq!(
            shared.find(&runtime, layer(), SIZE).await,
            None,
            "a directory for everyone"
        );
        chmod(dir.path(), 0o1777);
        assert_eq!(
            shared.find(&runtime, layer(), SIZE).await,
            Some(index()),
            "but with a sticky bit"
        );
        chmod(dir.path(), 0o755);

        let mut bytes = fs::read(&path).unwrap();
        bytes[70] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_eq!(shared.find(&runtime, layer(), SIZE).await, None, "a damaged one");
        shared.leave(&runtime, layer(), Arc::clone(&stored)).await;
        assert_eq!(
            shared.find(&runtime, layer(), SIZE).await,
            Some(index()),
            "whoever has read the layer puts a good one in its place"
        );
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(shared.path(&other), &path).unwrap();
        assert_eq!(shared.find(&runtime, layer(), SIZE).await, None, "a link");
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert_eq!(shared.find(&runtime, layer(), SIZE).await, None, "a pipe");
    }

    #[tokio::test]
    async fn a_directory_that_hangs_is_left_alone_for_a_while() {
        let shared = Arc::new(SharedIndexes {
            dir: PathBuf::new(),
            wait: Duration::from_millis(20),
            hung_at: Mutex::new(None),
            threads: Arc::new(Semaphore::new(THREADS_MAX)),
        });
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let runtime = Handle::current();
        let waited = shared
            .bounded(&runtime, move |_| {
                let _ = hang.recv();
                Ok(())
            })
            .await;
        assert!(matches!(waited, Err(Error::Timeout { .. })), "{waited:?}");
        drop(release);
        let next = shared.bounded(&runtime, |_| Ok(())).await;
        assert!(matches!(next, Err(Error::Busy { .. })), "{next:?}");
    }

    #[tokio::test]
    async fn a_directory_that_hangs_takes_few_threads_whoever_asks() {
        let shared = Arc::new(SharedIndexes {
            dir: PathBuf::new(),
            wait: Duration::from_millis(50),
            hung_at: Mutex::new(None),
            threads: Arc::new(Semaphore::new(THREADS_MAX)),
        });
        let runtime = Handle::current();
        let (hanging, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..THREADS_MAX * 4 {
            let (shared, runtime) = (Arc::clone(&shared), runtime.clone());
            let (hanging, over) = (Arc::clone(&hanging), Arc::clone(&over));
            let hang = move |_: &SharedIndexes| {
                hanging.fetch_add(1, Ordering::Relaxed);
                while !over.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            };
            asking.spawn(async move { shared.bounded(&runtime, hang).await });
        }
        let outcomes = asking.join_all().await;
        over.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
        assert_eq!(hanging.load(Ordering::Relaxed), THREADS_MAX as u64);
    }
}
