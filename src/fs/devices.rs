//! The tree of the second connection, which is attached nowhere and seen by the kernel's EROFS alone: a directory of the
//! layers' data files, and of files that only say when they are closed.
//!
//! A file is there for as long as someone here shows it or the kernel has it open. Its content never changes, and neither
//! does what its inode number means: a number is given once.

mod table;

use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use self::table::{Content, File, Table, Use};
use super::journal::Journal;
use super::ops::{
    Access, Answer, Attr, Caller, DirEntry, Entry, FOREVER, FileType, Lookup, Operations, ROOT_INO, Statfs,
};
use crate::error::{Error, Result};
use crate::fetch::Fetcher;
use crate::fetch::device::DeviceAt;
use crate::image::erofs;
use crate::image::reads::{LayerReads, ReadFile};
use crate::layer::entry::Time;
use crate::layer::index::DATA_ALIGN_BYTES;

/// How long a name holds in the kernel: not at all. Names are looked up when a device is opened, which is once a mount.
const ENTRY_TTL: std::time::Duration = std::time::Duration::ZERO;

/// The tree. A handle: clones are the same tree.
#[derive(Debug, Clone)]
pub struct Devices(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fetcher: Arc<Fetcher>,
    journal: Journal,
    table: Mutex<Table>,
}

/// A file of this tree that stays for as long as this lives, and longer if the kernel has it open.
#[derive(Debug)]
pub struct Shown {
    devices: Devices,
    name: String,
    ino: u64,
    number: u64,
    usage: watch::Receiver<Use>,
}

impl Shown {
    /// Its name in the root of the tree.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Resolves when the kernel has opened the file and closed it again as often, or will never open it: it was not open
    /// when the last one who showed it stopped.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut usage = self.usage.clone();
        async move {
            // An error means that the file is gone, and with it its uses.
            let _ = usage.wait_for(Use::is_over).await;
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.devices.0.table.lock().hide(self.ino, self.number);
    }
}

/// The device of the image [`erofs::probe`], for trying out the kernel: its second block cannot be read until it is healed.
#[derive(Debug)]
pub struct Probe {
    shown: Shown,
    is_healed: Arc<std::sync::atomic::AtomicBool>,
}

impl Probe {
    /// The file.
    #[must_use]
    pub fn shown(&self) -> &Shown {
        &self.shown
    }

    /// Lets the second block be read from now on.
    pub fn heal(&self) {
        self.is_healed.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}

impl Devices {
    /// An empty tree. Failed reads are noted in a journal of
    /// `journal_entries`.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>, journal_entries: usize) -> Self {
        Self(Arc::new(Inner {
            fetcher,
            journal: Journal::new(journal_entries),
            table: Mutex::default(),
        }))
    }

    /// The failed reads of all devices.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.0.journal
    }

    /// Shows a layer's data file. One layer with one index, read in one way, is one file, however often it is shown; it is
    /// read from the source that was shown last. What is read is noted in the records of all who show it: nobody can tell for
    /// which of them it is.
    #[must_use]
    pub fn show(&self, device: DeviceAt, access: Access, reads: Option<LayerReads>) -> Shown {
        let (layer, bytes) = (&device.layer, device.bytes());
        let way = match access {
            Access::Cached => "",
            Access::Direct => "-direct",
        };
        // The kernel knows a file, and may have pages of it, for longer than a layer is open.
        let name = format!("{}-{:08x}{way}", layer.key().hex(), layer.index_id());
        self.shown(name, bytes, Content::Layer(device, access, reads))
    }

    /// Shows a file of one block of zeros, of which there is only this one.
    #[must_use]
    pub fn show_witness(&self) -> Shown {
        let name = self.0.table.lock().unique_name("witness");
        self.shown(name, DATA_ALIGN_BYTES, Content::Zeros)
    }

    /// Shows a new file for trying out the kernel.
    #[must_use]
    pub fn show_probe(&self) -> Probe {
        let is_healed = Arc::default();
        let name = self.0.table.lock().unique_name("probe");
        let content = Content::Probe(Arc::clone(&is_healed));
        let shown = self.shown(name, erofs::probe::BYTES, content);
        Probe { shown, is_healed }
    }

    fn shown(&self, name: String, bytes: u64, content: Content) -> Shown {
        let (ino, number, usage) = self.0.table.lock().show(&name, bytes, content);
        Shown {
            devices: self.clone(),
            name,
            ino,
            number,
            usage,
        }
    }

    fn read_layer(&self, device: DeviceAt, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let bytes = size as usize;
        if let Some(data) = self.0.fetcher.read_device_now(&device, offset, bytes) {
            return Answer::Now(Ok(data));
        }
        let devices = self.clone();
        Answer::later(async move {
            let read = devices.0.fetcher.read_device(&device, offset, bytes).await;
            if let Err(error) = &read {
                devices
                    .0
                    .journal
                    .record("read", &place_in(&device, offset, size), error);
            }
            read
        })
    }
}

/// Notes the files that have content in a range of a device. Which of them a program wants nobody can tell: what the kernel
/// reads ahead it does not ask for again. So all of them count as read, and a record lacks none.
fn note_reads(reads: &[LayerReads], device: &DeviceAt, offset: u64, size: u32) {
    let index = device.layer.index();
    let end = offset.saturating_add(u64::from(size.max(1)));
    // What is wrong with the index is told by the read.
    let Ok(chunks) = device.layer.chunks_in(offset..end) else {
        return;
    };
    let mut last = None;
    for entry in chunks.filter_map(|chunk| Some(index.chunk(chunk).ok()?.entry)) {
        let before = last.replace(entry);
        if before == Some(entry) {
            continue;
        }
        for LayerReads { reads, layer } in reads {
            let layer = *layer;
            reads.note(ReadFile { layer, entry }, || index.entry_count());
            if before.is_some() {
                reads.note_rough();
            }
        }
    }
}

