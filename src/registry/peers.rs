//! Whom there is to talk to: the endpoints of registries, and the hosts that they send us to. Each has one state for all
//! who ask it, and an HTTP client of its own where it is told anything special; the others share two.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;
use reqwest::Url;
use rustls::RootCertStore;
use tokio::time::Instant;

use super::challenge::is_loopback;
use super::endpoint::Endpoint;
use super::host::{Host, HostHealth, HostSetup, Scheme};
use super::hosts::{self, EndpointSpec, PemFile, Settings};
use super::options::ClientOptions;
use super::proxy::{Way, check_environment};
use super::secret::authority;
use super::stranger::{Elsewhere, Stranger};
use super::tls::{Trust, add_authorities, client_keys, http_client};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Registries whose endpoints are kept; names of registries come from users.
const REGISTRIES_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Other hosts whose state is kept; their names come from redirects.
const PEERS_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// For how long the files that say something of a registry are believed not to have changed.
const BELIEVED_FOR: Duration = Duration::from_secs(30);
/// Docker Hub's API does not live under its name.
const HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// The endpoints of a registry as they were last read.
struct Resolved {
    specs: Vec<EndpointSpec>,
    read: Instant,
    endpoints: Arc<[Arc<Endpoint>]>,
}

/// A host that is no endpoint, the authorities that were trusted by whoever sent us there, and whether that was a manifest.
type PeerKey = (String, Digest, Option<Stranger>);

/// What a host is to us.
enum Role {
    /// A registry, or one whom a registry sends us to.
    Own,
    /// A mirror of the registry with this name.
    MirrorFor(String),
    /// One whom only a manifest names.
    Stranger(Stranger),
}

/// The hosts, and the HTTP clients that talk to them.
pub(super) struct Transport {
    pub(super) options: Arc<ClientOptions>,
    registries: Mutex<LruCache<String, Resolved>>,
    peers: Mutex<LruCache<PeerKey, Arc<Host>>>,
    roots: RootCertStore,
    proxied: reqwest::Client,
    direct: reqwest::Client,
}

impl Transport {
    /// # Errors
    /// [`Error::Usage`] for certificates and for settings of single registries that cannot be meant.
    pub(super) fn new(options: ClientOptions) -> Result<Self> {
        check_environment()?;
        hosts::validate(&options)?;
        let connect = options.timing.connect;
        let mut roots = RootCertStore::empty();
        for path in &options.ca_files {
            let file = PemFile::read(path).map_err(|error| {
                Error::usage(format!("{error}; correct --ca, REGISTRYFS_CA or the key `ca`"))
            })?;
            add_authorities(&mut roots, &file)?;
        }
        let general = match options.insecure {
            true => Trust::Anything,
            false => Trust::SystemAnd(roots.clone()),
        };
        Ok(Self {
            registries: Mutex::new(LruCache::new(REGISTRIES_MAX)),
            peers: Mutex::new(LruCache::new(PEERS_MAX)),
            roots,
            proxied: http_client(general.clone(), None, &Way::Environment, connect, None)?,
            direct: http_client(general, None, &Way::Direct, connect, None)?,
            options: Arc::new(options),
        })
    }

    /// The endpoints of the registry with the canonical name `name`, in the order in which they are asked. Files are
    /// read at the first use and again later; endpoints of which they say the same as before stay what they are.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file that cannot be read or understood.
    pub(super) async fn endpoints(&self, name: &str) -> Result<Arc<[Arc<Endpoint>]>> {
        if let Some(known) = self.registries.lock().get(name)
            && known.read.elapsed() < BELIEVED_FOR
        {
            return Ok(Arc::clone(&known.endpoints));
        }
        let (options, registry) = (Arc::clone(&self.options), name.to_owned());
        let specs = reading(move || hosts::resolve(&options, &registry)).await?;
        let mut registries = self.registries.lock();
        if let Some(known) = registries.get_mut(name)
            && known.specs == specs
        {
            known.read = Instant::now();
            return Ok(Arc::clone(&known.endpoints));
        }
        let endpoints: Arc<[_]> = specs
            .iter()
            .map(|spec| {
                let host = Arc::new(self.new_endpoint_host(spec, name)?);
                Ok(Arc::new(Endpoint::new(host, spec, name)))
            })
            .collect::<Result<_>>()?;
        let resolved = Resolved {
            specs,
            read: Instant::now(),
            endpoints: Arc::clone(&endpoints),
        };
        registries.put(name.to_owned(), resolved);
        Ok(endpoints)
    }

