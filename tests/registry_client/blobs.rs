//! Ranges: exactly the bytes that were asked for, or an error, over servers that lie, break off and redirect.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use registryfs::error::{Error, Result};
use registryfs::registry::{Client, ClientOptions, Timing};

use super::server::{Reply, Request, Server, Then};
use super::{blob, client, quick, repository};

/// A registry with one blob of 1000 bytes, whose answers `change` may make worse; what comes for bytes 100 to 300.
async fn asked(
    change: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
) -> (Server, Result<Vec<u8>>) {
    let (bytes, digest) = blob(1000);
    let server = Server::start(move |request| change(request, Reply::blob(request, &bytes))).await;
    let repository = repository(&server, "a");
    let result = client().blob_bytes(&repository, &digest, 100..300, 1000).await;
    (server, result.map(|bytes| bytes.to_vec()))
}

fn expected() -> Vec<u8> {
    blob(1000).0[100..300].to_vec()
}

#[tokio::test]
async fn a_range_is_one_request_for_exactly_it() {
    let (server, result) = asked(|_, reply| reply).await;
    assert_eq!(result.unwrap(), expected());
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].header("range"), Some("bytes=100-299"));
    assert_eq!(requests[0].header("accept-encoding"), Some("identity"));
}

#[tokio::test]
async fn an_empty_range_asks_nothing_and_one_beyond_the_end_is_refused() {
    let (bytes, digest) = blob(10);
    let server = Server::start(move |request| Reply::blob(request, &bytes)).await;
    let repository = repository(&server, "a");
    let client = client();
    assert!(
        client
            .blob_bytes(&repository, &digest, 5..5, 10)
            .await
            .unwrap()
            .is_empty()
    );
    let error = client
        .blob_bytes(&repository, &digest, 5..11, 10)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    assert_eq!(server.requests().len(), 0);
}

#[tokio::test]
async fn an_answer_that_lies_about_its_range_is_malformed_and_not_asked_again() {
    type Lie = fn(Reply) -> Reply;
    let lies: [(&str, Lie); 8] = [
        ("another start", |reply| {
            ranged(reply, Some("bytes 101-300/1000"), 200)
        }),
        ("a shorter range", |reply| {
            ranged(reply, Some("bytes 100-298/1000"), 199)
        }),
        ("another length of the blob", |reply| {
            ranged(reply, Some("bytes 100-299/1001"), 200)
        }),
        ("no range", |reply| ranged(reply, None, 200)),
        ("nonsense", |reply| ranged(reply, Some("bytes x-y/z"), 200)),
        ("a body of another length", |reply| {
            ranged(reply, Some("bytes 100-299/1000"), 150)
        }),
        ("several ranges", |reply| {
            ranged(reply, None, 200).header("Content-Type", "multipart/byteranges; boundary=x")
        }),
        ("an encoding", |reply| reply.header("Content-Encoding", "gzip")),
    ];
    for (name, lie) in lies {
        let (server, result) = asked(move |_, reply| lie(reply)).await;
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{name}: {error}");
        assert_eq!(error.exit_code(), 7, "{name}");
        assert_eq!(server.requests().len(), 1, "{name}");
    }
}

fn ranged(mut reply: Reply, content_range: Option<&str>, bytes: usize) -> Reply {
    reply.headers.retain(|(name, _)| name != "Content-Range");
    reply.body.resize(bytes, 0);
    match content_range {
        Some(text) => reply.header("Content-Range", text),
        None => reply,
    }
}

#[tokio::test]
async fn more_bytes_than_said_are_refused() {
    for excess in [1, 100_000] {
        let (_, result) = asked(move |_, mut reply| {
            reply.body.resize(200 + excess, b'!');
            reply.chunked()
        })
        .await;
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{excess}: {error}");
    }
    let (_, result) = asked(|_, reply| reply.chunked()).await;
    assert_eq!(result.unwrap(), expected());
}

