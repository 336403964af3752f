//! A pattern for paths of an image, as `get` and `prefetch` take it: names and wildcards between slashes.

use globset::{Candidate, GlobBuilder, GlobMatcher};

use crate::error::{Error, Result};

/// The most components of a pattern: each is a step of a recursion.
const PARTS_MAX: usize = 256;

/// A pattern. Slashes at its beginning do not matter, empty components and `.` neither, so `.` and `/` are the root.
#[derive(Debug, Clone)]
pub struct Pattern {
    text: Vec<u8>,
    pub(super) parts: Vec<Part>,
    /// Whether a slash stands at its end: only directories match.
    pub(super) wants_dir: bool,
}

/// A component of a pattern.
#[derive(Debug, Clone)]
pub(super) enum Part {
    /// `..`
    Up,
    /// A name.
    Name(Vec<u8>),
    /// A name with `*`, `?` or `[...]`.
    Glob(GlobMatcher),
    /// `**`: any number of directories; at the end, everything below.
    Any,
}

impl Part {
    /// Whether a name matches a component with wildcards.
    pub(super) fn matches(glob: &GlobMatcher, name: &[u8]) -> bool {
        glob.is_match_candidate(&Candidate::from_bytes(name))
    }
}

impl Pattern {
    /// Parses a pattern. `*` stands for any bytes of a name, `?` for one byte, `[a-z]` and `[!a-z]` for one of a set, `**`
    /// as a whole component for any number of directories. A backslash takes the meaning from what follows it.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unclosed bracket, for wildcards beside bytes that are no UTF-8, and for more than 256
    /// components.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let mut parts = Vec::new();
        for component in text.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => parts.push(Part::Up),
                b"**" if matches!(parts.last(), Some(Part::Any)) => {}
                b"**" => parts.push(Part::Any),
                other => parts.push(part(other).map_err(|why| wrong(text, &why))?),
            }
        }
        if parts.len() > PARTS_MAX {
            return Err(wrong(text, &format!("more than {PARTS_MAX} components")));
        }
        let last = text.rsplit(|&byte| byte == b'/').next();
        Ok(Self {
            text: text.to_vec(),
            parts,
            wants_dir: matches!(last, Some(b"" | b"." | b"..")),
        })
    }

    /// Whether it has no wildcards: it names one path.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        !self
            .parts
            .iter()
            .any(|part| matches!(part, Part::Glob(_) | Part::Any))
    }

    /// The pattern as it was given, for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.text).into_owned()
    }
}

fn wrong(text: &[u8], why: &str) -> Error {
    let text = String::from_utf8_lossy(text);
    Error::usage(format!("pattern {text:?}: {why}"))
}

/// A component that is neither empty nor made of dots or stars alone.
fn part(component: &[u8]) -> std::result::Result<Part, String> {
    let mut name = Vec::with_capacity(component.len());
    let mut glob = Vec::with_capacity(component.len());
    let mut has_wildcard = false;
    let mut bytes = component.iter().copied();
    while let Some(byte) = bytes.next() {
        let (byte, is_quoted) = match byte {
            // At the end it stands for itself.
            b'\\' => (bytes.next().unwrap_or(b'\\'), true),
            other => (other, false),
        };
        has_wildcard |= !is_quoted && matches!(byte, b'*' | b'?' | b'[');
        name.push(byte);
        // The library knows alternatives in braces, which are names here: they could not reach over a slash.
        if is_quoted || matches!(byte, b'{' | b'}') {
            glob.push(b'\\');
        }
        glob.push(byte);
    }
    if !has_wildcard {
        return Ok(Part::Name(name));
    }
    let text = String::from_utf8(glob).map_err(|_| "wildcards work with UTF-8 only".to_owned())?;
    let glob = GlobBuilder::new(&text)
        .literal_separator(true)
        .backslash_escape(true)
        .build();
    glob.map(|glob| Part::Glob(glob.compile_matcher()))
        .map_err(|error| error.kind().to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a component with wildcards means, tried out letter by letter.
    fn naive(pattern: &[u8], name: &[u8]) -> bool {
        match pattern {
            [] => name.is_empty(),
            [b'*', rest @ ..] => (0..=name.len()).any(|at| naive(rest, &name[at..])),
            [b'?', rest @ ..] => !name.is_empty() && naive(rest, &name[1..]),
            [b'[', b'!', set, b']', rest @ ..] => {
                name.first().is_some_and(|byte| byte != set) && naive(rest, &name[1..])
            }
            [b'[', from, b'-', to, b']', rest @ ..] => {
                name.first().is_some_and(|byte| (from..=to).contains(&byte)) && naive(rest, &name[1..])
            }
            [b'\\', quoted, rest @ ..] => name.first() == Some(quoted) && naive(rest, &name[1..]),
            [same, rest @ ..] => name.first() == Some(same) && naive(rest, &name[1..]),
        }
    }

    fn matches(pattern: &[u8], name: &[u8]) -> bool {
        match part(pattern).unwrap() {
            Part::Name(only) => only == name,
            Part::Glob(glob) => Part::matches(&glob, name),
            Part::Up | Part::Any => unreachable!(),
        }
    }

    proptest! {
        #[test]
        fn a_component_matches_as_it_reads(
            pieces in prop::collection::vec(
                prop::sample::select(vec!["a", "b", "{", ".", "*", "?", "[a-c]", "[!a]", "\\*", "\\[", "é"]), 1..6),
            name in "[abcd*\\[{.é]{0,6}",
        ) {
            let pattern = pieces.concat();
            prop_assume!(!pattern.contains("**"));
            prop_assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), naive(pattern.as_bytes(), name.as_bytes()));
        }

        #[test]
        fn any_bytes_are_a_pattern_or_a_mistake(text in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = Pattern::parse(&text);
        }
    }

    #[test]
    fn names_are_any_bytes_and_wildcards_match_them() {
        assert!(matches(b"\xff\xfe", b"\xff\xfe"));
        assert!(matches(b"a*", b"a\xff"));
        assert!(matches(b"a?", b"a\xff"));
        assert!(matches(b"a\\", b"a\\"));
        for mistake in [&b"a/[b"[..], b"\xff*"] {
            let error = Pattern::parse(mistake).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }
}
