//! `edgellm bench`: how fast a model reads, generates and is tuned, in the manner of llama-bench; with `--kernels`,
//! what single operators reach beside the machine's limits.

mod kernels;
mod model;
mod process;
mod random;
mod report;
mod stats;
mod threads;

pub(crate) use self::model::{ModelBench, Test};
pub(crate) use self::process::cpu_ns;
pub(crate) use self::report::Row;
pub(crate) use self::stats::median;

use std::collections::BTreeSet;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use self::kernels::KernelArgs;
use self::model::TuneStep;
use super::failure::Usage;
use super::memory::Room;
use super::{Context, output, stop_if_requested};

/// Measure how fast a model reads prompts, generates and is tuned
#[derive(Args)]
pub(crate) struct Bench {
    /// Models: folders, GGUF files, or stored names
    #[arg(short, long, value_name = "MODEL", value_delimiter = ',', required_unless_present = "kernels")]
    model: Vec<String>,
    /// Tokens of the prompt; 0 for no such test
    #[arg(short = 'p', long, value_name = "N", value_delimiter = ',', default_value = "512")]
    n_prompt: Vec<usize>,
    /// Tokens to generate one by one; 0 for no such test
    #[arg(short = 'n', long, value_name = "N", value_delimiter = ',', default_value = "128")]
    n_gen: Vec<usize>,
    /// Tokens of a sequence in a tuning step (LoRA of rank 8 on all projections of all blocks); 0 for no such test
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "256")]
    tune: Vec<usize>,
    /// Sequences in a tuning step
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = positive)]
    tune_batch: usize,
    /// Blocks below an exit that a tuning step trains (default: all of them)
    #[arg(long, value_name = "M", value_parser = positive)]
    tune_window: Option<usize>,
    /// Exits of the tuning steps, evenly spaced and taken in turn: a repetition is a step at each of them
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = positive)]
    tune_exits: usize,
    /// Keep the window's block inputs only, and compute its activations again: less memory, more time
    #[arg(long)]
    tune_recompute: bool,
    /// Threads, one run for each number (default: --threads, or all cores)
    #[arg(short = 't', value_name = "N", value_delimiter = ',', conflicts_with = "threads")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    thread_counts: Vec<u16>,
    /// Repetitions of each test, after a warm-up that does not count
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = positive)]
    repetitions: usize,
    /// How the results are printed
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Output::Md)]
    output: Output,
    #[command(flatten)]
    kernels: KernelArgs,
}

/// How rows are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A Markdown table
    Md,
    /// Lines with a header
    Csv,
    /// An array of objects with llama-bench's names
    Json,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!("expected at least 1, found '{text}'")),
    }
}

