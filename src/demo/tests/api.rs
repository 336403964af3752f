//! The distribution API, authentication and redirects, as a client sees them.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::super::*;
use super::{Reply, get, get_range, send, with_blob};
use crate::digest::Digest;
use crate::layer::entry::{Entry, Kind};
use crate::layer::estargz::writer::Options;

fn image() -> Image {
    let file = (Entry::new("etc/hostname", Kind::File), b"demo\n".to_vec());
    let layer = Layer::estargz(&[file], Options::default()).unwrap();
    ImageBuilder::new(vec![layer]).build()
}

#[test]
fn manifests_are_served_by_tag_and_digest_with_their_headers() {
    let mut content = Content::new();
    let image = image();
    let digest = content.add_tagged_image("team/app", "1.0", &image);
    let registry = DemoRegistry::start(content, Behaviour::default()).unwrap();
    let host = registry.host();
    for reference in ["1.0".to_owned(), digest.to_string()] {
        let path = format!("/v2/team/app/manifests/{reference}");
        let reply = get(&host, &path);
        assert_eq!(reply.status, 200);
        assert_eq!(reply.body, image.manifest);
        assert_eq!(reply.header("content-type"), Some(image.media_type()));
        assert_eq!(
            reply.header("docker-content-digest"),
            Some(digest.to_string().as_str())
        );
        let head = send(&host, &format!("HEAD {path}"), &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0));
        assert_eq!(
            head.header("content-length"),
            Some(image.manifest.len().to_string().as_str())
        );
        let etag = reply.header("etag").unwrap();
        let known = send(&host, &format!("GET {path}"), &[("If-None-Match", etag)], b"");
        assert_eq!((known.status, known.body.len()), (304, 0));
    }
    for (path, status, code) in [
        ("/v2/team/app/manifests/2.0", 404, "MANIFEST_UNKNOWN"),
        ("/v2/team/other/manifests/1.0", 404, "NAME_UNKNOWN"),
        ("/v2/Team/manifests/1.0", 400, "NAME_INVALID"),
        ("/v2/team/app/blobs/sha256:0", 400, "DIGEST_INVALID"),
    ] {
        let reply = get(&host, path);
        assert_eq!(
            (reply.status, reply.error_code().as_str()),
            (status, code),
            "{path}"
        );
    }
}

#[test]
fn blobs_are_served_whole_and_by_range_to_their_repository_only() {
    let (registry, blob, path) = with_blob(Behaviour::default());
    let host = registry.host();
    assert!(get(&host, &path).body == blob);
    let reply = get_range(&host, &path, "bytes=1000-1999");
    assert_eq!((reply.status, reply.body.as_slice()), (206, &blob[1000..2000]));
    assert_eq!(reply.header("content-range"), Some("bytes 1000-1999/800000"));
    let reply = get_range(&host, &path, "bytes=-51");
    assert_eq!(reply.body, &blob[blob.len() - 51..]);
    let beyond = get_range(&host, &path, "bytes=800000-");
    assert_eq!(
        (beyond.status, beyond.header("content-range")),
        (416, Some("bytes */800000"))
    );
    assert_eq!(get_range(&host, &path, "bytes=0-1,3-4").status, 400);
    assert_eq!(get(&host, &path.replace("a/b", "other")).status, 404);
    registry.handle().update(|behaviour| behaviour.ranges = false);
    let reply = get_range(&host, &path, "bytes=0-9");
    assert_eq!((reply.status, reply.body.len()), (200, blob.len()));
}

/// All names of a paged listing, by the Link headers, and how many pages there were.
fn follow_pages(host: &str, first: &str, key: &str) -> (Vec<String>, usize) {
    let mut path = Some(first.to_owned());
    let (mut names, mut pages) = (Vec::new(), 0);
    while let Some(at) = path {
        let reply = get(host, &at);
        assert_eq!(reply.status, 200, "{at}");
        let json = reply.json();
        names.extend(
            json[key]
                .as_array()
                .unwrap()
                .iter()
                .map(|name| name.as_str().unwrap().to_owned()),
        );
        pages += 1;
        path = reply.header("link").map(|link| {
            assert!(link.ends_with("; rel=\"next\""), "{link}");
            link[1..link.find('>').unwrap()].to_owned()
        });
    }
    (names, pages)
}

