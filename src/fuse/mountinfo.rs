//! The mount table of this process, `/proc/self/mountinfo` (proc_pid_mountinfo(5)): the one way to learn about a mount
//! without touching it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::erofs::Attachment;
use crate::error::{Error, Result};

/// The table.
const PATH: &str = "/proc/self/mountinfo";
/// The type of EROFS mounts.
pub(super) const EROFS: &str = "erofs";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountEntry {
    /// Its number, which another mount may get when it is gone.
    pub(super) id: u64,
    /// The number of the mount that it is mounted on.
    pub(super) parent: u64,
    /// `major:minor` of the filesystem.
    pub(super) device: String,
    /// Where it is mounted.
    pub(super) mountpoint: PathBuf,
    /// The type, with the subtype of FUSE.
    pub(super) fs_type: String,
}

impl MountEntry {
    /// Whether it is this attachment, wherever it is by now.
    pub(super) fn is(&self, attachment: &Attachment) -> bool {
        self.id == attachment.mount_id && self.device == attachment.device && self.fs_type == EROFS
    }
}

/// All mounts of this process's namespace, a later one over an earlier one.
pub(super) fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read(PATH)?))
}

/// The error of a table that cannot be read.
pub(super) fn unreadable(error: &io::Error) -> Error {
    Error::io(PATH, error)
}

/// The mount that a path walk to `mountpoint` ends on, if one is mounted there.
pub(super) fn top_at(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    let mounts = read()?;
    Ok(top_of(&mounts, mountpoint).cloned())
}

/// As [`top_at`], in a table that was read.
pub(super) fn top_of<'a>(mounts: &'a [MountEntry], mountpoint: &Path) -> Option<&'a MountEntry> {
    let here = || mounts.iter().filter(|mount| mount.mountpoint == mountpoint);
    // The order in the table is not that of mounting: a mount has its number before it has its place.
    here()
        .rfind(|mount| !here().any(|other| other.parent == mount.id && other.id != mount.id))
        .or_else(|| here().next_back())
}

/// The mounts on and below a mount, those that others are mounted on behind these.
pub(super) fn below(mounts: &[MountEntry], id: u64) -> Vec<&MountEntry> {
    let mut children: HashMap<u64, Vec<&MountEntry>> = HashMap::new();
    for mount in mounts.iter().filter(|mount| mount.id != mount.parent) {
        children.entry(mount.parent).or_default().push(mount);
    }
    let mut found = Vec::new();
    let mut open = vec![id];
    // Each is taken out of the map once, so this ends in any table.
    while let Some(parent) = open.pop() {
        let children = children.remove(&parent).unwrap_or_default();
        open.extend(children.iter().map(|child| child.id));
        found.extend(children);
    }
    found.reverse();
    found
}

/// Whether a path walk to where this mount is ends on it: nothing is mounted over it or over a directory on the way.
pub(super) fn is_reachable(mounts: &[MountEntry], mount: &MountEntry) -> bool {
    let covers = |by: &MountEntry, id: u64, path: &Path| {
        by.parent == id && by.id != id && path.starts_with(&by.mountpoint)
    };
    if mounts.iter().any(|by| covers(by, mount.id, &mount.mountpoint)) {
        return false;
    }
    let mut child = mount;
    // A chain of parents is not longer than the table.
    for _ in mounts {
        let Some(parent) = mounts.iter().find(|parent| parent.id == child.parent) else {
            return true;
        };
        if parent.id == child.id {
            return true;
        }
        if mounts
            .iter()
            .any(|by| by.id != child.id && covers(by, parent.id, &child.mountpoint))
        {
            return false;
        }
        child = parent;
    }
    false
}

/// The innermost mount that `is_meant` that `path`, which is absolute, lies inside of, by its spelling alone. A mount at
/// `path` itself does not count.
pub(super) fn enclosing(path: &Path, is_meant: impl Fn(&MountEntry) -> bool) -> io::Result<Option<PathBuf>> {
    Ok(enclosing_of(&read()?, path, is_meant))
}

fn enclosing_of(
    mounts: &[MountEntry],
    path: &Path,
    is_meant: impl Fn(&MountEntry) -> bool,
) -> Option<PathBuf> {
    path.ancestors().skip(1).find_map(|ancestor| {
        let top = top_of(mounts, ancestor)?;
        is_meant(top).then(|| ancestor.to_owned())
    })
}

/// Where each of these attachments is now; nowhere if it is gone, whoever took it. Nothing is touched but the table.
///
/// # Errors
/// [`Error::Io`] where the table cannot be read.
pub fn mounted(attachments: &[Attachment]) -> Result<Vec<Option<PathBuf>>> {
    let mounts = read().map_err(|error| unreadable(&error))?;
    let by_id: HashMap<u64, &MountEntry> = mounts.iter().map(|mount| (mount.id, mount)).collect();
    let place = |attachment: &Attachment| {
        let mount = by_id.get(&attachment.mount_id)?;
        mount.is(attachment).then(|| mount.mountpoint.clone())
    };
    Ok(attachments.iter().map(place).collect())
}

/// Tells when something was mounted, unmounted or moved in this process's namespace.
#[derive(Debug)]
pub struct MountTableWatch(File);

