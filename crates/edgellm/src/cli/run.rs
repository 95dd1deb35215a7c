//! `edgellm run`: generates text after a prompt, or chats; with an adapter and the vote of the exits.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use edgellm::eval::peak_rss_bytes;
use edgellm::kernels::CacheType;
use edgellm::model::ModelError;
use edgellm::model::adapter::{Adapter, even_exits};
use edgellm::model::chat::{ChatMessage, ChatTemplate};
use edgellm::model::generate::{Flow, Generator};
use edgellm::model::io::read_text;
use edgellm::model::sample::Sampler;
use edgellm::model::tokenizer::Tokenizer;
use edgellm::model::traits::Voter;
use edgellm::session::LoadedModel;
use serde_json::{Value, json};

use super::failure::{Interrupted, Usage};
use super::memory::{Room, streaming_json};
use super::output::{print, seconds};
use super::prompt::{encode_prompt, read_messages, render};
use super::run_adapters::{self, AdapterArgs, Line, Votes};
use super::sampling::SamplingArgs;
use super::speculation::{Drafters, Faster};
use super::{Context, check_output_file, interrupt, logits, vote};

/// Exits that vote where no adapter says which.
const DEFAULT_EXITS: usize = 4;

/// Bytes of text that make a token, at least as a rule.
const BYTES_PER_TOKEN: usize = 3;
/// Tokens that a chat template adds, and those of a few turns of a conversation.
const TEMPLATE_TOKENS: usize = 256;

/// Generate text, or chat
#[derive(Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub(crate) struct Run {
    /// The model: a folder, a GGUF file, or a stored name
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// The prompt: a user's message if the model has a chat template, else the start of a text
    #[arg(short, long, group = "input")]
    prompt: Option<String>,
    /// A file with the prompt
    #[arg(short, long, value_name = "FILE", group = "input")]
    file: Option<PathBuf>,
    /// A JSON file with chat messages: [{"role": "user", "content": "..."}, ...]
    #[arg(long, value_name = "FILE", group = "input")]
    messages: Option<PathBuf>,
    /// Talk to the model: reads messages from standard input, one a line
    #[arg(long, group = "input")]
    chat: bool,
    /// Take the prompt as it is: no chat template, no added tokens
    #[arg(long, conflicts_with_all = ["chat", "messages", "system"])]
    raw: bool,
    /// A system message before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Only print the prompt that the model would see, with its tokens
    #[arg(long, conflicts_with_all = ["chat", "dump_logits"])]
    render_only: bool,
    /// Tokens to generate at most (of each answer)
    #[arg(short, default_value_t = 256, value_name = "N")]
    n: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// How the exits decide together: last, max, renorm-max, mean; with a fitted adapter also weighted, calibrated-max,
    /// calibrated-renorm-max, calibrated-mean
    #[arg(long, default_value = "last")]
    vote: String,
    /// How keys and values of earlier tokens are kept on the CPU: f16, int8 or f32
    #[arg(long, default_value = "f16", value_name = "TYPE")]
    kv_cache: CacheType,
    #[command(flatten)]
    faster: Faster,
    /// Write the logits of every position of the prompt
    #[arg(long, value_name = "OUT.safetensors", conflicts_with = "chat")]
    dump_logits: Option<PathBuf>,
}

/// One answer.
struct Answer {
    text: String,
    token_ids: Vec<u32>,
    /// The whole prompt's.
    prompt_tokens: usize,
    /// Those of them that were not in the cache.
    prefill_tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
}

impl Answer {
    /// Rate of the tokens after the first, which the prefill gives.
    fn tokens_per_second(&self) -> Option<f64> {
        let decoded = self.token_ids.len().saturating_sub(1) as f64;
        (self.decode_seconds > 0.0 && decoded > 0.0).then(|| decoded / self.decode_seconds)
    }

    fn json(&self) -> Value {
        json!({
            "text": self.text, "token_ids": self.token_ids, "prompt_tokens": self.prompt_tokens,
            "prefill_seconds": self.prefill_seconds, "decode_seconds": self.decode_seconds,
            "tokens_per_second": self.tokens_per_second(), "peak_rss_bytes": peak_rss_bytes(),
        })
    }

