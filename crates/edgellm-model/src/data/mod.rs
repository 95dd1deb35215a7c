//! Training and evaluation examples from files.
//!
//! A [`DataFormat`] turns a file into records: JSON lines and CSV hold
//! - `instruction`, `input` and `output` (`input` may be missing or empty),
//! - `messages`, each with `role` and `content`, as chat interfaces have them,
//! - `prompt` and `response`, or
//! - `text`;
//!
//! a plain text is one record of the last kind. A [`PromptTemplate`] makes a prompt and a response of a record. They are
//! tokenized on their own and joined, an end token is appended, and what is longer than the limit is cut off. The loss is
//! on the responses and their ends only: in a chat on every turn of the assistant. A text is cut into windows and learned
//! from its second token on.
//!
//! A line that cannot be used is an error with its number, or, if asked for, passed over and counted in a [`DataReport`].

mod csv;
mod example;
mod jsonl;
mod record;
mod report;
mod split;
mod template;
mod text;

pub use example::Example;
pub use record::Record;
pub use report::{DataReport, SkipReason, Skipped};
pub use split::ValSplit;
pub use template::{Encoded, ExampleEncoder, PromptTemplate, alpaca_prompt};

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use self::report::Bad;
use crate::error::{ModelError, Result, bytes};
use crate::io::MAX_TEXT_BYTES;

/// The longest record: 16 MiB.
const MAX_RECORD: usize = 16 << 20;

/// How a file holds records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFormat {
    /// A JSON object a line.
    Jsonl,
    /// Comma-separated values with a header row.
    Csv,
    /// One text.
    Text,
}

impl DataFormat {
    /// The format of a file by the end of its name.
    ///
    /// # Errors
    /// The name does not tell.
    pub fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
        match extension.as_str() {
            "jsonl" | "ndjson" | "json" => Ok(Self::Jsonl),
            "csv" => Ok(Self::Csv),
            "txt" | "md" => Ok(Self::Text),
            _ => {
                let expected = "a name that ends with .jsonl, .csv, .txt or .md, or a format (--data-format)";
                Err(ModelError::format(path, "data file", expected, "another name and no format"))
            }
        }
    }
}

impl FromStr for DataFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "jsonl" => Ok(Self::Jsonl),
            "csv" => Ok(Self::Csv),
            "text" => Ok(Self::Text),
            other => Err(format!("'{other}' is no data format; expected jsonl, csv or text")),
        }
    }
}

/// How data files are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// The format, if the file's name is not to decide.
    pub format: Option<DataFormat>,
    /// Whether a line that cannot be used is passed over and counted; otherwise it is an error.
    pub skip_bad_lines: bool,
}

/// Examples of a file, with what was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dataset {
    /// The examples in the file's order; each has a token to learn.
    pub examples: Vec<Example>,
    /// What became of the file.
    pub report: DataReport,
}

/// Where a format's reader puts what it finds.
struct Sink<'a> {
    path: &'a Path,
    skip_bad_lines: bool,
    report: DataReport,
    records: usize,
    accept: &'a mut dyn FnMut(usize, Record) -> Result<(), Bad>,
}

impl Sink<'_> {
    /// A record, or what is wrong with it, and the line on which it starts.
    fn put(&mut self, line: usize, record: Result<Record, Bad>) -> Result<()> {
        match record.and_then(|record| (self.accept)(line, record)) {
            Ok(()) => self.records += 1,
            Err(bad) if self.skip_bad_lines => self.report.skip(line, bad),
            Err(bad) => return Err(ModelError::data(self.path, line, bad.expected, bad.found)),
        }
        Ok(())
    }
}

