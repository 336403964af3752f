//! A mount from its beginning to its end: the mounting, the waiting, the unmounting.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::counters::Counters;
use super::helper::{FS_TYPE, Unmount, enforces_permissions};
use super::helper_process::{Helper, Mounted};
use super::session::{END_WAIT, Served, threads_by_default};
use super::{mountinfo, notify};
use crate::error::{Error, Result};
use crate::fs::ops::Operations;

/// How a mount is removed whose session has ended. A session that failed leaves a dead mount behind; one that was
/// unmounted from outside leaves nothing, and a live mount with the same device number is somebody else's by then.
const AFTER_END: Unmount = Unmount::Dead;
/// The source by default.
const DEFAULT_SOURCE: &str = "registryfs";
/// The read-ahead by default, in KiB: the largest request that the kernel makes.
const READ_AHEAD_KIB: u32 = 1024;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Where, an existing directory.
    pub mountpoint: PathBuf,
    /// Whether users other than the daemon's may enter. Permissions are enforced then, and for root always; in a mount
    /// that an ordinary user has alone everything can be read.
    pub allow_other: bool,
    /// The source in the mount table: what was asked to be mounted, by which mount(8) tells what is mounted already.
    pub source: String,
    /// Whether no program of it can be run.
    pub no_exec: bool,
    /// Where [`Guarded::place`] has the mountpoint, which then cannot be walked to before the mount is reported.
    ///
    /// [`Guarded::place`]: super::Guarded::place
    pub place: Option<PathBuf>,
    /// Read-ahead in KiB.
    pub read_ahead_kib: u32,
    /// Threads that take requests from the kernel, at least 1.
    pub threads: usize,
    /// The `registryfs` binary that runs as the helper; none means this program itself.
    pub helper: Option<PathBuf>,
}

impl MountOptions {
    /// The defaults: for all users, 1 MiB of read-ahead, a thread a core (2 to 8).
    pub fn new(mountpoint: impl Into<PathBuf>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            allow_other: true,
            source: DEFAULT_SOURCE.to_owned(),
            no_exec: false,
            place: None,
            read_ahead_kib: READ_AHEAD_KIB,
            threads: threads_by_default(),
            helper: None,
        }
    }
}

/// A mounted filesystem. Dropping it unmounts at once, whoever uses it, and ends the session.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    device_number: String,
    is_guarded: bool,
    helper: Helper,
    session: Served,
}

