//! `cargo xtask compare-llama`: llama.cpp's llama-bench and `edgellm bench` by turns. In every round both run once for
//! every pair of models and number of threads, in an order that changes from round to round; medians are compared.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use xshell::{Shell, cmd};

use super::{bench, check_output, count, median, numbers, table, write_json};
use crate::edgellm::{Edgellm, arg};
use crate::repo;

/// Compares prefill and generation with llama.cpp, by turns in one run.
#[derive(Args)]
pub(crate) struct CompareLlama {
    /// llama.cpp's llama-bench.
    #[arg(long, value_name = "PATH")]
    llama_bench: PathBuf,
    /// Models for llama.cpp.
    #[arg(long, value_name = "FILE", required = true)]
    gguf: Vec<PathBuf>,
    /// Models for edgellm: one for each GGUF file, or one for all.
    #[arg(long, value_name = "MODEL", required = true)]
    model: Vec<String>,
    /// Threads.
    #[arg(short, long, value_delimiter = ',', default_value = "1")]
    threads: Vec<usize>,
    /// Tokens of the prompt.
    #[arg(short = 'p', long, default_value_t = 512)]
    n_prompt: usize,
    /// Tokens to generate.
    #[arg(short, long, default_value_t = 128)]
    n_gen: usize,
    /// Rounds: each program runs every test once in each, after a warm-up.
    #[arg(short, long, default_value_t = 5)]
    rounds: usize,
    /// Where to write all samples (default: in the target folder).
    #[arg(long, value_name = "FILE.json")]
    json: Option<PathBuf>,
}

/// Two models that are compared with some number of threads.
struct Pair {
    gguf: PathBuf,
    model: String,
    threads: usize,
    tests: Vec<Test>,
}

/// What both programs reached in one test.
struct Test {
    n_prompt: usize,
    n_gen: usize,
    llama_ts: Vec<f64>,
    edgellm_ts: Vec<f64>,
    /// Processor nanoseconds of a token; llama-bench does not tell its own.
    edgellm_cpu: Vec<f64>,
}

impl Test {
    fn new(n_prompt: usize, n_gen: usize) -> Self {
        Self { n_prompt, n_gen, llama_ts: Vec::new(), edgellm_ts: Vec::new(), edgellm_cpu: Vec::new() }
    }

    fn name(&self) -> String {
        if self.n_gen == 0 { format!("pp{}", self.n_prompt) } else { format!("tg{}", self.n_gen) }
    }

    fn ratio(&self) -> f64 {
        median(&self.edgellm_ts) / median(&self.llama_ts)
    }

    /// The row of this test among those that a program printed.
    fn find<'v>(&self, rows: &'v [Value]) -> Result<&'v Value> {
        for row in rows {
            if count(row, "n_prompt")? == self.n_prompt as u64 && count(row, "n_gen")? == self.n_gen as u64 {
                return Ok(row);
            }
        }
        bail!("no row for {} among {} rows", self.name(), rows.len())
    }

    fn add_llama(&mut self, rows: &[Value]) -> Result<()> {
        let samples = numbers(self.find(rows)?, "samples_ts")?;
        self.llama_ts.extend(samples);
        Ok(())
    }

    fn add_edgellm(&mut self, rows: &[Value]) -> Result<()> {
        let row = self.find(rows)?;
        let samples = numbers(row, "samples_ts")?;
        if row["cpu_ns"].is_array() {
            let tokens = (self.n_prompt + self.n_gen) as f64;
            self.edgellm_cpu.extend(numbers(row, "cpu_ns")?.into_iter().map(|ns| ns / tokens));
        }
        self.edgellm_ts.extend(samples);
        Ok(())
    }
}

impl CompareLlama {
    pub(crate) fn run(&self) -> Result<()> {
        let mut pairs = self.pairs()?;
        let output = match &self.json {
            Some(path) => std::path::absolute(path)?,
            None => repo::scratch("compare")?.join("llama.json"),
        };
        check_output(&output)?;
        let edgellm = Edgellm::build(&[])?.quietly();
        let shell = repo::shell()?;
        for round in 0..self.rounds {
            for pair in &mut pairs {
                eprintln!("round {}/{}: {}", round + 1, self.rounds, pair.describe());
                if round % 2 == 0 {
                    self.run_llama(&shell, pair)?;
                    self.run_edgellm(&edgellm, pair)?;
                } else {
                    self.run_edgellm(&edgellm, pair)?;
                    self.run_llama(&shell, pair)?;
                }
            }
        }
        write_json(&output, &results(self.rounds, &pairs))?;
        println!("{}", markdown(&pairs));
        println!("all samples: {}", output.display());
        Ok(())
    }

    /// Every pair of models with every number of threads.
    fn pairs(&self) -> Result<Vec<Pair>> {
        ensure!(self.rounds > 0 && !self.threads.contains(&0), "expected at least one round and one thread");
        ensure!(self.n_prompt + self.n_gen > 0, "expected a test, found -p 0 and -n 0");
        ensure!(self.llama_bench.is_file(), "{} is no file", self.llama_bench.display());
        if let Some(missing) = self.gguf.iter().find(|file| !file.is_file()) {
            bail!("{} is no file", missing.display());
        }
        let (files, models) = (self.gguf.len(), self.model.len());
        ensure!(
            models == 1 || models == files,
            "expected one --model, or one for each of the {files} GGUF files, found {models}"
        );
        let mut pairs = Vec::new();
        for (index, gguf) in self.gguf.iter().enumerate() {
            // The shell runs in the repository's root, the person perhaps elsewhere.
            let gguf = fs::canonicalize(gguf).with_context(|| format!("cannot open {}", gguf.display()))?;
            let model = absolute_model(&self.model[index.min(models - 1)])?;
            for &threads in &self.threads {
                let mut tests = vec![Test::new(self.n_prompt, 0), Test::new(0, self.n_gen)];
                tests.retain(|test| test.n_prompt + test.n_gen > 0);
                pairs.push(Pair { gguf: gguf.clone(), model: model.clone(), threads, tests });
            }
        }
        Ok(pairs)
    }

