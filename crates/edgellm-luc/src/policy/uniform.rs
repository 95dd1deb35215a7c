//! `uniform`: one format for every unit, the baseline that everybody uses.

use edgellm_model::ModelError;
use edgellm_model::traits::PolicySolver;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement};

use super::{bytes_of, check, infeasible, no_budget, policy};
use crate::cost::byte_limit;

/// One format for every unit: the given one, or else the widest measured one that fits the budget.
///
/// Of several formats of the widest width that fits, the one with the most bytes (the finest groups) is taken; of
/// those, the first measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Uniform {
    /// The format; `None` to choose by the budget.
    pub format: Option<LayerFormat>,
}

impl PolicySolver for Uniform {
    fn name(&self) -> &'static str {
        "uniform"
    }

    fn solve(&self, measurement: &Measurement, budget: &Budget) -> Result<CompressionPolicy, ModelError> {
        check(measurement)?;
        let limit = byte_limit(measurement, budget)?;
        let candidates: Vec<LayerFormat> = match self.format {
            Some(format) => vec![format],
            None if limit.is_none() => return Err(no_budget("uniform", ", or a format")),
            None => measurement.options.iter().copied().filter(|o| o.sparsity == 0.0).collect(),
        };
        let limit = limit.unwrap_or(u64::MAX);
        let mut best: Option<((u8, u64), LayerFormat)> = None;
        let mut least = u64::MAX;
        for format in candidates {
            let bytes = bytes_of(measurement, &vec![format; measurement.units.len()])?;
            least = least.min(bytes);
            let rank = (format.bit_width, bytes);
            if bytes <= limit && best.is_none_or(|(top, _)| rank > top) {
                best = Some((rank, format));
            }
        }
        let (_, format) = best.ok_or_else(|| infeasible(measurement, least, limit))?;
        Ok(policy(self.name(), measurement, budget, &vec![format; measurement.units.len()]))
    }
}
