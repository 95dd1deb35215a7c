//! The tests on a model: reading a prompt, generating token by token, and tuning steps.

use std::time::Instant;

use edgellm::eval::peak_rss_bytes;
use edgellm::kernels::{active_isa, threads};
use edgellm::model::adapter::{Adapter, LoraConfig, Targets, even_exits};
use edgellm::model::data::Example;
use edgellm::model::files::ModelFiles;
use edgellm::model::generate::{Flow, Generator};
use edgellm::model::sample::{Sampler, SamplingConfig};
use edgellm::session::LoadedModel;
use edgellm::tune::exits::{ExitScale, exit_schedule};
use edgellm::tune::optimizer::{AdamWConfig, LrSchedule};
use edgellm::tune::order::Order;
use edgellm::tune::voters::voter;
use edgellm::tune::{Keep, MICRO_TOKENS, Trainer, TuneConfig};

use super::super::failure::{Usage, usage};
use super::super::progress::Counted;
use super::super::{Context, stop_if_requested};
use super::process::{cpu_ns, reset_peak_rss};
use super::random::Random;
use super::report::Row;
use super::stats::median;

/// Tokens of the warm-up of a generation.
const WARM_UP_TOKENS: usize = 8;
/// Most repetitions of the time to the first token.
const TTFT_REPETITIONS: usize = 3;
const SEED: u64 = 0;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// Read a prompt of `tokens` into an empty cache; the logits of its last token.
    Prompt { tokens: usize },
    /// Run `tokens` tokens one by one from an empty cache.
    Generate { tokens: usize },
    /// A step of LoRA on all projections of a window, on sequences of `tokens` tokens.
    Tune { tokens: usize, step: TuneStep },
}

/// What a tuning step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TuneStep {
    /// Sequences.
    pub(crate) batch: usize,
    /// Blocks that are trained; all without.
    pub(crate) window: Option<usize>,
    /// Exits, each of which has a step in a repetition.
    pub(crate) exits: usize,
    /// Whether activations are computed again.
    pub(crate) recompute: bool,
}

impl Test {
    fn tokens(self) -> usize {
        match self {
            Test::Prompt { tokens } | Test::Generate { tokens } | Test::Tune { tokens, .. } => tokens,
        }
    }
}

/// Wall and processor time of repetitions.
#[derive(Default)]
struct Samples {
    wall_ns: Vec<u64>,
    cpu_ns: Vec<u64>,
}

impl Samples {
    /// Runs a repetition.
    fn time<T>(&mut self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let cpu = cpu_ns();
        let start = Instant::now();
        let result = work()?;
        self.wall_ns.push(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        if let (Some(before), Some(after)) = (cpu, cpu_ns()) {
            self.cpu_ns.push(after.saturating_sub(before));
        }
        Ok(result)
    }

    /// Divides the last sample among `parts`.
    fn share(&mut self, parts: u64) {
        for samples in [&mut self.wall_ns, &mut self.cpu_ns] {
            if let Some(last) = samples.last_mut() {
                *last /= parts;
            }
        }
    }

    fn cpu(&mut self) -> Option<Vec<u64>> {
        let all = self.cpu_ns.len() == self.wall_ns.len();
        all.then(|| std::mem::take(&mut self.cpu_ns))
    }
}

/// A loaded model with what its rows have in common.
pub(crate) struct ModelBench<'a> {
    ctx: &'a Context,
    model: &'a LoadedModel,
    adapter: Option<&'a Adapter>,
    common: Row,
    repetitions: usize,
}

