//! `cargo xtask compare-policies`: what each solver's policy really costs, measured on compressed models.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::table;
use crate::edgellm::{Edgellm, SMOLLM2, arg, number};
use crate::repo;

/// Plans, compresses and evaluates for every budget and solver, and prints a table.
#[derive(Args)]
pub(crate) struct ComparePolicies {
    /// The model.
    #[arg(long, value_name = "MODEL", default_value = SMOLLM2)]
    model: String,
    /// Its measurement, as `edgellm measure` wrote it.
    #[arg(long, value_name = "FILE")]
    measurement: PathBuf,
    /// Budgets: bits per weight such as 3.5, or sizes of the packed weights such as 70.1MB.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    budgets: Vec<String>,
    /// Solvers: solve, uniform, paper, search.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "solve")]
    solvers: Vec<String>,
    /// Text to calibrate on.
    #[arg(long, value_name = "FILE")]
    calibrate: PathBuf,
    /// Windows of 512 tokens to calibrate on.
    #[arg(long, value_name = "N", default_value = "64")]
    calibrate_windows: String,
    /// Seed of the windows.
    #[arg(long, value_name = "SEED", default_value = "0")]
    calibrate_seed: String,
    /// Policies that the search compares.
    #[arg(long, value_name = "N", default_value = "500")]
    candidates: String,
    /// Text to evaluate on, in windows of 512 tokens.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Windows to evaluate on.
    #[arg(long, value_name = "N", default_value = "40")]
    windows: String,
    /// File to which a line is added for each model: what `edgellm plan --pareto ... --measured` draws.
    #[arg(long, value_name = "FILE.jsonl")]
    points: Option<PathBuf>,
}

impl ComparePolicies {
    pub(crate) fn run(&self) -> Result<()> {
        ensure!(!self.budgets.is_empty(), "--budgets: expected at least one, such as 3.5 or 70MB");
        let edgellm = Edgellm::build(&[])?.quietly();
        let mut rows = Vec::new();
        let mut refused = None;
        for budget in &self.budgets {
            for solver in &self.solvers {
                // A budget that one solver cannot keep is a result; what the others do with it is still wanted.
                let row = self.row(&edgellm, budget, solver).unwrap_or_else(|error| {
                    refused.get_or_insert(format!("{error:#}"));
                    let cells = [solver, budget, "-", "-", "-", "-", "none"];
                    cells.map(str::to_owned).to_vec()
                });
                eprintln!("{}", row.join("  "));
                rows.push(row);
            }
        }
        let header = ["solver", "budget", "bits", "file MB", "KL", "perplexity", "same token %"];
        print!("{}", table(&header, &rows, 2));
        if let Some(error) = refused {
            eprintln!("the first that failed: {error}");
        }
        ensure!(rows.iter().any(|row| row[2] != "-"), "no solver found a policy");
        Ok(())
    }

    fn calibration(&self) -> Result<[&str; 6]> {
        let (windows, seed) = (&self.calibrate_windows, &self.calibrate_seed);
        Ok(["--calibrate", arg(&self.calibrate)?, "--calibrate-windows", windows, "--calibrate-seed", seed])
    }

    fn row(&self, edgellm: &Edgellm, budget: &str, solver: &str) -> Result<Vec<String>> {
        let folder = repo::scratch("policies")?;
        let (policy, small) = (folder.join("policy.toml"), folder.join("small"));
        let within = if budget.ends_with('B') { "--target-size" } else { "--target-bpw" };
        let measured = ["--measurement", arg(&self.measurement)?, within, budget, "-o", arg(&policy)?];
        let model = ["-m", &self.model];
        let plan = match solver {
            "search" => {
                let search = ["search", "--candidates", &self.candidates];
                Some(edgellm.json(search.into_iter().chain(model).chain(measured).chain(self.calibration()?))?)
            }
            // It says itself why there is none.
            _ => edgellm.json(["plan", "--solver", solver].into_iter().chain(model).chain(measured)).ok(),
        };
        let Some(plan) = plan else {
            let none = || "-".to_owned();
            return Ok(vec![solver.into(), budget.into(), "cannot be kept".into(), none(), none(), none(), none()]);
        };
        let compress = ["compress", "--policy", arg(&policy)?, "-o", arg(&small)?, "--force"];
        let compressed = edgellm.json(compress.into_iter().chain(model).chain(self.calibration()?))?;
        let eval = ["eval", "-m", arg(&small)?, "--base", &self.model, "--text", arg(&self.text)?];
        let eval = edgellm.json(eval.into_iter().chain(["--context", "512", "--windows", &self.windows]))?;
        let bytes = number(&compressed, "bytes_after")?;
        self.note(solver, bytes, &eval)?;
        Ok(vec![
            solver.into(),
            budget.into(),
            format!("{:.3}", number(&plan, "bits_per_weight")?),
            format!("{:.1}", bytes / 1e6),
            format!("{:.4}", number(&eval, "second_half_kl")?),
            format!("{:.2}", number(&eval, "second_half_perplexity")?),
            format!("{:.1}", 100.0 * number(&eval, "top1_agreement")?),
        ])
    }

    fn note(&self, solver: &str, bytes: f64, eval: &Value) -> Result<()> {
        let Some(path) = &self.points else { return Ok(()) };
        let line = json!({"label": solver, "bytes": bytes, "kl": number(eval, "second_half_kl")?});
        let mut file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.as_mut().map_err(|e| anyhow::anyhow!("{e}")).with_context(|| format!("{}", path.display()))?;
        Ok(writeln!(file, "{line}")?)
    }
}
