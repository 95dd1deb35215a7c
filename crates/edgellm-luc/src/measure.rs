//! Sensitivities: what compressing one unit alone changes, close by and at the end.
//!
//! **Local.** For unit `l` and option `o`, on tokens `t`:
//!
//! `S_l(o) = mean_t [ MSE_i(f_l^o(x_t)_i, f_l(x_t)_i) / Var_i(f_l(x_t)_i) ]`
//!
//! with `x` the *uncompressed* model's input to the unit and `i` the features of the output. This is the layer-wise
//! measure of EDGE-LLM (arXiv 2406.15758, section 3.1), made comparable between units by the variance. Three choices
//! are ours:
//!
//! - The variance is that of each token's own output, not of all outputs together. A few tokens (most often the first)
//!   carry activations hundreds of times larger than all others (Sun et al., "Massive Activations in Large Language
//!   Models", 2024); over all tokens they alone would make up both the error and the variance. A token whose variance is
//!   below a millionth of the mean is divided by that millionth.
//! - `f` of a block is its output: the residual stream with the block's update added. That is what the next block
//!   sees, behind an RMSNorm that looks only at proportions, so the error relative to the stream is what counts; relative
//!   to the update alone, a block that adds little would weigh as much as one that adds all. With granularity `linear`,
//!   `f` is the same output with only one projection compressed: relative to the projection's own output, a small key
//!   projection would weigh as much as the whole embedding.
//! - The embedding's output is the row of each calibration token, so rows weigh as often as they occur. Where the head
//!   is tied to it, the two normalised errors are added. The head's output is the logits on the final hidden states.
//!
//! **End to end.** `K_l(o) = mean_t KL(p(.|t) || p_o(.|t))` with only unit `l` compressed: its outputs run through the
//! rest of the model. Counted are the tokens of the second half of every window, which have seen some text.
//!
//! Compressors that look at inputs get the moments of the whole calibration text; outputs are compared on a part of it (the
//! beginnings of some windows), because every option of every unit runs through all later blocks.
//!
//! Blocks are taken one by one with the hidden states of all calibration tokens: memory is the model, those states, the
//! base's log-probabilities of the counted tokens and a few copies of one block in f32.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use edgellm_kernels::{InputGram, PackedHost};
use edgellm_model::ModelError;
use edgellm_model::decoder::{Decoder, Linear, Weight};
use edgellm_model::generate::to_vec;
use edgellm_model::traits::Compressor;
use edgellm_model::values::{
    Granularity, LayerFormat, MatrixShape, Measurement, Projection, Unit, UnitMeasurement, Value,
};

use crate::calibrate::{DAMPING, Site, States, TIED_DAMPING};
use crate::digest::calibration_digest;
use crate::error::{LucError, Result};
use crate::outputs::Outputs;
use crate::progress::Progress;
use crate::weights::{DenseBlock, HostWeight, tensor};

/// Rows of the vocabulary that are held as f32 at a time.
const VOCAB_CHUNK: usize = 4096;
/// Tokens of all options that run through the rest of the model together, about.
const TOGETHER: usize = 4096;

/// What is measured, and how.
#[derive(Clone, Copy)]
pub struct Trials<'a> {
    /// The formats to try.
    pub options: &'a [LayerFormat],
    /// Whole blocks or single projections.
    pub granularity: Granularity,
    /// What brings a matrix into a format.
    pub compressor: &'a dyn Compressor,
    /// Windows of token ids that do not see each other.
    pub calibration: &'a [Vec<u32>],
    /// Windows whose outputs are compared, evenly spaced among all.
    pub compared_windows: usize,
    /// Tokens from the beginning of a compared window.
    pub compared_length: usize,
}

/// The beginnings of `n` windows, evenly spaced among those that are not empty: what models are compared on.
pub fn beginnings(windows: &[Vec<u32>], n: usize, length: usize) -> Vec<Vec<u32>> {
    let windows: Vec<&Vec<u32>> = windows.iter().filter(|w| !w.is_empty()).collect();
    let n = n.min(windows.len());
    (0..n).map(|i| windows[i * windows.len() / n].iter().copied().take(length.max(2)).collect()).collect()
}

