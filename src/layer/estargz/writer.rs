//! Writes eStargz layers: for the demo registry, for tests, and for converting.
//!
//! The layout is that of the eStargz specification, so that every reader takes it: a gzip member at byte 0, at
//! every chunk of a payload (or, with a least size, at those that reach it), at the TOC, and the footer. The
//! variants of it are for trying readers: hardly any tool writes them. The same input gives the same bytes. Names are written as they are, because tests need layers that no well-meaning tool makes.

use std::io::{self, Read, Write};

use flate2::{Compress, Compression, FlushCompress, Status};

use super::{LANDMARK_BYTE, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME, footer};
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind};
use crate::layer::tar;
use crate::layer::toc_writer::{TocEntry, indented};

/// Bytes that are read, compressed and written at a time.
const BUFFER_BYTES: usize = 64 << 10;

/// How a layer is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Payload bytes in a chunk, at least 1.
    pub chunk_bytes: u64,
    /// Compressed bytes that a member must reach before the next chunk gets its own; 0: every chunk has its own.
    pub min_chunk_bytes: u64,
    /// Compression level, 0 to 9.
    pub level: u32,
    /// What the layer says about prefetching.
    pub landmark: Landmark,
    /// Which of the format's variants is written.
    pub variant: Variant,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            chunk_bytes: 4 << 20,
            min_chunk_bytes: 0,
            level: 6,
            landmark: Landmark::None,
            variant: Variant::Estargz,
        }
    }
}

/// A variant of the format: what the TOC says, where it stands, and how the footer tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// eStargz as it is today.
    Estargz,
    /// stargz, the predecessor: no digests of chunks, only of whole files; every chunk has its own member.
    Legacy,
    /// The TOC is no part of the layer: [`Finished::external_toc`] is for another image.
    ExternalToc,
}

/// The file that tells a reader how much of a layer to prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landmark {
    /// None is written.
    None,
    /// Everything before it is to be prefetched; it stands after that many entries, or last if there are fewer.
    Prefetch(usize),
    /// Nothing is to be prefetched; it stands first.
    NoPrefetch,
}

/// What a finished layer is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Digest of the TOC's JSON: the value of the annotation [`super::TOC_DIGEST_ANNOTATION`].
    pub toc_digest: Digest,
    /// Digest of the tar: the layer's `diff_id` in the image's configuration.
    pub diff_id: Digest,
    /// Digest of the blob.
    pub blob_digest: Digest,
    /// Size of the blob in bytes.
    pub blob_bytes: u64,
    /// Size of the tar in bytes.
    pub unpacked_bytes: u64,
    /// Where the TOC's member starts in the blob; of an external TOC, where the footer does.
    pub toc_offset: u64,
    /// The blob with the external TOC, of [`Variant::ExternalToc`].
    pub external_toc: Option<Vec<u8>>,
}

/// The end of a tar.
const END: [u8; tar::END_BYTES] = [0; tar::END_BYTES];

/// Writes one layer, entry by entry, to `W`. Holds the TOC in memory (some 300 bytes an entry), never a payload.
#[derive(Debug)]
pub struct Writer<W> {
    members: Members<W>,
    options: Options,
    toc: Vec<TocEntry>,
    /// Entries that [`Self::append`] took.
    appended: usize,
    landmark_written: bool,
    /// Where the member that chunks may be packed into starts: in the blob and in the tar.
    member_start: (u64, u64),
}

impl<W: Write> Writer<W> {
    /// A writer of an empty layer.
    pub fn new(out: W, options: Options) -> Self {
        let mut options = options;
        if options.variant == Variant::Legacy {
            options.min_chunk_bytes = 0;
        }
        Self {
            members: Members::new(out, options.level),
            options,
            toc: Vec::new(),
            appended: 0,
            landmark_written: false,
            member_start: (0, 0),
        }
    }

    /// Adds an entry; of a regular file, `payload` yields exactly `entry.size` bytes. `entry.digest` is not used.
    ///
    /// # Errors
    /// [`Error::Malformed`] when tar or the TOC cannot say the entry or the payload has another size, [`Error::Io`] when
    /// reading or writing fails.
    pub fn append(&mut self, entry: &Entry, payload: &mut dyn Read) -> Result<()> {
        let due = match self.options.landmark {
            Landmark::None => false,
            Landmark::Prefetch(entries) => self.appended >= entries,
            Landmark::NoPrefetch => true,
        };
        if due {
            self.landmark()?;
        }
        self.appended += 1;
        self.put(entry, payload, false)
    }

