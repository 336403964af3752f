//! A request to a registry with all that may come between it and its answer: authorization, exactly one renewal of
//! it, redirects. Authorization goes to the registry's own origin and never with a redirect to another.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap};
use reqwest::{Method, StatusCode, Url};

use super::answer::refusal;
use super::auth::{Auth, Authorization};
use super::challenge;
use super::endpoint::{Endpoint, Need, Route};
use super::host::{Host, Kind};
use super::options::ClientOptions;
use super::payload::Payload;
use super::redirect::{self, HOPS_MAX, Redirects};
use super::reference::Repository;
use super::retry::{Attempts, Patience};
use super::transport::{Answer, BodyError, Call, Destination, Transport, send};
use crate::error::{Error, Result};

/// What all clones of a client share.
pub(super) struct Core {
    pub(super) transport: Transport,
    pub(super) auth: Auth,
    pub(super) redirects: Redirects,
}

/// What is asked of an endpoint.
#[derive(Clone)]
pub(super) enum Target {
    /// A path of the registry's API, as it goes on behind `/v2`.
    Path(String),
    /// A URL that the endpoint gave as the next page.
    Page(Url),
}

/// A request to a registry.
#[derive(Clone)]
pub(super) struct Request {
    pub(super) method: Method,
    pub(super) to: Target,
    pub(super) headers: HeaderMap,
    /// What a token must allow for it.
    pub(super) scope: String,
    pub(super) kind: Kind,
}

/// An answer that is neither a redirect nor a 401 that could be helped.
pub(super) struct Reached {
    pub(super) answer: Answer,
    /// It came from another origin than the registry's.
    pub(super) elsewhere: bool,
    /// It was asked for with credentials. The registry may give it to everyone all the same.
    pub(super) with_credentials: bool,
    /// What the request had to be allowed.
    pub(super) scope: String,
}

/// The scope for writing to `repository`.
pub(super) fn push_scope(repository: &Repository) -> String {
    format!("repository:{}:pull,push", repository.path())
}

/// The scope for reading from `repository`.
pub(super) fn pull_scope(repository: &Repository) -> String {
    format!("repository:{}:pull", repository.path())
}

fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

impl Core {
    pub(super) fn options(&self) -> &ClientOptions {
        &self.transport.options
    }

    /// Begins an operation.
    ///
    /// # Errors
    /// [`Error::Offline`] where nothing may be sent.
    pub(super) fn begin(&self, what: impl Into<String>, patience: Patience) -> Result<Attempts> {
        let what = what.into();
        match self.options().offline {
            true => Err(Error::Offline { what }),
            false => Ok(Attempts::new(what, patience, self.options())),
        }
    }

    /// The way to what is asked of the registry with the canonical name `registry`.
    ///
    /// # Errors
    /// [`Error::Usage`] for settings that cannot be understood, [`Error::Unsupported`] where nobody may be asked.
    pub(super) async fn route(&self, what: &str, registry: &str, need: Need) -> Result<Route> {
        let endpoints = self.transport.endpoints(registry).await?;
        Route::new(what, &endpoints, need)
    }

    /// Sends `request` to `endpoint`.
    ///
    /// # Errors
    /// Those of the network, of fetching a token, and of redirects that must not be followed. A refusal is no error
    /// here but an answer: see [`Self::refuse`].
    pub(super) async fn request(
        &self,
        endpoint: &Endpoint,
        request: &Request,
        attempts: &mut Attempts,
    ) -> Result<Reached> {
        self.request_with(endpoint, request, None, attempts).await
    }

    /// The same for a request that carries something. Of a part of a blob see [`send`].
    ///
    /// # Errors
    /// As [`Self::request`].
    pub(super) async fn request_with(
        &self,
        endpoint: &Endpoint,
        request: &Request,
        payload: Option<&Payload>,
        attempts: &mut Attempts,
    ) -> Result<Reached> {
        if endpoint.is_foreign() {
            return self.follow(endpoint, request, payload, None, attempts).await;
        }
        let host = &endpoint.host;
        let mut authorization = self
            .auth
            .authorize(&self.transport, host, &request.scope, attempts)
            .await?;
        let mut renewed = false;
        loop {
            attempts.wait_anew();
            let mut reached = self
                .follow(endpoint, request, payload, authorization.as_ref(), attempts)
                .await?;
            if reached.elsewhere {
                return Ok(reached);
            }
            if is_refusal(reached.answer.status()) {
                // Many that wait for a token of this same host would leave no place for the one that fetches it.
                reached.answer.give_up_place();
            }
            let sent = authorization.as_ref();
            let better = match (reached.answer.status(), sent) {
                (StatusCode::UNAUTHORIZED, _) if !renewed => {
                    let Some(challenge) = challenge::parse(reached.answer.headers()) else {
                        return Ok(reached);
                    };
                    renewed = sent.is_some();
                    self.auth
                        .renew(&self.transport, host, &request.scope, challenge, sent, attempts)
                        .await?
                }
                (StatusCode::FORBIDDEN, Some(sent)) if !renewed => {
                    renewed = true;
                    self.auth
                        .reconsider(&self.transport, host, &request.scope, sent, attempts)
                        .await?
                }
                _ => return Ok(reached),
            };
            match better {
                Some(better) => {
                    reached.answer.drain().await;
                    authorization = Some(better);
                }
                None => return Ok(reached),
            }
        }
    }

