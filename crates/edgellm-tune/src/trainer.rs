//! Adaptive layer tuning: each step trains a window of blocks below one exit, with true truncation.
//!
//! Blocks below the window run without autodiff and keep nothing; blocks above the exit do not run at all. So time and
//! memory of a step fall with the window, not only the number of gradients (EDGE-LLM, DAC 2024).

use std::time::Instant;

use burn::tensor::{Gradients, Int, Tensor, TensorData};
use edgellm_model::adapter::{Adapter, LoraConfig};
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::traits::{DataSource, ExitSchedule};
use edgellm_model::values::Projection;

use crate::TuneError;
use crate::batch::Batch;
use crate::calibrate::calibrate_exit_norms;
use crate::exits::{ExitScale, window};
use crate::optimizer::{AdamW, AdamWConfig, LrSchedule};

/// Steps in a row with a loss that is not finite, after which a run gives up.
const MAX_SKIPPED: u32 = 10;

/// Examples from which the norms of the early exits start.
const CALIBRATION_EXAMPLES: usize = 16;

/// Settings of a tuning run.
#[derive(Clone, Debug)]
pub struct TuneConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Examples per step.
    pub batch_size: usize,
    /// Exits, as numbers of blocks, ascending; the last is the whole model.
    pub exits: Vec<usize>,
    /// Blocks that a step trains.
    pub window: usize,
    /// Rank, scale and targets of the adapter.
    pub lora: LoraConfig,
    /// Whether the norms of the exits before the last are trained as well. The last exit keeps the model's final norm, so
    /// that the adapter means the same to PEFT, which knows nothing of exits.
    pub train_exit_norms: bool,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// How strongly the exits before the last are trained.
    pub exit_scale: ExitScale,
    /// How the learning rate moves.
    pub lr_schedule: LrSchedule,
    /// Steps of linear increase of the learning rate.
    pub warmup_steps: u64,
    /// Optimizer settings.
    pub adamw: AdamWConfig,
    /// Largest global norm of a step's gradients; 0 does not clip.
    pub max_grad_norm: f64,
    /// Seed of the adapter's start.
    pub seed: u64,
}

impl TuneConfig {
    fn validate(&self, n_blocks: usize) -> Result<(), TuneError> {
        let bad = |what, expected: String, found: String| Err(TuneError::Setting { what, expected, found });
        let ascending = self.exits.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.exits.first().is_none_or(|e| *e == 0) || self.exits.last() != Some(&n_blocks) {
            let expected = format!("ascending numbers of blocks that end with {n_blocks}");
            return bad("exits", expected, format!("{:?}", self.exits));
        }
        if self.window == 0 || self.batch_size == 0 {
            return bad(
                "window and batch size",
                "at least 1".into(),
                format!("{} and {}", self.window, self.batch_size),
            );
        }
        if !self.learning_rate.is_finite() || self.learning_rate <= 0.0 {
            return bad("learning rate", "a positive number".into(), self.learning_rate.to_string());
        }
        if self.max_grad_norm < 0.0 || self.max_grad_norm.is_nan() {
            return bad("largest gradient norm", "at least 0".into(), self.max_grad_norm.to_string());
        }
        Ok(())
    }
}

/// What one step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The step, counted from 0.
    pub step: u64,
    /// The exit that was trained, as a number of blocks.
    pub exit: usize,
    /// Mean loss over the batch's response tokens.
    pub loss: f64,
    /// Response tokens in the batch.
    pub response_tokens: usize,
    /// Tokens that were run, padding included.
    pub tokens: usize,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
    /// Wall time of the step.
    pub seconds: f64,
    /// Whether the update was left out because loss or gradients were not finite.
    pub skipped: bool,
}

/// A gradient, waiting for the norm of all of them.
struct Gradient {
    name: String,
    slot: Slot,
    value: Tensor<1>,
}

/// Where a trained tensor lives in the adapter.
#[derive(Clone, Copy)]
enum Slot {
    LoraA(usize, Projection),
    LoraB(usize, Projection),
    ExitNorm(usize),
}

/// Tunes an adapter on a frozen base.
pub struct Trainer<'a> {
    decoder: &'a Decoder,
    config: TuneConfig,
    schedule: Box<dyn ExitSchedule>,
    adapter: Adapter,
    optimizer: AdamW,
    step: u64,
    skipped_in_a_row: u32,
}

