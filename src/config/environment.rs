//! The process environment as the configuration sees it: a value, so that tests need not change the real one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::bytes::{ByteSize, parse_bytes};
use super::layer::Layer;
use crate::error::{Error, Result};

/// Environment variables, who runs the program, and where the system's configuration lies.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The variables.
    pub variables: BTreeMap<OsString, OsString>,
    /// Whether the effective user is root.
    pub is_root: bool,
    /// The system's configuration file.
    pub system_file: PathBuf,
}

impl Environment {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self {
            variables: std::env::vars_os().collect(),
            is_root: nix::unistd::geteuid().is_root(),
            system_file: PathBuf::from("/etc/registryfs/config.toml"),
        }
    }

    /// A variable that is a path; an empty one counts as absent.
    #[must_use]
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.variables
            .get(&OsString::from(name))
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    }

    /// A directory of the XDG base directory specification, with its default below the home directory. The
    /// specification says to ignore values that are not absolute.
    fn xdg(&self, name: &str, below_home: &str) -> Option<PathBuf> {
        self.path(name)
            .filter(|path| path.is_absolute())
            .or_else(|| self.path("HOME").map(|home| home.join(below_home)))
    }

    /// The configuration files that need not exist, lowest first.
    pub(super) fn default_files(&self) -> Vec<PathBuf> {
        let user = self
            .xdg("XDG_CONFIG_HOME", ".config")
            .map(|dir| dir.join("registryfs/config.toml"));
        std::iter::once(self.system_file.clone()).chain(user).collect()
    }

    /// Where the store is unless someone says otherwise.
    pub(super) fn default_cache_dir(&self) -> Result<PathBuf> {
        // systemd separates several cache directories by colons.
        let from_systemd = self
            .text("CACHE_DIRECTORY")?
            .and_then(|dirs| dirs.split(':').next().map(PathBuf::from));
        if let Some(dir) = from_systemd {
            return Ok(dir);
        }
        if self.is_root {
            return Ok(PathBuf::from("/var/cache/registryfs"));
        }
        self.xdg("XDG_CACHE_HOME", ".cache")
            .map(|dir| dir.join("registryfs"))
            .ok_or_else(|| Error::usage("no place for the cache: set HOME, XDG_CACHE_HOME, or --cache-dir"))
    }

    /// Where containerd, podman and docker keep what they are told of registries: an ordinary user's own places first.
    pub(super) fn default_certs_dirs(&self) -> Vec<PathBuf> {
        let tools = ["containerd/certs.d", "containers/certs.d", "docker/certs.d"];
        let users = match self.is_root {
            true => None,
            false => self.xdg("XDG_CONFIG_HOME", ".config"),
        };
        let roots = users.into_iter().chain([PathBuf::from("/etc")]);
        roots.flat_map(|root| tools.map(|tool| root.join(tool))).collect()
    }

    /// What the variables `REGISTRYFS_*` say.
    pub(super) fn layer(&self) -> Result<Layer> {
        let layer = Layer {
            cache_dir: self.path("REGISTRYFS_CACHE_DIR"),
            platform: self.text("REGISTRYFS_PLATFORM")?,
            tag_ttl_s: self.number("REGISTRYFS_TAG_TTL")?,
            lookup_wait_s: self.number("REGISTRYFS_LOOKUP_WAIT")?,
            retries: self.number("REGISTRYFS_RETRIES")?,
            timeout_s: self.number("REGISTRYFS_TIMEOUT")?,
            concurrency: self.number("REGISTRYFS_CONCURRENCY")?,
            offline: self.switch("REGISTRYFS_OFFLINE")?,
            plain_http: self.switch("REGISTRYFS_PLAIN_HTTP")?,
            insecure: self.switch("REGISTRYFS_INSECURE")?,
            soci_v1: self.switch("REGISTRYFS_SOCI_V1")?,
            ca: self
                .path("REGISTRYFS_CA")
                .map(|paths| std::env::split_paths(&paths).collect()),
            certs_dirs: self
                .path("REGISTRYFS_CERTS_DIRS")
                .map(|paths| std::env::split_paths(&paths).collect()),
            budget: self.size("REGISTRYFS_BUDGET")?,
            plain_layers: self.parsed("REGISTRYFS_PLAIN_LAYERS", |text| {
                text.parse().map_err(|e: Error| e.to_string())
            })?,
            plain_layer_bytes_max: self.size("REGISTRYFS_PLAIN_LAYER_BYTES_MAX")?,
            shared_index_dir: self.path("REGISTRYFS_SHARED_INDEX_DIR"),
            prefetch_landmarks: self.switch("REGISTRYFS_PREFETCH_LANDMARKS")?,
            background: self.parsed("REGISTRYFS_BACKGROUND", |text| {
                text.parse().map_err(|e: Error| e.to_string())
            })?,
            background_bytes_per_s: self.size("REGISTRYFS_BACKGROUND_BYTES_PER_S")?,
            kernel: self.parsed("REGISTRYFS_KERNEL", |text| {
                text.parse().map_err(|e: Error| e.to_string())
            })?,
            kernel_idle_s: self.number("REGISTRYFS_KERNEL_IDLE")?,
            kernel_mounts_max: self.number("REGISTRYFS_KERNEL_MOUNTS_MAX")?,
            allow: self.list("REGISTRYFS_ALLOW")?,
            deny: self.list("REGISTRYFS_DENY")?,
            credential: self.parsed("REGISTRYFS_CREDENTIAL", |text| {
                text.parse().map_err(|e: Error| e.to_string())
            })?,
            ..Layer::default()
        };
        layer.with_absolute_paths(Path::new(""))
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        match self.variables.get(&OsString::from(name)) {
            Some(value) if !value.is_empty() => value
                .to_str()
                .map(|text| Some(text.to_owned()))
                .ok_or_else(|| Error::usage(format!("{name}: not UTF-8"))),
            _ => Ok(None),
        }
    }

    fn parsed<T>(
        &self,
        name: &str,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<Option<T>> {
        self.text(name)?
            .map(|text| parse(&text).map_err(|why| Error::usage(format!("{name}: {why}"))))
            .transpose()
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        self.parsed(name, |text| {
            text.parse().map_err(|_| format!("{text:?} is no whole number"))
        })
    }

    fn size(&self, name: &str) -> Result<Option<ByteSize>> {
        let size = self.parsed(name, |text| parse_bytes(text).map_err(|e| e.to_string()))?;
        Ok(size.map(ByteSize))
    }

    fn switch(&self, name: &str) -> Result<Option<bool>> {
        self.parsed(name, |text| match text {
            "1" | "true" => Ok(true),
            "0" | "false" => Ok(false),
            _ => Err(format!("{text:?}: write 1 or 0")),
        })
    }

    fn list(&self, name: &str) -> Result<Option<Vec<String>>> {
        self.parsed(name, |text| Ok(text.split(',').map(str::to_owned).collect()))
    }
}
