//! `paper`: the policy of EDGE-LLM (DAC 2024, arXiv 2406.15758, section 3.1).
//!
//! **Bits.** With a base width `B`, a unit whose sensitivity at `B` is above the mean gets `B + step`, rounded up to
//! the next width that exists. **Pruning.** With `s` the pruning sensitivities, scaled to `[0, 1]` by minimum and
//! maximum, and `P` the target mean sparsity, `p_l = (1 - s_l) / sum_k (1 - s_k) * L * P`, cut to `[0, p_max]`; what
//! was cut off goes to the other units in the same proportions, so that the mean is `P` exactly.
//!
//! Two choices where the paper is silent. Its layers are decoder blocks: the means are taken over the decoder's
//! units, embedding and head are compared with the same mean, and are not pruned. And where units differ in size
//! (single projections), means and sums weigh a unit by its number of weights, so that `P` is the share of weights
//! that are zero; for equal blocks this is the formula above.

use edgellm_model::ModelError;
use edgellm_model::traits::PolicySolver;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement, Scales, Unit, UnitMeasurement};

use super::costs::{Costs, DecodeDevice};
use super::{Sensitivity, check, no_budget, policy};
use crate::cost::matrices_bytes;

/// Bit widths that packed formats have, and f16.
const WIDTHS: [u8; 7] = [2, 3, 4, 5, 6, 8, 16];

/// The paper's policy.
#[derive(Clone, Copy, Debug)]
pub struct Paper<'a> {
    /// The base width `B`; `None` for the largest measured one with which the budget is kept.
    pub base: Option<u8>,
    /// What units above the mean get on top of it, before rounding up.
    pub step: u8,
    /// Group size; `None` for the smallest that was measured at the base width and keeps the budget.
    pub group_size: Option<u16>,
    /// Target mean sparsity `P`; 0 for no pruning. Needs a measured option with sparsity.
    pub target_sparsity: f64,
    /// The largest sparsity of a unit.
    pub p_max: f64,
    /// The sensitivity that it looks at; the paper's is local.
    pub sensitivity: Sensitivity,
    /// The device that milliseconds and memory are of; needed for such budgets only.
    pub device: Option<DecodeDevice<'a>>,
}

impl Default for Paper<'_> {
    fn default() -> Self {
        let sensitivity = Sensitivity::Local;
        Self { base: None, step: 1, group_size: None, target_sparsity: 0.0, p_max: 0.9, sensitivity, device: None }
    }
}

impl PolicySolver for Paper<'_> {
    fn name(&self) -> &'static str {
        "paper"
    }

    fn solve(&self, measurement: &Measurement, budget: &Budget) -> Result<CompressionPolicy, ModelError> {
        check(measurement)?;
        let costs = Costs::new(measurement, budget, self.device)?;
        let bases: Vec<usize> = match self.base {
            Some(width) => match (self.base_options(measurement, width)?, costs.is_limited()) {
                (options, _) if options.is_empty() => return Err(not_measured(&format!("{width} bits"), measurement)),
                (options, false) => options[..1].to_vec(),
                (options, true) => options,
            },
            None if !costs.is_limited() => return Err(no_budget("paper", ", or a base width")),
            None => {
                let mut all = Vec::new();
                for &width in WIDTHS.iter().rev() {
                    all.extend(self.base_options(measurement, width)?);
                }
                all
            }
        };
        if bases.is_empty() {
            return Err(not_measured("any width", measurement));
        }
        let sparsity = self.sparsity(measurement)?;
        let mut least = [u64::MAX; 3];
        for base in bases {
            let formats = self.formats(measurement, base, &sparsity);
            let total = costs.total(&formats)?;
            if costs.admits(&total) {
                return Ok(policy(self.name(), measurement, budget, &formats));
            }
            least = std::array::from_fn(|r| least[r].min(total[r]));
        }
        Err(costs.infeasible(least))
    }
}

