//! Reading what a report shows. A line that cannot be read is named and passed over: what is whole is shown.

use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::io::read_text;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::figures::{RECORD_VERSION, Record};

/// Events of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// The file's name.
    pub name: String,
    /// Its events, in order.
    pub events: Vec<Map<String, Value>>,
}

impl Metrics {
    /// The events of one kind.
    pub fn of<'a>(&'a self, event: &'a str) -> impl Iterator<Item = &'a Map<String, Value>> {
        self.events.iter().filter(move |fields| fields.get("event").and_then(Value::as_str) == Some(event))
    }
}

/// Reads a file of metrics, and what could not be read of it.
///
/// # Errors
/// The file cannot be read, or has no whole line.
pub fn read_metrics(path: &Path) -> Result<(Metrics, Vec<String>)> {
    let (events, problems) = lines(path, "an object with 'event'", |value| match value {
        Value::Object(fields) if fields.get("event").is_some_and(Value::is_string) => Ok(fields),
        _ => Err("no event".into()),
    })?;
    Ok((Metrics { name: file_name(path), events }, problems))
}

/// Reads a file of records, and what could not be read of it.
///
/// # Errors
/// The file cannot be read, or has no whole line.
pub fn read_records(path: &Path) -> Result<(Vec<Record>, Vec<String>)> {
    lines(path, "a record of a sweep", |value| {
        let version = value["version"].as_u64().unwrap_or(0);
        if version > u64::from(RECORD_VERSION) {
            return Err(format!("version {version}, of a newer edgellm than this one, which reads {RECORD_VERSION}"));
        }
        serde_json::from_value(value).map_err(|e| e.to_string())
    })
}

fn lines<T>(path: &Path, expected: &str, read: impl Fn(Value) -> Result<T, String>) -> Result<(Vec<T>, Vec<String>)> {
    let text = read_text(path)?;
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value: Result<Value, String> = serde_json::from_str(line).map_err(|_| "no whole JSON".to_owned());
        match value.and_then(&read) {
            Ok(item) => found.push(item),
            Err(reason) => {
                problems.push(format!("{}, line {}: expected {expected}, found {reason}", file_name(path), index + 1));
            }
        }
    }
    if found.is_empty() {
        let found = problems.first().map_or("an empty file", String::as_str).to_owned();
        let (path, what, expected) = (path.to_owned(), "lines".to_owned(), format!("at least one with {expected}"));
        return Err(ModelError::Format { path, what, expected, found }.into());
    }
    Ok((found, problems))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_whole_is_read_and_the_rest_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.jsonl");
        std::fs::write(&path, "{\"event\": \"step\", \"loss\": 1}\n{\"event\": \"st").unwrap();
        let (metrics, problems) = read_metrics(&path).unwrap();
        assert_eq!((metrics.of("step").count(), metrics.name.as_str()), (1, "m.jsonl"));
        assert!(problems.len() == 1 && problems[0].contains("m.jsonl, line 2"), "{problems:?}");
        for nothing in ["", "\n", "{\"a\": 1}", "[]"] {
            std::fs::write(&path, nothing).unwrap();
            assert!(read_metrics(&path).is_err(), "{nothing}");
        }
        std::fs::write(&path, "{\"version\": 99}\n").unwrap();
        assert!(read_records(&path).unwrap_err().to_string().contains("newer edgellm"));
    }
}
