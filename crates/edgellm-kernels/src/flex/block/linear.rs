//! A block's linear layers on slices: packed weight, bias, low-rank update; forward, and backward to the input and to
//! the update.

use super::dropout::Dropout;
use super::low_rank::{down, outer, transposed, up, up_few};
use super::{BlockLinear, BlockView, host};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, Part, Tokens8};
use crate::flex::integer::{Product, multiply};
use crate::flex::{Float, Packed, linear, slice};

/// Tokens from which the transposed `B` is worth making.
const FEW: usize = 4;
/// Rows of a weight's gradient that a thread computes at a time.
const GRADIENT_ROWS: usize = 96;

/// A linear layer with its buffers at hand.
pub(super) struct Linear<'a> {
    packed: &'a Packed,
    bias: Option<Float>,
    lora: Option<Update>,
}

/// `scaling * B A`.
struct Update {
    /// `[rank, cols]`.
    a: Float,
    /// `[rows, rank]`.
    b: Float,
    scaling: f32,
    rank: usize,
    dropout: Option<Dropout>,
}

/// The gradients of a low-rank update.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoraGradient {
    /// Of `A`, `[rank, cols]`.
    pub a: Vec<f32>,
    /// Of `B`, `[rows, rank]`.
    pub b: Vec<f32>,
}

/// Where the gradients of a layer's parameters are added, of those that are wanted.
pub(super) struct LayerGradients<'a> {
    pub(super) lora: Option<&'a mut LoraGradient>,
    /// Of the weight, `[rows, cols]`.
    pub(super) weight: Option<&'a mut [f32]>,
}

impl<'a> Linear<'a> {
    pub(super) fn new(linear: BlockLinear<'a>) -> Self {
        Linear {
            packed: linear.weight.host().expect("a weight on the CPU device"),
            bias: linear.bias.map(host),
            lora: linear.lora.map(|lora| Update {
                a: host(&lora.a),
                b: host(&lora.b),
                scaling: lora.scaling,
                rank: lora.a.dims()[0],
                dropout: None,
            }),
        }
    }

    /// The layers of a block, with its dropout.
    pub(super) fn all(block: &BlockView<'a>) -> [Self; 7] {
        let mut layers = block.linears.map(Linear::new);
        for (i, layer) in layers.iter_mut().enumerate() {
            if let (Some(update), Some(dropout)) = (&mut layer.lora, block.dropout) {
                update.dropout = Some(dropout.of_layer(i as u64));
            }
        }
        layers
    }

    pub(super) fn rows(&self) -> usize {
        self.packed.layout.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.packed.layout.cols
    }

