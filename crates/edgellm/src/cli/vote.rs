//! `edgellm vote`: fits the weights and temperatures of an adapter's vote, or shows them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use edgellm::eval::{HeldOut, heldout_loss, peak_rss_bytes};
use edgellm::model::data::Example;
use edgellm::model::traits::Voter;
use edgellm::tune::vote::{FitProgress, VOTE_FILE, VoteFit, VoteWeights, fit_vote};
use edgellm::tune::voters::{FITTED_VOTERS, Pool, VOTERS, fitted_voter};
use serde_json::{Map, Value, json};

use super::data::DataArgs;
use super::failure::Usage;
use super::memory::Room;
use super::output::{seconds, table};
use super::progress::Counted;
use super::run::exits;
use super::run_adapters::load_adapter;
use super::{Context, interrupt, stop_if_requested};

/// Of so many examples one is held out.
const HELD_OUT: usize = 3;

/// Fit how an adapter's exits vote, or show what was fitted
#[derive(Args)]
pub(crate) struct Vote {
    /// Fit weights and temperatures, and write them to the adapter's vote.json
    #[arg(long, requires = "data")]
    fit: bool,
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The adapter, as `edgellm adapt` wrote it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Examples that the adapter was not tuned on: JSON lines; every third is held out to report on
    #[arg(long, value_name = "FILE.jsonl", requires = "fit")]
    data: Option<PathBuf>,
    #[command(flatten)]
    format: DataArgs,
    /// Response tokens to fit on at most; half as many are held out
    #[arg(long, default_value_t = 4096, value_name = "N")]
    tokens: usize,
}

/// What a fit did, on the part that was held out.
struct Outcome {
    fit: VoteFit,
    heldout: HeldOut,
    /// Loss of each exit at its temperature.
    calibrated: Vec<f64>,
    /// Losses of the votes by name.
    votes: Vec<(&'static str, f64)>,
    seconds: f64,
}

impl Vote {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.format.check(&self.data)?;
        if self.tokens < 64 {
            return Err(Usage(format!("--tokens: expected at least 64, found {}", self.tokens)).into());
        }
        let model = ctx.load(&self.model, Room::PASSES)?;
        let decoder = &model.decoder;
        let adapter = load_adapter(Some(&self.adapter), &model)?;
        let exits = exits(adapter.as_ref(), decoder.n_blocks())?;
        let Some(path) = self.data.as_deref().filter(|_| self.fit) else {
            return self.show(ctx, &exits);
        };
        let (train, held_out) = split(self.format.read(&model, path)?.examples, self.tokens);
        if held_out.iter().all(|e| e.n_targets() == 0) {
            anyhow::bail!("{}: expected at least {HELD_OUT} examples with responses, found fewer", path.display());
        }
        let start = Instant::now();
        let mut progress = ctx.progress("fit", 0, Counted::Items("steps"));
        let fit = interrupt::stoppable(|| {
            let mut step = 0;
            let on_step = &mut |at: FitProgress| {
                step += 1;
                let text = match at {
                    FitProgress::States(tokens) => format!("{tokens} response tokens"),
                    FitProgress::Passes(passes) => format!("pass {passes}"),
                };
                progress.set_with(step, text);
                interrupt::checkpoint();
            };
            Ok(fit_vote(decoder, adapter.as_ref(), &exits, &train, self.tokens, on_step)?)
        })?;
        progress.finish();
        let (voters, singles) = contestants(&fit.vote)?;
        let all: Vec<&dyn Voter> =
            voters.iter().map(AsRef::as_ref).chain(singles.iter().map(|p| p as &dyn Voter)).collect();
        let mut progress = ctx.progress("held-out loss", 0, Counted::Items("batches"));
        let heldout = interrupt::stoppable(|| {
            let on_batch = &mut |p: edgellm::eval::Progress| {
                progress.set_total(p.total as u64);
                progress.set(p.done as u64);
                interrupt::checkpoint();
            };
            Ok(heldout_loss(decoder, adapter.as_ref(), &exits, &all, &held_out, on_batch)?)
        })?;
        progress.finish();
        stop_if_requested()?;
        fit.vote.save(&self.adapter)?;
        let votes = voters.iter().map(|v| v.name()).zip(heldout.votes.iter().copied()).collect();
        let calibrated = heldout.votes[voters.len()..].to_vec();
        let seconds = start.elapsed().as_secs_f64();
        self.report(ctx, &Outcome { fit, heldout, calibrated, votes, seconds })
    }

    fn show(&self, ctx: &Context, exits: &[usize]) -> anyhow::Result<()> {
        let vote = required(&self.adapter, exits)?;
        ctx.result(json!(vote), || {
            let row = |(e, factor): (&edgellm::tune::vote::VoteExit, f32)| {
                let values = [e.temperature, e.weight, f64::from(factor)].map(|v| format!("{v:.4}"));
                [vec![e.exit.to_string()], values.to_vec()].concat()
            };
            let rows: Vec<Vec<String>> = vote.exits.iter().zip(vote.factors()).map(row).collect();
            table(&["exit", "temperature", "weight", "weight / temperature"], &rows)
        })
    }

