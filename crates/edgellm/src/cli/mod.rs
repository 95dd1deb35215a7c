//! The command line: arguments that all commands share, dispatch, logging and exit codes.

mod adapt;
mod bench;
mod calibration;
mod child;
mod compress;
mod compressors;
mod data;
mod devices;
mod digest;
mod draft;
mod environment;
mod eval;
mod failure;
mod inspect;
mod interrupt;
mod logits;
mod measure;
mod memory;
mod merge;
mod observe;
mod output;
mod plan;
mod profile;
mod progress;
mod prompt;
mod pull;
mod recommend;
mod recover;
mod report;
mod run;
mod run_adapters;
mod sampling;
mod schedule;
mod search;
mod speculate;
mod speculation;
mod vote;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use edgellm::device::DeviceChoice;
use edgellm::kernels::{Isa, force_isa};
use edgellm::model::decoder::Activations;
use edgellm::model::traits::MetricSink;
use edgellm::store::Store;
use serde_json::Value;
use tracing_subscriber::filter::LevelFilter;

use self::failure::{Interrupted, Usage, exit_code, message};
use self::observe::{Observe, Observed};
use self::output::{parse_size, say};
use self::progress::{Counted, Progress};

/// Compress, adapt and run language models on the device where they are used.
#[derive(Parser)]
#[command(name = "edgellm", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Args)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// Print one JSON object on standard output instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Print neither progress nor messages
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Print more: -v for details and the causes of errors, -vv for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Where to compute: auto, flex (or cpu), ndarray, wgpu
    #[arg(long, global = true, default_value = "auto", value_name = "DEVICE")]
    device: DeviceChoice,
    /// Activations in products with quantized weights on the CPU: int8 (fast) or f32 (the reference)
    #[arg(long, global = true, default_value = "int8", value_name = "PRECISION")]
    activations: Activations,
    /// Instruction set of the CPU kernels, for tests and comparisons (default: the best; see `edgellm devices`)
    #[arg(long, global = true, value_name = "ISA")]
    isa: Option<String>,
    /// Threads for computing (default: all cores)
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Memory that this process may take, such as 1.5GB: blocks that do not fit are streamed from storage, and tuning steps
    /// are chosen to fit (default: what the system has left, for the weights alone)
    #[arg(long, global = true, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,
    /// The process that this one belongs to
    #[arg(long, global = true, hide = true, value_name = "PID")]
    parent: Option<u32>,
    #[command(flatten)]
    observe: Observe,
}

#[derive(Subcommand)]
enum Command {
    Pull(pull::Pull),
    Inspect(inspect::Inspect),
    Devices(devices::Devices),
    Profile(profile::Profile),
    Measure(measure::Measure),
    Plan(plan::Plan),
    Schedule(schedule::Schedule),
    Recommend(recommend::Recommend),
    Search(search::Search),
    Compress(compress::Compress),
    Adapt(adapt::Adapt),
    Draft(draft::Draft),
    Merge(merge::Merge),
    Vote(vote::Vote),
    Eval(eval::Eval),
    Report(report::Report),
    Run(run::Run),
    Speculate(speculate::Speculate),
    Bench(bench::Bench),
}

/// What every command works with.
pub(crate) struct Context {
    json: bool,
    quiet: bool,
    verbose: u8,
    /// As it was given.
    isa: Option<String>,
    threads: Option<u16>,
    max_memory: Option<u64>,
    device: DeviceChoice,
    activations: Activations,
    store: Store,
    observed: Observed,
}

impl Context {
    /// Where metrics go: nowhere without `--metrics`.
    pub(crate) fn metrics(&self) -> Box<dyn MetricSink> {
        self.observed.sink()
    }

    /// A message on standard error, unless `-q`.
    pub(crate) fn say(&self, text: &str) {
        if !self.quiet {
            say(text);
        }
    }

    /// The result on standard output: JSON with `--json`, text otherwise.
    pub(crate) fn result(&self, json: Value, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        output::print(&if self.json { output::json_line(&json) } else { text() })
    }

    /// Progress on standard error, unless `-q`.
    pub(crate) fn progress(&self, what: &str, total: u64, counted: Counted) -> Progress {
        Progress::new(self.quiet, what, total, counted)
    }
}

/// Refuses an output that exists, before any work is done.
pub(crate) fn check_output_dir(path: &Path, force: bool) -> anyhow::Result<()> {
    check_parent(path)?;
    match path.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(_) if !force => Err(Usage(format!("{} exists already; give --force to replace it", path.display())).into()),
        Ok(metadata) if !metadata.is_dir() => {
            Err(Usage(format!("{}: expected a folder to replace, found a file", path.display())).into())
        }
        Ok(_) => Ok(()),
    }
}

