//! HTTP clients and whom they trust. The TLS configuration is built here and not by reqwest, because reqwest refuses
//! to be built on a machine without any certificate authority, where plain HTTP must still work, and reads them all
//! at its start, where a cached image needs none.
//!
//! Everything is HTTP/1.1: ranges need many connections at once to fill a long line, which HTTP/2 with its one
//! connection a host does not give, and with one protocol the connection of the manifest serves the first blob.

use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, InconsistentKeys, RootCertStore, SignatureScheme,
};

use super::hosts::{ClientCertificate, PemFile};
use super::names::System;
use super::proxy::Way;
use super::stranger::Elsewhere;
use crate::error::{Error, Result};

/// How long an idle connection is kept. Registries behind load balancers close theirs after 60 s and more.
const IDLE: Duration = Duration::from_secs(50);

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

/// Adds every certificate of a PEM file to `roots`.
///
/// # Errors
/// [`Error::Usage`] if there is none in it, or something that is none.
pub(super) fn add_authorities(roots: &mut RootCertStore, file: &PemFile) -> Result<()> {
    let refused = |why: String| {
        Error::usage(format!(
            "{}: not a certificate authority: {why}",
            file.path.display()
        ))
    };
    let mut added = 0;
    for certificate in CertificateDer::pem_slice_iter(&file.pem) {
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        roots
            .add(certificate)
            .map_err(|error| refused(error.to_string()))?;
        added += 1;
    }
    match added {
        0 => Err(refused("no PEM certificate in it".to_owned())),
        _ => Ok(()),
    }
}

/// Our certificates for a server that asks for one; `None` where there are none.
///
/// # Errors
/// [`Error::Usage`] naming the files that hold no certificate, no key, or a key of another certificate.
pub(super) fn client_keys(certificates: &[ClientCertificate]) -> Result<Option<Arc<ClientKeys>>> {
    let keys: Vec<_> = certificates.iter().map(client_key).collect::<Result<_>>()?;
    Ok((!keys.is_empty()).then(|| Arc::new(ClientKeys(keys))))
}

fn client_key(files: &ClientCertificate) -> Result<Arc<CertifiedKey>> {
    let (certificate, key) = (files.certificate.path.display(), files.key.path.display());
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&files.certificate.pem).collect();
    let chain =
        chain.map_err(|error| Error::usage(format!("{certificate}: not a client certificate: {error}")))?;
    if chain.is_empty() {
        return Err(Error::usage(format!("{certificate}: no PEM certificate in it")));
    }
    let no_key = |why: &str| Error::usage(format!("{key}: no key for {certificate}: {why}"));
    let der = PrivateKeyDer::from_pem_slice(&files.key.pem)
        .map_err(|_| no_key("it needs a PEM key without a password (PKCS#8, PKCS#1 or SEC1)"))?;
    let signer = ring::default_provider()
        .key_provider
        .load_private_key(der)
        .map_err(|error| no_key(&error.to_string()))?;
    let certified = CertifiedKey::new(chain, signer);
    match certified.keys_match() {
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) | Ok(()) => Ok(Arc::new(certified)),
        Err(rustls::Error::InconsistentKeys(_)) => Err(Error::usage(format!(
            "{key}: the key of another certificate than {certificate}"
        ))),
        Err(error) => Err(Error::usage(format!(
            "{certificate}: not a client certificate: {error}"
        ))),
    }
}

/// Certificates of ours, of which a server gets the first whose kind of key it takes.
#[derive(Debug)]
pub(super) struct ClientKeys(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientKeys {
    fn resolve(&self, _authorities: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(schemes).is_some();
        self.0.iter().find(fits).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// An HTTP client with its own pool of connections, which go `way`. `resolver` looks up names where that is not the system's
/// business alone.
///
/// # Errors
/// [`Error::Network`] if the TLS library cannot be set up.
pub(super) fn http_client(
    trust: Trust,
    keys: Option<Arc<ClientKeys>>,
    way: &Way,
    connect: Duration,
    resolver: Option<Arc<Elsewhere>>,
) -> Result<reqwest::Client> {
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
    let builder = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let config = match keys {
        Some(keys) => builder.with_client_cert_resolver(keys),
        None => builder.with_no_client_auth(),
    };
    let mut client = reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("registryfs/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(connect)
        .pool_idle_timeout(IDLE)
        .tcp_nodelay(true);
    client = match resolver {
        Some(resolver) => client.dns_resolver(resolver),
        None => client.dns_resolver(System),
    };
    match way {
        Way::Direct => client = client.no_proxy(),
        Way::Environment => {}
        Way::Fixed(proxy) => {
            let proxy = reqwest::Proxy::all(proxy.expose().clone())
                .map_err(|error| broken(error.without_url().to_string()))?;
            client = client.proxy(proxy);
        }
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
