//! Training and evaluation examples from JSON lines.
//!
//! A line is one of
//! - `{"instruction": ..., "input": ..., "output": ...}` (`input` may be missing or empty),
//! - `{"messages": [{"role": ..., "content": ...}, ...]}`,
//! - `{"prompt": ..., "response": ...}`,
//! - `{"text": ...}`.
//!
//! A [`PromptTemplate`] makes a prompt and a response of it. They are tokenized on their own and joined, the end token
//! is appended, and what is longer than the limit is cut off. The loss is on the response and its end only; a plain
//! text is response from its second token on.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;
use serde_json::Value;

use crate::chat::{ChatMessage, ChatTemplate};
use crate::error::{ModelError, Result, Shown};
use crate::tokenizer::Tokenizer;

/// The longest line: 16 MiB.
const MAX_LINE: u64 = 16 << 20;

/// What a line must be, for messages.
const KINDS: &str =
    "an object with 'instruction' and 'output', with 'messages', with 'prompt' and 'response', or with 'text'";

/// A line of a data file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A task with its answer.
    Instruction {
        /// The task.
        instruction: String,
        /// What it is about; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
    /// A chat.
    Messages(Vec<ChatMessage>),
    /// A prompt with its continuation.
    PromptResponse {
        /// What is given.
        prompt: String,
        /// What is to be said.
        response: String,
    },
    /// A text.
    Text(String),
}

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

impl FromStr for PromptTemplate {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "chat" => Ok(Self::Chat),
            "alpaca" => Ok(Self::Alpaca),
            "text" => Ok(Self::Text),
            other => Err(format!("'{other}' is no template; expected chat, alpaca or text")),
        }
    }
}

/// Tokens of an example, and which of them the loss looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    targets: Vec<bool>,
}

impl Example {
    /// A prompt and the response that is to be learned.
    pub fn new(prompt: &[u32], response: &[u32]) -> Self {
        let mut example = Self { ids: Vec::new(), targets: Vec::new() };
        example.push(prompt, false);
        example.push(response, true);
        example
    }

    fn push(&mut self, ids: &[u32], target: bool) {
        self.ids.extend_from_slice(ids);
        self.targets.resize(self.ids.len(), target);
    }

    fn cut(&mut self, max_len: usize) {
        self.ids.truncate(max_len);
        self.targets.truncate(max_len);
    }

    /// Whether the loss looks at the prediction of the token at `position`. The first token is never predicted.
    pub fn is_target(&self, position: usize) -> bool {
        position > 0 && self.targets.get(position).copied().unwrap_or(false)
    }

