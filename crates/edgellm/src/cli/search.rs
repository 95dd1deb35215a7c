//! `edgellm search`: improves a plan by measuring whole compressed models.

use std::path::PathBuf;

use clap::Args;
use edgellm::luc::{
    Progress, Search as Searching, Searched, Solve, beginnings, bits_per_weight, model_digest, total_weights,
};
use edgellm::model::values::{Budget, Measurement, read_value, write_value};
use serde_json::json;

use super::calibration::CalibrationArgs;
use super::compressors::CompressorChoice;
use super::failure::Usage;
use super::output::{bytes, parse_size};
use super::progress::Counted;
use super::{Context, check_output_file, interrupt};

/// Improve the plan for a budget by comparing whole compressed models (minutes; plan itself takes none)
#[derive(Args)]
#[command(group = clap::ArgGroup::new("budget").required(true))]
pub(crate) struct Search {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The measurement, as `edgellm measure` wrote it
    #[arg(long, value_name = "FILE")]
    measurement: PathBuf,
    /// Mean bits per weight, scales included
    #[arg(long, allow_negative_numbers = true, value_name = "BITS", group = "budget")]
    target_bpw: Option<f64>,
    /// Size of all packed units, such as 60MB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "budget")]
    target_size: Option<u64>,
    /// Policies to compare
    #[arg(long, default_value_t = 500, value_name = "N")]
    candidates: usize,
    /// Seed of the changes that are tried
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// How matrices are brought into a format
    #[arg(long, value_enum, default_value_t = CompressorChoice::Gptq, value_name = "NAME")]
    compressor: CompressorChoice,
    /// Windows of the calibration text on which policies are compared; the first comparison is on a quarter of them
    #[arg(long, default_value_t = 16, value_name = "N")]
    compare_windows: usize,
    /// Tokens from the beginning of a compared window
    #[arg(long, default_value_t = 128, value_name = "N")]
    compare_context: usize,
    /// The policy to write: TOML, or JSON if the name ends in .json
    #[arg(short, long, value_name = "POLICY.toml")]
    output: PathBuf,
}

impl Search {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        check_output_file(&self.output)?;
        if let Some(bpw) = self.target_bpw.filter(|b| !b.is_finite() || *b <= 0.0) {
            return Err(Usage(format!("--target-bpw: expected a number above 0, found {bpw}")).into());
        }
        if self.candidates < 2 || self.compare_windows == 0 || self.compare_context < 2 {
            let found = format!("{}, {} and {}", self.candidates, self.compare_windows, self.compare_context);
            let text =
                "--candidates: expected at least 2, --compare-windows: at least 1, --compare-context: at least 2";
            return Err(Usage(format!("{text}; found {found}")).into());
        }
        self.calibration.check()?;
        let measurement: Measurement = read_value(&self.measurement)?;
        let budget = Budget { bits_per_weight: self.target_bpw, bytes: self.target_size, ..Budget::default() };
        let start = Solve::default().solution(&measurement, &budget)?.policy;
        let model = ctx.load_reference(&self.model)?;
        let digest = model_digest(&model.files)?;
        if digest != measurement.model_digest {
            anyhow::bail!(
                "{}: expected a measurement of {}, whose weights have the digest {digest}, found {}; measure that model",
                self.measurement.display(),
                self.model,
                measurement.model_digest
            );
        }
        let windows = self.calibration.windows(ctx, &model)?;
        let compared = beginnings(&windows, self.compare_windows, self.compare_context);
        let compressor = self.compressor.compressor();
        let search = Searching {
            compressor: compressor.as_ref(),
            calibration: &windows,
            compared: &compared,
            candidates: self.candidates,
            seed: self.seed,
        };
        let mut progress = ctx.progress("search", 0, Counted::Items("steps"));
        let found = interrupt::stoppable(|| {
            let on_step = &mut |step: Progress<'_>| {
                progress.set_total(step.total as u64);
                progress.set_with(step.done as u64, step.what.to_string());
                interrupt::checkpoint();
            };
            Ok(search.run(&model.decoder, &measurement, &start, &budget, on_step)?)
        })?;
        progress.finish();
        write_value(&self.output, &found.policy)?;
        self.report(ctx, &measurement, &found)
    }

    fn report(&self, ctx: &Context, measurement: &Measurement, found: &Searched) -> anyhow::Result<()> {
        let bpw = bits_per_weight(found.bytes, total_weights(measurement)?);
        let json = json!({
            "path": self.output, "bytes": found.bytes, "bits_per_weight": bpw, "candidates": found.candidates,
            "kl_before": found.kl_before, "kl": found.kl,
        });
        ctx.result(json, || {
            let gain = 100.0 * (1.0 - found.kl / found.kl_before.max(f64::MIN_POSITIVE));
            format!(
                "{bpw:.3} bits per weight, {}; {} policies compared: KL {:.4} became {:.4} on the calibration text \
                 ({gain:.0}% less); wrote {}\n",
                bytes(found.bytes),
                found.candidates,
                found.kl_before,
                found.kl,
                self.output.display()
            )
        })
    }
}
