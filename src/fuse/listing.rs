//! READDIR and READDIRPLUS: asks the filesystem for entries until the kernel's buffer is full.
//!
//! The kernel takes the inodes in a READDIRPLUS answer as looked up, so the books must balance: an entry that did not
//! fit any more is forgotten again, and once an entry is in the answer, the answer is sent whatever fails afterwards.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};
use parking_lot::Mutex;

use super::adapter::{Core, caught};
use super::attributes::{errno, file_attr, file_type, no_inode};
use super::counters::Op;
use super::interrupt::Waiter;
use crate::error::{Error, Result};
use crate::fs::ops::{Answer, Caller, DirEntry, Operations};

/// The longest name that the kernel takes in a listing, in bytes (FUSE_NAME_MAX); one longer name fails all of it.
const LISTED_NAME_MAX_BYTES: usize = 1024;

/// Forgets that the kernel will send for entries that were listed without a lookup (see [`PlusRows`]).
#[derive(Debug, Default)]
pub(super) struct OwedForgets(Mutex<HashMap<u64, u64>>);

impl OwedForgets {
    /// Expects one more forget of `ino` than the filesystem counted lookups.
    fn owe(&self, ino: u64) {
        *self.0.lock().entry(ino).or_insert(0) += 1;
    }

    /// Takes the expected ones out of `lookups` forgotten ones; the rest is for the filesystem.
    pub(super) fn settle(&self, ino: u64, lookups: u64) -> u64 {
        let mut owed = self.0.lock();
        let Some(count) = owed.get_mut(&ino) else {
            return lookups;
        };
        let settled = lookups.min(*count);
        *count -= settled;
        if *count == 0 {
            owed.remove(&ino);
        }
        lookups - settled
    }
}

/// The buffer of an answer.
pub(super) trait Rows: Send + 'static {
    /// The operation that is answered.
    const OP: Op;
    /// How many entries to ask for at once: about what a buffer of 32 KiB holds, getdents' usual one.
    const BATCH: usize;

    /// Adds an entry; false if it does not fit any more.
    fn add(&mut self, core: &Core, parent: u64, entry: &DirEntry) -> bool;

    /// Sends what was added.
    fn send(self);

    /// Sends a failure instead.
    fn fail(self, error: &Error);
}

/// READDIR's.
pub(super) struct PlainRows(ReplyDirectory);

impl PlainRows {
    pub(super) fn new(reply: ReplyDirectory) -> Self {
        Self(reply)
    }
}

impl Rows for PlainRows {
    const OP: Op = Op::Readdir;
    const BATCH: usize = 512;

    fn add(&mut self, _core: &Core, _parent: u64, entry: &DirEntry) -> bool {
        let name = OsStr::from_bytes(&entry.name);
        !self
            .0
            .add(INodeNo(entry.ino), entry.next, file_type(entry.kind), name)
    }

    fn send(self) {
        self.0.ok();
    }

    fn fail(self, error: &Error) {
        self.0.error(errno(error));
    }
}

/// READDIRPLUS's.
///
/// An entry whose attributes are not known is listed with an impossible size. The protocol has node id 0 for that, but
/// fuser writes the node id into d_ino too, and programs skip entries with d_ino 0. The kernel lists an entry with a
/// bad size by its name, number and type, takes no attributes from it, and gives the lookup that it assumes back:
/// that forget is owed.
pub(super) struct PlusRows(ReplyDirectoryPlus);

impl PlusRows {
    pub(super) fn new(reply: ReplyDirectoryPlus) -> Self {
        Self(reply)
    }
}

impl Rows for PlusRows {
    const OP: Op = Op::Readdirplus;
    const BATCH: usize = 160;

    fn add(&mut self, core: &Core, parent: u64, entry: &DirEntry) -> bool {
        let name = OsStr::from_bytes(&entry.name);
        let mut unknown = no_inode(entry.kind);
        unknown.ino = INodeNo(entry.ino);
        unknown.size = u64::MAX;
        let zero = std::time::Duration::ZERO;
        if is_dot(&entry.name) {
            // The kernel takes nothing but the name of these two.
            return !self
                .0
                .add(unknown.ino, entry.next, name, &zero, &unknown, Generation(0));
        }
        match caught(Self::OP, || core.fs.remember(parent, entry)) {
            Ok(Some(known)) => {
                let attr = file_attr(&known.attr);
                let ttl = known.attr_ttl.min(known.entry_ttl);
                let full = self.0.add(attr.ino, entry.next, name, &ttl, &attr, Generation(0));
                if full {
                    // A panic is logged, and nobody else would want to know.
                    let _ = caught(Op::Forget, || core.fs.forget(known.attr.ino, 1));
                }
                !full
            }
            Ok(None) | Err(_) => {
                core.owed_forgets.owe(entry.ino);
                let full = self
                    .0
                    .add(unknown.ino, entry.next, name, &zero, &unknown, Generation(0));
                if full {
                    core.owed_forgets.settle(entry.ino, 1);
                }
                !full
            }
        }
    }

