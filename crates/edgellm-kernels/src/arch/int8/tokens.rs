//! Activations rounded to 8 bits.

use super::{Vector, tile_width};
use crate::arch::Kernel;
use crate::arch::pool::for_each_mut;
use crate::format::BLOCK;

/// Quads (four consecutive columns) of a block.
const QUADS: usize = BLOCK / 4;

/// Token vectors, rounded to 8 bits per token and block of 32 columns: `x = scale * code`, with codes from -127 to 127
/// and `scale = max |x| / 127`, to the nearest.
///
/// Tokens lie in tiles, as the kernels use them: within a tile, for each block and quad, the quads of its tokens one
/// after the other; scales and sums likewise. Tiles have the width that was asked for, the last ones 8, 4, 2 or 1.
#[derive(Default)]
pub(crate) struct Tokens8 {
    count: usize,
    blocks: usize,
    width: usize,
    codes: Vec<u32>,
    scales: Vec<f32>,
    /// `scale * sum of codes` of every block.
    sums: Vec<f32>,
    /// The same of its halves.
    halves: Vec<[f32; 2]>,
}

/// A tile's data, for the kernels.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) width: usize,
    pub(super) blocks: usize,
    /// `[block][quad][token]`.
    pub(super) codes: &'a [u32],
    /// `[block][token]`.
    pub(super) scales: &'a [f32],
    /// `[block][token]`.
    pub(super) sums: &'a [f32],
    /// `[block][token]`, of the two halves.
    pub(super) halves: &'a [[f32; 2]],
}

impl Tokens8 {
    /// Rounds `[count, cols]` values, in tiles as the kernels want them, on several threads if it is worth it.
    ///
    /// # Panics
    /// If `x` is not whole rows.
    pub(crate) fn new(kernel: Kernel, x: &[f32], cols: usize) -> Self {
        let mut tokens = Tokens8::default();
        tokens.fill(kernel, x, cols);
        tokens
    }

    /// As [`new`](Self::new), in the buffers that are there.
    pub(crate) fn fill(&mut self, kernel: Kernel, x: &[f32], cols: usize) {
        let count = x.len() / cols;
        assert!(x.len() == count * cols, "tokens of {cols} columns");
        let blocks = cols.div_ceil(BLOCK);
        (self.count, self.blocks, self.width) = (count, blocks, tile_width(kernel));
        self.codes.resize(count * blocks * QUADS, 0);
        self.scales.resize(count * blocks, 0.0);
        self.sums.resize(count * blocks, 0.0);
        self.halves.resize(count * blocks, [0.0; 2]);
        let (mut codes, mut scales) = (&mut self.codes[..], &mut self.scales[..]);
        let (mut sums, mut halves) = (&mut self.sums[..], &mut self.halves[..]);
        let mut cut = |n: usize| TileMut {
            width: n,
            codes: take(&mut codes, n * blocks * QUADS),
            scales: take(&mut scales, n * blocks),
            sums: take(&mut sums, n * blocks),
            halves: take(&mut halves, n * blocks),
        };
        if count == 1 {
            return cut(1).fill(kernel, x, cols);
        }
        let mut tiles: Vec<_> =
            widths(count, self.width).map(|(first, n)| Some((cut(n), &x[first * cols..(first + n) * cols]))).collect();
        for_each_mut(&mut tiles, |_, tile| {
            if let Some((mut tile, x)) = tile.take() {
                tile.fill(kernel, x, cols);
            }
        });
    }

    /// Number of tokens.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Blocks of 32 columns.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The first token of every tile, and the tile.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, Tile<'_>)> {
        widths(self.count, self.width).map(|(first, n)| {
            let part = first * self.blocks..(first + n) * self.blocks;
            let tile = Tile {
                width: n,
                blocks: self.blocks,
                codes: &self.codes[first * self.blocks * QUADS..(first + n) * self.blocks * QUADS],
                scales: &self.scales[part.clone()],
                sums: &self.sums[part.clone()],
                halves: &self.halves[part],
            };
            (first, tile)
        })
    }
}

/// First token and width of every tile.
fn widths(count: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    core::iter::from_fn(move || {
        let left = count - first;
        let n = [width, 8, 4, 2, 1].into_iter().find(|&n| n <= width && n <= left)?;
        first += n;
        Some((first - n, n))
    })
}

/// The first `n` elements; the rest stays.
fn take<'a, T>(slice: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (first, rest) = core::mem::take(slice).split_at_mut(n);
    *slice = rest;
    first
}

/// A tile that is being filled.
pub(super) struct TileMut<'a> {
    width: usize,
    codes: &'a mut [u32],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    halves: &'a mut [[f32; 2]],
}

/// Rounds the tokens of a tile.
///
/// # Safety
/// Compiled for and called with the instruction set `L`.
#[inline(always)]
pub(super) unsafe fn round<L: Vector>(tile: &mut TileMut<'_>, x: &[f32], cols: usize) {
    let width = tile.width;
    let blocks = cols.div_ceil(BLOCK);
    assert!(x.len() == width * cols && tile.codes.len() == width * blocks * QUADS, "a tile of {width} tokens");
    assert!([tile.scales.len(), tile.sums.len(), tile.halves.len()] == [width * blocks; 3]);
    let mut padded;
    for (token, x) in x.chunks_exact(cols).enumerate() {
        for (block, x) in x.chunks(BLOCK).enumerate() {
            let x = if x.len() == BLOCK {
                x
            } else {
                padded = [0.0f32; BLOCK];
                padded[..x.len()].copy_from_slice(x);
                &padded
            };
            let at = block * width + token;
            let mut quads = [0u32; QUADS];
            // SAFETY: `x` has 32 values, `quads` 32 bytes.
            unsafe {
                let (low, high) = (L::load_f(x.as_ptr()), L::load_f(x.as_ptr().add(BLOCK / 2)));
                let scale = L::largest(L::max(L::abs(low), L::abs(high))) / 127.0;
                let inverse = L::splat(if scale > 0.0 { 1.0 / scale } else { 0.0 });
                let (low, high) = (L::round(L::mul(low, inverse)), L::round(L::mul(high, inverse)));
                let bytes: *mut u8 = quads.as_mut_ptr().cast();
                L::store_i8(bytes, low);
                L::store_i8(bytes.add(BLOCK / 2), high);
                let halves = [L::total(low) as f32 * scale, L::total(high) as f32 * scale];
                tile.scales[at] = scale;
                tile.sums[at] = halves[0] + halves[1];
                tile.halves[at] = halves;
            }
            let codes = &mut tile.codes[block * QUADS * width..][..QUADS * width];
            for (codes, quad) in codes.chunks_exact_mut(width).zip(quads) {
                codes[token] = quad;
            }
        }
    }
}