#[test]
fn listings_come_in_pages() {
    let mut content = Content::new();
    let digest = content.add_image("a", &image());
    for number in 0..25 {
        content.tag("a", format!("t{number:02}"), digest);
    }
    content.add_image("a/b", &image());
    let registry = DemoRegistry::start(content, Behaviour::default()).unwrap();
    let host = registry.host();
    let expected: Vec<_> = (0..25).map(|number| format!("t{number:02}")).collect();
    let list = "/v2/a/tags/list";
    assert_eq!(follow_pages(&host, list, "tags"), (expected.clone(), 1));
    assert_eq!(
        follow_pages(&host, &format!("{list}?n=10"), "tags"),
        (expected.clone(), 3)
    );
    assert_eq!(
        follow_pages(&host, &format!("{list}?n=25"), "tags"),
        (expected.clone(), 1)
    );
    registry
        .handle()
        .update(|behaviour| behaviour.page_entries_max = 5);
    assert_eq!(follow_pages(&host, list, "tags"), (expected.clone(), 5));
    let refused = get(&host, &format!("{list}?n=6"));
    assert_eq!(
        (refused.status, refused.error_code().as_str()),
        (400, "PAGINATION_NUMBER_INVALID")
    );
    registry.handle().update(|behaviour| {
        behaviour.refuse_large_pages = false;
        behaviour.link_header = false;
    });
    let reply = get(&host, &format!("{list}?n=6&last=t20"));
    assert_eq!(
        reply.json()["tags"],
        serde_json::json!(["t21", "t22", "t23", "t24"])
    );
    let reply = get(&host, list);
    assert_eq!(
        (
            reply.json()["tags"].as_array().unwrap().len(),
            reply.header("link")
        ),
        (5, None)
    );
    let catalog = get(&host, "/v2/_catalog").json();
    assert_eq!(catalog["repositories"], serde_json::json!(["a", "a/b"]));
    registry.handle().update(|behaviour| behaviour.catalog = false);
    assert_eq!(get(&host, "/v2/_catalog").status, 404);
}

#[test]
fn basic_authentication_wants_the_account() {
    let (registry, _, path) = with_blob(Behaviour {
        auth: Auth::Basic(Account::new("u", "p:w")),
        ..Behaviour::default()
    });
    let host = registry.host();
    let refused = get(&host, &path);
    assert_eq!(refused.status, 401);
    assert!(refused.header("www-authenticate").unwrap().starts_with("Basic "));
    for (credentials, status) in [("u:p:w", 200), ("u:other", 401)] {
        let value = format!("Basic {}", STANDARD.encode(credentials));
        let reply = send(&host, &format!("GET {path}"), &[("Authorization", &value)], b"");
        assert_eq!(reply.status, status);
    }
    let last = registry.handle().ledger().pop().unwrap();
    assert!(last.had_authorization);
}

fn with_token(host: &str, path: &str, token: &str) -> Reply {
    let value = format!("Bearer {token}");
    send(host, &format!("GET {path}"), &[("Authorization", &value)], b"")
}

#[test]
fn the_token_flow_grants_what_was_asked_for_until_it_expires() {
    let account = Account::new("u", "p");
    let (registry, blob, path) = with_blob(Behaviour {
        auth: Auth::Token(TokenAuth::new(account.clone())),
        ..Behaviour::default()
    });
    let host = registry.host();
    let refused = get(&host, &path);
    assert_eq!(refused.status, 401);
    let challenge = format!(
        "Bearer realm=\"http://{host}/token\",service=\"demo-registry\",scope=\"repository:a/b:pull\""
    );
    assert_eq!(refused.header("www-authenticate"), Some(challenge.as_str()));

    let answer = get(&host, "/token?service=demo-registry&scope=repository:a/b:pull").json();
    let token = answer["token"].as_str().unwrap();
    assert_eq!(
        (answer["access_token"].as_str(), answer["expires_in"].as_u64()),
        (Some(token), Some(300))
    );
    assert!(with_token(&host, &path, token).body == blob);
    let elsewhere = with_token(&host, "/v2/other/tags/list", token);
    let challenge = elsewhere.header("www-authenticate").unwrap();
    assert!(challenge.ends_with("error=\"insufficient_scope\""), "{challenge}");

    registry.handle().expire_tokens();
    let expired = with_token(&host, &path, token);
    assert_eq!(expired.status, 401);
    assert!(
        expired
            .header("www-authenticate")
            .unwrap()
            .contains("invalid_token")
    );
    registry.handle().update(|behaviour| {
        if let Auth::Token(auth) = &mut behaviour.auth {
            auth.expires_in_s = 0;
            auth.tell_expiry = false;
            auth.spelling = TokenSpelling::AccessToken;
        }
    });
    let answer = get(&host, "/token?scope=repository:a/b:pull").json();
    assert_eq!((answer.get("token"), answer.get("expires_in")), (None, None));
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(with_token(&host, &path, token).status, 401);
    assert_eq!(
        registry.handle().requests_matching("/token")[0].endpoint,
        Endpoint::Token
    );
}

#[test]
fn the_post_form_takes_passwords_and_identity_tokens() {
    let account = Account::new("u", "p");
    let (registry, _, path) = with_blob(Behaviour {
        auth: Auth::Token(TokenAuth {
            anonymous_pull: false,
            ..TokenAuth::new(account.clone())
        }),
        ..Behaviour::default()
    });
    let host = registry.host();
    assert_eq!(get(&host, "/token?scope=repository:a/b:pull").status, 401);
    let common =
        "service=demo-registry&client_id=test&scope=repository%3Aa%2Fb%3Apull+registry%3Acatalog%3A%2A";
    let post = |form: &str| send(&host, "POST /token", &[], format!("{common}&{form}").as_bytes());
    let answer = post("grant_type=password&username=u&password=p&access_type=offline").json();
    let refresh = answer["refresh_token"].as_str().unwrap();
    assert_eq!(refresh, identity_token(&account));
    let answer = post(&format!("grant_type=refresh_token&refresh_token={refresh}")).json();
    let token = answer["access_token"].as_str().unwrap();
    assert_eq!(with_token(&host, &path, token).status, 200);
    assert_eq!(with_token(&host, "/v2/_catalog", token).status, 200);
    assert_eq!(post("grant_type=password&username=u&password=x").status, 401);
    assert_eq!(post("grant_type=magic").status, 400);
    registry.handle().update(|behaviour| {
        if let Auth::Token(auth) = &mut behaviour.auth {
            auth.post_form = false;
        }
    });
    assert_eq!(post("grant_type=password&username=u&password=p").status, 404);
}

