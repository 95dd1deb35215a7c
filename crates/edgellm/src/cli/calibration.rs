//! Calibration text: what compressors and measurements see of a model's inputs.

use std::path::{Path, PathBuf};

use clap::Args;
use edgellm::model::io::read_text;
use edgellm::session::LoadedModel;

use super::Context;
use super::data::DataArgs;
use super::failure::Usage;

/// Text to calibrate on where none is given: a part of this project's own fixture text.
pub(super) const BUILT_IN_TEXT: &str = include_str!("../../../../fixtures/text/calibration.txt");

/// The text that calibrates.
#[derive(Args)]
pub(crate) struct CalibrationArgs {
    /// Text to calibrate on, or examples (.jsonl, .csv) (default: a short built-in English text)
    #[arg(id = "calibrate", long = "calibrate", visible_alias = "text", value_name = "FILE")]
    file: Option<PathBuf>,
    /// Windows of the text
    #[arg(id = "calibrate-windows", long = "calibrate-windows", default_value_t = 64, value_name = "N")]
    windows: usize,
    /// Tokens of a window
    #[arg(id = "calibrate-context", long = "calibrate-context", default_value_t = 512, value_name = "N")]
    context: usize,
    /// Which windows of a longer text are taken: 0 for evenly spaced ones, else a seed
    #[arg(id = "calibrate-seed", long = "calibrate-seed", default_value_t = 0, value_name = "SEED")]
    seed: u64,
    #[command(flatten)]
    data: DataArgs,
}

impl CalibrationArgs {
    /// Checks what can be checked before a model is loaded.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.windows == 0 || self.context < 2 {
            let text = "--calibrate-windows: expected at least 1, --calibrate-context: at least 2";
            return Err(Usage(format!("{text}; found {} and {}", self.windows, self.context)).into());
        }
        self.data.check(self.file.iter().filter(|path| is_examples(path)))
    }

    /// Windows of token ids, all of one length.
    pub(super) fn windows(&self, ctx: &Context, model: &LoadedModel) -> anyhow::Result<Vec<Vec<u32>>> {
        let windows = self.up_to(model, self.windows)?;
        if windows.len() < self.windows {
            let (found, wanted, context) = (windows.len(), self.windows, windows[0].len());
            ctx.say(&format!(
                "note: the calibration text has {found} windows of {context} tokens, {wanted} were asked for"
            ));
        }
        Ok(windows)
    }

    /// As [`windows`](Self::windows), another number of them, or all that the text has; at least one.
    pub(super) fn up_to(&self, model: &LoadedModel, wanted: usize) -> anyhow::Result<Vec<Vec<u32>>> {
        let ids = match self.file.as_deref() {
            Some(path) if is_examples(path) => {
                let examples = self.data.read(model, path)?.examples;
                examples.into_iter().flat_map(|example| example.ids).collect()
            }
            Some(path) => model.tokenizer.encode(&read_text(path)?, false)?,
            None => model.tokenizer.encode(BUILT_IN_TEXT, false)?,
        };
        let context = self.context.min(model.decoder.config().max_position_embeddings).min(ids.len());
        if context < 2 {
            anyhow::bail!("calibration text: expected at least 2 tokens, found {}", ids.len());
        }
        let all: Vec<&[u32]> = ids.chunks_exact(context).collect();
        Ok(chosen(all.len(), wanted, self.seed).into_iter().map(|i| all[i].to_vec()).collect())
    }
}

/// Whether a file holds examples rather than plain text.
fn is_examples(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "jsonl" || e == "csv")
}

/// Up to `wanted` of `n` places, in order.
fn chosen(n: usize, wanted: usize, seed: u64) -> Vec<usize> {
    let wanted = wanted.min(n);
    if seed == 0 {
        return (0..wanted).map(|i| i * n / wanted).collect();
    }
    // SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014) keys, sorted.
    let key = |i: usize| {
        let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut places: Vec<usize> = (0..n).collect();
    places.sort_by_key(|&i| (key(i), i));
    places.truncate(wanted);
    places.sort_unstable();
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_spread_or_drawn() {
        assert_eq!(chosen(10, 5, 0), [0, 2, 4, 6, 8]);
        assert_eq!(chosen(3, 5, 0), [0, 1, 2]);
        let (a, b) = (chosen(100, 10, 1), chosen(100, 10, 2));
        assert!(a != b && a.len() == 10 && a.windows(2).all(|p| p[0] < p[1]));
        assert_eq!(chosen(100, 10, 1), a);
        assert_eq!(chosen(3, 3, 7), [0, 1, 2]);
    }
}
