//! Generating answers and checking them.

use std::collections::BTreeMap;
use std::path::Path;

use edgellm::eval::{AnswerTask, Asked, Entry, Item, read_answer_tasks};
use edgellm::model::ModelError;
use edgellm::model::adapter::Adapter;
use edgellm::model::generate::{Flow, Generator};
use edgellm::model::sample::Sampler;
use edgellm::model::traits::Voter;
use edgellm::session::LoadedModel;
use serde::Serialize;

use super::Setup;
use crate::cli::failure::Usage;
use crate::cli::prompt::{encode_prompt, render};
use crate::cli::run::exits;
use crate::cli::sampling::SamplingArgs;
use crate::cli::vote;

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
    pub(super) sampling: &'a SamplingArgs,
    pub(super) vote: &'a str,
    pub(super) adapter_dir: Option<&'a Path>,
}

impl Generation<'_> {
    /// Answers each task from an empty cache, with a sampler of its own.
    pub(super) fn run(&self, setup: &mut Setup<'_>) -> anyhow::Result<Answers> {
        let tasks = read_answer_tasks(self.path, self.limit)?;
        if tasks.is_empty() {
            anyhow::bail!("{}: expected at least one task, found none", self.path.display());
        }
        let (model, adapter) = (setup.model, setup.adapter);
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voter = vote::named(self.vote, self.adapter_dir, &exits)?;
        setup.steps("answers", |steps| {
            let mut generated = Vec::new();
            let mut right: BTreeMap<String, Vec<Item>> = BTreeMap::new();
            for (index, task) in tasks.iter().enumerate() {
                let kept = steps.find("answers", index).and_then(|entry| entry.text);
                let answer = match kept {
                    Some(answer) => answer,
                    None => {
                        let ids = self.prompt(model, task, index)?;
                        let sampler = &mut self.sampling.sampler_of(index)?;
                        let answer = self.answer(model, adapter, (voter.as_ref(), &exits), &ids, sampler)?;
                        let entry = Entry { values: Vec::new(), text: Some(answer.clone()) };
                        steps.keep("answers", index, &entry)?;
                        answer
                    }
                };
                let is_right = task.is_right(&answer);
                let item = Item { sum: f64::from(u8::from(is_right)), weight: 1.0 };
                right.entry(task.figure().into()).or_default().push(item);
                generated.push(Generated { check: task.figure(), answer, right: is_right });
                steps.done(index + 1, tasks.len());
            }
            Ok((generated, right))
        })
    }

    fn prompt(&self, model: &LoadedModel, task: &AnswerTask, index: usize) -> anyhow::Result<Vec<u32>> {
        let ids = match &task.asked {
            Asked::Prompt(text) => encode_prompt(&model.tokenizer, text, false)?,
            Asked::Messages(messages) => render(&model.tokenizer, model.chat_template.as_ref(), messages)?.1,
        };
        if ids.is_empty() {
            return Err(Usage(format!("{}: task {} has no token", self.path.display(), index + 1)).into());
        }
        Ok(ids)
    }

    fn answer(
        &self,
        model: &LoadedModel,
        adapter: Option<&Adapter>,
        (voter, exits): (&dyn Voter, &[usize]),
        ids: &[u32],
        sampler: &mut Sampler,
    ) -> Result<String, ModelError> {
        let mut generator = Generator::new(&model.decoder, adapter, voter, exits)?;
        let stop = &model.decoder.config().eos_token_ids;
        let mut answer = generator.generate(ids, self.max_tokens, stop, sampler, |_token| Ok(Flow::Continue))?;
        answer.truncate(answer.iter().position(|id| stop.contains(id)).unwrap_or(answer.len()));
        model.tokenizer.decode(&answer, true)
    }
}
