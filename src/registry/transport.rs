//! One HTTP request until it has an answer that means something: the host's gate, its protocol, retries. What the
//! answer says is for the callers; 401, 404 and redirects are answers like any other here. Dropping a future aborts
//! its request.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use reqwest::header::{AsHeaderName, CONTENT_LENGTH, HeaderMap, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::ErrorBody;
use super::failure::{Cause, Failure, is_gateway_failure, is_retryable};
use super::host::{Host, Kind, Scheme};
use super::payload::{FilePart, Payload};
use super::retry::{Attempts, Patience, random_fraction};
use super::secret::redact;
use crate::error::{Error, Result};

pub(super) use super::peers::Transport;

/// Of a body that nobody wants so much is read, and for so long, to keep the connection.
const DRAIN_BYTES_MAX: u64 = 16 << 10;
const DRAIN_WAIT: Duration = Duration::from_millis(500);
/// How long a registry may take to store a part of a blob that it has received: some copy or hash all of it then.
const STORE_WAIT: Duration = Duration::from_secs(300);

/// Where a request goes. Like everything here that holds a URL it has no debug form: the query may be signed.
#[derive(Clone)]
pub(super) enum Destination {
    /// A path of the registry's API, by whatever protocol the host speaks.
    Registry(String),
    /// A URL that a registry gave.
    Url(Url),
}

/// One request.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) to: Destination,
    pub(super) headers: HeaderMap,
    /// What it carries.
    pub(super) body: Option<Payload>,
    pub(super) kind: Kind,
}

impl Call {
    pub(super) fn get(to: Destination, headers: HeaderMap, kind: Kind) -> Self {
        Self {
            method: Method::GET,
            to,
            headers,
            body: None,
            kind,
        }
    }
}

/// An answer whose body has not been read. It holds its place among the requests to the host until it is dropped,
/// and is logged then.
pub(super) struct Answer {
    pub(super) host: Arc<Host>,
    response: reqwest::Response,
    method: Method,
    started: Instant,
    headers_ms: u128,
    received: u64,
    permits: Option<Permits>,
}

type Permits = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

/// Why a whole body could not be had.
#[derive(Debug)]
pub(super) enum BodyError {
    Failure(Failure),
    TooLarge,
}

impl Answer {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn url(&self) -> &Url {
        self.response.url()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// A header as text, `None` where it is absent or not ASCII.
    pub(super) fn header(&self, name: impl AsHeaderName) -> Option<&str> {
        self.headers().get(name)?.to_str().ok()
    }

    /// The length that the body is said to have.
    pub(super) fn content_length(&self) -> Option<u64> {
        self.response.content_length()
    }

    /// The length that the head states: of an answer to HEAD that is not the length of its body.
    pub(super) fn length_stated(&self) -> Option<u64> {
        self.header(CONTENT_LENGTH)?.parse().ok()
    }

    /// The next piece of the body, `None` at its end.
    pub(super) async fn chunk(&mut self, until: Instant) -> Result<Option<Bytes>, Failure> {
        let waiting = Instant::now();
        match timeout_at(until, self.response.chunk()).await {
            Err(_) => Err(Failure::stalled(waiting.elapsed())),
            Ok(Err(error)) => Err(Failure::new(Cause::Cut, Failure::of(error).why)),
            Ok(Ok(bytes)) => {
                let count = bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
                self.received += count;
                self.host.count_bytes(count);
                Ok(bytes)
            }
        }
    }

    /// Gives up its place among the requests to the host: what is done before its body is read needs places, too.
    pub(super) fn give_up_place(&mut self) {
        self.permits = None;
    }

