//! `solve`: the measured options that add up to the least damage under the budget, by an exact knapsack.

use edgellm_model::ModelError;
use edgellm_model::traits::PolicySolver;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement};

use super::knapsack::{Item, select};
use super::{check, infeasible, no_budget, policy};
use crate::cost::{byte_limit, matrices_bytes};

/// Minimises the sum of the units' end-to-end sensitivities under the budget, over all measured options.
///
/// Sensitivities are added up as if units did not influence each other. Budgets in bits per weight and in bytes may be
/// given together; both hold then.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Solve {
    /// The most states that are kept per unit. Only beyond it does the result stop being exact, and says so.
    pub max_states: usize,
}

impl Default for Solve {
    fn default() -> Self {
        Self { max_states: 1 << 20 }
    }
}

/// A policy and how good it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// The policy.
    pub policy: CompressionPolicy,
    /// Bytes of all units.
    pub bytes: u64,
    /// Sum of the units' end-to-end sensitivities.
    pub sensitivity: f64,
    /// No policy is better than `sensitivity - gap`; 0 where this is the best.
    pub gap: f64,
}

impl Solve {
    /// The best policy, with its cost and how far it may be from the best.
    ///
    /// # Errors
    /// No budget, or one that cannot be met; the message says what the least is.
    pub fn solution(&self, measurement: &Measurement, budget: &Budget) -> Result<Solution, ModelError> {
        check(measurement)?;
        let limit = byte_limit(measurement, budget)?.ok_or_else(|| no_budget("solve", ""))?;
        let mut classes = Vec::with_capacity(measurement.units.len());
        for unit in &measurement.units {
            let items = measurement.options.iter().zip(&unit.kl);
            let item = |(option, &damage)| Ok(Item { bytes: matrices_bytes(&unit.matrices, option)?, damage });
            classes.push(items.map(item).collect::<Result<Vec<_>, ModelError>>()?);
        }
        let best = select(&classes, limit, self.max_states).map_err(|least| infeasible(measurement, least, limit))?;
        let formats: Vec<LayerFormat> = best.items.iter().map(|&i| measurement.options[i]).collect();
        Ok(Solution {
            policy: policy("solve", measurement, budget, &formats),
            bytes: best.bytes,
            sensitivity: best.damage,
            gap: best.gap,
        })
    }
}

impl PolicySolver for Solve {
    fn name(&self) -> &'static str {
        "solve"
    }

    fn solve(&self, measurement: &Measurement, budget: &Budget) -> Result<CompressionPolicy, ModelError> {
        let solution = self.solution(measurement, budget)?;
        if solution.gap > 0.0 {
            tracing::warn!(gap = solution.gap, sensitivity = solution.sensitivity, "the policy may not be the best");
        }
        Ok(solution.policy)
    }
}
