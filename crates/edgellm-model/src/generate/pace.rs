//! How far to draft: from how often drafts of each kind were right so far, and from what passes took so far.
//!
//! With the probability `P_i` that the first `i` drafts are all right, a pass over the pending token and `k` drafts gives
//! `1 + P_1 + ... + P_k` tokens (Leviathan et al., 2023, section 3.1, with a rate of its own for each draft). The pace takes
//! the `k` with the most tokens per second; 0 is plain decoding. Times move which drafts are made, never which tokens come
//! out.

use super::head::DraftHead;
use super::lookup::{Guess, LONGEST};

/// Most tokens of a pass. Up to here a token's values do not depend on the tokens beside it; see
/// `edgellm_kernels`' products, which have one order of sums for up to eight tokens.
pub const MAX_BATCH: usize = 8;
/// Classes of an exit's confidence.
const CONFIDENCES: usize = 8;
const SOURCES: usize = 2 * LONGEST + CONFIDENCES;
/// Drafts that a prior counts for.
const PRIOR_WEIGHT: f64 = 12.0;
/// How much a new time changes what is expected, if it is shorter and if it is longer: other programs make passes longer,
/// nothing makes them shorter.
const TIME_WEIGHTS: (f64, f64) = (0.3, 0.05);
/// Times of passes over 1 to 8 tokens, relative to one, until they are measured.
const TIMES: [f64; MAX_BATCH] = [1.0, 1.1, 1.2, 1.25, 1.4, 1.5, 1.55, 1.6];

/// Where a draft comes from, with what says how good it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Source {
    /// The text so far; tokens that agree.
    Text(usize),
    /// The drafter's texts; tokens that agree.
    Store(usize),
    /// The exit; its largest probability.
    Exit(f32),
}

impl Source {
    pub(crate) fn text(guess: Guess) -> Self {
        Source::Text(guess.matched)
    }

    pub(crate) fn store(guess: Guess) -> Self {
        Source::Store(guess.matched)
    }

    fn index(self) -> usize {
        match self {
            Source::Text(n) => n.clamp(1, LONGEST) - 1,
            Source::Store(n) => LONGEST + n.clamp(1, LONGEST) - 1,
            Source::Exit(p) => 2 * LONGEST + ((p * CONFIDENCES as f32) as usize).min(CONFIDENCES - 1),
        }
    }

    /// What is expected before anything was seen: as measured on instructions, for the exit its own probability.
    fn prior(index: usize) -> f64 {
        const TEXT: [f64; LONGEST] = [0.22, 0.6, 0.6, 0.65, 0.85];
        const STORE: [f64; LONGEST] = [0.18, 0.22, 0.38, 0.4, 0.5];
        match index {
            i if i < LONGEST => TEXT[i],
            i if i < 2 * LONGEST => STORE[i - LONGEST],
            i => (i - 2 * LONGEST) as f64 / CONFIDENCES as f64 + 0.5 / CONFIDENCES as f64,
        }
    }
}

/// Drafts of one kind that were verified, and those that were right.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SourceCount {
    /// Verified.
    pub tried: f64,
    /// Right.
    pub right: f64,
}

/// Times of passes by their number of tokens, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times([Option<f64>; MAX_BATCH]);

impl Times {
    pub(crate) fn note(&mut self, tokens: usize, seconds: f64) {
        let Some(slot) = self.0.get_mut(tokens - 1) else { return };
        *slot = Some(match *slot {
            // A pause of the machine says nothing of the pass.
            Some(old) if seconds < old => old + TIME_WEIGHTS.0 * (seconds - old),
            Some(old) => old + TIME_WEIGHTS.1 * (seconds.min(3.0 * old) - old),
            None => seconds,
        });
    }

