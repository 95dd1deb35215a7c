//! Checks against other programs' reading of our files, and of theirs: GGUF against the `gguf` package, adapters against
//! a plain numpy decoder, and against Python's `peft`. The scripts lie in xtask/py/; they know nothing of our code.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use xshell::cmd;

use crate::edgellm::{Edgellm, SMOLLM2, arg, number};
use crate::{python, repo};

/// Compares every GGUF type's dequantized values with the `gguf` package's.
#[derive(Args)]
pub(crate) struct CheckGguf {
    /// Also compare this file, tensor by tensor.
    file: Option<PathBuf>,
}

impl CheckGguf {
    pub(crate) fn run(&self) -> Result<()> {
        let edgellm = Edgellm::build(&[])?.quietly();
        println!("{}", gguf_types(&edgellm)?);
        if let Some(file) = &self.file {
            println!("{}", gguf_file(&edgellm, file)?);
        }
        Ok(())
    }
}

/// Checks an adapter that `edgellm adapt` wrote with numpy: names, shapes, orientation, and the logits that follow.
#[derive(Args)]
pub(crate) struct CheckAdapter {}

impl CheckAdapter {
    pub(crate) fn run(&self) -> Result<()> {
        println!("{}", adapter(&Edgellm::build(&[])?.quietly())?);
        Ok(())
    }
}

/// Loads an adapter with Python's `peft` on the transformers model (makes an environment of several gigabytes).
#[derive(Args)]
pub(crate) struct CheckPeft {
    /// Optimizer steps of the adapter to be checked.
    #[arg(long, default_value_t = 4)]
    steps: usize,
}

impl CheckPeft {
    pub(crate) fn run(&self) -> Result<()> {
        let edgellm = Edgellm::build(&[])?.quietly();
        edgellm.pull(SMOLLM2)?;
        let folder = repo::scratch("peft")?;
        let tuned = tune(&edgellm, SMOLLM2, &folder, self.steps)?;
        let (python, script) = (python::interpreter(python::PEFT)?, python::script("check_peft.py")?);
        let Tuned { model, adapter, prompt, logits } = tuned;
        let shell = repo::shell()?;
        cmd!(shell, "{python} {script} {model} {adapter} {prompt} {logits}").quiet().run()?;
        Ok(())
    }
}

/// Converts an adapter of ours with llama.cpp's `convert_lora_to_gguf.py` and compares the tensors with ours.
#[derive(Args)]
pub(crate) struct CheckLoraGguf {
    /// A checkout of llama.cpp.
    #[arg(long, value_name = "DIR")]
    llama_cpp: PathBuf,
}

impl CheckLoraGguf {
    pub(crate) fn run(&self) -> Result<()> {
        let converter = self.llama_cpp.join("convert_lora_to_gguf.py");
        ensure!(converter.is_file(), "{}: expected llama.cpp's converter, found no file", converter.display());
        let folder = repo::scratch("lora-gguf")?;
        let base = repo::root()?.join("fixtures/model");
        let Tuned { model, adapter, .. } = tune(&Edgellm::build(&[])?.quietly(), arg(&base)?, &folder, 8)?;
        let out = folder.join("adapter.gguf");
        let (python, script) = (python::interpreter(python::CONVERT)?, python::script("check_lora_gguf.py")?);
        let shell = repo::shell()?;
        // Its own gguf package is beside it; nothing is written there.
        cmd!(shell, "{python} -B {converter} --base {model} --outfile {out} {adapter}").quiet().run()?;
        println!("{}", cmd!(shell, "{python} {script} {adapter} {out}").quiet().read()?);
        Ok(())
    }
}