    fn send(self) {
        self.0.ok();
    }

    fn fail(self, error: &Error) {
        self.0.error(errno(error));
    }
}

fn is_dot(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}

/// Whether the kernel takes the name; it fails a whole listing with one that it does not.
fn is_listable(name: &[u8]) -> bool {
    (1..=LISTED_NAME_MAX_BYTES).contains(&name.len()) && !name.contains(&b'/') && !name.contains(&0)
}

/// One request on its way.
pub(super) struct Listing<R> {
    core: Core,
    caller: Caller,
    ino: u64,
    offset: u64,
    rows: R,
    is_empty: bool,
}

/// How a listing goes on.
enum Next {
    Ask,
    Done,
}

impl<R: Rows> Listing<R> {
    /// A listing of `ino` behind cookie `offset` into `rows`.
    pub(super) fn new(core: Core, caller: Caller, ino: u64, offset: u64, rows: R) -> Self {
        Self {
            core,
            caller,
            ino,
            offset,
            rows,
            is_empty: true,
        }
    }

    /// Answers the request, on this thread as far as the filesystem need not wait.
    pub(super) fn start(mut self, waiter: Waiter) {
        loop {
            match self.ask() {
                Answer::Now(result) => match self.absorb(result) {
                    Ok(Next::Ask) => {}
                    Ok(Next::Done) => return self.rows.send(),
                    Err(error) => return self.finish(&error),
                },
                Answer::Later(work) => {
                    let core = self.core.clone();
                    return core.run(R::OP, waiter, work, move |result| match self.absorb(result) {
                        Ok(Next::Ask) => self.start(waiter),
                        Ok(Next::Done) => self.rows.send(),
                        Err(error) => self.finish(&error),
                    });
                }
            }
        }
    }

    fn ask(&self) -> Answer<Vec<DirEntry>> {
        let fs: &dyn Operations = &*self.core.fs;
        caught(R::OP, || fs.readdir(self.caller, self.ino, self.offset, R::BATCH))
            .unwrap_or_else(|error| Answer::Now(Err(error)))
    }

    /// Adds a batch.
    fn absorb(&mut self, batch: Result<Vec<DirEntry>>) -> Result<Next> {
        let batch = batch?;
        if batch.is_empty() {
            return Ok(Next::Done);
        }
        for entry in &batch {
            if !is_listable(&entry.name) {
                tracing::debug!(
                    ino = self.ino,
                    "an entry with an impossible name is left out of a listing"
                );
            } else if self.rows.add(&self.core, self.ino, entry) {
                self.is_empty = false;
            } else {
                return Ok(Next::Done);
            }
            self.offset = entry.next;
        }
        Ok(Next::Ask)
    }

    /// Ends a listing that failed. With entries in the answer the failure waits for the next request, which starts
    /// where this one ends.
    fn finish(self, error: &Error) {
        tracing::debug!(operation = R::OP.name(), %error, "request failed");
        if self.is_empty {
            self.rows.fail(error);
        } else {
            self.rows.send();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owed_forgets_are_taken_from_the_kernels_and_no_others() {
        let owed = OwedForgets::default();
        assert_eq!(owed.settle(7, 3), 3);
        owed.owe(7);
        owed.owe(7);
        assert_eq!(owed.settle(8, 1), 1);
        assert_eq!(owed.settle(7, 1), 0);
        assert_eq!(owed.settle(7, 5), 4);
        assert_eq!(owed.settle(7, 5), 5);
        assert!(owed.0.lock().is_empty());
    }

    #[test]
    fn names_that_would_fail_a_listing_are_known() {
        assert!(is_listable(b"a"));
        assert!(is_listable(&[b'x'; LISTED_NAME_MAX_BYTES]));
        for bad in [&b""[..], b"a/b", b"a\0", &[b'x'; LISTED_NAME_MAX_BYTES + 1]] {
            assert!(!is_listable(bad));
        }
    }
}
