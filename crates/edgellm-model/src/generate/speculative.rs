//! Self-speculation: draft some tokens cheaply, verify them in one pass (Leviathan et al., 2023; Chen et al., 2023).
//!
//! Drafts come from what the text and a drafter's texts held before ([`super::lookup`]) and from an early exit of the same
//! model (LayerSkip, Elhoushi et al., ACL 2024, section 4.3; Draft & Verify, Zhang et al., ACL 2024). A token that was
//! drafted at the exit has been through the blocks below it: its hidden state and those blocks' keys and values are kept,
//! and verification runs only the blocks above, on all tokens at once. What was rejected is cut off every block's cache.
//!
//! A draft is one token, a point. For it the rule of Leviathan et al. (appendix A.1: keep the draft `x` with probability
//! `min(1, p(x) / q(x))`, else draw from `norm(max(0, p - q))`) is to draw from `p` and keep the draft if that is what was
//! drawn. So every token is drawn as plain decoding draws it, from the same scores with the same random numbers: not the
//! distribution alone, the text is the same for a seed. The scores are the same because up to [`MAX_BATCH`] tokens do not
//! change each other's sums.

use std::time::Instant;

use burn::tensor::Tensor;

use super::head::DraftHead;
use super::lookup::{LONGEST, NgramStore, NgramText};
use super::pace::{MAX_BATCH, Pace, Plan, Source, SourceCount};
use super::{Core, Next, Output, rows};
use crate::ModelError;
use crate::decoder::Decoder;
use crate::sample::{Sampler, argmax, log_softmax};

/// How to draft.
#[derive(Clone, Copy, Debug)]
pub struct Speculation<'a> {
    /// An early exit that drafts.
    pub head: Option<&'a DraftHead>,
    /// Texts to look drafts up in, beside the text so far.
    pub store: Option<&'a NgramStore>,
    /// Whether drafts are looked up in the text so far.
    pub lookup: bool,
    /// Most drafts of a pass, from 1 to 7.
    pub max_draft: usize,
    /// Whether the measured times and rates decide how far to draft; otherwise all drafts are made and verified.
    pub adaptive: bool,
}

impl Default for Speculation<'_> {
    fn default() -> Self {
        Self { head: None, store: None, lookup: true, max_draft: MAX_BATCH - 1, adaptive: true }
    }
}

/// What speculation did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SpeculationReport {
    /// Tokens that came out of passes, those of prefills not counted.
    pub tokens: usize,
    /// Passes.
    pub passes: usize,
    /// Passes without a draft: plain decoding.
    pub plain_passes: usize,
    /// Verified drafts from the text so far.
    pub text: SourceCount,
    /// Verified drafts from the drafter's texts.
    pub store: SourceCount,
    /// Verified drafts from the exit.
    pub exit: SourceCount,
}

impl SpeculationReport {
    /// Tokens of a pass, on average.
    pub fn tokens_per_pass(&self) -> f64 {
        self.tokens as f64 / self.passes.max(1) as f64
    }
}

pub(super) struct Speculative<'a> {
    config: Speculation<'a>,
    pace: Pace,
    text: NgramText,
    tokens: usize,
    passes: usize,
    plain_passes: usize,
}

/// The drafts of a pass while they are made.
struct Drafting {
    plan: Plan,
    /// States at the exit, `[1, 1, d]` each, of the pending token and the first drafts.
    states: Vec<Tensor<3>>,
    /// A token's index and the normalized last state of the token before it: its own, or the exit's estimate.
    before: (usize, Tensor<2>),
    seconds: f64,
}

impl<'a> Speculative<'a> {
    pub(super) fn new(decoder: &Decoder, config: Speculation<'a>) -> Result<Self, ModelError> {
        let fits = config.head.is_none_or(|head| head.exit() < decoder.n_blocks());
        if config.max_draft == 0 || config.max_draft >= MAX_BATCH || !fits {
            return Err(ModelError::Value {
                what: "drafts of a pass".into(),
                expected: format!("from 1 to {}, at an exit of the model", MAX_BATCH - 1),
                found: config.max_draft.to_string(),
            });
        }
        let pace = Pace::new(config.max_draft);
        Ok(Self { config, pace, text: NgramText::default(), tokens: 0, passes: 0, plain_passes: 0 })
    }

