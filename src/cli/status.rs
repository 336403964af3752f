//! `registryfs status`.

use clap::Args;
use serde_json::Value;

use super::context::Context;
use super::globals::Format;
use super::output::Output;
use super::text::visible_name;
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
            let width = fields.keys().map(String::len).max().unwrap_or(0) + 1;
            let field = |(name, value): (&String, &Value)| {
                let name = format!("{}:", visible_name(name).replace('_', " "));
                match scalar(value) {
                    Some(text) => vec![format!("{indent}{name:<width$} {text}")],
                    None => std::iter::once(format!("{indent}{name}"))
                        .chain(lines(value, depth + 1))
                        .collect(),
                }
            };
            fields.iter().flat_map(field).collect()
        }
        Value::Array(items) => items.iter().flat_map(|item| list_item(item, depth)).collect(),
        other => scalar(other)
            .map(|text| format!("{indent}{text}"))
            .into_iter()
            .collect(),
    }
}

/// An item of a list: its first line begins with a dash.
fn list_item(item: &Value, depth: usize) -> Vec<String> {
    let indent = "  ".repeat(depth);
    if let Some(text) = scalar(item) {
        return vec![format!("{indent}- {text}")];
    }
    let mut inner = lines(item, depth + 1);
    if let Some(first) = inner.first_mut() {
        *first = format!("{indent}- {}", first.trim_start());
    }
    inner
}

/// A value that fits behind its name; counters that never counted would only hide the others.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("-".to_owned()),
        Value::Bool(true) => Some("yes".to_owned()),
        Value::Bool(false) => Some("no".to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(visible_name(text)),
        Value::Array(items) if items.is_empty() => Some("-".to_owned()),
        Value::Array(_) => None,
        Value::Object(fields) if fields.values().all(Value::is_u64) => {
            let counted = fields.iter().filter(|(_, count)| count.as_u64() != Some(0));
            let texts: Vec<String> = counted.map(|(name, count)| format!("{name} {count}")).collect();
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
            "daemon": null,
            "mounts": [{"mountpoint": "/m", "requests": {"read": 3, "lookup": 0}}, {"mountpoint": "/n"}],
            "errors": [],
        });
        let expected = [
            "daemon: -",
            "errors: -",
            "mounts:",
            "  - mountpoint: /m",
            "    requests:   read 3",
            "  - mountpoint: /n",
        ];
        assert_eq!(lines(&status, 0), expected);
    }
}
