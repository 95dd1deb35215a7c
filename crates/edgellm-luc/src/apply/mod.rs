//! Applying a policy: to a model's files, tensor by tensor, or to a model in memory.
//!
//! Both go through the same compressor on the same f32 values, so a compressed directory, loaded again, is the model
//! that was compressed in memory, bit for bit.

mod files;
mod memory;

pub(crate) use files::check_replaceable;
pub use files::{Applied, compress_model};
pub use memory::compress_decoder;

use edgellm_model::ModelError;
use edgellm_model::values::{Budget, CompressionPolicy, Granularity, LayerFormat, Projection, Unit, UnitPolicy, Value};

use crate::error::{LucError, Result};

/// Tensor name of the embedding.
const EMBEDDING: &str = "model.embed_tokens.weight";
/// Tensor name of an untied head.
const HEAD: &str = "lm_head.weight";

/// A policy without measurement or budget: `format` for the embedding, the head and every one of `n_blocks` blocks.
///
/// # Errors
/// The format does not exist.
pub fn uniform_policy(n_blocks: usize, format: LayerFormat) -> Result<CompressionPolicy, ModelError> {
    format.packed()?;
    let blocks = (0..n_blocks).map(Unit::Block);
    // A head that is not tied takes the embedding's format.
    let units = std::iter::once(Unit::Embedding).chain(blocks);
    Ok(CompressionPolicy {
        format_version: CompressionPolicy::VERSION,
        solver: "manual".into(),
        granularity: Granularity::Block,
        seed: 0,
        measurement_digest: None,
        model_digest: None,
        compressor: None,
        budget: Budget::default(),
        units: units.map(|unit| UnitPolicy { unit, format }).collect(),
    })
}

/// The policy's format for the unit that holds a tensor.
fn format_of(policy: &CompressionPolicy, unit: Unit, tensor: &str) -> Result<LayerFormat> {
    policy.format_of(unit).ok_or_else(|| LucError::NotInPolicy { unit: unit.to_string(), tensor: tensor.to_owned() })
}

/// Checks the policy itself, and that it names no block that the model does not have.
fn check_policy(policy: &CompressionPolicy, n_blocks: usize) -> Result<()> {
    policy.validate()?;
    for unit in &policy.units {
        let (Unit::Block(block) | Unit::Linear(block, _)) = unit.unit else { continue };
        if block >= n_blocks {
            return Err(LucError::NotInModel { unit: unit.unit.to_string() });
        }
    }
    Ok(())
}

/// The unit of a weight matrix, by its Hugging Face name; `None` for what no policy decides on.
pub(crate) fn unit_of(name: &str) -> Option<Unit> {
    match name {
        EMBEDDING => return Some(Unit::Embedding),
        HEAD => return Some(Unit::Head),
        _ => {}
    }
    let (block, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let block = block.parse().ok()?;
    let projection = Projection::ALL.into_iter().find(|p| p.weight_name(block) == name)?;
    Some(Unit::Linear(block, projection))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_units_and_back() {
        for projection in Projection::ALL {
            assert_eq!(unit_of(&projection.weight_name(17)), Some(Unit::Linear(17, projection)));
        }
        assert_eq!(unit_of(EMBEDDING), Some(Unit::Embedding));
        assert_eq!(unit_of(HEAD), Some(Unit::Head));
        for other in ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.01.mlp.up_proj.weight"]
        {
            assert_eq!(unit_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_policy_for_a_larger_model_is_refused() {
        let policy = uniform_policy(5, LayerFormat::quantized(4, 32, false)).unwrap();
        assert!(check_policy(&policy, 5).is_ok());
        assert!(check_policy(&policy, 4).unwrap_err().to_string().contains("block.4"));
        assert!(uniform_policy(1, LayerFormat::quantized(7, 32, false)).is_err());
    }
}
