//! `edgellm speculate`: what drafts and confident exits save on held-out prompts, beside plain decoding in the same run.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use edgellm::model::adapter::Adapter;
use edgellm::model::generate::{ConfidentExit, Flow, Generator, MAX_BATCH, Speculation};
use edgellm::model::sample::{Sampler, SamplingConfig};
use edgellm::session::LoadedModel;
use edgellm::tune::voters::voter;
use serde_json::{Value, json};

use super::bench::{cpu_ns, median};
use super::data::DataArgs;
use super::draft::prompt_of;
use super::failure::Usage;
use super::memory::Room;
use super::output::table;
use super::progress::Counted;
use super::run_adapters::load_adapter;
use super::speculation::{Drafters, Faster};
use super::{Context, stop_if_requested};

/// Measure faster generation beside plain decoding
#[derive(Args)]
pub(crate) struct Speculate {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// An adapter, as `edgellm adapt` or PEFT wrote it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Examples whose prompts are answered: JSON lines
    #[arg(long, value_name = "HELDOUT.jsonl")]
    data: PathBuf,
    #[command(flatten)]
    format: DataArgs,
    /// A drafter that `edgellm draft` fitted
    #[arg(long, value_name = "FILE")]
    drafter: Option<PathBuf>,
    /// Exits of the adapter to draft at, without a drafter
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "drafter")]
    exits: Vec<usize>,
    /// Thresholds of confident exits to measure
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    confident: Vec<f32>,
    /// Prompts at most
    #[arg(long, default_value_t = 50, value_name = "N")]
    prompts: usize,
    /// Tokens of an answer at most
    #[arg(short, default_value_t = 64, value_name = "N")]
    n: usize,
    /// Temperature; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temp: f64,
    /// Seed of the draws, the same for every way of generating
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A way of generating with what it took.
struct Way<'a> {
    name: String,
    generator: Generator<'a>,
    /// Of each prompt.
    answers: Vec<Vec<u32>>,
    /// Seconds of each prompt after the prefill, of the clock and of processors.
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

impl Way<'_> {
    fn tokens(&self) -> usize {
        self.answers.iter().map(|answer| answer.len().saturating_sub(1)).sum()
    }
}

