//! What `edgellm adapt` prints and records.

use edgellm::eval::{ExitLoss, heldout_loss, peak_rss_bytes};
use edgellm::model::adapter::Adapter;
use edgellm::model::data::Example;
use edgellm::model::traits::{MetricSink, Voter};
use edgellm::session::LoadedModel;
use edgellm::tune::StepReport;
use serde_json::{Map, Value, json};

use super::super::data::TrainingData;
use super::super::output::{bytes, seconds, table};
use super::super::progress::Counted;
use super::super::{Context, interrupt};
use super::Adapt;
use super::steps::Tuned;

impl Adapt {
    pub(super) fn report(
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
            "resumed_at": tuned.resumed_at, "memory_plan": tuned.plan, "peak_rss_bytes": peak_rss_bytes(),
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
pub(super) struct Losses {
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
pub(super) fn held_out(
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

pub(super) fn step_json(report: &StepReport) -> Value {
    json!({
        "step": report.step, "exit": report.exit, "loss": report.loss, "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate, "tokens": report.tokens, "response_tokens": report.response_tokens,
        "seconds": report.seconds, "stage_seconds": {
            "prefix": report.stages.prefix, "window": report.stages.window, "head": report.stages.head,
            "backward": report.stages.backward, "update": report.stages.update,
        }, "skipped": report.skipped,
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
