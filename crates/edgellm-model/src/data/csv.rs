//! Comma-separated values (RFC 4180): a header row with the names of the fields, then a record a row.
//!
//! Quoted fields may hold commas, line breaks and doubled quotes. A record's line is that on which it starts.

use csv::{ByteRecord, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::record::{FIELDS, Record, parse_json};
use super::report::{Bad, SkipReason};
use super::{MAX_RECORD, Sink};
use crate::error::{ModelError, Result, Shown};

/// What a header must have, for messages.
const COLUMNS: &str = "a header row with the columns 'instruction' and 'output' (and 'input'), 'prompt' and \
                       'response', 'messages', or 'text'";

/// Reads a file's content; empty rows are passed over.
pub(super) fn read(content: &[u8], sink: &mut Sink<'_>) -> Result<()> {
    let content = super::without_mark(content);
    let mut reader = rows(content);
    let mut row = ByteRecord::new();
    let mut columns: Option<Vec<String>> = None;
    let mut next_line = 1;
    loop {
        let start = place(&reader);
        if !reader.read_byte_record(&mut row).map_err(|e| ModelError::format(sink.path, "CSV", "rows", e))? {
            break;
        }
        let end = place(&reader);
        let source = content.get(start..end).unwrap_or_default();
        // The reader leaves the second half of a line break, and empty lines, to the row after it.
        let breaks = source.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        let line = next_line + lines(content, start, start + breaks);
        next_line += lines(content, start, end);
        if end == content.len() && is_open(source) {
            // What follows cannot be told from the field's text, so that no row after it could be trusted.
            let expected = "a quote that ends the field";
            return Err(ModelError::data(sink.path, line, expected, "the end of the file within quotes"));
        }
        if row.iter().all(|field| field.trim_ascii().is_empty()) {
            continue;
        }
        match &columns {
            None => columns = Some(header(&row).map_err(|b| ModelError::data(sink.path, line, b.expected, b.found))?),
            Some(columns) if source.len() <= MAX_RECORD => sink.put(line, record(columns, &row))?,
            Some(_) => sink.put(line, Err(super::too_long()))?,
        }
    }
    Ok(())
}

fn rows(content: &[u8]) -> Reader<&[u8]> {
    ReaderBuilder::new().has_headers(false).flexible(true).from_reader(content)
}

/// Bytes that the reader has taken.
fn place(reader: &Reader<&[u8]>) -> usize {
    usize::try_from(reader.position().byte()).unwrap_or(usize::MAX)
}

/// Line breaks of any kind that end in a part of the content.
fn lines(content: &[u8], start: usize, end: usize) -> usize {
    let ends = |at: usize| match content.get(at) {
        Some(b'\n') => true,
        Some(b'\r') => content.get(at + 1) != Some(&b'\n'),
        _ => false,
    };
    (start..end).filter(|&at| ends(at)).count()
}

/// Whether a row at the end of a file ends within quotes, which the reader takes for an end: then what follows is part of
/// the row, and otherwise it is a row of its own.
fn is_open(source: &[u8]) -> bool {
    source.contains(&b'"') && rows(&[source, b"\n,"].concat()).byte_records().count() == 1
}

/// The names of the columns, in lower case.
fn header(row: &ByteRecord) -> Result<Vec<String>, Bad> {
    let name = |field: &[u8]| String::from_utf8_lossy(field).trim().to_ascii_lowercase();
    let columns: Vec<String> = row.iter().map(name).collect();
    let has = |name: &&str| columns.iter().any(|c| c == name);
    let complete = |kind: &&[&str]| kind.iter().all(|name| *name == "input" || has(name));
    // As for a line of JSON, the first kind whose first field is there is meant.
    if !FIELDS.iter().find(|kind| has(&kind[0])).is_some_and(complete) {
        return Err(Bad::fields(COLUMNS, format!("the columns [{}]", Shown(&columns.join(", ")))));
    }
    match FIELDS.iter().copied().flatten().find(|name| columns.iter().filter(|c| c == *name).count() > 1) {
        Some(name) => Err(Bad::fields("every column once", format!("'{name}' more than once"))),
        None => Ok(columns),
    }
}

fn record(columns: &[String], row: &ByteRecord) -> Result<Record, Bad> {
    if row.len() != columns.len() {
        return Err(Bad::fields(format!("{} fields, as in the header", columns.len()), row.len()));
    }
    let mut fields = Map::new();
    for (name, field) in columns.iter().zip(row) {
        if !FIELDS.iter().copied().flatten().any(|known| known == name) {
            continue;
        }
        let text = std::str::from_utf8(field)
            .map_err(|_| Bad::new(SkipReason::Encoding, "UTF-8", format!("other bytes as '{name}'")))?;
        let value = match name.as_str() {
            "messages" => parse_json(text, "a JSON list as 'messages'")?,
            _ => Value::String(text.to_owned()),
        };
        fields.insert(name.clone(), value);
    }
    Record::from_fields(&fields)
}
