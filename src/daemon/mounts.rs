//! The mounts of a daemon, and with them how long it lives: one that `mount` started ends with its last mount.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::engine::Engine;
use super::mounted::Mounted;
use super::protocol::MountRequest;
use super::run::Ending;
use crate::error::{Error, Result};
use crate::image::platform::Platform;

/// How many mounts one daemon holds.
const MOUNTS_MAX: usize = 256;
/// How long a daemon that was just started waits for its first mount, which the command that started it asks for at
/// once.
const FIRST_MOUNT_WITHIN: Duration = Duration::from_secs(10);
/// How long an unmount waits for the kernel to be done with the images that it served: it is within milliseconds.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(2);

/// The mounts.
#[derive(Debug)]
pub(super) struct Mounts {
    own: Weak<Self>,
    engine: Arc<Engine>,
    ending: Ending,
    started: Instant,
    state: Mutex<State>,
    /// Changes with every mount that comes or ends.
    changes: watch::Sender<u64>,
    /// Turns true when the daemon has nothing left to live for.
    over: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    slots: BTreeMap<PathBuf, Slot>,
    /// Mounts that have lost their place and are served until their last user is gone: unmounted lazily, with the place
    /// taken by another one, or unmounted while there are copies of them.
    detached: Vec<Arc<Mounted>>,
    is_over: bool,
}

#[derive(Debug)]
enum Slot {
    Starting {
        /// The layout that it will read.
        layout: Option<PathBuf>,
    },
    Live {
        request: MountRequest,
        mounted: Arc<Mounted>,
        since: Instant,
    },
}

impl Slot {
    /// The directory of the layout that is mounted.
    fn layout(&self) -> Option<&Path> {
        match self {
            Self::Starting { layout } => layout.as_deref(),
            Self::Live { request, .. } => request.source.layout(),
        }
    }
}

impl State {
    /// Refuses a mount that would leave this process reading a layout below a mount of its own: it would wait for itself.
    fn check_layouts<'a>(
        &'a self,
        request: &'a MountRequest,
        configured: impl Iterator<Item = &'a Path>,
    ) -> Result<()> {
        let read = self.slots.values().filter_map(Slot::layout).chain(configured);
        let hidden = read
            .chain(request.source.layout())
            .find(|layout| layout.starts_with(&request.mountpoint));
        if let Some(layout) = hidden {
            let why = format!("it would hide the layout {}, which is read", layout.display());
            return Err(Error::busy(request.mountpoint.display().to_string(), why));
        }
        let Some(layout) = request.source.layout() else {
            return Ok(());
        };
        match self
            .slots
            .keys()
            .find(|mountpoint| layout.starts_with(mountpoint))
        {
            Some(mountpoint) => Err(Error::busy(
                layout.display().to_string(),
                format!(
                    "it lies below {}, where this daemon has mounted",
                    mountpoint.display()
                ),
            )),
            None => Ok(()),
        }
    }
}

/// How a mount request ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Mounting {
    /// The tree answers.
    Mounted,
    /// The daemon is about to end.
    Over,
}

/// A place in the table for a mount that is being made, given back if it comes to nothing.
struct Reservation {
    mounts: Arc<Mounts>,
    mountpoint: PathBuf,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.mounts.state.lock();
        if matches!(state.slots.get(&self.mountpoint), Some(Slot::Starting { .. })) {
            state.slots.remove(&self.mountpoint);
            self.mounts.note_end(&mut state);
        }
    }
}

/// Lets go of a mount. The last holder runs a helper and waits for threads, which a thread that serves others must not do.
fn drop_in_time(mounted: Arc<Mounted>) {
    tokio::task::spawn_blocking(move || drop(mounted));
}

