//! Printing: results on standard output, everything else on standard error.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write};

use serde_json::Value;

use super::failure::ClosedOutput;

/// Writes to standard output. A reader that went away is [`ClosedOutput`], not a panic.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(ClosedOutput.into()),
        Err(e) => Err(anyhow::Error::new(e).context("cannot write to standard output")),
    }
}

/// Writes a line to standard error; if that is closed, there is nobody to tell.
pub(crate) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes to standard error without ending the line: a prompt for a person.
pub(crate) fn prompt(text: &str) {
    let mut err = io::stderr();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// One JSON object on one line. Numbers that JSON cannot hold (infinite, or none) are `null`.
pub(crate) fn json_line(value: &Value) -> String {
    format!("{value}\n")
}

/// A number of bytes for people: decimal units, three digits.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value >= 99.95 => format!("{value:.0} {}", UNITS[unit]),
        _ if value >= 9.995 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.2} {}", UNITS[unit]),
    }
}

/// A duration for people.
pub(crate) fn seconds(s: f64) -> String {
    let whole = s.max(0.0).round() as u64;
    match whole {
        0..60 if s < 10.0 => format!("{s:.2} s"),
        0..60 => format!("{s:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A table with aligned columns: the first to the left, the others to the right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let header: Vec<String> = header.iter().map(|h| h.to_string()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let _ = if column == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Parses a size such as `60MB`, `1.5GiB` or `123456`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is no size; expected a number with B, kB, MB, GB, KiB, MiB or GiB, such as 60MB");
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1048576.0,
        "gib" => 1073741824.0,
        _ => return Err(bad()),
    };
    let value = number.parse::<f64>().map_err(|_| bad())? * factor;
    if value.is_finite() && (1.0..9e18).contains(&value) { Ok(value as u64) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_read_well() {
        for (n, text) in [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (98_362_432, "98.4 MB"), (999_999, "1.00 MB")]
        {
            assert_eq!(bytes(n), text);
        }
        for (s, text) in [(0.1234, "0.12 s"), (12.34, "12.3 s"), (59.9, "1 min 00 s"), (3700.0, "1 h 01 min")] {
            assert_eq!(seconds(s), text);
        }
    }

    #[test]
    fn sizes_parse() {
        for (text, n) in [("60MB", 60_000_000), ("1.5GiB", 1_610_612_736), ("123", 123), ("2 kb", 2000), ("7B", 7)] {
            assert_eq!(parse_size(text), Ok(n), "{text}");
        }
        for bad in ["", "MB", "-1", "1XB", "0", "1.2.3MB", "1e30GB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn tables_align() {
        let rows = vec![vec!["block.0".into(), "4.5".into()], vec!["x".into(), "12.25".into()]];
        assert_eq!(table(&["unit", "bits"], &rows), "unit      bits\nblock.0    4.5\nx        12.25\n");
    }
}
