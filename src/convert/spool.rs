//! A layer on its way: fetched, decompressed into a file without a name, and checked. What is kept in memory is where in
//! that file each entry's content stands.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::convert::layer::Stop;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, clean_path};
use crate::layer::estargz::OWN_FILES;
use crate::layer::tar::scan::{Event, Scanner};
use crate::layer::{Decoded, Decompressor, Descriptor, decompressor};

/// The most entries of one layer: some 600 bytes of memory each, here and in the TOC.
const ENTRIES_MAX: usize = 2_000_000;
/// The most bytes of holes in the files of one layer: they are written as zeros, and cost a sparse file nothing to claim.
const HOLES_BYTES_MAX: u64 = 64 << 30;
/// So many bytes of a blob tell how it is compressed.
const HEAD_BYTES: usize = 16;
/// Bytes of the tar that are written at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// A layer's tar, and what is in it.
#[derive(Debug)]
pub(super) struct Spool {
    file: File,
    /// The entries in their order, without what belongs to eStargz itself.
    pub(super) entries: Vec<Spooled>,
    /// The size of the contents in bytes.
    pub(super) content_bytes: u64,
}

/// An entry, and where its content stands.
#[derive(Debug)]
pub(super) struct Spooled {
    pub(super) entry: Entry,
    extents: Vec<Extent>,
}

/// A part of a file's content.
#[derive(Debug, Clone, Copy)]
enum Extent {
    /// Bytes of the tar.
    Data { tar_offset: u64, bytes: u64 },
    /// So many zeros.
    Hole(u64),
}

/// Takes a blob and becomes a [`Spool`].
pub(super) struct Intake {
    blob: Hasher,
    blob_bytes: u64,
    head: Vec<u8>,
    decompressor: Option<Box<dyn Decompressor>>,
    tar: Tar,
}

/// The decompressed side.
struct Tar {
    out: BufWriter<File>,
    hasher: Hasher,
    scanner: Scanner,
    found: Found,
}

#[derive(Default)]
struct Found {
    entries: Vec<Spooled>,
    /// The current entry is one of eStargz itself.
    is_hidden: bool,
    content_bytes: u64,
    holes_bytes: u64,
}

impl Intake {
    /// An intake that writes to `file`.
    pub(super) fn new(file: File) -> Self {
        Self {
            blob: Hasher::default(),
            blob_bytes: 0,
            head: Vec::new(),
            decompressor: None,
            tar: Tar {
                out: BufWriter::with_capacity(BUFFER_BYTES, file),
                hasher: Hasher::default(),
                scanner: Scanner::default(),
                found: Found::default(),
            },
        }
    }

    /// Takes the next bytes of the blob.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::Unsupported`], [`Error::Io`].
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.blob.update(bytes);
        self.blob_bytes += bytes.len() as u64;
        if let Some(decompressor) = &mut self.decompressor {
            return decompressor.push(bytes, &mut |decoded| self.tar.take(&decoded));
        }
        self.head.extend_from_slice(bytes);
        match self.head.len() < HEAD_BYTES {
            true => Ok(()),
            false => self.start(),
        }
    }

    fn start(&mut self) -> Result<()> {
        let head = std::mem::take(&mut self.head);
        let decompressor = self.decompressor.insert(decompressor(&head));
        decompressor.push(&head, &mut |decoded| self.tar.take(&decoded))
    }

    /// The blob has ended.
    ///
    /// # Errors
    /// [`Error::Verification`] if it is not the one of `descriptor`, or its tar not the one with `diff_id`;
    /// [`Error::Malformed`], [`Error::Io`].
    pub(super) fn finish(mut self, descriptor: &Descriptor, diff_id: &Digest) -> Result<Spool> {
        check_blob(descriptor, self.blob_bytes, std::mem::take(&mut self.blob))?;
        // A blob of a few bytes has not told yet what it is.
        if self.decompressor.is_none() {
            self.start()?;
        }
        if let Some(decompressor) = &mut self.decompressor {
            decompressor.finish(&mut |decoded| self.tar.take(&decoded))?;
        }
        self.tar.scanner.finish()?;
        let actual = self.tar.hasher.finish();
        if actual != *diff_id {
            let what = format!("DiffID of layer {}", descriptor.digest);
            return Err(Error::mismatch(what, diff_id, actual));
        }
        let file = self.tar.out.into_inner();
        Ok(Spool {
            file: file.map_err(|error| write_failed(error.error()))?,
            entries: self.tar.found.entries,
            content_bytes: self.tar.found.content_bytes,
        })
    }
}

