//! What this folder reads of text that others wrote, as functions of bytes: for `tests/fuzz`, which tries them with bytes
//! that nobody should send. Nothing else uses them.

use std::ops::Range;
use std::path::Path;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};

use super::credentials::{self, Kind};
use super::hosts::HostsFile;
use super::layout::Names;
use super::proxy::ProxyUrl;
use super::{answer, blob, challenge, manifest, paging, referrers, token};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// What messages call the input.
const WHAT: &str = "input";

/// The challenge that `WWW-Authenticate` headers make, one a line.
#[must_use]
pub fn challenge(headers: &[u8]) -> Option<String> {
    let values = headers.split(|&byte| byte == b'\n');
    let values = values.filter_map(|value| HeaderValue::from_bytes(value).ok());
    let headers: HeaderMap = values.map(|value| (WWW_AUTHENTICATE, value)).collect();
    challenge::parse(&headers).map(|challenge| format!("{challenge:?}"))
}

/// The target of the next page in a `Link` header.
#[must_use]
pub fn next_link(header: &str) -> Option<&str> {
    paging::next_link(header)
}

/// The range and the length in a `Content-Range` header.
#[must_use]
pub fn content_range(header: &str) -> Option<(Range<u64>, Option<u64>)> {
    blob::parse_content_range(header)
}

/// How long the answer of a token service is good for, in seconds.
///
/// # Errors
/// [`Error::Malformed`] when it is none.
pub fn token(body: &[u8]) -> Result<u64> {
    let service = token::Service {
        realm: Url::parse("https://token.example/")
            .map_err(|error| Error::malformed(WHAT, error.to_string()))?,
        service: String::new(),
        scopes: Vec::new(),
    };
    token::parse(&service, body).map(|token| token.good_for.as_secs())
}

/// What a registry's body says of a refusal.
#[must_use]
pub fn refusal(body: &[u8]) -> Option<String> {
    answer::ErrorBody::parse(body).text()
}

/// What a manifest is, by its bytes and by a header.
///
/// # Errors
/// [`Error::Malformed`] and [`Error::Unsupported`] when it is none.
pub fn manifest_type(header: Option<&str>, body: &[u8]) -> Result<String> {
    manifest::media_type(WHAT, header, body)
}

/// The names in a page of a list.
///
/// # Errors
/// [`Error::Malformed`] when it is none.
pub fn names(body: &[u8]) -> Result<Vec<String>> {
    paging::names(WHAT, body)
}

/// The digests in a list of what refers to a manifest, of one type.
///
/// # Errors
/// [`Error::Malformed`] when it is none.
pub fn referrers(body: &[u8], artifact_type: &str) -> Result<Vec<Digest>> {
    referrers::read(WHAT, body, artifact_type)
}

/// A `hosts.toml`, in words.
///
/// # Errors
/// [`Error::Usage`] when it is none.
pub fn hosts_file(text: &str) -> Result<String> {
    HostsFile::parse(text, Path::new("/hosts.toml")).map(|file| format!("{file:?}"))
}

/// How many credentials a docker `config.json` (or podman's `auth.json`, or the old `.dockercfg`) has for a repository.
///
/// # Errors
/// [`Error::Malformed`] when it is none.
pub fn credentials(body: &[u8], host: &str, path: &str) -> Result<usize> {
    let mut found = 0;
    for kind in [Kind::Docker, Kind::Containers, Kind::OldDocker] {
        let entries =
            credentials::parse(kind, body).map_err(|line| Error::malformed(WHAT, format!("line {line}")))?;
        found += entries.candidates(host, path).len();
    }
    Ok(found)
}

/// The images that the `index.json` of a layout names: each with where it is found.
///
/// # Errors
/// [`Error::Malformed`] and [`Error::Unsupported`] when it is none.
pub fn layout_index(body: &[u8]) -> Result<Vec<(String, Vec<String>)>> {
    let names = Names::parse(WHAT, "own", body)?;
    let tags = |repository: String| {
        let tags = names.tags(&repository).unwrap_or_default();
        (repository, tags)
    };
    Ok(names.repositories().into_iter().map(tags).collect())
}

/// Whether this is the URL of a proxy.
#[must_use]
pub fn is_proxy(text: &str) -> bool {
    ProxyUrl::parse(text).is_ok()
}
