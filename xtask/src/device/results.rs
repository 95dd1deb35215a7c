//! What a run found, as it is written to JSON, and how it differs from the last run of the same device.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::readings::Reading;

/// How a device or a part of its suite ended.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    Passed,
    Failed,
    NotRun,
}

impl Outcome {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::NotRun => "not run",
        }
    }
}

/// A speed with its repetitions, in the unit of its name.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Figure {
    pub(super) samples: Vec<f64>,
}

/// One part of the suite.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct PartResult {
    pub(super) part: String,
    pub(super) outcome: Outcome,
    /// One sentence.
    pub(super) detail: String,
    pub(super) seconds: f64,
    /// Speeds, higher is better, by name with unit.
    pub(super) figures: BTreeMap<String, Figure>,
}

/// One device.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) transport: String,
    pub(super) outcome: Outcome,
    /// Why it was not run or failed.
    pub(super) reason: Option<String>,
    /// The processor, as the device calls it.
    pub(super) processor: Option<String>,
    /// Files pushed, files that were there already, and bytes pushed.
    pub(super) pushed: Option<(usize, usize, u64)>,
    pub(super) parts: Vec<PartResult>,
    pub(super) readings: Vec<Reading>,
    pub(super) seconds: f64,
    /// Differences from the last run of this device.
    pub(super) changes: Vec<Change>,
}

/// A run over the matrix.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Run {
    /// UTC, `YYYYMMDD-HHMMSS`.
    pub(super) time: String,
    /// The commit, with `+` where files differ from it.
    pub(super) commit: String,
    pub(super) rows: Vec<Row>,
}

/// A figure beside that of the last run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Change {
    pub(super) figure: String,
    pub(super) before: f64,
    pub(super) after: f64,
    /// Relative difference that noise alone explains.
    pub(super) noise: f64,
    pub(super) clear: bool,
}

impl Change {
    /// Clearly slower than before.
    pub(super) fn is_slower(&self) -> bool {
        self.clear && self.after < self.before
    }
}

/// Differences below this are never called clear.
const FLOOR: f64 = 0.05;
/// How many times the spread of the medians a clear difference is.
const SPREADS: f64 = 3.0;

impl Row {
    /// Every figure of the row.
    fn figures(&self) -> impl Iterator<Item = (&String, &Figure)> {
        self.parts.iter().flat_map(|part| &part.figures)
    }

    /// Differences from an earlier row of the same device.
    pub(super) fn compare(&self, earlier: &Self) -> Vec<Change> {
        let before: BTreeMap<_, _> = earlier.figures().collect();
        let both = self.figures().filter_map(|(name, after)| Some((name, *before.get(name)?, after)));
        both.filter_map(|(name, before, after)| change(name, before, after)).collect()
    }
}

/// The difference of two medians is clear where it is larger than three times their spread. The spread of a median of n
/// samples is estimated from the median deviation: 1.4826 MAD times 1.2533 / sqrt(n).
fn change(name: &str, before: &Figure, after: &Figure) -> Option<Change> {
    let (old, new) = (median(&before.samples)?, median(&after.samples)?);
    if old <= 0.0 {
        return None;
    }
    let noise = (SPREADS * spread(before, old).hypot(spread(after, new)) / old).max(FLOOR);
    Some(Change { figure: name.to_owned(), before: old, after: new, noise, clear: ((new - old) / old).abs() > noise })
}

fn spread(figure: &Figure, center: f64) -> f64 {
    let away: Vec<_> = figure.samples.iter().map(|x| (x - center).abs()).collect();
    1.4826 * 1.2533 * median(&away).unwrap_or_default() / (figure.samples.len() as f64).sqrt()
}

/// The middle of some values; none of none.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { (sorted[middle - 1] + upper) / 2.0 })
}

/// The newest earlier row of a device that has figures.
pub(super) fn last_row(folder: &Path, name: &str) -> Result<Option<Row>> {
    let mut files: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(|e| Some(e.ok()?.path())).collect(),
        Err(_) => Vec::new(),
    };
    files.retain(|path| path.extension().is_some_and(|end| end == "json"));
    files.sort();
    for path in files.iter().rev() {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let run: Run = serde_json::from_str(&text).with_context(|| {
            format!("{} is no result of bench-device; remove it or give another --out", path.display())
        })?;
        let row = run.rows.into_iter().find(|row| row.name == name && row.figures().next().is_some());
        if row.is_some() {
            return Ok(row);
        }
    }
    Ok(None)
}

/// Seconds since 1970 as `YYYYMMDD-HHMMSS` in UTC.
pub(super) fn stamp(seconds: u64) -> String {
    // Howard Hinnant, "chrono-compatible low-level date algorithms": days to a civil date, years beginning in March.
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let (date, month) = (of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}{month:02}{date:02}-{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(samples: &[f64]) -> Figure {
        Figure { samples: samples.to_vec() }
    }

    #[test]
    fn only_clear_differences_count() {
        let of = |before: &[f64], after: &[f64]| change("x", &figure(before), &figure(after)).unwrap();
        let steady = [100.0, 101.0, 99.0, 100.0, 100.5];
        let slower = of(&steady, &[80.0, 81.0, 79.5, 80.5, 80.0]);
        assert!(slower.is_slower(), "{slower:?}");
        assert!(!of(&steady, &[97.0, 98.0, 96.5, 97.0, 97.5]).clear, "within the floor");
        let noisy = of(&[100.0, 60.0, 140.0], &[80.0, 120.0, 50.0]);
        assert!(!noisy.clear && noisy.noise > 0.2, "{noisy:?}");
        let faster = of(&steady, &[150.0, 151.0, 149.0]);
        assert!(faster.clear && !faster.is_slower());
        assert_eq!(change("x", &figure(&[]), &figure(&steady)), None);
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(stamp(0), "19700101-000000");
        assert_eq!(stamp(951_827_696), "20000229-123456");
        assert_eq!(stamp(1_795_399_200), "20261123-020000");
    }
}
