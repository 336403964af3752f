//! Pushing: nothing is sent twice that need not be, what breaks off goes on, and nobody but the registry gets it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use registryfs::digest::Digest;
use registryfs::error::{Error, Result};
use registryfs::registry::reference::{Repository, Target};
use registryfs::registry::{
    BlobUpload, Client, ClientOptions, HostOptions, MirrorOptions, OCI_MANIFEST, Pushed, Secret,
};

use super::server::{Reply, Request, Server};
use super::{blob, client, quick, repository, tag};

/// A registry that takes uploads: how the uploads stand, and what it has.
#[derive(Default)]
struct Store {
    /// Bytes of the uploads by number, none of one that is done or given up.
    uploads: Mutex<Vec<Option<Vec<u8>>>>,
    blobs: Mutex<Vec<Vec<u8>>>,
}

impl Store {
    /// What a registry by the book answers.
    fn answer(&self, request: &Request) -> Reply {
        let path = request.path();
        let mut uploads = self.uploads.lock();
        if let Some(number) = path
            .strip_prefix("/v2/a/blobs/uploads/")
            .filter(|rest| !rest.is_empty())
        {
            let number: usize = number.parse().unwrap();
            return self.upload(request, &mut uploads[number], number);
        }
        match request.method.as_str() {
            "POST" => {
                uploads.push(Some(Vec::new()));
                Self::progress(202, uploads.len() - 1, 0)
            }
            "HEAD" => {
                let has = |blob: &Vec<u8>| path.ends_with(&Digest::of(blob).to_string());
                Reply::new(if self.blobs.lock().iter().any(has) {
                    200
                } else {
                    404
                })
            }
            _ => Reply::new(405),
        }
    }

    fn upload(&self, request: &Request, upload: &mut Option<Vec<u8>>, number: usize) -> Reply {
        let Some(bytes) = upload else {
            return Reply::error(404, "BLOB_UPLOAD_UNKNOWN");
        };
        match request.method.as_str() {
            "GET" => return Self::progress(204, number, bytes.len()),
            "DELETE" => {
                *upload = None;
                return Reply::new(204);
            }
            _ => {}
        }
        if let Some(range) = request.header("content-range") {
            let (first, last) = range.split_once('-').unwrap();
            let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
            if first != bytes.len() {
                return Self::progress(416, number, bytes.len());
            }
            assert!(request.is_cut || request.bytes.len() == last + 1 - first);
        }
        bytes.extend_from_slice(&request.bytes);
        if request.method == "PATCH" {
            return Self::progress(202, number, bytes.len());
        }
        if request.is_cut {
            return Reply::new(500);
        }
        let bytes = upload.take().unwrap();
        match request.query("digest") == [Digest::of(&bytes).to_string()] {
            true => {
                self.blobs.lock().push(bytes);
                Reply::new(201)
            }
            false => Reply::error(400, "DIGEST_INVALID"),
        }
    }

    fn progress(status: u16, number: usize, bytes: usize) -> Reply {
        Reply::new(status)
            .header(
                "Location",
                format!("/v2/a/blobs/uploads/{number}?state=s%3D{number}"),
            )
            .header("Range", format!("0-{}", bytes.saturating_sub(1)))
    }
}

pub(super) fn upload(bytes: &[u8]) -> BlobUpload {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    BlobUpload {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
        file: Arc::new(file),
        mount_from: None,
        sent_bytes: Arc::default(),
    }
}

/// Pushes a blob of so many bytes to a server by the book, whose answers `change` may make worse and whose connections
/// `cut` may close. Checks that the server has the blob if the push says so.
async fn pushed(
    bytes: usize,
    cut: impl Fn(&Request) -> Option<usize> + Send + Sync + 'static,
    change: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
) -> (Server, Result<Pushed>) {
    let store = Arc::new(Store::default());
    let behind = Arc::clone(&store);
    let server = Server::start_cutting(cut, move |request| change(request, behind.answer(request))).await;
    let (bytes, _) = blob(bytes);
    let result = client()
        .push_blob(&repository(&server, "a"), &upload(&bytes))
        .await;
    let has = store.blobs.lock().contains(&bytes);
    assert_eq!(has, result.is_ok(), "{result:?}");
    (server, result)
}

