//! What a registry's refusal means: its error body (`{"errors": [{"code", "message"}]}`, OCI distribution
//! specification) and its status become one of the crate's errors.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;
use tokio::time::Instant;

use super::secret::one_line;
use super::transport::Answer;
use crate::error::Error;

/// Error bodies are read up to here.
const BODY_BYTES_MAX: usize = 16 << 10;
/// An error body that is slower is not waited for: the status says enough.
const BODY_WAIT: Duration = Duration::from_secs(2);
/// Errors of one body that are shown.
const ERRORS_SHOWN_MAX: usize = 3;
/// Characters of an error body that are shown.
const TEXT_CHARS_MAX: usize = 300;

/// The body of a refusal.
#[derive(Debug, Default)]
pub(super) struct ErrorBody {
    errors: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Deserialize)]
struct Document {
    errors: Vec<Entry>,
}

impl ErrorBody {
    /// Reads what there is to read; a body that is late, too long or no such document counts as empty.
    pub(super) async fn read(answer: &mut Answer) -> Self {
        let until = Instant::now() + BODY_WAIT;
        let mut body = Vec::new();
        while body.len() < BODY_BYTES_MAX {
            match answer.chunk(until).await {
                Ok(Some(piece)) => body.extend_from_slice(&piece),
                Ok(None) => break,
                Err(_) => return Self::default(),
            }
        }
        Self::parse(&body)
    }

    pub(super) fn parse(body: &[u8]) -> Self {
        serde_json::from_slice::<Document>(body).map_or_else(
            |_| Self::default(),
            |document| Self {
                errors: document.errors,
            },
        )
    }

    /// What the refusal means whose body this is.
    pub(super) fn meaning(&self, what: &str, answer: &Answer, credentials: &str) -> Error {
        meaning(what, &answer.host.peer(), answer.status(), self, credentials)
    }

    /// Whether the registry gave one of these codes.
    pub(super) fn has(&self, codes: &[&str]) -> bool {
        self.errors
            .iter()
            .any(|error| codes.contains(&error.code.as_str()))
    }

    /// What the registry said, for the user; `None` if nothing.
    pub(super) fn text(&self) -> Option<String> {
        let shown: Vec<String> = self
            .errors
            .iter()
            .take(ERRORS_SHOWN_MAX)
            .map(|error| match &error.message {
                Some(message) if !message.is_empty() => format!("{}: {message}", error.code),
                _ => error.code.clone(),
            })
            .collect();
        (!shown.is_empty()).then(|| one_line(&shown.join("; "), TEXT_CHARS_MAX))
    }
}

/// The error for an answer that is no success. `credentials` says which were used, or where none were found.
pub(super) async fn refusal(what: &str, answer: &mut Answer, credentials: &str) -> Error {
    let body = ErrorBody::read(answer).await;
    body.meaning(what, answer, credentials)
}

fn meaning(what: &str, host: &str, status: StatusCode, body: &ErrorBody, credentials: &str) -> Error {
    let mut why = format!("{host} answered {status}");
    if let Some(text) = body.text() {
        why = format!("{why}: {text}");
    }
    let unknown = [
        "NAME_UNKNOWN",
        "MANIFEST_UNKNOWN",
        "BLOB_UNKNOWN",
        "NAME_INVALID",
        "TAG_INVALID",
        "NOT_FOUND",
    ];
    match status.as_u16() {
        401 | 403 => Error::denied(what, format!("{why}; {credentials}")),
        404 | 410 => Error::not_found(what, why),
        _ if body.has(&unknown) => Error::not_found(what, why),
        _ if body.has(&["UNAUTHORIZED", "DENIED"]) => Error::denied(what, format!("{why}; {credentials}")),
        405 | 501 => Error::unsupported(what, why),
        _ if body.has(&["UNSUPPORTED"]) => Error::unsupported(what, why),
        _ => Error::network(what, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16, body: &str) -> Error {
        let body = ErrorBody::parse(body.as_bytes());
        meaning(
            "h.example/a:1",
            "h.example",
            StatusCode::from_u16(status).unwrap(),
            &body,
            "no credentials",
        )
    }

    #[test]
    fn refusals_mean_what_the_specification_says() {
        let code = |code: &str| format!(r#"{{"errors":[{{"code":"{code}","message":"m","detail":{{}}}}]}}"#);
        assert!(matches!(
            error(404, &code("MANIFEST_UNKNOWN")),
            Error::NotFound { .. }
        ));
        assert!(matches!(error(404, "<html>"), Error::NotFound { .. }));
        assert!(matches!(
            error(400, &code("NAME_INVALID")),
            Error::NotFound { .. }
        ));
        assert!(matches!(error(401, ""), Error::Denied { .. }));
        assert!(matches!(error(403, &code("DENIED")), Error::Denied { .. }));
        assert!(matches!(
            error(400, &code("UNSUPPORTED")),
            Error::Unsupported { .. }
        ));
        assert!(matches!(error(418, ""), Error::Network { .. }));
    }

    #[test]
    fn the_registrys_words_are_shown_in_one_line() {
        let body = r#"{"errors":[{"code":"DENIED","message":"pull\naccess"},{"code":"X","message":null}]}"#;
        let text = error(403, body).to_string();
        assert!(
            text.ends_with("403 Forbidden: DENIED: pull access; X; no credentials"),
            "{text}"
        );
    }

    #[test]
    fn a_hostile_body_is_bounded() {
        let body = format!(
            r#"{{"errors":[{{"code":"A","message":"{}"}}]}}"#,
            "x".repeat(10_000)
        );
        assert!(error(500, &body).to_string().len() < 500);
        assert!(ErrorBody::parse(b"{\"errors\":7}").text().is_none());
    }
}
