//! Credentials of other tools over the wire: which of them are sent where, and that what they are now is what counts,
//! not what they were when a token was fetched.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use registryfs::error::Error;
use registryfs::registry::{Client, ClientOptions, CredentialEnvironment};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::server::{Reply, Request, Server};
use super::{docker_config, quick, repository, tag};

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

/// The directory of docker's `config.json`, and of programs.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn config(&self, config: &Value) {
        fs::write(self.path("config.json"), config.to_string()).unwrap();
    }

    fn login(&self, key: &str, user: &str) {
        self.config(&json!({"auths": {key: {"auth": STANDARD.encode(format!("{user}:pw"))}}}));
    }

    fn logout(&self) {
        fs::remove_file(self.path("config.json")).unwrap();
    }

    /// A credential helper that prints what is in the file `answer`. Written by another process, because a file that
    /// a child of this one still has open for writing cannot be started.
    fn helper(&self, name: &str) {
        let script = "printf '#!/bin/sh\\necho run >> %s/runs\\ncat %s/answer\\n' \"$1\" \"$1\" > \"$2\" && chmod 755 \"$2\"";
        let program = self.path(&format!("docker-credential-{name}"));
        let mut shell = Command::new("sh");
        let written = shell.args(["-c", script, "sh"]).arg(self.0.path()).arg(program);
        assert!(written.status().unwrap().success());
        self.config(&json!({"credsStore": name}));
    }

    fn answer(&self, user: &str) {
        fs::write(
            self.path("answer"),
            json!({"Username": user, "Secret": "pw"}).to_string(),
        )
        .unwrap();
    }

    fn client(&self) -> Client {
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        Client::new(ClientOptions {
            credential_environment: CredentialEnvironment {
                path: Some(path.into()),
                ..docker_config(self.0.path())
            },
            ..quick()
        })
        .unwrap()
    }
}

fn basic(user: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:pw")))
}

/// The user of a basic authorization, empty for none.
fn user_of(request: &Request) -> String {
    let sent = request
        .header("authorization")
        .and_then(|text| text.strip_prefix("Basic "));
    let decoded = sent.map(|text| String::from_utf8(STANDARD.decode(text).unwrap()).unwrap());
    decoded.map_or(String::new(), |pair| pair.split(':').next().unwrap().to_owned())
}

