//! `edgellm adapt`: tunes an adapter on data, window by window, and reports the held-out loss before and after.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use edgellm::eval::{ExitLoss, JsonLines, heldout_loss, peak_rss_bytes};
use edgellm::model::ModelError;
use edgellm::model::adapter::{Adapter, LoraConfig, Targets, even_exits};
use edgellm::model::data::{Example, ValSplit};
use edgellm::model::traits::{MetricSink, NoMetrics, Voter};
use edgellm::session::LoadedModel;
use edgellm::tune::exits::{ExitScale, exit_schedule};
use edgellm::tune::optimizer::{AdamWConfig, LrSchedule};
use edgellm::tune::voters::VOTERS;
use edgellm::tune::{Keep, StepReport, Trainer, TuneConfig};
use serde_json::{Map, Value, json};

use super::data::{DataArgs, TrainingData};
use super::failure::{Interrupted, Usage, usage};
use super::measure::model_name;
use super::output::{bytes, seconds, table};
use super::progress::Counted;
use super::{Context, check_output_dir, check_output_file, interrupt, stop_if_requested};

/// Tune an adapter on data, a window of blocks at a time
#[derive(Args)]
pub(crate) struct Adapt {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// Examples to learn from: JSON lines or CSV with instructions, messages, prompts or texts, or a plain text
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Examples to measure the loss on, before and after
    #[arg(long, value_name = "FILE")]
    eval_data: Option<PathBuf>,
    /// Hold out a part of the examples (such as 0.05), or this many, to measure the loss on
    #[arg(long, value_name = "PART", conflicts_with = "eval_data", allow_negative_numbers = true)]
    val_split: Option<ValSplit>,
    /// The adapter to write: a folder that PEFT reads as well
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Replace the adapter if it is there
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    format: DataArgs,
    /// Optimizer steps
    #[arg(long, default_value_t = 100, value_name = "N")]
    steps: u64,
    /// Examples in a step
    #[arg(long, default_value_t = 4, value_name = "N")]
    batch: usize,
    /// Exits, evenly spaced over the blocks
    #[arg(long, default_value_t = 4, value_name = "K")]
    exits: usize,
    /// Blocks below an exit that a step trains
    #[arg(long, default_value_t = 8, value_name = "M")]
    window: usize,
    /// Which exit a step trains: sequential, uniform or cyclic
    #[arg(long, default_value = "sequential", value_name = "NAME")]
    exit_schedule: String,
    /// Rank of the adapter
    #[arg(long, default_value_t = 8, value_name = "R")]
    rank: usize,
    /// Scale of the adapter: alpha / rank
    #[arg(long, allow_negative_numbers = true, default_value_t = 16.0, value_name = "A")]
    alpha: f64,
    /// Projections that are adapted, in every block or in some: q_proj,v_proj or 20-29:down_proj or all-linear
    #[arg(long, value_name = "LIST", default_value = "all-linear")]
    targets: Targets,
    #[command(flatten)]
    optimizer: OptimizerArgs,
    /// Seed of the adapter's start and of the exits' order
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// A file for metrics: JSON lines, one event a line
    #[arg(long, value_name = "FILE.jsonl")]
    metrics: Option<PathBuf>,
}

/// The optimizer's settings.
#[derive(Args)]
struct OptimizerArgs {
    /// Largest learning rate
    #[arg(long, allow_negative_numbers = true, default_value_t = 1e-3, value_name = "RATE")]
    lr: f64,
    /// How the learning rate moves after the warm-up: constant, cosine or linear
    #[arg(long, default_value = "constant", value_name = "NAME")]
    lr_schedule: String,
    /// How strongly exits before the last are trained: depth (less, the earlier they are) or equal
    #[arg(long, default_value = "depth", value_name = "NAME")]
    exit_scale: String,
    /// Steps of increasing learning rate
    #[arg(long, default_value_t = 0, value_name = "N")]
    warmup: u64,
    /// Decoupled weight decay
    #[arg(long, allow_negative_numbers = true, default_value_t = 0.0, value_name = "RATE")]
    weight_decay: f64,
    /// Largest norm of a step's gradients; 0 for no limit
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0, value_name = "NORM")]
    max_grad_norm: f64,
}

/// What a run of steps gave.
struct Tuned {
    adapter: Adapter,
    reports: Vec<StepReport>,
    seconds: f64,
    stopped: bool,
}

