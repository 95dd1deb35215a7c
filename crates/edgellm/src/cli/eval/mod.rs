//! `edgellm eval`: perplexity of a text, distance from a base model, loss on held-out examples, multiple choice, checks of
//! generated answers.

mod answers;
#[cfg(feature = "results")]
mod compare;
mod report;
#[cfg(feature = "results")]
pub(crate) mod sweep;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use edgellm::eval::{
    Divergence, HeldOut, Item, MultipleChoice, Perplexity, Progress, QuestionFile, Reliability, Scoring, Strided,
    heldout_loss, kl_divergence, multiple_choice, perplexity, read_questions, reliability, strided_perplexity,
};
use edgellm::model::adapter::Adapter;
use edgellm::model::data::DataReport;
use edgellm::model::io::read_text;
use edgellm::model::traits::Voter;
use edgellm::session::LoadedModel;

use super::data::DataArgs;
use super::failure::Usage;
use super::memory::Room;
use super::progress::Counted;
use super::run::exits;
use super::run_adapters::load_adapter;
use super::{Context, interrupt, vote};

/// What there is to measure; one of them is needed.
#[cfg(feature = "results")]
const WHAT: [&str; 4] = ["data", "multiple_choice", "answers", "sweep"];
#[cfg(not(feature = "results"))]
const WHAT: [&str; 3] = ["data", "multiple_choice", "answers"];

/// What to do with results.
#[cfg(feature = "results")]
#[derive(clap::Subcommand)]
enum EvalCommand {
    Compare(compare::Compare),
}

/// Measure how well a model does
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Eval {
    #[cfg(feature = "results")]
    #[command(subcommand)]
    command: Option<EvalCommand>,
    #[cfg(feature = "results")]
    #[command(flatten)]
    sweep: sweep::SweepArgs,
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL", default_value = "", hide_default_value = true)]
    #[cfg_attr(feature = "results", arg(required_unless_present = "sweep"))]
    #[cfg_attr(not(feature = "results"), arg(required = true))]
    model: String,
    /// An adapter, as `edgellm adapt` or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// A model to compare with, which computes in f32: KL divergence and agreement on the text
    #[arg(long, value_name = "MODEL", requires = "text")]
    base: Option<String>,
    /// A text to measure the perplexity on
    #[arg(long, value_name = "FILE", required_unless_present_any = WHAT)]
    text: Option<PathBuf>,
    /// Tokens of a window of the text
    #[arg(long, default_value_t = 512, value_name = "N")]
    context: usize,
    /// Windows of the text at most (default: all)
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Also measure the perplexity in windows that begin every so many tokens, each token scored once
    #[arg(long, value_name = "N", requires = "text")]
    stride: Option<usize>,
    /// Examples to measure the loss of the responses on: JSON lines, CSV or a plain text
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    #[command(flatten)]
    format: DataArgs,
    /// Questions with options to choose from: JSON lines with 'context', 'choices' and 'answer' (an index), or with
    /// 'input' that lists options by letter and 'output'
    #[arg(long, value_name = "FILE.jsonl")]
    multiple_choice: Option<PathBuf>,
    /// Of options that are listed by letter: score the letter or the option's text
    #[arg(long, value_enum, default_value_t = ScoringArg::Letter, value_name = "WHAT", requires = "multiple_choice")]
    scoring: ScoringArg,
    /// Answered questions of the same subject before each question
    #[arg(long, default_value_t = 0, value_name = "K", requires = "multiple_choice")]
    shots: usize,
    /// The file that they come from (default: the same file, without the question itself)
    #[arg(long, value_name = "FILE.jsonl", requires = "shots")]
    shots_file: Option<PathBuf>,
    /// Tasks to answer, checked: JSON lines with 'prompt' or 'messages', and 'exact', 'contains', 'regex' or 'json_schema'
    #[arg(long, value_name = "FILE.jsonl")]
    answers: Option<PathBuf>,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 128, value_name = "N", requires = "answers")]
    max_tokens: usize,
    /// Questions and tasks at most (default: all)
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Measure how far confidence is from being right, of each exit and vote, on the examples
    #[arg(long, requires = "data")]
    calibration: bool,
    /// With --json: also the items that every figure comes from, which comparisons need
    #[arg(long)]
    items: bool,
    /// How the exits decide together on examples and questions, one or several: last, max, renorm-max, mean; with a
    /// fitted adapter also weighted, calibrated-max, calibrated-renorm-max, calibrated-mean
    #[arg(long, default_value = "last", value_delimiter = ',', value_name = "NAME,...")]
    vote: Vec<String>,
}

/// What of an option is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScoringArg {
    /// Its letter
    Letter,
    /// Its text
    Answer,
}

