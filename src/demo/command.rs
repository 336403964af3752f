//! What `registryfs demo-registry` runs.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::error::{Error, Result};

use super::behaviour::{Account, Auth, Behaviour, Redirect, TokenAuth};
use super::registry::{DemoRegistry, Listen};
use super::sample::sample_content;

/// The options of `registryfs demo-registry`.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// `--listen`: a loopback address; port 0 is any free one.
    pub listen: SocketAddr,
    /// `--latency-ms`: waited before each answer.
    pub latency_ms: u64,
    /// `--rate-limit`: of all connections together, in bytes a second; 0 is no limit.
    pub rate_limit_bytes_per_s: u64,
    /// `--failure-rate`: the share of requests that fail, 0 to 1.
    pub failure_rate: f64,
    /// `--auth`.
    pub auth: DemoAuth,
    /// `--user` and `--password`. Without them `token` lets everybody pull, and `basic` is refused.
    pub account: Option<Account>,
    /// `--redirect`: blobs are answered by redirects to signed URLs on another port.
    pub redirect: bool,
    /// `--seed`: decides which requests fail.
    pub seed: u64,
}

impl Default for DemoOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            latency_ms: 0,
            rate_limit_bytes_per_s: 0,
            failure_rate: 0.0,
            auth: DemoAuth::None,
            account: None,
            redirect: false,
            seed: 0,
        }
    }
}

/// The values of `--auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DemoAuth {
    /// `none`: everybody may do everything.
    #[default]
    None,
    /// `basic`: the account, by HTTP basic authentication.
    Basic,
    /// `token`: the distribution token flow.
    Token,
}

impl DemoOptions {
    /// The behaviour that the options ask for.
    ///
    /// # Errors
    /// [`Error::Usage`] for a failure rate outside of 0 to 1, and for `basic` without an account.
    pub fn behaviour(&self) -> Result<Behaviour> {
        if !(0.0..=1.0).contains(&self.failure_rate) {
            return Err(Error::usage(format!(
                "--failure-rate {}: a share from 0 to 1 is needed",
                self.failure_rate
            )));
        }
        let auth = match (self.auth, &self.account) {
            (DemoAuth::None, _) => Auth::None,
            (DemoAuth::Basic, Some(account)) => Auth::Basic(account.clone()),
            (DemoAuth::Basic, None) => {
                return Err(Error::usage("--auth basic needs --user and --password"));
            }
            (DemoAuth::Token, Some(account)) => Auth::Token(TokenAuth {
                anonymous_pull: false,
                ..TokenAuth::new(account.clone())
            }),
            (DemoAuth::Token, None) => Auth::Token(TokenAuth::new(Account::new("demo", "demo"))),
        };
        Ok(Behaviour {
            latency: Duration::from_millis(self.latency_ms),
            total_bytes_per_s: self.rate_limit_bytes_per_s,
            failure_rate: self.failure_rate,
            seed: self.seed,
            auth,
            redirect: self.redirect.then(Redirect::default),
            ..Behaviour::default()
        })
    }
}

/// Runs a registry with the made-up content until `until` is done. `announce` gets the host, such as
/// `127.0.0.1:40123`, once connections are accepted.
///
/// # Errors
/// [`Error::Usage`] for options that cannot be meant, [`Error::Busy`] or [`Error::Io`] when the address cannot
/// be had.
pub async fn serve(
    options: &DemoOptions,
    announce: impl FnOnce(&str),
    until: impl Future<Output = ()>,
) -> Result<()> {
    let listen = Listen {
        address: options.listen,
        tls: None,
    };
    let registry = DemoRegistry::start_on(&listen, sample_content()?, options.behaviour()?)?;
    announce(&registry.host());
    until.await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_cannot_be_meant_are_refused() {
        let refused = |options: DemoOptions| options.behaviour().unwrap_err().exit_code();
        for failure_rate in [-0.1, 1.1, f64::NAN] {
            let options = DemoOptions {
                failure_rate,
                ..DemoOptions::default()
            };
            assert_eq!(refused(options), 2, "{failure_rate}");
        }
        let options = DemoOptions {
            auth: DemoAuth::Basic,
            ..DemoOptions::default()
        };
        assert_eq!(refused(options), 2);
    }

    #[test]
    fn an_account_closes_the_registry_to_the_anonymous() {
        let anonymous_pull = |account| {
            let options = DemoOptions {
                auth: DemoAuth::Token,
                account,
                ..DemoOptions::default()
            };
            match options.behaviour().unwrap().auth {
                Auth::Token(auth) => auth.anonymous_pull,
                other => panic!("{other:?}"),
            }
        };
        assert!(anonymous_pull(None));
        assert!(!anonymous_pull(Some(Account::new("u", "p"))));
    }

    #[tokio::test]
    async fn the_registry_answers_once_announced_and_ends_when_told() {
        let (sender, announced) = tokio::sync::oneshot::channel();
        let announce = |host: &str| sender.send(host.to_owned()).unwrap();
        let until = async {
            let host = announced.await.unwrap();
            assert!(std::net::TcpStream::connect(host).is_ok());
        };
        serve(&DemoOptions::default(), announce, until).await.unwrap();
    }
}
