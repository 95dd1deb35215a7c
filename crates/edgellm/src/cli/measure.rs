//! `edgellm measure`: the sensitivity of every unit of a model to every format, on calibration text.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use edgellm::luc::{Trials, measure, model_digest, option_grid};
use edgellm::model::values::{Granularity, LayerFormat, Measurement, Scales, write_value};
use serde_json::json;

use super::calibration::CalibrationArgs;
use super::compress::parse_format;
use super::compressors::CompressorChoice;
use super::failure::{Usage, usage};
use super::output::table;
use super::progress::Counted;
use super::{Context, check_output_file, interrupt};
use partial::Partial;

mod partial;

/// Measure how much every part of a model suffers from every format
#[derive(Args)]
pub(crate) struct Measure {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The measurement to write: JSON, or TOML if the name ends in .toml
    #[arg(short, long, value_name = "FILE.json")]
    output: PathBuf,
    /// Treat whole blocks, or single projections (linear), as units
    #[arg(long, default_value = "block", value_name = "UNIT")]
    granularity: Granularity,
    /// Bit widths to try
    #[arg(long, value_delimiter = ',', default_value = "2,3,4,5,6,8", value_name = "LIST")]
    bits: Vec<u8>,
    /// Numbers of weights that share a scale to try
    #[arg(long, value_delimiter = ',', default_value = "32,64", value_name = "LIST")]
    group_size: Vec<u16>,
    /// How scales are stored: in 8 bits and a unit a row, or in 16 bits
    #[arg(long, value_enum, default_value_t = ScalesArg::U8, value_name = "KIND")]
    scales: ScalesArg,
    /// More formats to try, such as q4g32s-b70 (70% of the weights kept) or q4g32a-2:4
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    formats: Vec<String>,
    /// Shares of pruned weights to try (what `plan --solver paper --target-sparsity` needs)
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    sparsity: Vec<f64>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// How matrices are brought into a format
    #[arg(long, value_enum, default_value_t = CompressorChoice::Gptq, value_name = "NAME")]
    compressor: CompressorChoice,
    /// Windows of the calibration text whose outputs are compared
    #[arg(long, default_value_t = 8, value_name = "N")]
    compare_windows: usize,
    /// Tokens from the beginning of a compared window
    #[arg(long, default_value_t = 128, value_name = "N")]
    compare_context: usize,
}

/// How scales are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ScalesArg {
    /// 8 bits, times a unit of the row
    U8,
    /// f16
    F16,
}

impl Measure {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        check_output_file(&self.output)?;
        let options = self.options()?;
        self.calibration.check()?;
        if self.compare_windows == 0 || self.compare_context < 2 {
            let found = format!("{} and {}", self.compare_windows, self.compare_context);
            let text = "--compare-windows: expected at least 1, --compare-context: at least 2";
            return Err(Usage(format!("{text}; found {found}")).into());
        }
        let model = ctx.load_reference(&self.model)?;
        let windows = self.calibration.windows(ctx, &model)?;
        let compressor = self.compressor.compressor();
        let trials = Trials {
            options: &options,
            granularity: self.granularity,
            compressor: compressor.as_ref(),
            calibration: &windows,
            compared_windows: self.compare_windows,
            compared_length: self.compare_context,
        };
        let partial = Partial::new(&self.output, &trials, model_digest(&model.files)?);
        let known = partial.read(ctx)?;
        let mut progress = ctx.progress("measure", 0, Counted::Items("trials"));
        let mut measurement = interrupt::stoppable(|| {
            let on_step = &mut |step: edgellm::luc::Progress<'_>| {
                progress.set_total(step.total as u64);
                progress.set_with(step.done as u64, step.what.to_string());
                interrupt::checkpoint();
            };
            Ok(measure(&model.decoder, &trials, &known, &mut |units| partial.write(units), on_step)?)
        })?;
        progress.finish();
        measurement.model = model_name(&self.model);
        measurement.model_digest = partial.model_digest().to_string();
        write_value(&self.output, &measurement)?;
        partial.remove();
        self.report(ctx, &measurement)
    }

    fn options(&self) -> anyhow::Result<Vec<LayerFormat>> {
        let scales = match self.scales {
            ScalesArg::U8 => Scales::U8,
            ScalesArg::F16 => Scales::F16,
        };
        let grid = option_grid(&self.bits, &self.group_size, &self.sparsity).map_err(usage)?;
        let stored = |option: LayerFormat| if option.bit_width < 16 { option.with_scales(scales) } else { option };
        let mut options: Vec<LayerFormat> = grid.into_iter().map(stored).collect();
        for name in &self.formats {
            let option = parse_format("--formats", name)?;
            if options.contains(&option) {
                return Err(Usage(format!("--formats: {name} is there already; expected every format once")).into());
            }
            options.push(option);
        }
        Ok(options)
    }

    fn report(&self, ctx: &Context, measurement: &Measurement) -> anyhow::Result<()> {
        let json = json!({
            "path": self.output, "model": measurement.model, "units": measurement.units.len(),
            "options": measurement.options.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "tokens": measurement.calibration_tokens,
        });
        ctx.result(json, || format!("{}wrote {}\n", sensitivities(measurement), self.output.display()))
    }
}

/// The last part of a path or name: what depends on the machine stays out of files.
pub(crate) fn model_name(name: &str) -> String {
    let trimmed = name.trim_end_matches(['/', '\\']);
    trimmed.rsplit(['/', '\\']).next().unwrap_or(trimmed).to_string()
}

/// A table of sensitivities: one row a unit, one column an option of the smallest group size.
pub(crate) fn sensitivities(measurement: &Measurement) -> String {
    let smallest = measurement.options.iter().filter(|o| o.bit_width < 16).map(|o| o.group_size).min();
    let shown: Vec<usize> = (0..measurement.options.len())
        .filter(|&i| measurement.options[i].bit_width >= 16 || Some(measurement.options[i].group_size) == smallest)
        .collect();
    let names: Vec<String> = shown.iter().map(|&i| measurement.options[i].to_string()).collect();
    let header: Vec<&str> = std::iter::once("unit").chain(names.iter().map(String::as_str)).collect();
    let row = |unit: &edgellm::model::values::UnitMeasurement| {
        let values = shown.iter().map(|&i| unit.kl.get(i).map_or("-".into(), |s| format!("{s:.2e}")));
        std::iter::once(unit.unit.to_string()).chain(values).collect()
    };
    table(&header, &measurement.units.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_leave_the_machine_out() {
        for (name, expected) in [("a/b/c", "c"), ("c", "c"), ("a\\c", "c"), ("x/m.gguf", "m.gguf"), ("a/b/", "b")] {
            assert_eq!(model_name(name), expected);
        }
    }
}