impl Mount {
    /// Mounts `fs` and returns when the mount answers. On failure nothing stays mounted. Work of the filesystem that
    /// waits runs on `runtime`. Blocks: not to be called on an async thread.
    pub fn start(
        fs: Arc<dyn Operations>,
        options: &MountOptions,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Self> {
        let helper = options
            .helper
            .clone()
            .map_or_else(Helper::this_program, Helper::at);
        let Mounted {
            device,
            mountpoint,
            device_number,
        } = helper.mount(options)?;
        let mut mount = Self {
            mountpoint,
            is_guarded: options.place.is_some(),
            session: Served::handing_on(helper.clone(), device_number.clone()),
            device_number,
            helper,
        };
        // From here on an early return drops the mount, and that unmounts.
        let what = format!("the FUSE session of {}", mount.mountpoint.display());
        let enforces = enforces_permissions(options.allow_other);
        mount
            .session
            .start(fs, device, what, enforces, options.threads, runtime)?;
        mount
            .helper
            .check(&mount.mountpoint, &mount.device_number, options)?;
        Ok(mount)
    }

    /// Where it is mounted, without links and dots. The daemon must never open this path or one below.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Unmounts and waits a moment for the session's end, which copies of the mount put off. While the mount is busy this fails and names who uses it; `lazy` takes
    /// it out of the tree in any case and returns, and the session ends when the last user is gone. Blocks.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        let how = match (self.session.has_ended(), lazy) {
            (true, _) => AFTER_END,
            (false, true) => Unmount::Lazy,
            (false, false) => Unmount::Idle,
        };
        self.helper
            .unmount_device(&self.mountpoint, Some(&self.device_number), how)?;
        if !lazy && !self.session.wait_blocking(END_WAIT) {
            tracing::warn!(
                mountpoint = %self.mountpoint.display(),
                "unmounted, but served on: a bind mount or another mount namespace has a copy of the mount"
            );
        }
        Ok(())
    }

    /// Takes it out of the tree at once, lets every use of it fail, and waits for the session's end. Blocks.
    pub fn abort(&self) -> Result<()> {
        let how = if self.session.has_ended() {
            AFTER_END
        } else {
            Unmount::Abort
        };
        self.helper
            .unmount_device(&self.mountpoint, Some(&self.device_number), how)?;
        self.session.wait_blocking(END_WAIT);
        Ok(())
    }

    /// Whether the session has ended: neither the mount nor a copy of it is left.
    pub fn has_ended(&self) -> bool {
        self.session.has_ended()
    }

    /// Whether it still has its place in the tree. One that was unmounted lazily, by whomever, has not, and is served
    /// until its last user is gone.
    pub fn is_attached(&self) -> bool {
        is_attached(&self.mountpoint, &self.device_number)
    }

    /// Sees that the mount answers, which takes no network. One that was covered or unmounted meanwhile is no failure, and
    /// one that autofs guards is not looked at: each look would begin its time of idleness anew. Blocks.
    ///
    /// # Errors
    /// [`Error::Timeout`] where it does not; what keeps the helper from asking.
    pub fn see_it_answers(&self) -> Result<()> {
        if self.is_guarded {
            return Ok(());
        }
        self.helper.is_mounted(&self.mountpoint).map(drop)
    }

    /// Resolves when the session has ended, for whatever reason: unmounted from here or outside, or failed.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.session.ended()
    }

    /// Makes the kernel ask again what `name` in directory `parent` means when it is used next; what is mounted there or
    /// below stays if it still means the same. One that the kernel does not know is none. This waits for the directory's
    /// lock, which a lookup in it holds for as long as it waits: it blocks, and is not for a thread of the session. A kernel
    /// before 6.2 detaches what is mounted there.
    ///
    /// # Errors
    /// [`Error::Io`]; also when the session has ended.
    pub fn expire_entry(&self, parent: u64, name: &[u8]) -> Result<()> {
        self.session.notify(&notify::expire_entry(parent, name)?)
    }

    /// Makes the kernel ask for the attributes of an inode when they are used next.
    ///
    /// # Errors
    /// As [`Self::expire_entry`].
    pub fn expire_attributes(&self, ino: u64) -> Result<()> {
        self.session.notify(&notify::expire_attributes(ino))
    }

    /// The requests so far.
    pub fn counters(&self) -> Counters {
        self.session.counters()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let mountpoint = self.mountpoint.display();
        let how = if self.session.has_ended() {
            AFTER_END
        } else {
            Unmount::Abort
        };
        let unmounted = self
            .helper
            .unmount_device(&self.mountpoint, Some(&self.device_number), how);
        if let Err(error) = unmounted {
            tracing::warn!(%mountpoint, %error, "could not unmount");
        }
        self.session.join(END_WAIT);
    }
}

/// Unmounts what is mounted at `mountpoint` if it is ours, whoever serves it. Blocks.
pub fn unmount_path(mountpoint: &Path, how: Unmount) -> Result<()> {
    Helper::this_program().unmount_device(mountpoint, None, how)
}

/// Unmounts every mount of ours in this mount namespace that nobody serves any more, and returns where they were. One
/// that cannot be looked at does not keep the others from being removed; it is the error. Blocks.
pub fn unmount_all_dead() -> Result<Vec<PathBuf>> {
    let helper = Helper::this_program();
    let mounts = mountinfo::read().map_err(|error| Error::io("/proc/self/mountinfo", &error))?;
    let (mut removed, mut failure) = (Vec::new(), None);
    // Of several at one place the last one lies on top.
    for mount in mounts.iter().rev().filter(|mount| mount.fs_type == FS_TYPE) {
        let path = &mount.mountpoint;
        match helper.unmount_device(path, Some(&mount.device), Unmount::Dead) {
            Ok(()) if !is_attached(path, &mount.device) => removed.push(path.clone()),
            Ok(()) => {}
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(removed), Err)
}

/// Whether the mount table still has this mount, covered by another one or not. What cannot be read counts as there.
fn is_attached(mountpoint: &Path, device_number: &str) -> bool {
    let is_it =
        |mount: &mountinfo::MountEntry| mount.mountpoint == mountpoint && mount.device == device_number;
    mountinfo::read().map_or(true, |mounts| mounts.iter().any(is_it))
}
