//! Sensitivities: how much each unit's output changes when only its own weights are compressed.
//!
//! For unit `l` and option `o`, on calibration tokens `t`:
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
//!   projection would weigh as much as the whole embedding. On SmolLM2-135M at the same bits per weight, policies
//!   solved with any of these alternatives leave a clearly larger KL divergence from the original model.
//! - The embedding's output is the row of each calibration token, so rows weigh as often as they occur. Where the head
//!   is tied to it, the two normalised errors are added. The head's output is the logits on the final hidden states.
//!
//! Blocks are taken one by one with the hidden states of all calibration tokens, the vocabulary in chunks of rows:
//! memory is the model, those states and a few copies of one block in f32.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use edgellm_model::ModelError;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::traits::Compressor;
use edgellm_model::values::{
    Granularity, LayerFormat, MatrixShape, Measurement, Projection, Unit, UnitMeasurement, Value,
};

use crate::digest::calibration_digest;
use crate::error::{LucError, Result};
use crate::progress::Progress;
use crate::weights::{DenseBlock, HostWeight, tensor};

/// Rows of the vocabulary that are held as f32 at a time.
const VOCAB_CHUNK: usize = 4096;

/// Measures the sensitivity of every unit for every option.
///
/// `calibration` is one list of token ids per window; windows do not see each other. The result's `model` describes
/// the architecture; set it to the model's name if there is one.
///
/// # Errors
/// No option, no token, an id outside the vocabulary, a format that does not exist, weights that cannot be read or
/// packed, or activations that overflow.
pub fn measure(
    decoder: &Decoder,
    options: &[LayerFormat],
    granularity: Granularity,
    calibration: &[Vec<u32>],
    compressor: &dyn Compressor,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Measurement> {
    if options.is_empty() {
        return Err(LucError::Nothing { expected: "at least one format" });
    }
    if calibration.iter().all(Vec::is_empty) {
        return Err(LucError::Nothing { expected: "at least one calibration token" });
    }
    for option in options {
        option.packed()?;
    }
    let config = decoder.config();
    let windows: Vec<&[u32]> = calibration.iter().map(Vec::as_slice).filter(|w| !w.is_empty()).collect();
    let hidden = windows.iter().map(|w| decoder.embed(&[w])).collect::<Result<Vec<_>, ModelError>>()?;
    let per_block = if granularity == Granularity::Linear { Projection::ALL.len() } else { 1 };
    let matrices = if decoder.is_head_tied() { 1 } else { 2 };
    let chunks = config.vocab_size.div_ceil(VOCAB_CHUNK) * matrices;
    let total = options.len() * (config.n_layers * per_block + chunks);
    let mut run = Run { decoder, options, compressor, progress, done: 0, total };

    let embedded = flatten(&hidden);
    let mut units = Vec::new();
    let last = run.blocks(hidden, granularity, &mut units)?;
    let normed = decoder.exit_norm(flatten(&last), config.n_layers, None);
    let mut ends = run.vocabulary(&windows.concat(), embedded, normed)?;
    units.splice(0..0, ends.drain(..1));
    units.append(&mut ends);
    check(&units, options)?;
    for unit in &mut units {
        unit.local.iter_mut().for_each(|value| *value = rounded(*value));
        unit.kl = unit.local.clone();
    }
    Ok(Measurement {
        format_version: Measurement::VERSION,
        model: format!("{}, {} blocks, hidden size {}", config.architecture.name, config.n_layers, config.hidden_size),
        model_digest: String::new(),
        compressor: compressor.name().into(),
        granularity,
        compared_tokens: windows.iter().map(|w| w.len()).sum(),
        calibration_tokens: windows.iter().map(|w| w.len()).sum(),
        calibration_digest: calibration_digest(calibration),
        options: options.to_vec(),
        units,
    })
}

fn check(units: &[UnitMeasurement], options: &[LayerFormat]) -> Result<()> {
    for unit in units {
        for (&value, option) in unit.local.iter().zip(options) {
            if !value.is_finite() {
                return Err(LucError::NotFinite { unit: unit.unit.to_string(), format: option.to_string(), value });
            }
        }
    }
    Ok(())
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
    options: &'a [LayerFormat],
    compressor: &'a dyn Compressor,
    progress: &'a mut dyn FnMut(Progress<'_>),
    done: usize,
    total: usize,
}

