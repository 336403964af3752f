//! Manifests and image indexes: the registry's own bytes, verified, and what type they are. The type decides how the
//! bytes are read, so a header and a body that disagree about it are refused.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;

use super::host::{Host, Kind};
use super::reference::{Repository, Target, is_tag};
use super::request::{Core, Request, pull_scope};
use super::retry::{Attempts, Patience};
use super::secret::one_line;
use super::transport::{Answer, Destination};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Media type of an image manifest (OCI image specification).
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an image index (OCI image specification).
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an image manifest (Docker, schema 2).
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Media type of an image index (Docker, schema 2).
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// Manifests are at most so long (OCI distribution specification).
pub(super) const MANIFEST_BYTES_MAX: u64 = 4 << 20;
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const SCHEMA_1: [&str; 2] = [
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];
/// Types that servers give to files they know nothing about; the body then says what it is.
const GENERIC: [&str; 3] = ["application/json", "application/octet-stream", "text/plain"];
const DIGEST_HEADER: &str = "docker-content-digest";

/// A manifest or index as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestBytes {
    /// The bytes.
    pub bytes: Bytes,
    /// One of the four media types of this module, without parameters.
    pub media_type: String,
    /// The digest of the bytes.
    pub digest: Digest,
    /// Whether it was asked for with credentials. The registry may give it to everyone all the same.
    pub with_credentials: bool,
}

/// Fetches and verifies a manifest.
pub(super) async fn fetch(core: &Core, repository: &Repository, target: &Target) -> Result<ManifestBytes> {
    let what = name(repository, target);
    let mut attempts = core.begin(&what, Patience::Total)?;
    let host = core.transport.registry(repository.host());
    let request = request(Method::GET, repository, target)?;
    let (mut reached, bytes) = core
        .whole(&host, &request, MANIFEST_BYTES_MAX, &mut attempts)
        .await?;
    if !reached.answer.status().is_success() {
        return Err(core.refuse(&host, &what, &mut reached).await);
    }
    let digest = Digest::of(&bytes);
    let promised = match target {
        Target::Digest(digest) => Some(*digest),
        Target::Tag(_) => header_digest(&reached.answer),
    };
    if let Some(promised) = promised.filter(|promised| *promised != digest) {
        return Err(Error::mismatch(what, promised, digest));
    }
    let header = reached
        .answer
        .header(CONTENT_TYPE)
        .map(|text| one_line(text, 200));
    let media_type = media_type(&what, header.as_deref(), &bytes)?;
    Ok(ManifestBytes {
        bytes,
        media_type,
        digest,
        with_credentials: reached.with_credentials,
    })
}

/// The digest that `target` names now, `None` if there is no such manifest. Asks with HEAD, which registries do not count
/// against their limits, and with GET where HEAD does not tell.
pub(super) async fn target_digest(
    core: &Core,
    repository: &Repository,
    target: &Target,
) -> Result<Option<Digest>> {
    let what = name(repository, target);
    let mut attempts = core.begin(&what, Patience::Total)?;
    let host = core.transport.registry(repository.host());
    if let Told::Digest(digest) = head(core, &host, repository, target, &mut attempts).await? {
        return Ok(digest);
    }
    match fetch(core, repository, target).await {
        Ok(manifest) => Ok(Some(manifest.digest)),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

enum Told {
    Digest(Option<Digest>),
    Nothing,
}

async fn head(
    core: &Core,
    host: &Arc<Host>,
    repository: &Repository,
    target: &Target,
    attempts: &mut Attempts,
) -> Result<Told> {
    let request = request(Method::HEAD, repository, target)?;
    let mut reached = core.request(host, &request, attempts).await?;
    let answer = &reached.answer;
    Ok(match answer.status().as_u16() {
        200 => match header_digest(answer) {
            Some(digest) => Told::Digest(Some(digest)),
            None => Told::Nothing,
        },
        404 => Told::Digest(None),
        401 | 403 => {
            let what = attempts.what.clone();
            return Err(core.refuse(host, &what, &mut reached).await);
        }
        // 405 and the like: this registry, or a proxy before it, does not do HEAD.
        _ => Told::Nothing,
    })
}

/// What is asked for, as errors name it.
pub(super) fn name(repository: &Repository, target: &Target) -> String {
    match target {
        Target::Tag(tag) => format!("{repository}:{tag}"),
        Target::Digest(digest) => format!("{repository}@{digest}"),
    }
}

fn request(method: Method, repository: &Repository, target: &Target) -> Result<Request> {
    if let Target::Tag(tag) = target
        && !is_tag(tag)
    {
        return Err(Error::usage(format!("{repository}: {tag:?} is no tag")));
    }
    Ok(Request {
        method,
        to: Destination::Registry(format!("/v2/{}/manifests/{target}", repository.path())),
        headers: HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(ACCEPTED))]),
        scope: pull_scope(repository),
        kind: Kind::Manifest,
    })
}

