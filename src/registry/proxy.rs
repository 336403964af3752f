//! Proxies: which one a request goes through. Errors must name it, because it is then the peer that refused or did not
//! answer. The environment is judged by the code that the HTTP library itself uses, so both see the same proxy.

use std::fmt;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::Url;

use super::secret::authority;
use crate::error::{Error, Result};

/// The protocols that can be spoken to a proxy.
const SCHEMES: [&str; 6] = ["http", "https", "socks4", "socks4a", "socks5", "socks5h"];
/// The variables that name a proxy.
const VARIABLES: [&str; 6] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// The URL of a proxy. It may hold a password, so it shows itself without.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ProxyUrl(Url);

impl ProxyUrl {
    /// Takes `http://proxy.example:3128`, with or without `USER:PASS@`; without a scheme http is meant.
    ///
    /// # Errors
    /// What is wrong with it, without quoting it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let url = match text.contains("://") {
            true => Url::parse(text),
            false => Url::parse(&format!("http://{text}")),
        };
        let url = url.map_err(|error| format!("it is no URL of a proxy: {error}"))?;
        if !SCHEMES.contains(&url.scheme()) {
            return Err(format!("{} is no protocol of a proxy", url.scheme()));
        }
        let bare = matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none();
        match url.has_host() && bare {
            true => Ok(Self(url)),
            false => Err("a proxy is written SCHEME://HOST:PORT".to_owned()),
        }
    }

    /// The whole URL, for the HTTP library.
    pub(super) fn expose(&self) -> &Url {
        &self.0
    }

    fn shown(&self) -> String {
        format!("{}://{}", self.0.scheme(), authority(&self.0))
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown())
    }
}

/// How requests leave this machine.
#[derive(Debug, Clone)]
pub(super) enum Way {
    /// Straight to the host.
    Direct,
    /// As the environment variables say.
    Environment,
    /// Through this proxy, whatever the environment says.
    Fixed(ProxyUrl),
}

impl Way {
    /// The proxy that a request for `url` goes through, without its password.
    pub(super) fn proxy_of(&self, url: &Url) -> Option<String> {
        match self {
            Self::Direct => None,
            Self::Fixed(proxy) => Some(proxy.shown()),
            Self::Environment => {
                let found = Matcher::from_env().intercept(&url.as_str().parse().ok()?)?;
                let uri = found.uri();
                Some(format!("{}://{}", uri.scheme_str()?, uri.authority()?))
            }
        }
    }
}

/// Refuses an environment that names a proxy which cannot be one: the HTTP library would pass it over, and requests
/// would go out directly that must not.
///
/// # Errors
/// [`Error::Usage`] naming the variable, not its value.
pub(super) fn check_environment() -> Result<()> {
    for name in VARIABLES {
        let value = std::env::var_os(name).filter(|value| !value.is_empty());
        let Some(value) = value else { continue };
        let judged = match value.to_str() {
            Some(text) => ProxyUrl::parse(text).map(drop),
            None => Err("it is not UTF-8".to_owned()),
        };
        judged.map_err(|why| Error::usage(format!("{name}: {why}")))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_proxy() {
        for text in [
            "http://p.example:3128",
            "https://p.example/",
            "p.example:3128",
            "socks5h://user:secret@p.example",
        ] {
            let proxy = ProxyUrl::parse(text).unwrap();
            assert!(!format!("{proxy:?}").contains("secret"), "{proxy:?}");
        }
        for text in [
            "",
            "http://",
            "ftp://p.example",
            "http://p.example/path",
            "http://p.example?x",
        ] {
            let error = ProxyUrl::parse(text).unwrap_err();
            assert!(!error.contains("example"), "{error}");
        }
    }
}
