//! The sections of a report; each is there only if there is something to show.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::Value;

use super::series::{number, smoothed, thinned};
use super::{Inputs, Metrics};
use crate::chart::{BITS, Bar, Chart, Series, bars, escape, themed};
use crate::figures::{Figure, Layer, Record};
use crate::recommendations::{QUALITY, recommendations, size};

/// Charts of layers at most; the table has all of them.
const MOST_MODELS: usize = 4;

pub(super) struct Section {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) body: String,
}

/// What makes a section's body.
type Make = fn(&Inputs) -> String;

pub(super) fn all(inputs: &Inputs) -> Vec<Section> {
    let parts: [(&'static str, &'static str, Make); 11] = [
        ("summary", "What was run", summary),
        ("recommendations", "Recommendations", advice),
        ("pareto", "Size and quality", pareto),
        ("layers", "Bits and sensitivity by layer", layers),
        ("loss", "Loss", loss),
        ("gradients", "Gradients and activations", magnitudes),
        ("time", "Time by layer and operator", time),
        ("memory", "Memory", memory),
        ("votes", "Exits and votes", votes),
        ("devices", "Devices", devices),
        ("figures", "All figures", figures),
    ];
    let section = |(id, title, make): (&'static str, &'static str, Make)| {
        let body = make(inputs);
        (!body.is_empty()).then_some(Section { id, title, body })
    };
    parts.into_iter().filter_map(section).collect()
}

fn summary(inputs: &Inputs) -> String {
    let mut out = String::new();
    let mut sweeps: BTreeMap<&str, usize> = BTreeMap::new();
    for record in &inputs.records {
        *sweeps.entry(record.sweep.as_deref().unwrap_or("single runs")).or_default() += 1;
    }
    let mut rows: Vec<Vec<String>> =
        sweeps.iter().map(|(name, count)| vec![(*name).to_owned(), format!("{count} runs")]).collect();
    for metrics in &inputs.metrics {
        let steps = metrics.of("step").count();
        let ended = if metrics.of("end").next().is_some() { "" } else { ", not ended" };
        rows.push(vec![metrics.name.clone(), format!("{steps} steps{ended}")]);
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
        let _ = writeln!(out, "<p>What could not be read is left out:</p>\n<ul>{items}</ul>");
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

fn advice(inputs: &Inputs) -> String {
    let found = recommendations(&inputs.records, &inputs.models);
    if found.is_empty() {
        return String::new();
    }
    let items: String = found.iter().map(|sentence| format!("<li>{}</li>\n", escape(sentence))).collect();
    format!("<ul>\n{items}</ul>\n<p class=\"quiet\">Differences are named where they are significant at 5%.</p>\n")
}

/// A chart for every figure of quality that records of several sizes have.
fn pareto(inputs: &Inputs) -> String {
    let mut out = String::new();
    for name in QUALITY {
        let mut series: BTreeMap<String, Series> = BTreeMap::new();
        let mut sizes = BTreeSet::new();
        let with_it: Vec<&Record> = inputs.records.iter().filter(|r| r.figures.contains_key(name)).collect();
        let mut without = common(&with_it);
        without.extend(["budget", "seed"]);
        for record in with_it.iter().copied() {
            let (Some(figure), Some(bytes)) = (record.figures.get(name), size(record)) else { continue };
            let label = label(record, &without);
            let line = record.case.contains_key("budget");
            let entry = series.entry(label.clone()).or_insert_with(|| Series {
                label,
                points: Vec::new(),
                line,
                intervals: Vec::new(),
            });
            let x = bytes / 1e6;
            sizes.insert(bytes as u64);
            entry.points.push((x, figure.value));
            entry.intervals.extend(figure.interval.map(|(low, high)| (x, low, high)));
        }
        if sizes.len() < 2 {
            continue;
        }
        let mut series: Vec<Series> = series.into_values().collect();
        for series in &mut series {
            series.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
        let title = format!("{} by size", words(name));
        let log_y = name.contains("kl") && series.iter().flat_map(|s| &s.points).any(|p| p.1 > 0.0);
        let chart = Chart { title: &title, x: "MB of the model", y: &words(name), log_y };
        out.push_str(&shown(chart.points(&series), &format!("{title}; vertical lines are 95% intervals")));
    }
    out
}

/// The names that have one value in all of these records.
fn common<'a>(records: &[&'a Record]) -> Vec<&'a str> {
    let Some(first) = records.first() else { return Vec::new() };
    let same = |(name, value): &(&String, &String)| records.iter().all(|r| r.case.get(name.as_str()) == Some(value));
    first.case.iter().filter(same).map(|(name, _)| name.as_str()).collect()
}

