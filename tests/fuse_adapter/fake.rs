//! A small tree in memory that counts lookups, and can hold, fail and panic on demand.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use registryfs::error::Error;
use registryfs::fs::ops::{
    Answer, Attr, Caller, DirEntry, Entry, Expected, FOREVER, FileType, Lookup, Operations, ROOT_INO, Statfs,
};
use registryfs::layer::entry::Time;

pub(crate) const HELLO: &[u8] = b"hello\n";
pub(crate) const LONG_BYTES: usize = (3 << 20) + 123;
pub(crate) const BIG_ENTRIES: u64 = 10_000;
pub(crate) const LONG_XATTR_BYTES: usize = 300;
/// Large enough for many reads that have no page in common.
pub(crate) const HELD_FILE_BYTES: u64 = 1 << 30;

const FILE: u64 = 2;
const HELLO_INO: u64 = 3;
const DIR: u64 = 4;
const LINK: u64 = 6;
const BIG: u64 = 7;
const HELD_FILE: u64 = 8;
/// A small file that is handed on once `hello` was read, and never answered to who asks for it.
const EXPECTED: u64 = 9;
const BIG_FIRST: u64 = 100_000;

/// Which entries of the big directory are not known without waiting.
pub(crate) fn is_unknown(index: u64) -> bool {
    index % 7 == 3
}

pub(crate) fn big_name(index: u64) -> String {
    format!("entry-{index:05}")
}

pub(crate) fn big_ino(index: u64) -> u64 {
    BIG_FIRST + index
}

/// The content of `long`.
pub(crate) fn long_content() -> Vec<u8> {
    (0..LONG_BYTES)
        .map(|i| (i % 251) as u8 ^ (i >> 12) as u8)
        .collect()
}

#[derive(Debug)]
pub(crate) struct Fake {
    long: Vec<u8>,
    lookups: Mutex<HashMap<u64, u64>>,
    pub(crate) unbalanced: AtomicBool,
    pub(crate) fails: AtomicBool,
    pub(crate) held: AtomicUsize,
    pub(crate) largest_read: AtomicU32,
}

/// Counts a held request for as long as its future lives.
struct Held(Arc<Fake>);

impl Held {
    async fn for_ever<T>(fake: Arc<Fake>) -> T {
        fake.held.fetch_add(1, Ordering::SeqCst);
        let _held = Self(fake);
        std::future::pending().await
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The operations on a shared [`Fake`], so that futures can hold it.
pub(crate) struct FakeFs(pub(crate) Arc<Fake>);

impl Fake {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            long: long_content(),
            lookups: Mutex::default(),
            unbalanced: AtomicBool::new(false),
            fails: AtomicBool::new(false),
            held: AtomicUsize::new(0),
            largest_read: AtomicU32::new(0),
        })
    }

    fn attr(&self, ino: u64) -> Attr {
        let (kind, size) = match ino {
            ROOT_INO | DIR | BIG => (FileType::Dir, 0),
            FILE => (FileType::File, self.long.len() as u64),
            LINK => (FileType::Symlink, 5),
            HELD_FILE => (FileType::File, HELD_FILE_BYTES),
            _ => (FileType::File, HELLO.len() as u64),
        };
        Attr {
            ino,
            size,
            blocks: size.div_ceil(512),
            mtime: Time {
                seconds: 1_700_000_000,
                nanos: 123_456_789,
            },
            kind,
            mode: if kind == FileType::Dir { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
        }
    }

    fn entry(&self, ino: u64) -> Entry {
        *self.lookups.lock().entry(ino).or_insert(0) += 1;
        Entry {
            attr: self.attr(ino),
            attr_ttl: FOREVER,
            entry_ttl: FOREVER,
        }
    }

    /// How many lookups of an inode are counted now.
    pub(crate) fn lookups_of(&self, ino: u64) -> u64 {
        self.lookups.lock().get(&ino).copied().unwrap_or(0)
    }

    /// The entries of a directory, behind the first `skip`.
    fn children(ino: u64, skip: u64) -> Box<dyn Iterator<Item = (String, u64)>> {
        let few: &[(&str, u64)] = match ino {
            ROOT_INO => &[
                ("long", FILE),
                ("hello", HELLO_INO),
                ("dir", DIR),
                ("link", LINK),
                ("big", BIG),
                ("held-file", HELD_FILE),
                ("expected", EXPECTED),
            ],
            DIR => &[("nested", 5)],
            BIG => return Box::new((skip..BIG_ENTRIES).map(|i| (big_name(i), big_ino(i)))),
            _ => &[],
        };
        let few = few.iter().skip(skip as usize);
        Box::new(few.map(|(name, ino)| ((*name).to_owned(), *ino)))
    }

    fn child(parent: u64, name: &[u8]) -> Option<u64> {
        if parent == BIG {
            let index = std::str::from_utf8(name)
                .ok()?
                .strip_prefix("entry-")?
                .parse()
                .ok()?;
            return (index < BIG_ENTRIES).then(|| big_ino(index));
        }
        Self::children(parent, 0)
            .find(|(child, _)| child.as_bytes() == name)
            .map(|(_, ino)| ino)
    }

    fn file(&self, ino: u64) -> &[u8] {
        if ino == FILE { &self.long } else { HELLO }
    }
}

