//! The helper's side: one operation on a mountpoint, in a process of its own that the daemon can kill.
//!
//! It is this same binary, started as `registryfs mount-helper MOUNTPOINT` with a socket as standard input, over which the
//! one request comes and the one answer goes back, each with descriptors where it needs some.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::statvfs;
use nix::unistd::{getegid, geteuid};
use serde::{Deserialize, Serialize};

use super::adapter::MAX_READ_BYTES;
use super::death_watch::Watch;
use super::erofs::{Attachment, Detach, ErofsDone, ErofsRequest};
use super::fusermount::{self, Fusermount};
use super::mountinfo::MountEntry;
use super::unmounting::{detach, is_dead, is_mounted, ours_at, unmount};
use super::{detached_helper, erofs_helper, fd_passing, mountinfo, unmounting, utab};
use crate::error::{Error, Result};

/// The hidden subcommand.
pub(super) const SUBCOMMAND: &str = "mount-helper";
/// The type of our mounts in the mount table.
pub(super) const FS_TYPE: &str = "fuse.registryfs";
/// How many symbolic links in a row a mountpoint may be, as for the kernel's own path walk.
const SYMLINKS_MAX: usize = 40;
/// How many dead mounts, one over the other, are removed from a mountpoint.
const DEAD_MOUNTS_MAX: usize = 16;

/// What the helper shall do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "operation", rename_all = "snake_case")]
pub(super) enum Request {
    /// Mount; the answer is [`Done::Mounted`] and carries the descriptor.
    Mount(NewMount),
    /// Set the read-ahead and see that the mount answers.
    Check {
        /// Whether the mountpoint can be walked to; else only the mount table is looked at.
        can_walk: bool,
        /// `major:minor` of the mount.
        device: String,
        /// Read-ahead in KiB.
        read_ahead_kib: u32,
    },
    /// Unmount.
    Unmount {
        /// `major:minor` of the mount that is meant: any other one stays. Without it, whichever of ours is there.
        device: Option<String>,
        /// In which way.
        how: Unmount,
    },
    /// Say whether a live mount of ours is there.
    IsMounted,
    /// Mount a connection that is attached nowhere; the answer is [`Done::MountedDetached`] and carries the descriptor of
    /// the connection and the root of the mount.
    MountDetached,
    /// End a connection, whoever uses it.
    AbortConnection {
        /// `major:minor` of its mount.
        device: String,
    },
    /// Watch the daemon, which has this connection, and end that if the daemon dies and it does not; the answer comes before.
    WatchDeath {
        /// `major:minor` of its mount.
        device: String,
    },
    /// Make, attach or read an EROFS; the answer is [`Done::Erofs`].
    Erofs(ErofsRequest),
    /// Remove attachments; the answer is [`Done::Each`].
    Detach {
        /// Which.
        attachments: Vec<Attachment>,
        /// In which way.
        how: Detach,
    },
    /// Walk to the mount that is there now, and wake who watches the mount table.
    Settle,
    /// Read of a file in the root of the mount that comes along; the answer is [`Done::Bytes`].
    Read {
        /// The file.
        name: String,
        /// Offsets and lengths in bytes.
        ranges: Vec<(u64, u32)>,
    },
}

/// What [`Request::Mount`] shall make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct NewMount {
    /// The source in the mount table.
    pub(super) source: String,
    /// Whether users other than the daemon's may enter.
    pub(super) allow_other: bool,
    /// Whether no program of it can be run.
    pub(super) no_exec: bool,
    /// Where the mountpoint is found without walking to it, which would wait for this very mount.
    pub(super) place: Option<PathBuf>,
}

/// Ways to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unmount {
    /// Only if nobody uses it.
    Idle,
    /// From the tree at once; who uses it goes on.
    Lazy,
    /// From the tree at once, and every use of it fails.
    Abort,
    /// Only if it is dead.
    Dead,
}

/// The result of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "done", rename_all = "snake_case")]
pub(super) enum Done {
    /// For [`Request::Mount`].
    Mounted {
        /// The canonical mountpoint.
        mountpoint: Vec<u8>,
        /// `major:minor`.
        device: String,
    },
    /// For [`Request::IsMounted`].
    Live {
        /// The answer.
        live: bool,
    },
    /// For [`Request::MountDetached`].
    MountedDetached {
        /// `major:minor`.
        device: String,
    },
    /// For [`Request::Erofs`].
    Erofs(ErofsDone),
    /// For [`Request::Read`]: what each read gave, an errno where it failed.
    Bytes {
        /// The results.
        results: Vec<Result<Vec<u8>, i32>>,
    },
    /// For [`Request::Detach`]: one for each attachment.
    Each {
        /// The results.
        results: Vec<Result<()>>,
    },
    /// For the others.
    Ok,
}