    pub(super) fn clear(&mut self) {
        self.text.clear();
    }

    pub(super) fn report(&self) -> SpeculationReport {
        SpeculationReport {
            tokens: self.tokens,
            passes: self.passes,
            plain_passes: self.plain_passes,
            text: self.pace.text_counts(),
            store: self.pace.store_counts(),
            exit: self.pace.exit_counts(),
        }
    }

    pub(super) fn generate(
        &mut self,
        core: &mut Core<'_>,
        prompt: &[u32],
        sampler: &mut Sampler,
        output: &mut Output<'_>,
    ) -> Result<(), ModelError> {
        prompt.iter().for_each(|&token| self.text.push(token));
        let span = tracing::debug_span!("prefill", tokens = prompt.len()).entered();
        let normed = core.run(prompt)?;
        let mut state = normed.narrow(0, prompt.len() - 1, 1);
        let mut pending = sampler.sample(&core.logits(state.clone())?);
        drop(span);
        while let Next::More = output.push(pending)? {
            self.text.push(pending);
            match self.pass(core, pending, state, sampler, output)? {
                Some(next) => (pending, state) = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Runs the pending token with drafts after it; the next pending token and the last state before it, or `None` where
    /// the text ends. All but the last token that comes out are in the caches afterwards.
    fn pass(
        &mut self,
        core: &mut Core<'_>,
        pending: u32,
        state: Tensor<2>,
        sampler: &mut Sampler,
        output: &mut Output<'_>,
    ) -> Result<Option<(u32, Tensor<2>)>, ModelError> {
        let span = tracing::debug_span!("decode", tokens = tracing::field::Empty).entered();
        let base = core.len();
        let room = output.limits.max_tokens - output.tokens.len();
        let mut drafting = self.draft(core, pending, state, room)?;
        let (spent, ran) = (drafting.seconds, drafting.states.len());
        let drafts = match self.config.adaptive {
            true => self.pace.choose(&drafting.plan, spent, ran),
            false => drafting.plan.tokens.len(),
        };
        let mut tokens = vec![pending];
        tokens.extend(&drafting.plan.tokens[..drafts]);
        drafting.states.truncate(tokens.len());
        let (normed, logits) = self.verify(core, &tokens, drafting.states)?;
        self.passes += 1;
        self.plain_passes += usize::from(drafts == 0);
        let vocab = core.decoder.config().vocab_size;
        for (index, scores) in logits.chunks_exact(vocab).enumerate() {
            let token = sampler.sample(scores);
            self.tokens += 1;
            span.record("tokens", index + 1);
            let draft = tokens.get(index + 1).copied();
            if let Some(draft) = draft {
                self.pace.note(drafting.plan.sources[index], draft == token);
            }
            if draft == Some(token) {
                if let Next::More = output.push(token)? {
                    self.text.push(token);
                    continue;
                }
                core.cache.truncate(base + index + 1);
                return Ok(None);
            }
            core.cache.truncate(base + index + 1);
            return Ok(Some((token, normed.narrow(0, index, 1))));
        }
        unreachable!("the last token has no draft after it")
    }

    /// Drafts after the pending token, with `room` for so many tokens in all.
    fn draft(
        &mut self,
        core: &mut Core<'_>,
        pending: u32,
        state: Tensor<2>,
        room: usize,
    ) -> Result<Drafting, ModelError> {
        let mut drafting = Drafting { plan: Plan::new(), states: Vec::new(), before: (0, state), seconds: 0.0 };
        if !self.pace.has_times() {
            // The first pass tells what plain decoding takes.
            return Ok(drafting);
        }
        let most = self.pace.max_draft().min(room.saturating_sub(1));
        while drafting.plan.tokens.len() < most {
            let looked_up = self.look_up(&drafting.plan.tokens);
            let rate = looked_up.map_or(0.0, |(_, _, rate)| rate);
            let exit = match self.config.head {
                Some(head) if self.asks(head, &drafting, rate) => self.ask(core, head, pending, &mut drafting)?,
                _ => None,
            };
            let better = exit.into_iter().chain(looked_up).max_by(|a, b| a.2.total_cmp(&b.2));
            let Some((token, source, rate)) = better else { break };
            drafting.plan.push(token, source, rate);
        }
        Ok(drafting)
    }

    /// The most promising guess after the text and the drafts, with how often such guesses are right.
    fn look_up(&self, drafts: &[u32]) -> Option<(u32, Source, f64)> {
        let mut context = self.text.tail().to_vec();
        context.extend(drafts);
        let context = &context[context.len().saturating_sub(LONGEST)..];
        let text = if self.config.lookup { self.text.guess(context) } else { None };
        let store = self.config.store.and_then(|store| store.guess(context));
        let text = text.map(|guess| (guess.token, Source::text(guess)));
        let store = store.map(|guess| (guess.token, Source::store(guess)));
        let rated = text.into_iter().chain(store).map(|(token, source)| (token, source, self.pace.rate(source)));
        rated.max_by(|a, b| a.2.total_cmp(&b.2))
    }

    fn asks(&self, head: &DraftHead, drafting: &Drafting, rate: f64) -> bool {
        if head.reads_last_state() && drafting.before.0 != drafting.plan.tokens.len() {
            return false;
        }
        let waiting = drafting.plan.tokens.len() + 1 - drafting.states.len();
        !self.config.adaptive || self.pace.asks_exit(head, &drafting.plan, waiting, rate)
    }

    /// Runs what has not been run through the blocks below the exit, and asks its head.
    fn ask(
        &mut self,
        core: &mut Core<'_>,
        head: &DraftHead,
        pending: u32,
        drafting: &mut Drafting,
    ) -> Result<Option<(u32, Source, f64)>, ModelError> {
        let tokens: Vec<u32> = std::iter::once(pending).chain(drafting.plan.tokens.iter().copied()).collect();
        let start = Instant::now();
        let waiting = &tokens[drafting.states.len()..];
        let hidden = lower(core, waiting, head.exit())?;
        let n = waiting.len();
        drafting.states.extend((0..n).map(|i| hidden.clone().narrow(1, i, 1)));
        let lower_seconds = start.elapsed().as_secs_f64();
        let last = rows(drafting.states[drafting.states.len() - 1].clone());
        let state = head.read(last, drafting.before.1.clone());
        let mut scores = head.scores(state.clone())?;
        drafting.before = (tokens.len(), state);
        log_softmax(&mut scores);
        let best = argmax(&scores);
        let source = Source::Exit(scores[best].exp());
        self.pace.lower.note(n, lower_seconds);
        self.pace.head.note(1, start.elapsed().as_secs_f64() - lower_seconds);
        drafting.seconds += start.elapsed().as_secs_f64();
        Ok(Some((head.shortlist().id(best), source, self.pace.rate(source))))
    }

    /// The normalized last states and the logits of `tokens`, the first of which have been at the exit.
    fn verify(
        &mut self,
        core: &mut Core<'_>,
        tokens: &[u32],
        mut states: Vec<Tensor<3>>,
    ) -> Result<(Tensor<2>, Vec<f32>), ModelError> {
        let start = Instant::now();
        let exit = self.config.head.filter(|_| !states.is_empty()).map(DraftHead::exit);
        let normed = match exit {
            None => core.run(tokens)?,
            Some(exit) => {
                if states.len() < tokens.len() {
                    states.push(lower(core, &tokens[states.len()..], exit)?);
                }
                core.finish(Tensor::cat(states, 1), exit)?
            }
        };
        let logits = core.logits(normed.clone())?;
        let times = if exit.is_some() { &mut self.pace.upper } else { &mut self.pace.whole };
        times.note(tokens.len(), start.elapsed().as_secs_f64());
        Ok((normed, logits))
    }
}

/// Runs tokens through the blocks below an exit.
fn lower(core: &mut Core<'_>, tokens: &[u32], exit: usize) -> Result<Tensor<3>, ModelError> {
    let hidden = core.decoder.embed(&[tokens])?;
    core.decoder.run_blocks(hidden, 0..exit, core.adapter, Some(&mut core.cache))
}