/// Makes a GGUF file with one block of each type that we read, and compares our reading with the package's.
pub(crate) fn gguf_types(edgellm: &Edgellm) -> Result<String> {
    let folder = repo::scratch("gguf")?;
    let file = folder.join("types.gguf");
    let (python, script) = (python::interpreter(python::LIGHT)?, python::script("make_gguf.py")?);
    let tokenizer = repo::root()?.join("fixtures/model/tokenizer.json");
    let shell = repo::shell()?;
    cmd!(shell, "{python} {script} {tokenizer} {file}").quiet().run()?;
    gguf_file(edgellm, &file)
}

/// Compares the values of every tensor of a GGUF file, exported to f32 by us, with the package's.
pub(crate) fn gguf_file(edgellm: &Edgellm, file: &Path) -> Result<String> {
    let exported = repo::scratch("gguf")?.join("exported");
    edgellm.json(["compress", "-m", arg(file)?, "--format", "f32", "-o", arg(&exported)?, "--force"])?;
    let (python, script) = (python::interpreter(python::LIGHT)?, python::script("check_gguf.py")?);
    let shell = repo::shell()?;
    Ok(cmd!(shell, "{python} {script} {file} {exported}").quiet().read()?)
}

/// Tunes an adapter on the fixture and checks it against a decoder written in numpy.
pub(crate) fn adapter(edgellm: &Edgellm) -> Result<String> {
    let folder = repo::scratch("adapter")?;
    let base = repo::root()?.join("fixtures/model");
    let Tuned { model, adapter, logits, .. } = tune(edgellm, arg(&base)?, &folder, 8)?;
    let (python, script) = (python::interpreter(python::LIGHT)?, python::script("check_adapter.py")?);
    let shell = repo::shell()?;
    Ok(cmd!(shell, "{python} {script} {model} {adapter} {logits}").quiet().read()?)
}

/// Memory that loading and generating may take above the size of the weights.
const MEMORY_ABOVE_FILE: f64 = 150e6;

/// Loads and generates from the memory-mapped GGUF and from a compressed directory; peak memory stays near the file's size.
pub(crate) fn memory(edgellm: &Edgellm) -> Result<String> {
    let folder = repo::scratch("memory")?.join("q4g32a");
    let compress =
        ["compress", "-m", SMOLLM2, "--format", "q4g32a", "--compressor", "rtn", "-o", arg(&folder)?, "--force"];
    let compressed = edgellm.json(compress)?;
    let mut lines = Vec::new();
    for (name, model, size) in [
        ("GGUF", SMOLLM2, number(&compressed, "bytes_before")?),
        ("q4g32a", arg(&folder)?, number(&compressed, "bytes_after")?),
    ] {
        let run = edgellm.json(["run", "-m", model, "--raw", "-p", "Once upon a time", "-n", "32", "--temp", "0"])?;
        let Some(peak) = run["peak_rss_bytes"].as_f64() else { return Ok("no peak memory on this system".to_owned()) };
        ensure!(peak <= size + MEMORY_ABOVE_FILE, "{name}: peak {peak} bytes for a file of {size} bytes");
        lines.push(format!("{name} {:.0} MB of {:.0} MB weights", peak / 1e6, size / 1e6));
    }
    Ok(format!("peak memory: {}", lines.join(", ")))
}

/// Budgets of tuning, in MB, and how far a process may go beyond them.
const BUDGETS: [u32; 6] = [200, 210, 230, 260, 300, 400];
const BUDGET_SLACK: f64 = 1.05;

