//! Who is sent what: tokens, passwords, and that nobody else gets them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use registryfs::error::Error;
use registryfs::registry::{Client, ClientOptions, Secret};

use super::server::{Reply, Request, Server};
use super::{blob, client, docker_config, quick, repository, tag};

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

/// A registry and its token service in one. The n-th token is `token-n`; `good` says which are taken.
async fn registry(good: impl Fn(usize) -> bool + Send + Sync + 'static) -> Server {
    let issued = AtomicUsize::new(0);
    Server::start(move |request| {
        if request.path() == "/token" {
            let n = issued.fetch_add(1, Ordering::SeqCst) + 1;
            return Reply::new(200).body(format!(r#"{{"token":"token-{n}","expires_in":300}}"#));
        }
        let sent = request
            .header("authorization")
            .and_then(|text| text.strip_prefix("Bearer token-"))
            .and_then(|n| n.parse().ok());
        match sent.is_some_and(&good) {
            true => Reply::new(200).body(MANIFEST),
            false => challenge(request, ""),
        }
    })
    .await
}

fn challenge(request: &Request, more: &str) -> Reply {
    let host = request.header("host").unwrap();
    let path = request.path().trim_start_matches("/v2/");
    let repository = path.split("/manifests").next().unwrap();
    Reply::error(401, "UNAUTHORIZED").header(
        "WWW-Authenticate",
        format!(
            r#"Bearer realm="http://{host}/token",service="s",scope="repository:{repository}:pull"{more}"#
        ),
    )
}

fn with_credential(credential: &str) -> Client {
    Client::new(ClientOptions {
        credential: Some(Secret::new(credential)),
        ..quick()
    })
    .unwrap()
}

#[tokio::test]
async fn anonymous_first_and_the_next_repository_with_a_token_at_once() {
    let server = registry(|_| true).await;
    let client = client();
    client
        .manifest(&repository(&server, "a/b"), &tag("1"))
        .await
        .unwrap();
    client
        .manifest(&repository(&server, "c"), &tag("1"))
        .await
        .unwrap();
    let expected = [
        "GET /v2/a/b/manifests/1",
        "GET /token",
        "GET /v2/a/b/manifests/1",
        "GET /token",
        "GET /v2/c/manifests/1",
    ];
    assert_eq!(server.lines(), expected);
    let requests = server.requests();
    assert_eq!(requests[0].header("authorization"), None);
    assert_eq!(requests[1].query("scope"), ["repository:a/b:pull"]);
    assert_eq!(requests[1].query("service"), ["s"]);
    assert_eq!(requests[3].query("scope"), ["repository:c:pull"]);
}

#[tokio::test]
async fn many_requests_share_one_token() {
    let server = registry(|_| true).await;
    let client = client();
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, repository) = (client.clone(), repository(&server, "a"));
        running.spawn(async move { client.manifest(&repository, &tag("1")).await });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(server.count("/token"), 1);
}

/// A registry is often its own token service. Those that wait for a token must leave a place to fetch it in.
#[tokio::test]
async fn more_first_requests_than_places_do_not_block_each_other() {
    let server = registry(|_| true).await;
    let client = Client::new(ClientOptions {
        concurrency: 2,
        ..quick()
    })
    .unwrap();
    let mut running = tokio::task::JoinSet::new();
    for n in 0..8 {
        let (client, repository) = (client.clone(), repository(&server, &format!("r{n}")));
        running.spawn(async move { client.manifest(&repository, &tag("1")).await });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(server.count("/token"), 8);
}

#[tokio::test]
async fn a_refused_token_is_renewed_exactly_once() {
    let server = registry(|n| n == 2).await;
    let client = client();
    let repository = repository(&server, "a");
    client.manifest(&repository, &tag("1")).await.unwrap();
    assert_eq!(server.count("/token"), 2, "the first was refused");

    let server = registry(|_| false).await;
    let repository = super::repository(&server, "a");
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(error.to_string().contains("no credentials"), "{error}");
    assert_eq!(server.count("/token"), 2, "one token and one renewal");
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(server.count("/token") <= 4, "{:?}", server.lines());
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let server = Server::start(|request| {
        if request.path() == "/token" {
            return Reply::new(200).body(r#"{"access_token":"t","expires_in":0.000001}"#);
        }
        match request.header("authorization") {
            Some("Bearer t") => Reply::new(200).body(MANIFEST),
            _ => challenge(request, ""),
        }
    })
    .await;
    let client = client();
    let repository = repository(&server, "a");
    client.manifest(&repository, &tag("1")).await.unwrap();
    client.manifest(&repository, &tag("1")).await.unwrap();
    let expected = [
        "GET /v2/a/manifests/1",
        "GET /token",
        "GET /v2/a/manifests/1",
        "GET /token",
        "GET /v2/a/manifests/1",
    ];
    assert_eq!(
        server.lines(),
        expected,
        "the second time there is no 401 in between"
    );
}

#[tokio::test]
async fn more_scopes_are_asked_for_when_a_token_allows_too_little() {
    let server = Server::start(|request| {
        if request.path() == "/token" {
            let scopes = request.query("scope").join(" ");
            return Reply::new(200).body(format!(r#"{{"token":"{}"}}"#, STANDARD.encode(scopes)));
        }
        let wide = STANDARD.encode("repository:base:pull repository:a:pull");
        match request.header("authorization") {
            Some(sent) if sent == format!("Bearer {wide}") => Reply::new(200).body(MANIFEST),
            Some(_) => {
                let host = request.header("host").unwrap();
                let text = format!(
                    r#"Bearer realm="http://{host}/token",service="s",scope="repository:base:pull",error="insufficient_scope""#
                );
                Reply::new(401).header("WWW-Authenticate", text)
            }
            None => challenge(request, ""),
        }
    })
    .await;
    let client = client();
    client
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap();
    client
        .manifest(&repository(&server, "a"), &tag("2"))
        .await
        .unwrap();
    assert_eq!(server.count("/token"), 2, "the union is remembered");
}

#[tokio::test]
async fn a_password_goes_to_the_token_service_only() {
    let server = registry(|_| true).await;
    let client = with_credential("me:pa:ss");
    client
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap();
    let expected = format!("Basic {}", STANDARD.encode("me:pa:ss"));
    let with_password: Vec<String> = server
        .requests()
        .iter()
        .filter(|request| request.header("authorization") == Some(&expected))
        .map(|request| request.path().to_owned())
        .collect();
    assert_eq!(with_password, ["/token"]);
    let health = client.health();
    assert_eq!(
        health[0].credentials.as_deref(),
        Some("credentials of --credential (or REGISTRYFS_CREDENTIAL)")
    );
    assert_eq!((health[0].requests.manifests, health[0].requests.tokens), (2, 1));
}

#[tokio::test]
async fn basic_credentials_are_read_anew_when_they_are_refused() {
    let server = Server::start(|request| match request.header("authorization") {
        Some(sent) if sent == format!("Basic {}", STANDARD.encode("me:new")) => {
            Reply::new(200).body(MANIFEST)
        }
        _ => Reply::error(401, "UNAUTHORIZED").header("WWW-Authenticate", "Basic realm=\"r\""),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let login = |password: &str| {
        let auth = STANDARD.encode(format!("me:{password}"));
        let json = format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, server.host());
        std::fs::write(&path, json).unwrap();
    };
    login("old");
    let client = Client::new(ClientOptions {
        credential_environment: docker_config(folder.path()),
        ..quick()
    })
    .unwrap();
    let repository = repository(&server, "a");
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(error.to_string().contains("config.json"), "{error}");
    assert_eq!(server.requests().len(), 2, "the same password is not sent twice");
    login("new");
    client.manifest(&repository, &tag("1")).await.unwrap();
}

#[tokio::test]
async fn a_wrong_password_is_an_answer_and_not_tried_again() {
    let server = Server::start(|request| match request.path() {
        "/token" => Reply::error(401, "UNAUTHORIZED"),
        _ => challenge(request, ""),
    })
    .await;
    let client = with_credential("me:wrong");
    let error = client
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(error.to_string().contains("--credential"), "{error}");
    assert_eq!(server.count("/token"), 1);
}

#[tokio::test]
async fn a_token_that_cannot_be_had_is_asked_for_once_for_all_who_wait() {
    let server = Server::start(|request| match request.path() {
        "/token" => Reply::error(403, "DENIED").broken(0, super::server::Then::Drip),
        _ => challenge(request, ""),
    })
    .await;
    let client = client();
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, repository) = (client.clone(), repository(&server, "a"));
        running.spawn(async move { client.manifest(&repository, &tag("1")).await });
    }
    while let Some(done) = running.join_next().await {
        let error = done.unwrap().unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
    }
    assert!(server.count("/token") < 16, "{} requests", server.count("/token"));
}

#[tokio::test]
async fn an_identity_token_is_posted_and_sent_by_get_where_there_is_no_form() {
    for form_status in [200, 404, 405, 401, 400] {
        let server = Server::start(move |request| match (request.path(), request.method.as_str()) {
            ("/token", "POST") if form_status == 200 => Reply::new(200).body(r#"{"access_token":"t"}"#),
            ("/token", "POST") => Reply::new(form_status),
            ("/token", _) => Reply::new(200).body(r#"{"token":"t"}"#),
            _ if request.header("authorization") == Some("Bearer t") => Reply::new(200).body(MANIFEST),
            _ => challenge(request, ""),
        })
        .await;
        let client = with_credential("<token>:refresh me");
        client
            .manifest(&repository(&server, "a"), &tag("1"))
            .await
            .unwrap();
        let requests = server.requests();
        let form: Vec<(String, String)> = url::form_urlencoded::parse(requests[1].body.as_bytes())
            .into_owned()
            .collect();
        let has = |name: &str, value: &str| form.contains(&(name.to_owned(), value.to_owned()));
        assert!(
            has("grant_type", "refresh_token") && has("refresh_token", "refresh me"),
            "{form:?}"
        );
        assert!(
            has("scope", "repository:a:pull") && has("service", "s"),
            "{form:?}"
        );
        let expected = if form_status == 200 { 1 } else { 2 };
        assert_eq!(server.count("/token"), expected, "{form_status}");
        if form_status != 200 {
            let by_get = format!("Basic {}", STANDARD.encode("<token>:refresh me"));
            assert_eq!(requests[2].header("authorization"), Some(by_get.as_str()));
        }
    }
}

#[tokio::test]
async fn a_token_service_that_is_not_safe_gets_nothing() {
    for realm in [
        "http://169.254.169.254/latest",
        "https://[fd00:ec2::254]/",
        "http://192.0.2.1/token",
        "ftp://127.0.0.1/token",
    ] {
        let server = Server::start(move |_| {
            Reply::new(401).header("WWW-Authenticate", format!(r#"Bearer realm="{realm}""#))
        })
        .await;
        let options = ClientOptions {
            plain_http: false,
            credential: Some(Secret::new("me:secret")),
            ..quick()
        };
        let client = Client::new(options).unwrap();
        let error = client
            .manifest(&repository(&server, "a"), &tag("1"))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{realm}: {error}");
        assert!(error.to_string().contains("token service"), "{realm}: {error}");
    }
}

#[tokio::test]
async fn authorization_stays_with_the_registry() {
    let (bytes, digest) = blob(1000);
    let total = bytes.len() as u64;
    let store = Arc::new(Server::start(move |request| Reply::blob(request, &bytes)).await);
    let elsewhere = format!("http://{}/data?sig=1", store.host());
    let server = Server::start(move |request| match request.header("authorization") {
        None => Reply::new(401).header("WWW-Authenticate", "Basic realm=\"r\""),
        Some(_) if request.path().ends_with("/moved") => {
            Reply::new(307).header("Location", elsewhere.clone())
        }
        // Within the registry it has to go along.
        Some(_) => Reply::new(307).header("Location", "/moved"),
    })
    .await;
    let client = with_credential("me:secret");
    let repository = repository(&server, "a");
    client
        .blob_bytes(&repository, &digest, 0..10, total)
        .await
        .unwrap();
    client
        .blob_bytes(&repository, &digest, 10..20, total)
        .await
        .unwrap();
    assert_eq!(server.count("/moved"), 1);
    for request in store.requests() {
        assert_eq!(request.header("authorization"), None, "{request:?}");
    }
}

#[tokio::test]
async fn a_refusal_of_the_token_service_is_believed_for_a_while() {
    let server = Server::start(|request| match request.path() {
        "/token" => Reply::error(401, "UNAUTHORIZED"),
        _ => challenge(request, ""),
    })
    .await;
    let client = with_credential("me:wrong");
    for name in ["1", "2", "3"] {
        let error = client
            .manifest(&repository(&server, "a"), &tag(name))
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Denied { .. }), "{text}");
        assert!(
            text.contains(&format!("/a:{name}")) && text.contains("--credential"),
            "{text}"
        );
    }
    assert_eq!(server.count("/token"), 1, "{:?}", server.lines());
    let other = client.manifest(&repository(&server, "b"), &tag("1")).await;
    assert!(other.is_err());
    assert_eq!(
        server.count("/token"),
        2,
        "another repository is another question"
    );
}

#[tokio::test]
async fn the_next_page_of_a_list_that_is_elsewhere_is_asked_for_without_credentials() {
    let elsewhere = Server::start(|request| {
        let page = Reply::new(200);
        match request.query("last").is_empty() {
            true => page
                .header("Link", "</list?last=a>; rel=\"next\"")
                .body(r#"{"tags":["a"]}"#),
            false => page.body(r#"{"tags":["b"]}"#),
        }
    })
    .await;
    let target = format!("http://{}/list", elsewhere.host());
    let server = Server::start(move |request| match request.header("authorization") {
        Some(_) => Reply::new(307).header("Location", target.clone()),
        None => Reply::error(401, "UNAUTHORIZED").header("WWW-Authenticate", "Basic realm=\"r\""),
    })
    .await;
    let mut pages = with_credential("me:secret").tags(&repository(&server, "a"));
    assert_eq!(pages.next_page().await.unwrap(), Some(vec!["a".to_owned()]));
    assert_eq!(pages.next_page().await.unwrap(), Some(vec!["b".to_owned()]));
    for request in elsewhere.requests() {
        assert_eq!(request.header("authorization"), None, "{}", request.target);
    }
    assert_eq!(elsewhere.requests().len(), 2);
}
