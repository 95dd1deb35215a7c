//! Plain text: a file is one text. It is cut into parts for the tokenizer and its tokens into windows for the model.

use super::example::Example;
use super::record::Record;
use super::report::{Bad, SkipReason};
use super::{Result, Sink};

/// Bytes of a part at most: the tokenizer's own memory is many times its input.
const PART: usize = 1 << 20;

/// Reads a file's content; `\r\n` ends a line as `\n` does. Only lines that are not UTF-8 are bad.
pub(super) fn read(content: &[u8], sink: &mut Sink<'_>) -> Result<()> {
    let content = super::without_mark(content);
    let mut text = String::with_capacity(content.len());
    for (index, line) in content.split_inclusive(|&b| b == b'\n').enumerate() {
        match std::str::from_utf8(line) {
            Ok(line) => match line.strip_suffix("\r\n") {
                Some(line) => text.extend([line, "\n"]),
                None => text.push_str(line),
            },
            Err(e) => {
                let found = format!("other bytes at offset {}", e.valid_up_to());
                sink.put(index + 1, Err(Bad::new(SkipReason::Encoding, "UTF-8", found)))?;
            }
        }
    }
    if text.trim().is_empty() { Ok(()) } else { sink.put(1, Ok(Record::Text(text))) }
}

/// The text in parts of at most about [`PART`] bytes.
pub(super) fn parts(text: &str) -> impl Iterator<Item = &str> {
    parts_of(text, PART)
}

/// Parts end where the usual pre-tokenizers cut as well, if there is such a place, so that the tokens are those of the
/// whole: before a word that follows a line break, or before the space of a word.
fn parts_of(text: &str, most: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (part, after) = rest.split_at(cut(rest, most));
        rest = after;
        Some(part)
    })
}

/// Where the first part of a text ends: at least one character, at most `most` bytes if a character has not more.
fn cut(text: &str, most: usize) -> usize {
    if text.len() <= most {
        return text.len();
    }
    let bytes = text.as_bytes();
    let is_word = |at: usize| !bytes[at].is_ascii_whitespace();
    let after_line = |&at: &usize| bytes[at - 1] == b'\n' && is_word(at);
    let before_space =
        |&at: &usize| is_word(at - 1) && bytes[at] == b' ' && bytes.get(at + 1).is_some_and(|b| *b > b' ');
    let places = || (1..=most).rev();
    let found = places().find(after_line).or_else(|| places().find(before_space));
    let boundary = |at: &usize| text.is_char_boundary(*at);
    found.or_else(|| places().find(boundary)).or_else(|| (1..=text.len()).find(boundary)).unwrap_or(text.len())
}

/// Windows of at most `max_len` tokens that overlap by one, so that every token but the very first is predicted once.
pub(super) fn windows(ids: &[u32], max_len: usize) -> Vec<Example> {
    let step = max_len.saturating_sub(1).max(1);
    let window = |start: usize| Example::new(&[], &ids[start..ids.len().min(start.saturating_add(max_len))]);
    // The last token of a text needs no window in which it comes first.
    (0..ids.len().saturating_sub(1).max(1)).step_by(step).map(window).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_every_token_but_the_first_once() {
        for n in 1..40u32 {
            let ids: Vec<u32> = (0..n).collect();
            for max_len in 2..10 {
                let windows = windows(&ids, max_len);
                let predicted: Vec<u32> = windows
                    .iter()
                    .flat_map(|w| (0..w.ids.len()).filter(|&i| w.is_target(i)).map(|i| w.ids[i]).collect::<Vec<_>>())
                    .collect();
                assert_eq!(predicted, &ids[1..], "{n} tokens in windows of {max_len}");
                assert!(windows.iter().all(|w| w.ids.len() <= max_len));
            }
        }
        assert_eq!(windows(&[7], 4), [Example::new(&[], &[7])]);
    }

    #[test]
    fn parts_join_to_the_text_and_end_where_words_do() {
        let check = |text: &str, most: usize, expected: &[&str]| {
            assert_eq!(parts_of(text, most).collect::<Vec<_>>(), expected);
        };
        check("", 4, &[]);
        check("one two", 7, &["one two"]);
        check("one two three", 7, &["one two", " three"]);
        check("one two three", 6, &["one", " two", " three"]);
        check("ab\ncd ef\n\n g hi", 9, &["ab\n", "cd ef\n\n g", " hi"]);
        check("abcdefgh", 3, &["abc", "def", "gh"]);
        check("äöü", 3, &["ä", "ö", "ü"]);
        check("äöü", 1, &["ä", "ö", "ü"]);
    }
}
