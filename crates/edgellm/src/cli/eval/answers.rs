//! Generating answers and checking them.

use std::collections::BTreeMap;
use std::path::Path;

use edgellm::eval::{Asked, Item, read_answer_tasks};
use edgellm::model::adapter::Adapter;
use edgellm::model::generate::{Flow, Generator};
use edgellm::model::sample::{Sampler, SamplingConfig};
use edgellm::session::LoadedModel;
use serde::Serialize;

use super::with_progress;
use crate::cli::failure::Usage;
use crate::cli::prompt::{encode_prompt, render};
use crate::cli::run::exits;
use crate::cli::{Context, vote};

/// An answer that was generated.
#[derive(Debug, Serialize)]
pub(super) struct Generated {
    check: &'static str,
    answer: String,
    right: bool,
}

/// What the answers were, and how many of each check were right.
pub(super) type Answers = (Vec<Generated>, BTreeMap<String, Vec<Item>>);

/// How answers are generated.
pub(super) struct Generation<'a> {
    pub(super) path: &'a Path,
    pub(super) limit: usize,
    pub(super) max_tokens: usize,
    pub(super) vote: &'a str,
    pub(super) adapter_dir: Option<&'a Path>,
}

impl Generation<'_> {
    /// Answers greedily, each task from an empty cache.
    pub(super) fn run(&self, ctx: &Context, model: &LoadedModel, adapter: Option<&Adapter>) -> anyhow::Result<Answers> {
        let tasks = read_answer_tasks(self.path, self.limit)?;
        if tasks.is_empty() {
            anyhow::bail!("{}: expected at least one task, found none", self.path.display());
        }
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voter = vote::named(self.vote, self.adapter_dir, &exits)?;
        with_progress(ctx, "answers", |on_step| {
            let mut generated = Vec::new();
            let mut right: BTreeMap<String, Vec<Item>> = BTreeMap::new();
            for (index, task) in tasks.iter().enumerate() {
                let ids = match &task.asked {
                    Asked::Prompt(text) => encode_prompt(&model.tokenizer, text, false)?,
                    Asked::Messages(messages) => render(&model.tokenizer, model.chat_template.as_ref(), messages)?.1,
                };
                if ids.is_empty() {
                    return Err(Usage(format!("{}: task {} has no token", self.path.display(), index + 1)).into());
                }
                let mut generator = Generator::new(&model.decoder, adapter, voter.as_ref(), &exits)?;
                let mut sampler = Sampler::new(SamplingConfig { temperature: 0.0, ..SamplingConfig::default() })?;
                let stop = &model.decoder.config().eos_token_ids;
                let mut answer =
                    generator.generate(&ids, self.max_tokens, stop, &mut sampler, |_token| Ok(Flow::Continue))?;
                answer.truncate(answer.iter().position(|id| stop.contains(id)).unwrap_or(answer.len()));
                let answer = model.tokenizer.decode(&answer, true)?;
                let is_right = task.is_right(&answer);
                let item = Item { sum: f64::from(u8::from(is_right)), weight: 1.0 };
                right.entry(task.figure().into()).or_default().push(item);
                generated.push(Generated { check: task.figure(), answer, right: is_right });
                on_step(edgellm::eval::Progress { done: index + 1, total: tasks.len() });
            }
            Ok((generated, right))
        })
    }
}
