//! `edgellm compress --recover`: tunes a compressed model's scales and norms toward the model that it was made from.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use clap::Args;
use edgellm::device::DeviceChoice;
use edgellm::kernels::{Arrangement, PackedHost, PackedLayout, TrainableMatrix};
use edgellm::model::decoder::{Activations, Weight};
use edgellm::model::files::ModelFiles;
use edgellm::model::generate::to_vec;
use edgellm::model::save::ModelWriter;
use edgellm::model::values::{LayerFormat, Projection};
use edgellm::session::LoadedModel;
use edgellm::tune::recover::{RecoverConfig, Recovery};
use serde_json::{Value, json};

use super::calibration::CalibrationArgs;
use super::failure::Usage;
use super::memory::Room;
use super::progress::Counted;
use super::{Context, interrupt};

/// Windows that are kept apart, to tell what was recovered.
const HELD_OUT: usize = 8;

/// How much is tuned after compression.
#[derive(Args)]
pub(crate) struct RecoverArgs {
    /// Afterwards, tune scales and norms for so many steps toward the model's own answers on the calibration text; the size
    /// stays
    #[arg(long = "recover", value_name = "STEPS")]
    steps: Option<u64>,
    /// Windows of the calibration text in a step
    #[arg(long = "recover-batch", default_value_t = 4, value_name = "N", requires = "steps")]
    batch: usize,
}

/// What tuning recovered.
#[derive(Clone, Copy)]
pub(super) struct Recovered {
    /// Mean divergence from the base on windows that were not trained on, in nats.
    pub(super) before: f64,
    pub(super) after: f64,
    pub(super) steps: u64,
    pub(super) seconds: f64,
}

impl Recovered {
    /// Whether the tuned weights were written.
    pub(super) fn is_better(&self) -> bool {
        self.after < self.before
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "steps": self.steps, "divergence_before": self.before, "divergence_after": self.after,
            "seconds": self.seconds, "kept": self.is_better(),
        })
    }

    pub(super) fn text(&self) -> String {
        let Self { before, after, steps, seconds } = self;
        let share = 100.0 * (1.0 - after / before);
        let what =
            format!("{steps} steps in {seconds:.0} s, KL on {HELD_OUT} windows kept apart {before:.4} to {after:.4}");
        if self.is_better() {
            format!("recovered {share:.0}%: {what}\n")
        } else {
            format!("recovered nothing, and the model is as it was compressed: {what}\n")
        }
    }
}

impl RecoverArgs {
    /// Refuses, before anything is compressed, settings and a device that it does not work with.
    pub(super) fn check(&self, ctx: &Context) -> anyhow::Result<()> {
        if self.steps == Some(0) || self.batch == 0 {
            return Err(Usage("--recover, --recover-batch: expected at least 1, found 0".into()).into());
        }
        if self.is_wanted() && !matches!(ctx.device, DeviceChoice::Auto | DeviceChoice::Flex) {
            let text = format!("--recover tunes on the CPU: expected --device flex, found {}", ctx.device);
            return Err(Usage(text).into());
        }
        Ok(())
    }

    /// Refuses formats of blocks among which none has scales that can be tuned.
    pub(super) fn check_formats(&self, formats: &[LayerFormat]) -> anyhow::Result<()> {
        let packed: Vec<_> = formats.iter().map(LayerFormat::packed).collect::<Result<_, _>>()?;
        if self.is_wanted() && !packed.into_iter().any(TrainableMatrix::exists) {
            let found: BTreeSet<_> = formats.iter().map(ToString::to_string).collect();
            let found = found.into_iter().collect::<Vec<_>>().join(", ");
            let text = format!("--recover tunes scales: expected a quantized format without sparsity, found {found}");
            return Err(Usage(text).into());
        }
        Ok(())
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.steps.is_some()
    }

    /// The text to tune on, if that is asked for.
    pub(super) fn text(&self, calibration: &CalibrationArgs, base: &LoadedModel) -> anyhow::Result<Option<Text>> {
        let Some(steps) = self.steps else { return Ok(None) };
        if !base.decoder.runs_on_slices(0..base.decoder.n_blocks())? {
            anyhow::bail!(
                "--recover: expected a base whose weights run packed or in floats on the CPU, found one with weights of \
                 another kind or a bias on its head; compress without --recover"
            );
        }
        let wanted = usize::try_from(steps)?.saturating_mul(self.batch).saturating_add(HELD_OUT);
        let windows = calibration.up_to(base, wanted.max(2 * HELD_OUT))?;
        if windows.len() < 2 * HELD_OUT {
            anyhow::bail!(
                "--recover: expected calibration text of at least {} windows, found {} of {} tokens; give a longer text with \
                 --calibrate, or a smaller --calibrate-context",
                2 * HELD_OUT,
                windows.len(),
                windows[0].len()
            );
        }
        Ok(Some(Text { windows, steps, batch: self.batch }))
    }
}

