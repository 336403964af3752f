//! The records of the format, as `fs/erofs/erofs_fs.h` has them. All numbers are little-endian.

use crate::digest::Digest;
use crate::layer::entry::{Kind, Time};

/// Size of a block in bytes: that of a page, which is what every kernel can do.
pub const BLOCK_BYTES: u64 = 4096;
/// The first bytes of the UUID of every image that is written here, by which a mount of one is told from others
/// (`FS_IOC_GETFSUUID`).
pub const UUID_PREFIX: [u8; 8] = *b"rgstryfs";

/// Where the superblock starts.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: u64 = 128;
pub(super) const DEVICE_BYTES: u64 = 128;
/// Where the device table starts: behind the superblock. It is counted in its own records.
pub(super) const DEVICES_AT: u64 = SUPERBLOCK_AT + SUPERBLOCK_BYTES;
/// Inodes start at multiples of this, and their numbers count it.
pub(super) const SLOT_BYTES: u64 = 32;
/// The number of the root's inode. Not 0: programs take that for a name that was removed.
pub(super) const ROOT_NID: u64 = 1;
/// Size of the inode form that has room for every field.
pub(super) const INODE_BYTES: u64 = 64;
pub(super) const DIRENT_BYTES: usize = 12;
/// Size of one entry of a chunk table, which starts at a multiple of it.
pub(super) const CHUNK_BYTES: u64 = 8;
/// What stands in front of the attributes behind an inode.
pub(super) const XATTR_HEAD_BYTES: u64 = 12;
/// Attributes, and numbers of shared ones, start at multiples of this.
pub(super) const XATTR_ALIGN_BYTES: u64 = 4;
/// The most bytes of attributes behind one inode: they are counted in 16 bits, from the head on as 1.
pub(super) const XATTR_BODY_BYTES_MAX: u64 = XATTR_HEAD_BYTES + XATTR_ALIGN_BYTES * (u16::MAX as u64 - 1);

const MAGIC: u32 = 0xE0F5_E1E2;
const BLOCK_BITS: u8 = 12;
/// The time of an inode is its mtime.
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const INCOMPAT_DEVICE_TABLE: u32 = 0x8;
/// In place of a block: a hole.
const NULL_BLOCK: u32 = u32::MAX;

/// The UUID of the image of the tree with this key.
#[must_use]
pub fn uuid(key: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    let (prefix, rest) = uuid.split_at_mut(UUID_PREFIX.len());
    prefix.copy_from_slice(&UUID_PREFIX);
    rest.iter_mut()
        .zip(key.as_bytes())
        .for_each(|(to, from)| *to = *from);
    uuid
}

/// The superblock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Superblock {
    pub(super) inodes: u64,
    /// Size of the image in blocks.
    pub(super) blocks: u32,
    /// The block from which inodes are numbered.
    pub(super) inodes_block: u32,
    /// The block from which shared attributes are numbered.
    pub(super) xattrs_block: u32,
    pub(super) uuid: [u8; 16],
    /// Number of devices besides the image.
    pub(super) devices: u16,
}

impl Superblock {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        put_u32(out, MAGIC);
        // No checksum of its own: that of our header covers it.
        put_u32(out, 0);
        put_u32(out, COMPAT_MTIME);
        out.extend_from_slice(&[BLOCK_BITS, 0]);
        put_u16(out, ROOT_NID as u16);
        out.extend_from_slice(&self.inodes.to_le_bytes());
        // The time of inodes without one, of which there are none.
        out.extend_from_slice(&[0; 12]);
        put_u32(out, self.blocks);
        put_u32(out, self.inodes_block);
        put_u32(out, self.xattrs_block);
        out.extend_from_slice(&self.uuid);
        out.extend_from_slice(b"registryfs\0\0\0\0\0\0");
        put_u32(out, INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE);
        put_u16(out, 0);
        put_u16(out, self.devices);
        put_u16(out, (DEVICES_AT / DEVICE_BYTES) as u16);
        out.resize(start + SUPERBLOCK_BYTES as usize, 0);
    }
}

/// A record of the device table. Without a place in one address space of all devices, which nothing needs: every chunk
/// names its device.
pub(super) fn put_device(out: &mut Vec<u8>, blocks: u32) {
    let start = out.len();
    out.resize(start + 64, 0);
    put_u32(out, blocks);
    out.resize(start + DEVICE_BYTES as usize, 0);
}

/// How the content of an inode is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum DataLayout {
    /// In blocks.
    Plain = 0,
    /// In blocks, and what is less than a block behind the inode.
    Inline = 2,
    /// In chunks of devices.
    Chunks = 4,
}

/// An inode in the form that has room for every field.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inode {
    pub(super) layout: DataLayout,
    pub(super) xattr_bytes: u64,
    pub(super) kind: Kind,
    /// Permission bits.
    pub(super) mode: u32,
    pub(super) size: u64,
    /// The first block, the form of the chunks, or the number of a device.
    pub(super) union: u32,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) nlink: u32,
}

impl Inode {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        put_u16(out, 1 | (self.layout as u16) << 1);
        let body_bytes = self.xattr_bytes.checked_sub(XATTR_HEAD_BYTES);
        put_u16(
            out,
            body_bytes.map_or(0, |bytes| 1 + (bytes / XATTR_ALIGN_BYTES) as u16),
        );
        put_u16(out, format_bits(self.kind) | (self.mode & 0o7777) as u16);
        put_u16(out, 0);
        out.extend_from_slice(&self.size.to_le_bytes());
        for field in [self.union, self.number, self.uid, self.gid] {
            put_u32(out, field);
        }
        out.extend_from_slice(&self.mtime.seconds.to_le_bytes());
        put_u32(out, self.mtime.nanos);
        put_u32(out, self.nlink);
        out.resize(start + INODE_BYTES as usize, 0);
    }
}

/// The form of a chunk table whose entries name devices, for chunks of `1 << bits` blocks.
pub(super) fn chunk_form(bits: u8) -> u32 {
    const WITH_DEVICES: u32 = 0x20;
    u32::from(bits) | WITH_DEVICES
}

/// An entry of a chunk table: a block of a device, counted from 1; `None` for a hole.
pub(super) fn put_chunk(out: &mut Vec<u8>, at: Option<(u16, u32)>) {
    let (device, block) = at.unwrap_or((0, NULL_BLOCK));
    put_u16(out, 0);
    put_u16(out, device);
    put_u32(out, block);
}

/// The type of a file in a dirent.
pub(super) fn dirent_type(kind: Kind) -> u8 {
    match kind {
        Kind::File | Kind::Hardlink => 1,
        Kind::Dir => 2,
        Kind::Char => 3,
        Kind::Block => 4,
        Kind::Fifo => 5,
        Kind::Symlink => 7,
    }
}

/// The type of a file in its mode.
fn format_bits(kind: Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::Char => 0o020_000,
        Kind::Dir => 0o040_000,
        Kind::Block => 0o060_000,
        Kind::File | Kind::Hardlink => 0o100_000,
        Kind::Symlink => 0o120_000,
    }
}

pub(super) fn put_u16(out: &mut Vec<u8>, field: u16) {
    out.extend_from_slice(&field.to_le_bytes());
}

pub(super) fn put_u32(out: &mut Vec<u8>, field: u32) {
    out.extend_from_slice(&field.to_le_bytes());
}
