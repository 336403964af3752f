//! One answer of the demo registry before it is sent: status, headers, all of the body. Faults are applied to it here,
//! and error bodies have the form of the distribution specification.

use bytes::Bytes;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};

use crate::digest::Digest;

use super::behaviour::{Fault, RangeLie, RetryAfter};
use super::date;

/// The header that carries a digest.
pub(super) const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Status, headers and body.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// The whole blob that `body` is a range of, for faults that lie about the range.
    pub(super) whole: Option<Whole>,
}

/// A blob and the part of it that was asked for.
#[derive(Debug, Clone)]
pub(super) struct Whole {
    bytes: Bytes,
    first: u64,
    end: u64,
}

impl Answer {
    /// An answer without a body.
    pub(super) fn empty(status: StatusCode) -> Self {
        Self {
            status,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            whole: None,
        }
    }

    /// 200 with a body.
    pub(super) fn ok(content_type: &str, body: Bytes) -> Self {
        let answer = Self {
            body,
            ..Self::empty(StatusCode::OK)
        };
        answer.with(header::CONTENT_TYPE, content_type)
    }

    /// 200 with JSON.
    pub(super) fn json(value: &serde_json::Value) -> Self {
        Self::ok("application/json", Bytes::from(value.to_string()))
    }

    /// An error with the body that the distribution specification gives it.
    pub(super) fn error(status: StatusCode, code: &str, message: &str) -> Self {
        let body = serde_json::json!({"errors": [{"code": code, "message": message, "detail": null}]});
        Self {
            status,
            ..Self::json(&body)
        }
    }

    /// The same, boxed, for functions that answer early.
    pub(super) fn refusal(status: StatusCode, code: &str, message: &str) -> Box<Self> {
        Box::new(Self::error(status, code, message))
    }

    /// The answer that any registry gives with that status, for faults.
    fn of_status(status: u16) -> Self {
        let code = match status {
            400 => "UNSUPPORTED",
            401 => "UNAUTHORIZED",
            403 => "DENIED",
            404 => "MANIFEST_UNKNOWN",
            416 => "SIZE_INVALID",
            429 => "TOOMANYREQUESTS",
            _ => "UNKNOWN",
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::error(status, code, "the demo registry was told to answer so")
    }

    /// The same with one more header; a value that no header can have is left out.
    pub(super) fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }

    /// The answer to a read of `blob`: all of it, or the one range that `range` asks for. A syntax that is none is
    /// ignored, as RFC 9110 section 14.2 demands; several ranges at once are refused, as by many registries in the field.
    pub(super) fn blob(blob: &Bytes, range: Option<&str>) -> Self {
        let size = blob.len() as u64;
        let base = Self::ok("application/octet-stream", blob.clone()).with(header::ACCEPT_RANGES, "bytes");
        let (first, end) = match range.map_or(Range::Ignored, |range| parse_range(range, size)) {
            Range::Ignored => return base,
            Range::Several => {
                return Self::error(StatusCode::BAD_REQUEST, "UNSUPPORTED", "only one range at a time");
            }
            Range::Beyond => {
                return Self::error(
                    StatusCode::RANGE_NOT_SATISFIABLE,
                    "SIZE_INVALID",
                    "the range begins behind the blob",
                )
                .with(header::CONTENT_RANGE, &format!("bytes */{size}"));
            }
            Range::Part { first, end } => (first, end),
        };
        let whole = Whole {
            bytes: blob.clone(),
            first,
            end,
        };
        Self {
            status: StatusCode::PARTIAL_CONTENT,
            body: whole.slice(first, end),
            ..base.with(header::CONTENT_RANGE, &content_range(first, end, size))
        }
        .of(whole)
    }

    fn of(mut self, whole: Whole) -> Self {
        self.whole = Some(whole);
        self
    }

    /// Applies a fault that changes what is answered. Faults of time and transport are not this function's.
    pub(super) fn distort(self, fault: &Fault) -> Self {
        match fault {
            Fault::Status { status, retry_after } => {
                let mut answer = Self::of_status(*status);
                if *status == 401
                    && let Some(challenge) = self.headers.get(header::WWW_AUTHENTICATE)
                {
                    answer.headers.insert(header::WWW_AUTHENTICATE, challenge.clone());
                }
                match retry_after {
                    None => answer,
                    Some(RetryAfter::Seconds(seconds)) => {
                        answer.with(header::RETRY_AFTER, &seconds.to_string())
                    }
                    Some(RetryAfter::DateIn(seconds)) => {
                        answer.with(header::RETRY_AFTER, &date::http(date::now_s() + seconds))
                    }
                }
            }
            Fault::WrongDigestHeader => {
                self.with(DOCKER_CONTENT_DIGEST, &Digest::of(b"something else").to_string())
            }
            Fault::ContentType(text) => self.with(header::CONTENT_TYPE, text),
            Fault::FlipByte(at) => self.flip(*at),
            Fault::Range(lie) => self.lie(*lie),
            _ => self,
        }
    }

