//! Rounding with searched scales, for weights that are already near a grid: a packed matrix plus a small update.
//!
//! Rounding to nearest on the old grid drops every change below half a step, and a grid fitted to the extremes anew
//! shifts all values for nothing. Here each group takes the grid with the least weighted squared error among: the old
//! one, the extremes' one, that one narrowed or widened, and each of these with scale and minimum refitted to the
//! codes by least squares. Then codes are moved where that serves the whole row. For a row with the errors
//! `e = w - Q(w)`, what is minimised is
//!
//! `sum_j d_j e_j^2 + sum_k (sum_j u_jk e_j)^2`
//!
//! with the weights `d` of the columns and the directions `u_k`. The second term makes errors cancel in the directions:
//! a change of a row that no single weight can show is then carried by some of them, as in error diffusion. It is
//! minimised by coordinate descent, a whole number of steps of one code at a time (as QuIP's greedy rounding does, Chee
//! et al., arXiv 2307.13304, section 3, there with the full Hessian).

use rayon::prelude::*;

use super::grouped::{BLOCK, QuantFormat, put_code};
use super::scales::{ScaleType, Units};
use super::{Arrangement, PackedLayout};
use crate::error::{KernelError, Result};
use crate::host::PackedHost;

/// Factors on the extremes' scale.
const FACTORS: [f32; 8] = [1.0, 0.97, 0.94, 0.91, 0.87, 0.83, 0.78, 1.03];
/// Passes of coordinate descent over a row at most.
const SWEEPS: usize = 4;

/// What a rounding is to preserve; see [`PackedHost::requantize`].
#[derive(Debug, Clone)]
pub struct RoundingGoal {
    cols: usize,
    /// `d`, `[cols]`.
    weights: Vec<f32>,
    /// `u`, `[cols, k]`.
    directions: Vec<f32>,
    k: usize,
}

impl RoundingGoal {
    /// Plain squared error in every one of `cols` columns.
    pub fn new(cols: usize) -> Self {
        Self { cols, weights: vec![1.0; cols], directions: Vec::new(), k: 0 }
    }

    /// The same goal with `k` directions, `[cols, k]`; their lengths say how much they weigh against single errors.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `cols * k` values, [`KernelError::NonFinite`].
    pub fn with_directions(mut self, directions: Vec<f32>, k: usize) -> Result<Self> {
        if directions.len() != self.cols * k {
            let layout = format!("{k} directions of {} columns", self.cols);
            let (expected, found) = (self.cols * k, directions.len());
            return Err(KernelError::Length { what: "directions of a rounding goal", layout, expected, found });
        }
        if let Some(at) = directions.iter().position(|v| !v.is_finite()) {
            return Err(KernelError::NonFinite { row: at % k, col: at / k, value: directions[at].to_string() });
        }
        (self.directions, self.k) = (directions, k);
        Ok(self)
    }

    /// The same goal with the weight `d` of every column, such as the mean square of its activations.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `cols` values, [`KernelError::NonFinite`].
    pub fn with_weights(mut self, weights: Vec<f32>) -> Result<Self> {
        if weights.len() != self.cols {
            let layout = format!("{} columns", self.cols);
            let (expected, found) = (self.cols, weights.len());
            return Err(KernelError::Length { what: "weights of a rounding goal", layout, expected, found });
        }
        if let Some(col) = weights.iter().position(|v| !v.is_finite() || *v < 0.0) {
            return Err(KernelError::NonFinite { row: 0, col, value: weights[col].to_string() });
        }
        self.weights = weights;
        Ok(self)
    }

    fn direction(&self, col: usize) -> &[f32] {
        &self.directions[col * self.k..(col + 1) * self.k]
    }
}

/// Scale and minimum of a group, as they are read back.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) scale: f32,
    pub(super) min: f32,
}

impl Grid {
    fn code(self, value: f32, top: f32) -> u32 {
        if self.scale == 0.0 {
            return 0;
        }
        (((value - self.min) / self.scale).clamp(0.0, top) + 0.5) as u32
    }
}

