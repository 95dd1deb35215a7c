//! From what a person writes to what the model sees: chat templates, message files and raw text.

use std::path::Path;

use edgellm::model::ModelError;
use edgellm::model::chat::{ChatMessage, ChatTemplate};
use edgellm::model::io::read_text;
use edgellm::model::tokenizer::Tokenizer;

use super::failure::Usage;

/// Messages of a JSON file: a list of objects with `role` and `content`.
pub(crate) fn read_messages(path: &Path) -> anyhow::Result<Vec<ChatMessage>> {
    let text = read_text(path)?;
    let messages: Vec<ChatMessage> = serde_json::from_str(&text).map_err(|e| ModelError::Format {
        path: path.to_path_buf(),
        what: "chat messages".into(),
        expected: "a list of objects with the texts 'role' and 'content'".into(),
        found: e.to_string(),
    })?;
    if messages.is_empty() {
        return Err(ModelError::Format {
            path: path.to_path_buf(),
            what: "chat messages".into(),
            expected: "at least one message".into(),
            found: "none".into(),
        }
        .into());
    }
    Ok(messages)
}

/// The conversation as the model sees it, up to where the assistant is to speak; with its tokens. The template writes
/// the special tokens itself, so none are added.
pub(crate) fn render(
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    messages: &[ChatMessage],
) -> anyhow::Result<(String, Vec<u32>)> {
    let Some(template) = template else {
        return Err(Usage("this model has no chat template; give a plain prompt with -p or -f".into()).into());
    };
    let text = template.render(messages, true)?;
    let ids = tokenizer.encode(&text, false)?;
    Ok((text, ids))
}

/// The tokens of a plain text; `raw` adds none.
pub(crate) fn encode_prompt(tokenizer: &Tokenizer, text: &str, raw: bool) -> Result<Vec<u32>, ModelError> {
    tokenizer.encode(text, !raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_files_are_lists_of_role_and_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.json");
        let check = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_messages(&path).map_err(|e| e.to_string())
        };
        let read = check(r#"[{"role": "user", "content": "hi"}]"#).unwrap();
        assert_eq!(read, [ChatMessage::new("user", "hi")]);
        for bad in ["", "[]", "{}", r#"[{"role": "user"}]"#, r#"[{"role": 1, "content": "x"}]"#] {
            assert!(check(bad).unwrap_err().contains("m.json: chat messages: expected"), "{bad}");
        }
    }
}
