//! Where credentials come from: the command line or environment, then Docker's `config.json`. They are looked up
//! anew each time a registry asks, so a `docker login` meanwhile is noticed; nothing is kept but the answer in use.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::options::ClientOptions;
use super::reference::canonical_host;
use super::secret::Secret;

/// Largest configuration file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How the user gave the credentials that no file holds.
const GIVEN: &str = "--credential (or REGISTRYFS_CREDENTIAL)";
/// The user name that says that the password is an identity token (docker's credential helpers).
const TOKEN_USER: &str = "<token>";

/// Who we are to a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Identity {
    /// Nobody.
    Anonymous,
    /// A user with a password.
    Password { user: String, password: Secret },
    /// A refresh token for the token service.
    Refresh { user: String, token: Secret },
    /// A token that the registry itself takes.
    Bearer(Secret),
}

/// An identity, and where it was found or looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) identity: Identity,
    source: String,
}

impl Credentials {
    /// No credentials, and why.
    pub(super) fn none(why: impl Into<String>) -> Self {
        Self {
            identity: Identity::Anonymous,
            source: why.into(),
        }
    }

    /// A sentence part for the user: which credentials were used, or why there are none. Never the secret.
    pub(super) fn describe(&self) -> String {
        match self.identity {
            Identity::Anonymous => format!("no credentials: {}", self.source),
            _ => format!("credentials of {}", self.source),
        }
    }
}

/// Finds the credentials for `host`, a registry's canonical name. It reads a file, so it does not belong on an async
/// thread.
pub(super) fn find(options: &ClientOptions, host: &str) -> Credentials {
    let own = options
        .hosts
        .get(host)
        .and_then(|options| options.credential.as_ref());
    if let Some(secret) = own.or(options.credential.as_ref()) {
        let credentials = |identity| Credentials {
            identity,
            source: GIVEN.to_owned(),
        };
        return match secret.expose().split_once(':') {
            Some((user, password)) => credentials(password_identity(user, password)),
            None => Credentials::none(format!("{GIVEN} is not of the form USER:PASS")),
        };
    }
    let path = match &options.docker_config {
        Some(path) => path.clone(),
        None => match docker_config_path() {
            Some(path) => path,
            None => return Credentials::none("neither $DOCKER_CONFIG nor $HOME is set"),
        },
    };
    from_docker_config(&path, host)
}

fn password_identity(user: &str, password: &str) -> Identity {
    let secret = Secret::new(password);
    if user == TOKEN_USER {
        return Identity::Refresh {
            user: user.to_owned(),
            token: secret,
        };
    }
    Identity::Password {
        user: user.to_owned(),
        password: secret,
    }
}

fn docker_config_path() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    match set("DOCKER_CONFIG") {
        Some(folder) => Some(Path::new(&folder).join("config.json")),
        None => Some(Path::new(&set("HOME")?).join(".docker").join("config.json")),
    }
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: BTreeMap<String, DockerAuth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default, Clone)]
#[serde(default)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

fn from_docker_config(path: &Path, host: &str) -> Credentials {
    let shown = path.display();
    let size = std::fs::metadata(path).map(|metadata| metadata.len());
    if size.as_ref().is_ok_and(|&size| size > FILE_BYTES_MAX) {
        return Credentials::none(format!("{shown} is too large for a configuration file"));
    }
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Credentials::none(format!("{shown} does not exist"));
        }
        Err(error) => return Credentials::none(format!("{shown}: {error}")),
    };
    // The parser's message could quote the file, so only the place is told.
    let config: DockerConfig = match serde_json::from_slice(&bytes) {
        Ok(config) => config,
        Err(error) => {
            let line = error.line();
            return Credentials::none(format!("{shown} is not a docker configuration, see line {line}"));
        }
    };
    let helper = config
        .cred_helpers
        .iter()
        .find(|(key, _)| names(key, host))
        .map(|(_, helper)| helper)
        .or(config.creds_store.as_ref());
    // A key that is the host itself wins over one that only means it, as docker has it.
    let entry = config
        .auths
        .get_key_value(host)
        .or_else(|| config.auths.iter().find(|(key, _)| names(key, host)));
    if let Some((key, auth)) = entry
        && let Some(identity) = identity(auth)
    {
        return Credentials {
            identity,
            source: format!("{shown}, entry {key}"),
        };
    }
    Credentials::none(match helper {
        Some(helper) => {
            format!("{shown} leaves {host} to the credential helper {helper:?}, which is not supported yet")
        }
        None => format!("{shown} has none for {host}"),
    })
}

/// Whether a key of `auths` means `host`: it may be a bare host, or have a scheme and an API path, as docker's for
/// Docker Hub does (`https://index.docker.io/v1/`).
fn names(key: &str, host: &str) -> bool {
    let key = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    let (name, path) = key.split_once('/').unwrap_or((key, ""));
    let whole_host = matches!(path.trim_end_matches('/'), "" | "v1" | "v2");
    whole_host && canonical_host(name).is_ok_and(|name| name == host)
}

