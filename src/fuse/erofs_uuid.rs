//! The UUID of a mounted filesystem (ioctl FS_IOC_GETFSUUID, Linux 6.9), asked of its root directory.
#![allow(unsafe_code)]

use rustix::fs::{Mode, OFlags, fstat, major, minor, open};
use rustix::ioctl::{Getter, Opcode, ioctl, opcode};

use super::mountinfo::MountEntry;

/// A UUID in bytes.
const UUID_BYTES: usize = 16;

/// `struct fsuuid2` of linux/fs.h.
#[repr(C)]
struct FsUuid {
    length: u8,
    uuid: [u8; UUID_BYTES],
}

/// FS_IOC_GETFSUUID of linux/fs.h.
const GET_UUID: Opcode = opcode::read::<FsUuid>(0x15, 0);

/// The UUID of the filesystem that a mount in the table shows; none if it has none, or a walk to the mountpoint ends
/// elsewhere.
pub(super) fn of(mount: &MountEntry) -> Option<[u8; UUID_BYTES]> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = open(&mount.mountpoint, flags, Mode::empty()).ok()?;
    let device = fstat(&root).ok()?.st_dev;
    if format!("{}:{}", major(device), minor(device)) != mount.device {
        return None;
    }
    // SAFETY: this ioctl writes one `struct fsuuid2`, of which `FsUuid` has the layout, and any bytes are a valid one.
    let answer = unsafe { ioctl(&root, Getter::<GET_UUID, FsUuid>::new()) }.ok()?;
    (usize::from(answer.length) == UUID_BYTES).then_some(answer.uuid)
}
