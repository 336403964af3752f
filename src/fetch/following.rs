//! Following readers: what [`crate::fetch::readahead`] is told of reads, and what becomes of its wishes.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use crate::error::Result;
use crate::fetch::file::Span;
use crate::fetch::readahead::{Read, Streams, Wish};
use crate::fetch::{Fetcher, Source, plan};
use crate::store::layer::Layer;

/// The most windows that are read ahead at once, all layers together.
pub(super) const WINDOWS_MAX: usize = 16;
/// So many of them are for readers that go on: others' windows at new places must not keep theirs waiting.
const WINDOWS_KEPT: usize = 10;

/// What to fetch ahead of a reader.
pub(super) struct Ahead {
    /// The members, those that are there among them.
    pub(super) members: Range<u32>,
    /// One of a few: held until they are there.
    pub(super) permit: OwnedSemaphorePermit,
}

impl Fetcher {
    /// Tells the read-ahead of a read; answers what to fetch ahead of the reader. Without a permit that is nothing, and
    /// wished again by its next read. A damaged index has no part in this: who needs the members is told.
    pub(super) fn follow(&self, layer: &Layer, span: &Span, missed: bool) -> Option<Ahead> {
        let (read, entry) = observation(layer, span, missed).ok()?;
        let mut followed = self.followed.lock();
        let streams = || Streams::new(layer.index().summary().blob_bytes);
        let streams = followed.get_or_insert_mut(*layer.key(), streams);
        let wish = streams.observe(&read)?;
        let members = plan::members_ahead(layer.index(), &wish, entry).ok()?;
        let last = layer.index().member(members.end.checked_sub(1)?).ok()?;
        if members.is_empty() {
            return None;
        }
        let permit = self.window_permit(&wish)?;
        streams.asked(last.blob_end);
        Some(Ahead { members, permit })
    }

    fn window_permit(&self, wish: &Wish) -> Option<OwnedSemaphorePermit> {
        if wish.is_new_place && self.read_ahead.available_permits() <= WINDOWS_KEPT {
            return None;
        }
        Arc::clone(&self.read_ahead).try_acquire_owned().ok()
    }

    /// A reader found what it needs in the store: it may still be one that goes on, and soon miss.
    pub(super) fn follow_hit(self: &Arc<Self>, source: &Arc<Source>, layer: &Arc<Layer>, span: &Span) {
        if let Some(ahead) = self.follow(layer, span, false) {
            let (fetcher, source, layer) = (Arc::clone(self), Arc::clone(source), Arc::clone(layer));
            // Planning a large window takes a while, and this is the thread of a hit. What fails here fails again, with a
            // reader to tell, when it is needed.
            self.runtime
                .spawn(async move { fetcher.launch(&source, &layer, &[], Some(ahead)).map(drop) });
        }
    }
}

/// A span that has chunks as the read-ahead sees it, and the file in which it ends.
fn observation(layer: &Layer, span: &Span, missed: bool) -> Result<(Read, u32)> {
    let index = layer.index();
    let first = index.chunk(span.chunks.start)?;
    let last = index.chunk(span.chunks.end.saturating_sub(1))?;
    let file_start = index.entry(first.entry)?.data_offset;
    let file_last = index.entry(last.entry)?.chunk_range().end.saturating_sub(1);
    let file_end = index.member(index.chunk(file_last)?.member)?.blob_end;
    let (first_member, last_member) = (index.member(first.member)?, index.member(last.member)?);
    let read = Read {
        data: span.data_offset..span.data_offset.saturating_add(span.len as u64),
        blob: first_member.blob_start..last_member.blob_end,
        is_at_start: span.data_offset <= file_start,
        file: last.entry,
        file_end,
        missed,
    };
    Ok((read, last.entry))
}
