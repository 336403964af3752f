//! One file of credentials: docker's `config.json` and `.dockercfg`, and `auth.json` of podman and skopeo. What is
//! asked of it is which of its entries are for a repository, best first.
//!
//! A key without a scheme may have a path: then it is for that repository, or for all below that namespace, and the
//! longest wins. Podman and skopeo made that rule for `auth.json` and apply it to docker's file too. A key that is a
//! URL means its host whatever its path, because docker once wrote the URL of an API there; for Docker Hub it still
//! does.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;

use super::places::{Kind, Place};
use super::{Identity, TOKEN_USER, password_identity};
use crate::registry::reference::{DEFAULT_HOST, canonical_host};
use crate::registry::secret::Secret;

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How docker calls Docker Hub, as a key and to its helpers.
const HUB_SERVER: &str = "https://index.docker.io/v1/";
/// A file that was written so recently may be written again within the resolution of its time stamps.
const UNSETTLED: Duration = Duration::from_secs(2);

/// Which state of a file this is, as far as one can see without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stamp {
    Absent,
    Unreadable(Option<i32>),
    File {
        device: u64,
        inode: u64,
        bytes: u64,
        modified_ns: (i64, i64),
        changed_ns: (i64, i64),
    },
}

impl Stamp {
    /// That of the file at `path` now.
    pub(super) fn of(path: &Path) -> Self {
        match std::fs::metadata(path) {
            Ok(metadata) => Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
                bytes: metadata.len(),
                modified_ns: (metadata.mtime(), metadata.mtime_nsec()),
                changed_ns: (metadata.ctime(), metadata.ctime_nsec()),
            },
            Err(error) if is_absence(&error) => Self::Absent,
            Err(error) => Self::Unreadable(error.raw_os_error()),
        }
    }

    /// Whether the file could change at `now` without its stamp.
    pub(super) fn is_unsettled(&self, now: SystemTime) -> bool {
        let Self::File {
            changed_ns: (seconds, _),
            ..
        } = self
        else {
            return false;
        };
        let settled =
            u64::try_from(*seconds).map(|seconds| Duration::from_secs(seconds).saturating_add(UNSETTLED));
        let settled = settled.map(|since_epoch| SystemTime::UNIX_EPOCH.checked_add(since_epoch));
        // A time too late to be told is never over; one from before the epoch is.
        settled.is_ok_and(|settled| settled.is_none_or(|settled| now < settled))
    }
}

/// A component of the path that is no directory is an absence too.
fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// What a file has for a repository.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registry) enum Candidate {
    /// A credential helper, and what it is to be asked for.
    Helper { name: String, server: String },
    /// Credentials in the file itself, under a key.
    Entry { key: String, identity: Identity },
    /// An entry that cannot be used, and why.
    Unusable { key: String, why: &'static str },
}

/// A file as it was read.
pub(super) enum Content {
    Absent,
    /// It is there but cannot be used, for the reason given, which quotes nothing of it.
    Broken(String),
    Entries(Entries),
}

/// The entries of a file. There is no debug form: the values are secrets.
pub(in crate::registry) struct Entries {
    kind: Kind,
    auths: BTreeMap<String, Value>,
    helpers: BTreeMap<String, String>,
    store: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    auths: Option<BTreeMap<String, Value>>,
    cred_helpers: Option<BTreeMap<String, String>>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// Reads the file at `place`.
pub(super) fn read(place: &Place) -> Content {
    let bytes = match bytes_of(place.path()) {
        Ok(bytes) => bytes,
        Err(error) if is_absence(&error) => return Content::Absent,
        Err(error) => return Content::Broken(error.to_string()),
    };
    match parse(place.kind, &bytes) {
        Ok(entries) => Content::Entries(entries),
        Err(line) => Content::Broken(format!("it is no JSON of the expected form, see line {line}")),
    }
}

fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    // A FIFO would otherwise hold whoever opens it.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other("it is too large for a file of credentials"));
    }
    Ok(bytes)
}

/// Reads the text of a file. The error is the line that cannot be understood: the parser's own message could quote a secret.
pub(in crate::registry) fn parse(kind: Kind, bytes: &[u8]) -> Result<Entries, usize> {
    let mut entries = Entries {
        kind,
        auths: BTreeMap::new(),
        helpers: BTreeMap::new(),
        store: None,
    };
    // Some tools empty a file before they write it, or leave it empty.
    if bytes.trim_ascii().is_empty() {
        return Ok(entries);
    }
    let line = |error: serde_json::Error| error.line();
    if kind == Kind::OldDocker {
        entries.auths = serde_json::from_slice(bytes).map_err(line)?;
        return Ok(entries);
    }
    let document: Document = serde_json::from_slice(bytes).map_err(line)?;
    entries.auths = document.auths.unwrap_or_default();
    entries.helpers = document.cred_helpers.unwrap_or_default();
    // Podman and skopeo know none: there the order of their own file stays theirs.
    entries.store = document.creds_store.filter(|_| kind == Kind::Docker);
    Ok(entries)
}