#[tokio::test]
async fn a_blob_goes_in_one_piece() {
    for size in [0, 1, 5_000_000] {
        let (server, result) = pushed(size, |_| None, |_, reply| reply).await;
        assert_eq!(result.unwrap(), Pushed::Sent);
        let requests = server.requests();
        let methods: Vec<&str> = requests.iter().map(|request| request.method.as_str()).collect();
        assert_eq!(methods, ["HEAD", "POST", "PUT"], "{size}");
        assert_eq!(requests[1].header("content-length"), Some("0"));
        assert_eq!(
            requests[2].header("content-length"),
            Some(size.to_string().as_str())
        );
        assert_eq!(requests[2].header("content-range"), None);
        assert!(
            requests[2].target.contains("?state=s%3D0&digest="),
            "{}",
            requests[2].target
        );
    }
}

#[tokio::test]
async fn what_is_there_is_not_sent() {
    let server = Server::start(|_| Reply::new(200)).await;
    let (bytes, _) = blob(100);
    let pushed = client()
        .push_blob(&repository(&server, "a"), &upload(&bytes))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Present);
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn a_blob_of_another_repository_is_mounted_or_else_sent() {
    for (status, expected) in [
        (201, Pushed::Mounted),
        (202, Pushed::Sent),
        (403, Pushed::Sent),
        (400, Pushed::Sent),
    ] {
        let store = Store::default();
        let server = Server::start(
            move |request| match request.query("mount").is_empty() || status == 202 {
                true => store.answer(request),
                false => Reply::new(status),
            },
        )
        .await;
        let (bytes, digest) = blob(100);
        let mut upload = upload(&bytes);
        upload.mount_from = Some(repository(&server, "team/b"));
        let pushed = client().push_blob(&repository(&server, "a"), &upload).await;
        assert_eq!(pushed.unwrap(), expected, "{status}");
        let post = &server.requests()[1];
        assert_eq!(post.query("mount"), [digest.to_string()]);
        assert_eq!(post.query("from"), ["team/b"]);
    }
    // A blob of another registry cannot be mounted, and is not asked for.
    let store = Store::default();
    let server = Server::start(move |request| store.answer(request)).await;
    let mut upload = upload(&blob(10).0);
    upload.mount_from = Some(Repository::new("h.example", "b").unwrap());
    client()
        .push_blob(&repository(&server, "a"), &upload)
        .await
        .unwrap();
    assert!(
        server
            .requests()
            .iter()
            .all(|request| request.query("mount").is_empty())
    );
}

#[tokio::test]
async fn an_upload_that_breaks_off_goes_on_where_it_was() {
    let cuts = AtomicUsize::new(0);
    let cut = move |request: &Request| {
        let sends = matches!(request.method.as_str(), "PUT" | "PATCH");
        (sends && cuts.fetch_add(1, Ordering::SeqCst) < 2).then_some(1_500_000)
    };
    let (server, result) = pushed(5_000_000, cut, |_, reply| reply).await;
    assert_eq!(result.unwrap(), Pushed::Sent);
    let lines: Vec<String> = server
        .requests()
        .iter()
        .map(|request| {
            format!(
                "{} {}",
                request.method,
                request.header("content-range").unwrap_or("-")
            )
        })
        .collect();
    let expected = [
        "HEAD -",
        "POST -",
        "PUT -",
        "GET -",
        "PATCH 1500000-4999999",
        "GET -",
        "PATCH 3000000-4999999",
        "PUT -",
    ];
    assert_eq!(lines, expected);
}

