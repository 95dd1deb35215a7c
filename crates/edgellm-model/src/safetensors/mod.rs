//! Safetensors files: a lazily mapped reader for single files and sharded models, and a streaming writer.
//!
//! A file is an 8-byte little-endian header length, a JSON header (name to type, shape and byte range), and the
//! tensors without gaps. A sharded model has a `model.safetensors.index.json` whose `weight_map` says which file
//! holds which tensor. Source: <https://github.com/huggingface/safetensors>, section "Format".

mod reader;
mod writer;

pub use reader::{Safetensors, TensorEntry, TensorPlace};
pub use safetensors::Dtype;
pub use writer::{SafetensorsWriter, TensorSpec};

/// Bytes of a tensor, if its shape and type give whole bytes that can be counted.
pub(crate) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

#[cfg(test)]
mod tests;
