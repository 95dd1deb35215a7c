//! Evaluations that go on where they were stopped: a file with a line for every finished item (a window, a batch of
//! examples, a question, an answer).
//!
//! The first line holds all settings that items depend on; a file of other settings is refused. An item is appended as soon
//! as it is there, so that a process that is killed loses one item at most; a last line that was cut short is dropped.
//! Numbers are written with as many digits as tell them from every other number, as text, because readers of JSON numbers
//! may round: what is read again is what was measured, to the bit, and so are all figures.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use edgellm_model::ModelError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{EvalError, Result};
use crate::windows::Progress;

/// Version of the file; another is refused.
const VERSION: u64 = 1;

/// A finished item.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// What was measured of it.
    pub values: Vec<f64>,
    /// A text that belongs to it, such as a generated answer.
    pub text: Option<String>,
}

/// Finished items, in a file.
#[derive(Debug)]
pub struct ItemLog {
    file: File,
    path: PathBuf,
    items: HashMap<(String, usize), Entry>,
}

/// A line of an item.
#[derive(Serialize, Deserialize)]
struct Line {
    task: String,
    item: usize,
    values: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl ItemLog {
    /// Opens a file of items that was begun with the same `settings`, or begins one.
    ///
    /// # Errors
    /// The file cannot be read or written, is no file of items, or has other settings; then it is as it was.
    pub fn open(path: &Path, settings: &Map<String, Value>) -> Result<Self> {
        let failed = |e| ModelError::io(path, e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        // What was cut short is written again.
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |place| place + 1);
        let header = json!({"edgellm_items": VERSION, "settings": settings}).to_string() + "\n";
        if whole == 0 && !header.as_bytes().starts_with(&bytes) {
            return Err(bad(path, 1, "expected a file of items, or a new one"));
        }
        let mut items = HashMap::new();
        if whole > 0 {
            let text = std::str::from_utf8(&bytes[..whole]).map_err(|e| bad(path, 1, &e.to_string()))?;
            let mut lines = text.lines().enumerate();
            check_header(path, lines.next().map_or("", |(_, line)| line), settings)?;
            for (index, line) in lines {
                let (key, entry) = parse(line).map_err(|reason| bad(path, index + 1, &reason))?;
                items.insert(key, entry);
            }
        }
        file.set_len(whole as u64).map_err(failed)?;
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        if whole == 0 {
            file.write_all(header.as_bytes()).map_err(failed)?;
        }
        Ok(Self { file, path: path.to_owned(), items })
    }

    /// Items that are there.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn get(&self, task: &str, item: usize) -> Option<&Entry> {
        self.items.get(&(task.to_owned(), item))
    }

    fn put(&mut self, task: &str, item: usize, entry: &Entry) -> Result<()> {
        // `{}` of a float is the shortest text that reads as the same float.
        let values = entry.values.iter().map(f64::to_string).collect();
        let line = Line { task: task.to_owned(), item, values, text: entry.text.clone() };
        let line = json!(line).to_string() + "\n";
        self.file.write_all(line.as_bytes()).map_err(|e| ModelError::io(&self.path, e))?;
        self.items.insert((task.to_owned(), item), entry.clone());
        Ok(())
    }
}

fn bad(path: &Path, line: usize, reason: &str) -> EvalError {
    let what = format!("line {line} of a file of items");
    ModelError::Parse { path: path.to_path_buf(), what, reason: reason.to_owned() }.into()
}

fn parse(line: &str) -> Result<((String, usize), Entry), String> {
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let number = |text: &String| text.parse::<f64>().map_err(|e| format!("'{text}': {e}"));
    let values = line.values.iter().map(number).collect::<Result<_, _>>()?;
    Ok(((line.task, line.item), Entry { values, text: line.text }))
}

fn check_header(path: &Path, line: &str, settings: &Map<String, Value>) -> Result<()> {
    let header: Value = serde_json::from_str(line).map_err(|_| bad(path, 1, "expected the settings of the items"))?;
    let (version, Some(found)) = (&header["edgellm_items"], header["settings"].as_object()) else {
        return Err(bad(path, 1, "expected the settings of the items"));
    };
    if version.as_u64() != Some(VERSION) {
        return Err(bad(path, 1, &format!("expected items of version {VERSION}, found {version}")));
    }
    let none = &Value::Null;
    let differs = |name: &&String| settings.get(*name).unwrap_or(none) != found.get(*name).unwrap_or(none);
    match settings.keys().chain(found.keys()).find(differs) {
        Some(name) => Err(bad(
            path,
            1,
            &format!(
                "expected items of this evaluation, found those of another, whose {name} is {}, not {}; name another file, or \
                 remove this one",
                found.get(name).unwrap_or(none),
                settings.get(name).unwrap_or(none)
            ),
        )),
        None => Ok(()),
    }
}

