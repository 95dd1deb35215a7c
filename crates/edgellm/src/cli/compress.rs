//! `edgellm compress`: applies a policy, or one format, and writes a model directory.

use std::path::PathBuf;

use clap::Args;
use edgellm::kernels::{Arrangement, Format, PackedHost};
use edgellm::luc::{Applied, Compression, bits_per_weight, compress_model, model_digest, uniform_policy};
use edgellm::model::files::ModelFiles;
use edgellm::model::save::ModelWriter;
use edgellm::model::values::{CompressionPolicy, LayerFormat, Unit, read_value};
use serde_json::json;

use super::calibration::CalibrationArgs;
use super::compressors::CompressorChoice;
use super::failure::{Usage, usage};
use super::output::bytes;
use super::progress::Counted;
use super::recover::{RecoverArgs, Recovered};
use super::{Context, check_output_dir, interrupt, stop_if_requested};

/// Apply a policy and write a smaller model
#[derive(Args)]
#[command(group = clap::ArgGroup::new("formats").required(true))]
pub(crate) struct Compress {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The policy, as `edgellm plan` wrote it
    #[arg(long, value_name = "POLICY.toml", group = "formats")]
    policy: Option<PathBuf>,
    /// One format for everything, such as q4g32a, or pruned: q4g32a-2:4, q4g32s-b50 (half of the weights kept); f16 and
    /// f32 write a plain model that other programs read
    #[arg(long, value_name = "FORMAT", group = "formats")]
    format: Option<String>,
    /// The model directory to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// How matrices are brought into their format
    #[arg(long, value_enum, default_value_t = CompressorChoice::Gptq, value_name = "NAME")]
    compressor: CompressorChoice,
    #[command(flatten)]
    calibration: CalibrationArgs,
    #[command(flatten)]
    recover: RecoverArgs,
    /// Write the packed weights as the CPU's integer kernels use them, so that loading does not prepare them
    #[arg(long)]
    prepare: bool,
    /// Replace the directory if it is there
    #[arg(long)]
    force: bool,
}

