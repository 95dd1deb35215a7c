//! Texts that end an answer, found while it streams: what may be the beginning of one is held back.

/// Passes a stream on until a stop text comes.
#[derive(Debug)]
pub(crate) struct StopFilter<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> StopFilter<'a> {
    /// A filter for these texts; empty ones never come.
    pub(crate) fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes a piece; gives what can be shown now, and whether a stop text came, before which it ends.
    pub(crate) fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let stops = || self.stops.iter().filter(|stop| !stop.is_empty());
        if let Some(at) = stops().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // The longest end that begins a stop text.
        let begins = |at: usize| stops().any(|stop| stop.starts_with(&self.held[at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(|&at| begins(at)).unwrap_or(self.held.len());
        let kept = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// What was held back at the end.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_before_the_first_stop_text_however_they_are_cut() {
        let stops: Vec<String> = ["END", "", "\n\n", "ß!"].map(String::from).into();
        let texts = [
            ("one EN two ENDE three", "one EN two "),
            ("no stop EN", "no stop EN"),
            ("a\nb\n\nc", "a\nb"),
            ("groß? groß! klein", "groß? gro"),
            ("END", ""),
            ("EEND", "E"),
        ];
        for (text, expected) in texts {
            let chars: Vec<String> = text.chars().map(String::from).collect();
            for size in 1..=text.len() {
                let mut filter = StopFilter::new(&stops);
                let mut shown = String::new();
                let mut ended = false;
                for piece in chars.chunks(size) {
                    let (piece, stop) = filter.push(&piece.concat());
                    shown.push_str(&piece);
                    if stop {
                        ended = true;
                        break;
                    }
                }
                if !ended {
                    shown.push_str(&filter.finish());
                }
                assert_eq!(shown, expected, "{text:?} in pieces of {size}");
            }
        }
    }
}
