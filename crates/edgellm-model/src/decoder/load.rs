//! Building a decoder from a model's files.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use edgellm_kernels::{PackedHost, PackedLayout};

use super::Decoder;
use super::block::{Block, Linear, Weight};
use crate::ModelError;
use crate::files::ModelFiles;
use crate::traits::WeightStore;
use crate::values::Projection;

/// Where and how weights are placed.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The device for weights and activations.
    pub device: Device,
    /// Expand packed weights to f32 once, for devices without fast packed kernels.
    pub expand: bool,
}

/// All blocks in memory.
#[derive(Clone, Debug)]
pub struct ResidentStore {
    blocks: Vec<Block>,
}

impl ResidentStore {
    /// A store of these blocks.
    pub fn new(blocks: Vec<Block>) -> Self {
        Self { blocks }
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn get(&self, index: usize) -> Result<&Block, ModelError> {
        self.blocks.get(index).ok_or_else(|| ModelError::Value {
            what: "block index".into(),
            expected: format!("below {}", self.blocks.len()),
            found: index.to_string(),
        })
    }
}

impl WeightStore for ResidentStore {
    fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self, index: usize) -> Result<Block, ModelError> {
        self.get(index).cloned()
    }

    fn layouts(&self, index: usize) -> Result<Vec<PackedLayout>, ModelError> {
        Ok(self.get(index)?.linears.iter().map(|linear| linear.weight.layout()).collect())
    }
}

/// Reads a model's tensors onto a device, one at a time.
struct Loader<'a> {
    files: &'a ModelFiles,
    options: &'a LoadOptions,
}

impl Loader<'_> {
    fn weight(&self, host: PackedHost) -> Weight {
        let matrix = host.to_device(&self.options.device);
        if self.options.expand { Weight::Dense(matrix.dequantize()) } else { Weight::Packed(matrix) }
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight, ModelError> {
        let host = self.files.matrix(name)?;
        let found = [host.layout.rows, host.layout.cols];
        if found != shape {
            return Err(ModelError::Value {
                what: format!("shape of tensor {name}"),
                expected: format!("{shape:?}, from the configuration"),
                found: format!("{found:?}"),
            });
        }
        Ok(self.weight(host))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor<1>, ModelError> {
        let values = self.files.vector(name)?;
        if values.len() != len {
            return Err(ModelError::Value {
                what: format!("length of tensor {name}"),
                expected: format!("{len}, from the configuration"),
                found: values.len().to_string(),
            });
        }
        Ok(Tensor::from_data(values.as_slice(), &self.options.device))
    }

    fn optional_vector(&self, name: &str, len: usize) -> Result<Option<Tensor<1>>, ModelError> {
        self.files.has(name).then(|| self.vector(name, len)).transpose()
    }

    fn linear(&self, block: usize, projection: Projection) -> Result<Linear, ModelError> {
        let shape = self.files.config().projection_shape(projection);
        let name = projection.weight_name(block);
        let bias = name.replace(".weight", ".bias");
        Ok(Linear { weight: self.matrix(&name, shape)?, bias: self.optional_vector(&bias, shape[0])? })
    }

    fn block(&self, index: usize) -> Result<Block, ModelError> {
        let config = self.files.config();
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let mut linears = Vec::with_capacity(Projection::ALL.len());
        for projection in Projection::ALL {
            linears.push(self.linear(index, projection)?);
        }
        let linears: [Linear; 7] = linears.try_into().expect("one linear per projection");
        Ok(Block {
            attn_norm: self.vector(&name("input_layernorm"), config.hidden_size)?,
            mlp_norm: self.vector(&name("post_attention_layernorm"), config.hidden_size)?,
            q_norm: self.optional_vector(&name("self_attn.q_norm"), config.head_dim)?,
            k_norm: self.optional_vector(&name("self_attn.k_norm"), config.head_dim)?,
            linears,
        })
    }
}

impl Decoder {
    /// Loads a model: weights in the packed layout they have on disk, zero-copy from the map where the device allows.
    ///
    /// # Errors
    /// A tensor is missing, has not the shape that the configuration says, or cannot be read.
    pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Self, ModelError> {
        let loader = Loader { files, options };
        let config = files.config().clone();
        let vocab = [config.vocab_size, config.hidden_size];
        let embedding = loader.matrix("model.embed_tokens.weight", vocab)?;
        let head = if files.has("lm_head.weight") && !config.tie_word_embeddings {
            Some(Linear {
                weight: loader.matrix("lm_head.weight", vocab)?,
                bias: loader.optional_vector("lm_head.bias", config.vocab_size)?,
            })
        } else if config.tie_word_embeddings {
            None
        } else {
            return Err(ModelError::Value {
                what: "tensor lm_head.weight".into(),
                expected: "present, since tie_word_embeddings is false".into(),
                found: "no such tensor".into(),
            });
        };
        let final_norm = loader.vector("model.norm.weight", config.hidden_size)?;
        let blocks = (0..config.n_layers).map(|index| loader.block(index)).collect::<Result<Vec<_>, _>>()?;
        let store = Arc::new(ResidentStore::new(blocks));
        Decoder::from_parts(config, embedding, store, final_norm, head, options.device.clone())
    }
}