/// What tells a record from others, without these names; of a record that nothing tells apart, its policy.
fn label(record: &Record, without: &[&str]) -> String {
    let named = record.case.iter().filter(|(name, _)| !without.contains(&name.as_str()));
    let label = named.map(|(_, value)| value.as_str()).collect::<Vec<_>>().join(", ");
    if label.is_empty() { record.case.get("policy").cloned().unwrap_or_else(|| record.id.clone()) } else { label }
}

fn layers(inputs: &Inputs) -> String {
    let mut models: Vec<(String, &[Layer])> =
        inputs.models.iter().map(|(name, layers)| (name.clone(), layers.as_slice())).collect();
    let mut seen = BTreeSet::new();
    for record in inputs.records.iter().filter(|record| !record.layers.is_empty()) {
        let name = label(record, &["task", "device", "adapter"]);
        if seen.insert(name.clone()) {
            models.push((name, &record.layers));
        }
    }
    let mut out = String::new();
    for (name, layers) in models.iter().take(MOST_MODELS) {
        let bits = layers.iter().filter_map(|l| Some(Bar::bits(l.name.clone(), l.bits?, l.sparsity.unwrap_or(0.0))));
        let bits: Vec<Bar> = bits.collect();
        if !bits.is_empty() {
            let _ = writeln!(out, "<h3>{}</h3>", escape(name));
            out.push_str(&shown(bars(&format!("{name}: bits"), BITS, &bits), &format!("{name}: bits by layer")));
        }
        let total: f64 = layers.iter().filter_map(|l| l.sensitivity).sum();
        let cost = |l: &Layer| {
            let value = l.sensitivity?;
            let words = format!("{value:.2e} ({:.0}%)", 100.0 * value / total.max(f64::MIN_POSITIVE));
            Some(Bar { label: l.name.clone(), value, pale: 0.0, words })
        };
        let costs: Vec<Bar> = layers.iter().filter_map(cost).collect();
        if !costs.is_empty() {
            let note = "KL in nats per token that the format costs, this layer alone";
            out.push_str(&shown(
                bars(&format!("{name}: sensitivity"), note, &costs),
                &format!("{name}: sensitivity by layer"),
            ));
        }
    }
    if models.len() > MOST_MODELS {
        let _ = writeln!(out, "<p class=\"quiet\">{} more are not drawn.</p>", models.len() - MOST_MODELS);
    }
    out
}

fn loss(inputs: &Inputs) -> String {
    let mut out = String::new();
    for metrics in &inputs.metrics {
        let mut exits: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
        for step in metrics.of("step") {
            if let (Some(at), Some(loss)) = (number(step, "step"), number(step, "loss")) {
                let exit = step.get("exit").and_then(Value::as_u64).unwrap_or(0);
                exits.entry(exit).or_default().push((at, loss));
            }
        }
        let series: Vec<Series> = exits
            .iter()
            .map(|(exit, points)| {
                let smooth = smoothed(points, (points.len() as f64 / 50.0).max(1.0));
                line(&format!("exit {exit}"), &smooth)
            })
            .collect();
        let title = format!("{}: loss by step", metrics.name);
        let chart = Chart { title: &title, x: "step", y: "loss (nats)", log_y: false };
        if !series.is_empty() {
            out.push_str(&shown(chart.points(&series), &format!("{title}, smoothed, by exit")));
        }
        out.push_str(&end_of(metrics));
    }
    out
}

fn line(label: &str, points: &[(f64, f64)]) -> Series {
    Series { label: label.to_owned(), points: thinned(points), line: true, intervals: Vec::new() }
}

/// Held-out losses before and after.
fn end_of(metrics: &Metrics) -> String {
    let Some(end) = metrics.of("end").last() else { return String::new() };
    let of = |name: &str| {
        let list = end.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
        list.into_iter().filter_map(|e| Some((e["exit"].as_u64()?, e["loss"].as_f64()?))).collect::<BTreeMap<_, _>>()
    };
    let (before, after) = (of("by_exit_before"), of("by_exit_after"));
    let cell = |value: Option<&f64>| value.map_or(String::new(), |loss| format!("{loss:.4}"));
    let exits: BTreeSet<u64> = before.keys().chain(after.keys()).copied().collect();
    let mut rows: Vec<Vec<String>> =
        exits.iter().map(|exit| vec![format!("exit {exit}"), cell(before.get(exit)), cell(after.get(exit))]).collect();
    for (name, loss) in end.get("votes_after").and_then(Value::as_object).into_iter().flatten() {
        rows.push(vec![format!("vote {name}"), String::new(), cell(loss.as_f64().as_ref())]);
    }
    if rows.is_empty() { String::new() } else { table(&["held-out loss", "before", "after"], &rows) }
}

