//! `edgellm adapt`: tunes an adapter on data, window by window, and reports the held-out loss before and after.

mod durability;
mod report;
mod steps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use edgellm::model::adapter::{Adapter, LoraConfig, Targets, even_exits};
use edgellm::model::data::ValSplit;
use edgellm::tune::exits::{ExitScale, exit_schedule};
use edgellm::tune::optimizer::{AdamWConfig, LrSchedule, StateType};
use edgellm::tune::order::Order;
use edgellm::tune::voters::VOTERS;
use edgellm::tune::{Keep, MICRO_TOKENS, TuneConfig};

use self::durability::DurabilityArgs;
use self::report::held_out;
use super::data::DataArgs;
use super::failure::{Interrupted, Usage, usage};
use super::measure::model_name;
use super::{Context, check_output_dir, interrupt, stop_if_requested};

/// Blocks below an exit that a step trains, if nothing else is asked for.
const DEFAULT_WINDOW: usize = 8;

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
    /// Blocks below an exit that a step trains (default: 8, or with --max-memory as many of 8 as fit)
    #[arg(long, value_name = "M")]
    window: Option<usize>,
    /// Tokens that are run at once, unless an example has more: fewer need less memory, for the same steps
    #[arg(long, value_name = "N", default_value_t = MICRO_TOKENS, conflicts_with = "max_memory")]
    micro_tokens: usize,
    /// Blocks of the window that keep their activations; the others compute them again, which needs less memory
    #[arg(long, value_name = "N", default_value_t = DEFAULT_WINDOW, conflicts_with = "max_memory")]
    keep_blocks: usize,
    /// Which examples a step takes: file, shuffled, or bucketed (of similar length)
    #[arg(long, default_value = "file", value_name = "ORDER")]
    order: String,
    /// Which exit a step trains: sequential, uniform, cyclic or adaptive
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
    /// Scale the adapter by alpha / sqrt(rank) (rank-stabilized LoRA)
    #[arg(long)]
    rslora: bool,
    /// Share of the adapter's inputs that a step sets to zero, against learning by heart
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", allow_negative_numbers = true)]
    lora_dropout: f32,
    #[command(flatten)]
    optimizer: OptimizerArgs,
    #[command(flatten)]
    durability: DurabilityArgs,
    /// Seed of the adapter's start and of the exits' order
    #[arg(long, default_value_t = 0)]
    seed: u64,
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
    /// How the optimizer's moments are stored: f32 or int8
    #[arg(long, default_value = "f32", value_name = "TYPE")]
    optimizer_state: String,
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

impl Adapt {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<ExitCode> {
        self.check()?;
        let model = ctx.load(&self.model, self.room(ctx)?)?;
        let config = self.config(model.decoder.n_blocks())?;
        let eval_data = self.eval_data.as_deref();
        let data = self.format.read_training(&model, &self.data, eval_data, self.val_split, self.seed)?;
        ctx.say(&data.to_string());
        let (train, heldout) = (&data.train, &data.heldout);
        let mut sink = ctx.metrics();
        let exits = config.exits.clone();
        let before = match heldout {
            Some(examples) => Some(held_out(ctx, &model, None, &exits, examples, &[])?),
            None => None,
        };
        stop_if_requested()?;
        let tuned = self.tune(ctx, &model, config, train, sink.as_mut())?;
        tuned.adapter.save(&self.output, &self.base_name(), self.force || self.durability.resume)?;
        if !tuned.stopped {
            self.durability.clean(&self.output)?;
        }
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
        let done = tuned.resumed_at + tuned.reports.len() as u64;
        let go_on = if self.durability.is_on() { "; --resume goes on" } else { "" };
        let output = self.output.display();
        ctx.say(&format!("stopped after {done} of {} steps; {output} holds what they learned{go_on}", self.steps));
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
        check_output_dir(&self.output, self.force || self.durability.resume)?;
        self.durability.check(&self.output, self.force)?;
        if self.output.exists() && !Adapter::is_adapter_dir(&self.output) {
            let text = format!("{}: --force replaces an adapter only, and this folder is none", self.output.display());
            return Err(Usage(text).into());
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
        self.optimizer.optimizer_state.parse::<StateType>()?;
        self.order.parse::<Order>()?;
        Ok(())
    }

    fn config(&self, n_blocks: usize) -> anyhow::Result<TuneConfig> {
        let targets = self.targets.clone();
        targets.check(n_blocks).map_err(usage)?;
        let lora = LoraConfig { rank: self.rank, alpha: self.alpha, use_rslora: self.rslora, targets };
        lora.validate().map_err(usage)?;
        let optimizer = &self.optimizer;
        Ok(TuneConfig {
            steps: self.steps,
            batch_size: self.batch,
            order: self.order.parse()?,
            micro_tokens: self.micro_tokens,
            keep: Keep::Last(self.keep_blocks),
            exits: even_exits(n_blocks, self.exits).map_err(usage)?,
            window: self.window.unwrap_or(DEFAULT_WINDOW),
            lora,
            lora_dropout: self.lora_dropout,
            train_exit_norms: true,
            learning_rate: optimizer.lr,
            exit_scale: optimizer.exit_scale.parse()?,
            lr_schedule: optimizer.lr_schedule.parse()?,
            warmup_steps: optimizer.warmup,
            adamw: AdamWConfig {
                weight_decay: optimizer.weight_decay,
                state: optimizer.optimizer_state.parse()?,
                ..AdamWConfig::default()
            },
            max_grad_norm: optimizer.max_grad_norm,
            seed: self.seed,
        })
    }

    /// The base model as PEFT is told: a Hub id or stored name as it is, of a path the last part.
    fn base_name(&self) -> String {
        if Path::new(&self.model).exists() { model_name(&self.model) } else { self.model.clone() }
    }
}
