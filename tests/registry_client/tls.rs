//! Which protocol is spoken to whom: TLS first, plain HTTP only to a loopback host that speaks no TLS, and never
//! after a certificate that is not trusted.

use registryfs::error::Error;
use registryfs::registry::{Client, ClientOptions, HostOptions};
use tokio_rustls::TlsAcceptor;

use super::certificates::{Authority, acceptor};
use super::server::{Reply, Request, Server};
use super::{quick, repository, tag};

fn manifest(_: &Request) -> Reply {
    Reply::new(200).body(r#"{"schemaVersion":2,"layers":[]}"#)
}

/// A server's side for 127.0.0.1, and the authority behind it.
fn certificate() -> (TlsAcceptor, Authority) {
    let authority = Authority::new();
    (acceptor(&authority, "127.0.0.1", None), authority)
}

fn found_out() -> ClientOptions {
    ClientOptions {
        plain_http: false,
        ..quick()
    }
}

#[tokio::test]
async fn a_loopback_host_without_tls_is_spoken_to_plainly_after_one_try() {
    spoken_to_plainly(Server::start(manifest).await).await;
    spoken_to_plainly(Server::start_mute(manifest).await).await;
}

async fn spoken_to_plainly(server: Server) {
    let client = Client::new(found_out()).unwrap();
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (client, repository) = (client.clone(), repository(&server, "a"));
        running.spawn(async move { client.manifest(&repository, &tag("1")).await });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(server.hellos(), 1, "the others wait for what the first finds out");
    assert_eq!(server.requests().len(), 8);
    let health = client.health().remove(0);
    assert_eq!((health.scheme.as_str(), health.requests.manifests), ("http", 8));
}

#[tokio::test]
async fn an_untrusted_certificate_is_an_error_and_nothing_is_sent_plainly() {
    let (tls, _) = certificate();
    let server = Server::start_tls(tls, manifest).await;
    let client = Client::new(found_out()).unwrap();
    for _ in 0..2 {
        let error = client
            .manifest(&repository(&server, "a"), &tag("1"))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Network { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("certificate") && text.contains("--ca") && text.contains("--insecure"),
            "{text}"
        );
    }
    assert_eq!(server.plain_connections(), 0);
    assert_eq!(server.requests().len(), 0);
    assert_eq!(server.hellos(), 2, "no retry helps against a certificate");
}

#[tokio::test]
async fn a_named_authority_or_no_check_makes_it_work() {
    let (tls, authority) = certificate();
    let server = Server::start_tls(tls, manifest).await;
    let name = server.host();
    let of_host = |options: HostOptions| ClientOptions {
        hosts: [(name.clone(), options)].into(),
        ..found_out()
    };
    let ways = [
        ClientOptions {
            ca_files: vec![authority.path()],
            ..found_out()
        },
        ClientOptions {
            insecure: true,
            ..found_out()
        },
        of_host(HostOptions {
            ca_files: vec![authority.path()],
            ..HostOptions::default()
        }),
        of_host(HostOptions {
            insecure: Some(true),
            ..HostOptions::default()
        }),
    ];
    for options in ways {
        let client = Client::new(options).unwrap();
        client
            .manifest(&repository(&server, "a"), &tag("1"))
            .await
            .unwrap();
        assert_eq!(client.health()[0].scheme, "https");
    }
    assert_eq!(server.plain_connections(), 0);
}

#[tokio::test]
async fn a_certificate_for_another_name_is_not_trusted() {
    let (tls, authority) = certificate();
    let server = Server::start_tls(tls, manifest).await;
    let client = Client::new(ClientOptions {
        ca_files: vec![authority.path()],
        ..found_out()
    })
    .unwrap();
    let name = format!("localhost:{}", server.address().port());
    let repository = registryfs::registry::reference::Repository::new(&name, "a").unwrap();
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert_eq!(server.requests().len(), 0);
}

#[tokio::test]
async fn a_host_that_spoke_tls_is_never_spoken_to_plainly_again() {
    let (tls, authority) = certificate();
    let server = Server::start_tls(tls, manifest).await;
    let (address, repository) = (server.address(), repository(&server, "a"));
    let client = Client::new(ClientOptions {
        ca_files: vec![authority.path()],
        retries: 0,
        ..found_out()
    })
    .unwrap();
    client.manifest(&repository, &tag("1")).await.unwrap();
    server.stop().await;
    let impostor = Server::listen(address, None, manifest).await;
    client.manifest(&repository, &tag("1")).await.unwrap_err();
    client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert_eq!(impostor.requests().len(), 0);
}

#[tokio::test]
async fn a_host_that_has_tls_after_an_outage_is_found_to_have_it() {
    let server = Server::start(manifest).await;
    let (address, repository) = (server.address(), repository(&server, "a"));
    let (tls, authority) = certificate();
    let client = Client::new(ClientOptions {
        ca_files: vec![authority.path()],
        ..found_out()
    })
    .unwrap();
    client.manifest(&repository, &tag("1")).await.unwrap();
    server.stop().await;
    client.manifest(&repository, &tag("1")).await.unwrap_err();
    let _back = Server::listen(address, Some(tls), manifest).await;
    let works_again = async {
        while client.manifest(&repository, &tag("1")).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), works_again)
        .await
        .unwrap();
    assert_eq!(client.health()[0].scheme, "https");
}

#[tokio::test]
async fn a_redirect_from_tls_to_plain_http_is_refused_outside_of_loopback() {
    let (tls, authority) = certificate();
    let (bytes, digest) = super::blob(100);
    let server = Server::start_tls(tls, |_| {
        Reply::new(307).header("Location", "http://192.0.2.1/x?sig=1")
    })
    .await;
    let client = Client::new(ClientOptions {
        ca_files: vec![authority.path()],
        ..found_out()
    })
    .unwrap();
    let got = client
        .blob_bytes(&repository(&server, "a"), &digest, 0..10, bytes.len() as u64)
        .await;
    assert!(matches!(got, Err(Error::Denied { .. })), "{got:?}");
}

#[tokio::test]
async fn a_ca_file_that_is_none_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [file.path().to_owned(), "/nonexistent/ca.pem".into()] {
        let error = Client::new(ClientOptions {
            ca_files: vec![path.clone()],
            ..quick()
        })
        .unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}
