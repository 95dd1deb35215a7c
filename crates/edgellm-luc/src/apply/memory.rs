//! Applying a policy to a model in memory.

use std::sync::Arc;

use edgellm_kernels::PackedHost;
use edgellm_model::decoder::{Decoder, Linear, ResidentStore, Weight};
use edgellm_model::traits::Compressor;
use edgellm_model::values::CompressionPolicy;

use super::check_policy;
use super::sequence::Sequence;
use crate::error::Result;

/// The model with every unit in the format that the policy gives it, on the same device; norms and biases are shared with
/// `decoder`.
///
/// All matrices come out packed, f16 and f32 ones as well, exactly as [`compress_model`](super::compress_model)
/// writes them and as they are loaded again. `calibration` are windows of token ids for compressors that look at inputs.
///
/// # Errors
/// The policy misses a unit or names one that the model does not have, or the compressor refuses.
pub fn compress_decoder(
    decoder: &Decoder,
    policy: &CompressionPolicy,
    compressor: &dyn Compressor,
    calibration: &[Vec<u32>],
) -> Result<Decoder> {
    check_policy(policy, decoder.n_blocks())?;
    let on_device = |packed: PackedHost| Weight::Packed(packed.to_device(decoder.device()));
    let (mut sequence, embedding) = Sequence::start(decoder, policy, compressor, calibration)?;
    let mut blocks = Vec::with_capacity(decoder.n_blocks());
    for index in 0..decoder.n_blocks() {
        let mut block = decoder.store().block(index)?;
        for (linear, packed) in block.linears.iter_mut().zip(sequence.block()?) {
            linear.weight = on_device(packed);
        }
        blocks.push(block);
    }
    let compressed = decoder.clone().with_store(Arc::new(ResidentStore::new(blocks)));
    let compressed = compressed.with_embedding(on_device(embedding));
    Ok(match decoder.untied_head() {
        Some(head) => {
            compressed.with_head(Linear { weight: on_device(sequence.head(&head.weight)?), bias: head.bias.clone() })
        }
        None => compressed,
    })
}
