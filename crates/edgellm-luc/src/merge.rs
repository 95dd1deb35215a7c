//! Merging a low-rank adapter into its base: `W' = Q(W + s B A)`, streamed matrix by matrix into a new model directory.
//!
//! A float format holds the sum as it is (f32 exactly, 16 bits rounded to nearest). A packed base is on a grid, and most
//! updates are smaller than half of its step: rounded to the nearest code, they vanish, and where they do not, what is
//! rounded is noise against them. So the grids are searched ([`PackedHost::requantize`]), and the errors of every row are made
//! to cancel in the directions in which the adapter reads: with the rows of `A` orthonormalised to `u_k`,
//!
//! `sum_j d_j |E_j|^2 + sum_k c_k |E u_k|^2` is minimised over the codes, where `E = W + s B A - Q`.
//!
//! Because `s B A` lies wholly in these directions, `E u_k = 0` means that the update survives in full: `<Q - W, s B A>`
//! is `|s B A|^2`. The price is a larger `E` elsewhere. What is worth what, `d_j` and `c_k`, the activations of a text
//! say ([`InputMoments`]); without one, `d_j` is 1 and `c_k` a constant.

mod inputs;

use std::path::Path;

use edgellm_kernels::{Lora, PackedHost, PackedLayout, RoundingGoal};
use edgellm_model::ModelError;
use edgellm_model::adapter::Adapter;
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::to_vec;
use edgellm_model::save::ModelWriter;
use edgellm_model::values::{CompressionPolicy, LayerFormat, Unit};
use rayon::prelude::*;

use crate::apply::{Applied, check_replaceable, uniform_policy, unit_of};
use crate::cost::bits_per_weight;
use crate::error::Result;
use crate::progress::Progress;

pub use self::inputs::InputMoments;

/// What the rounding of a merged matrix weighs its errors by.
#[derive(Clone, Copy, Debug)]
pub enum Aim<'a> {
    /// All columns alike, and errors in the adapter's directions by this much more; 0 asks for the least error of the
    /// weights alone.
    Constant(f32),
    /// Both by the activations of a text.
    Inputs(&'a InputMoments),
}

/// How an adapter is merged.
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions<'a> {
    /// The format of every matrix of the result; `None` keeps each in its own.
    pub format: Option<LayerFormat>,
    /// What errors are weighed by.
    pub aim: Aim<'a>,
}

impl Default for MergeOptions<'_> {
    fn default() -> Self {
        Self { format: None, aim: Aim::Constant(10.0) }
    }
}

/// What became of the update of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedMatrix {
    /// The matrix, by its Hugging Face name.
    pub tensor: String,
    /// Its format in the result.
    pub format: String,
    /// `|dW| / |W|`, in Frobenius norms, with `dW = s B A`.
    pub update: f64,
    /// The share of the update that is in the result: `<Q - W, dW> / |dW|^2`; 1 where there is no update.
    pub survived: f64,
    /// What is not the update: `|Q - W - dW| / |dW|`; 0 where there is no update.
    pub residual: f64,
}

/// What [`merge_adapter`] did.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    /// Sizes of the two models.
    pub applied: Applied,
    /// The matrices that the adapter changes, in the order of the files.
    pub matrices: Vec<MergedMatrix>,
    /// [`MergedMatrix::survived`] of all of them together.
    pub survived: f64,
    /// [`MergedMatrix::residual`] of all of them together.
    pub residual: f64,
}

