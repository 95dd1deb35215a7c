//! Figures: measured values with their confidence intervals, by name; and records of runs, in which evaluations,
//! sweeps, comparisons and reports meet.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bootstrap::{Item, interval, ratio};
use crate::calibration::Reliability;
use crate::divergence::Divergence;
use crate::heldout::HeldOut;
use crate::multiple_choice::MultipleChoice;
use crate::perplexity::Perplexity;

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

impl Figure {
    /// A value that is no estimate: a size, or one measured time.
    pub fn exact(value: f64, unit: &str, better: Better) -> Self {
        Self { value, interval: None, n: None, unit: unit.into(), better }
    }

    /// The ratio of sums over `items`, with its interval.
    pub fn ratio(items: &[Item], unit: &str, better: Better) -> Self {
        let n = Some(items.len() as u64);
        Self { value: ratio(items), interval: interval(items, SEED), n, unit: unit.into(), better }
    }

    /// The exponential of a ratio: a perplexity.
    fn exponential(items: &[Item]) -> Self {
        let log = Self::ratio(items, "", Better::Lower);
        Self { value: log.value.exp(), interval: log.interval.map(|(low, high)| (low.exp(), high.exp())), ..log }
    }

    /// Half of the interval; 0 without one.
    pub fn noise(&self) -> f64 {
        self.interval.map_or(0.0, |(low, high)| 0.5 * (high - low))
    }
}

/// Seed of the intervals.
const SEED: u64 = 0;

/// Figures, and the items that those with a sample came from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// By name.
    pub figures: Figures,
    /// By the same names. Those of perplexities are logarithms.
    pub items: BTreeMap<String, Vec<Item>>,
}

impl Measured {
    /// Adds a ratio over items.
    pub fn add(&mut self, name: &str, items: Vec<Item>, unit: &str, better: Better) {
        self.figures.insert(name.into(), Figure::ratio(&items, unit, better));
        self.items.insert(name.into(), items);
    }

    /// Adds a value without a sample.
    pub fn add_exact(&mut self, name: &str, value: f64, unit: &str, better: Better) {
        self.figures.insert(name.into(), Figure::exact(value, unit, better));
    }

    /// Adds all of `other`; what has the same name is replaced.
    pub fn extend(&mut self, other: Self) {
        self.figures.extend(other.figures);
        self.items.extend(other.items);
    }

    /// Adds the exponential of a ratio over items: a perplexity.
    pub fn add_logarithm(&mut self, name: &str, items: Vec<Item>) {
        self.figures.insert(name.into(), Figure::exponential(&items));
        self.items.insert(name.into(), items);
    }

    /// Adds `perplexity` and `second_half_perplexity`.
    pub fn add_perplexity(&mut self, found: &Perplexity) {
        for (name, items) in ["perplexity", "second_half_perplexity"].into_iter().zip(&found.items) {
            self.add_logarithm(name, items.clone());
        }
    }

    /// Adds `kl`, `second_half_kl` and `top1_agreement`.
    pub fn add_divergence(&mut self, found: &Divergence) {
        let [all, second, agree] = &found.items;
        self.add("kl", all.clone(), "nats", Better::Lower);
        self.add("second_half_kl", second.clone(), "nats", Better::Lower);
        self.add("top1_agreement", agree.clone(), "share", Better::Higher);
    }

    /// Adds `heldout_loss` (of the first vote, or of the last exit), `heldout_loss_exit_N`, and `heldout_loss_NAME` of each
    /// further vote.
    pub fn add_heldout(&mut self, found: &HeldOut, votes: &[String]) {
        for (exit, items) in found.by_exit.iter().zip(&found.items) {
            self.add(&format!("heldout_loss_exit_{}", exit.exit), items.clone(), "nats", Better::Lower);
        }
        let by_vote = &found.items[found.by_exit.len()..];
        if let Some(main) = by_vote.first().or(found.items.last()) {
            self.add("heldout_loss", main.clone(), "nats", Better::Lower);
        }
        for (name, items) in votes.iter().zip(by_vote).skip(1) {
            self.add(&format!("heldout_loss_{name}"), items.clone(), "nats", Better::Lower);
        }
    }

    /// Adds an expected calibration error, with its interval over examples.
    pub fn add_calibration(&mut self, name: &str, found: &Reliability) {
        let (interval, n) = (found.interval(SEED), Some(found.n_examples() as u64));
        let figure = Figure { interval, n, ..Figure::exact(found.error(), "share", Better::Lower) };
        self.figures.insert(name.into(), figure);
    }

    /// Adds `accuracy` and `accuracy_norm` (of the first vote, or of the last exit) and those of further votes.
    pub fn add_choices(&mut self, found: &MultipleChoice, votes: &[String]) {
        let by_vote = &found.items[found.by_exit.len()..];
        let main = by_vote.first().or(found.items.last());
        let mut named: Vec<(String, &Vec<[bool; 2]>)> = main.map(|items| (String::new(), items)).into_iter().collect();
        named.extend(votes.iter().zip(by_vote).skip(1).map(|(name, items)| (format!("_{name}"), items)));
        for (suffix, items) in named {
            for (way, name) in ["accuracy", "accuracy_norm"].into_iter().enumerate() {
                let items = items.iter().map(|right| Item { sum: f64::from(u8::from(right[way])), weight: 1.0 });
                self.add(&format!("{name}{suffix}"), items.collect(), "share", Better::Higher);
            }
        }
    }
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
    /// Which items were measured: 12 hexadecimal digits of a digest of the task's data and of how it is cut. Runs with the
    /// same have the same items in the same order. None in records of older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
    /// What was varied: `model`, `policy`, `budget`, `adapter`, `vote`, `device`, `task`, `seed`, ... by name.
    pub case: BTreeMap<String, String>,
    /// What was measured.
    pub figures: Figures,
    /// The items of the samples, by the name of their figure, in the order of the data: what paired
    /// comparisons need.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub items: BTreeMap<String, Vec<Item>>,
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
