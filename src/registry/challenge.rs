//! What a registry answers to a request without (good) authorization: the `WWW-Authenticate` header, by RFC 7235 and
//! the distribution project's token specification. The realm in it is chosen by a foreign server and decides where
//! credentials go, so it is judged here.

use std::net::{IpAddr, Ipv6Addr};

use http_auth::ChallengeParser;
use reqwest::Url;
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use url::Host;

/// Scopes that one challenge may name.
const SCOPES_MAX: usize = 8;
/// Bytes that a realm, service or scope may have.
const PARAMETER_BYTES_MAX: usize = 2048;

/// How a registry wants to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with every request.
    Basic,
    /// A token from a token service.
    Bearer {
        /// Where tokens are.
        realm: Url,
        /// The name of the registry there.
        service: String,
        /// What the token must allow, in the registry's words; may be empty.
        scopes: Vec<String>,
        /// The token that was sent is good but allows too little.
        insufficient_scope: bool,
    },
}

/// The best challenge among those of an answer, Bearer before Basic; `None` if there is none that we can meet.
pub(super) fn parse(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(text) = value.to_str() else { continue };
        for challenge in ChallengeParser::new(text).map_while(Result::ok) {
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                if let Some(bearer) = bearer(&challenge) {
                    return Some(bearer);
                }
            } else if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Challenge::Basic);
            }
        }
    }
    basic
}

fn bearer(challenge: &http_auth::ChallengeRef<'_>) -> Option<Challenge> {
    let parameter = |name: &str| {
        challenge
            .params
            .iter()
            .find(|(key, value)| {
                key.eq_ignore_ascii_case(name) && value.unescaped_len() <= PARAMETER_BYTES_MAX
            })
            .map(|(_, value)| value.to_unescaped())
    };
    let mut realm = Url::parse(&parameter("realm")?).ok()?;
    // Credentials of its own in a realm are nothing that any registry has, and would be sent instead of ours.
    realm.set_username("").ok()?;
    realm.set_password(None).ok()?;
    let scopes = parameter("scope").unwrap_or_default();
    Some(Challenge::Bearer {
        realm,
        service: parameter("service").unwrap_or_default(),
        scopes: scopes
            .split_ascii_whitespace()
            .take(SCOPES_MAX)
            .map(str::to_owned)
            .collect(),
        insufficient_scope: parameter("error").is_some_and(|error| error == "insufficient_scope"),
    })
}

/// Whether `url` names this machine: then nobody listens in between.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => is_loopback_name(name),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => is_loopback_ip(IpAddr::V6(address)),
        None => false,
    }
}

/// Whether a host name is the loopback's.
pub(super) fn is_loopback_name(name: &str) -> bool {
    name.eq_ignore_ascii_case("localhost")
}

fn is_loopback_ip(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Whether `url` names a cloud's metadata service (169.254.0.0/16, fd00:ec2::254 and their names). A foreign server
/// that names one as its realm or redirects there wants this machine's role, not a token.
pub(super) fn is_metadata_service(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => is_metadata_address(address.into()),
        Some(Host::Ipv6(address)) => is_metadata_address(address.into()),
        Some(Host::Domain(name)) => name
            .trim_end_matches('.')
            .eq_ignore_ascii_case("metadata.google.internal"),
        None => false,
    }
}

/// Whether `address` is one of those.
pub(super) fn is_metadata_address(address: IpAddr) -> bool {
    const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254);
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address == METADATA_V6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use reqwest::header::HeaderValue;

    fn parsed(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        parse(&headers)
    }

    fn bearer_of(realm: &str, service: &str, scopes: &[&str], insufficient_scope: bool) -> Challenge {
        Challenge::Bearer {
            realm: Url::parse(realm).unwrap(),
            service: service.to_owned(),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
            insufficient_scope,
        }
    }

    #[test]
    fn challenges_as_registries_write_them() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/debian:pull""#;
        let expected = bearer_of(
            "https://auth.docker.io/token",
            "registry.docker.io",
            &["repository:library/debian:pull"],
            false,
        );
        assert_eq!(parsed(&[hub]), Some(expected));
        let two = r#"bearer Realm="http://localhost/t", scope="repository:a:pull repository:b:pull,push", error="insufficient_scope""#;
        let expected = bearer_of(
            "http://localhost/t",
            "",
            &["repository:a:pull", "repository:b:pull,push"],
            true,
        );
        assert_eq!(parsed(&[two]), Some(expected));
        assert_eq!(parsed(&["Basic realm=\"x\""]), Some(Challenge::Basic));
    }

    #[test]
    fn bearer_is_preferred_wherever_it_stands() {
        let bearer = bearer_of("https://a.example/t", "s", &[], false);
        let text = r#"Bearer realm="https://a.example/t",service="s""#;
        assert_eq!(parsed(&["Basic realm=\"x\"", text]), Some(bearer.clone()));
        assert_eq!(parsed(&[&format!("Basic realm=\"x\", {text}")]), Some(bearer));
    }

    #[test]
    fn what_cannot_be_met_is_no_challenge() {
        for text in [
            "",
            "Negotiate",
            "Bearer",
            "Bearer realm=\"not a url\"",
            "Bearer service=\"x\"",
            "\"",
        ] {
            assert_eq!(parsed(&[text]), None, "{text}");
        }
    }

    #[test]
    fn metadata_services_are_recognised_in_every_spelling() {
        for url in [
            "http://169.254.169.254/latest",
            "http://2852039166/",
            "http://[::ffff:169.254.170.2]/",
            "http://[fd00:ec2::254]/",
            "http://metadata.google.internal./x",
        ] {
            assert!(is_metadata_service(&Url::parse(url).unwrap()), "{url}");
        }
        assert!(!is_metadata_service(
            &Url::parse("https://auth.docker.io/token").unwrap()
        ));
    }

    #[test]
    fn loopback_is_this_machine_only() {
        for url in [
            "http://localhost:1/",
            "http://127.9.9.9/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
        ] {
            assert!(is_loopback(&Url::parse(url).unwrap()), "{url}");
        }
        for url in ["http://localhost.evil.example/", "http://10.0.0.1/"] {
            assert!(!is_loopback(&Url::parse(url).unwrap()), "{url}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_survived(text in "[ -~]{0,200}") {
            let _ = parsed(&[&text]);
        }
    }
}
