//! Mounting and unmounting from a command's side.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::connection::{Connection, ShowWaiting};
use super::log::Verbosity;
use super::protocol::{Given, MountRequest, Outcome, Request};
use super::socket::all_sockets;
use super::spawn::{Orders, log_file, spawn};
use crate::config::Loaded;
use crate::error::{Error, Result};
use crate::fetch::PassProgress;
use crate::fuse::{Guarded, Unmount, unmount_all_dead, unmount_guarded, unmount_path};
use crate::store::lock::Lock;

/// How often a lock or a socket that is about to change is looked at.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// How long a daemon may take to end after its last mount is gone.
const END_WITHIN: Duration = Duration::from_secs(30);
/// How long a fresh mount may take to answer where this process looks itself.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The mount namespace of this process, as the kernel names it.
pub(super) fn mount_namespace() -> Result<String> {
    let link = "/proc/self/ns/mnt";
    std::fs::read_link(link)
        .map(|name| name.display().to_string())
        .map_err(|error| Error::io(link, &error))
}

/// Mounts a tree through the store's daemon, which is started where none runs. Returns when the tree answers. `show` is told
/// which layers are being read as a whole meanwhile.
///
/// # Errors
/// [`Error::Busy`] naming the settings in conflict with the running daemon, or who holds the store; what the daemon
/// says.
pub async fn mount(
    loaded: &Loaded,
    mount: &MountRequest,
    verbosity: Verbosity,
    show: fn(&[PassProgress]),
) -> Result<()> {
    // Held until the tree answers.
    let guarded = Guarded::at(&mount.mountpoint)?;
    let request = Request::Mount {
        mount: MountRequest {
            place: guarded.as_ref().map(Guarded::place),
            ..mount.clone()
        },
        given: Given::new(&loaded.given),
        namespace: mount_namespace()?,
    };
    let started = Instant::now();
    loop {
        match mount_once(loaded, &request, verbosity, show).await? {
            Attempt::Mounted => break,
            Attempt::Again(busy) if started.elapsed() > loaded.config.timeout => return Err(busy),
            Attempt::Again(_) => tokio::time::sleep(RETRY_INTERVAL).await,
        }
    }
    let Some(guarded) = guarded else {
        return Ok(());
    };
    timeout(ANSWER_WITHIN, blocking(move || guarded.see_it_answers()))
        .await
        .unwrap_or_else(|_| {
            Err(Error::Timeout {
                what: mount.mountpoint.display().to_string(),
                waited_ms: u64::try_from(ANSWER_WITHIN.as_millis()).unwrap_or(u64::MAX),
            })
        })
}

enum Attempt {
    Mounted,
    /// The owner of the store changes just now, or is a command that ends soon.
    Again(Error),
}

async fn mount_once(
    loaded: &Loaded,
    request: &Request,
    verbosity: Verbosity,
    show: ShowWaiting,
) -> Result<Attempt> {
    let cache_dir = &loaded.config.cache_dir;
    if let Some(connection) = Connection::to_store(cache_dir).await? {
        let (_, outcome) = connection.showing(show).call(request).await?;
        return match outcome {
            Outcome::Done => {
                tracing::info!(store = %cache_dir.display(), "the daemon of the store has mounted");
                Ok(Attempt::Mounted)
            }
            Outcome::Failed(error) => Err(error),
            Outcome::Ending => Ok(Attempt::Again(Error::busy("daemon", "it does not end"))),
        };
    }
    // A free lock is no promise, but saves a process where it is held.
    if let Err(error) = Lock::take(cache_dir) {
        return match error {
            busy @ Error::Busy { .. } => Ok(Attempt::Again(busy)),
            other => Err(other),
        };
    }
    let orders = Orders {
        config: loaded.config.clone(),
        verbosity: verbosity.for_daemon(),
    };
    match spawn(&orders).await {
        Ok(()) => {
            tracing::info!(log = %log_file(cache_dir).display(), "started the daemon of the store");
            Ok(Attempt::Again(Error::busy(
                "daemon",
                "it started, but does not listen",
            )))
        }
        // Another `mount` was faster, and its daemon is as good.
        Err(busy @ Error::Busy { .. }) => Ok(Attempt::Again(busy)),
        Err(error) => Err(error),
    }
}

