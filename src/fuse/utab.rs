//! Our trees in `/run/mount/utab`, the table in which libmount keeps what the kernel does not know of mounts.
//!
//! While this table is empty, umount(8) asks a mount for its type, gets that of FUSE without our subtype, and does not find
//! `umount.fuse.registryfs`. It would then fail for each tree in which the kernel serves an image: what is mounted below
//! keeps it busy. With an entry it reads the mount table of the kernel, which has the whole type. The form of an entry and
//! the order of locking and renaming are libmount's (util-linux, `libmount/src/tab_update.c`).

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

/// The directory of the table.
const DIR: &str = "/run/mount";
/// How long others may hold the table's lock.
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// How often the lock is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// The largest table that is changed, in bytes: an entry has some hundred.
const TABLE_BYTES_MAX: u64 = 4 << 20;

/// Notes a tree. Without it only umount(8) is worse off.
pub(super) fn add(mountpoint: &Path) {
    let line = entry(mountpoint);
    note(mountpoint, Some(&line));
}

/// Takes the note of a tree away.
pub(super) fn remove(mountpoint: &Path) {
    note(mountpoint, None);
}

fn note(mountpoint: &Path, line: Option<&[u8]>) {
    if let Err(error) = change(Path::new(DIR), mountpoint, line) {
        tracing::debug!(%error, mountpoint = %mountpoint.display(), "{DIR}/utab was not changed");
    }
}

/// Puts `line` in the place of the lines of a mountpoint.
fn change(dir: &Path, mountpoint: &Path, line: Option<&[u8]>) -> io::Result<()> {
    let path = dir.join("utab");
    if line.is_none() && !path.exists() {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    let _lock = lock(&dir.join("utab.lock"))?;
    let mut table = Vec::new();
    match File::open(&path) {
        Ok(file) if file.metadata()?.len() > TABLE_BYTES_MAX => {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(file) => {
            file.take(TABLE_BYTES_MAX).read_to_end(&mut table)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let target = [b"TARGET=", escaped(mountpoint).as_slice()].concat();
    let is_its = |line: &&[u8]| line.split(|&byte| byte == b' ').any(|field| field == target);
    let lines = table.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let mut kept = Vec::new();
    for line in lines.filter(|line| !is_its(line)).chain(line) {
        kept.extend_from_slice(line);
        kept.push(b'\n');
    }
    let aside = dir.join(format!("utab.{}", std::process::id()));
    let written = || {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&aside)?;
        file.write_all(&kept)?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        fs::rename(&aside, &path)
    };
    written().inspect_err(|_| {
        let _ = fs::remove_file(&aside);
    })
}

fn lock(path: &Path) -> io::Result<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if started.elapsed() < LOCK_WAIT => {
                std::thread::sleep(LOCK_INTERVAL);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn entry(mountpoint: &Path) -> Vec<u8> {
    [
        b"SRC=registryfs TARGET=",
        escaped(mountpoint).as_slice(),
        b" ROOT=/ OPTS=uhelper=fuse.registryfs",
    ]
    .concat()
}

/// As in the kernel's tables: blanks, control characters and backslashes as octal numbers.
fn escaped(path: &Path) -> Vec<u8> {
    let os: &OsStr = path.as_os_str();
    let escape = |&byte: &u8| match byte {
        b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
        byte => vec![byte],
    };
    os.as_bytes().iter().flat_map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_once_and_goes_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let table = || fs::read_to_string(dir.path().join("utab")).unwrap();
        let (ours, theirs) = (
            Path::new("/mnt/a b"),
            "SRC=//h/s TARGET=/mnt/a ROOT=/ OPTS=_netdev\n",
        );
        change(dir.path(), ours, None).unwrap();
        assert!(!dir.path().join("utab").exists());
        fs::write(dir.path().join("utab"), theirs).unwrap();
        for _ in 0..2 {
            change(dir.path(), ours, Some(&entry(ours))).unwrap();
            let ours = "SRC=registryfs TARGET=/mnt/a\\040b ROOT=/ OPTS=uhelper=fuse.registryfs\n";
            assert_eq!(table(), format!("{theirs}{ours}"));
        }
        change(dir.path(), ours, None).unwrap();
        assert_eq!(table(), theirs);
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn a_table_that_is_locked_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(&dir.path().join("utab.lock")).unwrap();
        let mountpoint = Path::new("/m");
        assert!(change(dir.path(), mountpoint, Some(&entry(mountpoint))).is_err());
        drop(held);
        change(dir.path(), mountpoint, Some(&entry(mountpoint))).unwrap();
    }
}
