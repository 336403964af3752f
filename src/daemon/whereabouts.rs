//! Where a store's daemon listens. The socket has a short path in the runtime directory, because a store's own path may
//! be longer than a socket address can hold; a file in the store says which one, so a client needs no environment of
//! its own to find it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Name of the file in the store.
const FILE_NAME: &str = "daemon.json";
/// Largest such file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Longest path of a socket on Linux, in bytes, its final NUL left out.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Who serves a store, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Whereabouts {
    /// The daemon's process.
    pub(super) pid: u32,
    /// Its socket.
    pub(super) socket: PathBuf,
}

impl Whereabouts {
    /// What the store at `cache_dir` says, which may be about a daemon that is gone. Unreadable content counts as
    /// absent: the lock, not this file, decides who owns the store.
    pub(super) fn read(cache_dir: &Path) -> Option<Self> {
        let file = cache_dir.join(FILE_NAME);
        let text = (fs::metadata(&file).ok()?.len() <= FILE_BYTES_MAX).then(|| fs::read(&file).ok())??;
        serde_json::from_slice(&text).ok()
    }

    /// Tells everyone, at once or not at all.
    pub(super) fn publish(&self, cache_dir: &Path) -> Result<()> {
        let file = cache_dir.join(FILE_NAME);
        let failed = |error: io::Error| Error::io(file.display().to_string(), &error);
        let draft = cache_dir.join(format!("{FILE_NAME}.new"));
        let text = serde_json::to_vec(self).map_err(io::Error::other).map_err(failed)?;
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)
            .map_err(failed)?;
        out.write_all(&text).map_err(failed)?;
        fs::rename(&draft, &file).map_err(failed)
    }

    /// Takes file and socket away; whoever still holds the lock calls this.
    pub(super) fn withdraw(&self, cache_dir: &Path) {
        for path in [&cache_dir.join(FILE_NAME), &self.socket] {
            if let Err(error) = fs::remove_file(path) {
                tracing::debug!(path = %path.display(), %error, "not removed");
            }
        }
    }
}

/// The directory for sockets of this user: `/run/registryfs` for root, else below `$XDG_RUNTIME_DIR`, else below the
/// directory for temporary files.
fn runtime_dir() -> PathBuf {
    let user = nix::unistd::geteuid();
    let xdg = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match xdg.filter(|dir| dir.is_absolute()) {
        _ if user.is_root() => PathBuf::from("/run/registryfs"),
        Some(dir) => dir.join("registryfs"),
        None => std::env::temp_dir().join(format!("registryfs-{user}")),
    }
}

/// The path for the socket of the store at `cache_dir`, in a directory that is made where it is missing and is
/// certainly this user's alone.
pub(super) fn socket_path(cache_dir: &Path) -> Result<PathBuf> {
    let dir = runtime_dir();
    let failed = |error: io::Error| Error::io(dir.display().to_string(), &error);
    match fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(&dir).map_err(failed)?;
    let owned = metadata.is_dir() && metadata.uid() == nix::unistd::geteuid().as_raw();
    if !owned || metadata.mode() & 0o022 != 0 {
        return Err(Error::busy(
            dir.display().to_string(),
            "is not a directory that only this user can write to",
        ));
    }
    let store = fs::canonicalize(cache_dir)
        .map_err(|error| Error::io(cache_dir.display().to_string(), &error))?;
    let hash = Digest::of(store.as_os_str().as_encoded_bytes()).hex();
    let socket = dir.join(format!("{}.sock", hash.get(..16).unwrap_or(&hash)));
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(Error::usage(format!(
            "{}: longer than a socket's path can be; set XDG_RUNTIME_DIR to a shorter directory",
            socket.display()
        )));
    }
    Ok(socket)
}

/// The sockets of all daemons of this user, dead ones included.
pub(super) fn all_sockets() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(runtime_dir()) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_published_is_found_until_it_is_withdrawn() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Whereabouts::read(dir.path()), None);
        let here = Whereabouts {
            pid: 7,
            socket: dir.path().join("s"),
        };
        here.publish(dir.path()).unwrap();
        assert_eq!(Whereabouts::read(dir.path()), Some(here.clone()));
        fs::write(dir.path().join(FILE_NAME), "{").unwrap();
        assert_eq!(Whereabouts::read(dir.path()), None);
        here.publish(dir.path()).unwrap();
        here.withdraw(dir.path());
        assert_eq!(Whereabouts::read(dir.path()), None);
    }
}
