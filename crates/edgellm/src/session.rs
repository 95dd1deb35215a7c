//! Loading a model whole: its files, its decoder on a device, its tokenizer, its chat template and its adapters.

use std::path::Path;

use edgellm_model::adapter::{Adapter, AdapterSet};
use edgellm_model::chat::ChatTemplate;
use edgellm_model::decoder::{Decoder, LoadOptions};
use edgellm_model::files::ModelFiles;
use edgellm_model::generate::Generator;
use edgellm_model::tokenizer::Tokenizer;
use edgellm_model::traits::Voter;

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
    /// Adapters on this base, by name. None is chosen at first; a model with a merged adapter brings its exit norms.
    pub adapters: AdapterSet,
}

impl LoadedModel {
    /// Reads an adapter for this model under a name. It is in use once it is chosen (`self.adapters.choose`).
    ///
    /// # Errors
    /// The name is not one or is taken, the directory cannot be read, or the adapter does not fit the model.
    pub fn load_adapter(&mut self, name: &str, dir: &Path) -> Result<(), EdgeError> {
        Ok(self.adapters.load(name, dir, self.decoder.config(), self.decoder.device())?)
    }

    /// A generator with an empty cache and the adapter that is chosen now, for as long as it lives: to go on with another
    /// adapter, choose it, start another generator and run all tokens again.
    ///
    /// # Errors
    /// The exits are not ascending numbers of blocks that end with the whole model.
    pub fn generator<'a>(&'a self, voter: &'a dyn Voter, exits: &[usize]) -> Result<Generator<'a>, EdgeError> {
        Ok(Generator::new(&self.decoder, self.adapters.current(), voter, exits)?)
    }
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
    let exits = if path.is_dir() { Adapter::load_exits(path, decoder.config(), decoder.device())? } else { None };
    Ok(LoadedModel { files, decoder, tokenizer, chat_template, adapters: AdapterSet::new(exits) })
}