    /// The host that `url` names, to which `from` sent us: `from` itself, a token service, or a blob store. The
    /// authorities that `from` is trusted by count there too; its keys, headers and doubts do not.
    ///
    /// # Errors
    /// As [`Self::endpoints`].
    pub(super) async fn peer(&self, from: &Arc<Host>, url: &Url) -> Result<Arc<Host>> {
        match from.is_at(url) {
            true => Ok(Arc::clone(from)),
            false => self.met_host(from, url, from.stranger).await,
        }
    }

    /// The host of a URL that a manifest names, which came from the registry at `from`. It is told nothing of who we are, be
    /// it that registry itself.
    ///
    /// # Errors
    /// As [`Self::endpoints`].
    pub(super) async fn stranger(
        &self,
        from: &Arc<Host>,
        url: &Url,
        stranger: Stranger,
    ) -> Result<Arc<Host>> {
        self.met_host(from, url, Some(stranger)).await
    }

    async fn met_host(&self, from: &Arc<Host>, url: &Url, stranger: Option<Stranger>) -> Result<Arc<Host>> {
        let authority = authority(url);
        let name = if authority == HUB.1 {
            HUB.0.to_owned()
        } else {
            authority
        };
        let inherited: Vec<u8> = from.ca.iter().flat_map(|file| file.pem.clone()).collect();
        let key = (name.clone(), Digest::of(&inherited), stranger);
        if let Some(known) = self.peers.lock().get(&key) {
            return Ok(Arc::clone(known));
        }
        let options = Arc::clone(&self.options);
        let settings = reading(move || hosts::of_peer(&options, &name)).await?;
        let (settings, role) = match stranger {
            Some(stranger) => (settings.without_identity(), Role::Stranger(stranger)),
            None => (settings, Role::Own),
        };
        let above = Settings {
            ca: from.ca.to_vec(),
            ..Settings::default()
        };
        let mut peers = self.peers.lock();
        if let Some(known) = peers.get(&key) {
            return Ok(Arc::clone(known));
        }
        let host = Arc::new(self.new_host(&key.0, &key.0, None, above.over(settings), role, "/v2/")?);
        peers.put(key, Arc::clone(&host));
        Ok(host)
    }

    /// Whether plain HTTP may be spoken to where `from` sends us: it is this machine, or it was asked for.
    pub(super) fn plain_allowed(&self, from: &Host, url: &Url) -> bool {
        let name = authority(url);
        let asked = self.options.hosts.get(&name).is_some_and(|host| host.plain_http);
        self.options.plain_http || asked || is_loopback(url) || (from.plain_allowed && from.is_at(url))
    }

    fn new_endpoint_host(&self, spec: &EndpointSpec, registry: &str) -> Result<Host> {
        let role = match spec.is_registry {
            true => Role::Own,
            false => Role::MirrorFor(registry.to_owned()),
        };
        let probe_path = format!("{}/", spec.base.path);
        let settings = spec.settings.clone();
        self.new_host(
            &spec.name,
            &spec.base.host,
            spec.base.scheme,
            settings,
            role,
            &probe_path,
        )
    }