/// Merges an adapter into a model's files and writes the model directory `out_dir`, which appears only when it is
/// complete. What the adapter does not change is copied. Its exit norms lie in the directory in the file that an
/// adapter's directory has them in, and are found when the model is loaded.
///
/// With `force`, a model (or an empty folder) at `out_dir` is replaced; nothing else ever is. About one matrix in f32 is in
/// memory at a time.
///
/// # Errors
/// The adapter has no update or does not fit the model (its first matrix that does not is named); a tensor cannot be
/// read or does not fit the format; `out_dir` exists without `force`, or is no model, or cannot be written, and is then
/// as it was.
pub fn merge_adapter(
    files: &ModelFiles,
    adapter: &Adapter,
    options: &MergeOptions<'_>,
    out_dir: &Path,
    force: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Merged> {
    check(files, adapter, options)?;
    check_replaceable(out_dir, force, "a model", |_| true)?;
    let format = options.format.map(|format| format.packed()).transpose()?;
    let layout_of = |_: &str, found: PackedLayout| match format {
        None => Ok(found),
        Some(format) => Ok(PackedLayout::new(found.rows, found.cols, format)?),
    };
    let mut writer = ModelWriter::create_as(out_dir, files, policy(files, options)?, layout_of)?;
    adapter.write_exits(writer.dir())?;
    let layouts = writer.layouts().clone();
    let (mut sums, mut matrices, mut bytes, mut weights) = (Sums::default(), Vec::new(), 0, 0);
    for (index, (name, layout)) in layouts.iter().enumerate() {
        progress(Progress { done: index, total: layouts.len(), what: name });
        let source = files.matrix(name)?;
        let packed = match update_of(adapter, name)? {
            None if source.layout == *layout => source,
            None => {
                let goal = RoundingGoal::new(layout.cols);
                PackedHost::requantize(&source.dequantize(), *layout, Some(&source), &goal)?
            }
            Some(update) => {
                let (packed, of_matrix) = update.merge(&source, *layout, &update.goal(name, options.aim)?)?;
                matrices.push(of_matrix.report(name, *layout));
                sums.add(&of_matrix);
                packed
            }
        };
        writer.write(name, &packed)?;
        files.release(name);
        bytes += layout.bytes();
        weights += layout.rows as u64 * layout.cols as u64;
    }
    writer.finish(force)?;
    progress(Progress { done: layouts.len(), total: layouts.len(), what: "model.safetensors" });
    let bytes_after = ModelFiles::open(out_dir)?.file_bytes();
    let bits_per_weight = bits_per_weight(bytes, weights);
    let applied = Applied { bytes_before: files.file_bytes(), bytes_after, bits_per_weight };
    Ok(Merged { applied, matrices, survived: sums.survived(), residual: sums.residual() })
}

fn check(files: &ModelFiles, adapter: &Adapter, options: &MergeOptions<'_>) -> Result<()> {
    adapter.check_fits(files.config())?;
    let bad = |what: &str, expected: &str, found: String| {
        Err(ModelError::Value { what: what.into(), expected: expected.into(), found }.into())
    };
    if !adapter.has_updates() {
        return bad("adapter to merge", "a low-rank update", "none".into());
    }
    match options.aim {
        Aim::Constant(weight) if !weight.is_finite() || weight < 0.0 => {
            bad("weight of the adapter's directions", "at least 0", weight.to_string())
        }
        _ => Ok(()),
    }
}

/// The policy that the result's formats follow.
fn policy(files: &ModelFiles, options: &MergeOptions<'_>) -> Result<Option<CompressionPolicy>> {
    match options.format {
        None => Ok(files.quantization().and_then(|q| q.policy.clone())),
        Some(format) => Ok(Some(uniform_policy(files.config().n_layers, format)?)),
    }
}

/// The update of one matrix, on the host.
struct Update {
    /// `[rank, cols]`.
    a: Vec<f32>,
    /// `[rows, rank]`.
    b: Vec<f32>,
    rank: usize,
    scaling: f32,
}

/// The adapter's update of a tensor, if it has one.
fn update_of(adapter: &Adapter, name: &str) -> Result<Option<Update>> {
    let Some(Unit::Linear(block, projection)) = unit_of(name) else { return Ok(None) };
    let Some(Lora { a, b, scaling }) = adapter.block(block).and_then(|block| block.get(projection)) else {
        return Ok(None);
    };
    let rank = a.dims()[0];
    Ok(Some(Update { a: to_vec(a.clone())?, b: to_vec(b.clone())?, rank, scaling: *scaling }))
}

impl Update {
    /// Row `row` of `s B A`, into `out`.
    fn row(&self, row: usize, out: &mut [f32]) {
        out.fill(0.0);
        let b = &self.b[row * self.rank..(row + 1) * self.rank];
        for (a, b) in self.a.chunks(out.len()).zip(b) {
            let factor = self.scaling * b;
            out.iter_mut().zip(a).for_each(|(out, a)| *out += factor * a);
        }
    }

    /// What the rounding of the tensor `name` is to preserve.
    fn goal(&self, name: &str, aim: Aim<'_>) -> Result<RoundingGoal> {
        let cols = self.a.len() / self.rank;
        match (aim, unit_of(name)) {
            (Aim::Inputs(inputs), Some(Unit::Linear(block, projection))) => match inputs.of(block, projection) {
                Some(moments) => moments.goal(),
                None => Ok(RoundingGoal::new(cols)),
            },
            (Aim::Constant(weight), _) if weight > 0.0 => {
                let basis = orthonormal(&self.a, cols);
                let k = basis.len();
                let directions = (0..cols * k).map(|i| weight.sqrt() * basis[i % k][i / k] as f32).collect();
                Ok(RoundingGoal::new(cols).with_directions(directions, k)?)
            }
            _ => Ok(RoundingGoal::new(cols)),
        }
    }

    fn merge(&self, source: &PackedHost, layout: PackedLayout, goal: &RoundingGoal) -> Result<(PackedHost, Sums)> {
        let cols = layout.cols;
        let mut values = source.dequantize();
        values.par_chunks_mut(cols).enumerate().for_each_init(
            || vec![0.0; cols],
            |delta, (row, values)| {
                self.row(row, delta);
                values.iter_mut().zip(delta.iter()).for_each(|(value, delta)| *value += delta);
            },
        );
        let packed = PackedHost::requantize(&values, layout, Some(source), goal)?;
        drop(values);
        let rows: Vec<Sums> = (0..layout.rows)
            .into_par_iter()
            .map_init(
                || [vec![0.0; cols], vec![0.0; cols], vec![0.0; cols]],
                |[delta, before, after], row| {
                    self.row(row, delta);
                    source.dequantize_row(row, before);
                    packed.dequantize_row(row, after);
                    Sums::of(before, after, delta)
                },
            )
            .collect();
        let mut sums = Sums::default();
        rows.iter().for_each(|row| sums.add(row));
        Ok((packed, sums))
    }
}

/// An orthonormal basis of the rows of `a`, `[rank, cols]`; fewer where they depend on each other.
///
/// Modified Gram-Schmidt, each row twice, in f64.
fn orthonormal(a: &[f32], cols: usize) -> Vec<Vec<f64>> {
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut basis: Vec<Vec<f64>> = Vec::new();
    for row in a.chunks(cols) {
        let mut v: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        let length = norm(&v);
        for _ in 0..2 {
            for u in &basis {
                let dot: f64 = u.iter().zip(&v).map(|(u, v)| u * v).sum();
                v.iter_mut().zip(u).for_each(|(v, u)| *v -= dot * u);
            }
        }
        let left = norm(&v);
        if left > 1e-6 * length {
            v.iter_mut().for_each(|x| *x /= left);
            basis.push(v);
        }
    }
    basis
}

/// Squared norms and products of a part of a matrix.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// `|W|^2`.
    base: f64,
    /// `|dW|^2`.
    update: f64,
    /// `<Q - W, dW>`.
    kept: f64,
    /// `|Q - W - dW|^2`.
    error: f64,
}

