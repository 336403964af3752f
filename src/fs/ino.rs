//! Inode numbers: the same path and image give the same number after a restart, and a number says which table knows it.
//!
//! ```text
//! 1                          the root
//! bit 63 set                 a directory or file of the tree of names: 63 bits of the hash of its path (and image)
//! bit 63 clear, slot << 32   inode `low 32 bits` of the merged tree in that slot; the store counts the slots up from 1
//! ```
//! A directory has one inode for each path that leads to it (the kernel gives a directory inode one dentry and would move
//! working directories and mounts to it), so a merged tree gets one slot for each path it is seen under, for its
//! directories, and one slot for its other inodes, which all those paths share, and their page cache too.

use crate::digest::Digest;

const NAME_BIT: u64 = 1 << 63;

/// Which table knows an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The tree of names.
    Name,
    /// Inode `node` of the merged tree in `slot`.
    Slot { slot: u32, node: u32 },
}

/// Says which table knows an inode.
pub(super) fn place(ino: u64) -> Place {
    let slot = (ino >> 32) as u32;
    if ino & NAME_BIT != 0 || slot == 0 {
        Place::Name
    } else {
        Place::Slot {
            slot,
            node: ino as u32,
        }
    }
}

/// The number of inode `node` in a slot.
pub(super) fn in_slot(slot: u32, node: u32) -> u64 {
    u64::from(slot) << 32 | u64::from(node)
}

/// The number that a path in the tree of names would have, if no other path has it.
pub(super) fn of_name(path: &str, image: Option<&Digest>) -> u64 {
    let key = match image {
        Some(digest) => format!("{path}\0{digest}"),
        None => path.to_owned(),
    };
    let hash = Digest::of(key.as_bytes());
    let head = hash.as_bytes().first_chunk::<8>().copied().unwrap_or_default();
    NAME_BIT | u64::from_le_bytes(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_says_where_it_belongs() {
        assert_eq!(place(crate::fs::ops::ROOT_INO), Place::Name);
        assert_eq!(place(of_name("docker.io", None)), Place::Name);
        assert_eq!(place(in_slot(7, 9)), Place::Slot { slot: 7, node: 9 });
        assert_eq!(
            place(in_slot(i32::MAX as u32, u32::MAX)),
            Place::Slot {
                slot: i32::MAX as u32,
                node: u32::MAX
            }
        );
    }

    #[test]
    fn numbers_are_those_of_path_and_image_and_stay() {
        let digest = Digest::of(b"image");
        assert_eq!(of_name("a/b", None), of_name("a/b", None));
        assert_ne!(of_name("a/b", None), of_name("a/b", Some(&digest)));
        // Written down, so that a change of the scheme, which would break mounts over a restart, is noticed.
        assert_eq!(of_name("docker.io", None), 0xfb57_d85d_41c4_3035);
    }
}
