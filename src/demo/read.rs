//! The reading half of the distribution API: manifests, blobs, tags, the catalog, referrers.

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{self, HeaderName};
use serde_json::json;

use crate::digest::Digest;
use crate::registry::reference::{is_component, is_tag};

use super::answer::{Answer, DOCKER_CONTENT_DIGEST};
use super::auth::Need;
use super::content::Content;
use super::server::{Call, Shared, method_not_allowed};

/// Longest path of a request in bytes.
const PATH_BYTES_MAX: usize = 1024;

/// What a path of the API names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    /// `/v2/`
    Base,
    /// `/v2/_catalog`
    Catalog,
    /// `/v2/NAME/tags/list`
    Tags { name: String },
    /// `/v2/NAME/manifests/REFERENCE`
    Manifest { name: String, reference: String },
    /// `/v2/NAME/blobs/DIGEST`
    Blob { name: String, digest: Digest },
    /// `/v2/NAME/referrers/DIGEST`
    Referrers { name: String, subject: Digest },
    /// `/v2/NAME/blobs/uploads/` and below
    Upload { name: String, id: String },
}

impl Route {
    /// The route of `path`: `None` if the API has no such path, the error answer if a part of it is malformed.
    pub(super) fn parse(path: &str) -> Option<Result<Self, Box<Answer>>> {
        let rest = path.strip_prefix("/v2")?;
        if path.len() > PATH_BYTES_MAX {
            return None;
        }
        match rest {
            "" | "/" => return Some(Ok(Self::Base)),
            "/_catalog" => return Some(Ok(Self::Catalog)),
            _ => {}
        }
        // Clients may write the colon of a digest as %3A; nothing else in a valid path is ever escaped.
        let rest = rest.strip_prefix('/')?.replace("%3A", ":").replace("%3a", ":");
        let (head, last) = rest.rsplit_once('/')?;
        let (name, kind) = match head.rsplit_once('/')? {
            (name, "uploads") => (name.strip_suffix("/blobs")?, "uploads"),
            split => split,
        };
        let name = name.to_owned();
        let route = match kind {
            "tags" if last == "list" => Ok(Self::Tags { name: name.clone() }),
            "manifests" => manifest_route(&name, last),
            "blobs" if last == "uploads" => Ok(Self::Upload {
                name: name.clone(),
                id: String::new(),
            }),
            "blobs" => digest_of(last).map(|digest| Self::Blob {
                name: name.clone(),
                digest,
            }),
            "referrers" => digest_of(last).map(|subject| Self::Referrers {
                name: name.clone(),
                subject,
            }),
            "uploads" => Ok(Self::Upload {
                name: name.clone(),
                id: last.to_owned(),
            }),
            _ => return None,
        };
        let valid = name.split('/').all(is_component);
        Some(if valid { route } else { Err(invalid_name()) })
    }

    /// What a request for this needs to be allowed to do.
    pub(super) fn need(&self, reading: bool) -> Option<Need> {
        match self {
            Self::Base => None,
            Self::Catalog => Some(Need {
                resource: "registry:catalog".to_owned(),
                actions: &["*"],
            }),
            Self::Tags { name }
            | Self::Manifest { name, .. }
            | Self::Blob { name, .. }
            | Self::Referrers { name, .. }
            | Self::Upload { name, .. } => Some(Need {
                resource: format!("repository:{name}"),
                actions: if reading && !matches!(self, Self::Upload { .. }) {
                    &["pull"]
                } else {
                    &["pull", "push"]
                },
            }),
        }
    }
}

fn manifest_route(name: &str, reference: &str) -> Result<Route, Box<Answer>> {
    if !is_tag(reference) {
        digest_of(reference)?;
    }
    Ok(Route::Manifest {
        name: name.to_owned(),
        reference: reference.to_owned(),
    })
}

