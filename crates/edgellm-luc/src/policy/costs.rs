//! What the formats of a measured model cost, and whether a budget allows it.
//!
//! Three resources: bytes of the packed units, nanoseconds to decode a token, and bytes of memory while it is decoded.
//! The first is exact and needs no device; the others come from a [`CostModel`]. Costs are whole numbers, so that sums do not
//! depend on their order.

use edgellm_model::ModelError;
use edgellm_model::traits::{CostModel, DecoderShape, UnitCost, Workload};
use edgellm_model::values::{Budget, LayerFormat, Measurement, Projection, Unit};

use crate::cost::{bits_per_weight, byte_limit, matrices_bytes, total_weights};

/// A device to decode on: its cost model, and the tokens in the cache.
#[derive(Clone, Copy)]
pub struct DecodeDevice<'a> {
    /// Predicts milliseconds and memory.
    pub model: &'a dyn CostModel,
    /// Tokens in the cache, for the time of attention and the memory of the cache.
    pub context: usize,
}

impl std::fmt::Debug for DecodeDevice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecodeDevice").field("context", &self.context).finish_non_exhaustive()
    }
}

/// What can be spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Bytes of all packed units.
    Bytes,
    /// Nanoseconds to decode a token.
    Time,
    /// Bytes of memory while tokens are decoded.
    Memory,
}

impl Resource {
    /// All of them, in the order of every array of costs.
    pub const ALL: [Resource; 3] = [Resource::Bytes, Resource::Time, Resource::Memory];
}

/// Costs of a measured model's units, and the limits of a budget.
#[derive(Clone, Debug)]
pub struct Costs<'a> {
    measurement: &'a Measurement,
    device: Option<DecodeDevice<'a>>,
    fixed: UnitCost,
    limits: [Option<u64>; 3],
}

impl<'a> Costs<'a> {
    /// Costs on `device` within `budget`.
    ///
    /// # Errors
    /// A limit that is no number above 0, a limit in milliseconds or memory without a device, or a profile that does not
    /// tell what the model needs.
    pub fn new(
        measurement: &'a Measurement,
        budget: &Budget,
        device: Option<DecodeDevice<'a>>,
    ) -> Result<Self, ModelError> {
        let bad = |what: &str, expected: &str, found: String| {
            Err(ModelError::Value { what: what.into(), expected: expected.into(), found })
        };
        if budget.needs_device() && device.is_none() {
            return bad("budget in milliseconds or memory", "a device profile", "none".into());
        }
        if let Some(ms) = budget.milliseconds.filter(|ms| !ms.is_finite() || *ms <= 0.0) {
            return bad("milliseconds of the budget", "a number above 0", ms.to_string());
        }
        let fixed = match device {
            None => UnitCost::default(),
            Some(device) => device.model.fixed(&decoder_shape(measurement, device.context)?)?,
        };
        let time = budget.milliseconds.map(|ms| (ms * 1e6 * (1.0 + 1e-12)) as u64);
        let limits = [byte_limit(measurement, budget)?, time, budget.peak_bytes];
        Ok(Self { measurement, device, fixed, limits })
    }

    /// What all units cost in no format: norms, attention, cache and buffers.
    pub fn fixed(&self) -> UnitCost {
        self.fixed
    }

    /// Whether the budget says anything.
    pub fn is_limited(&self) -> bool {
        self.limits.iter().any(Option::is_some)
    }

    /// The limits of [`Resource::ALL`].
    pub fn limits(&self) -> [Option<u64>; 3] {
        self.limits
    }

    /// The cost of unit `index` in a format; without a device, its bytes only.
    ///
    /// # Errors
    /// The format does not exist, or the device's profile does not tell its speed.
    pub fn unit(&self, index: usize, format: &LayerFormat) -> Result<UnitCost, ModelError> {
        let unit = &self.measurement.units[index];
        let bytes = matrices_bytes(&unit.matrices, format)?;
        let Some(device) = self.device else {
            return Ok(UnitCost { bytes, ..UnitCost::default() });
        };
        let mut cost = device.model.cost(&unit.matrices, format, Workload::Forward { tokens: 1 })?;
        // An embedding that is not the head as well gives one row a token.
        if unit.unit == Unit::Embedding && self.measurement.units.iter().any(|u| u.unit == Unit::Head) {
            cost.milliseconds = 0.0;
        }
        Ok(UnitCost { bytes, ..cost })
    }

