//! One decoder block: attention and feed-forward part with pre-normalization and residual connections.
//!
//! `h = x + O(attention(rope(Q n1), rope(K n1), V n1))`, `y = h + Down(silu(Gate n2) * Up n2)`, where
//! `n1 = rms_norm(x)` and `n2 = rms_norm(h)` (Touvron et al., "LLaMA", 2023, section 2.2).

use burn::tensor::Tensor;
use edgellm_kernels::{
    AttentionParams, BlockLinear, BlockView, Lora, PackedLayout, PackedMatrix, attention, packed_linear, rms_norm,
    rope, swiglu,
};

use super::cache::LayerCache;
use super::rope::RopeSlice;
use crate::adapter::BlockLora;
use crate::config::ModelConfig;
use crate::values::Projection;

/// A weight matrix `[out, in]` as the decoder uses it.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a few hundred handles in all, nearly all of them packed")]
pub enum Weight {
    /// Packed codes, or float values as they are on disk, read by the packed kernels.
    Packed(PackedMatrix),
    /// f32 values: for devices without fast packed kernels, and for weights that are trained themselves.
    Dense(Tensor<2>),
}

impl Weight {
    /// Rows (output features) and columns (input features).
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Weight::Packed(matrix) => [matrix.layout().rows, matrix.layout().cols],
            Weight::Dense(tensor) => tensor.dims(),
        }
    }

    /// The layout of the packed bytes, or of f32 rows.
    pub fn layout(&self) -> PackedLayout {
        match self {
            Weight::Packed(matrix) => matrix.layout(),
            Weight::Dense(tensor) => {
                let [rows, cols] = tensor.dims();
                PackedLayout { rows, cols, format: edgellm_kernels::Format::F32, arrangement: Default::default() }
            }
        }
    }

    /// The f32 values.
    pub fn dequantize(&self) -> Tensor<2> {
        match self {
            Weight::Packed(matrix) => matrix.dequantize(),
            Weight::Dense(tensor) => tensor.clone(),
        }
    }
}

/// A linear layer `y = x W^T (+ b)`, with an optional low-rank update at the call.
#[derive(Clone, Debug)]
pub struct Linear {
    /// The weight, `[out, in]`.
    pub weight: Weight,
    /// The bias, `[out]`.
    pub bias: Option<Tensor<1>>,
}

impl Linear {
    /// A linear layer without bias.
    pub fn new(weight: Weight) -> Self {
        Self { weight, bias: None }
    }

    /// `x W^T + s (x A^T) B^T + b`.
    ///
    /// # Shapes
    /// `x`: `[tokens, in]`; result: `[tokens, out]`.
    pub fn forward(&self, x: Tensor<2>, lora: Option<&Lora>) -> Tensor<2> {
        let y = match &self.weight {
            Weight::Packed(matrix) => packed_linear(x, matrix, lora),
            Weight::Dense(weight) => {
                let update = lora.map(|lora| {
                    let low = x.clone().matmul(lora.a.clone().transpose());
                    low.matmul(lora.b.clone().transpose()).mul_scalar(lora.scaling)
                });
                let y = x.matmul(weight.clone().transpose());
                match update {
                    Some(update) => y.add(update),
                    None => y,
                }
            }
        };
        match &self.bias {
            Some(bias) => y.add(bias.clone().unsqueeze()),
            None => y,
        }
    }
}

/// The weights of one decoder block. Clones share the tensors.
#[derive(Clone, Debug)]
pub struct Block {
    /// Weight of the norm before the attention, `[d]`.
    pub attn_norm: Tensor<1>,
    /// Weight of the norm before the feed-forward part, `[d]`.
    pub mlp_norm: Tensor<1>,
    /// Norm of each query head, `[head_dim]` (Qwen 3).
    pub q_norm: Option<Tensor<1>>,
    /// Norm of each key head, `[head_dim]` (Qwen 3).
    pub k_norm: Option<Tensor<1>>,
    /// The seven projections, in the order of [`Projection::ALL`].
    pub linears: [Linear; 7],
}

/// What a block needs to know of its model and its place in it.
#[derive(Clone, Copy)]
pub(crate) struct BlockContext<'a> {
    pub(crate) config: &'a ModelConfig,
    /// Index of the block.
    pub(crate) index: usize,
    /// Rotation of this call's positions; `None` where the block uses no position embedding.
    pub(crate) rope: Option<&'a RopeSlice>,
    /// Sees the input of every projection.
    pub(crate) observer: Option<&'a LinearObserver<'a>>,
}

/// Called with the input of each projection, `[tokens, in]`, in the order in which a block runs them.
pub type LinearObserver<'a> = dyn Fn(Projection, &Tensor<2>) + 'a;

impl Block {
    /// One projection of the block.
    pub fn linear(&self, projection: Projection) -> &Linear {
        &self.linears[projection as usize]
    }

