//! The helper's side of connections that are attached nowhere.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
use rustix::mount::MountAttrFlags;

use super::adapter::MAX_READ_BYTES;
use super::helper::{Done, device_error};
use super::new_mount::NewMount;
use crate::error::{Error, Result};

/// The source of the mount, where something shows it.
const SOURCE: &str = "registryfs-devices";

/// Mounts a connection. Only who mounted it can open its files (there is no `allow_other`), which the kernel's own reads
/// of files that are open do not ask.
pub(super) fn mount() -> Result<(Done, Vec<OwnedFd>)> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|error| device_error(&error))?;
    let new = NewMount::of("fuse")?;
    new.set("source", SOURCE)?;
    new.set("fd", &device.as_raw_fd().to_string())?;
    new.set("rootmode", "40000")?;
    new.set("user_id", &nix::unistd::geteuid().to_string())?;
    new.set("group_id", &nix::unistd::getegid().to_string())?;
    new.set("max_read", &MAX_READ_BYTES.to_string())?;
    let root = new.make(
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME,
    )?;
    let done = Done::MountedDetached {
        device: device_number(&root)?,
    };
    Ok((done, vec![device.into(), root]))
}

/// `major:minor` of a mount, asked of the kernel alone: nobody serves this one yet.
fn device_number(root: &OwnedFd) -> Result<String> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat =
        statx(root, "", flags, StatxFlags::empty()).map_err(|errno| Error::io(SOURCE, &errno.into()))?;
    Ok(format!("{}:{}", stat.stx_dev_major, stat.stx_dev_minor))
}

/// Ends a connection.
pub(super) fn abort(device: &str) -> Result<()> {
    // Without it, it has ended by itself.
    let Some(mut file) = control_file(device)? else {
        return Ok(());
    };
    file.write_all(b"1")
        .map_err(|error| Error::io(format!("ending the connection {device}"), &error))
}

/// The file by which a connection is ended, if it has not ended: in the FUSE control filesystem, which is mounted for it, as
/// nobody else may have done that.
pub(super) fn control_file(device: &str) -> Result<Option<File>> {
    let failed =
        |errno: rustix::io::Errno| Error::io(format!("ending the connection {device}"), &errno.into());
    let connection = device
        .split_once(':')
        .and_then(|(_, minor)| minor.parse::<u32>().ok())
        .ok_or_else(|| Error::malformed(device, "it is no device number"))?;
    let control = NewMount::of("fusectl")?.make(MountAttrFlags::empty())?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match openat(&control, format!("{connection}/abort"), flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(errno) => Err(failed(errno)),
        Ok(file) => Ok(Some(file.into())),
    }
}
