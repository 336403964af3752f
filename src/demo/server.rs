//! From a request to an answer: the ledger, the faults, authentication and the dispatch to the API's operations.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap};
use hyper::{Method, Request, Response, StatusCode};
use parking_lot::Mutex;

use super::answer::Answer;
use super::auth::{self, Tokens};
use super::behaviour::{Auth, Behaviour, Endpoint, Fault, Faults, Subject};
use super::body::{Connection, Entry, Limit, Pacer, Plan, PlannedBody};
use super::content::Content;
use super::ledger::{Arrival, Ledger};
use super::push::Uploads;
use super::read::{self, Route};
use super::signed::Signer;

/// Largest request body but for blobs: a manifest (distribution's limit), or a form.
const BODY_BYTES_MAX: usize = 4 << 20;

/// Everything that the connections share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) behaviour: Mutex<Behaviour>,
    pub(super) faults: Mutex<Faults>,
    pub(super) ledger: Arc<Mutex<Ledger>>,
    pub(super) content: Mutex<Content>,
    pub(super) tokens: Mutex<Tokens>,
    pub(super) uploads: Mutex<Uploads>,
    pub(super) signer: Mutex<Signer>,
    pub(super) pacer: Arc<Pacer>,
}

/// Where a connection was accepted.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// [`Endpoint::Registry`] or [`Endpoint::Storage`].
    pub(super) endpoint: Endpoint,
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    /// Address and port of the registry's listener, for requests without a `Host`.
    pub(super) host: String,
    /// Address and port of the storage listener.
    pub(super) storage_host: String,
}

/// A request on its way to its operation.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: Request<Incoming>,
    /// The behaviour at its arrival.
    pub(super) behaviour: Behaviour,
    pub(super) place: Place,
}

impl Call {
    pub(super) fn method(&self) -> &Method {
        self.request.method()
    }

    pub(super) fn query(&self) -> &str {
        self.request.uri().query().unwrap_or_default()
    }

    /// The first value of query parameter `name`.
    pub(super) fn parameter(&self, name: &str) -> Option<String> {
        url::form_urlencoded::parse(self.query().as_bytes())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    }

    pub(super) fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.request.headers().get(name)?.to_str().ok()
    }

    /// The URL of the registry as the client spells it.
    fn base_url(&self) -> String {
        let host = self.header(header::HOST).unwrap_or(&self.place.host);
        format!("{}://{host}", self.place.scheme)
    }

    /// All of the request's body, unless it has more than `bytes_max`.
    pub(super) async fn body(&mut self, bytes_max: usize) -> Result<bytes::Bytes, Box<Answer>> {
        match Limited::new(self.request.body_mut(), bytes_max).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(_) => Err(Answer::refusal(
                StatusCode::PAYLOAD_TOO_LARGE,
                "SIZE_INVALID",
                "the body is too large, or was cut short",
            )),
        }
    }

    pub(super) async fn small_body(&mut self) -> Result<bytes::Bytes, Box<Answer>> {
        self.body(BODY_BYTES_MAX).await
    }
}

/// The connection shall be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("closed without an answer")]
pub(super) struct Dropped;

