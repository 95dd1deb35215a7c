//! The regression sweep: what CI gates, and whether the gate and the store do what they promise.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::edgellm::{Edgellm, arg};
use crate::repo;

/// Runs the regression sweep against its baseline; then checks that a worse model fails, and that a killed sweep goes on.
#[derive(Args)]
pub(crate) struct RegressionSweep {
    /// Write the baseline anew instead: after a change that is meant to change figures.
    #[arg(long)]
    write_baseline: bool,
}

impl RegressionSweep {
    pub(crate) fn run(&self) -> Result<()> {
        let edgellm = Edgellm::build(&[])?.quietly();
        if self.write_baseline {
            let root = repo::root()?;
            let (template, baseline) =
                (root.join("sweeps/regression.toml"), root.join("sweeps/regression-baseline.toml"));
            let store = fresh("regression")?;
            sweep(&edgellm, &template, &store, &["--write-baseline", arg(&baseline)?])?;
            println!("wrote {}", baseline.display());
            return Ok(());
        }
        println!("{}", check(&edgellm)?);
        Ok(())
    }
}

/// An empty folder for results.
fn fresh(name: &str) -> Result<std::path::PathBuf> {
    let folder = repo::scratch("sweeps")?.join(name);
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).context(format!("cannot empty {}", folder.display())),
        _ => Ok(folder),
    }
}

fn sweep(edgellm: &Edgellm, template: &Path, store: &Path, more: &[&str]) -> Result<Value> {
    let arguments = ["eval", "--sweep", arg(template)?, "--store", arg(store)?];
    edgellm.json(arguments.into_iter().chain(more.iter().copied()))
}

/// Counts of stages: run, found.
fn stages(found: &Value) -> Result<(u64, u64)> {
    let count =
        |name: &str| found["stages"][name].as_u64().with_context(|| format!("no count of stages {name}: {found}"));
    Ok((count("run")?, count("found")?))
}

/// The whole check; one line that sums it up.
pub(crate) fn check(edgellm: &Edgellm) -> Result<String> {
    let root = repo::root()?;
    let (template, baseline) = (root.join("sweeps/regression.toml"), root.join("sweeps/regression-baseline.toml"));
    let store = fresh("regression")?;
    let gate = ["--gate", arg(&baseline)?];
    let start = Instant::now();
    let first = sweep(edgellm, &template, &store, &gate)?;
    let took = start.elapsed();
    let (run, _) = stages(&first)?;
    let runs = first["runs"].as_u64().unwrap_or(0);
    ensure!(run > 0 && runs > 0, "expected stages and runs, found {first}");
    let again = sweep(edgellm, &template, &store, &gate)?;
    ensure!(stages(&again)?.0 == 0, "expected no stage to run again, found {again}");
    worse_is_refused(edgellm, &template, &store, &gate)?;
    let found = killed_and_resumed(edgellm, &template, runs, run)?;
    Ok(format!(
        "{runs} runs of {run} stages in {:.0} s pass the gate, 2 bits do not; a killed sweep ran {found} fewer again",
        took.as_secs_f64()
    ))
}

/// The gate must fail for a model of 2 bits, and name what fell.
fn worse_is_refused(edgellm: &Edgellm, template: &Path, store: &Path, gate: &[&str; 2]) -> Result<()> {
    let output = Command::new(edgellm.binary()?)
        .args(["eval", "--sweep", arg(template)?, "--store", arg(store)?, "--set", "format=q2g32a"])
        .args(gate)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "expected a worse model to exit with 1, found {}: {said}", output.status);
    let named = said.lines().any(|line| line.contains("policy=narrow") && line.contains(" kl: expected at most"));
    ensure!(named, "expected the gate to name the KL of the policy 'narrow', found: {said}");
    let others = said.lines().any(|line| line.contains("policy=solve") && line.contains("expected at most"));
    ensure!(!others, "expected nothing but the policy 'narrow' to be worse, found: {said}");
    Ok(())
}

/// Kills a sweep in the middle and runs it again: what was finished is found, and all is there in the end.
fn killed_and_resumed(edgellm: &Edgellm, template: &Path, runs: u64, stages_in_all: u64) -> Result<u64> {
    let store = fresh("killed")?;
    let mut child = Command::new(edgellm.binary()?)
        .args(["eval", "--sweep", arg(template)?, "--store", arg(&store)?, "--quiet"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    // A first model has been compressed: some stages are done, and others are not.
    let work = store.join("work");
    let compressed = || {
        let names = fs::read_dir(&work).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.into_iter().any(|name| name.to_string_lossy().ends_with("-measurement.json"))
    };
    let deadline = Instant::now() + Duration::from_secs(300);
    while !compressed() {
        if let Some(status) = child.try_wait()? {
            bail!("expected to stop a sweep, but it had ended: {status}");
        }
        ensure!(Instant::now() < deadline, "the sweep had nothing compressed after 5 minutes");
        sleep(Duration::from_millis(10));
    }
    child.kill()?;
    child.wait()?;
    let resumed = sweep(edgellm, template, &store, &[])?;
    let (run, found) = stages(&resumed)?;
    // Stages that only stored results depend on are not even looked for.
    ensure!(found > 0 && run > 0, "expected stages of both kinds, found {found} again and {run} run");
    ensure!(run < stages_in_all, "expected fewer than {stages_in_all} stages to run, found {run}");
    ensure!(resumed["runs"] == runs, "expected {runs} runs in the end, found {}", resumed["runs"]);
    Ok(stages_in_all - run)
}
