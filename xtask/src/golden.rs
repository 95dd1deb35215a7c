//! `cargo xtask golden`: parity with Hugging Face transformers on SmolLM2-135M-Instruct. The golden values were made in
//! f32 from the same GGUF file; they lie beside the clone, not in it. Everything goes through the command, as a user's
//! work does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::edgellm::{Edgellm, SMOLLM2, arg, ids, number, text};
use crate::repo;

/// Checks token ids, logits, greedy text, chat templates and perplexity against ../shared/golden.
#[derive(Args)]
pub(crate) struct Golden {
    /// Where to run: flex, ndarray or wgpu (the latter two build the command with that feature).
    #[arg(long, default_value = "flex")]
    device: String,
    /// Only the prompts' logits, which is what a slow device can do.
    #[arg(long)]
    prompts_only: bool,
    /// Use this binary instead of building one.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

impl Golden {
    pub(crate) fn run(&self) -> Result<()> {
        let Some(folder) = folder()? else { bail!("no ../shared/golden beside the clone: nothing to compare with") };
        let features: &[&str] = if self.device == "flex" { &[] } else { &[&self.device] };
        let edgellm = match &self.binary {
            Some(binary) => Edgellm::at(repo::shell()?, binary.clone()),
            None => Edgellm::build(features)?,
        };
        let edgellm = edgellm.on(&self.device).quietly().in_f32();
        edgellm.pull(SMOLLM2)?;
        let parts = if self.prompts_only { Parts::Prompts } else { Parts::All };
        compare(&edgellm, &folder, tolerance(&self.device), parts).map(drop)
    }
}

/// The golden values' folder, where there is one.
pub(crate) fn folder() -> Result<Option<PathBuf>> {
    repo::shared("golden")
}

/// The largest difference of a logit that counts as the same, by device.
pub(crate) fn tolerance(device: &str) -> f64 {
    if device == "wgpu" { 1e-2 } else { 2e-3 }
}

/// What to compare.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parts {
    All,
    Prompts,
}

/// Runs the comparison, prints a table of the differences and returns one line that sums it up.
pub(crate) fn compare(edgellm: &Edgellm, folder: &Path, tolerance: f64, parts: Parts) -> Result<String> {
    let path = folder.join("smollm2.json");
    let golden: Value = serde_json::from_slice(&fs::read(&path)?).with_context(|| format!("{}", path.display()))?;
    let mut table = Table::default();
    let worst = prompts(edgellm, folder, &golden, tolerance, &mut table)?;
    let mut summary = format!("logits within {worst:.1e} (allowed {tolerance:.0e})");
    if parts == Parts::All {
        greedy(edgellm, &golden, &mut table)?;
        chats(edgellm, &golden, &mut table)?;
        let off = perplexity(edgellm, &golden, &mut table)?;
        summary.push_str(&format!(", perplexity within {:.3}%", off * 100.0));
        let off = multiple_choice(edgellm, &golden, &mut table)?;
        summary.push_str(&format!(", HellaSwag within {:.1} points", off * 100.0));
    }
    table.finish()?;
    Ok(summary)
}

/// Rows of what was compared; a row that is off makes the whole comparison fail at its end, after all were printed.
#[derive(Default)]
struct Table {
    rows: usize,
    off: Vec<String>,
}

impl Table {
    fn row(&mut self, what: &str, right: bool, detail: &str) {
        println!("  {:<4} {what:<24} {detail}", if right { "ok" } else { "OFF" });
        self.rows += 1;
        if !right {
            self.off.push(what.to_owned());
        }
    }

    fn finish(self) -> Result<()> {
        ensure!(self.rows > 0, "nothing was compared");
        ensure!(self.off.is_empty(), "not the golden values: {}", self.off.join(", "));
        Ok(())
    }
}

