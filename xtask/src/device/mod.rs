//! `cargo xtask bench-device`: runs the same suite on every device of a matrix, and compares each with its last run.

mod artifacts;
mod matrix;
mod process;
mod readings;
mod results;
pub(crate) mod sshd;
mod suite;
mod table;
#[cfg(test)]
mod tests;
mod transport;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use xshell::cmd;

use crate::edgellm::{Edgellm, arg, number};
use crate::repo;
use matrix::{Device, Part};
use process::Failure;
use results::{Outcome, Row, Run};
use suite::Suite;
use transport::Transport;

/// Runs the suite on every device of a matrix. Exits with 1 if a device failed, with 3 if one is clearly slower than in
/// its last run, with 4 if none was there to run; others that are not there are rows of the table, and no failure.
#[derive(Args)]
pub(crate) struct BenchDevice {
    /// The matrix
    #[arg(long, value_name = "FILE", default_value = "docs/devices.toml")]
    matrix: PathBuf,
    /// Only the device of this name
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Minutes of the sustained run, instead of the matrix's
    #[arg(long, value_name = "N")]
    minutes: Option<f64>,
    /// Where results go, and where those of the last run are (default: bench-device in the target folder)
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Remove everything from the devices afterwards, also what the next run would not have to push again
    #[arg(long)]
    clean: bool,
}

/// Exit code where something is clearly slower than in the last run.
const SLOWER: i32 = 3;
/// Exit code where no device was there.
const NONE: i32 = 4;

impl BenchDevice {
    pub(crate) fn run(&self) -> Result<()> {
        let devices = self.devices().unwrap_or_else(|error| crate::usage(&error));
        let run = self.rows(devices)?;
        let slower = run.rows.iter().flat_map(|r| &r.changes).any(results::Change::is_slower);
        if run.rows.iter().any(|row| row.outcome == Outcome::Failed) {
            bail!("a device failed");
        }
        if run.rows.iter().all(|row| row.outcome == Outcome::NotRun) {
            eprintln!("no device was run");
            std::process::exit(NONE);
        }
        if slower {
            eprintln!("something is clearly slower than in the last run");
            std::process::exit(SLOWER);
        }
        Ok(())
    }

    /// The devices of the matrix that were asked for.
    fn devices(&self) -> Result<Vec<Device>> {
        let mut devices = matrix::read(&repo::root()?.join(&self.matrix))?;
        if let Some(only) = &self.only {
            let names: Vec<_> = devices.iter().map(|d| d.name().to_owned()).collect();
            devices.retain(|d| d.name() == only);
            if devices.is_empty() {
                bail!("no device {only:?} in {}, which has {}", self.matrix.display(), names.join(", "));
            }
        }
        if let Some(minutes) = self.minutes {
            if !(minutes.is_finite() && minutes > 0.0) {
                bail!("--minutes {minutes}: expected a number above 0");
            }
            devices.iter_mut().for_each(|device| device.minutes = minutes);
        }
        Ok(devices)
    }

