//! The daemon's end of the control socket. Each client gets one answer; when it goes away, the work for it stops.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::connection::is_trusted;
use super::control::mount_namespace;
use super::engine::Engine;
use super::mounts::{Mounting, Mounts};
use super::protocol::{
    ALIVE_INTERVAL, Frame, Given, MountRequest, Outcome, Request, WAITING_INTERVAL, widen,
};
use super::query::{PIECES_WAITING_MAX, Pieces, Serving, answer, passes_of};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::fetch::Awaited;

/// How many clients are served at once with what is soon done; further ones wait.
const CLIENTS_MAX: usize = 64;
/// How many more there may be of those whose requests last: further ones are turned away.
const LASTING_CLIENTS_MAX: usize = 512;
/// How many of these are served with file contents at once; further ones wait.
const STREAMS_MAX: usize = 32;
/// How long a client may take to say what it wants.
const REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// How long a mount may take, without the time in which layers are read as a whole.
const MOUNT_WITHIN: Duration = Duration::from_secs(120);
/// How long a question may take, without that time; what it waits for has shorter deadlines of its own.
const QUERY_WITHIN: Duration = Duration::from_secs(3600);
/// How long clients may still be served once the daemon ends.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);
/// How long the socket rests after it could not accept, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all clients share.
#[derive(Debug)]
pub(super) struct Server {
    config: Config,
    engine: Arc<Engine>,
    mounts: Arc<Mounts>,
    streams: Semaphore,
    lasting_clients: Semaphore,
    farewells: Mutex<Vec<std::os::unix::net::UnixStream>>,
}

impl Server {
    /// A server for these mounts.
    pub(super) fn new(config: Config, engine: Arc<Engine>, mounts: Arc<Mounts>) -> Arc<Self> {
        Arc::new(Self {
            config,
            engine,
            mounts,
            streams: Semaphore::new(STREAMS_MAX),
            lasting_clients: Semaphore::new(LASTING_CLIENTS_MAX),
            farewells: Mutex::default(),
        })
    }