pub(super) fn digest_of(text: &str) -> Result<Digest, Box<Answer>> {
    text.parse()
        .map_err(|_| Answer::refusal(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "not a sha256 digest"))
}

fn invalid_name() -> Box<Answer> {
    Answer::refusal(
        StatusCode::BAD_REQUEST,
        "NAME_INVALID",
        "not a valid repository name",
    )
}

fn unknown_name() -> Answer {
    Answer::error(
        StatusCode::NOT_FOUND,
        "NAME_UNKNOWN",
        "no such repository in this registry",
    )
}

/// Answers a GET or a HEAD.
pub(super) fn answer(shared: &Shared, call: &Call, route: &Route) -> Answer {
    let content = shared.content.lock();
    match route {
        Route::Base => Answer::json(&serde_json::json!({})),
        Route::Catalog if !call.behaviour.catalog => {
            Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "there is no catalog")
        }
        Route::Catalog => page(
            call,
            "/v2/_catalog",
            content.names(),
            |names| serde_json::json!({ "repositories": names }),
        ),
        Route::Tags { name } => match content.repository(name) {
            Some(repository) => {
                let tags = repository.tags().map(|(tag, _)| tag);
                page(
                    call,
                    &format!("/v2/{name}/tags/list"),
                    tags,
                    |tags| serde_json::json!({ "name": name, "tags": tags }),
                )
            }
            None => unknown_name(),
        },
        Route::Manifest { name, reference } => manifest(&content, call, name, reference),
        Route::Blob { name, digest } => blob(shared, &content, call, name, digest),
        Route::Referrers { name, subject } => referrers(&content, call, name, subject),
        Route::Upload { id, .. } => match shared.uploads.lock().status(id) {
            Some(answer) => answer,
            None => method_not_allowed(),
        },
    }
}

