//! Why one HTTP exchange failed, as far as it decides what happens next: try again, speak another protocol, or tell
//! the user at once. Texts made here hold no URL: reqwest's own would show signed queries.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use reqwest::StatusCode;

use super::secret::one_line;

/// Longest text taken from an error of the HTTP library, in characters.
const WHY_CHARS_MAX: usize = 300;

/// The HTTP library's words for what a proxy said to CONNECT; it has no type for them.
const PROXY_WANTS_LOGIN: &str = "tunnel error: proxy authorization required";
const PROXY_REFUSES: &str = "tunnel error: unsuccessful";

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// No connection: refused, no route, no such name.
    Unreachable,
    /// The peer speaks TLS and its certificate is not trusted.
    Certificate,
    /// The peer speaks TLS, and the handshake failed otherwise.
    Handshake,
    /// The peer answered the TLS hello with something that is not TLS.
    NotTls,
    /// The peer closed the connection during the TLS handshake.
    HelloClosed,
    /// The connection broke, or what came over it was not HTTP.
    Broken,
    /// No answer came within the time for one attempt.
    Timeout,
    /// An answer came, and its body broke off.
    Cut,
    /// An answer came, and its body stopped coming.
    Stalled,
    /// The server answered that it cannot answer now.
    Status(StatusCode),
    /// The whole blob came instead of a range far behind its start. Caches do so while they fill themselves.
    Whole,
    /// The proxy on the way does not let us pass without a login.
    ProxyLogin,
    /// The proxy on the way does not connect us to the host.
    ProxyRefusal,
    /// The request itself cannot be sent.
    Invalid,
}

/// One failed exchange.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    /// The kind.
    pub(super) cause: Cause,
    /// The details for the user.
    pub(super) why: String,
    /// How long the server asked to wait.
    pub(super) retry_after: Option<Duration>,
}

impl Failure {
    pub(super) fn new(cause: Cause, why: impl Into<String>) -> Self {
        Self {
            cause,
            why: why.into(),
            retry_after: None,
        }
    }

    /// A proxy wants to know who we are.
    pub(super) fn proxy_login() -> Self {
        Self::new(
            Cause::ProxyLogin,
            "the proxy wants a user and password (407); write them into its URL: SCHEME://USER:PASS@HOST:PORT",
        )
    }

    pub(super) fn timeout(waited: Duration) -> Self {
        Self::new(
            Cause::Timeout,
            format!("no answer within {} ms", waited.as_millis()),
        )
    }

    pub(super) fn stalled(waited: Duration) -> Self {
        Self::new(
            Cause::Stalled,
            format!("no further byte within {} ms", waited.as_millis()),
        )
    }

    /// Sorts an error of the HTTP library. The text leaves out the host: whoever shows it knows which.
    pub(super) fn of(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let tls = find(&error, |source| source.downcast_ref::<rustls::Error>().cloned());
        let io_kind = find(&error, |source| {
            let kind = source.downcast_ref::<io::Error>()?.kind();
            // What only wraps another error says nothing.
            (kind != io::ErrorKind::Other).then_some(kind)
        });
        let why = |text: String| one_line(&text, WHY_CHARS_MAX);
        if let Some(tls) = tls {
            return Self::of_tls(&tls);
        }
        if error.is_connect() && error.is_timeout() {
            return Self::new(Cause::Unreachable, "no connection in time");
        }
        let why = why(deepest(&error));
        match why.as_str() {
            PROXY_WANTS_LOGIN => return Self::proxy_login(),
            PROXY_REFUSES => {
                return Self::new(
                    Cause::ProxyRefusal,
                    "the proxy refuses to connect to it; the proxy's own log says why",
                );
            }
            _ => {}
        }
        if error.is_builder() {
            return Self::new(Cause::Invalid, why);
        }
        if !error.is_connect() {
            let cause = if error.is_timeout() {
                Cause::Timeout
            } else {
                Cause::Broken
            };
            return Self::new(cause, why);
        }
        let closed = matches!(
            io_kind,
            Some(
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
            )
        );
        match closed {
            true => Self::new(Cause::HelloClosed, format!("it closed the connection: {why}")),
            false => Self::new(Cause::Unreachable, format!("cannot connect: {why}")),
        }
    }

