//! One source of settings: a file, the environment or the command line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Config;
use super::bytes::ByteSize;
use super::credential::{Credential, SecretText};
use super::environment::Environment;
use super::toml_error::explain;
use crate::error::{Error, Result};

/// Largest configuration file in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest wait that can be configured, in seconds.
const WAIT_S_MAX: u64 = 24 * 3600;

/// The most EROFS mounts of a tree that can be configured: far below what the kernel lets a mount namespace have (100,000).
const KERNEL_MOUNTS_MAX: usize = 20_000;

/// The settings that one source names; the keys of a configuration file are these fields. What each means is said at
/// [`Config`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layer {
    /// Directory of the store; relative to the file that names it.
    pub cache_dir: Option<PathBuf>,
    /// `OS/ARCH[/VARIANT]`.
    pub platform: Option<String>,
    /// Seconds that a tag's digest holds. Default 60.
    pub tag_ttl_s: Option<u64>,
    /// Seconds that a LOOKUP may wait for the network. Default 10.
    pub lookup_wait_s: Option<u64>,
    /// Further attempts of a failed request. Default 5.
    pub retries: Option<u32>,
    /// Seconds that a request may take in total. Default 60.
    pub timeout_s: Option<u64>,
    /// Requests under way to one host. Default 32.
    pub concurrency: Option<usize>,
    /// Send nothing.
    pub offline: Option<bool>,
    /// Plain HTTP to every registry.
    pub plain_http: Option<bool>,
    /// Accept any certificate.
    pub insecure: Option<bool>,
    /// PEM files; relative to the file that names them.
    pub ca: Option<Vec<PathBuf>>,
    /// Directories like containerd's, docker's and podman's `certs.d`; relative to the file that names them.
    pub certs_dirs: Option<Vec<PathBuf>>,
    /// Size of the cache: a number of bytes or text such as `"20 GiB"`.
    pub budget: Option<ByteSize>,
    /// `"index"` or `"refuse"`. Default `"index"`.
    pub plain_layers: Option<PlainLayers>,
    /// Largest layer that is read as a whole: as [`Self::budget`]. Default: no limit.
    pub plain_layer_bytes_max: Option<ByteSize>,
    /// Directory in which machines leave each other the indexes of plain layers. Default: none.
    pub shared_index_dir: Option<PathBuf>,
    /// Bring what images say is read first. Default true.
    pub prefetch_landmarks: Option<bool>,
    /// `"off"`, `"idle"` or `"full"`. Default `"off"`.
    pub background: Option<BackgroundMode>,
    /// Most bytes a second of it: as [`Self::budget`]; 0 means no limit. Default: no limit.
    pub background_bytes_per_s: Option<ByteSize>,
    /// Failed operations that are remembered. Default 256.
    pub journal_entries: Option<usize>,
    /// Patterns of hosts that can be looked up.
    pub allow: Option<Vec<String>>,
    /// Patterns of hosts that cannot.
    pub deny: Option<Vec<String>>,
    /// Show other users what came with credentials. Default false.
    pub share_private: Option<bool>,
    /// Ask for SOCI indexes of version 1. Default false.
    pub soci_v1: Option<bool>,
    /// `"auto"`, `"off"` or `"require"`. Default `"auto"`.
    pub kernel: Option<KernelMode>,
    /// Seconds that an idle mount of the kernel stays. Default 900.
    pub kernel_idle_s: Option<u64>,
    /// Mounts of the kernel in a tree at once. Default 256.
    pub kernel_mounts_max: Option<usize>,
    /// `[[mount]]`: what `registryfs daemon` mounts.
    pub mount: Option<Vec<MountEntry>>,
    /// `[registry."HOST"]`: what differs for one registry.
    pub registry: BTreeMap<String, RegistryEntry>,
    /// `[layout."NAME"]`: an OCI image layout on disk that is the registry NAME.
    pub layout: BTreeMap<String, LayoutEntry>,
    /// Only from the environment and the command line: files in clear text hold no secrets of ours.
    #[serde(skip)]
    pub credential: Option<Credential>,
}

