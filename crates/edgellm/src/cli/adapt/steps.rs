//! The steps of a run.

use std::time::Instant;

use edgellm::eval::rss_bytes;
use edgellm::model::adapter::Adapter;
use edgellm::model::data::Example;
use edgellm::model::files::ModelFiles;
use edgellm::model::traits::MetricSink;
use edgellm::session::LoadedModel;
use edgellm::tune::control::{Control, Flow, PauseEvent, run_paused};
use edgellm::tune::exits::exit_schedule;
use edgellm::tune::memory::StepShape;
use edgellm::tune::{StepReport, Trainer, TuneConfig};
use serde_json::{Value, json};

use super::super::Context;
use super::super::memory::Room;
use super::super::output::bytes;
use super::super::progress::Counted;
use super::durability::{Saver, identity};
use super::report::step_json;
use super::{Adapt, DEFAULT_WINDOW};

/// Hundredths of the memory that steps may take from weights that could stay in it.
const STEP_SHARE: u64 = 50;

/// What a run of steps gave.
pub(super) struct Tuned {
    pub(super) adapter: Adapter,
    pub(super) reports: Vec<StepReport>,
    pub(super) seconds: f64,
    pub(super) stopped: bool,
    /// Steps that an earlier process had done.
    pub(super) resumed_at: u64,
    /// What was chosen for `--max-memory`.
    pub(super) plan: Value,
}

