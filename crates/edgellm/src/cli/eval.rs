//! `edgellm eval`: perplexity of a text, distance from a base model, loss on held-out examples, multiple choice.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use edgellm::eval::{
    Divergence, HeldOut, MultipleChoice, Perplexity, Progress, heldout_loss, kl_divergence, multiple_choice,
    peak_rss_bytes, perplexity, read_questions,
};
use edgellm::model::adapter::Adapter;
use edgellm::model::data::DataReport;
use edgellm::model::io::read_text;
use edgellm::model::traits::Voter;
use edgellm::session::LoadedModel;
use serde_json::json;

use super::data::DataArgs;
use super::failure::Usage;
use super::memory::Room;
use super::output::{bytes, seconds, table};
use super::progress::Counted;
use super::run::exits;
use super::run_adapters::load_adapter;
use super::{Context, interrupt, vote};

/// Measure how well a model does
#[derive(Args)]
pub(crate) struct Eval {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// An adapter, as `edgellm adapt` or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// A model to compare with, which computes in f32: KL divergence and agreement on the text
    #[arg(long, value_name = "MODEL", requires = "text")]
    base: Option<String>,
    /// A text to measure the perplexity on
    #[arg(long, value_name = "FILE", required_unless_present_any = ["data", "multiple_choice"])]
    text: Option<PathBuf>,
    /// Tokens of a window of the text
    #[arg(long, default_value_t = 512, value_name = "N")]
    context: usize,
    /// Windows of the text at most (default: all)
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Examples to measure the loss of the responses on: JSON lines, CSV or a plain text
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    #[command(flatten)]
    format: DataArgs,
    /// Questions with options to choose from: JSON lines with 'context', 'choices' and 'answer' (an index), or with
    /// 'input' that lists options by letter and 'output'
    #[arg(long, value_name = "FILE.jsonl")]
    multiple_choice: Option<PathBuf>,
    /// Questions at most (default: all)
    #[arg(long, value_name = "N", requires = "multiple_choice")]
    limit: Option<usize>,
    /// How the exits decide together on examples and questions, one or several: last, max, renorm-max, mean; with a
    /// fitted adapter also weighted, calibrated-max, calibrated-renorm-max, calibrated-mean
    #[arg(long, default_value = "last", value_delimiter = ',', value_name = "NAME,...")]
    vote: Vec<String>,
}

/// What was measured.
#[derive(Default)]
struct Results {
    perplexity: Option<Perplexity>,
    divergence: Option<Divergence>,
    heldout: Option<HeldOut>,
    data: Option<DataReport>,
    choice: Option<MultipleChoice>,
    seconds: f64,
}

