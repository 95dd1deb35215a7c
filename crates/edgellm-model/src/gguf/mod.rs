//! GGUF files, versions 2 and 3: metadata, tensor table, and the block formats of their weights.
//!
//! Everything is little-endian. A file is: magic, version, number of tensors, number of metadata entries; the
//! entries (key, type, value); the tensor table (name, dimensions innermost first, type, offset); and, from the next
//! multiple of `general.alignment`, the tensors. Source: the GGUF specification,
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! Nothing of the file is copied when it is opened but names: arrays (the vocabulary) stay in the map until they are
//! asked for, and a tensor is decoded or repacked when it is asked for.

mod blocks;
mod config;
mod cursor;
mod file;
mod ggml_type;
mod value;

pub use blocks::{dequantize, packed_format, repack};
pub use config::{architecture, config_json};
pub use file::{Gguf, GgufTensor};
pub use ggml_type::GgmlType;
pub use value::{GgufArray, GgufValue, ValueType};

#[cfg(test)]
mod tests;
