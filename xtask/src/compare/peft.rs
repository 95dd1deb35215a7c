//! `cargo xtask compare-peft`: a step of LoRA with Python's peft and with `edgellm bench --tune`, on the same model:
//! peft gets its weights expanded to floats.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use xshell::cmd;

use super::{bench, check_output, median, numbers, table, write_json};
use crate::edgellm::{Edgellm, SMOLLM2, arg, number};
use crate::{python, repo};

/// What the script needs.
const MODULES: [&str; 3] = ["torch", "transformers", "peft"];

/// Compares a step of LoRA (rank 8, all seven projections, AdamW) with Python's peft.
#[derive(Args)]
pub(crate) struct ComparePeft {
    /// A Python environment with torch, transformers and peft (default: python3 on the path).
    #[arg(long, value_name = "DIR")]
    venv: Option<PathBuf>,
    /// The model: a folder, a GGUF file, or a stored name.
    #[arg(long, value_name = "MODEL", default_value = SMOLLM2)]
    model: String,
    /// Sequences and tokens of a step.
    #[arg(long, value_delimiter = ',', default_value = "1x256,4x256", value_parser = step)]
    steps: Vec<(usize, usize)>,
    /// Types of peft's base weights: f32 or bf16.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    types: Vec<String>,
    /// Tune a window of so many blocks at exits in turn, as `edgellm adapt` does, too; and the last so many blocks with
    /// peft.
    #[arg(long, value_name = "BLOCKS")]
    window: Option<usize>,
    /// Exits of the window's steps.
    #[arg(long, value_name = "K", default_value_t = 4)]
    exits: usize,
    /// Threads.
    #[arg(short, long, default_value_t = 2)]
    threads: usize,
    /// Steps that are timed, after one that is not.
    #[arg(short, long, default_value_t = 5)]
    repetitions: usize,
    /// Where to write all samples (default: in the target folder).
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
}

fn step(text: &str) -> Result<(usize, usize), String> {
    let parsed = text.split_once('x').and_then(|(batch, tokens)| Some((batch.parse().ok()?, tokens.parse().ok()?)));
    match parsed {
        Some((batch @ 1.., tokens @ 2..)) => Ok((batch, tokens)),
        _ => Err(format!("'{text}' is no step; expected sequences and tokens such as 4x256")),
    }
}

/// What a program needed for steps of one size.
struct Measured {
    program: String,
    batch: usize,
    tokens: usize,
    wall_seconds: Vec<f64>,
    /// Empty where the system does not tell.
    cpu_seconds: Vec<f64>,
    peak_rss_bytes: Option<f64>,
}

impl ComparePeft {
    pub(crate) fn run(&self) -> Result<()> {
        ensure!(self.threads > 0 && self.repetitions > 0, "expected at least one thread and one repetition");
        if let Some(other) = self.types.iter().find(|name| !["f32", "bf16"].contains(&name.as_str())) {
            bail!("--types: expected f32 or bf16, found {other}");
        }
        let output = match &self.json {
            Some(path) => std::path::absolute(path)?,
            None => repo::scratch("compare")?.join("peft.json"),
        };
        check_output(&output)?;
        let python = self.python()?;
        let model = if Path::new(&self.model).exists() {
            arg(&std::path::absolute(&self.model)?)?.to_owned()
        } else {
            self.model.clone()
        };
        let edgellm = Edgellm::build(&[])?.quietly();
        let floats = repo::scratch("compare")?.join("floats");
        edgellm.json(["compress", "-m", &model, "--format", "f32", "-o", arg(&floats)?, "--force"])?;
        let mut all = Vec::new();
        for &(batch, tokens) in &self.steps {
            for name in &self.types {
                eprintln!("peft {name}, {batch} x {tokens}");
                all.push(self.run_peft(&python, &floats, name, batch, tokens, None)?);
                if self.window.is_some() {
                    all.push(self.run_peft(&python, &floats, name, batch, tokens, self.window)?);
                }
            }
            eprintln!("edgellm, {batch} x {tokens}");
            all.push(self.run_edgellm(&edgellm, &model, batch, tokens, None)?);
            if self.window.is_some() {
                all.push(self.run_edgellm(&edgellm, &model, batch, tokens, self.window)?);
            }
        }
        write_json(&output, &results(self.threads, &all))?;
        println!("{}", markdown(&all));
        println!("all samples: {}", output.display());
        Ok(())
    }

    /// An interpreter that has what the script needs.
    fn python(&self) -> Result<PathBuf> {
        let python = match &self.venv {
            Some(folder) => {
                // Not canonical: a link to the interpreter is what makes it the environment's.
                let python = std::path::absolute(folder)?.join("bin/python");
                ensure!(python.exists(), "{} is no Python environment: it has no bin/python", folder.display());
                python
            }
            None => PathBuf::from("python3"),
        };
        let shell = repo::shell()?;
        let code = "import importlib.util, sys\nprint(*(m for m in sys.argv[1:] if not importlib.util.find_spec(m)))";
        let asked = cmd!(shell, "{python} -c {code} {MODULES...}").quiet().read();
        let missing = asked.with_context(|| format!("cannot run {}", python.display()))?;
        ensure!(
            missing.is_empty(),
            "{} lacks {}; give --venv a Python environment with {}",
            python.display(),
            missing.replace(' ', ", "),
            python::PEFT.1[2..].join(", ")
        );
        Ok(python)
    }

