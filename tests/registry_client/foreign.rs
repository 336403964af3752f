//! Layers that are somewhere else: the URLs of a descriptor, asked after the registry and without anything that is meant for
//! it.

use std::collections::BTreeMap;

use registryfs::digest::Digest;
use registryfs::error::Error;
use registryfs::layer::Descriptor;
use registryfs::registry::{Client, ClientOptions, HostOptions, HostPatterns, Secret};

use super::certificates::{Authority, acceptor};
use super::server::{Reply, Request, Server, Then};
use super::{blob, client, quick, repository};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

fn absent(_: &Request) -> Reply {
    Reply::error(404, "BLOB_UNKNOWN")
}

fn descriptor(media_type: &str, bytes: &[u8], urls: &[String]) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        annotations: BTreeMap::new(),
        urls: urls.to_vec(),
    }
}

/// A URL at `server`, signed as those of a cloud are.
fn url(server: &Server) -> String {
    format!("http://{}/far/away?sig=S3CRET", server.host())
}

async fn blobs(bytes: &[u8]) -> Server {
    let bytes = bytes.to_vec();
    Server::start(move |request| Reply::blob(request, &bytes)).await
}

#[tokio::test]
async fn what_the_registry_lacks_is_asked_of_the_url_without_credentials() {
    let (bytes, _) = blob(1000);
    let (registry, other) = (Server::start(absent).await, blobs(&bytes).await);
    let options = ClientOptions {
        credential: Some(Secret::new("user:pass")),
        ..quick()
    };
    let client = Client::new(options).unwrap();
    let layer = descriptor(LAYER, &bytes, &[url(&other)]);
    for start in [0, 300, 600] {
        let range = start..start + 100;
        let read = client
            .layer_bytes(&repository(&registry, "a"), &layer, range)
            .await;
        assert_eq!(read.unwrap().0, bytes[start as usize..start as usize + 100]);
    }
    let asked = other.requests();
    assert_eq!(asked.len(), 3);
    for request in &asked {
        assert_eq!(request.target, "/far/away?sig=S3CRET");
        assert_eq!(request.header("authorization"), None);
    }
    assert_eq!(registry.requests().len(), 1, "what it lacks is remembered");
    // Other blobs of the registry are asked of it.
    let (more, _) = blob(10);
    let more = descriptor(LAYER, &more, &[]);
    let read = client
        .layer_bytes(&repository(&registry, "a"), &more, 0..10)
        .await;
    assert!(matches!(read, Err(Error::NotFound { .. })));
    assert_eq!(registry.requests().len(), 2);
}

#[tokio::test]
async fn a_registry_that_has_the_layer_is_enough() {
    let (bytes, _) = blob(1000);
    let (registry, other) = (blobs(&bytes).await, blobs(&bytes).await);
    let layer = descriptor(FOREIGN, &bytes, &[url(&other)]);
    let read = client()
        .layer_bytes(&repository(&registry, "a"), &layer, 10..20)
        .await;
    assert_eq!(read.unwrap().0, bytes[10..20]);
    assert!(other.requests().is_empty());
}

#[tokio::test]
async fn a_registry_that_is_broken_does_not_lead_elsewhere() {
    let (bytes, _) = blob(1000);
    for (status, media_type, leads) in [
        (503, FOREIGN, false),
        (403, LAYER, false),
        (403, FOREIGN, true),
        (405, FOREIGN, true),
    ] {
        let registry = Server::start(move |_| Reply::new(status)).await;
        let other = blobs(&bytes).await;
        let layer = descriptor(media_type, &bytes, &[url(&other)]);
        let read = client()
            .layer_bytes(&repository(&registry, "a"), &layer, 10..20)
            .await;
        assert_eq!(read.is_ok(), leads, "{status}");
        assert_eq!(!other.requests().is_empty(), leads, "{status}");
    }
}

#[tokio::test]
async fn urls_are_asked_in_order_and_a_body_goes_on_at_the_next() {
    let (bytes, _) = blob(300_000);
    let registry = Server::start(absent).await;
    let gone = Server::start(|_| Reply::new(410)).await;
    let cut = bytes.clone();
    let cut = Server::start(move |request| Reply::blob(request, &cut).broken(100_000, Then::Close)).await;
    let good = blobs(&bytes).await;
    let urls = [&gone, &cut, &good].map(url);
    let layer = descriptor(LAYER, &bytes, &urls);
    let read = client()
        .layer_bytes(&repository(&registry, "a"), &layer, 0..300_000)
        .await;
    assert!(read.unwrap().0 == bytes);
    assert_eq!(good.requests()[0].range().map(|(first, _)| first), Some(100_000));
}

