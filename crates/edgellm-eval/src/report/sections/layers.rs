//! Bits, sparsity and sensitivity by layer.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Inputs, in_numbers, shown};
use crate::chart::{BITS, Bar, Column, columns};
use crate::figures::{Layer, Record};
use crate::names::Names;

/// Charts of layers at most.
const MOST_MODELS: usize = 6;
/// Layers of a chart at most; the table has all.
const MOST_LAYERS: usize = 400;

pub(super) fn layers(inputs: &Inputs) -> String {
    let mut models: Vec<(String, &[Layer])> =
        inputs.models.iter().map(|(name, layers)| (name.clone(), layers.as_slice())).collect();
    let with_layers: Vec<&Record> = inputs.records.iter().filter(|record| !record.layers.is_empty()).collect();
    let names = Names::of(with_layers.iter().copied());
    let mut seen = BTreeSet::new();
    for record in with_layers {
        let name = names.name(record, &["task", "device", "adapter", "seed", "vote"]);
        if seen.insert(name.clone()) {
            models.push((name, &record.layers));
        }
    }
    let mut out: String = models.iter().take(MOST_MODELS).map(|(name, layers)| model(name, layers)).collect();
    if models.len() > MOST_MODELS {
        let _ = writeln!(out, "<p class=\"quiet\">{} more are not drawn.</p>", models.len() - MOST_MODELS);
    }
    out
}

fn model(name: &str, layers: &[Layer]) -> String {
    let drawn = || layers.iter().take(MOST_LAYERS);
    let bits = drawn().filter_map(|l| Some(Bar::bits(l.name.clone(), l.bits?, l.sparsity.unwrap_or(0.0)))).collect();
    let total: f64 = layers.iter().filter_map(|l| l.sensitivity).map(|cost| cost.max(0.0)).sum();
    let cost = |l: &Layer| {
        let value = l.sensitivity?;
        let words = format!("{value:.1e} ({:.0}%)", 100.0 * value / total.max(f64::MIN_POSITIVE));
        Some(Bar { label: l.name.clone(), value, pale: 0.0, words })
    };
    let bits = Column { note: BITS, bars: bits };
    let costs =
        Column { note: "KL in nats that the format costs, this layer alone", bars: drawn().filter_map(cost).collect() };
    let with_length = |column: &Column<'_>| column.bars.iter().any(|bar| bar.value > 0.0);
    let found: Vec<Column<'_>> = [bits, costs].into_iter().filter(with_length).collect();
    let mut out = shown(columns(name, &found), &format!("{name}: bits and sensitivity by layer"));
    if out.is_empty() {
        return out;
    }
    if layers.len() > MOST_LAYERS {
        let _ = writeln!(out, "<p class=\"quiet\">The first {MOST_LAYERS} of {} are drawn.</p>", layers.len());
    }
    let number = |value: Option<f64>, digits: usize| value.map_or(String::new(), |v| format!("{v:.digits$}"));
    let row = |layer: &Layer| {
        vec![
            layer.name.clone(),
            number(layer.bits, 2),
            number(layer.sparsity, 2),
            layer.sensitivity.map_or(String::new(), |cost| format!("{cost:.2e}")),
            layer.bytes.map_or(String::new(), |bytes| bytes.to_string()),
            number(layer.milliseconds, 3),
        ]
    };
    let header = ["layer", "bits", "pruned share", "KL alone", "bytes", "ms a token"];
    out + &in_numbers(&header, &layers.iter().map(row).collect::<Vec<_>>())
}