impl Paper<'_> {
    /// Indices of the dense options of `width` bits, the most bytes (the finest groups and scales) first.
    fn base_options(&self, measurement: &Measurement, width: u8) -> Result<Vec<usize>, ModelError> {
        let mut found = Vec::new();
        for (index, option) in measurement.options.iter().enumerate() {
            let grouped = width >= 16 || self.group_size.is_none_or(|size| size == option.group_size);
            if option.bit_width == width && option.sparsity == 0.0 && grouped {
                let mut bytes = 0u64;
                for unit in &measurement.units {
                    bytes = bytes.saturating_add(matrices_bytes(&unit.matrices, option)?);
                }
                found.push((std::cmp::Reverse(bytes), index));
            }
        }
        found.sort_unstable();
        Ok(found.into_iter().map(|(_, index)| index).collect())
    }

    /// The sparsity of every unit.
    fn sparsity(&self, measurement: &Measurement) -> Result<Vec<f64>, ModelError> {
        let mut sparsity = vec![0.0; measurement.units.len()];
        if self.target_sparsity == 0.0 {
            return Ok(sparsity);
        }
        let probe = probe(measurement, self.target_sparsity)?;
        let decoder: Vec<usize> = decoder_units(measurement);
        let s: Vec<f64> = decoder.iter().map(|&u| self.sensitivity.of(&measurement.units[u])[probe]).collect();
        let weights: Vec<f64> = decoder.iter().map(|&u| unit_weights(measurement, u)).collect();
        let allocated = allocate_sparsity(&s, &weights, self.target_sparsity, self.p_max)?;
        for (unit, p) in decoder.into_iter().zip(allocated) {
            sparsity[unit] = p;
        }
        Ok(sparsity)
    }

    /// The format of every unit for one base option.
    fn formats(&self, measurement: &Measurement, base: usize, sparsity: &[f64]) -> Vec<LayerFormat> {
        let decoder = decoder_units(measurement);
        let at_base = |unit: &UnitMeasurement| self.sensitivity.of(unit)[base];
        let weighted: f64 =
            decoder.iter().map(|&u| unit_weights(measurement, u) * at_base(&measurement.units[u])).sum();
        let weights: f64 = decoder.iter().map(|&u| unit_weights(measurement, u)).sum();
        let mean = weighted / weights;
        let low = measurement.options[base];
        let high = widen(low, self.step);
        let units = measurement.units.iter().zip(sparsity);
        units.map(|(unit, &p)| if at_base(unit) > mean { high } else { low }.with_sparsity_if(p)).collect()
    }
}

/// Prunes only where there is something to prune: a dense unit keeps its asymmetric codes and its scales, which sparse
/// formats have in f16 only.
trait WithSparsityIf {
    fn with_sparsity_if(self, sparsity: f64) -> Self;
}

impl WithSparsityIf for LayerFormat {
    fn with_sparsity_if(self, sparsity: f64) -> Self {
        if sparsity > 0.0 { self.with_scales(Scales::F16).with_sparsity(sparsity) } else { self }
    }
}

/// `format` with `step` more bits, rounded up to a width that exists; f16 is the widest.
fn widen(format: LayerFormat, step: u8) -> LayerFormat {
    let wanted = format.bit_width.saturating_add(step);
    match WIDTHS.into_iter().find(|&w| w >= wanted) {
        Some(width @ ..=8) => LayerFormat { bit_width: width, ..format },
        _ if format.bit_width >= 16 => format,
        _ => LayerFormat::float(16),
    }
}

/// Units of the decoder blocks; all units if there is no block among them.
fn decoder_units(measurement: &Measurement) -> Vec<usize> {
    let is_block = |u: &Unit| matches!(u, Unit::Block(_) | Unit::Linear(..));
    let blocks: Vec<usize> = (0..measurement.units.len()).filter(|&i| is_block(&measurement.units[i].unit)).collect();
    if blocks.is_empty() { (0..measurement.units.len()).collect() } else { blocks }
}

fn unit_weights(measurement: &Measurement, unit: usize) -> f64 {
    measurement.units[unit].matrices.iter().map(|m| m.rows as f64 * m.cols as f64).sum()
}

/// Index of the measured option that tells pruning sensitivity best: of the widest codes, the nearest sparsity.
fn probe(measurement: &Measurement, target: f64) -> Result<usize, ModelError> {
    let sparse = measurement.options.iter().enumerate().filter(|(_, o)| o.sparsity > 0.0);
    sparse
        .min_by(|(i, a), (j, b)| {
            let distance = |o: &LayerFormat| (o.sparsity - target).abs();
            b.bit_width.cmp(&a.bit_width).then(distance(a).total_cmp(&distance(b))).then(i.cmp(j))
        })
        .map(|(index, _)| index)
        .ok_or_else(|| not_measured("a sparsity above 0, which pruning needs", measurement))
}

