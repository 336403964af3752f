//! Directories: blocks of dirents with their names behind them, sorted throughout, `.` and `..` among them.
//!
//! A name begins a new block when it does not fit into the last one, so the size of a directory is decided by its names
//! alone. The tree has it already, so that it is the same wherever the tree is shown.

use crate::image::erofs::disk::{BLOCK_BYTES, DIRENT_BYTES};

const BLOCK: usize = BLOCK_BYTES as usize;
/// The names that every directory has.
pub(super) const DOTS: [&[u8]; 2] = [b".", b".."];

/// Size in bytes of a directory of these names, which come sorted.
pub(in crate::image) fn dir_bytes<'n>(names: impl Iterator<Item = &'n [u8]>) -> u64 {
    let (mut blocks_bytes, mut block_bytes) = (0u64, 0);
    let mut add = |name: &[u8]| {
        let bytes = DIRENT_BYTES + name.len();
        if block_bytes + bytes > BLOCK {
            blocks_bytes += BLOCK_BYTES;
            block_bytes = 0;
        }
        block_bytes += bytes;
    };
    let mut dots = DOTS.into_iter().peekable();
    for name in names {
        while let Some(dot) = dots.next_if(|dot| *dot < name) {
            add(dot);
        }
        add(name);
    }
    dots.for_each(add);
    blocks_bytes + block_bytes as u64
}

/// One block in the making.
#[derive(Debug, Default)]
pub(super) struct DirBlock {
    /// Inode, type, and where the name ends in `names`.
    dirents: Vec<(u64, u8, usize)>,
    names: Vec<u8>,
}

impl DirBlock {
    fn bytes(&self) -> usize {
        self.dirents.len() * DIRENT_BYTES + self.names.len()
    }

    /// Whether a name still fits.
    pub(super) fn has_room(&self, name: &[u8]) -> bool {
        self.bytes() + DIRENT_BYTES + name.len() <= BLOCK
    }

    /// Adds a name that fits.
    pub(super) fn push(&mut self, nid: u64, kind: u8, name: &[u8]) {
        self.names.extend_from_slice(name);
        self.dirents.push((nid, kind, self.names.len()));
    }

    /// Lays the block out behind what `out` has, without padding, and begins a new one.
    pub(super) fn take(&mut self, out: &mut Vec<u8>) {
        let names_at = self.dirents.len() * DIRENT_BYTES;
        let mut name_at = names_at;
        for &(nid, kind, end) in &self.dirents {
            out.extend_from_slice(&nid.to_le_bytes());
            out.extend_from_slice(&(name_at as u16).to_le_bytes());
            out.extend_from_slice(&[kind, 0]);
            name_at = names_at + end;
        }
        out.extend_from_slice(&self.names);
        self.dirents.clear();
        self.names.clear();
    }
}