/// Norms of gradients by step, and ranges of activations by layer.
fn magnitudes(inputs: &Inputs) -> String {
    let mut out = String::new();
    for metrics in &inputs.metrics {
        let points: Vec<(f64, f64)> =
            metrics.of("step").filter_map(|step| Some((number(step, "step")?, number(step, "grad_norm")?))).collect();
        if !points.is_empty() {
            let title = format!("{}: norm of the gradient", metrics.name);
            let chart = Chart { title: &title, x: "step", y: "norm", log_y: true };
            out.push_str(&shown(chart.points(&[line("before clipping", &points)]), &title));
        }
        for (event, field, title, note) in [
            ("gradients", "norm", "gradients by layer", "norm, at the last report"),
            ("activations", "rms", "activations by layer", "root mean square, at the last report"),
        ] {
            let Some(last) = metrics.of(event).last() else { continue };
            let found = last.get("layers").and_then(Value::as_array).into_iter().flatten();
            let bar = |layer: &Value| {
                let value = layer[field].as_f64()?;
                let range = match (layer["min"].as_f64(), layer["max"].as_f64()) {
                    (Some(low), Some(high)) => format!(" ({low:.1} to {high:.1})"),
                    _ => String::new(),
                };
                Some(Bar {
                    label: format!("block {}", layer["index"]),
                    value,
                    pale: 0.0,
                    words: format!("{value:.3}{range}"),
                })
            };
            let found: Vec<Bar> = found.filter_map(bar).collect();
            let title = format!("{}: {title}", metrics.name);
            out.push_str(&shown(bars(&title, note, &found), &title));
        }
    }
    out
}

fn time(inputs: &Inputs) -> String {
    let mut out = String::new();
    for metrics in &inputs.metrics {
        let mut passes: BTreeMap<&str, Times> = BTreeMap::new();
        for event in metrics.of("layers") {
            let pass = event.get("pass").and_then(Value::as_str).unwrap_or("pass");
            passes.entry(pass).or_default().add(event);
        }
        for (pass, times) in &passes {
            let total: f64 = times.layers.values().sum();
            let bar = |(index, ms): (&u64, &f64)| Bar {
                label: format!("block {index}"),
                value: *ms,
                pale: 0.0,
                words: format!("{ms:.2} ms ({:.0}%)", 100.0 * ms / total.max(f64::MIN_POSITIVE)),
            };
            let title = format!("{}: {pass}, {} tokens", metrics.name, times.tokens);
            let found: Vec<Bar> = times.layers.iter().map(bar).collect();
            out.push_str(&shown(bars(&title, "milliseconds in all", &found), &format!("{title}: time by layer")));
            let operators: f64 = times.operators.values().sum();
            let row = |(name, ms): (&String, &f64)| {
                vec![
                    name.clone(),
                    format!("{ms:.2} ms"),
                    format!("{:.1}%", 100.0 * ms / operators.max(f64::MIN_POSITIVE)),
                ]
            };
            if !times.operators.is_empty() {
                out.push_str(&table(
                    &["operator", "time", "share"],
                    &times.operators.iter().map(row).collect::<Vec<_>>(),
                ));
            }
        }
    }
    out
}

#[derive(Default)]
struct Times {
    tokens: u64,
    layers: BTreeMap<u64, f64>,
    operators: BTreeMap<String, f64>,
}

impl Times {
    fn add(&mut self, event: &serde_json::Map<String, Value>) {
        self.tokens += event.get("tokens").and_then(Value::as_u64).unwrap_or(0);
        for layer in event.get("layers").and_then(Value::as_array).into_iter().flatten() {
            let Some(index) = layer["index"].as_u64() else { continue };
            *self.layers.entry(index).or_default() += layer["ms"].as_f64().unwrap_or(0.0);
            for (name, ms) in layer["operators"].as_object().into_iter().flatten() {
                *self.operators.entry(name.clone()).or_default() += ms.as_f64().unwrap_or(0.0);
            }
        }
    }
}

fn memory(inputs: &Inputs) -> String {
    let mut series = Vec::new();
    for metrics in &inputs.metrics {
        let point = |event: &serde_json::Map<String, Value>| {
            Some((number(event, "time_s")?, number(event, "rss_bytes")? / 1e6))
        };
        let points: Vec<(f64, f64)> = metrics.of("memory").chain(metrics.of("step")).filter_map(point).collect();
        if !points.is_empty() {
            series.push(line(&metrics.name, &points));
        }
    }
    if series.is_empty() {
        return String::new();
    }
    let chart = Chart { title: "Memory over time", x: "seconds", y: "MB resident", log_y: false };
    shown(chart.points(&series), "resident memory over time")
}

