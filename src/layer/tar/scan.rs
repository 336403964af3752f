//! Reads a tar from a stream: pieces of any size go in, entries and the content of files come out.
//!
//! Nothing is kept but the headers in front of the current entry. Content is handed on as it comes, at its place in the
//! file; of a sparse file the holes are told of. A tar may end without its two zero blocks where an entry could start, as
//! in Go; what follows them is ignored.

use crate::error::{Error, Result};
use crate::layer::entry::{Entry, Kind, Time};
use crate::layer::tar::header::{self, Dialect, Header};
use crate::layer::tar::pax::Records;
use crate::layer::tar::sparse::{self, HeaderMap, PayloadMap, RawMap, Segment, Version};
use crate::layer::tar::{BLOCK_BYTES, Rule, SPECIAL_BYTES_MAX, padding};

/// What comes out of a tar, in its order.
#[derive(Debug)]
pub enum Event<'a> {
    /// The next entry. If it is a file that is not empty, its content follows, whole.
    Entry(&'a Entry),
    /// The next bytes of the file, which stand at `tar_offset` of the tar.
    Data {
        /// Where they stand.
        tar_offset: u64,
        /// The bytes, at least one.
        bytes: &'a [u8],
    },
    /// The next so many bytes of the file are a hole.
    Hole(u64),
}

/// The most segments of sparse files in one tar. Each becomes a chunk, of one byte if need be.
const SEGMENTS_MAX: usize = 1_000_000;

type Out<'a> = dyn FnMut(Event<'_>) -> Result<()> + 'a;

/// The reader's place in the tar.
#[derive(Debug, Default)]
pub struct Scanner {
    /// Bytes of the tar so far.
    position: u64,
    state: State,
    block: Block,
    /// What stood in front of the next entry and belongs to it.
    pending: Pending,
    /// Segments of sparse files so far.
    segments: usize,
}

/// Collects the bytes of one block.
#[derive(Debug)]
struct Block {
    bytes: [u8; BLOCK_BYTES],
    filled: usize,
}

impl Default for Block {
    fn default() -> Self {
        Self {
            bytes: [0; BLOCK_BYTES],
            filled: 0,
        }
    }
}

impl Block {
    /// Takes no more bytes than are missing. Returns the block if they complete it.
    fn fill(&mut self, bytes: &[u8]) -> Option<[u8; BLOCK_BYTES]> {
        let end = self.filled + bytes.len();
        self.bytes[self.filled..end].copy_from_slice(bytes);
        self.filled = end % BLOCK_BYTES;
        (self.filled == 0).then_some(self.bytes)
    }
}

/// Extended headers and long names.
#[derive(Debug, Default)]
struct Pending {
    records: Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

#[derive(Debug, Default)]
enum State {
    /// A header or the end comes.
    #[default]
    Header,
    /// One zero block has come; another must follow.
    AfterZero,
    /// The payload of a header that belongs to the next one.
    Special(Special),
    /// A block that continues the sparse map of a GNU header.
    Extension(Box<Unmapped>, HeaderMap),
    /// A block of the sparse map in front of the data.
    Map(Box<Unmapped>, PayloadMap),
    /// The content of a file.
    Content(Content),
    /// What fills a payload up to whole blocks.
    Padding(usize),
    /// All that comes now is ignored.
    End,
}

/// A header whose payload belongs to the next one.
#[derive(Debug)]
struct Special {
    typeflag: u8,
    payload: Vec<u8>,
    bytes: usize,
}

/// A sparse file whose map is not complete.
#[derive(Debug)]
struct Unmapped {
    entry: Entry,
    /// Its size, which may still be nonsense.
    size: i64,
    /// Bytes of payload that are to come.
    payload_bytes: u64,
    padding: usize,
}

/// A file whose content comes.
#[derive(Debug)]
struct Content {
    /// What is stored of it and has not come yet; the first one, cut by what has.
    segments: std::vec::IntoIter<Segment>,
    /// Bytes of the current segment that are to come.
    left: u64,
    /// Where the file stands.
    at: u64,
    size: u64,
    padding: usize,
}

impl Scanner {
    /// Bytes of the tar so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Takes the next bytes of the tar.
    ///
    /// # Errors
    /// `Malformed` where Go refuses the tar, `Unsupported` for entries of types that engines do not unpack, and those of
    /// `out`; the scanner is of no use afterwards.
    pub fn push(&mut self, mut tar: &[u8], out: &mut Out<'_>) -> Result<()> {
        while !tar.is_empty() {
            self.step(&mut tar, out)?;
        }
        Ok(())
    }

