//! What a run that tunes did, step by step.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::super::series::{number, smoothed, thinned};
use super::{Inputs, bars_in_numbers, in_numbers, shown, table};
use crate::chart::{Bar, Chart, Series, bars};
use crate::report::Metrics;

pub(super) fn loss(inputs: &Inputs) -> String {
    inputs.metrics.iter().map(|metrics| loss_of(metrics) + &end_of(metrics)).collect()
}

fn loss_of(metrics: &Metrics) -> String {
    let mut exits: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
    for step in metrics.of("step") {
        if let (Some(at), Some(loss)) = (number(step, "step"), number(step, "loss")) {
            let exit = step.get("exit").and_then(Value::as_u64).unwrap_or(0);
            exits.entry(exit).or_default().push((at, loss));
        }
    }
    let series: Vec<Series> =
        exits.iter().flat_map(|(exit, points)| with_mean(&format!("exit {exit}"), points)).collect();
    let title = format!("{}: loss by step", metrics.name);
    let chart = Chart { title: &title, x: "step", y: "loss (nats)", ..Chart::default() };
    let row = |(exit, points): (&u64, &Vec<(f64, f64)>)| {
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
        let least = points.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
        let steps = format!("{} ({:.0} to {:.0})", points.len(), first.0, last.0);
        vec![exit.to_string(), steps, format!("{:.4}", first.1), format!("{least:.4}"), format!("{:.4}", last.1)]
    };
    let svg = shown(chart.points(&series), &format!("{title}, by exit; strong lines are running means"));
    svg + &in_numbers(&["exit", "steps", "first loss", "least", "last"], &exits.iter().map(row).collect::<Vec<_>>())
}

/// The points, pale, and their running mean.
fn with_mean(label: &str, points: &[(f64, f64)]) -> [Series; 2] {
    let mean = smoothed(points, (points.len() as f64 / 50.0).max(1.0));
    [Series { pale: true, ..line(label, points) }, line(label, &mean)]
}

fn line(label: &str, points: &[(f64, f64)]) -> Series {
    Series::line(label, thinned(points))
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
pub(super) fn magnitudes(inputs: &Inputs) -> String {
    let mut out = String::new();
    for metrics in &inputs.metrics {
        let points: Vec<(f64, f64)> =
            metrics.of("step").filter_map(|step| Some((number(step, "step")?, number(step, "grad_norm")?))).collect();
        let title = format!("{}: norm of the gradient, before clipping", metrics.name);
        let log_y = points.iter().all(|p| p.1 > 0.0);
        let chart = Chart { title: &title, x: "step", y: "norm", log_y, ..Chart::default() };
        out.push_str(&shown(chart.points(&with_mean("running mean", &points)), &title));
        for (event, field, title, note) in [
            ("gradients", "norm", "gradients by layer", "norm, at the last report"),
            ("activations", "rms", "activations by layer", "root mean square and range, at the last report"),
        ] {
            let Some(last) = metrics.of(event).last() else { continue };
            let found = last.get("layers").and_then(Value::as_array).into_iter().flatten();
            let found: Vec<Bar> = found.filter_map(|layer| magnitude(layer, field)).collect();
            let title = format!("{}: {title}", metrics.name);
            out.push_str(&shown(bars(&title, note, &found), &title));
            out.push_str(&bars_in_numbers(note, &found));
        }
    }
    out
}

fn magnitude(layer: &Value, field: &str) -> Option<Bar> {
    let value = layer[field].as_f64()?;
    let range = match (layer["min"].as_f64(), layer["max"].as_f64()) {
        (Some(low), Some(high)) => format!(" ({low:.1} to {high:.1})"),
        _ => String::new(),
    };
    let label = format!("block {}", layer["index"].as_u64()?);
    Some(Bar { label, value, pale: 0.0, words: format!("{value:.3}{range}") })
}

pub(super) fn memory(inputs: &Inputs) -> String {
    let (mut series, mut rows, mut energy) = (Vec::new(), Vec::new(), Vec::new());
    for metrics in &inputs.metrics {
        let point = |event: &Map<String, Value>| Some((number(event, "time_s")?, number(event, "rss_bytes")? / 1e6));
        let points: Vec<(f64, f64)> = metrics.events.iter().filter_map(point).collect();
        let peaks = metrics.events.iter().filter_map(|event| number(event, "peak_rss_bytes"));
        if let Some(peak) = peaks.reduce(f64::max) {
            rows.push(vec![metrics.name.clone(), format!("{:.1} MB", peak / 1e6)]);
        }
        if points.len() > 1 {
            series.push(line(&metrics.name, &points));
        }
        let joules: f64 = metrics.of("energy").filter_map(|event| number(event, "joules")).sum();
        if joules > 0.0 {
            energy.push(vec![metrics.name.clone(), format!("{joules:.1} J")]);
        }
    }
    let chart = Chart { title: "Memory over time", x: "seconds", y: "MB resident", ..Chart::default() };
    let mut out = shown(chart.points(&series), "resident memory over time");
    for (what, rows) in [("peak memory", rows), ("energy", energy)] {
        if !rows.is_empty() {
            out.push_str(&table(&["run", what], &rows));
        }
    }
    out
}
