//! What is to be brought, in which order, and for whom. No network and no disk.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use lru::LruCache;
use serde::Serialize;
use tokio::time::Instant;

use crate::config::BackgroundMode;
use crate::digest::Digest;
use crate::error::Error;
use crate::fetch::Source;
use crate::store::layer::Layer;

/// The most images that wait to be filled: each holds its layers open.
pub(super) const FILLS_MAX: usize = 16;
/// Images of which it is known that they were touched.
const TOUCHED_MAX: usize = 4096;
/// The first pause after a registry failed.
const PAUSE_MIN: Duration = Duration::from_secs(6);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// After so many requests in a row for what is not as it should be, the rest of the layer is not asked for.
const FAILURES_MAX: u32 = 8;

/// A mount lives for as long as its own end of this does.
pub type Alive = Weak<()>;

/// Members of a layer, in the order of the blob. A list of these is what is to be brought, in its order; those that are there
/// already are passed over.
#[derive(Debug, Clone)]
pub struct Stretch {
    /// Where the layer is to be had.
    pub source: Arc<Source>,
    /// The layer.
    pub layer: Arc<Layer>,
    /// The members.
    pub members: Range<u32>,
}

/// Which part of an image is brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    /// What the image says is read first.
    Landmarks,
    /// Everything.
    Rest,
}

/// What is to be brought of one image.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) image: String,
    pub(super) key: Digest,
    pub(super) what: What,
    pub(super) mode: BackgroundMode,
    /// The mounts that want it.
    pub(super) owners: Vec<Alive>,
    /// What has not been asked for yet.
    pub(super) stretches: VecDeque<Stretch>,
    /// Requests under way.
    pub(super) under_way: usize,
    /// Compressed bytes that were missing at the beginning.
    pub(super) total_bytes: u64,
    /// Those of them that were brought.
    pub(super) done_bytes: u64,
    /// The first failure of a part that was left out.
    pub(super) failure: Option<Error>,
    /// How many failed so since something came.
    pub(super) failures: u32,
    pub(super) paused_until: Option<Instant>,
    pub(super) pause: Duration,
}

impl Fill {
    pub(super) fn new(image: &str, key: Digest, what: What, mode: BackgroundMode, owner: Alive) -> Self {
        Self {
            image: image.to_owned(),
            key,
            what,
            mode,
            owners: vec![owner],
            stretches: VecDeque::new(),
            under_way: 0,
            total_bytes: 0,
            done_bytes: 0,
            failure: None,
            failures: 0,
            paused_until: None,
            pause: PAUSE_MIN,
        }
    }

    /// The registry is away: the next attempt is made after a pause, which gets longer.
    pub(super) fn back_off(&mut self, now: Instant) {
        self.paused_until = Some(now + self.pause);
        self.pause = PAUSE_MAX.min(self.pause * 2);
    }

    /// Something came.
    pub(super) fn progressed(&mut self, bytes: u64) {
        self.done_bytes = self.done_bytes.saturating_add(bytes).min(self.total_bytes);
        self.failures = 0;
        self.paused_until = None;
        self.pause = PAUSE_MIN;
    }

    /// A part of `layer` is not as it should be, and left out: whoever reads it is told why. Where nothing else comes, as of a
    /// blob that is gone, so is all of the layer, or the registry would be asked in vain for each part of it.
    pub(super) fn failed(&mut self, error: Error, layer: &Layer) {
        self.failure.get_or_insert(error);
        self.failures += 1;
        if self.failures >= FAILURES_MAX {
            self.failures = 0;
            self.stretches.retain(|left| left.layer.key() != layer.key());
        }
    }

    fn is_wanted(&self) -> bool {
        self.owners.iter().any(|owner| owner.strong_count() > 0)
    }
}

/// What a touch asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) landmarks: bool,
    pub(super) rest: bool,
}

/// The fills that are not done, those of the image that was touched last first.
#[derive(Debug)]
pub(super) struct Queue {
    fills: VecDeque<Fill>,
    /// What was asked for when an image was touched, by the key of its tree.
    touched: LruCache<Digest, BackgroundMode>,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            fills: VecDeque::new(),
            touched: LruCache::new(NonZeroUsize::MIN.saturating_add(TOUCHED_MAX - 1)),
        }
    }
}

