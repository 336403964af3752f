//! Authorization: what a request carries so that a registry lets it pass. Nothing is sent unasked; once a host has
//! said what it wants, its other repositories are asked with the right token at once, which saves their 401 round
//! trip. A token is fetched by one request at a time however many wait for it, is used until shortly before it
//! expires, and is given up when a registry refuses it.
//!
//! Which credentials are used depends on the repository and changes with every login, so everything that was got with
//! some is filed under their fingerprint: after a logout, or a login as someone else, it is not found any more.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lru::LruCache;
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::HeaderValue;
use tokio::time::{Instant, timeout_at};

use super::challenge::{Challenge, is_metadata_service};
use super::credentials::{Credentials, Failure, Identity, Sources};
use super::host::Host;
use super::options::ClientOptions;
use super::retry::Attempts;
use super::secret::{Secret, authorization, redact};
use super::token::{self, Service};
use super::transport::Transport;
use crate::error::{Error, Result};

/// Hosts whose wishes are remembered.
const HOSTS_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Tokens kept: one for each repository in use.
const TOKENS_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// For so long a token service that refused is not asked again for the same with the same credentials: each further
/// refusal may count towards the lock of an account.
const REFUSED_FOR: Duration = Duration::from_secs(5);
/// Scopes that one token may be asked for, the union over several refusals.
const SCOPES_MAX: usize = 16;

/// What authorizes one request.
#[derive(Debug, Clone)]
pub(super) struct Authorization {
    pub(super) header: HeaderValue,
    /// Where the credentials came from, for `status`; `None` for a token that anyone gets.
    pub(super) source: Option<String>,
    /// The token's number, which tells it from those fetched later. `None`: credentials sent with each request.
    token: Option<u64>,
    /// Of the credentials.
    fingerprint: u64,
}

/// What a host wants.
#[derive(Clone)]
enum Wish {
    Basic,
    Token { realm: Url, service: String },
}

/// What a token is good for, and with which credentials it was got.
#[derive(PartialEq, Eq, Hash)]
struct TokenKey {
    host: String,
    realm: String,
    service: String,
    scopes: Vec<String>,
    fingerprint: u64,
}

#[derive(Debug, Default)]
struct Slot {
    current: Option<Current>,
    /// The last fetch that failed, for those who waited for it; if it was refused, for those who come soon after, too.
    failed: Option<(Instant, Error)>,
}

#[derive(Debug, Clone)]
struct Current {
    authorization: Authorization,
    renew_at: Instant,
}

/// Everything known about who may ask what.
pub(super) struct Auth {
    sources: Arc<Sources>,
    /// Mirrors get nothing that was given for the registries that they stand for.
    sources_of_mirrors: Arc<Sources>,
    wishes: Mutex<LruCache<String, Wish>>,
    tokens: Mutex<LruCache<TokenKey, Arc<tokio::sync::Mutex<Slot>>>>,
    /// Numbers the tokens.
    tokens_fetched: AtomicU64,
    /// The scopes that a registry asked for, by host and the scope that we would have asked for.
    scopes: Mutex<LruCache<(String, String), Vec<String>>>,
    /// Refresh tokens that a token service gave in place of those of the credentials, by realm and fingerprint.
    rotated: Mutex<LruCache<(String, u64), Secret>>,
}

/// The repository that a scope is for; none for the catalog's.
fn repository_of(scope: &str) -> &str {
    let rest = scope.strip_prefix("repository:");
    rest.and_then(|rest| rest.rsplit_once(':'))
        .map_or("", |(path, _)| path)
}

impl Auth {
    pub(super) fn new(options: &Arc<ClientOptions>) -> Self {
        Self {
            sources: Sources::new(options),
            sources_of_mirrors: Sources::new(&Arc::new(options.without_given_credentials())),
            wishes: Mutex::new(LruCache::new(HOSTS_MAX)),
            tokens: Mutex::new(LruCache::new(TOKENS_MAX)),
            tokens_fetched: AtomicU64::new(0),
            scopes: Mutex::new(LruCache::new(TOKENS_MAX)),
            rotated: Mutex::new(LruCache::new(HOSTS_MAX)),
        }
    }