impl Adapt {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<ExitCode> {
        self.check()?;
        let model = ctx.load(&self.model)?;
        let config = self.config(model.decoder.n_blocks())?;
        let eval_data = self.eval_data.as_deref();
        let data = self.format.read_training(&model, &self.data, eval_data, self.val_split, self.seed)?;
        ctx.say(&data.to_string());
        let (train, heldout) = (&data.train, &data.heldout);
        let mut sink = self.sink()?;
        let exits = config.exits.clone();
        let before = match heldout {
            Some(examples) => Some(held_out(ctx, &model, None, &exits, examples, &[])?),
            None => None,
        };
        stop_if_requested()?;
        let tuned = self.tune(ctx, &model, config, train, sink.as_mut())?;
        tuned.adapter.save(&self.output, &self.base_name(), self.force)?;
        let after = match heldout {
            Some(examples) if !tuned.stopped => {
                let losses = held_out(ctx, &model, Some(&tuned.adapter), &exits, examples, &VOTERS);
                Some(losses.map_err(|error| self.interrupted_after(error))?)
            }
            _ => None,
        };
        self.report(ctx, &tuned, &data, before.as_ref(), after.as_ref(), sink.as_mut())?;
        if !tuned.stopped {
            return Ok(ExitCode::SUCCESS);
        }
        let done = tuned.reports.len();
        ctx.say(&format!(
            "stopped after {done} of {} steps; {} holds what they learned",
            self.steps,
            self.output.display()
        ));
        Ok(ExitCode::from(interrupt::STOPPED))
    }

    /// By then the adapter is written: a signal cuts off the report only.
    fn interrupted_after(&self, error: anyhow::Error) -> anyhow::Error {
        if error.is::<Interrupted>() {
            return Interrupted(format!("stopped by a signal; {} is complete", self.output.display())).into();
        }
        error
    }

    /// What can be checked before a model is loaded.
    fn check(&self) -> anyhow::Result<()> {
        self.format.check([&self.data].into_iter().chain(&self.eval_data))?;
        check_output_dir(&self.output, self.force)?;
        if self.output.exists() && !Adapter::is_adapter_dir(&self.output) {
            let text = format!("{}: --force replaces an adapter only, and this folder is none", self.output.display());
            return Err(Usage(text).into());
        }
        if let Some(path) = &self.metrics {
            check_output_file(path)?;
        }
        if self.steps == 0 {
            return Err(Usage("--steps: expected at least 1, found 0".into()).into());
        }
        let decay = self.optimizer.weight_decay;
        if !decay.is_finite() || decay < 0.0 {
            return Err(Usage(format!("--weight-decay: expected at least 0, found {decay}")).into());
        }
        exit_schedule(&self.exit_schedule, self.steps, self.seed)?;
        self.optimizer.lr_schedule.parse::<LrSchedule>()?;
        self.optimizer.exit_scale.parse::<ExitScale>()?;
        Ok(())
    }

    fn config(&self, n_blocks: usize) -> anyhow::Result<TuneConfig> {
        let targets = self.targets.clone();
        targets.check(n_blocks).map_err(usage)?;
        let lora = LoraConfig { rank: self.rank, alpha: self.alpha, use_rslora: false, targets };
        lora.validate().map_err(usage)?;
        Ok(TuneConfig {
            steps: self.steps,
            batch_size: self.batch,
            micro_batch: self.batch,
            keep: Keep::Inputs,
            exits: even_exits(n_blocks, self.exits).map_err(usage)?,
            window: self.window,
            lora,
            train_exit_norms: true,
            learning_rate: self.optimizer.lr,
            exit_scale: self.optimizer.exit_scale.parse()?,
            lr_schedule: self.optimizer.lr_schedule.parse()?,
            warmup_steps: self.optimizer.warmup,
            adamw: AdamWConfig { weight_decay: self.optimizer.weight_decay, ..AdamWConfig::default() },
            max_grad_norm: self.optimizer.max_grad_norm,
            seed: self.seed,
        })
    }
}

impl Adapt {
    fn sink(&self) -> Result<Box<dyn MetricSink>, ModelError> {
        Ok(match &self.metrics {
            Some(path) => Box::new(JsonLines::append(path)?),
            None => Box::new(NoMetrics),
        })
    }

    /// The base model as PEFT is told: a Hub id or stored name as it is, of a path the last part.
    fn base_name(&self) -> String {
        if Path::new(&self.model).exists() { model_name(&self.model) } else { self.model.clone() }
    }

    /// Runs the steps; a signal ends them after the current one.
    fn tune(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        config: TuneConfig,
        train: &Vec<Example>,
        sink: &mut dyn MetricSink,
    ) -> anyhow::Result<Tuned> {
        let schedule = exit_schedule(&self.exit_schedule, self.steps, self.seed)?;
        let mut trainer = Trainer::new(&model.decoder, config, schedule)?;
        let parameters = trainer.adapter().parameters();
        ctx.say(&format!("{parameters} adapter values, {} steps", self.steps));
        let mut progress = ctx.progress("adapt", self.steps, Counted::Items("steps"));
        let mut reports = Vec::new();
        let start = Instant::now();
        trainer.run(train, |report| {
            sink.record("step", step_json(report))?;
            let skipped = if report.skipped { ", skipped" } else { "" };
            progress.set_with(report.step + 1, format!("exit {}, loss {:.4}{skipped}", report.exit, report.loss));
            reports.push(report.clone());
            Ok(!interrupt::requested())
        })?;
        progress.finish();
        let stopped = (reports.len() as u64) < self.steps;
        Ok(Tuned { adapter: trainer.into_adapter(), reports, seconds: start.elapsed().as_secs_f64(), stopped })
    }

