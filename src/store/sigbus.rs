//! Turns SIGBUS on a memory-mapped cache file into zeros and a mark.
//!
//! A mapped file that is cut short, or whose disk fails, raises SIGBUS at the first touch of the missing page and would
//! end the daemon with every mount it serves. Here the handler puts a page of zeros in its place and marks the mapping as
//! damaged; whoever reads it finds an error at its next check.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The most mappings that can be guarded at once; beyond it a file is read into memory instead.
const GUARDED_MAX: usize = 16_384;

struct Region {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    damaged: AtomicBool,
}

static REGIONS: [Region; GUARDED_MAX] = [const {
    Region {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        damaged: AtomicBool::new(false),
    }
}; GUARDED_MAX];

/// How many slots were ever taken: the handler looks no further.
static TAKEN: AtomicUsize = AtomicUsize::new(0);
/// The action to fall back to, set before the handler is installed.
static mut PREVIOUS: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();
static INSTALL: Once = Once::new();

/// A mapping under guard; dropping it ends the guard (and must happen before the memory is unmapped).
#[derive(Debug)]
pub(super) struct Guard(usize);

impl Guard {
    /// Guards `len` bytes at `start`. `None` when the table is full.
    pub(super) fn new(start: *const u8, len: usize) -> Option<Self> {
        INSTALL.call_once(install);
        let free = |region: &Region| {
            region
                .taken
                .compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        let slot = REGIONS.iter().position(free)?;
        TAKEN.fetch_max(slot + 1, Ordering::AcqRel);
        let region = &REGIONS[slot];
        region.damaged.store(false, Ordering::Release);
        region.end.store(start as usize + len, Ordering::Release);
        region.start.store(start as usize, Ordering::Release);
        Some(Self(slot))
    }

    /// Whether a page of the mapping could not be read and shows zeros.
    pub(super) fn is_damaged(&self) -> bool {
        REGIONS[self.0].damaged.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let region = &REGIONS[self.0];
        region.start.store(0, Ordering::Release);
        region.end.store(0, Ordering::Release);
        region.taken.store(false, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the action is fully initialised (zeroed, then handler and flags set) and `PREVIOUS` is written before the
    // handler can run for the first time, under `Once`. The handler itself does only what is async-signal-safe: atomic
    // loads and stores, mmap(2), sigaction(2).
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let previous = &raw mut PREVIOUS;
        libc::sigaction(libc::SIGBUS, std::ptr::null(), (*previous).as_mut_ptr());
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to an SA_SIGINFO handler.
    let address = unsafe { (*info).si_addr() } as usize;
    let taken = TAKEN.load(Ordering::Acquire).min(GUARDED_MAX);
    for region in &REGIONS[..taken] {
        let (start, end) = (
            region.start.load(Ordering::Acquire),
            region.end.load(Ordering::Acquire),
        );
        if start == 0 || address < start || address >= end {
            continue;
        }
        region.damaged.store(true, Ordering::Release);
        let page = address & !(PAGE_BYTES - 1);
        // SAFETY: the page lies in a mapping that its owner holds (the guard ends before the unmapping), so replacing it
        // with zeros touches nobody else's memory.
        let mapped = unsafe {
            libc::mmap(
                page as *mut libc::c_void,
                PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    // Not ours: give the signal back to whoever had it; the faulting instruction runs again and raises it again.
    // SAFETY: `PREVIOUS` was filled before this handler was installed.
    unsafe {
        let previous = &raw const PREVIOUS;
        libc::sigaction(libc::SIGBUS, (*previous).as_ptr(), std::ptr::null_mut());
    }
}

/// The page size of every platform this runs on with 4 KiB pages; on larger ones a file is never mapped (see `mapped`).
pub(super) const PAGE_BYTES: usize = 4096;
