//! Which source wins, what its entries mean, and what is remembered.

mod with_helpers;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::places::Kind;
use super::*;
use crate::registry::options::HostOptions;

/// A home directory with whatever a test puts there.
struct Home {
    folder: TempDir,
}

impl Home {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("bin")).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> &Self {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// A credential helper that is a shell script. Another process writes it: a child of another test, forked
    /// meanwhile, would hold a descriptor of this one open for writing, and the kernel starts no program that is
    /// being written.
    fn helper(&self, name: &str, script: &str) -> &Self {
        let write =
            "printf '#!/bin/sh\\necho run >> \"$0.runs\"\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
        let path = self.path(&format!("bin/docker-credential-{name}"));
        let mut shell = Command::new("sh");
        let written = shell
            .args(["-c", write, "sh", script])
            .arg(path)
            .status()
            .unwrap();
        assert!(written.success());
        self
    }

    /// How often the helper was started.
    fn runs(&self, name: &str) -> usize {
        let runs = self.path(&format!("bin/docker-credential-{name}.runs"));
        fs::read_to_string(runs).map_or(0, |runs| runs.lines().count())
    }

    fn environment(&self) -> CredentialEnvironment {
        let path = format!("{}:/usr/bin:/bin", self.path("bin").display());
        CredentialEnvironment {
            registry_auth_file: Some(self.path("auth-file.json")),
            xdg_runtime_dir: Some(self.path("run")),
            home: Some(self.path("")),
            path: Some(path.into()),
            ..CredentialEnvironment::default()
        }
    }

    fn sources(&self) -> Arc<Sources> {
        Sources::new(&Arc::new(ClientOptions {
            credential_environment: self.environment(),
            ..ClientOptions::default()
        }))
    }

    async fn find(&self, host: &str, path: &str) -> Arc<Credentials> {
        self.sources().find(host, path, false).await.unwrap()
    }

    async fn failure(&self, host: &str) -> String {
        self.sources().find(host, "a", false).await.unwrap_err().0
    }
}

const DOCKER: &str = ".docker/config.json";
const PRIMARY: &str = "run/containers/auth.json";

fn auth(user: &str, password: &str) -> serde_json::Value {
    json!({ "auth": STANDARD.encode(format!("{user}:{password}")) })
}

fn auths(entries: &[(&str, &str)]) -> String {
    let entries: BTreeMap<&str, serde_json::Value> = entries
        .iter()
        .map(|&(key, user)| (key, auth(user, "pw")))
        .collect();
    json!({ "auths": entries }).to_string()
}

fn user(found: &Arc<Credentials>) -> &str {
    match &found.identity {
        Identity::Anonymous => "",
        Identity::Password { user, .. } | Identity::Refresh { user, .. } => user,
        Identity::Bearer(_) => "bearer",
    }
}

#[tokio::test]
async fn the_first_source_with_an_entry_wins() {
    let home = Home::new();
    home.write(
        ".dockercfg",
        json!({"https://h.io/v1/": auth("old", "pw")}).to_string(),
    );
    assert_eq!(user(&home.find("h.io", "a").await), "old");
    home.write(DOCKER, auths(&[("h.io", "docker")]));
    assert_eq!(user(&home.find("h.io", "a").await), "docker");
    home.write(".config/containers/auth.json", auths(&[("h.io", "config")]));
    assert_eq!(user(&home.find("h.io", "a").await), "config");
    home.write(PRIMARY, auths(&[("h.io", "primary")]));
    assert_eq!(user(&home.find("h.io", "a").await), "primary");
    home.write("auth-file.json", auths(&[("other.io", "other")]));
    assert_eq!(
        user(&home.find("h.io", "a").await),
        "primary",
        "a file without an entry is none"
    );
    assert_eq!(user(&home.find("other.io", "a").await), "other");
    let found = home.find("h.io", "a").await;
    assert!(
        found.describe().ends_with("run/containers/auth.json, entry h.io"),
        "{}",
        found.describe()
    );
    assert!(!format!("{found:?}").contains("pw\""), "{found:?}");
}

#[tokio::test]
async fn what_the_user_gave_wins_over_every_file() {
    let home = Home::new();
    home.write(DOCKER, auths(&[("h.io", "file"), ("own.io", "file")]));
    let own = HostOptions {
        credential: Some(Secret::new("own:secret2")),
        ..HostOptions::default()
    };
    let options = ClientOptions {
        credential: Some(Secret::new("flag:secret1")),
        hosts: BTreeMap::from([("own.io".to_owned(), own)]),
        credential_environment: home.environment(),
        ..ClientOptions::default()
    };
    let shown = format!("{options:?}");
    let sources = Sources::new(&Arc::new(options));
    let own = sources.find("own.io", "a", false).await.unwrap();
    let flag = sources.find("h.io", "a", false).await.unwrap();
    assert_eq!((user(&own), user(&flag)), ("own", "flag"));
    assert_eq!(
        own.describe(),
        "credentials of --credential (or REGISTRYFS_CREDENTIAL)"
    );
    assert!(!format!("{shown}{own:?}{flag:?}").contains("secret"));
}

