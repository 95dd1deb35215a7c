//! AdamW (Loshchilov and Hutter, 2019, algorithm 2) with states in 32 or 8 bits, and the learning-rate schedule.
//!
//! `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`, `w -= lr (m/(1-b1^t) / (sqrt(v/(1-b2^t)) + eps) + wd w)`,
//! where `t` counts the updates of *this* parameter, since a window leaves most parameters alone in a step.
//!
//! An update is one pass over plain slices on one thread, made of additions, products, quotients and roots in a fixed
//! order: the same inputs give the same bits whatever the threads and the instruction set.

mod blockwise;
mod schedule;
mod state;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use schedule::LrSchedule;

use crate::TuneError;
use blockwise::{BLOCK, Quantized, decode_signed, decode_unsigned, encode_signed, encode_unsigned};

/// Tensors with fewer values keep their state in `f32` (as in the paper's library, bitsandbytes: small
/// tensors save little, and norms and biases are sensitive).
pub const MIN_INT8_VALUES: usize = 4096;

/// How the moments are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StateType {
    /// 8 bytes for each value of a parameter.
    #[default]
    F32,
    /// About 2 bytes for each value of a parameter with at least [`MIN_INT8_VALUES`]: block-wise dynamic quantization
    /// (Dettmers et al., ICLR 2022).
    Int8,
}

impl StateType {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            StateType::F32 => "f32",
            StateType::Int8 => "int8",
        }
    }
}

impl std::str::FromStr for StateType {
    type Err = TuneError;

    fn from_str(s: &str) -> Result<Self, TuneError> {
        match s {
            "f32" => Ok(StateType::F32),
            "int8" => Ok(StateType::Int8),
            other => {
                Err(TuneError::Setting { what: "optimizer state", expected: "f32 or int8".into(), found: other.into() })
            }
        }
    }
}

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
    /// How the moments are stored.
    pub state: StateType,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, state: StateType::F32 }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Moments {
    F32 { first: Vec<f32>, second: Vec<f32> },
    Int8 { first: Quantized, second: Quantized },
}

impl Moments {
    fn zeros(len: usize, state: StateType) -> Self {
        if state == StateType::Int8 && len >= MIN_INT8_VALUES {
            Moments::Int8 { first: Quantized::zeros(len), second: Quantized::zeros(len) }
        } else {
            Moments::F32 { first: vec![0.0; len], second: vec![0.0; len] }
        }
    }

    fn len(&self) -> usize {
        match self {
            Moments::F32 { first, .. } => first.len(),
            Moments::Int8 { first, .. } => first.codes.len(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Moments::F32 { first, second } => 4 * (first.len() + second.len()) as u64,
            Moments::Int8 { first, second } => first.bytes() + second.bytes(),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct ParameterState {
    moments: Moments,
    updates: u64,
}

/// AdamW with state only for parameters that were updated.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    parameters: BTreeMap<String, ParameterState>,
}

impl AdamW {
    /// An optimizer without state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, parameters: BTreeMap::new() }
    }

    /// Updates a parameter in place with the gradient `scale * grad` (`scale` clips); `name` finds its state.
    ///
    /// # Panics
    /// If value and gradient have different lengths, or the parameter had another length before.
    pub fn update(&mut self, name: &str, value: &mut [f32], grad: &[f32], scale: f32, lr: f64) {
        assert_eq!(value.len(), grad.len(), "lengths of {name} and its gradient");
        if !self.parameters.contains_key(name) {
            let moments = Moments::zeros(value.len(), self.config.state);
            self.parameters.insert(name.to_owned(), ParameterState { moments, updates: 0 });
        }
        let Some(state) = self.parameters.get_mut(name) else { return };
        assert_eq!(value.len(), state.moments.len(), "lengths of {name} now and before");
        state.updates += 1;
        let step = Step::new(&self.config, scale, lr, state.updates);
        match &mut state.moments {
            Moments::F32 { first, second } => step.apply(value, grad, first, second),
            Moments::Int8 { first, second } => step.apply_int8(value, grad, first, second),
        }
    }

    /// Bytes of the state.
    pub fn state_bytes(&self) -> u64 {
        self.parameters.values().map(|p| p.moments.bytes()).sum()
    }
}

/// The numbers of one update that are the same for all values of a parameter.
struct Step {
    scale: f32,
    beta1: f32,
    beta2: f32,
    /// `1 - beta1`.
    keep1: f32,
    /// `1 - beta2`.
    keep2: f32,
    epsilon: f32,
    /// `1 - lr wd`.
    decay: f32,
    /// `lr / (1 - beta1^t)`.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root: f32,
}

impl Step {
    fn new(config: &AdamWConfig, scale: f32, lr: f64, updates: u64) -> Self {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay, .. } = *config;
        Self {
            scale,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            keep1: (1.0 - beta1) as f32,
            keep2: (1.0 - beta2) as f32,
            epsilon: epsilon as f32,
            decay: (1.0 - lr * weight_decay) as f32,
            rate: (lr / (1.0 - power(beta1, updates))) as f32,
            root: (1.0 / (1.0 - power(beta2, updates)).sqrt()) as f32,
        }
    }

    /// One pass; all slices have one length.
    fn apply(&self, value: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32]) {
        let n = value.len();
        let (grad, first, second) = (&grad[..n], &mut first[..n], &mut second[..n]);
        for i in 0..n {
            let g = self.scale * grad[i];
            let m = self.beta1 * first[i] + self.keep1 * g;
            let v = self.beta2 * second[i] + self.keep2 * (g * g);
            first[i] = m;
            second[i] = v;
            value[i] = self.decay * value[i] - self.rate * (m / (self.root * v.sqrt() + self.epsilon));
        }
    }

    /// One pass, block by block: what is between codes and codes stays in the nearest cache.
    fn apply_int8(&self, value: &mut [f32], grad: &[f32], first: &mut Quantized, second: &mut Quantized) {
        let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        let blocks = value.chunks_mut(BLOCK).zip(grad.chunks(BLOCK));
        for ((value, grad), (first, second)) in blocks.zip(first.blocks_mut().zip(second.blocks_mut())) {
            let (m, v) = (&mut m[..value.len()], &mut v[..value.len()]);
            decode_signed(first.0, *first.1, m);
            decode_unsigned(second.0, *second.1, v);
            self.apply(value, grad, m, v);
            encode_signed(m, first.0, first.1);
            encode_unsigned(v, second.0, second.1);
        }
    }
}

/// `base^exponent` by squaring: `powi` may round in another way on another system.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}
