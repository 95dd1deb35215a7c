//! Text: the prompt in parts that can be cancelled, then token by token, with what the cache still knows.

use std::time::Instant;

use edgellm::model::ModelError;
use edgellm::model::decoder::KvCache;
use edgellm::model::generate::{Flow, Generator};
use edgellm::model::sample::Sampler;
use edgellm::tune::voters::voter;

use crate::control::Control;
use crate::load::Work;
use crate::stop::StopFilter;
use crate::{EngineError, Finish, GenerateOptions, Generation, Result, TokenListener};

/// Tokens of a prompt between two looks at whether the call is cancelled.
const PROMPT_PART: usize = 128;

/// What a cache holds.
pub(crate) struct Seen {
    cache: KvCache,
    ids: Vec<u32>,
}

/// Answers a prompt.
pub(crate) fn answer(
    work: &mut Work,
    control: &Control,
    ids: Vec<u32>,
    options: &GenerateOptions,
    listener: Option<&dyn TokenListener>,
) -> Result<Generation> {
    let start = Instant::now();
    let mut sampler = Sampler::new(options.sampling())?;
    let limit = limit(work, ids.len(), options)?;
    let (cache, reused) = reusable(work, &ids);
    let last = voter("last")?;
    let exits = [work.decoder.n_blocks()];
    let mut generator = Generator::new(&work.decoder, work.adapter(), last, &exits)?.with_cache(cache);
    let mut speech = Speech::new(work, control, options, listener, start);
    let mut tokens = Vec::new();
    // All but the last part only fill the cache.
    let mut parts: Vec<&[u32]> = ids[reused..].chunks(PROMPT_PART).collect();
    let rest = parts.pop().unwrap_or_default();
    for part in parts {
        if control.is_cancelled() {
            speech.finish = Some(Finish::Cancelled);
            break;
        }
        generator.advance(part)?;
    }
    if speech.finish.is_none() {
        let ends = &work.decoder.config().eos_token_ids;
        let outcome = generator.generate(rest, limit, ends, &mut sampler, |token| speech.take(token));
        // The listener's own error says more than the one it became.
        if let Some(error) = speech.failure.take() {
            return Err(error);
        }
        tokens = outcome?;
    }
    let cache = generator.into_cache();
    let generation = speech.end(&tokens, limit, ids.len(), reused)?;
    let known = cache.len(work.decoder.n_blocks() - 1);
    let ids: Vec<u32> = ids.into_iter().chain(tokens).take(known).collect();
    work.seen = Some(Seen { cache, ids });
    Ok(generation)
}

/// Tokens that the answer may have.
fn limit(work: &Work, prompt: usize, options: &GenerateOptions) -> Result<usize> {
    if options.max_tokens == 0 {
        return Err(EngineError::argument("max_tokens", "at least 1", 0));
    }
    if prompt == 0 {
        return Err(EngineError::argument("prompt", "at least one token", "none"));
    }
    if prompt >= work.context {
        let expected = format!("fewer than {} tokens, the context", work.context);
        return Err(EngineError::argument("prompt", expected, prompt));
    }
    Ok((options.max_tokens as usize).min(work.context - prompt))
}

/// The cache of the text before as far as it began with the same tokens, or an empty one. At least one token is left to
/// run.
fn reusable(work: &mut Work, ids: &[u32]) -> (KvCache, usize) {
    let Some(Seen { mut cache, ids: seen }) = work.seen.take() else { return (work.decoder.new_cache(), 0) };
    let same = seen.iter().zip(&ids[..ids.len() - 1]).take_while(|(a, b)| a == b).count();
    cache.truncate(same);
    (cache, same)
}

/// The answer as it comes.
struct Speech<'a> {
    control: &'a Control,
    listener: Option<&'a dyn TokenListener>,
    stream: edgellm::model::tokenizer::StreamDecoder<'a>,
    stops: StopFilter<'a>,
    text: String,
    finish: Option<Finish>,
    failure: Option<EngineError>,
    start: Instant,
    first: Option<f64>,
}

impl<'a> Speech<'a> {
    fn new(
        work: &'a Work,
        control: &'a Control,
        options: &'a GenerateOptions,
        listener: Option<&'a dyn TokenListener>,
        start: Instant,
    ) -> Self {
        Self {
            control,
            listener,
            stream: work.tokenizer.stream(true),
            stops: StopFilter::new(&options.stop),
            text: String::new(),
            finish: None,
            failure: None,
            start,
            first: None,
        }
    }

    /// Takes a token; says whether to go on.
    fn take(&mut self, token: u32) -> Result<Flow, ModelError> {
        self.first.get_or_insert_with(|| self.start.elapsed().as_secs_f64());
        let piece = self.stream.push(token)?;
        let (piece, stopped) = self.stops.push(&piece);
        self.show(piece);
        if stopped && self.finish.is_none() {
            self.finish = Some(Finish::StopText);
        }
        if self.control.is_cancelled() && self.finish.is_none() {
            self.finish = Some(Finish::Cancelled);
        }
        Ok(if self.finish.is_some() || self.failure.is_some() { Flow::Stop } else { Flow::Continue })
    }

    /// Gives a piece to the listener.
    fn show(&mut self, piece: String) {
        if piece.is_empty() {
            return;
        }
        self.text.push_str(&piece);
        match self.listener.map_or(Ok(true), |listener| listener.on_token(piece)) {
            Ok(true) => {}
            Ok(false) => self.finish = Some(Finish::Cancelled),
            Err(error) => self.failure = Some(error.into()),
        }
    }

    /// Shows what was held back, unless a stop text came, and sums up.
    fn end(mut self, tokens: &[u32], limit: usize, prompt: usize, reused: usize) -> Result<Generation> {
        let ended = self.finish;
        if ended != Some(Finish::StopText) {
            let rest = self.stream.clone().finish()?;
            let (piece, stopped) = self.stops.push(&rest);
            let held = std::mem::replace(&mut self.stops, StopFilter::new(&[])).finish();
            let rest = if stopped { piece } else { piece + &held };
            // After a listener has said to end, it gets nothing more.
            if ended.is_none() {
                self.show(rest);
            }
        }
        if let Some(error) = self.failure {
            return Err(error);
        }
        let whole = if tokens.len() == limit { Finish::Length } else { Finish::EndOfText };
        let seconds = self.start.elapsed().as_secs_f64();
        Ok(Generation {
            text: self.text,
            tokens: tokens.len() as u32,
            prompt_tokens: prompt as u32,
            reused_tokens: reused as u32,
            finish: self.finish.unwrap_or(whole),
            first_token_seconds: self.first.unwrap_or(seconds),
            seconds,
        })
    }
}