    fn report(&self, ctx: &Context, outcome: &Outcome) -> anyhow::Result<()> {
        let Outcome { fit, heldout, calibrated, votes, seconds: took } = outcome;
        let best_exit = heldout.by_exit.iter().map(|e| e.loss).fold(f64::INFINITY, f64::min);
        let weighted = votes.iter().find(|(name, _)| *name == "weighted").map_or(f64::NAN, |(_, loss)| *loss);
        let beats_every_exit = weighted < best_exit;
        if !beats_every_exit {
            ctx.say("note: on the held-out part the weighted vote is no better than the best exit alone");
        }
        let by_exit = heldout.by_exit.iter().zip(calibrated).zip(&fit.vote.exits).map(|((loss, calibrated), vote)| {
            json!({
                "exit": loss.exit, "loss": loss.loss, "calibrated_loss": calibrated,
                "temperature": vote.temperature, "weight": vote.weight,
            })
        });
        let json = json!({
            "path": self.adapter.join(VOTE_FILE), "fit_tokens": fit.vote.tokens, "fit_loss": fit.loss,
            "fit_passes": fit.passes, "confidence": fit.confidence, "heldout_tokens": heldout.tokens,
            "by_exit": by_exit.collect::<Vec<_>>(),
            "votes": votes.iter().map(|(name, loss)| ((*name).to_string(), json!(loss))).collect::<Map<_, _>>(),
            "beats_every_exit": beats_every_exit, "seconds": took, "peak_rss_bytes": peak_rss_bytes(),
        });
        ctx.result(json, || {
            let number = |value: f64| format!("{value:.4}");
            let mut rows = Vec::new();
            for ((loss, calibrated), vote) in heldout.by_exit.iter().zip(calibrated).zip(&fit.vote.exits) {
                let values = [loss.loss, *calibrated, vote.temperature, vote.weight].map(number);
                rows.push([vec![format!("exit {}", loss.exit)], values.to_vec()].concat());
            }
            for (name, loss) in votes {
                let none = || String::from("-");
                rows.push(vec![format!("vote {name}"), number(*loss), none(), none(), none()]);
            }
            let header = ["held-out loss", "", "calibrated", "temperature", "weight"];
            format!(
                "{}fitted on {} response tokens in {} passes ({}), held out {}; wrote {}\n",
                table(&header, &rows),
                fit.vote.tokens,
                fit.passes,
                seconds(*took),
                heldout.tokens,
                self.adapter.join(VOTE_FILE).display()
            )
        })
    }
}

/// Every third example is held out, until they have half of `tokens`.
fn split(examples: Vec<Example>, tokens: usize) -> (Vec<Example>, Vec<Example>) {
    let (mut train, mut held_out, mut room) = (Vec::new(), Vec::new(), tokens / 2);
    for (index, example) in examples.into_iter().enumerate() {
        if index % HELD_OUT != HELD_OUT - 1 {
            train.push(example);
        } else if room > 0 {
            room = room.saturating_sub(example.n_targets());
            held_out.push(example);
        }
    }
    (train, held_out)
}

/// Votes that are made for one adapter.
type Voters = Vec<Box<dyn Voter>>;

/// All votes, and each exit at its temperature.
fn contestants(vote: &VoteWeights) -> anyhow::Result<(Voters, Vec<Pool>)> {
    let names = VOTERS.map(|v| v.name()).into_iter().chain(FITTED_VOTERS);
    let voters = names.map(|name| fitted_voter(name, Some(vote))).collect::<Result<_, _>>()?;
    let temperatures = vote.temperatures();
    let single = |j: usize| {
        let factor = |i: usize| if i == j { 1.0 / temperatures[j] } else { 0.0 };
        Pool::new("calibrated exit", (0..temperatures.len()).map(factor).collect())
    };
    Ok((voters, (0..temperatures.len()).map(single).collect()))
}

/// The adapter's fitted vote, which must be there.
fn required(adapter: &Path, exits: &[usize]) -> anyhow::Result<VoteWeights> {
    VoteWeights::load(adapter, exits)?.ok_or_else(|| {
        Usage(format!("{}: no vote was fitted for this adapter; run `edgellm vote --fit`", adapter.display())).into()
    })
}

/// The voter of `--vote`; a fitted one reads the weights beside the adapter.
pub(crate) fn named(name: &str, adapter: Option<&Path>, exits: &[usize]) -> anyhow::Result<Box<dyn Voter>> {
    let fitted = match adapter {
        Some(path) if FITTED_VOTERS.contains(&name) => Some(required(path, exits)?),
        _ => None,
    };
    for exit in fitted.iter().flat_map(|vote| &vote.exits) {
        tracing::trace!(target: edgellm::model::spans::VOTES, exit = exit.exit, temperature = exit.temperature);
    }
    Ok(fitted_voter(name, fitted.as_ref())?)
}

/// Refuses a name that no voter has, or one that needs an adapter, before a model is loaded.
pub(crate) fn check_name(name: &str, adapter: Option<&Path>) -> anyhow::Result<()> {
    let fitted = FITTED_VOTERS.contains(&name);
    if fitted && adapter.is_none() {
        return Err(Usage(format!("--vote {name} needs --adapter, whose folder holds the fitted weights")).into());
    }
    if !fitted {
        fitted_voter(name, None)?;
    }
    Ok(())
}

/// Losses or accuracies by the votes' names, as JSON.
pub(crate) fn by_name<T: serde::Serialize>(names: &[String], values: &[T]) -> Value {
    Value::Object(names.iter().cloned().zip(values.iter().map(|v| json!(v))).collect())
}
