//! The engine: a loaded model behind a lock, and what can be asked of it.

use std::path::Path;
use std::sync::{Arc, Mutex};

use edgellm::model::adapter::Adapter;
use edgellm::model::chat::ChatMessage;

use crate::control::Control;
use crate::error::guard;
use crate::load::{Work, load};
use crate::{
    AdaptOptions, Adaptation, EngineError, Example, GenerateOptions, Generation, ListenerError, LoadOptions, Message,
    ModelInfo, Result, Step, adapt, generate,
};

/// Gets the text of an answer as it comes, on the thread that asked for it.
#[uniffi::export(with_foreign)]
pub trait TokenListener: Send + Sync {
    /// Takes a piece of the text, at least one character; returns whether to go on.
    ///
    /// # Errors
    /// The listener failed: the answer ends, with an error.
    fn on_token(&self, text: String) -> Result<bool, ListenerError>;
}

/// Gets the progress of tuning, on the thread that asked for it.
#[uniffi::export(with_foreign)]
pub trait ProgressListener: Send + Sync {
    /// Takes note of a step: its number from 1, the number of all steps, its loss, and the bytes that the buffers take;
    /// returns whether to go on.
    ///
    /// # Errors
    /// The listener failed: tuning ends, with an error, and nothing of it is kept.
    fn on_step(&self, step: u32, total: u32, loss: f64, bytes: u64) -> Result<Step, ListenerError>;
}

/// A loaded model.
#[derive(uniffi::Object)]
pub struct Engine {
    work: Mutex<Work>,
    control: Control,
    info: ModelInfo,
}

#[uniffi::export]
impl Engine {
    /// Loads a Hugging Face folder, a compressed folder or a GGUF file.
    ///
    /// # Errors
    /// A file is missing or malformed, an option is out of range, or it does not fit into the budget.
    #[uniffi::constructor]
    pub fn load(path: String, options: LoadOptions) -> Result<Arc<Self>> {
        guard(|| {
            let (work, info) = load(&path, &options)?;
            Ok(Arc::new(Self { work: Mutex::new(work), control: Control::default(), info }))
        })
    }

    /// What is loaded. Answers while the engine is busy, too.
    pub fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    /// Goes on with a text. The prompt is taken as it is, without the chat template.
    ///
    /// # Errors
    /// The engine is busy, an option is out of range, the prompt is empty or longer than the context, or the listener
    /// fails.
    pub fn generate(
        &self,
        prompt: String,
        options: GenerateOptions,
        listener: Option<Arc<dyn TokenListener>>,
    ) -> Result<Generation> {
        guard(|| {
            let (_running, mut work) = self.control.begin(&self.work, "generating")?;
            let ids = work.tokenizer.encode(&prompt, true)?;
            generate::answer(&mut work, &self.control, ids, &options, listener.as_deref())
        })
    }

    /// Answers a conversation, which ends with a message of the user. What was computed for the messages before is kept
    /// for the next call.
    ///
    /// # Errors
    /// As for [`Engine::generate`], or the model has no chat template, or the template refuses the messages.
    pub fn chat(
        &self,
        messages: Vec<Message>,
        options: GenerateOptions,
        listener: Option<Arc<dyn TokenListener>>,
    ) -> Result<Generation> {
        guard(|| {
            let (_running, mut work) = self.control.begin(&self.work, "chatting")?;
            let ids = conversation(&work, &messages)?;
            generate::answer(&mut work, &self.control, ids, &options, listener.as_deref())
        })
    }

    /// Learns a fresh adapter from examples and uses it from now on, in place of the one before.
    ///
    /// # Errors
    /// The engine is busy, an option is out of range, there is nothing to learn, it does not fit into the budget, the loss
    /// is not finite, or the listener fails. The adapter in use is then as it was.
    pub fn adapt(
        &self,
        examples: Vec<Example>,
        options: AdaptOptions,
        listener: Option<Arc<dyn ProgressListener>>,
    ) -> Result<Adaptation> {
        guard(|| {
            let (_running, mut work) = self.control.begin(&self.work, "adapting")?;
            // Its memory goes to the tuning; the adapter will be another.
            work.seen = None;
            let (adapter, report) = adapt::adapt(&work, &self.control, &examples, &options, listener.as_deref())?;
            work.set_adapter(Some(adapter));
            Ok(report)
        })
    }

    /// Ends the call that runs now, after the token or step at hand: what was generated or learned so far is kept. A paused
    /// one ends as well. Without one, nothing happens.
    pub fn cancel(&self) {
        self.control.cancel();
    }

    /// Makes tuning that runs now wait before its next step. Without it, nothing happens.
    pub fn pause(&self) {
        self.control.pause(true);
    }

    /// Makes tuning that is paused go on.
    pub fn resume(&self) {
        self.control.pause(false);
    }

    /// Writes the adapter in use as a folder that PEFT reads as well. An adapter at that path is replaced once the new one
    /// is whole.
    ///
    /// # Errors
    /// The engine is busy, no adapter is in use, something else is at the path, or it cannot be written.
    pub fn save_adapter(&self, path: String) -> Result<()> {
        guard(|| {
            let (_running, work) = self.control.begin(&self.work, "saving an adapter")?;
            let Some(adapter) = &work.adapter else {
                return Err(EngineError::argument("adapter to save", "one that was learned or loaded", "none"));
            };
            Ok(adapter.save(Path::new(&path), &self.info.name, true)?)
        })
    }

    /// Reads an adapter and uses it from now on, in place of the one before.
    ///
    /// # Errors
    /// The engine is busy, the folder cannot be read, or the adapter does not fit the model. The one in use is then as it
    /// was.
    pub fn load_adapter(&self, path: String) -> Result<()> {
        guard(|| {
            let (_running, mut work) = self.control.begin(&self.work, "loading an adapter")?;
            let adapter = Adapter::load(Path::new(&path), work.decoder.config(), work.decoder.device())?;
            work.set_adapter(Some(adapter));
            Ok(())
        })
    }

    /// Uses no adapter from now on. Without one, nothing happens.
    ///
    /// # Errors
    /// The engine is busy.
    pub fn remove_adapter(&self) -> Result<()> {
        guard(|| {
            let (_running, mut work) = self.control.begin(&self.work, "removing an adapter")?;
            work.set_adapter(None);
            Ok(())
        })
    }

    /// Whether an adapter is in use.
    ///
    /// # Errors
    /// The engine is busy.
    pub fn has_adapter(&self) -> Result<bool> {
        guard(|| Ok(self.control.begin(&self.work, "looking")?.1.adapter.is_some()))
    }
}

/// The tokens of a conversation, up to where the assistant is to speak.
fn conversation(work: &Work, messages: &[Message]) -> Result<Vec<u32>> {
    if messages.is_empty() {
        return Err(EngineError::argument("messages", "at least one", "none"));
    }
    let Some(template) = &work.chat_template else {
        let found = "a model without one; use generate";
        return Err(EngineError::argument("chat", "a model with a chat template", found));
    };
    let messages: Vec<ChatMessage> = messages.iter().map(ChatMessage::from).collect();
    // The template writes the special tokens itself.
    Ok(work.tokenizer.encode(&template.render(&messages, true)?, false)?)
}
