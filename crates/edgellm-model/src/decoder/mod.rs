//! The decoder: one implementation, driven by its configuration, for every Llama-like architecture.
//!
//! It runs any range of blocks on a hidden state, so that the trainer can stop at an exit and the voter can look at all
//! of them; every exit shares the language-model head behind its own norm. Low-rank adapters lie beside the base and
//! are handed in with each call, so that one base serves several adapters.

mod activations;
mod block;
mod cache;
mod load;
mod pool;
mod rope;
mod slices;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Int, Tensor, TensorData};
use edgellm_kernels::{
    BlockView, PackedLayout, cross_entropy_head, decoder_block, decoder_block_uncached, packed_embedding, rms_norm,
};

pub use edgellm_kernels::{
    BlockGradients, BlockScratch, BlockTape, CacheType, Dropout, HEAD_CHUNK, HeadLoss, LoraGradient,
};

pub use self::block::{Block, Linear, LinearObserver, Weight};
pub use self::cache::KvCache;
pub use self::load::{Activations, BlockVectors, LoadOptions, Loader, ResidentStore};
pub use self::slices::SlicePass;

use self::activations::activation_range;
use self::block::BlockContext;
use self::rope::RopeTable;
use crate::ModelError;
use crate::adapter::Adapter;
use crate::config::ModelConfig;
use crate::generate::to_vec;
use crate::traits::WeightStore;

/// A decoder-only language model on a device.
#[derive(Clone)]
pub struct Decoder {
    config: ModelConfig,
    embedding: Weight,
    store: Arc<dyn WeightStore>,
    final_norm: Tensor<1>,
    /// `None` where the head is tied to the embedding.
    head: Option<Linear>,
    rope: RopeTable,
    device: Device,
    /// Bytes of the blocks' packed matrices, once somebody asked.
    block_bytes: Arc<OnceLock<Vec<u64>>>,
}

/// A hidden state, where the last block left it.
#[expect(clippy::large_enum_variant, reason = "one value, on the stack")]
enum Hidden {
    Tensor(Tensor<3>),
    Host(Vec<f32>, [usize; 3]),
}

impl Hidden {
    fn host(&mut self) -> Result<&mut Vec<f32>, ModelError> {
        if let Hidden::Tensor(tensor) = self {
            *self = Hidden::Host(to_vec(tensor.clone())?, tensor.dims());
        }
        match self {
            Hidden::Host(values, _) => Ok(values),
            Hidden::Tensor(_) => unreachable!("replaced above"),
        }
    }

