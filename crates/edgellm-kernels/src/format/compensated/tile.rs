//! Sixteen rows of a matrix at a time, a row a lane.
//!
//! All of it is inlined into one function that is compiled for the instruction set in use.

use super::factor::Factor;
use crate::arch::Vectorized;
use crate::format::refit::{Grid, Rounded};
use crate::format::{QuantFormat, SparsePattern};

/// Rows of a tile.
pub(super) const LANES: usize = 16;

pub(super) type Lanes = [f32; LANES];
pub(super) const ZERO: Lanes = [0.0; LANES];

/// Factors on the extremes' scale that the search tries.
const FACTORS: [f32; 9] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68, 0.62, 0.55];

/// Scales and minima of the groups of every row.
#[derive(Clone)]
struct Grids {
    scale: Vec<Lanes>,
    min: Vec<Lanes>,
}

/// A tile while it is rounded. Columns are in the factor's order.
pub(super) struct Tile<'a> {
    format: QuantFormat,
    factor: &'a Factor,
    /// Rows that exist.
    rows: usize,
    /// The weights.
    w: Vec<Lanes>,
    /// 1 for weights that are stored and 0 for others; empty if all are.
    kept: Vec<Lanes>,
    /// Places of the columns of every group.
    groups: Vec<Vec<u32>>,
    grids: Grids,
    codes: Vec<Lanes>,
    /// `w - Q(w)`.
    errors: Vec<Lanes>,
    best: Best,
}

/// The rounding of a tile.
pub(super) struct Rounding<'t, 'a> {
    pub(super) tile: &'t mut Tile<'a>,
    /// Times that grids are fitted again to the codes.
    pub(super) refits: usize,
}

impl Vectorized for Rounding<'_, '_> {
    #[inline(always)]
    fn run(self) {
        self.tile.round(self.refits);
    }
}

/// The best rounding so far, row by row.
struct Best {
    loss: Lanes,
    grids: Grids,
    codes: Vec<Lanes>,
}

impl<'a> Tile<'a> {
    /// A tile of up to 16 rows.
    ///
    /// `pruned` is the pattern of what is kept, where the format does not say it itself.
    pub(super) fn new(format: QuantFormat, pruned: SparsePattern, factor: &'a Factor, values: &[f32]) -> Self {
        let cols = factor.order.len();
        let rows = values.len() / cols;
        let lanes =
            |place: &u32| std::array::from_fn(|l| if l < rows { values[l * cols + *place as usize] } else { 0.0 });
        let w: Vec<Lanes> = factor.order.iter().map(lanes).collect();
        let mut groups = vec![Vec::new(); format.groups(cols)];
        for (place, &col) in factor.order.iter().enumerate() {
            groups[col as usize / usize::from(format.group_size)].push(place as u32);
        }
        let grids = Grids { scale: vec![ZERO; groups.len()], min: vec![ZERO; groups.len()] };
        let best = Best { loss: [f32::INFINITY; LANES], grids: grids.clone(), codes: vec![ZERO; cols] };
        let pattern = if format.is_sparse() { format.pattern } else { pruned };
        let kept = if pattern == SparsePattern::Dense { Vec::new() } else { keep(pattern, factor, &w, rows) };
        Tile { format, factor, rows, w, kept, groups, grids, codes: vec![ZERO; cols], errors: vec![ZERO; cols], best }
    }

    /// Rounds all rows.
    #[inline(always)]
    fn round(&mut self, refits: usize) {
        for group in 0..self.groups.len() {
            self.search(group);
        }
        self.store_grids();
        self.feed_forward();
        for _ in 0..refits {
            for group in 0..self.groups.len() {
                self.refit(group);
            }
            self.store_grids();
            self.feed_forward();
        }
    }

