//! HTTP clients and whom they trust. The TLS configuration is built here and not by reqwest, because reqwest refuses
//! to be built on a machine without any certificate authority, where plain HTTP must still work, and reads them all
//! at its start, where a cached image needs none.
//!
//! Everything is HTTP/1.1: ranges need many connections at once to fill a long line, which HTTP/2 with its one
//! connection a host does not give, and with one protocol the connection of the manifest serves the first blob.

use std::path::Path;
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::error::{Error, Result};

/// How long an idle connection is kept. Registries behind load balancers close theirs after 60 s and more.
const IDLE: Duration = Duration::from_secs(50);
/// Largest file with certificate authorities that is read.
const CA_FILE_BYTES_MAX: u64 = 8 << 20;

/// Which certificates are accepted.
#[derive(Debug, Clone)]
pub(super) enum Trust {
    /// Those that lead to one of the system's authorities, or of these.
    SystemAnd(RootCertStore),
    /// Any: the user asked for no check.
    Anything,
}

/// The system's certificate authorities. A machine may have none: then every certificate is untrusted, and only that.
/// Read when the first certificate is judged, because it takes longer than a whole command on cached images.
static SYSTEM_ROOTS: LazyLock<RootCertStore> = LazyLock::new(|| {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (_, ignored) = roots.add_parsable_certificates(found.certs);
    tracing::debug!(
        certificates = roots.len(),
        ignored,
        "system certificate authorities"
    );
    roots
});

/// Adds every certificate of the PEM file at `path` to `roots`.
///
/// # Errors
/// [`Error::Usage`] if it cannot be read, or there is no certificate in it.
pub(super) fn add_ca_file(roots: &mut RootCertStore, path: &Path) -> Result<()> {
    let shown = path.display().to_string();
    let unreadable = |error: std::io::Error| {
        Error::usage(format!(
            "{shown}: cannot be read as certificate authorities: {error}; correct --ca, REGISTRYFS_CA or the key `ca`"
        ))
    };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > CA_FILE_BYTES_MAX {
        return Err(Error::usage(format!(
            "{shown}: {size} bytes are no file of certificate authorities"
        )));
    }
    let pem = std::fs::read(path).map_err(unreadable)?;
    let mut added = 0;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let refused = |why: String| Error::usage(format!("{shown}: not a certificate authority: {why}"));
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| refused(error.to_string()))?;
        added += 1;
    }
    if added == 0 {
        return Err(Error::usage(format!("{shown}: no PEM certificate in it")));
    }
    Ok(())
}

/// An HTTP client with its own pool of connections. `direct` ignores the proxies of the environment, as is right for
/// loopback.
///
/// # Errors
/// [`Error::Network`] if the TLS library cannot be set up.
pub(super) fn http_client(trust: Trust, direct: bool, connect: Duration) -> Result<reqwest::Client> {
    let broken = |why: String| Error::network("HTTP client", why);
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| broken(error.to_string()))?;
    let verifier = Verifier {
        provider,
        trust,
        chains: OnceLock::new(),
    };
    let config = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    let mut client = reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("registryfs/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(connect)
        .pool_idle_timeout(IDLE)
        .tcp_nodelay(true);
    if direct {
        client = client.no_proxy();
    }
    client
        .build()
        .map_err(|error| broken(error.without_url().to_string()))
}

/// Judges the certificates of peers.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    trust: Trust,
    /// Made at the first use; `None` where there is no authority at all.
    chains: OnceLock<Option<Arc<WebPkiServerVerifier>>>,
}

impl Verifier {
    fn chains(&self, own: &RootCertStore) -> Option<&Arc<WebPkiServerVerifier>> {
        let chains = self.chains.get_or_init(|| {
            let mut roots = own.clone();
            roots.extend(SYSTEM_ROOTS.roots.iter().cloned());
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .ok()
        });
        chains.as_ref()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.trust {
            Trust::Anything => Ok(ServerCertVerified::assertion()),
            Trust::SystemAnd(own) => match self.chains(own) {
                None => Err(CertificateError::UnknownIssuer.into()),
                Some(chains) => {
                    chains.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                }
            },
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