impl Operations for FakeFs {
    fn lookup(&self, _caller: Caller, parent: u64, name: &[u8]) -> Answer<Lookup> {
        match name {
            b"held" => return Answer::later(Held::for_ever(self.0.clone())),
            b"panics" => panic!("a lookup that panics"),
            b"panics-later" => return Answer::later(async { panic!("a future that panics") }),
            b"denied" => return Answer::Now(Err(Error::denied("denied", "a test"))),
            _ => {}
        }
        let found = match Fake::child(parent, name) {
            Some(ino) => Lookup::Found(self.0.entry(ino)),
            None if name == b"asked-again" => Lookup::Absent(Duration::ZERO),
            None => Lookup::Absent(FOREVER),
        };
        if parent == DIR {
            return Answer::later(async move { Ok(found) });
        }
        Answer::Now(Ok(found))
    }

    fn forget(&self, ino: u64, lookups: u64) {
        let mut counted = self.0.lookups.lock();
        let count = counted.entry(ino).or_insert(0);
        if *count < lookups {
            self.0.unbalanced.store(true, Ordering::SeqCst);
        }
        *count = count.saturating_sub(lookups);
    }

    fn getattr(&self, ino: u64) -> Answer<(Attr, Duration)> {
        if self.0.fails.load(Ordering::SeqCst) {
            return Answer::Now(Err(Error::network("the root", "a test")));
        }
        Answer::Now(Ok((self.0.attr(ino), FOREVER)))
    }

    fn readlink(&self, _ino: u64) -> Answer<Vec<u8>> {
        Answer::Now(Ok(b"hello".to_vec()))
    }

    fn read(&self, _caller: Caller, ino: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let fake = self.0.clone();
        fake.largest_read.fetch_max(size, Ordering::SeqCst);
        if ino == HELD_FILE || ino == EXPECTED {
            return Answer::later(Held::for_ever(fake));
        }
        Answer::later(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let file = fake.file(ino);
            let start = (offset as usize).min(file.len());
            let end = (start + size as usize).min(file.len());
            Ok(file[start..end].to_vec())
        })
    }

    fn read_next(&self, ino: u64) -> Vec<Expected> {
        let bytes = HELLO.len() as u32;
        let expected = Expected { ino: EXPECTED, bytes };
        if ino == HELLO_INO {
            vec![expected]
        } else {
            Vec::new()
        }
    }

    fn hand_on(&self, _expected: Expected, take: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        take(HELLO)
    }

    fn readdir(&self, _caller: Caller, ino: u64, offset: u64, limit: usize) -> Answer<Vec<DirEntry>> {
        let fake = self.0.clone();
        let list = move || {
            let dots = [(".".to_owned(), ino), ("..".to_owned(), ROOT_INO)];
            let entries = dots
                .into_iter()
                .skip(offset as usize)
                .chain(Fake::children(ino, offset.saturating_sub(2)));
            Ok((offset + 1..)
                .zip(entries)
                .take(limit)
                .map(|(next, (name, ino))| DirEntry {
                    name: name.into_bytes(),
                    ino,
                    kind: fake.attr(ino).kind,
                    next,
                })
                .collect())
        };
        // Every other batch comes late, so both ways and the change between them are used.
        if offset % 2 == 1 {
            return Answer::later(async move { list() });
        }
        Answer::Now(list())
    }

    fn remember(&self, _parent: u64, entry: &DirEntry) -> Option<Entry> {
        assert!(entry.name != b"." && entry.name != b"..");
        let unknown = entry.ino >= BIG_FIRST && is_unknown(entry.ino - BIG_FIRST);
        (!unknown).then(|| self.0.entry(entry.ino))
    }

    fn getxattr(&self, _ino: u64, name: &[u8]) -> Answer<Vec<u8>> {
        Answer::Now(match name {
            b"user.short" => Ok(b"value".to_vec()),
            b"user.long" => Ok(vec![b'x'; LONG_XATTR_BYTES]),
            _ => Err(Error::posix("xattr", libc::ENODATA)),
        })
    }

    fn listxattr(&self, _ino: u64) -> Answer<Vec<u8>> {
        Answer::Now(Ok(b"user.short\0user.long\0".to_vec()))
    }

    fn statfs(&self) -> Answer<Statfs> {
        Answer::Now(Ok(Statfs {
            blocks: 1000,
            blocks_free: 10,
            files: 77,
        }))
    }
}
