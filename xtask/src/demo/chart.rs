//! Bars of Unicode blocks, in eighths of a character.

const EIGHTHS: [char; 7] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// A bar of `value` where `full` would be `width` characters; always `width` characters, blank to the right.
pub(super) fn bar(value: f64, full: f64, width: usize) -> String {
    let part = if full > 0.0 { (value / full).clamp(0.0, 1.0) } else { 0.0 };
    let eighths = (part * width as f64 * 8.0).round() as usize;
    let mut text = "█".repeat(eighths / 8);
    if let Some(rest) = (eighths % 8).checked_sub(1) {
        text.push(EIGHTHS[rest]);
    }
    let blank = width - text.chars().count();
    text + &" ".repeat(blank)
}

/// The text in lines of at most `width` characters, broken at blanks.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("there is always a line");
        if last.is_empty() {
            last.push_str(word);
        } else if last.chars().count() + 1 + word.chars().count() <= width {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_proportional_and_of_one_width() {
        assert_eq!(bar(8.0, 8.0, 4), "████");
        assert_eq!(bar(4.0, 8.0, 4), "██  ");
        assert_eq!(bar(3.0, 8.0, 4), "█▌  ");
        assert_eq!(bar(0.0, 8.0, 4), "    ");
        assert_eq!(bar(9.0, 8.0, 4), "████");
        assert_eq!(bar(f64::NAN, 8.0, 2).chars().count(), 2);
    }

    #[test]
    fn text_wraps_at_blanks() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("", 7), [""]);
    }
}