/// Measures the sensitivity of every unit for every option.
///
/// The model should compute with f32 activations: rounding them hides small differences. The result's `model` describes the
/// architecture; set it, and `model_digest`, if there are files.
///
/// `known` are units that were measured before with the same trials; they are not measured again. `unit_done` is called
/// with all units so far after each new one, in the order of the result, so that a run that is killed can go on.
///
/// # Errors
/// No option, no token, an id outside the vocabulary, a format that does not exist, weights that are not finite, cannot be
/// read or packed, or activations that overflow; or `unit_done` fails.
pub fn measure(
    decoder: &Decoder,
    trials: &Trials<'_>,
    known: &[UnitMeasurement],
    unit_done: &mut dyn FnMut(&[UnitMeasurement]) -> Result<()>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Measurement> {
    if trials.options.is_empty() {
        return Err(LucError::Nothing { expected: "at least one format" });
    }
    for option in trials.options {
        option.packed()?;
    }
    let config = decoder.config();
    let all = States::embed(decoder, trials.calibration)?;
    let compared = beginnings(trials.calibration, trials.compared_windows.max(1), trials.compared_length);
    let states = States::embed(decoder, &compared)?;
    let per_block = if trials.granularity == Granularity::Linear { Projection::ALL.len() } else { 1 };
    let matrices = if decoder.is_head_tied() { 1 } else { 2 };
    let total = trials.options.len() * (config.n_layers * per_block + matrices);
    let base = Outputs::of(decoder, states.clone().run_rest(decoder, 0)?)?;
    let mut run = Run { decoder, trials, base, known, units: Vec::new(), unit_done, progress, done: 0, total };
    // Known units are in order; the ends come last.
    let (last_all, last) = run.blocks(all, states.clone())?;
    run.ends(&compared, &states, &last_all, &last)?;
    let mut units = run.units;
    let position = units.iter().position(|u| u.unit == Unit::Embedding).unwrap_or(0);
    let embedding = units.remove(position);
    units.insert(0, embedding);
    Ok(Measurement {
        format_version: Measurement::VERSION,
        model: format!("{}, {} blocks, hidden size {}", config.architecture.name, config.n_layers, config.hidden_size),
        model_digest: String::new(),
        compressor: trials.compressor.name().into(),
        granularity: trials.granularity,
        calibration_tokens: trials.calibration.iter().map(Vec::len).sum(),
        compared_tokens: compared.iter().map(Vec::len).sum(),
        calibration_digest: calibration_digest(trials.calibration),
        options: trials.options.to_vec(),
        units,
    })
}

/// `value` to nine significant digits, none behind the 22nd decimal place. Activations are f32, so no more of them mean
/// anything; and decimal numbers of this size are read back from a file as exactly the same f64 by every parser (both the
/// digits and the power of ten are exact in f64), so that a measurement is the same value before and after.
fn rounded(value: f64) -> f64 {
    let magnitude = if value == 0.0 { 0.0 } else { value.abs().log10().floor() };
    let decimals = (8.0 - magnitude).clamp(0.0, 22.0) as usize;
    format!("{value:.decimals$}").parse().unwrap_or(value)
}

struct Run<'a> {
    decoder: &'a Decoder,
    trials: &'a Trials<'a>,
    base: Outputs,
    known: &'a [UnitMeasurement],
    units: Vec<UnitMeasurement>,
    unit_done: &'a mut dyn FnMut(&[UnitMeasurement]) -> Result<()>,
    progress: &'a mut dyn FnMut(Progress<'_>),
    done: usize,
    total: usize,
}

