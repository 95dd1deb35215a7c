//! Building a decoder from a model's files.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use edgellm_kernels::{Arrangement, PackedHost, PackedLayout};

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
    /// In which precision quantized weights meet activations.
    pub activations: Activations,
}

/// The precision of the activations in products with quantized weights on the CPU. Products with float weights, and
/// those on other devices, are in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Rounded to 8 bits per token and 32 columns, for integer dot products: fast. The weights are brought into the
    /// arrangement of these kernels when they are loaded, unless they are stored in it.
    #[default]
    Int8,
    /// f32: the reference.
    F32,
}

impl Activations {
    /// Both.
    pub const ALL: [Activations; 2] = [Activations::Int8, Activations::F32];

    /// `int8` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Activations::Int8 => "int8",
            Activations::F32 => "f32",
        }
    }
}

impl std::fmt::Display for Activations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Activations {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|a| a.name() == name);
        found.ok_or_else(|| format!("'{name}' is no precision of activations; expected int8 or f32"))
    }
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

/// What a block has beside its matrices: small, and always in memory.
#[derive(Clone, Debug)]
pub struct BlockVectors {
    attn_norm: Tensor<1>,
    mlp_norm: Tensor<1>,
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    biases: [Option<Tensor<1>>; 7],
}

impl BlockVectors {
    /// The block with these matrices, in the order of [`Projection::ALL`].
    pub fn with(&self, weights: [Weight; 7]) -> Block {
        let mut biases = self.biases.clone().into_iter();
        Block {
            attn_norm: self.attn_norm.clone(),
            mlp_norm: self.mlp_norm.clone(),
            q_norm: self.q_norm.clone(),
            k_norm: self.k_norm.clone(),
            linears: weights.map(|weight| Linear { weight, bias: biases.next().flatten() }),
        }
    }
}

/// Reads a model's tensors onto a device, one at a time.
pub struct Loader<'a> {
    files: &'a ModelFiles,
    options: &'a LoadOptions,
}

impl<'a> Loader<'a> {
    /// A loader of these files.
    pub fn new(files: &'a ModelFiles, options: &'a LoadOptions) -> Self {
        Self { files, options }
    }

    /// The layout that a stored matrix has once it is placed.
    pub fn placed(&self, layout: PackedLayout) -> PackedLayout {
        let rows = PackedLayout { arrangement: Arrangement::Rows, ..layout };
        match self.options.activations {
            Activations::Int8 if !self.options.expand => layout.prepared(),
            _ => rows,
        }
    }

    /// Places a matrix on the device, in the arrangement that the options ask for.
    ///
    /// # Errors
    /// Its buffers do not fit its layout.
    pub fn weight(&self, host: PackedHost) -> Result<Weight, ModelError> {
        let options = self.options;
        if options.expand {
            return Ok(Weight::Dense(host.unprepare()?.to_device(&options.device).dequantize()));
        }
        let host = match options.activations {
            Activations::Int8 => host.prepare()?,
            Activations::F32 => host.unprepare()?,
        };
        Ok(Weight::Packed(host.to_device(&options.device)))
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Weight, ModelError> {
        let host = self.files.matrix(name)?;
        let layout = host.layout;
        check_shape(name, layout, shape)?;
        let weight = self.weight(host)?;
        if matches!(&weight, Weight::Packed(matrix) if matrix.layout() != layout) {
            // The file's bytes were brought into another arrangement and are not needed any more.
            self.files.release(name);
        }
        Ok(weight)
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

    /// What block `index` has beside its matrices, whose shapes are checked.
    ///
    /// # Errors
    /// A tensor is missing, has not the shape that the configuration says, or cannot be read.
    pub fn vectors(&self, index: usize) -> Result<BlockVectors, ModelError> {
        let config = self.files.config();
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let mut biases: [Option<Tensor<1>>; 7] = Default::default();
        for (projection, bias) in Projection::ALL.into_iter().zip(&mut biases) {
            let (name, shape) = (projection.weight_name(index), config.projection_shape(projection));
            check_shape(&name, self.files.layout(&name)?, shape)?;
            *bias = self.optional_vector(&name.replace(".weight", ".bias"), shape[0])?;
        }
        Ok(BlockVectors {
            attn_norm: self.vector(&name("input_layernorm"), config.hidden_size)?,
            mlp_norm: self.vector(&name("post_attention_layernorm"), config.hidden_size)?,
            q_norm: self.optional_vector(&name("self_attn.q_norm"), config.head_dim)?,
            k_norm: self.optional_vector(&name("self_attn.k_norm"), config.head_dim)?,
            biases,
        })
    }

    /// The matrices of block `index`, in the order of [`Projection::ALL`].
    ///
    /// # Errors
    /// As [`Loader::vectors`].
    pub fn weights(&self, index: usize) -> Result<[Weight; 7], ModelError> {
        let mut weights = Vec::with_capacity(Projection::ALL.len());
        for projection in Projection::ALL {
            weights
                .push(self.matrix(&projection.weight_name(index), self.files.config().projection_shape(projection))?);
        }
        Ok(weights.try_into().expect("one matrix per projection"))
    }

    /// One matrix of block `index`.
    ///
    /// # Errors
    /// As [`Loader::vectors`].
    pub fn one(&self, index: usize, projection: Projection) -> Result<Weight, ModelError> {
        self.matrix(&projection.weight_name(index), self.files.config().projection_shape(projection))
    }

    fn block(&self, index: usize) -> Result<Block, ModelError> {
        Ok(self.vectors(index)?.with(self.weights(index)?))
    }
}

fn check_shape(name: &str, layout: PackedLayout, shape: [usize; 2]) -> Result<(), ModelError> {
    let found = [layout.rows, layout.cols];
    if found == shape {
        return Ok(());
    }
    Err(ModelError::Value {
        what: format!("shape of tensor {name}"),
        expected: format!("{shape:?}, from the configuration"),
        found: format!("{found:?}"),
    })
}

impl Decoder {
    /// Loads a model: weights in the packed layout they have on disk, zero-copy from the map where the device allows.
    ///
    /// # Errors
    /// A tensor is missing, has not the shape that the configuration says, or cannot be read.
    pub fn load(files: &ModelFiles, options: &LoadOptions) -> Result<Self, ModelError> {
        Self::load_around(files, options, || {
            let loader = Loader::new(files, options);
            let blocks =
                (0..files.config().n_layers).map(|index| loader.block(index)).collect::<Result<Vec<_>, _>>()?;
            Ok(Arc::new(ResidentStore::new(blocks)))
        })
    }

    /// Loads all but the blocks, which the store has that `store` gives: after embedding and head, which may have to be
    /// converted, and need twice their memory for a moment.
    ///
    /// # Errors
    /// As [`Decoder::load`], and those of `store`.
    pub fn load_around(
        files: &ModelFiles,
        options: &LoadOptions,
        store: impl FnOnce() -> Result<Arc<dyn WeightStore>, ModelError>,
    ) -> Result<Self, ModelError> {
        let loader = Loader::new(files, options);
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
        Decoder::from_parts(config, embedding, store()?, final_norm, head, options.device.clone())
    }
}