#[tokio::test]
async fn a_redirect_of_a_url_is_followed_once_for_all_ranges() {
    let (bytes, _) = blob(1000);
    let registry = Server::start(absent).await;
    let store = blobs(&bytes).await;
    let to = format!("http://{}/store?Expires=99999999999", store.host());
    let other = Server::start(move |_| Reply::new(307).header("Location", to.clone())).await;
    let layer = descriptor(LAYER, &bytes, &[url(&other)]);
    let client = client();
    for start in [0, 500] {
        let read = client
            .layer_bytes(&repository(&registry, "a"), &layer, start..start + 10)
            .await;
        assert_eq!(read.unwrap().0, bytes[start as usize..start as usize + 10]);
    }
    assert_eq!((other.requests().len(), store.requests().len()), (1, 2));
}

#[tokio::test]
async fn a_redirect_does_not_lead_where_no_manifest_may() {
    let (bytes, _) = blob(1000);
    let registry = Server::start(absent).await;
    let internal = blobs(&bytes).await;
    let to = url(&internal);
    let other = Server::start(move |_| Reply::new(307).header("Location", to.clone())).await;
    let layer = descriptor(LAYER, &bytes, &[url(&other)]);
    let options = ClientOptions {
        deny: HostPatterns::new(&[internal.host()]),
        ..quick()
    };
    let read = Client::new(options).unwrap();
    let read = read.layer_bytes(&repository(&registry, "a"), &layer, 0..10).await;
    let error = read.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert!(!error.to_string().contains("S3CRET"), "{error}");
    assert!(internal.requests().is_empty());
}

#[tokio::test]
async fn our_certificate_is_not_for_whom_a_manifest_names() {
    let authority = Authority::new();
    let (bytes, _) = blob(1000);
    let registry = Server::start(absent).await;
    let tls = acceptor(&authority, "127.0.0.1", Some(&authority));
    let body = bytes.clone();
    let internal = Server::start_tls(tls, move |request| Reply::blob(request, &body)).await;
    let (certificate, key) = authority.pems("me.example");
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("me.pem");
    std::fs::write(&ours, format!("{key}{certificate}")).unwrap();
    let host = HostOptions {
        client_cert: Some(ours),
        ..HostOptions::default()
    };
    let client = Client::new(ClientOptions {
        ca_files: vec![authority.path()],
        hosts: [(internal.host(), host)].into(),
        ..quick()
    })
    .unwrap();
    let there = format!("https://{}/blob", internal.host());
    let layer = descriptor(LAYER, &bytes, &[there]);
    let read = client
        .layer_bytes(&repository(&registry, "a"), &layer, 0..10)
        .await;
    read.unwrap_err();
    assert!(
        internal.requests().is_empty(),
        "it gives nothing without a certificate"
    );
}

#[tokio::test]
async fn what_went_wrong_is_told_without_the_url() {
    let (bytes, _) = blob(1000);
    let registry = Server::start(absent).await;
    let wants = Server::start(|_| Reply::new(401).header("WWW-Authenticate", "Basic realm=\"x\"")).await;
    let gone = Server::start(|_| Reply::new(404)).await;
    let read = |urls: Vec<String>, options: ClientOptions| {
        let layer = descriptor(FOREIGN, &bytes, &urls);
        let repository = repository(&registry, "a");
        async move {
            let client = Client::new(options).unwrap();
            client.layer_bytes(&repository, &layer, 0..10).await.unwrap_err()
        }
    };
    let credential = || ClientOptions {
        credential: Some(Secret::new("user:pass")),
        ..quick()
    };
    let denied = read(vec![url(&wants)], credential()).await;
    assert!(matches!(denied, Error::Denied { .. }), "{denied}");
    assert_eq!(wants.requests()[0].header("authorization"), None);
    let absent = read(vec![url(&gone)], quick()).await;
    assert!(matches!(absent, Error::NotFound { .. }), "{absent}");
    let kept_out = ClientOptions {
        deny: HostPatterns::new(&[gone.host()]),
        ..quick()
    };
    let before = gone.requests().len();
    let refused = read(vec![url(&gone)], kept_out).await;
    assert_eq!(gone.requests().len(), before);
    let unusable = read(vec!["file:///etc/passwd".to_owned()], quick()).await;
    for (error, names) in [
        (&denied, wants.host()),
        (&absent, gone.host()),
        (&absent, registry.host()),
        (&refused, "allow and deny".to_owned()),
        (&refused, registry.host()),
        (&unusable, "neither http nor https".to_owned()),
    ] {
        let text = error.to_string();
        assert!(text.contains(&names), "{text}");
        assert!(!text.contains("S3CRET") && !text.contains("passwd"), "{text}");
    }
}
