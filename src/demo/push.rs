//! The writing half of the distribution API, as far as `skopeo copy` and its kin need it: uploads in one piece or in
//! several, mounts of blobs from other repositories, manifests. All of it stays in memory, up to a limit.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use hyper::header;
use hyper::{Method, StatusCode};

use crate::digest::Digest;

use super::answer::{Answer, DOCKER_CONTENT_DIGEST};
use super::read::{Route, digest_of};
use super::server::{Call, Shared, method_not_allowed};

/// Most uploads that have begun and not ended.
const UPLOADS_MAX: usize = 64;
/// What a manifest without a `Content-Type` is taken for.
const MANIFEST_MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// Uploads that have begun, and how much was pushed in total.
#[derive(Debug, Default)]
pub(super) struct Uploads {
    open: HashMap<String, Upload>,
    begun: u64,
    pushed_bytes: u64,
}

#[derive(Debug)]
struct Upload {
    name: String,
    bytes: BytesMut,
}

impl Uploads {
    /// Begins an upload; `None` if too many are open.
    fn begin(&mut self, name: &str) -> Option<String> {
        if self.open.len() >= UPLOADS_MAX {
            return None;
        }
        self.begun += 1;
        let id = format!("upload-{}", self.begun);
        let upload = Upload {
            name: name.to_owned(),
            bytes: BytesMut::new(),
        };
        self.open.insert(id.clone(), upload);
        Some(id)
    }

    /// How far upload `id` is.
    pub(super) fn status(&self, id: &str) -> Option<Answer> {
        let upload = self.open.get(id)?;
        Some(progress(StatusCode::NO_CONTENT, id, upload))
    }

    /// Appends to upload `id`.
    fn append(&mut self, id: &str, bytes: &Bytes, bytes_max: u64) -> Result<Answer, Box<Answer>> {
        let total = self.pushed_bytes.saturating_add(bytes.len() as u64);
        if total > bytes_max {
            return Err(too_large());
        }
        let upload = self.open.get_mut(id).ok_or_else(unknown_upload)?;
        upload.bytes.extend_from_slice(bytes);
        self.pushed_bytes = total;
        Ok(progress(StatusCode::ACCEPTED, id, upload))
    }
}

fn too_large() -> Box<Answer> {
    Answer::refusal(
        StatusCode::PAYLOAD_TOO_LARGE,
        "SIZE_INVALID",
        "the demo registry takes no more",
    )
}

fn unknown_upload() -> Box<Answer> {
    Answer::refusal(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "no such upload")
}

/// The answer that says where to go on with an upload.
fn progress(status: StatusCode, id: &str, upload: &Upload) -> Answer {
    let location = format!("/v2/{}/blobs/uploads/{id}", upload.name);
    // `Range` counts inclusively: an empty upload has, by convention, 0-0 too.
    let last = upload.bytes.len().saturating_sub(1);
    Answer::empty(status)
        .with(header::LOCATION, &location)
        .with(header::RANGE, &format!("0-{last}"))
        .with(header::HeaderName::from_static("docker-upload-uuid"), id)
}

/// Answers anything but GET and HEAD.
pub(super) async fn answer(shared: &Shared, call: &mut Call, route: &Route) -> Answer {
    let method = call.method().clone();
    let done = match (route, method) {
        (Route::Manifest { name, reference }, Method::PUT) => {
            put_manifest(shared, call, name, reference).await
        }
        (Route::Upload { name, id }, Method::POST) if id.is_empty() => begin(shared, call, name).await,
        (Route::Upload { id, .. }, Method::PATCH) => append(shared, call, id).await,
        (Route::Upload { name, id }, Method::PUT) => finish(shared, call, name, id).await,
        (Route::Upload { id, .. }, Method::DELETE) => match shared.uploads.lock().open.remove(id) {
            Some(_) => Ok(Answer::empty(StatusCode::NO_CONTENT)),
            None => Err(unknown_upload()),
        },
        _ => Err(Box::new(method_not_allowed())),
    };
    done.unwrap_or_else(|refusal| *refusal)
}

