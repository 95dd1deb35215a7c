//! `edgellm merge`: writes a model with an adapter merged into it, and says what that costs.

use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::eval::{Divergence, adapted_kl_divergence, heldout_loss};
use edgellm::kernels::Format;
use edgellm::luc::{Aim, InputMoments, MergeOptions, Merged, merge_adapter};
use edgellm::model::adapter::Adapter;
use edgellm::model::data::Example;
use edgellm::model::decoder::Activations;
use edgellm::model::files::ModelFiles;
use edgellm::model::io::read_text;
use edgellm::model::values::LayerFormat;
use edgellm::session::{LoadedModel, load_model};
use serde_json::{Value, json};

use super::calibration::BUILT_IN_TEXT;
use super::compress::{is_model_dir, parse_format, same_place};
use super::data::DataArgs;
use super::eval::with_progress;
use super::failure::Usage;
use super::output::bytes;
use super::progress::Counted;
use super::{Context, check_output_dir, interrupt};

/// Tokens whose activations are looked at, and how many of them see each other.
const CALIBRATION_TOKENS: usize = 2048;
const CALIBRATION_WINDOW: usize = 256;

/// Merge an adapter into its base model
///
/// The merged model is compared with the base and the adapter beside it, with activations in f32: KL divergence per
/// token, on --data or a short built-in text.
#[derive(Args)]
pub(crate) struct Merge {
    /// The base model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The adapter, as `edgellm adapt` or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The model directory to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// The format of the result: keep (each matrix in its own), f32 (exact), f16, or a format such as q4g32a
    #[arg(long, default_value = "keep", value_name = "FORMAT")]
    format: String,
    /// Text, or examples (.jsonl), whose activations say which rounding errors matter (default: a built-in English text)
    #[arg(long, value_name = "FILE", conflicts_with = "update_weight")]
    calibrate: Option<PathBuf>,
    /// Do not look at activations: errors that drop the update weigh this much more than others; 0 for plain rounding
    #[arg(long, allow_negative_numbers = true, value_name = "C")]
    update_weight: Option<f32>,
    /// Replace the model if it is there
    #[arg(long)]
    force: bool,
    /// What to compare on: a text, or examples (a name that ends in .jsonl), of which the loss is reported too
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    #[command(flatten)]
    examples: DataArgs,
    /// Tokens of a window of the comparison
    #[arg(long, default_value_t = 256, value_name = "N")]
    context: usize,
    /// Windows of the comparison at most; 0 compares nothing
    #[arg(long, default_value_t = 8, value_name = "N")]
    windows: usize,
}

/// What the comparison of the merged model gave.
struct Comparison {
    /// Of the merged model from the base with the adapter.
    merged: Divergence,
    /// Of the base alone from the base with the adapter: what would be lost without any merging.
    base: Divergence,
    /// Losses of the base, of the base with the adapter, and of the merged model.
    losses: Option<[f64; 3]>,
}

