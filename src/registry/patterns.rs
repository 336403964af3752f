//! Patterns of host names, with which users say whom they mean.

use super::reference::{canonical_host, is_host};

/// Host patterns of the configuration, in which `*` stands for any text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostPatterns(Vec<String>);

impl HostPatterns {
    /// Patterns as they were written. Hosts are looked up by their canonical names, so that is how they are compared.
    #[must_use]
    pub fn new(patterns: &[String]) -> Self {
        let canonical =
            |pattern: &String| canonical_host(pattern).unwrap_or_else(|_| pattern.to_ascii_lowercase());
        Self(patterns.iter().map(canonical).collect())
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them means `host`, a canonical name.
    #[must_use]
    pub fn has(&self, host: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern, host))
    }

    /// The patterns that are hosts themselves.
    pub fn literals(&self) -> impl Iterator<Item = &String> {
        self.0.iter().filter(|pattern| is_host(pattern))
    }
}

/// Whether `pattern` means `host`, in time linear in both: each text between two stars is looked for behind the one before.
fn matches(pattern: &str, host: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == host;
    };
    let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    let inner = host
        .strip_prefix(head)
        .and_then(|behind| behind.strip_suffix(tail));
    let mut left = inner;
    for text in middle.split('*') {
        left = left
            .and_then(|left| left.split_once(text))
            .map(|(_, behind)| behind);
    }
    left.is_some()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_star_stands_for_any_text_anywhere() {
        for (pattern, host, expected) in [
            ("*", "ghcr.io", true),
            ("ghcr.io", "ghcr.io", true),
            ("ghcr.io", "ghcr.io:443", false),
            ("*.example.org", "a.b.example.org", true),
            ("*.example.org", "example.org", false),
            ("registry.*", "registry.example.org", true),
            ("*evil*", "very.evil.example", true),
            ("10.*.*.3:5000", "10.1.2.3:5000", true),
            ("localhost:*", "localhost:5000", true),
            // One text cannot be the beginning and the end.
            ("a.b*b.c", "a.b.c", false),
            ("*a*a*", "xax", false),
        ] {
            assert_eq!(matches(pattern, host), expected, "{pattern} {host}");
        }
    }

    #[test]
    fn patterns_are_compared_as_hosts_are_named() {
        let patterns = ["INDEX.docker.io", "*.Example.ORG"].map(str::to_owned);
        let patterns = HostPatterns::new(&patterns);
        assert!(patterns.has("docker.io"));
        assert!(patterns.has("a.example.org"));
        assert_eq!(patterns.literals().collect::<Vec<_>>(), ["docker.io"]);
    }

    /// The definition, letter by letter.
    fn model(pattern: &[u8], host: &[u8]) -> bool {
        match (pattern.split_first(), host.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => (0..=host.len()).any(|skipped| model(rest, &host[skipped..])),
            (Some((a, rest)), Some((b, left))) => a == b && model(rest, left),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_match_what_their_definition_says(pattern in "[ab*]{0,8}", host in "[ab]{0,10}") {
            prop_assert_eq!(matches(&pattern, &host), model(pattern.as_bytes(), host.as_bytes()));
        }
    }
}