impl<'a> ModelBench<'a> {
    /// Measures `model`, which `name` names; prompts and generation with `adapter`, if any.
    pub(crate) fn new(
        ctx: &'a Context,
        name: &str,
        model: &'a LoadedModel,
        adapter: Option<&'a Adapter>,
        repetitions: usize,
    ) -> anyhow::Result<Self> {
        let size = Size::of(&model.files)?;
        let common = Row {
            build_version: env!("CARGO_PKG_VERSION").into(),
            isa: active_isa().name().into(),
            device: ctx.device.to_string(),
            activations: ctx.activations.to_string(),
            model_filename: name.into(),
            model_type: format!("{} {}", model.files.config().architecture.gguf, size.formats),
            model_size: size.bytes,
            model_n_params: size.parameters,
            n_threads: threads(),
            n_prompt: 0,
            n_gen: 0,
            n_tune: 0,
            n_tune_batch: 1,
            n_tune_window: None,
            n_tune_exits: 1,
            avg_ns: 0,
            stddev_ns: 0,
            median_ns: 0,
            avg_ts: 0.0,
            stddev_ts: 0.0,
            median_ts: 0.0,
            samples_ns: Vec::new(),
            samples_ts: Vec::new(),
            cpu_ns: None,
            ttft_ns: None,
            peak_rss_bytes: None,
            streamed_bytes: None,
            streamed_gbps: None,
        };
        Ok(Self { ctx, model, adapter, common, repetitions })
    }

    /// Runs a test.
    pub(crate) fn run(&self, test: Test) -> anyhow::Result<Row> {
        let most = self.model.decoder.config().max_position_embeddings;
        if test.tokens() > most {
            let text =
                format!("{}: expected at most {most} tokens, found {}", self.common.model_filename, test.tokens());
            return Err(Usage(text).into());
        }
        let mut row = self.common.clone();
        match test {
            Test::Prompt { tokens } => row.n_prompt = tokens,
            Test::Generate { tokens } => row.n_gen = tokens,
            Test::Tune { tokens, step } => {
                (row.n_tune, row.n_tune_batch) = (tokens, step.batch);
                (row.n_tune_window, row.n_tune_exits) = (step.window, step.exits);
            }
        }
        reset_peak_rss();
        let streamed = || self.model.streaming.as_ref().map(|streaming| streaming.store.streamed());
        let (before, start) = (streamed(), Instant::now());
        let mut samples = match test {
            Test::Prompt { tokens } => self.prompt(tokens, &mut row)?,
            Test::Generate { tokens } => self.generate(tokens, &row)?,
            Test::Tune { tokens, step } => self.tune(tokens, step, &row)?,
        };
        row.peak_rss_bytes = peak_rss_bytes();
        if let (Some(before), Some(after)) = (before, streamed()) {
            let bytes = after.bytes - before.bytes;
            row.streamed_bytes = Some(bytes);
            row.streamed_gbps = Some(bytes as f64 / start.elapsed().as_secs_f64() * 1e-9);
        }
        let cpu = samples.cpu();
        row.set_samples(samples.wall_ns, cpu);
        Ok(row)
    }

    /// A warm-up, then the repetitions of `work`, which times itself.
    fn repeat(
        &self,
        row: &Row,
        mut work: impl FnMut(&mut Samples, Round) -> anyhow::Result<()>,
    ) -> anyhow::Result<Samples> {
        let what = format!("{} {}", self.common.model_filename, row.test());
        let mut progress = self.ctx.progress(&what, self.repetitions as u64, Counted::Items("runs"));
        work(&mut Samples::default(), Round::WarmUp)?;
        let mut samples = Samples::default();
        for done in 1..=self.repetitions {
            stop_if_requested()?;
            work(&mut samples, Round::Counted)?;
            progress.set(done as u64);
        }
        progress.finish();
        Ok(samples)
    }