/// Tunes the real model within each budget; peak memory of the whole process stays within it.
pub(crate) fn budgets(edgellm: &Edgellm) -> Result<String> {
    let folder = repo::scratch("memory")?.join("adapter");
    let text = repo::root()?.join("fixtures/text/calibration.txt");
    let mut lines = Vec::new();
    for budget in BUDGETS {
        let flag = format!("{budget}MB");
        let run = ["adapt", "-m", SMOLLM2, "--data", arg(&text)?, "--max-len", "256", "--steps", "8"];
        let more = ["--exit-schedule", "cyclic", "-o", arg(&folder)?, "--force", "--max-memory", &flag];
        let tuned = edgellm.json(run.into_iter().chain(more))?;
        let Some(peak) = tuned["peak_rss_bytes"].as_f64() else {
            return Ok("no peak memory on this system".to_owned());
        };
        ensure!(peak <= f64::from(budget) * 1e6 * BUDGET_SLACK, "peak {peak} bytes with a budget of {budget} MB");
        let plan = &tuned["memory_plan"];
        let of = |key: &str| plan[key].as_u64().unwrap_or_default();
        lines.push(format!(
            "{budget}: {:.0} (window {}, {} kept, {} tokens at once)",
            peak / 1e6,
            of("window"),
            of("kept_blocks"),
            of("micro_tokens")
        ));
    }
    Ok(format!("budget and peak in MB: {}", lines.join("; ")))
}

/// Nats a token, over the second half of windows of 512, that rounding activations to 8 bits may cost: what
/// llama.cpp reaches with the same weights.
const ACTIVATIONS_KL: f64 = 0.0029;

/// The model's own 4-bit grid with activations of 8 bits, against its weights and activations in f32.
pub(crate) fn activations(edgellm: &Edgellm, text: &Path) -> Result<String> {
    let base = repo::scratch("activations")?.join("f32");
    edgellm.json(["compress", "-m", SMOLLM2, "--format", "f32", "-o", arg(&base)?, "--force"])?;
    let eval =
        ["eval", "-m", SMOLLM2, "--base", arg(&base)?, "--text", arg(text)?, "--context", "512", "--windows", "40"];
    let eval = edgellm.json(eval)?;
    let kl = number(&eval, "second_half_kl")?;
    ensure!(kl <= ACTIVATIONS_KL, "KL {kl:.5} nats, more than {ACTIVATIONS_KL}");
    Ok(format!("KL {kl:.5} nats (allowed {ACTIVATIONS_KL})"))
}

/// An adapter with what another program needs to follow it.
struct Tuned {
    /// The base model as a plain f32 directory.
    model: PathBuf,
    adapter: PathBuf,
    /// The raw prompt, and our logits on it with the adapter.
    prompt: PathBuf,
    logits: PathBuf,
}

/// Tunes a few steps at a rate at which the adapter clearly shows, exports the base, and writes the tuned logits.
fn tune(edgellm: &Edgellm, base: &str, folder: &Path, steps: usize) -> Result<Tuned> {
    let data = repo::root()?.join("fixtures/instruct/train.jsonl");
    let tuned = Tuned {
        model: folder.join("model"),
        adapter: folder.join("adapter"),
        prompt: folder.join("prompt.txt"),
        logits: folder.join("logits.safetensors"),
    };
    let (model, adapter) = (arg(&tuned.model)?, arg(&tuned.adapter)?);
    for old in [&tuned.model, &tuned.adapter].into_iter().filter(|old| old.exists()) {
        fs::remove_dir_all(old)?;
    }
    edgellm.json(["compress", "-m", base, "--format", "f32", "-o", model])?;
    let steps = steps.to_string();
    let mut args = vec!["adapt", "-m", model, "--data", arg(&data)?, "-o", adapter, "--steps", &steps, "--batch", "2"];
    args.extend(["--max-len", "96", "--exits", "1", "--window", "8", "--lr", "5e-3", "--template", "chat"]);
    edgellm.json(args)?;
    fs::write(&tuned.prompt, "<|im_start|>user\nWhat is my favourite drink?<|im_end|>\n<|im_start|>assistant\n")?;
    let (prompt, logits) = (arg(&tuned.prompt)?, arg(&tuned.logits)?);
    let run = ["run", "-m", model, "--adapter", adapter, "--raw", "-f", prompt, "-n", "0", "--dump-logits", logits];
    edgellm.json(run)?;
    ensure!(tuned.logits.exists(), "run --dump-logits wrote no {logits}");
    Ok(tuned)
}
