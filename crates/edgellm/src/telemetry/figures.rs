//! Figures that come as events: activations, gradients, exits and votes.

use std::collections::BTreeMap;

use edgellm_model::spans;
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};

/// Layers that figures are kept of.
const MAX_LAYERS: u64 = 4096;

/// The fields of one event.
#[derive(Default)]
pub(super) struct Figure {
    index: Option<u64>,
    chosen: Option<u64>,
    won: Option<u64>,
    exit: Option<u64>,
    values: Vec<(&'static str, f64)>,
}

impl Figure {
    fn value(&self, name: &str) -> f64 {
        self.values.iter().find(|(known, _)| *known == name).map_or(f64::NAN, |(_, value)| *value)
    }
}

impl Visit for Figure {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.values.push((field.name(), value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "index" => self.index = Some(value),
            "chosen" => self.chosen = Some(value),
            "won" => self.won = Some(value),
            "exit" => self.exit = Some(value),
            _ => {}
        }
    }

    fn record_debug(&mut self, _field: &Field, _value: &dyn std::fmt::Debug) {}
}

/// A range of values, over some readings.
#[derive(Clone, Copy, Debug)]
struct Range {
    min: f64,
    max: f64,
    squares: f64,
    readings: f64,
}

/// Figures since they were last written.
#[derive(Debug, Default)]
pub(super) struct Figures {
    /// Tokens, or steps of tuning, by exit.
    pub(super) chosen: BTreeMap<u64, u64>,
    won: BTreeMap<u64, u64>,
    temperatures: BTreeMap<u64, f64>,
    activations: BTreeMap<u64, Range>,
    gradients: BTreeMap<u64, f64>,
}

impl Figures {
    /// Takes an event of one of the targets of [`spans`].
    pub(super) fn add(&mut self, target: &str, figure: &Figure) {
        let index = figure.index.filter(|index| *index < MAX_LAYERS);
        match (target, index) {
            (spans::ACTIVATIONS, Some(index)) => {
                let (min, max, rms) = (figure.value("min"), figure.value("max"), figure.value("rms"));
                let none = Range { min: f64::INFINITY, max: f64::NEG_INFINITY, squares: 0.0, readings: 0.0 };
                let range = self.activations.entry(index).or_insert(none);
                range.min = range.min.min(min);
                range.max = range.max.max(max);
                range.squares += rms * rms;
                range.readings += 1.0;
            }
            (spans::GRADIENTS, Some(index)) => {
                self.gradients.insert(index, figure.value("norm"));
            }
            (spans::VOTES, _) => {
                for (counts, exit) in [(&mut self.chosen, figure.chosen), (&mut self.won, figure.won)] {
                    if let Some(exit) = exit.filter(|exit| *exit <= MAX_LAYERS) {
                        *counts.entry(exit).or_default() += 1;
                    }
                }
                if let Some(exit) = figure.exit.filter(|exit| *exit <= MAX_LAYERS) {
                    self.temperatures.insert(exit, figure.value("temperature"));
                }
            }
            _ => {}
        }
    }

    /// The events of what there is; nothing is left.
    pub(super) fn take(&mut self) -> Vec<(&'static str, Value)> {
        let Figures { chosen, won, temperatures, activations, gradients } = std::mem::take(self);
        let mut events = Vec::new();
        if !chosen.is_empty() || !won.is_empty() || !temperatures.is_empty() {
            let mut fields = Map::new();
            let mut add = |name: &str, map: Map<String, Value>| {
                if !map.is_empty() {
                    fields.insert(name.into(), map.into());
                }
            };
            add("chosen", by_exit(&chosen));
            add("votes_won", by_exit(&won));
            add("temperatures", by_exit(&temperatures));
            events.push(("exits", fields.into()));
        }
        if !activations.is_empty() {
            let layer = |(index, range): (&u64, &Range)| {
                json!({
                    "index": index, "min": range.min, "max": range.max,
                    "rms": (range.squares / range.readings).sqrt(),
                })
            };
            events.push(("activations", json!({"layers": activations.iter().map(layer).collect::<Vec<_>>()})));
        }
        if !gradients.is_empty() {
            let layers: Vec<Value> =
                gradients.iter().map(|(index, norm)| json!({"index": index, "norm": norm})).collect();
            events.push(("gradients", json!({"layers": layers})));
        }
        events
    }
}

fn by_exit<T: Copy + Into<Value>>(counts: &BTreeMap<u64, T>) -> Map<String, Value> {
    counts.iter().map(|(exit, value)| (exit.to_string(), (*value).into())).collect()
}
