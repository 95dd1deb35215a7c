//! AdamW (Loshchilov and Hutter, 2019, algorithm 2), the learning-rate schedule, and clipping by the global norm.
//!
//! `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`, `w -= lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + wd w)`,
//! where `t` counts the updates of *this* parameter, since a window leaves most parameters alone in a step.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::TuneError;

/// Settings of AdamW. The defaults are PyTorch's, without weight decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 }
    }
}

#[derive(Clone, Debug)]
struct Moments {
    first: Tensor<1>,
    second: Tensor<1>,
    updates: i32,
}

/// AdamW with state only for parameters that were updated.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// An optimizer without state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, moments: BTreeMap::new() }
    }

    /// The parameter after one update; `name` finds its state.
    ///
    /// # Panics
    /// If value and gradient have different shapes.
    pub fn update<const D: usize>(&mut self, name: &str, value: Tensor<D>, grad: Tensor<D>, lr: f64) -> Tensor<D> {
        assert_eq!(value.dims(), grad.dims(), "shapes of {name} and its gradient");
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let dims = value.dims();
        let len = value.shape().num_elements();
        let grad: Tensor<1> = grad.reshape([len]);
        let value: Tensor<1> = value.reshape([len]);
        let old = self.moments.remove(name);
        let updates = old.as_ref().map_or(0, |m| m.updates) + 1;
        let squared = grad.clone().powi_scalar(2).mul_scalar(1.0 - beta2);
        let scaled = grad.mul_scalar(1.0 - beta1);
        let (first, second) = match old {
            Some(m) => (m.first.mul_scalar(beta1).add(scaled), m.second.mul_scalar(beta2).add(squared)),
            None => (scaled, squared),
        };
        let corrected_first = first.clone().div_scalar(1.0 - beta1.powi(updates));
        let corrected_second = second.clone().div_scalar(1.0 - beta2.powi(updates));
        let direction = corrected_first.div(corrected_second.sqrt().add_scalar(epsilon));
        self.moments.insert(name.to_string(), Moments { first, second, updates });
        value.mul_scalar(1.0 - lr * weight_decay).sub(direction.mul_scalar(lr)).reshape(dims)
    }

    /// Bytes of the state.
    pub fn state_bytes(&self) -> u64 {
        self.moments.values().map(|m| 8 * m.first.shape().num_elements() as u64).sum()
    }
}

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LrSchedule {
    /// It stays.
    Constant,
    /// Half a cosine down to zero.
    Cosine,
    /// A line down to zero.
    Linear,
}

impl std::str::FromStr for LrSchedule {
    type Err = TuneError;

    fn from_str(s: &str) -> Result<Self, TuneError> {
        match s {
            "constant" => Ok(LrSchedule::Constant),
            "cosine" => Ok(LrSchedule::Cosine),
            "linear" => Ok(LrSchedule::Linear),
            other => Err(TuneError::Setting {
                what: "learning-rate schedule",
                expected: "constant, cosine or linear".into(),
                found: other.into(),
            }),
        }
    }
}

impl LrSchedule {
    /// The factor on the learning rate in step `step` of `total`, after `warmup` steps of linear increase.
    pub fn factor(self, step: u64, total: u64, warmup: u64) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let span = total.saturating_sub(warmup).max(1) as f64;
        let progress = ((step - warmup) as f64 / span).min(1.0);
        match self {
            LrSchedule::Constant => 1.0,
            LrSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            LrSchedule::Linear => 1.0 - progress,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn adamw_matches_hand_worked_steps() {
        let device = Device::flex();
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(config);
        let mut value = Tensor::<1>::from_floats([1.0, -2.0], &device);
        let (mut expected, mut m, mut v) = ([1.0f64, -2.0], [0.0f64; 2], [0.0f64; 2]);
        for (t, grad) in [[0.5f64, -1.0], [0.25, 2.0], [-1.0, 0.0]].into_iter().enumerate() {
            let step = Tensor::<1>::from_floats([grad[0] as f32, grad[1] as f32], &device);
            value = optimizer.update("w", value, step, 0.01);
            for i in 0..2 {
                m[i] = 0.9 * m[i] + 0.1 * grad[i];
                v[i] = 0.999 * v[i] + 0.001 * grad[i] * grad[i];
                let power = t as i32 + 1;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(power)), v[i] / (1.0 - 0.999f64.powi(power)));
                expected[i] -= 0.01 * (mh / (vh.sqrt() + 1e-8) + 0.1 * expected[i]);
            }
        }
        let found = value.into_data().try_to_vec::<f32>().unwrap();
        for i in 0..2 {
            assert!((f64::from(found[i]) - expected[i]).abs() < 1e-5, "{found:?} is not {expected:?}");
        }
        assert_eq!(optimizer.state_bytes(), 16);
    }

    #[test]
    fn schedules_warm_up_and_end() {
        assert_eq!(LrSchedule::Constant.factor(50, 100, 0), 1.0);
        assert_eq!(LrSchedule::Constant.factor(1, 100, 4), 0.5);
        assert_eq!(LrSchedule::Linear.factor(60, 110, 10), 0.5);
        assert!((LrSchedule::Cosine.factor(60, 110, 10) - 0.5).abs() < 1e-12);
        assert!(LrSchedule::Cosine.factor(110, 110, 10) < 1e-12);
        assert!("step".parse::<LrSchedule>().is_err());
    }
}
