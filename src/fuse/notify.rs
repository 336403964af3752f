//! Messages to the kernel that no request asked for (`struct fuse_out_header` with unique 0, linux/fuse.h). fuser 0.18 has
//! no call for expiring an entry.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use crate::error::{Error, Result};

/// FUSE_NOTIFY_INVAL_INODE.
const INVAL_INODE: i32 = 2;
/// FUSE_NOTIFY_INVAL_ENTRY.
const INVAL_ENTRY: i32 = 3;
/// FUSE_NOTIFY_STORE.
const STORE: i32 = 4;
/// FUSE_EXPIRE_ONLY: the name is looked up again when it is used next, and nothing is detached before.
const EXPIRE_ONLY: u32 = 1;
/// The longest name that the kernel takes (FUSE_NAME_MAX of Linux before 6.18), in bytes.
const NAME_BYTES_MAX: usize = 1024;
/// The length of the header in bytes.
const HEADER_BYTES: usize = 16;

fn message(code: i32, parts: &[&[u8]]) -> Vec<u8> {
    let body: usize = parts.iter().map(|part| part.len()).sum();
    let length = u32::try_from(HEADER_BYTES + body).unwrap_or(u32::MAX);
    let unique = [0; 8];
    let header: [&[u8]; 3] = [&length.to_ne_bytes(), &code.to_ne_bytes(), &unique];
    header.iter().chain(parts).copied().flatten().copied().collect()
}

/// Lets what the kernel knows of a name end.
pub(super) fn expire_entry(parent: u64, name: &[u8]) -> Result<Vec<u8>> {
    let length = match u32::try_from(name.len()) {
        Ok(length) if (1..=NAME_BYTES_MAX).contains(&name.len()) => length,
        _ => return Err(Error::posix(String::from_utf8_lossy(name), libc::ENAMETOOLONG)),
    };
    Ok(message(
        INVAL_ENTRY,
        &[
            &parent.to_ne_bytes(),
            &length.to_ne_bytes(),
            &EXPIRE_ONLY.to_ne_bytes(),
            name,
            b"\0",
        ],
    ))
}

/// Lets what the kernel knows of an inode's attributes end. Its pages stay: a negative offset means none of them.
pub(super) fn expire_attributes(ino: u64) -> Vec<u8> {
    let (offset, length) = (-1_i64, 0_i64);
    message(
        INVAL_INODE,
        &[&ino.to_ne_bytes(), &offset.to_ne_bytes(), &length.to_ne_bytes()],
    )
}

/// Puts all of a file's content into the kernel's page cache. The kernel may hold the call for as long as
/// it waits for a READ of the same inode.
///
/// # Errors
/// ENOENT where the kernel does not know the inode; ENODEV when the session has ended.
pub(super) fn store(device: BorrowedFd<'_>, ino: u64, content: &[u8]) -> io::Result<()> {
    let head = content_head(ino, content.len());
    let head = head.ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
    nix::sys::uio::writev(device, &[IoSlice::new(&head), IoSlice::new(content)])?;
    Ok(())
}

/// What stands before the content of [`store`]; `None` where that is too long.
fn content_head(ino: u64, bytes: usize) -> Option<Vec<u8>> {
    let (offset, padding) = (0_u64, 0_u32);
    let bytes = u32::try_from(bytes).ok()?;
    let mut head = message(
        STORE,
        &[
            &ino.to_ne_bytes(),
            &offset.to_ne_bytes(),
            &bytes.to_ne_bytes(),
            &padding.to_ne_bytes(),
        ],
    );
    let length = u32::try_from(head.len()).ok()?.checked_add(bytes)?;
    head[..4].copy_from_slice(&length.to_ne_bytes());
    Some(head)
}

/// Sends a message. What the kernel does not know needs no message.
pub(super) fn send(device: BorrowedFd<'_>, message: &[u8]) -> io::Result<()> {
    match nix::unistd::write(device, message) {
        Ok(_) | Err(nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_layout_of_the_kernel() {
        let entry = expire_entry(0x0102, b"ab").unwrap();
        assert_eq!(entry.len(), 16 + 16 + 3);
        assert_eq!(entry[..4], 35_u32.to_ne_bytes());
        assert_eq!(entry[4..8], 3_i32.to_ne_bytes());
        assert_eq!(entry[16..24], 0x0102_u64.to_ne_bytes());
        assert_eq!(entry[24..32], [2_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat());
        assert_eq!(&entry[32..], b"ab\0");
        assert_eq!(expire_attributes(7).len(), 16 + 24);
        let content = content_head(7, 3).unwrap();
        assert_eq!(content.len(), 16 + 24);
        assert_eq!(content[..4], (16 + 24 + 3_u32).to_ne_bytes());
        assert_eq!(content[4..8], 4_i32.to_ne_bytes());
        assert_eq!(content[16..24], 7_u64.to_ne_bytes());
        assert_eq!(content[32..36], 3_u32.to_ne_bytes());
        for name in [&b""[..], &[b'x'; NAME_BYTES_MAX + 1]] {
            assert!(expire_entry(1, name).is_err());
        }
    }
}
