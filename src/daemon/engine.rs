//! Wires the layers below together: configuration into store, registry client, images and trees.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::protocol::MountRequest;
use crate::config::{Config, MirrorEntry, RegistryEntry, SecretText};
use crate::error::{Error, Result};
use crate::fetch::Fetcher;
use crate::fs::{Filesystem, Options};
use crate::fuse::{Mount, MountOptions, unmount_path};
use crate::image::Images;
use crate::image::platform::Platform;
use crate::image::resolve::Resolver;
use crate::registry::reference::{canonical_host, is_host};
use crate::registry::{Client, ClientOptions, HostOptions, MirrorOptions, Secret};
use crate::store::Store;
use crate::store::lock::Lock;

/// How deep a store's directories are nested.
const STORE_DEPTH: u32 = 3;

/// Everything that works on one store.
#[derive(Debug)]
pub(super) struct Engine {
    store: Arc<Store>,
    images: Arc<Images>,
    runtime: Handle,
    config: Config,
}

impl Engine {
    /// Opens the store whose lock was taken and sets up what works on it. A credential goes to `credential_host` alone
    /// where one is named, else to the hosts that the configuration names, else to every registry that asks for one.
    ///
    /// # Errors
    /// What the store and the client find wrong.
    pub(super) fn open(
        config: &Config,
        lock: Lock,
        credential_host: Option<&str>,
        runtime: &Handle,
    ) -> Result<Self> {
        let client = Client::new(client_options(config, credential_host)?)?;
        let store = Store::open_locked(&config.cache_dir, lock)?;
        let fetcher = Fetcher::new(client, store.clone(), runtime.clone(), config.timeout);
        let resolver = Resolver::new(fetcher.clone(), config.tag_ttl);
        Ok(Self {
            images: Images::new(fetcher, resolver),
            store,
            runtime: runtime.clone(),
            config: config.clone(),
        })
    }

    /// The images.
    pub(super) fn images(&self) -> &Arc<Images> {
        &self.images
    }

    /// Notes in the lock where this process listens.
    pub(super) fn publish(&self, socket: Option<&Path>) -> Result<()> {
        self.store.lock().note(socket)
    }

    /// The state of store, transfers and hosts.
    pub(super) fn status(&self) -> serde_json::Map<String, Value> {
        let fetcher = self.images.fetcher();
        let mut status = serde_json::Map::new();
        status.insert("store".to_owned(), json!(self.store.dir()));
        status.insert("transfers".to_owned(), json!(fetcher.counters()));
        status.insert("hosts".to_owned(), json!(fetcher.client().health()));
        status.insert("stale".to_owned(), json!(self.images.resolver().stale_names()));
        status
    }

    /// Logs what was asked of each host.
    pub(super) fn log_requests(&self) {
        for host in self.images.fetcher().client().health() {
            let requests = host.requests;
            tracing::info!(
                host = host.host,
                scheme = host.scheme,
                manifests = requests.manifests,
                blobs = requests.blobs,
                tags = requests.tags,
                catalog = requests.catalog,
                tokens = requests.tokens,
                retries = host.retries,
                received_bytes = host.bytes,
                "requests sent"
            );
        }
    }

    /// What the store takes up on disk. Looks at every file of it, so this is not for a thread that others wait for.
    pub(super) fn cache_usage(&self) -> Value {
        let layers = std::fs::read_dir(self.store.dir().join("layers")).map_or(0, Iterator::count);
        json!({
            "layers": layers,
            "disk_bytes": disk_bytes(self.store.dir(), STORE_DEPTH),
        })
    }

    /// Mounts a tree. Blocks until it answers or cannot. `status` makes the content of `status.json`.
    pub(super) fn mount(
        &self,
        request: &MountRequest,
        status: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Result<Mounted> {
        let platform: Platform = match &request.platform {
            Some(text) => text.parse()?,
            None => Platform::host(),
        };
        let tree = Filesystem::new(
            Arc::clone(&self.images),
            self.tree_options(request, platform.clone(), status),
        );
        let options = MountOptions {
            allow_other: request.allow_other,
            ..MountOptions::new(&request.mountpoint)
        };
        tracing::debug!(mountpoint = %request.mountpoint.display(), %platform, "mounting");
        Ok(Mounted {
            mount: Mount::start(Arc::new(tree.clone()), &options, &self.runtime)?,
            tree,
        })
    }

    /// How the tree of a mount for `platform` behaves.
    fn tree_options(
        &self,
        request: &MountRequest,
        platform: Platform,
        status: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Options {
        let config = &self.config;
        let canonical = |host: &String| canonical_host(host).unwrap_or_else(|_| host.clone());
        Options {
            platform,
            allow: request.allow.clone(),
            deny: request.deny.clone(),
            configured: config.registries.keys().map(canonical).collect(),
            owner_uid: nix::unistd::geteuid().as_raw(),
            lookup_wait: config.lookup_wait,
            journal_entries: config.journal_entries,
            status,
        }
    }

    /// Brings the store into the state that the next start trusts. Nothing may use the images any more.
    pub(super) fn close(&self) {
        self.store.close();
    }
}

/// The space that the files below `dir` occupy, holes left out. Files that vanish meanwhile count nothing.
fn disk_bytes(dir: &Path, depth: u32) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let bytes_of = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() && depth > 0 => disk_bytes(&entry.path(), depth - 1),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    };
    entries.flatten().map(bytes_of).sum()
}

