//! Chat templates: Jinja templates that turn messages into a prompt, with the semantics of Hugging Face's
//! `apply_chat_template`.
//!
//! Block tags take their line break with them (`trim_blocks`, `lstrip_blocks`), Python's string and list methods are
//! there, and so are `raise_exception`, `strftime_now` and a `tojson` that escapes nothing for HTML. The tags
//! `{% generation %}`, which mark the assistant's text for training, are read as plain blocks. Source:
//! `utils/chat_template_utils.py` of transformers.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::error::{ModelError, Result, Shown};

/// The longest prompt that a template may make: 64 MiB.
const MAX_OUTPUT: usize = 64 << 20;
/// Steps after which a template is stopped; real templates take some hundred per message.
const FUEL: u64 = 10_000_000;

/// A message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model's chat template and the special tokens that it may use.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    path: PathBuf,
    source: String,
    /// `bos_token`, `eos_token` and so on.
    tokens: Map<String, Json>,
}

impl ChatTemplate {
    /// A template from its source; `tokens` are variables such as `bos_token`; `path` is for messages.
    ///
    /// # Errors
    /// The source is no template.
    pub fn new(path: &Path, source: &str, tokens: Map<String, Json>) -> Result<Self> {
        let template = Self { path: path.to_owned(), source: plain_generation_tags(source), tokens };
        environment(SystemTime::now())
            .template_from_named_str("chat", &template.source)
            .map_err(|e| template.error(&e))?;
        Ok(template)
    }

    /// The source, as it is rendered.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The special tokens that the template may use.
    pub fn tokens(&self) -> &Map<String, Json> {
        &self.tokens
    }

    /// The prompt of some messages; with `add_generation_prompt`, it ends where the assistant is to speak.
    ///
    /// # Errors
    /// The template fails, or refuses the messages (`raise_exception`).
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, add_generation_prompt, &Map::new())
    }

    /// As [`render`](Self::render), with more variables, such as `enable_thinking`.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_with(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        variables: &Map<String, Json>,
    ) -> Result<String> {
        self.render_at(messages, add_generation_prompt, variables, SystemTime::now())
    }

    fn render_at(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        variables: &Map<String, Json>,
        now: SystemTime,
    ) -> Result<String> {
        let mut context: BTreeMap<&str, Value> = [("tools", Value::from(())), ("documents", Value::from(()))].into();
        for (name, value) in self.tokens.iter().chain(variables) {
            context.insert(name, Value::from_serialize(value));
        }
        // From the structures, not from JSON: a message's fields keep their order.
        context.insert("messages", Value::from_serialize(messages));
        context.insert("add_generation_prompt", add_generation_prompt.into());
        let environment = environment(now);
        let template = environment.template_from_named_str("chat", &self.source).map_err(|e| self.error(&e))?;
        let mut output = Limited(Vec::new());
        template.render_captured_to(&context, &mut output).map_err(|e| self.error(&e))?;
        String::from_utf8(output.0).map_err(|e| self.reason(e.to_string()))
    }

    fn error(&self, error: &Error) -> ModelError {
        // The message without the engine's dump of variables, and where it is.
        let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
        let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
        self.reason(format!("{}{line}", Shown(&what)))
    }

    fn reason(&self, reason: String) -> ModelError {
        ModelError::Template { path: self.path.clone(), reason }
    }
}

/// Collects output up to a limit.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, content: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + content.len() > MAX_OUTPUT {
            return Err(std::io::Error::other(format!("the prompt is longer than {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(content);
        Ok(content.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn environment<'a>(now: SystemTime) -> Environment<'a> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: &str| strftime(now, format));
    environment
}

/// `json.dumps(value, ensure_ascii=False, indent=...)` of Python, whose separators have a space after them.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    // Python's other options have no effect on what templates pass.
    for option in ["ensure_ascii", "separators", "sort_keys"] {
        kwargs.get::<Option<Value>>(option)?;
    }
    kwargs.assert_all_used()?;
    let indent = " ".repeat(indent.unwrap_or(0).min(16));
    let mut out = Vec::new();
    let written = if indent.is_empty() {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced))
    } else {
        let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
    };
    written.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("no JSON: {e}")))?;
    String::from_utf8(out).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON on one line with Python's separators `, ` and `: `.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` and `{% endgeneration %}` as blocks that are always rendered, with their whitespace control.
fn plain_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = &tag[2..tag.len() - 2];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen(word, "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Python's `strftime`, in UTC, for the directives that templates use.
fn strftime(now: SystemTime, format: &str) -> Result<String, Error> {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('I') => format!("{:02}", (second / 3600 + 11) % 12 + 1),
            Some('p') => if second < 43_200 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('j') => format!("{:03}", days - first_of_year(year) + 1),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now does not know the directive '%{other}'");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a day since 1970-01-01 (H. Hinnant, "chrono-compatible low-level date algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Days from 1970-01-01 to the first day of a year from 1970 on.
fn first_of_year(year: u64) -> u64 {
    let before = year - 1;
    before * 365 + before / 4 - before / 100 + before / 400 - 719_162
}

#[cfg(test)]
mod tests;
