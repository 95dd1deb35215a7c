//! Adaptive layer tuning: each step trains a window of blocks below one exit, with true truncation.
//!
//! Blocks below the window run without autodiff and keep nothing; blocks above the exit do not run at all. So time and
//! memory of a step fall with the window, not only the number of gradients (EDGE-LLM, DAC 2024).

mod state;

use std::time::Instant;

use burn::tensor::{Tensor, TensorData};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::{Decoder, Dropout};
use edgellm_model::generate::to_vec;
use edgellm_model::spans;
use edgellm_model::traits::{DataSource, ExitSchedule};
use edgellm_model::values::Projection;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::calibrate::calibrate_exit_norms;
use crate::exits::window;
use crate::optimizer::AdamW;
use crate::order::BatchOrder;
use crate::step::{Engine, Gradients, Place, StageSeconds, block_norm, engine};
use crate::{TuneConfig, TuneError};

/// Steps in a row with a loss that is not finite, after which a run gives up.
const MAX_SKIPPED: u32 = 10;

/// Examples from which the norms of the early exits start.
const CALIBRATION_EXAMPLES: usize = 16;

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
    /// Wall time of its stages.
    pub stages: StageSeconds,
    /// Whether the update was left out because loss or gradients were not finite.
    pub skipped: bool,
}

