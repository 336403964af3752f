//! Proxies: the usual environment variables, CONNECT, SOCKS, logins, and errors that name the proxy. The variables are
//! tried with the program, because a test must not change its own environment.

use std::process::{Command, Output};

use registryfs::error::Error;
use registryfs::registry::reference::Repository;
use registryfs::registry::{Client, ClientOptions, HostOptions, Secret};

use super::certificates::{Authority, acceptor};
use super::proxy::{Proxy, Rule};
use super::server::{Reply, Request, Server};
use super::{quick, tag};

/// `me:pass word`.
const LOGIN: &str = "Basic bWU6cGFzcyB3b3Jk";

fn answers(request: &Request) -> Reply {
    match request.path().ends_with("/tags/list") {
        true => Reply::new(200).body(r#"{"tags":["1"]}"#),
        false => Reply::new(200).body(r#"{"schemaVersion":2,"layers":[]}"#),
    }
}

/// A client that goes to `registry.example` through `proxy`.
fn through(proxy: &str, plain_http: bool, authority: Option<&Authority>) -> Client {
    let host = HostOptions {
        proxy: Some(Secret::new(proxy)),
        ca_files: authority.iter().map(|authority| authority.path()).collect(),
        ..HostOptions::default()
    };
    Client::new(ClientOptions {
        plain_http,
        hosts: [("registry.example".to_owned(), host)].into(),
        ..quick()
    })
    .unwrap()
}

fn repository() -> Repository {
    Repository::new("registry.example", "a").unwrap()
}

#[tokio::test]
async fn tls_goes_through_connect_and_socks_and_the_proxy_resolves_the_name() {
    let authority = Authority::new();
    let server = Server::start_tls(acceptor(&authority, "registry.example", None), answers).await;
    let proxy = Proxy::start(server.address(), Rule::Pass).await;
    for scheme in ["http", "socks5h"] {
        let client = through(
            &format!("{scheme}://{}", proxy.address()),
            false,
            Some(&authority),
        );
        client.manifest(&repository(), &tag("1")).await.unwrap();
        assert_eq!(
            client.health()[0].proxy,
            Some(format!("{scheme}://{}", proxy.address()))
        );
    }
    assert_eq!(
        proxy.log(),
        ["CONNECT registry.example:443", "SOCKS registry.example:443"]
    );
}

#[tokio::test]
async fn a_proxy_gets_its_login_and_says_when_it_is_wrong() {
    let authority = Authority::new();
    let tls = Server::start_tls(acceptor(&authority, "registry.example", None), answers).await;
    let plain = Server::start(answers).await;
    for (server, plain_http) in [(&tls, false), (&plain, true)] {
        let proxy = Proxy::start(server.address(), Rule::Login(LOGIN)).await;
        let address = proxy.address();
        let client = through(
            &format!("http://me:pass%20word@{address}"),
            plain_http,
            Some(&authority),
        );
        client.manifest(&repository(), &tag("1")).await.unwrap();
        assert!(!format!("{:?}", client.health()).contains("pass"));

        let client = through(
            &format!("http://me:hunter2@{address}"),
            plain_http,
            Some(&authority),
        );
        let error = client.manifest(&repository(), &tag("1")).await.unwrap_err();
        assert!(matches!(error, Error::Network { .. }), "{error}");
        let text = error.to_string();
        let named = format!("registry.example via proxy http://{address}: ");
        assert!(
            text.contains(&named) && text.contains("407") && !text.contains("hunter2"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_proxy_that_refuses_or_is_gone_is_the_one_to_blame() {
    let server = Server::start(answers).await;
    let proxy = Proxy::start(server.address(), Rule::Refuse).await;
    let gone = Proxy::start(server.address(), Rule::Pass).await.address();
    for (address, words) in [(proxy.address(), "the proxy refuses"), (gone, "cannot connect")] {
        let client = through(&format!("http://{address}"), false, None);
        let error = client.manifest(&repository(), &tag("1")).await.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&format!("via proxy http://{address}")) && text.contains(words),
            "{text}"
        );
    }
    let client = through(&format!("http://{}", proxy.address()), true, None);
    let error = client.manifest(&repository(), &tag("1")).await.unwrap_err();
    assert!(error.to_string().contains("via proxy"), "{error}");
    assert_eq!(server.requests().len(), 0);
}

/// Runs `registryfs tags REPOSITORY` with these variables alone.
async fn tags(repository: &str, variables: &[(&str, String)], flags: &[&str]) -> Output {
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_registryfs"));
    command
        .arg("--cache-dir")
        .arg(cache.path())
        .args(flags)
        .args(["--retries", "0", "tags", repository])
        .env_clear()
        .env("HOME", cache.path())
        .envs(variables.iter().map(|(name, value)| (name, value)));
    tokio::task::spawn_blocking(move || {
        let output = command.output().unwrap();
        drop(cache);
        output
    })
    .await
    .unwrap()
}

fn printed(output: &Output) -> String {
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_usual_variables_say_which_way_to_go() {
    let authority = Authority::new();
    let tls = Server::start_tls(acceptor(&authority, "registry.example", None), answers).await;
    let plain = Server::start(answers).await;
    let (to_tls, to_plain) = (
        Proxy::start(tls.address(), Rule::Pass).await,
        Proxy::start(plain.address(), Rule::Pass).await,
    );
    let url = |scheme: &str, proxy: &Proxy| format!("{scheme}://{}", proxy.address());
    let ca = authority.path();
    let ca = ["--ca", ca.to_str().unwrap()];
    let by_tls = [
        ("HTTPS_PROXY", url("http", &to_tls)),
        ("https_proxy", url("http", &to_tls)),
        ("ALL_PROXY", url("socks5h", &to_tls)),
    ];
    for variable in by_tls {
        let output = tags("registry.example/a", &[variable], &ca).await;
        assert_eq!(printed(&output), "1\n");
    }
    assert_eq!(to_tls.log().len(), 3, "{:?}", to_tls.log());
    let output = tags(
        "registry.example/a",
        &[("http_proxy", url("http", &to_plain))],
        &["--plain-http"],
    )
    .await;
    assert_eq!(printed(&output), "1\n");
    assert_eq!(to_plain.log().len(), 1);
    // Neither loopback nor what NO_PROXY names is asked through the proxy.
    let all = ("ALL_PROXY", url("http", &to_plain));
    let loopback = format!("{}/a", plain.host());
    assert_eq!(
        printed(&tags(&loopback, std::slice::from_ref(&all), &[]).await),
        "1\n"
    );
    let except = ("NO_PROXY", ".example".to_owned());
    let output = tags("registry.example/a", &[all, except], &["--timeout", "5"]).await;
    assert_ne!(output.status.code(), Some(0));
    assert_eq!(to_plain.log().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_that_names_no_proxy_is_refused_and_not_passed_over() {
    let wrong = ("HTTPS_PROXY", "ftp://me:hunter2@p.example".to_owned());
    let output = tags("registry.example/a", &[wrong], &[]).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("HTTPS_PROXY") && !text.contains("hunter2"),
        "{text}"
    );
}