#[test]
fn redirected_blobs_come_from_signed_urls_that_expire() {
    for style in [SignedStyle::Amz, SignedStyle::Expires] {
        let (registry, blob, path) = with_blob(Behaviour {
            redirect: Some(Redirect {
                style,
                ..Redirect::default()
            }),
            ..Behaviour::default()
        });
        let handle = registry.handle();
        let storage = handle.storage_host();
        let target = || {
            let reply = get_range(&registry.host(), &path, "bytes=0-9");
            assert_eq!(reply.status, 307);
            let prefix = format!("http://{storage}");
            reply
                .header("location")
                .unwrap()
                .strip_prefix(&prefix)
                .unwrap()
                .to_owned()
        };
        let url = target();
        let part = get_range(&storage, &url, "bytes=10-19");
        assert_eq!((part.status, part.body.as_slice()), (206, &blob[10..20]));
        assert_eq!(send(&storage, &format!("HEAD {url}"), &[], b"").status, 403);
        let authorized = send(
            &storage,
            &format!("GET {url}"),
            &[("Authorization", "Bearer x")],
            b"",
        );
        assert_eq!(authorized.status, 400);
        let mut forged = url.clone();
        forged.pop();
        assert_eq!(get(&storage, &forged).status, 403);
        handle.expire_signed_urls();
        assert_eq!(get(&storage, &url).status, 403);
        handle.update(|behaviour| {
            if let Some(redirect) = &mut behaviour.redirect {
                redirect.expires_in = Duration::ZERO;
            }
        });
        assert_eq!(get(&storage, &target()).status, 403);
        let stored = handle.requests_matching("/storage/");
        assert!(stored.iter().all(|record| record.endpoint == Endpoint::Storage));
        let signature = url.rsplit('=').next().unwrap();
        assert!(stored.iter().all(|record| !record.query.contains(signature)));
    }
}

#[test]
fn pushes_arrive_in_one_piece_or_several() {
    let registry = DemoRegistry::start(Content::new(), Behaviour::default()).unwrap();
    let host = registry.host();
    let digest = Digest::of(b"hello world");
    let begun = send(&host, "POST /v2/a/blobs/uploads/", &[], b"");
    assert_eq!(begun.status, 202);
    let location = begun.header("location").unwrap();
    let first = send(
        &host,
        &format!("PATCH {location}"),
        &[("Content-Range", "0-5")],
        b"hello ",
    );
    assert_eq!((first.status, first.header("range")), (202, Some("0-5")));
    let gap = send(
        &host,
        &format!("PATCH {location}"),
        &[("Content-Range", "9-13")],
        b"world",
    );
    assert_eq!(gap.status, 416);
    let done = send(&host, &format!("PUT {location}?digest={digest}"), &[], b"world");
    assert_eq!(done.status, 201);
    assert_eq!(get(&host, done.header("location").unwrap()).body, b"hello world");

    let mounted = format!("POST /v2/b/blobs/uploads/?mount={digest}&from=a");
    assert_eq!(send(&host, &mounted, &[], b"").status, 201);
    assert_eq!(get(&host, &format!("/v2/b/blobs/{digest}")).body, b"hello world");
    let wrong = format!("POST /v2/c/blobs/uploads/?digest={digest}");
    assert_eq!(send(&host, &wrong, &[], b"other").error_code(), "DIGEST_INVALID");

    let manifest = image().manifest;
    let media_type = ("Content-Type", "application/vnd.oci.image.manifest.v1+json");
    let put = send(&host, "PUT /v2/a/manifests/new", &[media_type], &manifest);
    assert_eq!(put.status, 201);
    assert_eq!(get(&host, "/v2/a/manifests/new").body, manifest);
    registry
        .handle()
        .update(|behaviour| behaviour.push_bytes_max = 100);
    let full = format!("POST /v2/c/blobs/uploads/?digest={digest}");
    assert_eq!(send(&host, &full, &[], &[0; 200]).status, 413);
}

#[test]
fn only_loopback_addresses_are_listened_on() {
    let listen = Listen {
        address: "0.0.0.0:0".parse().unwrap(),
        tls: None,
    };
    let refused = DemoRegistry::start_on(&listen, Content::new(), Behaviour::default());
    assert_eq!(refused.unwrap_err().exit_code(), 2);
}
