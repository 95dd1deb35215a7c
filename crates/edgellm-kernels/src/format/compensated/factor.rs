//! The second moments of a matrix's inputs, and the factors that error feedback needs.
//!
//! With `H = sum_t x_t x_t^T`, an error `e` of a row costs `e^T H e`. For an order of the columns, `H + damping` is factored
//! as `(U + I) D (U + I)^T` with `U` strictly upper triangular and `D` diagonal. Then
//!
//! `e^T H e = sum_k D_k (e_k + sum_{i < k} e_i U_ik)^2`:
//!
//! a column that is rounded after the errors of the columns before it were added to it in the proportions `U_ik` costs
//! only its own rounding, weighed with `D_k`, the part of its input that the later columns cannot predict (QuIP, Chee et
//! al., arXiv 2307.13304, section 3.1, which shows that this is GPTQ, arXiv 2210.17323).

use std::sync::OnceLock;

use rayon::prelude::*;

use crate::arch::{Kernel, vectorized};
use crate::error::{KernelError, Result};

/// Columns that are eliminated together.
const STRIP: usize = 48;

/// Second moments of a matrix's inputs, `H = sum_t x_t x_t^T` times any factor, and its factorizations, which are
/// computed when they are first needed.
#[derive(Debug)]
pub struct InputGram {
    cols: usize,
    values: Vec<f32>,
    damping: f64,
    natural: OnceLock<Factor>,
    by_energy: OnceLock<Factor>,
}

/// A factorization for one order of the columns. Everything is in that order.
#[derive(Debug)]
pub(super) struct Factor {
    /// Column of every place.
    pub(super) order: Vec<u32>,
    /// Column `k` of `U` from `k (k - 1) / 2` on: `U_0k .. U_(k-1)k`.
    upper: Vec<f32>,
    /// `D`.
    pub(super) weights: Vec<f32>,
    /// `H` with the damping, `[cols, cols]`.
    pub(super) gram: Vec<f32>,
}

impl Factor {
    /// `U_ik` for all `i < k`.
    pub(super) fn above(&self, k: usize) -> &[f32] {
        let start = k * k.saturating_sub(1) / 2;
        &self.upper[start..start + k]
    }
}

