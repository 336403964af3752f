//! Which images anyone may have, and which came with somebody's credentials.
//!
//! Noted is what a registry gave without credentials, never what needed them: an image of which nothing is known counts as
//! private, so a lost database makes nothing public. What came with credentials may be open to everyone all the same, as
//! most of Docker Hub is for who is logged in there. That is asked once, without credentials, and only where it matters. An
//! image that was open once stays so: its digest means the same bytes for ever.
//!
//! Names are another matter: a catalog shows a user what is his, and what was visited may have been private. So registries
//! that were asked for anything with credentials are noted too.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use crate::digest::Digest;
use crate::error::Result;
use crate::fetch::single_flight::SingleFlight;
use crate::fetch::{Fetcher, blocking};
use crate::registry::Client;
use crate::registry::reference::Repository;

/// How long a registry that refused is not asked again.
const REST: Duration = Duration::from_secs(300);
/// Images whose state is kept in memory.
const KEPT_MAX: usize = 16_384;
/// Registries whose state is. One beyond that counts as not having answered yet, unless it was asked with credentials.
const HOSTS_MAX: usize = 4096;

/// An image or index in a repository.
pub type ImageId = (Repository, Digest);

/// What is known about who may have what.
#[derive(Debug)]
pub struct Openness {
    fetcher: Arc<Fetcher>,
    /// Made when it is first needed: most mounts never do.
    anonymous: OnceLock<Result<Client>>,
    open: Mutex<LruCache<ImageId, ()>>,
    resting: Mutex<LruCache<ImageId, Instant>>,
    checks: SingleFlight<ImageId, bool>,
    /// The registries that answered, and whether any of their answers needed credentials, in this process or before.
    hosts: Mutex<HashMap<String, bool>>,
}

fn at_most<V>(images: usize) -> Mutex<LruCache<ImageId, V>> {
    Mutex::new(LruCache::new(NonZeroUsize::MIN.saturating_add(images - 1)))
}

impl Openness {
    /// Nothing asked yet.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>) -> Arc<Self> {
        Arc::new(Self {
            fetcher,
            anonymous: OnceLock::new(),
            open: at_most(KEPT_MAX),
            resting: at_most(KEPT_MAX),
            checks: SingleFlight::default(),
            hosts: Mutex::default(),
        })
    }

    /// Reads which registries have answered before, and which of them were asked with credentials.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`].
    pub async fn load(&self) -> Result<()> {
        let store = Arc::clone(self.fetcher.store());
        let read = move || Ok((store.db().visited("")?, store.db().hosts_with_credentials()?));
        let (visited, private) = blocking(self.fetcher.runtime(), read).await?;
        let mut hosts = self.hosts.lock();
        for (host, _) in visited.iter().filter_map(|repository| repository.split_once('/')) {
            if !hosts.contains_key(host) {
                hosts.insert(host.to_owned(), false);
            }
        }
        hosts.extend(private.into_iter().map(|host| (host, true)));
        Ok(())
    }

    /// Notes how an image came. To be noted before what came is kept.
    pub async fn came(&self, image: ImageId, with_credentials: bool) {
        self.host_answered(image.0.host(), with_credentials).await;
        if !with_credentials {
            self.note_open(image).await;
        }
    }

    /// Notes how a registry answered. To be noted before the answer is kept: then nothing is ever found in the store of
    /// which it is not known that it may be private.
    pub async fn host_answered(&self, host: &str, with_credentials: bool) {
        let known = {
            let mut hosts = self.hosts.lock();
            if hosts.len() >= HOSTS_MAX && !with_credentials {
                return;
            }
            let known = hosts.entry(host.to_owned()).or_insert(false);
            std::mem::replace(known, *known || with_credentials)
        };
        if known || !with_credentials {
            return;
        }
        let (store, host) = (Arc::clone(self.fetcher.store()), host.to_owned());
        let write = move || store.db().put_host_with_credentials(&host);
        if let Err(error) = blocking(self.fetcher.runtime(), write).await {
            tracing::warn!(%error, "cannot note that a registry was asked with credentials");
        }
    }

    /// Whether anything was ever asked of a registry with credentials, so that what is known of it may be private; `None`
    /// where it has not answered yet.
    #[must_use]
    pub fn may_be_private(&self, host: &str) -> Option<bool> {
        if self.is_layout(host) {
            return Some(false);
        }
        self.hosts.lock().get(host).copied()
    }

    /// Whether the images of `host` are files, which need no credentials.
    fn is_layout(&self, host: &str) -> bool {
        self.fetcher.client().layout_path(host).is_some()
    }

    async fn note_open(&self, image: ImageId) {
        if self.open.lock().put(image.clone(), ()).is_some() {
            return;
        }
        let store = Arc::clone(self.fetcher.store());
        let write = move || store.db().put_open_image(&image.0.to_string(), &image.1);
        if let Err(error) = blocking(self.fetcher.runtime(), write).await {
            tracing::warn!(%error, "cannot note that an image is open to everyone");
        }
    }

    /// Whether all of them are known to be open. Asks the network nothing.
    pub async fn are_open(&self, images: &[ImageId]) -> bool {
        for image in images {
            if self.is_layout(image.0.host()) || self.open.lock().get(image).is_some() {
                continue;
            }
            let (store, asked) = (Arc::clone(self.fetcher.store()), image.clone());
            let read = move || store.db().is_open_image(&asked.0.to_string(), &asked.1);
            match blocking(self.fetcher.runtime(), read).await {
                Ok(true) => self.open.lock().put(image.clone(), ()),
                Ok(false) => return false,
                Err(error) => {
                    tracing::warn!(%error, "cannot look up who may see an image");
                    return false;
                }
            };
        }
        true
    }

    /// Whether all of them are open, by asking the registry without credentials where it is not known. What it refused
    /// is not asked for again for a while.
    pub async fn check(self: &Arc<Self>, images: &[ImageId]) -> bool {
        for image in images {
            if self.are_open(std::slice::from_ref(image)).await {
                continue;
            }
            let rests = |since: &Instant| since.elapsed() < REST;
            if self.resting.lock().get(image).is_some_and(rests) {
                return false;
            }
            let (openness, asked) = (Arc::clone(self), image.clone());
            let work = async move { Ok(openness.ask(asked).await) };
            let checked = self.checks.run(self.fetcher.runtime(), image.clone(), work);
            if !checked.await.unwrap_or(false) {
                return false;
            }
        }
        true
    }

    async fn ask(&self, image: ImageId) -> bool {
        let client = self
            .anonymous
            .get_or_init(|| self.fetcher.client().without_credentials());
        let given = match client {
            Ok(client) => client.has_manifest(&image.0, &image.1).await,
            Err(error) => Err(error.clone()),
        };
        tracing::debug!(repository = %image.0, digest = %image.1, ?given, "asked whether it is for everyone");
        let is_open = matches!(given, Ok(true));
        if is_open {
            self.note_open(image).await;
        } else {
            self.resting.lock().put(image, Instant::now());
        }
        is_open
    }
}
