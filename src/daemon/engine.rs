//! Wires the layers below together: configuration into store, registry client, images and trees.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::endpoints::host_options;
use super::mounted::{Carried, Mounted, Opened};
use super::protocol::MountRequest;
use super::source::MountSource;
use crate::config::{BackgroundMode, Config, KernelMode};
use crate::error::{Error, Result};
use crate::fetch::{BackgroundOptions, FetchOptions, Fetcher, PlainLimits};
use crate::fs::{Filesystem, Options, Root};
use crate::fuse::{Mount, MountOptions};
use crate::image::Images;
use crate::image::platform::Platform;
use crate::image::resolve::Resolver;
use crate::kernel::{Covering, DirectOptions, Kernel};
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
    kernel: Mutex<Option<Kernel>>,
    /// Held while kernel mode is started, which takes helpers: who only asks whether there is one need not wait.
    kernel_start: Mutex<()>,
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
            background: BackgroundOptions {
                landmarks: config.prefetch_landmarks && !config.offline,
                bytes_per_s: config.background_bytes_per_s,
                concurrency: config.concurrency,
            },
        };
        let fetcher = Fetcher::new(client, store.clone(), runtime.clone(), options);
        let resolver = Resolver::new(fetcher.clone(), config.tag_ttl);
        Ok(Self {
            images: Images::new(fetcher, resolver, config.soci_v1),
            store,
            runtime: runtime.clone(),
            config: config.clone(),
            kernel: Mutex::default(),
            kernel_start: Mutex::default(),
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
        status.insert("background".to_owned(), json!(fetcher.background()));
        status.insert("hosts".to_owned(), json!(fetcher.client().health()));
        status.insert("stale".to_owned(), json!(self.images.resolver().stale_names()));
        if let Some(kernel) = self.kernel() {
            status.insert("kernel".to_owned(), kernel.status());
        }
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
    ) -> Result<Opened> {
        let platform: Platform = match &request.platform {
            Some(text) => text.parse()?,
            None => Platform::host(),
        };
        tracing::debug!(source = %request.source, %platform, "resolving");
        self.images.resolver().openness().load().await?;
        let root = self.root(&request.source).await?;
        let mut options = self.tree_options(request, platform, status);
        let kernel = match self.kernel_for(request) {
            Ok(kernel) if matches!(root, Root::Rootfs(_)) => Carried::Whole(kernel),
            Ok(kernel) => {
                let covering = Covering::new(kernel, request.no_exec);
                options.covers = Some(covering.clone());
                Carried::Covered(covering)
            }
            Err(error) if request.kernel == KernelMode::Require => return Err(error),
            Err(error) => Carried::Not(error.to_string()),
        };
        let tree = Filesystem::open(Arc::clone(&self.images), options, &root).await?;
        Ok(Opened { tree, kernel })
    }

    /// Kernel mode for a mount, or why it is not to be had for it.
    fn kernel_for(&self, request: &MountRequest) -> Result<Kernel> {
        if request.kernel == KernelMode::Off {
            return Err(Error::unsupported("kernel mode", "it is switched off"));
        }
        tokio::task::block_in_place(|| {
            let _starting = self.kernel_start.lock();
            match self.kernel() {
                Some(kernel) => Ok(kernel),
                None => self.start_kernel(),
            }
        })
    }

    /// Starts kernel mode. Blocks.
    fn start_kernel(&self) -> Result<Kernel> {
        let options = crate::kernel::Options {
            idle: self.config.kernel_idle,
            mounts_max: self.config.kernel_mounts_max,
            budget_bytes: self.config.budget_bytes,
            journal_entries: self.config.journal_entries,
        };
        let images = Arc::clone(&self.images);
        let started = Kernel::start(images, options, &self.runtime)
            .inspect_err(|error| tracing::info!(%error, "the kernel does not serve root filesystems"))?;
        Ok(self.kernel.lock().insert(started).clone())
    }

    /// The superblocks that the kernel has of ours, if it may have any.
    pub(super) fn superblocks(&self) -> Option<watch::Receiver<usize>> {
        self.kernel().map(|kernel| kernel.superblocks())
    }

    /// Kernel mode, if any mount has it.
    pub(super) fn kernel(&self) -> Option<Kernel> {
        self.kernel.lock().clone()
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
    pub(super) fn mount(&self, request: &MountRequest, opened: Opened) -> Result<Mounted> {
        let Opened { tree, kernel } = opened;
        let kernel = match self.mount_whole(request, &tree, kernel)? {
            Whole::Mounted(mounted) => return Ok(*mounted),
            Whole::Not(kernel) => kernel,
        };
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
        let mount = Mount::start(Arc::new(tree.clone()), &options, &self.runtime)?;
        Ok(Mounted::by_fuse(mount, tree, kernel))
    }

    /// Lets the kernel mount the one image that a tree shows, where it can. In an EROFS nobody can be kept out but by the
    /// modes of its files, so what only its owner may enter stays with us.
    fn mount_whole(&self, request: &MountRequest, tree: &Filesystem, kernel: Carried) -> Result<Whole> {
        let (Carried::Whole(kernel), Some(rootfs)) = (&kernel, tree.top_rootfs()) else {
            return Ok(Whole::Not(kernel));
        };
        let options = DirectOptions {
            mountpoint: request.mountpoint.clone(),
            place: request.place.clone(),
            source: request
                .shown_source
                .clone()
                .unwrap_or_else(|| request.source.to_string()),
            no_exec: request.no_exec,
        };
        let mounted = match request.allow_other && !tree.is_private() {
            true => self.runtime.block_on(kernel.mount_at(rootfs, &options)),
            false => Err(Error::unsupported(
                "kernel mode",
                "only the owner may enter this mount, and EROFS keeps nobody out",
            )),
        };
        match mounted {
            Ok(mount) => {
                let mounted = Mounted::by_kernel(mount, tree.clone());
                Ok(Whole::Mounted(Box::new(mounted)))
            }
            Err(error) if request.kernel == KernelMode::Require => Err(error),
            Err(error) => {
                tracing::warn!(%error, "the kernel does not serve this image");
                Ok(Whole::Not(Carried::Not(error.to_string())))
            }
        }
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
            covers: None,
            background: match config.offline {
                true => BackgroundMode::Off,
                false => request.background,
            },
            status,
        }
    }

    /// Brings the store into the state that the next start trusts. Nothing may use the images any more.
    pub(super) fn close(&self) {
        self.store.close();
    }
}

/// What came of letting the kernel mount a whole tree.
enum Whole {
    Mounted(Box<Mounted>),
    Not(Carried),
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
