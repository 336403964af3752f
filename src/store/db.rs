//! What is small and relational: which digest a tag had and when that was checked, the digests ever seen under it, what
//! registries list, and the numbers that inodes are made of.
//!
//! SQLite in WAL mode. All of it is a cache but for the slots, which only have to be stable: a database that is damaged is
//! moved aside and begun anew, and what a full disk does not take is not remembered, but no reason for a read to fail.
//! Calls block on the disk, so nobody makes one on a FUSE thread or an async one.

use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Listings of more names than this are not kept.
const LISTING_NAMES_MAX: usize = 1_000_000;
/// The most slots that are given while the disk takes no new ones.
const PASSING_SLOTS_MAX: usize = 65_536;
/// They are counted down from here, the largest slot that an inode number has room for.
const PASSING_SLOTS_FROM: u32 = i32::MAX as u32;

const SCHEMA: &str = "
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA user_version = 1;
-- digest NULL: the registry said that there is no such tag
CREATE TABLE IF NOT EXISTS tags (
    repository TEXT NOT NULL, tag TEXT NOT NULL, digest TEXT, checked_ms INTEGER NOT NULL,
    PRIMARY KEY (repository, tag)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tag_history (
    repository TEXT NOT NULL, tag TEXT NOT NULL, digest TEXT NOT NULL,
    first_ms INTEGER NOT NULL, last_ms INTEGER NOT NULL,
    PRIMARY KEY (repository, tag, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS media_types (digest TEXT PRIMARY KEY, media_type TEXT NOT NULL) WITHOUT ROWID;
-- of: 'tags HOST/PATH' or 'catalog HOST'; names: separated by newlines, which no name contains
CREATE TABLE IF NOT EXISTS listings (
    of TEXT PRIMARY KEY, names TEXT NOT NULL, checked_ms INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slots (slot INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE);
-- the images that a registry gave to somebody without credentials, and the registries that were asked with some
CREATE TABLE IF NOT EXISTS open_images (
    repository TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (repository, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hosts_with_credentials (host TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS warnings (tree TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
";

/// What was last heard of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagRecord {
    /// Its digest; `None` when the registry said that there is no such tag.
    pub digest: Option<Digest>,
    /// When the registry said so.
    pub checked: SystemTime,
}

impl TagRecord {
    /// How long ago the registry said so; a time in the future counts as long ago.
    #[must_use]
    pub fn age(&self) -> Duration {
        age(self.checked)
    }
}

/// What was last heard of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListingRecord {
    /// The names in the order they were kept.
    pub names: Vec<String>,
    /// When the registry gave them.
    pub checked: SystemTime,
}

impl ListingRecord {
    /// As [`TagRecord::age`].
    #[must_use]
    pub fn age(&self) -> Duration {
        age(self.checked)
    }
}

fn age(checked: SystemTime) -> Duration {
    SystemTime::now().duration_since(checked).unwrap_or(Duration::MAX)
}

/// The open database.
#[derive(Debug)]
pub struct Db {
    connection: Mutex<Connection>,
    /// Slots that could not be written down: they hold for this process.
    passing_slots: Mutex<HashMap<String, u32>>,
}

impl Db {
    /// Opens or creates the database; a damaged one is moved aside.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn open(path: &Path) -> Result<Self> {
        let connection = match open_connection(path) {
            Err(rusqlite::Error::SqliteFailure(failure, _))
                if matches!(failure.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) =>
            {
                tracing::warn!(path = %path.display(), "the database is damaged and begun anew");
                for suffix in ["", "-wal", "-shm"] {
                    let name = format!("{}{suffix}", path.display());
                    let _ = std::fs::rename(&name, format!("{name}.damaged"));
                }
                open_connection(path)
            }
            Err(error) if is_of_the_disk(&error) => {
                tracing::warn!(path = %path.display(), %error, "nothing new is written into the database");
                open_unwritable(path)
            }
            opened => opened,
        };
        let connection = connection.map_err(|e| failed(&e))?;
        Ok(Self {
            connection: Mutex::new(connection),
            passing_slots: Mutex::default(),
        })
    }

    /// What was last heard of a tag.
    ///
    /// # Errors
    /// [`Error::Io`], here and below.
    pub fn tag(&self, repository: &str, tag: &str) -> Result<Option<TagRecord>> {
        let connection = self.connection.lock();
        let mut statement = connection
            .prepare_cached("SELECT digest, checked_ms FROM tags WHERE repository = ?1 AND tag = ?2")
            .map_err(|e| failed(&e))?;
        let row = statement
            .query_row(params![repository, tag], |row| {
                Ok((row.get::<_, Option<String>>(0)?, row.get::<_, i64>(1)?))
            })
            .optional()
            .map_err(|e| failed(&e))?;
        Ok(row.map(|(digest, ms)| TagRecord {
            digest: digest.and_then(|text| text.parse().ok()),
            checked: from_ms(ms),
        }))
    }

    /// The tags of a repository that name something as far as is known, what was checked last first; at most `max`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn tags_of(&self, repository: &str, max: u32) -> Result<Vec<(String, Digest)>> {
        let connection = self.connection.lock();
        let mut statement = connection
            .prepare_cached(
                "SELECT tag, digest FROM tags WHERE repository = ?1 AND digest IS NOT NULL
                 ORDER BY checked_ms DESC LIMIT ?2",
            )
            .map_err(|e| failed(&e))?;
        let rows = statement
            .query_map(params![repository, max], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
            })
            .map_err(|e| failed(&e))?;
        let rows: Vec<_> = rows.collect::<rusqlite::Result<_>>().map_err(|e| failed(&e))?;
        let known = rows
            .into_iter()
            .filter_map(|(tag, digest)| Some((tag, digest.parse().ok()?)));
        Ok(known.collect())
    }

    /// Records what the registry just said of a tag.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_tag(&self, repository: &str, tag: &str, digest: Option<&Digest>) -> Result<()> {
        let now = to_ms(SystemTime::now());
        let digest = digest.map(Digest::to_string);
        let mut connection = self.connection.lock();
        let mut write = || -> rusqlite::Result<()> {
            let transaction = connection.transaction()?;
            transaction
                .prepare_cached("INSERT OR REPLACE INTO tags VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![repository, tag, digest, now])?;
            if digest.is_some() {
                transaction
                    .prepare_cached(
                        "INSERT INTO tag_history VALUES (?1, ?2, ?3, ?4, ?4)
                         ON CONFLICT DO UPDATE SET last_ms = ?4",
                    )?
                    .execute(params![repository, tag, digest, now])?;
            }
            transaction.commit()
        };
        kept(write())
    }

    /// The media type under which a manifest came.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn media_type(&self, digest: &Digest) -> Result<Option<String>> {
        self.text(
            "SELECT media_type FROM media_types WHERE digest = ?1",
            &digest.to_string(),
        )
    }

    /// Records the media type under which a manifest came.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_media_type(&self, digest: &Digest, media_type: &str) -> Result<()> {
        self.execute(
            "INSERT OR REPLACE INTO media_types VALUES (?1, ?2)",
            &digest.to_string(),
            media_type,
        )
    }

    /// What was odd in the layers of a merged tree, one line each.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn warnings(&self, tree: &Digest) -> Result<Vec<String>> {
        let text = self.text("SELECT text FROM warnings WHERE tree = ?1", &tree.to_string())?;
        Ok(text.unwrap_or_default().lines().map(str::to_owned).collect())
    }

    /// Records what was odd in the layers of a merged tree.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_warnings(&self, tree: &Digest, warnings: &[String]) -> Result<()> {
        let lines: Vec<_> = warnings.iter().map(|line| line.replace('\n', " ")).collect();
        self.execute(
            "INSERT OR REPLACE INTO warnings VALUES (?1, ?2)",
            &tree.to_string(),
            &lines.join("\n"),
        )
    }

    /// Whether an image is known to be open to everyone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn is_open_image(&self, repository: &str, digest: &Digest) -> Result<bool> {
        let connection = self.connection.lock();
        let found = connection
            .query_row(
                "SELECT 1 FROM open_images WHERE repository = ?1 AND digest = ?2",
                [repository, &digest.to_string()],
                |_| Ok(()),
            )
            .optional();
        found.map(|row| row.is_some()).map_err(|e| failed(&e))
    }

    /// Records that an image is open to everyone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_open_image(&self, repository: &str, digest: &Digest) -> Result<()> {
        self.execute(
            "INSERT OR REPLACE INTO open_images VALUES (?1, ?2)",
            repository,
            &digest.to_string(),
        )
    }

    /// The registries that were ever asked with credentials.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn hosts_with_credentials(&self) -> Result<Vec<String>> {
        let connection = self.connection.lock();
        let mut statement = connection
            .prepare_cached("SELECT host FROM hosts_with_credentials")
            .map_err(|e| failed(&e))?;
        let rows = statement
            .query_map([], |row| row.get(0))
            .map_err(|e| failed(&e))?;
        rows.collect::<rusqlite::Result<_>>().map_err(|e| failed(&e))
    }

    /// Records that a registry was asked with credentials.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_host_with_credentials(&self, host: &str) -> Result<()> {
        let connection = self.connection.lock();
        let written = connection.execute("INSERT OR IGNORE INTO hosts_with_credentials VALUES (?1)", [host]);
        kept(written.map(drop))
    }

    /// What was last heard of a listing (`tags HOST/PATH`, `catalog HOST`).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn listing(&self, of: &str) -> Result<Option<ListingRecord>> {
        let connection = self.connection.lock();
        let row = connection
            .query_row(
                "SELECT names, checked_ms FROM listings WHERE of = ?1",
                [of],
                |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)),
            )
            .optional()
            .map_err(|e| failed(&e))?;
        Ok(row.map(|(names, ms)| ListingRecord {
            names: names.lines().map(str::to_owned).collect(),
            checked: from_ms(ms),
        }))
    }

    /// Records what the registry just listed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_listing(&self, of: &str, names: &[String]) -> Result<()> {
        if names.len() > LISTING_NAMES_MAX {
            return Ok(());
        }
        let connection = self.connection.lock();
        let written = connection.execute(
            "INSERT OR REPLACE INTO listings VALUES (?1, ?2, ?3)",
            params![of, names.join("\n"), to_ms(SystemTime::now())],
        );
        kept(written.map(drop))
    }

    /// The repositories of `host` of which a tag was ever found, and all of them for the empty host.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn visited(&self, host: &str) -> Result<Vec<String>> {
        let connection = self.connection.lock();
        let mut statement = connection
            .prepare_cached(
                "SELECT DISTINCT repository FROM tags
                 WHERE digest IS NOT NULL AND (?1 = '' OR substr(repository, 1, length(?1) + 1) = ?1 || '/')",
            )
            .map_err(|e| failed(&e))?;
        let rows = statement
            .query_map([host], |row| row.get(0))
            .map_err(|e| failed(&e))?;
        rows.collect::<rusqlite::Result<_>>().map_err(|e| failed(&e))
    }

    /// The number that stands for `key`, the same for ever: counted up from 1. One that the disk does not take is the
    /// same until the process ends.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn slot(&self, key: &str) -> Result<u32> {
        if let Some(slot) = self.passing_slots.lock().get(key) {
            return Ok(*slot);
        }
        let connection = self.connection.lock();
        let find = || -> rusqlite::Result<Option<i64>> {
            connection
                .prepare_cached("SELECT slot FROM slots WHERE key = ?1")?
                .query_row([key], |row| row.get(0))
                .optional()
        };
        let insert = || -> rusqlite::Result<()> {
            connection
                .prepare_cached("INSERT OR IGNORE INTO slots (key) VALUES (?1)")?
                .execute([key])
                .map(drop)
        };
        let mut slot = find().map_err(|e| failed(&e))?;
        if slot.is_none() {
            match insert() {
                Err(error) if is_of_the_disk(&error) => return self.passing_slot(key),
                inserted => inserted.map_err(|e| failed(&e))?,
            }
            slot = find().map_err(|e| failed(&e))?;
        }
        slot.and_then(|slot| u32::try_from(slot).ok())
            .filter(|slot| *slot <= PASSING_SLOTS_FROM)
            .ok_or_else(no_slot_left)
    }

    fn passing_slot(&self, key: &str) -> Result<u32> {
        let mut passing = self.passing_slots.lock();
        if passing.len() >= PASSING_SLOTS_MAX {
            return Err(no_slot_left());
        }
        let next = u32::try_from(passing.len()).map_err(|_| no_slot_left())?;
        Ok(*passing.entry(key.to_owned()).or_insert(PASSING_SLOTS_FROM - next))
    }

    fn text(&self, sql: &str, key: &str) -> Result<Option<String>> {
        let connection = self.connection.lock();
        connection
            .query_row(sql, [key], |row| row.get(0))
            .optional()
            .map_err(|e| failed(&e))
    }

    fn execute(&self, sql: &str, key: &str, value: &str) -> Result<()> {
        kept(self.connection.lock().execute(sql, [key, value]).map(drop))
    }
}