/// Answers one request.
pub(super) async fn serve(
    shared: Arc<Shared>,
    place: Place,
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<PlannedBody>, Dropped> {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let endpoint = match place.endpoint {
        Endpoint::Registry if path == "/token" => Endpoint::Token,
        endpoint => endpoint,
    };
    let header = |name| Some(request.headers().get(name)?.to_str().ok()?.to_owned());
    let sequence = shared.ledger.lock().begin(Arrival {
        endpoint,
        method: method.to_string(),
        path: path.clone(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        range: header(header::RANGE),
        had_authorization: request.headers().contains_key(header::AUTHORIZATION),
    });
    let entry = Entry {
        ledger: Arc::clone(&shared.ledger),
        sequence,
    };
    let behaviour = shared.behaviour.lock().clone();
    let mut faults = shared.faults.lock().take(Subject {
        endpoint,
        method: method.as_str(),
        path: &path,
    });
    faults.extend(behaviour.chance(sequence));

    wait_before(&behaviour, &faults).await;
    if faults.contains(&Fault::Reset) {
        connection.reset.store(true, Ordering::Release);
        return Err(Dropped);
    }
    expire(&shared, &faults);
    let told = faults.iter().any(|fault| matches!(fault, Fault::Status { .. }));
    let mut call = Call {
        request,
        behaviour,
        place,
    };
    let mut answer = if told {
        challenge(&call, &path)
    } else {
        dispatch(&shared, &mut call, endpoint, &path).await
    };
    for fault in &faults {
        answer = answer.distort(fault);
    }
    shared.ledger.lock().answered(sequence, answer.status.as_u16());
    let plan = plan(
        &shared,
        &connection,
        &call.behaviour,
        &faults,
        answer.content_length(),
    );
    Ok(respond(answer, &method, plan, connection, entry))
}

async fn wait_before(behaviour: &Behaviour, faults: &[Fault]) {
    let delays = faults.iter().map(|fault| match fault {
        Fault::Delay(delay) => *delay,
        _ => Duration::ZERO,
    });
    let wait = behaviour.latency + delays.sum::<Duration>();
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
}

fn expire(shared: &Shared, faults: &[Fault]) {
    if faults.contains(&Fault::ExpireTokens) {
        shared.tokens.lock().clear();
    }
    if faults.contains(&Fault::ExpireSignedUrls) {
        shared.signer.lock().expire_all();
    }
}

/// How the body of an answer of `length` bytes is sent.
fn plan(
    shared: &Shared,
    connection: &Connection,
    behaviour: &Behaviour,
    faults: &[Fault],
    length: u64,
) -> Plan {
    let mut plan = Plan::default();
    let mut limit = |pacer: &Arc<Pacer>, bytes_per_s: u64| {
        if bytes_per_s > 0 {
            plan.limits.push(Limit {
                pacer: Arc::clone(pacer),
                bytes_per_s,
            });
        }
    };
    limit(&connection.pacer, behaviour.connection_bytes_per_s);
    limit(&shared.pacer, behaviour.total_bytes_per_s);
    for fault in faults {
        if let Fault::Throttle(bytes_per_s) = fault {
            limit(&Arc::default(), *bytes_per_s);
        }
    }
    for fault in faults {
        match fault {
            Fault::Cut(bytes) => plan.cut_after = Some(*bytes),
            Fault::CutHalfway => plan.cut_after = Some(length / 2),
            Fault::Stall { after_bytes, pause } => {
                plan.stall_after = Some(*after_bytes);
                plan.stall_pause = *pause;
            }
            _ => {}
        }
    }
    plan
}

fn respond(
    answer: Answer,
    method: &Method,
    plan: Plan,
    connection: Arc<Connection>,
    entry: Entry,
) -> Response<PlannedBody> {
    let length = answer.content_length();
    let has_body = answer.has_body(method);
    // A cut or a stall of a body that is not sent has nothing to act on.
    let (body, plan) = if has_body {
        (answer.body, plan)
    } else {
        Default::default()
    };
    let mut response = Response::new(PlannedBody::new(body, plan, connection, entry));
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    if !matches!(answer.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, length.into());
    }
    response
}

/// What a told status replaces: a 401 shall come with the challenge that this registry gives to strangers.
fn challenge(call: &Call, path: &str) -> Answer {
    let need = match Route::parse(path) {
        Some(Ok(route)) => route.need(true),
        _ => None,
    };
    let (nobody, tokens) = (HeaderMap::new(), Tokens::default());
    let refused = auth::check(
        &call.behaviour.auth,
        &tokens,
        &nobody,
        need.as_ref(),
        &call.base_url(),
    );
    refused
        .err()
        .map_or_else(|| Answer::empty(StatusCode::OK), |refusal| *refusal)
}

async fn dispatch(shared: &Shared, call: &mut Call, endpoint: Endpoint, path: &str) -> Answer {
    match endpoint {
        Endpoint::Storage => super::signed::read(shared, call, path),
        Endpoint::Token => token(shared, call).await,
        Endpoint::Registry => match Route::parse(path) {
            Some(Ok(route)) => operate(shared, call, &route).await,
            Some(Err(invalid)) => *invalid,
            None => Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "no such path"),
        },
    }
}

async fn token(shared: &Shared, call: &mut Call) -> Answer {
    let Auth::Token(auth) = call.behaviour.auth.clone() else {
        return Answer::error(StatusCode::NOT_FOUND, "UNSUPPORTED", "there is no token service");
    };
    let form = match *call.method() {
        Method::GET => None,
        Method::POST => match call.small_body().await {
            Ok(form) => Some(form),
            Err(refusal) => return *refusal,
        },
        _ => return method_not_allowed(),
    };
    let mut tokens = shared.tokens.lock();
    let (seed, headers) = (call.behaviour.seed, call.request.headers());
    auth::token_answer(&auth, &mut tokens, seed, headers, call.query(), form.as_deref())
}

pub(super) fn method_not_allowed() -> Answer {
    Answer::error(
        StatusCode::METHOD_NOT_ALLOWED,
        "UNSUPPORTED",
        "this method is not supported here",
    )
}

async fn operate(shared: &Shared, call: &mut Call, route: &Route) -> Answer {
    let reading = matches!(*call.method(), Method::GET | Method::HEAD);
    let refused = {
        let tokens = shared.tokens.lock();
        let need = route.need(reading);
        let headers = call.request.headers();
        auth::check(
            &call.behaviour.auth,
            &tokens,
            headers,
            need.as_ref(),
            &call.base_url(),
        )
        .err()
    };
    if let Some(answer) = refused {
        return *answer;
    }
    if reading {
        read::answer(shared, call, route)
    } else {
        super::push::answer(shared, call, route).await
    }
    .with(
        header::HeaderName::from_static("docker-distribution-api-version"),
        "registry/2.0",
    )
}
