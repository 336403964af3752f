//! Extended attributes: behind the inode where it alone has them, else once in the shared area.
//!
//! The tree keeps equal sets of attributes once, so a set is known by its place there.

use std::collections::HashMap;
use std::ops::Deref;

use crate::error::{Error, Result};
use crate::image::erofs::disk::{
    XATTR_ALIGN_BYTES, XATTR_BODY_BYTES_MAX, XATTR_HEAD_BYTES, put_u16, put_u32,
};
use crate::image::tree::{Node, Tree};

/// The most shared attributes of one inode.
const SHARED_MAX: usize = 255;
/// The beginnings of names, and the numbers that stand for them. The whole name where it does not end in a dot.
const PREFIXES: [(&[u8], u8); 4] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"security.", 6),
];

/// One attribute.
#[derive(Debug, Clone, Copy)]
struct Xattr<'t> {
    prefix: u8,
    name: &'t [u8],
    value: &'t [u8],
}

impl<'t> Xattr<'t> {
    /// Splits the name. An error says why EROFS cannot have it.
    fn new(name: &'t [u8], value: &'t [u8]) -> std::result::Result<Self, &'static str> {
        let split =
            |(prefix, number): (&'static [u8], u8)| Some((name.strip_prefix(prefix)?, prefix, number));
        let Some((rest, prefix, number)) = PREFIXES.into_iter().find_map(split) else {
            return Err("an extended attribute of a kind that EROFS does not have");
        };
        // `user.` alone is listed by EROFS and cannot be read.
        if rest.is_empty() == prefix.ends_with(b".") || rest.len() > 255 || rest.contains(&0) {
            return Err("an extended attribute with a name that EROFS cannot have");
        }
        if value.len() > usize::from(u16::MAX) {
            return Err("an extended attribute of 64 KiB, which is more than EROFS can have");
        }
        Ok(Self {
            prefix: number,
            name: rest,
            value,
        })
    }

    fn bytes(&self) -> u64 {
        ((4 + self.name.len() + self.value.len()) as u64).next_multiple_of(XATTR_ALIGN_BYTES)
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.name.len() as u8, self.prefix]);
        put_u16(out, self.value.len() as u16);
        out.extend_from_slice(self.name);
        out.extend_from_slice(self.value);
        let padded = out.len().next_multiple_of(XATTR_ALIGN_BYTES as usize);
        out.resize(padded, 0);
    }
}

/// What is known of a set of attributes.
#[derive(Debug, Clone, Copy, Default)]
struct Set {
    /// How many inodes have it.
    uses: u32,
    /// Where it starts in the shared area, in units of 4 bytes, once it has a place there.
    shared_at: Option<u32>,
}

/// All sets of the attributes of a tree.
#[derive(Debug)]
pub(super) struct Sets {
    sets: HashMap<(u32, u32), Set>,
    /// Size of the shared area so far.
    shared_bytes: u64,
}

/// Why an inode cannot be written: damage, or something that EROFS cannot express.
#[derive(Debug)]
pub(super) enum Refusal {
    Damage(Error),
    Beyond(&'static str),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Damage(error)
    }
}

impl From<&'static str> for Refusal {
    fn from(why: &'static str) -> Self {
        Self::Beyond(why)
    }
}

impl Sets {
    /// Counts who has which.
    pub(super) fn of<B: Deref<Target = [u8]>>(tree: &Tree<B>) -> Result<Self> {
        let mut sets: HashMap<(u32, u32), Set> = HashMap::new();
        // Sets that overlap, as only damage makes them, would be more together than the tree is.
        let mut left_bytes = tree.xattr_bytes();
        for number in 0..tree.node_count() {
            let Some(place) = tree.node(number)?.xattr_place() else {
                continue;
            };
            let set = sets.entry(place).or_default();
            if set.uses == 0 {
                let left = left_bytes.checked_sub(u64::from(place.1));
                left_bytes =
                    left.ok_or_else(|| Error::malformed("merged tree", "extended attributes that overlap"))?;
            }
            set.uses += 1;
        }
        Ok(Self {
            sets,
            shared_bytes: 0,
        })
    }