#[tokio::test]
async fn a_registry_that_cannot_tell_gets_the_blob_from_its_start() {
    for status in [404, 400, 405, 204] {
        let cuts = AtomicUsize::new(0);
        let cut = move |request: &Request| {
            (request.method == "PUT" && cuts.fetch_add(1, Ordering::SeqCst) == 0).then_some(1000)
        };
        let change = move |request: &Request, reply: Reply| match request.method.as_str() {
            "GET" => Reply::new(status),
            _ => reply,
        };
        let (server, result) = pushed(100_000, cut, change).await;
        assert_eq!(result.unwrap(), Pushed::Sent, "{status}");
        let bytes: Vec<usize> = server
            .requests()
            .iter()
            .filter(|request| request.method == "PUT")
            .map(|request| request.bytes.len())
            .collect();
        assert_eq!(bytes, [1000, 100_000], "{status}");
    }
}

#[tokio::test]
async fn a_blob_that_arrived_without_an_answer_is_not_sent_again() {
    let answers = AtomicUsize::new(0);
    let change = move |request: &Request, reply: Reply| match request.method == "PUT"
        && answers.fetch_add(1, Ordering::SeqCst) == 0
    {
        true => Reply::new(504),
        false => reply,
    };
    let (server, result) = pushed(100_000, |_| None, change).await;
    assert_eq!(result.unwrap(), Pushed::Sent);
    let puts = server
        .requests()
        .iter()
        .filter(|request| request.method == "PUT")
        .count();
    assert_eq!(puts, 1, "{:?}", server.lines());
}

#[tokio::test]
async fn a_proxy_with_a_limit_gets_smaller_pieces() {
    let change = |request: &Request, reply: Reply| match request.bytes.len() > 1 << 20 {
        true => Reply::new(413),
        false => reply,
    };
    let store = Arc::new(Store::default());
    let behind = Arc::clone(&store);
    let server = Server::start(move |request| {
        // What does not get through does not arrive.
        match request.bytes.len() > 1 << 20 {
            true => Reply::new(413),
            false => change(request, behind.answer(request)),
        }
    })
    .await;
    let (bytes, _) = blob(5_000_000);
    let pushed = client()
        .push_blob(&repository(&server, "a"), &upload(&bytes))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Sent);
    assert_eq!(*store.blobs.lock(), [bytes]);
    let open = store.uploads.lock().iter().flatten().count();
    assert_eq!(open, 0, "what is given up is told");

    let none = Server::start(|request| match request.method.as_str() {
        "POST" => Store::progress(202, 0, 0),
        "HEAD" => Reply::new(404),
        _ => Reply::new(413),
    })
    .await;
    let error = client()
        .push_blob(&repository(&none, "a"), &upload(&blob(5_000_000).0))
        .await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { why, .. } if why.contains("limit")),
        "{error}"
    );
}

#[tokio::test]
async fn pieces_are_as_long_as_the_registry_wants_them() {
    let store = Store::default();
    let server = Server::start(
        move |request| match (request.method.as_str(), request.bytes.len()) {
            ("POST", _) => store.answer(request).header("OCI-Chunk-Min-Length", "2000000"),
            (_, 3_000_000..) => Reply::new(413),
            _ => store.answer(request),
        },
    )
    .await;
    let pushed = client()
        .push_blob(&repository(&server, "a"), &upload(&blob(5_000_000).0))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Sent);
    let pieces: Vec<usize> = server
        .requests()
        .iter()
        .filter(|request| request.method == "PATCH")
        .map(|request| request.bytes.len())
        .collect();
    assert_eq!(pieces, [2_000_000, 2_000_000, 1_000_000]);
}