/// Tunes an adapter on a frozen base.
pub struct Trainer<'a> {
    decoder: &'a Decoder,
    config: TuneConfig,
    schedule: Box<dyn ExitSchedule>,
    adapter: Adapter,
    optimizer: AdamW,
    engine: Box<dyn Engine>,
    gradients: Gradients,
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
        let engine = engine(decoder, &config)?;
        let gradients = Gradients::default();
        Ok(Self { decoder, config, schedule, adapter, optimizer, engine, gradients, step: 0, skipped_in_a_row: 0 })
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
    /// Which examples a step takes depends on the settings and its number alone ([`BatchOrder`]). Before the first step of a
    /// run, the norms of the early exits are set from the first examples ([`calibrate_exit_norms`]).
    ///
    /// # Errors
    /// See [`Trainer::train_step`]; or an example cannot be read.
    pub fn run(
        &mut self,
        data: &dyn DataSource,
        mut on_step: impl FnMut(&Self, &StepReport) -> Result<bool, TuneError>,
    ) -> Result<(), TuneError> {
        if data.is_empty() {
            return Err(TuneError::EmptyBatch { step: self.step });
        }
        let TuneConfig { order, batch_size, seed, .. } = self.config;
        let lengths: Vec<usize> =
            (0..data.len()).map(|i| Ok(data.example(i)?.ids.len())).collect::<Result<_, TuneError>>()?;
        let order = BatchOrder::new(order, &lengths, batch_size, seed)?;
        if self.step == 0 && self.config.exits.len() > 1 {
            let first =
                (0..data.len().min(CALIBRATION_EXAMPLES)).map(|i| data.example(i)).collect::<Result<Vec<_>, _>>()?;
            calibrate_exit_norms(self.decoder, &mut self.adapter, &self.config.exits, &first, batch_size)?;
        }
        while self.step < self.config.steps {
            let examples =
                order.batch(self.step).into_iter().map(|index| data.example(index)).collect::<Result<Vec<_>, _>>()?;
            let report = self.train_step(&examples)?;
            if !on_step(self, &report)? {
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
        let choice = self.schedule.choose(step, self.config.exits.len());
        let exit = self.config.exits[choice];
        let last = self.decoder.n_blocks();
        let norm = self.config.train_exit_norms && exit < last && self.adapter.exit_norm(exit).is_some();
        let mut place = Place { exit, window: window(exit, self.config.window), norm, dropout: None };
        let tokens = |e: &Example| (0..e.ids.len()).filter(|position| *position > 0 && e.is_target(*position)).count();
        let examples: Vec<Example> = examples.iter().filter(|e| tokens(e) > 0).cloned().collect();
        let response_tokens: usize = examples.iter().map(tokens).sum();
        if response_tokens == 0 {
            return Err(TuneError::EmptyBatch { step });
        }
        let tokens: usize = examples.iter().map(|e| e.ids.len() - 1).sum();
        let span = tracing::debug_span!("tune_step", step, exit, tokens).entered();
        self.gradients.reset(&self.adapter, &place, self.decoder.config().hidden_size);
        let mut loss = 0.0;
        let TuneConfig { lora_dropout: share, seed, .. } = self.config;
        for (index, part) in parts(&examples, self.config.micro_tokens).into_iter().enumerate() {
            // Every part of every step has a stream of its own.
            let stream = ChaCha8Rng::seed_from_u64(seed ^ (step << 16) ^ index as u64).next_u64();
            place.dropout = (share > 0.0).then_some(Dropout { share, seed: stream });
            let weight = 1.0 / response_tokens as f32;
            let (adapter, gradients) = (&self.adapter, &mut self.gradients);
            loss += self.engine.accumulate(self.decoder, adapter, part, &place, weight, gradients)?;
        }
        let update = Instant::now();
        let norm = self.gradients.norm();
        if tracing::event_enabled!(target: spans::GRADIENTS, tracing::Level::TRACE) {
            for (index, gradients) in place.window.clone().zip(&self.gradients.blocks) {
                tracing::trace!(target: spans::GRADIENTS, index, norm = block_norm(gradients));
            }
        }
        let finite = norm.is_finite() && loss.is_finite();
        let lr = self.config.learning_rate
            * self.config.exit_scale.factor(exit, last)
            * self.config.lr_schedule.factor(step, self.config.steps, self.config.warmup_steps);
        if finite {
            self.skipped_in_a_row = 0;
            let clip = self.config.max_grad_norm;
            let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
            let _span = tracing::debug_span!("optimizer").entered();
            self.apply(&place, scale, lr)?;
        } else {
            self.skipped_in_a_row += 1;
            tracing::warn!(step, loss, grad_norm = norm, "step skipped: loss or gradients are not finite");
            if self.skipped_in_a_row >= MAX_SKIPPED {
                return Err(TuneError::Diverged { steps: self.skipped_in_a_row, step });
            }
        }
        drop(span);
        self.schedule.observe(choice, loss, self.multiply_adds(&place, tokens, response_tokens));
        self.step += 1;
        let stages = StageSeconds { update: update.elapsed().as_secs_f64(), ..self.engine.take_seconds() };
        Ok(StepReport {
            step,
            exit,
            loss,
            response_tokens,
            tokens,
            grad_norm: norm,
            learning_rate: lr,
            seconds: start.elapsed().as_secs_f64(),
            stages,
            skipped: !finite,
        })
    }

    /// Multiply-adds of a step in the frozen weights: forward below the window, forward and backward in it, and both in the
    /// head.
    fn multiply_adds(&self, place: &Place, tokens: usize, response_tokens: usize) -> f64 {
        let model = self.decoder.config();
        let block: usize = Projection::ALL.iter().map(|&p| model.projection_shape(p).iter().product::<usize>()).sum();
        let head = model.vocab_size * model.hidden_size;
        let passes = place.window.start + 2 * place.window.len();
        (tokens * passes * block + 2 * response_tokens * head) as f64
    }

    /// Bytes of the buffers that are kept from step to step, the optimizer's state included.
    pub fn buffer_bytes(&self) -> u64 {
        self.engine.bytes() as u64 + self.optimizer.state_bytes()
    }

    /// Updates what the step trained, in a fixed order.
    fn apply(&mut self, place: &Place, scale: f64, lr: f64) -> Result<(), TuneError> {
        let Self { adapter, optimizer, gradients, .. } = self;
        for (index, block) in place.window.clone().zip(&gradients.blocks) {
            for (gradient, projection) in block.linears.iter().zip(Projection::ALL) {
                let lora = adapter.block_mut(index).and_then(|block| block.get_mut(projection).as_mut());
                let (Some(lora), Some(gradient)) = (lora, gradient) else { continue };
                let name = format!("{index}.{}", projection.name());
                for (part, tensor, gradient) in [("a", &mut lora.a, &gradient.a), ("b", &mut lora.b, &gradient.b)] {
                    let dims = tensor.dims();
                    let device = tensor.device();
                    let mut values = to_vec(tensor.clone())?;
                    optimizer.update(&format!("{name}.{part}"), &mut values, gradient, scale as f32, lr);
                    *tensor = Tensor::from_data(TensorData::new(values, dims), &device);
                }
            }
        }
        if let Some(norm) = adapter.exit_norm(place.exit).filter(|_| place.norm).cloned() {
            let (dims, device) = (norm.dims(), norm.device());
            let mut values = to_vec(norm)?;
            optimizer.update(&format!("exit.{}", place.exit), &mut values, &gradients.norm, scale as f32, lr);
            adapter.set_exit_norm(place.exit, Tensor::from_data(TensorData::new(values, dims), &device));
        }
        Ok(())
    }
}

/// Consecutive examples with at most so many tokens together, or one with more.
fn parts(examples: &[Example], tokens: usize) -> Vec<&[Example]> {
    let (mut parts, mut start, mut sum) = (Vec::new(), 0, 0);
    for (i, example) in examples.iter().enumerate() {
        if i > start && sum + example.ids.len() > tokens {
            parts.push(&examples[start..i]);
            (start, sum) = (i, 0);
        }
        sum += example.ids.len();
    }
    parts.push(&examples[start..]);
    parts
}
