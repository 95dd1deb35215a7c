//! `edgellm eval --sweep`: runs what a template expands to, each stage in a process of its own, and stores every result at
//! once, so that a run that is stopped or killed goes on where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use edgellm::eval::store::Store;
use edgellm::eval::sweep::{Argument, Expanded, Stage, StageKind, Template, expand};
use edgellm::eval::{Baseline, EvalError, Figures, Item, Layer, RECORD_VERSION, Record, case_name};
use edgellm::model::io::{atomic_write, read_text};
use serde_json::{Value, json};

use super::report::environment;
use super::speed;
use crate::cli::digest::contents;
use crate::cli::failure::Usage;
use crate::cli::output::{seconds, table};
use crate::cli::progress::Counted;
use crate::cli::{Context, check_output_file, child, stop_if_requested};

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
        let expanded = expand(&template, env!("CARGO_PKG_VERSION"), &mut |name| digest(ctx, name, &mut digests))
            .map_err(|e| Usage(format!("{}: {e}", path.display())))?;
        if self.dry_run {
            return self.describe(ctx, &expanded);
        }
        std::fs::create_dir_all(self.store.join("work"))
            .map_err(|e| anyhow::anyhow!("{}: the folder cannot be made: {e}", self.store.display()))?;
        let store = Store::open(&self.store.join(RESULTS))?;
        let mut sweep =
            Sweep { ctx, args: self, name: &template.name, expanded: &expanded, store, done: Done::default() };
        let records = sweep.run()?;
        let (done, failed) = (sweep.done.counts(), sweep.done.failures());
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

/// Which stages were run, found in the store, or failed.
#[derive(Default)]
struct Done {
    /// `None` for those that failed.
    stages: BTreeMap<usize, Option<Value>>,
    run: usize,
    found: usize,
    failures: Vec<String>,
}

impl Done {
    fn counts(&self) -> Value {
        json!({"run": self.run, "found": self.found, "failed": self.failures.len()})
    }

    fn failures(&self) -> Vec<String> {
        self.failures.clone()
    }
}

struct Sweep<'a> {
    ctx: &'a Context,
    args: &'a SweepArgs,
    name: &'a str,
    expanded: &'a Expanded,
    store: Store,
    done: Done,
}