fn not_measured(what: &str, measurement: &Measurement) -> ModelError {
    let options: Vec<String> = measurement.options.iter().map(LayerFormat::to_string).collect();
    ModelError::Value {
        what: "measurement".into(),
        expected: format!("an option with {what}"),
        found: options.join(", "),
    }
}

/// Sparsities `p_l` in `[0, p_max]`, in proportion to `1 - s_l` where they are not cut, whose mean weighted by
/// `weights` is `target`; `s` is `sensitivity` scaled to `[0, 1]`.
///
/// Where all units are equally sensitive, all get `target`. Where the units that are not yet full all have `s = 1`,
/// they share what is left evenly.
///
/// ```
/// // s = 0, 0.5, 1: shares 2/3, 1/3 and 0 of 3 * 0.4, of which the first is cut to 0.7.
/// let p = edgellm_luc::allocate_sparsity(&[1.0, 2.0, 3.0], &[1.0; 3], 0.4, 0.7)?;
/// assert!((p[0] - 0.7).abs() < 1e-12 && (p[1] - 0.5).abs() < 1e-12 && p[2] == 0.0);
/// # Ok::<(), edgellm_model::ModelError>(())
/// ```
///
/// # Errors
/// A target outside `[0, p_max]`, a `p_max` outside `[0, 1)`, or sensitivities and weights that are not finite, or not
/// equally many.
pub fn allocate_sparsity(
    sensitivity: &[f64],
    weights: &[f64],
    target: f64,
    p_max: f64,
) -> Result<Vec<f64>, ModelError> {
    let bad =
        |what: &str, expected: String, found: String| Err(ModelError::Value { what: what.into(), expected, found });
    if !(0.0..1.0).contains(&p_max) {
        return bad("largest sparsity", "at least 0 and below 1".into(), p_max.to_string());
    }
    if !(0.0..=p_max).contains(&target) {
        return bad(
            "target sparsity",
            format!("from 0 to {p_max}, the largest sparsity of a unit"),
            target.to_string(),
        );
    }
    let usable = sensitivity.iter().all(|s| s.is_finite()) && weights.iter().all(|w| w.is_finite() && *w > 0.0);
    if !usable || sensitivity.len() != weights.len() || sensitivity.is_empty() {
        let found = format!("{sensitivity:?} and {weights:?}");
        return bad("sensitivities and weights", "finite numbers, as many of one as of the other".into(), found);
    }
    let low = sensitivity.iter().copied().fold(f64::INFINITY, f64::min);
    let high = sensitivity.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let scaled = |s: f64| if high > low { (s - low) / (high - low) } else { 0.0 };
    let share: Vec<f64> = sensitivity.iter().map(|&s| 1.0 - scaled(s)).collect();
    Ok(fill(&share, weights, target, p_max))
}

/// Raises `p_l = min(p_max, c * share_l)` until the weighted mean is `target`, then whatever has no share.
fn fill(share: &[f64], weights: &[f64], target: f64, p_max: f64) -> Vec<f64> {
    let mut p = vec![0.0; share.len()];
    let mut full = vec![false; share.len()];
    let mut left = target * weights.iter().sum::<f64>();
    let mut even = false;
    // Every round but the last fills a unit or starts sharing evenly, so there are at most `len + 2` rounds.
    loop {
        let part = |i: usize| if even { 1.0 } else { share[i] };
        let open: Vec<usize> = (0..share.len()).filter(|&i| !full[i] && part(i) > 0.0).collect();
        let base: f64 = open.iter().map(|&i| weights[i] * part(i)).sum();
        if open.is_empty() || base <= 0.0 {
            if even || left <= 0.0 {
                return p;
            }
            even = true;
            continue;
        }
        let factor = left / base;
        let over: Vec<usize> = open.iter().copied().filter(|&i| factor * part(i) > p_max).collect();
        if over.is_empty() {
            for i in open {
                p[i] = factor * part(i);
            }
            return p;
        }
        for i in over {
            (p[i], full[i]) = (p_max, true);
            left -= weights[i] * p_max;
        }
    }
}
