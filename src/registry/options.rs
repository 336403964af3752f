//! What a caller can set: credentials, trust, deadlines. Defaults are those that `README.md` promises.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::credentials::CredentialEnvironment;
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
    /// What differs for single registries, by their canonical names (`docker.io`, `localhost:5000`).
    pub hosts: BTreeMap<String, HostOptions>,
    /// OCI image layouts on disk that are registries under these host names; no request goes to such a host.
    pub layouts: BTreeMap<String, PathBuf>,
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
            hosts: BTreeMap::new(),
            layouts: BTreeMap::new(),
            timing: Timing::default(),
        }
    }
}

impl ClientOptions {
    /// The same for who has no credentials.
    #[must_use]
    pub(super) fn without_credentials(&self) -> Self {
        let hosts = self.hosts.iter().map(|(host, options)| {
            let options = HostOptions {
                credential: None,
                ..options.clone()
            };
            (host.clone(), options)
        });
        Self {
            credential: None,
            credential_environment: CredentialEnvironment::default(),
            hosts: hosts.collect(),
            ..self.clone()
        }
    }
}

/// What differs for one registry. The flags only add to the general ones.
#[derive(Debug, Clone, Default)]
pub struct HostOptions {
    /// Speak plain HTTP to it.
    pub plain_http: bool,
    /// Accept any certificate of it.
    pub insecure: bool,
    /// PEM files with certificate authorities that are trusted for it, besides the general ones.
    pub ca_files: Vec<PathBuf>,
    /// `USER:PASS` for it.
    pub credential: Option<Secret>,
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
            probe_interval: Duration::from_secs(5),
            probe_wait: Duration::from_millis(900),
        }
    }
}
