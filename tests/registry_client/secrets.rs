//! Passwords, tokens and the signatures of URLs are in no log, no error and no debug print.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use registryfs::registry::{Client, ClientOptions, CredentialEnvironment, Secret};

use super::server::{Reply, Server, Then};
use super::{blob, docker_config, quick, repository, tag};

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

/// Every way to have credentials for `host`, or to fail to. The password is in all of them.
fn logins(folder: &Path, host: &str) -> Vec<ClientOptions> {
    let auth = STANDARD.encode(format!("me:{PASSWORD}"));
    let script = format!("printf '#!/bin/sh\\necho {PASSWORD}\\n' > \"$1\" && chmod 755 \"$1\"");
    let program = folder.join("docker-credential-leak");
    // Written by another process, because a file that a child of this one still has open cannot be started.
    let mut shell = Command::new("sh");
    let written = shell.args(["-c", &script, "sh"]).arg(program).status();
    assert!(written.unwrap().success());
    let given = [format!("me:{PASSWORD}"), format!("<token>:{PASSWORD}")];
    let given = given.map(|credential| ClientOptions {
        credential: Some(Secret::new(credential)),
        retries: 1,
        ..quick()
    });
    let configs = [
        format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#),
        format!(r#"{{"auths":{{"{host}":{{"registrytoken":"{PASSWORD}"}}}}}}"#),
        format!(r#"{{"auths":{{"{host}":{{"auth":"{PASSWORD}"}}}}}}"#),
        format!(r#"{{"auths":{{"{host}":{PASSWORD}"#),
        r#"{"credsStore":"leak"}"#.to_owned(),
    ];
    let in_file = configs.iter().enumerate().map(|(number, config)| {
        let docker = folder.join(number.to_string());
        std::fs::create_dir(&docker).unwrap();
        std::fs::write(docker.join("config.json"), config).unwrap();
        ClientOptions {
            credential_environment: CredentialEnvironment {
                path: Some(folder.into()),
                ..docker_config(&docker)
            },
            retries: 1,
            ..quick()
        }
    });
    given.into_iter().chain(in_file).collect()
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
            ("denied", _) => Reply::error(403, "DENIED"),
            ("dead", _) => {
                Reply::new(307).header("Location", format!("http://127.0.0.1:1/x?sig={SIGNATURE}"))
            }
            _ => Reply::new(307).header("Location", format!("http://{to}/{name}?sig={SIGNATURE}")),
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    for options in logins(folder.path(), &server.host()) {
        seen.push_str(&format!("{options:?}\n"));
        let client = Client::new(options).unwrap();
        for name in [
            "good",
            "good",
            "cut",
            "forbidden",
            "dead",
            "denied",
            "broken",
            "basic",
        ] {
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
    for part in [
        "Denied",
        "Network",
        "NoCredentials",
        "passed over",
        "has no base64",
    ] {
        assert!(seen.contains(part), "{part}: {seen}");
    }
    let pair = STANDARD.encode(format!("me:{PASSWORD}"));
    for secret in [PASSWORD, TOKEN, SIGNATURE, &pair] {
        for (name, text) in [("log", &log), ("errors and debug prints", &seen)] {
            let line = text.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{secret} in {name}");
        }
    }
}
