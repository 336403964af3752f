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
use crate::layer::tar::BLOCK_BYTES;
use crate::layer::tar::scan::{Event, Scanner};
use crate::layer::{Decoded, Decompressor, Descriptor, decompressor};

/// The most entries of one layer: some 600 bytes of memory each, here and in the TOC.
const ENTRIES_MAX: usize = 2_000_000;
/// The most bytes of holes in the files of one layer: they are written as zeros, and cost a sparse file nothing to claim.
const HOLES_BYTES_MAX: u64 = 64 << 30;
/// So many bytes of a blob tell how it is compressed.
const HEAD_BYTES: usize = 16;
/// The most blocks of zeros at the end of a tar: two, and what fills the last record of 20.
const END_BLOCKS_MAX: usize = 21;
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
        check_tar(descriptor, self.tar.hasher, diff_id)?;
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

/// Checks the DiffID. Some writers of zstd:chunked leave out the zeros at the end of a tar, which engines do not miss: the
/// tar may be the one that is promised without them.
fn check_tar(descriptor: &Descriptor, tar: Hasher, diff_id: &Digest) -> Result<()> {
    let mut longer = tar.clone();
    for _ in 0..=END_BLOCKS_MAX {
        if longer.clone().finish() == *diff_id {
            return Ok(());
        }
        longer.update(&[0; BLOCK_BYTES]);
    }
    let what = format!("DiffID of layer {}", descriptor.digest);
    Err(Error::mismatch(what, diff_id, tar.finish()))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn descriptor(blob: &[u8]) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: Digest::of(blob),
            size: blob.len() as u64,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
        }
    }

    /// Takes a blob in pieces of this size.
    fn take(blob: &[u8], piece_bytes: usize, diff_id: &Digest) -> Result<Spool> {
        let mut intake = Intake::new(tempfile::tempfile().unwrap());
        for piece in blob.chunks(piece_bytes) {
            intake.push(piece)?;
        }
        intake.finish(&descriptor(blob), diff_id)
    }

    fn contents(spool: &Spool) -> Vec<(String, Vec<u8>)> {
        let read_bytes = AtomicU64::new(0);
        let content = |spooled: &Spooled| {
            let mut content = Vec::new();
            let stop = Stop::default();
            spool
                .content(spooled, &read_bytes, &stop)
                .read_to_end(&mut content)
                .unwrap();
            assert_eq!(content.len() as u64, spooled.entry.size);
            (String::from_utf8(spooled.entry.path.clone()).unwrap(), content)
        };
        let all: Vec<_> = spool.entries.iter().map(content).collect();
        assert_eq!(read_bytes.load(Ordering::Relaxed), spool.content_bytes);
        all
    }

    /// A tar with a file, one that is nothing but a map of holes, and what eStargz adds to a tar.
    fn tar() -> Vec<u8> {
        let mut tar = ::tar::Builder::new(Vec::new());
        let mut add = |records: &[(&str, &str)], path: &str, content: &[u8]| {
            let records = records.iter().map(|(key, value)| (*key, value.as_bytes()));
            tar.append_pax_extensions(records).unwrap();
            let mut header = ::tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, content).unwrap();
        };
        add(&[], ".no.prefetch.landmark", b"\x0f");
        add(&[], "file", &[7; 1000]);
        let sparse = [
            ("GNU.sparse.major", "0"),
            ("GNU.sparse.minor", "1"),
            ("GNU.sparse.name", "sparse"),
            ("GNU.sparse.size", "10"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.map", "1,2,6,1"),
        ];
        add(&sparse, "stored", b"abc");
        add(&[], "sub/stargz.index.json", b"{}");
        add(&[], "./stargz.index.json", b"{}");
        tar.into_inner().unwrap()
    }

    #[test]
    fn contents_come_out_with_their_holes_and_without_what_is_estargz() {
        let tar = tar();
        let expected = [
            ("file".to_owned(), vec![7; 1000]),
            ("sparse".to_owned(), b"\0ab\0\0\0c\0\0\0".to_vec()),
            ("sub/stargz.index.json".to_owned(), b"{}".to_vec()),
        ];
        for piece_bytes in [1, 13, 512, 100_000] {
            let spool = take(&tar, piece_bytes, &Digest::of(&tar)).unwrap();
            assert_eq!(contents(&spool), expected, "{piece_bytes}");
        }
        let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
        let spool = take(&zstd, 100, &Digest::of(&tar)).unwrap();
        assert_eq!(contents(&spool), expected);
    }

    #[test]
    fn a_tar_may_lack_the_zeros_at_its_end_and_nothing_else() {
        let tar = tar();
        let bare = &tar[..tar.len() - 2 * BLOCK_BYTES];
        let record = [bare, &vec![0; 10 << 10]].concat();
        for promised in [bare, &tar, &record] {
            take(bare, 1000, &Digest::of(promised)).unwrap();
        }
        let other = [bare, &[1; BLOCK_BYTES]].concat();
        let error = take(bare, 1000, &Digest::of(&other)).unwrap_err();
        assert_eq!(error.exit_code(), 7, "{error}");
        assert!(
            error.to_string().contains(&Digest::of(bare).to_string()),
            "{error}"
        );
    }

    #[test]
    fn a_blob_that_is_not_the_promised_one_is_refused() {
        let tar = tar();
        let mut intake = Intake::new(tempfile::tempfile().unwrap());
        intake.push(&tar).unwrap();
        let error = intake
            .finish(&descriptor(b"other"), &Digest::of(&tar))
            .unwrap_err();
        assert_eq!(error.exit_code(), 7, "{error}");
        let within = tar.iter().position(|byte| *byte == 7).unwrap() + 10;
        let cut = &tar[..within];
        assert!(take(cut, 100, &Digest::of(cut)).is_err());
        assert!(take(b"", 1, &Digest::of(b"")).unwrap().entries.is_empty());
    }

    #[test]
    fn a_conversion_that_was_given_up_reads_nothing_more() {
        let tar = tar();
        let spool = take(&tar, 1000, &Digest::of(&tar)).unwrap();
        let (read_bytes, stop) = (AtomicU64::new(0), Stop::default());
        let mut content = spool.content(&spool.entries[0], &read_bytes, &stop);
        assert_eq!(content.read(&mut [0; 10]).unwrap(), 10);
        stop.now();
        assert!(content.read(&mut [0; 10]).is_err());
    }
}
