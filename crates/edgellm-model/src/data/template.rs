//! Templates: how a record becomes prompt and response, and these the tokens of an example.

use std::str::FromStr;

use super::example::Example;
use super::record::Record;
use super::text;
use crate::chat::{ChatMessage, ChatTemplate};
use crate::error::{ModelError, Result};
use crate::tokenizer::Tokenizer;

/// How a record becomes prompt and response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptTemplate {
    /// The model's chat template.
    Chat,
    /// The Stanford Alpaca template.
    Alpaca,
    /// As it is: no template.
    Text,
}

impl PromptTemplate {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Alpaca => "alpaca",
            Self::Text => "text",
        }
    }
}

impl FromStr for PromptTemplate {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = [Self::Chat, Self::Alpaca, Self::Text].into_iter().find(|t| t.name() == name);
        known.ok_or_else(|| format!("'{name}' is no template; expected chat, alpaca or text"))
    }
}

/// Turns records into examples.
#[derive(Debug, Clone)]
pub struct ExampleEncoder<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The model's chat template, for [`PromptTemplate::Chat`].
    pub chat: Option<&'a ChatTemplate>,
    /// How records become prompts.
    pub template: PromptTemplate,
    /// The tokens that end a turn or a text. A chat template writes one of them itself; elsewhere the first is put after
    /// a response. If there is none, none is.
    pub end_tokens: &'a [u32],
    /// Tokens of an example at most.
    pub max_len: usize,
}

/// What a record became.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The examples: one for most records.
    pub examples: Vec<Example>,
    /// How many of those with something to learn were too long and lost their end.
    pub cut: usize,
}

/// A piece of an example's text.
struct Piece {
    text: String,
    target: bool,
    /// Whether the tokenizer's own start token goes before it.
    add_special: bool,
}

impl Piece {
    fn prompt(text: impl Into<String>, add_special: bool) -> Self {
        Self { text: text.into(), target: false, add_special }
    }

    fn response(text: impl Into<String>) -> Self {
        Self { text: text.into(), target: true, add_special: false }
    }
}

/// A turn of the assistant: all that is before it, and what it says, with its end token.
struct Turn {
    before: String,
    response: String,
}

impl Turn {
    /// What a later turn's prompt has after this turn, if it begins with this turn.
    fn rest<'a>(&self, later: &'a Turn) -> Option<&'a str> {
        later.before.strip_prefix(self.before.as_str())?.strip_prefix(self.response.as_str())
    }
}