impl Speculate {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.format.check([&self.data])?;
        if self.prompts == 0 || self.n < 2 {
            return Err(Usage("expected at least 1 in --prompts and 2 tokens (-n)".into()).into());
        }
        let model = ctx.load(&self.model, Room::text(512, 512))?;
        let adapter = load_adapter(self.adapter.as_deref(), &model)?;
        let drafters = match &self.drafter {
            Some(path) => Drafters::of_file(&model.decoder, path)?,
            None => Drafters::of_adapter(&model.decoder, adapter.as_ref(), &self.exits)?,
        };
        let examples = self.format.read(&model, &self.data)?.examples;
        let prompts: Vec<&[u32]> =
            examples.iter().map(prompt_of).filter(|p| !p.is_empty()).take(self.prompts).collect();
        let mut ways = self.ways(&model, adapter.as_ref(), &drafters)?;
        let mut progress = ctx.progress("prompts", prompts.len() as u64, Counted::Items("prompts"));
        for (index, prompt) in prompts.iter().enumerate() {
            // Every way goes first at times, and none always after the same other.
            let first = index % ways.len();
            for turn in 0..ways.len() {
                stop_if_requested()?;
                let count = ways.len();
                self.answer(&model, prompt, &mut ways[(first + turn) % count])?;
            }
            progress.set(index as u64 + 1);
        }
        progress.finish();
        self.report(ctx, &model, adapter.as_ref(), &prompts, &ways)
    }

    fn ways<'a>(
        &self,
        model: &'a LoadedModel,
        adapter: Option<&'a Adapter>,
        drafters: &'a Drafters,
    ) -> anyhow::Result<Vec<Way<'a>>> {
        let decoder = &model.decoder;
        let plain = || -> anyhow::Result<Generator<'a>> {
            Ok(Generator::new(decoder, adapter, voter("last")?, &[decoder.n_blocks()])?)
        };
        let way = |name: String, generator| Way { name, generator, answers: vec![], wall: vec![], cpu: vec![] };
        let store = drafters.store.as_ref();
        let base = Speculation { max_draft: MAX_BATCH - 1, ..Speculation::default() };
        let mut ways = vec![way("plain".into(), plain()?)];
        let mut add = |name: String, speculation: Speculation<'a>| -> anyhow::Result<()> {
            ways.push(way(name, plain()?.with_speculation(speculation)?));
            Ok(())
        };
        add("drafts from the text".into(), base)?;
        for head in &drafters.heads {
            let head = Some(head);
            let exit = head.map_or(0, |head| head.exit());
            add(format!("drafts at exit {exit}"), Speculation { head, lookup: false, ..base })?;
            add(format!("text and exit {exit}"), Speculation { head, ..base })?;
            if store.is_some() {
                add(format!("text, texts and exit {exit}"), Speculation { head, store, ..base })?;
            }
        }
        if store.is_some() {
            add("text and texts".into(), Speculation { store, ..base })?;
        }
        for &threshold in &self.confident {
            let heads = drafters.heads.iter().filter(|head| head.exit() > 0).collect();
            let generator = plain()?.with_confident_exit(ConfidentExit { heads, threshold })?;
            ways.push(way(format!("confident exit {threshold}"), generator));
        }
        Ok(ways)
    }

    fn answer(&self, model: &LoadedModel, prompt: &[u32], way: &mut Way<'_>) -> anyhow::Result<()> {
        let config = SamplingConfig { temperature: self.temp, seed: self.seed, ..SamplingConfig::default() };
        let mut sampler = Sampler::new(config)?;
        way.generator.clear();
        let mut start = None;
        let stop = &model.decoder.config().eos_token_ids;
        let answer = way.generator.generate(prompt, self.n, stop, &mut sampler, |_| {
            start.get_or_insert_with(|| (Instant::now(), cpu_ns()));
            Ok(Flow::Continue)
        })?;
        if let Some((wall, cpu)) = start {
            way.wall.push(wall.elapsed().as_secs_f64());
            let spent = cpu.zip(cpu_ns()).map_or(0, |(before, after)| after.saturating_sub(before));
            way.cpu.push(spent as f64 * 1e-9);
        } else {
            way.wall.push(0.0);
            way.cpu.push(0.0);
        }
        way.answers.push(answer);
        Ok(())
    }

    fn report(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        prompts: &[&[u32]],
        ways: &[Way<'_>],
    ) -> anyhow::Result<()> {
        let plain = &ways[0];
        let rate = |way: &Way<'_>, times: &[f64]| way.tokens() as f64 / times.iter().sum::<f64>().max(1e-9);
        let mut rows = Vec::new();
        let mut entries: Vec<Value> = Vec::new();
        for way in ways {
            let ratio = |a: &[f64], b: &[f64]| {
                let per_token = |i: usize, way: &Way<'_>, times: &[f64]| {
                    let tokens = way.answers[i].len().saturating_sub(1);
                    (tokens > 0 && times[i] > 0.0).then(|| times[i] / tokens as f64)
                };
                let each = (0..prompts.len()).filter_map(|i| Some(per_token(i, plain, a)? / per_token(i, way, b)?));
                median(&each.collect::<Vec<_>>())
            };
            let (wall, cpu) = (ratio(&plain.wall, &way.wall), ratio(&plain.cpu, &way.cpu));
            let total = rate(way, &way.wall) / rate(plain, &plain.wall);
            let same = way.answers == plain.answers;
            let loss = loss(model, adapter, prompts, &way.answers)?;
            let report = Faster::json(&way.generator);
            let passes = report["tokens_per_pass"].as_f64();
            rows.push(vec![
                way.name.clone(),
                format!("{:.1}", rate(way, &way.wall)),
                format!("{total:.2}"),
                format!("{wall:.2}"),
                format!("{cpu:.2}"),
                passes.map_or("-".into(), |passes| format!("{passes:.2}")),
                if same { "yes".into() } else { "no".into() },
                format!("{:.4}", loss.0),
                format!("{:.1}%", 100.0 * loss.1),
            ]);
            entries.push(json!({
                "name": way.name, "tokens": way.tokens(), "tokens_per_second": rate(way, &way.wall),
                "cpu_tokens_per_second": rate(way, &way.cpu), "speedup": total, "median_speedup": wall,
                "median_cpu_speedup": cpu, "identical": same, "loss": loss.0, "agreement": loss.1, "early_exits": report,
            }));
        }
        let header = [
            "generation",
            "tokens/s",
            "ratio",
            "median",
            "median of CPU",
            "tokens/pass",
            "same text",
            "loss",
            "likeliest",
        ];
        ctx.result(json!({ "prompts": prompts.len(), "ways": entries }), || table(&header, &rows))
    }
}

/// How the whole model finds the answers: mean negative log-likelihood of a token in nats, and the share of tokens that are
/// its likeliest ones.
fn loss(
    model: &LoadedModel,
    adapter: Option<&Adapter>,
    prompts: &[&[u32]],
    answers: &[Vec<u32>],
) -> anyhow::Result<(f64, f64)> {
    let decoder = &model.decoder;
    let (mut sum, mut right, mut total) = (0.0, 0usize, 0usize);
    for (prompt, answer) in prompts.iter().zip(answers).filter(|(_, answer)| !answer.is_empty()) {
        let ids: Vec<u32> = prompt.iter().chain(answer).copied().collect();
        let x = decoder.embed(&[&ids[..ids.len() - 1]])?;
        let x = decoder.run_blocks(x, 0..decoder.n_blocks(), adapter, None)?;
        let (n, d) = (answer.len(), decoder.config().hidden_size);
        let x = x.narrow(1, prompt.len() - 1, n).reshape([n, d]);
        let logits =
            edgellm::model::generate::to_vec(decoder.logits(decoder.exit_norm(x, decoder.n_blocks(), adapter)))?;
        for (row, &token) in logits.chunks_exact(decoder.config().vocab_size).zip(answer) {
            let mut row = row.to_vec();
            edgellm::model::sample::log_softmax(&mut row);
            sum -= f64::from(row[token as usize]);
            right += usize::from(edgellm::model::sample::argmax(&row) == token as usize);
            total += 1;
        }
    }
    Ok((sum / total.max(1) as f64, right as f64 / total.max(1) as f64))
}
