//! A mount that is attached nowhere: a connection whose files only who has its root can open.
//!
//! Nothing but the helper opens files below that root. This process holds it and never walks from it: it would wait for
//! itself. The files that the kernel's EROFS has open keep the connection's superblock alive without it.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use super::counters::Counters;
use super::helper::{Done, Request};
use super::helper_process::{DEADLINE, Helper};
use super::session::{END_WAIT, Served, threads_by_default};
use crate::error::{Error, Result};
use crate::fs::ops::Operations;

/// What the connection is called in messages.
const NAME: &str = "the connection of devices";

/// A filesystem that is mounted and attached nowhere. Dropping it ends the session, whoever has files of it open: what the
/// kernel has not read by then it cannot read any more. When the process ends the same happens.
#[derive(Debug)]
pub struct DetachedMount {
    root: OwnedFd,
    device_number: String,
    helper: Helper,
    session: Served,
}

impl DetachedMount {
    /// Mounts `fs`, with a read-ahead of so many KiB, and returns when it is served. Blocks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot; [`Error::Io`], [`Error::Timeout`].
    pub fn start(
        fs: Arc<dyn Operations>,
        helper: &Helper,
        read_ahead_kib: u32,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Self> {
        let (done, fds) = helper.ask(Path::new(NAME), &Request::MountDetached, &[], DEADLINE)?;
        let fds: Result<[OwnedFd; 2], _> = fds.try_into();
        let (Done::MountedDetached { device: number }, Ok([device, root])) = (done, fds) else {
            return Err(Helper::nonsense());
        };
        let mut mount = Self {
            root,
            device_number: number,
            helper: helper.clone(),
            session: Served::default(),
        };
        // The kernel lets nobody in but root, so nothing is left to enforce.
        let enforces = false;
        mount.session.start(
            fs,
            device,
            NAME.to_owned(),
            enforces,
            threads_by_default(),
            runtime,
        )?;
        if let Err(error) = mount.set_read_ahead(read_ahead_kib) {
            // Reads then have other sizes, and are no worse. In a container /sys is often read-only.
            tracing::debug!(%error, "the read-ahead stays as it is");
        }
        Ok(mount)
    }

    /// Its root, from which the helper opens files. This process must not.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Sets how far the kernel reads ahead in its files, in KiB. This looks at no file of it.
    ///
    /// # Errors
    /// [`Error::Io`], as where /sys is read-only.
    pub fn set_read_ahead(&self, kib: u32) -> Result<()> {
        let path = format!("/sys/class/bdi/{}/read_ahead_kb", self.device_number);
        fs::write(&path, kib.to_string()).map_err(|error| Error::io(path, &error))
    }

    /// Whether the session has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.session.has_ended()
    }

    /// Resolves when the session has ended, for whatever reason.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        self.session.ended()
    }

    /// The requests so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.session.counters()
    }
}

impl Drop for DetachedMount {
    fn drop(&mut self) {
        // The kernel would end it by itself only when this root and all files of it were closed.
        if !self.session.has_ended() {
            let request = Request::AbortConnection {
                device: self.device_number.clone(),
            };
            if let Err(error) = self.helper.ask(Path::new(NAME), &request, &[], DEADLINE) {
                tracing::warn!(%error, "could not end {NAME}");
            }
        }
        self.session.join(END_WAIT);
    }
}