impl Compress {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let format = self.format.as_deref().map(|name| parse_format("--format", name)).transpose()?;
        check_output_dir(&self.output, self.force)?;
        if self.output.is_dir() && !is_model_dir(&self.output)? {
            let text = format!("{}: --force replaces a model only, and this folder is none", self.output.display());
            return Err(Usage(text).into());
        }
        let source = ctx.store.resolve(&self.model)?;
        if same_place(&source, &self.output) {
            return Err(Usage(format!("--output: expected another folder than the model {}", source.display())).into());
        }
        self.calibration.check()?;
        self.recover.check(ctx)?;
        let files = ModelFiles::open(&source)?;
        let policy = match (&self.policy, format) {
            (Some(path), _) => read_value::<CompressionPolicy>(path)?,
            (None, Some(format)) if format.packed()?.quantized().is_none() => {
                self.recover.check_formats(&[format])?;
                let applied = self.export(ctx, &files, format.packed()?)?;
                return self.report(ctx, applied, None);
            }
            (None, Some(format)) => uniform_policy(files.config().n_layers, format).map_err(usage)?,
            (None, None) => return Err(Usage("expected --policy or --format".into()).into()),
        };
        if let Some(digest) = policy.model_digest.as_deref().filter(|digest| !digest.is_empty()) {
            let found = model_digest(&files)?;
            if found != digest {
                anyhow::bail!(
                    "the policy was made for a model with the digest {digest:.16}..., and {} has {found:.16}...; measure \
                     and plan for this model",
                    source.display()
                );
            }
        }
        let formats: Vec<_> = policy.units.iter().filter(|u| u.unit != Unit::Embedding).map(|u| u.format).collect();
        self.recover.check_formats(&formats)?;
        let compressor = self.compressor.compressor();
        let needs_base = compressor.needs_inputs() || self.recover.is_wanted();
        let base = needs_base.then(|| ctx.load_reference(&self.model)).transpose()?;
        let calibration = match &base {
            Some(base) if compressor.needs_inputs() => self.calibration.windows(ctx, base)?,
            _ => Vec::new(),
        };
        let text = base.as_ref().map(|base| self.recover.text(&self.calibration, base)).transpose()?.flatten();
        let arrangement = if self.prepare { Arrangement::Panels } else { Arrangement::Rows };
        let mut progress = ctx.progress("compress", 0, Counted::Items("tensors"));
        let applied = interrupt::stoppable(|| {
            let on_tensor = &mut |step: edgellm::luc::Progress<'_>| {
                progress.set_total(step.total as u64);
                progress.set_with(step.done as u64, step.what.to_string());
                interrupt::checkpoint();
            };
            let how = Compression {
                policy: &policy,
                compressor: compressor.as_ref(),
                calibration: &calibration,
                arrangement,
                force: self.force,
            };
            Ok(compress_model(&files, &how, &self.output, on_tensor)?)
        })?;
        progress.finish();
        let recovered = match (&base, &text) {
            (Some(base), Some(text)) => Some(text.recover(ctx, base, &self.output)?),
            _ => None,
        };
        self.report(ctx, applied, recovered)
    }

    /// Writes a plain directory in f32 or f16, which other programs read like any other.
    fn export(&self, ctx: &Context, files: &ModelFiles, format: Format) -> anyhow::Result<Applied> {
        let mut writer = ModelWriter::create(&self.output, files, None, |_, _| format)?;
        let layouts = writer.layouts().clone();
        let mut progress = ctx.progress("export", layouts.len() as u64, Counted::Items("tensors"));
        let (mut bytes, mut weights) = (0, 0);
        for (index, (name, layout)) in layouts.iter().enumerate() {
            stop_if_requested()?;
            let values = files.matrix(name)?.dequantize();
            writer.write(name, &PackedHost::quantize(&values, *layout)?)?;
            bytes += layout.bytes();
            weights += values.len() as u64;
            progress.set_with(index as u64 + 1, name.clone());
        }
        writer.finish(self.force)?;
        progress.finish();
        let bytes_after = ModelFiles::open(&self.output)?.file_bytes();
        let bits_per_weight = bits_per_weight(bytes, weights);
        Ok(Applied { bytes_before: files.file_bytes(), bytes_after, bits_per_weight })
    }

    fn report(&self, ctx: &Context, applied: Applied, recovered: Option<Recovered>) -> anyhow::Result<()> {
        let json = json!({
            "bytes_before": applied.bytes_before, "bytes_after": applied.bytes_after,
            "bits_per_weight": applied.bits_per_weight, "path": self.output,
            "recovery": recovered.map(|recovered| recovered.json()),
        });
        ctx.result(json, || {
            let (before, after) = (applied.bytes_before, applied.bytes_after);
            let ratio = before as f64 / after.max(1) as f64;
            let sizes = format!("{} became {}, {ratio:.2} times smaller", bytes(before), bytes(after));
            let recovered = recovered.map(|recovered| recovered.text()).unwrap_or_default();
            let bits = applied.bits_per_weight;
            format!("{sizes}, {bits:.3} bits per weight; wrote {}\n{recovered}", self.output.display())
        })
    }
}

/// Whether a folder is a model, or empty: all that may be replaced.
pub(super) fn is_model_dir(path: &std::path::Path) -> anyhow::Result<bool> {
    Ok(path.join("config.json").is_file() || std::fs::read_dir(path)?.next().is_none())
}

/// Whether both paths lead to the same place.
pub(super) fn same_place(a: &std::path::Path, b: &std::path::Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// A format that policies can name: what [`LayerFormat`] holds, by the kernels' names.
pub(super) fn parse_format(argument: &str, name: &str) -> anyhow::Result<LayerFormat> {
    let format = Format::parse(name).map_err(|e| Usage(format!("{argument}: {e}")))?;
    let layer = LayerFormat::of(format);
    let stored = layer.packed().map_err(usage)?;
    if stored != format {
        let text = if format.quantized().is_some_and(|q| q.is_sparse()) {
            format!("{argument}: {name} is not smaller than {stored}; expected a format that keeps fewer weights")
        } else {
            format!("{argument}: expected f32, f16 or a quantized format with f16 scales such as q4g32a, found {name}")
        };
        return Err(Usage(text).into());
    }
    Ok(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_those_of_policies() {
        for name in ["f32", "f16", "q4g32a", "q3g64s", "q8g128a"] {
            assert_eq!(parse_format("--format", name).unwrap().to_string(), name);
        }
        for (name, sparsity) in [("q4g32a-2:4", 0.5), ("q3g64s-4:8", 0.5), ("q4g32s-b50", 0.5), ("q8g32a-b30", 0.7)] {
            let format = parse_format("--format", name).unwrap();
            assert_eq!((format.packed().unwrap().name().as_str(), format.sparsity), (name, sparsity));
        }
        for bad in ["", "q7g32a", "q4g33a", "int4", "bf16", "q4g32a-f32", "q4g32s-1:4", "q4g32s-b75"] {
            assert!(parse_format("--format", bad).unwrap_err().is::<Usage>(), "{bad}");
        }
    }
}
