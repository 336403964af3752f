//! Our trees in `/run/mount/utab`, the table in which libmount keeps what the kernel does not know of mounts.
//!
//! While this table is empty, umount(8) asks a mount for its type, gets that of FUSE without our subtype, and does not find
//! `umount.fuse.registryfs`. It would then fail for each tree in which the kernel serves an image: what is mounted below
//! keeps it busy. With an entry it reads the mount table of the kernel, which has the whole type. The form of an entry and
//! the order of locking and renaming are libmount's (util-linux, `libmount/src/tab_update.c`).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::helper::FS_TYPE;
use super::mountinfo;

/// The directory of the table.
const DIR: &str = "/run/mount";
/// The end of each of our entries.
const OPTIONS: &[u8] = b" OPTS=uhelper=fuse.registryfs";
/// How long others may hold the table's lock.
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// How often the lock is tried.
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// The largest table that is changed, in bytes: an entry has some hundred.
const TABLE_BYTES_MAX: u64 = 4 << 20;

/// Notes the trees that are mounted, and no others: mounts end in many ways. Without the notes only umount(8) is worse
/// off.
pub(super) fn update() {
    let updated = mountinfo::read().and_then(|mounts| {
        let ours = mounts.iter().filter(|mount| mount.fs_type == FS_TYPE);
        change(
            Path::new(DIR),
            ours.map(|mount| entry(&mount.mountpoint)).collect(),
        )
    });
    if let Err(error) = updated {
        tracing::debug!(%error, "{DIR}/utab was not changed");
    }
}

/// Puts `entries` in the place of all that are ours.
fn change(dir: &Path, entries: BTreeSet<Vec<u8>>) -> io::Result<()> {
    let path = dir.join("utab");
    if entries.is_empty() && !path.exists() {
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
    let lines = table.split(|&byte| byte == b'\n');
    let others = lines.filter(|line| !line.is_empty() && !line.ends_with(OPTIONS));
    let mut kept = Vec::new();
    for line in others.chain(entries.iter().map(Vec::as_slice)) {
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
        b" ROOT=/",
        OPTIONS,
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
        change(dir.path(), BTreeSet::new()).unwrap();
        assert!(!dir.path().join("utab").exists());
        fs::write(dir.path().join("utab"), theirs).unwrap();
        for _ in 0..2 {
            change(dir.path(), [entry(ours)].into()).unwrap();
            let ours = "SRC=registryfs TARGET=/mnt/a\\040b ROOT=/ OPTS=uhelper=fuse.registryfs\n";
            assert_eq!(table(), format!("{theirs}{ours}"));
        }
        change(dir.path(), BTreeSet::new()).unwrap();
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
        let entries = BTreeSet::from([entry(Path::new("/m"))]);
        assert!(change(dir.path(), entries.clone()).is_err());
        drop(held);
        change(dir.path(), entries).unwrap();
    }
}
