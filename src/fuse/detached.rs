//! A mount that is attached nowhere: a connection whose files only who has its root can open.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::counters::Counters;
use super::helper_process::Helper;
use crate::error::{Error, Result};
use crate::fs::ops::Operations;

/// A filesystem that is mounted and attached nowhere. Dropping it ends the session, whoever has files of it open.
#[derive(Debug)]
pub struct DetachedMount {
    root: OwnedFd,
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
        let _ = (fs, helper, read_ahead_kib, runtime);
        Err(Error::unsupported("detached mount", "none can be made yet"))
    }

    /// Its root, from which the helper opens files. This process must not.
    #[must_use]
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The requests so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        super::counters::Requests::default().snapshot()
    }
}
