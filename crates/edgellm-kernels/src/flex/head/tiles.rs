//! A head in tiles of its vocabulary: the logits of a tile, and gradients through it.

use core::ops::Range;

use super::super::linear::{decode, tile_rows};
use super::super::{Packed, slice};
use crate::arch::matmul::{ColumnsMut, MatRef};
use crate::arch::pool::for_each_mut;
use crate::arch::{Kernel, Part, Task, Tokens8};
use crate::format::PANEL_ROWS;
use crate::panels::Panels;

/// Panels of a tile of a prepared head.
const TILE_PANELS: usize = 16;
/// Segments of the vocabulary in the backward pass.
const SEGMENTS: usize = 8;

/// The vocabulary that a tile of this head has best.
pub(super) fn tile_of(head: &Packed) -> usize {
    if head.panels().is_some() { TILE_PANELS * PANEL_ROWS } else { tile_rows(head.layout.cols) }
}

/// Hidden states before a head, which is taken a tile of the vocabulary at a time.
pub(super) struct Tiles<'a> {
    head: &'a Packed,
    hidden: MatRef<'a>,
    /// A prepared head, and the hidden states rounded for it.
    prepared: Option<(Panels<'a>, Tokens8)>,
    tokens: usize,
    tile: usize,
}

impl<'a> Tiles<'a> {
    /// Hidden states `[tokens, d]` before a head `[vocabulary, d]`; a tile has so much of the vocabulary, a multiple of a
    /// panel's.
    pub(super) fn new(head: &'a Packed, hidden: &'a [f32], tile: usize) -> Self {
        let cols = head.layout.cols;
        let tokens = hidden.len() / cols;
        let prepared = head.panels().map(|panels| (panels, Tokens8::new(Kernel::active(), hidden, cols)));
        Tiles { head, hidden: MatRef::new(hidden, tokens, cols, cols), prepared, tokens, tile }
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many tiles the vocabulary has.
    pub(super) fn count(&self) -> usize {
        self.head.layout.rows.div_ceil(self.tile)
    }

    /// The token ids of a tile.
    pub(super) fn rows(&self, tile: usize) -> Range<usize> {
        tile * self.tile..((tile + 1) * self.tile).min(self.head.layout.rows)
    }

    fn panels(&self, panels: &Panels<'a>, tile: usize) -> Panels<'a> {
        let (per_tile, last) = (self.tile / PANEL_ROWS, panels.layout().panels());
        panels.part(tile * per_tile..((tile + 1) * per_tile).min(last))
    }

    /// The logits of a tile, `[tokens, rows]`; tells how many rows these are.
    pub(super) fn logits(&self, tile: usize, logits: &mut Vec<f32>) -> usize {
        let (kernel, rows) = (Kernel::active(), self.rows(tile));
        let n = rows.len();
        logits.resize(self.tokens * n, 0.0);
        let mut out = ColumnsMut::whole(logits, self.tokens, n, n);
        match &self.prepared {
            Some((panels, x)) => {
                let matrix = self.panels(panels, tile);
                let range = 0..matrix.layout().panels();
                Task { matrix, x, part: Part::Forward, range, out, accumulate: false }.run(kernel);
            }
            None => {
                let mut buffer = Vec::new();
                let w = decode(kernel, self.head.rows(), rows, &mut buffer);
                out.product(self.hidden, w.t(), 1.0, false);
            }
        }
        n
    }

    /// The gradient with respect to the hidden states, `[tokens, d]`: `sum over tiles of g W`, where `each(tile, item, add)`
    /// gives the tile's `g`, `[tokens, rows]`, to `add`.
    ///
    /// The vocabulary is cut into a fixed number of segments, which are added in order: the number of threads does not
    /// change the result.
    pub(super) fn backward<T: Send>(
        &self,
        items: &mut [T],
        each: impl Fn(usize, &mut T, &mut dyn FnMut(&[f32])) + Sync,
    ) -> Vec<f32> {
        let (kernel, cols) = (Kernel::active(), self.head.layout.cols);
        assert_eq!(items.len(), self.count(), "an item for each tile");
        let per_segment = items.len().div_ceil(SEGMENTS).max(1);
        let mut segments: Vec<(&mut [T], Vec<f32>)> =
            items.chunks_mut(per_segment).map(|items| (items, vec![0.0; self.tokens * cols])).collect();
        for_each_mut(&mut segments, |segment, (items, sum)| {
            let (mut rounded, mut buffer) = (Tokens8::default(), Vec::new());
            for (i, item) in items.iter_mut().enumerate() {
                let tile = segment * per_segment + i;
                each(tile, item, &mut |g| {
                    let (rows, mut out) = (self.rows(tile), ColumnsMut::whole(sum, self.tokens, cols, cols));
                    let n = rows.len();
                    match &self.prepared {
                        Some((panels, _)) => {
                            let matrix = self.panels(panels, tile);
                            rounded.fill(kernel, g, n);
                            let range = 0..matrix.blocks();
                            Task { matrix, x: &rounded, part: Part::Backward, range, out, accumulate: true }
                                .run(kernel);
                        }
                        None => {
                            let w = decode(kernel, self.head.rows(), rows, &mut buffer);
                            out.product(MatRef::new(g, self.tokens, n, n), w, 1.0, true);
                        }
                    }
                });
            }
        });
        let mut sums = segments.into_iter().map(|(_, sum)| sum);
        let mut total = sums.next().expect("a vocabulary");
        for sum in sums {
            total.iter_mut().zip(sum).for_each(|(total, value)| *total += value);
        }
        total
    }

    /// Subtracts `factor(t) W[targets[t]]` from every token's gradient.
    pub(super) fn subtract_targets(&self, gradient: &mut [f32], targets: &[usize], factor: impl Fn(usize) -> f32) {
        let (cols, rows) = (self.head.layout.cols, self.head.gather(targets));
        let lines = gradient.chunks_exact_mut(cols).zip(slice::<f32>(&rows).chunks_exact(cols));
        for (t, (out, row)) in lines.enumerate() {
            let factor = factor(t);
            out.iter_mut().zip(row).for_each(|(out, value)| *out -= factor * value);
        }
    }
}
