//! Passwords, tokens and the signatures of URLs are in no log, no error and no debug print.

use std::io::Write;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use registryfs::registry::{Client, ClientOptions, Secret};

use super::server::{Reply, Server, Then};
use super::{blob, quick, repository, tag};

const PASSWORD: &str = "hunter2-password";
const TOKEN: &str = "eyJ-secret-token";
const SIGNATURE: &str = "0123abcd-signature";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Everything that goes wrong with secrets in it, and right; the errors and debug prints of it.
async fn operations() -> String {
    let mut seen = String::new();
    let (bytes, digest) = blob(1000);
    let total = bytes.len() as u64;
    let store = Server::start(move |request| match request.path() {
        "/good" => Reply::blob(request, &bytes),
        "/cut" => Reply::blob(request, &bytes).broken(0, Then::Close),
        _ => Reply::new(403).body(format!(
            r#"{{"errors":[{{"code":"DENIED","message":"no http://x/{}?sig={SIGNATURE}"}}]}}"#,
            request.path()
        )),
    })
    .await;
    let to = store.host();
    let server = Server::start(move |request| {
        let host = request.header("host").unwrap();
        let name = request.path().split('/').nth(2).unwrap_or_default();
        let sent = request.header("authorization");
        match request.path() {
            "/token" => return Reply::new(200).body(format!(r#"{{"token":"{TOKEN}"}}"#)),
            "/broken-token" => {
                return Reply::new(200).body(format!(r#"{{"token":"{TOKEN}\u0000{PASSWORD}"}}"#));
            }
            _ => {}
        }
        match (name, sent) {
            ("basic", _) => Reply::error(401, "UNAUTHORIZED").header("WWW-Authenticate", "Basic realm=\"r\""),
            ("broken", _) => Reply::new(401).header(
                "WWW-Authenticate",
                format!(r#"Bearer realm="http://{host}/broken-token?k={SIGNATURE}""#),
            ),
            (_, None) => Reply::new(401).header(
                "WWW-Authenticate",
                format!(r#"Bearer realm="http://user:{PASSWORD}@{host}/token?k={SIGNATURE}""#),
            ),
            ("dead", _) => {
                Reply::new(307).header("Location", format!("http://127.0.0.1:1/x?sig={SIGNATURE}"))
            }
            _ => Reply::new(307).header("Location", format!("http://{to}/{name}?sig={SIGNATURE}")),
        }
    })
    .await;
    for credential in [format!("me:{PASSWORD}"), format!("<token>:{PASSWORD}")] {
        let options = ClientOptions {
            credential: Some(Secret::new(credential)),
            retries: 1,
            ..quick()
        };
        seen.push_str(&format!("{options:?}\n"));
        let client = Client::new(options).unwrap();
        for name in ["good", "good", "cut", "forbidden", "dead", "broken", "basic"] {
            let repository = repository(&server, name);
            let read = client.blob_bytes(&repository, &digest, 0..10, total).await;
            let manifest = client.manifest(&repository, &tag("1")).await;
            seen.push_str(&format!("{read:?} {manifest:?}\n"));
            if let Err(error) = read {
                seen.push_str(&format!("{error}\n"));
            }
            let body = client.blob(&repository, &digest, 0..10, total).await;
            seen.push_str(&format!("{body:?} {client:?} {:?}\n", client.health()));
        }
    }
    seen
}

#[test]
fn no_secret_is_ever_shown() {
    let log = Log::default();
    let writer = log.clone();
    // For the whole process: one for this thread alone would miss what other tests' threads came to first.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let seen = runtime.block_on(operations());
    let log = String::from_utf8(log.0.lock().clone()).unwrap();
    assert!(
        log.contains("/v2/good/blobs/sha256:") && log.contains("206"),
        "{log}"
    );
    assert!(seen.contains("Denied") && seen.contains("Network"), "{seen}");
    let pair = STANDARD.encode(format!("me:{PASSWORD}"));
    for secret in [PASSWORD, TOKEN, SIGNATURE, &pair] {
        for (name, text) in [("log", &log), ("errors and debug prints", &seen)] {
            let line = text.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{secret} in {name}");
        }
    }
}