    /// Runs every device and writes the results.
    fn rows(&self, devices: Vec<Device>) -> Result<Run> {
        let out = match &self.out {
            Some(out) => repo::root()?.join(out),
            None => repo::target()?.join("bench-device"),
        };
        fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
        let mut rows = Vec::new();
        for device in &devices {
            println!("{}: {:?}", device.name(), device.transport);
            let mut row = row(device, self.clean);
            if row.outcome != Outcome::NotRun
                && let Some(last) = results::last_row(&out, device.name())?
            {
                row.changes = row.compare(&last);
            }
            let reason = row.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
            println!("  {}{reason} ({:.0} s)", row.outcome.word(), row.seconds);
            rows.push(row);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let run = Run { time: results::stamp(now), commit: commit()?, rows };
        write(&out, &run)?;
        Ok(run)
    }
}

/// One device from contact to clean-up; whatever happens ends this row only.
fn row(device: &Device, clean: bool) -> Row {
    let start = Instant::now();
    let mut row = Row {
        name: device.name().to_owned(),
        transport: format!("{:?}", device.transport).to_lowercase(),
        outcome: Outcome::Passed,
        reason: None,
        processor: None,
        pushed: None,
        parts: Vec::new(),
        readings: Vec::new(),
        seconds: 0.0,
        changes: Vec::new(),
    };
    if let Err(failure) = fill(device, clean, &mut row) {
        let not_run = matches!(failure, Failure::NotRun(_));
        row.outcome = if not_run { Outcome::NotRun } else { Outcome::Failed };
        row.reason = Some(failure.to_string());
    } else if let Some(part) = row.parts.iter().find(|part| part.outcome == Outcome::Failed) {
        row.outcome = Outcome::Failed;
        row.reason = Some(format!("{}: {}", part.part, part.detail));
    }
    row.seconds = start.elapsed().as_secs_f64();
    row
}

fn fill(device: &Device, clean: bool, row: &mut Row) -> Result<(), Failure> {
    let failed = |error: anyhow::Error| Failure::Failed(format!("{error:#}"));
    let transport = Transport::new(device)?;
    let answer = transport.reach()?;
    // Scripts run beside the emulator, so that they see this machine's processor.
    row.processor = Some(device.cpu.as_ref().map_or(answer, |cpu| format!("aarch64 {cpu}, emulated")));
    let programs = artifacts::Programs::of(device)?;
    let wants_accuracy = device.parts.contains(&Part::Accuracy);
    let perplexity = if wants_accuracy { perplexity_here().map_err(failed)? } else { f64::NAN };
    let deadline = Instant::now() + Duration::from_secs_f64(60.0 * device.timeout_minutes);
    let suite = Suite { device, transport: &transport, deadline, perplexity };
    let pushed = artifacts::push(&transport, &programs, suite.limit())?;
    println!("  pushed {} files, {:.1} MB; {} were there", pushed.files, pushed.bytes as f64 / 1e6, pushed.kept);
    row.pushed = Some((pushed.files, pushed.kept, pushed.bytes));
    row.readings.push(readings::read(&transport, "start", suite.limit())?);
    for &part in &device.parts {
        let result = suite.run(part, &mut row.readings)?;
        println!("  {} {}: {} ({:.0} s)", result.part, result.outcome.word(), result.detail, result.seconds);
        row.parts.push(result);
    }
    row.readings.push(readings::read(&transport, "end", suite.limit())?);
    if clean {
        transport.remove()
    } else {
        transport.script("rm -rf adapter adapter.checkpoints", suite.limit()).map(drop)
    }
}

/// The accuracy part on this machine.
fn perplexity_here() -> Result<f64> {
    let fixtures = repo::root()?.join("fixtures");
    let (model, text) = (fixtures.join("model"), fixtures.join("text/heldout.txt"));
    let files = ["-m", arg(&model)?, "--text", arg(&text)?];
    number(&Edgellm::build(&[])?.quietly().json(suite::EVAL.into_iter().chain(files))?, "perplexity")
}

fn commit() -> Result<String> {
    let shell = repo::shell()?;
    let Ok(commit) = cmd!(shell, "git rev-parse --short HEAD").quiet().ignore_stderr().read() else {
        return Ok("unknown".to_owned());
    };
    let changed = !cmd!(shell, "git status --porcelain").quiet().read()?.is_empty();
    Ok(format!("{commit}{}", if changed { "+" } else { "" }))
}

/// Writes the run as JSON, Markdown and HTML, and shows the table.
fn write(out: &Path, run: &Run) -> Result<()> {
    let markdown = table::markdown(run);
    let json = serde_json::to_string_pretty(run)?;
    for (end, text) in [("md", &markdown), ("html", &table::html(run)), ("json", &json)] {
        let path = out.join(format!("{}.{end}", run.time));
        let beside = path.with_extension("tmp");
        fs::write(&beside, text).with_context(|| format!("cannot write {}", beside.display()))?;
        fs::rename(&beside, &path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("\n{markdown}\nresults: {}", out.join(format!("{}.*", run.time)).display());
    Ok(())
}

/// The steps of CI: the matrix's own devices, and one by ssh.
pub(crate) fn check(matrix: &Path, only: &str) -> Result<String> {
    let out = Some(repo::scratch("bench-device")?);
    let task =
        BenchDevice { matrix: matrix.to_owned(), only: Some(only.to_owned()), minutes: Some(0.05), out, clean: false };
    let run = task.rows(task.devices()?)?;
    let row = run.rows.first().context("one row")?;
    let details: Vec<_> = row.parts.iter().map(|part| format!("{} ({})", part.part, part.detail)).collect();
    match row.outcome {
        Outcome::Passed => Ok(details.join("; ")),
        other => Err(anyhow!("{only} {}: {}", other.word(), row.reason.as_deref().unwrap_or_default())),
    }
}