/// A place in a device in words: the layer, and the first file that has content there.
fn place_in(device: &DeviceAt, offset: u64, size: u32) -> String {
    let (index, layer) = (device.layer.index(), device.source.name());
    let end = offset.saturating_add(u64::from(size.max(1)));
    let first = || {
        let chunks = device.layer.chunks_in(offset..end).ok()?;
        let first = chunks.into_iter().next()?;
        index.entry(index.chunk(first).ok()?.entry).ok()
    };
    match first() {
        Some(entry) => format!("{layer}: {}", String::from_utf8_lossy(entry.path)),
        None => format!("{layer}: byte {offset} of its data"),
    }
}

/// Bytes of a probe.
fn read_probe(is_healed: bool, offset: u64, size: u32) -> Result<Vec<u8>> {
    let content = erofs::probe::content();
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
    let end = start.saturating_add(size as usize).min(content.len());
    if end as u64 > DATA_ALIGN_BYTES && !is_healed {
        return Err(Error::posix("the second block of a probe", libc::EIO));
    }
    Ok(content.get(start..end).unwrap_or_default().to_vec())
}

fn attr(ino: u64, file: Option<&File>) -> Attr {
    let size = file.map_or(0, |file| file.bytes);
    let (kind, mode, nlink) = match file {
        Some(_) => (FileType::File, 0o400, 1),
        None => (FileType::Dir, 0o500, 2),
    };
    Attr {
        ino,
        size,
        blocks: size.div_ceil(512),
        mtime: Time { seconds: 0, nanos: 0 },
        kind,
        mode,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
    }
}

fn unknown<T>(ino: u64) -> Answer<T> {
    Answer::Now(Err(Error::posix(format!("device {ino}"), libc::ESTALE)))
}

fn refused<T>(errno: i32) -> Answer<T> {
    Answer::Now(Err(Error::posix("the tree of devices", errno)))
}

impl Operations for Devices {
    fn lookup(&self, _caller: Caller, parent: u64, name: &[u8]) -> Answer<Lookup> {
        if parent != ROOT_INO {
            return refused(libc::ENOTDIR);
        }
        let found = self.0.table.lock().look_up(name, attr_of_file);
        Answer::Now(Ok(match found {
            Some(attr) => Lookup::Found(Entry {
                attr,
                attr_ttl: FOREVER,
                entry_ttl: ENTRY_TTL,
            }),
            None => Lookup::Absent(ENTRY_TTL),
        }))
    }

    fn forget(&self, ino: u64, lookups: u64) {
        self.0.table.lock().forget(ino, lookups);
    }

    fn getattr(&self, ino: u64) -> Answer<(Attr, std::time::Duration)> {
        if ino == ROOT_INO {
            return Answer::Now(Ok((attr(ROOT_INO, None), FOREVER)));
        }
        match self.0.table.lock().file(ino) {
            Some(file) => Answer::Now(Ok((attr(ino, Some(file)), FOREVER))),
            None => unknown(ino),
        }
    }

    fn readlink(&self, _ino: u64) -> Answer<Vec<u8>> {
        refused(libc::EINVAL)
    }

    fn read(&self, _caller: Caller, ino: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let file = self
            .0
            .table
            .lock()
            .file(ino)
            .map(|file| (file.bytes, file.content(), file.reads()));
        let Some((bytes, content, reads)) = file else {
            return unknown(ino);
        };
        match content {
            Content::Layer(device, ..) => {
                note_reads(&reads, &device, offset, size);
                self.read_layer(device, offset, size)
            }
            Content::Zeros => {
                let length = bytes.saturating_sub(offset).min(u64::from(size));
                Answer::Now(Ok(vec![0; length as usize]))
            }
            Content::Probe(is_healed) => {
                let is_healed = is_healed.load(std::sync::atomic::Ordering::SeqCst);
                Answer::Now(read_probe(is_healed, offset, size))
            }
            Content::Gone => unknown(ino),
        }
    }

    fn readdir(&self, _caller: Caller, _ino: u64, _offset: u64, _limit: usize) -> Answer<Vec<DirEntry>> {
        refused(libc::EACCES)
    }

    fn remember(&self, _parent: u64, _entry: &DirEntry) -> Option<Entry> {
        None
    }

    fn getxattr(&self, _ino: u64, _name: &[u8]) -> Answer<Vec<u8>> {
        refused(libc::ENODATA)
    }

    fn listxattr(&self, _ino: u64) -> Answer<Vec<u8>> {
        Answer::Now(Ok(Vec::new()))
    }

    fn statfs(&self) -> Answer<Statfs> {
        let (files, bytes) = self.0.table.lock().totals();
        Answer::Now(Ok(Statfs {
            blocks: bytes.div_ceil(DATA_ALIGN_BYTES),
            blocks_free: 0,
            files,
        }))
    }

    fn wants_opens(&self) -> bool {
        true
    }

    fn opened(&self, ino: u64) -> Access {
        self.0.table.lock().opened(ino)
    }

    fn closed(&self, ino: u64) {
        self.0.table.lock().closed(ino);
    }
}

fn attr_of_file(ino: u64, file: &File) -> Attr {
    attr(ino, Some(file))
}

#[cfg(test)]
mod tests;
