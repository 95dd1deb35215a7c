//! Loading a model within the memory that there is.

use edgellm::device::DeviceChoice;
use edgellm::eval::rss_bytes;
use edgellm::model::decoder::Activations;
use edgellm::sched::usable_bytes;
use edgellm::session::{LoadedModel, Memory, Streaming, load_model, load_model_within};
use serde_json::{Value, json};

use super::Context;
use super::output::bytes;

/// What a command needs beside the weights.
#[derive(Clone, Copy)]
pub(crate) struct Room {
    /// Tokens whose keys and values are kept.
    pub(crate) cache_tokens: usize,
    /// Tokens that are computed at once.
    pub(crate) pass_tokens: usize,
    /// Bytes for something else.
    pub(crate) other: u64,
}

impl Room {
    /// For windows of text without a cache.
    pub(crate) const PASSES: Room = Room { cache_tokens: 0, pass_tokens: 2048, other: 0 };

    /// For text of so many tokens, the prompt included.
    pub(crate) fn text(prompt: usize, generated: usize) -> Self {
        Room { cache_tokens: prompt + generated, pass_tokens: prompt, other: 0 }
    }
}

/// Of the memory that the system has left, hundredths that are used without asking.
const SHARE: u64 = 90;

impl Context {
    /// Loads the model that `-m` names.
    pub(crate) fn load(&self, name: &str, room: Room) -> anyhow::Result<LoadedModel> {
        let model = self.load_with(name, self.activations, room)?;
        self.observed.describe(&model.decoder);
        Ok(model)
    }

    /// Loads a model that others are compared with: it computes in f32, whatever `--activations` says.
    pub(crate) fn load_reference(&self, name: &str) -> anyhow::Result<LoadedModel> {
        self.load_with(name, Activations::F32, Room::PASSES)
    }

    pub(crate) fn load_with(&self, name: &str, activations: Activations, room: Room) -> anyhow::Result<LoadedModel> {
        let path = self.store.resolve(name)?;
        // A device that is not there is reported before a file is read.
        let options = self.device.load_options(activations)?;
        let start = std::time::Instant::now();
        let model = match self.memory_limit() {
            Some(limit) => {
                let Room { cache_tokens, pass_tokens, other } = room;
                load_model_within(&path, &options, Memory { limit, cache_tokens, pass_tokens, other })?
            }
            None => load_model(&path, &options)?,
        };
        if let Some(streaming) = &model.streaming {
            self.say(&sentence(streaming));
        }
        tracing::info!(path = %path.display(), device = %self.device, seconds = start.elapsed().as_secs_f64(), "loaded");
        Ok(model)
    }

    /// What `--max-memory` says, or else what the system has left, where blocks can be streamed.
    fn memory_limit(&self) -> Option<u64> {
        let on_cpu = matches!(self.device, DeviceChoice::Auto | DeviceChoice::Flex);
        let free = || Some(rss_bytes()? + usable_bytes()? / 100 * SHARE);
        self.max_memory.or_else(|| on_cpu.then(free).flatten())
    }
}

/// What stays and what is streamed.
fn sentence(streaming: &Streaming) -> String {
    let placement = &streaming.placement;
    let (blocks, kept) = (placement.resident.len(), placement.resident.iter().filter(|kept| **kept).count());
    let mut text = format!(
        "memory: {kept} of {blocks} blocks stay, {} are streamed from storage through {} buffers, {} a token at {}/s",
        blocks - kept,
        placement.slots,
        bytes(placement.read_bytes),
        bytes(streaming.read_rate as u64)
    );
    if !streaming.ready {
        text.push_str(
            "; note: they are converted each time they are read, which `edgellm compress --prepare` does once and for all",
        );
    }
    text
}

/// The same for programs.
pub(crate) fn streaming_json(streaming: Option<&Streaming>) -> Value {
    let Some(streaming) = streaming else { return Value::Null };
    let placement = &streaming.placement;
    let done = streaming.store.streamed();
    json!({
        "resident": placement.resident, "buffers": placement.slots, "bytes": placement.bytes,
        "read_bytes_per_pass": placement.read_bytes, "predicted_seconds_per_pass": placement.seconds,
        "read_rate": streaming.read_rate, "ready": streaming.ready, "direct": streaming.direct,
        "streamed_bytes": done.bytes, "reading_seconds": done.reading, "waiting_seconds": done.waiting,
    })
}
