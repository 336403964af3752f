//! Hosts that are asked only because a manifest names a URL there (`foreign`). Anyone can write a manifest: what it names, and
//! where that redirects, must not make this machine ask its own services, nor those that the configuration keeps out, nor tell
//! anybody who we are. Names are judged before a request. What a name leads to shows only when it is looked up for a
//! connection, so addresses are judged there, and one that changes between two looks is of no use.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::challenge::{is_loopback, is_metadata_address, is_metadata_service};
use super::options::ClientOptions;
use super::reference::canonical_host;

const HERE: &str = "which is this machine";
const METADATA: &str = "a cloud metadata service";

/// What holds for such a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Stranger {
    /// The registry of the manifest is on this machine: then what it names may be, too.
    pub(super) may_be_here: bool,
}

impl Stranger {
    /// Why `url`, which a manifest names, must not be asked.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn check_named(self, options: &ClientOptions, url: &Url) -> Result<(), &'static str> {
        self.check_redirect(options, url)?;
        match options.allow.is_empty() || options.allow.has(&name_of(url)) {
            true => Ok(()),
            false => Err("which allow and deny of the configuration keep out"),
        }
    }

    /// The same of a URL that such a host redirects to. As with registries, one that is allowed may redirect anywhere but to
    /// what is denied.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn check_redirect(self, options: &ClientOptions, url: &Url) -> Result<(), &'static str> {
        if is_metadata_service(url) {
            return Err(METADATA);
        }
        if is_here(url) && !self.may_be_here {
            return Err(HERE);
        }
        match options.deny.has(&name_of(url)) {
            true => Err("which allow and deny of the configuration keep out"),
            false => Ok(()),
        }
    }

    /// What looks up the name of the host at `authority` (`HOST[:PORT]`), where its addresses have to be judged.
    pub(super) fn resolver(self, authority: &str) -> Option<Arc<Elsewhere>> {
        let name = authority.rsplit_once(':').map_or(authority, |(name, _)| name);
        (!self.may_be_here).then(|| Arc::new(Elsewhere(name.to_owned())))
    }
}

/// The name by which `allow` and `deny` know the host of `url`: a dot at its end changes nothing.
fn name_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default().trim_end_matches('.');
    let name = match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    };
    canonical_host(&name).unwrap_or(name)
}

/// Whether `url` names this machine in any way that needs no look-up.
fn is_here(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            let last = name.rsplit('.').next().unwrap_or_default();
            last.eq_ignore_ascii_case("localhost")
        }
        Some(url::Host::Ipv4(address)) => is_own_address(address.into()),
        Some(url::Host::Ipv6(address)) => is_own_address(address.into()),
        None => is_loopback(url),
    }
}

/// Whether a connection to `address` ends on this machine, whatever its addresses are. "Unspecified" does, on Linux.
fn is_own_address(address: IpAddr) -> bool {
    let address = address.to_canonical();
    address.is_loopback() || address.is_unspecified()
}

/// Looks up names; of one name only the addresses that are neither this machine's nor a metadata service's. Other names that
/// its HTTP client asks for are those of proxies.
#[derive(Debug)]
pub(super) struct Elsewhere(String);

impl Resolve for Elsewhere {
    fn resolve(&self, name: Name) -> Resolving {
        let is_judged = name.as_str().eq_ignore_ascii_case(&self.0);
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let (good, bad): (Vec<SocketAddr>, Vec<SocketAddr>) = found.partition(|address| {
                let address = address.ip();
                !is_judged || !(is_own_address(address) || is_metadata_address(address))
            });
            if good.is_empty() && !bad.is_empty() {
                let why = "its address is that of this machine or of a cloud metadata service";
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, why).into());
            }
            Ok(Box::new(good.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::HostPatterns;

    const REMOTE: Stranger = Stranger { may_be_here: false };

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn this_machine_is_known_by_all_its_names() {
        let options = ClientOptions::default();
        for text in [
            "http://localhost:6443/x",
            "http://LOCALHOST./x",
            "http://api.localhost/x",
            "http://127.0.0.1/x",
            "http://0.0.0.0:8080/x",
            "http://0/x",
            "http://2130706433/x",
            "http://[::]/x",
            "http://[::1]/x",
            "http://[::ffff:127.0.0.1]/x",
            "http://[::ffff:0.0.0.0]/x",
        ] {
            assert_eq!(REMOTE.check_named(&options, &url(text)), Err(HERE), "{text}");
            assert_eq!(REMOTE.check_redirect(&options, &url(text)), Err(HERE), "{text}");
            let local = Stranger { may_be_here: true };
            assert_eq!(local.check_named(&options, &url(text)), Ok(()), "{text}");
        }
        for text in ["http://169.254.169.254/latest", "http://[fd00:ec2::254]/latest"] {
            assert_eq!(
                REMOTE.check_redirect(&options, &url(text)),
                Err(METADATA),
                "{text}"
            );
        }
        assert_eq!(
            REMOTE.check_named(&options, &url("http://localhost.example/")),
            Ok(())
        );
    }

    #[test]
    fn allow_is_about_what_is_named_and_deny_about_redirects_too() {
        let patterns = |text: &str| HostPatterns::new(&[text.to_owned()]);
        let options = ClientOptions {
            allow: patterns("*.example"),
            deny: patterns("b.example"),
            ..ClientOptions::default()
        };
        for (text, named, redirect) in [
            ("https://a.example/x", true, true),
            ("https://a.example.org/x", false, true),
            ("https://b.example/x", false, false),
            ("https://B.example./x", false, false),
        ] {
            assert_eq!(REMOTE.check_named(&options, &url(text)).is_ok(), named, "{text}");
            assert_eq!(
                REMOTE.check_redirect(&options, &url(text)).is_ok(),
                redirect,
                "{text}"
            );
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_here_leads_nowhere() {
        let resolve = async |authority: &str| {
            let resolver = REMOTE.resolver(authority).unwrap();
            let found = resolver.resolve("localhost".parse().unwrap()).await;
            found.map(Iterator::count).map_err(|error| error.to_string())
        };
        let why = resolve("LocalHost:5000").await.unwrap_err();
        assert!(why.contains("this machine"), "{why}");
        assert!(resolve("other.example").await.unwrap() > 0, "a proxy may be here");
        assert!(Stranger { may_be_here: true }.resolver("localhost").is_none());
    }
}
