//! Who keeps a mount busy, found by the links and texts in `/proc` alone: nothing below the mount is touched.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::mountinfo;

/// How many are named; more would not fit on a screen.
const NAMED_MAX: usize = 5;

/// One sentence that names who uses the mount.
pub(super) fn describe(mountpoint: &Path) -> String {
    let mut holders = mounts_below(mountpoint);
    holders.extend(processes(mountpoint));
    if holders.is_empty() {
        return "a request on it is still waiting, or something uses it that is not visible from here"
            .to_owned();
    }
    let more = holders.len().saturating_sub(NAMED_MAX);
    holders.truncate(NAMED_MAX);
    if more > 0 {
        holders.push(format!("and {more} more"));
    }
    holders.join("; ")
}

fn mounts_below(mountpoint: &Path) -> Vec<String> {
    let mounts = mountinfo::read().unwrap_or_default();
    mounts
        .iter()
        .filter(|mount| mount.mountpoint != mountpoint && mount.mountpoint.starts_with(mountpoint))
        .map(|mount| format!("a {} is mounted on {}", mount.fs_type, mount.mountpoint.display()))
        .collect()
}

fn processes(mountpoint: &Path) -> Vec<String> {
    let myself = std::process::id();
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != myself)
        .collect();
    pids.sort_unstable();
    pids.into_iter()
        .filter_map(|pid| {
            let uses = use_by(&PathBuf::from(format!("/proc/{pid}")), mountpoint)?;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Some(format!("pid {pid} ({}) {uses}", name.trim_end()))
        })
        .collect()
}

/// How one process uses the mount, the most telling way first.
fn use_by(process: &Path, mountpoint: &Path) -> Option<String> {
    let below = |link: PathBuf| {
        fs::read_link(link)
            .ok()
            .filter(|path| path.starts_with(mountpoint))
    };
    if let Some(path) = below(process.join("cwd")) {
        return Some(format!("has its working directory in it ({})", path.display()));
    }
    if let Some(path) = below(process.join("root")) {
        return Some(format!("has its root directory in it ({})", path.display()));
    }
    if let Some(path) = below(process.join("exe")) {
        return Some(format!("runs {}", path.display()));
    }
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    if let Some(path) = descriptors.into_iter().find_map(|entry| below(entry.path())) {
        return Some(format!("has {} open", path.display()));
    }
    let maps = fs::read(process.join("maps")).unwrap_or_default();
    mapped_below(&maps, mountpoint).map(|path| format!("has {} mapped", path.display()))
}

/// The first mapped file below the mount (proc_pid_maps(5): the path is the rest of the line behind five fields).
fn mapped_below(maps: &[u8], mountpoint: &Path) -> Option<PathBuf> {
    maps.split(|&byte| byte == b'\n').find_map(|line| {
        let start = line.iter().position(|&byte| byte == b'/')?;
        let path = Path::new(std::ffi::OsStr::from_bytes(line.get(start..)?));
        path.starts_with(mountpoint).then(|| path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_file_is_found_by_its_whole_path() {
        let maps = b"7f00-7f01 r-xp 00000000 00:35 7                          /mnt/ab/lib.so\n\
                     7f02-7f03 rw-p 00000000 00:00 0 \n\
                     7f04-7f05 r-xp 00000000 00:35 9                          /mnt/a/x y.so\n";
        assert_eq!(
            mapped_below(maps, Path::new("/mnt/a")),
            Some("/mnt/a/x y.so".into())
        );
        assert_eq!(mapped_below(maps, Path::new("/mnt/b")), None);
    }

    #[test]
    fn a_process_is_named_by_its_working_directory() {
        let cwd = std::env::current_dir().unwrap();
        let found = use_by(Path::new("/proc/self"), &cwd).unwrap();
        assert!(found.contains("working directory") && found.contains(&*cwd.to_string_lossy()));
        assert_eq!(use_by(Path::new("/proc/self"), Path::new("/nowhere")), None);
    }
}
