//! Whether a budget in milliseconds is kept: plans for target times, compresses, and measures how long a token takes.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;

use crate::edgellm::{Edgellm, SMOLLM2, arg, number};
use crate::repo;

/// Tokens of a measured text; the cache holds half of them in the mean.
const TOKENS: usize = 128;
/// Widths between which target times are chosen.
const WIDTHS: [&str; 2] = ["3", "7"];

/// Plans for milliseconds per token, compresses, and compares target, prediction and measurement.
#[derive(Args)]
pub(crate) struct CheckLatency {
    /// The model.
    #[arg(short, long, default_value = SMOLLM2)]
    model: String,
    /// Its measurement (default: one is made, of a few widths and tokens).
    #[arg(long, value_name = "FILE")]
    measurement: Option<PathBuf>,
    /// The device's profile (default: it is measured now).
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Numbers of threads.
    #[arg(short = 't', value_delimiter = ',', default_value = "1,2")]
    threads: Vec<u16>,
    /// Target times in milliseconds (default: three between those of 3 and 7 bits per weight).
    #[arg(long, value_name = "MS", value_delimiter = ',')]
    targets: Vec<f64>,
    /// How far the measured time may be from the target.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1)]
    tolerance: f64,
}

impl CheckLatency {
    pub(crate) fn run(&self) -> Result<()> {
        let edgellm = Edgellm::build(&[])?.quietly();
        if self.model == SMOLLM2 {
            edgellm.pull(SMOLLM2)?;
        }
        let folder = repo::scratch("latency")?;
        let profile = match &self.profile {
            Some(path) => path.clone(),
            None => {
                let path = folder.join("profile.toml");
                edgellm.json(["profile", "-o", arg(&path)?])?;
                path
            }
        };
        let measurement = match &self.measurement {
            Some(path) => path.clone(),
            None => {
                let path = folder.join("measurement.json");
                // Times do not depend on the codes: the quickest compressor, and little text.
                let options =
                    ["--compressor", "rtn", "--group-size", "32", "--compare-windows", "1", "--compare-context", "32"];
                edgellm.json(["measure", "-m", &self.model, "-o", arg(&path)?].into_iter().chain(options))?;
                path
            }
        };
        println!("| threads | target ms | predicted ms | measured ms | measured / target |");
        println!("|--------:|----------:|-------------:|------------:|------------------:|");
        let mut worst = 0f64;
        for threads in &self.threads {
            let check = Check { edgellm: &edgellm, model: &self.model, measurement: &measurement, profile: &profile };
            let targets =
                if self.targets.is_empty() { check.targets(*threads, &folder)? } else { self.targets.clone() };
            for target in targets {
                let (predicted, measured) = check.measure(*threads, target, &folder)?;
                let ratio = measured / target;
                println!("| {threads} | {target:.3} | {predicted:.3} | {measured:.3} | {ratio:.3} |");
                worst = worst.max((ratio - 1.0).abs());
            }
        }
        let (worst, most) = (100.0 * worst, 100.0 * self.tolerance);
        ensure!(worst <= most, "expected measured times within {most:.0}% of their targets, found {worst:.1}%");
        println!("measured times are within {worst:.1}% of their targets");
        Ok(())
    }
}

struct Check<'a> {
    edgellm: &'a Edgellm,
    model: &'a str,
    measurement: &'a Path,
    profile: &'a Path,
}

impl Check<'_> {
    /// Plans with a budget; the predicted milliseconds.
    fn plan(&self, threads: u16, budget: [&str; 2], policy: &Path) -> Result<f64> {
        let (threads, context) = (threads.to_string(), (TOKENS / 2).to_string());
        let inputs = ["--measurement", arg(self.measurement)?, "--profile", arg(self.profile)?];
        let device = ["--context", &context, "--threads", &threads, "-o", arg(policy)?];
        number(&self.edgellm.json(["plan"].into_iter().chain(inputs).chain(device).chain(budget))?, "milliseconds")
    }

    /// Three times between those of the least and the most bits.
    fn targets(&self, threads: u16, folder: &Path) -> Result<Vec<f64>> {
        let policy = folder.join("policy.toml");
        let fast = self.plan(threads, ["--target-bpw", WIDTHS[0]], &policy)?;
        let slow = self.plan(threads, ["--target-bpw", WIDTHS[1]], &policy)?;
        // What has fewer bits is not always faster.
        let (fast, slow) = (fast.min(slow), fast.max(slow));
        Ok([0.2, 0.5, 0.8].map(|share| ((fast + share * (slow - fast)) * 1e3).round() / 1e3).to_vec())
    }

    /// Predicted and measured milliseconds for a target.
    fn measure(&self, threads: u16, target: f64, folder: &Path) -> Result<(f64, f64)> {
        let (policy, small) = (folder.join("policy.toml"), folder.join("model"));
        let predicted = self.plan(threads, ["--target-ms", &target.to_string()], &policy)?;
        let compress = ["compress", "-m", self.model, "--policy", arg(&policy)?, "-o", arg(&small)?, "--force"];
        self.edgellm.json(compress.into_iter().chain(["--compressor", "rtn"]))?;
        let (threads, tokens) = (threads.to_string(), TOKENS.to_string());
        let tests = ["-p", "0", "-n", &tokens, "--tune", "0", "-r", "7", "-t", &threads];
        let bench = self.edgellm.json(["bench", "-m", arg(&small)?].into_iter().chain(tests))?;
        Ok((predicted, 1e3 / number(&bench["tests"][0], "median_ts")?))
    }
}