    /// The tar has ended.
    ///
    /// # Errors
    /// `Malformed` when that was within an entry.
    pub fn finish(&self) -> Result<()> {
        match self.state {
            State::Header | State::AfterZero if self.block.filled == 0 => Ok(()),
            State::Padding(_) | State::End => Ok(()),
            _ => Err(Error::malformed(
                format!("tar of {} bytes", self.position),
                "it is cut short within an entry",
            )),
        }
    }

    /// Takes at least one byte of `tar`.
    fn step(&mut self, tar: &mut &[u8], out: &mut Out<'_>) -> Result<()> {
        let tar_offset = self.position;
        let mut take = |most: usize| {
            let (taken, rest) = tar.split_at(most.min(tar.len()));
            *tar = rest;
            self.position += taken.len() as u64;
            taken
        };
        match &mut self.state {
            State::End => drop(take(usize::MAX)),
            State::Padding(left) => {
                *left -= take(*left).len();
                if *left == 0 {
                    self.state = State::Header;
                }
            }
            State::Content(content) => {
                let bytes = take(usize::try_from(content.left).unwrap_or(usize::MAX));
                content.left -= bytes.len() as u64;
                content.at += bytes.len() as u64;
                let is_last = content.left == 0;
                out(Event::Data { tar_offset, bytes })?;
                if is_last {
                    self.next_segment(out)?;
                }
            }
            State::Special(special) => {
                let missing = special.bytes - special.payload.len();
                special.payload.extend_from_slice(take(missing));
                if special.payload.len() == special.bytes {
                    let special = std::mem::replace(special, Special::new(0, 0));
                    self.special(&special)?;
                }
            }
            State::Header | State::AfterZero | State::Extension(..) | State::Map(..) => {
                let bytes = take(BLOCK_BYTES - self.block.filled);
                if let Some(block) = self.block.fill(bytes) {
                    self.block_complete(&block, out)?;
                }
            }
        }
        Ok(())
    }

    /// A block that was collected byte by byte is there.
    fn block_complete(&mut self, block: &[u8; BLOCK_BYTES], out: &mut Out<'_>) -> Result<()> {
        match std::mem::take(&mut self.state) {
            State::AfterZero if *block == [0; BLOCK_BYTES] => self.state = State::End,
            State::AfterZero => {
                return Err(self.refuse(b"", "a single block of zeros is in front of it"));
            }
            State::Extension(unmapped, mut map) => {
                let more = map.extension(block);
                if more.map_err(|why| self.refuse(&unmapped.entry.path, why))? {
                    self.state = State::Extension(unmapped, map);
                } else {
                    self.mapped(*unmapped, &map.finish(), out)?;
                }
            }
            State::Map(mut unmapped, mut map) => {
                let done = map
                    .block(block)
                    .map_err(|why| self.refuse(&unmapped.entry.path, why))?;
                unmapped.payload_bytes -= BLOCK_BYTES as u64;
                if done {
                    self.mapped(*unmapped, &map.finish(), out)?;
                } else {
                    self.state = self.map_state(unmapped, map)?;
                }
            }
            _ if *block == [0; BLOCK_BYTES] => self.state = State::AfterZero,
            _ => self.header(block, out)?,
        }
        Ok(())
    }

    /// To read the next block of a sparse map in front of the data.
    fn map_state(&self, unmapped: Box<Unmapped>, map: PayloadMap) -> Result<State> {
        if unmapped.payload_bytes < BLOCK_BYTES as u64 {
            return Err(self.refuse(&unmapped.entry.path, "its sparse map is longer than its payload"));
        }
        Ok(State::Map(unmapped, map))
    }

    fn header(&mut self, block: &[u8; BLOCK_BYTES], out: &mut Out<'_>) -> Result<()> {
        let header = header::parse(block).map_err(|why| self.refuse(header::text(&block[..100]), why))?;
        let refuse = |why| self.refuse(&header.name, why);
        let payload_bytes = header.payload_bytes().map_err(refuse)?;
        if !matches!(header.typeflag, b'x' | b'g' | b'L' | b'K') {
            return self.entry(header, block, out);
        }
        let bytes = usize::try_from(payload_bytes)
            .ok()
            .filter(|&bytes| bytes <= SPECIAL_BYTES_MAX)
            .ok_or_else(|| refuse("it is longer than 1 MiB, and belongs to the next entry"))?;
        let special = Special::new(header.typeflag, bytes);
        if bytes == 0 {
            return self.special(&special);
        }
        self.state = State::Special(special);
        Ok(())
    }