    /// The values, unless they are tracked by autodiff or the device does not hand them over.
    fn values(&self) -> Option<Cow<'_, [f32]>> {
        match self {
            Hidden::Host(values, _) => Some(Cow::Borrowed(values)),
            Hidden::Tensor(tensor) if tensor.device().is_autodiff() => None,
            Hidden::Tensor(tensor) => to_vec(tensor.clone()).ok().map(Cow::Owned),
        }
    }

    fn into_tensor(self, device: &Device) -> Tensor<3> {
        match self {
            Hidden::Tensor(tensor) => tensor,
            Hidden::Host(values, dims) => Tensor::from_data(TensorData::new(values, dims), device),
        }
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder from its parts.
    ///
    /// # Errors
    /// A part has not the shape that the configuration says.
    pub fn from_parts(
        config: ModelConfig,
        embedding: Weight,
        store: Arc<dyn WeightStore>,
        final_norm: Tensor<1>,
        head: Option<Linear>,
        device: Device,
    ) -> Result<Self, ModelError> {
        let expected = [config.vocab_size, config.hidden_size];
        for (name, shape) in [("embedding", Some(embedding.shape())), ("head", head.as_ref().map(|h| h.weight.shape()))]
        {
            if let Some(shape) = shape.filter(|s| *s != expected) {
                return Err(ModelError::Value {
                    what: format!("shape of the {name}"),
                    expected: format!("{expected:?} (vocab_size, hidden_size)"),
                    found: format!("{shape:?}"),
                });
            }
        }
        if store.n_blocks() != config.n_layers {
            return Err(ModelError::Value {
                what: "number of blocks".into(),
                expected: config.n_layers.to_string(),
                found: store.n_blocks().to_string(),
            });
        }
        let (inv_freq, magnitude) = config.inv_freq();
        let rope = RopeTable::new(inv_freq, magnitude, device.clone());
        Ok(Self { config, embedding, store, final_norm, head, rope, device, block_bytes: Arc::default() })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Number of blocks.
    pub fn n_blocks(&self) -> usize {
        self.config.n_layers
    }

    /// Where the blocks' weights come from.
    pub fn store(&self) -> &Arc<dyn WeightStore> {
        &self.store
    }

    /// The same decoder with its blocks' weights from elsewhere.
    #[must_use]
    pub fn with_store(mut self, store: Arc<dyn WeightStore>) -> Self {
        self.store = store;
        self.block_bytes = Arc::default();
        self
    }

    /// The token embedding, `[vocab, d]`.
    pub fn embedding(&self) -> &Weight {
        &self.embedding
    }

    /// The head with its bias; `None` where it is tied to the embedding.
    pub fn untied_head(&self) -> Option<&Linear> {
        self.head.as_ref()
    }

    /// The same decoder with another token embedding (and head, where they are tied).
    #[must_use]
    pub fn with_embedding(mut self, embedding: Weight) -> Self {
        self.embedding = embedding;
        self
    }

    /// The same decoder with another head.
    #[must_use]
    pub fn with_head(mut self, head: Linear) -> Self {
        self.head = Some(head);
        self
    }

    /// The weight of the final norm, `[d]`.
    pub fn final_norm(&self) -> &Tensor<1> {
        &self.final_norm
    }

    /// The same decoder with another final norm.
    #[must_use]
    pub fn with_final_norm(mut self, weight: Tensor<1>) -> Self {
        self.final_norm = weight;
        self
    }

    /// The language-model head, `[vocab, d]`; the embedding where they are tied.
    pub fn head(&self) -> &Weight {
        self.head.as_ref().map_or(&self.embedding, |head| &head.weight)
    }

    /// Whether the head is the embedding.
    pub fn is_head_tied(&self) -> bool {
        self.head.is_none()
    }

    /// An empty key-value cache for this model.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.n_blocks())
    }

    /// An empty key-value cache that stores keys and values as `kind` on the CPU.
    pub fn new_cache_of(&self, kind: CacheType) -> KvCache {
        KvCache::with_type(self.n_blocks(), kind)
    }

    /// Embeds token ids.
    ///
    /// # Shapes
    /// `ids`: one row of equal length per sequence; result: `[batch, tokens, d]`.
    ///
    /// # Errors
    /// No tokens, rows of different lengths, or an id outside the vocabulary.
    pub fn embed(&self, ids: &[&[u32]]) -> Result<Tensor<3>, ModelError> {
        let _span = tracing::trace_span!("embed").entered();
        let tokens = ids.first().map_or(0, |row| row.len());
        if tokens == 0 || ids.iter().any(|row| row.len() != tokens) {
            return Err(ModelError::Value {
                what: "token ids".into(),
                expected: "at least one token, and rows of equal length".into(),
                found: format!("rows of {:?} tokens", ids.iter().map(|r| r.len()).collect::<Vec<_>>()),
            });
        }
        let flat: Vec<i32> = ids
            .iter()
            .flat_map(|row| row.iter())
            .map(|&id| match i32::try_from(id) {
                Ok(small) if (id as usize) < self.config.vocab_size => Ok(small),
                _ => Err(ModelError::Value {
                    what: "token id".into(),
                    expected: format!("below the vocabulary size {}", self.config.vocab_size),
                    found: id.to_string(),
                }),
            })
            .collect::<Result<_, _>>()?;
        let ids_tensor = Tensor::<1, Int>::from_data(flat.as_slice(), &self.device);
        let rows = match &self.embedding {
            Weight::Packed(matrix) => packed_embedding(matrix, ids_tensor),
            Weight::Dense(tensor) => tensor.clone().select(0, ids_tensor),
        };
        Ok(rows.reshape([ids.len(), tokens, self.config.hidden_size]))
    }

    /// Runs blocks `range` on the hidden state `x`, `[batch, tokens, d]`.
    ///
    /// Positions start where the cache of the first block of the range ends, or at 0 without one.
    ///
    /// # Errors
    /// The weights of a block cannot be read.
    ///
    /// # Panics
    /// If the range leaves the model.
    pub fn run_blocks(
        &self,
        x: Tensor<3>,
        range: Range<usize>,
        adapter: Option<&Adapter>,
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor<3>, ModelError> {
        assert!(range.end <= self.n_blocks(), "blocks {range:?} of a model with {} blocks", self.n_blocks());
        let start = cache.as_ref().filter(|_| !range.is_empty()).map_or(0, |c| c.len(range.start));
        let slice = self.rope.slice(start, x.dims()[1]);
        let plain = self.device == Device::flex() && !x.device().is_autodiff();
        let [batch, tokens, _] = x.dims();
        let lengths = vec![tokens; batch];
        let mut scratch = BlockScratch::default();
        let mut hidden = Hidden::Tensor(x);
        for index in range {
            let span = tracing::debug_span!("block", index, bytes = self.block_bytes(index)).entered();
            let block = self.store.block(index)?;
            let ctx = self.context(index, &slice);
            let lora = adapter.and_then(|a| a.block(index));
            let on_slices = match block.view(ctx, lora).filter(|_| plain) {
                Some(view) => {
                    self.on_slices(&view, index, &mut hidden, &lengths, cache.as_deref_mut(), &mut scratch)?
                }
                None => false,
            };
            if !on_slices {
                let layer_cache = cache.as_mut().map(|c| c.layer_mut(index));
                hidden = Hidden::Tensor(block.forward(hidden.into_tensor(&self.device), ctx, lora, layer_cache));
            }
            drop(span);
            activation_range(index, || hidden.values());
        }
        Ok(hidden.into_tensor(&self.device))
    }

    /// Runs a block on slices, in place, if its cache is there or none is needed; returns whether it did.
    fn on_slices(
        &self,
        view: &BlockView<'_>,
        index: usize,
        hidden: &mut Hidden,
        lengths: &[usize],
        cache: Option<&mut KvCache>,
        scratch: &mut BlockScratch,
    ) -> Result<bool, ModelError> {
        let Some(cache) = cache else {
            decoder_block_uncached(hidden.host()?, lengths, view, scratch);
            return Ok(true);
        };
        if lengths.len() != 1 {
            return Ok(false);
        }
        let Some((cache, scratch)) = cache.host_layer(index, self.config.n_kv_heads, self.config.head_dim) else {
            return Ok(false);
        };
        decoder_block(hidden.host()?, lengths, view, std::slice::from_mut(cache), scratch);
        Ok(true)
    }

    /// Bytes of a block's packed matrices: what running it reads.
    fn block_bytes(&self, index: usize) -> u64 {
        let of = |index| self.store.layouts(index).map_or(0, |layouts| layouts.iter().map(PackedLayout::bytes).sum());
        self.block_bytes.get_or_init(|| (0..self.n_blocks()).map(of).collect())[index]
    }

    /// Runs `block` in the place of block `index` on the hidden state `x`, `[batch, tokens, d]`, from position 0.
    ///
    /// `observer` sees the input of every projection: what calibration needs.
    ///
    /// # Panics
    /// If the model has no block `index`.
    pub fn run_block(
        &self,
        block: &Block,
        index: usize,
        x: Tensor<3>,
        observer: Option<&LinearObserver<'_>>,
    ) -> Tensor<3> {
        assert!(index < self.n_blocks(), "block {index} of a model with {} blocks", self.n_blocks());
        let slice = self.rope.slice(0, x.dims()[1]);
        block.forward(x, BlockContext { observer, ..self.context(index, &slice) }, None, None)
    }

    /// Normalizes a hidden state for the head, at the exit after `exit` blocks.
    ///
    /// An adapter may bring a norm of its own for that exit; otherwise it is the final norm.
    pub fn exit_norm(&self, x: Tensor<2>, exit: usize, adapter: Option<&Adapter>) -> Tensor<2> {
        let _span = tracing::trace_span!("norm").entered();
        let weight = adapter.and_then(|a| a.exit_norm(exit)).unwrap_or(&self.final_norm);
        rms_norm(x, weight.clone(), self.config.rms_norm_eps)
    }

    /// Scores the vocabulary.
    ///
    /// # Shapes
    /// `normed`: `[tokens, d]`, the result of [`Decoder::exit_norm`]; result: `[tokens, vocab]`.
    pub fn logits(&self, normed: Tensor<2>) -> Tensor<2> {
        let _span = tracing::trace_span!("head").entered();
        match &self.head {
            Some(head) => head.forward(normed, None),
            None => Linear::new(self.embedding.clone()).forward(normed, None),
        }
    }

    /// `sum_t weights[t] * (-log p(targets[t]))`, of shape `[1]`, without the `[tokens, vocab]` logits where the head is packed.
    ///
    /// # Shapes
    /// `normed`: `[tokens, d]`; `targets`, `weights`: `[tokens]`.
    pub fn loss(&self, normed: Tensor<2>, targets: Tensor<1, Int>, weights: Tensor<1>) -> Tensor<1> {
        let _span = tracing::trace_span!("head").entered();
        let bias = self.head.as_ref().and_then(|head| head.bias.as_ref());
        match (self.head(), bias) {
            (Weight::Packed(matrix), None) => cross_entropy_head(normed, matrix, targets, weights),
            _ => {
                let log_p = burn::tensor::activation::log_softmax(self.logits(normed), 1);
                let picked: Tensor<1> = log_p.gather(1, targets.unsqueeze_dim(1)).squeeze_dim(1);
                picked.mul(weights).sum().neg()
            }
        }
    }

    /// Logits at every position of one sequence through all blocks.
    ///
    /// # Shapes
    /// Result: `[tokens, vocab]`.
    ///
    /// # Errors
    /// See [`Decoder::embed`] and [`Decoder::run_blocks`].
    pub fn forward(
        &self,
        ids: &[u32],
        adapter: Option<&Adapter>,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor<2>, ModelError> {
        let x = self.embed(&[ids])?;
        let x = self.run_blocks(x, 0..self.n_blocks(), adapter, cache)?;
        let flat = x.reshape([ids.len(), self.config.hidden_size]);
        Ok(self.logits(self.exit_norm(flat, self.n_blocks(), adapter)))
    }
}
