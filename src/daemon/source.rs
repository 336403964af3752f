//! What a mount shows: the SOURCE of `registryfs mount`, as users write it and as a daemon is told.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::registry::reference::{Reference, canonical_host, is_host};

/// The text before the path of a layout.
const LAYOUT_PREFIX: &str = "oci:";

/// What the mount table shows where all registries are mounted.
const IN_MOUNT_TABLE: &str = "registryfs";

/// What a mount shows. Its text form is what users write, with nothing left to guess.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// All registries.
    #[default]
    Registries,
    /// One registry, by its canonical host.
    Registry(String),
    /// The root filesystem of an image: a whole reference.
    Image(String),
    /// An OCI image layout on disk: one image of it, or all.
    Layout {
        /// Its directory, absolute and without symbolic links.
        path: PathBuf,
        /// The image that is meant; without it the only one, or all.
        name: Option<String>,
    },
}

impl MountSource {
    /// Reads a SOURCE. Nothing, `none` or `registryfs` means all registries, `oci:PATH[:TAG]` a layout; what has a slash at its end, or
    /// no slash and a dot (before a port, if there is one) or `localhost`, is a registry, everything else a reference. So
    /// `debian:12` is an image although `12` could be a port.
    ///
    /// # Errors
    /// [`Error::Usage`] saying what the text was taken for; [`Error::NotFound`] for the path of a layout.
    pub fn parse(text: &str) -> Result<Self> {
        if matches!(text, "" | "none" | IN_MOUNT_TABLE) {
            return Ok(Self::Registries);
        }
        if let Some((path, name)) = layout_parts(text)? {
            return Self::parse_layout(path, name);
        }
        if let Some(host) = text.strip_suffix('/') {
            return canonical_host(host).map(Self::Registry);
        }
        let is_registry = !text.contains(['/', '@']) && is_host(text) && !is_ambiguous(text);
        if is_registry {
            return canonical_host(text).map(Self::Registry);
        }
        let reference = text.parse::<Reference>().map_err(|error| {
            Error::usage(format!(
                "{error} (SOURCE {text:?} was taken for an image; a registry has a dot, is localhost, or ends in a slash)"
            ))
        })?;
        Ok(Self::Image(reference.to_string()))
    }

    fn parse_layout(path: &str, name: Option<&str>) -> Result<Self> {
        let path = Path::new(path)
            .canonicalize()
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => {
                    let colon = match name {
                        Some(_) => " (the first colon ends the path)",
                        None => "",
                    };
                    Error::not_found(path, format!("there is no such directory{colon}"))
                }
                _ => Error::io(path, &error),
            })?;
        if path.to_str().is_none() {
            let why = "the path of a layout has to be UTF-8";
            return Err(Error::unsupported(path.display().to_string(), why));
        }
        let name = name.map(str::to_owned);
        Ok(Self::Layout { path, name })
    }

    /// The directory of the layout, if it is one.
    pub(super) fn layout(&self) -> Option<&Path> {
        match self {
            Self::Layout { path, .. } => Some(path),
            _ => None,
        }
    }

    /// What else the text could have meant, in the error that it was not found.
    pub(super) fn explain(&self, error: Error) -> Error {
        let Self::Image(reference) = self else {
            return error;
        };
        let short = reference
            .strip_prefix("docker.io/library/")
            .filter(|text| is_host(text));
        let Some(short) = short else { return error };
        let hinted = |why: String| format!("{why} (to mount a registry of this name, write {short}/)");
        match error {
            Error::NotFound { what, why } => Error::not_found(what, hinted(why)),
            Error::Denied { what, why } => Error::denied(what, hinted(why)),
            Error::Network { what, why } => Error::network(what, hinted(why)),
            error => error,
        }
    }
}

/// Path and name of `oci:PATH[:NAME]`. As for skopeo the first colon ends the path. `None` for what is no layout.
///
/// # Errors
/// [`Error::Usage`] without a path.
pub fn layout_parts(text: &str) -> Result<Option<(&str, Option<&str>)>> {
    let Some(layout) = text.strip_prefix(LAYOUT_PREFIX) else {
        return Ok(None);
    };
    let (path, name) = match layout.split_once(':') {
        Some((path, name)) => (path, Some(name).filter(|name| !name.is_empty())),
        None => (layout, None),
    };
    match path.is_empty() {
        false => Ok(Some((path, name))),
        true => Err(Error::usage(format!(
            "{text}: a layout is named oci:PATH or oci:PATH:TAG"
        ))),
    }
}

