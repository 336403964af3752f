//! Blobs that are somewhere else than in their registry: the `urls` of a descriptor, which make a layer a foreign one (not
//! to be distributed, such as the base layers of Windows).
//!
//! They are the last to be asked, without any credentials, and become endpoints of the route like mirrors, so ranges,
//! retries, redirects and lies are dealt with in one place; what a manifest may name and what not says `stranger`. A URL may
//! be signed, so none is ever shown.

use std::sync::Arc;

use reqwest::Url;

use super::challenge::is_loopback;
use super::endpoint::Endpoint;
use super::host::Host;
use super::options::ClientOptions;
use super::secret::authority;
use super::stranger::Stranger;
use super::transport::Transport;
use crate::error::{Error, Result};

/// The URLs of one descriptor.
#[derive(Debug, Clone, Default)]
pub(super) struct ForeignUrls {
    urls: Vec<String>,
    /// By its media type the blob is not meant to be in the registry at all.
    is_foreign_type: bool,
}

impl ForeignUrls {
    /// Of a descriptor with this media type.
    pub(super) fn new(media_type: &str, urls: &[String]) -> Self {
        let media_type = media_type.to_ascii_lowercase();
        Self {
            urls: urls.to_vec(),
            is_foreign_type: media_type.contains(".foreign.") || media_type.contains("nondistributable"),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.urls.is_empty()
    }

    /// Whether they may have what the registry refused with `error`: what it does not have, or, of a blob that it is not
    /// meant to have, does not give.
    pub(super) fn may_help(&self, error: &Error) -> bool {
        let refused = match error {
            Error::NotFound { .. } => true,
            Error::Denied { .. } | Error::NoCredentials { .. } | Error::Unsupported { .. } => {
                self.is_foreign_type
            }
            _ => false,
        };
        refused && !self.is_empty()
    }

    /// The endpoints that they are, for a registry that was last asked at `registry`.
    ///
    /// # Errors
    /// `error`, the registry's own, with the reasons added, if none of them may be asked; those of the settings of hosts.
    pub(super) async fn endpoints(
        &self,
        transport: &Transport,
        registry: &Arc<Host>,
        error: Error,
    ) -> Result<Vec<Arc<Endpoint>>> {
        let mut endpoints = Vec::new();
        let mut refused = Vec::new();
        let registry_url = Url::parse(&format!("https://{}/", registry.name()));
        let stranger = Stranger {
            may_be_here: registry_url.is_ok_and(|url| is_loopback(&url)),
        };
        for text in &self.urls {
            match check(&transport.options, text, stranger) {
                Ok(url) => {
                    let host = transport.stranger(registry, &url, stranger).await?;
                    endpoints.push(Arc::new(Endpoint::foreign(host, url)));
                }
                Err(why) => refused.push(why),
            }
        }
        match endpoints.is_empty() {
            false => Ok(endpoints),
            true => Err(explained(error, &refused)),
        }
    }
}

/// The URL that `text` is, if it may be asked.
fn check(options: &ClientOptions, text: &str, stranger: Stranger) -> std::result::Result<Url, String> {
    let url = Url::parse(text).map_err(|_| "one that is no URL".to_owned())?;
    let refuse = |why: &str| Err(format!("one at {}, {why}", authority(&url)));
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err("one that is neither http nor https".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return refuse("with a user in it");
    }
    match stranger.check_named(options, &url) {
        Ok(()) => Ok(url),
        Err(why) => refuse(why),
    }
}

/// What the registry said, and why its manifest's URLs are no help.
fn explained(error: Error, refused: &[String]) -> Error {
    let more = format!("; of its URLs none may be asked: {}", refused.join(", "));
    match error {
        Error::NotFound { what, why } => Error::NotFound {
            what,
            why: why + &more,
        },
        Error::Denied { what, why } => Error::Denied {
            what,
            why: why + &more,
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_that_a_stranger_may_name_are_asked() {
        let stranger = Stranger { may_be_here: false };
        let checked = |text: &str| check(&ClientOptions::default(), text, stranger);
        for text in [
            "https://mcr.example/v2/windows/blobs/x",
            "HTTP://mcr.example:8080/x?sig=secret",
        ] {
            assert!(checked(text).is_ok(), "{text}");
        }
        for text in [
            "",
            "mcr.example/x",
            "file:///etc/passwd",
            "ftp://a.example/x",
            "https://user:secret@a.example/x",
            "https://user@a.example/x",
            "http://169.254.169.254/latest?secret",
            "http://localhost:6443/x?secret",
        ] {
            let why = checked(text).unwrap_err();
            assert!(!why.contains("secret"), "{why}");
        }
    }

    #[test]
    fn they_help_where_the_registry_does_not_have_the_blob() {
        let urls = ["https://a.example/x".to_owned()];
        let layer = ForeignUrls::new("application/vnd.oci.image.layer.v1.tar+gzip", &urls);
        let foreign = ForeignUrls::new("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", &urls);
        let absent = Error::not_found("x", "404");
        let denied = Error::denied("x", "403");
        let broken = Error::network("x", "503");
        let helps = |urls: &ForeignUrls| [&absent, &denied, &broken].map(|error| urls.may_help(error));
        assert_eq!(helps(&layer), [true, false, false]);
        assert_eq!(helps(&foreign), [true, true, false]);
        assert_eq!(helps(&ForeignUrls::default()), [false; 3]);
    }
}
