//! `edgellm draft`: fits a drafter for speculation to a model, from texts that the model writes itself.

use std::path::PathBuf;

use clap::Args;
use edgellm::model::adapter::Adapter;
use edgellm::model::data::Example;
use edgellm::model::generate::{DrafterParts, Flow, Generator, Shortlist, Speculation};
use edgellm::model::sample::{Sampler, SamplingConfig};
use edgellm::session::LoadedModel;
use edgellm::tune::lens::{OwnText, fit_lens};
use edgellm::tune::voters::voter;
use serde_json::json;

use super::data::DataArgs;
use super::failure::Usage;
use super::memory::Room;
use super::progress::Counted;
use super::run_adapters::load_adapter;
use super::{Context, check_output_file, stop_if_requested};

/// Fit a drafter, which makes generation faster and leaves the text as it is
#[derive(Args)]
pub(crate) struct Draft {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// The adapter that will be used with it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Examples whose prompts the model answers: JSON lines
    #[arg(long, value_name = "TRAIN.jsonl")]
    data: PathBuf,
    #[command(flatten)]
    format: DataArgs,
    /// Blocks below the exit that drafts; 0 drafts from the embedding and the last state
    #[arg(long, default_value_t = 0, value_name = "E")]
    exit: usize,
    /// Prompts to answer at most
    #[arg(long, default_value_t = 1000, value_name = "N")]
    prompts: usize,
    /// Tokens of an answer at most
    #[arg(short, default_value_t = 80, value_name = "N")]
    n: usize,
    /// Tokens that the exit can name: the most frequent ones
    #[arg(long, default_value_t = 8192, value_name = "N")]
    shortlist: usize,
    /// The drafter to write
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
}

/// The prompt of an example: what comes before the first token that the loss looks at.
pub(crate) fn prompt_of(example: &Example) -> &[u32] {
    let end = (0..example.ids.len()).find(|&position| example.is_target(position)).unwrap_or(example.ids.len());
    &example.ids[..end]
}

impl Draft {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        self.format.check([&self.data])?;
        check_output_file(&self.output)?;
        if self.prompts < 10 || self.n < 2 || self.shortlist == 0 {
            let text = "expected at least 10 --prompts, 2 tokens (-n) and 1 token in --shortlist";
            return Err(Usage(text.into()).into());
        }
        let model = ctx.load(&self.model, Room::PASSES)?;
        if self.exit >= model.decoder.n_blocks() {
            let most = model.decoder.n_blocks() - 1;
            return Err(Usage(format!("--exit: expected at most {most} blocks, found {}", self.exit)).into());
        }
        let adapter = load_adapter(self.adapter.as_deref(), &model)?;
        let examples = self.format.read(&model, &self.data)?.examples;
        let texts = self.texts(ctx, &model, adapter.as_ref(), &examples)?;
        let shortlist = frequent(&texts, model.decoder.config().vocab_size, self.shortlist);
        let rows = Shortlist::new(&model.decoder, &shortlist)?;
        let mut progress = ctx.progress("lens", texts.len() as u64, Counted::Items("texts"));
        let on_text = &mut |done: usize| progress.set(done as u64);
        let lens = fit_lens(&model.decoder, adapter.as_ref(), self.exit, &texts, &rows, on_text)?;
        progress.finish();
        let tokens: usize = texts.iter().map(|text| text.ids.len() - text.prompt).sum();
        let parts = DrafterParts {
            exit: self.exit,
            lens: lens.values,
            temperature: lens.temperature,
            shortlist,
            texts: texts.into_iter().map(|text| text.ids).collect(),
        };
        parts.save(&self.output)?;
        let json = json!({
            "path": self.output, "exit": self.exit, "texts": parts.texts.len(), "tokens": tokens,
            "shortlist": parts.shortlist.len(), "temperature": parts.temperature, "agreement": lens.agreement,
        });
        ctx.result(json, || {
            format!(
                "wrote {}: {} texts with {tokens} tokens of the model's own; the exit after {} blocks names the model's \
                 token {:.1}% of the time\n",
                self.output.display(),
                parts.texts.len(),
                self.exit,
                100.0 * lens.agreement
            )
        })
    }

    /// The model's answers to the prompts.
    fn texts(
        &self,
        ctx: &Context,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        examples: &[Example],
    ) -> anyhow::Result<Vec<OwnText>> {
        let decoder = &model.decoder;
        let generator = Generator::new(decoder, adapter, voter("last")?, &[decoder.n_blocks()])?;
        let mut generator = generator.with_speculation(Speculation::default())?;
        let mut sampler = Sampler::new(SamplingConfig::default())?;
        let count = examples.len().min(self.prompts);
        let mut progress = ctx.progress("texts", count as u64, Counted::Items("texts"));
        let mut texts = Vec::with_capacity(count);
        for (index, example) in examples[..count].iter().enumerate() {
            stop_if_requested()?;
            let prompt = prompt_of(example);
            if prompt.is_empty() {
                continue;
            }
            generator.clear();
            let stop = &decoder.config().eos_token_ids;
            let answer = generator.generate(prompt, self.n, stop, &mut sampler, |_| Ok(Flow::Continue))?;
            let mut ids = prompt.to_vec();
            ids.extend(answer);
            texts.push(OwnText { ids, prompt: prompt.len() });
            progress.set(index as u64 + 1);
        }
        progress.finish();
        Ok(texts)
    }
}

/// The `n` most frequent tokens of the texts; where they have fewer, the first tokens of the vocabulary, which are those
/// that the tokenizer merged first.
fn frequent(texts: &[OwnText], vocab: usize, n: usize) -> Vec<u32> {
    let mut counts = vec![0u32; vocab];
    texts.iter().flat_map(|text| &text.ids).for_each(|&id| counts[id as usize] += 1);
    let mut ids: Vec<u32> = (0..vocab as u32).collect();
    ids.sort_by_key(|&id| (std::cmp::Reverse(counts[id as usize]), id));
    ids.truncate(n);
    ids
}
