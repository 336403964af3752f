//! containerd's `hosts.toml`, by its documentation: the server of a registry, and the hosts that are tried before it, in
//! the order of the file. Keys that are not known are passed over with a warning, as containerd does without; what cannot
//! be meant is an error that names the line, because passing over it could leave out a mirror that must be used.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::HeaderMap;
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use toml::Spanned;

use super::super::proxy::ProxyUrl;
use super::base::Base;
use super::settings::{Said, add_header};
use crate::config::explain;
use crate::error::{Error, Result};

/// Largest `hosts.toml` that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;
const ROOT_KEYS: [&str; 2] = ["server", "host"];
const HOST_KEYS: [&str; 8] = [
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "dial_timeout",
    "proxy",
];

/// What an endpoint may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registry) struct Capabilities {
    /// Blobs, and manifests by digest.
    pub(in crate::registry) pull: bool,
    /// Tags.
    pub(in crate::registry) resolve: bool,
}

impl Capabilities {
    /// Everything.
    pub(in crate::registry) const ALL: Self = Self {
        pull: true,
        resolve: true,
    };

    /// Reads the words of a list; an empty list means everything, as in containerd.
    ///
    /// # Errors
    /// The word that is none.
    pub(in crate::registry) fn parse(words: &[String]) -> Result<Self, String> {
        if words.is_empty() {
            return Ok(Self::ALL);
        }
        let mut capabilities = Self {
            pull: false,
            resolve: false,
        };
        for word in words {
            match word.to_ascii_lowercase().as_str() {
                "pull" => capabilities.pull = true,
                "resolve" => capabilities.resolve = true,
                // Nothing is pushed.
                "push" => {}
                _ => {
                    return Err(format!(
                        "{word:?} is none of the capabilities pull, resolve, push"
                    ));
                }
            }
        }
        Ok(capabilities)
    }
}

/// One endpoint of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registry) struct FileEndpoint {
    pub(in crate::registry) base: Base,
    pub(in crate::registry) capabilities: Capabilities,
    pub(in crate::registry) said: Said,
}

/// A file, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registry) struct HostsFile {
    /// Where the registry itself is; nothing means where its name says.
    pub(in crate::registry) server: Option<Base>,
    /// What is said of the server, whichever it is.
    pub(in crate::registry) server_said: Said,
    pub(in crate::registry) server_capabilities: Capabilities,
    /// In the order of the file.
    pub(in crate::registry) hosts: Vec<FileEndpoint>,
}

#[derive(Deserialize)]
struct Document {
    server: Option<Spanned<String>>,
    #[serde(default)]
    host: Hosts,
}

/// The tables of `host`, in the order of the file: a map of the TOML library has them sorted.
#[derive(Default)]
struct Hosts(Vec<(Spanned<String>, HostTable)>);

impl<'de> Deserialize<'de> for Hosts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tables;
        impl<'de> Visitor<'de> for Tables {
            type Value = Hosts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tables named by URLs")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Hosts, A::Error> {
                let mut tables = Vec::new();
                while let Some(entry) = map.next_entry::<Spanned<String>, HostTable>()? {
                    tables.push(entry);
                }
                tables.sort_by_key(|(url, _)| url.span().start);
                Ok(Hosts(tables))
            }
        }
        deserializer.deserialize_map(Tables)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct HostTable {
    capabilities: Option<Words>,
    ca: Option<OneOrMore<PathBuf>>,
    client: Option<Clients>,
    skip_verify: Option<bool>,
    header: BTreeMap<String, OneOrMore<String>>,
    override_path: bool,
    dial_timeout: Option<GoDuration>,
    proxy: Option<Proxy>,
}

struct Words(Capabilities);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let words = Vec::<String>::deserialize(deserializer)?;
        Capabilities::parse(&words).map(Self).map_err(de::Error::custom)
    }
}

struct Proxy(ProxyUrl);

impl<'de> Deserialize<'de> for Proxy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        ProxyUrl::parse(&text).map(Self).map_err(de::Error::custom)
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::More(more) => more,
        }
    }
}

/// A list of two paths is two certificates and no pair, so the outer list has a type of its own.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a path, a list of paths, or a list of pairs of paths")]
enum Clients {
    One(PathBuf),
    More(Vec<Client>),
}

impl Clients {
    fn into_vec(self) -> Vec<Client> {
        match self {
            Self::One(path) => vec![Client::Both(path)],
            Self::More(more) => more,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a path or a pair of paths")]
enum Client {
    Both(PathBuf),
    Pair([PathBuf; 2]),
}

struct GoDuration(Duration);

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let read = parse_go_duration(&text);
        read.map(Self)
            .ok_or_else(|| de::Error::custom("a time is written like \"1s\", \"500ms\" or \"1m30s\""))
    }
}

/// Reads a time as Go writes it: numbers with units, one after the other.
fn parse_go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let units = tail
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(units);
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    match text.is_empty() {
        true => None,
        false => Duration::try_from_secs_f64(seconds).ok(),
    }
}

