//! Image references and their parts, by the grammar that Docker's tools use: which text is a registry host, a
//! repository, a tag, a digest. Docker Hub's shorthands are resolved here and nowhere else.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::{Error, Result};

/// The registry meant when a reference names none.
pub const DEFAULT_HOST: &str = "docker.io";
/// The tag meant when a reference names none.
pub const DEFAULT_TAG: &str = "latest";
/// Begins the name that stands for the host where images are those of an OCI image layout on disk: this and the
/// layout's absolute path. No name in a tree and no reference that a user writes has it.
const LAYOUT_PREFIX: &str = "oci:";
/// Longest host and repository path together, in bytes (distribution's limit).
const NAME_BYTES_MAX: usize = 255;
/// Longest tag in bytes (OCI distribution specification).
const TAG_BYTES_MAX: usize = 128;

/// Whether `text` is a registry host by Docker's rule: it has a dot or a port, or is `localhost`, and is a valid
/// host name, IPv4 address or bracketed IPv6 address.
#[must_use]
pub fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    let port_ok = port.is_none_or(|port| {
        !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    let ipv6 = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let name_ok = match ipv6 {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => name.split('.').all(is_host_label),
    };
    let marked = name.contains('.') || port.is_some() || name == "localhost" || ipv6.is_some();
    marked && port_ok && name_ok && text.len() <= NAME_BYTES_MAX
}

/// What stands for the host of the images in the layout at `path`.
#[must_use]
pub fn layout_host(path: &str) -> String {
    format!("{LAYOUT_PREFIX}{path}")
}

/// The path of the layout that [`layout_host`] made `host` of.
#[must_use]
pub fn layout_path(host: &str) -> Option<&Path> {
    let path = host.strip_prefix(LAYOUT_PREFIX)?;
    path.starts_with('/').then(|| Path::new(path))
}

fn is_host_label(label: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
}

/// Whether `text` is one component of a repository path: lowercase letters and digits, separated by a dot, one or
/// two underscores, or dashes.
#[must_use]
pub fn is_component(text: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    if text.len() > NAME_BYTES_MAX
        || !bytes.first().copied().is_some_and(alphanumeric)
        || !bytes.last().copied().is_some_and(alphanumeric)
    {
        return false;
    }
    bytes.split(|&b| alphanumeric(b)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|&b| b == b'-')
    })
}

/// Whether `text` is a tag.
#[must_use]
pub fn is_tag(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    !text.is_empty()
        && text.len() <= TAG_BYTES_MAX
        && text.bytes().all(inner)
        && !text.starts_with(['.', '-'])
}

/// A repository: a registry host and a path in it, as the registry's API spells them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repository {
    host: String,
    path: String,
}

impl Repository {
    /// Checks `host` (a registry, or what [`layout_host`] made) and `path` and resolves Docker Hub's names
    /// (`index.docker.io` is `docker.io`, and a path of one component there lies in `library/`).
    ///
    /// # Errors
    /// [`Error::Usage`] naming the part that breaks the grammar.
    pub fn new(host: &str, path: &str) -> Result<Self> {
        let is_layout = layout_path(host).is_some();
        let host = if is_layout {
            host.to_owned()
        } else {
            canonical_host(host)?
        };
        if let Some(bad) = path.split('/').find(|part| !is_component(part)) {
            return Err(Error::usage(format!(
                "{host}/{path}: {bad:?} is no repository name component: lowercase letters and digits, separated by '.', '_', '__' or '-'"
            )));
        }
        let path = if host == DEFAULT_HOST && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        // A layout's path is no part of a name that anybody would send.
        let host_bytes = if is_layout { 0 } else { host.len() + 1 };
        if host_bytes + path.len() > NAME_BYTES_MAX {
            return Err(Error::usage(format!(
                "{host}/{path}: a repository name has at most {NAME_BYTES_MAX} bytes"
            )));
        }
        Ok(Self { host, path })
    }

    /// The registry, such as `docker.io` or `localhost:5000`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path in the registry, such as `library/debian`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A colon ends the path of a layout, so no two repositories are written alike.
        let separator = if layout_path(&self.host).is_some() {
            ':'
        } else {
            '/'
        };
        write!(f, "{}{separator}{}", self.host, self.path)
    }
}

/// Docker Hub's canonical name for its other names; any other valid host in lowercase.
///
/// # Errors
/// [`Error::Usage`] if `host` is no registry host.
pub fn canonical_host(host: &str) -> Result<String> {
    if !is_host(host) {
        return Err(Error::usage(format!(
            "{host:?} is no registry host: it needs a dot or a port, or must be localhost"
        )));
    }
    let host = host.to_ascii_lowercase();
    Ok(match host.as_str() {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_HOST.to_owned(),
        _ => host,
    })
}

/// What is asked of a repository: the manifest under a tag, or the one with a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// The manifest that the tag names now.
    Tag(String),
    /// The manifest with that digest, for ever the same.
    Digest(Digest),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// A reference to an image: `[HOST/]PATH[:TAG][@DIGEST]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    /// The repository.
    pub repository: Repository,
    /// The tag, [`DEFAULT_TAG`] where neither tag nor digest was given.
    pub tag: Option<String>,
    /// The digest, which wins over the tag.
    pub digest: Option<Digest>,
}