#[tokio::test]
async fn locations_of_every_kind_are_followed_and_only_our_host_gets_our_right() {
    let other = Server::start(|request| match request.method.as_str() {
        "PUT" => Reply::new(201),
        _ => Reply::new(404),
    })
    .await;
    let elsewhere = format!("http://{}/up?sig=1", other.host());
    let locations = ["up", "/up", "?x", elsewhere.as_str()];
    for location in locations {
        let place = location.to_owned();
        let server =
            Server::start(
                move |request| match (request.method.as_str(), request.header("authorization")) {
                    (_, None) => Reply::new(401).header("WWW-Authenticate", "Basic realm=\"r\""),
                    ("HEAD", _) => Reply::new(404),
                    ("POST", _) => Reply::new(202).header("Location", &place),
                    _ => Reply::new(201),
                },
            )
            .await;
        let options = ClientOptions {
            credential: Some(Secret::new("user:hunter2")),
            ..quick()
        };
        let client = Client::new(options).unwrap();
        let pushed = client
            .push_blob(&repository(&server, "a"), &upload(b"blob"))
            .await;
        assert_eq!(pushed.unwrap(), Pushed::Sent, "{location}");
        let put = |server: &Server| {
            server
                .requests()
                .into_iter()
                .find(|request| request.method == "PUT")
        };
        match location == elsewhere {
            true => assert!(put(&server).is_none()),
            false => {
                let put = put(&server).unwrap();
                let expected = match location {
                    "up" => "/v2/a/blobs/uploads/up",
                    "/up" => "/up",
                    _ => "/v2/a/blobs/uploads/",
                };
                assert_eq!(put.path(), expected);
            }
        }
    }
    let put = &other.requests()[0];
    assert_eq!((put.header("authorization"), put.body.as_str()), (None, "blob"));
    assert_eq!(put.query("sig"), ["1"]);

    let server = Server::start(|request| match request.method.as_str() {
        "POST" => Reply::new(202).header("Location", "http://169.254.169.254/up"),
        _ => Reply::new(404),
    })
    .await;
    let error = client()
        .push_blob(&repository(&server, "a"), &upload(b"blob"))
        .await;
    assert!(matches!(error.unwrap_err(), Error::Denied { .. }));
}

#[tokio::test]
async fn a_right_that_ends_midway_is_renewed_and_the_bytes_sent_again() {
    let tokens = AtomicUsize::new(0);
    let store = Store::default();
    let server = Server::start(move |request| {
        if request.path() == "/token" {
            let number = tokens.fetch_add(1, Ordering::SeqCst);
            return Reply::new(200).body(format!(r#"{{"token":"t{number}"}}"#));
        }
        let host = request.header("host").unwrap();
        let wanted = match request.method.as_str() {
            "PUT" => "Bearer t1",
            _ => "Bearer t0",
        };
        match request.header("authorization") == Some(wanted) {
            true => store.answer(request),
            false => Reply::new(401).header(
                "WWW-Authenticate",
                format!(r#"Bearer realm="http://{host}/token",service="s",scope="repository:a:pull,push""#),
            ),
        }
    })
    .await;
    let (bytes, _) = blob(300_000);
    let pushed = client()
        .push_blob(&repository(&server, "a"), &upload(&bytes))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Sent);
    let requests = server.requests();
    let token = requests
        .iter()
        .find(|request| request.path() == "/token")
        .unwrap();
    assert_eq!(token.query("scope"), ["repository:a:pull,push"]);
}

#[tokio::test]
async fn without_the_right_to_push_nothing_is_sent() {
    for (status, code) in [(401, "UNAUTHORIZED"), (403, "DENIED")] {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => Reply::new(404),
            _ => Reply::error(status, code),
        })
        .await;
        let repository = repository(&server, "a");
        let error = client()
            .push_blob(&repository, &upload(b"blob"))
            .await
            .unwrap_err();
        assert_eq!(error.exit_code(), 3, "{error}");
        assert!(error.to_string().contains(code), "{error}");
        assert_eq!(server.count("/uploads/"), 1);
        let manifest = "{}".into();
        let pushed = client()
            .push_manifest(&repository, &tag("1"), OCI_MANIFEST, &manifest)
            .await;
        assert_eq!(pushed.unwrap_err().exit_code(), 3);
    }
}

