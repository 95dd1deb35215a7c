//! Handwritten backward passes.
//!
//! Each operator saves the least that its gradient needs, and recomputes the rest: packed weights are read again,
//! attention probabilities and logits are computed again. The gradients themselves are the inner backend's
//! `_backward` methods.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};
use burn::tensor::Shape;

use super::{AttentionParams, EdgeOps, defaults};
use crate::format::PackedLayout;

/// A packed matrix as a backward pass keeps it: handles only.
type Packed<B> = (IntTensor<B>, IntTensor<B>, PackedLayout);

impl<B: EdgeOps, C: CheckpointStrategy> EdgeOps for Autodiff<B, C> {
    fn edge_dequantize(words: IntTensor<B>, scales: IntTensor<B>, layout: PackedLayout) -> FloatTensor<Self> {
        Self::from_inner(B::edge_dequantize(words, scales, layout))
    }

    fn edge_packed_embedding(
        words: IntTensor<B>,
        scales: IntTensor<B>,
        ids: IntTensor<B>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::edge_packed_embedding(words, scales, ids, layout))
    }

    fn edge_packed_linear(
        x: FloatTensor<Self>,
        words: IntTensor<B>,
        scales: IntTensor<B>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let out = B::edge_packed_linear(x, words.clone(), scales.clone(), layout);
        match PackedLinear.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((words, scales, layout), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn edge_packed_linear_lora(
        x: FloatTensor<Self>,
        words: IntTensor<B>,
        scales: IntTensor<B>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        layout: PackedLayout,
        scaling: f32,
    ) -> FloatTensor<Self> {
        let (train_a, train_b) = (is_tracked::<B, C>(&a), is_tracked::<B, C>(&b));
        let ((x, x_node), (a, a_node), (b, b_node)) = (x.into_parts(), a.into_parts(), b.into_parts());
        let (out, down) = defaults::packed_linear_lora::<B>(
            x.clone(),
            words.clone(),
            scales.clone(),
            a.clone(),
            b.clone(),
            layout,
            scaling,
        );
        match PackedLinearLora.prepare::<C>([x_node, a_node, b_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let state = LoraState {
                    x: train_a.then_some(x),
                    down: train_b.then_some(down),
                    a,
                    b,
                    packed: (words, scales, layout),
                    scaling,
                };
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn edge_rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let out = B::edge_rms_norm(x.clone(), weight.clone(), eps);
        match RmsNorm.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, weight, eps), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn edge_rope(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let out = B::edge_rope(x, cos.clone(), sin.clone());
        match Rope.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((cos, sin), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn edge_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        params: AttentionParams,
    ) -> FloatTensor<Self> {
        let ((q, q_node), (k, k_node), (v, v_node)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let out = B::edge_attention(q.clone(), k.clone(), v.clone(), params);
        match Attention.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((q, k, v, params), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn edge_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        let out = B::edge_swiglu(gate.clone(), up.clone());
        match Swiglu.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate, up), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn edge_cross_entropy_head(
        hidden: FloatTensor<Self>,
        words: IntTensor<B>,
        scales: IntTensor<B>,
        targets: IntTensor<B>,
        weights: FloatTensor<Self>,
        layout: PackedLayout,
    ) -> FloatTensor<Self> {
        let ((hidden, hidden_node), (weights, weights_node)) = (hidden.into_parts(), weights.into_parts());
        let (losses, log_normalizer) =
            defaults::token_losses::<B>(hidden.clone(), words.clone(), scales.clone(), targets.clone(), layout);
        let out = defaults::weighted_sum::<B>(losses.clone(), weights.clone());
        match CrossEntropy.prepare::<C>([hidden_node, weights_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let packed = (words, scales, layout);
                prep.finish(CrossEntropyState { hidden, packed, targets, weights, losses, log_normalizer }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

/// Whether a gradient will be asked for: the only public way to see it is to prepare an operation, which records
/// nothing until it is finished.
fn is_tracked<B: EdgeOps, C: CheckpointStrategy>(tensor: &FloatTensor<Autodiff<B, C>>) -> bool {
    matches!(Backward::<B, 1>::prepare::<C>(Probe, [tensor.node()]).compute_bound().stateful(), OpsKind::Tracked(_))
}

#[derive(Debug)]
struct Probe;

impl<B: EdgeOps> Backward<B, 1> for Probe {
    type State = ();

    fn backward(self, _: Ops<(), 1>, _: &mut Gradients, _: &mut Checkpointer) {}
}

#[derive(Debug)]
struct PackedLinear;

impl<B: EdgeOps> Backward<B, 1> for PackedLinear {
    type State = Packed<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([x], (words, scales, layout)) = (ops.parents, ops.state);
        if let Some(x) = x {
            grads.register::<B>(x.id, B::edge_packed_linear_backward(dy, words, scales, layout));
        }
    }
}

#[derive(Debug)]
struct PackedLinearLora;

#[derive(Debug, Clone)]
struct LoraState<B: EdgeOps> {
    /// Saved only if `A` is trained.
    x: Option<FloatTensor<B>>,
    /// `x A^T`; saved only if `B` is trained.
    down: Option<FloatTensor<B>>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    packed: Packed<B>,
    scaling: f32,
}

/// With `G = scaling dY B`: `dX = dY W + G A`, `dA = G^T x`, `dB = scaling dY^T (x A^T)`.
impl<B: EdgeOps> Backward<B, 3> for PackedLinearLora {
    type State = LoraState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([x_node, a_node, b_node], state) = (ops.parents, ops.state);
        let scaled = B::float_mul_scalar(dy.clone(), state.scaling.into());
        if let (Some(node), Some(down)) = (b_node, state.down) {
            grads.register::<B>(node.id, B::float_matmul(B::float_transpose(scaled.clone()), down));
        }
        if x_node.is_none() && a_node.is_none() {
            return;
        }
        let through_b = B::float_matmul(scaled, state.b);
        if let (Some(node), Some(x)) = (a_node, state.x) {
            grads.register::<B>(node.id, B::float_matmul(B::float_transpose(through_b.clone()), x));
        }
        if let Some(node) = x_node {
            let (words, scales, layout) = state.packed;
            let dx = B::edge_packed_linear_backward(dy, words, scales, layout);
            grads.register::<B>(node.id, B::float_add(dx, B::float_matmul(through_b, state.a)));
        }
    }
}

#[derive(Debug)]
struct RmsNorm;

impl<B: EdgeOps> Backward<B, 2> for RmsNorm {
    type State = (FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (x, weight, eps) = ops.state;
        let (dx, dw) = B::edge_rms_norm_backward(x, weight, dy, eps);
        for (node, grad) in ops.parents.into_iter().zip([dx, dw]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct Rope;

/// A rotation's transpose is the rotation by the negative angle.
impl<B: EdgeOps> Backward<B, 1> for Rope {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([x], (cos, sin)) = (ops.parents, ops.state);
        if let Some(x) = x {
            grads.register::<B>(x.id, B::edge_rope(dy, cos, B::float_neg(sin)));
        }
    }
}

#[derive(Debug)]
struct Attention;

impl<B: EdgeOps> Backward<B, 3> for Attention {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, AttentionParams);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<B>(&ops.node);
        let (q, k, v, params) = ops.state;
        let (dq, dk, dv) = B::edge_attention_backward(q, k, v, d_out, params);
        for (node, grad) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct Swiglu;

impl<B: EdgeOps> Backward<B, 2> for Swiglu {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (gate, up) = ops.state;
        let (d_gate, d_up) = B::edge_swiglu_backward(gate, up, dy);
        for (node, grad) in ops.parents.into_iter().zip([d_gate, d_up]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct CrossEntropy;

#[derive(Debug, Clone)]
struct CrossEntropyState<B: EdgeOps> {
    hidden: FloatTensor<B>,
    packed: Packed<B>,
    targets: IntTensor<B>,
    weights: FloatTensor<B>,
    losses: FloatTensor<B>,
    log_normalizer: FloatTensor<B>,
}

impl<B: EdgeOps> Backward<B, 2> for CrossEntropy {
    type State = CrossEntropyState<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let ([hidden_node, weights_node], state) = (ops.parents, ops.state);
        if let Some(node) = weights_node {
            grads.register::<B>(node.id, B::float_mul(state.losses, dy.clone()));
        }
        if let Some(node) = hidden_node {
            let (words, scales, layout) = state.packed;
            let tokens = state.weights.shape()[0];
            let factor = B::float_mul(state.weights, dy);
            let factor = B::float_reshape(factor, Shape::new([tokens]));
            let grad = B::edge_cross_entropy_backward(
                state.hidden,
                words,
                scales,
                state.targets,
                factor,
                state.log_normalizer,
                layout,
            );
            grads.register::<B>(node.id, grad);
        }
    }
}