/// Unmounts. Of an idle mount it returns when the daemon has ended, if that was the last mount that it was there for.
/// The other ways ask no daemon, which may hang, and neither does any below autofs: it notices that its mount is gone.
///
/// # Errors
/// [`Error::NotFound`] where nothing of ours is mounted; [`Error::Busy`] naming who uses the mount.
pub async fn unmount(loaded: &Loaded, mountpoint: &Path, how: Unmount) -> Result<()> {
    let path = mountpoint.to_owned();
    if blocking(move || unmount_guarded(&path, how)).await? {
        return Ok(());
    }
    if how != Unmount::Idle {
        let mountpoint = mountpoint.to_owned();
        return blocking(move || unmount_path(&mountpoint, how)).await;
    }
    let mountpoint = resolve(mountpoint)?;
    let request = Request::Unmount {
        mountpoint: mountpoint.clone(),
    };
    if let Some(own) = Connection::to_store(&loaded.config.cache_dir).await?
        && unmount_by(own, &request).await?
    {
        return Ok(());
    }
    for socket in all_sockets() {
        // A daemon of another store that is gone, stands still or is of another version is no reason not to ask the
        // next one.
        let Ok(Some(other)) = Connection::to(&socket).await else {
            continue;
        };
        match unmount_by(other, &request).await {
            Ok(true) => return Ok(()),
            Ok(false) | Err(Error::Timeout { .. } | Error::Unsupported { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    blocking(move || unmount_path(&mountpoint, Unmount::Idle)).await
}

/// Removes every mount of ours whose daemon is gone, and returns where they were.
///
/// # Errors
/// One that could not be looked at or removed; the others are gone all the same.
pub async fn unmount_dead() -> Result<Vec<PathBuf>> {
    blocking(unmount_all_dead).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::busy("unmount", error.to_string())))
}

/// Whether the daemon had this mount and has unmounted it; then it also has ended, if it was to.
async fn unmount_by(mut daemon: Connection, request: &Request) -> Result<bool> {
    match daemon.call(request).await?.1 {
        Outcome::Done => {
            tracing::info!("the daemon has unmounted; waiting for its end if that was its last mount");
            daemon.wait_for_close(END_WITHIN).await.map(|()| true)
        }
        Outcome::Failed(Error::NotFound { .. }) | Outcome::Ending => Ok(false),
        Outcome::Failed(error) => Err(error),
    }
}

/// Waits until nothing is mounted at `mountpoint` any more, for `mount -f` on a daemon that was there before.
///
/// # Errors
/// Why the daemon could not be asked.
pub(super) async fn wait_for_end(loaded: &Loaded, mountpoint: &Path) -> Result<()> {
    let Some(mut connection) = Connection::to_store(&loaded.config.cache_dir).await? else {
        return Ok(());
    };
    let request = Request::WaitForEnd {
        mountpoint: mountpoint.to_owned(),
    };
    match connection.call(&request).await?.1 {
        Outcome::Failed(error) => Err(error),
        Outcome::Done | Outcome::Ending => Ok(()),
    }
}

/// A mountpoint as the mount table spells it. Only its parent is looked at where the mount itself may be dead and
/// answer every look with an error; a mount behind a symbolic link is found through the link.
///
/// # Errors
/// [`Error::NotFound`], [`Error::Io`].
fn resolve(mountpoint: &Path) -> Result<PathBuf> {
    let failed = |error: std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            Error::not_found(mountpoint.display().to_string(), "no such directory")
        } else {
            Error::io(mountpoint.display().to_string(), &error)
        }
    };
    let absolute = std::path::absolute(mountpoint).map_err(failed)?;
    match std::fs::canonicalize(&absolute) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            match (absolute.parent(), absolute.file_name()) {
                (Some(parent), Some(name)) => Ok(std::fs::canonicalize(parent).map_err(failed)?.join(name)),
                _ => Err(failed(error)),
            }
        }
        other => other.map_err(failed),
    }
}
