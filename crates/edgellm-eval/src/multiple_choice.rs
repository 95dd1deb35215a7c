//! Multiple-choice questions: the option whose text the model finds likeliest, at every exit and by every vote.
//!
//! As EleutherAI's lm-evaluation-harness does it: the score of an option is `log p(option | context)`, summed over the
//! option's tokens (`acc`), or divided by the characters of the option (`acc_norm`; here with the space before it). Context
//! and option are tokenized separately. The context is run once; the options continue from its cache.

use std::path::Path;

use burn::tensor::Tensor;
use edgellm_model::ModelError;
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::{CacheType, Decoder, KvCache};
use edgellm_model::io::read_text;
use edgellm_model::tokenizer::Tokenizer;
use edgellm_model::traits::Voter;
use serde::{Deserialize, Serialize};

use crate::error::{EvalError, Result, finite};
use crate::votes::{Sums, check_exits};
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
    check_exits(exits, decoder.n_blocks())?;
    if questions.is_empty() {
        return Err(EvalError::TooLittle { what: "questions", needed: 1, found: 0 });
    }
    let mut right = vec![[0usize; 2]; exits.len() + voters.len()];
    for (index, question) in questions.iter().enumerate() {
        check_question(question, index)?;
        let scores = scores(decoder, adapter, exits, voters, question)?;
        for (place, right) in right.iter_mut().enumerate() {
            let summed = scores.iter().map(|option| option[place]);
            let per_character = scores.iter().zip(&question.options).map(|(s, o)| s[place] / o.characters as f64);
            right[0] += usize::from(likeliest(summed) == question.answer);
            right[1] += usize::from(likeliest(per_character) == question.answer);
        }
        progress(Progress { done: index + 1, total: questions.len() });
    }
    let share = |right: &[usize; 2]| {
        let [acc, acc_norm] = right.map(|n| n as f64 / questions.len() as f64);
        Accuracy { acc, acc_norm }
    };
    let (by_exit, votes) = right.split_at(exits.len());
    Ok(MultipleChoice {
        by_exit: by_exit.iter().map(share).collect(),
        votes: votes.iter().map(share).collect(),
        questions: questions.len(),
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
        let mut sums = Sums::zero(exits.len(), voters.len());
        sums.add(decoder, &normed, &targets.collect::<Vec<i32>>(), voters)?;
        let losses = sums.exits.into_iter().chain(sums.votes);
        losses.map(|loss| finite("the log-likelihood of an option", -loss)).collect()
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

/// A line of a file of questions.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    /// A context and its continuations, such as HellaSwag's.
    Choices { context: String, choices: Vec<String>, answer: usize },
    /// A prompt that lists its options by letter, and the right letter, such as MMLU's.
    Letters { input: String, output: String },
}

/// Reads the first `limit` questions of a file of JSON lines.
///
/// A line has `context`, `choices` and `answer` (an index), or `input`, a prompt with lines that begin `A. `, `B. ` and so
/// on, and `output`, a letter: the options are then the letters.
///
/// # Errors
/// The file cannot be read, a line is no question, or the tokenizer fails.
pub fn read_questions(path: &Path, tokenizer: &Tokenizer, limit: usize) -> Result<Vec<Question>> {
    let text = read_text(path)?;
    let mut questions = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit) {
        let bad = |reason: &str| {
            let what = format!("question on line {}", index + 1);
            ModelError::Parse { path: path.to_path_buf(), what, reason: reason.into() }
        };
        let line: Line = serde_json::from_str(line).map_err(|_| {
            bad("expected 'context', 'choices' and 'answer' (an index), or 'input' and 'output' (a letter)")
        })?;
        let (context, options, answer) = match line {
            Line::Choices { context, choices, answer } => (context, choices, answer),
            Line::Letters { input, output } => {
                let listed = |letter: &char| input.contains(&format!("\n{letter}. "));
                let letters: Vec<String> = ('A'..='Z').take_while(listed).map(String::from).collect();
                let answer = letters.iter().position(|letter| *letter == output.trim());
                let answer = answer.ok_or_else(|| bad("expected an 'output' that is the letter of a listed option"))?;
                (input, letters, answer)
            }
        };
        let option = |text: &String| {
            let text = format!(" {text}");
            Ok(ChoiceOption { ids: tokenizer.encode(&text, false)?, characters: text.chars().count() })
        };
        let question = Question {
            context: tokenizer.encode(&context, true)?,
            options: options.iter().map(option).collect::<Result<_, ModelError>>()?,
            answer,
        };
        if question.context.is_empty() || question.options.len() < 2 || question.answer >= question.options.len() {
            return Err(bad("expected a context, at least two options, and an answer among them").into());
        }
        questions.push(question);
    }
    Ok(questions)
}
