//! A small image to try a kernel with: one file of two blocks on the only device, to see what a read of it gives when
//! the device fails in the second one.

use std::io::Cursor;

use crate::digest::Digest;
use crate::error::Result;
use crate::image::erofs::disk::BLOCK_BYTES;
use crate::image::erofs::write::{device_blocks, write_with};
use crate::image::tree::{Tree, Whiteouts, merge};
use crate::layer::Format;
use crate::layer::entry::{Entry, Kind};
use crate::layer::index::{Coding, Index, Summary};
use crate::layer::index_builder::{IndexBuilder, NewChunk};

/// The name of the file in the root of the image.
pub const NAME: &str = "probe";
/// Size of the file, and of the device, in bytes.
pub const BYTES: u64 = 2 * BLOCK_BYTES;

/// The image. It has one device.
///
/// # Errors
/// None: it is always the same.
pub fn image() -> Result<Vec<u8>> {
    let mut builder = IndexBuilder::new(Coding::Stored);
    let mut file = Entry::new(NAME, Kind::File);
    file.size = BYTES;
    builder.entry(&file)?;
    builder.chunk(NewChunk {
        bytes: BYTES,
        blob_offset: 0,
        inner_offset: 0,
        digest: Some(Digest::of(&content())),
    })?;
    let index = Index::open(builder.finish(Summary::of(Format::Tar, BYTES), BYTES)?)?;
    let key = Digest::of(NAME.as_bytes());
    let merged = merge(&[&index], &key, Whiteouts::Apply)?;
    let tree = Tree::open(merged.bytes, &key)?;
    let mut image = Cursor::new(Vec::new());
    write_with(&tree, &[&index], &key, &device_blocks(&[&index])?, &mut image)?;
    Ok(image.into_inner())
}

/// The content of the device, and of the file: no byte of it is zero, and no block is like the other.
#[must_use]
pub fn content() -> Vec<u8> {
    let block = |salt: u64| (0..BLOCK_BYTES).map(move |at| ((at * 7 + salt) % 251) as u8 + 1);
    block(0).chain(block(100)).collect()
}
