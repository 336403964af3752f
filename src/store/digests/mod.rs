//! Where on disk is a chunk with this digest? So that what another layer has already is copied and not fetched.
//!
//! Answers are *claims*: the table (`table.rs`) may be damaged, old, or have mistaken one digest for another, and what it
//! names may be evicted. Whoever gets one opens the layer, compares digest and length with what its index says, and looks at
//! its map. So the files here are never synced, and whatever is wrong with them they begin anew. They fill again as layers
//! are opened: each is offered then, and a thread of its own adds those that are not in yet, a few milliseconds for a layer
//! of ten thousand chunks. Whoever opens one does not wait for that, and has the cores to himself at first.
//!
//! The list has, for each layer, whom its content may be shown to (see "Who sees what" in `ARCHITECTURE.md`). What is not
//! known there is for nobody: a loss closes and never opens.
//!
//! ```text
//! DIR/digests/table    the table; 21 to 43 bytes a chunk that is known, at most 512 MiB
//! DIR/digests/layers   a record of 64 for each number: key 32 | audience u64 | index id u32 | …
//! ```

mod table;

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLock};

use self::table::{Entry, SLOTS_MAX, SLOTS_MIN, Table};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::store::layer::Layer;
use crate::store::lock::make_dir;

const RECORD_BYTES: usize = 64;
/// The most layers that get a number. Then all begins anew: most of them will be gone by then.
const LAYERS_MAX: usize = 1 << 16;
/// The most layers that wait to be added. What is left out is offered again when it is next opened.
const WAITING_MAX: usize = 1024;

/// How long a layer waits to be added: whoever opened it is about to list it.
const ADDING_DELAY: Duration = Duration::from_secs(1);
/// How long [`Digests::settle`] waits at most.
const SETTLE_WAIT: Duration = Duration::from_secs(5);

/// Whom the content of a layer may be shown to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Audience(u64);

impl Audience {
    /// Anyone: the registry gives it without credentials.
    #[must_use]
    pub fn everyone() -> Self {
        Self::of("everyone")
    }

    /// Those who may read this repository.
    #[must_use]
    pub fn repository(name: &str) -> Self {
        Self::of(&format!("repository {name}"))
    }

    fn of(who: &str) -> Self {
        let digest = Digest::of(who.as_bytes());
        let (first, _) = digest.as_bytes().split_first_chunk().unwrap_or((&[0; 8], &[]));
        Self(u64::from_le_bytes(*first))
    }

    /// Whether what is for these may come into a layer that is for `other`.
    fn includes(self, other: Self) -> bool {
        self == other || self == Self::everyone()
    }
}

/// A layer that has a number.
#[derive(Debug)]
struct Known {
    key: Digest,
    index_id: u32,
    /// `None` for a layer that is gone.
    audience: Option<Audience>,
    layer: Weak<Layer>,
}

/// A chunk that may have a digest.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The key of its layer.
    pub key: Digest,
    /// Its number in the layer's index.
    pub chunk: u32,
    /// What is known as [`Layer::index_id`].
    index_id: u32,
    number: u32,
    layer: Weak<Layer>,
}

impl Claim {
    /// Its layer, if somebody uses that now.
    #[must_use]
    pub fn open_layer(&self) -> Option<Arc<Layer>> {
        self.layer.upgrade()
    }

    /// Whether it is about `layer` as that is now.
    pub(super) fn is_of(&self, layer: &Layer) -> bool {
        (&self.key, self.index_id) == (layer.key(), layer.index_id())
    }
}

/// The claims of the moment. It holds no lock, as a look may have to wait for the disk by a page fault, and who adds layers
/// would have to wait for it, and the next look for him.
#[derive(Debug)]
pub struct Look<'a> {
    table: Arc<Table>,
    known: &'a RwLock<Vec<Known>>,
}

impl Look<'_> {
    /// The chunks that may have `digest`, of layers whose content may be shown to `audience`.
    pub fn claims(&self, digest: Digest, audience: Audience) -> impl Iterator<Item = Claim> {
        self.table.find(digest).filter_map(move |entry| {
            let known = self.known.read();
            let known = known.get(entry.layer as usize)?;
            known.audience?.includes(audience).then(|| Claim {
                key: known.key,
                chunk: entry.chunk,
                index_id: known.index_id,
                number: entry.layer,
                layer: Weak::clone(&known.layer),
            })
        })
    }
}