    fn run_llama(&self, shell: &Shell, pair: &mut Pair) -> Result<()> {
        let program = fs::canonicalize(&self.llama_bench)?;
        let [p, n, t] = [self.n_prompt, self.n_gen, pair.threads].map(|n| n.to_string());
        let file = &pair.gguf;
        let text =
            cmd!(shell, "{program} -m {file} -p {p} -n {n} -t {t} -r 1 -o json").quiet().ignore_stderr().read()?;
        let rows: Vec<Value> =
            serde_json::from_str(&text).with_context(|| format!("llama-bench did not print JSON: {text:.200}"))?;
        pair.tests.iter_mut().try_for_each(|test| test.add_llama(&rows))
    }

    fn run_edgellm(&self, edgellm: &Edgellm, pair: &mut Pair) -> Result<()> {
        let arguments = [
            format!("--model={}", pair.model),
            format!("-p={}", self.n_prompt),
            format!("-n={}", self.n_gen),
            "--tune=0".into(),
            format!("-t={}", pair.threads),
            "-r=1".into(),
        ];
        let rows = bench(edgellm, &arguments)?;
        pair.tests.iter_mut().try_for_each(|test| test.add_edgellm(&rows))
    }
}

/// A path from the root where there is one; a stored name as it is.
fn absolute_model(name: &str) -> Result<String> {
    let path = Path::new(name);
    if path.exists() { Ok(arg(&fs::canonicalize(path)?)?.to_owned()) } else { Ok(name.to_owned()) }
}

impl Pair {
    fn describe(&self) -> String {
        format!("{} and {}, {} threads", short(&self.gguf), short(Path::new(&self.model)), self.threads)
    }
}

/// The last part of a path.
fn short(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn markdown(pairs: &[Pair]) -> String {
    let rows = pairs.iter().flat_map(|pair| {
        pair.tests.iter().map(|test| {
            let cpu = if test.edgellm_cpu.is_empty() {
                "-".to_owned()
            } else {
                format!("{:.2} ms", median(&test.edgellm_cpu) / 1e6)
            };
            vec![
                test.name(),
                short(&pair.gguf),
                short(Path::new(&pair.model)),
                pair.threads.to_string(),
                format!("{:.1}", median(&test.llama_ts)),
                format!("{:.1}", median(&test.edgellm_ts)),
                format!("{:.2}", test.ratio()),
                cpu,
            ]
        })
    });
    let header = [
        "test",
        "llama.cpp's model",
        "edgellm's model",
        "threads",
        "llama.cpp t/s",
        "edgellm t/s",
        "ratio",
        "edgellm cpu/token",
    ];
    table(&header, &rows.collect::<Vec<_>>(), 3)
}

fn results(rounds: usize, pairs: &[Pair]) -> Value {
    let rows = pairs.iter().flat_map(|pair| {
        pair.tests.iter().map(|test| {
            json!({
                "test": test.name(), "gguf": short(&pair.gguf), "model": short(Path::new(&pair.model)),
                "n_threads": pair.threads, "llama_median_ts": median(&test.llama_ts),
                "edgellm_median_ts": median(&test.edgellm_ts), "ratio": test.ratio(),
                "llama_samples_ts": test.llama_ts, "edgellm_samples_ts": test.edgellm_ts,
                "edgellm_cpu_ns_per_token": test.edgellm_cpu,
            })
        })
    });
    json!({ "rounds": rounds, "rows": rows.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n_prompt: usize, n_gen: usize, rate: f64) -> Value {
        json!({ "n_prompt": n_prompt, "n_gen": n_gen, "samples_ts": [rate], "cpu_ns": [1e9] })
    }

    #[test]
    fn samples_go_to_their_tests() {
        let rows = [row(512, 0, 400.0), row(0, 128, 60.0)];
        let mut tests = vec![Test::new(512, 0), Test::new(0, 128)];
        for test in &mut tests {
            test.add_llama(&rows).unwrap();
            test.add_edgellm(&[row(0, 128, 90.0), row(512, 0, 200.0)]).unwrap();
        }
        assert_eq!(tests.iter().map(Test::ratio).collect::<Vec<_>>(), [0.5, 1.5]);
        assert_eq!(tests[1].edgellm_cpu, [1e9 / 128.0]);
        assert!(Test::new(256, 0).add_llama(&rows).unwrap_err().to_string().contains("no row for pp256"));
        let pair = Pair { gguf: "a/b.gguf".into(), model: "m".into(), threads: 2, tests };
        let text = markdown(std::slice::from_ref(&pair));
        assert!(text.contains("| pp512 | b.gguf") && text.contains("  0.50 |"), "{text}");
        assert_eq!(results(1, &[pair])["rows"][1]["ratio"], 1.5);
    }
}