/// Checks the size and the digest of a blob that has come.
///
/// # Errors
/// [`Error::Verification`], [`Error::Malformed`].
pub(super) fn check_blob(descriptor: &Descriptor, bytes: u64, hasher: Hasher) -> Result<()> {
    let what = format!("layer {}", descriptor.digest);
    if bytes != descriptor.size {
        let why = format!("it has {} bytes by its descriptor, {bytes} came", descriptor.size);
        return Err(Error::malformed(what, why));
    }
    let actual = hasher.finish();
    match actual == descriptor.digest {
        true => Ok(()),
        false => Err(Error::mismatch(what, descriptor.digest, actual)),
    }
}

fn write_failed(error: &io::Error) -> Error {
    Error::io("temporary file of a layer", error)
}

impl Tar {
    fn take(&mut self, decoded: &Decoded<'_>) -> Result<()> {
        let Decoded::Bytes(bytes) = decoded else {
            return Ok(());
        };
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(|error| write_failed(&error))?;
        let found = &mut self.found;
        self.scanner.push(bytes, &mut |event| found.event(event))
    }
}

impl Found {
    fn event(&mut self, event: Event<'_>) -> Result<()> {
        let extent = match event {
            Event::Entry(entry) => return self.entry(entry),
            Event::Data { tar_offset, bytes } => Extent::Data {
                tar_offset,
                bytes: bytes.len() as u64,
            },
            Event::Hole(bytes) => Extent::Hole(bytes),
        };
        let Some(file) = self.entries.last_mut().filter(|_| !self.is_hidden) else {
            return Ok(());
        };
        self.content_bytes += extent.bytes();
        if let Extent::Hole(bytes) = extent {
            self.holes_bytes = self.holes_bytes.saturating_add(bytes);
            if self.holes_bytes > HOLES_BYTES_MAX {
                let what = format!("entry {:?}", String::from_utf8_lossy(&file.entry.path));
                let why =
                    "the holes of the layer's files, which eStargz has to write as zeros, are over 64 GiB";
                return Err(Error::unsupported(what, why));
            }
        }
        match (file.extents.last_mut(), extent) {
            (
                Some(Extent::Data {
                    tar_offset: last_offset,
                    bytes: last_bytes,
                }),
                Extent::Data { tar_offset, bytes },
            ) if *last_offset + *last_bytes == tar_offset => *last_bytes += bytes,
            _ => file.extents.push(extent),
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry) -> Result<()> {
        let path = clean_path(&entry.path).path;
        self.is_hidden = OWN_FILES.iter().any(|name| path == name.as_bytes());
        if self.is_hidden {
            return Ok(());
        }
        if self.entries.len() >= ENTRIES_MAX {
            let why = format!("a layer of more than {ENTRIES_MAX} entries is not converted");
            return Err(Error::unsupported("layer", why));
        }
        self.entries.push(Spooled {
            entry: entry.clone(),
            extents: Vec::new(),
        });
        Ok(())
    }
}

impl Extent {
    fn bytes(&self) -> u64 {
        match self {
            Self::Data { bytes, .. } | Self::Hole(bytes) => *bytes,
        }
    }
}

impl Spool {
    /// The content of an entry. What is read counts in `read_bytes`, and `stop` ends it.
    pub(super) fn content<'a>(
        &'a self,
        entry: &'a Spooled,
        read_bytes: &'a AtomicU64,
        stop: &'a Stop,
    ) -> impl Read + 'a {
        Content {
            file: &self.file,
            extents: entry.extents.iter(),
            current: Extent::Hole(0),
            read_bytes,
            stop,
        }
    }
}

struct Content<'a> {
    file: &'a File,
    extents: std::slice::Iter<'a, Extent>,
    current: Extent,
    read_bytes: &'a AtomicU64,
    stop: &'a Stop,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stop.check()?;
        while self.current.bytes() == 0 {
            match self.extents.next() {
                Some(extent) => self.current = *extent,
                None => return Ok(0),
            }
        }
        let wanted = (buffer.len() as u64).min(self.current.bytes());
        let wanted = usize::try_from(wanted).unwrap_or(buffer.len()).min(buffer.len());
        let (buffer, _) = buffer.split_at_mut(wanted);
        match &mut self.current {
            Extent::Data { tar_offset, bytes } => {
                self.file.read_exact_at(buffer, *tar_offset)?;
                *tar_offset += wanted as u64;
                *bytes -= wanted as u64;
            }
            Extent::Hole(bytes) => {
                buffer.fill(0);
                *bytes -= wanted as u64;
            }
        }
        self.read_bytes.fetch_add(wanted as u64, Ordering::Relaxed);
        Ok(wanted)
    }
}