/// What was measured.
#[derive(Default)]
struct Results {
    perplexity: Option<Perplexity>,
    strided: Option<Strided>,
    divergence: Option<Divergence>,
    heldout: Option<HeldOut>,
    data: Option<DataReport>,
    choice: Option<MultipleChoice>,
    /// Questions and right answers by the first vote, by subject.
    by_subject: BTreeMap<String, [usize; 2]>,
    reliability: Option<Vec<Reliability>>,
    generated: Vec<answers::Generated>,
    answers: BTreeMap<String, Vec<Item>>,
    load_seconds: f64,
    seconds: f64,
}

impl Eval {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        #[cfg(feature = "results")]
        {
            if let Some(EvalCommand::Compare(compare)) = &self.command {
                return compare.run(ctx);
            }
            if let Some(template) = self.sweep.template() {
                return self.sweep.run(ctx, template);
            }
        }
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
        if let Some(stride) = self.stride.filter(|stride| *stride == 0 || *stride > self.context) {
            let text = format!("--stride: expected 1 to {}, the tokens of a window, found {stride}", self.context);
            return Err(Usage(text).into());
        }
        if self.answers.is_some() && self.max_tokens == 0 {
            return Err(Usage("--max-tokens: expected at least 1, found 0".into()).into());
        }
        let load = Instant::now();
        let model = ctx.load(&self.model, Room::PASSES)?;
        let load_seconds = load.elapsed().as_secs_f64();
        let most = model.decoder.config().max_position_embeddings;
        if self.text.is_some() && self.context > most {
            let text =
                format!("--context: expected at most {most}, what the model was made for, found {}", self.context);
            return Err(Usage(text).into());
        }
        let adapter = load_adapter(self.adapter.as_deref(), &model)?;
        let start = Instant::now();
        let mut results = Results { load_seconds, ..Results::default() };
        if let Some(path) = &self.text {
            self.on_text(ctx, &model, adapter.as_ref(), path, &mut results)?;
        }
        if let Some(path) = &self.data {
            self.on_data(ctx, &model, adapter.as_ref(), path, &mut results)?;
        }
        if let Some(path) = &self.multiple_choice {
            self.on_questions(ctx, &model, adapter.as_ref(), path, &mut results)?;
        }
        if let Some(path) = &self.answers {
            let generation = answers::Generation {
                path,
                limit: self.limit.unwrap_or(usize::MAX),
                max_tokens: self.max_tokens,
                vote: &self.vote[0],
                adapter_dir: self.adapter.as_deref(),
            };
            (results.generated, results.answers) = generation.run(ctx, &model, adapter.as_ref())?;
        }
        results.seconds = start.elapsed().as_secs_f64();
        ctx.result(report::json(self, ctx, &model, &results), || report::text(self, &model, &results))
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
        if let Some(stride) = self.stride {
            results.strided = Some(with_progress(ctx, "strided perplexity", |on_step| {
                Ok(strided_perplexity(&model.decoder, adapter, &ids, (context, stride), limit, on_step)?)
            })?);
        }
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
        if self.calibration {
            results.reliability = Some(with_progress(ctx, "calibration", |on_step| {
                Ok(reliability(&model.decoder, adapter, &exits, &voters, &data.examples, on_step)?)
            })?);
        }
        results.data = Some(data.report);
        Ok(())
    }

    fn on_questions(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        path: &Path,
        results: &mut Results,
    ) -> anyhow::Result<()> {
        let scoring = match self.scoring {
            ScoringArg::Letter => Scoring::Letter,
            ScoringArg::Answer => Scoring::Answer,
        };
        let limit = self.limit.unwrap_or(usize::MAX);
        let file = QuestionFile { path, limit, scoring, shots: self.shots, shots_path: self.shots_file.as_deref() };
        let questions = read_questions(&file, &model.tokenizer)?;
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voters = self.voters(&exits)?;
        let voters: Vec<&dyn Voter> = voters.iter().map(AsRef::as_ref).collect();
        let found = with_progress(ctx, "multiple choice", |on_step| {
            Ok(multiple_choice(&model.decoder, adapter, &exits, &voters, &questions, on_step)?)
        })?;
        for (question, right) in questions.iter().zip(&found.items[exits.len()]) {
            let Some(subject) = &question.subject else { continue };
            let counts = results.by_subject.entry(subject.clone()).or_default();
            counts[0] += 1;
            counts[1] += usize::from(right[0]);
        }
        results.choice = Some(found);
        Ok(())
    }

    /// The votes that were asked for.
    fn voters(&self, exits: &[usize]) -> anyhow::Result<Vec<Box<dyn Voter>>> {
        self.vote.iter().map(|name| vote::named(name, self.adapter.as_deref(), exits)).collect()
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
