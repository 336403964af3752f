//! What names mean now: tags to digests, digests to documents, and listings. Every answer of a registry is kept, and what
//! is kept answers when the registry does not.
//!
//! A tag is asked for again after `tag_ttl`. If a digest of it is known, that question waits [`REVALIDATION_WAIT`] and goes
//! on in the background; until an authoritative answer comes, the last known digest stands, marked stale.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::error::Elapsed;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::fetch::single_flight::SingleFlight;
use crate::fetch::{Fetcher, blocking};
use crate::image::answers::Listing;
use crate::image::openness::Openness;
use crate::registry::Pager;
use crate::registry::reference::{Repository, Target};
use crate::store::db::{ListingRecord, TagRecord};

/// How long the revalidation of a known tag is waited for.
pub const REVALIDATION_WAIT: Duration = Duration::from_millis(500);
/// How long what a layout on disk says holds.
const LAYOUT_TTL: Duration = Duration::from_secs(1);
/// How long "there is no such tag" holds.
const ABSENT_TTL: Duration = Duration::from_secs(10);
/// How long a listing that is known is waited for when it is asked for again.
const RELISTING_WAIT: Duration = Duration::from_secs(5);
/// After a revalidation failed, the last known digest is given at once for this long.
const STALE_REST: Duration = Duration::from_secs(5);
/// The most names kept of a listing.
const LISTING_NAMES_MAX: usize = 1_000_000;
/// Why something is stale, where the wait for the answer has ended and the question goes on.
const NO_ANSWER: &str = "no answer yet";
/// The most tags whose failed revalidation is remembered.
const RESTING_MAX: usize = 4096;

/// A tag's digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagDigest {
    /// The digest.
    pub digest: Digest,
    /// Why it could not be checked, where that is so and this is what was last heard.
    pub stale: Option<String>,
    /// For how long it need not be asked for again.
    pub valid_for: Duration,
}

/// Resolves names, with the store's memory behind it.
#[derive(Debug)]
pub struct Resolver {
    fetcher: Arc<Fetcher>,
    openness: Arc<Openness>,
    tag_ttl: Duration,
    checks: SingleFlight<(Repository, String), Option<Digest>>,
    documents: SingleFlight<(Repository, Digest), Bytes>,
    listings: SingleFlight<String, Arc<Vec<String>>>,
    resting: Mutex<LruCache<(Repository, String), Instant>>,
    stale: Mutex<HashMap<String, String>>,
}

impl Resolver {
    /// A resolver that trusts a tag's digest for `tag_ttl`.
    #[must_use]
    pub fn new(fetcher: Arc<Fetcher>, tag_ttl: Duration) -> Arc<Self> {
        Arc::new(Self {
            openness: Openness::new(Arc::clone(&fetcher)),
            fetcher,
            tag_ttl,
            checks: SingleFlight::default(),
            documents: SingleFlight::default(),
            listings: SingleFlight::default(),
            resting: Mutex::new(LruCache::new(NonZeroUsize::MIN.saturating_add(RESTING_MAX - 1))),
            stale: Mutex::default(),
        })
    }

    /// What is open to everyone.
    #[must_use]
    pub fn openness(&self) -> &Arc<Openness> {
        &self.openness
    }

    /// How long a tag's digest is trusted.
    #[must_use]
    pub fn tag_ttl(&self) -> Duration {
        self.tag_ttl
    }

    /// How long "there is no such image" holds for the images of a host.
    #[must_use]
    pub fn absent_ttl(&self, host: &str) -> Duration {
        if self.is_layout(host) {
            LAYOUT_TTL
        } else {
            ABSENT_TTL
        }
    }

