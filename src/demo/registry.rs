//! The running demo registry and the handle to steer it by. It has its own runtime, so that it can be used from
//! blocking tests, asynchronous tests and the command alike, and a busy test cannot slow its answers down.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

use crate::error::{Error, Result};

use super::behaviour::{Behaviour, Endpoint, Fault, Scope};
use super::content::Content;
use super::ledger::{self, Record};
use super::listener::{Listening, Port};
use super::server::{Place, Shared};

/// Where the registry listens.
#[derive(Debug, Clone)]
pub struct Listen {
    /// A loopback address; port 0 is any free one. The storage listener is on the same address, another port.
    pub address: SocketAddr,
    /// TLS for both listeners; `None` is plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

impl Default for Listen {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            tls: None,
        }
    }
}

/// A running registry; dropping it stops it.
#[derive(Debug)]
pub struct DemoRegistry {
    handle: Handle,
    _runtime: OwnRuntime,
}

/// A runtime that may be dropped inside of another one, as by an asynchronous test or a command: it is not waited for.
#[derive(Debug)]
struct OwnRuntime(Option<Runtime>);

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl DemoRegistry {
    /// Starts on a free port of 127.0.0.1, with plain HTTP. Connections are accepted from the moment this returns.
    ///
    /// # Errors
    /// [`Error::Io`] when no port can be had.
    pub fn start(content: Content, behaviour: Behaviour) -> Result<Self> {
        Self::start_on(&Listen::default(), content, behaviour)
    }

    /// Starts where `listen` says.
    ///
    /// # Errors
    /// [`Error::Usage`] for an address that is not a loopback one, [`Error::Busy`] for one that is taken, [`Error::Io`]
    /// when it cannot be had for another reason.
    pub fn start_on(listen: &Listen, content: Content, behaviour: Behaviour) -> Result<Self> {
        let address = listen.address;
        if !address.ip().is_loopback() {
            return Err(Error::usage(format!(
                "{address}: the demo registry listens on loopback addresses only, such as 127.0.0.1:0"
            )));
        }
        let failed = |error| cannot_listen(address, &error);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("demo-registry")
            .enable_all()
            .build()
            .map_err(failed)?;
        let spawner = runtime.handle().clone();
        let runtime = OwnRuntime(Some(runtime));
        let entered = spawner.enter();
        let registry = Port::reserve(address).map_err(failed)?;
        let storage = Port::reserve(SocketAddr::new(address.ip(), 0)).map_err(failed)?;
        drop(entered);
        let shared = Shared {
            behaviour: Mutex::new(behaviour),
            content: Mutex::new(content),
            ..Shared::default()
        };
        let handle = Handle(Arc::new(Inner {
            shared: Arc::new(shared),
            registry,
            storage,
            tls: listen.tls.clone(),
            runtime: spawner,
            listening: Mutex::new(Vec::new()),
        }));
        handle.restart()?;
        Ok(Self {
            handle,
            _runtime: runtime,
        })
    }

    /// The registry's host as a reference spells it, such as `127.0.0.1:40123`.
    #[must_use]
    pub fn host(&self) -> String {
        self.handle.host()
    }

    /// The handle to steer it by.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for DemoRegistry {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

/// Steers a running registry. Clones steer the same one; they do not keep it running.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    registry: Port,
    storage: Port,
    tls: Option<Arc<rustls::ServerConfig>>,
    runtime: tokio::runtime::Handle,
    listening: Mutex<Vec<Listening>>,
}

impl Handle {
    /// The registry's host as a reference spells it, such as `127.0.0.1:40123`.
    #[must_use]
    pub fn host(&self) -> String {
        self.0.registry.address().to_string()
    }

    /// Address and port that redirects lead to.
    #[must_use]
    pub fn storage_host(&self) -> String {
        self.0.storage.address().to_string()
    }

    /// Changes the behaviour from the next request on.
    pub fn update(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.0.shared.behaviour.lock());
    }

    /// Changes the content from the next request on.
    pub fn edit<T>(&self, change: impl FnOnce(&mut Content) -> T) -> T {
        change(&mut self.0.shared.content.lock())
    }

    /// Lets `fault` happen to the requests of `scope`. Several faults may happen to one request.
    pub fn inject(&self, scope: Scope, fault: Fault) {
        self.0.shared.faults.lock().inject(scope, fault);
    }

    /// Takes all faults back.
    pub fn clear_faults(&self) {
        self.0.shared.faults.lock().clear();
    }

    /// Revokes all tokens given so far.
    pub fn expire_tokens(&self) {
        self.0.shared.tokens.lock().clear();
    }

    /// Invalidates all signed URLs given so far.
    pub fn expire_signed_urls(&self) {
        self.0.shared.signer.lock().expire_all();
    }

    /// All requests since the start or the last [`Handle::clear_ledger`], in the order of arrival; of the last 100,000.
    #[must_use]
    pub fn ledger(&self) -> Vec<Record> {
        self.0.shared.ledger.lock().records()
    }

    /// Forgets all requests so far.
    pub fn clear_ledger(&self) {
        self.0.shared.ledger.lock().clear();
    }

    /// The requests whose path contains `text`.
    #[must_use]
    pub fn requests_matching(&self, text: &str) -> Vec<Record> {
        let mut records = self.ledger();
        records.retain(|record| record.path.contains(text));
        records
    }

    /// How many requests had to wait for one another: see [`ledger::in_sequence`].
    #[must_use]
    pub fn requests_in_sequence(&self) -> usize {
        ledger::in_sequence(&self.ledger())
    }

    /// Closes the listeners and all connections: whoever connects is refused, as by a registry that was killed. The
    /// ports stay reserved. Does nothing if already stopped.
    pub fn stop(&self) {
        for listening in std::mem::take(&mut *self.0.listening.lock()) {
            listening.stop();
        }
    }

    /// Listens again on the same ports. Does nothing if already listening.
    ///
    /// # Errors
    /// [`Error::Busy`] or [`Error::Io`] when the ports cannot be listened on.
    pub fn restart(&self) -> Result<()> {
        let inner = &*self.0;
        let mut listening = inner.listening.lock();
        if !listening.is_empty() {
            return Ok(());
        }
        let _entered = inner.runtime.enter();
        for (port, endpoint) in [
            (&inner.registry, Endpoint::Registry),
            (&inner.storage, Endpoint::Storage),
        ] {
            let place = Place {
                endpoint,
                scheme: if inner.tls.is_some() { "https" } else { "http" },
                host: self.host(),
                storage_host: self.storage_host(),
            };
            let tls = inner.tls.clone().map(TlsAcceptor::from);
            let started = port.listen(place, tls, Arc::clone(&inner.shared));
            listening.push(started.map_err(|error| cannot_listen(port.address(), &error))?);
        }
        Ok(())
    }
}

fn cannot_listen(address: SocketAddr, error: &std::io::Error) -> Error {
    let what = format!("demo registry on {address}");
    if error.kind() == std::io::ErrorKind::AddrInUse {
        return Error::busy(
            what,
            "the port is taken; choose another one, or port 0 for any free one",
        );
    }
    Error::io(what, error)
}
