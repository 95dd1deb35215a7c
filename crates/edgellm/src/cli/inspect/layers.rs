//! A compressed model layer by layer: where its policy came from, and its bits and sparsity as bars.

use std::path::Path;

use edgellm::eval::Layer;
use edgellm::eval::chart::{self, Bar};
use edgellm::model::files::ModelFiles;
use edgellm::model::values::{Budget, CompressionPolicy, LayerFormat, Projection, Unit};

use super::{Part, Parts, part_of};
use crate::cli::failure::Usage;
use crate::cli::output::bytes;

/// Characters of the longest bar.
const WIDTH: f64 = 32.0;

/// A budget in words.
pub(super) fn budget(budget: &Budget) -> String {
    let parts = [
        budget.bits_per_weight.map(|bits| format!("{bits} bits per weight")),
        budget.bytes.map(bytes),
        budget.milliseconds.map(|ms| format!("{ms} ms per token")),
        budget.peak_bytes.map(|peak| format!("{} of memory", bytes(peak))),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "none".into() } else { parts.join(" and ") }
}

/// What a policy was computed from, a line each; nothing for a policy without a measurement.
pub(super) fn origin(policy: &CompressionPolicy) -> String {
    let lines = [
        ("compressor", &policy.compressor),
        ("measurement", &policy.measurement_digest),
        ("model", &policy.model_digest),
    ];
    lines.iter().filter_map(|(what, value)| Some(format!("  {what:<11} {}\n", value.as_ref()?))).collect()
}

/// A bar of the terminal: full for what is kept, pale for what is pruned.
pub(super) fn bar(bits: f64, most: f64, sparsity: f64) -> String {
    let length = (WIDTH * bits / most.max(f64::MIN_POSITIVE)).round().clamp(0.0, WIDTH) as usize;
    let kept = (length as f64 * (1.0 - sparsity)).round() as usize;
    // Padded, since tables align such columns to the right.
    format!("{}{}{}", "█".repeat(kept), "░".repeat(length - kept), " ".repeat(WIDTH as usize - length))
}

/// The share of a matrix's weights that were pruned: as its policy says, else as its format does.
pub(super) fn sparsity_of(files: &ModelFiles, name: &str) -> anyhow::Result<f64> {
    let stored = LayerFormat::of(files.layout(name)?.format).sparsity;
    let policy = files.quantization().and_then(|q| q.policy.as_ref());
    let planned = policy.zip(unit_of(name)).and_then(|(policy, unit)| policy.format_of(unit));
    Ok(planned.map_or(stored, |format| format.sparsity))
}

/// The unit of a matrix by its name.
fn unit_of(name: &str) -> Option<Unit> {
    match name {
        "model.embed_tokens.weight" => return Some(Unit::Embedding),
        "lm_head.weight" => return Some(Unit::Head),
        _ => {}
    }
    let (block, _) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let block = block.parse().ok()?;
    Projection::ALL.into_iter().find(|p| p.weight_name(block) == name).map(|p| Unit::Linear(block, p))
}

/// The matrices of a model by block, and what is beside blocks.
fn parts(files: &ModelFiles) -> anyhow::Result<Parts> {
    let mut parts = Parts::new();
    for name in files.names() {
        let [rows, cols] = files.shape(name)?[..] else { continue };
        let layout = files.layout(name)?;
        let weights = (rows as u64).saturating_mul(cols as u64);
        let part = parts.entry(part_of(name)).or_default();
        part.add(weights, layout.bytes(), sparsity_of(files, name)?, layout.format.name());
    }
    Ok(parts)
}

/// A model's layers as reports show them.
pub(in crate::cli) fn units(files: &ModelFiles) -> anyhow::Result<Vec<Layer>> {
    let layer = |((_, unit), part): ((usize, String), Part)| Layer {
        name: unit,
        bits: Some(part.bits_per_weight()),
        sparsity: Some(part.sparsity()),
        bytes: Some(part.bytes),
        ..Layer::default()
    };
    Ok(parts(files)?.into_iter().map(layer).collect())
}

/// Draws a compressed model's layers.
pub(super) fn draw(files: &ModelFiles, path: &Path) -> anyhow::Result<()> {
    crate::cli::check_output_file(path)?;
    if files.quantization().is_none() {
        return Err(Usage(format!("--chart: expected a compressed model, found {}", files.path().display())).into());
    }
    let parts = parts(files)?;
    let bar = |((_, unit), part): (&(usize, String), &Part)| {
        Bar::bits(format!("{unit} {}", part.formats()), part.bits_per_weight(), part.sparsity())
    };
    let bars: Vec<Bar> = parts.iter().map(bar).collect();
    let policy = files.quantization().and_then(|q| q.policy.as_ref());
    let solver = policy.map_or(String::new(), |p| format!(", policy '{}', budget: {}", p.solver, budget(&p.budget)));
    let name = files.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    Ok(chart::write(path, &chart::bars(&format!("{name}{solver}"), chart::BITS, &bars)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_one_width_and_show_what_is_pruned() {
        assert_eq!(bar(8.0, 8.0, 0.0), "█".repeat(32));
        assert_eq!(bar(4.0, 8.0, 0.5), format!("{}{}{}", "█".repeat(8), "░".repeat(8), " ".repeat(16)));
        assert_eq!(bar(0.0, 0.0, 0.0), " ".repeat(32));
    }

    #[test]
    fn budgets_are_words() {
        let both = Budget { bits_per_weight: Some(3.5), milliseconds: Some(2.0), ..Budget::default() };
        assert_eq!(budget(&both), "3.5 bits per weight and 2 ms per token");
        assert_eq!(budget(&Budget::default()), "none");
    }
}
