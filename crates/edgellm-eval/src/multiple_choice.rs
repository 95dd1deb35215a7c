//! Multiple-choice questions: the option whose text the model finds likeliest, at every exit and by every vote.
//!
//! As EleutherAI's lm-evaluation-harness does it: the score of an option is `log p(option | context)`, summed over the
//! option's tokens (`acc`), or divided by the characters of the option (`acc_norm`; here with the space before it). Context
//! and option are tokenized separately (the harness encodes both at once and cuts, which is the same for tokenizers whose
//! words carry the space before them). Of equal scores the first counts. The context is run once; the options continue from its cache.

use burn::tensor::Tensor;
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::{CacheType, Decoder, KvCache};
use edgellm_model::traits::Voter;
use serde::Serialize;

use crate::error::{EvalError, Result, finite};
use crate::items::Steps;
use crate::votes::{Losses, check_exits};
use crate::windows::Progress;

/// An option of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceOption {
    /// Its tokens, with the space before it.
    pub ids: Vec<u32>,
    /// Its characters, with the space before it.
    pub characters: usize,
}

/// A question with its options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Tokens of what comes before the options.
    pub context: Vec<u32>,
    /// The options.
    pub options: Vec<ChoiceOption>,
    /// Index of the right one.
    pub answer: usize,
    /// What it is about, where the file tells.
    pub subject: Option<String>,
}

/// Shares of questions that were answered right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Accuracy {
    /// By summed log-likelihood.
    pub acc: f64,
    /// By log-likelihood per character.
    pub acc_norm: f64,
}

/// Accuracies on multiple-choice questions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MultipleChoice {
    /// Of each exit, in the order given.
    pub by_exit: Vec<Accuracy>,
    /// Of each voter, in the order given.
    pub votes: Vec<Accuracy>,
    /// Questions.
    pub questions: usize,
    /// Whether each question was answered right, summed and per character: of each exit, then of each voter.
    #[serde(skip)]
    pub items: Vec<Vec<[bool; 2]>>,
}

/// Answers `questions` at each of `exits` and by each vote.
///
/// A context that is too long for the model with its longest option loses its beginning.
///
/// # Errors
/// Exits that are not ascending numbers of blocks of this model, no question, a question without context, options or an
/// option without tokens, an answer that is no option, scores that are not finite, or weights that cannot be read.
pub fn multiple_choice(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    questions: &[Question],
    progress: &mut dyn FnMut(Progress),
) -> Result<MultipleChoice> {
    multiple_choice_in_steps(decoder, adapter, exits, voters, questions, &mut Steps::new(progress))
}

/// As [`multiple_choice`], in steps that may be kept; an item is a question.
///
/// # Errors
/// As [`multiple_choice`], or those of a file of items.
pub fn multiple_choice_in_steps(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    questions: &[Question],
    steps: &mut Steps<'_>,
) -> Result<MultipleChoice> {
    check_exits(exits, decoder.n_blocks())?;
    if questions.is_empty() {
        return Err(EvalError::TooLittle { what: "questions", needed: 1, found: 0 });
    }
    let mut items = vec![Vec::with_capacity(questions.len()); exits.len() + voters.len()];
    for (index, question) in questions.iter().enumerate() {
        check_question(question, index)?;
        let chosen = steps.item("multiple choice", index, 2 * items.len(), || {
            let scores = scores(decoder, adapter, exits, voters, question)?;
            let of_place = |place: usize| {
                let summed = scores.iter().map(|option| option[place]);
                let per_character = scores.iter().zip(&question.options).map(|(s, o)| s[place] / o.characters as f64);
                [likeliest(summed) as f64, likeliest(per_character) as f64]
            };
            Ok((0..exits.len() + voters.len()).flat_map(of_place).collect())
        })?;
        let is_right = |option: f64| option == question.answer as f64;
        for (items, chosen) in items.iter_mut().zip(chosen.chunks(2)) {
            items.push([is_right(chosen[0]), is_right(chosen[1])]);
        }
        steps.done(index + 1, questions.len());
    }
    let share = |items: &Vec<[bool; 2]>| {
        let share = |way: usize| items.iter().filter(|right| right[way]).count() as f64 / questions.len() as f64;
        Accuracy { acc: share(0), acc_norm: share(1) }
    };
    let (by_exit, votes) = items.split_at(exits.len());
    Ok(MultipleChoice {
        by_exit: by_exit.iter().map(share).collect(),
        votes: votes.iter().map(share).collect(),
        questions: questions.len(),
        items,
    })
}

