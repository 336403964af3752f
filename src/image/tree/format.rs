//! The bytes of a merged tree: fixed-size little-endian records in sections behind a header, so that opening costs no
//! parsing and no heap, and an inode is found by its number.
//!
//! ```text
//! header 128 | nodes 64 each | dirents 12 each | symlink targets and names | xattrs
//! ```
//! *Nodes* are numbered in depth-first order of the sorted tree, so the same image gets the same numbers every time and
//! a node's number is above its parent's. The *dirents* of a directory stand together, sorted by name: the place of one
//! among them is a directory offset that never changes. Equal *xattrs* are stored once.

use crate::digest::Digest;
use crate::error::Result;
use crate::image::tree::damaged;
use crate::layer::entry::{Kind, Time};
use crate::layer::fields::Fields;

pub(super) const MAGIC: [u8; 8] = *b"RFSMERGE";
pub(super) const VERSION: u32 = 2;
pub(super) const HEADER_BYTES: usize = 128;
pub(super) const NODE_BYTES: usize = 64;
pub(super) const DIRENT_BYTES: usize = 12;
/// Where the CRC stands in the header; it covers everything behind itself.
pub(super) const CRC_AT: usize = 12;
/// No such number.
pub(super) const NONE: u32 = u32::MAX;

/// What the header says besides magic number, version and checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) key: Digest,
    pub(super) nodes: u64,
    pub(super) dirents: u64,
    pub(super) string_bytes: u64,
    pub(super) xattr_bytes: u64,
    /// Sum of the sizes of all regular files.
    pub(super) file_bytes: u64,
}

impl Header {
    /// Appends the header, with room for the checksum.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(self.key.as_bytes());
        for field in [
            self.nodes,
            self.dirents,
            self.string_bytes,
            self.xattr_bytes,
            self.file_bytes,
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.resize(start + HEADER_BYTES, 0);
    }

    /// Reads the header of `bytes` and checks that its sections fill them. Returns the checksum too.
    pub(super) fn read(bytes: &[u8]) -> Result<(Self, u32)> {
        let header = bytes
            .get(..HEADER_BYTES)
            .ok_or_else(|| damaged("shorter than its header"))?;
        let mut fields = Fields(header);
        if fields.take::<8>() != MAGIC || fields.u32() != VERSION {
            return Err(damaged("another magic number or version"));
        }
        let crc = fields.u32();
        let header = Self {
            key: Digest::from_bytes(fields.take()),
            nodes: fields.u64(),
            dirents: fields.u64(),
            string_bytes: fields.u64(),
            xattr_bytes: fields.u64(),
            file_bytes: fields.u64(),
        };
        let numbered = u64::from(NONE);
        if header.nodes == 0 || header.nodes >= numbered || header.dirents >= numbered {
            return Err(damaged("more or fewer inodes than can be"));
        }
        if header.end() != bytes.len() as u64 {
            return Err(damaged("its sections do not fill it"));
        }
        Ok((header, crc))
    }

    /// Where node `number` starts.
    pub(super) fn node_start(number: u32) -> usize {
        HEADER_BYTES + number as usize * NODE_BYTES
    }

    /// Where dirent `position` starts.
    pub(super) fn dirent_start(&self, position: u32) -> usize {
        HEADER_BYTES + self.nodes as usize * NODE_BYTES + position as usize * DIRENT_BYTES
    }

    /// Where the strings start, in u64 because the counts may not be checked yet.
    pub(super) fn strings_start(&self) -> u64 {
        (HEADER_BYTES as u64)
            .saturating_add(self.nodes.saturating_mul(NODE_BYTES as u64))
            .saturating_add(self.dirents.saturating_mul(DIRENT_BYTES as u64))
    }

    pub(super) fn xattrs_start(&self) -> u64 {
        self.strings_start().saturating_add(self.string_bytes)
    }

    pub(super) fn end(&self) -> u64 {
        self.xattrs_start().saturating_add(self.xattr_bytes)
    }
}