/// What votes made of the exits: losses of records, and counts of runs.
fn votes(inputs: &Inputs) -> String {
    let mut rows = Vec::new();
    for record in &inputs.records {
        for (name, figure) in &record.figures {
            let known =
                ["heldout_loss_", "calibration_error", "accuracy_"].iter().any(|prefix| name.starts_with(prefix));
            if known && name != "accuracy_norm" {
                rows.push(vec![label(record, &[]), name.replace('_', " "), value(figure)]);
            }
        }
    }
    let mut out = if rows.is_empty() { String::new() } else { table(&["case", "figure", ""], &rows) };
    for metrics in &inputs.metrics {
        let Some(last) = metrics.of("exits").last() else { continue };
        let mut rows: BTreeMap<String, [String; 3]> = BTreeMap::new();
        for (column, field) in ["chosen", "votes_won", "temperatures"].into_iter().enumerate() {
            for (exit, value) in last.get(field).and_then(Value::as_object).into_iter().flatten() {
                rows.entry(exit.clone()).or_default()[column] = value.to_string();
            }
        }
        let rows: Vec<Vec<String>> =
            rows.into_iter().map(|(exit, cells)| [exit].into_iter().chain(cells).collect()).collect();
        out.push_str(&table(&["exit", "chosen", "votes won", "temperature"], &rows));
    }
    out
}

/// Rates and memory of every record that has some.
fn devices(inputs: &Inputs) -> String {
    let shown = ["prefill_rate", "decode_rate", "first_token_seconds", "peak_rss_bytes"];
    let measured: Vec<&Record> = inputs
        .records
        .iter()
        .filter(|r| r.figures.contains_key("decode_rate") || r.figures.contains_key("prefill_rate"))
        .collect();
    if measured.is_empty() {
        return String::new();
    }
    let row = |record: &&Record| {
        let cells = shown.iter().map(|name| record.figures.get(*name).map(value).unwrap_or_default());
        let cpu = record.environment.get("cpu").cloned().unwrap_or_default();
        [label(record, &["task"]), cpu].into_iter().chain(cells).collect::<Vec<_>>()
    };
    let header = ["case", "processor", "prefill, tokens/s", "decode, tokens/s", "first token", "peak memory"];
    table(&header, &measured.iter().map(row).collect::<Vec<_>>())
}

fn figures(inputs: &Inputs) -> String {
    if inputs.records.is_empty() {
        return String::new();
    }
    let mut rows = Vec::new();
    for record in &inputs.records {
        let case = record.case.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ");
        for (name, figure) in &record.figures {
            rows.push(vec![
                case.clone(),
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
fn value(figure: &Figure) -> String {
    let scaled = |value: f64| match figure.unit.as_str() {
        "bytes" | "bytes of memory" => format!("{:.1} MB", value / 1e6),
        "s" => format!("{value:.3} s"),
        "tokens/s" => format!("{value:.1}"),
        "share" => format!("{:.2}%", 100.0 * value),
        _ => format!("{value:.4}"),
    };
    match figure.interval {
        Some((low, high)) => format!("{} ({} to {})", scaled(figure.value), scaled(low), scaled(high)),
        None => scaled(figure.value),
    }
}

fn words(figure: &str) -> String {
    match figure {
        "second_half_kl" => "KL, second half of windows (nats)".into(),
        "kl" => "KL (nats)".into(),
        "heldout_loss" => "held-out loss (nats)".into(),
        "second_half_perplexity" => "perplexity, second half of windows".into(),
        other => other.replace('_', " "),
    }
}

/// A chart in the page; one that has nothing to show is left out.
fn shown(svg: crate::Result<String>, description: &str) -> String {
    svg.map_or(String::new(), |svg| format!("<div class=\"charts\">{}</div>\n", themed(&svg, description)))
}

fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let head: String = header.iter().map(|cell| format!("<th>{}</th>", escape(cell))).collect();
    let head = if header.iter().all(|cell| cell.is_empty()) {
        String::new()
    } else {
        format!("<thead><tr>{head}</tr></thead>")
    };
    let row = |row: &Vec<String>| {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = rows.iter().map(row).collect();
    format!("<div class=\"wide\"><table>{head}<tbody>\n{rows}</tbody></table></div>\n")
}
