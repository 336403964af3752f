//! Fetching one token from a token service, by the distribution project's specification: a GET request, or for
//! identity tokens an OAuth2 form, which some services do not have.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Url};
use serde::Deserialize;

use super::answer::refusal;
use super::auth::basic;
use super::credentials::{Credentials, Identity};
use super::host::{Host, Kind};
use super::payload::Payload;
use super::retry::Attempts;
use super::secret::{Secret, redact};
use super::transport::{Answer, BodyError, Call, Destination, Transport, send};
use crate::error::{Error, Result};

/// Answers of token services are at most so long.
const BODY_BYTES_MAX: u64 = 1 << 20;
/// How long a token is good where the service does not say (the specification's default).
const GOOD_FOR_DEFAULT: Duration = Duration::from_secs(60);
/// A token is not used in the last part of its life, of at most this length: the request has to arrive in time.
const MARGIN_MAX: Duration = Duration::from_secs(20);
/// No token is kept for longer, whatever the service says.
const GOOD_FOR_MAX: Duration = Duration::from_secs(24 * 3600);
/// How many refresh tokens are tried for one token.
const FORMS_MAX: usize = 3;
/// How we call ourselves in an OAuth2 form.
const CLIENT_ID: &str = "registryfs";

/// A token service and what is wanted of it.
pub(super) struct Service {
    pub(super) realm: Url,
    pub(super) service: String,
    pub(super) scopes: Vec<String>,
}

/// A token, for how long from its request on it is to be used, and the refresh token that takes the place of the one
/// it was got with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) secret: Secret,
    pub(super) good_for: Duration,
    pub(super) refresh: Option<Secret>,
}

#[derive(Deserialize)]
struct Document {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
    refresh_token: Option<String>,
}

/// Fetches a token with `credentials` from the service that `from` named. `rotated` is the refresh token that the service gave last in place of theirs.
///
/// # Errors
/// [`Error::Denied`] naming the credentials if the service refuses, [`Error::Malformed`] if its answer is no token,
/// and those of the network.
pub(super) async fn fetch(
    transport: &Transport,
    from: &Arc<Host>,
    service: &Service,
    credentials: &Credentials,
    rotated: &(dyn Fn() -> Option<Secret> + Send + Sync),
    attempts: &mut Attempts,
) -> Result<Token> {
    let mut tried: Vec<Secret> = Vec::new();
    if let Identity::Refresh { token, .. } = &credentials.identity {
        // A request for another scope may have the token rotated meanwhile, so this is looked at after each refusal.
        while let Some(token) = [rotated(), Some(token.clone())]
            .into_iter()
            .flatten()
            .find(|token| !tried.contains(token))
            .filter(|_| tried.len() < FORMS_MAX)
        {
            let call = form(service, &token);
            let answer = exchange(transport, from, service, &call, attempts).await?;
            match answer.0.status().as_u16() {
                // No such form (Google's registry): no other token will find one.
                404 | 405 => break,
                // A token that is no longer good; Artifactory and Azure say that there is no form by it too.
                400 | 401 => tried.push(token),
                _ => return read(service, answer, credentials, attempts).await,
            }
        }
    }
    let call = query(service, credentials);
    let answer = exchange(transport, from, service, &call, attempts).await?;
    let token = read(service, answer, credentials, attempts).await;
    token.map_err(|error| match error {
        // The refusal is about the second form, which is not what the user can mend.
        Error::Denied { what, why } if !tried.is_empty() => Error::Denied {
            what,
            why: format!("{why}; its identity token is not taken: log in again"),
        },
        other => other,
    })
}

/// An answer, and its body if it was a success.
type Whole = (Answer, bytes::Bytes);

async fn exchange(
    transport: &Transport,
    from: &Arc<Host>,
    service: &Service,
    call: &Call,
    attempts: &mut Attempts,
) -> Result<Whole> {
    let host = transport.peer(from, &service.realm).await?;
    loop {
        let mut answer = send(&host, call, attempts).await?;
        if !answer.status().is_success() {
            return Ok((answer, bytes::Bytes::new()));
        }
        match answer.body(BODY_BYTES_MAX, attempts).await {
            Ok(body) => return Ok((answer, body)),
            Err(BodyError::TooLarge) => {
                return Err(malformed(service, "the answer is too long for a token"));
            }
            Err(BodyError::Failure(failure)) => attempts.pause(&host, &failure).await?,
        }
    }
}