impl MountTableWatch {
    /// Watches from now on.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new() -> Result<Self> {
        File::open(PATH).map(Self).map_err(|error| unreadable(&error))
    }

    /// Waits for a change since the last call, at most for `limit`: whether there was one. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        // A change is shown as an error and as priority data, whatever is asked for (proc_pid_mounts(5)).
        let mut watched = [PollFd::new(self.0.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut watched, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(unreadable(&errno.into())),
        }
    }
}

/// Lines that do not parse are left out: a newer kernel may add kinds of lines, and no mount of ours looks like that.
fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
    let id = text(fields.next()?)?.parse().ok()?;
    let parent = text(fields.next()?)?.parse().ok()?;
    let device = text(fields.next()?)?;
    let mountpoint = fields.nth(1)?;
    // Optional fields follow, up to a lone dash.
    fields.find(|field| field == b"-")?;
    Some(MountEntry {
        id,
        parent,
        device,
        mountpoint: PathBuf::from(OsString::from_vec(unescape(mountpoint))),
        fs_type: text(fields.next()?)?,
    })
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_with_and_without_optional_fields_parse() {
        let text = b"22 28 0:20 / /sys rw,nosuid shared:7 master:1 - sysfs sysfs rw\n\
                     garbage\n\
                     41 28 0:53 / /mnt/a\\040b,c\\134d ro - fuse.registryfs registryfs ro,user_id=0\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].fs_type, "sysfs");
        assert_eq!(
            mounts[1],
            MountEntry {
                id: 41,
                parent: 28,
                device: "0:53".into(),
                mountpoint: "/mnt/a b,c\\d".into(),
                fs_type: "fuse.registryfs".into(),
            }
        );
    }

    #[test]
    fn the_mount_around_a_path_is_found_by_its_spelling() {
        let mounts = parse(
            b"1 0 0:1 / / rw - ext4 none rw\n\
              2 1 0:2 / /m rw - fuse.ours none rw\n\
              3 2 0:3 / /m/inner rw - tmpfs none rw\n\
              4 1 0:4 / /over rw - fuse.ours none rw\n\
              5 4 0:5 / /over rw - tmpfs none rw\n",
        );
        let around = |path: &str| enclosing_of(&mounts, Path::new(path), |top| top.fs_type == "fuse.ours");
        assert_eq!(around("/m/host"), Some("/m".into()));
        assert_eq!(
            around("/m/inner/x"),
            Some("/m".into()),
            "the way there leads through it"
        );
        for outside in ["/m", "/mm/x", "/over/x", "/"] {
            assert_eq!(around(outside), None, "{outside}");
        }
    }

    /// Mount 4 covers 3, and is before it in the table; 6 hides 5 by covering the directory above it.
    fn covered() -> Vec<MountEntry> {
        parse(
            b"1 1 0:1 / / rw - ext4 none rw\n\
              2 1 0:2 / /m rw - fuse.ours none rw\n\
              4 3 0:4 / /m/a rw - tmpfs none rw\n\
              3 2 0:3 / /m/a rw - erofs none rw\n\
              5 2 0:3 / /m/b/c rw - erofs none rw\n\
              6 2 0:5 / /m/b rw - tmpfs none rw\n\
              7 1 0:6 / /mm rw - tmpfs none rw\n",
        )
    }

    #[test]
    fn the_top_of_a_place_and_what_hides_a_mount_follow_from_the_parents() {
        let mounts = covered();
        let top = |path: &str| top_of(&mounts, Path::new(path)).map(|mount| mount.id);
        assert_eq!((top("/m/a"), top("/m"), top("/x")), (Some(4), Some(2), None));
        let reachable: Vec<u64> = mounts
            .iter()
            .filter(|mount| is_reachable(&mounts, mount))
            .map(|mount| mount.id)
            .collect();
        assert_eq!(reachable, [1, 2, 4, 6, 7]);
    }

    #[test]
    fn what_is_below_a_mount_comes_leaves_first() {
        let mounts = covered();
        let below: Vec<u64> = below(&mounts, 2).iter().map(|mount| mount.id).collect();
        assert_eq!(below.len(), 4);
        let place = |id| below.iter().position(|&other| other == id).unwrap();
        assert!(place(4) < place(3));
        assert!(super::below(&mounts, 7).is_empty());
    }

    #[test]
    fn the_own_table_has_a_root() {
        assert!(top_at(Path::new("/proc")).unwrap().is_some());
        assert!(top_at(Path::new("/proc/nothing")).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn any_path_survives_the_kernels_escaping(path in proptest::collection::vec(1u8.., 1..40)) {
            let escaped: Vec<u8> = path
                .iter()
                .flat_map(|&byte| match byte {
                    b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                    _ => vec![byte],
                })
                .collect();
            let line = [b"1 2 0:3 / ", &escaped[..], b" rw - tmpfs none rw"].concat();
            let mounts = parse(&line);
            prop_assert_eq!(mounts.len(), 1);
            prop_assert_eq!(mounts[0].mountpoint.as_os_str(), OsStr::from_bytes(&path));
        }
    }
}
