//! Drafts by looking up: what followed the last few tokens when they were seen before.
//!
//! In the text itself (prompt lookup; Saxena, 2023; "LLMA", Yang et al., 2023), the latest occurrence counts; in other texts,
//! which a drafter brings (retrieval, "REST", He et al., NAACL 2024), the most frequent successor. A guess costs no
//! arithmetic; verification decides, so a wrong or a colliding entry costs time and never a wrong token.

use std::collections::HashMap;

/// Most tokens that are compared.
pub(crate) const LONGEST: usize = 5;

/// A guess, and how many tokens before it agree with an earlier place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guess {
    /// The token.
    pub token: u32,
    /// Tokens that were compared.
    pub matched: usize,
}

/// A key of some tokens: FNV-1a over their count and bytes.
fn key(tokens: &[u32]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ tokens.len() as u64;
    for token in tokens {
        hash = (hash ^ u64::from(*token)).wrapping_mul(0x0100_0000_01b3);
        hash ^= hash >> 29;
    }
    hash
}

/// The text so far, with what followed every run of up to five tokens.
#[derive(Clone, Debug, Default)]
pub struct NgramText {
    tokens: Vec<u32>,
    follows: HashMap<u64, u32>,
}

impl NgramText {
    /// Appends a token.
    pub fn push(&mut self, token: u32) {
        let end = self.tokens.len();
        for n in 1..=LONGEST.min(end) {
            self.follows.insert(key(&self.tokens[end - n..]), token);
        }
        self.tokens.push(token);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.follows.clear();
    }

    /// The last tokens, at most five.
    pub fn tail(&self) -> &[u32] {
        &self.tokens[self.tokens.len().saturating_sub(LONGEST)..]
    }

    /// What followed the longest end of `context` that was seen before.
    pub fn guess(&self, context: &[u32]) -> Option<Guess> {
        longest(context, |key| self.follows.get(&key).copied())
    }
}

/// What most often follows runs of up to five tokens in some texts.
#[derive(Clone, Debug, Default)]
pub struct NgramStore {
    /// Sorted by key.
    follows: Vec<(u64, u32)>,
}

impl NgramStore {
    /// Counts the texts.
    pub fn new<'t>(texts: impl IntoIterator<Item = &'t [u32]>) -> Self {
        let mut seen: Vec<(u64, u32)> = Vec::new();
        for text in texts {
            for end in 1..text.len() {
                seen.extend((1..=LONGEST.min(end)).map(|n| (key(&text[end - n..end]), text[end])));
            }
        }
        seen.sort_unstable();
        let mut follows: Vec<(u64, u32)> = Vec::new();
        for group in seen.chunk_by(|a, b| a.0 == b.0) {
            let best = group.chunk_by(|a, b| a.1 == b.1).max_by_key(|run| run.len());
            follows.extend(best.map(|run| run[0]));
        }
        follows.shrink_to_fit();
        Self { follows }
    }

    /// What most often follows the longest end of `context` that is known.
    pub fn guess(&self, context: &[u32]) -> Option<Guess> {
        longest(context, |key| {
            let at = self.follows.binary_search_by_key(&key, |entry| entry.0).ok()?;
            Some(self.follows[at].1)
        })
    }
}

fn longest(context: &[u32], find: impl Fn(u64) -> Option<u32>) -> Option<Guess> {
    let found = |n: usize| find(key(&context[context.len() - n..])).map(|token| Guess { token, matched: n });
    (1..=LONGEST.min(context.len())).rev().find_map(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_occurrence_of_the_longest_end_counts() {
        let mut text = NgramText::default();
        [1, 2, 3, 9, 2, 3, 7, 3].into_iter().for_each(|token| text.push(token));
        assert_eq!(text.guess(&[1, 2, 3]), Some(Guess { token: 9, matched: 3 }));
        assert_eq!(text.guess(&[8, 2, 3]), Some(Guess { token: 7, matched: 2 }));
        assert_eq!(text.guess(&[5, 5, 9]), Some(Guess { token: 2, matched: 1 }));
        assert_eq!(text.guess(&[5]), None);
        assert_eq!(text.tail(), [9, 2, 3, 7, 3]);
        text.clear();
        assert_eq!(text.guess(&[1, 2, 3]), None);
    }

    #[test]
    fn the_most_frequent_successor_counts() {
        let store = NgramStore::new([&[1, 2, 4][..], &[1, 2, 5], &[3, 2, 5], &[]]);
        assert_eq!(store.guess(&[7, 2]), Some(Guess { token: 5, matched: 1 }));
        assert_eq!(store.guess(&[3, 2]), Some(Guess { token: 5, matched: 2 }));
        assert_eq!(store.guess(&[9]), None);
        assert_eq!(store.guess(&[]), None);
    }
}
