//! What stands in the first 1024 bytes of an image, which EROFS leaves free: what it was made from, and a checksum.
//!
//! ```text
//! magic 8 | version u32 | CRC u32 of all that follows, to the end of the file | identity 32 | size u64 | zeros
//! ```

use std::io::{self, Read};
use std::ops::Deref;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::image::erofs::disk::{SUPERBLOCK_AT, put_u32};
use crate::image::tree::Tree;
use crate::layer::fields::Fields;
use crate::layer::index::{HEADER_BYTES, Index};

const MAGIC: [u8; 8] = *b"RFSEROFS";
/// Goes up with every change of what is written.
const VERSION: u32 = 2;
/// Where the CRC is.
pub(super) const CRC_AT: u64 = 12;
/// What the CRC covers starts here.
pub(super) const COVERED_AT: u64 = CRC_AT + 4;
/// So much of an image is read at once.
const READ_BYTES: usize = 256 << 10;

/// A digest of all that decides what the image of a tree says: the tree and the indexes, which places in the layers' data
/// files come from. Trees of one key may come to be merged by other rules, and indexes made anew.
pub fn identity<B, L>(tree: &Tree<B>, layers: &[&Index<L>], key: &Digest) -> Digest
where
    B: Deref<Target = [u8]>,
    L: Deref<Target = [u8]>,
{
    // The headers have the checksums of all the rest.
    let mut said = [key.as_bytes().as_slice(), tree.head()].concat();
    for index in layers {
        said.extend_from_slice(index.source().get(..HEADER_BYTES).unwrap_or_default());
    }
    Digest::of(&said)
}

/// Appends the header, with room for the checksum.
pub(super) fn put(out: &mut Vec<u8>, identity: &Digest, image_bytes: u64) {
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    put_u32(out, VERSION);
    put_u32(out, 0);
    out.extend_from_slice(identity.as_bytes());
    out.extend_from_slice(&image_bytes.to_le_bytes());
    out.resize(start + SUPERBLOCK_AT as usize, 0);
}

/// Reads an image to its end, and checks that it is whole and was made from what `identity` is of.
///
/// # Errors
/// [`Error::Malformed`] for one that is to be written anew; [`Error::Io`].
pub fn verify(image: &mut impl Read, identity: &Digest) -> Result<()> {
    let damaged = |why: &str| Error::malformed("EROFS image", why);
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged("shorter than its header"),
        _ => Error::io("EROFS image", &error),
    };
    let mut head = [0; SUPERBLOCK_AT as usize];
    image.read_exact(&mut head).map_err(failed)?;
    let mut fields = Fields(&head);
    if fields.take::<8>() != MAGIC || fields.u32() != VERSION {
        return Err(damaged("another magic number or version"));
    }
    let crc = fields.u32();
    if Digest::from_bytes(fields.take()) != *identity {
        return Err(damaged("it was made from another tree or other indexes"));
    }
    let image_bytes = fields.u64();
    let (_, covered) = head.split_at(COVERED_AT as usize);
    let (mut hasher, mut read_bytes) = (crc32fast::Hasher::new(), SUPERBLOCK_AT);
    hasher.update(covered);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match image.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        hasher.update(buffer.get(..read).unwrap_or_default());
        read_bytes += read as u64;
    }
    if read_bytes != image_bytes {
        return Err(damaged("of another size than its header says"));
    }
    if hasher.finalize() != crc {
        return Err(damaged("wrong checksum"));
    }
    Ok(())
}
