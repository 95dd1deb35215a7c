//! The demo's closing summary: at most 80 characters wide, in words and bars.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::chart::{bar, wrap};
use crate::edgellm::{number, text};

const WIDTH: usize = 80;
const BAR: usize = 32;

/// One unit of the plan.
pub(super) struct Unit {
    name: String,
    format: String,
    bits: f64,
}

impl Unit {
    pub(super) fn read(unit: &Value) -> Result<Self> {
        Ok(Self {
            name: text(unit, "unit")?.to_owned(),
            format: text(unit, "format")?.to_owned(),
            bits: number(unit, "bits_per_weight")?,
        })
    }
}

/// What the demo found.
pub(super) struct Summary {
    pub(super) title: String,
    pub(super) parameters: f64,
    pub(super) bytes_before: f64,
    pub(super) bytes_after: f64,
    pub(super) units: Vec<Unit>,
    pub(super) perplexity_base: f64,
    pub(super) perplexity_small: f64,
    pub(super) kl: f64,
    pub(super) top1_agreement: f64,
    pub(super) loss_before: f64,
    pub(super) loss_after: f64,
    pub(super) votes: Vec<(&'static str, f64)>,
    pub(super) question: String,
    pub(super) answer_before: String,
    pub(super) answer_after: String,
    pub(super) seconds: f64,
}

impl Summary {
    /// One line.
    pub(super) fn headline(&self) -> String {
        format!(
            "{:.2} to {:.2} MB, perplexity {:.3} to {:.3}, held-out loss {:.3} to {:.3}",
            self.bytes_before / 1e6,
            self.bytes_after / 1e6,
            self.perplexity_base,
            self.perplexity_small,
            self.loss_before,
            self.loss_after
        )
    }

    /// The whole summary.
    pub(super) fn render(&self) -> String {
        let mut out = String::new();
        let rule = "─".repeat(WIDTH);
        let _ = writeln!(out, "{rule}\n{}, {:.1} million parameters\n{rule}", self.title, self.parameters / 1e6);
        self.size(&mut out);
        self.bits(&mut out);
        self.loss(&mut out);
        self.answers(&mut out);
        let _ = writeln!(out, "{rule}\n{:.0} seconds in all.", self.seconds);
        out
    }

    fn size(&self, out: &mut String) {
        let (before, after) = (self.bytes_before / 1e6, self.bytes_after / 1e6);
        let _ = writeln!(out, "\nSIZE");
        let _ = writeln!(out, "  before  {} {before:8.2} MB", bar(before, before, BAR));
        let _ =
            writeln!(out, "  after   {} {after:8.2} MB, {:.1} times smaller", bar(after, before, BAR), before / after);
        let _ = writeln!(
            out,
            "  Perplexity {:.3} became {:.3} (lower is better); the next word it would\n  \
             choose is the same in {:.1}% of places; KL divergence {:.4} nats.",
            self.perplexity_base,
            self.perplexity_small,
            self.top1_agreement * 100.0,
            self.kl
        );
    }

    fn bits(&self, out: &mut String) {
        let _ = writeln!(out, "\nBITS PER LAYER (layers that suffer more got more)");
        let full = self.units.iter().map(|u| u.bits).fold(8.0, f64::max);
        for unit in &self.units {
            let Unit { name, format, bits } = unit;
            let _ = writeln!(out, "  {name:<12} {} {bits:5.2}  {format}", bar(*bits, full, BAR));
        }
    }

    fn loss(&self, out: &mut String) {
        let (before, after) = (self.loss_before, self.loss_after);
        let full = before.max(after);
        let _ = writeln!(out, "\nHELD-OUT LOSS on questions about the user that were not in the tuning data");
        let _ = writeln!(out, "  before  {} {before:7.3}", bar(before, full, BAR));
        let _ = writeln!(out, "  after   {} {after:7.3}", bar(after, full, BAR));
        let _ = writeln!(out, "\nVOTES of the exits (loss of the tuned model when the exits decide together)");
        for (vote, loss) in &self.votes {
            let _ = writeln!(out, "  {vote:<7} {} {loss:7.3}", bar(*loss, full, BAR));
        }
        if let Some((vote, loss)) = self.votes.iter().min_by(|a, b| a.1.total_cmp(&b.1)) {
            let last = self.votes.iter().find(|v| v.0 == "last").map_or(*loss, |v| v.1);
            let _ = match *vote {
                "last" => writeln!(out, "  The last exit alone does best here: voting changed nothing for the better."),
                _ => writeln!(out, "  The vote '{vote}' is better than the last exit alone by {:.3}.", last - loss),
            };
        }
    }

    fn answers(&self, out: &mut String) {
        let _ = writeln!(out, "\nONE QUESTION\n  {}", self.question);
        for (when, answer) in [("before", &self.answer_before), ("after", &self.answer_after)] {
            for (i, line) in wrap(answer, WIDTH - 10).iter().enumerate() {
                let _ = writeln!(out, "  {:<7} {line}", if i == 0 { when } else { "" });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_wider_than_a_terminal() {
        let units =
            (0..3).map(|i| Unit { name: format!("block.{i}"), format: "q4g32a".to_owned(), bits: 4.0 + f64::from(i) });
        let summary = Summary {
            title: "a model".to_owned(),
            parameters: 135e6,
            bytes_before: 270.9e6,
            bytes_after: 98.4e6,
            units: units.collect(),
            perplexity_base: 22.307,
            perplexity_small: 24.541,
            kl: 0.177,
            top1_agreement: 0.768,
            loss_before: 3.2,
            loss_after: 1.1,
            votes: vec![("last", 1.1), ("max", 1.2), ("mean", 1.05)],
            question: "What?".to_owned(),
            answer_before: "word ".repeat(60),
            answer_after: String::new(),
            seconds: 91.0,
        };
        let text = summary.render();
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
        }
        assert!(text.contains("2.8 times smaller"), "{text}");
        assert!(text.contains("'mean' is better than the last exit alone by 0.050"), "{text}");
    }
}
