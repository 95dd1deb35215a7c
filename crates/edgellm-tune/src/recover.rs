//! Recovering what compression cost: scales and norms of a packed model are tuned until its next-token distributions come
//! closer to those of the model that it was made from.
//!
//! No labels are needed, only text: the loss is the mean divergence from the base's distribution at every position
//! (Hinton et al., arXiv 1503.02531), through the packed model as it will run, with stored scales. What is trained are the
//! scales and the minima of the blocks' matrices ([`TrainableMatrix`]), and the norms; codes and formats stay as they are, and
//! so does the size.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use edgellm_kernels::{Arrangement, GroupValues, TrainableMatrix};
use edgellm_model::ModelError;
use edgellm_model::decoder::{
    Block, BlockGradients, BlockScratch, BlockTape, Decoder, ResidentStore, SlicePass, Weight,
};
use edgellm_model::generate::to_vec;
use edgellm_model::values::Projection;
use rayon::prelude::*;

use crate::TuneError;
use crate::optimizer::{AdamW, AdamWConfig, LrSchedule};

/// Settings of a recovery.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecoverConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Windows of text in a step.
    pub batch: usize,
    /// Largest learning rate of scales and minima, as a share of the matrix's mean scale.
    pub scale_rate: f64,
    /// Largest learning rate of norms, as a share of the norm's mean weight.
    pub norm_rate: f64,
}