impl PackedHost {
    /// Rounds `values` (row-major, `rows * cols`) to the layout's format, with the grid of every group searched for the
    /// least error by `goal`; the grids of `old`, if it has the same format and shape, are among those tried. Float
    /// formats round to nearest, whatever the goal.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and [`KernelError::Length`] if the goal is for another number of columns.
    pub fn requantize(
        values: &[f32],
        layout: PackedLayout,
        old: Option<&PackedHost>,
        goal: &RoundingGoal,
    ) -> Result<Self> {
        // It also checks everything, and gives the buffers.
        let rounded = Self::quantize(values, PackedLayout { arrangement: Arrangement::Rows, ..layout })?;
        let Some(format) = layout.format.quantized() else { return Ok(rounded) };
        if goal.cols != layout.cols {
            let (expected, found) = (layout.cols, goal.cols);
            return Err(KernelError::Length { what: "columns of a goal", layout: layout.to_string(), expected, found });
        }
        let same = |old: &&PackedHost| {
            (old.layout.format, old.layout.rows, old.layout.cols) == (layout.format, layout.rows, layout.cols)
        };
        let old = old.filter(same).map(PackedHost::unprepare).transpose()?;
        let old_scales: Option<&[u32]> = old.as_ref().map(|old| bytemuck::cast_slice(&old.scales));
        let PackedHost { layout: rows_layout, mut words, mut scales } = rounded;
        let (row_words, row_scales) = (layout.row_words(), layout.row_scale_words());
        let words_u32: &mut [u32] = bytemuck::cast_slice_mut(&mut words);
        let scales_u32: &mut [u32] = bytemuck::cast_slice_mut(&mut scales);
        words_u32
            .par_chunks_mut(row_words)
            .zip(scales_u32.par_chunks_mut(row_scales))
            .zip(values.par_chunks(layout.cols))
            .enumerate()
            .for_each(|(row, ((words, scales), values))| {
                let old = old_scales.map(|all| &all[row * row_scales..(row + 1) * row_scales]);
                let rounded = Row { format, values, goal }.round(scales, old);
                scales.fill(0);
                words.fill(0);
                rounded.store(&format, layout.cols, words, scales);
            });
        let packed = PackedHost { layout: rows_layout, words, scales };
        if layout.arrangement == Arrangement::Panels { packed.prepare() } else { Ok(packed) }
    }
}

/// A row to be rounded.
struct Row<'a> {
    format: QuantFormat,
    values: &'a [f32],
    goal: &'a RoundingGoal,
}

/// A rounded row: columns and codes of the weights that are kept, and the grids of the groups with their units.
pub(super) struct Rounded {
    pub(super) kept: Vec<usize>,
    pub(super) codes: Vec<u32>,
    pub(super) grids: Vec<Grid>,
    pub(super) units: Units,
    /// Sum of the groups' errors.
    pub(super) error: f32,
}