    /// The columns and codes of a row as they are stored, and its grids.
    pub(super) fn row(&self, lane: usize) -> Rounded {
        let cols = self.w.len();
        let mut by_column = vec![None; cols];
        for (place, &col) in self.factor.order.iter().enumerate() {
            by_column[col as usize] = match self.kept.get(place) {
                Some(kept) if kept[lane] == 0.0 && self.format.is_sparse() => None,
                // A format that stores all weights: the code of zero.
                Some(kept) if kept[lane] == 0.0 => Some(self.format.zero_point()),
                _ => Some(self.best.codes[place][lane] as u32),
            };
        }
        let (kept, codes) = by_column.iter().enumerate().filter_map(|(col, code)| code.map(|c| (col, c))).unzip();
        let Grids { scale, min } = &self.best.grids;
        let scales: Vec<f32> = scale.iter().map(|s| s[lane]).collect();
        let mins: Vec<f32> = if self.format.symmetric { Vec::new() } else { min.iter().map(|m| m[lane]).collect() };
        let units = self.format.choose_units(&scales, &mins);
        let grids = scale.iter().zip(min).map(|(scale, min)| Grid { scale: scale[lane], min: min[lane] }).collect();
        Rounded { kept, codes, grids, units, error: self.best.loss[lane] }
    }

    #[inline(always)]
    fn top(&self) -> f32 {
        ((1u32 << self.format.bit_width) - 1) as f32
    }

    #[inline(always)]
    fn kept(&self, place: u32) -> Lanes {
        self.kept.get(place as usize).copied().unwrap_or([1.0; LANES])
    }

