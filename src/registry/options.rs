//! What a caller can set: credentials, trust, deadlines. Defaults are those that `README.md` promises.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::credentials::CredentialEnvironment;
use super::patterns::HostPatterns;
use super::secret::Secret;

/// Everything that the client is told once, at its start.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// `USER:PASS`, sent to every registry that asks for a password and has none in [`Self::hosts`]. Set it only
    /// where the user named the registry that it is for.
    pub credential: Option<Secret>,
    /// Where to look for the credentials that other tools keep; by default nowhere.
    pub credential_environment: CredentialEnvironment,
    /// PEM files with certificate authorities that are trusted besides the system's.
    pub ca_files: Vec<PathBuf>,
    /// Accept any certificate.
    pub insecure: bool,
    /// Speak plain HTTP to every registry.
    pub plain_http: bool,
    /// Send nothing: every request fails with [`crate::error::Error::Offline`].
    pub offline: bool,
    /// How often a request is sent again after a failure that may pass.
    pub retries: u32,
    /// How long a manifest, a page of names, or a range of up to 4 MiB may take in total, retries included.
    pub timeout: Duration,
    /// How many requests may be under way to one host.
    pub concurrency: usize,
    /// Where other tools keep what they were told of registries: directories like containerd's, docker's and podman's
    /// `certs.d`. The first has the say.
    pub certs_dirs: Vec<PathBuf>,
    /// What differs for single registries, by their canonical names (`docker.io`, `localhost:5000`).
    pub hosts: BTreeMap<String, HostOptions>,
    /// OCI image layouts on disk that are registries under these host names; no request goes to such a host.
    pub layouts: BTreeMap<String, PathBuf>,
    /// Show nobody a client certificate or a header of ours: they tell who asks, as credentials do.
    pub anonymous: bool,
    /// The hosts that URLs in manifests may name; empty means all.
    pub allow: HostPatterns,
    /// The hosts that they may not.
    pub deny: HostPatterns,
    /// The waits that users do not set.
    pub timing: Timing,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            credential: None,
            credential_environment: CredentialEnvironment::default(),
            ca_files: Vec::new(),
            insecure: false,
            plain_http: false,
            offline: false,
            retries: 5,
            timeout: Duration::from_secs(60),
            concurrency: 32,
            certs_dirs: Vec::new(),
            hosts: BTreeMap::new(),
            layouts: BTreeMap::new(),
            anonymous: false,
            allow: HostPatterns::default(),
            deny: HostPatterns::default(),
            timing: Timing::default(),
        }
    }
}

impl ClientOptions {
    /// The same without the credentials that are given here; those that other tools keep stay.
    pub(super) fn without_given_credentials(&self) -> Self {
        let mut options = Self {
            credential: None,
            ..self.clone()
        };
        for host in options.hosts.values_mut() {
            host.credential = None;
        }
        options
    }

    /// The same for who has no credentials, nor anything else that tells who asks.
    #[must_use]
    pub(super) fn without_credentials(&self) -> Self {
        Self {
            credential_environment: CredentialEnvironment::default(),
            anonymous: true,
            ..self.without_given_credentials()
        }
    }
}

/// What differs for one host. `plain_http` only adds to the general option, and so do `ca_files`.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// Speak plain HTTP to it.
    pub plain_http: bool,
    /// Whether any certificate of it is accepted.
    pub insecure: Option<bool>,
    /// PEM files with certificate authorities that are trusted for it, besides the general ones.
    pub ca_files: Vec<PathBuf>,
    /// PEM file with the certificate that we show it, and those that lead to its authority.
    pub client_cert: Option<PathBuf>,
    /// PEM file with the key of that certificate; `None` means that the key is in the same file.
    pub client_key: Option<PathBuf>,
    /// The proxy on the way to it, whatever the environment says: `SCHEME://[USER:PASS@]HOST:PORT`.
    pub proxy: Option<Secret>,
    /// Longest wait for a connection to it.
    pub connect_timeout: Option<Duration>,
    /// Headers that are sent to it, and to nobody else.
    pub headers: BTreeMap<String, Secret>,
    /// `USER:PASS` for it.
    pub credential: Option<Secret>,
    /// Where the registry really is, as a URL; `None` means where its name says.
    pub server: Option<String>,
    /// What is asked before it, in this order; `None` leaves that to `hosts.toml`.
    pub mirrors: Option<Vec<MirrorOptions>>,
}

/// A mirror of a registry.
#[derive(Debug, Clone, Default)]
pub struct MirrorOptions {
    /// `[http[s]://]HOST[:PORT][/PATH]`.
    pub url: String,
    /// `pull`, `resolve`, `push`; nothing means all of them.
    pub capabilities: Vec<String>,
    /// The path of the URL is whole: `/v2` is not added.
    pub override_path: bool,
    /// How it is talked to. Its own server, mirrors and credential are not looked at.
    pub host: HostOptions,
}

/// The waits inside the client. Tests shorten them; nothing else needs to.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Longest wait for a TCP connection and its TLS handshake.
    pub connect: Duration,
    /// A host that refuses connections for so long is given up.
    pub unreachable: Duration,
    /// Longest wait for the next byte: then a small request is sent again, and a stream ends.
    pub stall: Duration,
    /// A stream that brings fewer bytes a second, over [`Self::stall`], ends.
    pub bytes_per_second_min: u64,
    /// Upper limit of the first pause before a retry; it doubles with each further one, and the actual pause is a
    /// random part of it.
    pub backoff: Duration,
    /// Upper limit of any pause that the registry did not ask for.
    pub backoff_max: Duration,
    /// How long all mirrors of a registry together may take to begin an answer, while there is another endpoint to ask.
    pub mirrors: Duration,
    /// For how long a mirror that lied or did not answer is left out the first time; then twice as long each time.
    pub left_out: Duration,
    /// How often a host that is down is probed, at most.
    pub probe_interval: Duration,
    /// How long a request to a host that is down waits for a probe that is under way.
    pub probe_wait: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            unreachable: Duration::from_secs(5),
            stall: Duration::from_secs(15),
            bytes_per_second_min: 1024,
            backoff: Duration::from_millis(200),
            backoff_max: Duration::from_secs(10),
            mirrors: Duration::from_secs(5),
            left_out: Duration::from_secs(60),
            probe_interval: Duration::from_secs(5),
            probe_wait: Duration::from_millis(900),
        }
    }
}