fn host_options(entry: &RegistryEntry) -> HostOptions {
    HostOptions {
        plain_http: entry.plain_http.unwrap_or(false),
        insecure: entry.insecure,
        ca_files: entry.ca.clone().unwrap_or_default(),
        client_cert: entry.client_cert.clone(),
        client_key: entry.client_key.clone(),
        proxy: entry.proxy.as_ref().map(|proxy| Secret::new(proxy.expose())),
        connect_timeout: entry.connect_timeout_s.map(Duration::from_secs),
        headers: secrets(entry.header.as_ref()),
        credential: None,
        server: entry.server.clone(),
        mirrors: entry
            .mirror
            .as_ref()
            .map(|mirrors| mirrors.iter().map(mirror_options).collect()),
    }
}

fn mirror_options(entry: &MirrorEntry) -> MirrorOptions {
    MirrorOptions {
        url: entry.url.clone(),
        capabilities: entry.capabilities.clone().unwrap_or_default(),
        override_path: entry.override_path.unwrap_or(false),
        host: HostOptions {
            insecure: entry.insecure,
            ca_files: entry.ca.clone().unwrap_or_default(),
            client_cert: entry.client_cert.clone(),
            client_key: entry.client_key.clone(),
            proxy: entry.proxy.as_ref().map(|proxy| Secret::new(proxy.expose())),
            connect_timeout: entry.connect_timeout_s.map(Duration::from_secs),
            headers: secrets(entry.header.as_ref()),
            ..HostOptions::default()
        },
    }
}

fn secrets(headers: Option<&BTreeMap<String, SecretText>>) -> BTreeMap<String, Secret> {
    let headers = headers.into_iter().flatten();
    headers
        .map(|(name, value)| (name.clone(), Secret::new(value.expose())))
        .collect()
}

/// The registry client's part of the settings.
fn client_options(config: &Config, credential_host: Option<&str>) -> Result<ClientOptions> {
    let mut hosts = BTreeMap::<String, HostOptions>::new();
    for (host, entry) in &config.registries {
        let name =
            canonical_host(host).map_err(|error| Error::usage(format!("[registry.{host:?}]: {error}")))?;
        hosts.insert(name, host_options(entry));
    }
    let mut for_all = None;
    if let Some(credential) = &config.credential {
        let secret = Secret::new(credential.expose());
        let named: Vec<String> = match credential_host {
            Some(host) => vec![host.to_owned()],
            None => {
                let allowed = config.allow.iter().filter(|pattern| is_host(pattern)).cloned();
                hosts.keys().cloned().chain(allowed).collect()
            }
        };
        if named.is_empty() {
            for_all = Some(secret.clone());
        }
        for host in named {
            let options = hosts.entry(canonical_host(&host)?).or_default();
            options.credential = Some(secret.clone());
        }
    }
    Ok(ClientOptions {
        credential: for_all,
        ca_files: config.ca.clone(),
        certs_dirs: config.certs_dirs.clone(),
        insecure: config.insecure,
        plain_http: config.plain_http,
        offline: config.offline,
        retries: config.retries,
        timeout: config.timeout,
        concurrency: config.concurrency,
        hosts,
        ..ClientOptions::default()
    })
}

/// A tree and its mount. Dropping it unmounts: nothing may be left without someone who answers.
#[derive(Debug)]
pub(super) struct Mounted {
    mount: Mount,
    tree: Filesystem,
}

impl Mounted {
    /// Unmounts; blocks. A busy mount is [`Error::Busy`] naming who is busy, unless `lazy`.
    pub(super) fn unmount(&self, lazy: bool) -> Result<()> {
        self.mount.unmount(lazy)
    }

    /// Waits until the kernel has ended the session, whoever unmounted.
    pub(super) async fn ended(&self) {
        self.mount.ended().await;
    }

    /// The requests that reached the daemon, by operation.
    pub(super) fn requests(&self) -> Value {
        json!(self.mount.counters().by_operation)
    }

    /// The last failed operations, each an object.
    pub(super) fn errors(&self) -> Vec<Value> {
        self.tree
            .journal()
            .entries()
            .iter()
            .map(|failure| json!(failure))
            .collect()
    }
}

/// Unmounts what no daemon answers for any more; what is not ours is left alone.
pub(super) async fn unmount_dead(mountpoint: PathBuf) -> Result<()> {
    tokio::task::spawn_blocking(move || unmount_path(&mountpoint, false))
        .await
        .unwrap_or_else(|error| Err(Error::busy("unmount", error.to_string())))
}
