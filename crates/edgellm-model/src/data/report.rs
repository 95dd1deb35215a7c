//! What became of a data file: how many examples it gave, and what was left out and why.

use std::fmt;

use serde::Serialize;

/// Line numbers that are kept for each reason.
const LINES: usize = 5;

/// Why a line of a data file gives no example.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Its bytes are not UTF-8.
    Encoding,
    /// It is longer than a line may be.
    TooLong,
    /// It is not JSON.
    Syntax,
    /// Its fields are not those of an example.
    Fields,
    /// The template or the tokenizer cannot make an example of it.
    Template,
    /// No token of the response is left within the length limit.
    NoResponse,
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Encoding => "not UTF-8",
            Self::TooLong => "too long",
            Self::Syntax => "not JSON",
            Self::Fields => "without the fields of an example",
            Self::Template => "not fit for the template",
            Self::NoResponse => "without a response within the length limit",
        })
    }
}

/// What is wrong with a line.
#[derive(Debug)]
pub(super) struct Bad {
    pub(super) reason: SkipReason,
    pub(super) expected: String,
    pub(super) found: String,
}

impl Bad {
    pub(super) fn new(reason: SkipReason, expected: impl Into<String>, found: impl fmt::Display) -> Self {
        Self { reason, expected: expected.into(), found: found.to_string() }
    }

    /// Other fields than those of an example.
    pub(super) fn fields(expected: impl Into<String>, found: impl fmt::Display) -> Self {
        Self::new(SkipReason::Fields, expected, found)
    }
}

/// What was left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The reason.
    pub reason: SkipReason,
    /// How many lines, or examples of [`SkipReason::NoResponse`].
    pub count: usize,
    /// The first few lines, from 1.
    pub lines: Vec<usize>,
    /// What was wrong with the first of them: `expected ..., found ...`.
    pub first: String,
}

/// What became of a data file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DataReport {
    /// Examples that can be learned from.
    pub examples: usize,
    /// How many of them were longer than the length limit and lost their end.
    pub cut: usize,
    /// What was left out, in the order in which the reasons came up.
    pub skipped: Vec<Skipped>,
}

impl DataReport {
    /// Lines and examples that were left out.
    pub fn n_skipped(&self) -> usize {
        self.skipped.iter().map(|s| s.count).sum()
    }

    pub(super) fn skip(&mut self, line: usize, bad: Bad) {
        let place = self.skipped.iter().position(|s| s.reason == bad.reason).unwrap_or_else(|| {
            let first = format!("expected {}, found {}", bad.expected, bad.found);
            self.skipped.push(Skipped { reason: bad.reason, count: 0, lines: Vec::new(), first });
            self.skipped.len() - 1
        });
        let skipped = &mut self.skipped[place];
        skipped.count += 1;
        if skipped.lines.len() < LINES && skipped.lines.last() != Some(&line) {
            skipped.lines.push(line);
        }
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.lines.iter().map(usize::to_string).collect();
        let line = if lines.len() == 1 { "line" } else { "lines" };
        let more = if self.count > lines.len() { ", ..." } else { "" };
        write!(f, "{} {} ({line} {}{more})", self.count, self.reason, lines.join(", "))
    }
}

/// `12 examples (3 skipped: 2 not JSON (lines 4, 9), 1 too long (line 7); 5 cut at the length limit)`.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} example{}", self.examples, if self.examples == 1 { "" } else { "s" })?;
        let mut notes = Vec::new();
        if !self.skipped.is_empty() {
            let skipped: Vec<String> = self.skipped.iter().map(Skipped::to_string).collect();
            notes.push(format!("{} skipped: {}", self.n_skipped(), skipped.join(", ")));
        }
        if self.cut > 0 {
            notes.push(format!("{} cut at the length limit", self.cut));
        }
        if notes.is_empty() { Ok(()) } else { write!(f, " ({})", notes.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_read_well() {
        let mut report = DataReport { examples: 1, ..DataReport::default() };
        assert_eq!(report.to_string(), "1 example");
        for line in [4, 9, 10, 11, 12, 13] {
            report.skip(line, Bad::new(SkipReason::Syntax, "JSON", format!("line {line}")));
        }
        report.skip(7, Bad::new(SkipReason::TooLong, "less", "more"));
        (report.examples, report.cut) = (12, 5);
        assert_eq!(
            report.to_string(),
            "12 examples (7 skipped: 6 not JSON (lines 4, 9, 10, 11, 12, ...), 1 too long (line 7); 5 cut at the \
             length limit)"
        );
        assert_eq!(report.skipped[0].first, "expected JSON, found line 4");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["skipped"][1]["reason"], "too_long");
        assert_eq!(json["skipped"][0]["lines"].as_array().unwrap().len(), 5);
    }
}