    /// The grid of a group with the least error of its weights, each rounded on its own and weighed by `D`.
    #[inline(always)]
    fn search(&mut self, group: usize) {
        let (mut low, mut high, mut any) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], ZERO);
        for &place in &self.groups[group] {
            let (w, kept) = (&self.w[place as usize], self.kept(place));
            for l in 0..LANES {
                if kept[l] != 0.0 {
                    (low[l], high[l], any[l]) = (low[l].min(w[l]), high[l].max(w[l]), 1.0);
                }
            }
        }
        let top = self.top();
        let centre = if self.format.symmetric { self.format.zero_point() as f32 } else { 0.0 };
        let mut best = [f32::INFINITY; LANES];
        for factor in FACTORS {
            let (mut scale, mut min) = (ZERO, ZERO);
            for l in 0..LANES {
                if self.format.symmetric {
                    let extreme = if high[l] > -low[l] { high[l] } else { low[l] };
                    scale[l] = factor * extreme / -centre * any[l];
                } else {
                    scale[l] = factor * (high[l] - low[l]) / top * any[l];
                    min[l] = (0.5 * ((low[l] + high[l]) - factor * (high[l] - low[l]))) * any[l];
                }
                if any[l] == 0.0 {
                    (scale[l], min[l]) = (0.0, 0.0);
                }
            }
            // The grid, and the one that fits its codes best.
            for _ in 0..2 {
                if self.format.symmetric {
                    min = scale.map(|s| -s * centre);
                }
                let (error, fitted) = self.try_grid(group, &scale, &min, centre);
                for l in 0..LANES {
                    if error[l] < best[l] {
                        best[l] = error[l];
                        self.grids.scale[group][l] = scale[l];
                        self.grids.min[group][l] = min[l];
                    }
                }
                (scale, min) = fitted;
            }
        }
    }

    /// The error of a group on a grid, and scale and minimum that fit the grid's codes best.
    #[inline(always)]
    fn try_grid(&self, group: usize, scale: &Lanes, min: &Lanes, centre: f32) -> (Lanes, (Lanes, Lanes)) {
        let (top, inverse) = (self.top(), inverses(scale));
        let (mut error, mut n, mut c, mut cc, mut v, mut cv) = (ZERO, ZERO, ZERO, ZERO, ZERO, ZERO);
        for &place in &self.groups[group] {
            let (w, kept, d) = (&self.w[place as usize], self.kept(place), self.factor.weights[place as usize]);
            for l in 0..LANES {
                let code = ((w[l] - min[l]) * inverse[l] + 0.5).floor().clamp(0.0, top);
                let (e, weight) = (w[l] - (code * scale[l] + min[l]), d * kept[l]);
                let code = code - centre;
                error[l] += weight * e * e;
                n[l] += weight;
                c[l] += weight * code;
                cc[l] += weight * code * code;
                v[l] += weight * w[l];
                cv[l] += weight * code * w[l];
            }
        }
        let (mut new_scale, mut new_min) = (*scale, *min);
        for l in 0..LANES {
            if self.format.symmetric {
                if cc[l] > 0.0 {
                    new_scale[l] = cv[l] / cc[l];
                }
            } else {
                let det = n[l] * cc[l] - c[l] * c[l];
                if det > 1e-6 * n[l] * cc[l] {
                    new_scale[l] = (n[l] * cv[l] - c[l] * v[l]) / det;
                    new_min[l] = (v[l] - new_scale[l] * c[l]) / n[l];
                }
            }
        }
        (error, (new_scale, new_min))
    }

    /// Rounds all grids to what the format stores.
    fn store_grids(&mut self) {
        let asymmetric = !self.format.symmetric;
        for l in 0..self.rows {
            let mut scales: Vec<f32> =
                self.grids.scale.iter().map(|s| if asymmetric { s[l].max(0.0) } else { s[l] }).collect();
            let mut mins: Vec<f32> =
                if asymmetric { self.grids.min.iter().map(|m| m[l]).collect() } else { Vec::new() };
            let stored = self.format.round_grids(l, &mut scales, &mut mins).is_ok();
            for (group, scale) in scales.into_iter().enumerate() {
                // What cannot be stored becomes a grid of zeros: it loses against any other round.
                let scale = if stored { scale } else { 0.0 };
                let centre = self.format.zero_point() as f32;
                let min = if asymmetric { mins[group] } else { -scale * centre };
                self.grids.scale[group][l] = scale;
                self.grids.min[group][l] = if stored { min } else { 0.0 };
            }
        }
    }

    /// Rounds column by column, with the feedback of the errors so far.
    #[inline(always)]
    fn feed_forward(&mut self) {
        let top = self.top();
        let group_size = usize::from(self.format.group_size);
        let inverse: Vec<Lanes> = self.grids.scale.iter().map(inverses).collect();
        let mut loss = ZERO;
        for k in 0..self.w.len() {
            let target = feedback(self.factor.above(k), &self.errors, self.w[k]);
            let group = self.factor.order[k] as usize / group_size;
            let (scale, min, inverse) = (&self.grids.scale[group], &self.grids.min[group], &inverse[group]);
            let (kept, d, w) = (self.kept(k as u32), self.factor.weights[k], &self.w[k]);
            let (codes, errors) = (&mut self.codes[k], &mut self.errors[k]);
            for l in 0..LANES {
                let code = ((target[l] - min[l]) * inverse[l] + 0.5).floor().clamp(0.0, top);
                let value = (code * scale[l] + min[l]) * kept[l];
                codes[l] = code;
                errors[l] = w[l] - value;
                loss[l] += d * (target[l] - value) * (target[l] - value);
            }
        }
        self.keep_best(loss);
    }

    /// Rows that were rounded better than before are kept.
    #[inline(always)]
    fn keep_best(&mut self, loss: Lanes) {
        let better: [bool; LANES] = std::array::from_fn(|l| loss[l] < self.best.loss[l]);
        if better.iter().any(|b| *b) {
            for (best, new) in self.best.codes.iter_mut().zip(&self.codes) {
                select(&better, best, new);
            }
            for (best, new) in self.best.grids.scale.iter_mut().zip(&self.grids.scale) {
                select(&better, best, new);
            }
            for (best, new) in self.best.grids.min.iter_mut().zip(&self.grids.min) {
                select(&better, best, new);
            }
            select(&better, &mut self.best.loss, &loss);
        }
    }

    /// Fits scale and minimum of a group to its codes, by least squares in `H`, and brings the errors up to date.
    #[inline(always)]
    fn refit(&mut self, group: usize) {
        let n = self.w.len();
        let centre = if self.format.symmetric { self.format.zero_point() as f32 } else { 0.0 };
        let members = &self.groups[group];
        // `H e`, and `H` applied to the codes and to ones, at the members.
        let (mut cr, mut or, mut cc, mut co, mut oo) = (ZERO, ZERO, ZERO, ZERO, ZERO);
        for &i in members {
            let row = &self.factor.gram[i as usize * n..(i as usize + 1) * n];
            let r = feedback(row, &self.errors, ZERO);
            let (kept, codes) = (self.kept(i), &self.codes[i as usize]);
            let (mut of_codes, mut of_ones) = (ZERO, ZERO);
            for &j in members {
                let (h, codes, kept) = (row[j as usize], &self.codes[j as usize], self.kept(j));
                for l in 0..LANES {
                    of_codes[l] += h * (codes[l] - centre) * kept[l];
                    of_ones[l] += h * kept[l];
                }
            }
            for l in 0..LANES {
                let code = (codes[l] - centre) * kept[l];
                cr[l] += code * r[l];
                or[l] += kept[l] * r[l];
                cc[l] += code * of_codes[l];
                co[l] += code * of_ones[l];
                oo[l] += kept[l] * of_ones[l];
            }
        }
        let (mut ds, mut dm) = (ZERO, ZERO);
        for l in 0..LANES {
            if self.format.symmetric {
                ds[l] = if cc[l] > 0.0 { cr[l] / cc[l] } else { 0.0 };
            } else {
                let det = cc[l] * oo[l] - co[l] * co[l];
                if det > 1e-6 * cc[l] * oo[l] {
                    ds[l] = (cr[l] * oo[l] - or[l] * co[l]) / det;
                    dm[l] = (cc[l] * or[l] - co[l] * cr[l]) / det;
                }
            }
        }
        for &i in &self.groups[group] {
            let (kept, codes) = (self.kept(i), &self.codes[i as usize]);
            for (l, error) in self.errors[i as usize].iter_mut().enumerate() {
                *error -= ((codes[l] - centre) * ds[l] + dm[l]) * kept[l];
            }
        }
        for l in 0..LANES {
            self.grids.scale[group][l] += ds[l];
            self.grids.min[group][l] += if self.format.symmetric { -ds[l] * centre } else { dm[l] };
        }
    }
}

