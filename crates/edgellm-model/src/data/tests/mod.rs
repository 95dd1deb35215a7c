//! Tests of reading and encoding: what the two parts below share.

mod files;
mod templates;

use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::chat::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// A tokenizer of single bytes with `<|end|>` as token 256.
fn tokenizer() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    crate::testing::tiny_model_dir(folder.path(), 0).unwrap();
    Tokenizer::open(&folder.path().join("tokenizer.json")).unwrap()
}

const END: u32 = 256;

/// A chat template that marks roles.
const CHAT: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";

fn chat(source: &str) -> ChatTemplate {
    ChatTemplate::new(Path::new("t"), source, Default::default()).unwrap()
}

/// A file of that name with this content.
fn file(name: &str, content: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    (folder, path)
}