    /// What belongs to the next entry is complete.
    fn special(&mut self, special: &Special) -> Result<()> {
        let records = || Records::parse(&special.payload).map_err(|why| self.refuse(b"", why));
        match special.typeflag {
            b'x' => self.pending.records = records()?,
            b'L' => self.pending.long_name = header::text(&special.payload).to_vec(),
            b'K' => self.pending.long_link = header::text(&special.payload).to_vec(),
            // Global records are for entries without own ones, and engines ignore them. To Go they are an entry, so
            // what is in front of them does not belong to the one behind.
            _ => {
                records()?;
                self.pending = Pending::default();
            }
        }
        self.pad(padding(special.bytes as u64));
        Ok(())
    }

    fn pad(&mut self, padding: usize) {
        self.state = match padding {
            0 => State::Header,
            _ => State::Padding(padding),
        };
    }

    /// A header that is no other's.
    fn entry(&mut self, header: Header, block: &[u8; BLOCK_BYTES], out: &mut Out<'_>) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let records = &pending.records;
        let named = header.name.clone();
        let header = merge(header, &pending).map_err(|why| self.refuse(&named, why))?;
        let refuse = |why| self.refuse(&header.name, why);
        let Some(kind) = kind(&header) else {
            let what = self.name(&header.name);
            let flag = char::from(header.typeflag);
            let why = format!("it is of type {flag:?}, which no container engine unpacks");
            return Err(Error::unsupported(what, why));
        };
        let payload_bytes = header.payload_bytes().map_err(refuse)?;
        let entry = entry_of(&header, kind, records).map_err(refuse)?;
        let mut file = Box::new(Unmapped {
            entry,
            size: header.size,
            payload_bytes,
            padding: padding(payload_bytes),
        });
        if header.typeflag == b'S' {
            if header.dialect != Dialect::Gnu {
                return Err(refuse("it is a sparse file in another format than GNU's"));
            }
            file.size = sparse::real_size(block).map_err(refuse)?;
            let mut map = HeaderMap::default();
            if map.header(block).map_err(refuse)? {
                self.state = State::Extension(file, map);
                return Ok(());
            }
            return self.mapped(*file, &map.finish(), out);
        }
        let Some(version) = sparse::version(records) else {
            file.entry.size = if kind == Kind::File { payload_bytes } else { 0 };
            let whole = Segment {
                offset: 0,
                bytes: payload_bytes,
            };
            return self.file(*file, vec![whole], out);
        };
        if header.is_header_only() {
            return Err(refuse(
                "its PAX records make it a sparse file, which its type is not",
            ));
        }
        if let Some(name) = records.get(b"GNU.sparse.name") {
            file.entry.path = name.to_vec();
        }
        let size = records.number(b"GNU.sparse.size").map_err(refuse)?;
        let real_size = records.number(b"GNU.sparse.realsize");
        file.size = match size {
            Some(size) => size,
            None => real_size.map_err(refuse)?.unwrap_or(header.size),
        };
        match version {
            Version::InRecords => {
                let map = sparse::of_records(records).map_err(refuse)?;
                self.mapped(*file, &map, out)
            }
            Version::InPayload => {
                self.state = self.map_state(file, PayloadMap::default())?;
                Ok(())
            }
        }
    }

    /// The map of a sparse file is complete.
    fn mapped(&mut self, mut file: Unmapped, map: &RawMap, out: &mut Out<'_>) -> Result<()> {
        let segments = sparse::check(map, file.size, file.payload_bytes)
            .map_err(|why| self.refuse(&file.entry.path, why))?;
        self.segments += segments.len();
        if self.segments > SEGMENTS_MAX {
            return Err(self.refuse(
                &file.entry.path,
                "the sparse files up to it have more than a million segments",
            ));
        }
        file.entry.size = file.size as u64;
        self.file(file, segments, out)
    }

