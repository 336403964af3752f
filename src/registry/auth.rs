//! Authorization: what a request carries so that a registry lets it pass. Nothing is sent unasked; once a host has
//! said what it wants, its other repositories are asked with the right token at once, which saves their 401 round
//! trip. A token is fetched by one request at a time however many wait for it, is used until shortly before it
//! expires, and is given up when a registry refuses it.

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
use super::credentials::{self, Credentials, Identity};
use super::host::Host;
use super::retry::Attempts;
use super::secret::{authorization, redact};
use super::token::{self, Service};
use super::transport::Transport;
use crate::error::{Error, Result};

/// Hosts whose wishes are remembered.
const HOSTS_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Tokens kept: one for each repository in use.
const TOKENS_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// Scopes that one token may be asked for, the union over several refusals.
const SCOPES_MAX: usize = 16;

/// What authorizes one request.
#[derive(Debug, Clone)]
pub(super) struct Authorization {
    pub(super) header: HeaderValue,
    /// Where the credentials came from, for messages.
    pub(super) source: String,
    /// The token's number, which tells it from those fetched later. `None`: user and password, sent with each request.
    token: Option<u64>,
}

/// What a host wants.
#[derive(Clone)]
enum Wish {
    Basic(Option<Authorization>),
    Token { realm: Url, service: String },
}

/// Host, realm, service and scopes: what a token is good for.
type TokenKey = (String, String, String, Vec<String>);

#[derive(Debug, Default)]
struct Slot {
    current: Option<Current>,
    /// The last fetch that failed, for those who waited for it.
    failed: Option<(Instant, Error)>,
}

#[derive(Debug, Clone)]
struct Current {
    authorization: Authorization,
    renew_at: Instant,
}

/// Everything known about who may ask what.
pub(super) struct Auth {
    wishes: Mutex<LruCache<String, Wish>>,
    tokens: Mutex<LruCache<TokenKey, Arc<tokio::sync::Mutex<Slot>>>>,
    /// Numbers the tokens.
    tokens_fetched: AtomicU64,
    /// The scopes that a registry asked for, by host and the scope that we would have asked for.
    scopes: Mutex<LruCache<(String, String), Vec<String>>>,
}

impl Auth {
    pub(super) fn new() -> Self {
        Self {
            wishes: Mutex::new(LruCache::new(HOSTS_MAX)),
            tokens: Mutex::new(LruCache::new(TOKENS_MAX)),
            tokens_fetched: AtomicU64::new(0),
            scopes: Mutex::new(LruCache::new(TOKENS_MAX)),
        }
    }

