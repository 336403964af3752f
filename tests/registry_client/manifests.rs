//! Manifests and tags: what is verified, what is refused, what a refusal means.

use registryfs::digest::Digest;
use registryfs::error::Error;
use registryfs::registry::reference::Target;
use registryfs::registry::{Client, ClientOptions, OCI_INDEX, OCI_MANIFEST};

use super::server::{Reply, Server};
use super::{client, quick, repository, tag};

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

fn manifest() -> Reply {
    Reply::new(200)
        .header("Content-Type", OCI_MANIFEST)
        .header(
            "Docker-Content-Digest",
            Digest::of(MANIFEST.as_bytes()).to_string(),
        )
        .body(MANIFEST)
}

#[tokio::test]
async fn a_manifest_comes_verified_by_tag_and_by_digest() {
    let server = Server::start(|_| manifest()).await;
    let client = client();
    let repository = repository(&server, "a/b");
    let digest = Digest::of(MANIFEST.as_bytes());
    let by_tag = client.manifest(&repository, &tag("1")).await.unwrap();
    let by_digest = client
        .manifest(&repository, &Target::Digest(digest))
        .await
        .unwrap();
    assert_eq!(by_tag, by_digest);
    assert_eq!(
        (by_tag.digest, by_tag.media_type.as_str()),
        (digest, OCI_MANIFEST)
    );
    assert_eq!(by_tag.bytes, MANIFEST);
    let accepted = server.requests()[0].header("accept").unwrap().to_owned();
    assert!(accepted.contains(OCI_INDEX) && accepted.contains("manifest.list.v2"));
    assert_eq!(server.lines()[1], format!("GET /v2/a/b/manifests/{digest}"));
}

#[tokio::test]
async fn another_manifest_than_the_promised_one_is_refused() {
    let server = Server::start(|_| manifest().body("{}")).await;
    let client = client();
    let repository = repository(&server, "a");
    for target in [tag("1"), Target::Digest(Digest::of(b"x"))] {
        let error = client.manifest(&repository, &target).await.unwrap_err();
        assert!(matches!(error, Error::Verification { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_manifest_of_more_than_four_mebibytes_is_refused() {
    for chunked in [false, true] {
        let server = Server::start(move |_| Reply {
            chunked,
            ..manifest().body(vec![b' '; (4 << 20) + 1])
        })
        .await;
        let got = client().manifest(&repository(&server, "a"), &tag("1")).await;
        assert!(matches!(got, Err(Error::Malformed { .. })), "{got:?}");
    }
}

#[tokio::test]
async fn a_manifest_cut_midway_is_asked_for_again() {
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let server = Server::start(
        move |_| match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => manifest().broken(5, super::server::Then::Close),
            _ => manifest(),
        },
    )
    .await;
    let got = client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap();
    assert_eq!(got.bytes, MANIFEST);
}

#[tokio::test]
async fn refusals_become_the_errors_that_users_know() {
    for (status, code, exit_code) in [
        (404, "MANIFEST_UNKNOWN", 4),
        (404, "NAME_UNKNOWN", 4),
        (400, "NAME_INVALID", 4),
        (401, "UNAUTHORIZED", 3),
        (403, "DENIED", 3),
        (418, "TEAPOT", 5),
    ] {
        let server = Server::start(move |_| Reply::error(status, code)).await;
        let error = client()
            .manifest(&repository(&server, "a"), &tag("1"))
            .await
            .unwrap_err();
        assert_eq!(error.exit_code(), exit_code, "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("{code}: said the test")), "{text}");
        assert_eq!(server.requests().len(), 1, "{status} is an answer");
    }
}

#[tokio::test]
async fn a_tags_digest_costs_one_head_request() {
    let server = Server::start(|request| match request.path().ends_with("/gone") {
        true => Reply::new(404),
        false => manifest(),
    })
    .await;
    let client = client();
    let repository = repository(&server, "a");
    let digest = client.tag_digest(&repository, "1").await.unwrap();
    assert_eq!(digest, Some(Digest::of(MANIFEST.as_bytes())));
    assert_eq!(client.tag_digest(&repository, "gone").await.unwrap(), None);
    assert_eq!(
        server.lines(),
        ["HEAD /v2/a/manifests/1", "HEAD /v2/a/manifests/gone"]
    );
}

#[tokio::test]
async fn a_tags_digest_is_got_where_head_does_not_tell_it() {
    for head_status in [200, 405, 400] {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => Reply::new(head_status),
            _ => Reply::new(200).body(MANIFEST),
        })
        .await;
        let digest = client().tag_digest(&repository(&server, "a"), "1").await;
        assert_eq!(
            digest.unwrap(),
            Some(Digest::of(MANIFEST.as_bytes())),
            "{head_status}"
        );
        assert_eq!(server.requests().len(), 2);
    }
}

#[tokio::test]
async fn limits_and_warnings_of_a_registry_are_kept_for_status() {
    let server = Server::start(|_| {
        manifest()
            .header("RateLimit-Limit", "100;w=21600")
            .header("RateLimit-Remaining", "76;w=21600")
            .header("Warning", "299 - \"moving house\"")
            .header("Warning", "199 - \"not for us\"")
    })
    .await;
    let client = client();
    let repository = repository(&server, "a");
    for _ in 0..3 {
        client.manifest(&repository, &tag("1")).await.unwrap();
    }
    let health = client.health().remove(0);
    assert_eq!(
        health.rate_limit.as_deref(),
        Some("limit 100;w=21600, remaining 76;w=21600")
    );
    assert_eq!(health.warnings, ["moving house"]);
    assert_eq!((health.host, health.scheme.as_str()), (server.host(), "http"));
    assert_eq!(health.requests.manifests, 3);
}

#[tokio::test]
async fn a_tag_that_is_none_is_never_sent() {
    let server = Server::start(|_| manifest()).await;
    let client = Client::new(ClientOptions::clone(&quick())).unwrap();
    let error = client
        .manifest(&repository(&server, "a"), &tag("../../../x"))
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_eq!(server.requests().len(), 0);
}
