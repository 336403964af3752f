//! The mount table of this process, `/proc/self/mountinfo` (proc_pid_mountinfo(5)): the one way to learn about a mount
//! without touching it.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountEntry {
    /// `major:minor` of the filesystem.
    pub(super) device: String,
    /// Where it is mounted.
    pub(super) mountpoint: PathBuf,
    /// The type, with the subtype of FUSE.
    pub(super) fs_type: String,
}

/// All mounts of this process's namespace, a later one over an earlier one.
pub(super) fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mount that a path walk to `mountpoint` ends on, if one is mounted there.
pub(super) fn top_at(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    let mounts = read()?;
    Ok(mounts.into_iter().rfind(|mount| mount.mountpoint == mountpoint))
}

/// The innermost mount of this type that `path`, which is absolute, lies inside of, by its spelling alone. A mount at
/// `path` itself does not count.
pub(super) fn enclosing(path: &Path, fs_type: &str) -> io::Result<Option<PathBuf>> {
    Ok(enclosing_of(&read()?, path, fs_type))
}

fn enclosing_of(mounts: &[MountEntry], path: &Path, fs_type: &str) -> Option<PathBuf> {
    path.ancestors().skip(1).find_map(|ancestor| {
        let top = mounts.iter().rfind(|mount| mount.mountpoint == ancestor)?;
        (top.fs_type == fs_type).then(|| ancestor.to_owned())
    })
}

/// Lines that do not parse are left out: a newer kernel may add kinds of lines, and no mount of ours looks like that.
fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    // Optional fields follow, up to a lone dash.
    fields.find(|field| field == b"-")?;
    let fs_type = fields.next()?;
    Some(MountEntry {
        device: String::from_utf8(device.to_vec()).ok()?,
        mountpoint: PathBuf::from(OsString::from_vec(unescape(mountpoint))),
        fs_type: String::from_utf8(fs_type.to_vec()).ok()?,
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
        let around = |path: &str| enclosing_of(&mounts, Path::new(path), "fuse.ours");
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