impl ExampleEncoder<'_> {
    /// The examples of a record: of a text its windows, of a chat one, unless the template changes earlier messages when
    /// later ones come (reasoning models do): then one for each turn of the assistant, with what is before it as it was.
    ///
    /// # Errors
    /// The record does not go with the template, or the template or the tokenizer fails.
    pub fn encode(&self, record: &Record) -> Result<Encoded> {
        if let (PromptTemplate::Text, Record::Text(text)) = (self.template, record) {
            return Ok(Encoded { examples: self.windows(text)?, cut: 0 });
        }
        let mut encoded = Encoded::default();
        for pieces in self.pieces(record)? {
            let mut example = Example::new(&[], &[]);
            for piece in pieces {
                example.push(&self.tokenizer.encode(&piece.text, piece.add_special)?, piece.target);
            }
            if let Some(&end) = self.end_tokens.first().filter(|_| !example.ends_with(self.end_tokens)) {
                example.push(&[end], true);
            }
            encoded.cut += usize::from(example.cut(self.max_len) && example.n_targets() > 0);
            encoded.examples.push(example);
        }
        Ok(encoded)
    }

    /// The windows of a text and its end token.
    fn windows(&self, text: &str) -> Result<Vec<Example>> {
        let mut ids = Vec::new();
        for (index, part) in text::parts(text).enumerate() {
            ids.extend(self.tokenizer.encode(part, index == 0)?);
        }
        ids.extend(self.end_tokens.first());
        Ok(text::windows(&ids, self.max_len))
    }

    /// The pieces of each example.
    fn pieces(&self, record: &Record) -> Result<Vec<Vec<Piece>>> {
        let pair = |prompt: String, response: &str| vec![vec![Piece::prompt(prompt, true), Piece::response(response)]];
        match (self.template, record) {
            (_, Record::Text(_)) => Err(self.mismatch(
                "an instruction, messages, or a prompt and a response (texts go with the template 'text')",
                "a text",
            )),
            (PromptTemplate::Text, Record::Messages(_)) => {
                Err(self.mismatch("a text, an instruction, or a prompt and a response", "messages"))
            }
            (PromptTemplate::Text, Record::PromptResponse { prompt, response }) => Ok(pair(prompt.clone(), response)),
            (PromptTemplate::Text, Record::Instruction { instruction, input, output }) => {
                let lines = [instruction, input].into_iter().filter(|t| !t.is_empty()).map(|t| format!("{t}\n"));
                Ok(pair(lines.collect(), output))
            }
            (PromptTemplate::Alpaca, Record::Instruction { instruction, input, output }) => {
                Ok(pair(alpaca_prompt(instruction, input), output))
            }
            (PromptTemplate::Alpaca, Record::PromptResponse { prompt, response }) => {
                Ok(pair(alpaca_prompt(prompt, ""), response))
            }
            (PromptTemplate::Alpaca, Record::Messages(messages)) => match messages.as_slice() {
                [user, assistant] if user.role == "user" && assistant.role == "assistant" => {
                    Ok(pair(alpaca_prompt(&user.content, ""), &assistant.content))
                }
                _ => Err(self.mismatch("one message of the user and one of the assistant", "other messages")),
            },
            (PromptTemplate::Chat, Record::Messages(messages)) => self.chat_pieces(messages),
            (PromptTemplate::Chat, Record::Instruction { instruction, input, output }) => {
                let user = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n\n{input}") };
                self.chat_pieces(&[ChatMessage::new("user", user), ChatMessage::new("assistant", output)])
            }
            (PromptTemplate::Chat, Record::PromptResponse { prompt, response }) => {
                self.chat_pieces(&[ChatMessage::new("user", prompt), ChatMessage::new("assistant", response)])
            }
        }
    }

    /// Every turn of the assistant is a response, up to its end token; everything else is prompt.
    fn chat_pieces(&self, messages: &[ChatMessage]) -> Result<Vec<Vec<Piece>>> {
        let turns = self.turns(messages)?;
        let rests: Option<Vec<&str>> = turns.windows(2).map(|pair| pair[0].rest(&pair[1])).collect();
        let Some(rests) = rests else {
            let alone = |turn: Turn| vec![Piece::prompt(turn.before, false), Piece::response(turn.response)];
            return Ok(turns.into_iter().map(alone).collect());
        };
        let prompts = turns.first().map(|turn| turn.before.as_str()).into_iter().chain(rests);
        let pieces = prompts
            .zip(&turns)
            .flat_map(|(prompt, turn)| [Piece::prompt(prompt, false), Piece::response(turn.response.as_str())]);
        Ok(vec![pieces.collect()])
    }

    /// The turns of the assistant. What belongs to whom is found by rendering the chat up to each of them, as it is when
    /// the model is to speak.
    fn turns(&self, messages: &[ChatMessage]) -> Result<Vec<Turn>> {
        let chat = self.chat.ok_or_else(|| self.mismatch("a model with a chat template", "a model without one"))?;
        let ends: Vec<String> = self.end_tokens.iter().filter_map(|&id| self.tokenizer.id_to_token(id)).collect();
        let mut turns = Vec::new();
        for (index, message) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let before = chat.render(&messages[..index], true)?;
            let after = chat.render(&messages[..=index], false)?;
            let Some(response) = after.strip_prefix(before.as_str()) else {
                let found = "one that writes them in another way";
                return Err(self.mismatch("a chat template whose answers follow its prompts", found));
            };
            let response = response[..end_of_response(response, &message.content, &ends)].to_owned();
            turns.push(Turn { before, response });
        }
        if turns.is_empty() {
            return Err(self.mismatch("a message of the assistant", "none"));
        }
        Ok(turns)
    }

    fn mismatch(&self, expected: &str, found: &str) -> ModelError {
        let what = format!("record for the template '{}'", self.template.name());
        ModelError::Value { what, expected: expected.into(), found: found.into() }
    }
}

/// Where a response ends: after its end token, or its content where the template writes none. A line break after it
/// belongs to the next prompt.
fn end_of_response(response: &str, content: &str, ends: &[String]) -> usize {
    let ends = ends.iter().filter(|end| !end.is_empty());
    let end = ends.filter_map(|end| response.rfind(end.as_str()).map(|at| at + end.len())).max();
    // Templates may trim the content.
    let content = content.trim();
    end.or_else(|| response.find(content).map(|at| at + content.len())).unwrap_or(response.len())
}

/// The prompt of Stanford Alpaca.
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write \
             a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### \
             Input:\n{input}\n\n### Response:\n"
        )
    }
}