fn prompts(edgellm: &Edgellm, folder: &Path, golden: &Value, tolerance: f64, table: &mut Table) -> Result<f64> {
    let bytes = fs::read(folder.join("smollm2_logits.safetensors"))?;
    let expected = SafeTensors::deserialize(&bytes)?;
    let subset = ints(&expected, "vocab_subset")?;
    let scratch = repo::scratch("golden")?;
    let mut worst = 0.0_f64;
    for (name, prompt) in golden["prompts"].as_object().context("prompts")? {
        let (file, out) = (scratch.join("prompt.txt"), scratch.join("logits.safetensors"));
        fs::write(&file, text(prompt, "text")?)?;
        edgellm.json(["run", "-m", SMOLLM2, "--raw", "-f", arg(&file)?, "-n", "0", "--dump-logits", arg(&out)?])?;
        let bytes = fs::read(&out)?;
        let found = Logits::read(&bytes)?;
        let same_ids = found.token_ids == ids(prompt, "ids")?;
        table.row(&format!("{name}: token ids"), same_ids, &format!("{} tokens", found.token_ids.len()));
        if same_ids {
            let (diff, logsumexp, argmax) = found.differences(&expected, name, &subset)?;
            worst = worst.max(diff).max(logsumexp);
            table.row(&format!("{name}: logits"), diff <= tolerance, &format!("max difference {diff:.2e}"));
            table.row(
                &format!("{name}: logsumexp"),
                logsumexp <= tolerance,
                &format!("max difference {logsumexp:.2e}"),
            );
            table.row(&format!("{name}: argmax"), argmax == 0, &format!("{argmax} differ"));
        }
    }
    Ok(worst)
}

/// What `run --dump-logits` wrote: `token_ids` [T] and `logits` [T, V].
struct Logits {
    token_ids: Vec<i64>,
    logits: Vec<f32>,
    vocabulary: usize,
}

impl Logits {
    fn read(bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes)?;
        let shape = file.tensor("logits")?.shape().to_vec();
        let token_ids = ints(&file, "token_ids")?;
        let [rows, vocabulary] = shape[..] else { bail!("logits have shape {shape:?}, expected [T, V]") };
        ensure!(rows == token_ids.len(), "{rows} rows of logits for {} tokens", token_ids.len());
        Ok(Self { token_ids, logits: floats(&file, "logits")?, vocabulary })
    }

    /// Largest differences of the logits in the columns `subset` and of the logsumexp, and how many argmaxes differ.
    fn differences(&self, expected: &SafeTensors<'_>, name: &str, subset: &[i64]) -> Result<(f64, f64, usize)> {
        let golden = floats(expected, &format!("{name}.logits_subset"))?;
        let golden_sums = floats(expected, &format!("{name}.logsumexp"))?;
        let golden_best = ints(expected, &format!("{name}.argmax"))?;
        let (mut diff, mut sums, mut best) = (0.0_f64, 0.0_f64, 0);
        for (t, row) in self.logits.chunks_exact(self.vocabulary).enumerate() {
            for (golden, &column) in golden[t * subset.len()..].iter().zip(subset) {
                diff = larger(diff, f64::from(row[column as usize]) - f64::from(*golden));
            }
            sums = larger(sums, logsumexp(row) - f64::from(golden_sums[t]));
            best += usize::from(argmax(row) as i64 != golden_best[t]);
        }
        Ok((diff, sums, best))
    }
}

/// The larger magnitude; not-a-number counts as infinitely large, so that it cannot pass.
fn larger(so_far: f64, difference: f64) -> f64 {
    if difference.is_nan() { f64::INFINITY } else { so_far.max(difference.abs()) }
}

fn logsumexp(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
    f64::from(max) + sum.ln()
}

fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, &x)| if x > row[best] { i } else { best })
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Result<Vec<f32>> {
    let tensor = file.tensor(name)?;
    ensure!(tensor.dtype() == Dtype::F32, "{name} is {:?}, expected F32", tensor.dtype());
    Ok(tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

fn ints(file: &SafeTensors<'_>, name: &str) -> Result<Vec<i64>> {
    let tensor = file.tensor(name)?;
    ensure!(tensor.dtype() == Dtype::I32, "{name} is {:?}, expected I32", tensor.dtype());
    Ok(tensor.data().as_chunks().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect())
}

fn greedy(edgellm: &Edgellm, golden: &Value, table: &mut Table) -> Result<()> {
    let file = repo::scratch("golden")?.join("prompt.txt");
    for (i, (prompt, expected)) in golden["greedy"].as_object().context("greedy")?.iter().enumerate() {
        fs::write(&file, prompt)?;
        let run = edgellm.json([
            "run",
            "-m",
            SMOLLM2,
            "--raw",
            "-f",
            arg(&file)?,
            "--temp",
            "0",
            "-n",
            "64",
            "--kv-cache=f32",
        ])?;
        let (found, expected) = (ids(&run, "token_ids")?, ids(expected, "ids")?);
        let same = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
        table.row(&format!("greedy {i}"), found == expected, &format!("{same} of {} tokens the same", expected.len()));
    }
    Ok(())
}

fn chats(edgellm: &Edgellm, golden: &Value, table: &mut Table) -> Result<()> {
    let file = repo::scratch("golden")?.join("messages.json");
    for (i, chat) in golden["chats"].as_array().context("chats")?.iter().enumerate() {
        fs::write(&file, chat["messages"].to_string())?;
        let run = edgellm.json(["run", "-m", SMOLLM2, "--messages", arg(&file)?, "--render-only"])?;
        table.row(&format!("chat {i}: text"), run["text"] == chat["text"], "");
        table.row(&format!("chat {i}: token ids"), ids(&run, "token_ids")? == ids(chat, "ids")?, "");
    }
    Ok(())
}

/// Relative difference of the perplexity (over all targets, and over the second half of each window).
fn perplexity(edgellm: &Edgellm, golden: &Value, table: &mut Table) -> Result<f64> {
    let golden = &golden["perplexity"];
    let data = repo::shared("data")?.context("no ../shared/data")?.join(text(golden, "text")?);
    let (window, windows) = (golden["window"].to_string(), golden["windows"].to_string());
    let eval =
        edgellm.json(["eval", "-m", SMOLLM2, "--text", arg(&data)?, "--context", &window, "--windows", &windows])?;
    let mut worst = 0.0_f64;
    for (key, golden_key) in
        [("perplexity", "all_targets"), ("second_half_perplexity", "second_half_targets_256_to_510")]
    {
        let (found, expected) = (number(&eval, key)?, number(golden, golden_key)?);
        let off = larger(0.0, found / expected - 1.0);
        worst = worst.max(off);
        table.row(key, off <= 2e-3, &format!("{found:.4}, golden {expected:.4} ({:.4}% off)", off * 100.0));
    }
    Ok(worst)
}

/// Difference of the accuracies on HellaSwag's first questions, summed and per character; a point is allowed.
fn multiple_choice(edgellm: &Edgellm, golden: &Value, table: &mut Table) -> Result<f64> {
    let golden = &golden["hellaswag_200"];
    let questions = repo::shared("data")?.context("no ../shared/data")?.join("hellaswag_val_1000.jsonl");
    let eval = edgellm.json(["eval", "-m", SMOLLM2, "--multiple-choice", arg(&questions)?, "--limit", "200"])?;
    let found = &eval["multiple_choice"]["votes"]["last"];
    let mut worst = 0.0_f64;
    for (key, golden_key) in [("acc", "accuracy_sum"), ("acc_norm", "accuracy_per_character")] {
        let (found, expected) = (number(found, key)?, number(golden, golden_key)?);
        let off = larger(0.0, found - expected);
        worst = worst.max(off);
        // 0.01 and what the difference of two decimal fractions is rounded by.
        table.row(&format!("HellaSwag {key}"), off <= 0.01 + 1e-9, &format!("{found:.4}, golden {expected:.4}"));
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logsumexp_and_argmax_of_a_row() {
        assert!((logsumexp(&[0.0, 0.0]) - 2.0_f64.ln()).abs() < 1e-12);
        assert!((logsumexp(&[1000.0, 1000.0]) - (1000.0 + 2.0_f64.ln())).abs() < 1e-9);
        assert_eq!(argmax(&[0.0, 3.0, 3.0, -1.0]), 1);
    }

    #[test]
    fn not_a_number_is_never_within_a_tolerance() {
        assert_eq!(larger(0.5, f64::NAN), f64::INFINITY);
        assert_eq!(larger(0.5, -2.0), 2.0);
    }
}