    fn timing(&self) -> String {
        let prefill = self.prefill_tokens as f64 / self.prefill_seconds.max(1e-9);
        let mut text = format!(
            "prompt: {} tokens in {} ({prefill:.1} tokens/s)",
            self.prefill_tokens,
            seconds(self.prefill_seconds)
        );
        if let Some(rate) = self.tokens_per_second() {
            let took = seconds(self.decode_seconds);
            text.push_str(&format!("; text: {} tokens in {took} ({rate:.1} tokens/s)", self.token_ids.len()));
        }
        text
    }
}

impl Run {
    /// Keys and values of the prompt, of which nothing more is known yet than its length in bytes, and of the text.
    fn room(&self) -> Room {
        let file = self.file.as_ref().or(self.messages.as_ref()).and_then(|path| path.metadata().ok());
        let in_file = file.map_or(0, |metadata| usize::try_from(metadata.len()).unwrap_or(usize::MAX / 4));
        let given = self.prompt.as_ref().map_or(0, String::len) + self.system.as_ref().map_or(0, String::len);
        Room::text((in_file + given) / BYTES_PER_TOKEN + TEMPLATE_TOKENS, self.n)
    }

    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let mut sampler = self.sampling.sampler()?;
        if let Some(path) = &self.dump_logits {
            check_output_file(path)?;
        }
        self.adapters.check()?;
        vote::check_name(&self.vote, self.adapters.chosen_dir()?.as_deref())?;
        if self.render_only {
            return self.render(ctx);
        }
        let mut model = ctx.load(&self.model, self.room())?;
        self.adapters.load(&mut model)?;
        let adapter = model.adapters.current();
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let votes = self.adapters.votes(&self.vote, &model)?;
        let vote = votes.of(model.adapters.chosen());
        if vote.needs_all_exits() && adapter.is_none_or(|a| a.exits().is_empty()) {
            ctx.say("note: without an adapter the early exits are untrained; their vote is poor");
        }
        let drafters = self.faster.load(&model.decoder, adapter)?;
        let mut speaker = Speaker {
            ctx,
            faster: &self.faster,
            drafters: &drafters,
            model: &model,
            adapter,
            vote,
            exits,
            n: self.n,
            kv_cache: self.kv_cache,
        };
        if self.chat {
            return self.converse(&mut speaker, &votes, &mut sampler);
        }
        let ids = self.prompt_ids(&model)?;
        if let Some(path) = &self.dump_logits {
            logits::dump(ctx, &model.decoder, adapter, &ids, path)?;
            ctx.say(&format!("wrote {}", path.display()));
        }
        let mut generator = speaker.generator()?;
        let answer = speaker.answer(&mut generator, &ids, ids.len(), &mut sampler)?;
        speaker.end_of_answer(&answer)?;
        if let Some(text) = Faster::summary(&generator) {
            ctx.say(&text);
        }
        if ctx.json {
            let mut json = answer.json();
            json["early_exits"] = Faster::json(&generator);
            json["streaming"] = streaming_json(model.streaming.as_ref());
            ctx.result(json, String::new)?;
        }
        if interrupt::requested() {
            return Err(Interrupted("stopped by a signal".into()).into());
        }
        Ok(())
    }

    /// The prompt's text and whether it is a message.
    fn prompt_text(&self) -> anyhow::Result<Option<String>> {
        match (&self.prompt, &self.file) {
            (Some(text), _) => Ok(Some(text.clone())),
            (None, Some(path)) => Ok(Some(read_text(path)?)),
            (None, None) => Ok(None),
        }
    }

    /// The prompt as the model sees it.
    fn prompt_ids(&self, model: &LoadedModel) -> anyhow::Result<Vec<u32>> {
        let (_, ids) = self.rendered(&model.tokenizer, model.chat_template.as_ref())?;
        if ids.is_empty() {
            return Err(Usage("the prompt: expected at least one token, found none".into()).into());
        }
        Ok(ids)
    }

    fn rendered(&self, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> anyhow::Result<(String, Vec<u32>)> {
        let system = self.system.iter().map(|text| ChatMessage::new("system", text));
        if let Some(path) = &self.messages {
            let mut messages: Vec<ChatMessage> = system.collect();
            messages.extend(read_messages(path)?);
            return render(tokenizer, template, &messages);
        }
        let text = self.prompt_text()?.unwrap_or_default();
        if !self.raw && template.is_some() {
            let mut messages: Vec<ChatMessage> = system.collect();
            messages.push(ChatMessage::new("user", text.as_str()));
            return render(tokenizer, template, &messages);
        }
        if self.system.is_some() {
            return Err(Usage("--system goes with a chat template, which this model does not have".into()).into());
        }
        let ids = encode_prompt(tokenizer, &text, self.raw)?;
        Ok((text, ids))
    }

    /// `--render-only`: needs the tokenizer and the template, not the weights.
    fn render(&self, ctx: &Context) -> anyhow::Result<()> {
        let path = ctx.store.resolve(&self.model)?;
        let files = edgellm::model::files::ModelFiles::open(&path)?;
        let (text, ids) = self.rendered(&files.tokenizer()?, files.chat_template()?.as_ref())?;
        ctx.result(json!({"text": text, "token_ids": ids}), || format!("{text}\n"))
    }

    /// `--chat`: one answer per line of standard input, until it ends.
    fn converse<'a>(&self, speaker: &mut Speaker<'a>, votes: &'a Votes, sampler: &mut Sampler) -> anyhow::Result<()> {
        let (ctx, model) = (speaker.ctx, speaker.model);
        if model.chat_template.is_none() {
            return Err(Usage(format!("--chat: {} has no chat template; use -p", self.model)).into());
        }
        let mut messages: Vec<ChatMessage> = self.system.iter().map(|text| ChatMessage::new("system", text)).collect();
        let mut turns = Vec::new();
        let mut generator = speaker.generator()?;
        let mut seen: Vec<u32> = Vec::new();
        let mut adapter = model.adapters.chosen().map(str::to_owned);
        let interactive = std::io::stdin().is_terminal();
        if interactive {
            ctx.say("one message a line; Ctrl-C stops an answer, Ctrl-D ends the conversation");
        }
        loop {
            let Some(line) = read_line(interactive)? else { break };
            if line.trim().is_empty() {
                continue;
            }
            if line.starts_with("/adapter ") && !speaker.drafters.heads.is_empty() {
                ctx.say("error: the exit that drafts belongs to this adapter; start again to change it");
                continue;
            }
            match run_adapters::command(ctx, &line, &model.adapters, &mut adapter) {
                Line::Message => {}
                Line::Done => continue,
                Line::Use(used) => {
                    (speaker.adapter, speaker.exits) = (used, exits(used, model.decoder.n_blocks())?);
                    speaker.vote = votes.of(adapter.as_deref());
                    // Keys and values of the other adapter: the whole conversation is run again.
                    seen.clear();
                    continue;
                }
            }
            messages.push(ChatMessage::new("user", line));
            let (_, ids) = render(&model.tokenizer, model.chat_template.as_ref(), &messages)?;
            // What the cache has seen stays, if the conversation so far reads the same.
            if seen.is_empty() || seen.len() >= ids.len() || !ids.starts_with(&seen) {
                generator = speaker.generator()?;
                seen.clear();
            }
            let answer = speaker.answer(&mut generator, &ids[seen.len()..], ids.len(), sampler)?;
            speaker.end_of_answer(&answer)?;
            let cut = interrupt::take() || answer.token_ids.len() == speaker.limit(ids.len());
            seen = ids;
            // The last token of an answer that was cut off has not been run.
            seen.extend(&answer.token_ids[..answer.token_ids.len().saturating_sub(usize::from(cut))]);
            messages.push(ChatMessage::new("assistant", answer.text.as_str()));
            turns.push(answer.json());
        }
        if ctx.json { ctx.result(json!({ "turns": turns }), String::new) } else { Ok(()) }
    }
}