async fn begin(shared: &Shared, call: &mut Call, name: &str) -> Result<Answer, Box<Answer>> {
    if let (Some(digest), Some(from)) = (call.parameter("mount"), call.parameter("from")) {
        let digest = digest_of(&digest)?;
        if shared.content.lock().mount_blob(name, &from, digest) {
            return Ok(created(
                &format!("/v2/{name}/blobs/{digest}"),
                &digest.to_string(),
            ));
        }
    }
    let busy = || {
        Answer::error(
            StatusCode::TOO_MANY_REQUESTS,
            "TOOMANYREQUESTS",
            "too many uploads",
        )
    };
    let id = shared.uploads.lock().begin(name).ok_or_else(busy)?;
    if call.parameter("digest").is_some() {
        return finish(shared, call, name, &id).await;
    }
    let status = shared.uploads.lock().status(&id).ok_or_else(unknown_upload)?;
    Ok(Answer {
        status: StatusCode::ACCEPTED,
        ..status
    })
}

async fn append(shared: &Shared, call: &mut Call, id: &str) -> Result<Answer, Box<Answer>> {
    let bytes_max = call.behaviour.push_bytes_max;
    let left = {
        let uploads = shared.uploads.lock();
        uploads.open.get(id).ok_or_else(unknown_upload)?;
        bytes_max.saturating_sub(uploads.pushed_bytes)
    };
    let body = call.body(usize::try_from(left).unwrap_or(usize::MAX)).await?;
    let mut uploads = shared.uploads.lock();
    let at = uploads.open.get(id).ok_or_else(unknown_upload)?.bytes.len();
    let begins_at = call
        .header(header::CONTENT_RANGE)
        .and_then(|range| range.trim_start_matches("bytes ").split('-').next()?.parse().ok());
    if begins_at.is_some_and(|begin: usize| begin != at) {
        let answer = uploads.status(id).ok_or_else(unknown_upload)?;
        return Err(Box::new(Answer {
            status: StatusCode::RANGE_NOT_SATISFIABLE,
            ..answer
        }));
    }
    uploads.append(id, &body, bytes_max)
}

async fn finish(shared: &Shared, call: &mut Call, name: &str, id: &str) -> Result<Answer, Box<Answer>> {
    append(shared, call, id).await?;
    let expected = digest_of(&call.parameter("digest").unwrap_or_default())?;
    let upload = shared.uploads.lock().open.remove(id).ok_or_else(unknown_upload)?;
    let bytes = upload.bytes.freeze();
    let mut content = shared.content.lock();
    if Digest::of(&bytes) != expected {
        return Err(Answer::refusal(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            "the bytes have another digest",
        ));
    }
    let digest = content.put_blob(name, bytes);
    Ok(created(
        &format!("/v2/{name}/blobs/{digest}"),
        &digest.to_string(),
    ))
}

async fn put_manifest(
    shared: &Shared,
    call: &mut Call,
    name: &str,
    reference: &str,
) -> Result<Answer, Box<Answer>> {
    let bytes = call.small_body().await?;
    let invalid = |why: &str| Answer::refusal(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", why);
    let json: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|_| invalid("the manifest is not JSON"))?;
    let media_type = call
        .header(header::CONTENT_TYPE)
        .or_else(|| json.get("mediaType")?.as_str())
        .unwrap_or(MANIFEST_MEDIA_TYPE)
        .to_owned();
    {
        let mut uploads = shared.uploads.lock();
        let total = uploads.pushed_bytes.saturating_add(bytes.len() as u64);
        if total > call.behaviour.push_bytes_max {
            return Err(too_large());
        }
        uploads.pushed_bytes = total;
    }
    let digest = Digest::of(&bytes);
    let by_digest = reference.contains(':');
    if by_digest && digest.to_string() != reference {
        return Err(Answer::refusal(
            StatusCode::BAD_REQUEST,
            "DIGEST_INVALID",
            "the manifest has another digest",
        ));
    }
    let mut content = shared.content.lock();
    content.put_manifest(name, media_type, bytes);
    if !by_digest {
        content.tag(name, reference, digest);
    }
    Ok(created(
        &format!("/v2/{name}/manifests/{digest}"),
        &digest.to_string(),
    ))
}

fn created(location: &str, digest: &str) -> Answer {
    Answer::empty(StatusCode::CREATED)
        .with(header::LOCATION, location)
        .with(DOCKER_CONTENT_DIGEST, digest)
}
