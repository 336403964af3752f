//! A fetcher with an empty store, and the demo registry from which it fetches.

use std::sync::Arc;
use std::time::Duration;

use registryfs::demo::{Behaviour, Content, DemoRegistry, Image};
use registryfs::fetch::{FetchOptions, Fetcher};
use registryfs::image::manifest::{Document, Manifest};
use registryfs::registry::{Client, ClientOptions, Timing};
use registryfs::store::Store;

/// A registry, and a fetcher with a store in `dir`.
pub(crate) struct Fetching {
    pub(crate) registry: DemoRegistry,
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) dir: tempfile::TempDir,
}

impl Fetching {
    /// From a registry with `content`. What fails is not tried again.
    pub(crate) fn from(content: Content, options: impl FnOnce(&Store) -> FetchOptions) -> Self {
        let registry = DemoRegistry::start(content, Behaviour::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let options = options(&store);
        let client = ClientOptions {
            plain_http: true,
            retries: 0,
            timeout: options.timeout,
            timing: Timing {
                backoff: Duration::from_millis(1),
                ..Timing::default()
            },
            ..ClientOptions::default()
        };
        let client = Client::new(client).unwrap();
        let fetcher = Fetcher::new(client, store, runtime.handle().clone(), options);
        Self {
            registry,
            runtime,
            fetcher,
            dir,
        }
    }
}

/// The manifest of an image.
pub(crate) fn manifest_of(image: &Image) -> Manifest {
    match Document::parse("manifest", &image.manifest).unwrap() {
        Document::Manifest(manifest) => manifest,
        Document::Index(_) => panic!("it is no manifest"),
    }
}
