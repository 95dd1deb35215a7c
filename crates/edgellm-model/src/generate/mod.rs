//! Generation: prefill, then one token at a time, with the exits' vote for each; or faster, with the exits' help.
//!
//! [`Generator::with_speculation`] gives the same tokens sooner; [`Generator::with_confident_exit`] gives other tokens,
//! from as few blocks as it takes to be sure.

mod confident;
mod drafter;
mod head;
mod lookup;
mod pace;
mod speculative;

use burn::tensor::Tensor;
use edgellm_kernels::CacheType;

pub use self::confident::{ConfidentExit, ConfidentReport};
pub use self::drafter::{Drafter, DrafterParts};
pub use self::head::{DraftHead, Shortlist};
pub use self::lookup::{Guess, NgramStore, NgramText};
pub use self::pace::{MAX_BATCH, Pace, Source, SourceCount};
pub use self::speculative::{Speculation, SpeculationReport};

use self::confident::Confident;
use self::speculative::Speculative;
use crate::ModelError;
use crate::adapter::Adapter;
use crate::decoder::{Decoder, KvCache};
use crate::sample::{Sampler, argmax, log_softmax};
use crate::spans;
use crate::traits::Voter;

/// Whether to go on after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop before the token limit.
    Stop,
}

/// How tokens are found.
enum Mode<'a> {
    /// Every token through all blocks.
    Plain,
    Speculative(Box<Speculative<'a>>),
    Confident(Box<Confident<'a>>),
}

/// A model, an adapter, and how the exits vote: what a session of generation shares.
pub struct Generator<'a> {
    core: Core<'a>,
    voter: &'a dyn Voter,
    exits: Vec<usize>,
    mode: Mode<'a>,
}

/// What every way of generating needs.
struct Core<'a> {
    decoder: &'a Decoder,
    adapter: Option<&'a Adapter>,
    cache: KvCache,
}

/// What ends a text, beside the caller.
struct Limits<'a> {
    max_tokens: usize,
    stop: &'a [u32],
}

/// What a new token means for a text.
enum Next {
    /// It belongs to the text, which goes on.
    More,
    /// The text ends.
    End,
}

/// The text so far, and who wants to see it.
struct Output<'a> {
    limits: Limits<'a>,
    tokens: Vec<u32>,
    on_token: &'a mut dyn FnMut(u32) -> Result<Flow, ModelError>,
}

impl Output<'_> {
    /// Takes a token.
    fn push(&mut self, token: u32) -> Result<Next, ModelError> {
        if self.limits.stop.contains(&token) {
            return Ok(Next::End);
        }
        self.tokens.push(token);
        let full = self.tokens.len() == self.limits.max_tokens;
        Ok(if (self.on_token)(token)? == Flow::Stop || full { Next::End } else { Next::More })
    }
}

impl Core<'_> {
    /// Tokens that all blocks have seen.
    fn len(&self) -> usize {
        self.cache.len(self.decoder.n_blocks() - 1)
    }

    /// Runs `ids` through all blocks; the normalized last hidden states, `[tokens, d]`.
    fn run(&mut self, ids: &[u32]) -> Result<Tensor<2>, ModelError> {
        let hidden = self.decoder.embed(&[ids])?;
        self.finish(hidden, 0)
    }

    /// Runs hidden states from block `start` to the end; the normalized last ones, `[tokens, d]`.
    fn finish(&mut self, hidden: Tensor<3>, start: usize) -> Result<Tensor<2>, ModelError> {
        let end = self.decoder.n_blocks();
        let hidden = self.decoder.run_blocks(hidden, start..end, self.adapter, Some(&mut self.cache))?;
        Ok(self.decoder.exit_norm(rows(hidden), end, self.adapter))
    }

    /// Scores of the vocabulary for each of `normed`, `[tokens, d]`, one after the other.
    fn logits(&self, normed: Tensor<2>) -> Result<Vec<f32>, ModelError> {
        to_vec(self.decoder.logits(normed))
    }
}

