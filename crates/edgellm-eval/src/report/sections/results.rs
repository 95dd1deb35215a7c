//! What was run, what follows from it, and all that was measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::{Inputs, table};
use crate::chart::escape;
use crate::figures::{Figure, Record};
use crate::names::Names;
use crate::recommendations::{recommendations, run_recommendations};

pub(super) fn summary(inputs: &Inputs) -> String {
    let mut out = String::new();
    let mut sweeps: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in &inputs.records {
        sweeps.entry(record.sweep.as_deref().unwrap_or("single runs")).or_default().push(record);
    }
    let of_sweep = |(name, records): (&&str, &Vec<&Record>)| {
        let seconds: f64 = records.iter().map(|record| record.seconds).filter(|s| s.is_finite()).sum();
        vec![(*name).to_owned(), format!("{} runs, {seconds:.0} s", records.len())]
    };
    let mut rows: Vec<Vec<String>> = sweeps.iter().map(of_sweep).collect();
    for metrics in &inputs.metrics {
        let steps = metrics.of("step").count();
        let what = if steps > 0 { format!("{steps} steps") } else { format!("{} events", metrics.events.len()) };
        let ended = if steps == 0 || metrics.of("end").next().is_some() { "" } else { ", not ended" };
        rows.push(vec![metrics.name.clone(), format!("{what}{ended}")]);
    }
    rows.extend(inputs.models.iter().map(|(name, layers)| vec![name.clone(), format!("{} layers", layers.len())]));
    out.push_str(&table(&["", ""], &rows));
    let environment: Vec<String> = environments(&inputs.records)
        .into_iter()
        .map(|(name, values)| format!("{name} {}", values.into_iter().collect::<Vec<_>>().join(", ")))
        .collect();
    if !environment.is_empty() {
        let _ = writeln!(out, "<p class=\"quiet\">{}</p>", escape(&environment.join(" · ")));
    }
    if !inputs.problems.is_empty() {
        let items: String = inputs.problems.iter().map(|p| format!("<li>{}</li>", escape(p))).collect();
        let _ =
            writeln!(out, "<div class=\"problems\"><p>What could not be read is left out:</p>\n<ul>{items}</ul></div>");
    }
    out
}

fn environments(records: &[Record]) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, value) in records.iter().flat_map(|record| &record.environment) {
        found.entry(name.clone()).or_default().insert(value.clone());
    }
    found
}

pub(super) fn advice(inputs: &Inputs) -> String {
    let mut found = recommendations(&inputs.records, &inputs.models);
    found.extend(inputs.metrics.iter().flat_map(run_recommendations));
    if found.is_empty() {
        return String::new();
    }
    let items: String = found.iter().map(|sentence| format!("<li>{}</li>\n", escape(sentence))).collect();
    let note =
        "A difference is only called one where it is significant at 5%; what is said of a single run has no interval.";
    format!("<ul>\n{items}</ul>\n<p class=\"quiet\">{note}</p>\n")
}

/// Rates and memory of every record that has some.
pub(super) fn devices(inputs: &Inputs) -> String {
    let shown = ["prefill_rate", "decode_rate", "first_token_seconds", "load_seconds", "peak_rss_bytes", "joules"];
    let with_rate = |r: &&Record| r.figures.contains_key("decode_rate") || r.figures.contains_key("prefill_rate");
    let measured: Vec<&Record> = inputs.records.iter().filter(with_rate).collect();
    if measured.is_empty() {
        return String::new();
    }
    let names = Names::of(measured.iter().copied());
    let row = |record: &&Record| {
        let cells = shown.iter().map(|name| record.figures.get(*name).map(value).unwrap_or_default());
        let of = |name: &str| record.environment.get(name).cloned().unwrap_or_default();
        let machine = [names.name(record, &["task"]), of("cpu"), of("isa"), of("threads")];
        machine.into_iter().chain(cells).collect::<Vec<_>>()
    };
    let header = [
        "case",
        "processor",
        "instructions",
        "threads",
        "prefill, tokens/s",
        "decode, tokens/s",
        "first token",
        "load",
        "peak memory",
        "energy",
    ];
    // A column that nobody has says nothing.
    let rows: Vec<Vec<String>> = measured.iter().map(row).collect();
    let used: Vec<usize> = (0..header.len()).filter(|&i| rows.iter().any(|row| !row[i].is_empty())).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(|row| used.iter().map(|&i| row[i].clone()).collect()).collect();
    table(&used.iter().map(|&i| header[i]).collect::<Vec<_>>(), &rows)
}

pub(super) fn figures(inputs: &Inputs) -> String {
    if inputs.records.is_empty() {
        return String::new();
    }
    let names = Names::of(&inputs.records);
    let mut rows = Vec::new();
    for record in &inputs.records {
        for (name, figure) in &record.figures {
            rows.push(vec![
                names.name(record, &[]),
                name.clone(),
                value(figure),
                figure.n.map_or(String::new(), |n| n.to_string()),
                record.id.clone(),
            ]);
        }
    }
    let all = table(&["case", "figure", "value, 95% interval", "items", "run"], &rows);
    format!("<details><summary>{} figures of {} runs</summary>\n{all}</details>\n", rows.len(), inputs.records.len())
}

/// A figure in words.
pub(super) fn value(figure: &Figure) -> String {
    let scaled = |value: f64| match figure.unit.as_str() {
        "bytes" | "bytes of memory" => format!("{:.1} MB", value / 1e6),
        "s" => format!("{value:.3} s"),
        "J" => format!("{value:.2} J"),
        "tokens/s" => format!("{value:.1}"),
        "share" => format!("{:.2}%", 100.0 * value),
        _ => format!("{value:.4}"),
    };
    match figure.interval {
        Some((low, high)) => format!("{} ({} to {})", scaled(figure.value), scaled(low), scaled(high)),
        None => scaled(figure.value),
    }
}