/// What is done about a layer without a table of contents, of which all must be read before anything of it can be seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlainLayers {
    /// It is read once, and from then on by ranges.
    #[default]
    Index,
    /// It is refused, unless it was read before.
    Refuse,
}

impl std::str::FromStr for PlainLayers {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "index" => Ok(Self::Index),
            "refuse" => Ok(Self::Refuse),
            _ => Err(Error::usage(format!("{text:?}: write \"index\" or \"refuse\""))),
        }
    }
}

/// Whether the rest of an image is brought once its root filesystem was touched, behind whatever readers wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackgroundMode {
    /// Nothing but what is read.
    #[default]
    Off,
    /// While no reader has waited for the network for a moment.
    Idle,
    /// Whenever no reader waits for the network.
    Full,
}

impl std::str::FromStr for BackgroundMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "off" => Ok(Self::Off),
            "idle" => Ok(Self::Idle),
            "full" => Ok(Self::Full),
            _ => Err(Error::usage(format!(
                "{text:?}: write \"off\", \"idle\" or \"full\""
            ))),
        }
    }
}

/// Whether the kernel serves root filesystems by itself, by EROFS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelMode {
    /// Where it can.
    #[default]
    Auto,
    /// Never.
    Off,
    /// A mount is refused where it cannot.
    Require,
}

impl std::str::FromStr for KernelMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "require" => Ok(Self::Require),
            _ => Err(Error::usage(format!(
                "{text:?}: write \"auto\", \"off\" or \"require\""
            ))),
        }
    }
}

/// One `[[mount]]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountEntry {
    /// Where to mount; relative to the file that names it.
    pub mountpoint: PathBuf,
    /// What: as the argument of `mount`; all registries where it is left out. The path of a layout is relative to the
    /// file that names it.
    pub source: Option<String>,
    /// Whether users other than the daemon's reach the mount. Default: where the daemon is root.
    pub allow_other: Option<bool>,
    /// `OS/ARCH[/VARIANT]` for this mount.
    pub platform: Option<String>,
    /// Show other users of this mount what came with credentials.
    pub share_private: Option<bool>,
    /// `"auto"`, `"off"` or `"require"` for this mount.
    pub kernel: Option<KernelMode>,
    /// `"off"`, `"idle"` or `"full"` for this mount.
    pub background: Option<BackgroundMode>,
}

/// One `[registry."HOST"]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryEntry {
    /// Speak plain HTTP to it.
    pub plain_http: Option<bool>,
    /// Accept any certificate of it.
    pub insecure: Option<bool>,
    /// PEM files with certificate authorities that are trusted for it.
    pub ca: Option<Vec<PathBuf>>,
    /// PEM file with the certificate that we show it.
    pub client_cert: Option<PathBuf>,
    /// PEM file with its key. Default: in the same file.
    pub client_key: Option<PathBuf>,
    /// The proxy on the way to it, whatever the environment says; it may hold a password.
    pub proxy: Option<SecretText>,
    /// Seconds that a connection to it may take.
    pub connect_timeout_s: Option<u64>,
    /// Headers that are sent to it; they may be secrets.
    pub header: Option<BTreeMap<String, SecretText>>,
    /// The URL of the registry's API, where it is not where its name says.
    pub server: Option<String>,
    /// What is asked before it, in this order. An empty list also rules out those of a `hosts.toml`.
    pub mirror: Option<Vec<MirrorEntry>>,
}

