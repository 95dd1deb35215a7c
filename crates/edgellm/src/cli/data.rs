//! Examples from JSON lines for tuning and evaluation.

use std::path::Path;

use clap::Args;
use edgellm::model::data::{Example, ExampleEncoder, PromptTemplate, read_examples};
use edgellm::session::LoadedModel;

use super::failure::Usage;

/// How examples are read.
#[derive(Args)]
pub(crate) struct DataArgs {
    /// How records become prompts: chat, alpaca or text (default: chat if the model has a template, else alpaca)
    #[arg(long, value_name = "TEMPLATE")]
    template: Option<PromptTemplate>,
    /// Tokens of an example at most
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_len: usize,
}

impl DataArgs {
    /// Checks what can be checked before a model is loaded.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.max_len < 2 {
            return Err(Usage(format!("--max-len: expected at least 2, found {}", self.max_len)).into());
        }
        Ok(())
    }

    /// The examples of a file, for a model.
    pub(crate) fn read(&self, model: &LoadedModel, path: &Path) -> anyhow::Result<Vec<Example>> {
        let config = model.decoder.config();
        let chat = model.chat_template.as_ref();
        let default = if chat.is_some() { PromptTemplate::Chat } else { PromptTemplate::Alpaca };
        let Some(&end_token) = config.eos_token_ids.first() else {
            anyhow::bail!("the model names no token that ends a text (eos_token_id), which examples need");
        };
        let encoder = ExampleEncoder {
            tokenizer: &model.tokenizer,
            chat,
            template: self.template.unwrap_or(default),
            end_token,
            max_len: self.max_len.min(config.max_position_embeddings),
        };
        Ok(read_examples(path, &encoder)?)
    }
}
