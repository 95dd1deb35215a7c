//! `cargo xtask demo`: the whole pipeline through the command, on the fixture or on a real model: inspect, measure, plan,
//! compress, evaluate, tune, vote, answer; then a summary that a person understands.

mod chart;
mod summary;

use std::path::PathBuf;
use std::time::Instant;
use std::{fs, io};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::edgellm::{Edgellm, arg, number, text};
use crate::repo;
use summary::{Summary, Unit};

const VOTES: [&str; 3] = ["last", "max", "mean"];

/// Shows the whole pipeline, from a model to a smaller one that knows its user.
#[derive(Args)]
pub(crate) struct Demo {
    /// A model by name, such as smollm2-135m-instruct (it is fetched first); the tiny model of fixtures/ by default.
    #[arg(long)]
    model: Option<String>,
}

impl Demo {
    pub(crate) fn run(&self) -> Result<()> {
        let settings = match &self.model {
            Some(name) => Settings::real(name),
            None => Settings::fixture()?,
        };
        show(&settings, Edgellm::build(&[])?).map(drop)
    }
}

/// The demo on the fixture; returns one line that sums it up.
pub(crate) fn on_fixture() -> Result<String> {
    show(&Settings::fixture()?, Edgellm::build(&[])?)
}

/// A short demo on the fixture with another build of the command, such as one under an emulator; `name` tells its files
/// from those of other demos.
pub(crate) fn short(edgellm: Edgellm, name: &str) -> Result<String> {
    show(&Settings::short(name)?, edgellm)
}

/// What differs between the tiny model and a real one.
struct Settings {
    model: String,
    title: String,
    pull: bool,
    target_bpw: &'static str,
    /// Windows of the calibration text, and tokens of each.
    calibrate: [&'static str; 2],
    /// What else `measure` is told.
    measure: &'static [&'static str],
    context: &'static str,
    windows: &'static str,
    /// Of the tuning: steps, longest example, window in blocks, learning rate.
    steps: &'static str,
    max_len: &'static str,
    window: &'static str,
    lr: &'static str,
    exits: &'static str,
    /// How many of the held-out examples are looked at.
    heldout: usize,
    /// Of what it writes, in the target folder.
    folder: String,
}

impl Settings {
    fn fixture() -> Result<Self> {
        let model = repo::root()?.join("fixtures/model");
        Ok(Self {
            model: arg(&model)?.to_owned(),
            title: "the tiny model of fixtures/".to_owned(),
            pull: false,
            target_bpw: "3.0",
            calibrate: ["64", "256"],
            measure: &["--group-size", "32,64"],
            context: "256",
            windows: "24",
            steps: "800",
            max_len: "128",
            window: "4",
            lr: "4e-3",
            exits: "4",
            heldout: usize::MAX,
            folder: "demo".to_owned(),
        })
    }

    /// Every stage on the fixture, each with little to do.
    fn short(name: &str) -> Result<Self> {
        Ok(Self {
            title: format!("the tiny model of fixtures/, on {name}"),
            calibrate: ["2", "64"],
            measure: &["--bits", "2,3,4", "--group-size", "32", "--compare-windows", "2", "--compare-context", "32"],
            context: "128",
            windows: "2",
            steps: "24",
            heldout: 8,
            folder: format!("demo-{name}"),
            ..Self::fixture()?
        })
    }

    fn real(name: &str) -> Self {
        Self {
            model: name.to_owned(),
            title: name.to_owned(),
            pull: true,
            target_bpw: "4.8",
            // Few tokens: a first impression in about a minute.
            calibrate: ["16", "256"],
            measure: &["--compare-windows", "2", "--compare-context", "64", "--group-size", "32"],
            context: "256",
            windows: "4",
            steps: "140",
            max_len: "96",
            window: "8",
            lr: "1e-3",
            exits: "2",
            heldout: 24,
            folder: "demo".to_owned(),
        }
    }
}

const QUESTION: &str = "What is my bedtime?";

/// Runs every stage, prints the summary, and returns its first line.
fn show(settings: &Settings, edgellm: Edgellm) -> Result<String> {
    println!("EdgeLLM on {}: smaller, then tuned to one user, all on this machine.\n", settings.title);
    let start = Instant::now();
    let mut stages = Stages::new(settings, edgellm)?;
    let parameters = stages.prepare()?;
    let units = stages.plan()?;
    let (bytes_before, bytes_after) = stages.compress()?;
    let (base, small) = stages.quality()?;
    let tuning = stages.tune()?;
    let (answer_before, answer_after) = stages.answers()?;
    let summary = Summary {
        title: settings.title.clone(),
        parameters,
        bytes_before,
        bytes_after,
        units,
        perplexity_base: number(&base, "perplexity")?,
        perplexity_small: number(&small, "perplexity")?,
        kl: number(&small, "kl")?,
        top1_agreement: number(&small, "top1_agreement")?,
        loss_before: tuning.before,
        loss_after: tuning.after,
        votes: tuning.votes,
        question: QUESTION.to_owned(),
        answer_before,
        answer_after,
        seconds: start.elapsed().as_secs_f64(),
    };
    println!("\n{}", summary.render());
    println!("Everything it wrote is in {}", stages.folder.display());
    Ok(summary.headline())
}

/// Held-out losses of the tuning, and after it by how the exits vote.
struct Tuning {
    before: f64,
    after: f64,
    votes: Vec<(&'static str, f64)>,
}

/// The stages, each of which says what it does and how long it took.
struct Stages<'a> {
    settings: &'a Settings,
    edgellm: Edgellm,
    folder: PathBuf,
    fixtures: PathBuf,
    done: usize,
}

const N_STAGES: usize = 7;