fn check_question(question: &Question, index: usize) -> Result<()> {
    let empty = question.options.iter().any(|o| o.ids.is_empty() || o.characters == 0);
    if question.context.is_empty() || empty || question.answer >= question.options.len() {
        return Err(EvalError::Setting {
            what: "question",
            expected: "a context, options that are not empty, and an answer among them".into(),
            found: format!(
                "question {} with a context of {} tokens, {} options, and answer {}",
                index + 1,
                question.context.len(),
                question.options.len(),
                question.answer
            ),
        });
    }
    Ok(())
}

/// Log-likelihoods of a question's options: of each option, at every exit and then by every vote.
fn scores(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    voters: &[&dyn Voter],
    question: &Question,
) -> Result<Vec<Vec<f64>>> {
    let longest = question.options.iter().map(|o| o.ids.len()).max().unwrap_or(0);
    let room = decoder.config().max_position_embeddings.saturating_sub(longest - 1).max(1);
    let context = &question.context[question.context.len().saturating_sub(room)..];
    // The reference keeps keys and values as they are.
    let mut cache = decoder.new_cache_of(CacheType::F32);
    let before = states(decoder, adapter, exits, context, &mut cache)?;
    let last: Vec<Tensor<2>> = before.into_iter().map(|x| x.narrow(0, context.len() - 1, 1)).collect();
    let score = |option: &ChoiceOption| -> Result<Vec<f64>> {
        let (given, targets) = (&option.ids[..option.ids.len() - 1], option.ids.iter().map(|&id| id as i32));
        let mut normed = last.clone();
        if !given.is_empty() {
            cache.truncate(context.len());
            let rows = states(decoder, adapter, exits, given, &mut cache)?;
            normed = normed.into_iter().zip(rows).map(|(first, rest)| Tensor::cat(vec![first, rest], 0)).collect();
        }
        let mut losses = Losses::none(exits.len(), voters.len());
        losses.add(decoder, &normed, (&targets.collect::<Vec<i32>>(), &[option.ids.len()]), voters)?;
        let sums = losses.exits.iter().chain(&losses.votes).flatten();
        sums.map(|loss| finite("the log-likelihood of an option", -loss)).collect()
    };
    check_ids(decoder, question)?;
    question.options.iter().map(score).collect()
}

/// Targets are not embedded, so nothing else checks them.
fn check_ids(decoder: &Decoder, question: &Question) -> Result<()> {
    let vocab = decoder.config().vocab_size;
    match question.options.iter().flat_map(|o| &o.ids).find(|&&id| id as usize >= vocab) {
        Some(id) => Err(EvalError::Setting {
            what: "token id of an option",
            expected: format!("below the vocabulary size {vocab}"),
            found: id.to_string(),
        }),
        None => Ok(()),
    }
}

/// The normed states of `ids` at each exit, `[tokens, d]`, after what the cache has seen.
fn states(
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    exits: &[usize],
    ids: &[u32],
    cache: &mut KvCache,
) -> Result<Vec<Tensor<2>>> {
    let _span = tracing::debug_span!("evaluate", tokens = ids.len()).entered();
    let mut x = decoder.embed(&[ids])?;
    let mut start = 0;
    let mut normed = Vec::with_capacity(exits.len());
    for &exit in exits {
        x = decoder.run_blocks(x, start..exit, adapter, Some(cache))?;
        start = exit;
        let flat: Tensor<2> = x.clone().reshape([ids.len(), decoder.config().hidden_size]);
        normed.push(decoder.exit_norm(flat, exit, adapter));
    }
    Ok(normed)
}

/// Index of the first of the largest scores.
fn likeliest(scores: impl Iterator<Item = f64>) -> usize {
    let better = |best: (usize, f64), next: (usize, f64)| if next.1 > best.1 { next } else { best };
    scores.enumerate().fold((0, f64::NEG_INFINITY), better).0
}
