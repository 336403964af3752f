//! Registries that are busy, down, and back again.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use registryfs::error::Error;
use registryfs::registry::{Client, ClientOptions, HostOptions, MirrorOptions, Timing};

use super::server::{Reply, Request, Server, Then};
use super::{blob, client, quick, repository, tag};

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

/// A registry whose first `n` answers are `first`.
async fn after(n: usize, first: impl Fn() -> Reply + Send + Sync + 'static) -> Server {
    let asked = AtomicUsize::new(0);
    Server::start(move |_| match asked.fetch_add(1, Ordering::SeqCst) < n {
        true => first(),
        false => Reply::new(200).body(MANIFEST),
    })
    .await
}

#[tokio::test]
async fn what_may_pass_is_asked_again() {
    for status in [408, 429, 500, 502, 503, 504] {
        let server = after(3, move || Reply::new(status)).await;
        let client = client();
        let got = client.manifest(&repository(&server, "a"), &tag("1")).await;
        assert!(got.is_ok(), "{status}: {got:?}");
        assert_eq!(client.health()[0].retries, 3, "{status}");
    }
    let server = after(3, || Reply::new(200).broken(0, Then::Close).body("x")).await;
    let got = client().manifest(&repository(&server, "a"), &tag("1")).await;
    assert!(got.is_ok(), "{got:?}");
}

#[tokio::test]
async fn retries_end_with_the_servers_words() {
    let server = after(usize::MAX, || Reply::error(500, "INTERNAL")).await;
    let error = client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("500") && text.contains("INTERNAL: said the test") && text.contains("6 tries"),
        "{text}"
    );
    assert_eq!(server.requests().len(), 6);
}

#[tokio::test]
async fn retry_after_is_waited_for() {
    let server = after(1, || Reply::new(429).header("Retry-After", "1")).await;
    let began = Instant::now();
    client()
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn a_quota_that_is_used_up_is_named_and_not_hammered() {
    let server = after(usize::MAX, || Reply::new(429).header("Retry-After", "3600")).await;
    let client = client();
    let repository = repository(&server, "a");
    for _ in 0..5 {
        let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
        assert!(matches!(error, Error::Network { .. }), "{error}");
        assert!(error.to_string().contains("Retry-After: 3600 s"), "{error}");
    }
    assert_eq!(server.requests().len(), 1);
    assert!(client.health()[0].held_for_ms.is_some());
}

#[tokio::test]
async fn a_server_without_an_answer_is_a_timeout() {
    let server = after(usize::MAX, || Reply::new(200).broken(0, Then::Stop).body("x")).await;
    let client = Client::new(ClientOptions {
        timeout: Duration::from_millis(100),
        ..quick()
    })
    .unwrap();
    let error = client
        .manifest(&repository(&server, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert_eq!(error.exit_code(), 6);
}

#[tokio::test]
async fn a_dead_registry_fails_at_once_from_the_second_time_on_and_works_when_it_is_back() {
    let server = after(0, || Reply::new(500)).await;
    let (address, repository) = (server.address(), repository(&server, "a"));
    let client = client();
    client.manifest(&repository, &tag("1")).await.unwrap();
    server.stop().await;

    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert!(error.to_string().contains("cannot connect"), "{error}");
    let sent = client.health()[0].requests.manifests;
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(error.to_string().contains("has been down for"), "{error}");
    let health = client.health().remove(0);
    assert_eq!(health.requests.manifests, sent, "nothing but probes is sent");
    assert!(health.down_for_ms.is_some() && health.last_error.is_some());

    let back = Server::listen(address, None, |_| Reply::new(200).body(MANIFEST)).await;
    let works_again = async {
        while client.manifest(&repository, &tag("1")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), works_again)
        .await
        .unwrap();
    assert_eq!(back.count("/manifests/"), 1, "the first read after the probe");
    assert_eq!(client.health()[0].down_for_ms, None);
}

#[tokio::test]
async fn the_first_read_after_a_long_outage_succeeds() {
    let server = after(0, || Reply::new(500)).await;
    let (address, repository) = (server.address(), repository(&server, "a"));
    let client = Client::new(ClientOptions {
        timing: Timing {
            probe_interval: Duration::from_secs(30),
            probe_wait: Duration::from_secs(30),
            ..quick().timing
        },
        ..quick()
    })
    .unwrap();
    server.stop().await;
    client.manifest(&repository, &tag("1")).await.unwrap_err();
    let _back = Server::listen(address, None, |_| Reply::new(200).body(MANIFEST)).await;
    client.manifest(&repository, &tag("1")).await.unwrap();
}

#[tokio::test]
async fn answers_of_any_kind_keep_a_host_up() {
    let server = after(usize::MAX, || Reply::error(404, "NAME_UNKNOWN")).await;
    let client = client();
    let repository = repository(&server, "a");
    for _ in 0..20 {
        let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    }
    assert_eq!(server.requests().len(), 20);
    assert_eq!(client.health()[0].down_for_ms, None);
}

#[tokio::test]
async fn no_more_requests_run_at_once_than_allowed() {
    let running = std::sync::Arc::new(AtomicUsize::new(0));
    let most = std::sync::Arc::new(AtomicUsize::new(0));
    let (now, peak) = (std::sync::Arc::clone(&running), std::sync::Arc::clone(&most));
    let server = Server::start(move |_| {
        let count = now.fetch_add(1, Ordering::SeqCst) + 1;
        peak.fetch_max(count, Ordering::SeqCst);
        std::thread::yield_now();
        now.fetch_sub(1, Ordering::SeqCst);
        Reply::new(200).body(MANIFEST)
    })
    .await;
    let client = Client::new(ClientOptions {
        concurrency: 2,
        ..quick()
    })
    .unwrap();
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let (client, repository) = (client.clone(), repository(&server, "a"));
        reads.spawn(async move { client.manifest(&repository, &tag("1")).await });
    }
    while let Some(done) = reads.join_next().await {
        done.unwrap().unwrap();
    }
    assert!(server.connections() <= 2, "{} connections", server.connections());
    assert!(most.load(Ordering::SeqCst) <= 2);
}

#[tokio::test]
async fn one_failure_on_behalf_of_a_mirror_does_not_take_a_blob_store_from_the_server() {
    let (bytes, digest) = blob(1000);
    let asked = AtomicBool::new(false);
    let store = Server::start(move |request| {
        let is_first = request.range().is_some() && !asked.swap(true, Ordering::SeqCst);
        match is_first || request.range().is_none() {
            true => Reply::new(503),
            false => Reply::blob(request, &bytes),
        }
    })
    .await;
    let target = format!("http://{}/blob", store.host());
    let redirect = move |_: &Request| Reply::new(307).header("Location", target.clone());
    let (upstream, mirror) = (
        Server::start(redirect.clone()).await,
        Server::start(redirect).await,
    );
    let only = MirrorOptions {
        url: format!("http://{}", mirror.host()),
        ..MirrorOptions::default()
    };
    let mirrored = HostOptions {
        mirrors: Some(vec![only]),
        ..HostOptions::default()
    };
    let client = Client::new(ClientOptions {
        hosts: [(upstream.host(), mirrored)].into(),
        ..quick()
    })
    .unwrap();
    let repository = repository(&upstream, "a");
    let got = client.blob_bytes(&repository, &digest, 100..200, 1000).await;
    assert_eq!(got.unwrap().len(), 100);
    assert_eq!((mirror.requests().len(), upstream.requests().len()), (1, 1));
}