    /// Writes the TOC and the footer.
    ///
    /// # Errors
    /// [`Error::Io`] when writing fails.
    pub fn finish(mut self) -> Result<(W, Finished)> {
        self.landmark()?;
        let json = indented(self.toc)?;
        let mut entry = Entry::new(TOC_NAME, Kind::File);
        entry.size = json.len() as u64;
        entry.mode = 0;
        let header = tar::header(&entry)?;
        let toc = [&header, json.as_slice(), &vec![0; tar::padding(entry.size)], &END].concat();
        let mut members = self.members;
        let external_toc = if self.options.variant == Variant::ExternalToc {
            members.write(&END)?;
            let mut apart = Members::new(Vec::new(), self.options.level);
            apart.write(&toc)?;
            apart.close()?;
            Some(apart.out)
        } else {
            // No reader takes a TOC at byte 0, so a layer without entries starts with an empty member.
            if members.blob_bytes == 0 {
                members.start()?;
            }
            None
        };
        members.close()?;
        let toc_offset = members.blob_bytes;
        if external_toc.is_none() {
            members.write(&toc)?;
            members.close()?;
        }
        members.emit(&match self.options.variant {
            Variant::Estargz => footer::write(toc_offset),
            Variant::Legacy => footer::write_legacy(toc_offset),
            Variant::ExternalToc => footer::write_external(),
        })?;
        members.out.flush().map_err(|e| write_failed(&e))?;
        let finished = Finished {
            toc_digest: Digest::of(&json),
            diff_id: members.tar_hash.finish(),
            blob_digest: members.blob_hash.finish(),
            blob_bytes: members.blob_bytes,
            unpacked_bytes: members.tar_bytes,
            toc_offset,
            external_toc,
        };
        Ok((members.out, finished))
    }

    /// Writes the landmark, unless there is none or it stands already.
    fn landmark(&mut self) -> Result<()> {
        let name = match self.options.landmark {
            Landmark::Prefetch(_) => PREFETCH_LANDMARK,
            Landmark::NoPrefetch => NO_PREFETCH_LANDMARK,
            Landmark::None => return Ok(()),
        };
        if std::mem::replace(&mut self.landmark_written, true) {
            return Ok(());
        }
        let entry = Entry {
            size: 1,
            mode: 0,
            ..Entry::new(name, Kind::File)
        };
        self.put(&entry, &mut [LANDMARK_BYTE].as_slice(), true)
    }

    fn put(&mut self, entry: &Entry, payload: &mut dyn Read, own_member: bool) -> Result<()> {
        let mut toc = TocEntry::of(entry)?;
        let is_legacy = self.options.variant == Variant::Legacy;
        toc.num_link = is_legacy.then_some(0);
        self.members.write(&tar::header(entry)?)?;
        if entry.kind != Kind::File || entry.size == 0 {
            self.toc.push(toc);
            return check_end(entry, payload);
        }
        let number = self.toc.len();
        let mut whole = Hasher::default();
        let chunk_bytes = self.options.chunk_bytes.max(1);
        let mut written = 0;
        while written < entry.size {
            let bytes = chunk_bytes.min(entry.size - written);
            (toc.offset, toc.inner_offset) = self.start_chunk(own_member)?;
            toc.chunk_offset = written;
            toc.chunk_size = if bytes == chunk_bytes { bytes } else { 0 };
            let digest = self.copy(entry, payload, bytes, &mut whole)?;
            toc.chunk_digest = Some(digest).filter(|_| !is_legacy);
            written += bytes;
            let next = TocEntry {
                name: toc.name.clone(),
                kind: "chunk",
                num_link: toc.num_link,
                ..TocEntry::default()
            };
            self.toc.push(std::mem::replace(&mut toc, next));
        }
        check_end(entry, payload)?;
        if let Some(first) = self.toc.get_mut(number) {
            first.digest = Some(whole.finish());
        }
        self.members.write(&vec![0; tar::padding(entry.size)])
    }

    /// Starts a member for the next chunk, or goes on with the one before while that is small. Returns the chunk's place:
    /// its member's offset in the blob and its own offset in the decoded member.
    fn start_chunk(&mut self, own_member: bool) -> Result<(u64, u64)> {
        if self.options.min_chunk_bytes > 0 {
            self.members.flush()?;
        }
        let (start, tar_start) = self.member_start;
        if !own_member && self.members.blob_bytes - start < self.options.min_chunk_bytes {
            return Ok((start, self.members.tar_bytes - tar_start));
        }
        self.members.close()?;
        self.member_start = (self.members.blob_bytes, self.members.tar_bytes);
        Ok((self.members.blob_bytes, 0))
    }

    /// Copies `bytes` bytes of the payload and returns their digest.
    fn copy(
        &mut self,
        entry: &Entry,
        payload: &mut dyn Read,
        bytes: u64,
        whole: &mut Hasher,
    ) -> Result<Digest> {
        let mut chunk = Hasher::default();
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        let mut left = bytes;
        while left > 0 {
            buffer.clear();
            let wanted = left.min(BUFFER_BYTES as u64);
            payload
                .take(wanted)
                .read_to_end(&mut buffer)
                .map_err(|e| read_failed(entry, &e))?;
            if (buffer.len() as u64) < wanted {
                return Err(wrong_size(entry));
            }
            chunk.update(&buffer);
            whole.update(&buffer);
            self.members.write(&buffer)?;
            left -= wanted;
        }
        Ok(chunk.finish())
    }
}