impl<'a> Trainer<'a> {
    /// A trainer with a fresh adapter whose exits have the final norm.
    ///
    /// # Errors
    /// A setting out of range.
    pub fn new(decoder: &'a Decoder, config: TuneConfig, schedule: Box<dyn ExitSchedule>) -> Result<Self, TuneError> {
        config.validate(decoder.n_blocks())?;
        let mut adapter = Adapter::new(decoder.config(), config.lora.clone(), config.seed, decoder.device())?;
        for &exit in &config.exits {
            adapter.set_exit_norm(exit, decoder.final_norm().clone());
        }
        let optimizer = AdamW::new(config.adamw);
        Ok(Self { decoder, config, schedule, adapter, optimizer, step: 0, skipped_in_a_row: 0 })
    }

    /// The adapter as it is now.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The trained adapter.
    pub fn into_adapter(self) -> Adapter {
        self.adapter
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Runs until the configured number of steps is done or `on_step` says to stop (by returning `false`).
    ///
    /// Examples are taken in the source's order, again from the start after the last. Before the first step, the norms of
    /// the early exits are set from the first examples ([`calibrate_exit_norms`]).
    ///
    /// # Errors
    /// See [`Trainer::train_step`]; or an example cannot be read.
    pub fn run(
        &mut self,
        data: &dyn DataSource,
        mut on_step: impl FnMut(&StepReport) -> Result<bool, TuneError>,
    ) -> Result<(), TuneError> {
        if data.is_empty() {
            return Err(TuneError::EmptyBatch { step: self.step });
        }
        if self.step == 0 && self.config.exits.len() > 1 {
            let first =
                (0..data.len().min(CALIBRATION_EXAMPLES)).map(|i| data.example(i)).collect::<Result<Vec<_>, _>>()?;
            let TuneConfig { exits, batch_size, .. } = &self.config;
            calibrate_exit_norms(self.decoder, &mut self.adapter, exits, &first, *batch_size)?;
        }
        while self.step < self.config.steps {
            let first = self.step as usize * self.config.batch_size;
            let examples = (first..first + self.config.batch_size)
                .map(|index| data.example(index % data.len()))
                .collect::<Result<Vec<_>, _>>()?;
            let report = self.train_step(&examples)?;
            if !on_step(&report)? {
                break;
            }
        }
        Ok(())
    }

    /// One optimizer step on one batch.
    ///
    /// # Errors
    /// The batch has no response token; weights cannot be read; or too many steps in a row were not finite.
    pub fn train_step(&mut self, examples: &[Example]) -> Result<StepReport, TuneError> {
        let start = Instant::now();
        let step = self.step;
        let exit = self.config.exits[self.schedule.choose(step, self.config.exits.len())];
        let batch = Batch::new(examples, 0);
        if batch.targets.is_empty() {
            return Err(TuneError::EmptyBatch { step });
        }
        let span = tracing::debug_span!("tune_step", step, exit).entered();
        let tracked = self.tracked_adapter(exit);
        let loss = self.loss(&batch, exit, &tracked)?;
        let value = f64::from(to_vec(loss.clone().inner())?[0]);
        let mut gradients = Vec::new();
        let mut norm = f64::NAN;
        if value.is_finite() {
            let mut all = loss.backward();
            gradients = self.collect(&tracked, exit, &mut all);
            norm = global_norm(&gradients)?;
        }
        let finite = norm.is_finite();
        let lr = self.config.learning_rate
            * self.config.exit_scale.factor(exit, self.decoder.n_blocks())
            * self.config.lr_schedule.factor(step, self.config.steps, self.config.warmup_steps);
        if finite {
            self.skipped_in_a_row = 0;
            let clip = self.config.max_grad_norm;
            let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
            self.apply(gradients, scale, lr)?;
        } else {
            self.skipped_in_a_row += 1;
            tracing::warn!(step, loss = value, grad_norm = norm, "step skipped: loss or gradients are not finite");
            if self.skipped_in_a_row >= MAX_SKIPPED {
                return Err(TuneError::Diverged { steps: self.skipped_in_a_row, step });
            }
        }
        drop(span);
        self.step += 1;
        Ok(StepReport {
            step,
            exit,
            loss: value,
            response_tokens: batch.targets.len(),
            tokens: batch.tokens(),
            grad_norm: norm,
            learning_rate: lr,
            seconds: start.elapsed().as_secs_f64(),
            skipped: !finite,
        })
    }

    /// The adapter with the window's tensors and the exit's norm as leaves that keep gradients.
    fn tracked_adapter(&self, exit: usize) -> Adapter {
        let mut adapter = self.adapter.clone();
        for index in window(exit, self.config.window) {
            let Some(block) = adapter.block_mut(index) else { continue };
            for &projection in &self.config.lora.targets {
                if let Some(lora) = block.get_mut(projection) {
                    lora.a = lora.a.clone().autodiff().require_grad();
                    lora.b = lora.b.clone().autodiff().require_grad();
                }
            }
        }
        if self.config.train_exit_norms
            && exit < self.decoder.n_blocks()
            && let Some(norm) = self.adapter.exit_norm(exit)
        {
            adapter.set_exit_norm(exit, norm.clone().autodiff().require_grad());
        }
        adapter
    }

    /// Mean loss over the batch's response tokens at `exit`.
    fn loss(&self, batch: &Batch, exit: usize, adapter: &Adapter) -> Result<Tensor<1>, TuneError> {
        let decoder = self.decoder;
        let trained = window(exit, self.config.window);
        let rows: Vec<&[u32]> = batch.rows.iter().map(Vec::as_slice).collect();
        let hidden = decoder.embed(&rows)?;
        let hidden = decoder.run_blocks(hidden, 0..trained.start, Some(&self.adapter), None)?;
        let hidden = decoder.run_blocks(hidden, trained, Some(adapter), None)?;
        let [batch_size, tokens, d] = hidden.dims();
        let device = decoder.device();
        let positions = Tensor::<1, Int>::from_data(batch.positions.as_slice(), device);
        let targets = Tensor::<1, Int>::from_data(batch.targets.as_slice(), device);
        let weight = 1.0 / batch.targets.len() as f32;
        let weights = Tensor::<1>::full([batch.targets.len()], weight, device);
        let picked = hidden.reshape([batch_size * tokens, d]).select(0, positions);
        let normed = decoder.exit_norm(picked, exit, Some(adapter));
        Ok(decoder.loss(normed, targets, weights))
    }

    /// Takes the gradients of the step's trained tensors, in a fixed order.
    fn collect(&self, tracked: &Adapter, exit: usize, all: &mut Gradients) -> Vec<Gradient> {
        let mut out = Vec::new();
        let mut push = |name: String, slot: Slot, value: Option<Tensor<1>>| {
            if let Some(value) = value {
                out.push(Gradient { name, slot, value });
            }
        };
        for index in window(exit, self.config.window) {
            let Some(block) = tracked.block(index) else { continue };
            for &projection in &self.config.lora.targets {
                let Some(lora) = block.get(projection) else { continue };
                let base = format!("{index}.{}", projection.name());
                push(format!("{base}.a"), Slot::LoraA(index, projection), lora.a.grad_remove(all).map(flat));
                push(format!("{base}.b"), Slot::LoraB(index, projection), lora.b.grad_remove(all).map(flat));
            }
        }
        if let Some(norm) = tracked.exit_norm(exit).filter(|norm| norm.is_require_grad()) {
            push(format!("exit.{exit}"), Slot::ExitNorm(exit), norm.grad_remove(all));
        }
        out
    }

    fn apply(&mut self, gradients: Vec<Gradient>, scale: f64, lr: f64) -> Result<(), TuneError> {
        for Gradient { name, slot, value } in gradients {
            let grad = to_vec(value)?;
            match slot {
                Slot::LoraA(index, projection) | Slot::LoraB(index, projection) => {
                    let lora = self.adapter.block_mut(index).and_then(|block| block.get_mut(projection).as_mut());
                    let Some(lora) = lora else { continue };
                    let target = if matches!(slot, Slot::LoraA(..)) { &mut lora.a } else { &mut lora.b };
                    let mut values = to_vec(target.clone())?;
                    self.optimizer.update(&name, &mut values, &grad, scale as f32, lr);
                    *target = Tensor::from_data(TensorData::new(values, target.dims()), &target.device());
                }
                Slot::ExitNorm(exit) => {
                    if let Some(norm) = self.adapter.exit_norm(exit).cloned() {
                        let mut values = to_vec(norm.clone())?;
                        self.optimizer.update(&name, &mut values, &grad, scale as f32, lr);
                        let updated = Tensor::from_data(TensorData::new(values, norm.dims()), &norm.device());
                        self.adapter.set_exit_norm(exit, updated);
                    }
                }
            }
        }
        Ok(())
    }
}

fn flat(tensor: Tensor<2>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}

/// `sqrt(sum |g|^2)` over all gradients.
fn global_norm(gradients: &[Gradient]) -> Result<f64, TuneError> {
    let mut sum = 0.0;
    for gradient in gradients {
        sum += f64::from(to_vec(gradient.value.clone().powi_scalar(2).sum())?[0]);
    }
    Ok(sum.sqrt())
}