    /// The cost of the whole model when unit `i` has the format `formats[i]`, the fixed part included.
    ///
    /// # Errors
    /// As [`unit`](Self::unit).
    pub fn total(&self, formats: &[LayerFormat]) -> Result<[u64; 3], ModelError> {
        let mut sum = amounts(&self.fixed);
        for (index, format) in formats.iter().enumerate() {
            let cost = amounts(&self.unit(index, format)?);
            sum = std::array::from_fn(|r| sum[r].saturating_add(cost[r]));
        }
        Ok(sum)
    }

    /// Whether a total is within the budget.
    pub fn admits(&self, total: &[u64; 3]) -> bool {
        self.limits.iter().zip(total).all(|(limit, cost)| limit.is_none_or(|limit| *cost <= limit))
    }

    /// The budget cannot be kept: `least` is the least total of each resource.
    pub(super) fn infeasible(&self, least: [u64; 3]) -> ModelError {
        let weights = total_weights(self.measurement).unwrap_or(1);
        let say = |resource: Resource, amount: u64| match resource {
            Resource::Bytes => format!("{amount} bytes ({:.3} bits per weight)", bits_per_weight(amount, weights)),
            Resource::Time => format!("{:.4} ms per token", amount as f64 / 1e6),
            Resource::Memory => format!("{amount} bytes of memory"),
        };
        let limited = Resource::ALL.into_iter().zip(self.limits).zip(least);
        let limited: Vec<_> =
            limited.filter_map(|((resource, limit), least)| limit.map(|l| (resource, l, least))).collect();
        // The limits that cannot be kept; all of them, where each can be but not together.
        let broken: Vec<_> = limited.iter().copied().filter(|(_, limit, least)| least > limit).collect();
        let named = if broken.is_empty() { limited } else { broken };
        let list = |amount: &dyn Fn(&(Resource, u64, u64)) -> u64| {
            named.iter().map(|entry| say(entry.0, amount(entry))).collect::<Vec<_>>().join(" and ")
        };
        ModelError::Value {
            what: "budget".into(),
            expected: format!("at least {}, the least that these options reach", list(&|e| e.2)),
            found: list(&|e| e.1),
        }
    }
}

/// A cost as whole numbers, in the order of [`Resource::ALL`].
pub(super) fn amounts(cost: &UnitCost) -> [u64; 3] {
    [cost.bytes, (cost.milliseconds * 1e6).ceil() as u64, cost.resident_bytes]
}

/// The shape of a measured decoder, by its matrices' names, with `context` tokens in its cache.
///
/// # Errors
/// Matrices of a decoder are missing.
pub fn decoder_shape(measurement: &Measurement, context: usize) -> Result<DecoderShape, ModelError> {
    let missing = |what: &str| ModelError::Value {
        what: "matrices of the measurement".into(),
        expected: format!("{what} of a decoder"),
        found: "none".into(),
    };
    let matrices = || measurement.units.iter().flat_map(|u| &u.matrices);
    let projection = |projection: Projection| {
        let suffix = format!(".{}.weight", projection.path());
        matrices().find(|m| m.name.ends_with(&suffix)).ok_or_else(|| missing(projection.name()))
    };
    let blocks: std::collections::BTreeSet<usize> = measurement
        .units
        .iter()
        .filter_map(|u| match u.unit {
            Unit::Block(block) | Unit::Linear(block, _) => Some(block),
            Unit::Embedding | Unit::Head => None,
        })
        .collect();
    let embedding = measurement.units.iter().find(|u| matches!(u.unit, Unit::Embedding | Unit::Head));
    let embedding = embedding.and_then(|u| u.matrices.first()).ok_or_else(|| missing("embedding"))?;
    Ok(DecoderShape {
        n_blocks: blocks.len(),
        hidden_size: embedding.cols,
        query_size: projection(Projection::Q)?.rows,
        kv_size: projection(Projection::K)?.rows,
        intermediate_size: projection(Projection::Up)?.rows,
        vocab_size: embedding.rows,
        context,
    })
}
