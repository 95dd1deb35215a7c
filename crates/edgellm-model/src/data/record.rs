//! A record: what a line of a data file says, before a template makes tokens of it.

use serde_json::{Map, Value};

use super::report::{Bad, SkipReason};
use crate::chat::ChatMessage;
use crate::error::Shown;

/// What a record must be, for messages.
const KINDS: &str =
    "an object with 'instruction' and 'output', with 'messages', with 'prompt' and 'response', or with 'text'";

/// A record of a data file.
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

/// The fields of each kind of record; the first kind whose first field is there is meant. All are needed but `input`.
pub(super) const FIELDS: [&[&str]; 4] =
    [&["messages"], &["instruction", "output", "input"], &["prompt", "response"], &["text"]];

impl Record {
    /// The record of a JSON value.
    pub(super) fn from_json(value: &Value) -> Result<Self, Bad> {
        match value {
            Value::Object(fields) => Self::from_fields(fields),
            other => Err(Bad::fields(KINDS, kind(Some(other)))),
        }
    }

    /// The record of named fields; those with other names are ignored.
    pub(super) fn from_fields(fields: &Map<String, Value>) -> Result<Self, Bad> {
        let text = |name: &str| text(fields, name, "");
        match FIELDS.iter().find(|kind| fields.contains_key(kind[0])).map(|kind| kind[0]) {
            Some("messages") => Ok(Self::Messages(messages(&fields["messages"])?)),
            Some("instruction") => {
                let has_input = fields.get("input").is_some_and(|v| !v.is_null());
                let input = if has_input { text("input")? } else { String::new() };
                Ok(Self::Instruction { instruction: text("instruction")?, input, output: text("output")? })
            }
            Some("prompt") => Ok(Self::PromptResponse { prompt: text("prompt")?, response: text("response")? }),
            Some(_) => Ok(Self::Text(text("text")?)),
            None => {
                let names: Vec<&str> = fields.keys().map(String::as_str).take(8).collect();
                Err(Bad::fields(KINDS, format!("the fields [{}]", Shown(&names.join(", ")))))
            }
        }
    }
}

/// JSON from a text.
pub(super) fn parse_json(text: &str, expected: &str) -> Result<Value, Bad> {
    serde_json::from_str(text).map_err(|e| Bad::new(SkipReason::Syntax, expected, Shown(&e.to_string())))
}

/// What a value is, for messages.
fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "true or false",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a text",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

/// The text of a field; `place` says whose field it is.
fn text(fields: &Map<String, Value>, name: &str, place: &str) -> Result<String, Bad> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        other => Err(Bad::fields(format!("a text as '{name}'{place}"), kind(other))),
    }
}

/// Messages as chat interfaces have them. What would be lost without a word is refused: calls of tools, parts that are
/// no text, and weights, which keep some turns out of the loss.
fn messages(value: &Value) -> Result<Vec<ChatMessage>, Bad> {
    let Value::Array(list) = value else {
        return Err(Bad::fields("a list as 'messages'", kind(Some(value))));
    };
    if list.is_empty() {
        return Err(Bad::fields("messages", "an empty list"));
    }
    list.iter().enumerate().map(|(index, value)| message(value, &format!(" of message {}", index + 1))).collect()
}

fn message(value: &Value, place: &str) -> Result<ChatMessage, Bad> {
    let Value::Object(fields) = value else {
        return Err(Bad::fields("messages with 'role' and 'content'", kind(Some(value))));
    };
    for name in ["tool_calls", "function_call"] {
        let none = fields.get(name).is_none_or(|v| v.is_null() || v.as_array().is_some_and(Vec::is_empty));
        if !none {
            return Err(Bad::fields(format!("no '{name}'{place}, which are not supported"), "some"));
        }
    }
    if let Some(weight) = fields.get("weight").filter(|w| !w.is_null() && w.as_f64() != Some(1.0)) {
        let expected = format!("1 as 'weight'{place}: every turn of the assistant is learned");
        return Err(Bad::fields(expected, Shown(&weight.to_string())));
    }
    let content = match fields.get("content") {
        Some(Value::Array(parts)) => parts
            .iter()
            .map(|part| match part {
                Value::Object(part) if part.get("type").and_then(Value::as_str) == Some("text") => {
                    text(part, "text", &format!(" in the content{place}"))
                }
                _ => Err(Bad::fields(format!("parts of type 'text' in the content{place}"), "another part")),
            })
            .collect::<Result<String, Bad>>()?,
        _ => text(fields, "content", place)?,
    };
    Ok(ChatMessage { role: text(fields, "role", place)?, content })
}