#[tokio::test]
async fn docker_writes_keys_in_many_ways() {
    let found = async |file: &str, key: &str, host: &str| {
        let home = Home::new();
        home.write(file, auths(&[(key, "me")]));
        user(&home.find(host, "library/debian").await) == "me"
    };
    for key in [
        "https://index.docker.io/v1/",
        "docker.io",
        "registry-1.docker.io",
        "docker.io/library",
    ] {
        assert!(found(DOCKER, key, "docker.io").await, "{key}");
        assert!(found(PRIMARY, key, "docker.io").await, "{key}");
    }
    for key in [
        "h.io:5000",
        "https://h.io:5000",
        "http://h.io:5000/v2/",
        "H.io:5000",
        "h.io:5000/v1/",
    ] {
        assert!(found(DOCKER, key, "h.io:5000").await, "{key}");
    }
    for key in [
        "h.io",
        "https://h.io:5001",
        "evil.io/h.io:5000",
        "h.io:5000/lib",
        "https://me@h.io:5000",
        "",
    ] {
        assert!(!found(DOCKER, key, "h.io:5000").await, "{key}");
    }
}

#[tokio::test]
async fn the_longest_path_wins() {
    let home = Home::new();
    let keys = ["h.io", "h.io/a", "h.io/a/b", "h.io/a/b/c", "docker.io/a/b"];
    home.write(PRIMARY, auths(&keys.map(|key| (key, key))));
    let sources = home.sources();
    for (path, key) in [
        ("a/b/c", "h.io/a/b/c"),
        ("a/b/d", "h.io/a/b"),
        ("a/bb", "h.io/a"),
        ("ab", "h.io"),
        ("", "h.io"),
    ] {
        let found = sources.find("h.io", path, false).await.unwrap();
        assert_eq!(user(&found), key, "{path}");
    }
}

