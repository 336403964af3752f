//! EROFS mounts, made and removed by the helper: the daemon's side.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::helper::{Done, Request};
use super::helper_process::{DEADLINE, Helper};
use super::mountinfo;
use crate::error::Result;

/// A superblock to be made.
#[derive(Debug)]
pub struct NewErofs<'a> {
    /// The EROFS image.
    pub image: BorrowedFd<'a>,
    /// Its devices, in order.
    pub devices: Vec<ErofsDevice<'a>>,
    /// The root of the detached connection that shows devices.
    pub shown_root: BorrowedFd<'a>,
    /// The source in the mount table. One that the kernel cannot take there is shown by its end.
    pub source: String,
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

/// Where a mount is to be attached.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The directory. Its last name is not followed if it is a symbolic link.
    pub mountpoint: &'a Path,
    /// Where [`Guarded::place`] has it, if autofs guards it and it cannot be walked to.
    ///
    /// [`Guarded::place`]: super::Guarded::place
    pub guarded: Option<&'a Path>,
    /// How long this may take.
    pub deadline: Duration,
}

/// A mount that has its place.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// Where it was attached; one whose directory has moved is elsewhere by now.
    #[serde(with = "path_bytes")]
    pub mountpoint: PathBuf,
    /// Its number in the mount table.
    pub mount_id: u64,
    /// `major:minor` of the superblock.
    pub device: String,
}

/// Paths of any bytes, which text could not hold.
mod path_bytes {
    use super::*;

    pub(super) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        let bytes = Vec::deserialize(deserializer)?;
        Ok(OsString::from_vec(bytes).into())
    }
}

/// How an attachment is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Detach {
    /// Unless somebody uses it, who is waited for a moment and then named.
    Idle,
    /// Unless somebody uses it at this moment. Of many that are in use none costs time.
    Unused,
    /// Unless somebody uses it, or has since this was asked for the last time.
    Expired,
    /// From the tree at once; who uses it goes on.
    Lazy,
}

/// What the helper shall make, and with what. The descriptors that come along are, in this order: the image, the root of
/// the detached connection and the local devices; or the mount that is there already.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ErofsRequest {
    /// The superblock to be made, unless it is there.
    pub(super) make: Option<Make>,
    /// Where the mount is found without walking there, if that is otherwise; none where it is not to be attached.
    pub(super) attach: Option<Attach>,
}

/// A superblock to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Make {
    pub(super) source: String,
    /// The names of those that are shown; none for a local one.
    pub(super) devices: Vec<Option<String>>,
    pub(super) no_exec: bool,
}

/// A mount to be attached at the helper's mountpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Attach {
    /// As [`Place::guarded`].
    pub(super) guarded: Option<PathBuf>,
}

/// What was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ErofsDone {
    /// Where it was attached.
    pub(super) attachment: Option<Attachment>,
}

impl Helper {
    /// Makes a superblock: a mount of it that is attached nowhere, from which [`Self::attach_erofs`] makes others.
    ///
    /// # Errors
    /// [`Unsupported`](crate::error::Error::Unsupported) where the kernel cannot; what keeps the helper from doing it.
    pub fn make_erofs(&self, new: &NewErofs<'_>) -> Result<OwnedFd> {
        let (make, fds) = new.to_request();
        let request = ErofsRequest {
            make: Some(make),
            attach: None,
        };
        let (_, mount) = self.ask_for_erofs(Path::new(&new.source), request, &fds, DEADLINE)?;
        mount.ok_or_else(Self::nonsense)
    }

    /// Attaches a copy of a mount at `place`, and says where the mount table has it.
    ///
    /// # Errors
    /// What keeps the helper from doing it.
    pub fn attach_erofs(&self, mount: BorrowedFd<'_>, place: &Place<'_>) -> Result<Attachment> {
        let request = ErofsRequest {
            make: None,
            attach: Some(place.to_request()),
        };
        match self.ask_for_erofs(place.mountpoint, request, &[mount], place.deadline) {
            Ok((done, _)) => done.attachment.ok_or_else(Self::nonsense),
            // The helper may have been killed between attaching and answering.
            Err(error) => attached_at(mount, place.mountpoint).ok_or(error),
        }
    }

