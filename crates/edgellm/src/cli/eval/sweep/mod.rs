//! `edgellm eval --sweep`: runs what a template expands to, each stage in a process of its own, and stores every result at
//! once, so that a run that is stopped or killed goes on where it was.

mod record;
mod run;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::device::DeviceChoice;
use edgellm::eval::store::Store;
use edgellm::eval::sweep::{Everywhere, Expanded, Template, expand};
use edgellm::eval::{Baseline, EvalError, Record, case_name};
use edgellm::model::decoder::Activations;
use edgellm::model::io::{atomic_write, read_text};
use serde_json::{Value, json};

use self::run::{Settings, Sweep, shown};
use crate::cli::digest::contents;
use crate::cli::failure::Usage;
use crate::cli::output::{seconds, table};
use crate::cli::{Context, check_output_file};

/// The file of results in a store's folder.
const RESULTS: &str = "results.db";

/// Options of sweeps.
#[derive(Args)]
#[command(next_help_heading = "Sweeps")]
pub(crate) struct SweepArgs {
    /// Run everything that a template describes; what was run before is not run again
    #[arg(long, value_name = "FILE.toml", conflicts_with_all = ["model", "text", "data", "multiple_choice", "answers"])]
    sweep: Option<PathBuf>,
    /// A value for a variable of the template
    #[arg(long, value_name = "NAME=VALUE", value_parser = assignment)]
    set: Vec<(String, String)>,
    /// The folder of results
    #[arg(long, value_name = "DIR", default_value = "edgellm-results")]
    pub(super) store: PathBuf,
    /// Keep compressed models and adapters once all that is measured of them is stored
    #[arg(long, requires = "sweep")]
    keep_models: bool,
    /// Write all records of the sweep, one a line, for `edgellm report`
    #[arg(long, value_name = "FILE.jsonl", requires = "sweep")]
    records: Option<PathBuf>,
    /// Fail if a figure is worse than in this baseline by more than its noise
    #[arg(long, value_name = "BASELINE.toml", requires = "sweep")]
    gate: Option<PathBuf>,
    /// Write the figures of quality and size as a baseline
    #[arg(long, value_name = "BASELINE.toml", requires = "sweep", conflicts_with = "gate")]
    write_baseline: Option<PathBuf>,
    /// Stages at once, at most, where memory allows; what measures speed always runs alone
    #[arg(long, value_name = "N", default_value_t = 1, requires = "sweep", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,
    /// Run everything anew, also what was run before
    #[arg(long, requires = "sweep")]
    again: bool,
    /// Say what would be run, and run nothing
    #[arg(long, requires = "sweep")]
    dry_run: bool,
}

fn assignment(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("expected NAME=VALUE, found '{text}'"))?;
    Ok((name.to_owned(), value.to_owned()))
}

impl SweepArgs {
    pub(super) fn template(&self) -> Option<&Path> {
        self.sweep.as_deref()
    }

    pub(super) fn run(&self, ctx: &Context, path: &Path) -> anyhow::Result<()> {
        for path in [&self.records, &self.write_baseline].into_iter().flatten() {
            check_output_file(path)?;
        }
        let gate = self.gate.as_deref().map(read_baseline).transpose()?;
        let template = Template::read(path, &self.set).map_err(|e| Usage(e.to_string()))?;
        let mut digests = BTreeMap::new();
        let options = options(ctx);
        let everywhere = Everywhere { version: env!("CARGO_PKG_VERSION"), options: &options };
        let expanded = expand(&template, everywhere, &mut |name| digest(ctx, name, &mut digests))
            .map_err(|e| Usage(format!("{}: {e}", path.display())))?;
        if self.dry_run {
            return self.describe(ctx, &expanded);
        }
        let work = self.store.join("work");
        std::fs::create_dir_all(&work)
            .map_err(|e| anyhow::anyhow!("{}: the folder cannot be made: {e}", self.store.display()))?;
        let store = Store::open(&self.store.join(RESULTS))?;
        let (name, jobs, again, keep_models) = (&template.name, self.jobs.into(), self.again, self.keep_models);
        let mut sweep = Sweep::new(ctx, Settings { work, name, jobs, again, keep_models }, &expanded, store);
        let records = sweep.run()?;
        let (done, failed) = (sweep.counts(), sweep.failures());
        if let Some(path) = &self.records {
            let lines: Vec<String> = records.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
            atomic_write(path, (lines.join("\n") + "\n").as_bytes())?;
        }
        if let Some(path) = self.write_baseline.as_deref().filter(|_| failed.is_empty()) {
            atomic_write(path, toml::to_string_pretty(&Baseline::of(&records))?.as_bytes())?;
        }
        let worse = gate.map(|baseline| baseline.failures(&records)).unwrap_or_default();
        let json = json!({
            "sweep": template.name, "runs": records.len(), "stages": done, "failed": failed, "left_out": expanded.left_out,
            "worse": worse,
            "records": records.iter().map(|r| json!({"id": r.id, "case": r.case, "figures": r.figures})).collect::<Vec<_>>(),
        });
        ctx.result(json, || text(&records, &done, &expanded.left_out))?;
        let count = failed.len() + worse.len();
        if count == 0 {
            return Ok(());
        }
        for sentence in failed.iter().chain(&worse) {
            ctx.say(&format!("failed: {sentence}"));
        }
        let what = if worse.is_empty() { "stages" } else { "stages and figures" };
        anyhow::bail!("{count} {what} of the sweep failed; what was measured is in {}", self.store.display())
    }