/// What is known of the digests on this disk.
#[derive(Debug)]
pub struct Digests {
    dir: PathBuf,
    /// Changed by nobody but who adds layers, one at a time.
    table: RwLock<Option<Arc<Table>>>,
    known: RwLock<Vec<Known>>,
    waiting: Mutex<Waiting>,
    /// Somebody waits for the layers to be added, or they are.
    changed: Condvar,
}

/// Layers to be added.
#[derive(Debug, Default)]
struct Waiting {
    layers: VecDeque<(Arc<Layer>, Audience)>,
    is_adding: bool,
    is_awaited: bool,
}

impl Digests {
    /// What `dir` holds.
    pub(super) fn open(dir: PathBuf) -> Arc<Self> {
        let table = Table::open(&dir.join("table"));
        let known = table.as_ref().and_then(|_| read_list(&dir.join("layers")));
        Arc::new(Self {
            dir,
            table: RwLock::new(table.filter(|_| known.is_some()).map(Arc::new)),
            known: RwLock::new(known.unwrap_or_default()),
            waiting: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Offers a layer that was opened for `audience`: its chunks can be found soon.
    pub fn offer(self: &Arc<Self>, layer: &Arc<Layer>, audience: Audience) {
        if layer.index().chunk_count() == 0 || self.recall(layer, audience) {
            return;
        }
        let mut waiting = self.waiting.lock();
        if waiting.layers.len() >= WAITING_MAX {
            return;
        }
        waiting.layers.push_back((Arc::clone(layer), audience));
        if waiting.is_adding {
            return;
        }
        let digests = Arc::clone(self);
        let thread = std::thread::Builder::new().name("digests".to_owned());
        match thread.spawn(move || digests.add_waiting()) {
            Ok(_) => waiting.is_adding = true,
            Err(error) => {
                tracing::warn!(%error, "layers are not looked at for chunks that others have too");
                waiting.layers.clear();
            }
        }
    }

    /// Waits until every layer that was offered can be found, but no longer than 5 s: what is left is offered again when it
    /// is next opened.
    pub fn settle(&self) {
        let until = Instant::now() + SETTLE_WAIT;
        let mut waiting = self.waiting.lock();
        while waiting.is_adding {
            waiting.is_awaited = true;
            self.changed.notify_all();
            if self.changed.wait_until(&mut waiting, until).timed_out() {
                return;
            }
        }
    }

    /// Where chunks may be; `None` while nothing is known.
    #[must_use]
    pub fn look(&self) -> Option<Look<'_>> {
        let table = self.table.read().clone()?;
        let known = &self.known;
        Some(Look { table, known })
    }

    /// The layer of a claim was opened: the next who looks need not.
    pub(super) fn note_open(&self, claim: &Claim, layer: &Arc<Layer>) {
        if let Some(known) = self.known.write().get_mut(claim.number as usize)
            && known.key == claim.key
        {
            known.layer = Arc::downgrade(layer);
        }
    }

    /// The layer of a claim is gone, or another than it was.
    pub(super) fn note_gone(&self, claim: &Claim) {
        if let Some(known) = self.known.write().get_mut(claim.number as usize)
            && (known.key, known.index_id) == (claim.key, claim.index_id)
        {
            known.audience = None;
        }
    }

    /// Whether a layer is known and for `audience`. Then it is known to be open.
    fn recall(&self, layer: &Arc<Layer>, audience: Audience) -> bool {
        let mut known = self.known.write();
        let Some(known) = known.iter_mut().find(|known| known.is(layer)) else {
            return false;
        };
        known.layer = Arc::downgrade(layer);
        known.audience.is_some_and(|whom| whom.includes(audience))
    }

    fn add_waiting(&self) {
        let mut waiting = self.waiting.lock();
        let is_alone = |waiting: &mut Waiting| !waiting.is_awaited;
        self.changed.wait_while_for(&mut waiting, is_alone, ADDING_DELAY);
        drop(waiting);
        loop {
            let mut waiting = self.waiting.lock();
            let next = waiting.layers.pop_front();
            waiting.is_adding = next.is_some();
            let Some((layer, audience)) = next else {
                waiting.is_awaited = false;
                self.changed.notify_all();
                return;
            };
            drop(waiting);
            if let Err(error) = self.add(&layer, audience) {
                tracing::debug!(layer = %layer.key(), %error, "its chunks cannot be found by others");
            }
        }
    }

    /// Adds a layer. Its record is written last: what was cut off is added anew.
    fn add(&self, layer: &Arc<Layer>, audience: Audience) -> Result<()> {
        let (number, is_new) = self.number(layer, audience);
        let added = match is_new {
            true => self.add_chunks(layer, number),
            false => Ok(()),
        };
        let added = added.and_then(|()| self.write_record(number, layer, audience));
        added.inspect_err(|_| {
            if let Some(known) = self.known.write().get_mut(number as usize) {
                known.audience = None;
            }
        })
    }

    /// The number of a layer, and whether it is a new one.
    fn number(&self, layer: &Arc<Layer>, audience: Audience) -> (u32, bool) {
        let mut table = self.table.write();
        let mut known = self.known.write();
        if let Some(number) = known.iter().position(|known| known.is(layer)) {
            known[number].audience = Some(audience);
            return (number as u32, false);
        }
        if known.len() >= LAYERS_MAX {
            known.clear();
            *table = None;
        }
        known.push(Known {
            key: *layer.key(),
            index_id: layer.index_id(),
            audience: Some(audience),
            layer: Arc::downgrade(layer),
        });
        ((known.len() - 1) as u32, true)
    }

    fn add_chunks(&self, layer: &Layer, number: u32) -> Result<()> {
        let index = layer.index();
        let known = self.table.read().clone();
        let mut table = match known {
            Some(table) => table,
            None => {
                make_dir(&self.dir)?;
                // Numbers of another table mean nothing in this one.
                let _ = std::fs::remove_file(self.dir.join("layers"));
                let slots = u64::from(index.chunk_count())
                    .saturating_mul(2)
                    .next_power_of_two();
                self.replace_table(None, slots.clamp(SLOTS_MIN, SLOTS_MAX))?
            }
        };
        for chunk in 0..index.chunk_count() {
            if table.is_full() && table.slots() < SLOTS_MAX {
                table = self.replace_table(Some(&table), table.slots() * 2)?;
            }
            if let Some(digest) = index.chunk(chunk)?.digest {
                table.put(&digest, Entry { layer: number, chunk });
            }
        }
        index.source().vouch("layer index", ())
    }

    /// Puts a table of so many slots in the place of the present one, with what that has. It takes a second or longer for the
    /// largest, so no lock is held: others go on with the present one meanwhile.
    fn replace_table(&self, old: Option<&Table>, slots: u64) -> Result<Arc<Table>> {
        let (path, aside) = (self.dir.join("table"), self.dir.join("table.new"));
        let replace = || {
            let table = Table::create(&aside, slots)?;
            if let Some(old) = old {
                let here: Vec<bool> = self
                    .known
                    .read()
                    .iter()
                    .map(|known| known.audience.is_some())
                    .collect();
                let is_here = |entry: Entry| here.get(entry.layer as usize) == Some(&true);
                table.put_all(old, is_here);
            }
            std::fs::rename(&aside, &path)?;
            let table = Arc::new(table);
            *self.table.write() = Some(Arc::clone(&table));
            Ok(table)
        };
        replace().map_err(|error: std::io::Error| {
            let _ = std::fs::remove_file(&aside);
            Error::io(path.display().to_string(), &error)
        })
    }

    fn write_record(&self, number: u32, layer: &Layer, audience: Audience) -> Result<()> {
        let mut record = [0; RECORD_BYTES];
        record[..32].copy_from_slice(layer.key().as_bytes());
        record[32..40].copy_from_slice(&audience.0.to_le_bytes());
        record[40..44].copy_from_slice(&layer.index_id().to_le_bytes());
        let path = self.dir.join("layers");
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(&path);
        let written =
            file.and_then(|file| file.write_all_at(&record, u64::from(number) * RECORD_BYTES as u64));
        written.map_err(|error| Error::io(path.display().to_string(), &error))
    }
}

impl Known {
    fn is(&self, layer: &Layer) -> bool {
        self.audience.is_some() && self.key == *layer.key() && self.index_id == layer.index_id()
    }
}

/// The list of layers; `None` where it cannot be read.
fn read_list(path: &Path) -> Option<Vec<Known>> {
    let mut bytes = Vec::new();
    let bytes_max = (LAYERS_MAX * RECORD_BYTES) as u64;
    let file = File::open(path).ok()?;
    file.take(bytes_max).read_to_end(&mut bytes).ok()?;
    let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
    let known = records.iter().map(|record| {
        let mut fields = crate::layer::fields::Fields(record);
        let (key, audience) = (Digest::from_bytes(fields.take()), fields.u64());
        Known {
            key,
            // What was not written is zeros.
            audience: (audience != 0).then_some(Audience(audience)),
            index_id: fields.u32(),
            layer: Weak::new(),
        }
    });
    Some(known.collect())
}

#[cfg(test)]
mod tests;