/// Gives the records of a file to `accept`; returns what was left out.
fn for_each_record(
    path: &Path,
    options: &ReadOptions,
    accept: &mut dyn FnMut(usize, Record) -> Result<(), Bad>,
) -> Result<DataReport> {
    let format = options.format.map_or_else(|| DataFormat::of(path), Ok)?;
    let skip_bad_lines = options.skip_bad_lines;
    let mut sink = Sink { path, skip_bad_lines, report: DataReport::default(), records: 0, accept };
    match format {
        DataFormat::Jsonl => jsonl::read(&mut sink)?,
        DataFormat::Csv => csv::read(&read_whole(path)?, &mut sink)?,
        DataFormat::Text => text::read(&read_whole(path)?, &mut sink)?,
    }
    let (records, report) = (sink.records, sink.report);
    if records == 0 { Err(nothing_left(path, "at least one line with an example", &report)) } else { Ok(report) }
}

fn nothing_left(path: &Path, expected: &str, report: &DataReport) -> ModelError {
    let found = match report.skipped.first() {
        Some(first) => format!("none: {first}: {}", first.first),
        None => "none".into(),
    };
    ModelError::format(path, "data file", expected, found)
}

/// The records of a file, each with the number of the line on which it starts, from 1, and what was left out. Empty lines
/// are passed over.
///
/// # Errors
/// The file cannot be read; it has no record at all, or no header, or a quote without end (CSV); or, unless they are to be
/// passed over, a line is too long, is not UTF-8, or is no record.
pub fn read_records(path: &Path, options: &ReadOptions) -> Result<(Vec<(usize, Record)>, DataReport)> {
    let mut records = Vec::new();
    let report = for_each_record(path, options, &mut |line, record| {
        records.push((line, record));
        Ok(())
    })?;
    Ok((records, report))
}

/// The examples of a file, in its order. Those without a token to learn within the length limit are left out and counted.
///
/// # Errors
/// As [`read_records`]; a record cannot be encoded (unless such lines are to be passed over); no example is left.
pub fn read_examples(path: &Path, encoder: &ExampleEncoder<'_>, options: &ReadOptions) -> Result<Dataset> {
    let mut examples = Vec::new();
    let mut cut = 0;
    let mut without_response = Vec::new();
    let mut report = for_each_record(path, options, &mut |line, record| {
        let encoded = encoder.encode(&record).map_err(misfit)?;
        cut += encoded.cut;
        for example in encoded.examples {
            if example.n_targets() > 0 { examples.push(example) } else { without_response.push(line) }
        }
        Ok(())
    })?;
    for line in without_response {
        let expected = format!("a response within the first {} tokens", encoder.max_len);
        report.skip(line, Bad::new(SkipReason::NoResponse, expected, "none"));
    }
    if examples.is_empty() {
        let expected = format!("a response within the first {} tokens of some example", encoder.max_len);
        return Err(nothing_left(path, &expected, &report));
    }
    (report.examples, report.cut) = (examples.len(), cut);
    Ok(Dataset { examples, report })
}

/// Why a record cannot be encoded.
fn misfit(error: ModelError) -> Bad {
    match error {
        ModelError::Value { expected, found, what } => {
            Bad::new(SkipReason::Template, expected, format!("{found} ({what})"))
        }
        other => Bad::new(SkipReason::Template, "a record that can be encoded", other),
    }
}

/// The whole of a file of at most [`MAX_TEXT_BYTES`].
fn read_whole(path: &Path) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| ModelError::io_on("open", path, e))?;
    let mut content = Vec::new();
    file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut content).map_err(|e| ModelError::io_on("read", path, e))?;
    if content.len() as u64 > MAX_TEXT_BYTES {
        return Err(ModelError::format(path, "data file", format!("at most {}", bytes(MAX_TEXT_BYTES)), "more"));
    }
    Ok(content)
}

/// Without the byte order mark that some editors put at the start of a file.
fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix("\u{feff}".as_bytes()).unwrap_or(content)
}

fn too_long() -> Bad {
    Bad::new(SkipReason::TooLong, format!("at most {}", bytes(MAX_RECORD)), "more")
}

#[cfg(test)]
mod tests;
