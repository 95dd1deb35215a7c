//! Trains the project's own tiny model from scratch: the one of `fixtures/model`.
//!
//! Usage: `train_fixture --text FILE --tokenizer-dir DIR --out DIR [--seed 0] [--steps 1500] [--heldout FILE]`
//!
//! `DIR/config.json` of the tokenizer's folder says what model to build; OUT gets its weights in f32 and the
//! configuration, through the same writers as every other model.
#![allow(clippy::print_stderr, reason = "an example talks to a person")]

use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::Device;
use clap::Parser;
use edgellm::eval;
use edgellm::model::config::ModelConfig;
use edgellm::model::data::Example;
use edgellm::model::decoder::{Decoder, Weight};
use edgellm::model::generate::to_vec;
use edgellm::model::io::{atomic_write, read_text};
use edgellm::model::safetensors::{Dtype, SafetensorsWriter, TensorSpec};
use edgellm::model::tokenizer::Tokenizer;
use edgellm::model::values::Projection;
use edgellm::tune::full::{PretrainConfig, pretrain};

/// Train a tiny model from scratch.
#[derive(Parser)]
struct Args {
    /// Training text.
    #[arg(long)]
    text: PathBuf,
    /// Folder with config.json and tokenizer.json.
    #[arg(long)]
    tokenizer_dir: PathBuf,
    /// Where to write config.json and model.safetensors.
    #[arg(long)]
    out: PathBuf,
    /// Seed of the start and of the order of the text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimizer steps.
    #[arg(long, default_value_t = 1500)]
    steps: u64,
    /// Text to measure the loss on, before and after.
    #[arg(long)]
    heldout: Option<PathBuf>,
    /// Windows per step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens per window.
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Largest learning rate.
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps of linear increase of the learning rate.
    #[arg(long, default_value_t = 100)]
    warmup: u64,
    /// Weight decay on matrices.
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f64,
    /// Share of steps whose loss also looks at an earlier exit.
    #[arg(long, default_value_t = 0.3)]
    early_exit_share: f64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let config_text = read_text(&args.tokenizer_dir.join("config.json"))?;
    let model = ModelConfig::parse(&args.tokenizer_dir.join("config.json"), &config_text)?;
    let tokenizer = Tokenizer::open(&args.tokenizer_dir.join("tokenizer.json"))?;
    let ids = tokens(&tokenizer, &read_text(&args.text)?)?;
    let heldout = match &args.heldout {
        Some(path) => Some(tokens(&tokenizer, &read_text(path)?)?),
        None => None,
    };
    eprintln!("{} tokens of text, {} steps", ids.len(), args.steps);
    let config = PretrainConfig {
        steps: args.steps,
        batch_size: args.batch,
        context: args.context,
        learning_rate: args.lr,
        warmup_steps: args.warmup,
        weight_decay: args.weight_decay,
        early_exit_share: args.early_exit_share,
        seed: args.seed,
    };
    let start = Instant::now();
    let mut mean = None;
    let decoder = pretrain(&model, &ids, &config, &Device::flex(), |report| {
        // A moving average: single batches differ too much to be read.
        let smooth = mean.map_or(report.loss, |m| 0.95 * m + 0.05 * report.loss);
        mean = Some(smooth);
        let done = report.step + 1;
        if done % 20 == 0 || done == args.steps {
            let elapsed = start.elapsed().as_secs_f64();
            let left = elapsed / done as f64 * (args.steps - done) as f64;
            eprintln!("step {done}/{}: loss {smooth:.4}, {:.0} s, {left:.0} s left", args.steps, elapsed);
        }
    })?;
    if let Some(heldout) = heldout {
        let result = eval::perplexity(&decoder, None, &heldout, args.context, None, &mut |_| {})?;
        eprintln!("held-out loss {:.4} (perplexity {:.3})", result.all_targets.ln(), result.all_targets);
        for exit in 1..=decoder.n_blocks() {
            eprintln!("  after {exit} blocks: {:.4}", exit_loss(&decoder, &heldout, args.context, exit)?);
        }
    }
    std::fs::create_dir_all(&args.out)?;
    write_weights(&args, &decoder)?;
    // The same bytes, so that the file that was read and the one that is written agree.
    atomic_write(&args.out.join("config.json"), config_text.as_bytes())?;
    eprintln!("wrote {}", args.out.display());
    Ok(())
}

/// The tokens of a long text: cut at empty lines, since the tokenizer would hold all of its working copies at once.
fn tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, edgellm::model::ModelError> {
    let mut ids = Vec::new();
    for part in text.split_inclusive("\n\n") {
        ids.extend(tokenizer.encode(part, false)?);
    }
    Ok(ids)
}

/// Mean loss at an exit, over windows of held-out text.
fn exit_loss(decoder: &Decoder, ids: &[u32], context: usize, exit: usize) -> Result<f64, Box<dyn std::error::Error>> {
    let windows: Vec<Example> = ids.chunks_exact(context).map(|w| Example::new(&w[..1], &w[1..])).collect();
    Ok(eval::heldout_loss(decoder, None, &[exit], &[], &windows, &mut |_| {})?.by_exit[0].loss)
}

fn write_weights(args: &Args, decoder: &Decoder) -> Result<(), Box<dyn std::error::Error>> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut matrix = |name: String, weight: &Weight| -> Result<(), edgellm::model::ModelError> {
        let shape = weight.shape().to_vec();
        tensors.push((name, shape, to_vec(weight.dequantize())?));
        Ok(())
    };
    matrix("model.embed_tokens.weight".into(), decoder.embedding())?;
    let mut norms = vec![("model.norm.weight".to_string(), decoder.final_norm().clone())];
    for index in 0..decoder.n_blocks() {
        let block = decoder.store().block(index)?;
        for projection in Projection::ALL {
            matrix(projection.weight_name(index), &block.linear(projection).weight)?;
        }
        norms.push((format!("model.layers.{index}.input_layernorm.weight"), block.attn_norm));
        norms.push((format!("model.layers.{index}.post_attention_layernorm.weight"), block.mlp_norm));
    }
    for (name, norm) in norms {
        tensors.push((name, norm.dims().to_vec(), to_vec(norm)?));
    }
    let specs: Vec<TensorSpec> =
        tensors.iter().map(|(name, shape, _)| TensorSpec::new(name, Dtype::F32, shape.as_slice())).collect();
    let mut writer = SafetensorsWriter::create(&args.out.join("model.safetensors"), &specs)?;
    for (name, _, values) in &tensors {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(name, &bytes)?;
    }
    writer.finish()?;
    Ok(())
}
