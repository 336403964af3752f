//! The directories in which other tools keep what they were told of registries: containerd's `certs.d` with a
//! `hosts.toml`, docker's and podman's `certs.d` with certificates. All have one directory a host, so all are searched
//! alike: of the `hosts.toml` the first counts, certificates add up.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::super::reference::DEFAULT_HOST;
use super::file::HostsFile;
use super::settings::{ClientCertificate, PemFile, Settings};
use crate::error::{Error, Result};

/// The directory that stands for every host without one of its own.
const FALLBACK: &str = "_default";
/// The file in it that names mirrors.
const FILE: &str = "hosts.toml";
/// Entries of one directory that are looked at.
const ENTRIES_MAX: usize = 1024;

/// The names under which the directory of `host` is looked for, in containerd's order.
fn spellings(host: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((name, port)) = host.rsplit_once(':').filter(|(name, _)| !name.is_empty()) {
        names.push(format!("{name}_{port}_"));
    }
    names.push(host.to_owned());
    names
}

/// The directories of `host`, by the names in `names`: of each root the first that is there.
fn directories<'a>(
    roots: &'a [PathBuf],
    names: &'a [String],
) -> impl Iterator<Item = (&'a Path, Option<PathBuf>)> {
    roots.iter().map(|root| {
        let mut below = names.iter().map(|name| root.join(name));
        (root.as_path(), below.find(|dir| dir.is_dir()))
    })
}

/// The `hosts.toml` for `host` and where it is: of the first root that has one for it, else of the first whose
/// `_default` has one and that has no directory for it.
///
/// # Errors
/// [`Error::Usage`] for a file that cannot be read or understood.
pub(super) fn hosts_file(roots: &[PathBuf], host: &str) -> Result<Option<(PathBuf, HostsFile)>> {
    let read = |dir: PathBuf| {
        let path = dir.join(FILE);
        let file = HostsFile::read(&path)?;
        Ok::<_, Error>(file.map(|file| (path, file)))
    };
    let names = spellings(host);
    let mut without = Vec::new();
    for (root, dir) in directories(roots, &names) {
        match dir {
            None => without.push(root),
            Some(dir) => {
                if let Some(found) = read(dir)? {
                    return Ok(Some(found));
                }
            }
        }
    }
    for root in without {
        if let Some(found) = read(root.join(FALLBACK))? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The certificates for `host`: `*.crt` are authorities, `*.cert` with `*.key` are ours.
///
/// # Errors
/// [`Error::Usage`] for files that cannot be read, and for one of a pair without the other.
pub(super) fn certificates(roots: &[PathBuf], host: &str) -> Result<Settings> {
    let mut names = spellings(host);
    if host == DEFAULT_HOST {
        names.extend(["registry-1.docker.io", "index.docker.io"].map(str::to_owned));
    }
    let mut found = Settings::default();
    for (root, dir) in directories(roots, &names) {
        let dir = dir.unwrap_or_else(|| root.join(FALLBACK));
        // Beside a hosts.toml, as in containerd, only the files that it names count.
        if !dir.join(FILE).exists() {
            found = found.over(certificates_in(&dir)?);
        }
    }
    Ok(found)
}

fn certificates_in(dir: &Path) -> Result<Settings> {
    let unreadable =
        |error: std::io::Error| Error::usage(format!("{}: cannot be read: {error}", dir.display()));
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Settings::default());
        }
        Err(error) => return Err(unreadable(error)),
    };
    let mut files = Vec::new();
    for entry in entries.take(ENTRIES_MAX) {
        files.push(entry.map_err(unreadable)?.path());
    }
    files.sort();
    let mut found = Settings::default();
    for path in &files {
        match path.extension().and_then(OsStr::to_str) {
            Some("crt") => found.ca.push(PemFile::read(path)?),
            Some("cert") => {
                let key = path.with_extension("key");
                if !files.contains(&key) {
                    return Err(lonely(path, &key));
                }
                found.client.push(ClientCertificate::read(path, Some(&key))?);
            }
            Some("key") => {
                let certificate = path.with_extension("cert");
                if !files.contains(&certificate) {
                    return Err(lonely(path, &certificate));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

fn lonely(path: &Path, other: &Path) -> Error {
    let (path, other) = (path.display(), other.display());
    Error::usage(format!(
        "{path}: {other} is missing; a client certificate (.cert) and its key (.key) go together, an authority is a .crt"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_with_a_port_has_two_spellings() {
        assert_eq!(spellings("a.example:5000"), ["a.example_5000_", "a.example:5000"]);
        assert_eq!(spellings("a.example"), ["a.example"]);
        assert_eq!(spellings("[::1]:5000"), ["[::1]_5000_", "[::1]:5000"]);
    }

    #[test]
    fn the_first_file_counts_and_the_fallback_only_where_no_directory_is() {
        let dir = tempfile::tempdir().unwrap();
        let roots = [dir.path().join("a"), dir.path().join("b")];
        let put = |path: &str, server: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("server = {server:?}\n")).unwrap();
        };
        let server = |host: &str| {
            let found = hosts_file(&roots, host).unwrap();
            found.and_then(|(_, file)| file.server).map(|base| base.host)
        };
        assert_eq!(server("x.example:1"), None);
        put("a/_default/hosts.toml", "default-a.example");
        put("b/_default/hosts.toml", "default-b.example");
        assert_eq!(server("x.example:1").as_deref(), Some("default-a.example"));
        put("b/x.example:1/hosts.toml", "own-b.example");
        assert_eq!(server("x.example:1").as_deref(), Some("own-b.example"));
        put("b/x.example_1_/hosts.toml", "underscored.example");
        assert_eq!(server("x.example:1").as_deref(), Some("underscored.example"));
        std::fs::create_dir_all(dir.path().join("a/y.example")).unwrap();
        assert_eq!(
            server("y.example").as_deref(),
            Some("default-b.example"),
            "a directory of its own hides the fallback beside it"
        );
    }

    #[test]
    fn a_key_without_its_certificate_is_an_error_and_so_is_the_reverse() {
        for (alone, missing) in [("c.key", "c.cert"), ("c.cert", "c.key")] {
            let dir = tempfile::tempdir().unwrap();
            let host = dir.path().join("h.example");
            std::fs::create_dir(&host).unwrap();
            std::fs::write(host.join(alone), "x").unwrap();
            let roots = [dir.path().to_owned()];
            let error = certificates(&roots, "h.example").unwrap_err().to_string();
            assert!(error.contains(alone) && error.contains(missing), "{error}");
            std::fs::write(host.join("ca.crt"), "x").unwrap();
            std::fs::write(host.join(missing), "x").unwrap();
            let found = certificates(&roots, "h.example").unwrap();
            assert_eq!((found.ca.len(), found.client.len()), (1, 1));
        }
    }
}
