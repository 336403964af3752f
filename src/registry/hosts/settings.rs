//! What an endpoint is told besides its address: whom to trust, who we are, which way to go. Settings hold the contents
//! of the files that they name, so two of them are equal only if nothing on disk has changed either.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::super::proxy::ProxyUrl;
use crate::error::{Error, Result};

/// Largest file with certificates or keys that is read.
const PEM_BYTES_MAX: u64 = 8 << 20;

/// A PEM file as it was when it was read. It may be a private key, so it shows its path alone.
#[derive(Clone, PartialEq, Eq)]
pub(in crate::registry) struct PemFile {
    pub(in crate::registry) path: PathBuf,
    pub(in crate::registry) pem: Vec<u8>,
}

impl PemFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Usage`] naming it.
    pub(in crate::registry) fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let unreadable = |error: std::io::Error| Error::usage(format!("{shown}: cannot be read: {error}"));
        let size = std::fs::metadata(path).map_err(unreadable)?.len();
        if size > PEM_BYTES_MAX {
            return Err(Error::usage(format!(
                "{shown}: {size} bytes are no file of certificates"
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            pem: std::fs::read(path).map_err(unreadable)?,
        })
    }
}

impl fmt::Debug for PemFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

/// A certificate of ours and its key; both may be in one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registry) struct ClientCertificate {
    pub(in crate::registry) certificate: PemFile,
    pub(in crate::registry) key: PemFile,
}

impl ClientCertificate {
    /// Reads both files; without `key` it is in the certificate's.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file.
    pub(in crate::registry) fn read(certificate: &Path, key: Option<&Path>) -> Result<Self> {
        let certificate = PemFile::read(certificate)?;
        let key = match key {
            Some(key) => PemFile::read(key)?,
            None => certificate.clone(),
        };
        Ok(Self { certificate, key })
    }
}

/// The settings of one endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::registry) struct Settings {
    /// Authorities trusted besides the general ones.
    pub(in crate::registry) ca: Vec<PemFile>,
    pub(in crate::registry) client: Vec<ClientCertificate>,
    /// Accept any certificate.
    pub(in crate::registry) insecure: Option<bool>,
    pub(in crate::registry) proxy: Option<ProxyUrl>,
    /// Longest wait for a connection.
    pub(in crate::registry) connect: Option<Duration>,
    /// Sent with every request to the endpoint; they may be secrets.
    pub(in crate::registry) headers: HeaderMap,
}

impl Settings {
    /// Whether the endpoint is told who we are, credentials left out.
    pub(in crate::registry) fn has_identity(&self) -> bool {
        !self.client.is_empty() || !self.headers.is_empty()
    }

    /// The same, without telling who we are.
    pub(in crate::registry) fn without_identity(self) -> Self {
        Self {
            client: Vec::new(),
            headers: HeaderMap::new(),
            ..self
        }
    }

    /// These settings where they say something, else those `below`. Authorities add up.
    pub(in crate::registry) fn over(self, below: Self) -> Self {
        let mut ca = self.ca;
        for file in below.ca {
            if !ca.contains(&file) {
                ca.push(file);
            }
        }
        Self {
            ca,
            client: if self.client.is_empty() {
                below.client
            } else {
                self.client
            },
            insecure: self.insecure.or(below.insecure),
            proxy: self.proxy.or(below.proxy),
            connect: self.connect.or(below.connect),
            headers: if self.headers.is_empty() {
                below.headers
            } else {
                self.headers
            },
        }
    }
}

/// What a source says of one endpoint, before the files that it names are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::registry) struct Said {
    pub(in crate::registry) ca: Vec<PathBuf>,
    /// Certificates, each with its key where that is a file of its own.
    pub(in crate::registry) client: Vec<(PathBuf, Option<PathBuf>)>,
    pub(in crate::registry) insecure: Option<bool>,
    pub(in crate::registry) proxy: Option<ProxyUrl>,
    pub(in crate::registry) connect: Option<Duration>,
    pub(in crate::registry) headers: HeaderMap,
}

impl Said {
    /// Reads the files.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the file.
    pub(in crate::registry) fn load(&self) -> Result<Settings> {
        let ca = self
            .ca
            .iter()
            .map(|path| PemFile::read(path))
            .collect::<Result<_>>()?;
        let client = self
            .client
            .iter()
            .map(|(certificate, key)| ClientCertificate::read(certificate, key.as_deref()))
            .collect::<Result<_>>()?;
        Ok(Settings {
            ca,
            client,
            insecure: self.insecure,
            proxy: self.proxy.clone(),
            connect: self.connect,
            headers: self.headers.clone(),
        })
    }
}

/// Adds a header that the user set, marked so that no HTTP library prints it.
///
/// # Errors
/// What is wrong, without the value.
pub(in crate::registry) fn add_header(
    headers: &mut HeaderMap,
    name: &str,
    value: &str,
) -> Result<(), String> {
    let name: HeaderName = name
        .parse()
        .map_err(|_| format!("{name:?} is no name of a header"))?;
    let mut value =
        HeaderValue::from_str(value).map_err(|_| format!("header {name}: its value cannot be sent"))?;
    value.set_sensitive(true);
    headers.append(name, value);
    Ok(())
}