impl Run<'_> {
    fn step(&mut self, what: &str) {
        self.done += 1;
        (self.progress)(Progress { done: self.done, total: self.total, what });
    }

    /// Takes a unit over that was measured before.
    fn take_known(&mut self, unit: Unit) -> bool {
        let known = self.known.iter().find(|known| known.unit == unit);
        let options = self.trials.options.len();
        let Some(known) = known.filter(|k| k.local.len() == options && k.kl.len() == options) else { return false };
        self.units.push(known.clone());
        self.done += options;
        (self.progress)(Progress { done: self.done, total: self.total, what: "measured before" });
        true
    }

    fn push(&mut self, unit: Unit, matrices: Vec<MatrixShape>, mut local: Vec<f64>, mut kl: Vec<f64>) -> Result<()> {
        for values in [&mut local, &mut kl] {
            for (value, option) in values.iter_mut().zip(self.trials.options) {
                // Divergences are sums of differences: rounding may leave a little less than nothing.
                *value = rounded(if *value > -1e-6 { value.max(0.0) } else { *value });
                if !value.is_finite() || *value < 0.0 {
                    let (unit, format) = (unit.to_string(), option.to_string());
                    return Err(LucError::NotFinite { unit, format, value: *value });
                }
            }
        }
        self.units.push(UnitMeasurement { unit, matrices, local, kl });
        (self.unit_done)(&self.units)
    }

    /// Measures all blocks; returns the states behind the last, of all tokens and of the compared ones.
    fn blocks(&mut self, mut all: States, mut compared: States) -> Result<(States, States)> {
        let needs_inputs = self.trials.compressor.needs_inputs();
        for index in 0..self.decoder.n_blocks() {
            let block = DenseBlock::new(&self.decoder.store().block(index)?, self.decoder.device())?;
            block.check_finite(index)?;
            let parts: Vec<(Unit, Vec<Projection>)> = match self.trials.granularity {
                Granularity::Block => vec![(Unit::Block(index), Projection::ALL.to_vec())],
                Granularity::Linear => Projection::ALL.map(|p| (Unit::Linear(index, p), vec![p])).to_vec(),
            };
            let open: Vec<_> = parts.into_iter().filter(|(unit, _)| !self.take_known(*unit)).collect();
            let mut grams = Vec::new();
            if needs_inputs {
                let sites: &[Site] = if open.is_empty() { &[] } else { &Site::ALL };
                (all, grams) = all.observe(self.decoder, &block.block, index, sites)?;
            }
            let outputs = compared.run(self.decoder, &block.block, index);
            let gram = |p: Projection| grams.get(Site::of(p) as usize);
            for (unit, projections) in open {
                self.part(unit, index, &block, &projections, &gram, (&compared, &outputs))?;
            }
            compared = outputs;
        }
        Ok((all, compared))
    }

    /// Measures one unit: the given projections of a block, from the block's inputs and outputs.
    fn part<'g>(
        &mut self,
        unit: Unit,
        index: usize,
        block: &DenseBlock,
        projections: &[Projection],
        gram: &dyn Fn(Projection) -> Option<&'g InputGram>,
        (inputs, outputs): (&States, &States),
    ) -> Result<()> {
        let _span = tracing::debug_span!("measure_unit", %unit).entered();
        let decoder = self.decoder;
        let weight = TokenWeights::of(&outputs.flat())?;
        let (mut local, mut kl) = (Vec::new(), Vec::new());
        let at_once = (TOGETHER / inputs.tokens()).max(1);
        for options in self.trials.options.chunks(at_once) {
            let mut results = Vec::with_capacity(options.len());
            for option in options {
                let compressor = self.trials.compressor;
                let compressed = block.with_format(projections, option, compressor, gram, decoder.device())?;
                let result = inputs.run(decoder, &compressed, index);
                let error = weight.scale(result.flat().sub(outputs.flat()));
                local.push(sum_of_squares(error.clone())? / error.shape().num_elements() as f64);
                results.push(result);
                self.step(&unit.to_string());
            }
            for last in States::run_rest_together(results, decoder, index + 1)? {
                kl.push(self.base.divergence(&Outputs::of(decoder, last)?));
            }
        }
        let matrix = |p: &Projection| shape(p.weight_name(index), block.block.linear(*p).weight.shape());
        self.push(unit, projections.iter().map(matrix).collect(), local, kl)
    }

    /// Measures the embedding (with the head, if it is tied), and the head otherwise.
    fn ends(&mut self, compared: &[Vec<u32>], embedded: &States, last_all: &States, last: &States) -> Result<()> {
        let decoder = self.decoder;
        let tied = decoder.is_head_tied();
        let needs_inputs = self.trials.compressor.needs_inputs();
        let damping = if tied { TIED_DAMPING } else { DAMPING };
        let inputs = if needs_inputs { Some(last_all.observe_head(decoder, damping)?) } else { None };
        let normed = decoder.exit_norm(last.flat(), decoder.n_blocks(), None);
        if !self.take_known(Unit::Embedding) {
            let rows = HostWeight::new(decoder.embedding())?;
            let lookup = Lookup::new(&compared.concat(), &embedded.flat())?;
            let logits = if tied { Some(Logits::new(&rows, normed.clone())?) } else { None };
            // An embedding alone is looked up: its rows have no inputs, and all columns weigh the same.
            let flat = if needs_inputs && !tied { Some(flat_moments(rows.shape()[1])?) } else { None };
            let inputs = if tied { inputs.as_ref() } else { flat.as_ref() };
            let rest = |weight: Weight| {
                let other = decoder.clone().with_embedding(weight);
                Outputs::of(&other, States::embed(&other, compared)?.run_rest(&other, 0)?)
            };
            let name = "model.embed_tokens.weight";
            self.end(Unit::Embedding, name, &rows, inputs, (Some(&lookup), logits.as_ref()), &rest)?;
        }
        if let Some(head) = decoder.untied_head()
            && !self.take_known(Unit::Head)
        {
            let rows = HostWeight::new(&head.weight)?;
            let logits = Logits::new(&rows, normed)?;
            let rest = |weight: Weight| {
                let other = decoder.clone().with_head(Linear { weight, bias: head.bias.clone() });
                Outputs::of(&other, last.clone())
            };
            self.end(Unit::Head, "lm_head.weight", &rows, inputs.as_ref(), (None, Some(&logits)), &rest)?;
        }
        Ok(())
    }

    fn end(
        &mut self,
        unit: Unit,
        name: &str,
        weight: &HostWeight,
        inputs: Option<&InputGram>,
        (lookup, logits): (Option<&Lookup>, Option<&Logits>),
        rest: &dyn Fn(Weight) -> Result<Outputs>,
    ) -> Result<()> {
        let [rows, cols] = weight.shape();
        let values = weight.values()?;
        crate::weights::check_finite(name, &values)?;
        let (mut local, mut kl) = (Vec::new(), Vec::new());
        for option in self.trials.options {
            let packed = self.trials.compressor.compress(&values, rows, cols, option, inputs)?;
            let mut sum = 0.0;
            for start in (0..rows).step_by(VOCAB_CHUNK) {
                let range = start..rows.min(start + VOCAB_CHUNK);
                let original = &values[range.start * cols..range.end * cols];
                let compressed = rows_of(&packed, range.clone());
                if let Some(lookup) = lookup {
                    sum += lookup.error(range.start, original, &compressed, cols);
                }
                if let Some(logits) = logits {
                    let error = product_error(&logits.scaled, original, compressed, [range.len(), cols])?;
                    sum += error / (logits.scaled.dims()[0] * rows) as f64;
                }
            }
            local.push(sum);
            kl.push(self.base.divergence(&rest(Weight::Packed(packed.to_device(self.decoder.device())))?));
            self.step(&unit.to_string());
        }
        self.push(unit, vec![shape(name.into(), [rows, cols])], local, kl)
    }
}

