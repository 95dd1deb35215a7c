//! `solve`: the measured options that add up to the least damage under the budget, by an exact knapsack.

use edgellm_model::ModelError;
use edgellm_model::traits::PolicySolver;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement};

use super::costs::{Costs, DecodeDevice, Resource, amounts};
use super::knapsack::{Item, Selection, select};
use super::{Sensitivity, check, no_budget, policy};

/// Minimises the sum of the units' sensitivities under the budget, over all measured options.
///
/// Sensitivities are added up as if units did not influence each other. Budgets in bits per weight, bytes, milliseconds and
/// memory may be given together; all hold then. Where one of them binds, the result is the best there is; where several
/// do, it usually is, and [`Solution::gap`] says how far it may be from it.
#[derive(Clone, Copy, Debug)]
pub struct Solve<'a> {
    /// The most states that are kept per unit where one budget is given, and eight times as many as where several are.
    /// Only beyond it does the result stop being exact, and says so.
    pub max_states: usize,
    /// What is minimised.
    pub sensitivity: Sensitivity,
    /// The device that milliseconds and memory are of; needed for such budgets only.
    pub device: Option<DecodeDevice<'a>>,
}

impl Default for Solve<'_> {
    fn default() -> Self {
        Self { max_states: 1 << 14, sensitivity: Sensitivity::Kl, device: None }
    }
}

/// A policy and how good it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// The policy.
    pub policy: CompressionPolicy,
    /// Index of the option taken for each unit.
    pub options: Vec<usize>,
    /// Bytes of all units.
    pub bytes: u64,
    /// Sum of the units' sensitivities.
    pub sensitivity: f64,
    /// No policy is better than `sensitivity - gap`; 0 where this is the best.
    pub gap: f64,
    /// What one more unit of each of [`Resource::ALL`] would save of the sensitivity (per byte, nanosecond, byte of
    /// memory), by the dual; 0 where it does not bind.
    pub prices: [f64; 3],
}

impl Solve<'_> {
    /// The best policy, with its cost and how far it may be from the best.
    ///
    /// # Errors
    /// No budget, or one that cannot be met; the message says what the least is.
    pub fn solution(&self, measurement: &Measurement, budget: &Budget) -> Result<Solution, ModelError> {
        let _span = tracing::debug_span!("plan").entered();
        check(measurement)?;
        let costs = Costs::new(measurement, budget, self.device)?;
        if !costs.is_limited() {
            return Err(no_budget("solve", ""));
        }
        let mut table = Vec::with_capacity(measurement.units.len());
        for index in 0..measurement.units.len() {
            let cost = |option: &LayerFormat| Ok(amounts(&costs.unit(index, option)?));
            table.push(measurement.options.iter().map(cost).collect::<Result<Vec<_>, ModelError>>()?);
        }
        let limited: Vec<usize> = (0..Resource::ALL.len()).filter(|&r| costs.limits()[r].is_some()).collect();
        let best = match *limited.as_slice() {
            [a] => self.within(measurement, &costs, &table, [a]),
            [a, b] => self.within(measurement, &costs, &table, [a, b]),
            _ => self.within(measurement, &costs, &table, [0, 1, 2]),
        }?;
        let formats: Vec<LayerFormat> = best.items.iter().map(|&i| measurement.options[i]).collect();
        let bytes = best.items.iter().zip(&table).map(|(&option, costs)| costs[option][0]).sum();
        Ok(Solution {
            policy: policy("solve", measurement, budget, &formats),
            options: best.items,
            bytes,
            sensitivity: best.damage,
            gap: best.gap,
            prices: best.prices,
        })
    }

    /// The best selection within the limits of `resources`.
    fn within<const N: usize>(
        &self,
        measurement: &Measurement,
        costs: &Costs<'_>,
        table: &[Vec<[u64; 3]>],
        resources: [usize; N],
    ) -> Result<Selection<3>, ModelError> {
        let fixed = amounts(&costs.fixed());
        // Totals of resources that are not limited stay 0: nobody asks for them.
        let with_fixed = |least: [u64; N]| {
            let mut total = [0; 3];
            for (i, &r) in resources.iter().enumerate() {
                total[r] = least[i].saturating_add(fixed[r]);
            }
            total
        };
        let mut budgets = [0; N];
        for (budget, &r) in budgets.iter_mut().zip(&resources) {
            *budget = costs.limits()[r].unwrap_or(u64::MAX).saturating_sub(fixed[r]);
        }
        let units = table.iter().zip(&measurement.units);
        let classes: Vec<Vec<Item<N>>> = units
            .map(|(costs, unit)| {
                let items = costs.iter().zip(self.sensitivity.of(unit));
                items.map(|(cost, &damage)| Item { costs: resources.map(|r| cost[r]), damage }).collect()
            })
            .collect();
        // Several resources leave more states that do not beat each other.
        let max_states = if N == 1 { self.max_states } else { self.max_states.div_ceil(8) };
        let found = select(&classes, budgets, max_states).map_err(|least| costs.infeasible(with_fixed(least)))?;
        let mut spread = Selection {
            items: found.items,
            costs: with_fixed(found.costs),
            damage: found.damage,
            gap: found.gap,
            prices: [0.0; 3],
        };
        // Less than nothing left for the units: the fixed part alone is too much.
        if !costs.admits(&spread.costs) {
            return Err(costs.infeasible(spread.costs));
        }
        for (price, &r) in found.prices.iter().zip(&resources) {
            spread.prices[r] = *price;
        }
        Ok(spread)
    }
}

impl PolicySolver for Solve<'_> {
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