    fn of_tls(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(reason) => {
                let why = format!(
                    "its certificate is not trusted ({reason}); name its authority with --ca FILE, or skip the check with --insecure"
                );
                Self::new(Cause::Certificate, one_line(&why, WHY_CHARS_MAX))
            }
            rustls::Error::InvalidMessage(_) => Self::new(
                Cause::NotTls,
                "it does not speak TLS; if plain HTTP is meant, ask for it with --plain-http",
            ),
            rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired) => Self::new(
                Cause::Handshake,
                "it wants a client certificate; name one with client_cert and client_key, or in its hosts.toml or certs.d",
            ),
            other => {
                let why = format!("TLS handshake: {other}");
                Self::new(Cause::Handshake, one_line(&why, WHY_CHARS_MAX))
            }
        }
    }

    /// Whether the same request may succeed a moment later.
    pub(super) fn may_pass(&self) -> bool {
        !matches!(
            self.cause,
            Cause::Certificate
                | Cause::Handshake
                | Cause::NotTls
                | Cause::Invalid
                | Cause::ProxyLogin
                | Cause::ProxyRefusal
        )
    }

    /// Whether no request was sent: there was no connection to send it over.
    pub(super) fn is_before_http(&self) -> bool {
        matches!(
            self.cause,
            Cause::Unreachable
                | Cause::Certificate
                | Cause::Handshake
                | Cause::NotTls
                | Cause::HelloClosed
                | Cause::ProxyLogin
                | Cause::ProxyRefusal
        )
    }

    /// Whether it says that the host as a whole is gone, and not that it dislikes this request.
    pub(super) fn is_outage(&self) -> bool {
        match self.cause {
            Cause::Unreachable | Cause::HelloClosed | Cause::Broken | Cause::Timeout => true,
            Cause::Status(status) => is_gateway_failure(status),
            _ => false,
        }
    }
}

/// Whether `status` is a proxy's word for a server behind it that is gone.
pub(super) fn is_gateway_failure(status: StatusCode) -> bool {
    matches!(status.as_u16(), 502..=504)
}

/// Whether a request answered with `status` is worth sending again: timeouts, limits and failures of servers, those
/// of nginx and Cloudflare (499, 522) included.
pub(super) fn is_retryable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 499 | 500 | 502..=504 | 522)
}

/// Searches the chain of causes, and looks into the errors that [`io::Error`] wraps: its own `source` skips them.
fn find<T>(
    error: &(dyn StdError + 'static),
    wanted: impl Fn(&(dyn StdError + 'static)) -> Option<T>,
) -> Option<T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = wanted(error) {
            return Some(found);
        }
        let wrapped = error
            .downcast_ref::<io::Error>()
            .and_then(|error| error.get_ref());
        next = match wrapped {
            Some(wrapped) => Some(wrapped as &(dyn StdError + 'static)),
            None => error.source(),
        };
    }
    None
}

/// The text of the last cause: the outer ones only say in which part of the library it happened.
fn deepest(error: &(dyn StdError + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worth_a_retry() {
        for status in [408, 429, 500, 502, 503, 504] {
            assert!(is_retryable(StatusCode::from_u16(status).unwrap()), "{status}");
        }
        for status in [200, 206, 307, 400, 401, 403, 404, 416, 501] {
            assert!(!is_retryable(StatusCode::from_u16(status).unwrap()), "{status}");
        }
    }

    #[test]
    fn a_tls_error_inside_an_io_error_is_found() {
        let tls = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let wrapped = io::Error::other(io::Error::other(tls.clone()));
        let found = find(&wrapped, |source| source.downcast_ref::<rustls::Error>().cloned());
        assert_eq!(found, Some(tls));
    }
}