fn shape(name: String, [rows, cols]: [usize; 2]) -> MatrixShape {
    MatrixShape { name, rows, cols }
}

fn rows_of(packed: &PackedHost, range: std::ops::Range<usize>) -> Vec<f32> {
    let cols = packed.layout.cols;
    let mut out = vec![0.0; range.len() * cols];
    for (row, out) in range.zip(out.chunks_mut(cols)) {
        packed.dequantize_row(row, out);
    }
    out
}

/// The moments of inputs of which nothing is known: all columns alike and unrelated.
pub(crate) fn flat_moments(cols: usize) -> Result<InputGram> {
    let identity = (0..cols * cols).map(|i| if i / cols == i % cols { 1.0 } else { 0.0 }).collect();
    Ok(InputGram::new(cols, identity, DAMPING).map_err(ModelError::from)?)
}

/// `1 / sqrt(Var_t)` of every token.
struct TokenWeights(Tensor<2>);

impl TokenWeights {
    fn of(outputs: &Tensor<2>) -> Result<Self> {
        let centred = outputs.clone().sub(outputs.clone().mean_dim(1));
        let variance: Vec<f64> = to_vec(centred.clone().mul(centred).mean_dim(1))?.into_iter().map(f64::from).collect();
        Ok(Self(Self::from_variance(&variance, &outputs.device())))
    }

    fn from_variance(variance: &[f64], device: &burn::tensor::Device) -> Tensor<2> {
        let floor = floor(variance);
        let weights: Vec<f32> = variance.iter().map(|v| v.max(floor).sqrt().recip() as f32).collect();
        tensor(weights, [variance.len(), 1], device)
    }

    fn scale(&self, x: Tensor<2>) -> Tensor<2> {
        x.mul(self.0.clone())
    }
}

/// What variances are divided by at least: a millionth of their mean.
fn floor(variance: &[f64]) -> f64 {
    (1e-6 * variance.iter().sum::<f64>() / variance.len() as f64).max(f64::from(f32::MIN_POSITIVE))
}

