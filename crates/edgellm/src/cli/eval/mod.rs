//! `edgellm eval`: perplexity of a text, distance from a base model, loss on held-out examples, multiple choice, checks of
//! generated answers.

mod answers;
#[cfg(feature = "results")]
mod compare;
mod measures;
mod report;
mod settings;
mod speed;
#[cfg(feature = "results")]
pub(crate) mod sweep;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use edgellm::eval::{
    Divergence, HeldOut, Item, ItemLog, MultipleChoice, Perplexity, Progress, Reliability, Steps, Strided,
    peak_rss_bytes,
};
use edgellm::model::adapter::Adapter;
use edgellm::model::data::DataReport;
use edgellm::session::LoadedModel;

use super::data::DataArgs;
use super::failure::{Interrupted, Usage};
use super::memory::Room;
use super::progress::Counted;
use super::run_adapters::load_adapter;
use super::sampling::SamplingArgs;
use super::{Context, check_output_file, interrupt, vote};

/// What there is to measure; one of them is needed.
#[cfg(feature = "results")]
const WHAT: [&str; 5] = ["data", "multiple_choice", "answers", "speed", "sweep"];
#[cfg(not(feature = "results"))]
const WHAT: [&str; 4] = ["data", "multiple_choice", "answers", "speed"];

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
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Questions and tasks at most (default: all)
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Measure how far confidence is from being right, of each exit and vote, on the examples
    #[arg(long, requires = "data")]
    calibration: bool,
    /// Measure what the model takes on this device: time to the first token, rates, memory, and energy where it is told
    #[arg(long)]
    speed: bool,
    /// Keep every finished item (a window, a batch of examples, a question, an answer) in this file at once, and do not
    /// repeat those that it has; it belongs to one model, its data and settings
    #[arg(long, value_name = "FILE.jsonl")]
    resume: Option<PathBuf>,
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
    speed: Option<speed::Speed>,
    load_seconds: f64,
    peak_rss_bytes: Option<u64>,
    seconds: f64,
}

/// What is measured, and where finished items are kept.
struct Setup<'a> {
    ctx: &'a Context,
    model: &'a LoadedModel,
    adapter: Option<&'a Adapter>,
    log: Option<&'a mut ItemLog>,
}

impl Setup<'_> {
    /// Runs an evaluation with progress; a signal stops it between two steps.
    fn steps<T>(&mut self, what: &str, work: impl FnOnce(&mut Steps<'_>) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let log = self.log.as_deref_mut();
        let kept = log.is_some();
        let result = with_progress(self.ctx, what, |on_step| work(&mut Steps::kept(log, on_step)));
        result.map_err(|error| match error.is::<Interrupted>() && kept {
            true => Interrupted("stopped by a signal; finished items are kept".into()).into(),
            false => error,
        })
    }
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
        if let Some(path) = &self.resume {
            check_output_file(path)?;
        }
        let load = Instant::now();
        let model = ctx.load(&self.model, self.room())?;
        let load_seconds = load.elapsed().as_secs_f64();
        let most = model.decoder.config().max_position_embeddings;
        if self.text.is_some() && self.context > most {
            let text =
                format!("--context: expected at most {most}, what the model was made for, found {}", self.context);
            return Err(Usage(text).into());
        }
        let adapter = load_adapter(self.adapter.as_deref(), &model)?;
        let mut log = self.items_file(ctx)?;
        let start = Instant::now();
        let mut results = Results { load_seconds, ..Results::default() };
        let setup = &mut Setup { ctx, model: &model, adapter: adapter.as_ref(), log: log.as_mut() };
        self.measure(setup, &mut results)?;
        results.peak_rss_bytes = peak_rss_bytes();
        if self.speed {
            // Starts the peak of the memory anew.
            let found = speed::measure(ctx, &self.model, &model, adapter.as_ref())?;
            results.peak_rss_bytes = results.peak_rss_bytes.max(found.peak_rss_bytes());
            results.speed = Some(found);
        }
        results.seconds = start.elapsed().as_secs_f64();
        ctx.result(report::json(self, ctx, &model, &results), || report::text(self, &model, &results))
    }

    /// The file of `--resume`.
    fn items_file(&self, ctx: &Context) -> anyhow::Result<Option<ItemLog>> {
        let Some(path) = &self.resume else { return Ok(None) };
        let log = ItemLog::open(path, &settings::settings(self, ctx)?)?;
        if !log.is_empty() {
            ctx.say(&format!("{}: {} items were finished before", path.display(), log.len()));
        }
        Ok(Some(log))
    }

    fn room(&self) -> Room {
        let generated = if self.answers.is_some() { self.max_tokens } else { 0 };
        let cache_tokens = if self.speed || generated > 0 { Room::PASSES.pass_tokens.max(generated) } else { 0 };
        Room { cache_tokens, ..Room::PASSES }
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
