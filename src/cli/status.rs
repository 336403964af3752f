//! `registryfs status`.

use clap::Args;
use nix::errno::Errno;
use serde_json::Value;

use super::context::Context;
use super::globals::Format;
use super::output::Output;
use super::text::{human_bytes, human_duration, timestamp, visible_name};
use crate::daemon::Query;
use crate::error::Result;

/// Show mounts, cache, transfers and recent errors
#[derive(Debug, Args)]
pub(super) struct Status {}

impl Status {
    pub(super) async fn run(&self, context: &Context, out: &mut Output) -> Result<()> {
        let status: Value = context.session().ask(Query::Status).await?;
        match out.format {
            Format::Json => out.json(&status),
            Format::Text => lines(&status, 0).iter().try_for_each(|line| out.line(line)),
        }
    }
}

/// The document as an outline: whatever the layers below report shows up here without this code knowing it.
fn lines(value: &Value, depth: usize) -> Vec<String> {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            let labels = fields.keys().map(|name| Unit::of(name).1);
            let width = labels.map(|label| label.chars().count()).max().unwrap_or(0) + 1;
            let field = |(name, value): (&String, &Value)| {
                let (unit, label) = Unit::of(name);
                let label = format!("{label}:");
                match scalar(value, unit) {
                    Some(text) => vec![format!("{indent}{label:<width$} {text}")],
                    None => std::iter::once(format!("{indent}{label}"))
                        .chain(lines(value, depth + 1))
                        .collect(),
                }
            };
            fields.iter().flat_map(field).collect()
        }
        Value::Array(items) => items.iter().flat_map(|item| list_item(item, depth)).collect(),
        other => scalar(other, Unit::None)
            .map(|text| format!("{indent}{text}"))
            .into_iter()
            .collect(),
    }
}

/// An item of a list: its first line begins with a dash.
fn list_item(item: &Value, depth: usize) -> Vec<String> {
    let indent = "  ".repeat(depth);
    if let Some(text) = failure(item).or_else(|| scalar(item, Unit::None)) {
        return vec![format!("{indent}- {text}")];
    }
    let mut inner = lines(&said(item), depth + 1);
    if let Some(first) = inner.first_mut() {
        *first = format!("{indent}- {}", first.trim_start());
    }
    inner
}

/// What an item of a list says: many such items in a row, most of whose fields say nothing, would hide the others.
fn said(item: &Value) -> Value {
    let Value::Object(fields) = item else {
        return item.clone();
    };
    let says_something = |value: &Value| match value {
        Value::Null => false,
        Value::Array(items) => !items.is_empty(),
        _ => true,
    };
    let said = fields.iter().filter(|(_, value)| says_something(value));
    said.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A failed operation on one line: when, what, where, which errno, and why.
fn failure(item: &Value) -> Option<String> {
    let number = |name: &str| item.get(name)?.as_u64();
    let text = |name: &str| Some(visible_name(item.get(name)?.as_str()?));
    let errno = i32::try_from(number("errno")?).ok()?;
    let times = match number("times")? {
        0 | 1 => String::new(),
        times => format!(" ({times} times)"),
    };
    Some(format!(
        "{} {} {}: {:?}: {}{times}",
        timestamp(number("at_ms")?),
        text("operation")?,
        text("path")?,
        Errno::from_raw(errno),
        text("reason")?,
    ))
}

/// What a number counts, as the end of its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    None,
    Bytes,
    BytesPerSecond,
    Seconds,
    Milliseconds,
}

impl Unit {
    /// The unit in a field's name, and the name for people, without it.
    fn of(name: &str) -> (Self, String) {
        let suffixes = [
            ("_bytes_per_s", Self::BytesPerSecond),
            ("_bytes", Self::Bytes),
            ("_ms", Self::Milliseconds),
            ("_s", Self::Seconds),
        ];
        let found = suffixes
            .iter()
            .find_map(|(suffix, unit)| Some((*unit, name.strip_suffix(suffix)?)));
        let (unit, bare) = match found {
            Some(found) => found,
            None if name == "bytes" => (Self::Bytes, "received"),
            None => (Self::None, name),
        };
        (unit, visible_name(bare).replace('_', " "))
    }

    fn text(self, number: u64) -> String {
        match self {
            Self::None => number.to_string(),
            Self::Bytes => human_bytes(number),
            Self::BytesPerSecond => format!("{}/s", human_bytes(number)),
            Self::Seconds => human_duration(number.saturating_mul(1000)),
            Self::Milliseconds => human_duration(number),
        }
    }
}

/// A value that fits behind its name; counters that never counted would only hide the others.
fn scalar(value: &Value, unit: Unit) -> Option<String> {
    match value {
        Value::Null => Some("-".to_owned()),
        Value::Bool(true) => Some("yes".to_owned()),
        Value::Bool(false) => Some("no".to_owned()),
        Value::Number(number) => Some(
            number
                .as_u64()
                .map_or_else(|| number.to_string(), |number| unit.text(number)),
        ),
        Value::String(text) => Some(visible_name(text)),
        Value::Array(items) if items.is_empty() => Some("-".to_owned()),
        Value::Array(_) => None,
        Value::Object(fields) if fields.values().all(Value::is_u64) => {
            let counters = fields.iter().filter_map(|(name, count)| {
                let count = count.as_u64().filter(|&count| count != 0)?;
                let (unit, label) = Unit::of(name);
                Some(format!("{label} {}", unit.text(count)))
            });
            let texts: Vec<String> = counters.collect();
            Some(if texts.is_empty() {
                "-".to_owned()
            } else {
                texts.join(", ")
            })
        }
        Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_outline_shows_every_value_under_its_name() {
        let status = json!({
            "cache": {"disk_bytes": 1536, "layers": 2},
            "daemon": null,
            "mounts": [
                {"mountpoint": "/m", "mounted_s": 130, "requests": {"read": 3, "lookup": 0}, "digest": null, "deny": []},
                {"mountpoint": "/n"},
            ],
            "stale": [],
        });
        let expected = [
            "cache:  disk 1.5 KiB, layers 2",
            "daemon: -",
            "mounts:",
            "  - mounted:    2 min",
            "    mountpoint: /m",
            "    requests:   read 3",
            "  - mountpoint: /n",
            "stale:  -",
        ];
        assert_eq!(lines(&status, 0), expected);
    }

    #[test]
    fn a_failed_operation_is_one_line() {
        let failure = |times: u64| {
            json!({
                "at_ms": 951_827_696_007_u64,
                "operation": "read",
                "path": "r.example/a\nb",
                "errno": libc::EIO,
                "reason": "the host is down",
                "times": times,
            })
        };
        let expected = [
            "errors:",
            "  - 2000-02-29T12:34:56.007Z read r.example/a?b: EIO: the host is down",
            "  - 2000-02-29T12:34:56.007Z read r.example/a?b: EIO: the host is down (3 times)",
        ];
        assert_eq!(lines(&json!({ "errors": [failure(1), failure(3)] }), 0), expected);
    }
}