    /// Sends `request` and follows its redirects.
    async fn follow(
        &self,
        endpoint: &Endpoint,
        request: &Request,
        payload: Option<&Payload>,
        authorization: Option<&Authorization>,
        attempts: &mut Attempts,
    ) -> Result<Reached> {
        let mut call = Call {
            method: request.method.clone(),
            to: match &request.to {
                Target::Path(path) => endpoint.destination(path),
                Target::Page(url) => endpoint.page(url.clone()),
            },
            headers: endpoint.headers.clone(),
            body: payload.cloned(),
            kind: request.kind,
        };
        call.headers.extend(request.headers.clone());
        if let Some(authorization) = authorization {
            call.headers.insert(AUTHORIZATION, authorization.header.clone());
        }
        // At a URL of a manifest, credentials are not what was missing.
        if !endpoint.is_foreign() {
            endpoint
                .host
                .note_credentials(authorization.and_then(|authorization| authorization.source.as_deref()));
        }
        let mut host = Arc::clone(&endpoint.host);
        let mut elsewhere = false;
        if let Destination::Url(url) = &call.to
            && !host.is_at(url)
        {
            // The page before was behind a redirect, and this one is where that led.
            elsewhere = true;
            call.headers = request.headers.clone();
            host = self.transport.peer(&host, url).await?;
        }
        for _ in 0..=HOPS_MAX {
            let mut answer = send(&host, &call, attempts).await?;
            if !redirect::is_redirect(answer.status()) {
                return Ok(Reached {
                    answer,
                    elsewhere,
                    with_credentials: endpoint.knows_us
                        || authorization.is_some_and(|sent| sent.source.is_some()),
                    scope: request.scope.clone(),
                });
            }
            let url = redirect::target(&self.transport, &attempts.what, &answer)?;
            if url.origin() != answer.url().origin() {
                elsewhere = true;
                // Neither our right nor the endpoint's own headers are for anybody else, nor come back from there.
                call.headers = request.headers.clone();
            }
            answer.drain().await;
            host = self.transport.peer(&host, &url).await?;
            call.to = Destination::Url(url);
        }
        let why = format!("more than {HOPS_MAX} redirects, the last to {}", host.peer());
        Err(Error::malformed(&attempts.what, why))
    }

    /// Sends `request` and reads the whole body of a success. For any other answer the body is left to read.
    ///
    /// # Errors
    /// Those of [`Self::request`], and [`Error::Malformed`] for a body of more than `bytes_max`.
    pub(super) async fn whole(
        &self,
        endpoint: &Endpoint,
        request: &Request,
        bytes_max: u64,
        attempts: &mut Attempts,
    ) -> Result<(Reached, Bytes)> {
        loop {
            let mut reached = self.request(endpoint, request, attempts).await?;
            if !reached.answer.status().is_success() {
                return Ok((reached, Bytes::new()));
            }
            let failure = match reached.answer.body(bytes_max, attempts).await {
                Ok(body) => return Ok((reached, body)),
                Err(BodyError::TooLarge) => {
                    let why = format!("{} sends more than {bytes_max} bytes", reached.answer.host.peer());
                    return Err(Error::malformed(&attempts.what, why));
                }
                Err(BodyError::Failure(failure)) => failure,
            };
            let peer = Arc::clone(&reached.answer.host);
            drop(reached);
            attempts.pause(&peer, &failure).await?;
        }
    }

    /// What a refusal by the registry at `host`, or by where it redirected to, means.
    pub(super) async fn refuse(&self, host: &Arc<Host>, what: &str, reached: &mut Reached) -> Error {
        let credentials = match reached.answer.status().as_u16() {
            // The everyday answer: no credentials have to do with it.
            404 => String::new(),
            _ if reached.elsewhere => format!("{} redirected there", host.label()),
            _ => self.auth.describe(host, &reached.scope).await,
        };
        refusal(what, &mut reached.answer, &credentials).await
    }
}