/// Checks that the payload has been used up.
fn check_end(entry: &Entry, payload: &mut dyn Read) -> Result<()> {
    match payload.read(&mut [0]).map_err(|e| read_failed(entry, &e))? {
        0 => Ok(()),
        _ => Err(wrong_size(entry)),
    }
}

fn wrong_size(entry: &Entry) -> Error {
    let why = format!("its payload does not have {} bytes", entry.size);
    Error::malformed(format!("entry {:?}", String::from_utf8_lossy(&entry.path)), why)
}

fn read_failed(entry: &Entry, error: &io::Error) -> Error {
    Error::io(
        format!("payload of {:?}", String::from_utf8_lossy(&entry.path)),
        error,
    )
}

fn write_failed(error: &io::Error) -> Error {
    Error::io("eStargz layer", error)
}

/// Concatenated gzip members, and what is counted and hashed on the way into them. A member opens with its first byte.
#[derive(Debug)]
struct Members<W> {
    out: W,
    blob_hash: Hasher,
    blob_bytes: u64,
    tar_hash: Hasher,
    tar_bytes: u64,
    level: u32,
    deflate: Compress,
    scratch: Vec<u8>,
    /// CRC and length modulo 2^32 of the open member.
    open: Option<(crc32fast::Hasher, u32)>,
}

impl<W: Write> Members<W> {
    fn new(out: W, level: u32) -> Self {
        let level = level.min(9);
        Self {
            out,
            blob_hash: Hasher::default(),
            blob_bytes: 0,
            tar_hash: Hasher::default(),
            tar_bytes: 0,
            level,
            deflate: Compress::new(Compression::new(level), false),
            scratch: vec![0; BUFFER_BYTES],
            open: None,
        }
    }

    /// Adds bytes of the tar, in a new member if none is open.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.start()?;
        if let Some((crc, len)) = &mut self.open {
            crc.update(bytes);
            *len = len.wrapping_add(bytes.len() as u32);
        }
        self.tar_hash.update(bytes);
        self.tar_bytes += bytes.len() as u64;
        self.deflate(bytes, FlushCompress::None)
    }

    /// Starts a member, unless one is open.
    fn start(&mut self) -> Result<()> {
        if self.open.is_none() {
            // No name, no time, so that the same tar gives the same bytes; 255 is "unknown system".
            let effort = if self.level == 9 { 2 } else { 0 };
            self.emit(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, effort, 0xff])?;
            self.open = Some((crc32fast::Hasher::new(), 0));
        }
        Ok(())
    }

    /// Pushes out what the open member holds back, so that its size is known.
    fn flush(&mut self) -> Result<()> {
        if self.open.is_some() {
            self.deflate(&[], FlushCompress::Sync)
        } else {
            Ok(())
        }
    }

    /// Ends the open member, if one is.
    fn close(&mut self) -> Result<()> {
        let Some((crc, len)) = self.open.take() else {
            return Ok(());
        };
        self.deflate(&[], FlushCompress::Finish)?;
        self.deflate.reset();
        self.emit(&crc.finalize().to_le_bytes())?;
        self.emit(&len.to_le_bytes())
    }

    fn deflate(&mut self, mut input: &[u8], flush: FlushCompress) -> Result<()> {
        loop {
            let (taken, made) = (self.deflate.total_in(), self.deflate.total_out());
            let status = self
                .deflate
                .compress(input, &mut self.scratch, flush)
                .map_err(|e| write_failed(&io::Error::other(e)))?;
            let taken = (self.deflate.total_in() - taken) as usize;
            let made = (self.deflate.total_out() - made) as usize;
            input = input.get(taken..).unwrap_or_default();
            let scratch = std::mem::take(&mut self.scratch);
            let emitted = self.emit(scratch.get(..made).unwrap_or_default());
            self.scratch = scratch;
            emitted?;
            let drained = input.is_empty() && made < self.scratch.len();
            let done = if flush == FlushCompress::Finish {
                status == Status::StreamEnd
            } else {
                drained
            };
            if done {
                return Ok(());
            }
        }
    }

    /// Adds bytes of the blob.
    fn emit(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| write_failed(&e))?;
        self.blob_hash.update(bytes);
        self.blob_bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Writes a whole layer into memory, for tests and the demo registry. A regular file has the size of its payload,
/// whatever its entry says.
///
/// # Errors
/// As [`Writer::append`].
pub fn write_layer(entries: &[(Entry, Vec<u8>)], options: Options) -> Result<(Vec<u8>, Finished)> {
    let mut writer = Writer::new(Vec::new(), options);
    for (entry, payload) in entries {
        let entry = Entry {
            size: payload.len() as u64,
            ..entry.clone()
        };
        writer.append(&entry, &mut payload.as_slice())?;
    }
    writer.finish()
}