impl Row<'_> {
    fn top(&self) -> f32 {
        ((1u32 << self.format.bit_width) - 1) as f32
    }

    /// `nearest` are the scales of rounding to nearest, fitted to the extremes of every group.
    fn round(&self, nearest: &[u32], old: Option<&[u32]>) -> Rounded {
        let mut rounded = self.round_in(self.format.units(nearest), nearest, old);
        // The old grids are exact in their own units only.
        if let Some(old) = old.filter(|_| self.format.scale_type == ScaleType::U8) {
            let with_old = self.round_in(self.format.units(old), nearest, Some(old));
            if with_old.error < rounded.error {
                rounded = with_old;
            }
        }
        self.cancel(&mut rounded);
        rounded
    }

    /// Rounds every group on its own, with scales in these units.
    fn round_in(&self, units: Units, nearest: &[u32], old: Option<&[u32]>) -> Rounded {
        let kept = self.format.pattern.kept_columns(self.values);
        let group_size = usize::from(self.format.group_size);
        let mut codes = Vec::with_capacity(kept.len());
        let mut grids = Vec::with_capacity(self.format.groups(self.values.len()));
        let (mut first, mut sum) = (0, 0.0);
        for group in 0..self.format.groups(self.values.len()) {
            let len = kept[first..].partition_point(|col| *col < (group + 1) * group_size);
            let members = &kept[first..first + len];
            let grid_of = |scales: &[u32]| {
                let (scale, min) = self.format.scale_and_min(scales, group);
                Grid { scale, min }
            };
            let (error, grid) = self.best_grid(units, members, grid_of(nearest), old.map(grid_of));
            codes.extend(members.iter().map(|&col| grid.code(self.values[col], self.top())));
            grids.push(grid);
            first += len;
            sum += error;
        }
        Rounded { kept, codes, grids, units, error: sum }
    }

    /// The grid of least error of a group, and that error.
    fn best_grid(&self, units: Units, members: &[usize], extremes: Grid, old: Option<Grid>) -> (f32, Grid) {
        let mut best = (f32::INFINITY, extremes);
        let mut consider = |grid: Grid| {
            for grid in [Some(grid), self.refitted(units, members, grid)].into_iter().flatten() {
                let error = self.error(members, grid);
                if error < best.0 {
                    best = (error, grid);
                }
            }
        };
        let old = old.filter(|g| g.scale.is_finite() && g.min.is_finite());
        if let Some(old) = old.and_then(|old| self.stored(units, old.scale, old.min)) {
            consider(old);
        }
        for factor in FACTORS {
            // The middle of the span stays where it is.
            let min = extremes.min + extremes.scale * self.top() * 0.5 * (1.0 - factor);
            if let Some(grid) = self.stored(units, extremes.scale * factor, min) {
                consider(grid);
            }
        }
        best
    }

    /// A grid as it is read back after it was stored; `None` if it cannot be.
    fn stored(&self, units: Units, scale: f32, min: f32) -> Option<Grid> {
        let (scale, min) = self.format.rounded_grid(units, scale, min);
        (scale.is_finite() && min.is_finite()).then_some(Grid { scale, min })
    }

    fn error(&self, members: &[usize], grid: Grid) -> f32 {
        let top = self.top();
        let term = |&col: &usize| {
            let value = self.values[col];
            let e = value - (grid.code(value, top) as f32 * grid.scale + grid.min);
            self.goal.weights[col] * e * e
        };
        members.iter().map(term).sum()
    }

    /// The grid of least weighted squared error for the codes that `grid` gives.
    fn refitted(&self, units: Units, members: &[usize], grid: Grid) -> Option<Grid> {
        let top = self.top();
        let centre = if self.format.symmetric { f64::from(self.format.zero_point()) } else { 0.0 };
        let (mut n, mut c, mut cc, mut v, mut cv) = (0.0f64, 0.0, 0.0, 0.0, 0.0);
        for &col in members {
            let (value, weight) = (f64::from(self.values[col]), f64::from(self.goal.weights[col]));
            let code = f64::from(grid.code(self.values[col], top)) - centre;
            n += weight;
            c += weight * code;
            cc += weight * code * code;
            v += weight * value;
            cv += weight * code * value;
        }
        if self.format.symmetric {
            return (cc > 0.0).then(|| self.stored(units, (cv / cc) as f32, 0.0)).flatten();
        }
        let det = n * cc - c * c;
        if det <= 1e-9 * n * cc {
            return None;
        }
        let scale = (n * cv - c * v) / det;
        (scale > 0.0).then(|| self.stored(units, scale as f32, ((v - scale * c) / n) as f32)).flatten()
    }

    /// Moves codes so that errors cancel in the goal's directions.
    fn cancel(&self, rounded: &mut Rounded) {
        if self.goal.k == 0 {
            return;
        }
        let (top, group_size) = (self.top(), usize::from(self.format.group_size));
        // What is pruned is an error as well.
        let mut errors = self.values.to_vec();
        for (&col, &code) in rounded.kept.iter().zip(&rounded.codes) {
            let grid = rounded.grids[col / group_size];
            errors[col] -= code as f32 * grid.scale + grid.min;
        }
        let mut sums = vec![0.0f32; self.goal.k];
        for (col, error) in errors.iter().enumerate() {
            sums.iter_mut().zip(self.goal.direction(col)).for_each(|(sum, u)| *sum += u * error);
        }
        for _ in 0..SWEEPS {
            let mut moved = false;
            for (&col, code) in rounded.kept.iter().zip(&mut rounded.codes) {
                let scale = rounded.grids[col / group_size].scale;
                let (u, d) = (self.goal.direction(col), self.goal.weights[col]);
                let (mut slope, mut curvature) = (d * errors[col], d);
                for (u, sum) in u.iter().zip(&sums) {
                    slope += u * sum;
                    curvature += u * u;
                }
                if scale == 0.0 || curvature == 0.0 {
                    continue;
                }
                let target = (*code as f32 + (slope / (curvature * scale)).round()).clamp(0.0, top);
                let change = target - *code as f32;
                if change != 0.0 {
                    *code = target as u32;
                    let change = change * scale;
                    errors[col] -= change;
                    sums.iter_mut().zip(u).for_each(|(sum, u)| *sum -= u * change);
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
    }
}

impl Rounded {
    /// Writes the row into zeroed words and scales.
    pub(super) fn store(&self, format: &QuantFormat, cols: usize, words: &mut [u32], scales: &mut [u32]) {
        format.put_units(scales, self.units);
        for (group, grid) in self.grids.iter().enumerate() {
            format.store(scales, self.units, group, grid.scale, grid.min);
        }
        let (mask, words) = words.split_at_mut(format.pattern.mask_words(cols));
        if !mask.is_empty() {
            self.kept.iter().for_each(|col| mask[col / BLOCK] |= 1 << (col % BLOCK));
        }
        for (i, &code) in self.codes.iter().enumerate() {
            put_code(words, usize::from(format.bit_width), i, code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 16_777_216.0 - 0.5
        };
        (0..n).map(|_| next() + next() + next()).collect()
    }

    fn squared(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    /// The searched grids are never worse than the extremes', in any format and arrangement.
    #[test]
    fn the_error_is_at_most_that_of_rounding_to_nearest() {
        let (rows, cols) = (20, 200);
        let values = noise(rows * cols, 3);
        let goal = RoundingGoal::new(cols);
        let mut better = 0;
        let formats = Format::all();
        for &format in &formats {
            let layout = PackedLayout::new(rows, cols, format).unwrap();
            let nearest = PackedHost::quantize(&values, layout).unwrap();
            let found = PackedHost::requantize(&values, layout, None, &goal).unwrap();
            assert_eq!(found.layout, layout);
            found.check().unwrap();
            let (a, b) = (squared(&values, &found.dequantize()), squared(&values, &nearest.dequantize()));
            assert!(a <= b * 1.000_01, "{format}: {a} > {b}");
            better += usize::from(a < b * 0.999);
            let panels = PackedHost::requantize(&values, layout.prepared(), Some(&nearest), &goal).unwrap();
            assert_eq!(panels.layout, layout.prepared());
        }
        assert!(better > formats.len() / 2, "only {better} of {} formats gain", formats.len());
    }

    /// What is on a grid already stays as it is, bit for bit, if its grid is known.
    #[test]
    fn values_of_the_old_matrix_keep_their_codes() {
        let (rows, cols) = (5, 96);
        for format in [
            "q4g32a",
            "q3g64s",
            "q4g32s-2:4",
            "q6g16s-f32",
            "q4g32a-f32",
            "q2g32a-b50",
            "q8g32s",
            "q4g32a-8",
            "q3g16s-8",
        ] {
            let layout = PackedLayout::new(rows, cols, Format::parse(format).unwrap()).unwrap();
            let old = PackedHost::quantize(&noise(rows * cols, 9), layout).unwrap();
            let again =
                PackedHost::requantize(&old.dequantize(), layout, Some(&old), &RoundingGoal::new(cols)).unwrap();
            assert_eq!(again.dequantize(), old.dequantize(), "{format}");
        }
    }

    /// An update far below half a step is lost to rounding, and is carried where a direction asks for it.
    #[test]
    fn a_small_update_survives_in_a_direction() {
        let (rows, cols) = (8, 256);
        for format in ["q4g32a", "q4g32s", "q3g64a", "q2g32s", "q8g32s-b60", "q3g32a-8"] {
            let layout = PackedLayout::new(rows, cols, Format::parse(format).unwrap()).unwrap();
            let old = PackedHost::quantize(&noise(rows * cols, 5), layout).unwrap();
            let before = old.dequantize();
            let direction: Vec<f32> = noise(cols, 8);
            let norm: f32 = direction.iter().map(|v| v * v).sum::<f32>();
            let update = |i: usize| 0.004 * direction[i % cols];
            let merged: Vec<f32> = before.iter().enumerate().map(|(i, v)| v + update(i)).collect();
            let survived = |goal: &RoundingGoal| {
                let after = PackedHost::requantize(&merged, layout, Some(&old), goal).unwrap().dequantize();
                let dot = |f: &dyn Fn(usize) -> f32| -> f32 { (0..rows * cols).map(|i| f(i) * update(i)).sum() };
                dot(&|i| after[i] - before[i]) / dot(&update)
            };
            let plain = survived(&RoundingGoal::new(cols));
            let weighted = direction.iter().map(|v| v * (1000.0 / norm).sqrt()).collect();
            let kept = survived(&RoundingGoal::new(cols).with_directions(weighted, 1).unwrap());
            assert!(plain.abs() < 0.7, "{format}: {plain} survives already");
            assert!((kept - 1.0).abs() < 0.2, "{format}: {kept} survives");
        }
    }

    #[test]
    fn goals_that_do_not_fit_are_refused() {
        let goal = RoundingGoal::new(32);
        assert!(goal.clone().with_directions(vec![0.0; 63], 2).is_err());
        assert!(goal.clone().with_directions(vec![f32::NAN; 32], 1).is_err());
        assert!(goal.clone().with_weights(vec![1.0; 31]).is_err());
        assert!(goal.clone().with_weights(vec![-1.0; 32]).is_err());
        let layout = PackedLayout::new(1, 64, Format::parse("q4g32a").unwrap()).unwrap();
        assert!(PackedHost::requantize(&[0.5; 64], layout, None, &goal).is_err());
        assert!(PackedHost::requantize(&[f32::NAN; 64], layout, None, &RoundingGoal::new(64)).is_err());
    }
}
