//! Checks of generated answers: exact match, containing a text, a regular expression, a JSON schema.
//!
//! A task is a line of JSON: `prompt` (text that is continued) or `messages` (a chat), and one of `exact` (the answer without
//! space around it is this text), `contains` (a text, or several that must all occur), `regex` (matches somewhere in the
//! answer), `json_schema` (the answer is JSON, with or without a Markdown fence around it, and valid). `exact` and
//! `contains` do not tell upper from lower case if `ignore_case` is true.

use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::chat::ChatMessage;
use edgellm_model::io::read_text;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Result;

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    /// A text to continue.
    Prompt(String),
    /// A chat to answer in.
    Messages(Vec<ChatMessage>),
}

/// A question with what its answer must be.
#[derive(Debug)]
pub struct AnswerTask {
    /// What is asked.
    pub asked: Asked,
    check: Check,
}

#[derive(Debug)]
enum Check {
    Exact {
        text: String,
        ignore_case: bool,
    },
    Contains {
        texts: Vec<String>,
        ignore_case: bool,
    },
    Regex(regex::Regex),
    #[cfg(feature = "schema")]
    Schema(Box<jsonschema::Validator>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<ChatMessage>>,
    exact: Option<String>,
    contains: Option<Texts>,
    regex: Option<String>,
    json_schema: Option<Value>,
    #[serde(default)]
    ignore_case: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Texts {
    One(String),
    Several(Vec<String>),
}

impl AnswerTask {
    /// The name of the check, and of its figure: `exact_match`, `contains`, `regex` or `json_schema`.
    pub fn figure(&self) -> &'static str {
        match self.check {
            Check::Exact { .. } => "exact_match",
            Check::Contains { .. } => "contains",
            Check::Regex(_) => "regex",
            #[cfg(feature = "schema")]
            Check::Schema(_) => "json_schema",
        }
    }

    /// Whether an answer is right.
    pub fn is_right(&self, answer: &str) -> bool {
        let cased = |text: &str, ignore: bool| if ignore { text.to_lowercase() } else { text.to_owned() };
        match &self.check {
            Check::Exact { text, ignore_case } => {
                cased(answer.trim(), *ignore_case) == cased(text.trim(), *ignore_case)
            }
            Check::Contains { texts, ignore_case } => {
                let answer = cased(answer, *ignore_case);
                texts.iter().all(|text| answer.contains(&cased(text, *ignore_case)))
            }
            Check::Regex(regex) => regex.is_match(answer),
            #[cfg(feature = "schema")]
            Check::Schema(schema) => {
                serde_json::from_str(without_fence(answer)).is_ok_and(|value: Value| schema.is_valid(&value))
            }
        }
    }
}

/// The text inside a Markdown fence, or the whole text.
#[cfg(feature = "schema")]
fn without_fence(answer: &str) -> &str {
    let answer = answer.trim();
    let inside = answer.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"));
    inside.map_or(answer, |inside| inside.strip_prefix("json").unwrap_or(inside))
}

/// Reads the first `limit` tasks of a file of JSON lines.
///
/// # Errors
/// The file cannot be read, a line is no task, its regular expression or schema is none, or a schema is asked for in a build
/// without the feature `schema`.
pub fn read_answer_tasks(path: &Path, limit: usize) -> Result<Vec<AnswerTask>> {
    let text = read_text(path)?;
    let mut tasks = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit) {
        let task = task(line).map_err(|reason| ModelError::Parse {
            path: path.to_path_buf(),
            what: format!("task on line {}", index + 1),
            reason,
        })?;
        tasks.push(task);
    }
    Ok(tasks)
}

fn task(line: &str) -> Result<AnswerTask, String> {
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let asked = match (line.prompt, line.messages) {
        (Some(prompt), None) => Asked::Prompt(prompt),
        (None, Some(messages)) if !messages.is_empty() => Asked::Messages(messages),
        _ => return Err("expected either 'prompt' or 'messages'".into()),
    };
    let ignore_case = line.ignore_case;
    let check = match (line.exact, line.contains, line.regex, line.json_schema) {
        (Some(text), None, None, None) => Check::Exact { text, ignore_case },
        (None, Some(Texts::One(text)), None, None) => Check::Contains { texts: vec![text], ignore_case },
        (None, Some(Texts::Several(texts)), None, None) => Check::Contains { texts, ignore_case },
        (None, None, Some(regex), None) => Check::Regex(regex::Regex::new(&regex).map_err(|e| e.to_string())?),
        (None, None, None, Some(schema)) => self::schema(&schema)?,
        _ => return Err("expected one of 'exact', 'contains', 'regex' and 'json_schema'".into()),
    };
    Ok(AnswerTask { asked, check })
}

#[cfg(feature = "schema")]
fn schema(schema: &Value) -> Result<Check, String> {
    let validator = jsonschema::validator_for(schema).map_err(|e| format!("'json_schema': {e}"))?;
    Ok(Check::Schema(Box::new(validator)))
}

#[cfg(not(feature = "schema"))]
fn schema(_schema: &Value) -> Result<Check, String> {
    Err("'json_schema' needs a build with the feature 'schema'".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, right: &[&str], wrong: &[&str]) {
        let task = task(line).unwrap();
        right.iter().for_each(|answer| assert!(task.is_right(answer), "{answer}"));
        wrong.iter().for_each(|answer| assert!(!task.is_right(answer), "{answer}"));
    }

    #[test]
    fn answers_are_checked() {
        check(r#"{"prompt": "2+2=", "exact": "4"}"#, &["4", " 4\n"], &["44", ""]);
        check(r#"{"prompt": "x", "exact": "Paris", "ignore_case": true}"#, &["PARIS"], &["Lyon"]);
        check(r#"{"prompt": "x", "contains": ["a", "b"]}"#, &["b a"], &["a", "B a"]);
        check(r#"{"prompt": "x", "regex": "^\\d+$"}"#, &["12"], &["12a"]);
        for bad in [
            "{}",
            r#"{"prompt": "x"}"#,
            r#"{"prompt": "x", "exact": "a", "regex": "b"}"#,
            r#"{"prompt": "x", "messages": [], "exact": "a"}"#,
            r#"{"prompt": "x", "regex": "("}"#,
            r#"{"prompt": "x", "exakt": "a"}"#,
        ] {
            assert!(task(bad).is_err(), "{bad}");
        }
    }

    #[cfg(feature = "schema")]
    #[test]
    fn answers_are_held_against_schemas() {
        let line = r#"{"prompt": "x", "json_schema": {"type": "object", "required": ["a"]}}"#;
        check(line, &[r#"{"a": 1}"#, "```json\n{\"a\": 1}\n```"], &["{}", "a", "[1]"]);
        assert!(task(r#"{"prompt": "x", "json_schema": {"type": "nothing"}}"#).is_err());
    }
}
