//! Mounting where autofs waits for it. A systemd automount unit puts an autofs over the directory, and the first access
//! makes systemd run mount(8). Until that has ended, everybody who walks to the directory waits, but for the processes of
//! systemd's own process group, to which mount(8) and the `mount` command that it runs belong, and the daemon does not
//! (autofs(5), "oz_mode"). So the command opens the directory, which the daemon then reaches through /proc without a walk,
//! and looks afterwards whether the mount answers, which the daemon's helper could not do either.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::helper::{Unmount, answers, resolve};
use super::mountinfo::MountEntry;
use super::{mountinfo, unmounting};
use crate::error::{Error, Result};

/// The type of these mounts in the mount table.
const FS_TYPE: &str = "autofs";

/// A directory that autofs guards, held open.
#[derive(Debug)]
pub struct Guarded {
    mountpoint: PathBuf,
    directory: File,
}

impl Guarded {
    /// The directory at `mountpoint`, if autofs guards it. It is not entered.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn at(mountpoint: &Path) -> Result<Option<Self>> {
        let top = mountinfo::top_at(mountpoint).map_err(|error| Error::io("/proc/self/mountinfo", &error))?;
        if top.is_none_or(|mount| mount.fs_type != FS_TYPE) {
            return Ok(None);
        }
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(mountpoint)
            .map_err(|error| Error::io(format!("the mountpoint {}", mountpoint.display()), &error))?;
        Ok(Some(Self {
            mountpoint: mountpoint.to_owned(),
            directory,
        }))
    }

    /// Where every process that may look into this one finds the directory, for as long as it is held.
    #[must_use]
    pub fn place(&self) -> PathBuf {
        let (pid, number) = (std::process::id(), self.directory.as_raw_fd());
        PathBuf::from(format!("/proc/{pid}/fd/{number}"))
    }

    /// Sees that what was mounted over it answers; else it does not stay. Blocks.
    ///
    /// # Errors
    /// Why it does not answer.
    pub fn see_it_answers(&self) -> Result<()> {
        let result = answers(&self.mountpoint);
        if result.is_err() {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            if let Err(errno) = umount2(&self.mountpoint, flags) {
                tracing::warn!(mountpoint = %self.mountpoint.display(), %errno, "could not unmount");
            }
        }
        result
    }
}

/// Unmounts what is ours at a mountpoint that autofs guards, and says whether it does. All in this process: while autofs has
/// it expire everyone else who walks there waits for that, the helper included, in whichever way it shall unmount. Blocks.
///
/// # Errors
/// [`Error::Busy`] naming who uses it; [`Error::Usage`] where nothing of ours is mounted; [`Error::Io`].
pub fn unmount_guarded(path: &Path, how: Unmount) -> Result<bool> {
    // What is wrong with the path is said by those who unmount where nothing guards.
    let Ok(mountpoint) = resolve(path) else {
        return Ok(false);
    };
    let mounts = unmounting::read_table()?;
    let guards = |mount: &MountEntry| mount.fs_type == FS_TYPE && mount.mountpoint == mountpoint;
    if !mounts.iter().any(guards) {
        return Ok(false);
    }
    unmounting::unmount(&mountpoint, None, how).map(|_| true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_nobody_guards_is_left_to_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Guarded::at(dir.path()).unwrap().is_none());
        assert!(Guarded::at(Path::new("/proc")).unwrap().is_none());
        for how in [Unmount::Idle, Unmount::Lazy, Unmount::Abort] {
            assert!(!unmount_guarded(dir.path(), how).unwrap());
        }
    }
}