impl Merge {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let format = self.check()?;
        let source = ctx.store.resolve(&self.model)?;
        if same_place(&source, &self.output) {
            return Err(Usage(format!("--output: expected another folder than the model {}", source.display())).into());
        }
        let load_options = ctx.device.load_options(Activations::F32)?;
        let files = ModelFiles::open(&source)?;
        let adapter = Adapter::load(&self.adapter, files.config(), &load_options.device)?;
        let inputs = match (self.update_weight, format.is_none_or(|format| format.bit_width < 16)) {
            (None, true) => Some(self.inputs(ctx, &load_model(&source, &load_options)?, &adapter)?),
            _ => None,
        };
        let aim = inputs.as_ref().map_or(Aim::Constant(self.update_weight.unwrap_or(0.0)), Aim::Inputs);
        let options = MergeOptions { format, aim };
        let mut progress = ctx.progress("merge", 0, Counted::Items("tensors"));
        let merged = interrupt::stoppable(|| {
            let on_tensor = &mut |step: edgellm::luc::Progress<'_>| {
                progress.set_total(step.total as u64);
                progress.set_with(step.done as u64, step.what.to_string());
                interrupt::checkpoint();
            };
            Ok(merge_adapter(&files, &adapter, &options, &self.output, self.force, on_tensor)?)
        })?;
        progress.finish();
        drop(files);
        let comparison = if self.windows == 0 {
            None
        } else {
            let (base, result) = (load_model(&source, &load_options)?, load_model(&self.output, &load_options)?);
            Some(self.compare(ctx, &base, &adapter, &result)?)
        };
        self.report(ctx, &adapter, &merged, comparison.as_ref())
    }

    /// What can be checked before a model is opened.
    fn check(&self) -> anyhow::Result<Option<LayerFormat>> {
        self.examples.check(self.data.iter().filter(|path| is_jsonl(path)))?;
        let format = if self.format == "keep" { None } else { Some(parse_merged_format(&self.format)?) };
        if let Some(weight) = self.update_weight.filter(|weight| !weight.is_finite() || *weight < 0.0) {
            let text = format!("--update-weight: expected at least 0, found {weight}");
            return Err(Usage(text).into());
        }
        if self.context < 3 {
            return Err(Usage(format!("--context: expected at least 3, found {}", self.context)).into());
        }
        check_output_dir(&self.output, self.force)?;
        if self.output.is_dir() && !is_model_dir(&self.output)? {
            let text = format!("{}: --force replaces a model only, and this folder is none", self.output.display());
            return Err(Usage(text).into());
        }
        for (flag, path) in [("--data", &self.data), ("--calibrate", &self.calibrate)] {
            if let Some(path) = path.as_deref().filter(|path| !path.is_file()) {
                return Err(Usage(format!("{flag}: expected a file, found none at {}", path.display())).into());
            }
        }
        Ok(format)
    }

    /// The activations that calibration gives: of the last tokens of its text, so that the built-in one serves for the
    /// comparison too.
    fn inputs(&self, ctx: &Context, base: &LoadedModel, adapter: &Adapter) -> anyhow::Result<InputMoments> {
        let ids = match self.calibrate.as_deref() {
            Some(path) if is_jsonl(path) => all_ids(&self.examples.read(base, path)?.examples),
            Some(path) => base.tokenizer.encode(&read_text(path)?, false)?,
            None => base.tokenizer.encode(BUILT_IN_TEXT, false)?,
        };
        let context = CALIBRATION_WINDOW.min(base.decoder.config().max_position_embeddings);
        let first = ids.len().saturating_sub(CALIBRATION_TOKENS);
        let windows: Vec<Vec<u32>> = ids[first..].chunks(context).map(<[u32]>::to_vec).collect();
        let mut progress = ctx.progress("activations", 0, Counted::Items("blocks"));
        let inputs = interrupt::stoppable(|| {
            let on_block = &mut |step: edgellm::luc::Progress<'_>| {
                progress.set_total(step.total as u64);
                progress.set(step.done as u64);
                interrupt::checkpoint();
            };
            Ok(InputMoments::measure(&base.decoder, adapter, &windows, on_block)?)
        })?;
        progress.finish();
        Ok(inputs)
    }

    fn compare(
        &self,
        ctx: &Context,
        base: &LoadedModel,
        adapter: &Adapter,
        result: &LoadedModel,
    ) -> anyhow::Result<Comparison> {
        let examples = match self.data.as_deref().filter(|path| is_jsonl(path)) {
            Some(path) => Some(self.examples.read(base, path)?.examples),
            None => None,
        };
        let ids = match (&examples, &self.data) {
            (Some(examples), _) => all_ids(examples),
            (None, Some(path)) => base.tokenizer.encode(&read_text(path)?, false)?,
            (None, None) => base.tokenizer.encode(BUILT_IN_TEXT, false)?,
        };
        let context = self.context.min(base.decoder.config().max_position_embeddings).min(ids.len());
        let both = (&base.decoder, Some(adapter));
        let kl = |what: &str, other| {
            with_progress(ctx, what, |on_step| {
                Ok(adapted_kl_divergence(both, (other, None), &ids, context, Some(self.windows), on_step)?)
            })
        };
        let (merged, alone) = (kl("KL of merging", &result.decoder)?, kl("KL of the base", &base.decoder)?);
        let losses = match &examples {
            Some(examples) => Some([
                last_loss(ctx, &base.decoder, None, examples)?,
                last_loss(ctx, &base.decoder, Some(adapter), examples)?,
                last_loss(ctx, &result.decoder, None, examples)?,
            ]),
            None => None,
        };
        Ok(Comparison { merged, base: alone, losses })
    }

    fn report(
        &self,
        ctx: &Context,
        adapter: &Adapter,
        merged: &Merged,
        comparison: Option<&Comparison>,
    ) -> anyhow::Result<()> {
        let matrices: Vec<Value> = merged
            .matrices
            .iter()
            .map(|m| {
                json!({
                    "tensor": m.tensor, "format": m.format, "update": m.update, "survived": m.survived,
                    "residual": m.residual,
                })
            })
            .collect();
        let losses = comparison.and_then(|c| c.losses);
        let json = json!({
            "path": self.output, "bytes_before": merged.applied.bytes_before,
            "bytes_after": merged.applied.bytes_after, "bits_per_weight": merged.applied.bits_per_weight,
            "survived": merged.survived, "residual": merged.residual, "matrices": matrices,
            "exits": adapter.exits(),
            "kl": comparison.map(|c| c.merged.kl),
            "top1_agreement": comparison.map(|c| c.merged.top1_agreement),
            "base_kl": comparison.map(|c| c.base.kl),
            "tokens": comparison.map(|c| c.merged.tokens),
            "heldout_base": losses.map(|l| l[0]), "heldout_adapter": losses.map(|l| l[1]),
            "heldout_merged": losses.map(|l| l[2]),
        });
        ctx.result(json, || self.text(adapter, merged, comparison))
    }

    fn text(&self, adapter: &Adapter, merged: &Merged, comparison: Option<&Comparison>) -> String {
        let mut text = format!(
            "{} matrices changed: {:.2}% of the update is in the result, with {:.2} times its size of rounding\n",
            merged.matrices.len(),
            merged.survived * 100.0,
            merged.residual
        );
        if let Some(Comparison { merged, base, losses }) = comparison {
            text.push_str(&format!(
                "KL from the adapter beside the base: {:.5} nats a token over {} tokens, {:.2}% the same likeliest token \
                 (the base without it: {:.5})\n",
                merged.kl,
                merged.tokens,
                merged.top1_agreement * 100.0,
                base.kl
            ));
            if merged.kl >= base.kl {
                text.push_str(
                    "note: rounding loses more than the update brings: keep the adapter beside the base, or merge with \
                     --format f16\n",
                );
            }
            if let Some([base, adapter, merged]) = losses {
                text.push_str(&format!("loss: base {base:.4}, with the adapter {adapter:.4}, merged {merged:.4}\n"));
            }
        }
        if !adapter.exits().is_empty() {
            text.push_str(&format!("the norms of the exits after {:?} blocks lie beside the model\n", adapter.exits()));
        }
        let size = bytes(merged.applied.bytes_after);
        text.push_str(&format!(
            "{size}, {:.3} bits per weight; wrote {}\n",
            merged.applied.bits_per_weight,
            self.output.display()
        ));
        text
    }
}

/// Loss of the last exit.
fn last_loss(
    ctx: &Context,
    decoder: &edgellm::model::decoder::Decoder,
    adapter: Option<&Adapter>,
    examples: &[Example],
) -> anyhow::Result<f64> {
    let exits = [decoder.n_blocks()];
    let loss = with_progress(ctx, "held-out loss", |on_step| {
        Ok(heldout_loss(decoder, adapter, &exits, &[], examples, on_step)?)
    })?;
    Ok(loss.by_exit.first().map_or(f64::NAN, |exit| exit.loss))
}

fn all_ids(examples: &[Example]) -> Vec<u32> {
    examples.iter().flat_map(|example| example.ids.iter().copied()).collect()
}

fn is_jsonl(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl"))
}

/// A format of `--format`, other than `keep`. Pruning drops weights that the adapter counts on, so it is not for merging.
fn parse_merged_format(name: &str) -> anyhow::Result<LayerFormat> {
    if Format::parse(name).is_ok_and(|f| f.quantized().is_some_and(|q| q.is_sparse())) {
        let text =
            format!("--format: expected keep, f32, f16 or a dense format, found {name}; merge first, then compress");
        return Err(Usage(text).into());
    }
    parse_format("--format", name)
}