impl Reference {
    /// What to ask the repository for: the digest if there is one, else the tag.
    #[must_use]
    pub fn target(&self) -> Target {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => Target::Digest(*digest),
            (None, Some(tag)) => Target::Tag(tag.clone()),
            (None, None) => Target::Tag(DEFAULT_TAG.to_owned()),
        }
    }

    /// Splits `HOST/PATH` or `PATH` into a repository, without tag or digest.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the part that breaks the grammar.
    pub fn parse_repository(text: &str) -> Result<Repository> {
        if text.starts_with("oci:/") {
            return Err(Error::usage(format!(
                "{text}: only `mount` takes an OCI image layout by its path; [layout.\"NAME\"] in the configuration gives it a name for all commands"
            )));
        }
        match text.split_once('/') {
            Some((host, path)) if is_host(host) => Repository::new(host, path),
            _ => Repository::new(DEFAULT_HOST, text),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (
                rest,
                Some(
                    digest
                        .parse::<Digest>()
                        .map_err(|e| Error::usage(format!("{text}: {e}")))?,
                ),
            ),
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag.filter(|tag| !is_tag(tag)) {
            return Err(Error::usage(format!(
                "{text}: {tag:?} is no tag: up to {TAG_BYTES_MAX} letters, digits, '_', '.' and '-', not starting with '.' or '-'"
            )));
        }
        let repository = Self::parse_repository(name)?;
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            repository,
            tag,
            digest,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repository.fmt(f)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> String {
        text.parse::<Reference>().unwrap().to_string()
    }

    #[test]
    fn a_name_that_is_too_long_with_what_it_implies_is_refused() {
        let fits = "a".repeat(NAME_BYTES_MAX - "docker.io/library/".len());
        assert_eq!(full(&full(&fits)), full(&fits));
        assert!(format!("{fits}a").parse::<Reference>().is_err());
    }

    #[test]
    fn shorthands_resolve_as_docker_resolves_them() {
        let digest = Digest::of(b"");
        let cases = [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("debian:12", "docker.io/library/debian:12".to_owned()),
            ("org/app", "docker.io/org/app:latest".to_owned()),
            (
                "index.docker.io/debian",
                "docker.io/library/debian:latest".to_owned(),
            ),
            ("localhost/app:1", "localhost/app:1".to_owned()),
            ("localhost:5000/a/b:1", "localhost:5000/a/b:1".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            ("ghcr.io/a/b__c/d-e", "ghcr.io/a/b__c/d-e:latest".to_owned()),
        ];
        for (text, expected) in cases {
            assert_eq!(full(text), expected, "{text}");
        }
        let both = format!("quay.io/a/b:1@{digest}");
        let reference: Reference = both.parse().unwrap();
        assert_eq!(reference.to_string(), both);
        assert_eq!(reference.target(), Target::Digest(digest));
        let only: Reference = format!("a@{digest}").parse().unwrap();
        assert_eq!((only.tag, only.digest), (None, Some(digest)));
    }

    #[test]
    fn what_breaks_the_grammar_is_a_usage_error() {
        for text in [
            "",
            "Debian",
            "a//b",
            "a:",
            "a:-x",
            "a@sha256:1",
            "a..b",
            "a_",
            "ghcr.io/",
            "a___b",
            "host.io/UP/x",
        ] {
            let error = text.parse::<Reference>().unwrap_err();
            assert_eq!(error.exit_code(), 2, "{text}: {error}");
        }
    }

    #[test]
    fn images_of_a_layout_are_named_by_its_path_and_by_nothing_that_is_typed() {
        let host = layout_host("/srv/a:b");
        let repository = Repository::new(&host, "team/app").unwrap();
        assert_eq!(repository.to_string(), "oci:/srv/a:b:team/app");
        assert_eq!(layout_path(repository.host()), Some(Path::new("/srv/a:b")));
        assert!(Repository::new(&layout_host("relative"), "app").is_err());
        let long = layout_host(&format!("/{}", "long/".repeat(100)));
        assert!(Repository::new(&long, "app").is_ok());
        assert!(!is_host(&host) && canonical_host(&host).is_err());
        let error = "oci:/srv/app:1".parse::<Reference>().unwrap_err();
        assert!(error.to_string().contains("[layout"), "{error}");
    }

    #[test]
    fn hosts_by_dockers_rule() {
        for host in [
            "docker.io",
            "localhost",
            "localhost:5000",
            "h:1",
            "127.0.0.1",
            "[::1]",
            "a-b.c:65535",
        ] {
            assert!(is_host(host), "{host}");
        }
        for host in [
            "docker",
            "",
            ".",
            "a..b",
            "-a.b",
            "h:",
            "h:65536",
            "h:x",
            "[zz]:1",
            "a_b.c",
            ".registryfs",
            "a.b/c",
        ] {
            assert!(!is_host(host), "{host}");
        }
    }
}
