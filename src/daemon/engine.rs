//! Wires the layers below together: configuration into store, registry client, images and trees.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::endpoints::host_options;
use super::protocol::MountRequest;
use super::source::MountSource;
use crate::config::Config;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::{FetchOptions, Fetcher, PlainLimits};
use crate::fs::{Filesystem, Options, Root};
use crate::fuse::{Mount, MountOptions};
use crate::image::Images;
use crate::image::platform::Platform;
use crate::image::resolve::Resolver;
use crate::registry::reference::{DEFAULT_HOST, canonical_host, is_host, layout_host};
use crate::registry::{Client, ClientOptions, CredentialEnvironment, HostOptions, HostPatterns, Secret};
use crate::store::Store;
use crate::store::lock::Lock;

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
        let client = client(config, credential_host)?;
        let store = Store::open_locked(&config.cache_dir, lock)?;
        let options = FetchOptions {
            timeout: config.timeout,
            budget_bytes: config.budget_bytes,
            plain: PlainLimits {
                plain_layers: config.plain_layers,
                bytes_max: config.plain_layer_bytes_max,
            },
            shared_index_dir: config.shared_index_dir.clone(),
        };
        let fetcher = Fetcher::new(client, store.clone(), runtime.clone(), options);
        let resolver = Resolver::new(fetcher.clone(), config.tag_ttl);
        Ok(Self {
            images: Images::new(fetcher, resolver, config.soci_v1),
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
        status.insert("passes".to_owned(), json!(fetcher.passes()));
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
                pushes = requests.pushes,
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
            "disk_bytes": self.store.disk_bytes(),
        })
    }

    /// Opens the tree of a mount: what its source names is resolved when this returns. `status` makes the content of
    /// `status.json`.
    pub(super) async fn open_tree(
        &self,
        request: &MountRequest,
        status: Arc<dyn Fn() -> String + Send + Sync>,
    ) -> Result<Filesystem> {
        let platform: Platform = match &request.platform {
            Some(text) => text.parse()?,
            None => Platform::host(),
        };
        tracing::debug!(source = %request.source, %platform, "resolving");
        self.images.resolver().openness().load().await?;
        let root = self.root(&request.source).await?;
        let options = self.tree_options(request, platform, status);
        Filesystem::open(Arc::clone(&self.images), options, &root).await
    }

    async fn root(&self, source: &MountSource) -> Result<Root> {
        Ok(match source {
            MountSource::Registries => Root::Registries,
            MountSource::Registry(host) => Root::Registry(canonical_host(host)?),
            MountSource::Image(reference) => Root::Rootfs(reference.parse()?),
            MountSource::Layout { path, name } => {
                let host = layout_host(&path.display().to_string());
                let client = self.images.fetcher().client();
                match client.find_in_layout(&host, name.as_deref()).await? {
                    Some(reference) => Root::Rootfs(reference),
                    None => Root::Registry(host),
                }
            }
        })
    }

    /// The directories of the layouts that the configuration names.
    pub(super) fn layouts(&self) -> impl Iterator<Item = &Path> {
        self.config.layouts.values().map(PathBuf::as_path)
    }

    /// Mounts a tree. Blocks until it answers or cannot.
    pub(super) fn mount(&self, request: &MountRequest, tree: Filesystem) -> Result<Mounted> {
        let mut options = MountOptions {
            allow_other: request.allow_other && !tree.is_private(),
            no_exec: request.no_exec,
            place: request.place.clone(),
            ..MountOptions::new(&request.mountpoint)
        };
        if request.allow_other && tree.is_private() {
            let mountpoint = request.mountpoint.display();
            tracing::warn!(%mountpoint, "the image came with credentials: only its owner may enter, without share_private");
        }
        if let Some(source) = &request.shown_source {
            options.source.clone_from(source);
        }
        tracing::debug!(mountpoint = %request.mountpoint.display(), "mounting");
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
            hides_private: request.allow_other && !request.share_private,
            configured: config
                .registries
                .keys()
                .chain(config.layouts.keys())
                .map(canonical)
                .collect(),
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

/// The layouts by canonical host names, none of which a registry has.
fn layouts(config: &Config, registries: &BTreeMap<String, HostOptions>) -> Result<BTreeMap<String, PathBuf>> {
    let mut layouts = BTreeMap::new();
    for (name, path) in &config.layouts {
        let wrong = |why: String| Error::usage(format!("[layout.{name:?}]: {why}"));
        let host = canonical_host(name).map_err(|error| wrong(error.to_string()))?;
        if host == DEFAULT_HOST || registries.contains_key(&host) {
            return Err(wrong(format!(
                "{host} is a registry; give the layout another name"
            )));
        }
        if layouts.insert(host, path.clone()).is_some() {
            return Err(wrong("two layouts have this name".to_owned()));
        }
    }
    Ok(layouts)
}

/// A registry client for what works without a store. `credential_host` is the registry that `credential` is for; without
/// it, those that the configuration names.
///
/// # Errors
/// [`Error::Usage`] for settings that cannot be meant.
pub fn client(config: &Config, credential_host: Option<&str>) -> Result<Client> {
    Client::new(client_options(config, credential_host)?)
}

/// The registry client's part of the settings.
fn client_options(config: &Config, credential_host: Option<&str>) -> Result<ClientOptions> {
    let mut hosts = BTreeMap::<String, HostOptions>::new();
    for (host, entry) in &config.registries {
        let name =
            canonical_host(host).map_err(|error| Error::usage(format!("[registry.{host:?}]: {error}")))?;
        hosts.insert(name, host_options(entry));
    }
    let layouts = layouts(config, &hosts)?;
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
        layouts,
        credential: for_all,
        credential_environment: CredentialEnvironment::of_process(),
        ca_files: config.ca.clone(),
        certs_dirs: config.certs_dirs.clone(),
        insecure: config.insecure,
        plain_http: config.plain_http,
        offline: config.offline,
        retries: config.retries,
        timeout: config.timeout,
        concurrency: config.concurrency,
        hosts,
        allow: HostPatterns::new(&config.allow),
        deny: HostPatterns::new(&config.deny),
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
    /// Unmounts; blocks. A busy mount is [`Error::Busy`] naming who is busy.
    pub(super) fn unmount(&self) -> Result<()> {
        self.mount.unmount(false)
    }

    /// Unmounts whoever uses it; blocks.
    pub(super) fn abort(&self) -> Result<()> {
        self.mount.abort()
    }

    /// Whether nobody can use it any more.
    pub(super) fn has_ended(&self) -> bool {
        self.mount.has_ended()
    }

    /// Whether it still has its place in the tree; one that was unmounted lazily has not.
    pub(super) fn is_attached(&self) -> bool {
        self.mount.is_attached()
    }

    /// Sees that it answers; blocks. Needs no network.
    pub(super) fn see_it_answers(&self) -> Result<()> {
        self.mount.see_it_answers()
    }

    /// Waits until the kernel has ended the session, whoever unmounted.
    pub(super) async fn ended(&self) {
        self.mount.ended().await;
    }

    /// The requests that reached the daemon, by operation.
    pub(super) fn requests(&self) -> Value {
        json!(self.mount.counters().by_operation)
    }

    /// Whether nobody but the owner may enter, because what is mounted came with his credentials.
    pub(super) fn is_private(&self) -> bool {
        self.tree.is_private()
    }

    /// The image that is mounted, where it is one.
    pub(super) fn digest(&self) -> Option<Digest> {
        self.tree.digest()
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
