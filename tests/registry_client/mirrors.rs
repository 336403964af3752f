//! Mirrors: who is asked in which order and what he is told, and that one which is down, slow, empty or lying costs a
//! wait at most, never the read.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use registryfs::digest::Digest;
use registryfs::error::Error;
use registryfs::registry::reference::{Repository, Target};
use registryfs::registry::{
    Client, ClientOptions, CredentialEnvironment, HostHealth, HostOptions, MirrorOptions, Secret, Timing,
};

use super::server::{Reply, Request, Server, Then};
use super::{blob, quick, repository, tag};

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

fn manifest(_: &Request) -> Reply {
    Reply::new(200).body(MANIFEST)
}

/// A `certs.d` with a `hosts.toml` for one registry.
struct Certs(tempfile::TempDir);

impl Certs {
    fn new(registry: &Server, hosts_toml: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join(registry.host().replace(':', "_") + "_");
        std::fs::create_dir(&host).unwrap();
        std::fs::write(host.join("hosts.toml"), hosts_toml).unwrap();
        Self(dir)
    }

    /// With these servers as mirrors, in this order.
    fn mirrors(registry: &Server, mirrors: &[&Server]) -> Self {
        let table = |mirror: &&Server| format!("[host.\"http://{}\"]\n", mirror.host());
        Self::new(registry, &mirrors.iter().map(table).collect::<String>())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn options(&self) -> ClientOptions {
        ClientOptions {
            certs_dirs: vec![self.path().to_owned()],
            ..quick()
        }
    }

    fn client(&self) -> Client {
        Client::new(self.options()).unwrap()
    }
}

fn health_of(client: &Client, server: &Server) -> HostHealth {
    let mut all = client.health().into_iter();
    all.find(|health| health.host == server.host()).unwrap()
}

/// A server that answers every blob with `bytes`.
async fn blobs(bytes: &[u8]) -> Server {
    let bytes = bytes.to_vec();
    Server::start(move |request| Reply::blob(request, &bytes)).await
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_told_whom_it_stands_for() {
    let (upstream, mirror) = (Server::start(manifest).await, Server::start(manifest).await);
    let certs = Certs::new(
        &upstream,
        &format!(
            "[host.\"http://{}/us\"]\n[host.\"http://{0}/us\".header]\nx-key = \"k\"",
            mirror.host()
        ),
    );
    let client = certs.client();
    let repository = repository(&upstream, "a/b");
    client.manifest(&repository, &tag("1")).await.unwrap();
    assert_eq!(upstream.connections(), 0);
    let [request] = &mirror.requests()[..] else {
        panic!("{:?}", mirror.lines())
    };
    assert_eq!(request.path(), "/us/v2/a/b/manifests/1");
    assert_eq!(request.query("ns"), [upstream.host()]);
    assert_eq!(request.header("x-key"), Some("k"));
    let health = health_of(&client, &mirror);
    assert_eq!(health.mirror_for, Some(upstream.host()));
    assert_eq!(
        client.health().len(),
        2,
        "the server is shown before it is needed"
    );
}

#[tokio::test]
async fn mirrors_are_tried_in_order_and_the_registry_itself_is_not_told_its_name() {
    let upstream = Server::start(manifest).await;
    let first = Server::start(|_| Reply::error(404, "MANIFEST_UNKNOWN")).await;
    let second = Server::start(|_| Reply::new(500)).await;
    let certs = Certs::mirrors(&upstream, &[&first, &second]);
    let got = certs
        .client()
        .manifest(&repository(&upstream, "a"), &tag("1"))
        .await;
    assert_eq!(got.unwrap().bytes, MANIFEST);
    assert_eq!(
        (first.requests().len(), second.requests().len()),
        (1, 1),
        "a mirror is not asked twice"
    );
    assert!(upstream.requests()[0].query("ns").is_empty());
}

#[tokio::test]
async fn our_own_settings_win_over_the_file() {
    let (upstream, of_file, own) = (
        Server::start(manifest).await,
        Server::start(manifest).await,
        Server::start(manifest).await,
    );
    let certs = Certs::mirrors(&upstream, &[&of_file]);
    let with = |mirrors: Vec<MirrorOptions>| ClientOptions {
        hosts: [(
            upstream.host(),
            HostOptions {
                mirrors: Some(mirrors),
                ..HostOptions::default()
            },
        )]
        .into(),
        ..certs.options()
    };
    let mirror = MirrorOptions {
        url: format!("http://{}/api", own.host()),
        override_path: true,
        ..MirrorOptions::default()
    };
    for mirrors in [vec![mirror], Vec::new()] {
        let client = Client::new(with(mirrors)).unwrap();
        client
            .manifest(&repository(&upstream, "a"), &tag("1"))
            .await
            .unwrap();
    }
    assert_eq!(own.lines(), ["GET /api/a/manifests/1"]);
    assert_eq!((of_file.requests().len(), upstream.requests().len()), (0, 1));
}

#[tokio::test]
async fn a_tag_is_asked_only_of_who_may_resolve_it() {
    let (bytes, digest) = blob(100);
    let (upstream, mirror) = (Server::start(manifest).await, blobs(&bytes).await);
    let certs = Certs::new(
        &upstream,
        &format!("[host.\"http://{}\"]\ncapabilities = [\"pull\"]", mirror.host()),
    );
    let client = certs.client();
    let repository = repository(&upstream, "a");
    client.manifest(&repository, &tag("1")).await.unwrap();
    client.tag_digest(&repository, "1").await.unwrap();
    let _ = client.tags(&repository).next_page().await;
    assert_eq!(mirror.connections(), 0);
    client.blob_bytes(&repository, &digest, 0..10, 100).await.unwrap();
    assert_eq!((mirror.requests().len(), upstream.count("/blobs/")), (1, 0));
    let nobody = Certs::new(&upstream, "capabilities = [\"pull\"]");
    let error = nobody
        .client()
        .manifest(&repository, &tag("1"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[tokio::test]
async fn what_the_server_answers_is_final() {
    let upstream = Server::start(|_| Reply::error(404, "MANIFEST_UNKNOWN")).await;
    let mirror = Server::start(|_| Reply::error(403, "DENIED")).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = certs.client();
    let repository = repository(&upstream, "a");
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert_eq!(client.tag_digest(&repository, "1").await.unwrap(), None);
    assert_eq!(mirror.requests().len(), 2);
    upstream.stop().await;
    let error = client.manifest(&repository, &tag("1")).await.unwrap_err();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    let said = format!("{} (for ", mirror.host());
    assert!(
        error.to_string().contains(&said),
        "what the mirror said may be the remedy: {error}"
    );
}

#[tokio::test]
async fn a_mirror_gets_its_own_credentials_and_no_others() {
    let upstream = Server::start(|request| match request.header("authorization") {
        Some(_) => manifest(request),
        None => Reply::new(401).header("WWW-Authenticate", "Basic realm=\"u\""),
    })
    .await;
    let mirror = Server::start(|_| Reply::new(401).header("WWW-Authenticate", "Basic realm=\"m\"")).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let repository = repository(&upstream, "a");
    let given = ClientOptions {
        credential: Some(Secret::new("up:stream")),
        ..certs.options()
    };
    Client::new(given)
        .unwrap()
        .manifest(&repository, &tag("1"))
        .await
        .unwrap();
    assert!(
        mirror
            .requests()
            .iter()
            .all(|request| request.header("authorization").is_none())
    );

    let encoded = |pair: &str| base64::engine::general_purpose::STANDARD.encode(pair);
    let config = certs.path().join("config.json");
    let auths = format!(
        r#"{{"auths":{{"{}":{{"auth":"{}"}},"{}":{{"auth":"{}"}}}}}}"#,
        upstream.host(),
        encoded("up:stream"),
        mirror.host(),
        encoded("of:mirror"),
    );
    std::fs::write(&config, auths).unwrap();
    let found = ClientOptions {
        credential_environment: CredentialEnvironment {
            docker_config: Some(certs.path().to_owned()),
            ..CredentialEnvironment::default()
        },
        ..certs.options()
    };
    Client::new(found)
        .unwrap()
        .manifest(&repository, &tag("1"))
        .await
        .unwrap();
    let sent = |server: &Server| {
        let requests = server.requests().into_iter();
        let sent: Vec<String> = requests
            .filter_map(|request| request.header("authorization").map(str::to_owned))
            .collect();
        sent.last().cloned()
    };
    assert_eq!(sent(&mirror), Some(format!("Basic {}", encoded("of:mirror"))));
    assert_eq!(sent(&upstream), Some(format!("Basic {}", encoded("up:stream"))));
}

#[tokio::test]
async fn headers_of_an_endpoint_do_not_follow_a_redirect_and_are_not_shown() {
    let (bytes, digest) = blob(1000);
    let store = blobs(&bytes).await;
    let target = format!("http://{}/store", store.host());
    let upstream = Server::start(move |_| Reply::new(307).header("Location", &target)).await;
    let certs = Certs::new(&upstream, "[header]\nx-secret = \"hunter2\"");
    let client = certs.client();
    let repository = repository(&upstream, "a");
    for start in [0, 10] {
        client
            .blob_bytes(&repository, &digest, start..start + 10, 1000)
            .await
            .unwrap();
    }
    assert_eq!(
        upstream.requests().len(),
        1,
        "the URL behind the redirect is asked directly"
    );
    assert_eq!(upstream.requests()[0].header("x-secret"), Some("hunter2"));
    assert!(
        store
            .requests()
            .iter()
            .all(|request| request.header("x-secret").is_none())
    );
    assert!(!format!("{:?}", client.health()).contains("hunter2"));
}

#[tokio::test]
async fn a_mirror_that_is_down_is_left_out_and_used_again_when_it_is_back() {
    let (upstream, mirror) = (Server::start(manifest).await, Server::start(manifest).await);
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = certs.client();
    let repository = repository(&upstream, "a");
    let address = mirror.address();
    mirror.stop().await;
    for _ in 0..3 {
        client.manifest(&repository, &tag("1")).await.unwrap();
    }
    assert_eq!(upstream.requests().len(), 3);
    assert!(client.health().iter().any(|health| health.down_for_ms.is_some()));
    let back = Server::listen(address, None, manifest).await;
    let used_again = async {
        while back.count("/manifests/") == 0 {
            client.manifest(&repository, &tag("1")).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), used_again)
        .await
        .unwrap();
    assert_eq!(health_of(&client, &back).down_for_ms, None);
}

#[tokio::test]
async fn a_mirror_that_hangs_leaves_time_for_the_server_and_is_asked_once() {
    let (bytes, digest) = blob(1000);
    let upstream = blobs(&bytes).await;
    let hang = |request: &Request| Reply::blob(request, &[0; 1000]).broken(0, Then::Stop);
    let (first, second) = (Server::start(hang).await, Server::start(hang).await);
    let certs = Certs::mirrors(&upstream, &[&first, &second]);
    let client = Client::new(ClientOptions {
        timeout: Duration::from_secs(20),
        timing: Timing {
            mirrors: Duration::from_millis(200),
            ..quick().timing
        },
        ..certs.options()
    })
    .unwrap();
    let repository = repository(&upstream, "a");
    let began = Instant::now();
    for start in 0..3 {
        let range = start..start + 10;
        let got = client
            .blob_bytes(&repository, &digest, range.clone(), 1000)
            .await
            .unwrap();
        assert_eq!(got, &bytes[range.start as usize..range.end as usize]);
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!((first.requests().len(), second.requests().len()), (1, 1));
    assert!(health_of(&client, &first).left_out_for_ms.is_some());
    assert_eq!(health_of(&client, &first).lies, 0);
}

#[tokio::test]
async fn a_blob_that_a_mirror_lacks_costs_one_request() {
    let (bytes, digest) = blob(1000);
    let upstream = blobs(&bytes).await;
    let mirror = Server::start(|_| Reply::error(404, "BLOB_UNKNOWN")).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = certs.client();
    for start in 0..5 {
        let range = start..start + 10;
        client
            .blob_bytes(&repository(&upstream, "a"), &digest, range, 1000)
            .await
            .unwrap();
    }
    assert_eq!((mirror.requests().len(), upstream.requests().len()), (1, 5));
    let (_, other) = blob(999);
    let _ = client
        .blob_bytes(&repository(&upstream, "a"), &other, 0..10, 999)
        .await;
    assert_eq!(mirror.requests().len(), 2, "another blob it may have");
}

#[tokio::test]
async fn a_mirror_that_lies_about_a_manifest_is_left_out_for_a_while() {
    let digest = Digest::of(MANIFEST.as_bytes());
    let upstream = Server::start(manifest).await;
    let lying = Arc::new(AtomicBool::new(true));
    let lies = Arc::clone(&lying);
    let mirror = Server::start(move |request| match lies.load(Ordering::SeqCst) {
        true => Reply::new(200).body(MANIFEST.replace("[]", "[ ]")),
        false => manifest(request),
    })
    .await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = Client::new(ClientOptions {
        timing: Timing {
            left_out: Duration::from_millis(300),
            ..quick().timing
        },
        ..certs.options()
    })
    .unwrap();
    let repository = repository(&upstream, "a");
    for _ in 0..2 {
        let got = client
            .manifest(&repository, &Target::Digest(digest))
            .await
            .unwrap();
        assert_eq!(got.digest, digest);
    }
    assert_eq!(mirror.requests().len(), 1);
    let health = health_of(&client, &mirror);
    assert_eq!(health.lies, 1);
    let lie = health.last_lie.unwrap();
    let actual = Digest::of(MANIFEST.replace("[]", "[ ]").as_bytes());
    assert!(
        lie.contains(&digest.to_string()) && lie.contains(&actual.to_string()),
        "{lie}"
    );

    lying.store(false, Ordering::SeqCst);
    let used_again = async {
        while mirror.requests().len() < 2 {
            client
                .manifest(&repository, &Target::Digest(digest))
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), used_again)
        .await
        .unwrap();
}

#[tokio::test]
async fn lies_about_ranges_and_small_blobs_are_made_good_by_the_next() {
    let (bytes, digest) = blob(1000);
    let answers: [fn(&Request, &[u8]) -> Reply; 4] = [
        |_, bytes| {
            Reply::new(206)
                .header("Content-Range", "bytes 1-10/1000")
                .body(&bytes[1..11])
        },
        |_, bytes| Reply::new(200).body(&bytes[..500]),
        |_, _| Reply::new(416),
        |_, _| {
            Reply::new(206)
                .header("Content-Range", "bytes 0-9/7")
                .body(vec![0; 10])
        },
    ];
    for answer in answers {
        let upstream = blobs(&bytes).await;
        let lie = bytes.clone();
        let mirror = Server::start(move |request| answer(request, &lie)).await;
        let certs = Certs::mirrors(&upstream, &[&mirror]);
        let client = certs.client();
        let got = client
            .blob_bytes(&repository(&upstream, "a"), &digest, 0..10, 1000)
            .await;
        assert_eq!(got.unwrap(), &bytes[..10]);
        assert_eq!(health_of(&client, &mirror).lies, 1);
    }
    let upstream = blobs(&bytes).await;
    let mirror = blobs(&vec![7; 1000]).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = certs.client();
    let got = client
        .small_blob(&repository(&upstream, "a"), &digest, 1000)
        .await;
    assert_eq!(got.unwrap(), bytes);
    let lie = health_of(&client, &mirror).last_lie.unwrap();
    assert!(lie.contains(&Digest::of(&[7; 1000]).to_string()), "{lie}");
}

#[tokio::test]
async fn a_body_that_breaks_off_goes_on_at_the_next_endpoint() {
    let (bytes, digest) = blob(1000);
    let upstream = blobs(&bytes).await;
    let cut = bytes.clone();
    let mirror = Server::start(move |request| Reply::blob(request, &cut).broken(400, Then::Close)).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = certs.client();
    let got = client
        .blob_bytes(&repository(&upstream, "a"), &digest, 100..900, 1000)
        .await;
    assert_eq!(got.unwrap(), &bytes[100..900]);
    let ranges = |server: &Server| server.requests().iter().map(Request::range).collect::<Vec<_>>();
    assert_eq!(ranges(&mirror), [Some((100, 899))]);
    assert_eq!(ranges(&upstream), [Some((500, 899))]);
}

#[tokio::test]
async fn a_list_begins_anew_where_its_mirror_fails_and_the_catalog_is_the_servers() {
    let upstream = Server::start(|request| match request.path() {
        "/v2/_catalog" => Reply::new(200).body(r#"{"repositories":["up"]}"#),
        _ => Reply::new(200).body(r#"{"tags":["a","b","c"]}"#),
    })
    .await;
    let mirror = Server::start(|request| match request.query("last").is_empty() {
        true => Reply::new(200)
            .header("Link", "</v2/x/tags/list?last=a>; rel=\"next\"")
            .body(r#"{"tags":["a"]}"#),
        false => Reply::error(500, "UNKNOWN"),
    })
    .await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = certs.client();
    let mut tags = client.tags(&repository(&upstream, "x"));
    let mut names = Vec::new();
    while let Some(page) = tags.next_page().await.unwrap() {
        names.extend(page);
    }
    names.sort();
    names.dedup();
    assert_eq!(names, ["a", "b", "c"]);
    assert!(
        mirror
            .requests()
            .iter()
            .all(|request| request.query("ns") == [upstream.host()])
    );
    let mut catalog = client.catalog(&upstream.host());
    assert_eq!(catalog.next_page().await.unwrap().unwrap(), ["up"]);
    assert_eq!(mirror.count("_catalog"), 0);
}

#[tokio::test]
async fn a_file_that_cannot_be_understood_stops_its_registry_alone() {
    let (upstream, other) = (Server::start(manifest).await, Server::start(manifest).await);
    let certs = Certs::new(&upstream, "[host.\"http://m.example\"]\nca = 7\n");
    let client = certs.client();
    let error = client
        .manifest(&repository(&upstream, "a"), &tag("1"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("hosts.toml:2: "), "{error}");
    assert_eq!(upstream.connections(), 0);
    client
        .manifest(&repository(&other, "a"), &tag("1"))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_server_elsewhere_is_told_whom_it_stands_for() {
    let real = Server::start(manifest).await;
    let certs = tempfile::tempdir().unwrap();
    let host = certs.path().join("_default");
    std::fs::create_dir(&host).unwrap();
    std::fs::write(
        host.join("hosts.toml"),
        format!("server = \"http://{}\"", real.host()),
    )
    .unwrap();
    let client = Client::new(ClientOptions {
        certs_dirs: vec![certs.path().to_owned()],
        ..quick()
    })
    .unwrap();
    let named = Repository::new("docker.io", "library/debian").unwrap();
    client.manifest(&named, &tag("1")).await.unwrap();
    assert_eq!(real.requests()[0].query("ns"), ["docker.io"]);
}

#[tokio::test]
async fn a_mirror_without_ranges_is_passed_over_for_the_blob() {
    let (bytes, digest) = blob((9 << 20) + 7);
    let (length, far) = (bytes.len() as u64, (8 << 20) + 1);
    let upstream = blobs(&bytes).await;
    let mirror = Server::start(move |_| Reply::new(200).body(bytes.clone())).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let (client, repository) = (certs.client(), repository(&upstream, "a"));
    for start in [far, far + 10] {
        let got = client.blob_bytes(&repository, &digest, start..start + 10, length);
        assert_eq!(got.await.unwrap().len(), 10);
    }
    assert_eq!((mirror.requests().len(), upstream.requests().len()), (1, 2));
    let health = health_of(&client, &mirror);
    assert_eq!((health.left_out_for_ms, health.lies), (None, 0));
}

#[tokio::test]
async fn those_who_wait_for_a_mirror_that_stops_midway_do_not_all_try_it() {
    let (bytes, digest) = blob(1000);
    let upstream = blobs(&bytes).await;
    let mirror = Server::start(move |request| Reply::blob(request, &bytes).broken(5, Then::Stop)).await;
    let certs = Certs::mirrors(&upstream, &[&mirror]);
    let client = Client::new(ClientOptions {
        concurrency: 1,
        timing: Timing {
            mirrors: Duration::from_millis(300),
            ..quick().timing
        },
        ..certs.options()
    })
    .unwrap();
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (client, repository) = (client.clone(), repository(&upstream, "a"));
        running.spawn(async move { client.blob_bytes(&repository, &digest, 100..200, 1000).await });
    }
    while let Some(result) = running.join_next().await {
        assert_eq!(result.unwrap().unwrap().len(), 100);
    }
    assert_eq!(mirror.requests().len(), 1, "the others waited for their turn");
    assert_eq!(upstream.requests().len(), 8);
}
