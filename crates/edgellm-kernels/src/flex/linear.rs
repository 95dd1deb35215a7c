//! Products with packed matrices.
//!
//! *Few tokens* (at most [`FEW`]): memory-bound. Every row is decoded in registers and dotted with all tokens.
//!
//! *Many tokens*: compute-bound. A tile of rows is decoded into a buffer that stays in the second-level cache and
//! multiplied with the `gemm` crate. Forward, a task owns a tile of rows, so a range of output columns. Backward
//! (`dX = dY W`), a task owns a range of *columns* of `W`, so of `dX`, and adds the tiles of rows in order: nothing
//! is decoded twice, and no two threads add to the same element.

use core::ops::Range;

use rayon::prelude::*;

use super::integer::{self, Product};
use super::{Float, Packed, TASK, dense, dims, float, for_chunks, slice};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::{Kernel, PackedRows, Part, Tokens, Tokens8};
use crate::format::BLOCK;

/// Most tokens for which rows are dotted directly.
const FEW: usize = 8;
/// Elements of a decoded tile: 256 KiB.
const TILE: usize = 1 << 16;
/// Rows of a tile in the backward pass.
const BACKWARD_ROWS: usize = 256;

pub(super) fn forward(x: Float, w: &Packed) -> Float {
    let [tokens, cols] = dims(&x);
    let rows = w.layout.rows;
    let x = dense(x);
    let x = slice::<f32>(&x);
    let mut out = vec![0.0; tokens * rows];
    match w.panels() {
        Some(matrix) => {
            let x = Tokens8::new(Kernel::active(), x, cols);
            integer::multiply(&x, Part::Forward, [Product { matrix, out: &mut out }], false);
        }
        None => multiply(x, w.rows(), &mut out),
    }
    float(out, [tokens, rows])
}

/// `out = x W^T`, `[tokens, rows]`, with activations in `f32`.
pub(super) fn multiply(x: &[f32], w: PackedRows<'_>, out: &mut [f32]) {
    let (rows, cols) = (w.layout().rows, w.layout().cols);
    match x.len() / cols {
        0 => {}
        1 => few(x, cols, w, out),
        tokens @ 2..=FEW => {
            let mut transposed = vec![0.0; rows * tokens];
            few(x, cols, w, &mut transposed);
            for (token, out) in out.chunks_mut(rows).enumerate() {
                for (out, products) in out.iter_mut().zip(transposed.chunks(tokens)) {
                    *out = products[token];
                }
            }
        }
        tokens => many(x, tokens, w, out),
    }
}

/// `out` `[rows, tokens]`.
fn few(x: &[f32], cols: usize, w: PackedRows, out: &mut [f32]) {
    let kernel = Kernel::active();
    let x = Tokens::new(x, cols);
    let tokens = out.len() / w.layout().rows;
    let per_task = (TASK / cols).max(1);
    for_chunks(out, per_task * tokens, |i, out| {
        let first = i * per_task;
        w.dot(kernel, first..first + out.len() / tokens, &x, out);
    });
}

/// `out` `[tokens, rows]`.
fn many(x: &[f32], tokens: usize, w: PackedRows, out: &mut [f32]) {
    let kernel = Kernel::active();
    let layout = w.layout();
    let tile = tile_rows(layout.cols);
    let x = MatRef::new(x, tokens, layout.cols, layout.cols);
    let columns = ColumnsMut::split(out, tokens, layout.rows, tile);
    columns.into_par_iter().enumerate().for_each_init(Vec::new, |buffer, (i, mut out)| {
        let rows = i * tile..((i + 1) * tile).min(layout.rows);
        let w = decode(kernel, w, rows, buffer);
        out.product(x, w.t(), 1.0, false);
    });
}

/// Rows of a tile that a thread decodes at once: a function of the shape alone.
pub(super) fn tile_rows(cols: usize) -> usize {
    (TILE / cols.next_multiple_of(BLOCK) / 16 * 16).clamp(64, 256)
}

/// Decodes whole rows into `buffer`.
pub(super) fn decode<'a>(kernel: Kernel, w: PackedRows, rows: Range<usize>, buffer: &'a mut Vec<f32>) -> MatRef<'a> {
    let cols = w.layout().cols;
    let blocks = cols.div_ceil(BLOCK);
    buffer.resize(rows.len() * blocks * BLOCK, 0.0);
    w.decode(kernel, rows.clone(), 0..blocks, buffer);
    MatRef::new(buffer, rows.len(), cols, blocks * BLOCK)
}

pub(super) fn backward(dy: Float, w: &Packed) -> Float {
    let [tokens, _] = dims(&dy);
    let dy = dense(dy);
    let dy = slice::<f32>(&dy);
    let mut out = vec![0.0; tokens * w.layout.cols];
    if let Some(matrix) = w.panels() {
        let dy = Tokens8::new(Kernel::active(), dy, w.layout.rows);
        integer::multiply(&dy, Part::Backward, [Product { matrix, out: &mut out }], false);
        return float(out, [tokens, w.layout.cols]);
    }
    multiply_backward(dy, w.rows(), false, &mut out);
    float(out, [tokens, w.layout.cols])
}

/// `out = dy W`, or `out += dy W`, `[tokens, cols]`, with gradients in `f32`.
pub(super) fn multiply_backward(dy: &[f32], w: PackedRows<'_>, accumulate: bool, out: &mut [f32]) {
    let (kernel, layout) = (Kernel::active(), w.layout());
    let tokens = dy.len() / layout.rows;
    if tokens == 0 {
        return;
    }
    // Two or four blocks wide: enough columns for gemm, enough ranges for threads.
    let width = if layout.cols <= 1024 { 2 * BLOCK } else { 4 * BLOCK };
    let columns = ColumnsMut::split(out, tokens, layout.cols, width);
    columns.into_par_iter().enumerate().for_each_init(Vec::new, |buffer, (i, mut out)| {
        let first = i * width / BLOCK;
        let cols = width.min(layout.cols - i * width);
        let blocks = first..first + cols.div_ceil(BLOCK);
        let stride = blocks.len() * BLOCK;
        for start in (0..layout.rows).step_by(BACKWARD_ROWS) {
            let rows = start..(start + BACKWARD_ROWS).min(layout.rows);
            buffer.resize(rows.len() * stride, 0.0);
            w.decode(kernel, rows.clone(), blocks.clone(), buffer);
            let dy = MatRef::new(&dy[start..], tokens, rows.len(), layout.rows);
            out.product(dy, MatRef::new(buffer, rows.len(), cols, stride), 1.0, accumulate || start > 0);
        }
    });
}