#[tokio::test]
async fn a_whole_blob_instead_of_a_range_is_cut_to_it_near_its_start() {
    let (server, result) = asked(|_, _| Reply::new(200).body(blob(1000).0)).await;
    assert_eq!(result.unwrap(), expected());
    assert_eq!(server.requests().len(), 1);

    let (bytes, digest) = blob(9 << 20);
    let total = bytes.len() as u64;
    let server = Server::start(move |_| Reply::new(200).body(bytes.clone())).await;
    let error = client()
        .blob_bytes(&repository(&server, "a"), &digest, total - 10..total, total)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[tokio::test]
async fn a_blob_of_another_size_than_its_descriptor_says_is_malformed() {
    for status in [200, 416] {
        let (_, result) = asked(move |_, _| Reply::new(status).body(blob(999).0)).await;
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }), "{status}: {error}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_is_resumed_where_it_broke() {
    let (server, result) = asked(|_, reply| match reply.body.len() {
        0..=50 => reply,
        _ => reply.broken(50, Then::Close),
    })
    .await;
    assert_eq!(result.unwrap(), expected());
    let ranges: Vec<_> = server
        .requests()
        .iter()
        .map(|request| request.range().unwrap())
        .collect();
    assert_eq!(ranges, [(100, 299), (150, 299), (200, 299), (250, 299)]);
}

#[tokio::test]
async fn a_body_that_always_breaks_off_at_once_ends_after_the_retries() {
    let (server, result) = asked(|_, reply| reply.broken(0, Then::Close)).await;
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert_eq!(server.requests().len(), 6, "one request and five retries");
}

#[tokio::test]
async fn a_body_that_stops_is_asked_for_again_and_ends_with_the_deadline() {
    let (bytes, digest) = blob(1000);
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |request| {
        let reply = Reply::blob(request, &bytes);
        match asked.fetch_add(1, Ordering::SeqCst) {
            0 => reply.broken(20, Then::Stop),
            _ => reply,
        }
    })
    .await;
    let mut options = quick();
    options.timing.stall = Duration::from_millis(50);
    let client = Client::new(options.clone()).unwrap();
    let got = client
        .blob_bytes(&repository(&server, "a"), &digest, 100..300, 1000)
        .await;
    assert_eq!(got.unwrap(), expected());
    assert_eq!(server.requests()[1].range(), Some((120, 299)));

    let (bytes, digest) = blob(1000);
    let server = Server::start(move |request| Reply::blob(request, &bytes).broken(0, Then::Stop)).await;
    options.timeout = Duration::from_millis(120);
    let client = Client::new(options).unwrap();
    let got = client
        .blob_bytes(&repository(&server, "a"), &digest, 100..300, 1000)
        .await;
    assert!(matches!(got, Err(Error::Timeout { .. })), "{got:?}");
}

