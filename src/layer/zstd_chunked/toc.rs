//! Where the chunks of a zstd:chunked TOC stand in the blob.
//!
//! containers/storage says where a file's last frame ends, and each other ends where the next chunk starts; a chunk of
//! zeros has a frame too, which nobody needs. stargz-snapshotter says no ends, as eStargz. A TOC does the one or the other
//! throughout, because a file that said nothing among others that do would be read in two ways.

use std::collections::BTreeMap;

use super::TOC;
use crate::error::{Error, Result};
use crate::layer::index::Coding;
use crate::layer::index_builder::{IndexBuilder, NewMember};
use crate::layer::toc_json::{Content, Place, Placement};

/// The type of a chunk of zeros.
const ZEROS: &str = "zeros";

/// Who wrote a TOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    /// containers/storage: frames are exact.
    Exact,
    /// stargz-snapshotter: frames run to the next one that has a chunk.
    Stargz,
}

/// The frames of a TOC.
#[derive(Debug, Default)]
pub(super) struct Frames {
    flavour: Option<Flavour>,
    /// Where the current file's last frame ends.
    file_end: u64,
    /// Where the chunk before starts, and whether it is data.
    open: Option<(u64, Content)>,
    /// The exact frames: where they start, and where they end.
    ends: BTreeMap<u64, u64>,
}

impl Frames {
    /// Ends the frame of the chunk before.
    fn end(&mut self, end: u64) -> std::result::Result<(), &'static str> {
        let Some((start, content)) = self.open.take() else {
            return Ok(());
        };
        if start >= end || end > self.file_end {
            return Err("the frames of the file are not one behind the other");
        }
        if content == Content::Data && *self.ends.entry(start).or_insert(end) != end {
            return Err("a frame ends at two places");
        }
        Ok(())
    }

    /// Tells the builder of the frames, when all are known.
    ///
    /// # Errors
    /// [`Error::Malformed`] when two overlap.
    pub(super) fn tell(self, builder: &mut IndexBuilder) -> Result<()> {
        let mut behind = 0;
        for (blob_start, blob_end) in self.ends {
            if blob_start < behind {
                let why = format!("the frame at {blob_start} starts within the one before");
                return Err(Error::malformed(TOC, why));
            }
            behind = blob_end;
            builder.member(NewMember {
                blob_start,
                blob_end,
                coding: Coding::Zstd,
                bits: 0,
                window: Vec::new(),
                check: None,
            })?;
        }
        Ok(())
    }
}

impl Placement for Frames {
    fn what(&self) -> &'static str {
        TOC
    }

    fn coding(&self) -> Coding {
        Coding::Zstd
    }

    fn place(&mut self, place: &Place<'_>) -> std::result::Result<Content, &'static str> {
        if place.is_first {
            let flavour = if place.end_offset > 0 {
                Flavour::Exact
            } else {
                Flavour::Stargz
            };
            if *self.flavour.get_or_insert(flavour) != flavour {
                return Err("some files have an end in the blob, and others do not");
            }
            self.file_end = place.end_offset;
            self.open = None;
        }
        let content = match place.chunk_type {
            "" => Content::Data,
            ZEROS => Content::Hole,
            _ => return Err("a chunk of an unknown type"),
        };
        if self.flavour != Some(Flavour::Exact) {
            return match content {
                Content::Data => Ok(content),
                Content::Hole => Err("a chunk of zeros in a file without an end in the blob"),
            };
        }
        if place.inner_offset > 0 {
            return Err("a chunk that does not start its frame");
        }
        self.end(place.offset)?;
        self.open = Some((place.offset, content));
        if place.is_last {
            self.end(self.file_end)?;
        }
        Ok(content)
    }

    /// containers/storage has none: what has such a name came with the image.
    fn has_own_files(&self, end_offset: u64) -> bool {
        end_offset == 0 && self.flavour != Some(Flavour::Exact)
    }
}