    /// Serves clients until `stop` completes; then finishes with those that are there, within bounds. What it returns
    /// are the connections of clients that wait for the end of this process: they see it when these are dropped.
    pub(super) async fn run(
        self: Arc<Self>,
        listener: UnixListener,
        stop: impl Future<Output = ()>,
    ) -> Vec<std::os::unix::net::UnixStream> {
        let permits = Arc::new(Semaphore::new(CLIENTS_MAX));
        let mut clients = JoinSet::new();
        tokio::pin!(stop);
        loop {
            let next = async {
                let permit = permits.clone().acquire_owned().await.ok();
                (permit, listener.accept().await)
            };
            tokio::select! {
                () = &mut stop => break,
                // Reaps finished clients, which would pile up otherwise.
                Some(_) = clients.join_next() => {}
                (permit, accepted) = next => match accepted {
                    Ok((stream, _)) => {
                        let server = self.clone();
                        clients.spawn(async move { server.serve(stream, permit).await });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a client");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        let drained = async { while clients.join_next().await.is_some() {} };
        if timeout(DRAIN_WITHIN, drained).await.is_err() {
            clients.shutdown().await;
        }
        std::mem::take(&mut self.farewells.lock())
    }

    /// Serves a client, who holds `place` while he is served with what is soon done.
    async fn serve(self: Arc<Self>, stream: UnixStream, place: Option<OwnedSemaphorePermit>) {
        match stream.peer_cred() {
            Ok(peer) if is_trusted(peer.uid()) => {}
            _ => return tracing::warn!("a process of another user was turned away"),
        }
        widen(&stream);
        let (mut from, mut to) = stream.into_split();
        let request = match timeout(REQUEST_WITHIN, Frame::read(&mut from)).await {
            Ok(Ok(Some(frame))) => frame.body::<Request>(),
            Ok(Err(error)) => Err(error),
            Ok(Ok(None)) | Err(_) => return,
        };
        let ends_mount = matches!(request, Ok(Request::Unmount { .. }));
        let outcome = match request {
            Ok(request) if request.is_lasting() => {
                // Nor may those that wait for a stream keep anybody from control.
                drop(place);
                match self.lasting_clients.try_acquire() {
                    Ok(_place) => self.clone().work(request, &mut from, &mut to).await,
                    Err(_) => Ok(Outcome::Failed(Error::busy(
                        "daemon",
                        format!("it has {LASTING_CLIENTS_MAX} clients already; try again when some are done"),
                    ))),
                }
            }
            Ok(request) => self.clone().work(request, &mut from, &mut to).await,
            Err(error) => Ok(Outcome::Failed(error)),
        };
        let written = match outcome.and_then(|outcome| Frame::message(&outcome)) {
            Ok(frame) => frame.write(&mut to).await,
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::debug!(%error, "a client went away");
        } else if ends_mount && self.mounts.is_over() {
            self.keep(from, to);
        }
    }

    /// Keeps a connection open until the process ends.
    fn keep(&self, from: OwnedReadHalf, to: tokio::net::unix::OwnedWriteHalf) {
        if let Some(stream) = from.reunite(to).ok().and_then(|stream| stream.into_std().ok()) {
            self.farewells.lock().push(stream);
        }
    }

    /// Does what was asked and passes its pieces on. An error means that the client is gone.
    async fn work(
        self: Arc<Self>,
        request: Request,
        from: &mut OwnedReadHalf,
        to: &mut tokio::net::unix::OwnedWriteHalf,
    ) -> Result<Outcome> {
        let (sender, mut pieces) = mpsc::channel(PIECES_WAITING_MAX);
        let repository = request.repository();
        let images = Arc::clone(self.engine.images());
        // A set of one: dropping it stops the work.
        let mut work = JoinSet::new();
        work.spawn(async move { self.perform(request, &sender).await });
        let mut alive = interval_at(Instant::now() + ALIVE_INTERVAL, ALIVE_INTERVAL);
        let mut waiting = interval_at(Instant::now() + WAITING_INTERVAL, WAITING_INTERVAL);
        waiting.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut has_begun, mut was_waiting) = (false, false);
        let mut byte = [0];
        loop {
            tokio::select! {
                piece = pieces.recv() => match piece {
                    Some(bytes) => {
                        has_begun = true;
                        Frame::Piece(bytes).write(to).await?;
                    }
                    None => break,
                },
                _ = alive.tick() => Frame::Alive.write(to).await?,
                _ = waiting.tick() => {
                    // Once the answer comes, it is not waited for any more.
                    let awaited = repository.iter().filter(|_| !has_begun);
                    let passes: Vec<_> = awaited.flat_map(|repository| passes_of(&images, repository)).collect();
                    if was_waiting || !passes.is_empty() {
                        was_waiting = !passes.is_empty();
                        Frame::Waiting(serde_json::to_vec(&passes).unwrap_or_default()).write(to).await?;
                    }
                }
                // A client says nothing more; whatever comes is its end.
                _ = from.read(&mut byte) => return Err(Error::Interrupted),
            }
        }
        Ok(match work.join_next().await {
            Some(Ok(Ok(outcome))) => outcome,
            Some(Ok(Err(error))) => Outcome::Failed(error),
            Some(Err(_)) | None => Outcome::Failed(Error::busy("daemon", "it failed inside; see its log")),
        })
    }

    async fn perform(self: Arc<Self>, request: Request, pieces: &Pieces) -> Result<Outcome> {
        match request {
            Request::Query { query, given } => {
                self.refuse_conflicts(given)?;
                let is_stream = query.is_stream();
                let _permit = match is_stream {
                    true => self.streams.acquire().await.ok(),
                    false => None,
                };
                let work = answer(
                    self.engine.images(),
                    self.serving(),
                    || self.status(),
                    query,
                    pieces,
                );
                if is_stream {
                    work.await?;
                } else {
                    self.within(QUERY_WITHIN, "query", work).await?;
                }
                Ok(Outcome::Done)
            }
            Request::Mount {
                mount,
                given,
                namespace,
            } => {
                self.refuse_conflicts(given)?;
                if namespace != mount_namespace()? {
                    return Err(Error::busy(
                        mount.mountpoint.display().to_string(),
                        format!(
                            "the daemon (process {}) of this store runs in another mount namespace; use another --cache-dir",
                            std::process::id()
                        ),
                    ));
                }
                self.within(MOUNT_WITHIN, "mount", self.mount(mount)).await
            }
            Request::Unmount { mountpoint } => {
                self.mounts.unmount(&mountpoint).await?;
                Ok(Outcome::Done)
            }
            Request::WaitForEnd { mountpoint } => {
                self.mounts.wait_for_end(&mountpoint).await;
                Ok(Outcome::Done)
            }
        }
    }

    fn serving(&self) -> Serving {
        match self.engine.kernel() {
            Some(kernel) => Serving::Kernel(kernel),
            None if self.mounts.count() > 0 => Serving::Fuse,
            None => Serving::Nobody,
        }
    }

    /// The state of the daemon and, which the mounts' own `status.json` cannot wait for, of the disk.
    fn status(&self) -> Value {
        let mut status = self.mounts.status();
        if let Some(fields) = status.as_object_mut() {
            let usage = tokio::task::block_in_place(|| self.engine.cache_usage());
            fields.insert("cache".to_owned(), usage);
        }
        status
    }

    /// Mounts, also for the daemon itself.
    pub(super) async fn mount(&self, request: MountRequest) -> Result<Outcome> {
        let mounts = Arc::downgrade(&self.mounts);
        let status = move || {
            let status = mounts.upgrade().map(|mounts| mounts.status());
            let mut text = serde_json::to_string_pretty(&status).unwrap_or_default();
            text.push('\n');
            text
        };
        Ok(match self.mounts.mount(request, Arc::new(status)).await? {
            Mounting::Mounted => Outcome::Done,
            Mounting::Over => Outcome::Ending,
        })
    }

    /// Ends work that takes too long. Passes over layers have deadlines of their own.
    async fn within<T>(
        &self,
        limit: Duration,
        what: &str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let fetcher = self.engine.images().fetcher();
        fetcher
            .within(limit, &Awaited::All, || what.to_owned(), work)
            .await
    }

    fn refuse_conflicts(&self, given: Given) -> Result<()> {
        match self.config.conflicts(&given.into_layer()).as_slice() {
            [] => Ok(()),
            names => Err(Error::busy(
                self.config.cache_dir.display().to_string(),
                format!(
                    "its daemon (process {}) runs with other settings than were asked for: {}; leave them out, unmount first, or use another --cache-dir",
                    std::process::id(),
                    names.join(", ")
                ),
            )),
        }
    }
}

/// Listens at `path`. The caller holds the store's lock, so whatever lies there belongs to nobody.
pub(super) fn listen(path: &PathBuf) -> Result<UnixListener> {
    let failed = |error: std::io::Error| Error::io(path.display().to_string(), &error);
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(error)),
        _ => UnixListener::bind(path).map_err(failed),
    }
}