impl Default for RecoverConfig {
    fn default() -> Self {
        Self { steps: 100, batch: 4, scale_rate: 2e-3, norm_rate: 1e-2 }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecoverReport {
    /// The step, counted from 0.
    pub step: u64,
    /// Mean divergence from the base at a position, before the step's update, in nats.
    pub divergence: f64,
    /// Wall time of the step.
    pub seconds: f64,
}

/// A matrix and the state of its optimizer.
struct Trained {
    matrix: TrainableMatrix,
    optimizer: AdamW,
    gradients: GroupValues,
    /// Mean size of the scales at the start.
    scale: f64,
    arrangement: Arrangement,
}

impl Trained {
    fn new(packed: &Weight) -> Result<Option<Self>, TuneError> {
        let Weight::Packed(packed) = packed else { return Ok(None) };
        if !TrainableMatrix::exists(packed.layout().format) {
            return Ok(None);
        }
        let host = packed.to_host().map_err(ModelError::from)?;
        let matrix = TrainableMatrix::new(host).map_err(ModelError::from)?;
        let sum: f64 = matrix.grid.scales.iter().map(|scale| f64::from(scale.abs())).sum();
        let scale = sum / matrix.grid.scales.len() as f64;
        let arrangement = packed.layout().arrangement;
        Ok(Some(Self { matrix, optimizer: adam(), gradients: GroupValues::default(), scale, arrangement }))
    }

    /// One update, of the weights' gradient; `factor` is on both learning rates.
    fn update(&mut self, dw: &[f32], config: &RecoverConfig, factor: f64) {
        let Self { matrix, optimizer, gradients, scale, .. } = self;
        matrix.gradients(dw, gradients);
        let rate = config.scale_rate * factor * *scale;
        let grid = &mut matrix.grid;
        optimizer.update("scales", &mut grid.scales, &gradients.scales, 1.0, rate);
        if !grid.mins.is_empty() {
            optimizer.update("minima", &mut grid.mins, &gradients.mins, 1.0, rate);
        }
    }

    fn weight(&self, decoder: &Decoder) -> Result<Weight, TuneError> {
        let mut host = self.matrix.pack();
        if self.arrangement == Arrangement::Panels {
            host = host.prepare().map_err(ModelError::from)?;
        }
        Ok(Weight::Packed(host.to_device(decoder.device())))
    }
}

/// A norm and the state of its optimizer.
struct TrainedNorm {
    weight: Vec<f32>,
    optimizer: AdamW,
    /// Mean size of the weights at the start.
    size: f64,
}

impl TrainedNorm {
    fn new(norm: &Tensor<1>) -> Result<Self, TuneError> {
        let weight = to_vec(norm.clone())?;
        let size = weight.iter().map(|w| f64::from(w.abs())).sum::<f64>() / weight.len() as f64;
        Ok(Self { weight, optimizer: adam(), size })
    }

    /// One update; `rate` is a share of the mean weight.
    fn update(&mut self, gradient: &[f32], rate: f64, device: &Device) -> Tensor<1> {
        self.optimizer.update("norm", &mut self.weight, gradient, 1.0, rate * self.size);
        Tensor::from_floats(self.weight.as_slice(), device)
    }
}

/// The second moment follows quickly: there are few steps.
fn adam() -> AdamW {
    AdamW::new(AdamWConfig { beta2: 0.95, ..AdamWConfig::default() })
}

/// A packed model on its way back to its base.
pub struct Recovery<'a> {
    base: &'a Decoder,
    decoder: Decoder,
    blocks: Vec<Block>,
    trained: Vec<[Option<Trained>; 7]>,
    /// Before attention and feed-forward part of each block.
    norms: Vec<[TrainedNorm; 2]>,
    final_norm: TrainedNorm,
    config: RecoverConfig,
    scratch: BlockScratch,
    tapes: Vec<BlockTape>,
    step: u64,
}

impl<'a> Recovery<'a> {
    /// Starts with the packed model `decoder` of `base`.
    ///
    /// # Errors
    /// The models differ in shape, one of them does not run packed on the CPU, nothing of it can be trained, or a setting is
    /// out of range.
    pub fn new(base: &'a Decoder, decoder: Decoder, config: RecoverConfig) -> Result<Self, TuneError> {
        let refuse =
            |what, expected: &str, found: String| Err(TuneError::Setting { what, expected: expected.into(), found });
        if config.steps == 0 || config.batch == 0 {
            return refuse("steps and windows of recovery", "at least 1", "0".into());
        }
        let shape = |d: &Decoder| (d.n_blocks(), d.config().vocab_size, d.config().hidden_size);
        if shape(base) != shape(&decoder) {
            let found = format!("{:?} and {:?}", shape(base), shape(&decoder));
            return refuse("blocks, vocabulary and width of base and model", "the same", found);
        }
        for (model, what) in [(base, "the base of recovery"), (&decoder, "the model to recover")] {
            if !model.runs_on_slices(0..model.n_blocks())? {
                return refuse(
                    what,
                    "packed or float weights on the CPU",
                    "weights or a device of another kind".into(),
                );
            }
        }
        let (mut blocks, mut trained, mut norms) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..decoder.n_blocks() {
            let block = decoder.store().block(index)?;
            let mut matrices: [Option<Trained>; 7] = Default::default();
            for projection in Projection::ALL {
                matrices[projection as usize] = Trained::new(&block.linear(projection).weight)?;
            }
            trained.push(matrices);
            norms.push([TrainedNorm::new(&block.attn_norm)?, TrainedNorm::new(&block.mlp_norm)?]);
            blocks.push(block);
        }
        if trained.iter().flatten().all(Option::is_none) {
            return refuse("the model to recover", "matrices in quantized formats without sparsity", "none".into());
        }
        let (scratch, tapes) = (BlockScratch::default(), Vec::new());
        let final_norm = TrainedNorm::new(decoder.final_norm())?;
        Ok(Self { base, decoder, blocks, trained, norms, final_norm, config, scratch, tapes, step: 0 })
    }

    /// The model as it is now.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Mean divergence from the base over all positions of some windows, in nats.
    ///
    /// # Errors
    /// Weights cannot be read, or a token id is outside the vocabulary.
    pub fn divergence(&mut self, windows: &[&[u32]]) -> Result<f64, TuneError> {
        let (mut sum, mut positions) = (0.0, 0);
        for batch in windows.chunks(self.config.batch) {
            let lengths: Vec<usize> = batch.iter().map(|ids| ids.len()).collect();
            let of_base = hidden(self.base, batch, &lengths, &mut self.scratch)?;
            let of_this = hidden(&self.decoder, batch, &lengths, &mut self.scratch)?;
            sum += self.decoder.divergence_on_slices(self.base, &of_base, &of_this, 1.0).loss;
            positions += lengths.iter().sum::<usize>();
        }
        Ok(sum / positions.max(1) as f64)
    }