fn identity(auth: &DockerAuth) -> Option<Identity> {
    let text = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    if let Some(token) = text(&auth.registrytoken) {
        return Some(Identity::Bearer(Secret::new(token)));
    }
    let decoded = text(&auth.auth)
        .and_then(|auth| STANDARD.decode(auth.trim()).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok());
    // Some tools pad the password with NUL bytes.
    let pair = decoded
        .as_deref()
        .and_then(|text| text.trim_end_matches('\0').split_once(':'));
    let (user, password) = match pair {
        Some((user, password)) => (Some(user.to_owned()), Some(password.to_owned())),
        None => (text(&auth.username), text(&auth.password)),
    };
    if let Some(token) = text(&auth.identitytoken) {
        return Some(Identity::Refresh {
            user: user.unwrap_or_else(|| TOKEN_USER.to_owned()),
            token: Secret::new(token),
        });
    }
    Some(password_identity(&user?, &password?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::options::HostOptions;

    fn in_file(json: &str, host: &str) -> Credentials {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        let options = ClientOptions {
            docker_config: Some(path),
            ..ClientOptions::default()
        };
        find(&options, host)
    }

    fn password(user: &str, password: &str) -> Identity {
        Identity::Password {
            user: user.to_owned(),
            password: Secret::new(password),
        }
    }

    #[test]
    fn docker_writes_keys_in_many_ways() {
        let auth = STANDARD.encode("me:pa:ss");
        let file = |key: &str| format!(r#"{{"auths":{{"{key}":{{"auth":"{auth}"}}}}}}"#);
        for key in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"] {
            assert_eq!(
                in_file(&file(key), "docker.io").identity,
                password("me", "pa:ss"),
                "{key}"
            );
        }
        for key in [
            "h.example:5000",
            "https://h.example:5000",
            "http://h.example:5000/v2/",
            "H.example:5000",
        ] {
            assert_eq!(
                in_file(&file(key), "h.example:5000").identity,
                password("me", "pa:ss"),
                "{key}"
            );
        }
        for key in [
            "h.example",
            "https://h.example:5001",
            "evil.example/h.example:5000",
            "h.example:5000/org",
        ] {
            assert_eq!(
                in_file(&file(key), "h.example:5000").identity,
                Identity::Anonymous,
                "{key}"
            );
        }
    }

    #[test]
    fn tokens_are_told_from_passwords() {
        let auth = STANDARD.encode("me:");
        let json = format!(r#"{{"auths":{{"h.io":{{"auth":"{auth}","identitytoken":"it"}}}}}}"#);
        let expected = Identity::Refresh {
            user: "me".to_owned(),
            token: Secret::new("it"),
        };
        assert_eq!(in_file(&json, "h.io").identity, expected);
        let json = r#"{"auths":{"h.io":{"registrytoken":"rt"}}}"#;
        assert_eq!(
            in_file(json, "h.io").identity,
            Identity::Bearer(Secret::new("rt"))
        );
        let auth = STANDARD.encode("<token>:it");
        let json = format!(r#"{{"auths":{{"h.io":{{"auth":"{auth}"}}}}}}"#);
        assert!(matches!(
            in_file(&json, "h.io").identity,
            Identity::Refresh { .. }
        ));
    }

    #[test]
    fn the_nearest_source_wins_and_is_named() {
        let options = ClientOptions {
            credential: Some(Secret::new("flag:secret1")),
            hosts: BTreeMap::from([(
                "h.io".to_owned(),
                HostOptions {
                    credential: Some(Secret::new("own:secret2")),
                    ..HostOptions::default()
                },
            )]),
            ..ClientOptions::default()
        };
        let own = find(&options, "h.io");
        assert_eq!(own.identity, password("own", "secret2"));
        assert_eq!(
            own.describe(),
            "credentials of --credential (or REGISTRYFS_CREDENTIAL)"
        );
        let flag = find(&options, "other.io");
        assert_eq!(flag.identity, password("flag", "secret1"));
        assert!(!format!("{options:?}{own:?}{flag:?}").contains("secret"));
    }

    #[test]
    fn why_there_are_none_is_said_without_quoting_the_file() {
        let broken = in_file(r#"{"auths": {"h.io": {"auth": hunter2"#, "h.io").describe();
        assert!(
            broken.contains("line 1") && !broken.contains("hunter2"),
            "{broken}"
        );
        let helper = in_file(r#"{"credsStore":"pass"}"#, "h.io").describe();
        assert!(helper.contains("credential helper \"pass\""), "{helper}");
        assert!(
            in_file("{}", "h.io").describe().ends_with("has none for h.io"),
            "no entry"
        );
        let garbage = in_file(r#"{"auths":{"h.io":{"auth":"%%%"}}}"#, "h.io");
        assert_eq!(garbage.identity, Identity::Anonymous);
    }
}
