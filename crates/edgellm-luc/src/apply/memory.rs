//! Applying a policy to a model in memory.

use std::sync::Arc;

use edgellm_model::decoder::{Decoder, Linear, ResidentStore, Weight};
use edgellm_model::traits::Compressor;
use edgellm_model::values::{CompressionPolicy, LayerFormat, Projection, Unit};

use super::{check_policy, format_of};
use crate::error::Result;
use crate::weights::HostWeight;

/// The model with every unit in the format that the policy gives it, on the same device; norms and biases are shared with
/// `decoder`.
///
/// All matrices come out packed, f16 and f32 ones as well, exactly as [`compress_model`](super::compress_model)
/// writes them and as they are loaded again.
///
/// # Errors
/// The policy misses a unit or names one that the model does not have, or the compressor refuses.
pub fn compress_decoder(decoder: &Decoder, policy: &CompressionPolicy, compressor: &dyn Compressor) -> Result<Decoder> {
    check_policy(policy, decoder.n_blocks())?;
    let pack = |weight: &Weight, format: LayerFormat| -> Result<Weight> {
        let host = HostWeight::new(weight)?;
        let [rows, cols] = host.shape();
        let packed = compressor.compress(&host.values()?, rows, cols, &format)?;
        Ok(Weight::Packed(packed.to_device(decoder.device())))
    };
    let mut blocks = Vec::with_capacity(decoder.n_blocks());
    for index in 0..decoder.n_blocks() {
        let mut block = decoder.store().block(index)?;
        for projection in Projection::ALL {
            let format = format_of(policy, Unit::Linear(index, projection), &projection.weight_name(index))?;
            let linear = block.linear_mut(projection);
            linear.weight = pack(&linear.weight, format)?;
        }
        blocks.push(block);
    }
    let embedding = pack(decoder.embedding(), format_of(policy, Unit::Embedding, super::EMBEDDING)?)?;
    let mut compressed = decoder.clone().with_store(Arc::new(ResidentStore::new(blocks))).with_embedding(embedding);
    if let Some(head) = decoder.untied_head() {
        let weight = pack(&head.weight, format_of(policy, Unit::Head, super::HEAD)?)?;
        compressed = compressed.with_head(Linear { weight, bias: head.bias.clone() });
    }
    Ok(compressed)
}