/// One `[[registry."HOST".mirror]]`. What is said of a registry of the same name holds for it too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MirrorEntry {
    /// `[http[s]://]HOST[:PORT][/PATH]`.
    pub url: String,
    /// What it may be asked: `pull`, `resolve`. Default: both.
    pub capabilities: Option<Vec<String>>,
    /// Whether the path of `url` is whole, without `/v2` behind it.
    pub override_path: Option<bool>,
    /// As of a registry.
    pub insecure: Option<bool>,
    /// As of a registry.
    pub ca: Option<Vec<PathBuf>>,
    /// As of a registry.
    pub client_cert: Option<PathBuf>,
    /// As of a registry.
    pub client_key: Option<PathBuf>,
    /// As of a registry.
    pub proxy: Option<SecretText>,
    /// As of a registry.
    pub connect_timeout_s: Option<u64>,
    /// As of a registry.
    pub header: Option<BTreeMap<String, SecretText>>,
}

impl MirrorEntry {
    fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let files = self.ca.iter_mut().flatten();
        files.chain(&mut self.client_cert).chain(&mut self.client_key)
    }
}

/// One `[layout."NAME"]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayoutEntry {
    /// The layout's directory; relative to the file that names it.
    pub path: PathBuf,
}

impl RegistryEntry {
    fn over(self, below: Self) -> Self {
        Self {
            plain_http: self.plain_http.or(below.plain_http),
            insecure: self.insecure.or(below.insecure),
            ca: self.ca.or(below.ca),
            client_cert: self.client_cert.or(below.client_cert),
            client_key: self.client_key.or(below.client_key),
            proxy: self.proxy.or(below.proxy),
            connect_timeout_s: self.connect_timeout_s.or(below.connect_timeout_s),
            header: self.header.or(below.header),
            server: self.server.or(below.server),
            mirror: self.mirror.or(below.mirror),
        }
    }

    fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let files = self.ca.iter_mut().flatten();
        let own = files.chain(&mut self.client_cert).chain(&mut self.client_key);
        let mirrors = self.mirror.iter_mut().flatten();
        own.chain(mirrors.flat_map(MirrorEntry::paths))
    }
}

impl Layer {
    /// Reads a file that must exist.
    pub(super) fn read(file: &Path) -> Result<Self> {
        Self::read_if_present(file)?
            .ok_or_else(|| Error::usage(format!("{}: no such configuration file", file.display())))
    }

    /// Reads a file, or nothing where there is none.
    pub(super) fn read_if_present(file: &Path) -> Result<Option<Self>> {
        let unreadable = |error: std::io::Error| Error::usage(format!("{}: {error}", file.display()));
        let bytes_on_disk = match std::fs::metadata(file) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        if bytes_on_disk > FILE_BYTES_MAX {
            return Err(Error::usage(format!(
                "{}: larger than {FILE_BYTES_MAX} bytes",
                file.display()
            )));
        }
        let text = std::fs::read_to_string(file).map_err(unreadable)?;
        let dir = file.parent().unwrap_or(Path::new(""));
        Self::parse(&text, &file.display().to_string())?
            .with_absolute_paths(dir)
            .map(Some)
    }

