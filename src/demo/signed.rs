//! The storage behind the demo registry: blobs at signed URLs that expire, in the manner of S3 and its kin. Such a URL
//! is for GET alone, and a request that brings an `Authorization` header of its own is refused.

use bytes::Bytes;
use hyper::header;
use hyper::{Method, StatusCode};

use crate::digest::Digest;

use super::answer::Answer;
use super::behaviour::{Redirect, SignedStyle};
use super::date;
use super::server::{Call, Place, Shared};

/// Makes and checks signatures. The key is a counter: signing protects nothing here, it only has to fail when told so.
#[derive(Debug, Default)]
pub(super) struct Signer {
    generation: u64,
}

impl Signer {
    /// Makes all URLs so far invalid.
    pub(super) fn expire_all(&mut self) {
        self.generation += 1;
    }

    fn signature(&self, path: &str, begins_s: u64, ends_s: u64) -> String {
        Digest::of(format!("{} {path} {begins_s} {ends_s}", self.generation).as_bytes()).hex()
    }

    /// The URL of blob `digest` of repository `name`, which works from now on for as long as `redirect` says.
    pub(super) fn url(&self, redirect: &Redirect, place: &Place, name: &str, digest: &Digest) -> String {
        let path = format!("/storage/{name}/{digest}");
        let begins_s = date::now_s();
        let query = match redirect.style {
            SignedStyle::Amz => {
                let lifetime_s = redirect.expires_in.as_secs();
                let signature = self.signature(&path, begins_s, begins_s + lifetime_s);
                format!(
                    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date={}&X-Amz-Expires={lifetime_s}&X-Amz-SignedHeaders=host&X-Amz-Signature={signature}",
                    date::basic(begins_s)
                )
            }
            SignedStyle::Expires => {
                let ends_s = begins_s + redirect.expires_in.as_secs();
                format!("Expires={ends_s}&Signature={}", self.signature(&path, 0, ends_s))
            }
        };
        format!("{}://{}{path}?{query}", place.scheme, place.storage_host)
    }

    /// Whether the request's signature is right and has not expired; otherwise why not.
    fn check(&self, call: &Call, path: &str) -> Result<(), &'static str> {
        let parameter = |name: &str| call.parameter(name).unwrap_or_default();
        let now_s = date::now_s();
        let (begins_s, ends_s, signature) = match call.parameter("X-Amz-Date") {
            Some(begins) => {
                let lifetime_s: u64 = parameter("X-Amz-Expires")
                    .parse()
                    .map_err(|_| "malformed expiry")?;
                let begins_s = date::parse_basic(&begins).ok_or("malformed date")?;
                (
                    begins_s,
                    begins_s.saturating_add(lifetime_s),
                    parameter("X-Amz-Signature"),
                )
            }
            None => {
                let ends_s = parameter("Expires").parse().map_err(|_| "malformed expiry")?;
                (0, ends_s, parameter("Signature"))
            }
        };
        if signature != self.signature(path, begins_s, ends_s) {
            return Err("The request signature we calculated does not match");
        }
        if now_s >= ends_s {
            return Err("Request has expired");
        }
        Ok(())
    }
}

/// Answers a request to the storage listener.
pub(super) fn read(shared: &Shared, call: &Call, path: &str) -> Answer {
    if call.request.headers().contains_key(header::AUTHORIZATION) {
        return refusal(
            StatusCode::BAD_REQUEST,
            "InvalidArgument",
            "Only one auth mechanism allowed",
        );
    }
    if *call.method() != Method::GET {
        return refusal(
            StatusCode::FORBIDDEN,
            "SignatureDoesNotMatch",
            "The URL was signed for GET",
        );
    }
    if let Err(why) = shared.signer.lock().check(call, path) {
        return refusal(StatusCode::FORBIDDEN, "AccessDenied", why);
    }
    let named = path
        .strip_prefix("/storage/")
        .and_then(|rest| rest.rsplit_once('/'));
    let blob = named.and_then(|(name, digest)| shared.content.lock().blob(name, &digest.parse().ok()?));
    match blob {
        Some(blob) => {
            let range = call.header(header::RANGE).filter(|_| call.behaviour.ranges);
            Answer::blob(&blob, range)
        }
        None => refusal(StatusCode::NOT_FOUND, "NoSuchKey", "The key does not exist"),
    }
}

/// An error in the XML that object stores speak.
fn refusal(status: StatusCode, code: &str, message: &str) -> Answer {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    );
    Answer {
        status,
        ..Answer::ok("application/xml", Bytes::from(body))
    }
}
