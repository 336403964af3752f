//! Where a store's daemon listens. The socket has a short path in the runtime directory, because a store's own path may
//! be longer than a socket address can hold. The store's lock file says which one, so that a client needs no
//! environment of its own to find it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Longest path of a socket on Linux, in bytes, its final NUL left out.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// How many daemons of one user are looked for.
const SOCKETS_MAX: usize = 1024;

/// The directory for sockets of this user: `/run/registryfs` for root, else below `$XDG_RUNTIME_DIR`, else below the
/// directory for temporary files. After `su` the variable still names the directory of the user before, which the
/// specification says to belong to no other.
fn runtime_dir() -> PathBuf {
    let user = nix::unistd::geteuid();
    if user.is_root() {
        return PathBuf::from("/run/registryfs");
    }
    let xdg = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let is_own = |dir: &PathBuf| fs::metadata(dir).is_ok_and(|metadata| metadata.uid() == user.as_raw());
    match xdg.filter(|dir| dir.is_absolute() && is_own(dir)) {
        Some(dir) => dir.join("registryfs"),
        None => std::env::temp_dir().join(format!("registryfs-{user}")),
    }
}

/// Makes `dir` where it is missing, and makes sure that nobody else can put a socket into it.
fn make_private_dir(dir: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(dir.display().to_string(), &error);
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(dir).map_err(failed)?;
    let own = metadata.is_dir() && metadata.uid() == nix::unistd::geteuid().as_raw();
    if !own || metadata.mode() & 0o022 != 0 {
        return Err(Error::busy(
            dir.display().to_string(),
            "not a directory that only this user can write to; set XDG_RUNTIME_DIR to one",
        ));
    }
    Ok(())
}

/// The path for the socket of the store at `cache_dir`, which exists.
pub(super) fn socket_path(cache_dir: &Path) -> Result<PathBuf> {
    let dir = runtime_dir();
    make_private_dir(&dir)?;
    let store =
        fs::canonicalize(cache_dir).map_err(|error| Error::io(cache_dir.display().to_string(), &error))?;
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

/// The sockets of all daemons of this user, those of dead ones included.
pub(super) fn all_sockets() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(runtime_dir()) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .take(SOCKETS_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = dir.path().join("fresh");
        make_private_dir(&fresh).unwrap();
        assert_eq!(fs::metadata(&fresh).unwrap().mode() & 0o777, 0o700);
        make_private_dir(&fresh).unwrap();

        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(make_private_dir(&fresh).is_err());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(make_private_dir(&link).is_err());
    }
}