    /// What a request for `scope` to `host` should carry, as far as the host's wishes are known.
    ///
    /// # Errors
    /// [`Error::NoCredentials`], and those of fetching a token.
    pub(super) async fn authorize(
        &self,
        transport: &Transport,
        host: &Arc<Host>,
        scope: &str,
        attempts: &mut Attempts,
    ) -> Result<Option<Authorization>> {
        let wish = self.wishes.lock().get(host.name()).cloned();
        match wish {
            None => Ok(None),
            Some(Wish::Basic) => Ok(basic(&*self.look_up(host, scope, false, attempts).await?)),
            Some(Wish::Token { realm, service }) => {
                let service = Service {
                    realm,
                    service,
                    scopes: self.scopes_of(host, scope),
                };
                self.token(transport, host, scope, &service, None, attempts).await
            }
        }
    }

    /// What to send after `host` refused a request for `scope` that carried `sent`. `None` means that there is
    /// nothing better.
    ///
    /// # Errors
    /// [`Error::Denied`] if the host's wish is not one to follow, [`Error::NoCredentials`], and those of fetching a
    /// token.
    pub(super) async fn renew(
        &self,
        transport: &Transport,
        host: &Arc<Host>,
        scope: &str,
        challenge: Challenge,
        sent: Option<&Authorization>,
        attempts: &mut Attempts,
    ) -> Result<Option<Authorization>> {
        match challenge {
            Challenge::Basic => {
                self.wishes.lock().put(host.name().to_owned(), Wish::Basic);
                let found = self.look_up(host, scope, sent.is_some(), attempts).await?;
                let unchanged = |known: &Authorization| sent.is_some_and(|sent| sent.header == known.header);
                Ok(basic(&found).filter(|known| !unchanged(known)))
            }
            Challenge::Bearer {
                realm,
                service,
                scopes,
                insufficient_scope,
            } => {
                check_realm(transport, host, &attempts.what, &realm)?;
                let wish = Wish::Token {
                    realm: realm.clone(),
                    service: service.clone(),
                };
                self.wishes.lock().put(host.name().to_owned(), wish);
                let service = Service {
                    realm,
                    service,
                    scopes: self.widen(host, scope, scopes, insufficient_scope),
                };
                self.token(transport, host, scope, &service, sent, attempts).await
            }
        }
    }

    /// What to send after `host` forbade a request for `scope` that carried `sent`: only other credentials than those
    /// can help. Some registries say so of a password that has expired.
    ///
    /// # Errors
    /// Those of fetching a token.
    pub(super) async fn reconsider(
        &self,
        transport: &Transport,
        host: &Arc<Host>,
        scope: &str,
        sent: &Authorization,
        attempts: &mut Attempts,
    ) -> Result<Option<Authorization>> {
        match self.look_up(host, scope, true, attempts).await {
            Ok(found) if found.fingerprint != sent.fingerprint => {
                self.authorize(transport, host, scope, attempts).await
            }
            // The refusal says more than a helper that fails now.
            Ok(_) | Err(_) => Ok(None),
        }
    }

    /// Which credentials a message should name after the host refused a request for `scope`. They are looked up anew
    /// before their next use: whoever reads the message may log in.
    pub(super) async fn describe(&self, host: &Host, scope: &str) -> String {
        let path = repository_of(scope);
        let sources = self.sources(host);
        let found = sources.find(host.name(), path, false).await;
        sources.doubt(host.name(), path);
        match found {
            Ok(found) => found.describe(),
            Err(Failure(why)) => why,
        }
    }

    fn sources(&self, host: &Host) -> &Arc<Sources> {
        match host.is_mirror() {
            true => &self.sources_of_mirrors,
            false => &self.sources,
        }
    }