fn referrers(content: &Content, call: &Call, name: &str, subject: &Digest) -> Answer {
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    let artifact_type = call.parameter("artifactType");
    let repository = content.repository(name);
    let manifests = repository.map_or_else(Vec::new, |repository| {
        repository.referrers(subject, artifact_type.as_deref())
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
    let answer = Answer::ok(INDEX, Bytes::from(index.to_string()));
    match artifact_type {
        Some(_) => answer.with(HeaderName::from_static("oci-filters-applied"), "artifactType"),
        None => answer,
    }
}

fn manifest(content: &Content, call: &Call, name: &str, reference: &str) -> Answer {
    let Some(repository) = content.repository(name) else {
        return unknown_name();
    };
    let found = repository.resolve(reference);
    let Some((digest, manifest)) = found.and_then(|digest| Some((digest, repository.manifest(&digest)?)))
    else {
        return Answer::error(
            StatusCode::NOT_FOUND,
            "MANIFEST_UNKNOWN",
            "the repository has no such manifest",
        );
    };
    let etag = format!("\"{digest}\"");
    let answer = if call
        .header(header::IF_NONE_MATCH)
        .is_some_and(|known| known == etag)
    {
        Answer::empty(StatusCode::NOT_MODIFIED)
    } else {
        Answer::ok(&manifest.media_type, manifest.bytes.clone())
    };
    answer
        .with(DOCKER_CONTENT_DIGEST, &digest.to_string())
        .with(header::ETAG, &etag)
}

fn blob(shared: &Shared, content: &Content, call: &Call, name: &str, digest: &Digest) -> Answer {
    let Some(blob) = content.blob(name, digest) else {
        return unknown_blob();
    };
    if let Some(redirect) = &call.behaviour.redirect
        && call.method() == hyper::Method::GET
    {
        let url = shared.signer.lock().url(redirect, &call.place, name, digest);
        let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::TEMPORARY_REDIRECT);
        return Answer::empty(status).with(header::LOCATION, &url);
    }
    let range = call.header(header::RANGE).filter(|_| call.behaviour.ranges);
    Answer::blob(&blob, range)
        .with(DOCKER_CONTENT_DIGEST, &digest.to_string())
        .with(header::ETAG, &format!("\"{digest}\""))
}

pub(super) fn unknown_blob() -> Answer {
    Answer::error(
        StatusCode::NOT_FOUND,
        "BLOB_UNKNOWN",
        "the repository has no such blob",
    )
}

/// One page of `names`, which come sorted: at most `n` of those behind `last`, and a link to the next page if there
/// is one.
fn page<'a>(
    call: &Call,
    path: &str,
    names: impl Iterator<Item = &'a str>,
    body: impl FnOnce(&[&str]) -> serde_json::Value,
) -> Answer {
    let entries_max = call.behaviour.page_entries_max;
    let invalid = || {
        Answer::error(
            StatusCode::BAD_REQUEST,
            "PAGINATION_NUMBER_INVALID",
            &format!("n is a number from 0 to {entries_max}"),
        )
    };
    let asked = match call.parameter("n").map(|n| n.parse::<usize>()) {
        None => entries_max,
        Some(Ok(n)) if n > entries_max && call.behaviour.refuse_large_pages => return invalid(),
        Some(Ok(n)) => n.min(entries_max),
        Some(Err(_)) => return invalid(),
    };
    let last = call.parameter("last").unwrap_or_default();
    let mut rest = names.skip_while(|name| *name <= last.as_str());
    let entries: Vec<&str> = rest.by_ref().take(asked).collect();
    let answer = Answer::json(&body(&entries));
    match entries.last() {
        Some(last) if call.behaviour.link_header && rest.next().is_some() => answer.with(
            header::LINK,
            &format!("<{path}?n={asked}&last={last}>; rel=\"next\""),
        ),
        _ => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(path: &str) -> Option<Result<Route, StatusCode>> {
        Route::parse(path).map(|parsed| parsed.map_err(|answer| answer.status))
    }

    #[test]
    fn paths_are_read_from_their_end() {
        let name = || "a/manifests/b".to_owned();
        let digest = Digest::of(b"x");
        assert_eq!(route("/v2"), Some(Ok(Route::Base)));
        assert_eq!(route("/v2/_catalog"), Some(Ok(Route::Catalog)));
        assert_eq!(
            route("/v2/a/manifests/b/tags/list"),
            Some(Ok(Route::Tags { name: name() }))
        );
        let reference = "12.1-x".to_owned();
        assert_eq!(
            route("/v2/a/manifests/b/manifests/12.1-x"),
            Some(Ok(Route::Manifest {
                name: name(),
                reference
            }))
        );
        let escaped = digest.to_string().replace(':', "%3A");
        let blob = Route::Blob {
            name: "a".to_owned(),
            digest,
        };
        assert_eq!(route(&format!("/v2/a/blobs/{escaped}")), Some(Ok(blob)));
        for (id, path) in [
            ("", "/v2/a/blobs/uploads/"),
            ("", "/v2/a/blobs/uploads"),
            ("7", "/v2/a/blobs/uploads/7"),
        ] {
            let upload = Route::Upload {
                name: "a".to_owned(),
                id: id.to_owned(),
            };
            assert_eq!(route(path), Some(Ok(upload)), "{path}");
        }
    }

    #[test]
    fn malformed_paths_are_told_from_unknown_ones() {
        for path in [
            "/",
            "/v1/",
            "/v2/a",
            "/v2/a/tags/other",
            "/v2/a/b/c/d",
            "/v2x/_catalog",
        ] {
            assert_eq!(route(path), None, "{path}");
        }
        let bad_request = Some(Err(StatusCode::BAD_REQUEST));
        for path in [
            "/v2/UPPER/tags/list",
            "/v2/a/manifests/-x",
            "/v2/a/blobs/sha256:12",
            "/v2/a//b/tags/list",
        ] {
            assert_eq!(route(path), bad_request, "{path}");
        }
    }
}
