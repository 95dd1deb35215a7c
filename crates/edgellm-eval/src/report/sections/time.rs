//! Where the time goes: by layer, by operator, by stage of a step.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::super::series::number;
use super::{Inputs, in_numbers, shown};
use crate::chart::{Parts, stacked};
use crate::report::Metrics;

/// Operators that have a colour of their own; the others are one part.
const MOST_OPERATORS: usize = 6;

pub(super) fn time(inputs: &Inputs) -> String {
    let mut out = String::new();
    for metrics in &inputs.metrics {
        for (pass, times) in passes(metrics) {
            out.push_str(&times.chart(&format!("{}: {pass}", metrics.name)));
        }
        out.push_str(&stages(metrics));
    }
    out
}

/// Times by kind of pass.
pub(crate) fn passes(metrics: &Metrics) -> BTreeMap<&str, Times> {
    let mut passes: BTreeMap<&str, Times> = BTreeMap::new();
    for event in metrics.of("layers") {
        let pass = event.get("pass").and_then(Value::as_str).unwrap_or("pass");
        passes.entry(pass).or_default().add(event);
    }
    passes
}

/// Milliseconds of a kind of pass.
#[derive(Default)]
pub(crate) struct Times {
    tokens: u64,
    /// By layer, in all and by operator.
    layers: BTreeMap<u64, (f64, BTreeMap<String, f64>)>,
    /// Of operators outside layers.
    outside: BTreeMap<String, f64>,
    bytes: u64,
}

impl Times {
    fn add(&mut self, event: &Map<String, Value>) {
        self.tokens += event.get("tokens").and_then(Value::as_u64).unwrap_or(0);
        for layer in event.get("layers").and_then(Value::as_array).into_iter().flatten() {
            let Some(index) = layer["index"].as_u64() else { continue };
            let (all, operators) = self.layers.entry(index).or_default();
            *all += milliseconds(&layer["ms"]);
            self.bytes = self.bytes.saturating_add(layer["bytes"].as_u64().unwrap_or(0));
            add(operators, layer.get("operators"));
        }
        add(&mut self.outside, event.get("operators"));
    }

    /// All operators, the longest first.
    pub(crate) fn operators(&self) -> Vec<(String, f64)> {
        let mut sums = self.outside.clone();
        for (name, ms) in self.layers.values().flat_map(|(_, operators)| operators) {
            *sums.entry(name.clone()).or_default() += ms;
        }
        let mut sorted: Vec<(String, f64)> = sums.into_iter().collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        sorted
    }

    fn chart(&self, title: &str) -> String {
        let inside = |name: &str| self.layers.values().any(|(_, operators)| operators.contains_key(name));
        let operators = self.operators();
        let names: Vec<&str> = operators.iter().map(|(name, _)| name.as_str()).filter(|name| inside(name)).collect();
        let shown_names = &names[..names.len().min(MOST_OPERATORS)];
        let total: f64 = self.layers.values().map(|(ms, _)| ms).sum();
        let row = |(index, (ms, operators)): (&u64, &(f64, BTreeMap<String, f64>))| {
            let mut values: Vec<f64> =
                shown_names.iter().map(|name| operators.get(*name).copied().unwrap_or(0.0)).collect();
            values.push((ms - values.iter().sum::<f64>()).max(0.0));
            let words = format!("{ms:.1} ms ({:.0}%)", 100.0 * ms / total.max(f64::MIN_POSITIVE));
            Parts { label: format!("block {index}"), values, words }
        };
        let rows: Vec<Parts> = self.layers.iter().map(row).collect();
        let legend: Vec<&str> = shown_names.iter().copied().chain(["other"]).collect();
        let title = format!("{title}, {} tokens", self.tokens);
        let svg = shown(stacked(&title, &legend, &rows), &format!("{title}: milliseconds by layer and operator"));
        let sum: f64 = operators.iter().map(|(_, ms)| ms).sum();
        let row = |(name, ms): &(String, f64)| {
            let each = if self.tokens > 0 { format!("{:.4}", ms / self.tokens as f64) } else { String::new() };
            vec![name.clone(), format!("{ms:.1}"), each, format!("{:.1}%", 100.0 * ms / sum.max(f64::MIN_POSITIVE))]
        };
        let rows: Vec<Vec<String>> = operators.iter().map(row).collect();
        svg + &in_numbers(&["operator", "ms", "ms a token", "share"], &rows)
    }
}

fn milliseconds(value: &Value) -> f64 {
    value.as_f64().filter(|ms| ms.is_finite()).unwrap_or(0.0).max(0.0)
}

fn add(sums: &mut BTreeMap<String, f64>, operators: Option<&Value>) {
    for (name, ms) in operators.and_then(Value::as_object).into_iter().flatten() {
        *sums.entry(name.clone()).or_default() += milliseconds(ms);
    }
}

/// Stages of tuning steps, in the order of a step.
pub(crate) const STAGES: [&str; 5] = ["prefix", "window", "head", "backward", "update"];

/// The mean seconds of each stage, and how many steps tell them.
pub(crate) fn stage_seconds(metrics: &Metrics) -> ([f64; 5], usize) {
    let (mut sums, mut steps) = ([0.0; 5], 0);
    for step in metrics.of("step").filter_map(|step| step.get("stage_seconds").and_then(Value::as_object)) {
        steps += 1;
        for (sum, name) in sums.iter_mut().zip(STAGES) {
            *sum += number(step, name).unwrap_or(0.0);
        }
    }
    (sums.map(|sum| sum / steps.max(1) as f64), steps)
}

fn stages(metrics: &Metrics) -> String {
    let (seconds, steps) = stage_seconds(metrics);
    let total: f64 = seconds.iter().sum();
    let title = format!("{}: a tuning step, mean of {steps}", metrics.name);
    let row = Parts {
        label: "step".into(),
        values: seconds.iter().map(|s| 1e3 * s).collect(),
        words: format!("{:.1} ms", 1e3 * total),
    };
    let svg = shown(stacked(&title, &STAGES, &[row]), &format!("{title}: milliseconds by stage"));
    if svg.is_empty() {
        return svg;
    }
    let row = |(name, s): (&str, &f64)| {
        vec![name.to_owned(), format!("{:.2}", 1e3 * s), format!("{:.1}%", 100.0 * s / total)]
    };
    svg + &in_numbers(&["stage", "ms", "share"], &STAGES.into_iter().zip(&seconds).map(row).collect::<Vec<_>>())
}