    /// Reads the text of a file; `name` is for the error, which quotes the key at fault.
    ///
    /// # Errors
    /// [`Error::Usage`] naming file, line and key.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| {
            let (number, why, key) = explain(&error, text);
            Error::usage(format!("{name}:{number}: {why} in `{key}`"))
        })
    }

    /// Paths as this process would open them, now and from any working directory; relative ones are taken from `dir`.
    pub(super) fn with_absolute_paths(mut self, dir: &Path) -> Result<Self> {
        let absolute = |path: &mut PathBuf| match std::path::absolute(dir.join(&*path)) {
            Ok(full) => {
                *path = full;
                Ok(())
            }
            Err(error) => Err(Error::usage(format!("{}: {error}", path.display()))),
        };
        for source in self
            .mount
            .iter_mut()
            .flatten()
            .filter_map(|mount| mount.source.as_mut())
        {
            if let Some(rest) = source
                .strip_prefix("oci:")
                .filter(|rest| !rest.is_empty() && !rest.starts_with(['/', ':']))
            {
                let (path, name) = rest.split_at(rest.find(':').unwrap_or(rest.len()));
                let mut path = PathBuf::from(path);
                absolute(&mut path)?;
                *source = format!("oci:{}{name}", path.display());
            }
        }
        let registry_files = self.registry.values_mut().flat_map(RegistryEntry::paths);
        let files = self.ca.iter_mut().flatten().chain(registry_files);
        let certs_dirs = self.certs_dirs.iter_mut().flatten();
        let layouts = self.layout.values_mut().map(|layout| &mut layout.path);
        let mountpoints = self.mount.iter_mut().flatten().map(|mount| &mut mount.mountpoint);
        self.cache_dir
            .iter_mut()
            .chain(self.shared_index_dir.iter_mut())
            .chain(files)
            .chain(certs_dirs)
            .chain(layouts)
            .chain(mountpoints)
            .try_for_each(absolute)?;
        Ok(self)
    }

    /// Flags: as [`Layer`] fields with paths relative to the working directory.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty path.
    pub fn of_flags(self) -> Result<Self> {
        self.with_absolute_paths(Path::new(""))
    }

    /// This layer where it says something, else what lies `below`.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        let mut registry = below.registry;
        for (host, entry) in self.registry {
            let under = registry.remove(&host).unwrap_or_default();
            registry.insert(host, entry.over(under));
        }
        let mut layout = below.layout;
        layout.extend(self.layout);
        Self {
            cache_dir: self.cache_dir.or(below.cache_dir),
            platform: self.platform.or(below.platform),
            tag_ttl_s: self.tag_ttl_s.or(below.tag_ttl_s),
            lookup_wait_s: self.lookup_wait_s.or(below.lookup_wait_s),
            retries: self.retries.or(below.retries),
            timeout_s: self.timeout_s.or(below.timeout_s),
            concurrency: self.concurrency.or(below.concurrency),
            offline: self.offline.or(below.offline),
            plain_http: self.plain_http.or(below.plain_http),
            insecure: self.insecure.or(below.insecure),
            ca: self.ca.or(below.ca),
            certs_dirs: self.certs_dirs.or(below.certs_dirs),
            budget: self.budget.or(below.budget),
            plain_layers: self.plain_layers.or(below.plain_layers),
            plain_layer_bytes_max: self.plain_layer_bytes_max.or(below.plain_layer_bytes_max),
            shared_index_dir: self.shared_index_dir.or(below.shared_index_dir),
            prefetch_landmarks: self.prefetch_landmarks.or(below.prefetch_landmarks),
            background: self.background.or(below.background),
            background_bytes_per_s: self.background_bytes_per_s.or(below.background_bytes_per_s),
            journal_entries: self.journal_entries.or(below.journal_entries),
            allow: self.allow.or(below.allow),
            deny: self.deny.or(below.deny),
            share_private: self.share_private.or(below.share_private),
            soci_v1: self.soci_v1.or(below.soci_v1),
            kernel: self.kernel.or(below.kernel),
            kernel_idle_s: self.kernel_idle_s.or(below.kernel_idle_s),
            kernel_mounts_max: self.kernel_mounts_max.or(below.kernel_mounts_max),
            mount: self.mount.or(below.mount),
            registry,
            layout,
            credential: self.credential.or(below.credential),
        }
    }

    /// Fills in the defaults and checks what only the whole can tell.
    pub(super) fn resolve(self, environment: &Environment) -> Result<Config> {
        let timeout = seconds("timeout", self.timeout_s, 60)?;
        let concurrency = self.concurrency.unwrap_or(32);
        let kernel_idle = seconds("kernel_idle", self.kernel_idle_s, 900)?;
        let kernel_mounts_max = self.kernel_mounts_max.unwrap_or(256);
        let out_of_range = [
            ("timeout", timeout.is_zero()),
            ("kernel_idle", kernel_idle.is_zero()),
            (
                "kernel_mounts_max",
                !(1..=KERNEL_MOUNTS_MAX).contains(&kernel_mounts_max),
            ),
            ("concurrency", !(1..=1024).contains(&concurrency)),
            ("retries", self.retries.is_some_and(|retries| retries > 100)),
            (
                "journal_entries",
                self.journal_entries.is_some_and(|n| n > 1 << 20),
            ),
        ];
        if let Some((key, _)) = out_of_range.iter().find(|(_, wrong)| *wrong) {
            return Err(Error::usage(format!("{key}: out of range")));
        }
        let is_registry = |name: &String| self.registry.keys().any(|host| host.eq_ignore_ascii_case(name));
        if let Some(name) = self.layout.keys().find(|name| is_registry(name)) {
            return Err(Error::usage(format!(
                "{name:?} is the name of a [registry] and of a [layout]; give the layout another one"
            )));
        }
        let cache_dir = match self.cache_dir {
            Some(dir) => dir,
            None => environment.default_cache_dir()?,
        };
        Ok(Config {
            cache_dir,
            platform: self.platform,
            tag_ttl: seconds("tag_ttl", self.tag_ttl_s, 60)?,
            lookup_wait: seconds("lookup_wait", self.lookup_wait_s, 10)?,
            retries: self.retries.unwrap_or(5),
            timeout,
            concurrency,
            offline: self.offline.unwrap_or(false),
            plain_http: self.plain_http.unwrap_or(false),
            insecure: self.insecure.unwrap_or(false),
            ca: self.ca.unwrap_or_default(),
            certs_dirs: self
                .certs_dirs
                .unwrap_or_else(|| environment.default_certs_dirs()),
            credential: self.credential,
            budget_bytes: self.budget.map(|budget| budget.0),
            plain_layers: self.plain_layers.unwrap_or_default(),
            plain_layer_bytes_max: self.plain_layer_bytes_max.map(|bytes| bytes.0),
            shared_index_dir: self.shared_index_dir,
            prefetch_landmarks: self.prefetch_landmarks.unwrap_or(true),
            background: self.background.unwrap_or_default(),
            background_bytes_per_s: self.background_bytes_per_s.map(|rate| rate.0),
            journal_entries: self.journal_entries.unwrap_or(256),
            allow: host_patterns("allow", self.allow)?,
            deny: host_patterns("deny", self.deny)?,
            share_private: self.share_private.unwrap_or(false),
            soci_v1: self.soci_v1.unwrap_or(false),
            kernel: self.kernel.unwrap_or_default(),
            kernel_idle,
            kernel_mounts_max,
            mounts: self.mount.unwrap_or_default(),
            registries: self.registry,
            layouts: self
                .layout
                .into_iter()
                .map(|(name, entry)| (name, entry.path))
                .collect(),
        })
    }
}

/// A wait in seconds, within what can be configured.
fn seconds(key: &str, given: Option<u64>, default: u64) -> Result<Duration> {
    match given.unwrap_or(default) {
        s if s > WAIT_S_MAX => Err(Error::usage(format!("{key}: at most {WAIT_S_MAX} seconds"))),
        s => Ok(Duration::from_secs(s)),
    }
}

/// Patterns are matched against canonical hosts, which are lowercase and without a path.
fn host_patterns(key: &str, patterns: Option<Vec<String>>) -> Result<Vec<String>> {
    let patterns = patterns.unwrap_or_default();
    let valid = |c: char| c.is_ascii_alphanumeric() || "*.-:[]".contains(c);
    match patterns.iter().find(|p| p.is_empty() || !p.chars().all(valid)) {
        Some(bad) => Err(Error::usage(format!(
            "{key}: {bad:?} is no pattern of a registry host, such as \"ghcr.io\" or \"*.example.org\""
        ))),
        None => Ok(patterns.iter().map(|p| p.to_ascii_lowercase()).collect()),
    }
}