/// What is tuned on, and for how long.
pub(super) struct Text {
    windows: Vec<Vec<u32>>,
    steps: u64,
    batch: usize,
}

impl Text {
    /// Tunes the compressed model in `dir`, and writes it again if it came closer to the base.
    pub(super) fn recover(&self, ctx: &Context, base: &LoadedModel, dir: &Path) -> anyhow::Result<Recovered> {
        let start = std::time::Instant::now();
        let Self { windows, steps, batch } = self;
        let (steps, batch) = (*steps, *batch);
        // Spread over the text, like the windows that are trained on.
        let every = windows.len() / HELD_OUT;
        let is_held_out = |i: usize| i % every == every / 2 && i / every < HELD_OUT;
        let pick = |held_out: bool| -> Vec<&[u32]> {
            let all = windows.iter().enumerate();
            all.filter(|(i, _)| is_held_out(*i) == held_out).map(|(_, window)| window.as_slice()).collect()
        };
        let (held_out, text) = (pick(true), pick(false));
        let files = ModelFiles::open(dir)?;
        let decoder = ctx.load_with(&dir.to_string_lossy(), Activations::Int8, Room::PASSES)?.decoder;
        let config = RecoverConfig { steps, batch, ..RecoverConfig::default() };
        let mut recovery = Recovery::new(&base.decoder, decoder, config)?;
        let before = recovery.divergence(&held_out)?;
        let mut progress = ctx.progress("recover", steps, Counted::Items("steps"));
        interrupt::stoppable(|| {
            for step in 0..steps {
                // Windows that lie apart, each of them as often as any other.
                let window = |i: usize| text[(step as usize + i * text.len() / batch) % text.len()];
                let report = recovery.step(&(0..batch).map(window).collect::<Vec<_>>())?;
                progress.set_with(step + 1, format!("KL {:.4}", report.divergence));
                tracing::info!(step, kl = report.divergence, seconds = report.seconds, "recover");
                interrupt::checkpoint();
            }
            Ok(())
        })?;
        progress.finish();
        let after = recovery.divergence(&held_out)?;
        let recovered = Recovered { before, after, steps, seconds: start.elapsed().as_secs_f64() };
        if recovered.is_better() {
            write(&files, &recovery, dir)?;
        }
        Ok(recovered)
    }
}

/// Replaces the model in `dir` by the same one with the tuned matrices.
fn write(files: &ModelFiles, recovery: &Recovery<'_>, dir: &Path) -> anyhow::Result<()> {
    let policy = files.quantization().and_then(|q| q.policy.clone());
    let mut norms =
        BTreeMap::from([("model.norm.weight".to_owned(), to_vec(recovery.decoder().final_norm().clone())?)]);
    for index in 0..recovery.decoder().n_blocks() {
        let block = recovery.decoder().store().block(index)?;
        for (name, norm) in [("input_layernorm", block.attn_norm), ("post_attention_layernorm", block.mlp_norm)] {
            norms.insert(format!("model.layers.{index}.{name}.weight"), to_vec(norm)?);
        }
    }
    let mut vector = |name: &str, values| norms.remove(name).unwrap_or(values);
    let mut writer = ModelWriter::create_with_vectors(dir, files, policy, &mut |_, layout| Ok(layout), &mut vector)?;
    let mut rest = writer.layouts().clone();
    let store = recovery.decoder().store();
    for index in 0..recovery.decoder().n_blocks() {
        let block = store.block(index)?;
        for projection in Projection::ALL {
            let name = projection.weight_name(index);
            let (Some(layout), Weight::Packed(matrix)) = (rest.get(&name), &block.linear(projection).weight) else {
                continue;
            };
            let matrix = matrix.to_host()?;
            let matrix = arranged(matrix, *layout)?;
            writer.write(&name, &matrix)?;
            rest.remove(&name);
        }
    }
    for (name, layout) in rest {
        writer.write(&name, &arranged(files.matrix(&name)?, layout)?)?;
    }
    Ok(writer.finish(true)?)
}

/// The matrix in the arrangement of the files.
fn arranged(matrix: PackedHost, layout: PackedLayout) -> anyhow::Result<PackedHost> {
    Ok(if layout.arrangement == Arrangement::Panels { matrix.prepare()? } else { matrix.unprepare()? })
}
