//! The memory that decoding works with, kept from one batch of members to the next: to have the kernel clear new pages for
//! each took nearly as long as hashing what is decoded.

use parking_lot::Mutex;

use crate::layer::Spare;

/// What one thread needs to decode one member after the other.
#[derive(Debug, Default)]
pub(super) struct Workbench {
    /// What decoders leave each other.
    pub(super) spare: Spare,
    /// Where small chunks are collected.
    pub(super) room: Vec<u8>,
}

/// Workbenches that nobody works at. There are as many as there were ever batches being decoded at the same time, which
/// [`crate::fetch::Fetcher`] bounds.
#[derive(Debug, Default)]
pub(super) struct Workbenches(Mutex<Vec<Workbench>>);

impl Workbenches {
    /// One that was left, or a new one.
    pub(super) fn take(&self) -> Workbench {
        self.0.lock().pop().unwrap_or_default()
    }

    /// Leaves one for the next batch.
    pub(super) fn put_back(&self, workbench: Workbench) {
        self.0.lock().push(workbench);
    }

    /// Gives their memory up.
    pub(super) fn clear(&self) {
        self.0.lock().clear();
    }
}