    fn scopes_of(&self, host: &Host, scope: &str) -> Vec<String> {
        let key = (host.name().to_owned(), scope.to_owned());
        let known = self.scopes.lock().get(&key).cloned();
        known.unwrap_or_else(|| vec![scope.to_owned()])
    }

    /// Takes up the scopes that a registry asked for: they come first, and what was asked for before stays if the
    /// registry only wants more.
    fn widen(&self, host: &Host, scope: &str, asked: Vec<String>, insufficient: bool) -> Vec<String> {
        if asked.is_empty() {
            return self.scopes_of(host, scope);
        }
        let mut scopes = asked;
        if insufficient {
            scopes.extend(self.scopes_of(host, scope));
        }
        let mut seen = std::collections::HashSet::new();
        scopes.retain(|scope| seen.insert(scope.clone()));
        scopes.truncate(SCOPES_MAX);
        let key = (host.name().to_owned(), scope.to_owned());
        self.scopes.lock().put(key, scopes.clone());
        scopes
    }

    /// The credentials for a request for `scope`.
    async fn look_up(
        &self,
        host: &Host,
        scope: &str,
        in_doubt: bool,
        attempts: &Attempts,
    ) -> Result<Arc<Credentials>> {
        let finding = self
            .sources(host)
            .find(host.name(), repository_of(scope), in_doubt);
        match timeout_at(attempts.deadline(), finding).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(Failure(why))) => {
                host.note_credentials(Some(&why));
                Err(Error::no_credentials(&attempts.what, why))
            }
            Err(_) => Err(attempts.timed_out()),
        }
    }

    /// A token for a request for `scope`, other than the one that was `refused`; `None` if there is no other.
    async fn token(
        &self,
        transport: &Transport,
        host: &Arc<Host>,
        scope: &str,
        service: &Service,
        refused: Option<&Authorization>,
        attempts: &mut Attempts,
    ) -> Result<Option<Authorization>> {
        let found = self.look_up(host, scope, refused.is_some(), attempts).await?;
        let error = match self
            .token_with(&found, transport, host, service, refused, attempts)
            .await
        {
            Err(error @ Error::Denied { .. }) => error,
            result => return result,
        };
        // What was remembered may have expired, or somebody has logged in meanwhile.
        let anew = self.look_up(host, scope, true, attempts).await?;
        if anew.fingerprint != found.fingerprint {
            return self
                .token_with(&anew, transport, host, service, refused, attempts)
                .await;
        }
        self.sources(host).doubt(host.name(), repository_of(scope));
        Err(error)
    }

    /// [`Self::token`] with certain credentials, from memory if there is a good one.
    async fn token_with(
        &self,
        found: &Credentials,
        transport: &Transport,
        host: &Arc<Host>,
        service: &Service,
        refused: Option<&Authorization>,
        attempts: &mut Attempts,
    ) -> Result<Option<Authorization>> {
        if let Identity::Bearer(token) = &found.identity {
            let own = bearer(found, token, service, None)?;
            let is_refused = refused.is_some_and(|refused| refused.header == own.header);
            return Ok((!is_refused).then_some(own));
        }
        let slot = self.slot(host, service, found);
        let asked = Instant::now();
        let locked = timeout_at(attempts.deadline(), slot.lock()).await;
        let mut slot = locked.map_err(|_| attempts.timed_out())?;
        if let Some((when, error)) = &slot.failed {
            match error {
                Error::Denied { why, .. } if when.elapsed() < REFUSED_FOR => {
                    return Err(Error::denied(side_name(attempts), why));
                }
                _ if *when >= asked => return Err(error.clone()),
                _ => {}
            }
        }
        if let Some(current) = &slot.current {
            let was_refused = refused.is_some_and(|refused| refused.token == current.authorization.token);
            if !was_refused && Instant::now() < current.renew_at {
                return Ok(Some(current.authorization.clone()));
            }
        }
        slot.current = None;
        match self.fetch(transport, host, service, found, attempts).await {
            Ok(current) => {
                let authorization = current.authorization.clone();
                slot.current = Some(current);
                slot.failed = None;
                Ok(Some(authorization))
            }
            Err(error) => {
                // Running out of time is the asker's own failure: others may have more.
                if !matches!(error, Error::Timeout { .. }) {
                    slot.failed = Some((Instant::now(), error.clone()));
                }
                Err(error)
            }
        }
    }

    /// The place of the token for that service and those scopes.
    fn slot(&self, host: &Host, service: &Service, found: &Credentials) -> Arc<tokio::sync::Mutex<Slot>> {
        let mut scopes = service.scopes.clone();
        scopes.sort_unstable();
        let key = TokenKey {
            host: host.name().to_owned(),
            realm: service.realm.to_string(),
            service: service.service.clone(),
            scopes,
            fingerprint: found.fingerprint,
        };
        Arc::clone(self.tokens.lock().get_or_insert(key, Arc::default))
    }

    async fn fetch(
        &self,
        transport: &Transport,
        host: &Arc<Host>,
        service: &Service,
        found: &Credentials,
        attempts: &mut Attempts,
    ) -> Result<Current> {
        let asked = Instant::now();
        host.note_credentials(found.sent().as_deref());
        let key = (service.realm.to_string(), found.fingerprint);
        let rotated = || self.rotated.lock().get(&key).cloned();
        let mut side = attempts.side(side_name(attempts));
        let token = token::fetch(transport, host, service, found, &rotated, &mut side).await?;
        if let Some(refresh) = token.refresh {
            self.rotated.lock().put(key.clone(), refresh);
        }
        let number = self.tokens_fetched.fetch_add(1, Ordering::Relaxed);
        Ok(Current {
            authorization: bearer(found, &token.secret, service, Some(number))?,
            renew_at: asked + token.good_for,
        })
    }
}

