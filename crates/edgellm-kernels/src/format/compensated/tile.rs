//! Sixteen rows of a matrix at a time, a row a lane.
//!
//! The loops with most work are functions of their own, each compiled for the instruction set in use: in a longer function
//! the compiler leaves lanes in memory, and works on them one by one.

use super::factor::Factor;
use crate::arch::{Kernel, Vectorized, run_vectorized};
use crate::format::refit::{Grid, Rounded};
use crate::format::{QuantFormat, SparsePattern};

/// Rows of a tile.
pub(super) const LANES: usize = 16;

pub(super) type Lanes = [f32; LANES];
pub(super) const ZERO: Lanes = [0.0; LANES];
const ONES: Lanes = [1.0; LANES];

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
    kernel: Kernel,
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
        Tile {
            kernel: Kernel::active(),
            format,
            factor,
            rows,
            w,
            kept,
            groups,
            grids,
            codes: vec![ZERO; cols],
            errors: vec![ZERO; cols],
            best,
        }
    }

    /// Rounds all rows; grids are fitted again to the codes `refits` times.
    pub(super) fn round(&mut self, refits: usize) {
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

    fn top(&self) -> f32 {
        ((1u32 << self.format.bit_width) - 1) as f32
    }

    fn centre(&self) -> f32 {
        if self.format.symmetric { self.format.zero_point() as f32 } else { 0.0 }
    }

    #[inline(always)]
    fn kept(&self, place: u32) -> Lanes {
        self.kept.get(place as usize).copied().unwrap_or(ONES)
    }

    /// The grid of a group with the least error of its weights, each rounded on its own and weighed by `D`.
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
        let centre = self.centre();
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
                let trial = Trial { tile: self, group, scale: &scale, min: &min };
                let (error, fitted) = run_vectorized(self.kernel, trial);
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
    fn feed_forward(&mut self) {
        let top = self.top();
        let group_size = usize::from(self.format.group_size);
        let inverse: Vec<Lanes> = self.grids.scale.iter().map(inverses).collect();
        let mut loss = ZERO;
        let n = self.w.len();
        for k in 0..n {
            let place = self.factor.order[k] as usize / group_size;
            let (before, from) = self.errors.split_at_mut(k);
            let fed = Feedback { factors: self.factor.above(k), errors: before, start: &self.w[k] };
            let target = run_vectorized(self.kernel, fed);
            let column = Column {
                target: &target,
                w: &self.w[k],
                kept: self.kept.get(k).unwrap_or(&ONES),
                scale: &self.grids.scale[place],
                min: &self.grids.min[place],
                inverse: &inverse[place],
                weight: self.factor.weights[k],
                top,
                code: &mut self.codes[k],
                error: &mut from[0],
                loss: &mut loss,
            };
            run_vectorized(self.kernel, column);
        }
        self.keep_best(loss);
    }

    /// Rows that were rounded better than before are kept.
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
    fn refit(&mut self, group: usize) {
        let n = self.w.len();
        let centre = self.centre();
        let mut sums = Normal::default();
        for &i in &self.groups[group] {
            let row = &self.factor.gram[i as usize * n..(i as usize + 1) * n];
            // `H e`, and `H` applied to the codes and to ones, at the member.
            let of_errors = run_vectorized(self.kernel, Feedback { factors: row, errors: &self.errors, start: &ZERO });
            let (of_codes, of_ones) = run_vectorized(self.kernel, OfCodes { tile: self, group, row, centre });
            let (kept, codes) = (self.kept(i), &self.codes[i as usize]);
            run_vectorized(
                self.kernel,
                Sums { sums: &mut sums, codes, kept: &kept, centre, of_errors, of_codes, of_ones },
            );
        }
        let (ds, dm) = sums.solve(self.format.symmetric);
        for &i in &self.groups[group] {
            let kept = self.kept(i);
            let (codes, error) = (&self.codes[i as usize], &mut self.errors[i as usize]);
            run_vectorized(self.kernel, Moved { codes, kept: &kept, centre, ds: &ds, dm: &dm, error });
        }
        for l in 0..LANES {
            self.grids.scale[group][l] += ds[l];
            self.grids.min[group][l] += if self.format.symmetric { -ds[l] * centre } else { dm[l] };
        }
    }
}

/// One grid for a group: the error of the group on it, each weight rounded on its own and weighed by `D`, and scale and
/// minimum that fit the grid's codes best.
struct Trial<'t, 'a> {
    tile: &'t Tile<'a>,
    group: usize,
    scale: &'t Lanes,
    min: &'t Lanes,
}

impl Vectorized for Trial<'_, '_> {
    type Output = (Lanes, (Lanes, Lanes));