/// Refuses an output whose folder does not exist, before any work is done.
pub(crate) fn check_parent(path: &Path) -> anyhow::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if folder.is_dir() {
        return Ok(());
    }
    Err(Usage(format!("{}: the folder {} does not exist", path.display(), folder.display())).into())
}

/// Refuses an output file that cannot be one, before any work is done.
pub(crate) fn check_output_file(path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        return Err(Usage(format!("{}: expected a file name, found a folder", path.display())).into());
    }
    check_parent(path)
}

/// Ends work at a step's boundary once a signal asked for it.
pub(crate) fn stop_if_requested() -> anyhow::Result<()> {
    if interrupt::requested() { Err(Interrupted::nothing_written()) } else { Ok(()) }
}

/// Runs the command; returns its exit code.
pub(crate) fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output with code 0, errors to standard error with code 2.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let verbose = cli.global.verbose;
    let quiet = cli.global.quiet;
    let fail = |error: &anyhow::Error| {
        let code = exit_code(error);
        if code != 0 {
            say(&format!("error: {}", message(error, verbose > 0)));
        }
        ExitCode::from(code)
    };
    let observed = match cli.global.observe.open() {
        Ok(observed) => observed,
        Err(error) => return fail(&error),
    };
    log_to_stderr(verbose, quiet, &observed);
    let result = dispatch(cli, observed.clone());
    // What was measured until a failure is worth having too; the failure is what is told.
    let finished = observed.finish();
    match result.and_then(|code| finished.map(|()| code)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn log_to_stderr(verbose: u8, quiet: bool, observed: &Observed) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (_, 0) => LevelFilter::WARN,
        (_, 1) => LevelFilter::INFO,
        (_, 2) => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let targets = tracing_subscriber::filter::Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        .with_targets(edgellm::CRATES.map(|name| (name, level)))
        // Figures cost time to compute, and are for files.
        .with_target(edgellm::model::spans::FIGURES, LevelFilter::OFF);
    let format = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .log_internal_errors(false);
    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    tracing_subscriber::registry().with(format.with_filter(targets)).with(observed.layer()).init();
}

fn dispatch(cli: Cli, observed: Observed) -> anyhow::Result<ExitCode> {
    let global = cli.global;
    if let Some(parent) = global.parent {
        child::end_with(parent);
    }
    interrupt::install()?;
    if let Some(name) = &global.isa {
        let isa = Isa::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            let all: Vec<&str> = Isa::ALL.into_iter().map(Isa::name).collect();
            Usage(format!("--isa: {name} is no instruction set; expected one of {}", all.join(", ")))
        })?;
        force_isa(isa).map_err(|error| Usage(format!("--isa: {error}")))?;
    }
    let threads = match &cli.command {
        Command::Bench(bench) => bench.threads().or(global.threads),
        _ => global.threads,
    };
    if let Some(threads) = threads {
        edgellm::kernels::set_threads(usize::from(threads));
        rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads)).build_global()?;
    }
    let ctx = Context {
        json: global.json,
        quiet: global.quiet,
        verbose: global.verbose,
        isa: global.isa,
        threads,
        max_memory: global.max_memory,
        device: global.device,
        activations: global.activations,
        store: environment::store()?,
        observed,
    };
    match cli.command {
        Command::Pull(command) => command.run(&ctx).map(success),
        Command::Inspect(command) => command.run(&ctx).map(success),
        Command::Devices(command) => command.run(&ctx).map(success),
        Command::Profile(command) => command.run(&ctx).map(success),
        Command::Measure(command) => command.run(&ctx).map(success),
        Command::Plan(command) => command.run(&ctx).map(success),
        Command::Schedule(command) => command.run(&ctx).map(success),
        Command::Recommend(command) => command.run(&ctx).map(success),
        Command::Search(command) => command.run(&ctx).map(success),
        Command::Compress(command) => command.run(&ctx).map(success),
        Command::Adapt(command) => command.run(&ctx),
        Command::Draft(command) => command.run(&ctx).map(success),
        Command::Merge(command) => command.run(&ctx).map(success),
        Command::Vote(command) => command.run(&ctx).map(success),
        Command::Eval(command) => command.run(&ctx).map(success),
        Command::Report(command) => command.run(&ctx).map(success),
        Command::Run(command) => command.run(&ctx).map(success),
        Command::Speculate(command) => command.run(&ctx).map(success),
        Command::Bench(command) => command.run(&ctx).map(success),
    }
}

fn success(_: ()) -> ExitCode {
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
