//! What the inputs of the adapted projections look like on some text: what a rounding error costs.
//!
//! An error `e` of a row costs `e^T H e` with `H = E[x x^T]`. `H` has as many values as columns squared; taken here are its
//! parts that count for a merge: the variance of every column, the mean, and the energy in the directions in which the
//! adapter reads, which are those that tuning found to matter.
//!
//! The first token of a window is left out: its activations are outliers of their own (Sun et al., "Massive activations
//! in large language models", arXiv 2402.17762).

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::tensor::Tensor;
use edgellm_kernels::RoundingGoal;
use edgellm_model::ModelError;
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::values::Projection;

use super::orthonormal;
use crate::error::{LucError, Result};
use crate::progress::Progress;

/// The least weight of a column, as a share of the mean one: no error is free.
const FLOOR: f64 = 1e-3;

/// Moments of the inputs of every projection that an adapter changes.
#[derive(Clone, Debug)]
pub struct InputMoments {
    by_matrix: BTreeMap<(usize, Projection), Moments>,
}

/// Sums over tokens.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    tokens: usize,
    sum: Vec<f64>,
    squares: Vec<f64>,
    /// Orthonormal directions in which the adapter reads, and the squares of the inputs in them.
    basis: Vec<Vec<f64>>,
    energy: Vec<f64>,
}

impl InputMoments {
    /// Runs the base (without the adapter) on `windows` of token ids.
    ///
    /// # Errors
    /// No window of two tokens, an id outside the vocabulary, or weights that cannot be read.
    pub fn measure(
        decoder: &Decoder,
        adapter: &Adapter,
        windows: &[Vec<u32>],
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self> {
        if !windows.iter().any(|window| window.len() > 1) {
            return Err(LucError::Nothing { expected: "a text of at least two tokens" });
        }
        let mut hidden = windows
            .iter()
            .filter(|window| window.len() > 1)
            .map(|window| decoder.embed(&[window]))
            .collect::<Result<Vec<_>, _>>()?;
        let mut by_matrix = BTreeMap::new();
        for index in 0..decoder.n_blocks() {
            let block = decoder.store().block(index)?;
            let mut of_block = BTreeMap::new();
            for projection in Projection::ALL {
                if let Some(lora) = adapter.block(index).and_then(|block| block.get(projection)) {
                    let cols = lora.a.dims()[1];
                    of_block.insert(projection, Moments::new(cols, orthonormal(&to_vec(lora.a.clone())?, cols)));
                }
            }
            let (of_block, failure) = (RefCell::new(of_block), RefCell::new(None));
            let observe = |projection: Projection, x: &Tensor<2>| {
                if let Some(moments) = of_block.borrow_mut().get_mut(&projection)
                    && let Err(error) = moments.add(x)
                {
                    *failure.borrow_mut() = Some(error);
                }
            };
            for x in &mut hidden {
                *x = decoder.run_block(&block, index, x.clone(), Some(&observe));
            }
            if let Some(error) = failure.take() {
                return Err(error.into());
            }
            by_matrix.extend(of_block.into_inner().into_iter().map(|(p, moments)| ((index, p), moments)));
            progress(Progress { done: index + 1, total: decoder.n_blocks(), what: "inputs" });
        }
        Ok(Self { by_matrix })
    }

    pub(super) fn of(&self, block: usize, projection: Projection) -> Option<&Moments> {
        self.by_matrix.get(&(block, projection))
    }
}

impl Moments {
    fn new(cols: usize, basis: Vec<Vec<f64>>) -> Self {
        Self { tokens: 0, sum: vec![0.0; cols], squares: vec![0.0; cols], energy: vec![0.0; basis.len()], basis }
    }

    fn add(&mut self, x: &Tensor<2>) -> Result<(), ModelError> {
        for row in to_vec(x.clone())?.chunks(self.sum.len()).skip(1) {
            self.tokens += 1;
            for ((sum, square), x) in self.sum.iter_mut().zip(&mut self.squares).zip(row) {
                *sum += f64::from(*x);
                *square += f64::from(*x) * f64::from(*x);
            }
            for (energy, u) in self.energy.iter_mut().zip(&self.basis) {
                let dot: f64 = u.iter().zip(row).map(|(u, x)| u * f64::from(*x)).sum();
                *energy += dot * dot;
            }
        }
        Ok(())
    }

    /// `H` as variances of columns, the mean, and what the adapter's directions have beyond these two.
    pub(super) fn goal(&self) -> Result<RoundingGoal> {
        let (cols, n) = (self.sum.len(), self.tokens.max(1) as f64);
        let mean: Vec<f64> = self.sum.iter().map(|sum| sum / n).collect();
        let total = self.squares.iter().sum::<f64>() / n / cols as f64;
        if total <= 0.0 || !total.is_finite() {
            return Ok(RoundingGoal::new(cols));
        }
        let variance: Vec<f64> =
            self.squares.iter().zip(&mean).map(|(s, m)| (s / n - m * m).max(FLOOR * total)).collect();
        let mut directions = vec![mean.clone()];
        for (u, energy) in self.basis.iter().zip(&self.energy) {
            let along: f64 = u.iter().zip(&mean).map(|(u, m)| u * m).sum();
            let known: f64 = u.iter().zip(&variance).map(|(u, v)| u * u * v).sum();
            let beyond = (energy / n - along * along - known).max(0.0);
            directions.push(u.iter().map(|u| u * beyond.sqrt()).collect());
        }
        let (k, scale) = (directions.len(), total.sqrt());
        let directions = (0..cols * k).map(|i| (directions[i % k][i / k] / scale) as f32).collect();
        let weights = variance.iter().map(|v| (v / total) as f32).collect();
        Ok(RoundingGoal::new(cols).with_weights(weights)?.with_directions(directions, k)?)
    }
}
