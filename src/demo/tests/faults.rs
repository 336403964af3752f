//! What goes wrong when it is told to, and what the ledger says of it.

use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::super::*;
use super::{Reply, connect, converse, get, get_range, with_blob};
use crate::digest::Digest;

#[test]
fn bodies_end_where_a_fault_says() {
    let (registry, blob, path) = with_blob(Behaviour::default());
    let (host, handle) = (registry.host(), registry.handle());
    handle.inject(Scope::exact(&path).next(1), Fault::Cut(100_000));
    let cut = get(&host, &path);
    assert!(cut.body == blob[..100_000]);
    assert_eq!(cut.header("content-length"), Some("800000"));
    assert_eq!(handle.ledger()[0].body_bytes, 100_000);
    assert!(get(&host, &path).body == blob);

    handle.inject(Scope::all().next(1), Fault::Cut(0));
    let cut = get(&host, &path);
    assert_eq!((cut.status, cut.body.len()), (200, 0));

    handle.inject(Scope::containing("/blobs/").next(1), Fault::FlipByte(5));
    let flipped = get_range(&host, &path, "bytes=8-17").body;
    let wrong: Vec<_> = (0..10).filter(|&i| flipped[i] != blob[8 + i]).collect();
    assert_eq!(wrong, [5]);

    handle.inject(Scope::all().next(1), Fault::Reset);
    let reset = get(&host, &path);
    assert_eq!((reset.status, reset.error), (0, Some(ErrorKind::ConnectionReset)));
    assert_eq!(handle.ledger().last().unwrap().status, 0);
}

#[test]
fn a_stalled_body_goes_on_after_its_pause_or_ends_with_the_registry() {
    let (registry, blob, path) = with_blob(Behaviour::default());
    let (host, handle) = (registry.host(), registry.handle());
    let pause = Duration::from_millis(30);
    let stall = |pause| Fault::Stall {
        after_bytes: 70_000,
        pause,
    };
    handle.inject(Scope::all().next(1), stall(Some(pause)));
    let begun = Instant::now();
    assert!(get(&host, &path).body == blob);
    assert!(begun.elapsed() >= pause);

    handle.inject(Scope::all().next(1), stall(None));
    let reader = std::thread::spawn(move || get(&host, &path));
    while handle
        .ledger()
        .last()
        .is_none_or(|record| record.body_bytes != 70_000)
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    handle.stop();
    assert!(reader.join().unwrap().body == blob[..70_000]);
}

#[test]
fn told_statuses_and_headers_are_sent() {
    let (registry, blob, path) = with_blob(Behaviour::default());
    let (host, handle) = (registry.host(), registry.handle());
    for status in [401, 403, 404, 416, 429, 500, 503] {
        let retry_after = Some(RetryAfter::Seconds(7));
        handle.inject(Scope::all().next(1), Fault::Status { status, retry_after });
        let reply = get(&host, &path);
        assert_eq!((reply.status, reply.header("retry-after")), (status, Some("7")));
        assert!(!reply.error_code().is_empty());
    }
    let dated = Fault::Status {
        status: 429,
        retry_after: Some(RetryAfter::DateIn(60)),
    };
    handle.inject(Scope::all().next(1), dated);
    assert!(get(&host, &path).header("retry-after").unwrap().ends_with(" GMT"));
    handle.update(|behaviour| behaviour.auth = Auth::Basic(Account::new("u", "p")));
    let refusal = Fault::Status {
        status: 401,
        retry_after: None,
    };
    handle.inject(Scope::all().next(1), refusal);
    assert!(get(&host, &path).header("www-authenticate").is_some());
    handle.update(|behaviour| behaviour.auth = Auth::None);
    handle.inject(Scope::all().next(1), Fault::WrongDigestHeader);
    handle.inject(Scope::all().next(1), Fault::ContentType("text/html".to_owned()));
    let reply = get(&host, &path);
    assert_eq!(
        (reply.status, reply.header("content-type")),
        (200, Some("text/html"))
    );
    let digest = Digest::of(&blob).to_string();
    assert_ne!(reply.header("docker-content-digest"), Some(digest.as_str()));
}

