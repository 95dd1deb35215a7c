//! Low-rank adapters (Hu et al., "LoRA", 2021): `W' = W + s B A` beside a frozen base, and the norms of the exits.
//!
//! An adapter holds, for every block and every targeted projection, `A` `[r, in]` and `B` `[out, r]`, with
//! `s = alpha / r` (or `alpha / sqrt(r)` for rank-stabilized LoRA, Kalajdzievski 2023). `A` starts as
//! Kaiming-uniform noise and `B` as zero, so that a fresh adapter changes nothing.

mod peft;
mod set;
mod targets;

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use edgellm_kernels::Lora;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ModelError;
use crate::config::ModelConfig;
use crate::values::Projection;

pub use self::set::AdapterSet;
pub use self::targets::Targets;

/// Rank, scale and targets of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank `r`.
    pub rank: usize,
    /// Numerator `alpha` of the scale.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(r)` instead of `alpha / r`.
    pub use_rslora: bool,
    /// The projections that are adapted, in every block or in some.
    pub targets: Targets,
}

impl LoraConfig {
    /// The factor `s` on the low-rank product.
    pub fn scaling(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Checks rank, scale and targets.
    ///
    /// # Errors
    /// A rank of zero or above 1024, a scale that is not finite, or no target.
    pub fn validate(&self) -> Result<(), ModelError> {
        let bad = |what: &str, expected: &str, found: String| {
            Err(ModelError::Value { what: what.into(), expected: expected.into(), found })
        };
        if self.rank == 0 || self.rank > 1024 {
            return bad("LoRA rank", "from 1 to 1024", self.rank.to_string());
        }
        if !self.alpha.is_finite() {
            return bad("LoRA alpha", "a finite number", self.alpha.to_string());
        }
        if self.targets.is_empty() {
            return bad("LoRA targets", "at least one projection", "none".into());
        }
        Ok(())
    }
}

/// The adapters of one block, by projection.
#[derive(Clone, Debug, Default)]
pub struct BlockLora {
    loras: [Option<Lora>; 7],
}

impl BlockLora {
    /// The adapter of one projection.
    pub fn get(&self, projection: Projection) -> Option<&Lora> {
        self.loras[projection as usize].as_ref()
    }

    /// Mutable access to the adapter of one projection.
    pub fn get_mut(&mut self, projection: Projection) -> &mut Option<Lora> {
        &mut self.loras[projection as usize]
    }
}

/// A low-rank adapter of a whole model, with the norms of its exits.
#[derive(Clone, Debug)]
pub struct Adapter {
    config: LoraConfig,
    blocks: Vec<BlockLora>,
    exit_norms: BTreeMap<usize, Tensor<1>>,
}

impl Adapter {
    /// A fresh adapter: `A` uniform in `±1/sqrt(in)` (PEFT's Kaiming-uniform with `a = sqrt(5)`), `B` zero, no exit norms.
    ///
    /// # Errors
    /// The configuration is not valid, or names a block that the model does not have.
    pub fn new(model: &ModelConfig, config: LoraConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        config.validate()?;
        config.targets.check(model.n_layers)?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut blocks = vec![BlockLora::default(); model.n_layers];
        for (index, block) in blocks.iter_mut().enumerate() {
            for &projection in config.targets.iter().filter(|p| config.targets.contains(index, **p)) {
                let [out, input] = model.projection_shape(projection);
                let bound = 1.0 / (input as f32).sqrt();
                let a: Vec<f32> = (0..config.rank * input).map(|_| rng.random_range(-bound..bound)).collect();
                *block.get_mut(projection) = Some(Lora {
                    a: Tensor::from_data(TensorData::new(a, [config.rank, input]), device),
                    b: Tensor::zeros([out, config.rank], device),
                    scaling: config.scaling(),
                });
            }
        }
        Ok(Self { config, blocks, exit_norms: BTreeMap::new() })
    }

    /// Rank, scale and targets; rank 0 and no targets where there are exit norms alone.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The adapters of block `index`, if the adapter has such a block.
    pub fn block(&self, index: usize) -> Option<&BlockLora> {
        self.blocks.get(index)
    }