/// How errors name the request for the token of an operation.
fn side_name(attempts: &Attempts) -> String {
    format!("token for {}", attempts.what)
}

fn bearer(
    found: &Credentials,
    token: &Secret,
    service: &Service,
    number: Option<u64>,
) -> Result<Authorization> {
    let header = authorization("Bearer", token.expose()).ok_or_else(|| {
        let what = format!("token of {}", redact(&service.realm));
        Error::malformed(what, "it cannot be sent in a header")
    })?;
    Ok(Authorization {
        header,
        source: found.sent(),
        token: number,
        fingerprint: found.fingerprint,
    })
}

/// User and password as a header, if there are such. Where a refresh token finds no form to be posted to, it is the
/// password, unless there is one of its own.
pub(super) fn basic(found: &Credentials) -> Option<Authorization> {
    let (user, password) = match &found.identity {
        Identity::Password { user, password } => (user, password),
        Identity::Refresh {
            user,
            token,
            password,
        } => (user, password.as_ref().unwrap_or(token)),
        Identity::Anonymous | Identity::Bearer(_) => return None,
    };
    let pair = STANDARD.encode(format!("{user}:{}", password.expose()));
    Some(Authorization {
        header: authorization("Basic", &pair)?,
        source: found.sent(),
        token: None,
        fingerprint: found.fingerprint,
    })
}

/// A realm is chosen by a foreign server and gets our credentials: it must be reached by TLS, be on this machine, or
/// be a host that plain HTTP was asked for, and it must not be a cloud's metadata service.
fn check_realm(transport: &Transport, host: &Host, what: &str, realm: &Url) -> Result<()> {
    let shown = redact(realm);
    if is_metadata_service(realm) {
        let why =
            format!("the registry names {shown} as its token service, which is a cloud metadata service");
        return Err(Error::denied(what, why));
    }
    let safe = match realm.scheme() {
        "https" => true,
        "http" => transport.plain_allowed(host, realm),
        _ => false,
    };
    match safe {
        true => Ok(()),
        false => Err(Error::denied(
            what,
            format!("the registry's token service {shown} is not reached by https"),
        )),
    }
}