    /// The host whose credentials are those of `name`, at `host`, which is `HOST[:PORT]`.
    fn new_host(
        &self,
        name: &str,
        host: &str,
        scheme: Option<Scheme>,
        settings: Settings,
        role: Role,
        probe_path: &str,
    ) -> Result<Host> {
        let (mirror_for, stranger) = match role {
            Role::Own => (None, None),
            Role::MirrorFor(registry) => (Some(registry), None),
            Role::Stranger(stranger) => (None, Some(stranger)),
        };
        let authority = if name == HUB.0 { HUB.1 } else { host };
        let loopback = Url::parse(&format!("https://{authority}/")).is_ok_and(|url| is_loopback(&url));
        let asked = self.options.hosts.get(name).is_some_and(|host| host.plain_http);
        let scheme = match scheme {
            Some(scheme) => Some(scheme),
            None if self.options.plain_http || asked => Some(Scheme::Http),
            None if loopback => None,
            None => Some(Scheme::Https),
        };
        let way = match settings.proxy.clone() {
            Some(proxy) => Way::Fixed(proxy),
            None if loopback => Way::Direct,
            None => Way::Environment,
        };
        let setup = HostSetup {
            http: match stranger.and_then(|stranger| stranger.resolver(authority)) {
                Some(resolver) => self.own_http_client(&settings, &way, Some(resolver))?,
                None => self.http_client(&settings, &way)?,
            },
            way,
            ca: settings.ca.into(),
            scheme,
            mirror_for,
            stranger,
            probe_path: probe_path.to_owned(),
            concurrency: self.options.concurrency,
            timing: self.options.timing,
        };
        Ok(Host::new(name, authority, setup))
    }

    /// The client for a host with these settings.
    fn http_client(&self, settings: &Settings, way: &Way) -> Result<reqwest::Client> {
        let insecure = self.options.insecure || settings.insecure == Some(true);
        let ordinary = insecure == self.options.insecure
            && settings.ca.is_empty()
            && settings.client.is_empty()
            && settings.connect.is_none();
        match way {
            Way::Environment if ordinary => Ok(self.proxied.clone()),
            Way::Direct if ordinary => Ok(self.direct.clone()),
            _ => self.own_http_client(settings, way, None),
        }
    }

    /// A client that no other host has.
    fn own_http_client(
        &self,
        settings: &Settings,
        way: &Way,
        resolver: Option<Arc<Elsewhere>>,
    ) -> Result<reqwest::Client> {
        let insecure = self.options.insecure || settings.insecure == Some(true);
        let mut roots = self.roots.clone();
        for file in &settings.ca {
            add_authorities(&mut roots, file)?;
        }
        let trust = match insecure {
            true => Trust::Anything,
            false => Trust::SystemAnd(roots),
        };
        let connect = settings.connect.unwrap_or(self.options.timing.connect);
        http_client(trust, client_keys(&settings.client)?, way, connect, resolver)
    }

    /// Every host that was talked to, the last one first, and the endpoints that were not needed yet.
    pub(super) fn health(&self) -> Vec<HostHealth> {
        let mut hosts: Vec<Arc<Host>> = Vec::new();
        for (_, resolved) in self.registries.lock().iter() {
            hosts.extend(
                resolved
                    .endpoints
                    .iter()
                    .map(|endpoint| Arc::clone(&endpoint.host)),
            );
        }
        hosts.extend(self.peers.lock().iter().map(|(_, host)| Arc::clone(host)));
        hosts.sort_by_key(|host| std::cmp::Reverse(host.used()));
        hosts.iter().map(|host| host.health()).collect()
    }
}

/// Reads settings from files, off the async threads.
async fn reading<T: Send + 'static>(read: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let read = tokio::task::spawn_blocking(read).await;
    read.unwrap_or_else(|error| Err(Error::network("settings of a registry", error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_hub_is_one_host_under_both_names() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let transport = Transport::new(ClientOptions::default()).unwrap();
            let endpoints = transport.endpoints("docker.io").await.unwrap();
            let hub = &endpoints[0].host;
            let url = hub.url(Scheme::Https, "/v2/").unwrap();
            assert_eq!(url.as_str(), "https://registry-1.docker.io/v2/");
            assert!(Arc::ptr_eq(hub, &transport.peer(hub, &url).await.unwrap()));
        });
    }
}