    /// The tags and listings that could not be checked when they were last asked for, sorted.
    #[must_use]
    pub fn stale_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.stale.lock().keys().cloned().collect();
        names.sort();
        names
    }

    /// The digest that a tag has now.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Denied`] from the registry; of the network only if no digest is known.
    pub async fn tag(self: &Arc<Self>, repository: &Repository, tag: &str) -> Result<TagDigest> {
        let name = format!("{repository}:{tag}");
        let client = self.fetcher.client();
        if let Some(path) = client.layout_path(repository.host()) {
            let digest = client.tag_digest(repository, tag).await?;
            let digest = digest.ok_or_else(|| {
                let why = format!("the layout {} has no such image", path.display());
                Error::not_found(&name, why)
            })?;
            return Ok(TagDigest {
                digest,
                stale: None,
                valid_for: LAYOUT_TTL,
            });
        }
        let record = self.tag_record(repository, tag).await?;
        let known = match record {
            Some(TagRecord {
                digest: Some(digest), ..
            }) => Some(digest),
            _ => None,
        };
        if let Some(record) = record {
            let age = record.age();
            match record.digest {
                Some(digest) if age < self.tag_ttl => {
                    let valid_for = self.tag_ttl.saturating_sub(age);
                    return Ok(TagDigest {
                        digest,
                        stale: None,
                        valid_for,
                    });
                }
                None if age < ABSENT_TTL => return Err(no_such_tag(&name)),
                _ => {}
            }
        }
        let check = self.check(repository, tag, known);
        let Some(digest) = known else {
            return match check.await {
                Ok(Some(digest)) => Ok(self.fresh(digest)),
                Ok(None) => Err(no_such_tag(&name)),
                // What is known is that there was none.
                Err(error) if error.is_network() && record.is_some() => Err(no_such_tag(&name)),
                Err(error) => Err(error),
            };
        };
        let key = (repository.clone(), tag.to_owned());
        if self
            .resting
            .lock()
            .get(&key)
            .is_some_and(|since| since.elapsed() < STALE_REST)
        {
            let why = self.stale.lock().get(&name).cloned();
            return Ok(stale(digest, why.unwrap_or_else(|| NO_ANSWER.to_owned())));
        }
        match tokio::time::timeout(REVALIDATION_WAIT, check).await {
            Ok(Ok(Some(digest))) => Ok(self.fresh(digest)),
            Ok(Ok(None)) => Err(no_such_tag(&name)),
            Ok(Err(error)) if is_authoritative(&error) => Err(error),
            failed => {
                self.resting.lock().put(key, Instant::now());
                Ok(stale(digest, self.mark_stale(name, failed)))
            }
        }
    }

    fn fresh(&self, digest: Digest) -> TagDigest {
        TagDigest {
            digest,
            stale: None,
            valid_for: self.tag_ttl,
        }
    }

    /// What was last heard of a tag, whatever its age. Asks the network nothing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn tag_record(&self, repository: &Repository, tag: &str) -> Result<Option<TagRecord>> {
        let store = Arc::clone(self.fetcher.store());
        let (repository, tag) = (repository.to_string(), tag.to_owned());
        blocking(self.fetcher.runtime(), move || store.db().tag(&repository, &tag)).await
    }

    /// Asks the registry for a tag's digest and keeps the answer. A tag that is not known yet is asked for by its
    /// manifest, so that one request brings both.
    async fn check(
        self: &Arc<Self>,
        repository: &Repository,
        tag: &str,
        known: Option<Digest>,
    ) -> Result<Option<Digest>> {
        let key = (repository.clone(), tag.to_owned());
        let resolver = Arc::clone(self);
        let (repository, tag) = key.clone();
        let work = async move {
            let client = resolver.fetcher.client();
            let answer = match known {
                Some(_) => client.tag_digest(&repository, &tag).await,
                None => match client.manifest(&repository, &Target::Tag(tag.clone())).await {
                    Ok(manifest) => {
                        let image = (repository.clone(), manifest.digest);
                        resolver.openness.came(image, manifest.with_credentials).await;
                        resolver
                            .fetcher
                            .keep_document(manifest.digest, manifest.bytes, manifest.media_type)
                            .await;
                        Ok(Some(manifest.digest))
                    }
                    Err(Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(error),
                },
            };
            let digest = answer?;
            resolver.stale.lock().remove(&format!("{repository}:{tag}"));
            let store = Arc::clone(resolver.fetcher.store());
            let runtime = resolver.fetcher.runtime();
            let keep = move || store.db().put_tag(&repository.to_string(), &tag, digest.as_ref());
            blocking(runtime, keep).await?;
            Ok(digest)
        };
        self.checks.run(self.fetcher.runtime(), key, work).await
    }

    /// The manifest, index or configuration with this digest.
    ///
    /// # Errors
    /// As the registry client's `manifest`.
    pub async fn document(self: &Arc<Self>, repository: &Repository, digest: &Digest) -> Result<Bytes> {
        if let Some(bytes) = self.fetcher.kept_document(digest).await? {
            return Ok(bytes);
        }
        let resolver = Arc::clone(self);
        let key = (repository.clone(), *digest);
        let (repository, digest) = key.clone();
        let work = async move {
            let target = Target::Digest(digest);
            let manifest = resolver.fetcher.client().manifest(&repository, &target).await?;
            let image = (repository, digest);
            resolver.openness.came(image, manifest.with_credentials).await;
            resolver
                .fetcher
                .keep_document(digest, manifest.bytes.clone(), manifest.media_type)
                .await;
            Ok(manifest.bytes)
        };
        self.documents.run(self.fetcher.runtime(), key, work).await
    }

    /// The media type of a kept document.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn media_type(&self, digest: &Digest) -> Result<Option<String>> {
        let (store, digest) = (Arc::clone(self.fetcher.store()), *digest);
        blocking(self.fetcher.runtime(), move || store.db().media_type(&digest)).await
    }

    /// The tags of a repository, sorted.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Denied`] from the registry; of the network only if no listing is known.
    pub async fn tags(self: &Arc<Self>, repository: &Repository) -> Result<Listing> {
        if self.is_layout(repository.host()) {
            return listing_now(self.fetcher.client().tags(repository)).await;
        }
        let repository = repository.clone();
        let of = format!("tags {repository}");
        let host = repository.host().to_owned();
        let pager = move |fetcher: &Fetcher| fetcher.client().tags(&repository);
        self.listing(&host, of, pager).await
    }

    /// The repositories that a registry's catalog lists, sorted.
    ///
    /// # Errors
    /// As [`Self::tags`]; [`Error::Unsupported`] or [`Error::Denied`] too from a registry without a catalog.
    pub async fn catalog(self: &Arc<Self>, host: &str) -> Result<Listing> {
        if self.is_layout(host) {
            return listing_now(self.fetcher.client().catalog(host)).await;
        }
        let of = format!("catalog {host}");
        let asked = host.to_owned();
        let pager = move |fetcher: &Fetcher| fetcher.client().catalog(&asked);
        self.listing(host, of, pager).await
    }

    /// What was last heard of a repository's tags, whatever its age. Asks the network nothing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn known_tags(&self, repository: &Repository) -> Result<Option<ListingRecord>> {
        self.listing_record(&format!("tags {repository}")).await
    }

    /// What was last heard of a registry's catalog, whatever its age. Asks the network nothing.
    ///
    /// # Errors
    /// [`Error::Io`]; what is wrong with a layout on disk.
    pub async fn known_catalog(&self, host: &str) -> Result<Option<ListingRecord>> {
        if self.is_layout(host) {
            let names = listing_now(self.fetcher.client().catalog(host)).await?.names;
            let checked = SystemTime::now();
            return Ok(Some(ListingRecord { names, checked }));
        }
        self.listing_record(&format!("catalog {host}")).await
    }

    /// The repositories of a registry of which a tag was ever found; none of a layout, whose catalog has them all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub async fn visited(&self, host: &str) -> Result<Vec<String>> {
        if self.is_layout(host) {
            return Ok(Vec::new());
        }
        let (store, host) = (Arc::clone(self.fetcher.store()), host.to_owned());
        blocking(self.fetcher.runtime(), move || store.db().visited(&host)).await
    }

    fn is_layout(&self, host: &str) -> bool {
        self.fetcher.client().layout_path(host).is_some()
    }

    async fn listing_record(&self, of: &str) -> Result<Option<ListingRecord>> {
        let (store, of) = (Arc::clone(self.fetcher.store()), of.to_owned());
        blocking(self.fetcher.runtime(), move || store.db().listing(&of)).await
    }

    async fn listing<P>(self: &Arc<Self>, host: &str, of: String, pager: P) -> Result<Listing>
    where
        P: FnOnce(&Fetcher) -> Pager + Send + 'static,
    {
        let known = self.listing_record(&of).await?;
        if let Some(record) = known.as_ref().filter(|record| record.age() < self.tag_ttl) {
            return Ok(Listing {
                names: record.names.clone(),
                stale: None,
            });
        }
        let resolver = Arc::clone(self);
        let (host, name) = (host.to_owned(), of.clone());
        let work = async move { resolver.fetch_listing(&host, &name, pager).await.map(Arc::new) };
        let asked = self.listings.run(self.fetcher.runtime(), of.clone(), work);
        let Some(record) = known else {
            return Ok(Listing {
                names: asked.await?.to_vec(),
                stale: None,
            });
        };
        match tokio::time::timeout(RELISTING_WAIT, asked).await {
            Ok(Ok(names)) => Ok(Listing {
                names: names.to_vec(),
                stale: None,
            }),
            Ok(Err(error)) if is_authoritative(&error) => Err(error),
            failed => Ok(Listing {
                names: record.names,
                stale: Some(self.mark_stale(of, failed)),
            }),
        }
    }

    async fn fetch_listing<P>(&self, host: &str, of: &str, pager: P) -> Result<Vec<String>>
    where
        P: FnOnce(&Fetcher) -> Pager + Send + 'static,
    {
        let mut pager = pager(&self.fetcher);
        let mut names = Vec::new();
        while let Some(page) = pager.next_page().await? {
            names.extend(page);
            if names.len() > LISTING_NAMES_MAX {
                return Err(Error::unsupported(of, "it has more than a million names"));
            }
        }
        self.openness.host_answered(host, pager.with_credentials()).await;
        self.stale.lock().remove(of);
        names.sort();
        names.dedup();
        let (store, of, kept) = (Arc::clone(self.fetcher.store()), of.to_owned(), names.clone());
        let keep = move || store.db().put_listing(&of, &kept);
        if let Err(error) = blocking(self.fetcher.runtime(), keep).await {
            tracing::warn!(%error, "cannot keep a listing");
        }
        Ok(names)
    }

    /// Notes a name for `status`, and gives the reason; beyond a bound only the fact counts.
    fn mark_stale<T>(&self, name: String, failed: std::result::Result<Result<T>, Elapsed>) -> String {
        let why = match failed {
            Ok(Err(error)) => error.to_string(),
            Ok(Ok(_)) | Err(_) => NO_ANSWER.to_owned(),
        };
        let mut stale = self.stale.lock();
        if stale.len() < RESTING_MAX || stale.contains_key(&name) {
            stale.insert(name, why.clone());
        }
        why
    }
}

/// The whole of a list.
async fn listing_now(mut pager: Pager) -> Result<Listing> {
    let mut names = Vec::new();
    while let Some(page) = pager.next_page().await? {
        names.extend(page);
    }
    Ok(Listing { names, stale: None })
}

fn stale(digest: Digest, why: String) -> TagDigest {
    TagDigest {
        digest,
        stale: Some(why),
        valid_for: STALE_REST,
    }
}

/// Whether a registry has said something about the name itself. Anything else, be it a broken network or a proxy's web
/// page, leaves what is known as it is: an error would detach what is mounted or open below.
fn is_authoritative(error: &Error) -> bool {
    matches!(error, Error::NotFound { .. } | Error::Denied { .. })
}

fn no_such_tag(name: &str) -> Error {
    Error::not_found(name, "the registry has no such tag, or it is private")
}