/// A line of standard input without its end; `None` at the end of the input.
fn read_line(interactive: bool) -> anyhow::Result<Option<String>> {
    if interactive {
        super::output::prompt("> ");
    }
    let mut line = String::new();
    let read = interrupt::while_waiting(|| std::io::stdin().lock().read_line(&mut line));
    match read {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(line.trim_end_matches(['\n', '\r']).to_string())),
        Err(e) => Err(anyhow::Error::new(e).context("cannot read standard input")),
    }
}

/// The exits that vote: the adapter's, or evenly spaced ones.
pub(crate) fn exits(adapter: Option<&Adapter>, n_blocks: usize) -> Result<Vec<usize>, ModelError> {
    let mut exits = adapter.map(Adapter::exits).unwrap_or_default();
    if exits.is_empty() {
        return even_exits(n_blocks, DEFAULT_EXITS.min(n_blocks));
    }
    if exits.last() != Some(&n_blocks) {
        exits.push(n_blocks);
    }
    Ok(exits)
}

/// What produces answers: a model with its adapter and vote.
struct Speaker<'a> {
    ctx: &'a Context,
    faster: &'a Faster,
    drafters: &'a Drafters,
    model: &'a LoadedModel,
    adapter: Option<&'a Adapter>,
    vote: &'a dyn Voter,
    kv_cache: CacheType,
    exits: Vec<usize>,
    n: usize,
}

