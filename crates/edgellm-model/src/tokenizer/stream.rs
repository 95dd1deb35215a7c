//! Decoding ids as they are generated. A character may be spread over several tokens, and a token's text may depend on
//! the one before it (a leading space, say): text is held back until it is whole, and decoded with its predecessor.

use super::Tokenizer;
use crate::error::Result;

/// A character has at most 4 bytes, so that at most 4 tokens of one byte make it. When more tokens than this end in
/// bytes that are no character, they never will.
const MAX_HELD_BACK: usize = 8;

/// Gives text piece by piece, never a part of a character.
#[derive(Debug, Clone)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens of the last piece, then those held back.
    ids: Vec<u32>,
    /// How many of `ids` were given out.
    given: usize,
}

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), given: 0 }
    }

    /// Takes the next id; gives the text that is complete now, perhaps nothing.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.new_text()?;
        let incomplete = text.ends_with('\u{fffd}') && self.ids.len() - self.given <= MAX_HELD_BACK;
        if text.is_empty() || incomplete {
            return Ok(String::new());
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(text)
    }

    /// The text held back at the end: bytes that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        let text = self.new_text()?;
        self.ids.clear();
        Ok(text)
    }

    /// The text of the tokens that were not given out, after that of those that were.
    fn new_text(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special)?;
        let all = self.tokenizer.decode(&self.ids, self.skip_special)?;
        // The text of the first tokens is the start of the whole, except where broken bytes meet: then what differs
        // from the first different character on is new.
        let common: usize =
            before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok(all[common..].to_owned())
    }
}