    /// Adds bias and low-rank update.
    fn add_rest(&self, kernel: Kernel, x: &[f32], out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            let bias = slice::<f32>(bias);
            out.chunks_mut(bias.len()).for_each(|out| out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias));
        }
        if let Some(Update { a, b, scaling, rank, dropout }) = &self.lora {
            let (mut low, b) = (Vec::new(), slice::<f32>(b));
            let dropped = dropout.map(|dropout| dropout.apply(kernel, x));
            let x = dropped.as_deref().unwrap_or(x);
            down(kernel, x, slice::<f32>(a), *rank, *scaling, &mut low);
            if low.len() < FEW * rank {
                up_few(kernel, &low, b, *rank, out);
            } else {
                up(kernel, &low, &transposed(b, self.rows(), *rank), *rank, out);
            }
        }
    }

    /// The gradient of the input, written or added to `dx` if there is one, and those of the parameters, added to
    /// `gradients`.
    ///
    /// `x` is the layer's input, `[tokens, cols]`; `dy` the gradient of its output, `[tokens, rows]`.
    pub(super) fn backward(
        &self,
        kernel: Kernel,
        x: &[f32],
        dy: &[f32],
        dy8: &mut Tokens8,
        mut dx: Option<(&mut [f32], bool)>,
        gradients: LayerGradients<'_>,
    ) {
        if let Some(dw) = gradients.weight {
            weight_gradient(x, dy, self.cols(), dw);
        }
        let gradient = gradients.lora;
        if let Some((dx, accumulate)) = &mut dx {
            match self.packed.panels() {
                Some(matrix) => {
                    dy8.fill(kernel, dy, self.rows());
                    multiply(dy8, Part::Backward, [Product { matrix, out: dx }], *accumulate);
                }
                None => linear::multiply_backward(dy, self.packed.rows(), *accumulate, dx),
            }
        }
        let Some(Update { a, b, scaling, rank, dropout }) = &self.lora else { return };
        let (a, b) = (slice::<f32>(a), transposed(slice::<f32>(b), self.rows(), *rank));
        // `u = s x A^T` is what `B` sees, `du = s dy B` what `A` does.
        let (mut u, mut du) = (Vec::new(), Vec::new());
        down(kernel, dy, &b, *rank, *scaling, &mut du);
        match (dx, dropout) {
            (Some((dx, _)), None) => up(kernel, &du, a, *rank, dx),
            (Some((dx, _)), Some(dropout)) => {
                let mut of_dropped = vec![0.0; dx.len()];
                up(kernel, &du, a, *rank, &mut of_dropped);
                let through = dropout.apply(kernel, &of_dropped);
                dx.iter_mut().zip(through).for_each(|(dx, value)| *dx += value);
            }
            (None, _) => {}
        }
        let dropped = dropout.filter(|_| gradient.is_some()).map(|dropout| dropout.apply(kernel, x));
        let x = dropped.as_deref().unwrap_or(x);
        if let Some(gradient) = gradient {
            outer(kernel, &du, x, *rank, &mut gradient.a);
            down(kernel, x, a, *rank, *scaling, &mut u);
            let mut db = vec![0.0; b.len()];
            outer(kernel, &u, dy, *rank, &mut db);
            for (i, db) in transposed(&db, *rank, self.rows()).into_iter().enumerate() {
                gradient.b[i] += db;
            }
        }
    }
}

/// Adds `dy^T x`, `[rows, cols]`, to `dw`.
fn weight_gradient(x: &[f32], dy: &[f32], cols: usize, dw: &mut [f32]) {
    let (tokens, rows) = (x.len() / cols, dw.len() / cols);
    let x = MatRef::new(x, tokens, cols, cols);
    let mut tiles: Vec<&mut [f32]> = dw.chunks_mut(GRADIENT_ROWS * cols).collect();
    for_each_mut(&mut tiles, |tile, dw| {
        let (first, n) = (tile * GRADIENT_ROWS, dw.len() / cols);
        let dy = MatRef::new(&dy[first..], tokens, n, rows).t();
        ColumnsMut::whole(dw, n, cols, cols).product(dy, x, 1.0, true);
    });
}

impl Tokens8 {
    /// Rounds `x` if one of the layers multiplies with rounded activations.
    pub(super) fn fill_if(&mut self, linears: &[&Linear<'_>], kernel: Kernel, x: &[f32], cols: usize) {
        if linears.iter().any(|linear| linear.packed.panels().is_some()) {
            self.fill(kernel, x, cols);
        }
    }
}

/// Applies layers of one input.
pub(super) fn apply<'a, const N: usize>(
    kernel: Kernel,
    x: &[f32],
    x8: &Tokens8,
    layers: [(&'a Linear<'a>, &'a mut [f32]); N],
    accumulate: bool,
) {
    let mut prepared = Vec::with_capacity(N);
    let mut rest = Vec::new();
    for (linear, out) in layers {
        match linear.packed.panels() {
            Some(matrix) => prepared.push((linear, matrix, out)),
            None => rest.push((linear, out)),
        }
    }
    multiply(
        x8,
        Part::Forward,
        prepared.iter_mut().map(|(_, matrix, out)| Product { matrix: *matrix, out }),
        accumulate,
    );
    for (linear, out) in rest {
        if accumulate {
            let mut product = vec![0.0; out.len()];
            linear::multiply(x, linear.packed.rows(), &mut product);
            out.iter_mut().zip(product).for_each(|(out, product)| *out += product);
        } else {
            linear::multiply(x, linear.packed.rows(), out);
        }
        linear.add_rest(kernel, x, out);
    }
    for (linear, _, out) in prepared {
        linear.add_rest(kernel, x, out);
    }
}