impl<'a> Speaker<'a> {
    fn generator(&self) -> anyhow::Result<Generator<'a>> {
        let generator = Generator::new(&self.model.decoder, self.adapter, self.vote, &self.exits)?;
        self.faster.apply(generator.with_cache_type(self.kv_cache), self.drafters)
    }

    /// Tokens that an answer to `prompt` tokens may have.
    fn limit(&self, prompt: usize) -> usize {
        self.n.min(self.model.decoder.config().max_position_embeddings.saturating_sub(prompt))
    }

    /// Generates after the last `ids` of a prompt of `total` tokens, printing the text as it comes.
    fn answer(
        &self,
        generator: &mut Generator<'_>,
        ids: &[u32],
        total: usize,
        sampler: &mut Sampler,
    ) -> anyhow::Result<Answer> {
        let config = self.model.decoder.config();
        if total > config.max_position_embeddings {
            let most = config.max_position_embeddings;
            anyhow::bail!("the prompt: expected at most {most} tokens, what the model was made for, found {total}");
        }
        let mut stream = self.model.tokenizer.stream(true);
        let mut text = String::new();
        let mut failure = None;
        let start = Instant::now();
        let mut first = None;
        let token_ids = generator.generate(ids, self.limit(total), &config.eos_token_ids, sampler, |token| {
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
            let piece = stream.push(token)?;
            text.push_str(&piece);
            if let Err(error) = self.show(&piece) {
                failure = Some(error);
                return Ok(Flow::Stop);
            }
            Ok(if interrupt::requested() { Flow::Stop } else { Flow::Continue })
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        let rest = stream.finish()?;
        text.push_str(&rest);
        self.show(&rest)?;
        let whole = start.elapsed().as_secs_f64();
        let prefill_seconds = first.unwrap_or(whole);
        Ok(Answer {
            text,
            token_ids,
            prompt_tokens: total,
            prefill_tokens: ids.len(),
            prefill_seconds,
            decode_seconds: whole - prefill_seconds,
        })
    }

    /// Shows a piece of an answer as it comes; with `--json` the whole comes at the end.
    fn show(&self, piece: &str) -> anyhow::Result<()> {
        if self.ctx.json || piece.is_empty() { Ok(()) } else { print(piece) }
    }

    /// Ends the line on standard output and reports the times.
    fn end_of_answer(&self, answer: &Answer) -> anyhow::Result<()> {
        if !self.ctx.json && !answer.token_ids.is_empty() {
            print("\n")?;
        }
        if !answer.token_ids.is_empty() {
            self.ctx.say(&answer.timing());
        }
        Ok(())
    }
}