fn challenge(request: &Request) -> Reply {
    let host = request.header("host").unwrap();
    let path = request.path().trim_start_matches("/v2/");
    let repository = path.split("/manifests").next().unwrap();
    Reply::error(401, "UNAUTHORIZED").header(
        "WWW-Authenticate",
        format!(r#"Bearer realm="http://{host}/token",service="s",scope="repository:{repository}:pull""#),
    )
}

/// A registry whose token service gives everyone a token, named after the user, and which lets those in that `may`
/// says, by user and repository.
async fn registry(may: impl Fn(&str, &str) -> bool + Send + Sync + 'static) -> Server {
    Server::start(move |request| {
        if request.path() == "/token" {
            let token = format!("of-{}", user_of(request));
            return Reply::new(200).body(json!({"token": token, "expires_in": 3000}).to_string());
        }
        let repository = request
            .path()
            .split("/manifests")
            .next()
            .unwrap()
            .trim_start_matches("/v2/");
        let sent = request
            .header("authorization")
            .and_then(|text| text.strip_prefix("Bearer of-"));
        match sent.is_some_and(|user| may(user, repository)) {
            true => Reply::new(200).body(MANIFEST),
            false => challenge(request),
        }
    })
    .await
}

#[tokio::test]
async fn a_login_after_a_refusal_works_at_once_and_a_logout_ends_it() {
    let server = registry(|user, _| user == "me").await;
    let folder = Folder::new();
    let client = folder.client();
    let repository = repository(&server, "a");
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(
        error.to_string().contains("no credentials: there is no "),
        "{error}"
    );
    assert_eq!(client.health()[0].credentials, None);
    folder.login(&server.host(), "me");
    client.manifest(&repository, &tag("1")).await.unwrap();
    let shown = client.health()[0].credentials.clone().unwrap();
    assert_eq!(
        shown,
        format!(
            "credentials of {}, entry {}",
            folder.path("config.json").display(),
            server.host()
        )
    );
    let before = server.count("/token");
    client.manifest(&repository, &tag("1")).await.unwrap();
    assert_eq!(server.count("/token"), before, "the token is used again");

    folder.logout();
    // The files are not looked at for each request: until then the token is used as before.
    let patience = Instant::now() + Duration::from_secs(30);
    while client.manifest(&repository, &tag("1")).await.is_ok() {
        assert!(Instant::now() < patience, "the logout was not noticed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let seen = server.requests().len();
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    let after = &server.requests()[seen..];
    let tokens: BTreeSet<_> = after
        .iter()
        .filter_map(|request| request.header("authorization"))
        .collect();
    assert_eq!(
        tokens,
        BTreeSet::from(["Bearer of-"]),
        "nothing of the old login is sent"
    );
}

#[tokio::test]
async fn a_login_after_an_anonymous_success_opens_what_is_private() {
    let server = registry(|user, repository| user == "me" || repository == "public").await;
    let folder = Folder::new();
    let client = folder.client();
    client
        .manifest(&repository(&server, "public"), &tag("1"))
        .await
        .unwrap();
    let private = repository(&server, "private");
    client.manifest(&private, &tag("1")).await.unwrap_err();
    folder.login(&server.host(), "me");
    client.manifest(&private, &tag("1")).await.unwrap();
}

#[tokio::test]
async fn each_namespace_is_asked_for_with_its_own_login() {
    for by_token in [true, false] {
        let server = match by_token {
            true => registry(|user, repository| repository.starts_with(user) && !user.is_empty()).await,
            false => {
                Server::start(|request| {
                    let user = user_of(request);
                    match !user.is_empty() && request.path().starts_with(&format!("/v2/{user}/")) {
                        true => Reply::new(200).body(MANIFEST),
                        false => {
                            Reply::error(401, "UNAUTHORIZED").header("WWW-Authenticate", "Basic realm=\"r\"")
                        }
                    }
                })
                .await
            }
        };
        let folder = Folder::new();
        let key = |namespace: &str| format!("{}/{namespace}", server.host());
        let auth = |user: &str| json!({"auth": STANDARD.encode(format!("{user}:pw"))});
        folder.config(&json!({"auths": {key("red"): auth("red"), key("blue"): auth("blue")}}));
        let client = folder.client();
        for _ in 0..2 {
            for path in ["red/app", "blue/app"] {
                client
                    .manifest(&repository(&server, path), &tag("1"))
                    .await
                    .unwrap();
            }
        }
        let error = client
            .manifest(&repository(&server, "green/app"), &tag("1"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("no credentials"), "{error}");
        if !by_token {
            let mut sent = server
                .requests()
                .into_iter()
                .map(|request| (user_of(&request), request.target));
            let wrong = sent.find(|(user, target)| !user.is_empty() && !target.contains(user.as_str()));
            assert_eq!(wrong, None);
        }
        // Twice two repositories; the first 401, two tokens; the third repository with its one renewal.
        let expected = if by_token { 4 + 3 + 4 } else { 4 + 1 + 1 };
        assert_eq!(server.lines().len(), expected, "{:?}", server.lines());
    }
}

/// Amazon's registry answers 403 to a password that has expired.
#[tokio::test]
async fn an_expired_password_is_looked_up_anew_also_where_the_registry_forbids() {
    for status in [401, 403] {
        let server = Server::start(move |request| match user_of(request).as_str() {
            "" => Reply::error(401, "UNAUTHORIZED").header("WWW-Authenticate", "Basic realm=\"r\""),
            "fresh" => Reply::new(200).body(MANIFEST),
            _ => Reply::error(status, "DENIED").header("WWW-Authenticate", "Basic realm=\"r\""),
        })
        .await;
        let folder = Folder::new();
        folder.login(&server.host(), "stale");
        let client = folder.client();
        let repository = repository(&server, "a");
        let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
        let sent = server
            .requests()
            .iter()
            .filter(|request| user_of(request) == "stale")
            .count();
        assert_eq!(sent, 1, "the same is not sent twice");
        folder.login(&server.host(), "fresh");
        client.manifest(&repository, &tag("1")).await.unwrap();
    }
}

#[tokio::test]
async fn a_helper_is_asked_once_for_many_requests_and_its_failure_is_the_error() {
    let server = registry(|user, _| user == "me").await;
    let folder = Folder::new();
    folder.helper("test");
    folder.answer("me");
    let client = folder.client();
    let mut running = tokio::task::JoinSet::new();
    for n in 0..50 {
        let (client, repository) = (client.clone(), repository(&server, &format!("r{n}")));
        running.spawn(async move { client.manifest(&repository, &tag("1")).await });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap().unwrap();
    }
    let runs = fs::read_to_string(folder.path("runs")).unwrap();
    assert_eq!(runs.lines().count(), 1);
    let shown = client.health()[0].credentials.clone().unwrap();
    assert!(
        shown.starts_with("credentials of docker-credential-test, as "),
        "{shown}"
    );

    let server = registry(|user, _| user == "me").await;
    let folder = Folder::new();
    folder.helper("test");
    fs::write(folder.path("answer"), "hunter2").unwrap();
    let client = folder.client();
    let error = client
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NoCredentials { .. }), "{error}");
    assert_eq!((error.exit_code(), error.errno()), (3, libc::EACCES));
    let text = format!("{error} {error:?} {:?}", client.health());
    assert!(
        text.contains("docker-credential-test") && !text.contains("hunter2"),
        "{text}"
    );
    assert_eq!(
        server.lines(),
        ["GET /v2/a/manifests/1"],
        "nothing is asked for in vain"
    );
}

#[tokio::test]
async fn a_broken_file_is_named_when_the_registry_refuses() {
    let server = registry(|user, _| user == "me").await;
    let folder = Folder::new();
    fs::write(folder.path("config.json"), "{ \"auths\": hunter2").unwrap();
    let error = folder
        .client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("config.json: it is no JSON of the expected form, see line 1"),
        "{text}"
    );
    assert!(!text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn a_refresh_token_that_was_rotated_is_the_next_one_to_send() {
    let server = Server::start(|request| {
        if request.path() != "/token" {
            let sent = request
                .header("authorization")
                .and_then(|text| text.strip_prefix("Bearer "));
            let scope = format!("for-{}", request.path().split('/').nth(2).unwrap());
            return match sent == Some(&scope) {
                true => Reply::new(200).body(MANIFEST),
                false => challenge(request),
            };
        }
        let form: Vec<(String, String)> = url::form_urlencoded::parse(request.body.as_bytes())
            .into_owned()
            .collect();
        let value = |name: &str| {
            form.iter()
                .find(|(key, _)| key == name)
                .map_or("", |(_, value)| value)
                .to_owned()
        };
        let path = value("scope").split(':').nth(1).unwrap_or_default().to_owned();
        // Each is good once, but for the first, to which a new login leads back.
        let next = match (value("refresh_token").as_str(), path.as_str()) {
            ("first", _) => "second",
            ("second", "b") => "third",
            _ => return Reply::error(401, "UNAUTHORIZED"),
        };
        Reply::new(200)
            .body(json!({"access_token": format!("for-{path}"), "refresh_token": next}).to_string())
    })
    .await;
    let folder = Folder::new();
    folder.config(&json!({"auths": {server.host(): {"identitytoken": "first"}}}));
    let client = folder.client();
    for path in ["a", "b", "c"] {
        client
            .manifest(&repository(&server, path), &tag("1"))
            .await
            .unwrap();
    }
    let posted: Vec<String> = server
        .requests()
        .iter()
        .filter(|request| request.method == "POST")
        .map(|request| request.body.rsplit_once("refresh_token=").unwrap().1.to_owned())
        .collect();
    assert_eq!(
        posted,
        ["first", "second", "third", "first"],
        "the one of the file is tried at last"
    );
}

#[tokio::test]
async fn an_identity_token_that_is_no_longer_good_is_said_to_be_the_reason() {
    let server = Server::start(|request| match (request.path(), request.method.as_str()) {
        ("/token", "POST") => Reply::error(400, "UNSUPPORTED"),
        ("/token", _) => Reply::error(401, "UNAUTHORIZED"),
        _ => challenge(request),
    })
    .await;
    let folder = Folder::new();
    folder.config(&json!({"auths": {server.host(): {"identitytoken": "it"}}}));
    let error = folder
        .client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(
        error.to_string().contains("identity token is not taken"),
        "{error}"
    );
    folder.login(&server.host(), "me");
    let error = folder
        .client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(!error.to_string().contains("identity token"), "{error}");
}

#[tokio::test]
async fn a_password_beside_an_identity_token_is_for_services_without_a_form() {
    let server = Server::start(|request| match (request.path(), request.method.as_str()) {
        ("/token", "POST") => Reply::new(404),
        ("/token", _) if request.header("authorization") == Some(&basic("me")) => {
            Reply::new(200).body(r#"{"token":"t"}"#)
        }
        _ if request.header("authorization") == Some("Bearer t") => Reply::new(200).body(MANIFEST),
        _ => challenge(request),
    })
    .await;
    let folder = Folder::new();
    let entry = json!({"auth": STANDARD.encode("me:pw"), "identitytoken": "it"});
    folder.config(&json!({"auths": {server.host(): entry}}));
    folder
        .client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_registry_token_is_sent_as_it_is_and_not_twice() {
    for good in [true, false] {
        let server = Server::start(move |request| match request.header("authorization") {
            Some("Bearer rt") if good => Reply::new(200).body(MANIFEST),
            _ => challenge(request),
        })
        .await;
        let folder = Folder::new();
        folder.config(&json!({"auths": {server.host(): {"registrytoken": "rt"}}}));
        let read = folder
            .client()
            .manifest(&repository(&server, "a"), &tag("1"))
            .await;
        assert_eq!(read.is_ok(), good, "{read:?}");
        assert_eq!(server.lines(), ["GET /v2/a/manifests/1"; 2]);
    }
}