impl Sweep<'_> {
    fn run(&mut self) -> anyhow::Result<Vec<Record>> {
        let mut progress = self.ctx.progress("sweep", self.expanded.cases.len() as u64, Counted::Items("cases"));
        let mut records = Vec::new();
        for (index, case) in self.expanded.cases.iter().enumerate() {
            stop_if_requested()?;
            let name: Vec<&str> = case.names.values().map(String::as_str).collect();
            progress.set_with(index as u64, name.join(" "));
            if let Some(result) = self.ensure(case.stage)? {
                let plan = case.plan.map(|plan| self.ensure(plan)).transpose()?.flatten();
                let record = self.record(case.stage, &case.names, &result, plan.as_ref())?;
                self.store.put(&record)?;
                records.push(record);
            }
            progress.set(index as u64 + 1);
        }
        progress.finish();
        if !self.args.keep_models {
            self.remove_models()?;
        }
        Ok(records)
    }

    /// The result of a stage: from the store, or by running it and all that it reads. `None` if that failed.
    fn ensure(&mut self, index: usize) -> anyhow::Result<Option<Value>> {
        if let Some(known) = self.done.stages.get(&index) {
            return Ok(known.clone());
        }
        let stage = &self.expanded.stages[index];
        // What writes something is done only while that is there.
        let there = self.output(stage).is_none_or(|path| path.exists());
        let stored = if there { self.store.stage(&stage.key)? } else { None };
        let result = match stored {
            Some(result) => {
                self.done.found += 1;
                Some(result)
            }
            None => {
                let mut inputs_are_there = true;
                for input in stage.inputs() {
                    inputs_are_there &= self.ensure(input)?.is_some();
                }
                if inputs_are_there { self.execute(stage)? } else { None }
            }
        };
        self.done.stages.insert(index, result.clone());
        Ok(result)
    }

    fn execute(&mut self, stage: &Stage) -> anyhow::Result<Option<Value>> {
        stop_if_requested()?;
        let output = self.output(stage);
        // Written beside, and renamed when it is whole; commands that go on where they were stopped find what they left.
        let partial = output.as_ref().map(|path| path.with_file_name(format!("partial-{}", file_name(path))));
        if let (Some(output), Some(partial)) = (&output, &partial) {
            remove(partial)?;
            remove(output)?;
        }
        let mut arguments: Vec<String> =
            stage.arguments.iter().map(|argument| self.argument(argument, partial.as_deref())).collect();
        let checkpoints = partial.as_ref().map(|path| path.with_file_name(format!("{}.checkpoints", file_name(path))));
        if stage.kind == StageKind::Adapt && checkpoints.is_some_and(|folder| folder.is_dir()) {
            arguments.push("--resume".into());
        }
        let start = Instant::now();
        let found = child::json([stage.kind.command().to_owned()].into_iter().chain(arguments));
        stop_if_requested()?;
        match found {
            Ok(result) => {
                if let (Some(output), Some(partial)) = (&output, &partial) {
                    std::fs::rename(partial, output)
                        .map_err(|e| anyhow::anyhow!("{}: cannot be renamed: {e}", partial.display()))?;
                }
                let took = start.elapsed().as_secs_f64();
                self.store.put_stage(&stage.key, stage.kind.command(), &shown(stage), took, &result)?;
                self.done.run += 1;
                Ok(Some(result))
            }
            Err(error) => {
                self.done.failures.push(format!("{} ({error})", shown(stage)));
                Ok(None)
            }
        }
    }

    fn output(&self, stage: &Stage) -> Option<PathBuf> {
        Some(self.args.store.join("work").join(format!("{:.16}-{}", stage.key, stage.kind.output()?)))
    }

    fn argument(&self, argument: &Argument, own: Option<&Path>) -> String {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        match argument {
            Argument::Text(value) | Argument::File(value) => value.clone(),
            Argument::Output(stage) => {
                self.output(&self.expanded.stages[*stage]).as_deref().map(text).unwrap_or_default()
            }
            Argument::Own => own.map(text).unwrap_or_default(),
        }
    }

    fn record(
        &self,
        stage: usize,
        names: &BTreeMap<String, String>,
        result: &Value,
        plan: Option<&Value>,
    ) -> anyhow::Result<Record> {
        let stage = &self.expanded.stages[stage];
        let (figures, items) = match stage.kind {
            StageKind::Bench => {
                let found = speed::figures(result);
                (found.figures, found.items)
            }
            _ => (
                serde_json::from_value::<Figures>(result["figures"].clone())?,
                serde_json::from_value::<BTreeMap<String, Vec<Item>>>(result["items"].clone())?,
            ),
        };
        let environment = match &result["environment"] {
            Value::Object(fields) => fields.clone(),
            _ => environment(self.ctx).as_object().cloned().unwrap_or_default(),
        };
        let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let layers = plan.and_then(|plan| plan["units"].as_array()).map(|units| units.iter().map(layer).collect());
        Ok(Record {
            version: RECORD_VERSION,
            id: stage.key[..12].to_owned(),
            sweep: Some(self.name.to_owned()),
            case: names.clone(),
            figures,
            items,
            layers: layers.unwrap_or_default(),
            environment: environment.iter().map(|(name, value)| (name.clone(), plain(value))).collect(),
            seconds: self.store.stage_seconds(&stage.key)?.unwrap_or(0.0),
            ended: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        })
    }

    /// Removes models and adapters of which everything is stored.
    fn remove_models(&self) -> anyhow::Result<()> {
        let failed: BTreeSet<usize> =
            self.done.stages.iter().filter(|(_, result)| result.is_none()).map(|(index, _)| *index).collect();
        let still_read: BTreeSet<usize> =
            failed.iter().flat_map(|index| self.expanded.stages[*index].inputs().collect::<Vec<_>>()).collect();
        for (index, stage) in self.expanded.stages.iter().enumerate() {
            let large = matches!(stage.kind, StageKind::Compress | StageKind::Adapt);
            if let Some(path) = self.output(stage).filter(|_| large && !still_read.contains(&index)) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(anyhow::anyhow!("{}: cannot be removed: {e}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A unit of `plan --json`.
fn layer(unit: &Value) -> Layer {
    let name = unit["unit"].as_str().map_or_else(|| unit["unit"].to_string(), str::to_owned);
    Layer {
        name,
        bits: unit["bits_per_weight"].as_f64(),
        sparsity: unit["sparsity"].as_f64(),
        sensitivity: unit["sensitivity"].as_f64(),
        bytes: unit["bytes"].as_u64(),
        milliseconds: None,
    }
}

/// A stage as a person would type it.
fn shown(stage: &Stage) -> String {
    let words = stage.arguments.iter().map(|argument| match argument {
        Argument::Text(value) | Argument::File(value) => value.clone(),
        Argument::Output(stage) => format!("<{stage}>"),
        Argument::Own => "<out>".into(),
    });
    std::iter::once(stage.kind.command().to_owned()).chain(words).collect::<Vec<_>>().join(" ")
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
