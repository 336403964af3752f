//! What is brought before anybody needs it: what an image says is read first (its prefetch landmarks), and, where it is
//! wished, all the rest of it.
//!
//! Readers come first. No request is begun while anybody waits for the network; one that is under way stands still, unless it
//! brings what is waited for, and is so short ([`pace`]) that what of it is in the line already delays nobody for long. Never
//! more than [`REQUESTS_MAX`] are under way, on fewer permits of a host than readers have left, and they decode on half of
//! the cores.
//!
//! One worker does it all while there is anything to do. What it brings goes through the flights of every other fetch, so
//! nothing comes twice, and a reader who needs what is on its way waits for just that.

mod batch;
mod pace;
mod queue;
mod worker;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use crate::config::BackgroundMode;
use crate::digest::Digest;
use crate::error::Result;
use crate::fetch::background::pace::RequestSize;
pub use crate::fetch::background::queue::{Alive, Stretch};
use crate::fetch::background::queue::{Fill, Queue, Wanted, What};
use crate::fetch::device::DeviceAt;
use crate::fetch::{Fetcher, blocking, plan};

/// The most requests under way.
pub(super) const REQUESTS_MAX: usize = 2;

/// What the configuration says about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackgroundOptions {
    /// Whether prefetch landmarks are followed.
    pub landmarks: bool,
    /// The most bytes a second of the rest.
    pub bytes_per_s: Option<u64>,
    /// How many requests may be under way to one host, those of readers included.
    pub concurrency: usize,
}

impl Default for BackgroundOptions {
    fn default() -> Self {
        Self {
            landmarks: true,
            bytes_per_s: None,
            concurrency: 32,
        }
    }
}

impl BackgroundOptions {
    fn requests_max(&self) -> usize {
        (self.concurrency / 4).clamp(1, REQUESTS_MAX)
    }

    /// Whether a request may stand still: one that holds the last permit of a host would wait for whoever waits for that.
    pub(super) fn may_stand_still(&self) -> bool {
        self.concurrency >= 4
    }
}

/// What is to be brought, and whether somebody is at it.
#[derive(Debug)]
pub(super) struct Background {
    state: Mutex<State>,
    /// Tells the worker that there is more to do.
    woken: Notify,
    /// Half of the cores: readers have the others at once.
    decoders: Arc<Semaphore>,
    size: Mutex<RequestSize>,
}

#[derive(Debug, Default)]
struct State {
    queue: Queue,
    is_working: bool,
    /// What the fill waits for whose turn it is.
    waits: Option<Waits>,
}

#[derive(Debug)]
struct Waits {
    key: Digest,
    what: What,
    for_what: &'static str,
}

/// How far a fill is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FillStatus {
    /// The image.
    pub image: String,
    /// `landmarks`, or `rest`.
    part: What,
    /// Compressed bytes that it brought.
    pub done_bytes: u64,
    /// Compressed bytes that were missing when it was touched.
    pub total_bytes: u64,
    /// Requests under way.
    pub requests: usize,
    /// What keeps it from going on: readers, the rate limit, the registry.
    pub waits_for: Option<&'static str>,
    /// Why a part of it does not come.
    pub failure: Option<String>,
}

impl Background {
    pub(super) fn new(cores: usize) -> Self {
        Self {
            state: Mutex::default(),
            woken: Notify::new(),
            decoders: Arc::new(Semaphore::new((cores / 2).max(1))),
            size: Mutex::default(),
        }
    }

    /// A request of `bytes` took `took`. Only of what came over the line: what was copied comes sooner, and says nothing of it.
    pub(super) fn measured(&self, bytes: u64, took: Duration) {
        self.size.lock().measured(bytes, took);
    }

    /// One permit for each batch of it that is decoded.
    pub(super) fn decoders(&self) -> Arc<Semaphore> {
        Arc::clone(&self.decoders)
    }
}

/// An image whose root filesystem a mount has shown.
#[derive(Debug, Clone)]
pub struct Touch {
    /// The image, for messages.
    pub image: String,
    /// The key of its merged tree.
    pub key: Digest,
    /// What the mount wants of it.
    pub mode: BackgroundMode,
    /// Whether the mount is there still.
    pub mount: Alive,
}