    /// What a pass over `tokens` takes, in seconds; relative times until one was measured.
    fn of(&self, tokens: usize) -> f64 {
        if let Some(time) = self.0[tokens - 1] {
            return time;
        }
        let known = self.0.iter().enumerate().filter_map(|(i, time)| Some((i, (*time)?)));
        let nearest = known.min_by_key(|(i, _)| i.abs_diff(tokens - 1));
        nearest.map_or(TIMES[tokens - 1], |(i, time)| time * TIMES[tokens - 1] / TIMES[i])
    }

    fn is_known(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }
}

/// Rates and times so far.
#[derive(Clone, Debug)]
pub struct Pace {
    counts: [SourceCount; SOURCES],
    /// Passes through all blocks and the head.
    pub(crate) whole: Times,
    /// Passes through the blocks below the exit.
    pub(crate) lower: Times,
    /// Passes through the blocks above it and the head.
    pub(crate) upper: Times,
    /// The exit's head, for one token.
    pub(crate) head: Times,
    max_draft: usize,
}

/// The drafts of a step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) tokens: Vec<u32>,
    pub(crate) sources: Vec<Source>,
    /// Probability that all drafts so far are right.
    pub(crate) chance: f64,
    /// Tokens that a pass over the first `i` drafts is expected to give.
    expected: Vec<f64>,
}

impl Plan {
    pub(crate) fn new() -> Self {
        Self { chance: 1.0, expected: vec![1.0], ..Self::default() }
    }

    pub(crate) fn push(&mut self, token: u32, source: Source, rate: f64) {
        self.tokens.push(token);
        self.sources.push(source);
        self.chance *= rate;
        let before = self.expected[self.expected.len() - 1];
        self.expected.push(before + self.chance);
    }
}

impl Pace {
    /// A pace that drafts at most `max_draft` tokens, which may be at most one less than [`MAX_BATCH`].
    pub(crate) fn new(max_draft: usize) -> Self {
        Self {
            counts: [SourceCount::default(); SOURCES],
            whole: Times::default(),
            lower: Times::default(),
            upper: Times::default(),
            head: Times::default(),
            max_draft: max_draft.min(MAX_BATCH - 1),
        }
    }

    /// Whether a pass through all blocks was timed.
    pub(crate) fn has_times(&self) -> bool {
        self.whole.is_known()
    }

    pub(crate) fn max_draft(&self) -> usize {
        self.max_draft
    }

    /// How often a draft from `source` is right.
    pub(crate) fn rate(&self, source: Source) -> f64 {
        let index = source.index();
        let count = self.counts[index];
        (count.right + PRIOR_WEIGHT * Source::prior(index)) / (count.tried + PRIOR_WEIGHT)
    }

    /// How often the exit's drafts are right, whatever their confidence.
    fn exit_rate(&self) -> f64 {
        let all = self.exit_counts();
        (all.right + 0.3 * PRIOR_WEIGHT) / (all.tried + PRIOR_WEIGHT)
    }

    /// Notes whether a verified draft was right.
    pub(crate) fn note(&mut self, source: Source, right: bool) {
        let count = &mut self.counts[source.index()];
        count.tried += 1.0;
        count.right += f64::from(u8::from(right));
    }

    pub(crate) fn text_counts(&self) -> SourceCount {
        sum(&self.counts[..LONGEST])
    }

    pub(crate) fn store_counts(&self) -> SourceCount {
        sum(&self.counts[LONGEST..2 * LONGEST])
    }

    pub(crate) fn exit_counts(&self) -> SourceCount {
        sum(&self.counts[2 * LONGEST..])
    }

    /// Whether asking the exit for the next draft is worth its time, if a lookup's guess is right at `rate`. `waiting`
    /// tokens have not been through the blocks below the exit.
    pub(crate) fn asks_exit(&self, head: &DraftHead, plan: &Plan, waiting: usize, rate: f64) -> bool {
        let gain = plan.chance * (self.exit_rate() - rate).max(0.0);
        // The pending token goes through the lower blocks in any case; the others alone instead of beside it.
        let alone = if plan.tokens.is_empty() || head.exit() == 0 { 0.0 } else { self.lower_time(head, waiting) };
        let cost = self.head_time() + alone;
        gain * self.whole.of(1) > cost
    }

