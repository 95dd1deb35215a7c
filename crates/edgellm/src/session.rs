//! Loading a model whole: its files, its decoder on a device, its tokenizer and its chat template.

use std::path::Path;

use edgellm_model::chat::ChatTemplate;
use edgellm_model::decoder::{Decoder, LoadOptions};
use edgellm_model::files::ModelFiles;
use edgellm_model::tokenizer::Tokenizer;

use crate::EdgeError;

/// A model that is ready to run.
pub struct LoadedModel {
    /// Its files, memory-mapped.
    pub files: ModelFiles,
    /// The decoder on its device.
    pub decoder: Decoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, where the model has one.
    pub chat_template: Option<ChatTemplate>,
}

/// Loads a Hugging Face directory, a compressed directory or a GGUF file.
///
/// # Errors
/// A file is missing or malformed, or the tensors do not fit the configuration.
pub fn load_model(path: &Path, options: &LoadOptions) -> Result<LoadedModel, EdgeError> {
    let files = ModelFiles::open(path)?;
    let tokenizer = files.tokenizer()?;
    let chat_template = files.chat_template()?;
    let decoder = Decoder::load(&files, options)?;
    Ok(LoadedModel { files, decoder, tokenizer, chat_template })
}