impl Sums {
    fn of(before: &[f32], after: &[f32], delta: &[f32]) -> Self {
        let mut sums = Self::default();
        for ((before, after), delta) in before.iter().zip(after).zip(delta) {
            let (before, after, delta) = (f64::from(*before), f64::from(*after), f64::from(*delta));
            sums.base += before * before;
            sums.update += delta * delta;
            sums.kept += (after - before) * delta;
            sums.error += (after - before - delta).powi(2);
        }
        sums
    }

    fn add(&mut self, other: &Self) {
        self.base += other.base;
        self.update += other.update;
        self.kept += other.kept;
        self.error += other.error;
    }

    fn survived(&self) -> f64 {
        if self.update > 0.0 { self.kept / self.update } else { 1.0 }
    }

    fn residual(&self) -> f64 {
        if self.update > 0.0 { (self.error / self.update).sqrt() } else { 0.0 }
    }

    fn report(&self, name: &str, layout: PackedLayout) -> MergedMatrix {
        MergedMatrix {
            tensor: name.to_owned(),
            format: layout.format.name(),
            update: if self.base > 0.0 { (self.update / self.base).sqrt() } else { f64::INFINITY },
            survived: self.survived(),
            residual: self.residual(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_basis_is_orthonormal_and_spans() {
        let cols = 7;
        let mut a: Vec<f32> = (0..3 * cols).map(|i| ((i * 37 % 23) as f32 - 11.0) / 7.0).collect();
        // A row that is the sum of two others, and one of zeros.
        let sum: Vec<f32> = (0..cols).map(|i| a[i] + a[cols + i]).collect();
        a.extend(sum);
        a.extend(vec![0.0; cols]);
        let basis = orthonormal(&a, cols);
        assert_eq!(basis.len(), 3);
        for (i, u) in basis.iter().enumerate() {
            for (j, v) in basis.iter().enumerate() {
                let dot: f64 = u.iter().zip(v).map(|(a, b)| a * b).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-9, "{i} {j} {dot}");
            }
        }
    }
}