    fn file(&mut self, file: Unmapped, segments: Vec<Segment>, out: &mut Out<'_>) -> Result<()> {
        out(Event::Entry(&file.entry))?;
        self.state = State::Content(Content {
            segments: segments.into_iter(),
            left: 0,
            at: 0,
            size: file.entry.size,
            padding: file.padding,
        });
        self.next_segment(out)
    }

    /// Tells of the hole that comes, and makes ready for the segment after it or for what follows the file.
    fn next_segment(&mut self, out: &mut Out<'_>) -> Result<()> {
        let State::Content(content) = &mut self.state else {
            return Ok(());
        };
        let segment = content.segments.find(|segment| segment.bytes > 0);
        let next = segment.map_or(content.size, |segment| segment.offset);
        let hole = next - content.at;
        content.at = next;
        let padding = content.padding;
        match segment {
            Some(segment) => content.left = segment.bytes,
            None => self.pad(padding),
        }
        match hole {
            0 => Ok(()),
            _ => out(Event::Hole(hole)),
        }
    }

    fn name(&self, name: &[u8]) -> String {
        match name {
            b"" => format!("tar header before byte {}", self.position),
            _ => format!("tar entry {:?}", String::from_utf8_lossy(name)),
        }
    }

    fn refuse(&self, name: &[u8], why: Rule) -> Error {
        Error::malformed(self.name(name), why)
    }
}

impl Special {
    fn new(typeflag: u8, bytes: usize) -> Self {
        Self {
            typeflag,
            payload: Vec::new(),
            bytes,
        }
    }
}

/// The header with what stood in front of it: PAX records, and over them GNU's long names.
fn merge(mut header: Header, pending: &Pending) -> Result<Header, Rule> {
    let records = &pending.records;
    for (field, key, long) in [
        (&mut header.name, &b"path"[..], &pending.long_name),
        (&mut header.link, b"linkpath", &pending.long_link),
    ] {
        if !long.is_empty() {
            field.clone_from(long);
        } else if let Some(text) = records.get(key) {
            *field = text.to_vec();
        }
    }
    for (field, key) in [
        (&mut header.size, &b"size"[..]),
        (&mut header.uid, b"uid"),
        (&mut header.gid, b"gid"),
    ] {
        *field = records.number(key)?.unwrap_or(*field);
    }
    // Times that nobody needs must be times all the same.
    records.time(b"atime")?;
    records.time(b"ctime")?;
    // Before there was a type for them, directories were files whose names end in a slash.
    if header.typeflag == 0 {
        header.typeflag = if header.name.ends_with(b"/") { b'5' } else { b'0' };
    }
    Ok(header)
}

/// What an entry is. Contiguous files (`7`) are files, as POSIX demands of those who do not know them; volume labels,
/// pieces of files, directory dumps and whatever else there is are nothing.
fn kind(header: &Header) -> Option<Kind> {
    match header.typeflag {
        b'0' | b'7' | b'S' => Some(Kind::File),
        b'1' => Some(Kind::Hardlink),
        b'2' => Some(Kind::Symlink),
        b'3' => Some(Kind::Char),
        b'4' => Some(Kind::Block),
        b'5' => Some(Kind::Dir),
        b'6' => Some(Kind::Fifo),
        _ => None,
    }
}

/// The entry, but for its size.
fn entry_of(header: &Header, kind: Kind, records: &Records) -> Result<Entry, Rule> {
    let id = |id: i64| u32::try_from(id).map_err(|_| "its owner or group has more than 32 bits");
    let device = |number: i64| u32::try_from(number).map_err(|_| "its device number has more than 32 bits");
    let is_device = matches!(kind, Kind::Char | Kind::Block);
    let of_header = Time {
        seconds: header.mtime,
        nanos: 0,
    };
    Ok(Entry {
        path: header.name.clone(),
        kind,
        mode: (header.mode & 0o7777) as u32,
        uid: id(header.uid)?,
        gid: id(header.gid)?,
        mtime: records.time(b"mtime")?.unwrap_or(of_header),
        size: 0,
        link: match kind {
            Kind::Symlink | Kind::Hardlink => header.link.clone(),
            _ => Vec::new(),
        },
        rdev: match is_device {
            true => (device(header.device.0)?, device(header.device.1)?),
            false => (0, 0),
        },
        xattrs: records.xattrs(),
        digest: None,
    })
}
