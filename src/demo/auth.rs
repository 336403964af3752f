//! Who may do what in the demo registry: basic authentication, and the token flow with its GET and POST forms.
//! Tokens are opaque, live in memory and are bounded in number.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::StatusCode;
use hyper::header::{self, HeaderMap};

use crate::digest::Digest;

use super::answer::Answer;
use super::behaviour::{Account, Auth, TokenAuth, TokenSpelling};
use super::date;

/// The service that tokens are for.
pub(super) const SERVICE: &str = "demo-registry";
/// Most tokens that are remembered; the oldest are forgotten first.
const TOKENS_MAX: usize = 10_000;
/// Most scopes of one token request.
const SCOPES_MAX: usize = 100;

/// What a request needs to be allowed to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    /// `repository:NAME` or `registry:catalog`.
    pub(super) resource: String,
    /// `pull`, `push` or `*`.
    pub(super) actions: &'static [&'static str],
}

impl Need {
    fn scope(&self) -> String {
        format!("{}:{}", self.resource, self.actions.join(","))
    }
}

/// The tokens given so far.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    given: HashMap<String, Grant>,
    order: VecDeque<String>,
    count: u64,
}

#[derive(Debug)]
struct Grant {
    /// Resource and action.
    allowed: Vec<(String, String)>,
    expires: Instant,
}

impl Tokens {
    /// Revokes everything.
    pub(super) fn clear(&mut self) {
        self.given.clear();
        self.order.clear();
    }

    fn give(&mut self, seed: u64, allowed: Vec<(String, String)>, lifetime: Duration) -> String {
        self.count += 1;
        let token = Digest::of(format!("token {seed} {}", self.count).as_bytes()).hex();
        if self.order.len() == TOKENS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.given.remove(&oldest);
        }
        let expires = Instant::now() + lifetime;
        self.given.insert(token.clone(), Grant { allowed, expires });
        self.order.push_back(token.clone());
        token
    }
}

/// What the account's refresh token (an identity token in docker's words) is: it follows from the account, so that a
/// test can configure it beforehand.
#[must_use]
pub fn identity_token(account: &Account) -> String {
    Digest::of(format!("identity {}:{}", account.user, account.password).as_bytes()).hex()
}

/// Whether a request with `headers` may do what it needs (`None`: nothing but be known). The error is the answer.
pub(super) fn check(
    auth: &Auth,
    tokens: &Tokens,
    headers: &HeaderMap,
    need: Option<&Need>,
    base_url: &str,
) -> Result<(), Box<Answer>> {
    match auth {
        Auth::None => Ok(()),
        Auth::Basic(account) if basic(headers).as_ref() == Some(account) => Ok(()),
        Auth::Basic(_) => Err(Box::new(
            unauthorized("authentication required")
                .with(header::WWW_AUTHENTICATE, "Basic realm=\"demo registry\""),
        )),
        Auth::Token(_) => check_token(tokens, headers, need, base_url),
    }
}

fn unauthorized(message: &str) -> Answer {
    Answer::error(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message)
}

fn check_token(
    tokens: &Tokens,
    headers: &HeaderMap,
    need: Option<&Need>,
    base_url: &str,
) -> Result<(), Box<Answer>> {
    let given = bearer(headers).map(|token| tokens.given.get(token));
    let why = match given {
        None => None,
        Some(Some(grant)) if grant.expires > Instant::now() => {
            let allowed = |need: &Need| {
                need.actions.iter().all(|action| {
                    let has = |(resource, granted): &(String, String)| {
                        *resource == need.resource && (granted == action || granted == "*")
                    };
                    grant.allowed.iter().any(has)
                })
            };
            if need.is_none_or(allowed) {
                return Ok(());
            }
            Some("insufficient_scope")
        }
        Some(_) => Some("invalid_token"),
    };
    let mut challenge = format!("Bearer realm=\"{base_url}/token\",service=\"{SERVICE}\"");
    if let Some(need) = need {
        challenge += &format!(",scope=\"{}\"", need.scope());
    }
    if let Some(why) = why {
        challenge += &format!(",error=\"{why}\"");
    }
    let answer = unauthorized("authentication required");
    Err(Box::new(answer.with(header::WWW_AUTHENTICATE, &challenge)))
}