impl Run<'_> {
    fn step(&mut self, what: &str) {
        self.done += 1;
        (self.progress)(Progress { done: self.done, total: self.total, what });
    }

    /// Measures all blocks; returns the hidden states behind the last.
    fn blocks(
        &mut self,
        mut hidden: Vec<Tensor<3>>,
        granularity: Granularity,
        units: &mut Vec<UnitMeasurement>,
    ) -> Result<Vec<Tensor<3>>> {
        for index in 0..self.decoder.n_blocks() {
            let block = DenseBlock::new(&self.decoder.store().block(index)?, self.decoder.device())?;
            let run = |x: &Tensor<3>| self.decoder.run_block(&block.block, index, x.clone(), None);
            let outputs: Vec<Tensor<3>> = hidden.iter().map(run).collect();
            let weight = TokenWeights::of(&flatten(&outputs))?;
            match granularity {
                Granularity::Block => {
                    units.push(self.part(
                        Unit::Block(index),
                        index,
                        &block,
                        &Projection::ALL,
                        (&hidden, &outputs, &weight),
                    )?);
                }
                Granularity::Linear => {
                    for projection in Projection::ALL {
                        let unit = Unit::Linear(index, projection);
                        units.push(self.part(unit, index, &block, &[projection], (&hidden, &outputs, &weight))?);
                    }
                }
            }
            hidden = outputs;
        }
        Ok(hidden)
    }

    /// Measures one unit: the given projections of a block, from the block's inputs, outputs and their weights.
    fn part(
        &mut self,
        unit: Unit,
        index: usize,
        block: &DenseBlock,
        projections: &[Projection],
        (inputs, outputs, weight): (&[Tensor<3>], &[Tensor<3>], &TokenWeights),
    ) -> Result<UnitMeasurement> {
        let mut sensitivity = Vec::with_capacity(self.options.len());
        for option in self.options {
            let compressed = block.with_format(projections, option, self.compressor, self.decoder.device())?;
            let error = |(x, y): (&Tensor<3>, &Tensor<3>)| {
                self.decoder.run_block(&compressed, index, x.clone(), None).sub(y.clone())
            };
            let errors: Vec<Tensor<3>> = inputs.iter().zip(outputs).map(error).collect();
            let error = weight.scale(flatten(&errors));
            sensitivity.push(sum_of_squares(error.clone())? / error.shape().num_elements() as f64);
            self.step(&unit.to_string());
        }
        let matrix = |p: &Projection| self.shape(p.weight_name(index), block.block.linear(*p).weight.shape());
        Ok(UnitMeasurement {
            unit,
            matrices: projections.iter().map(matrix).collect(),
            local: sensitivity,
            kl: Vec::new(),
        })
    }

    /// Measures the embedding (with the head, if it is tied), and the head otherwise, in this order.
    fn vocabulary(&mut self, ids: &[u32], embedded: Tensor<2>, normed: Tensor<2>) -> Result<Vec<UnitMeasurement>> {
        let rows = HostWeight::new(self.decoder.embedding())?;
        let tied = self.decoder.is_head_tied();
        let lookup = Lookup::new(ids, &embedded)?;
        let head = if tied { None } else { Some(HostWeight::new(self.decoder.head())?) };
        let logits = Logits::new(head.as_ref().unwrap_or(&rows), normed)?;
        let mut units = vec![self.vocabulary_unit(
            Unit::Embedding,
            "model.embed_tokens.weight",
            &rows,
            Some(&lookup),
            tied.then_some(&logits),
        )?];
        if let Some(head) = &head {
            units.push(self.vocabulary_unit(Unit::Head, "lm_head.weight", head, None, Some(&logits))?);
        }
        Ok(units)
    }

    fn vocabulary_unit(
        &mut self,
        unit: Unit,
        name: &str,
        weight: &HostWeight,
        lookup: Option<&Lookup>,
        logits: Option<&Logits>,
    ) -> Result<UnitMeasurement> {
        let [rows, cols] = weight.shape();
        let mut sensitivity = vec![0.0; self.options.len()];
        for start in (0..rows).step_by(VOCAB_CHUNK) {
            let range = start..rows.min(start + VOCAB_CHUNK);
            let original = weight.rows(range.clone())?;
            for (option, sum) in self.options.iter().zip(&mut sensitivity) {
                let compressed = self.compressor.compress(&original, range.len(), cols, option)?.dequantize();
                if let Some(lookup) = lookup {
                    *sum += lookup.error(range.start, &original, &compressed, cols);
                }
                if let Some(logits) = logits {
                    let error = product_error(&logits.scaled, &original, compressed, [range.len(), cols])?;
                    *sum += error / (logits.scaled.dims()[0] * rows) as f64;
                }
                self.step(&unit.to_string());
            }
        }
        Ok(UnitMeasurement {
            unit,
            matrices: vec![self.shape(name.into(), [rows, cols])],
            local: sensitivity,
            kl: Vec::new(),
        })
    }

    fn shape(&self, name: String, [rows, cols]: [usize; 2]) -> MatrixShape {
        MatrixShape { name, rows, cols }
    }
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

/// Hidden states of several windows as one matrix, a row per token.
fn flatten(windows: &[Tensor<3>]) -> Tensor<2> {
    let rows = windows.iter().map(|x| {
        let [batch, tokens, d] = x.dims();
        x.clone().reshape([batch * tokens, d])
    });
    Tensor::cat(rows.collect(), 0)
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