fn open_connection(path: &Path) -> rusqlite::Result<Connection> {
    // Made by us, it is for its owner alone, and SQLite gives its other files the same mode. What keeps it from being
    // made is said better by SQLite itself.
    let _ = std::fs::File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path);
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.execute_batch(SCHEMA)?;
    Ok(connection)
}

/// What the database holds, where it cannot be opened for writing: as it was at its last checkpoint, else nothing.
fn open_unwritable(path: &Path) -> rusqlite::Result<Connection> {
    let mut name = path.display().to_string();
    for (sign, code) in [("%", "%25"), ("?", "%3f"), ("#", "%23")] {
        name = name.replace(sign, code);
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let old = Connection::open_with_flags(format!("file:{name}?immutable=1"), flags)
        .and_then(|old| old.prepare("SELECT slot FROM slots").map(drop).map(|()| old));
    old.or_else(|_| {
        let fresh = Connection::open_in_memory()?;
        fresh.execute_batch(SCHEMA)?;
        Ok(fresh)
    })
}

/// Whether the disk is at fault, not the database or the question.
fn is_of_the_disk(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure | ErrorCode::ReadOnly | ErrorCode::CannotOpen)
    )
}

/// The outcome of writing down what the registry can be asked again.
fn kept(written: rusqlite::Result<()>) -> Result<()> {
    match written {
        Err(error) if is_of_the_disk(&error) => {
            tracing::debug!(%error, "the database does not take an answer");
            Ok(())
        }
        written => written.map_err(|e| failed(&e)),
    }
}

