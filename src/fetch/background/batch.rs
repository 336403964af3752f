//! What one request of the background brings.

use std::ops::Range;

use crate::error::Result;
use crate::fetch::background::Stretch;
use crate::fetch::plan;
use crate::store::layer::Layer;

/// Members that one request brings.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    /// Those that are missing, in the order of the blob.
    pub(super) members: Vec<u32>,
    /// Compressed bytes of them.
    pub(super) bytes: u64,
    /// Bytes of their chunks.
    pub(super) decoded_bytes: u64,
}

/// Takes the next request off the front of a stretch: members that are missing and lie close to each other, up to
/// `bytes_max`, or one member that is longer. Nothing is left of the stretch where nothing of it is missing. May wait for the
/// disk: what an unclean reboot made doubtful is looked at.
pub(super) fn take(stretch: &mut Stretch, bytes_max: u64) -> Result<Batch> {
    let mut batch = Batch::default();
    let mut place: Option<Range<u64>> = None;
    while let Some(number) = stretch.members.next() {
        let Some(decoded_bytes) = missing(&stretch.layer, number)? else {
            continue;
        };
        let range = stretch.layer.index().member(number)?.blob_range();
        let together = place
            .as_ref()
            .map_or(range.clone(), |place| place.start..range.end);
        let is_far = |place: &Range<u64>| {
            range.start.saturating_sub(place.end) > plan::GAP_BYTES_MAX
                || together.end.saturating_sub(together.start) > bytes_max
        };
        if place.as_ref().is_some_and(is_far) {
            stretch.members.start = number;
            break;
        }
        batch.members.push(number);
        batch.bytes += range.end.saturating_sub(range.start);
        batch.decoded_bytes += decoded_bytes;
        place = Some(together);
    }
    Ok(batch)
}

/// Compressed bytes of what is missing of a stretch. What is doubtful counts.
pub(super) fn missing_bytes(stretch: &Stretch) -> Result<u64> {
    let layer = &stretch.layer;
    if layer.is_complete() {
        return Ok(0);
    }
    let mut bytes = 0;
    for number in stretch.members.clone() {
        let member = layer.index().member(number)?;
        let chunks = layer.index().member_chunks(&member)?;
        if !chunks.iter().all(|&chunk| layer.is_present(chunk)) {
            let range = member.blob_range();
            bytes += range.end.saturating_sub(range.start);
        }
    }
    Ok(bytes)
}

/// Bytes of a member's chunks, if one of them is missing.
fn missing(layer: &Layer, number: u32) -> Result<Option<u64>> {
    let index = layer.index();
    let (mut bytes, mut is_missing) = (0, false);
    for chunk in index.member_chunks(&index.member(number)?)? {
        let is_here = layer.is_present(chunk) || (layer.is_suspect(chunk) && layer.verify_suspect(chunk)?);
        is_missing |= !is_here;
        bytes += index.chunk(chunk)?.bytes;
    }
    Ok(is_missing.then_some(bytes))
}
