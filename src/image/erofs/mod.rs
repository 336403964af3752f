//! Merged trees as EROFS images: the metadata alone, which the kernel then serves by itself.
//!
//! The format is that of `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst` in the kernel; what the kernel
//! makes of it was read in its sources. No crate writes it as it is needed here, see ARCHITECTURE.md.
//!
//! ```text
//! block 0 | our header (1024 bytes), superblock, device table
//! inodes  | in the order of the tree's numbers, each with its attributes, chunk table, or short content behind it
//! blocks  | content of directories and symlinks that does not fit behind its inode
//! xattrs  | those that several inodes have, once
//! ```
//! A regular file is chunks of a *device*: the data file of its layer, where each file is contiguous. So one chunk does
//! for a file, unless it has holes that are worth a table. The devices are two a layer, base first, and then one of a
//! block that nothing refers to ([`write`] says what for).
//!
//! Whatever the kernel might stumble over ends in an error: the tree and the indexes come from a disk, what they say from
//! strangers. The same bytes go in, the same image comes out, inode numbers included.

mod chunks;
mod dirents;
mod disk;
mod header;
mod layout;
pub mod probe;
mod write;
mod xattrs;

#[cfg(test)]
mod tests;

pub(in crate::image) use dirents::dir_bytes;
pub use disk::{BLOCK_BYTES, UUID_PREFIX, uuid};
pub use header::{identity, verify};
pub use write::write;