    /// Number of tokens that the loss looks at.
    pub fn n_targets(&self) -> usize {
        (0..self.ids.len()).filter(|&position| self.is_target(position)).count()
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
    /// The token after a response.
    pub end_token: u32,
    /// Tokens of an example at most.
    pub max_len: usize,
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

impl ExampleEncoder<'_> {
    /// The example of a record.
    ///
    /// # Errors
    /// The record does not go with the template, or the template or the tokenizer fails.
    pub fn encode(&self, record: &Record) -> Result<Example> {
        let mut example = Example::new(&[], &[]);
        for piece in self.pieces(record)? {
            example.push(&self.tokenizer.encode(&piece.text, piece.add_special)?, piece.target);
        }
        // A chat template writes the end token itself where it wants to.
        let ended = example.ids.last() == Some(&self.end_token) && example.targets.last() == Some(&true);
        if !ended {
            example.push(&[self.end_token], true);
        }
        example.cut(self.max_len);
        Ok(example)
    }

    fn pieces(&self, record: &Record) -> Result<Vec<Piece>> {
        match (self.template, record) {
            (PromptTemplate::Text, Record::Text(text)) => {
                Ok(vec![Piece { text: text.clone(), target: true, add_special: true }])
            }
            (_, Record::Text(_)) => {
                Err(self.mismatch("an instruction, messages, or a prompt and a response", "a text"))
            }
            (PromptTemplate::Text, Record::Messages(_)) => {
                Err(self.mismatch("a text, an instruction, or a prompt and a response", "messages"))
            }
            (PromptTemplate::Text, Record::PromptResponse { prompt, response }) => {
                Ok(vec![Piece::prompt(prompt, true), Piece::response(response)])
            }
            (PromptTemplate::Text, Record::Instruction { instruction, input, output }) => {
                let prompt = [instruction.as_str(), input]
                    .iter()
                    .filter(|t| !t.is_empty())
                    .fold(String::new(), |prompt, text| prompt + text + "\n");
                Ok(vec![Piece::prompt(prompt, true), Piece::response(output)])
            }
            (PromptTemplate::Alpaca, Record::Instruction { instruction, input, output }) => {
                Ok(vec![Piece::prompt(alpaca_prompt(instruction, input), true), Piece::response(output)])
            }
            (PromptTemplate::Alpaca, Record::PromptResponse { prompt, response }) => {
                Ok(vec![Piece::prompt(alpaca_prompt(prompt, ""), true), Piece::response(response)])
            }
            (PromptTemplate::Alpaca, Record::Messages(messages)) => match messages.as_slice() {
                [user, assistant] if user.role == "user" && assistant.role == "assistant" => {
                    let prompt = alpaca_prompt(&user.content, "");
                    Ok(vec![Piece::prompt(prompt, true), Piece::response(&assistant.content)])
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

    /// Every message of the assistant is a response, up to its end token; everything else is prompt. What belongs to
    /// whom is found by rendering the chat up to each such message.
    fn chat_pieces(&self, messages: &[ChatMessage]) -> Result<Vec<Piece>> {
        let chat = self.chat.ok_or_else(|| self.mismatch("a model with a chat template", "a model without one"))?;
        let last = messages.iter().rposition(|m| m.role == "assistant");
        let last = last.ok_or_else(|| self.mismatch("a message of the assistant", "none"))?;
        let end = self.tokenizer.id_to_token(self.end_token).unwrap_or_default();
        let mut pieces = Vec::new();
        let mut done = String::new();
        for (index, message) in messages.iter().enumerate().take(last + 1).filter(|(_, m)| m.role == "assistant") {
            let before = chat.render(&messages[..index], true)?;
            let after = chat.render(&messages[..=index], false)?;
            let prompt = before.strip_prefix(done.as_str());
            let response = after.strip_prefix(before.as_str());
            let (Some(prompt), Some(response)) = (prompt, response) else {
                let found = "one that changes earlier messages when later ones come";
                return Err(self.mismatch("a chat template whose prompts grow at the end", found));
            };
            // The response ends with its end token; a line break after it belongs to the next prompt.
            let len = match response.rfind(&end).filter(|_| !end.is_empty()) {
                Some(at) => at + end.len(),
                None => message.content.len().min(response.len()),
            };
            let len = (len..=response.len()).find(|&at| response.is_char_boundary(at)).unwrap_or(response.len());
            pieces.push(Piece::prompt(prompt, false));
            pieces.push(Piece::response(&response[..len]));
            done = format!("{before}{}", &response[..len]);
        }
        Ok(pieces)
    }

    fn mismatch(&self, expected: &str, found: &str) -> ModelError {
        let what = match self.template {
            PromptTemplate::Chat => "record for the template 'chat'",
            PromptTemplate::Alpaca => "record for the template 'alpaca'",
            PromptTemplate::Text => "record for the template 'text'",
        };
        ModelError::Value { what: what.into(), expected: expected.into(), found: found.into() }
    }
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

/// The records of a file of JSON lines with their line numbers, from 1. Empty lines are skipped.
///
/// # Errors
/// The file cannot be read; a line is too long, is no JSON or no record; there is no record at all.
pub fn read_records(path: &Path) -> Result<Vec<(usize, Record)>> {
    let file = File::open(path).map_err(|e| ModelError::io_on("open", path, e))?;
    let mut reader = BufReader::new(file);
    let mut records = Vec::new();
    let mut content = Vec::new();
    for line in 1.. {
        content.clear();
        let read = (&mut reader).take(MAX_LINE + 1).read_until(b'\n', &mut content);
        if read.map_err(|e| ModelError::io_on("read", path, e))? == 0 {
            break;
        }
        if content.len() as u64 > MAX_LINE {
            return Err(ModelError::data(path, line, format!("at most {MAX_LINE} bytes"), "a longer line"));
        }
        let text = std::str::from_utf8(&content)
            .map_err(|e| ModelError::data(path, line, "UTF-8", format!("other bytes at offset {}", e.valid_up_to())))?;
        // The mark that some editors put at the start of a file.
        let text = if line == 1 { text.strip_prefix('\u{feff}').unwrap_or(text) } else { text };
        if !text.trim().is_empty() {
            records.push((line, parse_record(text).map_err(|(e, f)| ModelError::data(path, line, e, f))?));
        }
    }
    if records.is_empty() {
        return Err(ModelError::format(path, "data file", "at least one line with an example", "none"));
    }
    Ok(records)
}

/// The examples of a file of JSON lines, in its order.
///
/// # Errors
/// As [`read_records`]; a record cannot be encoded; no example has a response within the length limit.
pub fn read_examples(path: &Path, encoder: &ExampleEncoder<'_>) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    for (line, record) in read_records(path)? {
        let example = encoder.encode(&record).map_err(|error| match error {
            ModelError::Value { expected, found, what } => {
                ModelError::data(path, line, expected, format!("{found} ({what})"))
            }
            other => ModelError::data(path, line, "a record that can be encoded", other),
        })?;
        examples.push(example);
    }
    if examples.iter().all(|e| e.n_targets() == 0) {
        let expected = format!("a response within the first {} tokens of some example", encoder.max_len);
        return Err(ModelError::format(path, "data file", expected, "none"));
    }
    Ok(examples)
}

/// What was expected and what was found.
type Mismatch = (String, String);

fn parse_record(text: &str) -> Result<Record, Mismatch> {
    #[derive(Deserialize)]
    struct Chat {
        messages: Vec<ChatMessage>,
    }
    let value: Value =
        serde_json::from_str(text).map_err(|e| ("a JSON object".into(), Shown(&e.to_string()).to_string()))?;
    let Value::Object(fields) = &value else {
        return Err((KINDS.into(), "a JSON value of another kind".into()));
    };
    let text = |name: &str| match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err((format!("a text as '{name}'"), "another kind of value".into())),
        None => Err((format!("a text as '{name}'"), "nothing".into())),
    };
    if fields.contains_key("messages") {
        let chat: Chat = serde_json::from_value(value.clone())
            .map_err(|e| ("messages with 'role' and 'content'".to_owned(), Shown(&e.to_string()).to_string()))?;
        if chat.messages.is_empty() {
            return Err(("messages".into(), "an empty list".into()));
        }
        Ok(Record::Messages(chat.messages))
    } else if fields.contains_key("instruction") {
        let input = if fields.get("input").is_some_and(|v| !v.is_null()) { text("input")? } else { String::new() };
        Ok(Record::Instruction { instruction: text("instruction")?, input, output: text("output")? })
    } else if fields.contains_key("prompt") {
        Ok(Record::PromptResponse { prompt: text("prompt")?, response: text("response")? })
    } else if fields.contains_key("text") {
        Ok(Record::Text(text("text")?))
    } else {
        let names: Vec<&str> = fields.keys().map(String::as_str).take(8).collect();
        Err((KINDS.into(), format!("the fields [{}]", Shown(&names.join(", ")))))
    }
}

#[cfg(test)]
mod tests;
