//! The tree of the second connection, which is attached nowhere and seen by the kernel's EROFS alone: a directory of the
//! layers' data files, and of files that only say when they are closed.

use std::future::Future;
use std::sync::Arc;

use crate::fetch::Fetcher;
use crate::fetch::device::DeviceAt;
use crate::fs::journal::Journal;

/// The tree. A handle: clones are the same tree.
#[derive(Debug, Clone)]
pub struct Devices(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    #[allow(dead_code)]
    fetcher: Arc<Fetcher>,
    journal: Journal,
}

/// A file of this tree that stays for as long as this lives, and longer if the kernel has it open.
#[derive(Debug)]
pub struct Shown {
    name: String,
}

impl Shown {
    /// Its name in the root of the tree.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Resolves when the kernel has opened the file and closed it again as often.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        std::future::pending()
    }
}

impl Devices {
    /// An empty tree. Failed reads are noted in a journal of `journal_entries`.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>, journal_entries: usize) -> Self {
        Self(Arc::new(Inner {
            fetcher,
            journal: Journal::new(journal_entries),
        }))
    }

    /// The failed reads of all devices.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.0.journal
    }

    /// Shows a layer's data file. One layer is one file, however often it is shown.
    #[must_use]
    pub fn show(&self, device: DeviceAt) -> Shown {
        Shown {
            name: device.layer.key().hex(),
        }
    }

    /// Shows a file of one block of zeros, of which there is only this one.
    #[must_use]
    pub fn show_witness(&self) -> Shown {
        Shown {
            name: "witness".to_owned(),
        }
    }
}
use crate::fs::ops::*;
impl Operations for Devices {
    fn lookup(&self, _: Caller, _: u64, _: &[u8]) -> Answer<Lookup> {
        Answer::Now(Ok(Lookup::Absent(FOREVER)))
    }
    fn forget(&self, _: u64, _: u64) {}
    fn getattr(&self, _: u64) -> Answer<(Attr, std::time::Duration)> {
        Answer::Now(Err(crate::error::Error::posix("x", 5)))
    }
    fn readlink(&self, _: u64) -> Answer<Vec<u8>> {
        Answer::Now(Err(crate::error::Error::posix("x", 5)))
    }
    fn read(&self, _: Caller, _: u64, _: u64, _: u32) -> Answer<Vec<u8>> {
        Answer::Now(Err(crate::error::Error::posix("x", 5)))
    }
    fn readdir(&self, _: Caller, _: u64, _: u64, _: usize) -> Answer<Vec<DirEntry>> {
        Answer::Now(Ok(vec![]))
    }
    fn remember(&self, _: u64, _: &DirEntry) -> Option<Entry> {
        None
    }
    fn getxattr(&self, _: u64, _: &[u8]) -> Answer<Vec<u8>> {
        Answer::Now(Err(crate::error::Error::posix("x", 5)))
    }
    fn listxattr(&self, _: u64) -> Answer<Vec<u8>> {
        Answer::Now(Ok(vec![]))
    }
    fn statfs(&self) -> Answer<Statfs> {
        Answer::Now(Ok(Statfs {
            blocks: 0,
            blocks_free: 0,
            files: 0,
        }))
    }
}
