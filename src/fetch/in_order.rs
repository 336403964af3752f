//! Files that are wanted in an order of their own, as parts for [`Fetcher::bring_parts`]: what is first in the list comes
//! first, wherever it stands in its layer.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;
use crate::fetch::prefetch::Part;
use crate::fetch::{Fetcher, FileAt, Source};
use crate::store::layer::Layer;

/// Within so many compressed bytes the order of the blobs counts for more than that of the list: neighbours come with one
/// request. It is what a line of 100 Mbit/s brings in a third of a second.
const STEP_BYTES: u64 = 4 << 20;
/// The most files in a step: small ones in a row that are far apart.
const STEP_FILES: usize = 1024;

impl Fetcher {
    /// What is missing of files, in their order, each member once.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a damaged index; [`Error::Io`].
    ///
    /// [`Error::Malformed`]: crate::error::Error::Malformed
    /// [`Error::Io`]: crate::error::Error::Io
    pub async fn parts_in_order(&self, files: &[FileAt]) -> Result<Vec<Part>> {
        let mut taken = HashSet::new();
        let mut parts = Vec::new();
        let mut rest = files;
        while !rest.is_empty() {
            let (step, after) = rest.split_at(step_files(rest)?);
            rest = after;
            for (source, layer, chunks) in by_layer(step)? {
                let mut part = self.part(&source, &layer, chunks).await?;
                part.retain(|member| taken.insert((*layer.key(), member)));
                parts.push(part);
            }
        }
        Ok(parts)
    }
}

/// How many of these files make a step: one at least.
fn step_files(files: &[FileAt]) -> Result<usize> {
    let mut bytes = 0_u64;
    for (number, file) in files.iter().enumerate().take(STEP_FILES) {
        let index = file.layer.index();
        let chunks = index.entry(file.entry)?.chunk_range();
        let mut last = None;
        for chunk in chunks {
            let member = index.chunk(chunk)?.member;
            if last.replace(member) != Some(member) {
                let range = index.member(member)?.blob_range();
                bytes = bytes.saturating_add(range.end.saturating_sub(range.start));
            }
        }
        if bytes >= STEP_BYTES {
            return Ok(number + 1);
        }
    }
    Ok(files.len().min(STEP_FILES))
}

/// The files of one layer that something is done with.
pub type OfLayer = (Arc<Source>, Arc<Layer>, Vec<Range<u32>>);

/// The chunks of files, by the layers that they are in.
///
/// # Errors
/// `Malformed` for a damaged index.
pub fn by_layer(files: &[FileAt]) -> Result<Vec<OfLayer>> {
    let mut layers: Vec<OfLayer> = Vec::new();
    for file in files.iter().filter(|file| file.size > 0) {
        let chunks = file.layer.index().entry(file.entry)?.chunk_range();
        match layers
            .iter_mut()
            .find(|(_, layer, _)| Arc::ptr_eq(layer, &file.layer))
        {
            Some((.., known)) => known.push(chunks),
            None => layers.push((Arc::clone(&file.source), Arc::clone(&file.layer), vec![chunks])),
        }
    }
    Ok(layers)
}
