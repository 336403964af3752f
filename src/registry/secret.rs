//! What must not be seen: passwords and tokens, and the signatures in the query of a URL. Everything that may end in
//! a log, an error or a debug print goes through the types and the one function here.

use std::fmt;

use reqwest::Url;
use reqwest::header::HeaderValue;

/// A text that never shows itself: its debug form is `***`, and it has no display form.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Takes the text in.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The value of an Authorization header, or `None` where the secret cannot be sent in one. It is marked sensitive,
/// so that no HTTP library prints it either.
pub(super) fn authorization(scheme: &str, secret: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("{scheme} {secret}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The form of `url` that may be shown: scheme, host, port and path, without user information, query and fragment.
pub(super) fn redact(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// Host and port of `url` as written in it, without the port where it is the scheme's default.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Text of a foreign server made fit for one line of an error: control characters become spaces, the query of every
/// URL in it is cut off, and it ends after `chars_max` characters.
pub(super) fn one_line(text: &str, chars_max: usize) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let mut line = String::new();
    for word in words.filter(|word| !word.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        match word.split_once('?') {
            Some((start, _)) if word.contains('/') => {
                line.push_str(start);
                line.push_str("?…");
            }
            _ => line.push_str(word),
        }
        if line.len() > chars_max * 4 {
            break;
        }
    }
    match line.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_does_not_print() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "*** Some(***)");
        assert!(!format!("{:?}", authorization("Bearer", "hunter2")).contains("hunter2"));
    }

    #[test]
    fn a_shown_url_has_no_user_and_no_query() {
        let url = Url::parse("https://user:pass@cdn.example:8443/a/b?X-Amz-Signature=abc#frag").unwrap();
        assert_eq!(redact(&url), "https://cdn.example:8443/a/b");
    }

    #[test]
    fn foreign_text_is_one_short_line_without_signatures() {
        let text = "first\nsecond \u{1b}[31m see https://x.example/y?sig=SECRET ok?";
        assert_eq!(
            one_line(text, 200),
            "first second [31m see https://x.example/y?… ok?"
        );
        assert_eq!(one_line("äöüß", 2), "äö…");
    }
}
