//! The one error type of the crate.
//!
//! Every variant names what was read or asked for, where, what was expected and what was found, so that its message
//! is a sentence that a person can act on. Names that come from files are shortened and escaped before they are
//! printed: a hostile file must not be able to fill a terminal or a log.

use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};

/// `Result` with [`ModelError`].
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

/// What can go wrong between a file and a running model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb with its object's kind: `open`, `create the folder`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file does not follow its format.
    #[error("{}: {what}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Which part of the file.
        what: String,
        /// What the format, or the rest of the file, asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor has another shape, type or size than it must have.
    #[error("{}: tensor '{tensor}': expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file or model directory.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the model or the format asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A tensor is not in the model.
    #[error("{}: no tensor '{tensor}' among the {available} in it", path.display())]
    MissingTensor {
        /// The file or model directory.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// How many tensors there are.
        available: usize,
    },
    /// A field of `config.json`, or its counterpart in a GGUF file's metadata, is missing or makes no sense.
    #[error("{}: configuration field '{field}': expected {expected}, found {found}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field or metadata key.
        field: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The file is well-formed, but holds something that this crate does not do.
    #[error("{}: {what} is not supported (supported: {supported})", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
        /// What there is instead.
        supported: String,
    },
    /// A tokenizer cannot be built, or cannot encode or decode.
    #[error("{}: tokenizer: {what}: expected {expected}, found {found}", path.display())]
    Tokenizer {
        /// The file that the tokenizer comes from.
        path: PathBuf,
        /// The part or the operation.
        what: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A chat template cannot be parsed, or fails or refuses while it is rendered.
    #[error("{}: chat template: {reason}", path.display())]
    Template {
        /// The file that the template comes from.
        path: PathBuf,
        /// The template engine's, or the template's own, message.
        reason: String,
    },
    /// A line of a data file cannot be used.
    #[error("{} line {line}: expected {expected}, found {found}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What a line must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A file's text cannot be parsed, or a part of it cannot be used.
    #[error("{}: {what}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Which part of the file, or what it should have been.
        what: String,
        /// The parser's answer.
        reason: String,
    },
    /// A caller's value is out of range, or does not fit the model.
    #[error("{what}: expected {expected}, found {found}")]
    Value {
        /// The parameter.
        what: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The packed bytes of a tensor are not what their format asks for.
    #[error("{}: tensor '{tensor}': {source}", path.display())]
    Packed {
        /// The file or model directory.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The kernels' answer.
        source: edgellm_kernels::KernelError,
    },
    /// An operator refused its input.
    #[error(transparent)]
    Kernel(#[from] edgellm_kernels::KernelError),
    /// A download failed.
    #[error("{repo}: {what}: {reason}")]
    Hub {
        /// The repository's id.
        repo: String,
        /// The file or the step.
        what: String,
        /// The server's or the network's answer.
        reason: String,
    },
}

impl ModelError {
    /// The system's refusal to read or write `path`.
    pub fn io(path: &Path, source: io::Error) -> Self {
        Self::io_on("read or write", path, source)
    }

    pub(crate) fn io_on(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn format(
        path: &Path,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Display,
    ) -> Self {
        let (path, what, expected) = (path.to_owned(), what.into(), expected.into());
        Self::Format { path, what, expected, found: found.to_string() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, expected: impl Into<String>, found: impl Display) -> Self {
        let (path, tensor) = (path.to_owned(), Shown(tensor).to_string());
        Self::Tensor { path, tensor, expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn config(path: &Path, field: &str, expected: impl Into<String>, found: impl Display) -> Self {
        let (path, field) = (path.to_owned(), Shown(field).to_string());
        Self::Config { path, field, expected: expected.into(), found: found.to_string() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>, supported: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into(), supported: supported.into() }
    }

    pub(crate) fn tokenizer(
        path: &Path,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Display,
    ) -> Self {
        let (path, what, expected) = (path.to_owned(), what.into(), expected.into());
        Self::Tokenizer { path, what, expected, found: found.to_string() }
    }

    pub(crate) fn data(path: &Path, line: usize, expected: impl Into<String>, found: impl Display) -> Self {
        Self::Data { path: path.to_owned(), line, expected: expected.into(), found: found.to_string() }
    }
}

/// Text from a file, fit for a message: control characters escaped, at most 80 characters.
pub(crate) struct Shown<'a>(pub(crate) &'a str);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 80;
        for c in self.0.chars().take(LONGEST) {
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        if self.0.chars().nth(LONGEST).is_some() {
            write!(f, "…")?;
        }
        Ok(())
    }
}

/// A number of bytes for a message.
pub(crate) fn bytes(n: impl Display) -> String {
    format!("{n} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_is_shortened_and_escaped() {
        assert_eq!(Shown("a\u{1b}[2J\n").to_string(), "a\\u{1b}[2J\\n");
        let long = "x".repeat(1000);
        assert_eq!(Shown(&long).to_string().chars().count(), 81);
    }

    #[test]
    fn a_message_says_what_where_expected_and_found() {
        let error = ModelError::tensor(Path::new("m.gguf"), "blk.0.attn_q.weight", "shape [4, 4]", "shape [4, 5]");
        assert_eq!(
            error.to_string(),
            "m.gguf: tensor 'blk.0.attn_q.weight': expected shape [4, 4], found shape [4, 5]"
        );
    }
}