/// Occurrences of the tokens and what their rows' errors are divided by.
struct Lookup {
    /// Token id to (occurrences, variance of its row).
    rows: BTreeMap<usize, (f64, f64)>,
    tokens: f64,
}

impl Lookup {
    fn new(ids: &[u32], embedded: &Tensor<2>) -> Result<Self> {
        let centred = embedded.clone().sub(embedded.clone().mean_dim(1));
        let variance: Vec<f64> = to_vec(centred.clone().mul(centred).mean_dim(1))?.into_iter().map(f64::from).collect();
        let floor = floor(&variance);
        let mut rows = BTreeMap::new();
        for (&id, &variance) in ids.iter().zip(&variance) {
            rows.entry(id as usize).or_insert((0.0, variance.max(floor))).0 += 1.0;
        }
        Ok(Self { rows, tokens: ids.len() as f64 })
    }

    /// The normalised error of the lookups that fall on these rows, as a part of the mean over all tokens.
    fn error(&self, start: usize, original: &[f32], compressed: &[f32], cols: usize) -> f64 {
        let end = start + original.len() / cols;
        let mut sum = 0.0;
        for (&id, &(count, variance)) in self.rows.range(start..end) {
            let row = (id - start) * cols..(id - start + 1) * cols;
            let pairs = original[row.clone()].iter().zip(&compressed[row]);
            let squares: f64 = pairs.map(|(a, b)| (f64::from(*b) - f64::from(*a)).powi(2)).sum();
            sum += count * squares / cols as f64 / variance;
        }
        sum / self.tokens
    }
}

/// The final hidden states, each divided by the standard deviation of its logits.
struct Logits {
    scaled: Tensor<2>,
}

impl Logits {
    fn new(head: &HostWeight, normed: Tensor<2>) -> Result<Self> {
        let [rows, cols] = head.shape();
        let tokens = normed.dims()[0];
        let (mut sums, mut squares) = (vec![0.0f64; tokens], vec![0.0f64; tokens]);
        for start in (0..rows).step_by(VOCAB_CHUNK) {
            let range = start..rows.min(start + VOCAB_CHUNK);
            let chunk = tensor(head.rows(range.clone())?, [range.len(), cols], &normed.device());
            let logits = normed.clone().matmul(chunk.transpose());
            add(&mut sums, to_vec(logits.clone().sum_dim(1))?);
            add(&mut squares, to_vec(logits.clone().mul(logits).sum_dim(1))?);
        }
        let n = rows as f64;
        let variance = |(sum, square): (&f64, &f64)| (square / n - (sum / n).powi(2)).max(0.0);
        let variance: Vec<f64> = sums.iter().zip(&squares).map(variance).collect();
        let weights = TokenWeights::from_variance(&variance, &normed.device());
        Ok(Self { scaled: normed.mul(weights) })
    }
}

fn add(sums: &mut [f64], values: Vec<f32>) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += f64::from(value);
    }
}

/// `sum |X (W' - W)^T|^2` for inputs `X` `[tokens, in]` and weights `[out, in]`.
fn product_error(x: &Tensor<2>, original: &[f32], mut compressed: Vec<f32>, shape: [usize; 2]) -> Result<f64> {
    for (c, o) in compressed.iter_mut().zip(original) {
        *c -= o;
    }
    let difference = tensor(compressed, shape, &x.device());
    sum_of_squares(x.clone().matmul(difference.transpose()))
}

/// Rows are summed in f32 on the device, the rows' sums in f64.
fn sum_of_squares(x: Tensor<2>) -> Result<f64> {
    let rows = to_vec(x.clone().mul(x).sum_dim(1))?;
    Ok(rows.into_iter().map(f64::from).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounded_values_survive_json() {
        let mut value = 3.0e-20;
        while value < 1e6 {
            let short = rounded(value);
            assert!((short - value).abs() <= 0.5e-8 * value + 1e-22, "{value} became {short}");
            let back: f64 = serde_json::from_str(&serde_json::to_string(&short).unwrap()).unwrap();
            assert_eq!(back.to_bits(), short.to_bits(), "{short}");
            value *= 1.037_654_321;
        }
        assert_eq!(rounded(0.0), 0.0);
        assert_eq!(rounded(0.123_456_789_123), 0.123_456_789);
    }
}
