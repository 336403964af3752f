//! EROFS mounts, made and removed by the helper: the helper's side.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};
use std::thread::sleep;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, mkdirat, open, openat, statx, symlinkat};
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::erofs::{Attach, Attachment, Detach, ErofsDone, ErofsRequest, Make};
use super::helper::{Done, clear, system_error};
use super::mountinfo::MountEntry;
use super::new_mount::{NewMount, VALUE_BYTES_MAX};
use super::unmounting::{UNMOUNT_PAUSE, UNMOUNT_TRIES, read_table};
use super::{busy, mount_attr, mountinfo};
use crate::error::{Error, Result};

/// How often a mountpoint is walked to: what lies on the way may be replaced meanwhile (ESTALE).
const WALKS: u32 = 5;
/// The pause between two of these walks.
const WALK_PAUSE: Duration = Duration::from_millis(2);
/// The source where the one that was asked for cannot be shown.
const PLAIN_SOURCE: &str = "registryfs";

/// Makes or takes the mount that `request` is about, attaches it, and returns it.
pub(super) fn serve(
    mountpoint: &Path,
    request: ErofsRequest,
    fds: Vec<OwnedFd>,
) -> Result<(Done, Vec<OwnedFd>)> {
    let mount = match &request.make {
        Some(make) => made(make, &fds)?,
        None => fds.into_iter().next().ok_or_else(too_few)?,
    };
    let attachment = match &request.attach {
        Some(attach) => Some(attached(mount.as_fd(), mountpoint, attach)?),
        None => None,
    };
    let done = ErofsDone { attachment };
    Ok((Done::Erofs(done), vec![mount]))
}

fn too_few() -> Error {
    Error::malformed("the request to the helper", "too few descriptors came along")
}

/// Where this process finds what a descriptor is open on.
fn by_descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A new superblock, with a mount of it that is attached nowhere.
fn made(make: &Make, fds: &[OwnedFd]) -> Result<OwnedFd> {
    let (image, shown_root, mut locals) = match fds {
        [image, shown_root, locals @ ..] => (image, shown_root, locals.iter()),
        _ => return Err(too_few()),
    };
    let new = NewMount::of(mountinfo::EROFS)?;
    let image = by_descriptor(image);
    let source = named_source(&make.source, &image).unwrap_or_else(|error| {
        tracing::debug!(%error, "the source cannot be shown");
        image
    });
    new.set("source", &source)?;
    for device in &make.devices {
        let path = match device {
            Some(name) => format!("{}/{name}", by_descriptor(shown_root)),
            None => by_descriptor(locals.next().ok_or_else(too_few)?),
        };
        new.set("device", &path)?;
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, make.no_exec);
    new.make(attributes).map_err(|error| match error {
        Error::Io { errno, why, .. } if errno == libc::ENOTBLK => Error::unsupported(
            "mounting erofs",
            format!("the kernel mounts none from this file: either it cannot at all (Linux 6.12 can), or the cache is on a filesystem that cannot back one, such as tmpfs: {why}"),
        ),
        error => error,
    })
}

/// A path that leads to `image` and reads as `source`, from this process's working directory: the kernel opens it and
/// shows it in the mount table. The directory is a memory file system that is attached nowhere and ends with this process.
fn named_source(source: &str, image: &str) -> Result<String> {
    let source = shown_source(source);
    let failed = |errno: rustix::io::Errno| Error::io(format!("the source {source}"), &errno.into());
    let flags = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let top = NewMount::of("tmpfs")?.make(flags)?;
    let mut names = Path::new(source).components().peekable();
    let mut dir = top.try_clone().map_err(|error| Error::io(source, &error))?;
    while let Some(name) = names.next() {
        let name: &OsStr = name.as_os_str();
        if names.peek().is_none() {
            symlinkat(image, &dir, name).map_err(failed)?;
        } else {
            mkdirat(&dir, name, Mode::RWXU).map_err(failed)?;
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            dir = openat(&dir, name, flags, Mode::empty()).map_err(failed)?;
        }
    }
    rustix::process::fchdir(&top).map_err(failed)?;
    Ok(source.to_owned())
}

/// The part of a source that can be shown: whole names up to the longest value.
fn shown_source(source: &str) -> &str {
    let is_plain = |path: &str| {
        let is_name = |part: Component<'_>| matches!(part, Component::Normal(_));
        let mut parts = Path::new(path).components();
        !path.contains(['\0', '\\']) && parts.clone().count() > 0 && parts.all(is_name)
    };
    let fits = |path: &&str| path.len() <= VALUE_BYTES_MAX;
    let ends = source.match_indices('/').map(|(slash, _)| &source[slash + 1..]);
    let shown = std::iter::once(source).chain(ends).find(fits);
    shown.filter(|path| is_plain(path)).unwrap_or(PLAIN_SOURCE)
}

