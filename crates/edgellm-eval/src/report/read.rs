//! Reading what a report shows. A line that cannot be read is named and passed over: what is whole is shown.

use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::io::read_text;
use serde_json::{Map, Value};

use super::series::number;
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

/// What a file of JSON lines holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Lines {
    /// Runs, from `--metrics`.
    Metrics(Vec<Metrics>),
    /// What a sweep measured.
    Records(Vec<Record>),
}

/// Reads a file of metrics or of records, and what could not be read of it: of records, if the first whole line is none of
/// metrics and has a `version`.
///
/// # Errors
/// The file cannot be read, or has no whole line.
pub fn read_lines(path: &Path) -> Result<(Lines, Vec<String>)> {
    let text = read_text(path)?;
    let first = text.lines().find_map(|line| serde_json::from_str::<Map<String, Value>>(line).ok());
    if first.is_some_and(|fields| !fields.contains_key("event") && fields.contains_key("version")) {
        return read_records(path).map(|(records, problems)| (Lines::Records(records), problems));
    }
    read_metrics(path).map(|(metrics, problems)| (Lines::Metrics(metrics), problems))
}

/// Reads a file of metrics, and what could not be read of it. Several runs may share a file, in which time begins again with
/// each; one that goes on with the steps of the run before it belongs to that one.
///
/// # Errors
/// The file cannot be read, or has no whole line.
pub fn read_metrics(path: &Path) -> Result<(Vec<Metrics>, Vec<String>)> {
    let (events, problems) = lines(path, "an object with 'event'", |value| match value {
        Value::Object(fields) if fields.get("event").is_some_and(Value::is_string) => Ok(fields),
        _ => Err("no event".into()),
    })?;
    let mut runs = runs(events);
    let name = file_name(path);
    let several = runs.len() > 1;
    for (index, run) in runs.iter_mut().enumerate() {
        run.name = if several { format!("{name}, run {}", index + 1) } else { name.clone() };
    }
    Ok((runs, problems))
}

/// The runs of a file.
fn runs(events: Vec<Map<String, Value>>) -> Vec<Metrics> {
    let mut parts: Vec<Vec<Map<String, Value>>> = Vec::new();
    let mut before = f64::INFINITY;
    for event in events {
        let time = number(&event, "time_s").unwrap_or(before);
        match parts.last_mut() {
            Some(part) if time >= before => part.push(event),
            _ => parts.push(vec![event]),
        }
        before = time;
    }
    let mut runs: Vec<Metrics> = Vec::new();
    for mut part in parts {
        let first = part.iter().find_map(|event| number(event, "step"));
        match (runs.last_mut(), first) {
            (Some(run), Some(first)) if first > 0.0 && run.of("step").next().is_some() => {
                let offset = run.events.iter().filter_map(|event| number(event, "time_s")).fold(0.0, f64::max);
                // Steps behind the checkpoint were run again. What the run before said of its end is not the end.
                run.events.retain(|event| number(event, "step").is_none_or(|step| step < first));
                run.events.retain(|event| event.get("event").and_then(Value::as_str) != Some("end"));
                for event in &mut part {
                    if let Some(time) = number(event, "time_s") {
                        event.insert("time_s".into(), (time + offset).into());
                    }
                }
                run.events.append(&mut part);
            }
            _ => runs.push(Metrics { name: String::new(), events: part }),
        }
    }
    runs
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
        assert_eq!((metrics[0].of("step").count(), metrics[0].name.as_str()), (1, "m.jsonl"));
        assert!(problems.len() == 1 && problems[0].contains("m.jsonl, line 2"), "{problems:?}");
        for nothing in ["", "\n", "{\"a\": 1}", "[]"] {
            std::fs::write(&path, nothing).unwrap();
            assert!(read_metrics(&path).is_err(), "{nothing}");
        }
        std::fs::write(&path, "{\"version\": 99}\n").unwrap();
        assert!(read_records(&path).unwrap_err().to_string().contains("newer edgellm"));
    }

    #[test]
    fn the_kind_of_a_file_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.jsonl");
        std::fs::write(&path, "{\"event\": \"step\", \"version\": 99}\n").unwrap();
        assert!(matches!(read_lines(&path).unwrap().0, Lines::Metrics(_)));
        let record = serde_json::to_string(&crate::names::tests::named(&[("task", "text")])).unwrap();
        std::fs::write(&path, format!("{{\"ve\n{record}\n{{\"version\": 99}}\n")).unwrap();
        let (lines, problems) = read_lines(&path).unwrap();
        assert!(matches!(lines, Lines::Records(records) if records.len() == 1));
        assert!(problems.len() == 2 && problems[1].contains("newer edgellm"), "{problems:?}");
    }

    #[test]
    fn runs_of_a_file_are_told_apart_and_resumed_ones_joined() {
        let event = |line: &str| serde_json::from_str::<Map<String, Value>>(line).unwrap();
        let step = |step: u32, time: f64| event(&format!("{{\"event\":\"step\",\"step\":{step},\"time_s\":{time}}}"));
        let end = || event(r#"{"event":"end","steps":3,"time_s":3.5}"#);
        let steps = |metrics: &Metrics| -> Vec<(f64, f64)> {
            metrics.of("step").map(|s| (number(s, "step").unwrap(), number(s, "time_s").unwrap())).collect()
        };
        // A run that was stopped after step 2, and whose checkpoint was before step 2.
        let found = runs(vec![step(0, 1.0), step(1, 2.0), step(2, 3.0), end(), step(2, 0.5), step(3, 1.5)]);
        assert_eq!(found.len(), 1);
        assert_eq!(steps(&found[0]), [(0.0, 1.0), (1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]);
        assert_eq!(found[0].of("end").count(), 0);
        // Another run.
        let found = runs(vec![step(0, 1.0), step(1, 2.0), end(), step(0, 0.5)]);
        assert_eq!((found.len(), found[0].of("end").count(), steps(&found[1])), (2, 1, vec![(0.0, 0.5)]));
    }
}
