//! The merged root filesystem of an image: built once from the indexes of its layers, kept as bytes that are
//! memory-mapped for ever after.
//!
//! Merging follows the measured consensus of the container engines where there is one, and the image specification
//! where there is none: each rule is a test in `tests/rules/`, under the name of the case. What it comes to:
//! - A layer first hides (`whiteouts`), then adds (`apply`): a whiteout acts on the layers below alone, wherever it
//!   stands in its own. A whiteout is known by its name, whatever its type; it makes nothing, its parents neither.
//! - Directory over directory keeps the children and replaces the attributes; anything else replaces what was there.
//!   Of two entries of one path the last counts.
//! - A parent that no entry names keeps the attributes it has, or is made 0755, owned by root, at 1970. A symlink in
//!   the way is followed if the same layer made it, held at the root; one from below becomes a directory.
//! - Hard links are bound when the layer is done and share the target's inode; the link's own attributes do not count.
//!   One without a target is left out, and so is what it replaced: older content under its name would be a lie.
//! - A character device 0:0 is shown as one: it is overlayfs' whiteout, not the tar's.
//!
//! A layer's index has bounds of its own; here the number of inodes, the symlinks of a path, the steps that symlinks
//! add to all paths together, and the warnings are bounded too, so a hostile image costs no more than a large one.

mod apply;
mod arena;
mod format;
mod read;
mod resolve;
mod walk;
mod warnings;
mod whiteouts;
mod write;

#[cfg(test)]
pub(super) mod tests;

use std::ops::Deref;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::layer::index::Index;

pub use read::{Node, Totals, Tree};

/// The number of the root directory.
pub const ROOT: u32 = 0;

/// What becomes of `.wh.` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// They hide what lies below and are hidden themselves: the root filesystem of an image.
    Apply,
    /// They are files like any other: one layer alone, as its tar names them.
    Show,
}

/// A merged tree and what was odd about its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The tree in the form that [`Tree::open`] takes.
    pub bytes: Vec<u8>,
    /// A sentence for each entry that was left out or bent into shape; a bounded number of them, then how many more.
    pub warnings: Vec<String>,
}

/// Merges `layers`, base first. `key` says what the tree is of; [`Tree::open`] wants the same one.
///
/// # Errors
/// [`Error::Malformed`] for a damaged layer index, or when symlinked parents lead on without end;
/// [`Error::Unsupported`] for more layers, inodes or names than the form can number.
pub fn merge<B: Deref<Target = [u8]>>(
    layers: &[&Index<B>],
    key: &Digest,
    whiteouts: Whiteouts,
) -> Result<Merged> {
    let count = u16::try_from(layers.len()).map_err(|_| too_large("more than 65,535 layers"))?;
    let mut merger = apply::Merger::new(layers, whiteouts);
    for layer in 0..count {
        merger.layer(layer)?;
    }
    let (arena, warnings) = merger.into_parts();
    Ok(Merged {
        bytes: write::write(layers, arena, key)?,
        warnings: warnings.into_list(),
    })
}

/// The image is valid but beyond what a tree can number.
fn too_large(why: &str) -> Error {
    Error::unsupported("image", why)
}

/// A tree file that does not say what its writer wrote.
fn damaged(why: &str) -> Error {
    Error::malformed("merged tree", why)
}