#[tokio::test]
async fn a_registry_that_stored_something_else_is_not_believed() {
    let wrong = Digest::of(b"other").to_string();
    let server = Server::start(move |request| match request.method.as_str() {
        "HEAD" => Reply::new(404),
        "POST" => Store::progress(202, 0, 0),
        _ => Reply::new(201).header("Docker-Content-Digest", &wrong),
    })
    .await;
    let repository = repository(&server, "a");
    let error = client()
        .push_blob(&repository, &upload(b"blob"))
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 7, "{error}");
    let manifest = "{}".into();
    let pushed = client()
        .push_manifest(&repository, &tag("1"), OCI_MANIFEST, &manifest)
        .await;
    assert_eq!(pushed.unwrap_err().exit_code(), 7);
}

#[tokio::test]
async fn a_registry_that_lies_about_what_has_arrived_is_refused() {
    for range in ["0-99999999", "0-18446744073709551614"] {
        let cut = |request: &Request| (request.method == "PUT").then_some(1000);
        let (_, result) = pushed(100_000, cut, move |request, reply| {
            match request.method.as_str() {
                "GET" => Reply::new(204).header("Range", range),
                _ => reply,
            }
        })
        .await;
        assert_eq!(result.unwrap_err().exit_code(), 7, "{range}");
    }
}

#[tokio::test]
async fn uploads_that_always_break_off_end() {
    let cut = |request: &Request| (request.method == "PUT").then_some(10);
    let (_, result) = pushed(100_000, cut, |request, reply| match request.method.as_str() {
        "GET" => Reply::new(404),
        _ => reply,
    })
    .await;
    assert_eq!(result.unwrap_err().exit_code(), 5);
}

#[tokio::test]
async fn a_manifest_goes_under_a_tag_or_its_digest_with_its_type_and_is_tried_again() {
    let failures = AtomicUsize::new(0);
    let server = Server::start(move |_| match failures.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(503),
        _ => Reply::new(201),
    })
    .await;
    let repository = repository(&server, "team/a");
    let manifest = bytes::Bytes::from_static(b"{\"a\":1}");
    let digest = Digest::of(&manifest);
    let client = client();
    for target in [tag("1.0"), Target::Digest(digest)] {
        client
            .push_manifest(&repository, &target, OCI_MANIFEST, &manifest)
            .await
            .unwrap();
    }
    let requests = server.requests();
    assert_eq!(
        server.lines(),
        [
            "PUT /v2/team/a/manifests/1.0".to_owned(),
            "PUT /v2/team/a/manifests/1.0".to_owned(),
            format!("PUT /v2/team/a/manifests/{digest}"),
        ]
    );
    for request in requests {
        assert_eq!(request.header("content-type"), Some(OCI_MANIFEST));
        assert_eq!(request.body, "{\"a\":1}");
    }
}

#[tokio::test]
async fn a_mirror_is_never_pushed_to() {
    let mirror = Server::start(|_| Reply::new(200)).await;
    let store = Store::default();
    let server = Server::start(move |request| store.answer(request)).await;
    let mirrors = vec![MirrorOptions {
        url: format!("http://{}", mirror.host()),
        ..MirrorOptions::default()
    }];
    let own = HostOptions {
        mirrors: Some(mirrors),
        plain_http: true,
        ..HostOptions::default()
    };
    let mut options = quick();
    options.hosts.insert(server.host(), own);
    let client = Client::new(options).unwrap();
    let pushed = client
        .push_blob(&repository(&server, "a"), &upload(b"blob"))
        .await;
    assert_eq!(pushed.unwrap(), Pushed::Sent);
    assert_eq!(mirror.requests().len(), 0);
}
