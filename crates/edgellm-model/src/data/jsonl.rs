//! JSON lines: one record a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use super::record::{Record, parse_json};
use super::report::{Bad, SkipReason};
use super::{MAX_RECORD, Sink};
use crate::error::{ModelError, Result};

/// Reads a file line by line; empty lines are passed over.
pub(super) fn read(sink: &mut Sink<'_>) -> Result<()> {
    let path = sink.path;
    let failed = |e| ModelError::io_on("read", path, e);
    let file = File::open(path).map_err(|e| ModelError::io_on("open", path, e))?;
    let mut reader = BufReader::new(file);
    let mut content = Vec::new();
    for line in 1.. {
        content.clear();
        let limit = MAX_RECORD as u64 + 1;
        if (&mut reader).take(limit).read_until(b'\n', &mut content).map_err(failed)? == 0 {
            break;
        }
        if content.len() > MAX_RECORD {
            sink.put(line, Err(super::too_long()))?;
            // The rest of the line is passed over without being kept.
            if content.last() != Some(&b'\n') {
                reader.skip_until(b'\n').map_err(failed)?;
            }
            continue;
        }
        // The mark that some editors put at the start of a file.
        let bytes = if line == 1 { super::without_mark(&content) } else { &content };
        if !bytes.trim_ascii().is_empty() {
            sink.put(line, record(bytes))?;
        }
    }
    Ok(())
}

fn record(bytes: &[u8]) -> Result<Record, Bad> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| Bad::new(SkipReason::Encoding, "UTF-8", format!("other bytes at offset {}", e.valid_up_to())))?;
    Record::from_json(&parse_json(text, "a JSON object")?)
}
