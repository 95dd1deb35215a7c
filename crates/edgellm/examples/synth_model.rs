//! Writes a model with random weights and the shape of a real family: what `cargo xtask synth-model` runs.
//!
//! Usage: `synth_model --preset 1b --format q4g32s --tokenizer-dir DIR --out DIR [--prepare] [--seed 0] [--force]`
#![allow(clippy::print_stderr, reason = "an example talks to a person")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use edgellm::kernels::{Arrangement, Format};
use edgellm::model::synth::{PRESETS, Packing, Preset, write_random_model};

/// Write a random model of a real family's shape.
#[derive(Parser)]
struct Args {
    /// Its shape.
    #[arg(long, value_parser = preset)]
    preset: &'static Preset,
    /// The format of its matrices, such as q4g32s.
    #[arg(long)]
    format: Format,
    /// Folder with the tokenizer's files.
    #[arg(long)]
    tokenizer_dir: PathBuf,
    /// The folder to write.
    #[arg(long)]
    out: PathBuf,
    /// Write the weights as the CPU's integer kernels use them.
    #[arg(long)]
    prepare: bool,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Replace the folder if it is there.
    #[arg(long)]
    force: bool,
}

fn preset(name: &str) -> Result<&'static Preset, String> {
    Preset::by_name(name).ok_or_else(|| {
        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        format!("expected {}", names.join(", "))
    })
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    if args.out.exists() && !args.force {
        return Err(format!("{} exists already; give --force to replace it", args.out.display()).into());
    }
    if args.out.exists() && !args.out.join("config.json").is_file() {
        return Err(format!("{}: --force replaces a model only, and this is none", args.out.display()).into());
    }
    let start = Instant::now();
    let mut told = 0;
    let (target, tokenizer) = (&args.out, &args.tokenizer_dir);
    let mut config = args.preset.config_json();
    // The tokens that the tokenizer of the fixture ends a text with.
    config["bos_token_id"] = 1.into();
    config["eos_token_id"] = 2.into();
    let arrangement = if args.prepare { Arrangement::Panels } else { Arrangement::Rows };
    let packing = Packing { format: args.format, arrangement };
    write_random_model(target, config, tokenizer, packing, args.seed, args.force, &mut |done, all| {
        let percent = done * 100 / all;
        if percent >= told + 10 {
            told = percent;
            eprintln!("{percent}% of {:.0} million values, {:.1} s", all as f64 / 1e6, start.elapsed().as_secs_f64());
        }
    })?;
    eprintln!("wrote {}: the shape of {} in {}", target.display(), args.preset.family, args.format);
    Ok(())
}