/// `start + sum_i factors[i] * errors[i]`.
#[inline(always)]
pub(super) fn feedback(factors: &[f32], errors: &[Lanes], start: Lanes) -> Lanes {
    // Four sums, so that additions do not wait for each other.
    let mut sums = [start, ZERO, ZERO, ZERO];
    let (factors4, errors4) = (factors.chunks_exact(4), errors[..factors.len()].chunks_exact(4));
    for (factor, error) in factors4.remainder().iter().zip(errors4.remainder()) {
        for l in 0..LANES {
            sums[0][l] += factor * error[l];
        }
    }
    for (factors, errors) in factors4.zip(errors4) {
        for (sum, (factor, error)) in sums.iter_mut().zip(factors.iter().zip(errors)) {
            for l in 0..LANES {
                sum[l] += factor * error[l];
            }
        }
    }
    std::array::from_fn(|l| (sums[0][l] + sums[1][l]) + (sums[2][l] + sums[3][l]))
}

#[inline(always)]
fn inverses(scale: &Lanes) -> Lanes {
    scale.map(|s| if s == 0.0 { 0.0 } else { 1.0 / s })
}

#[inline(always)]
fn select(which: &[bool; LANES], old: &mut Lanes, new: &Lanes) {
    for l in 0..LANES {
        if which[l] {
            old[l] = new[l];
        }
    }
}

/// Which weights a sparse format keeps: those of most `w^2 D`, the least loss if a weight alone were pruned and the later
/// ones made up for it (SparseGPT, section 3.2). The factor is in the columns' order.
pub(super) fn keep(pattern: SparsePattern, factor: &Factor, w: &[Lanes], rows: usize) -> Vec<Lanes> {
    let mut kept = vec![ZERO; w.len()];
    for lane in 0..rows {
        let score = |(w, d): (&Lanes, &f32)| w[lane].abs() * d.max(0.0).sqrt();
        let scores: Vec<f32> = w.iter().zip(&factor.weights).map(score).collect();
        for col in pattern.kept_columns(&scores) {
            kept[col][lane] = 1.0;
        }
    }
    kept
}