    fn lower_time(&self, head: &DraftHead, tokens: usize) -> f64 {
        if self.lower.is_known() { self.lower.of(tokens) } else { 0.01 * head.exit() as f64 * self.whole.of(tokens) }
    }

    fn head_time(&self) -> f64 {
        if self.head.is_known() { self.head.of(1) } else { 0.05 * self.whole.of(1) }
    }

    /// How many of the plan's drafts to verify: those with the most tokens per second. `spent`: seconds that drafting has
    /// taken; `ran`: tokens that have been through the lower blocks, 0 if the pass goes through all blocks at once.
    pub(crate) fn choose(&self, plan: &Plan, spent: f64, ran: usize) -> usize {
        let time = |k: usize| {
            let split = ran > 0 && self.upper.is_known();
            spent + if split { self.upper.of(k + 1) } else { self.whole.of(k + 1) }
        };
        let rate = |k: usize| plan.expected[k] / time(k);
        (0..plan.expected.len()).max_by(|a, b| rate(*a).total_cmp(&rate(*b))).unwrap_or(0)
    }
}

fn sum(counts: &[SourceCount]) -> SourceCount {
    counts
        .iter()
        .fold(SourceCount::default(), |a, b| SourceCount { tried: a.tried + b.tried, right: a.right + b.right })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rates: &[f64]) -> Plan {
        let mut plan = Plan::new();
        rates.iter().for_each(|rate| plan.push(1, Source::Text(1), *rate));
        plan
    }

    /// Passes over `n` tokens that take `1 + slope (n - 1)`.
    fn pace(slope: f64) -> Pace {
        let mut pace = Pace::new(7);
        (1..=MAX_BATCH).for_each(|n| pace.whole.note(n, 1.0 + slope * (n - 1) as f64));
        pace
    }

    #[test]
    fn drafts_are_verified_while_they_pay() {
        assert_eq!(pace(0.1).choose(&plan(&[0.9, 0.9, 0.9]), 0.0, 0), 3);
        assert_eq!(pace(0.1).choose(&plan(&[0.9, 0.02, 0.9]), 0.0, 0), 1);
        assert_eq!(pace(0.1).choose(&plan(&[0.05]), 0.0, 0), 0);
        assert_eq!(pace(1.0).choose(&plan(&[0.9, 0.9, 0.9]), 0.0, 0), 0, "a pass that costs as much as its tokens");
        assert_eq!(pace(0.1).choose(&Plan::new(), 0.0, 0), 0);
    }

    #[test]
    fn rates_move_from_the_prior_to_what_was_seen() {
        let mut pace = Pace::new(3);
        assert!((pace.rate(Source::Text(5)) - 0.85).abs() < 1e-9);
        (0..1000).for_each(|i| pace.note(Source::Text(5), i % 4 == 0));
        assert!((pace.rate(Source::Text(5)) - 0.25).abs() < 0.01);
        assert!((pace.rate(Source::Text(4)) - 0.65).abs() < 1e-9, "kinds are counted apart");
        assert_eq!(pace.text_counts(), SourceCount { tried: 1000.0, right: 250.0 });
        assert!(pace.rate(Source::Exit(0.95)) > pace.rate(Source::Exit(0.1)));
        assert!(pace.rate(Source::Exit(1.0)) <= 1.0);
    }

    #[test]
    fn unknown_times_follow_the_nearest_known_one() {
        let mut times = Times::default();
        times.note(1, 2.0);
        assert!((times.of(4) - 2.5).abs() < 1e-9);
        times.note(4, 8.0);
        assert!((times.of(4) - 8.0).abs() < 1e-9);
        assert!(times.of(8) > 8.0);
        times.note(4, 1000.0);
        assert!(times.of(4) < 10.0, "a pause of the machine");
    }
}
