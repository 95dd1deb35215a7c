//! What analytics cost: processor time of decoding without them, with metrics and with a trace, in turns.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::edgellm::{Edgellm, SMOLLM2, arg};
use crate::repo;

/// Measures what metrics and traces cost.
#[derive(Args)]
pub(crate) struct CheckTelemetry {
    /// The model.
    #[arg(short, long, default_value = SMOLLM2)]
    model: String,
    /// Another binary, such as one without spans, to compare with.
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Turns.
    #[arg(short, long, default_value_t = 15)]
    repetitions: usize,
    /// Tokens of a turn.
    #[arg(short = 'n', long, default_value_t = 128)]
    tokens: usize,
}

impl CheckTelemetry {
    pub(crate) fn run(&self) -> Result<()> {
        let edgellm = Edgellm::build(&[])?.quietly();
        if self.model == SMOLLM2 {
            edgellm.pull(SMOLLM2)?;
        }
        let folder = repo::scratch("telemetry")?;
        let (metrics, trace) = (folder.join("metrics.jsonl"), folder.join("trace.json"));
        let base = match &self.base {
            Some(path) => Some(Edgellm::at(repo::shell()?, std::path::absolute(path)?).quietly()),
            None => None,
        };
        let mut ways: Vec<(&str, &Edgellm, Vec<&str>)> = vec![
            ("off", &edgellm, Vec::new()),
            ("metrics", &edgellm, vec!["--metrics", arg(&metrics)?]),
            ("trace", &edgellm, vec!["--trace", arg(&trace)?]),
        ];
        ways.extend(base.as_ref().map(|base| ("base", base, Vec::new())));
        let mut samples: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
        for turn in 0..self.repetitions {
            // No way is always first after another.
            for at in (0..ways.len()).map(|i| (i + turn) % ways.len()) {
                let (_, edgellm, options) = &ways[at];
                samples[at].push(self.cpu_ms(edgellm, options)?);
                if metrics.exists() {
                    std::fs::remove_file(&metrics)?;
                }
            }
        }
        println!("| analytics | median CPU ms | least CPU ms | median ratio to off | least ratio to off |");
        println!("|-----------|--------------:|-------------:|--------------------:|-------------------:|");
        let off = samples[0].clone();
        for ((name, _, _), times) in ways.iter().zip(&samples) {
            let ratios: Vec<f64> = times.iter().zip(&off).map(|(time, off)| time / off).collect();
            let least = least(times);
            let (median, ratio) = (median(times), median(&ratios));
            println!("| {name} | {median:.1} | {least:.1} | {ratio:.4} | {:.4} |", least / self::least(&off));
        }
        Ok(())
    }

    /// Processor time of decoding, on one thread: two disturb each other.
    fn cpu_ms(&self, edgellm: &Edgellm, options: &[&str]) -> Result<f64> {
        let tokens = self.tokens.to_string();
        let bench = ["bench", "-m", &self.model, "-p", "0", "-n", &tokens, "--tune", "0", "-r", "1", "-t", "1"];
        let result = edgellm.json(bench.into_iter().chain(options.iter().copied()))?;
        let ns = &result["tests"][0]["cpu_ns"][0];
        Ok(ns.as_f64().with_context(|| format!("no processor time in {result}"))? * 1e-6)
    }
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