    fn generator(&self) -> anyhow::Result<Generator<'_>> {
        Ok(Generator::new(&self.model.decoder, self.adapter, voter("last")?, &[self.model.decoder.n_blocks()])?)
    }

    fn tokens(&self, random: &mut Random, n: usize) -> Vec<u32> {
        let vocab = self.model.decoder.config().vocab_size;
        (0..n).map(|_| random.below(vocab as u64) as u32).collect()
    }

    fn prompt(&self, tokens: usize, row: &mut Row) -> anyhow::Result<Samples> {
        let mut random = Random::new(SEED);
        let ids = self.tokens(&mut random, tokens);
        let samples = self.repeat(row, |samples, _| {
            let mut generator = self.generator()?;
            samples.time(|| Ok(generator.advance(&ids)?))?;
            Ok(())
        })?;
        let mut first = Samples::default();
        for _ in 0..self.repetitions.min(TTFT_REPETITIONS) {
            stop_if_requested()?;
            let mut sampler = Sampler::new(SamplingConfig::default())?;
            let mut generator = self.generator()?;
            first.time(|| Ok(generator.generate(&ids, 1, &[], &mut sampler, |_| Ok(Flow::Stop))?))?;
        }
        let times: Vec<f64> = first.wall_ns.iter().map(|&ns| ns as f64).collect();
        row.ttft_ns = Some(median(&times).round() as u64);
        Ok(samples)
    }

    fn generate(&self, tokens: usize, row: &Row) -> anyhow::Result<Samples> {
        let mut random = Random::new(SEED);
        let ids = self.tokens(&mut random, tokens);
        self.repeat(row, |samples, round| {
            let run = if round == Round::WarmUp { &ids[..tokens.min(WARM_UP_TOKENS)] } else { &ids };
            let mut generator = self.generator()?;
            samples.time(|| {
                for &id in run {
                    generator.advance(&[id])?;
                    stop_if_requested()?;
                }
                Ok(())
            })
        })
    }

    fn tune(&self, tokens: usize, step: TuneStep, row: &Row) -> anyhow::Result<Samples> {
        let mut random = Random::new(SEED);
        let examples: Vec<Example> = (0..step.batch)
            .map(|_| {
                let ids = self.tokens(&mut random, tokens);
                Example::new(&ids[..1], &ids[1..])
            })
            .collect();
        let steps = (self.repetitions as u64 + 1) * step.exits as u64;
        let config = self.tune_config(steps, step)?;
        let mut trainer = Trainer::new(&self.model.decoder, config, exit_schedule("cyclic", steps, SEED)?)?;
        self.repeat(row, |samples, _| {
            samples.time(|| {
                for _ in 0..step.exits {
                    let report = trainer.train_step(&examples)?;
                    if report.skipped {
                        anyhow::bail!("tuning step {}: expected a finite loss, found {}", report.step, report.loss);
                    }
                }
                Ok(())
            })?;
            samples.share(step.exits as u64);
            Ok(())
        })
    }

    fn tune_config(&self, steps: u64, step: TuneStep) -> anyhow::Result<TuneConfig> {
        let n_blocks = self.model.decoder.n_blocks();
        Ok(TuneConfig {
            steps,
            batch_size: step.batch,
            order: Order::File,
            micro_tokens: MICRO_TOKENS,
            keep: if step.recompute { Keep::Inputs } else { Keep::All },
            exits: even_exits(n_blocks, step.exits).map_err(usage)?,
            window: step.window.unwrap_or(n_blocks),
            lora: LoraConfig { rank: 8, alpha: 16.0, use_rslora: false, targets: Targets::all_linear() },
            lora_dropout: 0.0,
            train_exit_norms: false,
            learning_rate: 1e-4,
            exit_scale: ExitScale::Equal,
            lr_schedule: LrSchedule::Constant,
            warmup_steps: 0,
            adamw: AdamWConfig::default(),
            max_grad_norm: 1.0,
            seed: SEED,
        })
    }
}

/// Whether a repetition counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    WarmUp,
    Counted,
}

/// The weights of a model as they are stored.
struct Size {
    bytes: u64,
    parameters: u64,
    /// The formats of the matrices, that of most weights first.
    formats: String,
}

impl Size {
    fn of(files: &ModelFiles) -> anyhow::Result<Self> {
        let (mut bytes, mut parameters) = (0u64, 0u64);
        let mut formats: Vec<(String, u64)> = Vec::new();
        for name in files.names() {
            let shape = files.shape(name)?;
            let weights = shape.iter().fold(1u64, |n, d| n.saturating_mul(*d as u64));
            parameters += weights;
            if shape.len() != 2 {
                bytes += 4 * weights;
                continue;
            }
            let layout = files.layout(name)?;
            bytes += layout.bytes();
            let format = layout.format.name();
            match formats.iter_mut().find(|(known, _)| *known == format) {
                Some((_, count)) => *count += weights,
                None => formats.push((format, weights)),
            }
        }
        formats.sort_by_key(|(_, weights)| std::cmp::Reverse(*weights));
        let formats = formats.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join("+");
        Ok(Self { bytes, parameters, formats })
    }
}