/// Attaches a copy of `mount`.
fn attached(mount: BorrowedFd<'_>, mountpoint: &Path, attach: &Attach) -> Result<Attachment> {
    let failed = |errno: rustix::io::Errno| {
        Error::io(format!("cannot mount on {}", mountpoint.display()), &errno.into())
    };
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = open_tree(mount, "", flags).map_err(failed)?;
    clear(mountpoint)?;
    let place = walked_to(mountpoint, attach).map_err(failed)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(&copy, "", &place, "", flags).map_err(failed)?;
    let stat = statx(&copy, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).map_err(failed)?;
    let attachment = Attachment {
        mountpoint: mountpoint.to_owned(),
        mount_id: stat.stx_mnt_id,
        device: format!("{}:{}", stat.stx_dev_major, stat.stx_dev_minor),
    };
    let mounts = mountinfo::read().map_err(|error| mountinfo::unreadable(&error))?;
    match mounts.into_iter().find(|mount| mount.is(&attachment)) {
        Some(entry) => Ok(Attachment {
            mountpoint: entry.mountpoint,
            ..attachment
        }),
        None => Err(Error::busy(
            mountpoint.display().to_string(),
            "it was unmounted at once",
        )),
    }
}

/// Walks into a mount, and reports it as changed although it stays as it is.
pub(super) fn settle(path: &Path) -> Result<()> {
    let failed = |errno: rustix::io::Errno| Error::io(path.display().to_string(), &errno.into());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mount = open(path, flags, Mode::empty()).map_err(failed)?;
    mount_attr::set_again(mount.as_fd()).map_err(|error| Error::io(path.display().to_string(), &error))
}

/// The directory, without entering what it is or could be a mountpoint of.
fn walked_to(mountpoint: &Path, attach: &Attach) -> Result<OwnedFd, rustix::io::Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    if let Some(guarded) = &attach.guarded {
        // A link of /proc, which leads to the directory itself.
        return open(guarded, flags, Mode::empty());
    }
    let flags = flags | OFlags::NOFOLLOW | OFlags::DIRECTORY;
    let mut walks = 1;
    loop {
        match open(mountpoint, flags, Mode::empty()) {
            Err(rustix::io::Errno::STALE) if walks < WALKS => {
                walks += 1;
                sleep(WALK_PAUSE);
            }
            opened => return opened,
        }
    }
}

/// Removes attachments, each on its own.
pub(super) fn detach_all(attachments: &[Attachment], how: Detach) -> Result<Vec<Result<()>>> {
    let mut results = Vec::with_capacity(attachments.len());
    let mut mounts = read_table()?;
    for attachment in attachments {
        let found = mounts.iter().find(|mount| mount.is(attachment));
        let Some(mount) = found else {
            results.push(Ok(()));
            continue;
        };
        results.push(detach(&mounts, mount, how));
        // What is gone may have covered another one.
        if attachments.len() > 1 {
            mounts = read_table()?;
        }
    }
    Ok(results)
}

/// Removes a mount that the table has. It is not walked to before: a walk would count as a use of it.
pub(super) fn detach(mounts: &[MountEntry], mount: &MountEntry, how: Detach) -> Result<()> {
    let path = &mount.mountpoint;
    let what = || format!("cannot unmount {}", path.display());
    if !mountinfo::is_reachable(mounts, mount) {
        return Err(Error::busy(what(), "something else is mounted over it"));
    }
    let flags = match how {
        Detach::Idle | Detach::Unused => MntFlags::empty(),
        Detach::Expired => MntFlags::MNT_EXPIRE,
        Detach::Lazy => MntFlags::MNT_DETACH,
    };
    for attempt in 1.. {
        match umount2(path, flags | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::EAGAIN) => return Err(Error::busy(what(), "it was used a moment ago")),
            Err(Errno::EBUSY) if how == Detach::Idle && attempt < UNMOUNT_TRIES => sleep(UNMOUNT_PAUSE),
            Err(Errno::EBUSY) if how == Detach::Idle => {
                return Err(Error::busy(what(), busy::describe(path)));
            }
            Err(Errno::EBUSY) => return Err(Error::busy(what(), "it is in use")),
            // Somebody else was faster, or the walk there has thrown it out, because its directory is no more.
            Err(_) if !read_table()?.contains(mount) => return Ok(()),
            Err(errno) => return Err(system_error(what(), errno)),
        }
    }
    Ok(())
}

/// What reads of a file in the root of a mount give.
pub(super) fn read(
    name: &str,
    ranges: &[(u64, u32)],
    fds: Vec<OwnedFd>,
) -> Result<Vec<Result<Vec<u8>, i32>>> {
    let mount = fds.into_iter().next().ok_or_else(too_few)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(&mount, name, flags, Mode::empty()).map_err(|errno| Error::io(name, &errno.into()))?;
    let read = |&(offset, length): &(u64, u32)| {
        let mut buffer = vec![0; length as usize];
        match rustix::io::pread(&file, &mut buffer, offset) {
            Ok(read) => {
                buffer.truncate(read);
                Ok(buffer)
            }
            Err(errno) => Err(errno.raw_os_error()),
        }
    };
    Ok(ranges.iter().map(read).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_shown_as_far_as_it_can_be() {
        assert_eq!(
            shown_source("docker.io/library/debian:12"),
            "docker.io/library/debian:12"
        );
        for odd in ["", "/", "/a/b", "a/../b", "..", "a\0b", "a\\b"] {
            assert_eq!(shown_source(odd), PLAIN_SOURCE, "{odd:?}");
        }
        let long = format!("{}/{}:12", "a/".repeat(200), "b".repeat(90));
        let shown = shown_source(&long);
        assert!(long.ends_with(shown) && shown.len() <= VALUE_BYTES_MAX && shown.len() > 200);
        assert_eq!(shown_source(&"x".repeat(300)), PLAIN_SOURCE);
    }
}
