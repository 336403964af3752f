//! The worker: whose turn it is, whether anything may be asked for now, and what became of it.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use crate::config::BackgroundMode;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::background::batch::{self, Batch};
use crate::fetch::background::pace::RateLimit;
use crate::fetch::background::queue::{Fill, What};
use crate::fetch::background::{Stretch, Waits};
use crate::fetch::job::Urgency;
use crate::fetch::prefetch::is_kept;
use crate::fetch::{Fetcher, Source, blocking};
use crate::store::layer::Layer;

/// How long no reader has waited before [`BackgroundMode::Idle`] asks for anything.
const IDLE_AFTER: Duration = Duration::from_secs(1);
/// How long the worker waits for one thing before it looks whether another matters more.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// After so many bytes it is looked anew what the budget and the disk have left.
const ROOM_BYTES_MAX: u64 = 64 << 20;

/// Brings what is in the queue until it is empty.
pub(super) async fn work(fetcher: Arc<Fetcher>) {
    let mut worker = Worker {
        rate: RateLimit::new(fetcher.options.background.bytes_per_s),
        fetcher,
        under_way: JoinSet::new(),
        room_bytes: 0,
        coming_bytes: 0,
    };
    while worker.is_needed() {
        worker.step().await;
    }
}

struct Worker {
    fetcher: Arc<Fetcher>,
    under_way: JoinSet<Ended>,
    rate: RateLimit,
    /// What may be kept before the disk is looked at again.
    room_bytes: u64,
    /// What is under way, decoded: the disk does not show it yet.
    coming_bytes: u64,
}

/// The fill whose turn it is, and the stretch that it begins with.
struct Turn {
    key: Digest,
    what: What,
    mode: BackgroundMode,
    stretch: Stretch,
}

/// A request that has ended.
struct Ended {
    key: Digest,
    what: What,
    /// What it was to bring.
    stretch: Stretch,
    bytes: u64,
    decoded_bytes: u64,
    outcome: Result<()>,
}

impl Worker {
    /// Whether there is anything to do; else the worker is at its end, and whoever puts something in starts another.
    fn is_needed(&self) -> bool {
        let mut state = self.fetcher.background.state.lock();
        for fill in state.queue.take_unwanted() {
            log_end(&fill, "no longer brought ahead: its mount is gone");
        }
        for fill in state.queue.take_done() {
            log_end(&fill, "brought ahead");
        }
        let is_needed = state.queue.fills().next().is_some() || !self.under_way.is_empty();
        state.is_working = is_needed;
        is_needed
    }

    /// Begins a request, or waits a while for what keeps it from being begun.
    async fn step(&mut self) {
        while let Some(ended) = self.under_way.try_join_next() {
            self.ended(ended);
        }
        let turn = match self.under_way.len() < self.fetcher.options.background.requests_max() {
            true => self.turn(),
            false => None,
        };
        let Some(turn) = turn else {
            self.unless_woken(tokio::time::sleep(LOOK_INTERVAL)).await;
            return;
        };
        let quiet = match (turn.what, turn.mode) {
            (What::Rest, BackgroundMode::Idle) => IDLE_AFTER,
            _ => Duration::ZERO,
        };
        if !self.fetcher.foreground.is_quiet(quiet, Duration::ZERO).await {
            self.note(&turn, "readers");
            let fetcher = Arc::clone(&self.fetcher);
            let is_quiet = fetcher.foreground.is_quiet(quiet, LOOK_INTERVAL);
            self.unless_woken(is_quiet).await;
            return;
        }
        let wait = self.rate.wait(Instant::now());
        if turn.what == What::Rest && !wait.is_zero() {
            self.note(&turn, "the rate limit");
            self.unless_woken(tokio::time::sleep(wait.min(LOOK_INTERVAL)))
                .await;
            return;
        }
        self.fetcher.background.state.lock().waits = None;
        self.begin(turn).await;
    }

    fn turn(&self) -> Option<Turn> {
        let mut state = self.fetcher.background.state.lock();
        let fill = state.queue.turn(Instant::now())?;
        Some(Turn {
            key: fill.key,
            what: fill.what,
            mode: fill.mode,
            stretch: fill.stretches.front()?.clone(),
        })
    }

    /// Waits, unless there is more to do or a request ends.
    async fn unless_woken<T>(&mut self, waiting: impl Future<Output = T>) {
        tokio::select! {
            _ = waiting => {}
            () = self.fetcher.background.woken.notified() => {}
            Some(ended) = self.under_way.join_next() => self.ended(ended),
        }
    }

    fn note(&self, turn: &Turn, for_what: &'static str) {
        let &Turn { key, what, .. } = turn;
        self.fetcher.background.state.lock().waits = Some(Waits { key, what, for_what });
    }

    async fn begin(&mut self, turn: Turn) {
        let bytes_max = self.fetcher.background.size.lock().bytes();
        let stretch = turn.stretch.clone();
        let take = move || {
            let mut stretch = stretch;
            let batch = batch::take(&mut stretch, bytes_max)?;
            Ok((batch, stretch))
        };
        let (batch, rest) = match blocking(&self.fetcher.runtime, take).await {
            Ok(taken) => taken,
            Err(error) => return self.give_up(&turn, &error),
        };
        if !self.has_room(batch.decoded_bytes).await {
            self.drop_all("the budget or the disk is used up");
            return;
        }
        if self.fetcher.foreground.is_busy() {
            // Somebody has come meanwhile.
            self.room_bytes += batch.decoded_bytes;
            return;
        }
        if let Some(fill) = self
            .fetcher
            .background
            .state
            .lock()
            .queue
            .find(&turn.key, turn.what)
        {
            fill.stretches.pop_front();
            if !rest.members.is_empty() {
                fill.stretches.push_front(rest);
            }
            fill.under_way += usize::from(!batch.members.is_empty());
        }
        if !batch.members.is_empty() {
            self.send(turn, batch);
        }
    }