    /// Size in bytes of what stands behind the inode. A set that is to be shared gets its place in the shared area here,
    /// so this is called in the order of the inodes.
    pub(super) fn body_bytes<B: Deref<Target = [u8]>>(
        &mut self,
        tree: &Tree<B>,
        node: &Node,
    ) -> std::result::Result<u64, Refusal> {
        let Some(place) = node.xattr_place() else {
            return Ok(0);
        };
        let xattrs = xattrs(tree, node)?;
        let set_bytes: u64 = xattrs.iter().map(Xattr::bytes).sum();
        let fits_behind = XATTR_HEAD_BYTES + set_bytes <= XATTR_BODY_BYTES_MAX;
        let set = self.sets.entry(place).or_default();
        if set.shared_at.is_none() && (set.uses > 1 || !fits_behind) && xattrs.len() <= SHARED_MAX {
            let at = u32::try_from(self.shared_bytes / XATTR_ALIGN_BYTES);
            set.shared_at = Some(at.map_err(|_| "more than 16 GiB of extended attributes")?);
            self.shared_bytes += set_bytes;
        }
        match set.shared_at {
            Some(_) => Ok(XATTR_HEAD_BYTES + XATTR_ALIGN_BYTES * xattrs.len() as u64),
            None if fits_behind => Ok(XATTR_HEAD_BYTES + set_bytes),
            None => Err("more than 255 extended attributes of more than 256 KiB together".into()),
        }
    }

    /// Appends what stands behind the inode.
    pub(super) fn put_body<B: Deref<Target = [u8]>>(
        &self,
        tree: &Tree<B>,
        node: &Node,
        out: &mut Vec<u8>,
    ) -> std::result::Result<(), Refusal> {
        let Some(place) = node.xattr_place() else {
            return Ok(());
        };
        let xattrs = xattrs(tree, node)?;
        let shared_at = self.sets.get(&place).and_then(|set| set.shared_at);
        // No filter of names.
        put_u32(out, 0);
        let shared_count = if shared_at.is_some() { xattrs.len() } else { 0 };
        out.extend_from_slice(&[shared_count as u8, 0, 0, 0, 0, 0, 0, 0]);
        match shared_at {
            Some(mut at) => {
                for xattr in &xattrs {
                    put_u32(out, at);
                    at += (xattr.bytes() / XATTR_ALIGN_BYTES) as u32;
                }
            }
            None => xattrs.iter().for_each(|xattr| xattr.put(out)),
        }
        Ok(())
    }

    /// Appends an inode's set as it stands in the shared area, if it is the next one there, which starts at `at` bytes.
    pub(super) fn put_shared<B: Deref<Target = [u8]>>(
        &self,
        tree: &Tree<B>,
        node: &Node,
        at: u64,
        out: &mut Vec<u8>,
    ) -> std::result::Result<(), Refusal> {
        let set = node.xattr_place().and_then(|place| self.sets.get(&place));
        if set.and_then(|set| set.shared_at).map(u64::from) == Some(at / XATTR_ALIGN_BYTES) {
            xattrs(tree, node)?.iter().for_each(|xattr| xattr.put(out));
        }
        Ok(())
    }

    /// Size of the shared area in bytes.
    pub(super) fn shared_bytes(&self) -> u64 {
        self.shared_bytes
    }
}

fn xattrs<'t, B: Deref<Target = [u8]>>(
    tree: &'t Tree<B>,
    node: &Node,
) -> std::result::Result<Vec<Xattr<'t>>, Refusal> {
    let xattrs = tree.xattrs(node)?;
    xattrs
        .into_iter()
        .map(|(name, value)| Xattr::new(name, value).map_err(Refusal::from))
        .collect()
}