/// A node as stored. What `detail` holds depends on the type: a file's size, a directory's first dirent and their
/// number, where a symlink's target starts, a device's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeRecord {
    pub(super) kind: Kind,
    pub(super) mode: u16,
    pub(super) layer: u16,
    pub(super) link_len: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) nlink: u32,
    /// The entry of the layer that it is made from, or [`NONE`].
    pub(super) entry: u32,
    pub(super) mtime: Time,
    /// The directory of its first name; the root's is itself.
    pub(super) parent: u32,
    pub(super) detail: Detail,
    /// Place and length in the xattr section.
    pub(super) xattrs: (u32, u32),
    /// The dirent of its first name, or [`NONE`] for the root.
    pub(super) name: u32,
    /// Size of a directory in bytes, else 0.
    pub(super) dir_bytes: u32,
}

/// Eight bytes, read as one number or as two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Detail(pub(super) u64);

impl Detail {
    pub(super) fn pair(first: u32, second: u32) -> Self {
        Self(u64::from(first) | u64::from(second) << 32)
    }

    pub(super) fn split(self) -> (u32, u32) {
        (self.0 as u32, (self.0 >> 32) as u32)
    }
}

/// Where parent and name stand in a node: both become known when the dirents are written.
const PARENT_AT: usize = 36;
const NAME_AT: usize = 56;

impl NodeRecord {
    /// Appends the record.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[self.kind as u8, 0]);
        for field in [self.mode, self.layer, self.link_len] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        for field in [self.uid, self.gid, self.nlink, self.entry] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.mtime.seconds.to_le_bytes());
        for field in [self.mtime.nanos, self.parent] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.detail.0.to_le_bytes());
        for field in [self.xattrs.0, self.xattrs.1, self.name, self.dir_bytes] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        debug_assert_eq!(out.len(), start + NODE_BYTES);
    }

    /// Names node `number`, which `out` has already, unless it has a name.
    pub(super) fn set_name(out: &mut [u8], number: u32, parent: u32, name: u32) {
        let start = Header::node_start(number);
        let record = &mut out[start..start + NODE_BYTES];
        if record[NAME_AT..NAME_AT + 4] == NONE.to_le_bytes() {
            record[NAME_AT..NAME_AT + 4].copy_from_slice(&name.to_le_bytes());
            record[PARENT_AT..PARENT_AT + 4].copy_from_slice(&parent.to_le_bytes());
        }
    }

    /// Reads a record of [`NODE_BYTES`].
    pub(super) fn read(record: &[u8]) -> Result<Self> {
        let mut fields = Fields(record);
        let kind = Kind::from_byte(fields.u8()).filter(|&kind| kind != Kind::Hardlink);
        let kind = kind.ok_or_else(|| damaged("unknown inode type"))?;
        let _reserved = fields.u8();
        Ok(Self {
            kind,
            mode: fields.u16(),
            layer: fields.u16(),
            link_len: fields.u16(),
            uid: fields.u32(),
            gid: fields.u32(),
            nlink: fields.u32(),
            entry: fields.u32(),
            mtime: Time {
                seconds: i64::from_le_bytes(fields.take()),
                nanos: fields.u32(),
            },
            parent: fields.u32(),
            detail: Detail(fields.u64()),
            xattrs: (fields.u32(), fields.u32()),
            name: fields.u32(),
            dir_bytes: fields.u32(),
        })
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirentRecord {
    pub(super) node: u32,
    /// Place and length in the string section.
    pub(super) name: (u32, u16),
}

impl DirentRecord {
    /// Appends the record.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.node.to_le_bytes());
        out.extend_from_slice(&self.name.0.to_le_bytes());
        out.extend_from_slice(&self.name.1.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
    }

    /// Reads a record of [`DIRENT_BYTES`].
    pub(super) fn read(record: &[u8]) -> Self {
        let mut fields = Fields(record);
        Self {
            node: fields.u32(),
            name: (fields.u32(), fields.u16()),
        }
    }
}