/// What goes over the socket.
pub(super) type Reply = Result<Done>;

/// Runs the helper if this process was started as one: its exit code. To be called before anything else in `main`.
#[must_use]
pub fn helper_main_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    (arguments.next()? == SUBCOMMAND).then(|| {
        let arguments: Vec<_> = arguments.collect();
        match run(&arguments) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        }
    })
}

/// Does what is asked and sends the answer; fails if nobody is there to take it.
fn run(arguments: &[OsString]) -> io::Result<()> {
    let [mountpoint] = arguments else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let path = Path::new(mountpoint);
    let asked = fd_passing::receive_message(io::stdin(), || Ok(()))?;
    let request: Request = serde_json::from_slice(&asked.bytes)?;
    let mut watch = None;
    let (reply, fds) = match serve(path, request, asked.fds, &mut watch) {
        Ok((done, fds)) => (Ok(done), fds),
        Err(error) => (Err(error), Vec::new()),
    };
    let reply: Reply = reply;
    let message = serde_json::to_vec(&reply)?;
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let sent = fd_passing::send_message(io::stdin(), &message, &borrowed);
    if sent.is_err() {
        // The daemon is gone, and nobody else will ever serve this mount, or keep account of it.
        match &reply {
            Ok(Done::Mounted { mountpoint, device }) => {
                let mountpoint = PathBuf::from(OsString::from_vec(mountpoint.clone()));
                unmount(&mountpoint, Some(device), Unmount::Lazy).map_err(io::Error::other)?;
            }
            Ok(Done::Erofs(ErofsDone {
                attachment: Some(attachment),
                ..
            })) => {
                let results = erofs_helper::detach_all(std::slice::from_ref(attachment), Detach::Lazy);
                results.map_err(io::Error::other)?;
            }
            _ => {}
        }
    }
    sent?;
    watch.map_or(Ok(()), Watch::keep)
}

/// What is asked, done, and the descriptors that go back. `watch` is set to what is to be kept after the answer.
fn serve(
    path: &Path,
    request: Request,
    fds: Vec<OwnedFd>,
    watch: &mut Option<Watch>,
) -> Result<(Done, Vec<OwnedFd>)> {
    let alone = |done: Done| (done, Vec::new());
    match request {
        Request::Mount(new) => mount_at(path, &new).map(|(done, device)| (done, vec![device])),
        Request::Check {
            can_walk,
            device,
            read_ahead_kib,
        } => check(path, can_walk, &device, read_ahead_kib).map(alone),
        Request::Unmount { device, how } => unmount(path, device.as_deref(), how).map(alone),
        Request::IsMounted => is_mounted(path).map(alone),
        Request::MountDetached => detached_helper::mount(),
        Request::AbortConnection { device } => detached_helper::abort(&device).map(|()| alone(Done::Ok)),
        Request::WatchDeath { device } => {
            *watch = Some(Watch::of(&device)?);
            Ok(alone(Done::Ok))
        }
        Request::Erofs(request) => erofs_helper::serve(path, request, fds),
        Request::Detach { attachments, how } => {
            erofs_helper::detach_all(&attachments, how).map(|results| alone(Done::Each { results }))
        }
        Request::Read { name, ranges } => {
            erofs_helper::read(&name, &ranges, fds).map(|results| alone(Done::Bytes { results }))
        }
        Request::Settle => erofs_helper::settle(path).map(|()| alone(Done::Ok)),
    }
}

/// Where a mount shall be made, as [`resolve`] spells it. A place inside a mount of ours is refused before anything is
/// looked at: the new mount would keep the old one busy, and hang with its daemon.
///
/// # Errors
/// [`Error::Usage`] with the remedy where nothing can be mounted there; [`Error::Io`].
pub fn resolve_new_mountpoint(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path)
        .map_err(|error| Error::io(format!("the mountpoint {}", path.display()), &error))?;
    refuse_inside_ours(&absolute)?;
    let mountpoint = resolve(&absolute)?;
    // A symbolic link may have led into one.
    refuse_inside_ours(&mountpoint)?;
    Ok(mountpoint)
}