    #[inline(always)]
    fn run(self) -> Self::Output {
        let Self { tile, group, scale, min } = self;
        let (top, centre, inverse) = (tile.top(), tile.centre(), inverses(scale));
        let (mut error, mut n, mut c, mut cc, mut v, mut cv) = (ZERO, ZERO, ZERO, ZERO, ZERO, ZERO);
        for &place in &tile.groups[group] {
            let (w, kept, d) = (&tile.w[place as usize], tile.kept(place), tile.factor.weights[place as usize]);
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
            if tile.format.symmetric {
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
}

/// Rounds a column whose feedback is known.
struct Column<'t> {
    target: &'t Lanes,
    w: &'t Lanes,
    kept: &'t Lanes,
    scale: &'t Lanes,
    min: &'t Lanes,
    inverse: &'t Lanes,
    weight: f32,
    top: f32,
    code: &'t mut Lanes,
    error: &'t mut Lanes,
    loss: &'t mut Lanes,
}

impl Vectorized for Column<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { target, w, kept, scale, min, inverse, weight, top, code, error, loss } = self;
        for l in 0..LANES {
            let rounded = ((target[l] - min[l]) * inverse[l] + 0.5).floor().clamp(0.0, top);
            let value = (rounded * scale[l] + min[l]) * kept[l];
            code[l] = rounded;
            error[l] = w[l] - value;
            loss[l] += weight * (target[l] - value) * (target[l] - value);
        }
    }
}

/// A row of `H` applied to the codes of a group, and to ones.
struct OfCodes<'t, 'a> {
    tile: &'t Tile<'a>,
    group: usize,
    row: &'t [f32],
    centre: f32,
}

impl Vectorized for OfCodes<'_, '_> {
    type Output = (Lanes, Lanes);

    #[inline(always)]
    fn run(self) -> Self::Output {
        let Self { tile, group, row, centre } = self;
        let (mut of_codes, mut of_ones) = (ZERO, ZERO);
        for &j in &tile.groups[group] {
            let (h, codes, kept) = (row[j as usize], &tile.codes[j as usize], tile.kept(j));
            for l in 0..LANES {
                of_codes[l] += h * (codes[l] - centre) * kept[l];
            }
            for l in 0..LANES {
                of_ones[l] += h * kept[l];
            }
        }
        (of_codes, of_ones)
    }
}

/// The normal equations for a group's scale and minimum, with `c` the codes, `o` ones and `r` the errors.
#[derive(Default)]
struct Normal {
    cr: Lanes,
    or: Lanes,
    cc: Lanes,
    co: Lanes,
    oo: Lanes,
}

impl Normal {
    /// What is added to the scale and to the minimum.
    fn solve(&self, symmetric: bool) -> (Lanes, Lanes) {
        let Self { cr, or, cc, co, oo } = self;
        let (mut ds, mut dm) = (ZERO, ZERO);
        for l in 0..LANES {
            if symmetric {
                ds[l] = if cc[l] > 0.0 { cr[l] / cc[l] } else { 0.0 };
            } else {
                let det = cc[l] * oo[l] - co[l] * co[l];
                if det > 1e-6 * cc[l] * oo[l] {
                    ds[l] = (cr[l] * oo[l] - or[l] * co[l]) / det;
                    dm[l] = (cc[l] * or[l] - co[l] * cr[l]) / det;
                }
            }
        }
        (ds, dm)
    }
}

/// Adds one member's part to the normal equations.
struct Sums<'t> {
    sums: &'t mut Normal,
    codes: &'t Lanes,
    kept: &'t Lanes,
    centre: f32,
    of_errors: Lanes,
    of_codes: Lanes,
    of_ones: Lanes,
}

impl Vectorized for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { sums, codes, kept, centre, of_errors, of_codes, of_ones } = self;
        for l in 0..LANES {
            let code = (codes[l] - centre) * kept[l];
            sums.cr[l] += code * of_errors[l];
            sums.or[l] += kept[l] * of_errors[l];
            sums.cc[l] += code * of_codes[l];
            sums.co[l] += code * of_ones[l];
            sums.oo[l] += kept[l] * of_ones[l];
        }
    }
}

/// The errors of a column after its group's grid moved.
struct Moved<'t> {
    codes: &'t Lanes,
    kept: &'t Lanes,
    centre: f32,
    ds: &'t Lanes,
    dm: &'t Lanes,
    error: &'t mut Lanes,
}

impl Vectorized for Moved<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { codes, kept, centre, ds, dm, error } = self;
        for l in 0..LANES {
            error[l] -= ((codes[l] - centre) * ds[l] + dm[l]) * kept[l];
        }
    }
}

/// `start + sum_i factors[i] * errors[i]`.
pub(super) struct Feedback<'t> {
    pub(super) factors: &'t [f32],
    pub(super) errors: &'t [Lanes],
    pub(super) start: &'t Lanes,
}

impl Vectorized for Feedback<'_> {
    type Output = Lanes;

    #[inline(always)]
    fn run(self) -> Lanes {
        let mut sums = ZERO;
        let (factors4, factors) = self.factors.as_chunks::<4>();
        let (errors4, errors) = self.errors.as_chunks::<4>();
        for (f, e) in factors4.iter().zip(errors4) {
            for l in 0..LANES {
                sums[l] += (f[0] * e[0][l] + f[1] * e[1][l]) + (f[2] * e[2][l] + f[3] * e[3][l]);
            }
        }
        for (f, e) in factors.iter().zip(errors) {
            for l in 0..LANES {
                sums[l] += f * e[l];
            }
        }
        for (sum, start) in sums.iter_mut().zip(self.start) {
            *sum += start;
        }
        sums
    }
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
