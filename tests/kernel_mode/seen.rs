//! A tree as programs see it: all that system calls say of it but the numbers of filesystem and inodes, and the program's own
//! attributes, which EROFS cannot answer.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use registryfs::digest::Digest;
use rustix::fs::{lgetxattr, llistxattr};

/// Larger than what the kernel lets a value or a list be (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const XATTR_BYTES_MAX: usize = 1 << 16;
/// Lengths of names that are looked up where they are not: the longest that can be, and one more.
const ABSENT_BYTES: [usize; 3] = [6, 255, 256];

/// Every path below `root`, and `root` itself, with what there is to see of it.
pub(crate) fn seen(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut first_names = BTreeMap::new();
    let mut found = BTreeMap::new();
    for path in paths(root) {
        let name = path.strip_prefix(root).unwrap().to_owned();
        let line = line(&path, &name, &mut first_names);
        assert!(
            found.insert(name, line).is_none(),
            "{} is listed twice",
            path.display()
        );
    }
    found
}

/// Fails with what differs between two trees.
pub(crate) fn assert_same(ours: &Path, theirs: &Path) {
    let (ours, theirs) = (seen(ours), seen(theirs));
    let names = ours.keys().chain(theirs.keys());
    let mut differences: Vec<String> = names
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| format!("{name:?}:\n  {:?}\n  {:?}", ours.get(name), theirs.get(name)))
        .collect();
    differences.dedup();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert!(ours.len() > 1, "an empty tree shows nothing");
}

fn paths(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut at = 0;
    while let Some(path) = found.get(at).cloned() {
        at += 1;
        if at == 1 || fs::symlink_metadata(&path).unwrap().is_dir() {
            found.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    // By name, so that the first name of a file is the same in every order of directory reads.
    found.sort();
    found
}

fn line(path: &Path, name: &Path, first_names: &mut BTreeMap<u64, PathBuf>) -> String {
    let metadata = fs::symlink_metadata(path).unwrap();
    let mut line = format!(
        "mode {:o} owner {}:{} size {} names {} device {} blocks {} of {} times {}.{} {}.{} {}.{}",
        metadata.mode(),
        metadata.uid(),
        metadata.gid(),
        metadata.size(),
        metadata.nlink(),
        metadata.rdev(),
        metadata.blocks(),
        metadata.blksize(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.atime(),
        metadata.atime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    );
    if !metadata.is_dir() {
        let first = first_names
            .entry(metadata.ino())
            .or_insert_with(|| name.to_owned());
        write!(line, " first {first:?}").unwrap();
    }
    if metadata.is_symlink() {
        write!(line, " to {:?}", fs::read_link(path).unwrap()).unwrap();
    }
    if metadata.is_file() {
        write!(line, " holds {}", content(path)).unwrap();
    }
    if metadata.is_dir() {
        let absent = ABSENT_BYTES.map(|length| {
            let found = fs::symlink_metadata(path.join("-".repeat(length)));
            found.map_err(|error| error.raw_os_error()).err()
        });
        write!(line, " absent {absent:?}").unwrap();
    }
    write!(line, " attributes {:?}", xattrs(path)).unwrap();
    line
}

/// The digest of a file's bytes, or why they cannot be read.
fn content(path: &Path) -> String {
    fs::read(path).map_or_else(|error| error.to_string(), |bytes| Digest::of(&bytes).to_string())
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut buffer = vec![0; XATTR_BYTES_MAX];
    let listed = llistxattr(path, &mut buffer)?;
    let names: Vec<&[u8]> = buffer[..listed]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    let mut value = vec![0; XATTR_BYTES_MAX];
    let mut found = BTreeMap::new();
    for name in names {
        let read = lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value);
        let shown = read.map_or_else(|error| error.to_string(), |len| format!("{:?}", &value[..len]));
        let name = String::from_utf8_lossy(name).into_owned();
        assert!(
            found.insert(name, shown).is_none(),
            "{}: an attribute is listed twice",
            path.display()
        );
    }
    Ok(found)
}
