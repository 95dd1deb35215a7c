//! What a model takes on this device: time to the first token, rates, memory, energy; measured as `edgellm bench` does.

use edgellm::eval::{Better, EnergyMeter, Item, Measured};
use edgellm::model::adapter::Adapter;
use edgellm::session::LoadedModel;
use serde_json::{Value, json};

use crate::cli::Context;
use crate::cli::bench::{ModelBench, Row, Test};

/// Tokens of the prompt, and tokens that are generated, at most.
const TOKENS: (usize, usize) = (512, 128);
/// Repetitions, after a warm-up.
const REPETITIONS: usize = 5;

/// What was measured.
pub(super) struct Speed {
    prefill: Row,
    decode: Row,
    /// Joules of a token that is generated and what they are measured of, where the device tells.
    energy: Option<(f64, &'static str)>,
}

/// Reads a prompt and generates, with the adapter and the last exit.
pub(super) fn measure(
    ctx: &Context,
    name: &str,
    model: &LoadedModel,
    adapter: Option<&Adapter>,
) -> anyhow::Result<Speed> {
    let most = model.decoder.config().max_position_embeddings;
    let (prompt, generated) = (TOKENS.0.min(most), TOKENS.1.min(most));
    let bench = ModelBench::new(ctx, name, model, adapter, REPETITIONS)?;
    let prefill = bench.run(Test::Prompt { tokens: prompt })?;
    let decode = bench.run(Test::Generate { tokens: generated })?;
    // Once more, so that reading sensors does not slow the others down.
    let energy = match EnergyMeter::start() {
        None => None,
        Some(mut meter) => {
            let scope = meter.scope();
            let tokens = bench.run(Test::Generate { tokens: generated })?.samples_ts.len() * generated;
            meter.joules().map(|joules| (joules / tokens as f64, scope))
        }
    };
    Ok(Speed { prefill, decode, energy })
}

impl Speed {
    /// `null` where the device does not tell, never 0.
    pub(super) fn json(&self) -> Value {
        json!({
            "n_prompt": self.prefill.n_prompt, "n_gen": self.decode.n_gen,
            "repetitions": self.decode.samples_ts.len(),
            "prefill_rate": self.prefill.median_ts, "decode_rate": self.decode.median_ts,
            "first_token_seconds": self.prefill.ttft_ns.map(|ns| ns as f64 * 1e-9),
            "peak_rss_bytes": self.peak_rss_bytes(),
            "joules_per_token": self.energy.map(|(joules, _)| joules),
            "energy_of": self.energy.map(|(_, scope)| scope),
        })
    }

    pub(super) fn peak_rss_bytes(&self) -> Option<u64> {
        self.prefill.peak_rss_bytes.max(self.decode.peak_rss_bytes)
    }

    /// Adds the figures; energy only where the device tells.
    pub(super) fn add_to(&self, measured: &mut Measured) {
        measured.extend(figures(&json!({"tests": [self.prefill, self.decode]})));
        if let Some((joules, _)) = self.energy {
            measured.add_exact("joules", joules, "J/token", Better::Lower);
        }
    }

    /// Rows of a table: what, and how much.
    pub(super) fn rows(&self) -> Vec<[String; 2]> {
        let row = |name: &str, value: String| [name.to_owned(), value];
        let first = self.prefill.ttft_ns.map_or("not told".into(), |ns| format!("{:.0} ms", ns as f64 * 1e-6));
        let energy =
            self.energy.map_or("not told by this device".into(), |(joules, of)| format!("{joules:.3} J ({of})"));
        vec![
            row(&format!("first token of {}", self.prefill.n_prompt), first),
            row("prefill", format!("{:.1} tokens/s", self.prefill.median_ts)),
            row("decode", format!("{:.1} tokens/s", self.decode.median_ts)),
            row("energy of a token", energy),
        ]
    }
}

/// Figures of `bench --json`: rates with the intervals of their repetitions.
pub(super) fn figures(result: &Value) -> Measured {
    let mut measured = Measured::default();
    for row in result["tests"].as_array().into_iter().flatten() {
        let count = |name: &str| row[name].as_u64().unwrap_or(0);
        let name = match (count("n_prompt"), count("n_gen")) {
            (0, 0) => "tune_rate",
            (_, 0) => "prefill_rate",
            _ => "decode_rate",
        };
        let rates = row["samples_ts"].as_array().into_iter().flatten().filter_map(Value::as_f64);
        measured.add(name, rates.map(|sum| Item { sum, weight: 1.0 }).collect(), "tokens/s", Better::Higher);
        if let Some(ns) = row["ttft_ns"].as_f64() {
            measured.add_exact("first_token_seconds", ns * 1e-9, "s", Better::Lower);
        }
        if let Some(peak) = row["peak_rss_bytes"].as_f64() {
            let known = measured.figures.get("peak_rss_bytes").map_or(0.0, |figure| figure.value);
            measured.add_exact("peak_rss_bytes", peak.max(known), "bytes of memory", Better::Lower);
        }
        if let Some(size) = row["model_size"].as_f64() {
            measured.add_exact("weights_bytes", size, "bytes", Better::Lower);
        }
    }
    // What comes from rates that were drawn together is not a sample that two runs share.
    measured.items.clear();
    measured
}