    /// What a request for `scope` to `host` should carry, as far as the host's wishes are known.
    ///
    /// # Errors
    /// Those of fetching a token.
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
            Some(Wish::Basic(known)) => Ok(known),
            Some(Wish::Token { realm, service }) => {
                let scopes = self.scopes_of(host, scope);
                self.token(transport, host, (realm, service, scopes), None, attempts)
                    .await
                    .map(Some)
            }
        }
    }

    /// What to send after `host` refused a request for `scope` that carried `sent`. `None` means that there is
    /// nothing better.
    ///
    /// # Errors
    /// [`Error::Denied`] if the host's wish is not one to follow, and those of fetching a token.
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
                let found = look_up(transport, host).await;
                let known = basic(&found);
                self.wishes
                    .lock()
                    .put(host.name().to_owned(), Wish::Basic(known.clone()));
                let unchanged = |known: &Authorization| sent.is_some_and(|sent| sent.header == known.header);
                Ok(known.filter(|known| !unchanged(known)))
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
                let scopes = self.widen(host, scope, scopes, insufficient_scope);
                let key = (realm, service, scopes);
                self.token(transport, host, key, sent, attempts).await.map(Some)
            }
        }
    }

    /// Which credentials a message should name after the host refused.
    pub(super) async fn describe(&self, transport: &Transport, host: &Arc<Host>) -> String {
        look_up(transport, host).await.describe()
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

    /// The token for that service and those scopes, from memory if it is good and not the one that was `refused`.
    async fn token(
        &self,
        transport: &Transport,
        host: &Arc<Host>,
        (realm, service, scopes): (Url, String, Vec<String>),
        refused: Option<&Authorization>,
        attempts: &mut Attempts,
    ) -> Result<Authorization> {
        let mut sorted = scopes.clone();
        sorted.sort_unstable();
        let key = (host.name().to_owned(), realm.to_string(), service.clone(), sorted);
        let slot = {
            let mut tokens = self.tokens.lock();
            Arc::clone(tokens.get_or_insert(key, Arc::default))
        };
        let asked = Instant::now();
        let locked = timeout_at(attempts.deadline(), slot.lock()).await;
        let mut slot = locked.map_err(|_| attempts.timed_out())?;
        if let Some((when, error)) = &slot.failed
            && *when >= asked
        {
            return Err(error.clone());
        }
        if let Some(current) = &slot.current {
            let was_refused = refused.is_some_and(|refused| refused.token == current.authorization.token);
            if !was_refused && Instant::now() < current.renew_at {
                return Ok(current.authorization.clone());
            }
        }
        slot.current = None;
        let service = Service {
            realm,
            service,
            scopes,
        };
        match fetch(transport, host, &service, attempts).await {
            Ok(fetched) => {
                let authorization = Authorization {
                    token: Some(self.tokens_fetched.fetch_add(1, Ordering::Relaxed)),
                    ..fetched.authorization
                };
                slot.current = Some(Current {
                    authorization: authorization.clone(),
                    renew_at: fetched.renew_at,
                });
                slot.failed = None;
                Ok(authorization)
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
}

async fn fetch(
    transport: &Transport,
    host: &Arc<Host>,
    service: &Service,
    attempts: &mut Attempts,
) -> Result<Current> {
    let asked = Instant::now();
    let found = look_up(transport, host).await;
    let source = found.describe();
    host.note_credentials(&source);
    let malformed = || {
        Error::malformed(
            format!("token of {}", redact(&service.realm)),
            "it cannot be sent in a header",
        )
    };
    if let Identity::Bearer(token) = &found.identity {
        let header = authorization("Bearer", token.expose()).ok_or_else(malformed)?;
        return Ok(Current {
            authorization: Authorization {
                header,
                source,
                token: None,
            },
            renew_at: asked + Duration::from_secs(3600),
        });
    }
    let mut side = attempts.side(format!("token for {}", attempts.what));
    let token = token::fetch(transport, host, service, &found, &mut side).await?;
    let header = authorization("Bearer", token.secret.expose()).ok_or_else(malformed)?;
    Ok(Current {
        authorization: Authorization {
            header,
            source,
            token: None,
        },
        renew_at: asked + token.good_for,
    })
}

/// Credentials are looked up off the async threads: it reads a file, and helpers may take their time.
async fn look_up(transport: &Transport, host: &Arc<Host>) -> Credentials {
    let (options, name) = (transport.options_for(host), host.name().to_owned());
    let found = tokio::task::spawn_blocking(move || credentials::find(&options, &name)).await;
    found.unwrap_or_else(|_| Credentials::none("looking for them failed"))
}

/// User and password as a header, if there are such. Where a refresh token finds no form to be posted to, it is the
/// password.
pub(super) fn basic(found: &Credentials) -> Option<Authorization> {
    let (user, password) = match &found.identity {
        Identity::Password { user, password } => (user, password),
        Identity::Refresh { user, token } => (user, token),
        Identity::Anonymous | Identity::Bearer(_) => return None,
    };
    let pair = STANDARD.encode(format!("{user}:{}", password.expose()));
    Some(Authorization {
        header: authorization("Basic", &pair)?,
        source: found.describe(),
        token: None,
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