    /// [`Self::make_erofs`] and [`Self::attach_erofs`] in one process. Where either fails nothing is left.
    ///
    /// # Errors
    /// As these two.
    pub fn make_and_attach_erofs(
        &self,
        new: &NewErofs<'_>,
        place: &Place<'_>,
    ) -> Result<(OwnedFd, Attachment)> {
        let (make, fds) = new.to_request();
        let request = ErofsRequest {
            make: Some(make),
            attach: Some(place.to_request()),
        };
        let (done, mount) = self.ask_for_erofs(place.mountpoint, request, &fds, place.deadline)?;
        let attachment = done.attachment.ok_or_else(Self::nonsense)?;
        Ok((mount.ok_or_else(Self::nonsense)?, attachment))
    }

    fn ask_for_erofs(
        &self,
        mountpoint: &Path,
        request: ErofsRequest,
        fds: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<(ErofsDone, Option<OwnedFd>)> {
        match self.ask(mountpoint, &Request::Erofs(request), fds, deadline)? {
            (Done::Erofs(done), mut fds) => Ok((done, fds.pop())),
            _ => Err(Self::nonsense()),
        }
    }

    /// Removes attachments, each on its own: whether it is gone, or why not ([`Busy`](crate::error::Error::Busy) naming who uses it). One that
    /// is not there any more is gone.
    ///
    /// # Errors
    /// What keeps the helper from doing anything.
    pub fn detach_erofs(&self, attachments: &[Attachment], how: Detach) -> Result<Vec<Result<()>>> {
        let Some(first) = attachments.first() else {
            return Ok(Vec::new());
        };
        let request = Request::Detach {
            attachments: attachments.to_vec(),
            how,
        };
        match self.ask(&first.mountpoint, &request, &[], DEADLINE)? {
            (Done::Each { results }, _) if results.len() == attachments.len() => Ok(results),
            _ => Err(Self::nonsense()),
        }
    }

    /// What reads at these offsets, of these lengths in bytes, of the file `name` in the root of a mount give: bytes, or
    /// an errno.
    ///
    /// # Errors
    /// What keeps the helper from doing it, as a file that cannot be opened.
    pub fn read_in(
        &self,
        mount: BorrowedFd<'_>,
        name: &str,
        ranges: &[(u64, u32)],
    ) -> Result<Vec<Result<Vec<u8>, i32>>> {
        let request = Request::Read {
            name: name.to_owned(),
            ranges: ranges.to_vec(),
        };
        match self.ask(Path::new(name), &request, &[mount], DEADLINE)? {
            (Done::Bytes { results }, _) if results.len() == ranges.len() => Ok(results),
            _ => Err(Self::nonsense()),
        }
    }

    /// Walks to a mount of EROFS below one of ours, so that the kernel moves it to where it belongs, and wakes all who watch the
    /// mount table: the kernel tells nobody that a mount has moved with its directory.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Timeout`].
    pub fn settle(&self, path: &Path) -> Result<()> {
        self.ask(path, &Request::Settle, &[], DEADLINE).map(drop)
    }
}

impl NewErofs<'_> {
    fn to_request(&self) -> (Make, Vec<BorrowedFd<'_>>) {
        let mut fds = vec![self.image, self.shown_root];
        let device = |device: &ErofsDevice<'_>| match device {
            ErofsDevice::Shown(name) => Some(name.clone()),
            ErofsDevice::Local(_) => None,
        };
        let make = Make {
            source: self.source.clone(),
            devices: self.devices.iter().map(device).collect(),
            no_exec: self.no_exec,
        };
        fds.extend(self.devices.iter().filter_map(|device| match device {
            ErofsDevice::Shown(_) => None,
            ErofsDevice::Local(file) => Some(*file),
        }));
        (make, fds)
    }
}

impl Place<'_> {
    fn to_request(self) -> Attach {
        Attach {
            guarded: self.guarded.map(Path::to_owned),
        }
    }
}

/// The attachment that the mount table has at `mountpoint` of this mount's superblock.
fn attached_at(mount: BorrowedFd<'_>, mountpoint: &Path) -> Option<Attachment> {
    // This asks EROFS, and no file of a connection of ours.
    let device = rustix::fs::fstat(mount.as_fd()).ok()?.st_dev;
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = mountinfo::read().ok()?;
    let found = mounts
        .into_iter()
        .rfind(|mount| mount.mountpoint == mountpoint && mount.device == device)?;
    Some(Attachment {
        mountpoint: found.mountpoint,
        mount_id: found.id,
        device,
    })
}
