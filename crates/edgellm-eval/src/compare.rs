//! Comparing runs, figure by figure, and holding runs against a baseline.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bootstrap::{Difference, paired_difference};
use crate::figures::{Better, Figure, Record};

/// Seed of the draws.
const SEED: u64 = 0;
/// Above this level, a difference may be chance.
const LEVEL: f64 = 0.05;

/// What a comparison says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The second is better, and not by chance.
    Better,
    /// The second is worse, and not by chance.
    Worse,
    /// It may be chance.
    Unclear,
    /// Both have no sample: the values differ or not, and that is all.
    Untested,
    /// Measured on other data, or on other items of it: the difference says nothing about the models.
    Incomparable,
}

/// A figure of two runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    /// Its name.
    pub figure: String,
    /// Of the first run.
    pub first: Figure,
    /// Of the second.
    pub second: Figure,
    /// The difference on the same items; of perplexities, of their logarithms.
    pub difference: Option<Difference>,
    /// In a word.
    pub verdict: Verdict,
}

/// Compares the figures that both runs have. Runs on the same [`sample`](Record::sample) have the same items in the same
/// order, which are compared in pairs. Figures without items (such as calibration errors) are told apart by intervals that do
/// not touch.
pub fn compare(first: &Record, second: &Record) -> Vec<Compared> {
    let same_sample = first.sample == second.sample;
    let mut out = Vec::new();
    for (name, a) in &first.figures {
        let Some(b) = second.figures.get(name) else { continue };
        let items = (first.items.get(name), second.items.get(name));
        let difference = match items {
            (Some(x), Some(y)) if same_sample && same_weights(x, y) => paired_difference(x, y, SEED),
            _ => None,
        };
        let verdict = match (&difference, a.interval, b.interval) {
            (_, Some(_), Some(_)) if !same_sample => Verdict::Incomparable,
            (Some(found), ..) if found.p < LEVEL => towards(found.difference, b.better),
            (Some(_), ..) => Verdict::Unclear,
            (None, Some(x), Some(y)) if x.1 < y.0 || y.1 < x.0 => towards(b.value - a.value, b.better),
            (None, Some(_), Some(_)) => Verdict::Unclear,
            _ => Verdict::Untested,
        };
        out.push(Compared { figure: name.clone(), first: a.clone(), second: b.clone(), difference, verdict });
    }
    out
}

fn same_weights(a: &[crate::bootstrap::Item], b: &[crate::bootstrap::Item]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.weight == b.weight)
}

fn towards(difference: f64, better: Better) -> Verdict {
    match (difference < 0.0, better) {
        (true, Better::Lower) | (false, Better::Higher) => Verdict::Better,
        _ => Verdict::Worse,
    }
}

/// Figures that must not get worse, by case.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// 1.
    pub version: u32,
    /// By case (as [`case_name`] says it), then by figure.
    pub cases: BTreeMap<String, BTreeMap<String, Bound>>,
}

/// A figure of a baseline.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// What it was.
    pub value: f64,
    /// How much worse it may be.
    pub noise: f64,
    /// Which way it improves.
    pub better: Better,
}

/// The least noise: a share of the value, and a value.
const LEAST_NOISE: (f64, f64) = (0.01, 1e-6);

impl Baseline {
    /// The baseline of these records: figures of quality and the model's size. Times and memory are left out, since they
    /// belong to a machine.
    ///
    /// The noise is a quarter of the interval's half-width: the interval says how another *sample* would differ, and a
    /// baseline is held against the same sample, which other processors and numbers of threads only round differently.
    pub fn of(records: &[Record]) -> Self {
        let mut cases = BTreeMap::new();
        for record in records {
            let bounds = record.figures.iter().filter(|(_, figure)| !of_machine(figure)).map(|(name, figure)| {
                let noise = (0.25 * figure.noise()).max(LEAST_NOISE.0 * figure.value.abs()).max(LEAST_NOISE.1);
                (name.clone(), Bound { value: figure.value, noise, better: figure.better })
            });
            cases.insert(case_name(record), bounds.collect());
        }
        Self { version: 1, cases }
    }