proptest! {
    /// Against the manual page's own description: the name is cut at its last slash until a key is found.
    #[test]
    fn a_namespace_is_found_as_the_manual_says(
        keys in proptest::collection::btree_set("[ab]{1,2}(/[ab]{1,2}){0,3}", 0..8),
        whole in any::<bool>(),
        path in "[ab]{1,2}(/[ab]{1,2}){0,3}",
    ) {
        let mut entries: BTreeMap<String, serde_json::Value> =
            keys.iter().map(|key| (format!("h.io/{key}"), auth(key, "pw"))).collect();
        if whole {
            entries.insert("h.io".to_owned(), auth("whole", "pw"));
        }
        let mut name = format!("h.io/{path}");
        let expected = loop {
            if entries.contains_key(&name) {
                break Some(name);
            }
            match name.rsplit_once('/') {
                Some((shorter, _)) => name = shorter.to_owned(),
                None => break None,
            }
        };
        let text = json!({ "auths": entries }).to_string();
        let Ok(read) = file::parse(Kind::Containers, text.as_bytes()) else { panic!("it is a good file") };
        let first = read.candidates("h.io", &path).into_iter().next();
        let first = first.map(|candidate| match candidate {
            Candidate::Entry { key, .. } => key,
            other => panic!("{other:?}"),
        });
        prop_assert_eq!(first, expected);
    }

    #[test]
    fn any_file_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "[\\[\\]{}\":,a-z0-9 ]{0,100}") {
        let in_auths = format!(r#"{{"auths":{text}}}"#).into_bytes();
        let in_entry = format!(r#"{{"auths":{{"h.io":{{{text}}}}}}}"#).into_bytes();
        for content in [bytes, in_auths, in_entry] {
            for kind in [Kind::Docker, Kind::OldDocker] {
                if let Ok(entries) = file::parse(kind, &content) {
                    entries.candidates("h.io", "a");
                }
            }
        }
    }
}

#[tokio::test]
async fn tokens_are_told_from_passwords() {
    let found = async |entry: serde_json::Value| {
        let home = Home::new();
        home.write(DOCKER, json!({ "auths": { "h.io": entry } }).to_string());
        home.find("h.io", "a").await.identity.clone()
    };
    let refresh = |user: &str, password: Option<&str>| Identity::Refresh {
        user: user.to_owned(),
        token: Secret::new("it"),
        password: password.map(Secret::new),
    };
    let with =
        |password: &str| json!({"auth": STANDARD.encode(format!("me:{password}")), "identitytoken": "it"});
    assert_eq!(found(with("")).await, refresh("me", None));
    assert_eq!(found(with("pw")).await, refresh("me", Some("pw")));
    assert_eq!(
        found(json!({"identitytoken": "it"})).await,
        refresh("<token>", None)
    );
    assert_eq!(found(auth("<token>", "it")).await, refresh("<token>", None));
    assert_eq!(
        found(json!({"registrytoken": "rt"})).await,
        Identity::Bearer(Secret::new("rt"))
    );
    assert_eq!(
        found(auth("me", "pa:ss\0\0")).await,
        password_identity("me", "pa:ss")
    );
    assert_eq!(
        found(json!({"username": "me", "password": "pw"})).await,
        password_identity("me", "pw")
    );
    for nothing in [json!({}), json!(null), auth("me", "")] {
        assert_eq!(found(nothing).await, Identity::Anonymous);
    }
}

#[tokio::test]
async fn what_is_broken_is_passed_over_and_named_without_quoting_it() {
    let home = Home::new();
    home.write("auth-file.json", "{\"auths\":\n {\"h.io\": {\"auth\": hunter2");
    fs::create_dir_all(home.path(".config/containers/auth.json")).unwrap();
    home.write(
        PRIMARY,
        json!({"auths": {"h.io": {"auth": "%hunter2%"}}}).to_string(),
    );
    let none = home.find("h.io", "a").await.describe();
    assert!(none.starts_with("no credentials: "), "{none}");
    home.write(DOCKER, auths(&[("h.io", "me")]));
    let found = home.find("h.io", "a").await.describe();
    for text in [none, found.clone()] {
        assert!(!text.contains("hunter2"), "{text}");
        for part in [
            "auth-file.json: it is no JSON of the expected form, see line 2",
            "run/containers/auth.json: entry h.io has no base64",
            ".config/containers/auth.json: it is no regular file",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    assert!(
        found.contains(".docker/config.json, entry h.io; passed over"),
        "{found}"
    );
    let huge = Home::new();
    huge.write(DOCKER, " ".repeat((1 << 20) + 1));
    let text = huge.find("h.io", "a").await.describe();
    assert!(text.contains("too large"), "{text}");
    let fifo = Home::new();
    fs::create_dir_all(fifo.path(".docker")).unwrap();
    nix::unistd::mkfifo(&fifo.path(DOCKER), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let text = fifo.find("h.io", "a").await.describe();
    assert!(text.contains("no regular file"), "{text}");
}

#[tokio::test]
async fn why_there_are_none_says_where_they_were_looked_for() {
    let home = Home::new();
    let text = home.find("h.io", "a").await.describe();
    for place in ["auth-file.json", PRIMARY, DOCKER, ".dockercfg"] {
        assert!(text.contains(place), "{place}: {text}");
    }
    home.write(DOCKER, "").write(PRIMARY, auths(&[("x.io", "x")]));
    let text = home.find("h.io", "a").await.describe();
    assert!(text.starts_with("no credentials: nothing for h.io in "), "{text}");
    assert!(
        text.contains(DOCKER) && text.contains(PRIMARY) && !text.contains(".dockercfg"),
        "{text}"
    );
}

#[tokio::test]
async fn a_login_and_a_logout_are_noticed() {
    let home = Home::new();
    let sources = home.sources();
    let nobody = sources.find("h.io", "a", false).await.unwrap();
    assert_eq!(nobody.identity, Identity::Anonymous);
    sources.doubt("h.io", "a");
    home.write(DOCKER, auths(&[("h.io", "me")]));
    let me = sources.find("h.io", "a", false).await.unwrap();
    assert_eq!(user(&me), "me");
    assert_ne!(me.fingerprint, nobody.fingerprint);
    let again = sources.find("h.io", "a", true).await.unwrap();
    assert_eq!(again.fingerprint, me.fingerprint, "doubt alone changes nothing");
    // As long as the first, in the same tick: the file's stamp may be the same.
    home.write(DOCKER, auths(&[("h.io", "us")]));
    assert_eq!(user(&sources.find("h.io", "a", true).await.unwrap()), "us");
    fs::remove_file(home.path(DOCKER)).unwrap();
    let gone = sources.find("h.io", "a", true).await.unwrap();
    assert_eq!(gone.fingerprint, nobody.fingerprint);
}

#[tokio::test]
async fn files_are_looked_at_again_after_a_while_without_a_doubt() {
    let home = Home::new();
    let sources = home.sources();
    sources.find("h.io", "a", false).await.unwrap();
    home.write(DOCKER, auths(&[("h.io", "me")]));
    assert_eq!(user(&sources.find("h.io", "a", false).await.unwrap()), "");
    let before = tokio::time::Instant::now().checked_sub(LOOK_INTERVAL);
    sources.state.lock().looked_at = before;
    assert_eq!(user(&sources.find("h.io", "a", false).await.unwrap()), "me");
}
