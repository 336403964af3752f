//! The filesystem's types in fuser's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, INodeNo};

use crate::error::Error;
use crate::fs::ops::{Attr, FileType};
use crate::layer::entry::Time;

/// The block size that stat(2) and statfs(2) show, in bytes: the page size, the unit of the kernel's cache.
pub(super) const BLOCK_BYTES: u32 = 4096;

/// What stat(2) shall show.
pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    let time = system_time(attr.mtime);
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attr.kind),
        perm: attr.mode & 0o7777,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// Attributes that mean no inode: number 0.
pub(super) fn no_inode(kind: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// The type in fuser's terms.
pub(super) fn file_type(kind: FileType) -> fuser::FileType {
    match kind {
        FileType::Dir => fuser::FileType::Directory,
        FileType::File => fuser::FileType::RegularFile,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Char => fuser::FileType::CharDevice,
        FileType::Block => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
    }
}

/// What the kernel is told about a failure.
pub(super) fn errno(error: &Error) -> fuser::Errno {
    fuser::Errno::from_i32(error.errno())
}

/// A time that the clock type cannot hold becomes the epoch: a layer may say anything, and stat(2) must not fail.
fn system_time(time: Time) -> SystemTime {
    let whole_seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let second = if time.seconds < 0 {
        UNIX_EPOCH.checked_sub(whole_seconds)
    } else {
        UNIX_EPOCH.checked_add(whole_seconds)
    };
    let nanos = Duration::from_nanos(u64::from(time.nanos.min(999_999_999)));
    second
        .and_then(|second| second.checked_add(nanos))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_at_the_limits_convert() {
        let at = |seconds, nanos| system_time(Time { seconds, nanos });
        assert_eq!(at(0, 5), UNIX_EPOCH + Duration::from_nanos(5));
        assert_eq!(at(-2, 250_000_000), UNIX_EPOCH - Duration::from_millis(1750));
        assert_eq!(at(3, u32::MAX), UNIX_EPOCH + Duration::new(3, 999_999_999));
        let day = Duration::from_secs(86_400);
        assert!(at(i64::MIN, 0) == UNIX_EPOCH || at(i64::MIN, 0) < UNIX_EPOCH - day);
        assert!(at(i64::MAX, 999_999_999) == UNIX_EPOCH || at(i64::MAX, 999_999_999) > UNIX_EPOCH + day);
    }
}
