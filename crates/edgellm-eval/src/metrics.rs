//! Metrics as JSON lines: one object a line, with `event`, `time_s` since the start, and the event's own fields.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use edgellm_model::ModelError;
use edgellm_model::traits::MetricSink;
use serde_json::{Map, Value};

/// A file of metrics. Events are appended; each is written at once, so that a run that is killed leaves whole lines.
#[derive(Debug)]
pub struct JsonLines {
    file: File,
    path: PathBuf,
    start: Instant,
}

impl JsonLines {
    /// Opens `path` to append to it, or creates it. A last line that was cut short is ended first.
    ///
    /// # Errors
    /// The file cannot be opened or written.
    pub fn append(path: &Path) -> Result<Self, ModelError> {
        let failed = |e| ModelError::io(path, e);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
        if file.metadata().map_err(failed)?.len() > 0 {
            let mut last = [0u8];
            file.seek(SeekFrom::End(-1)).map_err(failed)?;
            file.read_exact(&mut last).map_err(failed)?;
            if last != *b"\n" {
                file.write_all(b"\n").map_err(failed)?;
            }
        }
        Ok(Self { file, path: path.to_owned(), start: Instant::now() })
    }
}

impl MetricSink for JsonLines {
    fn record(&mut self, event: &str, fields: Value) -> Result<(), ModelError> {
        let line = line(event, self.start.elapsed().as_secs_f64(), fields)?;
        self.file.write_all(line.as_bytes()).map_err(|e| ModelError::io(&self.path, e))
    }
}

/// One event as a line of JSON, its end included.
fn line(event: &str, seconds: f64, fields: Value) -> Result<String, ModelError> {
    let bad = |expected: &str, found: String| {
        Err(ModelError::Value { what: format!("fields of the event '{event}'"), expected: expected.into(), found })
    };
    let fields = match fields {
        Value::Object(fields) => fields,
        Value::Null => Map::new(),
        other => return bad("a JSON object", other.to_string()),
    };
    let mut object = Map::new();
    object.insert("event".into(), event.into());
    object.insert("time_s".into(), ((seconds * 1e3).round() / 1e3).into());
    for (name, value) in fields {
        if object.contains_key(&name) {
            return bad("names other than event and time_s, each once", name);
        }
        object.insert(name, value);
    }
    Ok(Value::Object(object).to_string() + "\n")
}

/// The most physical memory that this process had in use at a time, in bytes (`VmHWM` of `/proc/self/status`). `None`
/// on systems other than Linux and Android.
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// The physical memory that this process has in use now, in bytes (`VmRSS`). `None` on systems other than Linux and
/// Android.
pub fn rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// The physical memory that a process has in use, now and at most so far, in bytes. `None` on systems other than Linux and
/// Android, and for what is no process.
pub fn process_memory(process: u32) -> Option<[u64; 2]> {
    let status = status(&process.to_string())?;
    Some([parse_status(&status, "VmRSS:")?, parse_status(&status, "VmHWM:")?])
}

fn status_bytes(name: &str) -> Option<u64> {
    parse_status(&status("self")?, name)
}

fn status(process: &str) -> Option<String> {
    let known = cfg!(any(target_os = "linux", target_os = "android"));
    if known { std::fs::read_to_string(format!("/proc/{process}/status")).ok() } else { None }
}

fn parse_status(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_lines_and_the_file_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.jsonl");
        JsonLines::append(&path).unwrap().record("start", Value::Null).unwrap();
        // A run that was killed while it wrote.
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap() + "{\"eve").unwrap();
        let mut sink = JsonLines::append(&path).unwrap();
        sink.record("step", json!({"step": 3, "loss": 1.5})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[1], "{\"eve");
        let last: Value = serde_json::from_str(lines[2]).unwrap();
        assert_eq!((&last["event"], &last["step"], &last["loss"]), (&json!("step"), &json!(3), &json!(1.5)));
        assert!(last["time_s"].as_f64().unwrap() >= 0.0);
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn fields_must_be_an_object_with_names_of_its_own() {
        assert!(line("x", 0.0, json!([1])).is_err());
        assert!(line("x", 0.0, json!({"time_s": 1})).unwrap_err().to_string().contains("time_s"));
        assert_eq!(line("x", 0.12345, json!({})).unwrap(), "{\"event\":\"x\",\"time_s\":0.123}\n");
    }

    #[test]
    fn peak_memory_is_read_in_bytes() {
        assert_eq!(parse_status("VmPeak:\t 9 kB\nVmHWM:\t   1234 kB\n", "VmHWM:"), Some(1234 * 1024));
        assert_eq!(parse_status("VmPeak:\t 9 kB\n", "VmHWM:"), None);
        if let Some([now, most]) = process_memory(std::process::id()) {
            assert!(0 < now && now <= most && Some(most) <= peak_rss_bytes());
        }
        assert_eq!(process_memory(u32::MAX), None);
        if cfg!(target_os = "linux") {
            assert!(peak_rss_bytes().unwrap() > 1 << 20);
        }
    }
}
