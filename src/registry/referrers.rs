//! What refers to a manifest: the referrers API of the distribution specification, and for registries without it the tag
//! that stands in for it.
//!
//! The list is as good as the right to push into the repository: nothing that the manifest promises is in it.

use std::sync::Arc;

use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LINK};
use serde::Deserialize;

use super::endpoint::{Endpoint, Need};
use super::host::Kind;
use super::manifest::{self, MANIFEST_BYTES_MAX, OCI_INDEX};
use super::paging::next_link;
use super::reference::{Repository, Target as Name};
use super::request::{Core, Request, Target, pull_scope};
use super::retry::{Attempts, Patience};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Pages of one list: what refers to an image is a handful.
const PAGES_MAX: usize = 32;
/// Entries of one list.
const REFERRERS_MAX: usize = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    manifests: Option<Vec<Referrer>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Referrer {
    digest: String,
    #[serde(default)]
    artifact_type: Option<String>,
}

/// The manifests of type `artifact_type` that refer to `digest`, in the registry's order.
pub(super) async fn fetch(
    core: &Arc<Core>,
    repository: &Repository,
    digest: &Digest,
    artifact_type: &str,
) -> Result<Vec<Digest>> {
    let what = format!("{repository}@{digest}: referrers");
    let mut attempts = core.begin(&what, Patience::Total)?;
    // The list changes, like what a tag names.
    let mut route = core.route(&what, repository.host(), Need::Resolve).await?;
    loop {
        let endpoint = route.current()?;
        let mut bounded = route.bounded(&attempts);
        let attempts = bounded.as_mut().unwrap_or(&mut attempts);
        let pages = Pages {
            core,
            endpoint: &endpoint,
            repository,
            digest,
            artifact_type,
        };
        match pages.all(attempts).await {
            Ok(Some(referrers)) => return Ok(referrers),
            Ok(None) => return by_tag(core, repository, digest, artifact_type).await,
            Err(error) => route.pass(error)?,
        }
    }
}

/// One list at one endpoint.
struct Pages<'a> {
    core: &'a Core,
    endpoint: &'a Endpoint,
    repository: &'a Repository,
    digest: &'a Digest,
    artifact_type: &'a str,
}

impl Pages<'_> {
    /// The whole list; nothing if the registry does not have the API.
    async fn all(&self, attempts: &mut Attempts) -> Result<Option<Vec<Digest>>> {
        let what = attempts.what.clone();
        let mut referrers = Vec::new();
        let query: String = url::form_urlencoded::byte_serialize(self.artifact_type.as_bytes()).collect();
        let path = format!(
            "/{}/referrers/{}?artifactType={query}",
            self.repository.path(),
            self.digest
        );
        let mut to = Target::Path(path);
        for _ in 0..PAGES_MAX {
            let request = Request {
                method: Method::GET,
                to,
                headers: HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(OCI_INDEX))]),
                scope: pull_scope(self.repository),
                kind: Kind::Manifest,
            };
            let (mut reached, body) = self
                .core
                .whole(self.endpoint, &request, MANIFEST_BYTES_MAX, attempts)
                .await?;
            let is_index = |text: String| text.split(';').next().map(str::trim) == Some(OCI_INDEX);
            match reached.answer.status().as_u16() {
                // A registry that does not know the path may have a page of its own for everything.
                200 if reached
                    .answer
                    .header(CONTENT_TYPE)
                    .is_some_and(|text| is_index(text.to_string())) => {}
                // What registries answer that do not have the API.
                200 | 400 | 404 | 405 | 406 | 501 => return Ok(None),
                _ => return Err(self.core.refuse(&self.endpoint.host, &what, &mut reached).await),
            }
            referrers.extend(read(&what, &body, self.artifact_type)?);
            if referrers.len() > REFERRERS_MAX {
                return Err(Error::malformed(what, "more than 4096 manifests refer to it"));
            }
            let links = reached.answer.headers().get_all(LINK).iter();
            let link = links.filter_map(|value| value.to_str().ok()).find_map(next_link);
            let Some(link) = link else {
                return Ok(Some(referrers));
            };
            let url = reached.answer.url().join(link).ok();
            let url = url.filter(|url| url.origin() == reached.answer.url().origin());
            to = Target::Page(
                url.ok_or_else(|| Error::malformed(&what, "the next page is not at the registry"))?,
            );
        }
        Err(Error::malformed(what, "its pages do not end"))
    }
}

/// What the tag says that clients keep where a registry has no list of its own: an index under the digest's name.
async fn by_tag(
    core: &Arc<Core>,
    repository: &Repository,
    digest: &Digest,
    artifact_type: &str,
) -> Result<Vec<Digest>> {
    let tag = Name::Tag(format!("sha256-{}", digest.hex()));
    match manifest::fetch(core, repository, &tag).await {
        Ok(index) => read(&manifest::name(repository, &tag), &index.bytes, artifact_type),
        Err(Error::NotFound { .. }) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The entries that are wanted. Whether the registry has filtered them (`OCI-Filters-Applied`) is not relied upon.
pub(super) fn read(what: &str, body: &[u8], artifact_type: &str) -> Result<Vec<Digest>> {
    let page: Page = serde_json::from_slice(body)
        .map_err(|_| Error::malformed(what, "the registry's answer is no list of what refers to it"))?;
    let wanted = |referrer: &Referrer| referrer.artifact_type.as_deref() == Some(artifact_type);
    let referrers = page.manifests.unwrap_or_default();
    Ok(referrers
        .iter()
        .filter(|referrer| wanted(referrer))
        .filter_map(|referrer| referrer.digest.parse().ok())
        .take(REFERRERS_MAX + 1)
        .collect())
}