    fn flip(mut self, at: u64) -> Self {
        let mut bytes = self.body.to_vec();
        if let Some(byte) = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at)) {
            *byte ^= 0xff;
        }
        self.body = Bytes::from(bytes);
        self
    }

    fn lie(mut self, lie: RangeLie) -> Self {
        let Some(whole) = self.whole.clone() else {
            return self;
        };
        let (first, end, size) = (whole.first, whole.end, whole.bytes.len() as u64);
        match lie {
            RangeLie::WrongHeader => {
                let shifted = content_range(first + 1, end + 1, size + 1);
                self.with(header::CONTENT_RANGE, &shifted)
            }
            RangeLie::WrongBytes => {
                self.body = self.body.iter().map(|byte| byte ^ 0x5a).collect();
                self
            }
            RangeLie::WholeBody => {
                self.headers.remove(header::CONTENT_RANGE);
                self.status = StatusCode::OK;
                self.body = whole.bytes;
                self
            }
            RangeLie::ShortBody => {
                self.body = whole.slice(first, first + (end - first) / 2);
                self
            }
        }
    }

    /// The `Content-Length` that the answer to `method` announces.
    pub(super) fn content_length(&self) -> u64 {
        self.body.len() as u64
    }

    /// Whether `method` gets the body itself.
    pub(super) fn has_body(&self, method: &Method) -> bool {
        *method != Method::HEAD && !self.body.is_empty()
    }
}

impl Whole {
    fn slice(&self, first: u64, end: u64) -> Bytes {
        let size = self.bytes.len();
        let clamp = |offset: u64| usize::try_from(offset).unwrap_or(size).min(size);
        self.bytes.slice(clamp(first)..clamp(end).max(clamp(first)))
    }
}

fn content_range(first: u64, end: u64, size: u64) -> String {
    format!("bytes {first}-{}/{size}", end.saturating_sub(1))
}

/// What a `Range` header asks for.
#[derive(Debug, PartialEq, Eq)]
enum Range {
    /// Nothing that is understood.
    Ignored,
    /// More than one range.
    Several,
    /// Nothing that the blob has.
    Beyond,
    /// The bytes from `first` to before `end`.
    Part { first: u64, end: u64 },
}

/// RFC 9110 section 14.1.2: `bytes=FIRST-LAST`, `bytes=FIRST-`, `bytes=-LENGTH`.
fn parse_range(text: &str, size: u64) -> Range {
    let Some(spec) = text.trim().strip_prefix("bytes=") else {
        return Range::Ignored;
    };
    if spec.contains(',') {
        return Range::Several;
    }
    let Some((first, last)) = spec.split_once('-') else {
        return Range::Ignored;
    };
    match (first.trim().parse::<u64>(), last.trim().parse::<u64>()) {
        (Ok(first), Ok(last)) if first > last => Range::Ignored,
        (Ok(first), _) if first >= size => Range::Beyond,
        (Ok(first), Ok(last)) => Range::Part {
            first,
            end: last.saturating_add(1).min(size),
        },
        (Ok(first), Err(_)) if last.trim().is_empty() => Range::Part { first, end: size },
        (Err(_), Ok(length)) if first.trim().is_empty() => match length.min(size) {
            0 => Range::Beyond,
            length => Range::Part {
                first: size - length,
                end: size,
            },
        },
        _ => Range::Ignored,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        let part = |first, end| Range::Part { first, end };
        let cases = [
            ("bytes=0-0", part(0, 1)),
            ("bytes=2-4", part(2, 5)),
            ("bytes=2-", part(2, 10)),
            ("bytes=-3", part(7, 10)),
            ("bytes=-30", part(0, 10)),
            ("bytes=9-99", part(9, 10)),
            ("bytes=10-", Range::Beyond),
            ("bytes=-0", Range::Beyond),
            ("bytes=4-2", Range::Ignored),
            ("bytes=a-2", Range::Ignored),
            ("bytes=2-b", Range::Ignored),
            ("items=0-1", Range::Ignored),
            ("bytes=0-1,3-4", Range::Several),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_range(text, 10), expected, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Range::Beyond);
    }

    #[test]
    fn a_lie_is_about_the_range_that_was_asked_for() {
        let blob = Bytes::from_static(b"0123456789");
        let honest = Answer::blob(&blob, Some("bytes=2-5"));
        assert_eq!(honest.body, "2345");
        assert_eq!(honest.headers[header::CONTENT_RANGE], "bytes 2-5/10");
        let told = |lie| honest.clone().distort(&Fault::Range(lie));
        assert_eq!(told(RangeLie::ShortBody).body, "23");
        assert_eq!(told(RangeLie::WholeBody).status, 200);
        assert_eq!(told(RangeLie::WholeBody).body, blob);
        assert_eq!(told(RangeLie::WrongBytes).body.len(), 4);
        assert_ne!(told(RangeLie::WrongBytes).body, honest.body);
        let header = &told(RangeLie::WrongHeader).headers[header::CONTENT_RANGE];
        assert_eq!(header, "bytes 3-6/11");
        let unranged = Answer::blob(&blob, None).distort(&Fault::Range(RangeLie::ShortBody));
        assert_eq!(unranged.body, blob);
    }
}