impl Entries {
    /// What there is for the repository `path` (empty: the registry as such) of the registry `host`, a canonical
    /// name. Best first.
    pub(in crate::registry) fn candidates(&self, host: &str, path: &str) -> Vec<Candidate> {
        let named = self.matching(&self.helpers, host, path).into_iter().next();
        let helper = named.map(|(_, helper)| helper).or(self.store.as_ref());
        // Docker takes an empty name for "no helper for this one".
        let helper = helper.filter(|helper| !helper.is_empty());
        let helper = helper.map(|helper| Candidate::Helper {
            name: helper.clone(),
            server: self.server(host),
        });
        let entries = self.matching(&self.auths, host, path).into_iter();
        let entries = entries.filter_map(|(key, value)| {
            let key = key.clone();
            match identity(value) {
                Ok(identity) => identity.map(|identity| Candidate::Entry { key, identity }),
                Err(why) => Some(Candidate::Unusable { key, why }),
            }
        });
        helper.into_iter().chain(entries).collect()
    }

    /// What helpers are asked for: the host, and Docker Hub as the tool calls it whose file this is.
    fn server(&self, host: &str) -> String {
        match self.kind {
            Kind::Docker if host == DEFAULT_HOST => HUB_SERVER.to_owned(),
            _ => host.to_owned(),
        }
    }

    /// The entries of `map` that are for the repository: those with the longest path first, and of those for the same
    /// path the ones spelled as the host itself, then as docker spells its hub.
    fn matching<'a, T>(
        &self,
        map: &'a BTreeMap<String, T>,
        host: &str,
        path: &str,
    ) -> Vec<(&'a String, &'a T)> {
        let with_reach = map.iter().filter_map(|(key, value)| {
            let (key_host, namespace) = meaning(key, self.kind)?;
            let reaches = key_host == host && is_prefix(namespace, path);
            reaches.then_some((namespace.len(), key, value))
        });
        let mut found: Vec<_> = with_reach.collect();
        found.sort_by_key(|(bytes, key, _)| {
            (
                std::cmp::Reverse(*bytes),
                key.as_str() != host,
                key.as_str() != HUB_SERVER,
            )
        });
        found.into_iter().map(|(_, key, value)| (key, value)).collect()
    }
}

/// The registry that a key means, by its canonical name, and the repository or namespace in it, empty for all.
/// `None`: no registry at all.
fn meaning(key: &str, kind: Kind) -> Option<(String, &str)> {
    let without_scheme = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"));
    let is_url = without_scheme.is_some() || kind == Kind::OldDocker;
    let (name, path) = without_scheme
        .unwrap_or(key)
        .split_once('/')
        .unwrap_or((without_scheme.unwrap_or(key), ""));
    let path = path.trim_end_matches('/');
    let is_api = matches!(path, "v1" | "v2");
    let host = canonical_host(name).ok()?;
    Some((host, if is_url || is_api { "" } else { path }))
}

/// Whether `namespace` is `path` or lies above it.
fn is_prefix(namespace: &str, path: &str) -> bool {
    namespace.is_empty()
        || path
            .strip_prefix(namespace)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The identity of an entry, `None` where it has none: docker leaves empty entries for what its helpers keep.
fn identity(value: &Value) -> Result<Option<Identity>, &'static str> {
    if value.is_null() {
        return Ok(None);
    }
    let auth = Auth::deserialize(value).map_err(|_| "is not of the expected form")?;
    let text = |value: Option<String>| value.filter(|value| !value.is_empty());
    if let Some(token) = text(auth.registrytoken) {
        return Ok(Some(Identity::Bearer(Secret::new(token))));
    }
    let pair = match text(auth.auth) {
        Some(encoded) => Some(decode(&encoded).ok_or("has no base64 of USER:PASS as its `auth`")?),
        None => None,
    };
    let (user, password) = match pair {
        Some((user, password)) => (text(Some(user)), text(Some(password))),
        None => (text(auth.username), text(auth.password)),
    };
    if let Some(token) = text(auth.identitytoken) {
        return Ok(Some(Identity::Refresh {
            user: user.unwrap_or_else(|| TOKEN_USER.to_owned()),
            token: Secret::new(token),
            password: password.map(Secret::new),
        }));
    }
    Ok(password.map(|password| password_identity(&user.unwrap_or_default(), &password)))
}

fn decode(encoded: &str) -> Option<(String, String)> {
    let bytes = STANDARD.decode(encoded.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    // Some tools pad the password with NUL bytes.
    let (user, password) = text.trim_end_matches('\0').split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}