impl Mounts {
    /// No mounts yet.
    pub(super) fn new(engine: Arc<Engine>, ending: Ending) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: Weak::clone(own),
            engine,
            ending,
            started: Instant::now(),
            state: Mutex::default(),
            changes: watch::channel(0).0,
            over: watch::channel(false).0,
        })
    }

    /// Mounts, and returns when the tree answers. A caller that goes away meanwhile leaves no mount behind.
    pub(super) async fn mount(
        self: &Arc<Self>,
        request: MountRequest,
        status: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Result<Mounting> {
        let Some(reservation) = self.reserve(&request)? else {
            return Ok(Mounting::Over);
        };
        let engine = self.engine.clone();
        let tree = engine.open_tree(&request, status).await;
        let tree = tree.map_err(|error| request.source.explain(error))?;
        let blocking = move || {
            // The reservation goes along: until the mount stands or has failed, its place is taken. Where nobody takes the
            // result any more, the mount goes first.
            let mounted = engine.mount(&request, tree);
            (mounted, request, reservation)
        };
        let (mounted, request, reservation) = tokio::task::spawn_blocking(blocking)
            .await
            .map_err(|error| Error::busy("mount", error.to_string()))?;
        let mounted = Arc::new(mounted?);
        let mountpoint = request.mountpoint.clone();
        tracing::info!(mountpoint = %mountpoint.display(), "mounted");
        let slot = Slot::Live {
            request,
            mounted: mounted.clone(),
            since: Instant::now(),
        };
        self.state.lock().slots.insert(mountpoint.clone(), slot);
        drop(reservation);
        self.changes.send_modify(|count| *count += 1);
        tokio::spawn(Self::watch(Arc::downgrade(self), mounted, mountpoint));
        Ok(Mounting::Mounted)
    }

    fn reserve(self: &Arc<Self>, request: &MountRequest) -> Result<Option<Reservation>> {
        let mountpoint = request.mountpoint.as_path();
        let mut state = self.state.lock();
        if state.is_over {
            return Ok(None);
        }
        let what = || mountpoint.display().to_string();
        match state.slots.get(mountpoint) {
            // Somebody has unmounted it behind our back, and its session is about to end, or still in use.
            Some(Slot::Live { mounted, .. }) if !mounted.is_attached() => {
                let mounted = mounted.clone();
                state.detached.push(mounted);
            }
            Some(_) => return Err(Error::busy(what(), "this daemon has mounted there already")),
            None => {}
        }
        if state.slots.len() >= MOUNTS_MAX {
            return Err(Error::busy(
                what(),
                format!("a daemon holds at most {MOUNTS_MAX} mounts"),
            ));
        }
        state.check_layouts(request, self.engine.layouts())?;
        let layout = request.source.layout().map(Path::to_path_buf);
        state
            .slots
            .insert(mountpoint.to_owned(), Slot::Starting { layout });
        Ok(Some(Reservation {
            mounts: self.clone(),
            mountpoint: mountpoint.to_owned(),
        }))
    }

    /// Notices the end of a mount, whoever ended it.
    async fn watch(mounts: Weak<Self>, mounted: Arc<Mounted>, mountpoint: PathBuf) {
        mounted.ended().await;
        tracing::info!(mountpoint = %mountpoint.display(), "unmounted");
        if let Some(mounts) = mounts.upgrade() {
            let is_other = |found: &Arc<Mounted>| !Arc::ptr_eq(found, &mounted);
            mounts.state.lock().detached.retain(is_other);
            mounts.remove_slot(&mountpoint, &mounted);
        }
        drop_in_time(mounted);
    }

    /// Unmounts; a busy mount is an error that says who is busy.
    pub(super) async fn unmount(&self, mountpoint: &Path) -> Result<()> {
        self.unmount_by(mountpoint, Mounted::unmount).await?;
        self.wait_for_the_kernel().await;
        Ok(())
    }

    /// Waits a moment until the kernel has given back what it had of the last mount, so that whoever unmounts it finds the
    /// store free. Longer than a moment takes only what somebody uses.
    async fn wait_for_the_kernel(&self) {
        let Some(mut superblocks) = self.engine.superblocks() else {
            return;
        };
        if !self.state.lock().slots.is_empty() {
            return;
        }
        // What `wait_for` gives locks the channel: it must be gone before the state is locked.
        let gone = async { superblocks.wait_for(|live| *live == 0).await.is_ok() };
        if tokio::time::timeout(GIVEN_BACK_WITHIN, gone).await == Ok(true) {
            self.note_end(&mut self.state.lock());
        }
    }

    async fn unmount_by(&self, mountpoint: &Path, way: fn(&Mounted) -> Result<()>) -> Result<()> {
        let mounted = match self.state.lock().slots.get(mountpoint) {
            Some(Slot::Live { mounted, .. }) => mounted.clone(),
            Some(Slot::Starting { .. }) => {
                return Err(Error::busy(
                    mountpoint.display().to_string(),
                    "it is just being mounted",
                ));
            }
            None => {
                return Err(Error::not_found(
                    mountpoint.display().to_string(),
                    "this daemon has no mount there",
                ));
            }
        };
        let blocking = mounted.clone();
        tokio::task::spawn_blocking(move || way(&blocking))
            .await
            .map_err(|error| Error::busy("unmount", error.to_string()))??;
        self.unmounted(mountpoint, &mounted);
        drop_in_time(mounted);
        Ok(())
    }

    /// Notes that a mount has lost its place. Copies of it, bound elsewhere or in another mount namespace, are served until
    /// the last one is gone, which [`Self::watch`] notices.
    fn unmounted(&self, mountpoint: &Path, mounted: &Arc<Mounted>) {
        if !mounted.has_ended() {
            let mut state = self.state.lock();
            let is_known = state.detached.iter().any(|found| Arc::ptr_eq(found, mounted));
            // Once more with the lock, which whoever notices the end has to take too.
            if !is_known && !mounted.has_ended() {
                state.detached.push(mounted.clone());
            }
        }
        self.remove_slot(mountpoint, mounted);
    }

    /// Takes exactly this mount out of the table: another may have taken its place.
    fn remove_slot(&self, mountpoint: &Path, mounted: &Arc<Mounted>) {
        let mut state = self.state.lock();
        if let Some(Slot::Live { mounted: found, .. }) = state.slots.get(mountpoint)
            && Arc::ptr_eq(found, mounted)
        {
            state.slots.remove(mountpoint);
        }
        self.note_end(&mut state);
    }

    fn note_end(&self, state: &mut State) {
        self.changes.send_modify(|count| *count += 1);
        if self.ending != Ending::WithLastMount || !state.slots.is_empty() || !state.detached.is_empty() {
            return;
        }
        if let Some(mut superblocks) = self.engine.superblocks().filter(|live| *live.borrow() > 0) {
            // Programs stand in mounts of the kernel that have lost their places, and need us for what is not complete.
            let mounts = Weak::clone(&self.own);
            tokio::spawn(async move {
                let gone = superblocks.wait_for(|live| *live == 0).await.is_ok();
                if let Some(mounts) = mounts.upgrade().filter(|_| gone) {
                    mounts.note_end(&mut mounts.state.lock());
                }
            });
            return;
        }
        state.is_over = true;
        self.over.send_replace(true);
    }

    /// Waits until nothing is mounted at `mountpoint`.
    pub(super) async fn wait_for_end(&self, mountpoint: &Path) {
        let mut changes = self.changes.subscribe();
        while self.state.lock().slots.contains_key(mountpoint) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Waits until the daemon has nothing left to live for.
    pub(super) async fn over(&self) {
        let mut over = self.over.subscribe();
        if self.ending == Ending::WithLastMount {
            // What `wait_for` gives locks the channel, to which others send while they hold the state: it must be gone.
            let first = async { over.wait_for(|over| *over).await.is_ok() };
            let first = tokio::time::timeout(FIRST_MOUNT_WITHIN, first).await;
            let mut state = self.state.lock();
            if first.is_err() && state.slots.is_empty() {
                state.is_over = true;
                return;
            }
        }
        // The sender lives as long as `self`.
        let _ = over.wait_for(|over| *over).await;
    }

    /// Whether requests are turned away because the daemon ends.
    pub(super) fn is_over(&self) -> bool {
        self.state.lock().is_over
    }

    /// Unmounts everything, whoever uses it: nobody will serve them. All at once, so that it takes no longer than the
    /// deadlines of one.
    pub(super) async fn unmount_all(self: &Arc<Self>) {
        self.state.lock().is_over = true;
        let mountpoints: Vec<PathBuf> = self.state.lock().slots.keys().cloned().collect();
        let mut work = JoinSet::new();
        for mountpoint in mountpoints {
            let mounts = self.clone();
            work.spawn(async move { mounts.unmount_somehow(&mountpoint).await });
        }
        while work.join_next().await.is_some() {}
    }

    async fn unmount_somehow(&self, mountpoint: &Path) {
        if let Err(error) = self.unmount(mountpoint).await {
            tracing::warn!(%error, "unmounting by force");
            if let Err(error) = self.unmount_by(mountpoint, Mounted::abort).await {
                tracing::error!(%error, "left to the kernel");
            }
        }
    }

    /// Sees that every mount answers, one after the other; needs no network.
    ///
    /// # Errors
    /// Of the first one that does not.
    pub(super) async fn see_they_answer(&self) -> Result<()> {
        for mounted in self.live() {
            tokio::task::spawn_blocking(move || mounted.see_it_answers())
                .await
                .unwrap_or_else(|error| Err(Error::busy("self-check", error.to_string())))?;
        }
        Ok(())
    }

    /// How many mounts there are.
    pub(super) fn count(&self) -> usize {
        let state = self.state.lock();
        let is_live = |slot: &&Slot| matches!(slot, Slot::Live { .. });
        state.slots.values().filter(is_live).count()
    }

    fn live(&self) -> Vec<Arc<Mounted>> {
        let state = self.state.lock();
        let mounted = |slot: &Slot| match slot {
            Slot::Live { mounted, .. } => Some(mounted.clone()),
            Slot::Starting { .. } => None,
        };
        state.slots.values().filter_map(mounted).collect()
    }

    /// Changes with every mount that comes or ends.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The mounts, for people and programs.
    pub(super) fn status(&self) -> Value {
        let mut fields = self.engine.status();
        let (mut mounts, mut errors) = (Vec::new(), Vec::new());
        for slot in self.state.lock().slots.values() {
            if let Slot::Live {
                request,
                mounted,
                since,
            } = slot
            {
                mounts.push(json!({
                    "mountpoint": request.mountpoint,
                    "source": request.source.to_string(),
                    "digest": mounted.digest(),
                    "platform": request.platform.clone().unwrap_or_else(|| Platform::host().to_string()),
                    "allow_other": request.allow_other && !mounted.is_private(),
                    "allow": request.allow,
                    "deny": request.deny,
                    "share_private": request.share_private,
                    "background": request.background,
                    "mounted_s": since.elapsed().as_secs(),
                    "requests": mounted.requests(),
                    "kernel": mounted.kernel(),
                }));
                errors.extend(mounted.errors());
            }
        }
        if let Some(kernel) = self.engine.kernel() {
            errors.extend(kernel.errors().iter().map(|failure| json!(failure)));
        }
        let daemon = json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "running_s": self.started.elapsed().as_secs(),
            "ends_with_last_mount": self.ending == Ending::WithLastMount,
        });
        fields.insert("daemon".to_owned(), daemon);
        fields.insert("mounts".to_owned(), mounts.into());
        fields.insert("errors".to_owned(), errors.into());
        fields.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Environment, Layer};
    use crate::store::lock::Lock;

    #[test]
    fn who_waits_for_the_end_holds_up_nobody_who_notices_it() {
        let dir = tempfile::tempdir().unwrap();
        let flags = Layer {
            cache_dir: Some(dir.path().join("store")),
            ..Layer::default()
        };
        let environment = Environment {
            variables: BTreeMap::new(),
            is_root: true,
            system_file: dir.path().join("none.toml"),
        };
        let config = Config::load(&environment, None, flags).unwrap().config;
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let lock = Lock::take(&config.cache_dir).unwrap();
        let engine = Engine::open(&config, lock, None, runtime.handle()).unwrap();
        let mounts = Mounts::new(Arc::new(engine), Ending::WithLastMount);
        let (began, begins) = std::sync::mpsc::channel();
        let waiting = runtime.spawn({
            let mounts = mounts.clone();
            async move {
                began.send(()).unwrap();
                mounts.over().await;
            }
        });
        begins.recv().unwrap();
        // The watcher of a mount and the client that unmounts it both notice its end.
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut state = mounts.state.lock();
            mounts.note_end(&mut state);
            std::thread::sleep(Duration::from_millis(300));
            mounts.note_end(&mut state);
            drop(state);
            done.send(()).unwrap();
        });
        if is_done.recv_timeout(Duration::from_secs(20)).is_err() {
            // It would wait for the threads that hold each other up.
            runtime.shutdown_background();
            panic!("nobody gets on");
        }
        runtime.block_on(waiting).unwrap();
    }
}
