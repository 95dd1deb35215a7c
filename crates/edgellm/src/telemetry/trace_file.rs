//! Spans as a file that Perfetto and Chromium's `about:tracing` open.
//!
//! The JSON array form of the Trace Event Format (Google, 2016): complete events (`"ph":"X"`) with `ts` and `dur` in
//! microseconds. In that form the closing bracket is optional, so that the file of a program that was killed opens too.
//! A file has a limit, which its first event tells; what comes after it is counted, and the last event tells the count.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use edgellm_model::ModelError;
use serde_json::{Value, json};

/// Bytes of a file.
pub const TRACE_LIMIT: u64 = 64 << 20;

/// Bytes that are collected before they are written.
const BUFFER: usize = 64 << 10;

/// A span that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended<'a> {
    pub(super) name: &'a str,
    pub(super) category: &'a str,
    pub(super) start: Instant,
    pub(super) ns: u64,
    pub(super) thread: u64,
    pub(super) index: Option<u64>,
    pub(super) tokens: u64,
    pub(super) bytes: u64,
}

/// A file of spans.
#[derive(Debug)]
pub(super) struct TraceFile {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    written: u64,
    limit: u64,
    dropped: u64,
    start: Instant,
    named: Vec<u64>,
}

impl TraceFile {
    /// Creates the file, or replaces it.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn create(path: &Path, start: Instant, limit: u64) -> Result<Self, ModelError> {
        let file = File::create(path).map_err(|e| ModelError::io(path, e))?;
        let buffer = Vec::with_capacity(BUFFER + 1024);
        let mut trace =
            Self { file, path: path.to_owned(), buffer, written: 0, limit, dropped: 0, start, named: Vec::new() };
        trace.buffer.extend_from_slice(b"[\n");
        let process = json!({
            "name": "process_name", "ph": "M", "pid": std::process::id(), "tid": 0, "ts": 0,
            "args": {"name": "edgellm", "limit_bytes": limit},
        });
        trace.buffer.extend_from_slice(process.to_string().as_bytes());
        trace.flush()?;
        Ok(trace)
    }

    /// Adds a span.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn complete(&mut self, span: Ended<'_>) -> Result<(), ModelError> {
        if self.written + self.buffer.len() as u64 >= self.limit {
            self.dropped += 1;
            return Ok(());
        }
        let pid = std::process::id();
        if !self.named.contains(&span.thread) {
            self.named.push(span.thread);
            let name = std::thread::current().name().unwrap_or("unnamed").to_owned();
            self.event(&json!({
                "name": "thread_name", "ph": "M", "pid": pid, "tid": span.thread, "ts": 0, "args": {"name": name},
            }));
        }
        // Names are literals of ours, which JSON writes as Rust does; a tree of values would cost more than most operators.
        let Ended { name, category, ns, thread, .. } = span;
        let ts = span.start.saturating_duration_since(self.start).as_nanos() as f64 / 1e3;
        let dur = ns as f64 / 1e3;
        let out = &mut self.buffer;
        let head = format_args!(
            ",\n{{\"name\":{name:?},\"cat\":{category:?},\"ph\":\"X\",\"ts\":{ts:.3},\"dur\":{dur:.3},\"pid\":{pid},\"tid\":{thread},\"args\":{{"
        );
        let _ = out.write_fmt(head);
        let fields = [("index", span.index), ("tokens", above_zero(span.tokens)), ("bytes", above_zero(span.bytes))];
        for (place, (name, value)) in fields.into_iter().filter_map(|(name, value)| Some((name, value?))).enumerate() {
            let comma = if place > 0 { "," } else { "" };
            let _ = write!(out, "{comma}\"{name}\":{value}");
        }
        out.extend_from_slice(b"}}");
        if self.buffer.len() >= BUFFER { self.flush() } else { Ok(()) }
    }

    /// Writes what was collected: whole events.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn flush(&mut self) -> Result<(), ModelError> {
        self.written += self.buffer.len() as u64;
        let result = self.file.write_all(&self.buffer).map_err(|e| ModelError::io(&self.path, e));
        self.buffer.clear();
        result
    }

    /// Ends the array.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn finish(&mut self) -> Result<(), ModelError> {
        let ts = self.start.elapsed().as_nanos() as f64 / 1e3;
        let args = json!({"dropped_events": self.dropped, "limit_bytes": self.limit});
        let pid = std::process::id();
        self.event(&json!({"name": "end", "ph": "i", "s": "g", "ts": ts, "pid": pid, "tid": 0, "args": args}));
        self.buffer.extend_from_slice(b"\n]\n");
        self.flush()
    }

    fn event(&mut self, event: &Value) {
        self.buffer.extend_from_slice(b",\n");
        self.buffer.extend_from_slice(event.to_string().as_bytes());
    }
}

fn above_zero(value: u64) -> Option<u64> {
    (value > 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: Instant, index: u64) -> Ended<'static> {
        Ended { name: "block", category: "block", start, ns: 1500, thread: 1, index: Some(index), tokens: 0, bytes: 9 }
    }

    #[test]
    fn a_file_is_json_when_it_ends_and_but_for_a_bracket_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        let start = Instant::now();
        let mut trace = TraceFile::create(&path, start, TRACE_LIMIT).unwrap();
        (0..3).for_each(|i| trace.complete(span(start, i)).unwrap());
        trace.flush().unwrap();
        let open = std::fs::read_to_string(&path).unwrap();
        let events: Vec<Value> = serde_json::from_str(&(open + "]")).unwrap();
        assert_eq!(events.len(), 5);
        assert_eq!(
            (&events[2]["ph"], &events[2]["dur"], &events[2]["args"]["bytes"]),
            (&json!("X"), &json!(1.5), &json!(9))
        );
        trace.finish().unwrap();
        let closed: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(closed[0]["args"]["limit_bytes"], json!(TRACE_LIMIT));
        assert_eq!(closed[5]["args"]["dropped_events"], json!(0));
    }

    #[test]
    fn a_file_stays_below_its_limit_and_tells_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        let start = Instant::now();
        let mut trace = TraceFile::create(&path, start, 1000).unwrap();
        (0..100).for_each(|i| trace.complete(span(start, i)).unwrap());
        trace.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() < 1000 + 500, "{}", text.len());
        let events: Vec<Value> = serde_json::from_str(&text).unwrap();
        let kept = events.iter().filter(|e| e["ph"] == "X").count();
        assert_eq!(events.last().unwrap()["args"]["dropped_events"], json!(100 - kept));
        assert!((1..20).contains(&kept), "{kept}");
    }
}