    /// One step on some windows.
    ///
    /// # Errors
    /// Weights cannot be read, a token id is outside the vocabulary, or the loss is not finite.
    pub fn step(&mut self, windows: &[&[u32]]) -> Result<RecoverReport, TuneError> {
        let start = Instant::now();
        let lengths: Vec<usize> = windows.iter().map(|ids| ids.len()).collect();
        let of_base = hidden(self.base, windows, &lengths, &mut self.scratch)?;
        let mut x = self.decoder.embed_slices(windows)?;
        let n = self.decoder.n_blocks();
        let mut pass = SlicePass::new(&self.decoder, None, &lengths, &mut self.scratch);
        pass.record(&mut x, 0..n, |_| false, &mut self.tapes)?;
        let weight = 1.0 / lengths.iter().sum::<usize>().max(1) as f32;
        let head = self.decoder.divergence_on_slices(self.base, &of_base, &x, weight);
        if !head.loss.is_finite() {
            return Err(TuneError::Diverged { steps: 1, step: self.step });
        }
        let warmup = (self.config.steps / 10).min(20);
        let factor = LrSchedule::Cosine.factor(self.step, self.config.steps, warmup);
        let mut dy = head.d_hidden;
        for index in (0..n).rev() {
            let trained = &mut self.trained[index];
            let norms = &mut self.norms[index];
            let zeros = norms.each_ref().map(|norm| vec![0.0; norm.weight.len()]);
            let mut gradients = BlockGradients { norms: Some(zeros), ..BlockGradients::default() };
            for (projection, (gradient, matrix)) in gradients.weights.iter_mut().zip(trained.iter()).enumerate() {
                let [rows, cols] = self.blocks[index].linears[projection].weight.shape();
                *gradient = matrix.as_ref().map(|_| vec![0.0; rows * cols]);
            }
            pass.backward_block(&mut dy, index, &mut self.tapes[index], index > 0, &mut gradients)?;
            let [of_attn, of_mlp] = gradients.norms.take().expect("asked for above");
            let (block, rate, device) =
                (&mut self.blocks[index], self.config.norm_rate * factor, self.decoder.device());
            block.attn_norm = norms[0].update(&of_attn, rate, device);
            block.mlp_norm = norms[1].update(&of_mlp, rate, device);
            let updates = trained.par_iter_mut().zip(gradients.weights).zip(&mut block.linears);
            updates.try_for_each(|((trained, dw), linear)| {
                if let (Some(trained), Some(dw)) = (trained, dw) {
                    trained.update(&dw, &self.config, factor);
                    linear.weight = trained.weight(&self.decoder)?;
                }
                Ok::<(), TuneError>(())
            })?;
        }
        let norm = self.final_norm.update(&head.d_norm, self.config.norm_rate * factor, self.decoder.device());
        let store = Arc::new(ResidentStore::new(self.blocks.clone()));
        self.decoder = self.decoder.clone().with_store(store).with_final_norm(norm);
        let report = RecoverReport { step: self.step, divergence: head.loss, seconds: start.elapsed().as_secs_f64() };
        self.step += 1;
        Ok(report)
    }
}

/// Hidden states behind the last block, `[tokens of all windows, d]`.
fn hidden(
    decoder: &Decoder,
    windows: &[&[u32]],
    lengths: &[usize],
    scratch: &mut BlockScratch,
) -> Result<Vec<f32>, TuneError> {
    let mut x = decoder.embed_slices(windows)?;
    SlicePass::new(decoder, None, lengths, scratch).forward(&mut x, 0..decoder.n_blocks())?;
    Ok(x)
}