/// The digest that the registry promises. One by another algorithm than ours promises nothing that we can check.
fn header_digest(answer: &Answer) -> Option<Digest> {
    answer.header(DIGEST_HEADER)?.trim().parse().ok()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

/// What the bytes are, by the header and by themselves.
pub(super) fn media_type(what: &str, header: Option<&str>, bytes: &[u8]) -> Result<String> {
    let header = header.map(|text| {
        let essence = text.split(';').next().unwrap_or_default();
        essence.trim().to_ascii_lowercase()
    });
    let malformed = |why: String| Err(Error::malformed(what, why));
    let body: Probe = match serde_json::from_slice(bytes) {
        Ok(body) => body,
        Err(_) => {
            let header = header.as_deref().unwrap_or("no Content-Type");
            return malformed(format!("the registry's answer is no manifest ({header})"));
        }
    };
    let header = header.filter(|header| !header.is_empty() && !GENERIC.contains(&header.as_str()));
    let own = body.media_type.as_deref().map(|text| one_line(text, 200));
    if let (Some(header), Some(own)) = (&header, &own)
        && header != own
    {
        return malformed(format!("its Content-Type is {header}, its mediaType {own}"));
    }
    if body.manifests.is_some() && body.layers.is_some() {
        return malformed("it is an index and an image manifest at once".to_owned());
    }
    let schema_1 = body.schema_version == Some(1) || body.fs_layers.is_some();
    let stated = header.or(own);
    if schema_1
        || stated
            .as_ref()
            .is_some_and(|stated| SCHEMA_1.contains(&stated.as_str()))
    {
        let why =
            "a Docker schema 1 manifest, a format given up in 2017; push the image again with a current tool";
        return Err(Error::unsupported(what, why));
    }
    let media_type = match (stated, body.manifests.is_some(), body.layers.is_some()) {
        (Some(stated), _, _) => stated,
        (None, true, _) => OCI_INDEX.to_owned(),
        (None, _, true) => OCI_MANIFEST.to_owned(),
        (None, false, false) => {
            return malformed("neither a list of manifests nor one of layers".to_owned());
        }
    };
    let known = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX];
    match known.contains(&media_type.as_str()) {
        true => Ok(media_type),
        false => Err(Error::unsupported(
            what,
            format!("a manifest of type {media_type}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(header: Option<&str>, body: &str) -> Result<String> {
        media_type("h.io/a:1", header, body.as_bytes())
    }

    #[test]
    fn header_and_body_say_what_it_is() {
        let with = |media_type: &str| format!(r#"{{"schemaVersion":2,"mediaType":"{media_type}"}}"#);
        let parameters = format!("{}; charset=utf-8", OCI_INDEX.to_uppercase());
        assert_eq!(typed(Some(&parameters), &with(OCI_INDEX)).unwrap(), OCI_INDEX);
        assert_eq!(
            typed(Some(OCI_MANIFEST), r#"{"layers":[]}"#).unwrap(),
            OCI_MANIFEST
        );
        assert_eq!(
            typed(Some("application/json"), &with(DOCKER_INDEX)).unwrap(),
            DOCKER_INDEX
        );
        assert_eq!(typed(None, &with(DOCKER_MANIFEST)).unwrap(), DOCKER_MANIFEST);
        assert_eq!(typed(None, r#"{"manifests":[]}"#).unwrap(), OCI_INDEX);
        assert_eq!(typed(None, r#"{"layers":[],"config":{}}"#).unwrap(), OCI_MANIFEST);
    }

    #[test]
    fn two_readings_of_one_manifest_are_refused() {
        let body = format!(r#"{{"mediaType":"{OCI_INDEX}"}}"#);
        let error = typed(Some(OCI_MANIFEST), &body).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
        let error = typed(Some(OCI_MANIFEST), r#"{"layers":[],"manifests":[]}"#).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }

    #[test]
    fn schema_1_and_strangers_are_named() {
        let old = r#"{"schemaVersion":1,"fsLayers":[]}"#;
        for (header, body) in [(Some(SCHEMA_1[1]), "{}"), (Some(SCHEMA_1[0]), old), (None, old)] {
            let error = typed(header, body).unwrap_err().to_string();
            assert!(error.contains("schema 1"), "{error}");
        }
        let error = typed(Some("application/vnd.x+json"), "{}").unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    #[test]
    fn a_login_page_is_no_manifest() {
        let error = typed(Some("text/html"), "<html>").unwrap_err();
        assert!(error.to_string().contains("text/html"), "{error}");
        assert!(typed(None, "{}").is_err());
    }
}
