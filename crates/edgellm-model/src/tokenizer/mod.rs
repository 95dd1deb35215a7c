//! Tokenizers: Hugging Face's `tokenizer.json`, or the vocabulary in a GGUF file's metadata.
//!
//! Both end in the `tokenizers` crate, so that there is one implementation of byte-pair encoding; [`gguf`](self) files
//! are rebuilt into the same parts (normalizer, pre-tokenizer, model, decoder) that the original `tokenizer.json` had.

mod check;
mod from_gguf;
mod stream;

pub use stream::StreamDecoder;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tokenizers::tokenizer::Tokenizer as Inner;

use crate::error::{ModelError, Result, Shown};
use crate::gguf::Gguf;
use crate::io::read_text;

/// Turns text into token ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
    path: PathBuf,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// The file cannot be read or is no tokenizer.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_json(path, &read_text(path)?)
    }

    /// Reads the text of a `tokenizer.json`; `path` is for messages. Truncation and padding that the file asks for are
    /// left out: lengths are the caller's business.
    ///
    /// # Errors
    /// The text is no tokenizer.
    pub fn from_json(path: &Path, text: &str) -> Result<Self> {
        let wrong = |found: String| ModelError::tokenizer(path, "tokenizer.json", "a tokenizer", Shown(&found));
        check::merges(text).map_err(wrong)?;
        let mut inner: Inner = guarded(|| Inner::from_bytes(text)).map_err(wrong)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { inner, path: path.to_owned() })
    }

    /// Builds the tokenizer in a GGUF file's metadata.
    ///
    /// # Errors
    /// The metadata has no tokenizer, one of an unsupported kind, or one that contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Ok(Self { inner: from_gguf::build(gguf)?, path: gguf.path().to_owned() })
    }

    /// The `tokenizer.json` of this tokenizer.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|e| self.error("tokenizer.json", e.to_string()))
    }

    /// The ids of a text. Special tokens in the text are recognised; `add_special` adds those that the model wants
    /// around every text (a start token, for some).
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let _span = tracing::debug_span!("tokenize", bytes = text.len()).entered();
        let encoding = guarded(|| self.inner.encode_fast(text, add_special));
        encoding.map(|e| e.get_ids().to_vec()).map_err(|reason| self.error("encode", reason))
    }

    /// The text of ids, without special tokens if `skip_special`. Unknown ids give nothing; bytes that are no UTF-8
    /// give U+FFFD.
    ///
    /// # Errors
    /// The tokenizer cannot decode.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|reason| self.error("decode", reason))
    }

    /// A decoder for ids that come one by one.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special)
    }

    /// Number of tokens, special ones included. The embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token, as written in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as written in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    fn error(&self, what: &str, found: String) -> ModelError {
        ModelError::tokenizer(&self.path, what, "no failure", Shown(&found))
    }
}

/// Runs a part of the tokenizers library, which may panic on tokenizers that contradict themselves; a file must not be
/// able to end the program.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
            Err(format!("a contradiction ({message})"))
        }
    }
}

#[cfg(test)]
mod tests;
