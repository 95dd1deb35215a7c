//! The values that cross the border.

use edgellm::model::chat::ChatMessage;
use edgellm::model::data::Record;
use edgellm::model::sample::SamplingConfig;
use serde::Serialize;

/// How a model is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq, uniffi::Record)]
pub struct LoadOptions {
    /// Bytes that the engine may use for weights, keys and values of the context, and the buffers of tuning; not counted
    /// are the program itself and the app. A smaller budget gives a shorter context, down to 256 tokens. `None`: no limit.
    #[uniffi(default = None)]
    pub memory_budget_bytes: Option<u64>,
    /// Compress in memory while loading: a policy file (TOML or JSON, from `edgellm plan`), or one format for everything,
    /// such as `q4g32a`. `None`: the formats of the file.
    #[uniffi(default = None)]
    pub policy: Option<String>,
    /// Threads, in the whole process, all engines together. `None`: as it is, at first all processors.
    #[uniffi(default = None)]
    pub threads: Option<u32>,
    /// Instruction set of the CPU kernels, in the whole process, such as `neon+dotprod`. `None`: the best there is.
    #[uniffi(default = None)]
    pub kernels: Option<String>,
}

/// What an engine has loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, uniffi::Record)]
pub struct ModelInfo {
    /// The folder's or file's name.
    pub name: String,
    /// The architecture, as the configuration names it.
    pub architecture: String,
    /// Bytes of the weights in memory.
    pub bytes: u64,
    /// Blocks.
    pub layers: u32,
    /// Tokens of a prompt and its answer together, at most.
    pub context: u32,
    /// Whether the model has a chat template, which [`Engine::chat`](crate::Engine::chat) needs.
    pub can_chat: bool,
    /// The instruction set of the CPU kernels in use.
    pub kernels: String,
    /// Threads in use.
    pub threads: u32,
}

/// How text is generated.
#[derive(Clone, Debug, PartialEq, uniffi::Record)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    #[uniffi(default = 256)]
    pub max_tokens: u32,
    /// Temperature, from 0 to 100; 0 always takes the likeliest token.
    #[uniffi(default = 0.0)]
    pub temperature: f64,
    /// Draw from the likeliest tokens only; 0 for all.
    #[uniffi(default = 0)]
    pub top_k: u32,
    /// Draw from the likeliest tokens that together reach this probability, above 0 and up to 1.
    #[uniffi(default = 1.0)]
    pub top_p: f64,
    /// Seed of the draws.
    #[uniffi(default = 0)]
    pub seed: u64,
    /// Texts that end the answer; they are not part of it.
    #[uniffi(default = [])]
    pub stop: Vec<String>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 256, temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, stop: Vec::new() }
    }
}

impl GenerateOptions {
    pub(crate) fn sampling(&self) -> SamplingConfig {
        SamplingConfig {
            temperature: self.temperature,
            top_k: self.top_k as usize,
            top_p: self.top_p,
            min_p: 0.0,
            seed: self.seed,
        }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, uniffi::Enum)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model ended it.
    EndOfText,
    /// A text of `stop` came.
    StopText,
    /// `max_tokens` or the context is reached.
    Length,
    /// The listener or [`Engine::cancel`](crate::Engine::cancel) ended it.
    Cancelled,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, uniffi::Record)]
pub struct Generation {
    /// The text: all that the listener got, together.
    pub text: String,
    /// Tokens generated.
    pub tokens: u32,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Those of them that were still known from the call before.
    pub reused_tokens: u32,
    /// Why it ended.
    pub finish: Finish,
    /// Seconds until the first token.
    pub first_token_seconds: f64,
    /// Seconds for all of it.
    pub seconds: f64,
}

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, uniffi::Record)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl From<&Message> for ChatMessage {
    fn from(message: &Message) -> Self {
        ChatMessage::new(message.role.as_str(), message.content.as_str())
    }
}

/// Something to learn from.
#[derive(Clone, Debug, PartialEq, Eq, uniffi::Enum)]
pub enum Example {
    /// What is given, and what is to be said; a message and its answer where the model has a chat template.
    Pair {
        /// What is given.
        prompt: String,
        /// What is to be said.
        response: String,
    },
    /// A conversation: what the assistant says is learned. Needs a chat template.
    Chat {
        /// The messages in their order.
        messages: Vec<Message>,
    },
    /// A text, all of which is learned.
    Text {
        /// The text.
        text: String,
    },
}

impl Example {
    pub(crate) fn record(&self) -> Record {
        match self {
            Example::Pair { prompt, response } => {
                Record::PromptResponse { prompt: prompt.clone(), response: response.clone() }
            }
            Example::Chat { messages } => Record::Messages(messages.iter().map(ChatMessage::from).collect()),
            Example::Text { text } => Record::Text(text.clone()),
        }
    }
}

/// How an adapter is learned.
#[derive(Clone, Debug, PartialEq, uniffi::Record)]
pub struct AdaptOptions {
    /// Optimizer steps.
    #[uniffi(default = 60)]
    pub steps: u32,
    /// Examples in a step.
    #[uniffi(default = 4)]
    pub batch: u32,
    /// Rank of the adapter; its scale is 2.
    #[uniffi(default = 8)]
    pub rank: u32,
    /// Blocks that are tuned, counted from the last. `None`: 8, or as many of 8 as fit into the budget.
    #[uniffi(default = None)]
    pub window: Option<u32>,
    /// Learning rate.
    #[uniffi(default = 0.001)]
    pub learning_rate: f64,
    /// Tokens of an example at most; the rest is cut off.
    #[uniffi(default = 256)]
    pub max_tokens: u32,
    /// Bytes that weights and buffers may take together. `None`: the budget that the model was loaded with.
    #[uniffi(default = None)]
    pub memory_budget_bytes: Option<u64>,
    /// Seed of the adapter's start and of the order of examples.
    #[uniffi(default = 0)]
    pub seed: u64,
}

impl Default for AdaptOptions {
    fn default() -> Self {
        Self {
            steps: 60,
            batch: 4,
            rank: 8,
            window: None,
            learning_rate: 1e-3,
            max_tokens: 256,
            memory_budget_bytes: None,
            seed: 0,
        }
    }
}

/// What a listener says after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, uniffi::Enum)]
pub enum Step {
    /// Go on.
    Continue,
    /// Wait until [`Engine::resume`](crate::Engine::resume) or [`Engine::cancel`](crate::Engine::cancel) is called.
    Pause,
    /// End here, with what was learned so far.
    Stop,
}

/// What tuning did.
#[derive(Clone, Debug, PartialEq, Serialize, uniffi::Record)]
pub struct Adaptation {
    /// Steps done.
    pub steps: u32,
    /// Whether it ended before its last step.
    pub stopped: bool,
    /// Examples that were learned from.
    pub examples: u32,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// Values of the adapter.
    pub parameters: u64,
    /// Blocks that were tuned.
    pub window: u32,
    /// Most bytes that the buffers took.
    pub buffer_bytes: u64,
    /// Seconds for all of it, pauses included.
    pub seconds: f64,
}
