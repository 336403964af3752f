//! An allocator that counts, so that what an input makes a parser set aside can be bounded. What C libraries allocate
//! (libzstd) is not seen by it.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// A request beyond this is refused: it would hurt the machine, and nothing may need it. That ends the process unless the
/// parser can do without, and the input is in the target's `.current` file then.
const SINGLE_BYTES_MAX: usize = 4 << 30;

struct Counting;

fn grown(bytes: usize) {
    let current = CURRENT.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(current, Ordering::Relaxed);
}

// SAFETY: every request goes to the system's allocator as it is, or is refused; the counters never allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > SINGLE_BYTES_MAX {
            return std::ptr::null_mut();
        }
        grown(layout.size());
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() > SINGLE_BYTES_MAX {
            return std::ptr::null_mut();
        }
        grown(layout.size());
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        if new_bytes > SINGLE_BYTES_MAX {
            return std::ptr::null_mut();
        }
        grown(new_bytes);
        CURRENT.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's conditions.
        unsafe { System.realloc(at, layout, new_bytes) }
    }
}

/// Runs `work` and says by how many bytes the heap grew at most meanwhile.
pub(crate) fn growth<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = CURRENT.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let made = work();
    (made, PEAK.load(Ordering::Relaxed).saturating_sub(before))
}
