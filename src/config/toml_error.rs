//! Mistakes in TOML, told without the values: a header or the URL of a proxy may hold a password.

/// The line, from 1, on which `error` found its fault in `text`; what it is; and the key or table that it is in.
#[must_use]
pub fn explain(error: &toml::de::Error, text: &str) -> (usize, String, String) {
    let offset = error.span().map_or(0, |span| span.start);
    let before = text.get(..offset).unwrap_or_default();
    let number = before.bytes().filter(|&byte| byte == b'\n').count() + 1;
    let above = text.lines().take(number).collect::<Vec<_>>();
    let key = above
        .iter()
        .rev()
        .find_map(|line| key_in(line))
        .unwrap_or_default();
    (number, without_value(error.message()), key.to_owned())
}

/// The key or the table that a line names. A line may be a part of a value that began above it, and a secret.
fn key_in(line: &str) -> Option<&str> {
    let key = match line.split_once('=') {
        Some((key, _)) => key.trim(),
        None => line.trim(),
    };
    let named = match key.starts_with('[') {
        true => key.parse::<toml::Table>().is_ok(),
        false => line.contains('=') && format!("{key} = 0").parse::<toml::Table>().is_ok(),
    };
    named.then_some(key)
}

/// `invalid type: string "x", expected a map` without the `"x"`.
fn without_value(message: &str) -> String {
    let told = message.split_once(": ").and_then(|(kind, rest)| {
        let (found, expected) = rest.rsplit_once(", expected ")?;
        let (of_type, _) = found.split_once(['"', '`'])?;
        let wrong = kind.starts_with("invalid type") || kind.starts_with("invalid value");
        wrong.then(|| format!("{kind}: {}, expected {expected}", of_type.trim()))
    });
    told.unwrap_or_else(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_and_the_kind_of_a_mistake_but_not_the_value() {
        let explained = |text: &str| {
            #[derive(Debug, serde::Deserialize)]
            #[serde(deny_unknown_fields)]
            struct Document {
                #[serde(rename = "number")]
                _number: u32,
                #[serde(rename = "table")]
                _table: std::collections::BTreeMap<String, String>,
            }
            explain(&toml::from_str::<Document>(text).unwrap_err(), text)
        };
        let (line, why, key) = explained("number = 1\n\ntable = \"hunter2, expected x\"");
        assert_eq!((line, key.as_str()), (3, "table"));
        assert_eq!(why, "invalid type: string, expected a map");
        let (_, why, _) = explained("number = -7");
        assert_eq!(why, "invalid value: integer, expected u32");
        let (_, why, key) = explained("nomber = \"hunter2\"");
        assert!(why.contains("nomber") && key == "nomber", "{why}");
        let (_, why, key) = explained("number = 1\ntable = { x = \"hunter2 }");
        assert!(
            !why.contains("hunter2") && !key.contains("hunter2"),
            "{why} {key}"
        );
        for value in ["\"hunter2\" 5", "\"hunter2==\" 5", "hunter2"] {
            let (line, why, key) = explained(&format!("number = 1\ntable = [\n{value}\n]"));
            assert!(!why.contains("hunter2"), "{why}");
            assert_eq!((line > 1, key.as_str()), (true, "table"), "{why}");
        }
        let (_, _, key) = explained("[[number]]\nx = 1");
        assert_eq!(key, "[[number]]");
    }
}