    /// Reads the rest of a short body that nobody wants, so that its connection can be used again.
    pub(super) async fn drain(&mut self) {
        let until = Instant::now() + DRAIN_WAIT;
        while self.received < DRAIN_BYTES_MAX {
            match self.chunk(until).await {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }

    /// The whole body, if it has at most `bytes_max` bytes.
    pub(super) async fn body(&mut self, bytes_max: u64, attempts: &mut Attempts) -> Result<Bytes, BodyError> {
        if self.content_length().is_some_and(|length| length > bytes_max) {
            return Err(BodyError::TooLarge);
        }
        let mut body = bytes::BytesMut::new();
        while let Some(piece) = self
            .chunk(attempts.attempt_deadline())
            .await
            .map_err(BodyError::Failure)?
        {
            attempts.progressed(piece.len() as u64);
            if body.len() as u64 + piece.len() as u64 > bytes_max {
                return Err(BodyError::TooLarge);
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        tracing::debug!(
            method = %self.method,
            url = %redact(self.response.url()),
            status = self.response.status().as_u16(),
            headers_ms = self.headers_ms,
            ms = self.started.elapsed().as_millis(),
            bytes = self.received,
            "request"
        );
    }
}

/// Sends `call` to `host` until an answer comes that is worth reading. With a part of a blob it is sent once: after a
/// failure that may pass, and the pause that follows, [`Attempts::may_go_on`] says that its sender is to look how much of
/// it has arrived.
///
/// # Errors
/// [`Error::Network`] and [`Error::Timeout`], when the retries or the time of `attempts` are used up, or a part failed.
pub(super) async fn send(host: &Arc<Host>, call: &Call, attempts: &mut Attempts) -> Result<Answer> {
    loop {
        gate(host, attempts).await?;
        let permits = permits(host, attempts).await?;
        if let Some(error) = attempts.passes_over(host) {
            return Err(error);
        }
        // The wait for a permit may have been long.
        if host.held().is_some() || host.breaker.down_for().is_some() {
            continue;
        }
        let failure = match attempt(host, call, attempts.attempt_deadline()).await {
            Ok(mut answer) if is_retryable(answer.status()) => {
                answer.permits = Some(permits);
                busy(answer).await
            }
            Ok(mut answer) => {
                host.alive();
                answer.permits = Some(permits);
                return Ok(answer);
            }
            Err(failure) => {
                // Nobody waits for a place while this request pauses.
                drop(permits);
                failure
            }
        };
        attempts.pause(host, &failure).await?;
        if call.body.as_ref().is_some_and(|body| body.part().is_some()) {
            return Err(attempts.interrupted(host, &failure));
        }
    }
}

/// What an answer means that says "not now".
async fn busy(mut answer: Answer) -> Failure {
    let status = answer.status();
    let asked = retry_after(answer.headers(), SystemTime::now());
    let host = Arc::clone(&answer.host);
    let mut why = format!("answered {status}");
    let body = ErrorBody::read(&mut answer).await;
    if let Some(text) = body.text() {
        why = format!("{why}: {text}");
    }
    if let Some(asked) = asked {
        why = format!("{why} (Retry-After: {} s)", asked.as_secs());
    }
    let limited = status == StatusCode::TOO_MANY_REQUESTS;
    if limited || asked.is_some() {
        host.hold_back(asked, &why);
    }
    if !is_gateway_failure(status) {
        host.breaker.alive();
    }
    Failure {
        cause: Cause::Status(status),
        why,
        retry_after: asked.or(limited.then_some(Duration::ZERO)),
    }
}

/// How long `Retry-After` asks to wait, in its two forms: seconds, or a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse::<u32>() {
        Ok(seconds) => Some(Duration::from_secs(u64::from(seconds))),
        Err(_) => {
            let date = httpdate::parse_http_date(text).ok()?;
            Some(date.duration_since(now).unwrap_or_default())
        }
    }
}

/// Whether a mirror is to be passed over now: left out, asked to be left alone, or down. One that is down is probed.
pub(super) fn is_left_out(host: &Arc<Host>) -> bool {
    host.is_absent() || host.held().is_some() || !host.breaker.passes(|| start_probe(host))
}

fn start_probe(host: &Arc<Host>) {
    let host = Arc::clone(host);
    tokio::spawn(async move { probe(&host).await });
}

/// Waits until `host` may be asked, or fails at once if it is down or wants to be left alone for too long.
async fn gate(host: &Arc<Host>, attempts: &mut Attempts) -> Result<()> {
    host.breaker.admit(|| start_probe(host)).await.map_err(|down| {
        let seconds = down.since.as_secs();
        Error::network(
            &attempts.what,
            format!("{} has been down for {seconds} s: {}", host.peer(), down.why),
        )
    })?;
    while let Some((until, why)) = host.held() {
        if until >= attempts.deadline() {
            let seconds = until.saturating_duration_since(Instant::now()).as_secs_f32();
            return Err(Error::network(
                &attempts.what,
                format!("{} {why}; it is not asked again for {seconds:.0} s", host.peer()),
            ));
        }
        // Those who waited together must not all come back at the same moment.
        let spread = until.saturating_duration_since(Instant::now()).mul_f64(0.1);
        tokio::time::sleep_until(until + spread.mul_f64(random_fraction())).await;
        attempts.wait_anew();
    }
    Ok(())
}

async fn probe(host: &Arc<Host>) {
    let call = Call::get(
        Destination::Registry(host.probe_path().to_owned()),
        HeaderMap::new(),
        Kind::Probe,
    );
    let until = Instant::now() + host.timing().probe_interval;
    match attempt(host, &call, until).await {
        Ok(answer) if is_gateway_failure(answer.status()) => {
            host.breaker
                .probe_failed(&format!("answered {}", answer.status()));
        }
        Ok(_) => {
            tracing::info!(host = %host.label(), "host is up again");
            host.alive();
        }
        Err(failure) => host.breaker.probe_failed(&failure.why),
    }
}

/// A place among the requests to `host`. Streams take a second one, of fewer.
async fn permits(host: &Arc<Host>, attempts: &mut Attempts) -> Result<Permits> {
    let until = attempts.queue_deadline();
    let acquire = async {
        let stream = match attempts.patience {
            Patience::Total => None,
            Patience::Stream => Arc::clone(&host.streams).acquire_owned().await.ok(),
        };
        let any = Arc::clone(&host.permits).acquire_owned().await.ok()?;
        Some((any, stream))
    };
    let permits = timeout_at(until, acquire).await;
    let permits = permits.map_err(|_| attempts.no_turn(host))?;
    attempts.wait_anew();
    // The semaphores are never closed.
    permits.ok_or_else(|| attempts.no_turn(host))
}

/// Sends `call` once, by the protocol of the host. For a loopback host whose protocol is not known, https is tried
/// first and plain HTTP only if the peer does not speak TLS; the first request finds out, the others wait for it.
async fn attempt(host: &Arc<Host>, call: &Call, until: Instant) -> Result<Answer, Failure> {
    let path = match &call.to {
        Destination::Url(url) => return exchange(host, url.clone(), call, until).await,
        Destination::Registry(path) => path,
    };
    let url = |scheme| {
        host.url(scheme, path)
            .map_err(|error| Failure::new(Cause::Invalid, error.to_string()))
    };
    if let Some(scheme) = host.scheme() {
        return exchange(host, url(scheme)?, call, until).await;
    }
    let began = Instant::now();
    let gate = timeout_at(until, host.scheme_gate.lock()).await;
    let _gate = gate.map_err(|_| Failure::timeout(began.elapsed()))?;
    if let Some(scheme) = host.scheme() {
        return exchange(host, url(scheme)?, call, until).await;
    }
    let by_tls = exchange(host, url(Scheme::Https)?, call, until).await;
    match by_tls.as_ref().map_err(|failure| failure.cause) {
        Ok(_) | Err(Cause::Certificate | Cause::Handshake) => host.decide(Scheme::Https),
        Err(Cause::NotTls | Cause::HelloClosed) => {
            let plain = exchange(host, url(Scheme::Http)?, call, until).await?;
            // A TLS server that is just starting may answer 400 to plain HTTP: that decides nothing.
            if plain.status() != StatusCode::BAD_REQUEST {
                host.decide(Scheme::Http);
            }
            return Ok(plain);
        }
        Err(_) => {}
    }
    by_tls
}

async fn exchange(host: &Arc<Host>, url: Url, call: &Call, until: Instant) -> Result<Answer, Failure> {
    host.count_request(call.kind);
    let started = Instant::now();
    let shown = redact(&url);
    let mut request = host
        .http
        .request(call.method.clone(), url)
        .headers(call.headers.clone());
    if let Some(body) = &call.body {
        request = request.body(body.body());
    }
    let part = call.body.as_ref().and_then(Payload::part);
    let failure = match answered(host, request.send(), part, until).await {
        Ok(Ok(response)) if response.status() == StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            Failure::proxy_login()
        }
        Ok(Ok(response)) => {
            host.note_headers(response.headers());
            return Ok(Answer {
                host: Arc::clone(host),
                response,
                method: call.method.clone(),
                started,
                headers_ms: started.elapsed().as_millis(),
                received: 0,
                permits: None,
            });
        }
        Ok(Err(error)) => Failure::of(error),
        Err(waited) => Failure::timeout(waited),
    };
    if failure.is_before_http() {
        host.uncount_request(call.kind);
    }
    tracing::debug!(
        method = %call.method,
        url = %shown,
        ms = started.elapsed().as_millis(),
        why = %failure.why,
        "request failed"
    );
    Err(failure)
}

/// Waits for the head of an answer until `until`. For a `part` the time does not run while the connection takes more and
/// more of it, and once it has all of it the registry may need a while to store it. An error is how long nothing happened.
async fn answered<T>(
    host: &Host,
    sending: impl Future<Output = T>,
    part: Option<&FilePart>,
    until: Instant,
) -> Result<T, Duration> {
    let began = Instant::now();
    let Some(part) = part else {
        let answer = timeout_at(until, sending).await;
        return answer.map_err(|_| began.elapsed());
    };
    let mut sending = std::pin::pin!(sending);
    loop {
        let taken_to = part.taken_to();
        let wait = match part.is_taken() {
            true => STORE_WAIT,
            false => host.timing().stall,
        };
        match timeout(wait, &mut sending).await {
            Ok(answer) => return Ok(answer),
            Err(_) if part.taken_to() == taken_to => return Err(wait),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderValue;

    #[test]
    fn retry_after_in_seconds_and_as_a_date() {
        let now = SystemTime::now();
        let asked = |text: &str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(text).unwrap())]);
            retry_after(&headers, now)
        };
        assert_eq!(asked("7"), Some(Duration::from_secs(7)));
        let date = httpdate::fmt_http_date(now + Duration::from_secs(100));
        let wait = asked(&date).unwrap();
        assert!((98..=100).contains(&wait.as_secs()), "{wait:?}");
        assert_eq!(asked("Thu, 01 Jan 1970 00:00:00 GMT"), Some(Duration::ZERO));
        for text in ["", "-1", "soon", "99999999999999999999"] {
            assert_eq!(asked(text), None, "{text}");
        }
    }
}