impl Fetcher {
    /// Notes that an image's root filesystem is seen. `layers` opens its layers, base first, as far as they are known; it is
    /// asked only if there is something to do: the first time, in the life of this process.
    pub fn touched<L>(self: &Arc<Self>, touch: Touch, layers: impl FnOnce() -> L + Send + 'static)
    where
        L: Future<Output = Result<Vec<DeviceAt>>> + Send + 'static,
    {
        let mode = touch.mode;
        let options = &self.options.background;
        if mode == BackgroundMode::Off && !options.landmarks {
            return;
        }
        let mut wanted = self
            .background
            .state
            .lock()
            .queue
            .touch(touch.key, mode, &touch.mount);
        wanted.landmarks &= options.landmarks;
        if !wanted.landmarks && !wanted.rest {
            return;
        }
        let fetcher = Arc::clone(self);
        self.runtime.spawn(async move {
            let image = touch.image.clone();
            let filled = match layers().await {
                Ok(layers) => fetcher.fill(touch, wanted, layers).await,
                Err(error) => Err(error),
            };
            if let Err(error) = filled {
                tracing::info!(image, %error, "nothing is brought ahead");
            }
        });
    }

    /// Puts in what is wanted of an image and begins to work.
    async fn fill(self: &Arc<Self>, touch: Touch, wanted: Wanted, layers: Vec<DeviceAt>) -> Result<()> {
        let remote: Vec<DeviceAt> = layers
            .into_iter()
            .filter(|at| self.is_remote(&at.source))
            .collect();
        let fills = move || fills(&touch, wanted, &remote);
        let fills = blocking(&self.runtime, fills).await?;
        if fills.is_empty() {
            return Ok(());
        }
        let mut state = self.background.state.lock();
        for dropped in state.queue.put(fills) {
            tracing::info!(
                image = dropped.image,
                done_bytes = dropped.done_bytes,
                total_bytes = dropped.total_bytes,
                "no longer brought ahead: others were touched since"
            );
        }
        if !std::mem::replace(&mut state.is_working, true) {
            self.runtime.spawn(worker::work(Arc::clone(self)));
        }
        drop(state);
        self.background.woken.notify_one();
        Ok(())
    }

    /// How far the images are that are brought ahead, those first that were touched last.
    #[must_use]
    pub fn background(&self) -> Vec<FillStatus> {
        let state = self.background.state.lock();
        let now = Instant::now();
        let status = |fill: &Fill| FillStatus {
            waits_for: match &state.waits {
                _ if fill.paused_until.is_some_and(|until| until > now) => Some("the registry"),
                Some(waits) if waits.key == fill.key && waits.what == fill.what => Some(waits.for_what),
                _ => None,
            },
            image: fill.image.clone(),
            part: fill.what,
            done_bytes: fill.done_bytes,
            total_bytes: fill.total_bytes,
            requests: fill.under_way,
            failure: fill.failure.as_ref().map(ToString::to_string),
        };
        state.queue.fills().map(status).collect()
    }
}

/// The fills of what is wanted of an image and not there. Looks at every member.
fn fills(touch: &Touch, wanted: Wanted, layers: &[DeviceAt]) -> Result<VecDeque<Fill>> {
    let mut fills = VecDeque::new();
    for (what, is_wanted) in [(What::Landmarks, wanted.landmarks), (What::Rest, wanted.rest)] {
        let mut fill = Fill::new(&touch.image, touch.key, what, touch.mode, touch.mount.clone());
        for DeviceAt { source, layer } in layers.iter().filter(|_| is_wanted) {
            let index = layer.index();
            let members = match what {
                What::Landmarks => plan::members_in(index, &(0..index.summary().prefetch_end))?,
                What::Rest => 0..index.member_count(),
            };
            let stretch = Stretch {
                source: Arc::clone(source),
                layer: Arc::clone(layer),
                members,
            };
            let missing_bytes = batch::missing_bytes(&stretch)?;
            if missing_bytes > 0 {
                fill.total_bytes = fill.total_bytes.saturating_add(missing_bytes);
                fill.stretches.push_back(stretch);
            }
        }
        if !fill.stretches.is_empty() {
            fills.push_back(fill);
        }
    }
    Ok(fills)
}

#[cfg(test)]
mod tests;
