//! Attributes of a mount that is there (mount_setattr(2), Linux 5.12).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// `MOUNT_ATTR_NODEV` of linux/mount.h.
const NODEV: u64 = 4;

/// Sets what all our mounts have already, the refusal of devices: nothing changes, but the kernel wakes who polls the mount
/// table.
pub(super) fn set_again(mount: BorrowedFd<'_>) -> io::Result<()> {
    let attr = MountAttr {
        set: NODEV,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: the path is an empty C string, `attr` has the layout and the size that are given, and the kernel only reads
    // it during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
