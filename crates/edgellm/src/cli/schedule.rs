//! `edgellm schedule`: how a model will run within a memory limit on a measured device.

use std::path::PathBuf;

use clap::Args;
use edgellm::eval::chart::{self, Lane, Span};
use edgellm::model::files::ModelFiles;
use edgellm::sched::Roofline;
use edgellm::schedule::{Schedule as Found, block_format, schedule};
use edgellm::session::Memory;
use serde_json::{Value, json};

use super::output::bytes;
use super::{Context, check_output_file, profile};

/// Show which blocks stay in memory, what is streamed when, and how long a token will take
#[derive(Args)]
pub(crate) struct Schedule {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The device's profile, as `edgellm profile` wrote it
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,
    /// Tokens in the cache
    #[arg(long, value_name = "N", default_value_t = 256)]
    context: usize,
    /// Tell of every block where it lies and what it costs
    #[arg(long)]
    explain: bool,
    /// Draw one token: computing, reads and memory over time
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
}

impl Schedule {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        if let Some(path) = &self.chart {
            check_output_file(path)?;
        }
        let profile = profile::read(ctx, &self.profile)?;
        let limit = ctx.max_memory.unwrap_or(profile.usable_bytes);
        let cost = Roofline::new(profile)?;
        let cost = match ctx.threads {
            Some(threads) => cost.with_threads(usize::from(threads))?,
            None => cost,
        };
        let files = ModelFiles::open(&ctx.store.resolve(&self.model)?)?;
        let options = ctx.device.load_options(ctx.activations)?;
        // What a process that runs the model has before it loads it.
        let tokenizer = files.tokenizer()?;
        let memory = Memory { limit, cache_tokens: self.context, pass_tokens: 1, other: 0 };
        let found = schedule(&files, &options, memory, &cost)?;
        drop(tokenizer);
        if let Some(path) = &self.chart {
            chart::write(path, &picture(&self.model, &found)?)?;
        }
        ctx.result(self.json(&found), || self.text(&files, &found, limit).unwrap_or_default())
    }

    fn json(&self, found: &Found) -> Value {
        let blocks: Vec<Value> = found
            .blocks
            .iter()
            .zip(&found.placement.resident)
            .map(|(b, stays)| json!({"resident": stays, "bytes": b.bytes, "bits": b.bits, "seconds": b.seconds}))
            .collect();
        json!({
            "seconds_per_token": found.seconds(), "tokens_per_second": 1.0 / found.seconds(), "peak_bytes": found.bytes(), "expected_bytes": found.expected_bytes(),
            "fixed_bytes": found.fixed_bytes, "head_seconds": found.head_seconds, "read_rate": found.read_rate,
            "buffers": found.placement.slots, "read_bytes_per_token": found.placement.read_bytes, "blocks": blocks,
            "chart": self.chart,
        })
    }

    fn text(&self, files: &ModelFiles, found: &Found, limit: u64) -> anyhow::Result<String> {
        let mut text = String::new();
        if self.explain {
            text.push_str("block  format        bits       size  where     computes      read\n");
            for (index, (block, step)) in found.blocks.iter().zip(&found.steps).enumerate() {
                let format = block_format(files, index)?.map_or_else(|| "mixed".into(), |format| format.name());
                let place = if step.read.is_some() { "storage" } else { "memory" };
                let read = step.read.map_or_else(|| "-".into(), |(from, to)| format!("{:.2} ms", 1e3 * (to - from)));
                let (size, computes) = (bytes(block.bytes), format!("{:.2} ms", 1e3 * block.seconds));
                text.push_str(&format!(
                    "{index:>5}  {format:<10} {:>7.2} {size:>10}  {place:<8} {computes:>10} {read:>10}\n",
                    block.bits
                ));
            }
        }
        let placement = &found.placement;
        let kept = placement.resident.iter().filter(|stays| **stays).count();
        let computes: f64 = found.blocks.iter().map(|block| block.seconds).sum::<f64>() + found.head_seconds;
        text.push_str(&format!(
            "memory     {}, at most {} of {}: {} beside the blocks, {} for {kept} of {} blocks",
            bytes(found.expected_bytes()),
            bytes(found.bytes()),
            bytes(limit),
            bytes(found.fixed_bytes - found.reserve_bytes),
            bytes(placement.bytes),
            found.blocks.len()
        ));
        if let Some(rate) = found.read_rate {
            text.push_str(&format!(" and {} buffers\n", placement.slots));
            let read = placement.read_bytes as f64 / rate;
            text.push_str(&format!(
                "storage    {} a token at {}/s: {:.1} ms\n",
                bytes(placement.read_bytes),
                bytes(rate as u64),
                1e3 * read
            ));
        } else {
            text.push('\n');
        }
        text.push_str(&format!("computing  {:.1} ms a token\n", 1e3 * computes));
        text.push_str(&format!(
            "predicted  {:.1} ms a token, {:.2} tokens/s\n",
            1e3 * found.seconds(),
            1.0 / found.seconds()
        ));
        if let Some(path) = &self.chart {
            text.push_str(&format!("wrote {}\n", path.display()));
        }
        Ok(text)
    }
}

/// One token over time.
fn picture(model: &str, found: &Found) -> anyhow::Result<String> {
    let ms = |(from, to): (f64, f64)| (1e3 * from, 1e3 * to);
    let span = |block: usize, time| Span { time: ms(time), label: block.to_string(), strong: true };
    let compute = found.steps.iter().map(|step| Span { strong: step.read.is_some(), ..span(step.block, step.compute) });
    let reads = found.steps.iter().filter_map(|step| Some(span(step.block, step.read?)));
    // A buffer is full from the start of its read to the end of its computing.
    let mut changes: Vec<(f64, f64)> = Vec::new();
    for (step, block) in found.steps.iter().zip(&found.blocks) {
        if let Some((from, _)) = step.read {
            changes.extend([(1e3 * from, block.bytes as f64), (1e3 * step.compute.1, -(block.bytes as f64))]);
        }
    }
    changes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let kept = found.blocks.iter().zip(&found.placement.resident).filter(|(_, stays)| **stays);
    let mut level = found.fixed_bytes as f64 + kept.map(|(block, _)| block.bytes as f64).sum::<f64>();
    let begin = changes.first().map_or(0.0, |first| first.0.min(0.0));
    let mut memory = vec![(begin, level * 1e-6)];
    for (at, change) in changes {
        memory.push((at, level * 1e-6));
        level += change;
        memory.push((at, level * 1e-6));
    }
    memory.push((1e3 * found.seconds(), level * 1e-6));
    let lanes = [Lane { label: "computes", spans: compute.collect() }, Lane { label: "reads", spans: reads.collect() }];
    let title = format!("{model}: one token, {:.1} ms, {}", 1e3 * found.seconds(), bytes(found.bytes()));
    Ok(chart::timeline(&title, &lanes, "memory, MB", &memory)?)
}
