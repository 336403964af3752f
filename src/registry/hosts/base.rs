//! Where an endpoint is: the URL under which a registry's API lives, as `hosts.toml` and our configuration write it.

use reqwest::Url;

use super::super::host::Scheme;
use super::super::reference::canonical_host;
use super::super::secret::authority;

/// The address of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registry) struct Base {
    /// `None` where the text named none: then the rules for a bare host hold.
    pub(in crate::registry) scheme: Option<Scheme>,
    /// `HOST[:PORT]` in lower case, without the scheme's default port.
    pub(in crate::registry) host: String,
    /// The path that stands for `/v2`, without a slash at its end.
    pub(in crate::registry) path: String,
}

impl Base {
    /// The registry with the canonical name `host`, where its name says.
    pub(in crate::registry) fn of_registry(host: &str) -> Self {
        Self {
            scheme: None,
            host: host.to_owned(),
            path: "/v2".to_owned(),
        }
    }

    /// Reads `[http[s]://]HOST[:PORT][/PATH]`. `/v2` is added to a path that does not end in it, unless
    /// `override_path` says that the path is whole.
    ///
    /// # Errors
    /// What is wrong, without quoting user information.
    pub(in crate::registry) fn parse(text: &str, override_path: bool) -> Result<Self, String> {
        let (scheme, url) = match text.split_once("://") {
            None => (None, Url::parse(&format!("https://{text}"))),
            Some((scheme, _)) => {
                let scheme = match scheme.to_ascii_lowercase().as_str() {
                    "https" => Scheme::Https,
                    "http" => Scheme::Http,
                    _ => return Err("a registry is spoken to by http or https".to_owned()),
                };
                (Some(scheme), Url::parse(text))
            }
        };
        let url = url.map_err(|error| format!("not a URL of a registry: {error}"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("user and password do not belong into the URL of a registry".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() || !url.has_host() {
            return Err("the URL of a registry is SCHEME://HOST[:PORT][/PATH]".to_owned());
        }
        let path = url.path().trim_end_matches('/');
        let path = match override_path || path.ends_with("/v2") {
            true => path.to_owned(),
            false => format!("{path}/v2"),
        };
        Ok(Self {
            scheme,
            host: authority(&url),
            path,
        })
    }

    /// The name under which credentials for it are looked up, and by which it is the same as a registry.
    pub(in crate::registry) fn name(&self, registry: &str) -> String {
        let canonical = canonical_host(&self.host).unwrap_or_else(|_| self.host.clone());
        // What was meant for https must not go to the same host's plain port.
        match self.scheme {
            Some(Scheme::Http) if canonical != registry && !has_port(&canonical) => format!("{canonical}:80"),
            _ => canonical,
        }
    }
}

fn has_port(host: &str) -> bool {
    host.rsplit_once(':')
        .is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (Option<Scheme>, String, String) {
        let base = Base::parse(text, false).unwrap();
        (base.scheme, base.host, base.path)
    }

    #[test]
    fn addresses_as_users_write_them() {
        let expected = |scheme, host: &str, path: &str| (scheme, host.to_owned(), path.to_owned());
        let https = Some(Scheme::Https);
        assert_eq!(parsed("https://m.example"), expected(https, "m.example", "/v2"));
        assert_eq!(
            parsed("https://m.example:443/"),
            expected(https, "m.example", "/v2")
        );
        assert_eq!(
            parsed("https://M.example/us/"),
            expected(https, "m.example", "/us/v2")
        );
        assert_eq!(
            parsed("https://m.example/v2"),
            expected(https, "m.example", "/v2")
        );
        let http = Some(Scheme::Http);
        assert_eq!(
            parsed("http://10.0.0.1:5000"),
            expected(http, "10.0.0.1:5000", "/v2")
        );
        assert_eq!(
            parsed("httpbin.example:5000"),
            expected(None, "httpbin.example:5000", "/v2")
        );
        let whole = Base::parse("https://m.example/api/docker/", true).unwrap();
        assert_eq!(whole.path, "/api/docker");
        assert_eq!(Base::parse("https://m.example", true).unwrap().path, "");
    }

    #[test]
    fn what_is_no_address() {
        for text in [
            "",
            "https://",
            "ftp://m.example",
            "https://u:pw@m.example",
            "https://m.example?x=1",
        ] {
            let error = Base::parse(text, false).unwrap_err();
            assert!(!error.contains("pw"), "{error}");
        }
    }

    #[test]
    fn one_name_for_one_holder_of_credentials() {
        let name = |text: &str, registry: &str| Base::parse(text, false).unwrap().name(registry);
        assert_eq!(name("https://registry-1.docker.io", "docker.io"), "docker.io");
        assert_eq!(name("https://m.example", "docker.io"), "m.example");
        assert_eq!(name("http://m.example", "docker.io"), "m.example:80");
        assert_eq!(name("http://m.example", "m.example"), "m.example");
        assert_eq!(name("http://m.example:5000", "docker.io"), "m.example:5000");
    }
}