/// The value of the `Authorization` header behind `scheme`, which is compared without case (RFC 9110 section 11.1).
fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (given, rest) = value.split_once(' ')?;
    given.eq_ignore_ascii_case(scheme).then_some(rest.trim())
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    credentials(headers, "Bearer")
}

fn basic(headers: &HeaderMap) -> Option<Account> {
    let decoded = STANDARD.decode(credentials(headers, "Basic")?).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.split_once(':')?;
    Some(Account::new(user, password))
}

/// A request for a token, whichever its form.
#[derive(Debug, Default)]
struct TokenRequest {
    scopes: Vec<String>,
    wants_refresh_token: bool,
    /// `None`: no credentials; otherwise whether they are right.
    authenticated: Option<bool>,
}

/// The answer of the token service to a GET (`form` is `None`) or a POST.
pub(super) fn token_answer(
    auth: &TokenAuth,
    tokens: &mut Tokens,
    seed: u64,
    headers: &HeaderMap,
    query: &str,
    form: Option<&[u8]>,
) -> Answer {
    let request = match form {
        Some(_) if !auth.post_form => {
            return Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "there is no POST here");
        }
        Some(form) => match posted(auth, form) {
            Ok(request) => request,
            Err(why) => {
                return Answer {
                    status: StatusCode::BAD_REQUEST,
                    ..Answer::json(&serde_json::json!({"error": why}))
                };
            }
        },
        None => asked(auth, headers, query),
    };
    let everything = match request.authenticated {
        Some(false) => return unauthorized("wrong credentials"),
        None if !auth.anonymous_pull => return unauthorized("credentials required"),
        known => known.is_some(),
    };
    let mut allowed = Vec::new();
    for scope in request.scopes.iter().take(SCOPES_MAX) {
        // The name may contain a colon, type and actions may not.
        if let Some((resource, actions)) = scope.rsplit_once(':') {
            let name = resource.strip_prefix("repository:");
            let is_private = name.is_some_and(|name| auth.private.iter().any(|private| private == name));
            let granted = actions
                .split(',')
                .filter(|action| everything || (*action == "pull" && !is_private))
                .map(|action| (resource.to_owned(), action.to_owned()));
            allowed.extend(granted.take(SCOPES_MAX));
        }
    }
    let token = tokens.give(seed, allowed, Duration::from_secs(auth.expires_in_s));
    let mut answer = serde_json::json!({ "issued_at": date::rfc3339(date::now_s()) });
    if auth.tell_expiry {
        answer["expires_in"] = auth.expires_in_s.into();
    }
    if auth.spelling != TokenSpelling::AccessToken {
        answer["token"] = token.clone().into();
    }
    if auth.spelling != TokenSpelling::Token {
        answer["access_token"] = token.into();
    }
    if request.wants_refresh_token && everything {
        answer["refresh_token"] = identity_token(&auth.account).into();
    }
    Answer::json(&answer)
}

fn asked(auth: &TokenAuth, headers: &HeaderMap, query: &str) -> TokenRequest {
    let mut request = TokenRequest {
        authenticated: headers
            .contains_key(header::AUTHORIZATION)
            .then(|| basic(headers).as_ref() == Some(&auth.account)),
        ..TokenRequest::default()
    };
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match &*key {
            "scope" => request.scopes.extend(value.split(' ').map(str::to_owned)),
            "offline_token" => request.wants_refresh_token = value == "true",
            _ => {}
        }
    }
    request
}

/// Reads the POST form; the error is OAuth's name for it.
fn posted(auth: &TokenAuth, form: &[u8]) -> Result<TokenRequest, &'static str> {
    let fields: HashMap<_, _> = url::form_urlencoded::parse(form).into_owned().collect();
    let field = |name: &str| fields.get(name).map_or("", String::as_str);
    if field("service").is_empty() || field("client_id").is_empty() {
        return Err("invalid_request");
    }
    let right = match field("grant_type") {
        "password" => Account::new(field("username"), field("password")) == auth.account,
        "refresh_token" => field("refresh_token") == identity_token(&auth.account),
        _ => return Err("unsupported_grant_type"),
    };
    Ok(TokenRequest {
        scopes: field("scope").split_whitespace().map(str::to_owned).collect(),
        wants_refresh_token: field("access_type") == "offline" || field("grant_type") == "refresh_token",
        authenticated: Some(right),
    })
}
