//! Settings and where they come from. Files in TOML, the environment and the command line are all read into the same
//! [`Layer`] of optional values; layers are laid over each other, and the result is resolved into one [`Config`] that
//! the rest of the program reads. `/etc/registryfs/config.toml` lies lowest, then
//! `$XDG_CONFIG_HOME/registryfs/config.toml` (or `~/.config`), the file of `--config` or `REGISTRYFS_CONFIG`,
//! the environment, and the flags on top.
//!
//! What an invocation itself said (its `--config`, environment and flags) is kept apart as [`Loaded::given`]: a command
//! that is handed to a running daemon is refused, by name, where what it said differs from what the daemon runs with.
//!
//! | variable | key |
//! |---|---|
//! | `REGISTRYFS_CONFIG` | a configuration file, as `--config` |
//! | `REGISTRYFS_CACHE_DIR`, `_PLATFORM`, `_RETRIES`, `_CONCURRENCY` | as the key of that name |
//! | `REGISTRYFS_TAG_TTL`, `_LOOKUP_WAIT`, `_TIMEOUT` | `tag_ttl_s`, `lookup_wait_s`, `timeout_s`, in seconds |
//! | `REGISTRYFS_OFFLINE`, `_PLAIN_HTTP`, `_INSECURE`, `_SOCI_V1` | `1`, `true`, `0` or `false` |
//! | `REGISTRYFS_CA` | `ca`: PEM files, separated by colons |
//! | `REGISTRYFS_CERTS_DIRS` | `certs_dirs`: directories, separated by colons |
//! | `REGISTRYFS_ALLOW`, `_DENY` | host patterns, separated by commas |
//! | `REGISTRYFS_BUDGET` | `budget`, such as `20GiB` |
//! | `REGISTRYFS_PLAIN_LAYERS` | `plain_layers`: `index` or `refuse` |
//! | `REGISTRYFS_PLAIN_LAYER_BYTES_MAX` | `plain_layer_bytes_max`, such as `5GB` |
//! | `REGISTRYFS_SHARED_INDEX_DIR` | `shared_index_dir` |
//! | `REGISTRYFS_PREFETCH_LANDMARKS` | `prefetch_landmarks`: `1`, `true`, `0` or `false` |
//! | `REGISTRYFS_BACKGROUND` | `background`: `off`, `idle` or `full` |
//! | `REGISTRYFS_BACKGROUND_BYTES_PER_S` | `background_bytes_per_s`, such as `20MB` |
//! | `REGISTRYFS_KERNEL` | `kernel`: `auto`, `off` or `require` |
//! | `REGISTRYFS_KERNEL_IDLE`, `_KERNEL_MOUNTS_MAX` | `kernel_idle_s`, in seconds; `kernel_mounts_max` |
//! | `REGISTRYFS_CREDENTIAL` | `USER:PASS`, as `--credential`; there is no such key in files |

mod bytes;
mod credential;
mod environment;
mod layer;
mod toml_error;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use bytes::ByteSize;
pub use bytes::parse_bytes;
pub use credential::{Credential, SecretText};
pub use environment::Environment;
pub use layer::{
    BackgroundMode, KernelMode, Layer, LayoutEntry, MirrorEntry, MountEntry, PlainLayers, RegistryEntry,
};
pub use toml_error::explain;

use crate::error::Result;