    /// Mutable access to one projection.
    pub fn linear_mut(&mut self, projection: Projection) -> &mut Linear {
        &mut self.linears[projection as usize]
    }

    /// The block as the CPU's inference path runs it, where it can.
    pub(crate) fn view<'a>(&'a self, ctx: BlockContext<'a>, lora: Option<&'a BlockLora>) -> Option<BlockView<'a>> {
        let mut linears = Vec::with_capacity(Projection::ALL.len());
        for projection in Projection::ALL {
            let linear = self.linear(projection);
            let Weight::Packed(weight) = &linear.weight else { return None };
            let lora = lora.and_then(|lora| lora.get(projection));
            linears.push(BlockLinear { weight, bias: linear.bias.as_ref(), lora });
        }
        let view = BlockView {
            attn_norm: &self.attn_norm,
            mlp_norm: &self.mlp_norm,
            q_norm: self.q_norm.as_ref(),
            k_norm: self.k_norm.as_ref(),
            linears: linears.try_into().ok()?,
            head_dim: ctx.config.head_dim,
            eps: ctx.config.rms_norm_eps,
            scale: ctx.config.attention_scale(),
            window: ctx.config.window_of(ctx.index),
            rope: ctx.rope.map(|slice| (&slice.cos, &slice.sin)),
            dropout: None,
        };
        (ctx.observer.is_none() && view.is_supported()).then_some(view)
    }

    /// Runs the block on `x`, `[batch, tokens, d]`, appending keys and values to `cache` if there is one.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        ctx: BlockContext<'_>,
        lora: Option<&BlockLora>,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<3> {
        let eps = ctx.config.rms_norm_eps;
        let [batch, tokens, d] = x.dims();
        let residual = x.reshape([batch * tokens, d]);
        let norm = |x: &Tensor<2>, weight: &Tensor<1>| {
            let _span = tracing::trace_span!("norm").entered();
            rms_norm(x.clone(), weight.clone(), eps)
        };
        let normed = norm(&residual, &self.attn_norm);
        let attended = self.attend(normed, [batch, tokens], ctx, lora, cache);
        let hidden = residual.add(attended);
        let normed = norm(&hidden, &self.mlp_norm);
        hidden.add(self.feed_forward(normed, ctx, lora)).reshape([batch, tokens, d])
    }

    fn project(
        &self,
        projection: Projection,
        x: Tensor<2>,
        ctx: BlockContext<'_>,
        lora: Option<&BlockLora>,
    ) -> Tensor<2> {
        if let Some(observe) = ctx.observer {
            observe(projection, &x);
        }
        self.linear(projection).forward(x, lora.and_then(|l| l.get(projection)))
    }

    fn attend(
        &self,
        x: Tensor<2>,
        [batch, tokens]: [usize; 2],
        ctx: BlockContext<'_>,
        lora: Option<&BlockLora>,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let config = ctx.config;
        let split = |y: Tensor<2>, heads: usize| y.reshape([batch, tokens, heads, config.head_dim]).swap_dims(1, 2);
        let span = tracing::trace_span!("qkv").entered();
        let mut q = split(self.project(Projection::Q, x.clone(), ctx, lora), config.n_heads);
        let mut k = split(self.project(Projection::K, x.clone(), ctx, lora), config.n_kv_heads);
        let v = split(self.project(Projection::V, x, ctx, lora), config.n_kv_heads);
        drop(span);
        let span = tracing::trace_span!("attention").entered();
        if let Some(norm) = &self.q_norm {
            q = rms_norm(q, norm.clone(), config.rms_norm_eps);
        }
        if let Some(norm) = &self.k_norm {
            k = rms_norm(k, norm.clone(), config.rms_norm_eps);
        }
        if let Some(slice) = ctx.rope {
            q = rope(q, slice.cos.clone(), slice.sin.clone());
            k = rope(k, slice.cos.clone(), slice.sin.clone());
        }
        let (k, v, offset) = match cache {
            Some(cache) => cache.tensors().append(k, v),
            None => (k, v, 0),
        };
        let params = AttentionParams { scale: config.attention_scale(), offset, window: config.window_of(ctx.index) };
        let out = attention(q, k, v, params);
        let merged = out.swap_dims(1, 2).reshape([batch * tokens, config.n_heads * config.head_dim]);
        drop(span);
        let _span = tracing::trace_span!("o").entered();
        self.project(Projection::O, merged, ctx, lora)
    }

    fn feed_forward(&self, x: Tensor<2>, ctx: BlockContext<'_>, lora: Option<&BlockLora>) -> Tensor<2> {
        let span = tracing::trace_span!("gate_up").entered();
        let gate = self.project(Projection::Gate, x.clone(), ctx, lora);
        let up = self.project(Projection::Up, x, ctx, lora);
        drop(span);
        let _span = tracing::trace_span!("down").entered();
        self.project(Projection::Down, swiglu(gate, up), ctx, lora)
    }
}
