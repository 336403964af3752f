//! The contract between the filesystem and whatever carries it to the kernel.
//!
//! An operation answers at once ([`Answer::Now`]) when it needs neither network nor disk, and the carrier may then reply
//! on the thread that received the request. Otherwise it hands out a future ([`Answer::Later`]) that the carrier runs
//! elsewhere and drops when the one who waits was interrupted; shared work goes on without it. Deadlines are the
//! filesystem's: every future ends.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use crate::error::Result;
use crate::layer::entry::Time;

/// The inode number of the root.
pub const ROOT_INO: u64 = 1;
/// A time to live for what never changes: the kernel keeps it until it needs the memory.
pub const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// An answer now, or work that leads to one.
pub enum Answer<T> {
    /// Known without waiting.
    Now(Result<T>),
    /// Needs the network, the disk or a computation.
    Later(Pin<Box<dyn Future<Output = Result<T>> + Send>>),
}

impl<T> Answer<T> {
    /// Work that leads to an answer.
    pub fn later(work: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Self::Later(Box::pin(work))
    }
}

impl<T: fmt::Debug> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(result) => f.debug_tuple("Now").field(result).finish(),
            Self::Later(_) => f.write_str("Later"),
        }
    }
}

/// The type of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// A directory.
    Dir,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
}

/// What stat(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Space in units of 512 bytes.
    pub blocks: u64,
    /// Modification time, also shown as access and change time.
    pub mtime: Time,
    /// Type.
    pub kind: FileType,
    /// Permission bits (0o7777).
    pub mode: u16,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number as the kernel encodes it (new_encode_dev), 0 if no device.
    pub rdev: u32,
}

/// An inode under a name, with how long the kernel may keep both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The inode's attributes.
    pub attr: Attr,
    /// How long the attributes hold.
    pub attr_ttl: Duration,
    /// How long the name means this inode.
    pub entry_ttl: Duration,
}

/// The answer to a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// The name exists; one lookup was counted for its inode.
    Found(Entry),
    /// It does not, and that holds for the time given (zero: ask again at once).
    Absent(Duration),
}

/// One entry of a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The inode number.
    pub ino: u64,
    /// The type.
    pub kind: FileType,
    /// The offset to continue behind this entry: a stable cookie.
    pub next: u64,
}

/// A small regular file whose content will probably be asked for next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The inode number.
    pub ino: u64,
    /// Its size.
    pub bytes: u32,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Thread id in the daemon's pid namespace, 0 if it has none there.
    pub pid: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

/// What statfs(2) shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statfs {
    /// Size of the filesystem in 4 KiB blocks.
    pub blocks: u64,
    /// Free 4 KiB blocks.
    pub blocks_free: u64,
    /// Number of inodes.
    pub files: u64,
}

/// How the kernel reads an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Through the page cache, which keeps what was read, and reads ahead.
    Cached,
    /// What it needs and nothing else, and keeps nothing.
    Direct,
}

/// The operations of a read-only filesystem. Everything that would write is answered EROFS by the carrier.
pub trait Operations: Send + Sync + 'static {
    /// Looks `name` up in directory `parent`. [`Lookup::Found`] counts one lookup of the inode, which a later
    /// [`Operations::forget`] takes back.
    fn lookup(&self, caller: Caller, parent: u64, name: &[u8]) -> Answer<Lookup>;

    /// Takes back `lookups` counted lookups of an inode.
    fn forget(&self, ino: u64, lookups: u64);

    /// The attributes of an inode and how long they hold.
    fn getattr(&self, ino: u64) -> Answer<(Attr, Duration)>;

    /// The target of a symbolic link.
    fn readlink(&self, ino: u64) -> Answer<Vec<u8>>;

    /// `size` bytes at `offset` of a regular file, fewer only where the file ends (a short answer would shrink the file
    /// in the kernel for good).
    fn read(&self, caller: Caller, ino: u64, offset: u64, size: u32) -> Answer<Vec<u8>>;

    /// After a READ of the start of file `ino`: what its reader will probably read next, all of it. What is not at hand then
    /// is not worth waiting for.
    fn read_next(&self, ino: u64) -> Vec<Expected> {
        let _ = ino;
        Vec::new()
    }

    /// At most `limit` entries of a directory behind cookie `offset` (0: from the start), `.` and `..` included. An
    /// empty list means the end.
    fn readdir(&self, caller: Caller, ino: u64, offset: u64, limit: usize) -> Answer<Vec<DirEntry>>;

    /// What a lookup of this entry of directory `parent` would answer, counted as one lookup, where that is known without
    /// waiting: for READDIRPLUS. Not asked for `.` and `..`.
    fn remember(&self, parent: u64, entry: &DirEntry) -> Option<Entry>;

    /// The value of an extended attribute; ENODATA where there is none.
    fn getxattr(&self, ino: u64, name: &[u8]) -> Answer<Vec<u8>>;

    /// The names of the extended attributes, each ended by a NUL.
    fn listxattr(&self, ino: u64) -> Answer<Vec<u8>>;

    /// Figures of the whole filesystem.
    fn statfs(&self) -> Answer<Statfs>;

    /// Whether the carrier shall report opens and closes of files. Without, the kernel opens what it knows without asking.
    fn wants_opens(&self) -> bool {
        false
    }

    /// A file was opened, where that is wanted. How it is to be read.
    fn opened(&self, ino: u64) -> Access {
        let _ = ino;
        Access::Cached
    }

    /// A file that was opened was closed for good, where that is wanted.
    fn closed(&self, ino: u64) {
        let _ = ino;
    }
}