/// Whether a valid host could as well be an image and its tag.
fn is_ambiguous(host: &str) -> bool {
    match host.split_once(':') {
        Some((name, _)) => !name.contains('.') && name != "localhost" && !name.starts_with('['),
        None => false,
    }
}

impl fmt::Display for MountSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registries => f.write_str("none"),
            Self::Registry(host) => f.write_str(host),
            Self::Image(reference) => f.write_str(reference),
            Self::Layout { path, name: None } => write!(f, "{LAYOUT_PREFIX}{}", path.display()),
            Self::Layout {
                path,
                name: Some(name),
            } => {
                write!(f, "{LAYOUT_PREFIX}{}:{name}", path.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> MountSource {
        MountSource::parse(text).unwrap()
    }

    #[test]
    fn registries_and_images_are_told_apart() {
        for (text, host) in [
            ("docker.io", "docker.io"),
            ("index.docker.io", "docker.io"),
            ("GHCR.io", "ghcr.io"),
            ("localhost", "localhost"),
            ("localhost:5000", "localhost:5000"),
            ("127.0.0.1:5000", "127.0.0.1:5000"),
            ("[::1]:5000", "[::1]:5000"),
            ("registry:5000/", "registry:5000"),
            ("docker.io/", "docker.io"),
        ] {
            assert_eq!(parsed(text), MountSource::Registry(host.to_owned()), "{text}");
        }
        for (text, full) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12", "docker.io/library/debian:12"),
            ("registry:5000", "docker.io/library/registry:5000"),
            ("debian:12.5", "docker.io/library/debian:12.5"),
            ("my.app:v1", "docker.io/library/my.app:v1"),
            ("ghcr.io/a/b", "ghcr.io/a/b:latest"),
            ("localhost:5000/a", "localhost:5000/a:latest"),
        ] {
            assert_eq!(parsed(text), MountSource::Image(full.to_owned()), "{text}");
        }
        assert_eq!(parsed(""), MountSource::Registries);
        assert_eq!(parsed("none"), MountSource::Registries);
        assert_eq!(parsed("registryfs"), MountSource::Registries);
        let error = MountSource::parse("De bian").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("taken for an image"), "{error}");
        for failure in [
            Error::not_found("x", "no"),
            Error::denied("x", "no"),
            Error::network("x", "no"),
        ] {
            let hinted = parsed("registry:5000").explain(failure.clone());
            assert!(hinted.to_string().contains("write registry:5000/"), "{hinted}");
            assert_eq!(hinted.exit_code(), failure.exit_code());
            assert_eq!(parsed("debian:bookworm").explain(failure.clone()), failure);
        }
    }

    #[test]
    fn layouts_are_named_as_for_skopeo() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        std::fs::create_dir(path.join("a")).unwrap();
        let layout = |name: Option<&str>| MountSource::Layout {
            path: path.join("a"),
            name: name.map(str::to_owned),
        };
        let at = |rest: &str| parsed(&format!("oci:{}{rest}", path.display()));
        assert_eq!(at("/a"), layout(None));
        assert_eq!(at("/./a/"), layout(None));
        assert_eq!(at("/a:"), layout(None));
        assert_eq!(at("/a:v1"), layout(Some("v1")));
        assert_eq!(at("/a:debian:12"), layout(Some("debian:12")));
        let text = at("/a:x:1").to_string();
        assert_eq!(parsed(&text), layout(Some("x:1")), "the text form is read again");
        let error = MountSource::parse(&format!("oci:{}/a:b/c", path.display())).unwrap();
        assert_eq!(error, layout(Some("b/c")));
        let none = MountSource::parse("oci:/nonexistent:1").unwrap_err();
        assert_eq!(none.exit_code(), 4);
        assert_eq!(MountSource::parse("oci:").unwrap_err().exit_code(), 2);
    }
}