impl HostTable {
    fn said(self, dir: &Path) -> Result<(Capabilities, Said), String> {
        let absolute = |path: PathBuf| dir.join(path);
        let mut headers = HeaderMap::new();
        for (name, values) in self.header {
            for value in values.into_vec() {
                add_header(&mut headers, &name, &value)?;
            }
        }
        let client = self.client.map(Clients::into_vec).unwrap_or_default();
        let pair = |client: Client| match client {
            Client::Both(both) => (absolute(both), None),
            Client::Pair([certificate, key]) if key.as_os_str().is_empty() => (absolute(certificate), None),
            Client::Pair([certificate, key]) => (absolute(certificate), Some(absolute(key))),
        };
        let ca = self.ca.map(OneOrMore::into_vec).unwrap_or_default();
        let said = Said {
            ca: ca.into_iter().map(absolute).collect(),
            client: client.into_iter().map(pair).collect(),
            insecure: self.skip_verify,
            proxy: self.proxy.map(|Proxy(url)| url),
            // Zero is containerd's word for its default.
            connect: self
                .dial_timeout
                .map(|GoDuration(time)| time)
                .filter(|time| !time.is_zero()),
            headers,
        };
        Ok((
            self.capabilities.map_or(Capabilities::ALL, |Words(words)| words),
            said,
        ))
    }
}

impl HostsFile {
    /// Reads a file; `None` where there is none, or an empty one.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file, and the line at fault.
    pub(in crate::registry) fn read(path: &Path) -> Result<Option<Self>> {
        let unreadable =
            |error: std::io::Error| Error::usage(format!("{}: cannot be read: {error}", path.display()));
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > FILE_BYTES_MAX => {
                return Err(Error::usage(format!(
                    "{}: too large for a hosts.toml",
                    path.display()
                )));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        match text.trim().is_empty() {
            true => Ok(None),
            false => Self::parse(&text, path).map(Some),
        }
    }

    /// Reads the text of the file at `path`, from whose directory relative paths are taken.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(in crate::registry) fn parse(text: &str, path: &Path) -> Result<Self> {
        let dir = path.parent().unwrap_or(Path::new(""));
        let at = |offset: usize, why: &str| {
            let before = text.get(..offset).unwrap_or_default();
            let line = before.bytes().filter(|&byte| byte == b'\n').count() + 1;
            Error::usage(format!("{}:{line}: {why}", path.display()))
        };
        let of_toml = |error: toml::de::Error| {
            let (line, why, key) = explain(&error, text);
            Error::usage(format!("{}:{line}: {why} in `{key}`", path.display()))
        };
        let Document { server, host } = toml::from_str(text).map_err(of_toml)?;
        // The root has the server's settings beside its own keys.
        let root: HostTable = toml::from_str(text).map_err(of_toml)?;
        warn_of_unknown_keys(text, path);
        let server = match server {
            Some(server) if !server.get_ref().is_empty() => {
                let parsed = Base::parse(server.get_ref(), root.override_path);
                Some(parsed.map_err(|why| at(server.span().start, &format!("server: {why}")))?)
            }
            _ => None,
        };
        let (server_capabilities, server_said) = root.said(dir).map_err(|why| at(0, &why))?;
        let endpoint = |(url, table): (Spanned<String>, HostTable)| {
            let wrong = |why: String| at(url.span().start, &format!("host: {why}"));
            let base = Base::parse(url.get_ref(), table.override_path).map_err(wrong)?;
            let (capabilities, said) = table.said(dir).map_err(wrong)?;
            Ok(FileEndpoint {
                base,
                capabilities,
                said,
            })
        };
        Ok(Self {
            server,
            server_said,
            server_capabilities,
            hosts: host.0.into_iter().map(endpoint).collect::<Result<_>>()?,
        })
    }
}

fn warn_of_unknown_keys(text: &str, path: &Path) {
    let Ok(table) = text.parse::<toml::Table>() else {
        return;
    };
    let hosts = table.get("host").and_then(toml::Value::as_table);
    let of_hosts = hosts
        .into_iter()
        .flatten()
        .filter_map(|(_, host)| host.as_table());
    let unknown = table
        .keys()
        .filter(|key| !ROOT_KEYS.contains(&key.as_str()))
        .chain(of_hosts.flat_map(toml::Table::keys))
        .filter(|key| !HOST_KEYS.contains(&key.as_str()));
    for key in unknown {
        tracing::warn!(file = %path.display(), "{key:?} is no key of a hosts.toml that is known: passed over");
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