fn refuse_inside_ours(path: &Path) -> Result<()> {
    let enclosing = |is_ours: fn(&MountEntry) -> bool| {
        mountinfo::enclosing(path, is_ours).map_err(|error| mountinfo::unreadable(&error))
    };
    let is_fuse = |mount: &MountEntry| mount.fs_type == FS_TYPE;
    // Whether an EROFS is ours is asked of itself, and the way to it must not lead through a connection of this process.
    let found = match enclosing(is_fuse)? {
        None => enclosing(unmounting::is_ours)?,
        found => found,
    };
    match found {
        Some(mount) => Err(Error::usage(format!(
            "the mountpoint {} lies inside the registryfs at {}; mount outside of it",
            path.display(),
            mount.display()
        ))),
        None => Ok(()),
    }
}

/// The canonical path of a mountpoint without asking the filesystem that is mounted there: it may be dead or hang.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    let failed = |error: &io::Error| match error.raw_os_error() {
        Some(libc::ENOENT) => Error::usage(format!(
            "the mountpoint {0} does not exist; create it first: mkdir -p {0}",
            path.display()
        )),
        Some(libc::ENOTDIR) => not_a_directory(path),
        _ => Error::io(format!("the mountpoint {}", path.display()), error),
    };
    let mut place = std::path::absolute(path).map_err(|error| failed(&error))?;
    for _ in 0..SYMLINKS_MAX {
        let Some((parent, name)) = place.parent().zip(place.file_name()) else {
            // It ends in `..` or is the root: nothing mounted there needs protection from us.
            return fs::canonicalize(&place).map_err(|error| failed(&error));
        };
        let parent = fs::canonicalize(parent).map_err(|error| failed(&error))?;
        let here = parent.join(name);
        match fs::read_link(&here) {
            Ok(target) => place = parent.join(target),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(here),
            Err(error) => return Err(failed(&error)),
        }
    }
    Err(failed(&io::Error::from_raw_os_error(libc::ELOOP)))
}

fn not_a_directory(path: &Path) -> Error {
    Error::usage(format!("the mountpoint {} is not a directory", path.display()))
}

/// A failed system call, with what the user can do about it.
pub(super) fn system_error(what: impl Into<String>, errno: Errno) -> Error {
    let remedy = match errno {
        Errno::EPERM | Errno::EACCES => {
            ": root has no right to mount here (CAP_SYS_ADMIN), as in a container"
        }
        Errno::ENODEV | Errno::ENXIO => ": the kernel's FUSE module is not loaded; try: modprobe fuse",
        _ => "",
    };
    Error::Io {
        what: what.into(),
        errno: errno as i32,
        why: format!("{}{remedy}", errno.desc()),
    }
}

/// A failed open of /dev/fuse.
pub(super) fn device_error(error: &io::Error) -> Error {
    let what = "cannot open /dev/fuse";
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        Errno::ENOENT => Error::Io {
            what: what.to_owned(),
            errno: libc::ENOENT,
            why: "it is missing; try: modprobe fuse, or pass the device into the container".to_owned(),
        },
        errno => system_error(what, errno),
    }
}

/// Mounts, after removing what a killed daemon left behind.
fn mount_at(path: &Path, new: &NewMount) -> Result<(Done, OwnedFd)> {
    let mountpoint = match new.place {
        Some(_) => path.to_owned(),
        None => resolve_new_mountpoint(path)?,
    };
    clear(&mountpoint)?;
    let place = new.place.as_ref().unwrap_or(&mountpoint);
    let metadata = fs::metadata(place)
        .map_err(|error| Error::io(format!("the mountpoint {}", mountpoint.display()), &error))?;
    if !metadata.is_dir() {
        return Err(not_a_directory(&mountpoint));
    }
    let device = mounted_descriptor(place, new)?;
    match ours_at(&mountpoint) {
        Ok(Some(entry)) => {
            if geteuid().is_root() {
                utab::update();
            }
            let done = Done::Mounted {
                mountpoint: mountpoint.into_os_string().into_vec(),
                device: entry.device,
            };
            Ok((done, device))
        }
        // What lies on top now is not ours to unmount; closing the descriptor ends ours below it.
        Ok(None) => {
            let what = mountpoint.display().to_string();
            Err(Error::busy(what, "something else was mounted over it at once"))
        }
        Err(error) => {
            detach(&mountpoint, None)?;
            Err(error)
        }
    }
}