async fn read(
    service: &Service,
    (mut answer, body): Whole,
    credentials: &Credentials,
    attempts: &Attempts,
) -> Result<Token> {
    let status = answer.status();
    if status.is_success() {
        return parse(service, &body);
    }
    if status.is_redirection() {
        return Err(malformed(service, "the token service answers with a redirect"));
    }
    let error = refusal(&attempts.what, &mut answer, &credentials.describe()).await;
    // What a token service does not find is our right to pass, not the image.
    Err(match error {
        Error::NotFound { what, why } | Error::Unsupported { what, why } => Error::Denied { what, why },
        Error::Network { what, why } if status.is_client_error() => Error::Denied { what, why },
        other => other,
    })
}

fn malformed(service: &Service, why: &str) -> Error {
    Error::malformed(format!("token of {}", redact(&service.realm)), why)
}

fn query(service: &Service, credentials: &Credentials) -> Call {
    let mut url = service.realm.clone();
    {
        let mut pairs = url.query_pairs_mut();
        if !service.service.is_empty() {
            pairs.append_pair("service", &service.service);
        }
        for scope in &service.scopes {
            pairs.append_pair("scope", scope);
        }
    }
    let mut headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("application/json"))]);
    if let Some(authorization) = basic(credentials) {
        headers.insert(AUTHORIZATION, authorization.header);
    }
    Call::get(Destination::Url(url), headers, Kind::Token)
}

fn form(service: &Service, token: &Secret) -> Call {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "refresh_token")
        .append_pair("service", &service.service)
        .append_pair("client_id", CLIENT_ID)
        .append_pair("scope", &service.scopes.join(" "))
        .append_pair("access_type", "offline")
        .append_pair("refresh_token", token.expose());
    Call {
        method: Method::POST,
        to: Destination::Url(service.realm.clone()),
        headers: HeaderMap::from_iter([
            (ACCEPT, HeaderValue::from_static("application/json")),
            (
                CONTENT_TYPE,
                HeaderValue::from_static("application/x-www-form-urlencoded"),
            ),
        ]),
        body: Some(Payload::Text(form.finish())),
        kind: Kind::Token,
    }
}

pub(super) fn parse(service: &Service, body: &[u8]) -> Result<Token> {
    let document: Document =
        serde_json::from_slice(body).map_err(|_| malformed(service, "the answer is no token"))?;
    let secret = document
        .token
        .filter(|token| !token.is_empty())
        .or(document.access_token)
        .filter(|token| !token.is_empty())
        .ok_or_else(|| malformed(service, "neither token nor access_token in the answer"))?;
    let life = document
        .expires_in
        .filter(|seconds| *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or(GOOD_FOR_DEFAULT)
        .min(GOOD_FOR_MAX);
    Ok(Token {
        secret: Secret::new(secret),
        good_for: life - (life / 4).min(MARGIN_MAX),
        refresh: document
            .refresh_token
            .filter(|token| !token.is_empty())
            .map(Secret::new),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(realm: &str) -> Service {
        Service {
            realm: Url::parse(realm).unwrap(),
            service: "reg & co".to_owned(),
            scopes: vec!["repository:a/b:pull".to_owned(), "repository:c:pull".to_owned()],
        }
    }

    fn token(body: &str) -> Result<Token> {
        parse(&service("https://a.example/token?sig=SECRET"), body.as_bytes())
    }

    #[test]
    fn either_name_of_the_token_and_its_life() {
        let expected = |secret: &str, seconds: u64| Token {
            secret: Secret::new(secret),
            good_for: Duration::from_secs(seconds),
            refresh: None,
        };
        assert_eq!(token(r#"{"token":"t"}"#).unwrap(), expected("t", 45));
        assert_eq!(
            token(r#"{"access_token":"a","expires_in":300}"#).unwrap(),
            expected("a", 280)
        );
        assert_eq!(
            token(r#"{"token":"","access_token":"a","expires_in":0}"#).unwrap(),
            expected("a", 45)
        );
        assert_eq!(
            token(r#"{"token":"t","expires_in":1e9}"#).unwrap(),
            expected("t", 24 * 3600 - 20)
        );
    }

    #[test]
    fn what_is_no_token_is_refused_without_showing_it() {
        for body in ["", "{}", "[]", r#"{"token":null}"#, r#"{"token":7}"#] {
            let error = token(body).unwrap_err().to_string();
            assert!(!error.contains("SECRET"), "{error}");
        }
    }

    #[test]
    fn the_query_keeps_the_realms_own_and_repeats_the_scope() {
        let call = query(&service("https://a.example/token?x=1"), &Credentials::none());
        let Destination::Url(url) = call.to else {
            panic!("a token service is a URL")
        };
        let expected = "x=1&service=reg+%26+co&scope=repository%3Aa%2Fb%3Apull&scope=repository%3Ac%3Apull";
        assert_eq!(url.query(), Some(expected));
        assert!(call.headers.get(AUTHORIZATION).is_none());
    }
}
