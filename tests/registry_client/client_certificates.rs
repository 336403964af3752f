//! Servers that want to know who we are by a certificate: each gets the one that is meant for it, and nobody else does.

use std::path::Path;

use registryfs::registry::{Client, ClientOptions, HostOptions};

use super::certificates::{Authority, acceptor};
use super::server::{Reply, Server};
use super::{blob, quick, repository, tag};

async fn demanding(authority: &Authority) -> Server {
    let tls = acceptor(authority, "127.0.0.1", Some(authority));
    Server::start_tls(tls, |_| {
        Reply::new(200).body(r#"{"schemaVersion":2,"layers":[]}"#)
    })
    .await
}

fn options(authority: &Authority) -> ClientOptions {
    ClientOptions {
        plain_http: false,
        ca_files: vec![authority.path()],
        ..quick()
    }
}

fn put(dir: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

#[tokio::test]
async fn a_certificate_comes_from_our_settings_from_hosts_toml_and_from_dockers_directory() {
    let authority = Authority::new();
    let server = demanding(&authority).await;
    let (certificate, key) = authority.pems("me.example");
    let dir = tempfile::tempdir().unwrap();
    let ours = HostOptions {
        client_cert: Some(put(dir.path(), "me.pem", &format!("{key}{certificate}"))),
        ..HostOptions::default()
    };
    let host = server.host();
    put(dir.path(), &format!("docker/{host}/client.cert"), &certificate);
    put(dir.path(), &format!("docker/{host}/client.key"), &key);
    put(dir.path(), "toml/c.pem", &certificate);
    put(dir.path(), "toml/c.key", &key);
    let pair = "client = [[\"../c.pem\", \"../c.key\"]]";
    put(dir.path(), &format!("toml/{host}/hosts.toml"), pair);
    let of_dirs = |name: &str| ClientOptions {
        certs_dirs: vec![dir.path().join(name)],
        ..options(&authority)
    };
    let ways = [
        ClientOptions {
            hosts: [(host, ours)].into(),
            ..options(&authority)
        },
        of_dirs("toml"),
        of_dirs("docker"),
    ];
    for options in ways {
        let client = Client::new(options).unwrap();
        client
            .manifest(&repository(&server, "a"), &tag("1"))
            .await
            .unwrap();
    }
    let error = Client::new(options(&authority))
        .unwrap()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("client certificate"), "{error}");
}

#[tokio::test]
async fn a_certificate_is_not_shown_where_a_redirect_leads() {
    let authority = Authority::new();
    let (bytes, digest) = blob(100);
    let store = demanding(&authority).await;
    let target = format!("https://{}/blob", store.host());
    let tls = acceptor(&authority, "127.0.0.1", Some(&authority));
    let server = Server::start_tls(tls, move |_| Reply::new(307).header("Location", &target)).await;
    let (certificate, key) = authority.pems("me.example");
    let dir = tempfile::tempdir().unwrap();
    let ours = HostOptions {
        client_cert: Some(put(dir.path(), "me.cert", &certificate)),
        client_key: Some(put(dir.path(), "me.key", &key)),
        ..HostOptions::default()
    };
    let client = Client::new(ClientOptions {
        hosts: [(server.host(), ours)].into(),
        ..options(&authority)
    })
    .unwrap();
    let repository = repository(&server, "a");
    let read = client.blob_bytes(&repository, &digest, 0..10, bytes.len() as u64);
    read.await.unwrap_err();
    assert_eq!((server.requests().len(), store.requests().len()), (1, 0));
}

#[tokio::test]
async fn files_that_are_no_pair_are_named() {
    let authority = Authority::new();
    let (certificate, key) = authority.pems("me.example");
    let (_, other) = authority.pems("other.example");
    let dir = tempfile::tempdir().unwrap();
    let server = demanding(&authority).await;
    let wrong = [
        ("no certificate", "", key.as_str(), "c.cert"),
        ("no key", certificate.as_str(), "", "c.key"),
        (
            "another key",
            certificate.as_str(),
            other.as_str(),
            "another certificate",
        ),
    ];
    for (case, certificate, key, named) in wrong {
        let ours = HostOptions {
            client_cert: Some(put(dir.path(), "c.cert", certificate)),
            client_key: Some(put(dir.path(), "c.key", key)),
            ..HostOptions::default()
        };
        let client = Client::new(ClientOptions {
            hosts: [(server.host(), ours)].into(),
            ..options(&authority)
        });
        let error = match client {
            Ok(client) => client
                .manifest(&repository(&server, "a"), &tag("1"))
                .await
                .unwrap_err(),
            Err(error) => error,
        };
        assert!(error.to_string().contains(named), "{case}: {error}");
        assert_eq!(error.exit_code(), 2, "{case}");
    }
}
