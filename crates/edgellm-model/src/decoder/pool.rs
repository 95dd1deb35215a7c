//! Log-linear pools of the exits at the price of one head product.
//!
//! A log-linear pool (Genest and Zidek, "Combining Probability Distributions", 1986) with weights `w_j` and temperatures
//! `T_j` is
//!
//! ```text
//! p(v) ∝ prod_j p_j(v)^(w_j / T_j),   so   log p(v) = sum_j c_j z_j(v) - log Z,   c_j = w_j / T_j
//! ```
//!
//! where `z_j` are the logits of exit `j`; their normalizers do not depend on `v` and go into `Z`. All exits share one
//! linear head behind norms of their own: `z_j(v) = W_v . n_j + b_v`. Hence
//!
//! ```text
//! sum_j c_j z_j(v) = W_v . (sum_j c_j n_j) + (sum_j c_j) b_v
//! ```
//!
//! The pool of `k` exits is the head applied once to the pooled state `sum_j c_j n_j`: not an approximation, and `k d`
//! multiplications dearer than the last exit alone. (In floating point, sums are taken in another order; with 8-bit
//! activations the pooled state is rounded once instead of each `n_j`.)

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor};

use super::Decoder;

impl Decoder {
    /// The pooled state `sum_j weights[j] states[j]`.
    ///
    /// # Shapes
    /// `states`: `[tokens, d]` each, results of [`Decoder::exit_norm`]; result: `[tokens, d]`.
    ///
    /// # Panics
    /// If there is no state, or not one weight for each.
    pub fn pooled_state(&self, states: &[Tensor<2>], weights: &[f32]) -> Tensor<2> {
        assert_eq!(states.len(), weights.len(), "states and weights of a pool");
        let terms = states.iter().zip(weights).map(|(state, &weight)| state.clone().mul_scalar(weight));
        terms.reduce(|sum, term| sum + term).expect("a pool of at least one exit")
    }

    /// The pool's logits, `sum_j weights[j] z_j`, by one head product.
    ///
    /// # Shapes
    /// As [`Decoder::pooled_state`]; result: `[tokens, vocab]`.
    ///
    /// # Panics
    /// See [`Decoder::pooled_state`].
    pub fn pooled_logits(&self, states: &[Tensor<2>], weights: &[f32]) -> Tensor<2> {
        let logits = self.logits(self.pooled_state(states, weights));
        match self.untied_head().and_then(|head| head.bias.as_ref()) {
            // The head added its bias once.
            Some(bias) => logits + bias.clone().mul_scalar(weights.iter().sum::<f32>() - 1.0).unsqueeze_dim(0),
            None => logits,
        }
    }

    /// `sum_t (-log p(targets[t]))` under the pool, of shape `[1]`; see [`Decoder::loss`].
    ///
    /// # Shapes
    /// As [`Decoder::pooled_state`]; `targets`: `[tokens]`.
    ///
    /// # Panics
    /// See [`Decoder::pooled_state`].
    pub fn pooled_loss(&self, states: &[Tensor<2>], weights: &[f32], targets: Tensor<1, Int>) -> Tensor<1> {
        if self.untied_head().is_some_and(|head| head.bias.is_some()) {
            let log_p = log_softmax(self.pooled_logits(states, weights), 1);
            let picked: Tensor<1> = log_p.gather(1, targets.unsqueeze_dim(1)).squeeze_dim(1);
            return picked.sum().neg();
        }
        let each = Tensor::ones([targets.dims()[0]], &targets.device());
        self.loss(self.pooled_state(states, weights), targets, each)
    }
}