/// The settings that a process works with, every one resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// The directory of the store, absolute. Default: `$CACHE_DIRECTORY`; for root `/var/cache/registryfs`; for others
    /// `$XDG_CACHE_HOME/registryfs` (or `~/.cache`).
    pub cache_dir: PathBuf,
    /// `OS/ARCH[/VARIANT]` to choose from indexes; nothing means the host's.
    pub platform: Option<String>,
    /// How long a tag's digest holds before it is checked again.
    pub tag_ttl: Duration,
    /// How long a LOOKUP may wait for the network.
    pub lookup_wait: Duration,
    /// How often a failed request is sent again.
    pub retries: u32,
    /// How long a request may take in total, retries included.
    pub timeout: Duration,
    /// How many requests may be under way to one host.
    pub concurrency: usize,
    /// Send nothing; answer from the cache.
    pub offline: bool,
    /// Speak plain HTTP to every registry.
    pub plain_http: bool,
    /// Accept any certificate.
    pub insecure: bool,
    /// PEM files with certificate authorities that are trusted besides the system's, absolute.
    pub ca: Vec<PathBuf>,
    /// Where other tools keep their `hosts.toml` and certificates, absolute; the first has the say.
    pub certs_dirs: Vec<PathBuf>,
    /// `USER:PASS` for the registries that the command names.
    pub credential: Option<Credential>,
    /// The size that the cache is kept below, in bytes; nothing means no limit.
    pub budget_bytes: Option<u64>,
    /// What is done about layers without a table of contents, all of which must be read once.
    pub plain_layers: PlainLayers,
    /// The largest of them that is read, in compressed bytes; nothing means no limit.
    pub plain_layer_bytes_max: Option<u64>,
    /// The directory in which machines leave each other the indexes of plain layers.
    pub shared_index_dir: Option<PathBuf>,
    /// Whether what an image says is read first is brought when its root filesystem is first touched.
    pub prefetch_landmarks: bool,
    /// Whether the rest of an image is brought after that.
    pub background: BackgroundMode,
    /// Most bytes a second of that rest, over all images; nothing and 0 mean no limit.
    pub background_bytes_per_s: Option<u64>,
    /// How many failed operations are remembered for `errors` and `status`.
    pub journal_entries: usize,
    /// Patterns of the registry hosts that can be looked up (`*` stands for any text); empty means all.
    pub allow: Vec<String>,
    /// Patterns of the registry hosts that cannot.
    pub deny: Vec<String>,
    /// Whether users other than a mount's owner see what came with his credentials.
    pub share_private: bool,
    /// Whether images are asked for SOCI indexes of version 1, which anyone who may push can attach to them.
    pub soci_v1: bool,
    /// Whether root filesystems are served by the kernel itself.
    pub kernel: KernelMode,
    /// How long one that nobody uses stays mounted.
    pub kernel_idle: Duration,
    /// How many of them stay mounted in a tree at once, those in use aside.
    pub kernel_mounts_max: usize,
    /// What `registryfs daemon` mounts.
    pub mounts: Vec<MountEntry>,
    /// What differs for single registries, by host.
    pub registries: BTreeMap<String, RegistryEntry>,
    /// The directories of the OCI image layouts that are registries, by their host names, absolute.
    pub layouts: BTreeMap<String, PathBuf>,
}

/// The settings of an invocation, and the part of them that it named itself.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Everything, resolved.
    pub config: Config,
    /// What `--config`, the environment and the flags said.
    pub given: Layer,
    /// The files with a `[registry."HOST"]`, by host; of several, the one that wins.
    pub registry_files: BTreeMap<String, PathBuf>,
}

/// Whether something is stated otherwise than what runs.
fn differs<T: PartialEq>(given: Option<&T>, running: &T) -> bool {
    given.is_some_and(|given| given != running)
}

impl Config {
    /// Reads the configuration files and the environment and lays `flags` over them. `explicit_file` is the argument
    /// of `--config`.
    ///
    /// # Errors
    /// [`crate::error::Error::Usage`] naming the file, line and key (or the variable) that cannot be meant.
    pub fn load(environment: &Environment, explicit_file: Option<&Path>, flags: Layer) -> Result<Loaded> {
        let named = explicit_file
            .map(Path::to_path_buf)
            .or_else(|| environment.path("REGISTRYFS_CONFIG"));
        let mut given = flags.over(environment.layer()?);
        let mut registry_files = BTreeMap::new();
        let mut note_registries = |layer: &Layer, file: &Path| {
            for host in layer.registry.keys() {
                registry_files
                    .entry(host.clone())
                    .or_insert_with(|| file.to_owned());
            }
        };
        if let Some(file) = named {
            let layer = Layer::read(&file)?;
            note_registries(&layer, &file);
            given = given.over(layer);
        }
        let mut all = given.clone();
        for file in environment.default_files().into_iter().rev() {
            if let Some(layer) = Layer::read_if_present(&file)? {
                note_registries(&layer, &file);
                all = all.over(layer);
            }
        }
        Ok(Loaded {
            config: all.resolve(environment)?,
            given,
            registry_files,
        })
    }