impl Eval {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.format.check(&self.data)?;
        for name in &self.vote {
            vote::check_name(name, self.adapter.as_deref())?;
        }
        if self.limit == Some(0) {
            return Err(Usage("--limit: expected at least 1, found 0".into()).into());
        }
        if self.context < 3 || self.windows == Some(0) {
            let text = format!("--context: expected at least 3, found {}; --windows: at least 1", self.context);
            return Err(Usage(text).into());
        }
        let model = ctx.load(&self.model, Room::PASSES)?;
        let most = model.decoder.config().max_position_embeddings;
        if self.text.is_some() && self.context > most {
            let text =
                format!("--context: expected at most {most}, what the model was made for, found {}", self.context);
            return Err(Usage(text).into());
        }
        let adapter = load_adapter(self.adapter.as_deref(), &model)?;
        let start = Instant::now();
        let mut results = Results::default();
        if let Some(path) = &self.text {
            self.on_text(ctx, &model, adapter.as_ref(), path, &mut results)?;
        }
        if let Some(path) = &self.data {
            self.on_data(ctx, &model, adapter.as_ref(), path, &mut results)?;
        }
        if let Some(path) = &self.multiple_choice {
            results.choice = Some(self.on_questions(ctx, &model, adapter.as_ref(), path)?);
        }
        results.seconds = start.elapsed().as_secs_f64();
        self.report(ctx, &model, &results)
    }

    fn on_text(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        path: &Path,
        results: &mut Results,
    ) -> anyhow::Result<()> {
        let ids = model.tokenizer.encode(&read_text(path)?, false)?;
        let (context, limit) = (self.context, self.windows);
        results.perplexity = Some(with_progress(ctx, "perplexity", |on_step| {
            Ok(perplexity(&model.decoder, adapter, &ids, context, limit, on_step)?)
        })?);
        if let Some(name) = &self.base {
            let base = ctx.load_reference(name)?;
            if base.tokenizer.encode(&read_text(path)?, false)? != ids {
                anyhow::bail!("the base model '{name}' cuts the text into other tokens than '{}'", self.model);
            }
            results.divergence = Some(with_progress(ctx, "KL divergence", |on_step| {
                Ok(kl_divergence(&base.decoder, &model.decoder, adapter, &ids, context, limit, on_step)?)
            })?);
        }
        Ok(())
    }

    fn on_data(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        path: &Path,
        results: &mut Results,
    ) -> anyhow::Result<()> {
        let data = self.format.read(model, path)?;
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voters = self.voters(&exits)?;
        let voters: Vec<&dyn Voter> = voters.iter().map(AsRef::as_ref).collect();
        results.heldout = Some(with_progress(ctx, "held-out loss", |on_step| {
            Ok(heldout_loss(&model.decoder, adapter, &exits, &voters, &data.examples, on_step)?)
        })?);
        results.data = Some(data.report);
        Ok(())
    }

    fn on_questions(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        path: &Path,
    ) -> anyhow::Result<MultipleChoice> {
        let questions = read_questions(path, &model.tokenizer, self.limit.unwrap_or(usize::MAX))?;
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voters = self.voters(&exits)?;
        let voters: Vec<&dyn Voter> = voters.iter().map(AsRef::as_ref).collect();
        with_progress(ctx, "multiple choice", |on_step| {
            Ok(multiple_choice(&model.decoder, adapter, &exits, &voters, &questions, on_step)?)
        })
    }

    /// The votes that were asked for.
    fn voters(&self, exits: &[usize]) -> anyhow::Result<Vec<Box<dyn Voter>>> {
        self.vote.iter().map(|name| vote::named(name, self.adapter.as_deref(), exits)).collect()
    }

    fn report(&self, ctx: &Context, model: &LoadedModel, results: &Results) -> anyhow::Result<()> {
        let text_tokens = results.perplexity.map(|p| p.tokens);
        let data_tokens = results.heldout.as_ref().map(|h| h.tokens);
        let json = json!({
            "perplexity": results.perplexity.map(|p| p.all_targets),
            "second_half_perplexity": results.perplexity.map(|p| p.second_half),
            "windows": results.perplexity.map(|p| p.windows),
            "kl": results.divergence.map(|d| d.kl),
            "second_half_kl": results.divergence.map(|d| d.second_half_kl),
            "top1_agreement": results.divergence.map(|d| d.top1_agreement),
            "heldout_loss": results.heldout.as_ref().and_then(|h| h.votes.first()),
            "by_exit": results.heldout.as_ref().map(|h| &h.by_exit),
            "vote": results.heldout.as_ref().map(|_| &self.vote[0]),
            "votes": results.heldout.as_ref().map(|h| vote::by_name(&self.vote, &h.votes)),
            "multiple_choice": results.choice.as_ref().map(|c| json!({
                "questions": c.questions,
                "by_exit": c.by_exit,
                "votes": vote::by_name(&self.vote, &c.votes),
            })),
            "examples": results.heldout.as_ref().map(|h| h.examples),
            "data": results.data,
            "tokens": text_tokens.unwrap_or(0) + data_tokens.unwrap_or(0),
            "seconds": results.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "model_bytes": model.files.file_bytes(),
        });
        ctx.result(json, || self.text(model, results))
    }

    fn text(&self, model: &LoadedModel, results: &Results) -> String {
        let mut rows = Vec::new();
        let mut row = |name: &str, value: String| rows.push(vec![name.to_string(), value]);
        if let Some(p) = &results.perplexity {
            row("perplexity", format!("{:.4}", p.all_targets));
            row("perplexity, second half", format!("{:.4}", p.second_half));
            row("windows", format!("{} of {} tokens", p.windows, self.context));
        }
        if let Some(d) = &results.divergence {
            row("KL from the base", format!("{:.5} nats", d.kl));
            row("KL, second half", format!("{:.5} nats", d.second_half_kl));
            row("same likeliest token", format!("{:.2}%", d.top1_agreement * 100.0));
        }
        for exit in results.heldout.iter().flat_map(|h| &h.by_exit) {
            row(&format!("held-out loss, exit {}", exit.exit), format!("{:.4}", exit.loss));
        }
        for (name, loss) in self.vote.iter().zip(results.heldout.iter().flat_map(|h| &h.votes)) {
            row(&format!("held-out loss, vote {name}"), format!("{loss:.4}"));
        }
        if let Some(c) = &results.choice {
            let exits = (1..=c.by_exit.len()).map(|number| format!("exit {number} of {}", c.by_exit.len()));
            let names = exits.chain(self.vote.iter().map(|name| format!("vote {name}")));
            for (name, found) in names.zip(c.by_exit.iter().chain(&c.votes)) {
                let value = format!("{:.4} summed, {:.4} per character", found.acc, found.acc_norm);
                row(&format!("accuracy, {name}"), value);
            }
            row("questions", c.questions.to_string());
        }
        row("model", bytes(model.files.file_bytes()));
        if let Some(peak) = peak_rss_bytes() {
            row("peak memory", bytes(peak));
        }
        row("time", seconds(results.seconds));
        let data = results.data.as_ref().map(|report| format!("{report}\n")).unwrap_or_default();
        data + table(&["", ""], &rows).trim_start()
    }
}

/// Runs an evaluation with progress; a signal stops it between two steps.
pub(super) fn with_progress<T>(
    ctx: &Context,
    what: &str,
    work: impl FnOnce(&mut dyn FnMut(Progress)) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut progress = ctx.progress(what, 0, Counted::Items("steps"));
    let result = interrupt::stoppable(|| {
        work(&mut |step| {
            progress.set_total(step.total as u64);
            progress.set(step.done as u64);
            interrupt::checkpoint();
        })
    })?;
    progress.finish();
    Ok(result)
}