    /// Mutable access to the adapters of block `index`.
    pub fn block_mut(&mut self, index: usize) -> Option<&mut BlockLora> {
        self.blocks.get_mut(index)
    }

    /// Number of blocks.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The norm of the exit after `exit` blocks, `[d]`.
    pub fn exit_norm(&self, exit: usize) -> Option<&Tensor<1>> {
        self.exit_norms.get(&exit)
    }

    /// Sets the norm of the exit after `exit` blocks.
    pub fn set_exit_norm(&mut self, exit: usize, weight: Tensor<1>) {
        self.exit_norms.insert(exit, weight);
    }

    /// Whether there is any low-rank update: an adapter may hold exit norms alone.
    pub fn has_updates(&self) -> bool {
        self.blocks.iter().any(|block| block.loras.iter().any(Option::is_some))
    }

    /// The exits that this adapter was tuned with, as numbers of blocks, ascending; empty if none.
    pub fn exits(&self) -> Vec<usize> {
        self.exit_norms.keys().copied().collect()
    }

    /// Number of values in all `A`, `B` and exit norms.
    pub fn parameters(&self) -> usize {
        let loras = self.blocks.iter().flat_map(|block| block.loras.iter().flatten());
        let low_rank: usize = loras.map(|l| l.a.shape().num_elements() + l.b.shape().num_elements()).sum();
        low_rank + self.exit_norms.values().map(|n| n.shape().num_elements()).sum::<usize>()
    }

    /// Checks that the adapter fits a model.
    ///
    /// # Errors
    /// The first tensor that does not fit, with both shapes.
    pub fn check_fits(&self, model: &ModelConfig) -> Result<(), ModelError> {
        let bad = |what: String, expected: String, found: String| Err(ModelError::Value { what, expected, found });
        if self.blocks.len() != model.n_layers {
            return bad("blocks of the adapter".into(), model.n_layers.to_string(), self.blocks.len().to_string());
        }
        for (index, block) in self.blocks.iter().enumerate() {
            for projection in Projection::ALL {
                let Some(lora) = block.get(projection) else { continue };
                let [out, input] = model.projection_shape(projection);
                let found = (lora.a.dims(), lora.b.dims());
                let expected = ([self.config.rank, input], [out, self.config.rank]);
                if found != expected {
                    return bad(
                        format!("adapter shapes (A, B) for {}", projection.weight_name(index)),
                        format!("{expected:?}"),
                        format!("{found:?}"),
                    );
                }
            }
        }
        for (exit, norm) in &self.exit_norms {
            if *exit == 0 || *exit > model.n_layers || norm.dims() != [model.hidden_size] {
                return bad(
                    format!("exit norm after {exit} blocks"),
                    format!("an exit from 1 to {} with {} values", model.n_layers, model.hidden_size),
                    format!("{} values", norm.dims()[0]),
                );
            }
        }
        Ok(())
    }
}

/// `k` exits evenly spaced over `n_blocks` blocks; the last is the whole model.
///
/// # Errors
/// `k` is zero or more than the number of blocks.
pub fn even_exits(n_blocks: usize, k: usize) -> Result<Vec<usize>, ModelError> {
    if k == 0 || k > n_blocks {
        return Err(ModelError::Value {
            what: "number of exits".into(),
            expected: format!("from 1 to {n_blocks}, the number of blocks"),
            found: k.to_string(),
        });
    }
    Ok((1..=k).map(|i| (i * n_blocks).div_ceil(k)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_even_and_end_at_the_model() {
        assert_eq!(even_exits(30, 4).unwrap(), [8, 15, 23, 30]);
        assert_eq!(even_exits(8, 4).unwrap(), [2, 4, 6, 8]);
        assert_eq!(even_exits(8, 8).unwrap(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(even_exits(3, 1).unwrap(), [3]);
        assert!(even_exits(3, 4).is_err());
        assert!(even_exits(3, 0).is_err());
    }
}
