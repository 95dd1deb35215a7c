//! Figures: measured values with their confidence intervals, by name; and records of runs, in which evaluations,
//! sweeps, comparisons and reports meet.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of [`Record`]; a newer one is refused.
pub const RECORD_VERSION: u32 = 1;

/// Which way a figure improves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Less is better: a loss, a size, a time.
    Lower,
    /// More is better: an accuracy, a rate.
    Higher,
}

/// A measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The value, in [`unit`](Self::unit).
    pub value: f64,
    /// The 95% confidence interval, lower and upper end, where the figure is an estimate from a sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// Items of the sample (windows, questions, examples, repetitions).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u64>,
    /// `nats`, `bytes`, `tokens/s`, `s`, `J`, `share` (of 1), or empty for a plain number such as a perplexity.
    pub unit: String,
    /// Which way it improves.
    pub better: Better,
}

/// Figures by name, such as `perplexity`, `kl`, `top1_agreement`, `model_bytes`, `decode_rate`.
pub type Figures = BTreeMap<String, Figure>;

/// What one task measured of one model under one configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub version: u32,
    /// The run's id: the first 12 hexadecimal digits of a SHA-256 over everything that determines the result.
    pub id: String,
    /// The sweep that the run belongs to, if any.
    #[serde(default)]
    pub sweep: Option<String>,
    /// What was varied: `model`, `policy`, `budget`, `adapter`, `vote`, `device`, `task`, `seed`, ... by name.
    pub case: BTreeMap<String, String>,
    /// What was measured.
    pub figures: Figures,
    /// A value for each item of the sample, by the name of its figure, in the order of the data: what paired
    /// comparisons need.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub items: BTreeMap<String, Vec<f64>>,
    /// Bits, sparsity, sensitivity, time of every unit, in order, where known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
    /// `edgellm` (version), `os`, `arch`, `cpu`, `cores`, `isa`, `threads`, ...
    pub environment: BTreeMap<String, String>,
    /// Seconds that the run took.
    pub seconds: f64,
    /// Seconds since 1970 when it ended.
    pub ended: u64,
}

/// A unit of a model (a block, the embedding or the head) in a record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    /// Its name, as in policies.
    pub name: String,
    /// Mean bits of a weight, sparsity counted.
    #[serde(default)]
    pub bits: Option<f64>,
    /// Share of weights that are zero.
    #[serde(default)]
    pub sparsity: Option<f64>,
    /// What its compression costs in KL, in nats per token, as measured alone.
    #[serde(default)]
    pub sensitivity: Option<f64>,
    /// Bytes it takes.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Milliseconds of one decoded token.
    #[serde(default)]
    pub milliseconds: Option<f64>,
}