    /// What is worse than the baseline by more than its noise, and what is missing on either side; one sentence each.
    pub fn failures(&self, records: &[Record]) -> Vec<String> {
        let mut found = Vec::new();
        let known: BTreeMap<String, &Record> = records.iter().map(|record| (case_name(record), record)).collect();
        for (case, bounds) in &self.cases {
            let Some(record) = known.get(case) else {
                found.push(format!("{case}: the baseline has it, and it was not run"));
                continue;
            };
            for (name, bound) in bounds {
                let Some(figure) = record.figures.get(name) else {
                    found.push(format!("{case}: {name}: expected {}, found no such figure", bound.value));
                    continue;
                };
                let worse = match bound.better {
                    Better::Lower => figure.value - bound.value,
                    Better::Higher => bound.value - figure.value,
                };
                // What is no number is worse.
                if worse.is_nan() || worse > bound.noise {
                    let than = if bound.better == Better::Lower { "at most" } else { "at least" };
                    let limit = match bound.better {
                        Better::Lower => bound.value + bound.noise,
                        Better::Higher => bound.value - bound.noise,
                    };
                    found.push(format!("{case}: {name}: expected {than} {limit:.5}, found {:.5}", figure.value));
                }
            }
        }
        for case in known.keys().filter(|case| !self.cases.contains_key(*case)) {
            found.push(format!("{case}: it was run, and the baseline does not have it"));
        }
        found
    }
}

/// Times, rates, memory and energy: figures that another machine has others of.
fn of_machine(figure: &Figure) -> bool {
    matches!(figure.unit.as_str(), "s" | "tokens/s" | "J") || figure.unit == "bytes of memory"
}

/// A case as one text: its names with their values.
pub fn case_name(record: &Record) -> String {
    record.case.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::Item;
    use crate::figures::{Measured, RECORD_VERSION};

    fn record(values: &[f64]) -> Record {
        let mut measured = Measured::default();
        measured.add("kl", values.iter().map(|&sum| Item { sum, weight: 1.0 }).collect(), "nats", Better::Lower);
        measured.add_exact("load_seconds", values[0], "s", Better::Lower);
        Record {
            version: RECORD_VERSION,
            id: "0".into(),
            sweep: None,
            sample: Some("abc".into()),
            case: [("task".to_owned(), "t".to_owned())].into(),
            figures: measured.figures,
            items: measured.items,
            layers: Vec::new(),
            environment: BTreeMap::new(),
            seconds: 0.0,
            ended: 0,
        }
    }

    #[test]
    fn pairs_decide_and_what_has_no_sample_stays_untested() {
        let values: Vec<f64> = (0..30).map(|i| 1.0 + (i as f64 * 0.7).sin()).collect();
        let more: Vec<f64> = values.iter().enumerate().map(|(i, v)| v + 0.1 + 0.01 * (i % 3) as f64).collect();
        let found = compare(&record(&values), &record(&more));
        assert_eq!((found[0].figure.as_str(), found[0].verdict), ("kl", Verdict::Worse));
        assert_eq!(compare(&record(&more), &record(&values))[0].verdict, Verdict::Better);
        assert_eq!(compare(&record(&values), &record(&values))[0].verdict, Verdict::Unclear);
        assert_eq!(found[1].verdict, Verdict::Untested);
        // Fewer items of the same sample are no pairs.
        assert_eq!(compare(&record(&values), &record(&more[..20]))[0].verdict, Verdict::Unclear);
        // Other data of the same size: a difference that would be clear in pairs says nothing.
        let other = Record { sample: Some("def".into()), ..record(&more) };
        let found = compare(&record(&values), &other);
        assert_eq!((&found[0].difference, found[0].verdict), (&None, Verdict::Incomparable));
        assert_eq!(found[1].verdict, Verdict::Untested);
    }

    #[test]
    fn a_gate_fails_for_what_got_worse_and_for_what_is_missing() {
        let good = record(&[1.0, 1.2, 0.8]);
        let baseline = Baseline::of(std::slice::from_ref(&good));
        assert!(!baseline.cases["task=t"].contains_key("load_seconds"));
        assert_eq!(baseline.failures(std::slice::from_ref(&good)), Vec::<String>::new());
        assert!(baseline.failures(&[record(&[0.5, 0.6, 0.4])]).is_empty());
        let worse = baseline.failures(&[record(&[2.0, 2.4, 1.6])]);
        assert!(worse.len() == 1 && worse[0].contains("kl: expected at most"), "{worse:?}");
        assert_eq!(baseline.failures(&[record(&[f64::NAN, 1.0, 1.0])]).len(), 1);
        assert!(baseline.failures(&[])[0].contains("was not run"));
        let mut other = good;
        other.case.insert("task".into(), "u".into());
        assert_eq!(baseline.failures(&[other]).len(), 2);
    }
}
