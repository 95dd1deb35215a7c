//! The key-value cache: keys and values of the tokens seen so far, per block.

use std::ops::Range;

use burn::tensor::Tensor;
use edgellm_kernels::{BlockCache, BlockScratch, CacheType};

/// Keys and values of one block: as tensors, or as the CPU's kernels want them.
#[derive(Clone, Debug)]
pub(crate) enum LayerCache {
    Tensors(Box<TensorCache>),
    Host(BlockCache),
}

impl Default for LayerCache {
    fn default() -> Self {
        LayerCache::Tensors(Box::default())
    }
}

impl LayerCache {
    fn len(&self) -> usize {
        match self {
            LayerCache::Tensors(cache) => cache.len,
            LayerCache::Host(cache) => cache.len(),
        }
    }

    fn truncate(&mut self, len: usize) {
        match self {
            LayerCache::Tensors(cache) => cache.len = cache.len.min(len),
            LayerCache::Host(cache) => cache.truncate(len),
        }
    }

    /// The cache for the tensor path.
    ///
    /// # Panics
    /// If it was filled by the CPU's path.
    pub(crate) fn tensors(&mut self) -> &mut TensorCache {
        if let LayerCache::Host(cache) = self {
            assert!(
                cache.is_empty(),
                "a cache that inference filled cannot be used on another device or with gradients"
            );
            *self = LayerCache::default();
        }
        match self {
            LayerCache::Tensors(cache) => cache,
            LayerCache::Host(_) => unreachable!("replaced above"),
        }
    }

    /// The cache for the CPU's path; `None` if the tensor path filled it.
    pub(crate) fn host(&mut self, new: impl FnOnce() -> BlockCache) -> Option<&mut BlockCache> {
        if matches!(self, LayerCache::Tensors(cache) if cache.len == 0) {
            *self = LayerCache::Host(new());
        }
        match self {
            LayerCache::Host(cache) => Some(cache),
            LayerCache::Tensors(_) => None,
        }
    }
}

/// Keys and values of one block, `[batch, kv_heads, capacity, head_dim]`, of which `len` positions are in use.
#[derive(Clone, Debug, Default)]
pub(crate) struct TensorCache {
    /// Taken out while it is being written, so that the write is in place.
    store: Option<(Tensor<4>, Tensor<4>)>,
    len: usize,
    capacity: usize,
}

impl TensorCache {
    /// Appends `k` and `v`, `[batch, kv_heads, tokens, head_dim]`; returns all of them so far and how many came before.
    pub(crate) fn append(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>, usize) {
        let [batch, heads, tokens, dim] = k.dims();
        let offset = self.len;
        let needed = offset + tokens;
        if needed > self.capacity || self.store.is_none() {
            self.grow(needed, &k);
        }
        if let Some((keys, values)) = self.store.take() {
            let place: [Range<usize>; 4] = [0..batch, 0..heads, offset..needed, 0..dim];
            self.store = Some((keys.slice_assign(place.clone(), k), values.slice_assign(place, v)));
        }
        self.len = needed;
        let (keys, values) = self.view();
        (keys, values, offset)
    }

    fn grow(&mut self, needed: usize, like: &Tensor<4>) {
        let [batch, heads, _, dim] = like.dims();
        let capacity = needed.next_power_of_two().max(64);
        let fresh = || Tensor::<4>::zeros([batch, heads, capacity, dim], &like.device());
        let (mut keys, mut values) = (fresh(), fresh());
        if self.len > 0 {
            let (old_keys, old_values) = self.view();
            let place: [Range<usize>; 4] = [0..batch, 0..heads, 0..self.len, 0..dim];
            keys = keys.slice_assign(place.clone(), old_keys);
            values = values.slice_assign(place, old_values);
        }
        self.store = Some((keys, values));
        self.capacity = capacity;
    }

    fn view(&self) -> (Tensor<4>, Tensor<4>) {
        let (keys, values) = self.store.as_ref().expect("a cache that holds positions has a store");
        (keys.clone().narrow(2, 0, self.len), values.clone().narrow(2, 0, self.len))
    }
}

/// The keys and values of every block for one sequence (or a batch of sequences of equal length).
///
/// A cache may serve a prefix of the blocks only; each block keeps its own length, so that exits can be run on.
#[derive(Debug, Default)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    kind: CacheType,
    scratch: BlockScratch,
}

impl Clone for KvCache {
    fn clone(&self) -> Self {
        Self { layers: self.layers.clone(), kind: self.kind, scratch: BlockScratch::default() }
    }
}

impl KvCache {
    /// An empty cache for `n_blocks` blocks.
    pub fn new(n_blocks: usize) -> Self {
        Self::with_type(n_blocks, CacheType::default())
    }

    /// An empty cache whose keys and values are stored as `kind` on the CPU; other devices store `f32`.
    pub fn with_type(n_blocks: usize, kind: CacheType) -> Self {
        Self { layers: vec![LayerCache::default(); n_blocks], kind, scratch: BlockScratch::default() }
    }

    /// Positions that block `index` has seen.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn len(&self, index: usize) -> usize {
        self.layers[index].len()
    }

    /// Whether no block has seen a token.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|layer| layer.len() == 0)
    }

    /// Forgets every position from `len` on, in every block.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.truncate(len);
        }
    }

    /// Bytes of keys and values on the CPU's path.
    pub fn bytes(&self) -> usize {
        let bytes = |layer: &LayerCache| if let LayerCache::Host(cache) = layer { cache.bytes() } else { 0 };
        self.layers.iter().map(bytes).sum()
    }

    /// What the CPU's path needs for block `index`; `None` if the tensor path filled the cache.
    pub(crate) fn host_layer(
        &mut self,
        index: usize,
        heads: usize,
        dim: usize,
    ) -> Option<(&mut BlockCache, &mut BlockScratch)> {
        let kind = self.kind;
        let cache = self.layers[index].host(|| BlockCache::new(kind, heads, dim))?;
        Some((cache, &mut self.scratch))
    }

    pub(crate) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }
}
