//! `uniform`: one format for every unit, the baseline that everybody uses.

use edgellm_model::ModelError;
use edgellm_model::traits::PolicySolver;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement};

use super::costs::{Costs, DecodeDevice};
use super::{Sensitivity, check, no_budget, policy};

/// One format for every unit: the given one, or else the best dense one that was measured and fits the budget: that of
/// the least sum of end-to-end sensitivities, of equals the smaller.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uniform<'a> {
    /// The format; `None` to choose by the budget.
    pub format: Option<LayerFormat>,
    /// The device that milliseconds and memory are of; needed for such budgets only.
    pub device: Option<DecodeDevice<'a>>,
}

impl PolicySolver for Uniform<'_> {
    fn name(&self) -> &'static str {
        "uniform"
    }

    fn solve(&self, measurement: &Measurement, budget: &Budget) -> Result<CompressionPolicy, ModelError> {
        check(measurement)?;
        let costs = Costs::new(measurement, budget, self.device)?;
        let dense = || measurement.options.iter().enumerate().filter(|(_, o)| o.sparsity == 0.0);
        let candidates: Vec<(f64, LayerFormat)> = match self.format {
            Some(format) => vec![(0.0, format)],
            None if !costs.is_limited() => return Err(no_budget("uniform", ", or a format")),
            None => dense().map(|(index, &format)| (damage(measurement, index), format)).collect(),
        };
        let mut best: Option<(f64, u64, LayerFormat)> = None;
        let mut least = [u64::MAX; 3];
        for (damage, format) in candidates {
            let total = costs.total(&vec![format; measurement.units.len()])?;
            least = std::array::from_fn(|r| least[r].min(total[r]));
            let better = |(other, bytes, _): (f64, u64, _)| (damage, total[0]) < (other, bytes);
            if costs.admits(&total) && best.is_none_or(better) {
                best = Some((damage, total[0], format));
            }
        }
        let (.., format) = best.ok_or_else(|| costs.infeasible(least))?;
        Ok(policy(self.name(), measurement, budget, &vec![format; measurement.units.len()]))
    }
}

/// The sum of the units' sensitivities to an option.
fn damage(measurement: &Measurement, option: usize) -> f64 {
    measurement.units.iter().map(|unit| Sensitivity::Kl.of(unit)[option]).sum()
}
