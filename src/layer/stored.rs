//! Plain tar: what is not compressed.

use std::ops::Deref;

use crate::error::Result;
use crate::layer::checked::Checked;
use crate::layer::cutter::Cutter;
use crate::layer::index::Index;
use crate::layer::{ChunkSink, Decoded, Decompressor, Format, MemberDecoder};

/// Decompresses nothing.
#[derive(Debug)]
pub(super) struct Uncompressed;

impl Decompressor for Uncompressed {
    fn format(&self) -> Format {
        Format::Tar
    }

    fn push(&mut self, blob: &[u8], out: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        out(Decoded::Bytes(blob))
    }

    fn finish(&mut self, _: &mut dyn FnMut(Decoded<'_>) -> Result<()>) -> Result<()> {
        Ok(())
    }
}

/// A member of a blob that is its own content.
#[derive(Debug)]
pub(super) struct StoredMember {
    checked: Checked,
    cutter: Cutter,
}

impl StoredMember {
    /// # Errors
    /// `Malformed` when there is no such member or the index is damaged.
    pub(super) fn new<B: Deref<Target = [u8]>>(index: &Index<B>, member: u32) -> Result<Self> {
        let member = index.member(member)?;
        let what = format!("piece of the tar at {}", member.blob_start);
        Ok(Self {
            checked: Checked::new(index, &member, what)?,
            cutter: Cutter::new(index, &member)?,
        })
    }
}

impl MemberDecoder for StoredMember {
    fn push(&mut self, bytes: &[u8], sink: &mut dyn ChunkSink) -> Result<bool> {
        if let Some(bytes) = self.checked.pass(bytes)? {
            self.cutter.decoded(&bytes, sink)?;
        }
        Ok(self.cutter.is_done())
    }
}