#[tokio::test]
async fn a_stream_that_only_drips_ends() {
    let (bytes, digest) = blob(5 << 20);
    let total = bytes.len() as u64;
    let server = Server::start(move |request| Reply::blob(request, &bytes).broken(0, Then::Drip)).await;
    let options = ClientOptions {
        timing: Timing {
            stall: Duration::from_millis(200),
            bytes_per_second_min: 100_000,
            ..quick().timing
        },
        ..quick()
    };
    let client = Client::new(options).unwrap();
    let mut body = client
        .blob(&repository(&server, "a"), &digest, 0..total, total)
        .await
        .unwrap();
    let error = loop {
        match body.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("five million bytes cannot have come one by one"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_large_blob_streams_and_counts() {
    let (bytes, digest) = blob(5 << 20);
    let total = bytes.len() as u64;
    let server = Server::start(move |request| Reply::blob(request, &bytes)).await;
    let client = client();
    let mut body = client
        .blob(&repository(&server, "a"), &digest, 0..total, total)
        .await
        .unwrap();
    let mut hasher = registryfs::digest::Hasher::default();
    while let Some(piece) = body.next().await.unwrap() {
        hasher.update(&piece);
    }
    assert_eq!(hasher.finish(), digest);
    assert_eq!(
        server.requests()[0].header("range"),
        None,
        "a whole blob needs no range"
    );
    assert_eq!(client.health()[0].bytes, total);
}

#[tokio::test]
async fn streams_leave_room_for_small_reads() {
    let (bytes, digest) = blob(5 << 20);
    let total = bytes.len() as u64;
    let server = Server::start(move |request| Reply::blob(request, &bytes)).await;
    let repository = repository(&server, "a");
    let client = Client::new(ClientOptions {
        concurrency: 2,
        timeout: Duration::from_secs(2),
        ..quick()
    })
    .unwrap();
    let stream = client.blob(&repository, &digest, 0..total, total).await.unwrap();
    let second = client.blob(&repository, &digest, 0..total, total).await;
    assert!(matches!(second, Err(Error::Timeout { .. })), "{second:?}");
    client
        .blob_bytes(&repository, &digest, 0..10, total)
        .await
        .unwrap();
    drop(stream);
    client.blob(&repository, &digest, 0..total, total).await.unwrap();
}

/// A registry that redirects to `store`.
async fn redirecting(store: &Server) -> Server {
    let to = format!("http://{}/data?X-Amz-Signature=s", store.host());
    Server::start(move |_| Reply::new(307).header("Location", to.clone())).await
}

#[tokio::test]
async fn a_redirect_is_asked_for_once_and_again_when_its_url_is_no_longer_good() {
    for gone in [400, 401, 403, 404, 410] {
        let (bytes, digest) = blob(1000);
        let served = AtomicUsize::new(0);
        let store = Server::start(move |request| match served.fetch_add(1, Ordering::SeqCst) {
            3 => Reply::new(gone),
            _ => Reply::blob(request, &bytes),
        })
        .await;
        let server = redirecting(&store).await;
        let repository = repository(&server, "a");
        let client = client();
        for start in [0, 100, 200] {
            let got = client
                .blob_bytes(&repository, &digest, start..start + 100, 1000)
                .await;
            assert_eq!(got.unwrap().len(), 100);
        }
        assert_eq!((server.requests().len(), store.requests().len()), (1, 3));
        let got = client.blob_bytes(&repository, &digest, 100..300, 1000).await;
        assert_eq!(got.unwrap(), expected(), "{gone}");
        assert_eq!(
            (server.requests().len(), store.requests().len()),
            (2, 5),
            "{gone}"
        );
    }
}

#[tokio::test]
async fn a_store_that_refuses_everyone_is_resolved_once_more_only() {
    let open = std::sync::Arc::new(AtomicUsize::new(1));
    let (bytes, digest) = blob(1000);
    let inner = std::sync::Arc::clone(&open);
    let store = Server::start(move |request| match inner.load(Ordering::SeqCst) {
        1 => Reply::blob(request, &bytes),
        _ => Reply::new(403),
    })
    .await;
    let server = redirecting(&store).await;
    let repository = repository(&server, "a");
    let client = client();
    client
        .blob_bytes(&repository, &digest, 0..10, 1000)
        .await
        .unwrap();
    open.store(0, Ordering::SeqCst);
    let error = client
        .blob_bytes(&repository, &digest, 0..10, 1000)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert_eq!((server.requests().len(), store.requests().len()), (2, 3));
}

#[tokio::test]
async fn redirects_end_and_do_not_lead_to_a_metadata_service() {
    let (_, digest) = blob(1000);
    for (location, expected) in [
        ("/again", "more than 5 redirects"),
        ("http://169.254.169.254/", "metadata"),
        ("", "without a valid URL"),
    ] {
        let server = Server::start(move |_| {
            let reply = Reply::new(302);
            match location {
                "" => reply,
                location => reply.header("Location", location),
            }
        })
        .await;
        let got = client()
            .blob_bytes(&repository(&server, "a"), &digest, 0..10, 1000)
            .await;
        let error = got.unwrap_err().to_string();
        assert!(error.contains(expected), "{location}: {error}");
        assert!(server.requests().len() <= 6);
    }
}

#[tokio::test]
async fn a_small_blob_is_verified() {
    let (bytes, digest) = blob(1000);
    let good = bytes.clone();
    let server = Server::start(move |request| Reply::blob(request, &good)).await;
    let got = client()
        .small_blob(&repository(&server, "a"), &digest, 1000)
        .await;
    assert_eq!(got.unwrap(), bytes);

    let server = Server::start(move |_| Reply::new(200).body(vec![0; 1000])).await;
    let got = client()
        .small_blob(&repository(&server, "a"), &digest, 1000)
        .await;
    assert!(matches!(got, Err(Error::Verification { .. })), "{got:?}");

    let got = client()
        .small_blob(&repository(&server, "a"), &digest, 9 << 20)
        .await;
    assert!(matches!(got, Err(Error::Malformed { .. })), "{got:?}");
}

#[tokio::test]
async fn dropping_a_read_ends_its_request() {
    let (bytes, digest) = blob(1000);
    let server = Server::start(move |request| Reply::blob(request, &bytes).broken(10, Then::Stop)).await;
    let repository = repository(&server, "a");
    let client = client();
    let read = client.blob_bytes(&repository, &digest, 100..300, 1000);
    let given_up = tokio::select! {
        _ = read => false,
        () = seen(&server) => true,
    };
    assert!(given_up);
    let closed = async {
        while server.abandoned() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), closed)
        .await
        .unwrap();
}

async fn seen(server: &Server) {
    while server.requests().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn offline_sends_nothing() {
    let server = Server::start(|_| Reply::new(200)).await;
    let client = Client::new(ClientOptions {
        offline: true,
        ..quick()
    })
    .unwrap();
    let repository = repository(&server, "a");
    let (_, digest) = blob(1);
    let errors = [
        client
            .blob_bytes(&repository, &digest, 0..1, 1)
            .await
            .unwrap_err(),
        client.tag_digest(&repository, "1").await.unwrap_err(),
        client.tags(&repository).next_page().await.unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, Error::Offline { .. }), "{error}");
    }
    assert_eq!(server.requests().len(), 0);
}

/// Beyond so many bytes a whole blob is not read to get at a range of it.
const FAR: u64 = (8 << 20) + 1;

/// What comes of bytes far into a blob from a server that sends the whole blob instead of the answers for which
/// `whole` holds, by their number.
async fn far_into(
    whole: impl Fn(usize) -> bool + Send + Sync + 'static,
    options: ClientOptions,
) -> (Server, Vec<Result<Vec<u8>>>) {
    let (bytes, digest) = blob((9 << 20) + 7);
    let asked = AtomicUsize::new(0);
    let length = bytes.len() as u64;
    let server = Server::start(move |request| match whole(asked.fetch_add(1, Ordering::SeqCst)) {
        true => Reply::new(200).body(bytes.clone()),
        false => Reply::blob(request, &bytes),
    })
    .await;
    let client = Client::new(options).unwrap();
    let mut results = Vec::new();
    for range in [FAR..FAR + 10, FAR + 10..FAR + 30] {
        let result = client
            .blob_bytes(&repository(&server, "a"), &digest, range, length)
            .await;
        results.push(result.map(|bytes| bytes.to_vec()));
    }
    (server, results)
}

#[tokio::test]
async fn a_cache_that_is_still_filling_itself_is_asked_again_for_a_far_range() {
    let bytes = blob((9 << 20) + 7).0;
    let far = usize::try_from(FAR).unwrap();
    let (server, results) = far_into(|n| n < 2, quick()).await;
    assert_eq!(results[0].as_ref().unwrap(), &bytes[far..far + 10]);
    assert_eq!(results[1].as_ref().unwrap(), &bytes[far + 10..far + 30]);
    assert_eq!(server.requests().len(), 4);

    // What is waited for is time, and not a number of tries.
    let patient = ClientOptions {
        retries: 1,
        ..quick()
    };
    let (server, results) = far_into(|n| (1..9).contains(&n), patient).await;
    assert_eq!(results[1].as_ref().unwrap(), &bytes[far + 10..far + 30]);
    assert_eq!(server.requests().len(), 10);
}

#[tokio::test]
async fn a_server_that_gives_no_ranges_is_told_as_such() {
    let soon = ClientOptions {
        timing: Timing {
            stall: Duration::from_secs(1),
            backoff_max: Duration::from_millis(200),
            ..quick().timing
        },
        ..quick()
    };
    let (_server, results) = far_into(|_| true, soon).await;
    for result in results {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{text}");
        assert!(
            text.contains("does not honour ranges") && text.contains(" tries"),
            "{text}"
        );
    }
    let once = ClientOptions {
        retries: 0,
        ..quick()
    };
    let (server, results) = far_into(|_| true, once).await;
    assert!(results.iter().all(Result::is_err));
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn a_cache_that_never_gets_filled_is_not_waited_for_for_ever() {
    let short = ClientOptions {
        timeout: Duration::from_secs(2),
        ..quick()
    };
    let (_server, results) = far_into(|n| n > 0, short).await;
    assert!(results[0].is_ok(), "{results:?}");
    let error = results[1].as_ref().unwrap_err();
    assert!(
        matches!(error, Error::Unsupported { .. } | Error::Timeout { .. }),
        "{error}"
    );
}