    fn report(
        &self,
        ctx: &Context,
        tuned: &Tuned,
        data: &TrainingData,
        before: Option<&Losses>,
        after: Option<&Losses>,
        sink: &mut dyn MetricSink,
    ) -> anyhow::Result<()> {
        let steps = tuned.reports.len();
        let loss = |report: Option<&StepReport>| report.map(|r| r.loss).filter(|loss| loss.is_finite());
        let json = json!({
            "steps": steps, "stopped": tuned.stopped, "path": self.output,
            "parameters": tuned.adapter.parameters(),
            "skipped_steps": tuned.reports.iter().filter(|r| r.skipped).count(),
            "loss_first": loss(tuned.reports.first()), "loss_last": loss(tuned.reports.last()),
            "heldout_before": before.map(Losses::last), "heldout_after": after.map(Losses::last),
            "by_exit_before": before.map(|l| &l.by_exit), "by_exit_after": after.map(|l| &l.by_exit),
            "votes_after": after.map(Losses::votes_json),
            "examples": data.json(), "seconds": tuned.seconds, "seconds_per_step": tuned.seconds / steps.max(1) as f64,
            "peak_rss_bytes": peak_rss_bytes(),
        });
        sink.record("end", json.clone())?;
        ctx.result(json, || format!("{data}\n{}", self.summary(tuned, before, after)))
    }

    fn summary(&self, tuned: &Tuned, before: Option<&Losses>, after: Option<&Losses>) -> String {
        let steps = tuned.reports.len();
        let each = seconds(tuned.seconds / steps.max(1) as f64);
        let mut text = format!("{steps} steps in {} ({each} each)", seconds(tuned.seconds));
        if let Some(peak) = peak_rss_bytes() {
            text.push_str(&format!(", peak memory {}", bytes(peak)));
        }
        text.push_str(&format!("; wrote {}\n", self.output.display()));
        if let (Some(before), Some(after)) = (before, after) {
            text.push_str(&losses_table(before, after));
        }
        text
    }
}

/// Held-out losses of every exit and of votes.
struct Losses {
    by_exit: Vec<ExitLoss>,
    votes: Vec<(&'static str, f64)>,
}

impl Losses {
    /// The whole model's.
    fn last(&self) -> f64 {
        self.by_exit.last().map_or(f64::NAN, |exit| exit.loss)
    }

    fn votes_json(&self) -> Value {
        let entry = |(name, loss): &(&str, f64)| ((*name).to_string(), json!(loss));
        Value::Object(self.votes.iter().map(entry).collect::<Map<_, _>>())
    }
}

/// Held-out losses of the exits and of these votes, in one pass.
fn held_out(
    ctx: &Context,
    model: &LoadedModel,
    adapter: Option<&Adapter>,
    exits: &[usize],
    examples: &[Example],
    voters: &[&dyn Voter],
) -> anyhow::Result<Losses> {
    let when = if adapter.is_some() { "held-out loss after" } else { "held-out loss before" };
    let mut progress = ctx.progress(when, 0, Counted::Items("batches"));
    let result = interrupt::stoppable(|| {
        let on_batch = &mut |p: edgellm::eval::Progress| {
            progress.set_total(p.total as u64);
            progress.set(p.done as u64);
            interrupt::checkpoint();
        };
        Ok(heldout_loss(&model.decoder, adapter, exits, voters, examples, on_batch)?)
    })?;
    progress.finish();
    let votes = voters.iter().map(|voter| voter.name()).zip(result.votes).collect();
    Ok(Losses { by_exit: result.by_exit, votes })
}

fn step_json(report: &StepReport) -> Value {
    json!({
        "step": report.step, "exit": report.exit, "loss": report.loss, "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate, "tokens": report.tokens, "response_tokens": report.response_tokens,
        "seconds": report.seconds, "skipped": report.skipped,
    })
}

fn losses_table(before: &Losses, after: &Losses) -> String {
    let mut rows: Vec<Vec<String>> = before
        .by_exit
        .iter()
        .zip(&after.by_exit)
        .map(|(b, a)| vec![format!("exit {}", b.exit), format!("{:.4}", b.loss), format!("{:.4}", a.loss)])
        .collect();
    rows.extend(after.votes.iter().map(|(name, loss)| vec![format!("vote {name}"), "-".into(), format!("{loss:.4}")]));
    table(&["held-out loss", "before", "after"], &rows)
}