    fn run_peft(
        &self,
        python: &Path,
        model: &Path,
        name: &str,
        batch: usize,
        tokens: usize,
        window: Option<usize>,
    ) -> Result<Measured> {
        let blocks = window.unwrap_or(0).to_string();
        let (shell, script) = (repo::shell()?, python::script("peft_bench.py")?);
        let [b, n, t, r] = [batch, tokens, self.threads, self.repetitions].map(|n| n.to_string());
        let text = cmd!(
            shell,
            "{python} {script} {model} --type {name} --batch {b} --tokens {n} --threads {t} --repetitions {r} --blocks {blocks}"
        )
        .quiet()
        .read()?;
        let line = text.lines().last().unwrap_or_default();
        let found: Value =
            serde_json::from_str(line).with_context(|| format!("peft_bench.py did not print JSON: {text:.200}"))?;
        Ok(Measured {
            program: format!("peft {name}{}", window.map_or(String::new(), |n| format!(", last {n} blocks"))),
            batch,
            tokens,
            wall_seconds: numbers(&found, "wall_seconds")?,
            cpu_seconds: numbers(&found, "cpu_seconds")?,
            peak_rss_bytes: Some(number(&found, "peak_rss_bytes")?),
        })
    }

    fn run_edgellm(
        &self,
        edgellm: &Edgellm,
        model: &str,
        batch: usize,
        tokens: usize,
        window: Option<usize>,
    ) -> Result<Measured> {
        let mut arguments = vec![
            format!("--model={model}"),
            "-p=0".into(),
            "-n=0".into(),
            format!("--tune={tokens}"),
            format!("--tune-batch={batch}"),
            format!("-t={}", self.threads),
            format!("-r={}", self.repetitions),
        ];
        if let Some(window) = window {
            arguments.extend([format!("--tune-window={window}"), format!("--tune-exits={}", self.exits)]);
        }
        let rows = bench(edgellm, &arguments)?;
        let row = rows.first().context("edgellm bench printed no row")?;
        let seconds = |key: &str| Ok::<_, anyhow::Error>(numbers(row, key)?.into_iter().map(|ns| ns / 1e9).collect());
        Ok(Measured {
            program: format!(
                "edgellm {}{}",
                row["model_type"].as_str().unwrap_or_default(),
                window.map_or(String::new(), |n| format!(", window {n}, {} exits", self.exits))
            ),
            batch,
            tokens,
            wall_seconds: seconds("samples_ns")?,
            cpu_seconds: if row["cpu_ns"].is_array() { seconds("cpu_ns")? } else { Vec::new() },
            peak_rss_bytes: row["peak_rss_bytes"].as_f64(),
        })
    }
}

fn markdown(all: &[Measured]) -> String {
    let rows = all.iter().map(|m| {
        let cpu = if m.cpu_seconds.is_empty() { "-".to_owned() } else { format!("{:.2}", median(&m.cpu_seconds)) };
        vec![
            format!("{} x {}", m.batch, m.tokens),
            m.program.clone(),
            format!("{:.2}", median(&m.wall_seconds)),
            cpu,
            m.peak_rss_bytes.map_or_else(|| "-".to_owned(), |bytes| format!("{:.0}", bytes / 1e6)),
        ]
    });
    table(&["step", "program", "wall s", "CPU s", "peak MB"], &rows.collect::<Vec<_>>(), 2)
}

fn results(threads: usize, all: &[Measured]) -> Value {
    let rows = all.iter().map(|m| {
        json!({
            "program": m.program, "batch": m.batch, "tokens": m.tokens, "wall_seconds": m.wall_seconds,
            "cpu_seconds": m.cpu_seconds, "peak_rss_bytes": m.peak_rss_bytes,
        })
    });
    json!({ "n_threads": threads, "rows": rows.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_parse() {
        assert_eq!(step("4x256"), Ok((4, 256)));
        assert!(["", "4", "0x256", "4x1", "axb"].iter().all(|text| step(text).is_err()));
    }

    #[test]
    fn medians_are_shown() {
        let measured = Measured {
            program: "peft f32".into(),
            batch: 4,
            tokens: 256,
            wall_seconds: vec![3.0, 1.0, 2.0],
            cpu_seconds: Vec::new(),
            peak_rss_bytes: Some(2.5e9),
        };
        let text = markdown(std::slice::from_ref(&measured));
        assert!(text.contains("| 4 x 256 | peft f32 |   2.00 |     - |    2500 |"), "{text}");
        assert_eq!(results(2, &[measured])["rows"][0]["batch"], 4);
    }
}
