//! Exits and votes: what each is worth, and which were taken.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Inputs, results, table};
use crate::names::Names;
use crate::report::Metrics;

pub(super) fn votes(inputs: &Inputs) -> String {
    let names = Names::of(&inputs.records);
    let mut rows = Vec::new();
    for record in &inputs.records {
        for (name, figure) in &record.figures {
            let known =
                ["heldout_loss_", "calibration_error", "accuracy_"].iter().any(|prefix| name.starts_with(prefix));
            if known && name != "accuracy_norm" {
                rows.push(vec![names.name(record, &[]), name.replace('_', " "), results::value(figure)]);
            }
        }
    }
    let mut out = if rows.is_empty() { String::new() } else { table(&["case", "figure", ""], &rows) };
    for metrics in &inputs.metrics {
        let rows = taken(metrics);
        if !rows.is_empty() {
            out.push_str(&table(
                &[&format!("{}: exit", metrics.name), "tokens or steps", "votes won", "temperature"],
                &rows,
            ));
        }
    }
    out
}

/// Of each exit: how often it was taken, how many votes it won, with shares, and its last temperature. Events hold what
/// happened since the one before.
fn taken(metrics: &Metrics) -> Vec<Vec<String>> {
    let mut counts: [BTreeMap<u64, f64>; 2] = Default::default();
    let mut temperatures: BTreeMap<u64, f64> = BTreeMap::new();
    for event in metrics.of("exits") {
        let of = |field: &str| event.get(field).and_then(Value::as_object).into_iter().flatten();
        let value = |(exit, value): (&String, &Value)| Some((exit.parse::<u64>().ok()?, value.as_f64()?));
        for (sums, field) in counts.iter_mut().zip(["chosen", "votes_won"]) {
            for (exit, count) in of(field).filter_map(value) {
                *sums.entry(exit).or_default() += count;
            }
        }
        temperatures.extend(of("temperatures").filter_map(value));
    }
    let mut exits: Vec<u64> = counts.iter().chain([&temperatures]).flat_map(|of| of.keys().copied()).collect();
    exits.sort_unstable();
    exits.dedup();
    let share = |of: &BTreeMap<u64, f64>, exit: &u64| {
        let total: f64 = of.values().sum();
        of.get(exit).map_or(String::new(), |count| format!("{count} ({:.0}%)", 100.0 * count / total.max(1.0)))
    };
    let temperature = |exit: &u64| temperatures.get(exit).map_or(String::new(), |t| format!("{t:.3}"));
    exits
        .iter()
        .map(|exit| vec![exit.to_string(), share(&counts[0], exit), share(&counts[1], exit), temperature(exit)])
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn counts_of_all_events_are_summed() {
        let event = |value: Value| value.as_object().cloned().unwrap();
        let events = vec![
            event(json!({"event": "exits", "chosen": {"8": 3, "30": 1}, "temperatures": {"8": 1.5}})),
            event(json!({"event": "exits", "chosen": {"8": 2}, "votes_won": {"30": 4}, "temperatures": {"8": 1.25}})),
        ];
        let rows = taken(&Metrics { name: "run".into(), events });
        assert_eq!(rows, [["8", "5 (83%)", "", "1.250"], ["30", "1 (17%)", "4 (100%)", ""]]);
        assert!(taken(&Metrics::default()).is_empty());
    }
}
