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

/// Workbenches that nobody works at, a bounded number of them.
#[derive(Debug)]
pub(super) struct Workbenches {
    left: Mutex<Vec<Workbench>>,
    left_max: usize,
}

impl Workbenches {
    /// At most `left_max` are kept, with up to 5 MiB each.
    pub(super) fn new(left_max: usize) -> Self {
        Self {
            left: Mutex::default(),
            left_max,
        }
    }

    /// One that was left, or a new one.
    pub(super) fn take(&self) -> Workbench {
        self.left.lock().pop().unwrap_or_default()
    }

    /// Leaves one for the next batch, if there are not enough.
    pub(super) fn put_back(&self, workbench: Workbench) {
        let mut left = self.left.lock();
        if left.len() < self.left_max {
            left.push(workbench);
        }
    }

    /// Gives their memory up.
    pub(super) fn clear(&self) {
        self.left.lock().clear();
    }
}
