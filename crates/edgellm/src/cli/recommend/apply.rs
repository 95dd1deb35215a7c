//! Doing what was recommended, each step in a process of its own, and holding what comes out against what was expected.

use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::model::values::{Measurement, write_value};
use edgellm::recommend::Recommendation;
use serde_json::{Value, json};

use super::{Recommend, compared};
use crate::cli::output::bytes;
use crate::cli::{Context, child};

/// Options of applying.
#[derive(Args)]
#[command(next_help_heading = "Doing it")]
pub(crate) struct ApplyArgs {
    /// Compress the model into this folder, and measure speed, memory and, with --text, quality
    #[arg(long, value_name = "DIR")]
    apply: Option<PathBuf>,
    /// A text to measure the quality on
    #[arg(long, value_name = "FILE", requires = "apply")]
    text: Option<PathBuf>,
    /// Windows of the text, of 512 tokens
    #[arg(long, value_name = "N", default_value_t = 8, requires = "text")]
    windows: usize,
    /// How matrices are brought into their format (default: the measurement's)
    #[arg(long, value_name = "NAME", requires = "apply")]
    compressor: Option<String>,
    /// Text to calibrate on, or examples (.jsonl, .csv) (default: a short built-in English text)
    #[arg(long, value_name = "FILE", requires = "apply")]
    calibrate: Option<PathBuf>,
    /// Windows of the calibration text
    #[arg(long, value_name = "N", default_value_t = 64, requires = "apply")]
    calibrate_windows: usize,
}

/// What was measured of the applied recommendation.
pub(super) struct Checked {
    folder: PathBuf,
    expected_seconds: f64,
    seconds: f64,
    expected_peak: u64,
    peak: Option<u64>,
    expected_kl: f64,
    kl: Option<f64>,
    quality: Option<f64>,
}

impl ApplyArgs {
    pub(super) fn folder(&self) -> Option<&Path> {
        self.apply.as_deref()
    }

    pub(super) fn run(
        &self,
        ctx: &Context,
        asked: &Recommend,
        measurement: &Measurement,
        best: &Recommendation,
    ) -> anyhow::Result<Option<Checked>> {
        let Some(folder) = &self.apply else { return Ok(None) };
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let policy = folder.with_extension("policy.toml.tmp");
        write_value(&policy, &best.solution.policy)?;
        let compressor = self.compressor.as_ref().unwrap_or(&measurement.compressor);
        let (out, written) = (text(folder), text(&policy));
        ctx.say(&format!("compressing into {out}"));
        let mut compress =
            vec!["compress", "-m", &asked.model, "--policy", &written, "--force", "--compressor", compressor];
        let calibrate = self.calibrate.as_deref().map(text);
        let windows = self.calibrate_windows.to_string();
        compress.extend(["--prepare", "-o", &out, "--calibrate-windows", &windows]);
        if let Some(file) = &calibrate {
            compress.extend(["--calibrate", file]);
        }
        let compressed = child::json(compress);
        std::fs::remove_file(&policy)?;
        compressed?;
        ctx.say("measuring what it does");
        let (threads, tokens) = (best.threads.to_string(), (2 * asked.context).to_string());
        let mut bench = vec!["bench", "-m", &out, "-p", "0", "--tune", "0", "-n", &tokens, "-t", &threads];
        let limit = ctx.max_memory.map(|limit| limit.to_string());
        if let Some(limit) = &limit {
            bench.extend(["--max-memory", limit]);
        }
        let found = child::json(bench)?;
        let row = &found["tests"][0];
        let rate = row["median_ts"].as_f64().ok_or_else(|| anyhow::anyhow!("edgellm bench told no speed: {found}"))?;
        let kl = match &self.text {
            None => None,
            Some(path) => {
                let (path, windows) = (text(path), self.windows.to_string());
                let eval = ["eval", "-m", &out, "--base", &asked.model, "--text", &path, "--windows", &windows];
                child::json(eval)?["kl"].as_f64()
            }
        };
        Ok(Some(Checked {
            folder: folder.clone(),
            expected_seconds: best.schedule.seconds(),
            seconds: 1.0 / rate,
            expected_peak: best.schedule.expected_bytes(),
            peak: row["peak_rss_bytes"].as_u64(),
            expected_kl: best.solution.sensitivity,
            kl,
            quality: asked.min_quality,
        }))
    }
}

impl Checked {
    /// Whether the quality that was asked for is kept; `None` if it was not measured or not asked for.
    fn keeps(&self) -> Option<bool> {
        Some((-self.kl?).exp() >= self.quality?)
    }

    /// What to ask for, so that the quality that was asked for is kept on the text: units' sensitivities do not just add up,
    /// and other text has others. `None` if it is kept.
    pub(super) fn stricter(&self) -> Option<f64> {
        let asked = -self.quality?.ln();
        let measured = self.kl.filter(|kl| *kl > asked)?;
        // A little more, so that the next one is not just as far from it.
        Some((-0.97 * asked * self.expected_kl / measured).exp())
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "path": self.folder, "seconds_per_token": self.seconds, "peak_rss_bytes": self.peak, "kl": self.kl,
            "quality": self.kl.map(|kl| (-kl).exp()), "keeps_quality": self.keeps(),
            "expected": {
                "seconds_per_token": self.expected_seconds, "peak_bytes": self.expected_peak, "kl": self.expected_kl,
            },
        })
    }

    pub(super) fn text(&self) -> String {
        let ms = |seconds: f64| format!("{:.2} ms", 1e3 * seconds);
        let mut rows =
            vec![("a token", self.expected_seconds, self.seconds, ms(self.expected_seconds), ms(self.seconds))];
        if let Some(peak) = self.peak {
            let (expected, found) = (bytes(self.expected_peak), bytes(peak));
            rows.push(("memory", self.expected_peak as f64, peak as f64, expected, found));
        }
        if let Some(kl) = self.kl {
            let (expected, found) = (format!("{:.4} nats", self.expected_kl), format!("{kl:.4} nats"));
            rows.push(("KL", self.expected_kl, kl, expected, found));
        }
        let kept = match (self.keeps(), self.quality) {
            (Some(false), Some(quality)) => format!(
                "on this text {:.1}% of the base's probability is kept, less than the {:.1}% that were asked for\n",
                100.0 * (-self.kl.unwrap_or(0.0)).exp(),
                100.0 * quality
            ),
            _ => String::new(),
        };
        format!("wrote {}\n{}{kept}", self.folder.display(), compared(&rows))
    }
}