/// Removes what killed daemons left at a canonical path. What is served there, or goes on without a daemon, stays, and is
/// the error.
pub(super) fn clear(mountpoint: &Path) -> Result<()> {
    for _ in 0..DEAD_MOUNTS_MAX {
        if ours_at(mountpoint)?.is_none() {
            break;
        }
        if !is_dead(mountpoint) {
            let what = mountpoint.display().to_string();
            return Err(Error::busy(
                what,
                "registryfs is already mounted there; unmount it first: registryfs umount",
            ));
        }
        detach(mountpoint, None)?;
    }
    Ok(())
}

/// The options that the kernel takes from everyone. Without `default_permissions` whoever may enter may read everything,
/// whatever the modes say: right where that is one user alone, who could as well have pulled the image.
fn options(allow_other: bool) -> String {
    let enforced = if enforces_permissions(allow_other) {
        ",default_permissions"
    } else {
        ""
    };
    let others = if allow_other { ",allow_other" } else { "" };
    format!("max_read={MAX_READ_BYTES}{enforced}{others}")
}

/// Whether the kernel enforces the modes of a mount that is made now: not where it belongs to an ordinary user alone.
pub(super) fn enforces_permissions(allow_other: bool) -> bool {
    allow_other || geteuid().is_root()
}

/// The descriptor of a session, mounted: for root by mount(2) itself, for others through fusermount3.
fn mounted_descriptor(mountpoint: &Path, new: &NewMount) -> Result<OwnedFd> {
    let options = options(new.allow_other);
    if !geteuid().is_root() {
        let subtype = FS_TYPE.trim_start_matches("fuse.");
        let no_exec = if new.no_exec { "noexec," } else { "" };
        let source = fusermount::escaped(&new.source);
        let options = format!("ro,nosuid,nodev,noatime,{no_exec}fsname={source},subtype={subtype},{options}");
        return Fusermount::find()?.mount(mountpoint, &options);
    }
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|error| device_error(&error))?;
    let options = format!(
        "fd={},rootmode=40000,user_id={},group_id={},{options}",
        device.as_raw_fd(),
        geteuid(),
        getegid(),
    );
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_NOEXEC, new.no_exec);
    mount(
        Some(new.source.as_str()),
        mountpoint,
        Some(FS_TYPE),
        flags,
        Some(options.as_str()),
    )
    .map_err(|errno| system_error(format!("cannot mount on {}", mountpoint.display()), errno))?;
    Ok(device.into())
}

/// Sees that a new mount is the one on top, and that it answers.
fn check(mountpoint: &Path, can_walk: bool, device: &str, read_ahead_kib: u32) -> Reply {
    let read_ahead = format!("/sys/class/bdi/{device}/read_ahead_kb");
    // Without it reads are smaller, and no worse. In a container /sys is often read-only.
    let _ = fs::write(read_ahead, read_ahead_kib.to_string());
    if can_walk {
        answers(mountpoint)?;
    }
    match ours_at(mountpoint)? {
        Some(entry) if entry.device == device => Ok(Done::Ok),
        _ => Err(Error::busy(
            mountpoint.display().to_string(),
            "it was unmounted, or mounted over, at once",
        )),
    }
}

/// Sees that a mount answers. An error that the filesystem itself answers to the listing is an answer too: a registry
/// that is down now may be up when someone looks.
pub(super) fn answers(mountpoint: &Path) -> Result<()> {
    let silent = |error: &io::Error| Error::io(format!("{} does not answer", mountpoint.display()), error);
    fs::metadata(mountpoint).map_err(|error| silent(&error))?;
    statvfs(mountpoint).map_err(|errno| silent(&errno.into()))?;
    let listed = fs::read_dir(mountpoint).and_then(|mut entries| entries.next().transpose());
    match listed {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)) => {
            Err(silent(&error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mountpoint_is_resolved_through_links_and_dots() {
        let dir = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir_all(base.join("real/mnt")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        std::os::unix::fs::symlink("link/mnt/", base.join("mnt")).unwrap();
        std::os::unix::fs::symlink("loop", base.join("loop")).unwrap();
        let real = base.join("real/mnt");
        for spelling in ["real/mnt", "link/mnt/", "mnt", "real/./mnt/.", "real/mnt/../mnt"] {
            assert_eq!(resolve(&base.join(spelling)).unwrap(), real, "{spelling}");
        }
        assert_eq!(resolve(&base.join("real/mnt/..")).unwrap(), base.join("real"));
        let missing = resolve(&base.join("none")).unwrap_err().to_string();
        assert!(missing.contains("does not exist") && missing.contains("mkdir -p"));
        assert!(resolve(&base.join("loop")).is_err());
    }
}
