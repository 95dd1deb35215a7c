//! Files of multiple-choice questions, and how they are put to a model.
//!
//! A line of JSON has `context`, `choices` and `answer` (an index), such as HellaSwag's; or, such as MMLU's, `input`, a prompt
//! that lists its options by letter and ends with `Answer:`, `output`, the right letter, and maybe `subject`. Options of the
//! second kind are scored by their letters, as lm-evaluation-harness does for MMLU, or by their full text. With shots, other
//! questions of the same subject come first, answered; the line that introduces the subject is not repeated.

use std::path::Path;

use edgellm_model::ModelError;
use edgellm_model::io::read_text;
use edgellm_model::tokenizer::Tokenizer;
use serde::Deserialize;

use crate::error::Result;
use crate::multiple_choice::{ChoiceOption, Question};

/// What of an option that is listed by letter is scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scoring {
    /// Its letter.
    #[default]
    Letter,
    /// Its text.
    Answer,
}

/// How a file of questions is read.
#[derive(Clone, Copy, Debug)]
pub struct QuestionFile<'a> {
    /// The file.
    pub path: &'a Path,
    /// Questions at most.
    pub limit: usize,
    /// What is scored.
    pub scoring: Scoring,
    /// Answered questions before each question.
    pub shots: usize,
    /// The file that they are taken from: the first of the same subject. `None` for the same file, without the question
    /// itself.
    pub shots_path: Option<&'a Path>,
}

/// A line of a file of questions.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Choices { context: String, choices: Vec<String>, answer: usize },
    Letters { input: String, output: String, subject: Option<String> },
}

/// A question as text.
struct Text {
    /// What introduces the subject; empty for questions without shots.
    header: String,
    body: String,
    options: Vec<String>,
    answer: usize,
    subject: Option<String>,
}

impl Text {
    fn answered(&self) -> String {
        format!("{} {}", self.body, self.options[self.answer])
    }
}

/// Reads questions.
///
/// # Errors
/// A file cannot be read, a line is no question, there are not enough questions of a subject for the shots, or the tokenizer
/// fails.
pub fn read_questions(file: &QuestionFile<'_>, tokenizer: &Tokenizer) -> Result<Vec<Question>> {
    let from_same_file = file.shots > 0 && file.shots_path.is_none();
    let texts = read(file.path, if from_same_file { usize::MAX } else { file.limit }, file.scoring)?;
    let others = file.shots_path.map(|path| read(path, usize::MAX, file.scoring)).transpose()?;
    let mut questions = Vec::new();
    for (index, text) in texts.iter().enumerate().take(file.limit) {
        let same_subject = |(place, other): &(usize, &Text)| {
            other.subject == text.subject && (others.is_some() || *place != index) && other.body != text.body
        };
        let pool = others.as_ref().unwrap_or(&texts);
        let shots: Vec<String> =
            pool.iter().enumerate().filter(same_subject).take(file.shots).map(|(_, other)| other.answered()).collect();
        if shots.len() < file.shots {
            let about = text.subject.as_deref().unwrap_or("no subject");
            return Err(ModelError::Value {
                what: format!("other questions about {about} for the shots"),
                expected: format!("at least {}", file.shots),
                found: shots.len().to_string(),
            }
            .into());
        }
        let mut context = text.header.clone();
        shots.iter().for_each(|shot| context.push_str(&format!("{shot}\n\n")));
        context.push_str(&text.body);
        let option = |option: &String| {
            let option = format!(" {option}");
            Ok(ChoiceOption { ids: tokenizer.encode(&option, false)?, characters: option.chars().count() })
        };
        questions.push(Question {
            context: tokenizer.encode(&context, true)?,
            options: text.options.iter().map(option).collect::<Result<_, ModelError>>()?,
            answer: text.answer,
            subject: text.subject.clone(),
        });
    }
    Ok(questions)
}

fn read(path: &Path, limit: usize, scoring: Scoring) -> Result<Vec<Text>> {
    let text = read_text(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit);
    let read = |(index, line)| {
        parse(line, scoring).map_err(|reason| {
            let what = format!("question on line {}", index + 1);
            ModelError::Parse { path: path.to_path_buf(), what, reason: reason.into() }.into()
        })
    };
    lines.map(read).collect()
}

fn parse(line: &str, scoring: Scoring) -> Result<Text, &'static str> {
    let line = serde_json::from_str(line)
        .map_err(|_| "expected 'context', 'choices' and 'answer' (an index), or 'input' and 'output' (a letter)")?;
    let text = match line {
        Line::Choices { context, choices, answer } => {
            Text { header: String::new(), body: context, options: choices, answer, subject: None }
        }
        Line::Letters { input, output, subject } => {
            let listed = |letter: char| {
                let start = format!("\n{letter}. ");
                input.split_once(&start).map(|(_, rest)| rest.lines().next().unwrap_or("").trim().to_owned())
            };
            let options: Vec<(char, String)> =
                ('A'..='Z').map_while(|letter| Some((letter, listed(letter)?))).collect();
            let answer = options.iter().position(|(letter, _)| output.trim() == letter.to_string());
            let answer = answer.ok_or("expected an 'output' that is the letter of a listed option")?;
            let scored = |(letter, text): (char, String)| match scoring {
                Scoring::Letter => letter.to_string(),
                Scoring::Answer => text,
            };
            let (header, body) = match input.split_once("\n\n") {
                Some((header, body)) => (format!("{header}\n\n"), body.to_owned()),
                None => (String::new(), input.clone()),
            };
            Text { header, body, options: options.into_iter().map(scored).collect(), answer, subject }
        }
    };
    let empty = text.body.is_empty() || text.options.iter().any(String::is_empty);
    if empty || text.options.len() < 2 || text.answer >= text.options.len() {
        return Err("expected a context, at least two options that are not empty, and an answer among them");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"subject": "sums", "input": "About sums.\n\n1+1?\nA. one\nB. two\nAnswer:", "output": "B"}"#;

    #[test]
    fn options_are_letters_or_texts() {
        let letters = parse(LINE, Scoring::Letter).unwrap();
        assert_eq!((letters.options.as_slice(), letters.answer), (["A".into(), "B".into()].as_slice(), 1));
        assert_eq!((letters.header.as_str(), letters.subject.as_deref()), ("About sums.\n\n", Some("sums")));
        assert_eq!(letters.answered(), "1+1?\nA. one\nB. two\nAnswer: B");
        let texts = parse(LINE, Scoring::Answer).unwrap();
        assert_eq!(texts.options, ["one", "two"]);
        assert!(texts.answered().ends_with("Answer: two"));
        for bad in
            ["{}", r#"{"input": "x\nA. a\nB. b", "output": "C"}"#, r#"{"context": "", "choices": ["a"], "answer": 0}"#]
        {
            assert!(parse(bad, Scoring::Letter).is_err(), "{bad}");
        }
    }
}