impl<'a> Stages<'a> {
    fn new(settings: &'a Settings, edgellm: Edgellm) -> Result<Self> {
        let folder = repo::target()?.join(&settings.folder);
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).context("cannot clear the demo's folder");
            }
            _ => fs::create_dir_all(&folder)?,
        }
        Ok(Self { settings, edgellm, folder, fixtures: repo::root()?.join("fixtures"), done: 0 })
    }

    fn stage<T>(&mut self, what: &str, run: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        self.done += 1;
        println!("[{}/{N_STAGES}] {what}", self.done);
        let start = Instant::now();
        let result = run(self).with_context(|| format!("the demo's stage '{what}' failed"))?;
        println!("      {:.1} s", start.elapsed().as_secs_f64());
        Ok(result)
    }

    /// A path in the demo's folder as an argument.
    fn path(&self, name: &str) -> Result<String> {
        Ok(arg(&self.folder.join(name))?.to_owned())
    }

    fn fixture(&self, name: &str) -> Result<String> {
        Ok(arg(&self.fixtures.join(name))?.to_owned())
    }

    /// Fetches the model where that is needed, looks into it, and returns how many parameters it has.
    fn prepare(&mut self) -> Result<f64> {
        self.stage("inspect: what is in the model", |s| {
            if s.settings.pull {
                s.edgellm.pull(&s.settings.model)?;
            }
            number(&s.edgellm.json(["inspect", &s.settings.model])?, "parameters")
        })
    }

    /// The calibration's size as arguments.
    fn windows(&self) -> [&'static str; 4] {
        let [windows, context] = self.settings.calibrate;
        ["--calibrate-windows", windows, "--calibrate-context", context]
    }

    fn plan(&mut self) -> Result<Vec<Unit>> {
        self.stage("measure: how much each layer suffers from each width", |s| {
            let (out, calibration) = (s.path("measurement.json")?, s.fixture("text/calibration.txt")?);
            let args = ["measure", "-m", &s.settings.model, "-o", &out, "--calibrate", &calibration];
            s.edgellm.json(args.into_iter().chain(s.windows()).chain(s.settings.measure.iter().copied()))
        })?;
        self.stage("plan: the widths that cost least for the size", |s| {
            let (measurement, out) = (s.path("measurement.json")?, s.path("policy.toml")?);
            let bpw = s.settings.target_bpw;
            let args = ["plan", "--measurement", &measurement, "--solver", "solve", "--target-bpw", bpw, "-o", &out];
            let plan = s.edgellm.json(args)?;
            let units = plan["units"].as_array().context("no units in the plan")?;
            units.iter().map(Unit::read).collect()
        })
    }

    fn compress(&mut self) -> Result<(f64, f64)> {
        self.stage("compress: write the smaller model", |s| {
            let (policy, out, text) =
                (s.path("policy.toml")?, s.path("compressed")?, s.fixture("text/calibration.txt")?);
            let args = ["compress", "-m", &s.settings.model, "--policy", &policy, "-o", &out, "--calibrate", &text];
            let json = s.edgellm.json(args.into_iter().chain(s.windows()))?;
            Ok((number(&json, "bytes_before")?, number(&json, "bytes_after")?))
        })
    }

    /// Perplexity of the base, and of the compressed model with its distance from the base.
    fn quality(&mut self) -> Result<(Value, Value)> {
        self.stage("eval: what the smaller size costs", |s| {
            let (base, small, text) = (&s.settings.model, s.path("compressed")?, s.fixture("text/heldout.txt")?);
            let window = ["--text", &text, "--context", s.settings.context, "--windows", s.settings.windows];
            let of_base = s.edgellm.json(["eval", "-m", base].into_iter().chain(window))?;
            let of_small = s.edgellm.json(["eval", "-m", &small, "--base", base].into_iter().chain(window))?;
            Ok((of_base, of_small))
        })
    }

    /// Held-out loss before and after, and after by how the exits vote.
    fn tune(&mut self) -> Result<Tuning> {
        self.stage("adapt: learn what one user told it, and let the exits vote", |s| {
            let (model, out, heldout) = (s.path("compressed")?, s.path("adapter")?, s.path("heldout.jsonl")?);
            let all = fs::read_to_string(s.fixtures.join("instruct/heldout.jsonl"))?;
            fs::write(&heldout, all.split_inclusive('\n').take(s.settings.heldout).collect::<String>())?;
            let (data, set) = (s.fixture("instruct/train.jsonl")?, s.settings);
            let mut args = vec!["adapt", "-m", &model, "--data", &data, "--eval-data", &heldout, "-o", &out];
            args.extend(["--steps", set.steps, "--batch", "4", "--max-len", set.max_len, "--window", set.window]);
            args.extend(["--exits", set.exits, "--rank", "16", "--alpha", "32", "--lr", set.lr, "--template", "chat"]);
            let json = s.edgellm.json(args)?;
            let votes = VOTES.iter().map(|vote| Ok((*vote, number(&json["votes_after"], vote)?)));
            Ok(Tuning {
                before: number(&json, "heldout_before")?,
                after: number(&json, "heldout_after")?,
                votes: votes.collect::<Result<_>>()?,
            })
        })
    }

    /// The answer to one question before and after tuning.
    fn answers(&mut self) -> Result<(String, String)> {
        self.stage("run: ask the same question before and after", |s| {
            let (model, adapter) = (s.path("compressed")?, s.path("adapter")?);
            let ask = ["run", "-m", &model, "-p", QUESTION, "--temp", "0", "-n", "60"];
            let before = s.edgellm.json(ask)?;
            let after = s.edgellm.json(ask.into_iter().chain(["--adapter", &adapter]))?;
            Ok((text(&before, "text")?.trim().to_owned(), text(&after, "text")?.trim().to_owned()))
        })
    }
}