impl InputGram {
    /// The moments `values`, row-major `[cols, cols]`. `damping` times the mean of the diagonal is added to the diagonal:
    /// columns that were never active in the sample are not free, and the factorization exists.
    ///
    /// # Errors
    /// [`KernelError::Length`] if there are not `cols^2` values; [`KernelError::NonFinite`] if one is not finite, one of
    /// the diagonal is negative, or the damping is not above 0.
    pub fn new(cols: usize, values: Vec<f32>, damping: f64) -> Result<Self> {
        if values.len() != cols * cols {
            let layout = format!("{cols} columns");
            let (expected, found) = (cols * cols, values.len());
            return Err(KernelError::Length { what: "second moments of inputs", layout, expected, found });
        }
        let bad = |i: usize| !values[i].is_finite() || (i / cols == i % cols && values[i] < 0.0);
        if let Some(at) = (0..values.len()).find(|&i| bad(i)) {
            return Err(KernelError::NonFinite { row: at / cols, col: at % cols, value: values[at].to_string() });
        }
        if !damping.is_finite() || damping <= 0.0 {
            return Err(KernelError::NonFinite { row: 0, col: 0, value: format!("a damping of {damping}") });
        }
        Ok(Self { cols, values, damping, natural: OnceLock::new(), by_energy: OnceLock::new() })
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `H`, row-major `[cols, cols]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The diagonal of `H`: the energy of every column.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.cols).map(|i| self.values[i * (self.cols + 1)]).collect()
    }

    /// `sum_r e_r^T H e_r` over the rows of `errors`, row-major `[rows, cols]`: the squared error of the outputs.
    ///
    /// # Panics
    /// If there is no whole number of rows.
    pub fn output_error(&self, errors: &[f32]) -> f64 {
        assert!(errors.len().is_multiple_of(self.cols), "rows of {} errors", self.cols);
        let kernel = Kernel::active();
        let of_row = |e: &[f32]| {
            vectorized(kernel, || {
                let products = self.values.chunks(self.cols).zip(e).map(|(h, &factor)| f64::from(factor * dot(h, e)));
                products.sum::<f64>()
            })
        };
        errors.par_chunks(self.cols).map(of_row).collect::<Vec<f64>>().into_iter().sum()
    }

    /// The factors for columns in their order, or for those of most energy first.
    pub(super) fn factor(&self, by_energy: bool) -> &Factor {
        let cell = if by_energy { &self.by_energy } else { &self.natural };
        cell.get_or_init(|| {
            let mut order: Vec<u32> = (0..self.cols as u32).collect();
            if by_energy {
                let energy = self.diagonal();
                order.sort_by(|&a, &b| energy[b as usize].total_cmp(&energy[a as usize]).then(a.cmp(&b)));
            }
            self.factorize(order)
        })
    }

    fn factorize(&self, order: Vec<u32>) -> Factor {
        let n = self.cols;
        let mean = self.diagonal().iter().map(|v| f64::from(*v)).sum::<f64>() / n as f64;
        // An input that is always zero: any order and any rounding will do.
        let added = if mean > 0.0 { self.damping * mean } else { 1.0 };
        let at = |i: usize, j: usize| {
            let value = self.values[order[i] as usize * n + order[j] as usize];
            f64::from(value) + if i == j { added } else { 0.0 }
        };
        let gram = (0..n * n).into_par_iter().map(|i| at(i / n, i % n) as f32).collect();
        // `(U + I) D (U + I)^T` read backwards is `L D L^T`.
        let mut lower: Vec<f64> = (0..n * n).into_par_iter().map(|i| at(n - 1 - i / n, n - 1 - i % n)).collect();
        let pivots = eliminate(&mut lower, n, 1e-9 * added);
        let upper = (0..n).flat_map(|k| (0..k).map(move |i| (n - 1 - i, n - 1 - k)));
        let upper = upper.map(|(i, k)| lower[i * n + k] as f32).collect();
        Factor { order, upper, weights: pivots.iter().rev().map(|d| *d as f32).collect(), gram }
    }
}

/// The product of two vectors, in an order that vectorizes.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a16.zip(b16) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Turns the lower triangle of a symmetric matrix into `L` of `L D L^T`, below the diagonal, and gives `D`; a pivot is at
/// least `least`.
///
/// Strip by strip: the strip's own triangle, then the rows below it, then what is right of it.
fn eliminate(a: &mut [f64], n: usize, least: f64) -> Vec<f64> {
    let kernel = Kernel::active();
    let mut pivots = vec![0.0; n];
    for start in (0..n).step_by(STRIP) {
        let end = n.min(start + STRIP);
        for j in start..end {
            let (above, row) = a.split_at_mut(j * n);
            let row = &mut row[..n];
            solve(row, above, &pivots, start, j, n);
            let known: f64 = (start..j).map(|p| row[p] * row[p] * pivots[p]).sum();
            pivots[j] = (row[j] - known).max(least);
        }
        let (top, below) = a.split_at_mut(end * n);
        below.par_chunks_mut(n).for_each(|row| solve(row, top, &pivots, start, end, n));
        // `below` holds `L` of this strip now; what is right of it loses the strip's part.
        let strips: Vec<f64> = below.chunks(n).flat_map(|row| &row[start..end]).copied().collect();
        let (width, pivots) = (end - start, &pivots[start..end]);
        below.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
            vectorized(kernel, || {
                let scaled: Vec<f64> = (0..width).map(|p| row[start + p] * pivots[p]).collect();
                for (value, other) in row[end..=end + i].iter_mut().zip(strips.chunks(width)) {
                    *value -= dot64(&scaled, other);
                }
            });
        });
    }
    pivots
}

/// The places `start..end` of a row of `L`, from the rows above it.
fn solve(row: &mut [f64], above: &[f64], pivots: &[f64], start: usize, end: usize, n: usize) {
    for j in start..end {
        let known: f64 = (start..j).map(|p| row[p] * above[j * n + p] * pivots[p]).sum();
        row[j] = (row[j] - known) / pivots[j];
    }
}

fn dot64(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0f64; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(in super::super) fn gram(cols: usize, tokens: usize) -> Vec<f32> {
        let x: Vec<f32> = (0..tokens * cols)
            .map(|i| {
                let (t, c) = (i / cols, i % cols);
                ((t * 37 + 11) as f32 * (c / 3 + 1) as f32).sin() + 0.3 * ((t * c * 13 + c) as f32).cos()
            })
            .collect();
        let at = |i: usize, j: usize| (0..tokens).map(|t| x[t * cols + i] * x[t * cols + j]).sum::<f32>();
        (0..cols * cols).map(|i| at(i / cols, i % cols)).collect()
    }

    #[test]
    fn the_factors_multiply_to_the_moments() {
        for n in [1, 2, 47, 48, 49, 130] {
            let gram = InputGram::new(n, gram(n, 2 * n + 3), 0.01).unwrap();
            for by_energy in [false, true] {
                let factor = gram.factor(by_energy);
                let u = |i: usize, k: usize| match i.cmp(&k) {
                    std::cmp::Ordering::Less => f64::from(factor.above(k)[i]),
                    std::cmp::Ordering::Equal => 1.0,
                    std::cmp::Ordering::Greater => 0.0,
                };
                let scale = gram.diagonal().iter().copied().fold(0.0f32, f32::max);
                for i in 0..n {
                    for j in 0..n {
                        let product: f64 = (0..n).map(|k| u(i, k) * f64::from(factor.weights[k]) * u(j, k)).sum();
                        let expected = f64::from(factor.gram[i * n + j]);
                        assert!((product - expected).abs() < 1e-4 * f64::from(scale), "{n}: {i}, {j}");
                    }
                }
            }
            let energy = gram.diagonal();
            let order = &gram.factor(true).order;
            assert!(order.windows(2).all(|p| energy[p[0] as usize] >= energy[p[1] as usize]));
        }
    }

    #[test]
    fn the_output_error_is_the_inputs_products() {
        let n = 20;
        let gram = InputGram::new(n, gram(n, 33), 0.01).unwrap();
        let e: Vec<f32> = (0..2 * n).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut expected = 0.0;
        for row in e.chunks(n) {
            for i in 0..n {
                for j in 0..n {
                    expected += f64::from(row[i]) * f64::from(gram.values()[i * n + j]) * f64::from(row[j]);
                }
            }
        }
        assert!((gram.output_error(&e) - expected).abs() < 1e-4 * expected);
    }

    #[test]
    fn bad_moments_are_refused_and_zeros_are_not() {
        assert!(InputGram::new(2, vec![1.0; 3], 0.01).is_err());
        assert!(InputGram::new(1, vec![f32::NAN], 0.01).is_err());
        assert!(InputGram::new(1, vec![-1.0], 0.01).is_err());
        assert!(InputGram::new(1, vec![1.0], 0.0).is_err());
        let silent = InputGram::new(3, vec![0.0; 9], 0.01).unwrap();
        assert_eq!(silent.factor(true).weights, [1.0; 3]);
    }
}