/// The steps of an evaluation: tells how far it is, and asks for finished items first, if there is a file of them.
pub struct Steps<'a> {
    log: Option<&'a mut ItemLog>,
    progress: &'a mut dyn FnMut(Progress),
}

impl<'a> Steps<'a> {
    /// Steps of which nothing is kept.
    pub fn new(progress: &'a mut dyn FnMut(Progress)) -> Self {
        Self { log: None, progress }
    }

    /// Steps whose items are kept in `log`, if there is one.
    pub fn kept(log: Option<&'a mut ItemLog>, progress: &'a mut dyn FnMut(Progress)) -> Self {
        Self { log, progress }
    }

    /// Tells how far the evaluation is.
    pub fn done(&mut self, done: usize, total: usize) {
        (self.progress)(Progress { done, total });
    }

    /// An item that was finished before.
    pub fn find(&self, task: &str, item: usize) -> Option<Entry> {
        self.log.as_ref()?.get(task, item).cloned()
    }

    /// Keeps a finished item.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep(&mut self, task: &str, item: usize, entry: &Entry) -> Result<()> {
        self.log.as_mut().map_or(Ok(()), |log| log.put(task, item, entry))
    }

    /// The `count` values of an item: those that were kept, or what `compute` gives.
    ///
    /// # Errors
    /// Those of `compute`, kept values of another number, or a file that cannot be written.
    pub(crate) fn item(
        &mut self,
        task: &'static str,
        item: usize,
        count: usize,
        compute: impl FnOnce() -> Result<Vec<f64>>,
    ) -> Result<Vec<f64>> {
        let values = match self.find(task, item) {
            Some(entry) => entry.values,
            None => {
                let values = compute()?;
                self.keep(task, item, &Entry { values: values.clone(), text: None })?;
                values
            }
        };
        if values.len() != count {
            let (expected, found) = (format!("{count} in item {item} of {task}"), values.len().to_string());
            return Err(EvalError::Setting { what: "kept values", expected, found });
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(context: usize) -> Map<String, Value> {
        json!({"model": "abc", "context": context}).as_object().unwrap().clone()
    }

    fn run(path: &Path, items: std::ops::Range<usize>) -> (Vec<Vec<f64>>, usize) {
        let mut log = ItemLog::open(path, &settings(8)).unwrap();
        let mut progress = |_| {};
        let mut steps = Steps::kept(Some(&mut log), &mut progress);
        let mut computed = 0;
        let mut value = |item: usize| {
            computed += 1;
            Ok(vec![1.0 / (item as f64 + 3.0), f64::MIN_POSITIVE, 1e300 / 7.0])
        };
        let values = items.map(|item| steps.item("windows", item, 3, || value(item)).unwrap()).collect();
        (values, computed)
    }

    #[test]
    fn a_file_goes_on_where_it_was_cut_and_gives_the_same_bits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        let whole = run(&path, 0..5);
        assert_eq!(whole.1, 5);
        let text = std::fs::read(&path).unwrap();
        let ends: Vec<usize> = (0..text.len()).filter(|&place| text[place] == b'\n').collect();
        // Cut anywhere, also inside the header.
        for cut in (0..text.len()).step_by(7) {
            std::fs::write(&path, &text[..cut]).unwrap();
            let kept = ends.iter().filter(|&&end| end < cut).count().saturating_sub(1);
            assert_eq!(run(&path, 0..5), (whole.0.clone(), 5 - kept), "cut at {cut}");
            assert_eq!(std::fs::read(&path).unwrap(), text);
        }
    }

    #[test]
    fn other_settings_and_other_files_are_refused_and_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.jsonl");
        run(&path, 0..2);
        let before = std::fs::read(&path).unwrap();
        let error = ItemLog::open(&path, &settings(9)).unwrap_err().to_string();
        assert!(error.contains("whose context is 8, not 9"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        for other in ["a text\n", "a text", "{\"edgellm_items\":2,\"settings\":{}}\n", "[]\n", "\u{0}\n"] {
            std::fs::write(&path, other).unwrap();
            assert!(ItemLog::open(&path, &settings(8)).is_err(), "{other}");
            assert_eq!(std::fs::read(&path).unwrap(), other.as_bytes());
        }
        let header = String::from_utf8(before).unwrap().lines().next().unwrap().to_owned();
        for line in ["{}", "x", r#"{"task":"w","item":0,"values":["x"]}"#] {
            std::fs::write(&path, format!("{header}\n{line}\n")).unwrap();
            assert!(ItemLog::open(&path, &settings(8)).unwrap_err().to_string().contains("line 2"), "{line}");
        }
        std::fs::write(&path, format!("{header}\n{{\"task\":\"w\",\"item\":0,\"values\":[]}}\n")).unwrap();
        let mut log = ItemLog::open(&path, &settings(8)).unwrap();
        let mut progress = |_| {};
        assert!(Steps::kept(Some(&mut log), &mut progress).item("w", 0, 1, || Ok(vec![1.0])).is_err());
    }
}
