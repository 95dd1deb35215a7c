//! Confident exit: a token is taken from the first exit that is sure of it (CALM, Schuster et al., NeurIPS 2022).
//!
//! Later tokens need the keys and values of every block for the tokens that left early. CALM (section 3.3) copies the exit's
//! state upwards, which is cheap and wrong. Here the exact states wait at the exit, and the next token that goes on takes
//! them along: a pass over up to eight tokens takes little longer than one over a single token, since both read
//! the same weights. So the blocks above see what they would have seen, and the text differs from plain decoding only where
//! an exit was sure of another token. At most seven tokens wait; then one goes on in any case.

use std::collections::VecDeque;

use burn::tensor::Tensor;

use super::head::DraftHead;
use super::pace::MAX_BATCH;
use super::{Core, Next, Output, rows};
use crate::ModelError;
use crate::decoder::Decoder;
use crate::sample::{Sampler, argmax, log_softmax};
use crate::spans;

/// When to leave early.
#[derive(Clone, Debug)]
pub struct ConfidentExit<'a> {
    /// The exits with their heads, from early to late.
    pub heads: Vec<&'a DraftHead>,
    /// Probability of the likeliest token from which on an exit is sure.
    pub threshold: f32,
}

/// Where tokens came from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfidentReport {
    /// Tokens from each early exit, and last from the whole model; those of prefills not counted.
    pub tokens: Vec<usize>,
}

pub(super) struct Confident<'a> {
    config: ConfidentExit<'a>,
    /// For each part of the model above the first exit, the states that wait to go through it, `[1, n, d]`.
    waiting: Vec<VecDeque<Tensor<3>>>,
    report: ConfidentReport,
    /// The normalized last state that is known last, for heads that read it.
    state: Option<Tensor<2>>,
}

impl<'a> Confident<'a> {
    pub(super) fn new(decoder: &Decoder, config: ConfidentExit<'a>) -> Result<Self, ModelError> {
        let exits: Vec<usize> = config.heads.iter().map(|head| head.exit()).collect();
        let ascending = exits.windows(2).all(|pair| pair[0] < pair[1]);
        let early = exits.last().is_some_and(|&exit| exit < decoder.n_blocks()) && exits[0] > 0;
        if !ascending || !early || !(0.0..=1.0).contains(&config.threshold) {
            return Err(ModelError::Value {
                what: "confident exit".into(),
                expected: format!("ascending exits before block {} and a threshold up to 1", decoder.n_blocks()),
                found: format!("exits {exits:?}, threshold {}", config.threshold),
            });
        }
        let report = ConfidentReport { tokens: vec![0; exits.len() + 1] };
        Ok(Self { waiting: vec![VecDeque::new(); exits.len()], config, report, state: None })
    }

    pub(super) fn clear(&mut self) {
        self.waiting.iter_mut().for_each(VecDeque::clear);
        self.state = None;
    }

    pub(super) fn report(&self) -> ConfidentReport {
        self.report.clone()
    }

    pub(super) fn generate(
        &mut self,
        core: &mut Core<'_>,
        prompt: &[u32],
        sampler: &mut Sampler,
        output: &mut Output<'_>,
    ) -> Result<(), ModelError> {
        self.catch_up(core)?;
        let span = tracing::debug_span!("prefill", tokens = prompt.len()).entered();
        let normed = core.run(prompt)?.narrow(0, prompt.len() - 1, 1);
        let mut token = sampler.sample(&core.logits(normed.clone())?);
        self.state = Some(normed);
        drop(span);
        while let Next::More = output.push(token)? {
            token = self.step(core, token, sampler)?;
        }
        self.catch_up(core)
    }

    /// The token after `token`.
    fn step(&mut self, core: &mut Core<'_>, token: u32, sampler: &mut Sampler) -> Result<u32, ModelError> {
        let _span = tracing::debug_span!("decode", tokens = 1).entered();
        let mut hidden = core.decoder.embed(&[&[token]])?;
        let mut start = 0;
        for (index, head) in self.config.heads.iter().enumerate() {
            hidden = core.decoder.run_blocks(hidden, start..head.exit(), core.adapter, Some(&mut core.cache))?;
            start = head.exit();
            let tokens = hidden.dims()[1];
            let last = rows(hidden.clone().narrow(1, tokens - 1, 1));
            let before = self.state.clone().unwrap_or_else(|| last.zeros_like());
            let state = head.read(last, before);
            let mut scores = head.scores(state.clone())?;
            log_softmax(&mut scores);
            let queue = &mut self.waiting[index];
            queue.push_back(hidden);
            let waiting: usize = queue.iter().map(|states| states.dims()[1]).sum();
            if scores[argmax(&scores)].exp() >= self.config.threshold && waiting < MAX_BATCH {
                self.report.tokens[index] += 1;
                tracing::trace!(target: spans::VOTES, chosen = head.exit());
                self.state = Some(state);
                return Ok(head.shortlist().id(sampler.sample(&scores) as usize));
            }
            hidden = Tensor::cat(queue.drain(..).collect(), 1);
        }
        let normed = core.finish(hidden, start)?;
        let last = normed.dims()[0] - 1;
        let normed = normed.narrow(0, last, 1);
        let token = sampler.sample(&core.logits(normed.clone())?);
        self.state = Some(normed);
        tracing::trace!(target: spans::VOTES, chosen = core.decoder.n_blocks());
        *self.report.tokens.last_mut().expect("a count for the whole model") += 1;
        Ok(token)
    }

    /// Takes all waiting states through the rest of the model, so that every block has seen the text.
    fn catch_up(&mut self, core: &mut Core<'_>) -> Result<(), ModelError> {
        let mut hidden: Option<Tensor<3>> = None;
        let exits: Vec<usize> = self.config.heads.iter().map(|head| head.exit()).collect();
        for (index, &exit) in exits.iter().enumerate() {
            let mut parts: Vec<Tensor<3>> = self.waiting[index].drain(..).collect();
            parts.extend(hidden.take());
            if parts.is_empty() {
                continue;
            }
            let end = exits.get(index + 1).copied().unwrap_or(core.decoder.n_blocks());
            let states = Tensor::cat(parts, 1);
            hidden = Some(core.decoder.run_blocks(states, exit..end, core.adapter, Some(&mut core.cache))?);
        }
        Ok(())
    }
}