    fn describe(&self, ctx: &Context, expanded: &Expanded) -> anyhow::Result<()> {
        let lines: Vec<String> =
            expanded.stages.iter().map(|stage| format!("{:.12}  {}", stage.key, shown(stage))).collect();
        let json = json!({"stages": lines, "cases": expanded.cases.iter().map(|c| &c.names).collect::<Vec<_>>(),
            "left_out": expanded.left_out});
        ctx.result(json, || {
            let left_out: String = expanded.left_out.iter().map(|reason| format!("left out: {reason}\n")).collect();
            format!("{}\n{} stages for {} cases\n{left_out}", lines.join("\n"), lines.len(), expanded.cases.len())
        })
    }
}

/// The options of every command that were given: they hold for every stage.
fn options(ctx: &Context) -> Vec<(&'static str, String)> {
    let mut options = Vec::new();
    if ctx.device != DeviceChoice::default() {
        options.push(("device", ctx.device.to_string()));
    }
    if ctx.activations != Activations::default() {
        options.push(("activations", ctx.activations.to_string()));
    }
    options.extend(ctx.isa.clone().map(|isa| ("isa", isa)));
    options.extend(ctx.threads.map(|threads| ("threads", threads.to_string())));
    options.extend(ctx.max_memory.map(|bytes| ("max-memory", bytes.to_string())));
    options
}

/// The digest of a file, or of all files of a folder or a stored model; `None` if it is neither.
fn digest(
    ctx: &Context,
    name: &str,
    known: &mut BTreeMap<String, Option<String>>,
) -> Result<Option<String>, EvalError> {
    if let Some(found) = known.get(name) {
        return Ok(found.clone());
    }
    let path = Path::new(name);
    let path = if path.exists() { Some(path.to_owned()) } else { ctx.store.resolve(name).ok() };
    let found = path
        .map(|path| contents(&path))
        .transpose()
        .map_err(|(path, error)| EvalError::Model(edgellm::model::ModelError::io(&path, error)))?;
    known.insert(name.to_owned(), found.clone());
    Ok(found)
}

fn read_baseline(path: &Path) -> anyhow::Result<Baseline> {
    let baseline: Baseline =
        toml::from_str(&read_text(path)?).map_err(|e| Usage(format!("{}: no baseline: {e}", path.display())))?;
    if baseline.version != 1 {
        let text = format!("{}: version: expected 1, found {}", path.display(), baseline.version);
        return Err(Usage(text).into());
    }
    Ok(baseline)
}

/// Figures that the table shows, if a run has them, with their headers.
const SHOWN: [(&str, &str); 8] = [
    ("second_half_perplexity", "perplexity"),
    ("second_half_kl", "KL"),
    ("top1_agreement", "same token"),
    ("heldout_loss", "loss"),
    ("accuracy", "accuracy"),
    ("exact_match", "exact"),
    ("prefill_rate", "prefill/s"),
    ("decode_rate", "decode/s"),
];

fn text(records: &[Record], done: &Value, left_out: &[String]) -> String {
    let shown: Vec<_> =
        SHOWN.iter().filter(|(name, _)| records.iter().any(|r| r.figures.contains_key(*name))).collect();
    let mut header = vec!["case"];
    header.extend(shown.iter().map(|(_, title)| *title));
    header.extend(["MB", "took", "run"]);
    let rows: Vec<Vec<String>> = records
        .iter()
        .map(|record| {
            let mut row = vec![record.case.values().cloned().collect::<Vec<_>>().join(" ")];
            row.extend(shown.iter().map(|(name, _)| match record.figures.get(*name) {
                None => String::new(),
                Some(figure) if figure.interval.is_some() => format!("{:.4} ± {:.4}", figure.value, figure.noise()),
                Some(figure) => format!("{:.4}", figure.value),
            }));
            let size = record.figures.get("model_bytes").or(record.figures.get("weights_bytes"));
            row.push(size.map_or(String::new(), |figure| format!("{:.1}", figure.value / 1e6)));
            row.extend([seconds(record.seconds), record.id.clone()]);
            row
        })
        .collect();
    let left_out: String = left_out.iter().map(|reason| format!("left out: {reason}\n")).collect();
    let (run, found) = (&done["run"], &done["found"]);
    format!("{}{left_out}{run} stages were run, {found} were found in the store\n", table(&header, &rows))
}

/// The records that a run or a sweep of a store means, or all of them.
pub(crate) fn records(folder: &Path, name: Option<&str>) -> anyhow::Result<Vec<Record>> {
    let path = folder.join(RESULTS);
    if !path.is_file() {
        let text = format!(
            "{}: expected a folder of results, as `edgellm eval --sweep` writes it, found none",
            folder.display()
        );
        return Err(Usage(text).into());
    }
    let store = Store::open(&path)?;
    Ok(match name {
        Some(name) => store.find(name)?,
        None => store.records(None)?,
    })
}

/// The name of a record's case, for tables.
pub(super) fn name(record: &Record) -> String {
    case_name(record)
}