impl Bench {
    /// The one number of threads that this process computes with; `None` if it is left to others.
    pub(crate) fn threads(&self) -> Option<u16> {
        match self.thread_counts.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }

    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        if self.kernels.kernels {
            if self.thread_counts.len() > 1 {
                return Err(Usage("-t: expected one number of threads with --kernels".into()).into());
            }
            let found = self.kernels.run(ctx)?;
            return self.print(ctx, "kernels", &found.rows, || found.markdown(), || Ok(found.csv()));
        }
        if self.thread_counts.len() > 1 && ctx.observed.is_on() {
            return Err(Usage("-t: expected one number of threads with --metrics or --trace".into()).into());
        }
        self.kernels.check()?;
        let tests = self.tests()?;
        let rows =
            if self.thread_counts.len() > 1 { self.with_each_thread_count(ctx)? } else { self.measure(ctx, &tests)? };
        self.print(ctx, "tests", &rows, || report::markdown(&rows), || report::csv(&rows))
    }

    fn tests(&self) -> anyhow::Result<Vec<Test>> {
        if self.tune.contains(&1) {
            return Err(Usage("--tune: expected 0 or at least 2 tokens, found 1".into()).into());
        }
        let step = TuneStep {
            batch: self.tune_batch,
            window: self.tune_window,
            exits: self.tune_exits,
            recompute: self.tune_recompute,
        };
        let listed = |list: &[usize]| list.iter().copied().filter(|&n| n > 0).collect::<Vec<_>>();
        let mut tests: Vec<Test> = listed(&self.n_prompt).into_iter().map(|tokens| Test::Prompt { tokens }).collect();
        tests.extend(listed(&self.n_gen).into_iter().map(|tokens| Test::Generate { tokens }));
        tests.extend(listed(&self.tune).into_iter().map(|tokens| Test::Tune { tokens, step }));
        if tests.is_empty() {
            return Err(Usage("expected a test, found -p, -n and --tune all 0".into()).into());
        }
        Ok(tests)
    }

    /// What the tests need beside the weights; tuning steps come on top of a pass, and are not counted.
    fn room(&self) -> Room {
        let most = |list: &[usize]| list.iter().copied().max().unwrap_or(0);
        let (prompt, generated) = (most(&self.n_prompt), most(&self.n_gen));
        Room { cache_tokens: prompt.max(generated), pass_tokens: prompt.max(most(&self.tune)), other: 0 }
    }

    fn measure(&self, ctx: &Context, tests: &[Test]) -> anyhow::Result<Vec<Row>> {
        let mut rows = Vec::new();
        for name in &self.model {
            stop_if_requested()?;
            let model = ctx.load(name, self.room())?;
            let bench = ModelBench::new(ctx, name, &model, None, self.repetitions)?;
            for &test in tests {
                rows.push(bench.run(test)?);
            }
        }
        Ok(rows)
    }

    /// A pool of threads cannot be changed once it is there, so that each number has a process of its own.
    fn with_each_thread_count(&self, ctx: &Context) -> anyhow::Result<Vec<Row>> {
        let mut seen = BTreeSet::new();
        let mut rows = Vec::new();
        for &count in self.thread_counts.iter().filter(|&&count| seen.insert(count)) {
            stop_if_requested()?;
            rows.extend(threads::run(&self.arguments(ctx, count))?);
        }
        Ok(rows)
    }

    /// This command with one number of threads.
    fn arguments(&self, ctx: &Context, threads: u16) -> Vec<String> {
        let list = |values: &[usize]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let mut arguments: Vec<String> = vec!["bench".into()];
        arguments.extend(self.model.iter().map(|model| format!("--model={model}")));
        arguments.extend([
            format!("-p={}", list(&self.n_prompt)),
            format!("-n={}", list(&self.n_gen)),
            format!("--tune={}", list(&self.tune)),
            format!("--tune-batch={}", self.tune_batch),
            format!("--tune-exits={}", self.tune_exits),
            format!("-t={threads}"),
            format!("-r={}", self.repetitions),
            "-o=json".into(),
            format!("--device={}", ctx.device),
            format!("--activations={}", ctx.activations),
        ]);
        arguments.extend(ctx.max_memory.map(|bytes| format!("--max-memory={bytes}")));
        arguments.extend(self.tune_window.map(|window| format!("--tune-window={window}")));
        arguments.extend(self.tune_recompute.then(|| "--tune-recompute".into()));
        arguments.extend(ctx.quiet.then(|| "--quiet".into()));
        arguments.extend((0..ctx.verbose).map(|_| "-v".to_string()));
        arguments
    }

    /// Prints rows as `-o` says; with `--json` as one object.
    fn print<T: Serialize>(
        &self,
        ctx: &Context,
        what: &str,
        rows: &[T],
        markdown: impl FnOnce() -> String,
        csv: impl FnOnce() -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let text = match self.output {
            Output::Md => markdown(),
            Output::Csv => csv()?,
            Output::Json => report::json(rows)?,
        };
        if ctx.json { ctx.result(json!({ what: rows }), String::new) } else { output::print(&text) }
    }
}