#[test]
fn a_stopped_registry_refuses_and_comes_back_on_its_port() {
    let (registry, blob, path) = with_blob(Behaviour::default());
    let (host, handle) = (registry.host(), registry.handle().clone());
    for _ in 0..3 {
        assert!(get(&host, &path).body == blob);
        handle.stop();
        let refused = TcpStream::connect(&host).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        handle.restart().unwrap();
    }
    assert!(get(&host, &path).body == blob);
    drop(registry);
    assert!(TcpStream::connect(&host).is_err());
}

#[test]
fn a_taken_port_is_refused() {
    let (registry, _, _) = with_blob(Behaviour::default());
    let another = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = [registry.host().parse().unwrap(), another.local_addr().unwrap()];
    for address in taken {
        let listen = Listen { address, tls: None };
        let error = DemoRegistry::start_on(&listen, Content::new(), Behaviour::default()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&address.to_string()) && text.contains("port is taken"),
            "{text}"
        );
    }
}

#[test]
fn rates_and_latency_take_their_time() {
    let (registry, _, path) = with_blob(Behaviour {
        latency: Duration::from_millis(40),
        total_bytes_per_s: 1_000_000,
        ..Behaviour::default()
    });
    let host = registry.host();
    let begun = Instant::now();
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (host, path) = (host.clone(), path.clone());
            std::thread::spawn(move || get_range(&host, &path, "bytes=0-99999").body.len())
        })
        .collect();
    let bytes: usize = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
    assert_eq!(bytes, 200_000);
    // Only the lower bound is a promise: 200,000 bytes at 1 MB/s, after the latency.
    assert!(begun.elapsed() >= Duration::from_millis(240));
}

#[test]
fn the_ledger_tells_parallel_requests_from_sequential_ones() {
    let (registry, _, path) = with_blob(Behaviour::default());
    let (host, handle) = (registry.host(), registry.handle());
    for range in ["bytes=0-9", "bytes=10-19", "bytes=20-29"] {
        get_range(&host, &path, range);
    }
    assert_eq!(handle.requests_in_sequence(), 3);
    let records = handle.ledger();
    assert_eq!(records[2].range.as_deref(), Some("bytes=20-29"));
    let expected = Traffic {
        requests: 3,
        body_bytes: 30,
    };
    assert_eq!(traffic_by_path(&records)[&path], expected);
    handle.clear_ledger();
    assert!(handle.ledger().is_empty());
}

#[test]
fn the_same_faults_happen_behind_tls() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificate = made.cert.der().clone();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let client = Arc::new(client);

    let blob = Bytes::from(vec![7; 300_000]);
    let mut content = Content::new();
    let digest = content.put_blob("a", blob.clone());
    let listen = Listen {
        tls: Some(Arc::new(server)),
        ..Listen::default()
    };
    let behaviour = Behaviour {
        auth: Auth::Token(TokenAuth::new(Account::new("u", "p"))),
        ..Behaviour::default()
    };
    let registry = DemoRegistry::start_on(&listen, content, behaviour).unwrap();
    let host = registry.host();
    let get = || {
        let name = "localhost".try_into().unwrap();
        let session = rustls::ClientConnection::new(Arc::clone(&client), name).unwrap();
        let stream = rustls::StreamOwned::new(session, connect(&host));
        converse(stream, &host, &format!("GET /v2/a/blobs/{digest}"), &[], b"")
    };
    let challenge = get().header("www-authenticate").unwrap().to_owned();
    assert!(
        challenge.starts_with(&format!("Bearer realm=\"https://{host}/token\"")),
        "{challenge}"
    );
    registry.handle().update(|behaviour| behaviour.auth = Auth::None);
    assert!(get().body == blob);
    registry
        .handle()
        .inject(Scope::all().next(1), Fault::Cut(150_000));
    assert!(get().body == blob[..150_000]);
}

#[test]
fn the_failure_rate_reaches_the_wire() {
    let (registry, blob, path) = with_blob(Behaviour {
        failure_rate: 0.5,
        seed: 3,
        ..Behaviour::default()
    });
    let host = registry.host();
    let outcome = |reply: &Reply| match (reply.status, reply.body.len()) {
        (200, bytes) if bytes == blob.len() => "whole",
        (200, bytes) if bytes == blob.len() / 2 => "cut",
        (503, _) => "503",
        (0, 0) => "reset",
        other => panic!("{other:?}"),
    };
    let mut seen: Vec<_> = (0..40).map(|_| outcome(&get(&host, &path))).collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen, ["503", "cut", "reset", "whole"]);
}
