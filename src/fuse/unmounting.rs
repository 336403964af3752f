//! What is ours in the mount table, and how the helper takes it away again.
//!
//! Ours are the mounts of our FUSE type, and the EROFS mounts whose images we have written, which is known by their UUIDs.

use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::statvfs::statvfs;
use nix::unistd::geteuid;

use super::erofs::Detach;
use super::fusermount::{self, Fusermount};
use super::helper::{Done, FS_TYPE, Reply, Unmount, resolve, system_error};
use super::mountinfo::MountEntry;
use super::{busy, erofs_helper, erofs_uuid, mountinfo, utab};
use crate::error::{Error, Result};
use crate::image::erofs::UUID_PREFIX;

/// How often an unmount is tried while the mount is busy: someone may just be leaving.
pub(super) const UNMOUNT_TRIES: u32 = 4;
/// The pause between two tries.
pub(super) const UNMOUNT_PAUSE: Duration = Duration::from_millis(50);

/// All mounts of this process's namespace.
pub(super) fn read_table() -> Result<Vec<MountEntry>> {
    mountinfo::read().map_err(|error| mountinfo::unreadable(&error))
}

/// Whether a mount is one of ours. An EROFS is opened for that, so its way must not lead through a connection of this
/// process.
pub(super) fn is_ours(mount: &MountEntry) -> bool {
    match mount.fs_type.as_str() {
        FS_TYPE => true,
        mountinfo::EROFS => erofs_uuid::of(mount).is_some_and(|uuid| uuid.starts_with(&UUID_PREFIX)),
        _ => false,
    }
}

/// The mount table's word on our mount at a canonical path.
pub(super) fn ours_at(mountpoint: &Path) -> Result<Option<MountEntry>> {
    let top = mountinfo::top_at(mountpoint).map_err(|error| mountinfo::unreadable(&error))?;
    Ok(top.filter(is_ours))
}

/// Whether nobody serves the mount any more.
pub(super) fn is_dead(mountpoint: &Path) -> bool {
    matches!(statvfs(mountpoint), Err(Errno::ENOTCONN | Errno::ECONNABORTED))
}

/// Takes a mount out of the tree. Where its device number is given, every use of it fails from then on.
pub(super) fn detach(mountpoint: &Path, abort: Option<&str>) -> Result<()> {
    if !geteuid().is_root() {
        if let Some(device) = abort {
            fusermount::abort(device);
        }
        return Fusermount::find()?.unmount(mountpoint, true);
    }
    let force = abort.map_or(MntFlags::empty(), |_| MntFlags::MNT_FORCE);
    umount2(
        mountpoint,
        force | MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
    )
    .map_err(|errno| system_error(format!("cannot unmount {}", mountpoint.display()), errno))
}

/// Unmounts what is ours at a path, in one of the ways; `device` says which one is meant.
pub(super) fn unmount(path: &Path, device: Option<&str>, how: Unmount) -> Reply {
    let mountpoint = resolve(path)?;
    let entry = match (ours_at(&mountpoint)?, device) {
        (Some(entry), None) => entry,
        (Some(entry), Some(device)) if entry.device == device => entry,
        // Somebody else unmounted it, which is what was wanted.
        (_, Some(_)) => return Ok(Done::Ok),
        (None, None) => {
            let message = format!("no registryfs is mounted on {}", mountpoint.display());
            return Err(Error::usage(message));
        }
    };
    match (how, entry.fs_type == FS_TYPE) {
        (Unmount::Idle, true) => {
            remove_below(&entry)?;
            unmount_idle(&entry.mountpoint)?;
        }
        (Unmount::Lazy, true) => detach(&mountpoint, None)?,
        (Unmount::Abort, true) => detach(&mountpoint, Some(&entry.device))?,
        (Unmount::Dead, true) if is_dead(&mountpoint) => detach(&mountpoint, None)?,
        (Unmount::Idle, false) => erofs_helper::detach(&read_table()?, &entry, Detach::Idle)?,
        // Nothing makes the uses of an EROFS fail.
        (Unmount::Lazy | Unmount::Abort, false) => {
            erofs_helper::detach(&read_table()?, &entry, Detach::Lazy)?;
        }
        (Unmount::Dead, _) => {}
    }
    if geteuid().is_root() && entry.fs_type == FS_TYPE && how != Unmount::Dead {
        utab::update();
    }
    Ok(Done::Ok)
}

/// Removes the EROFS mounts of ours on and below a mount, the innermost first. All that are idle go, and the first one that
/// is not is the error; a way that removes more than one mount takes them all by itself.
fn remove_below(mount: &MountEntry) -> Result<()> {
    let mounts = read_table()?;
    let mut failure = None;
    for below in mountinfo::below(&mounts, mount.id) {
        if below.fs_type != mountinfo::EROFS || !is_ours(below) {
            continue;
        }
        // What was removed before may have covered this one.
        if let Err(error) = erofs_helper::detach(&read_table()?, below, Detach::Idle) {
            failure.get_or_insert(error);
        }
    }
    failure.map_or(Ok(()), Err)
}

fn unmount_idle(mountpoint: &Path) -> Result<()> {
    for attempt in 1.. {
        match unmount_once(mountpoint) {
            Err(Error::Busy { .. }) if attempt < UNMOUNT_TRIES => std::thread::sleep(UNMOUNT_PAUSE),
            Err(Error::Busy { what, .. }) => return Err(Error::busy(what, busy::describe(mountpoint))),
            done => return done,
        }
    }
    Ok(())
}

fn unmount_once(mountpoint: &Path) -> Result<()> {
    if !geteuid().is_root() {
        return Fusermount::find()?.unmount(mountpoint, false);
    }
    let what = format!("cannot unmount {}", mountpoint.display());
    match umount2(mountpoint, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(Error::busy(what, "it is in use")),
        Err(errno) => Err(system_error(what, errno)),
    }
}

/// Whether a live mount of ours is there.
pub(super) fn is_mounted(path: &Path) -> Reply {
    let mountpoint = resolve(path)?;
    let live = ours_at(&mountpoint)?.is_some() && !is_dead(&mountpoint);
    Ok(Done::Live { live })
}