impl Queue {
    /// A mount has an image touched that is known by `key`. Answers what is to be put in for it: each part once, and the rest
    /// when it is first wanted.
    pub(super) fn touch(&mut self, key: Digest, mode: BackgroundMode, owner: &Alive) -> Wanted {
        let known = self.touched.get(&key).copied();
        if known.is_none_or(|known| known < mode) {
            self.touched.put(key, mode);
        }
        for fill in self.fills.iter_mut().filter(|fill| fill.key == key) {
            fill.mode = fill.mode.max(mode);
            fill.owners.retain(|known| known.strong_count() > 0);
            if !fill.owners.iter().any(|known| known.ptr_eq(owner)) {
                fill.owners.push(owner.clone());
            }
        }
        let (mut of_image, others): (VecDeque<Fill>, VecDeque<Fill>) = std::mem::take(&mut self.fills)
            .into_iter()
            .partition(|fill| fill.key == key);
        of_image.extend(others);
        self.fills = of_image;
        Wanted {
            landmarks: known.is_none(),
            rest: known.unwrap_or_default() == BackgroundMode::Off && mode != BackgroundMode::Off,
        }
    }

    /// Puts fills in before all others. Answers those that found no more room.
    pub(super) fn put(&mut self, mut fills: VecDeque<Fill>) -> Vec<Fill> {
        fills.extend(std::mem::take(&mut self.fills));
        let dropped = fills.split_off(fills.len().min(FILLS_MAX));
        self.fills = fills;
        dropped.into_iter().inspect(|fill| self.forget(fill)).collect()
    }

    /// Lets a part of an image be asked for again at its next touch.
    fn forget(&mut self, fill: &Fill) {
        match fill.what {
            What::Landmarks => drop(self.touched.pop(&fill.key)),
            What::Rest => {
                if let Some(mode) = self.touched.get_mut(&fill.key) {
                    *mode = BackgroundMode::Off;
                }
            }
        }
    }

    /// The fill whose turn it is: what images say is read first before everything else, and the image that was touched last
    /// before the others.
    pub(super) fn turn(&mut self, now: Instant) -> Option<&mut Fill> {
        let is_due =
            |fill: &Fill| !fill.stretches.is_empty() && fill.paused_until.is_none_or(|until| until <= now);
        let first = |what| {
            self.fills
                .iter()
                .position(|fill| fill.what == what && is_due(fill))
        };
        let position = first(What::Landmarks).or_else(|| first(What::Rest))?;
        self.fills.get_mut(position)
    }

    pub(super) fn find(&mut self, key: &Digest, what: What) -> Option<&mut Fill> {
        let is_it = |fill: &&mut Fill| fill.key == *key && fill.what == what;
        self.fills.iter_mut().find(is_it)
    }

    /// Takes out the fills that are done.
    pub(super) fn take_done(&mut self) -> Vec<Fill> {
        self.take(|fill| fill.stretches.is_empty() && fill.under_way == 0)
    }

    /// Takes out the fills that no mount wants any more. They may be asked for again.
    pub(super) fn take_unwanted(&mut self) -> Vec<Fill> {
        self.drop_all(|fill| !fill.is_wanted())
    }

    /// Takes out fills that cannot go on. They may be asked for again.
    pub(super) fn drop_all(&mut self, which: impl Fn(&Fill) -> bool) -> Vec<Fill> {
        let dropped = self.take(which);
        dropped.iter().for_each(|fill| self.forget(fill));
        dropped
    }

    fn take(&mut self, which: impl Fn(&Fill) -> bool) -> Vec<Fill> {
        let (taken, kept): (Vec<Fill>, VecDeque<Fill>) = {
            let fills = std::mem::take(&mut self.fills);
            let mut kept = VecDeque::with_capacity(fills.len());
            let mut taken = Vec::new();
            for fill in fills {
                match which(&fill) {
                    true => taken.push(fill),
                    false => kept.push_back(fill),
                }
            }
            (taken, kept)
        };
        self.fills = kept;
        taken
    }

    pub(super) fn fills(&self) -> impl Iterator<Item = &Fill> {
        self.fills.iter()
    }
}
