//! The measurements of `edgellm eval`, each on its own data.

use std::path::Path;

use edgellm::eval::{
    QuestionFile, Scoring, divergence_in_steps, heldout_loss_in_steps, multiple_choice_in_steps, perplexity_in_steps,
    read_questions, reliability_in_steps, strided_perplexity_in_steps,
};
use edgellm::model::io::read_text;
use edgellm::model::traits::Voter;

use super::{Eval, Results, ScoringArg, Setup, answers};
use crate::cli::run::exits;
use crate::cli::vote;

impl Eval {
    /// Everything that was asked for, into `results`.
    pub(super) fn measure(&self, setup: &mut Setup<'_>, results: &mut Results) -> anyhow::Result<()> {
        if let Some(path) = &self.text {
            self.on_text(setup, path, results)?;
        }
        if let Some(path) = &self.data {
            self.on_data(setup, path, results)?;
        }
        if let Some(path) = &self.multiple_choice {
            self.on_questions(setup, path, results)?;
        }
        if let Some(path) = &self.answers {
            let generation = answers::Generation {
                path,
                limit: self.limit.unwrap_or(usize::MAX),
                max_tokens: self.max_tokens,
                sampling: &self.sampling,
                vote: &self.vote[0],
                adapter_dir: self.adapter.as_deref(),
            };
            (results.generated, results.answers) = generation.run(setup)?;
        }
        Ok(())
    }

    fn on_text(&self, setup: &mut Setup<'_>, path: &Path, results: &mut Results) -> anyhow::Result<()> {
        let (model, adapter) = (setup.model, setup.adapter);
        let ids = model.tokenizer.encode(&read_text(path)?, false)?;
        let (context, limit) = (self.context, self.windows);
        results.perplexity = Some(setup.steps("perplexity", |steps| {
            Ok(perplexity_in_steps(&model.decoder, adapter, &ids, context, limit, steps)?)
        })?);
        if let Some(stride) = self.stride {
            results.strided = Some(setup.steps("strided perplexity", |steps| {
                Ok(strided_perplexity_in_steps(&model.decoder, adapter, &ids, (context, stride), limit, steps)?)
            })?);
        }
        if let Some(name) = &self.base {
            let base = setup.ctx.load_reference(name)?;
            if base.tokenizer.encode(&read_text(path)?, false)? != ids {
                anyhow::bail!("the base model '{name}' cuts the text into other tokens than '{}'", self.model);
            }
            results.divergence = Some(setup.steps("KL divergence", |steps| {
                Ok(divergence_in_steps((&base.decoder, None), (&model.decoder, adapter), &ids, context, limit, steps)?)
            })?);
        }
        Ok(())
    }

    fn on_data(&self, setup: &mut Setup<'_>, path: &Path, results: &mut Results) -> anyhow::Result<()> {
        let (model, adapter) = (setup.model, setup.adapter);
        let data = self.format.read(model, path)?;
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voters = self.voters(&exits)?;
        let voters: Vec<&dyn Voter> = voters.iter().map(AsRef::as_ref).collect();
        results.heldout = Some(setup.steps("held-out loss", |steps| {
            Ok(heldout_loss_in_steps(&model.decoder, adapter, &exits, &voters, &data.examples, steps)?)
        })?);
        if self.calibration {
            results.reliability = Some(setup.steps("calibration", |steps| {
                Ok(reliability_in_steps(&model.decoder, adapter, &exits, &voters, &data.examples, steps)?)
            })?);
        }
        results.data = Some(data.report);
        Ok(())
    }

    fn on_questions(&self, setup: &mut Setup<'_>, path: &Path, results: &mut Results) -> anyhow::Result<()> {
        let (model, adapter) = (setup.model, setup.adapter);
        let scoring = match self.scoring {
            ScoringArg::Letter => Scoring::Letter,
            ScoringArg::Answer => Scoring::Answer,
        };
        let limit = self.limit.unwrap_or(usize::MAX);
        let file = QuestionFile { path, limit, scoring, shots: self.shots, shots_path: self.shots_file.as_deref() };
        let questions = read_questions(&file, &model.tokenizer)?;
        let exits = exits(adapter, model.decoder.n_blocks())?;
        let voters = self.voters(&exits)?;
        let voters: Vec<&dyn Voter> = voters.iter().map(AsRef::as_ref).collect();
        let found = setup.steps("multiple choice", |steps| {
            Ok(multiple_choice_in_steps(&model.decoder, adapter, &exits, &voters, &questions, steps)?)
        })?;
        for (question, right) in questions.iter().zip(&found.items[exits.len()]) {
            let Some(subject) = &question.subject else { continue };
            let counts = results.by_subject.entry(subject.clone()).or_default();
            counts[0] += 1;
            counts[1] += usize::from(right[0]);
        }
        results.choice = Some(found);
        Ok(())
    }

    /// The votes that were asked for.
    fn voters(&self, exits: &[usize]) -> anyhow::Result<Vec<Box<dyn Voter>>> {
        self.vote.iter().map(|name| vote::named(name, self.adapter.as_deref(), exits)).collect()
    }
}