impl Adapt {
    /// Runs the steps; a signal ends them after the current one.
    pub(super) fn tune(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        mut config: TuneConfig,
        train: &Vec<Example>,
        sink: &mut dyn MetricSink,
    ) -> anyhow::Result<Tuned> {
        let plan = self.fit(ctx, model, &mut config, train)?;
        let identity = identity(self.settings(&config), self.model_facts(model), train);
        let resumed = self.durability.latest(ctx, &self.output, &identity)?;
        let saver = self.durability.saver(&self.output, identity)?;
        let schedule = exit_schedule(&self.exit_schedule, self.steps, self.seed)?;
        let mut trainer = Trainer::new(&model.decoder, config, schedule)?;
        if let Some(state) = &resumed {
            trainer.restore(state)?;
        }
        let resumed_at = trainer.steps_done();
        let parameters = trainer.adapter().parameters();
        ctx.say(&format!("{parameters} adapter values, {} steps", self.steps));
        let mut control = self.durability.control(ctx)?;
        let mut progress = ctx.progress("adapt", self.steps, Counted::Items("steps"));
        let mut reports = Vec::new();
        let start = Instant::now();
        trainer.run(train, |trainer, report| {
            sink.record("step", step_json(report))?;
            let skipped = if report.skipped { ", skipped" } else { "" };
            progress.set_with(report.step + 1, format!("exit {}, loss {:.4}{skipped}", report.exit, report.loss));
            reports.push(report.clone());
            let go_on = wait(ctx, control.as_mut(), report.step + 1) == Flow::Run;
            let due = |saver: &Saver| !go_on || saver.is_due(report.step + 1);
            if let Some(saver) = saver.as_ref().filter(|saver| report.step + 1 < self.steps && due(saver)) {
                saver.save(&trainer.state()?)?;
            }
            Ok(go_on)
        })?;
        progress.finish();
        let stopped = trainer.steps_done() < self.steps;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Tuned { adapter: trainer.into_adapter(), reports, seconds, stopped, resumed_at, plan })
    }

    /// What steps need beside the weights: all that makes them fast, but at most [`STEP_SHARE`] of the memory. Weights that
    /// do not fit are streamed in every pass, so that many tokens at once are worth more than a few blocks in memory.
    pub(super) fn room(&self, ctx: &Context) -> anyhow::Result<Room> {
        let files = ModelFiles::open(&ctx.store.resolve(&self.model)?)?;
        let config = self.config(files.config().n_layers)?;
        let shape = StepShape::new(files.config(), &config);
        let tokens = config.batch_size * self.format.max_len;
        let windows = config.window..config.window + 1;
        let plan = shape.plan(u64::MAX, tokens, self.format.max_len, windows)?;
        let wanted = shape.adapter_bytes() + plan.bytes;
        let most = ctx.max_memory.map_or(u64::MAX, |limit| limit / 100 * STEP_SHARE);
        Ok(Room { cache_tokens: 0, pass_tokens: 0, other: wanted.min(most) })
    }

    /// Fits the settings into `--max-memory`; returns what was chosen.
    fn fit(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        config: &mut TuneConfig,
        train: &[Example],
    ) -> anyhow::Result<Value> {
        let Some(budget) = ctx.max_memory else { return Ok(Value::Null) };
        // Weights in mapped files take memory only once they were used.
        model.decoder.forward(&[0], None, None)?;
        let used = rss_bytes()
            .ok_or_else(|| anyhow::anyhow!("--max-memory: this system does not tell how much memory a process uses"))?;
        let shape = StepShape::new(model.decoder.config(), config);
        let adapter = shape.adapter_bytes();
        let longest = train.iter().map(|example| example.ids.len()).max().unwrap_or(0);
        let most = DEFAULT_WINDOW.min(model.decoder.n_blocks());
        let windows = self.window.map_or(1..most + 1, |window| window..window + 1);
        let left = budget.saturating_sub(used + adapter);
        let plan = shape.plan(left, config.batch_size * longest, longest, windows).map_err(|error| match error {
            edgellm::tune::TuneError::Memory { least, .. } => anyhow::anyhow!(
                "--max-memory: expected at least {}, found {}; the model takes {} and the leanest step {}",
                bytes(used + adapter + least),
                bytes(budget),
                bytes(used),
                bytes(adapter + least)
            ),
            other => other.into(),
        })?;
        (config.window, config.micro_tokens, config.keep) = (plan.window, plan.micro_tokens, plan.keep);
        let expected = used + adapter + plan.bytes;
        let kept = plan.keep.blocks().min(plan.window);
        ctx.say(&format!(
            "memory: a window of {} blocks, of which {kept} keep their activations, {} tokens at once: {} of {}",
            plan.window,
            plan.micro_tokens,
            bytes(expected),
            bytes(budget)
        ));
        Ok(json!({
            "window": plan.window, "micro_tokens": plan.micro_tokens, "kept_blocks": kept,
            "budget_bytes": budget, "predicted_bytes": expected, "before_bytes": used,
        }))
    }

    /// Settings that change what is computed.
    fn settings(&self, config: &TuneConfig) -> Value {
        json!({
            "steps": config.steps, "batch": config.batch_size, "order": config.order.name(),
            "micro_tokens": config.micro_tokens, "exits": config.exits, "window": config.window,
            "exit_schedule": self.exit_schedule, "rank": config.lora.rank, "alpha": config.lora.alpha,
            "rslora": config.lora.use_rslora, "targets": config.lora.targets.to_string(),
            "lora_dropout": config.lora_dropout, "lr": config.learning_rate, "lr_schedule": self.optimizer.lr_schedule,
            "exit_scale": self.optimizer.exit_scale, "optimizer_state": config.adamw.state.name(),
            "warmup": config.warmup_steps, "weight_decay": config.adamw.weight_decay,
            "max_grad_norm": config.max_grad_norm, "seed": config.seed,
        })
    }

    /// What tells one base model from another.
    fn model_facts(&self, model: &LoadedModel) -> Value {
        let config = model.decoder.config();
        let formats: Vec<String> = (0..model.decoder.n_blocks())
            .filter_map(|index| model.decoder.store().layouts(index).ok())
            .map(|layouts| layouts.iter().map(|l| l.format.name()).collect::<Vec<_>>().join(","))
            .collect();
        json!({
            "name": self.base_name(), "blocks": config.n_layers, "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size, "formats": formats,
        })
    }
}

/// Waits as long as something says to pause.
fn wait(ctx: &Context, control: &mut dyn Control, step: u64) -> Flow {
    run_paused(control, step, std::thread::sleep, |event| match event {
        PauseEvent::Paused { reason } => ctx.say(&format!("paused before step {step}: {reason}")),
        PauseEvent::Resumed { waited } => ctx.say(&format!("going on after {} s", waited.as_secs())),
    })
}