impl<'a> Generator<'a> {
    /// A generator with an empty cache.
    ///
    /// `exits` are numbers of blocks, ascending, and end with the whole model. A voter that looks only at the last exit
    /// costs nothing for the others.
    ///
    /// # Errors
    /// The exits are not as described.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Option<&'a Adapter>,
        voter: &'a dyn Voter,
        exits: &[usize],
    ) -> Result<Self, ModelError> {
        let ascending = exits.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || exits.first() == Some(&0) || exits.last() != Some(&decoder.n_blocks()) {
            return Err(ModelError::Value {
                what: "exits".into(),
                expected: format!("ascending numbers of blocks that end with {}", decoder.n_blocks()),
                found: format!("{exits:?}"),
            });
        }
        let exits = if voter.needs_all_exits() { exits.to_vec() } else { vec![decoder.n_blocks()] };
        let core = Core { decoder, adapter, cache: decoder.new_cache() };
        Ok(Self { core, voter, exits, mode: Mode::Plain })
    }

    /// The same generator with an empty cache that stores keys and values as `kind` on the CPU (default: `f16`).
    #[must_use]
    pub fn with_cache_type(mut self, kind: CacheType) -> Self {
        self.core.cache = self.core.decoder.new_cache_of(kind);
        self
    }

    /// The same generator, going on with a cache that [`Generator::into_cache`] gave: its tokens were run with the same
    /// decoder and adapter.
    #[must_use]
    pub fn with_cache(mut self, cache: KvCache) -> Self {
        self.core.cache = cache;
        self
    }

    /// The cache, for a later generator: it holds what was run, and `len` of the last block says how many tokens.
    pub fn into_cache(self) -> KvCache {
        self.core.cache
    }

    /// The same generator, which drafts tokens and verifies them together: the same text, sooner.
    ///
    /// # Errors
    /// The exits vote, or a drafter does not fit the model.
    pub fn with_speculation(mut self, speculation: Speculation<'a>) -> Result<Self, ModelError> {
        self.check_alone("speculation")?;
        self.mode = Mode::Speculative(Box::new(Speculative::new(self.core.decoder, speculation)?));
        Ok(self)
    }

    /// The same generator, which takes a token from the first exit that is sure of it: another text, from fewer blocks.
    ///
    /// # Errors
    /// The exits vote, or an exit does not fit the model.
    pub fn with_confident_exit(mut self, confident: ConfidentExit<'a>) -> Result<Self, ModelError> {
        self.check_alone("confident exit")?;
        self.mode = Mode::Confident(Box::new(Confident::new(self.core.decoder, confident)?));
        Ok(self)
    }

    fn check_alone(&self, what: &str) -> Result<(), ModelError> {
        if !self.voter.needs_all_exits() {
            return Ok(());
        }
        Err(ModelError::Value {
            what: format!("vote with {what}"),
            expected: "last".into(),
            found: self.voter.name().into(),
        })
    }

    /// Forgets the text; what was learned of drafts and of times stays.
    pub fn clear(&mut self) {
        self.core.cache.truncate(0);
        match &mut self.mode {
            Mode::Plain => {}
            Mode::Speculative(speculative) => speculative.clear(),
            Mode::Confident(confident) => confident.clear(),
        }
    }

    /// What speculation did so far, if it is on.
    pub fn speculation_report(&self) -> Option<SpeculationReport> {
        match &self.mode {
            Mode::Speculative(speculative) => Some(speculative.report()),
            _ => None,
        }
    }

    /// What the confident exits did so far, if they are on.
    pub fn confident_report(&self) -> Option<ConfidentReport> {
        match &self.mode {
            Mode::Confident(confident) => Some(confident.report()),
            _ => None,
        }
    }

    /// Runs `ids` through all blocks and returns the voted log-probabilities of the token that follows, `[vocab]`.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, or weights that cannot be read.
    pub fn advance(&mut self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        let _span = pass_span(ids.len(), self.core.len()).entered();
        let core = &mut self.core;
        let mut hidden = core.decoder.embed(&[ids])?;
        let mut start = 0;
        let mut states = Vec::with_capacity(self.exits.len());
        for &exit in &self.exits {
            hidden = core.decoder.run_blocks(hidden, start..exit, core.adapter, Some(&mut core.cache))?;
            start = exit;
            let last = rows(hidden.clone().narrow(1, ids.len() - 1, 1));
            states.push(core.decoder.exit_norm(last, exit, core.adapter));
        }
        if let Some(weights) = self.voter.pool(states.len()) {
            return log_probs(core.decoder.pooled_logits(&states, &weights));
        }
        let distributions: Result<Vec<_>, _> =
            states.into_iter().map(|state| log_probs(core.decoder.logits(state))).collect();
        let distributions = distributions?;
        let views: Vec<&[f32]> = distributions.iter().map(Vec::as_slice).collect();
        let mut out = vec![0.0; core.decoder.config().vocab_size];
        self.voter.vote(&views, &mut out);
        if tracing::event_enabled!(target: spans::VOTES, tracing::Level::TRACE) {
            let token = argmax(&out);
            let won = (0..views.len()).max_by(|&a, &b| views[a][token].total_cmp(&views[b][token]));
            tracing::trace!(target: spans::VOTES, won = self.exits[won.unwrap_or_default()]);
        }
        Ok(out)
    }

    /// Generates up to `max_tokens` tokens after `prompt`; `on_token` sees each and may stop.
    ///
    /// A token of `stop` ends the text and is not part of it. Afterwards the cache holds the prompt and the text, but not
    /// the last token of a text that was cut off.
    ///
    /// # Errors
    /// See [`Generator::advance`]; or the first error of `on_token`.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        stop: &[u32],
        sampler: &mut Sampler,
        mut on_token: impl FnMut(u32) -> Result<Flow, ModelError>,
    ) -> Result<Vec<u32>, ModelError> {
        if max_tokens == 0 {
            return Ok(Vec::new());
        }
        let limits = Limits { max_tokens, stop };
        let mut output = Output { limits, tokens: Vec::new(), on_token: &mut on_token };
        match &mut self.mode {
            Mode::Plain => self.plain(prompt, sampler, &mut output)?,
            Mode::Speculative(speculative) => speculative.generate(&mut self.core, prompt, sampler, &mut output)?,
            Mode::Confident(confident) => confident.generate(&mut self.core, prompt, sampler, &mut output)?,
        }
        Ok(output.tokens)
    }

    fn plain(&mut self, prompt: &[u32], sampler: &mut Sampler, output: &mut Output<'_>) -> Result<(), ModelError> {
        let mut scores = self.scores(prompt)?;
        loop {
            let token = sampler.sample(&scores);
            match output.push(token)? {
                Next::End => return Ok(()),
                Next::More => scores = self.scores(&[token])?,
            }
        }
    }

    /// What the next token is drawn from: the vote, or the last exit's logits as they are.
    fn scores(&mut self, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
        if self.voter.needs_all_exits() {
            return self.advance(ids);
        }
        let _span = pass_span(ids.len(), self.core.len()).entered();
        let normed = self.core.run(ids)?;
        self.core.logits(normed.narrow(0, ids.len() - 1, 1))
    }
}

/// The span of a pass: of a prompt's tokens, or of one after others.
fn pass_span(tokens: usize, past: usize) -> tracing::Span {
    if tokens == 1 && past > 0 {
        tracing::debug_span!("decode", tokens)
    } else {
        tracing::debug_span!("prefill", tokens)
    }
}

/// One sequence's hidden states, `[1, tokens, d]`, as `[tokens, d]`.
fn rows(hidden: Tensor<3>) -> Tensor<2> {
    let [batch, tokens, d] = hidden.dims();
    hidden.reshape([batch * tokens, d])
}

/// Log-probabilities from one token's logits, `[1, vocab]`.
fn log_probs(logits: Tensor<2>) -> Result<Vec<f32>, ModelError> {
    let mut row = to_vec(logits)?;
    log_softmax(&mut row);
    Ok(row)
}

/// The f32 values of a tensor.
///
/// # Errors
/// The device fails to hand them over.
pub fn to_vec<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, ModelError> {
    tensor.into_data().convert::<f32>().try_into_vec::<f32>().map_err(|e| ModelError::Value {
        what: "tensor data".into(),
        expected: "f32 values".into(),
        found: format!("{e:?}"),
    })
}