    /// The names of the settings of a whole daemon that `given` states otherwise than this configuration, as flags or
    /// keys. Settings of a single mount or request (platform, allow, deny, share_private, kernel, background) cannot
    /// conflict.
    #[must_use]
    pub fn conflicts(&self, given: &Layer) -> Vec<&'static str> {
        let seconds = |given: Option<u64>, running: Duration| differs(given.as_ref(), &running.as_secs());
        let registries_differ = given
            .registry
            .iter()
            .any(|(host, entry)| self.registries.get(host) != Some(entry));
        let layouts_differ = given
            .layout
            .iter()
            .any(|(name, entry)| self.layouts.get(name) != Some(&entry.path));
        let checks = [
            ("tag_ttl", seconds(given.tag_ttl_s, self.tag_ttl)),
            ("lookup_wait", seconds(given.lookup_wait_s, self.lookup_wait)),
            ("--retries", differs(given.retries.as_ref(), &self.retries)),
            ("--timeout", seconds(given.timeout_s, self.timeout)),
            (
                "--concurrency",
                differs(given.concurrency.as_ref(), &self.concurrency),
            ),
            ("--offline", differs(given.offline.as_ref(), &self.offline)),
            (
                "--plain-http",
                differs(given.plain_http.as_ref(), &self.plain_http),
            ),
            ("--insecure", differs(given.insecure.as_ref(), &self.insecure)),
            ("--ca", differs(given.ca.as_ref(), &self.ca)),
            ("certs_dirs", differs(given.certs_dirs.as_ref(), &self.certs_dirs)),
            (
                "--credential",
                given.credential.is_some() && given.credential != self.credential,
            ),
            (
                "journal_entries",
                differs(given.journal_entries.as_ref(), &self.journal_entries),
            ),
            ("soci_v1", differs(given.soci_v1.as_ref(), &self.soci_v1)),
            ("kernel_idle", seconds(given.kernel_idle_s, self.kernel_idle)),
            (
                "kernel_mounts_max",
                differs(given.kernel_mounts_max.as_ref(), &self.kernel_mounts_max),
            ),
            ("[registry]", registries_differ),
            ("[layout]", layouts_differ),
        ];
        checks
            .iter()
            .chain(&self.conflicts_of_content(given))
            .filter(|(_, conflicting)| *conflicting)
            .map(|(name, _)| *name)
            .collect()
    }

    /// The part of [`Self::conflicts`] that is about what is brought and kept of layers.
    fn conflicts_of_content(&self, given: &Layer) -> [(&'static str, bool); 6] {
        let limit_differs = |given: Option<ByteSize>, running: Option<u64>| {
            given.is_some_and(|given| Some(given.0) != running)
        };
        // No rate is no limit, and so is 0.
        let rate = self.background_bytes_per_s.unwrap_or(0);
        [
            ("budget", limit_differs(given.budget, self.budget_bytes)),
            (
                "plain_layers",
                differs(given.plain_layers.as_ref(), &self.plain_layers),
            ),
            (
                "plain_layer_bytes_max",
                limit_differs(given.plain_layer_bytes_max, self.plain_layer_bytes_max),
            ),
            (
                "shared_index_dir",
                given.shared_index_dir.is_some() && given.shared_index_dir != self.shared_index_dir,
            ),
            (
                "prefetch_landmarks",
                differs(given.prefetch_landmarks.as_ref(), &self.prefetch_landmarks),
            ),
            (
                "background_bytes_per_s",
                given.background_bytes_per_s.is_some_and(|given| given.0 != rate),
            ),
        ]
    }
}

#[cfg(test)]
mod tests;