    fn send(&mut self, turn: Turn, batch: Batch) {
        let Batch {
            members,
            bytes,
            decoded_bytes,
        } = batch;
        self.coming_bytes += decoded_bytes;
        let range = match (members.first(), members.last()) {
            (Some(&first), Some(&last)) => first..last.saturating_add(1),
            _ => return,
        };
        if turn.what == What::Rest {
            self.rate.spend(Instant::now(), bytes);
        }
        let fetcher = Arc::clone(&self.fetcher);
        let Turn {
            key, what, stretch, ..
        } = turn;
        let work = async move {
            let (runtime, source, layer) = (
                fetcher.runtime.clone(),
                Arc::clone(&stretch.source),
                Arc::clone(&stretch.layer),
            );
            // A task of its own, so that a panic of it is one failure and not an end that nobody hears of.
            let bringing = runtime.spawn(async move { fetcher.bring_ahead(&source, &layer, &members).await });
            let outcome = bringing.await;
            let outcome = outcome.unwrap_or_else(|error| Err(Error::malformed("fetch", error.to_string())));
            Ended {
                key,
                what,
                stretch: Stretch {
                    members: range,
                    ..stretch
                },
                bytes,
                decoded_bytes,
                outcome,
            }
        };
        self.under_way.spawn_on(work, &self.fetcher.runtime);
    }

    fn ended(&mut self, ended: std::result::Result<Ended, JoinError>) {
        // It does not panic, and is not cancelled but with the worker.
        let Ok(Ended {
            key,
            what,
            stretch,
            bytes,
            decoded_bytes,
            outcome,
        }) = ended
        else {
            return;
        };
        self.coming_bytes = self.coming_bytes.saturating_sub(decoded_bytes);
        let mut state = self.fetcher.background.state.lock();
        let Some(fill) = state.queue.find(&key, what) else {
            return;
        };
        fill.under_way = fill.under_way.saturating_sub(1);
        match outcome {
            Ok(()) => fill.progressed(bytes),
            Err(error) if error.is_network() => {
                tracing::info!(image = fill.image, %error, pause_s = fill.pause.as_secs(), "bringing ahead pauses");
                fill.stretches.push_front(stretch);
                fill.back_off(Instant::now());
            }
            Err(Error::Io { why, .. }) => {
                drop(state);
                self.drop_all(&why);
            }
            Err(error @ (Error::Denied { .. } | Error::NoCredentials { .. })) => {
                for fill in state.queue.drop_all(|fill| fill.key == key) {
                    log_end(&fill, &error.to_string());
                }
            }
            Err(error) => fill.failed(error, &stretch.layer),
        }
    }

    /// Whether the budget and the disk take so much more, which is then counted as taken.
    async fn has_room(&mut self, bytes: u64) -> bool {
        if !self.fetcher.keeps_what_comes() {
            return false;
        }
        if bytes > self.room_bytes {
            let (store, budget_bytes) = (Arc::clone(&self.fetcher.store), self.fetcher.options.budget_bytes);
            let room_bytes = blocking(&self.fetcher.runtime, move || Ok(store.room_bytes(budget_bytes)));
            let left_bytes = room_bytes.await.unwrap_or(0).saturating_sub(self.coming_bytes);
            self.room_bytes = left_bytes.min(ROOM_BYTES_MAX.max(bytes));
        }
        match self.room_bytes.checked_sub(bytes) {
            Some(left_bytes) => {
                self.room_bytes = left_bytes;
                true
            }
            None => false,
        }
    }

    fn drop_all(&self, why: &str) {
        for fill in self.fetcher.background.state.lock().queue.drop_all(|_| true) {
            log_end(&fill, why);
        }
    }

    /// An image cannot be brought: whoever reads it is told why.
    fn give_up(&self, turn: &Turn, error: &Error) {
        let mut state = self.fetcher.background.state.lock();
        for fill in state.queue.drop_all(|fill| fill.key == turn.key) {
            log_end(&fill, &error.to_string());
        }
    }
}

fn log_end(fill: &Fill, why: &str) {
    let Fill {
        image,
        what,
        done_bytes,
        total_bytes,
        ..
    } = fill;
    tracing::info!(image, part = ?what, done_bytes, total_bytes, why, "the background is done with an image");
}

impl Fetcher {
    /// Brings members that nobody waits for.
    async fn bring_ahead(
        self: &Arc<Self>,
        source: &Arc<Source>,
        layer: &Arc<Layer>,
        members: &[u32],
    ) -> Result<()> {
        let mut outcome = Ok(());
        for waiter in self.launch_as(Urgency::Ahead, source, layer, members, None)? {
            let arrived = waiter.arrival.await.map_err(|error| match waiter.foreign {
                // Whoever fetches it may be refused what we are not: it is tried again.
                true => Error::network(source.name(), format!("who else fetches it failed: {error}")),
                false => error,
            });
            outcome = outcome.and(arrived);
        }
        outcome?;
        is_kept(layer, members)
    }
}