fn no_slot_left() -> Error {
    Error::malformed("state.db", "no inode slot is left")
}

fn failed(error: &rusqlite::Error) -> Error {
    Error::Io {
        what: "state.db".to_owned(),
        errno: libc::EIO,
        why: error.to_string(),
    }
}

fn to_ms(time: SystemTime) -> i64 {
    let ms = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    i64::try_from(ms).unwrap_or(i64::MAX)
}

fn from_ms(ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir) -> Db {
        Db::open(&dir.path().join("state.db")).unwrap()
    }

    #[test]
    fn what_was_heard_of_tags_and_listings_survives() {
        let dir = tempfile::tempdir().unwrap();
        let digest = Digest::of(b"1");
        let db = open(&dir);
        db.put_tag("h.io/a", "1", Some(&digest)).unwrap();
        db.put_tag("h.io/b", "gone", None).unwrap();
        db.put_tag("h.iox/c", "1", Some(&digest)).unwrap();
        db.put_listing("tags h.io/a", &["1".to_owned(), "2".to_owned()])
            .unwrap();
        drop(db);
        let db = open(&dir);
        let record = db.tag("h.io/a", "1").unwrap().unwrap();
        assert_eq!(record.digest, Some(digest));
        assert!(record.age() < Duration::from_secs(60));
        assert_eq!(db.tag("h.io/b", "gone").unwrap().unwrap().digest, None);
        assert_eq!(db.tag("h.io/a", "2").unwrap(), None);
        assert_eq!(db.listing("tags h.io/a").unwrap().unwrap().names, ["1", "2"]);
        assert_eq!(db.visited("h.io").unwrap(), ["h.io/a"]);
        assert_eq!(db.tags_of("h.io/a", 9).unwrap(), [("1".to_owned(), digest)]);
        assert!(
            db.tags_of("h.io/b", 9).unwrap().is_empty(),
            "there is no such tag"
        );
        assert!(db.tags_of("h.io/a", 0).unwrap().is_empty());
        assert_eq!(db.visited("").unwrap(), ["h.io/a", "h.iox/c"]);
    }

    #[test]
    fn what_is_open_to_everyone_is_known_by_repository_and_digest() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let db = open(&dir);
        db.put_open_image("h.io/a", &one).unwrap();
        db.put_open_image("h.io/a", &one).unwrap();
        db.put_host_with_credentials("h.io").unwrap();
        db.put_host_with_credentials("h.io").unwrap();
        drop(db);
        let db = open(&dir);
        assert!(db.is_open_image("h.io/a", &one).unwrap());
        assert!(!db.is_open_image("h.io/a", &two).unwrap());
        assert!(
            !db.is_open_image("h.io/b", &one).unwrap(),
            "the same image elsewhere"
        );
        assert_eq!(db.hosts_with_credentials().unwrap(), ["h.io"]);
    }

    #[test]
    fn slots_are_small_and_stable() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (open(&dir).slot("a").unwrap(), open(&dir).slot("b").unwrap());
        assert_ne!(a, b);
        assert_eq!(
            (open(&dir).slot("a").unwrap(), open(&dir).slot("b").unwrap()),
            (a, b)
        );
    }

    #[test]
    fn a_damaged_database_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state.db"), vec![b'x'; 10_000]).unwrap();
        let db = open(&dir);
        assert_eq!(db.tag("a", "1").unwrap(), None);
        db.slot("a").unwrap();
    }
}
