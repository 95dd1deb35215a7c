//! Progress of long work: a bar on a terminal, plain lines elsewhere, nothing with `-q`. Both say rate and time left.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{bytes, say, seconds};

/// Time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// Things with a name, such as steps.
    Items(&'static str),
    /// Bytes.
    Bytes,
}

/// The progress of one piece of work.
pub(crate) struct Progress {
    what: String,
    counted: Counted,
    total: u64,
    done: u64,
    note: String,
    start: Instant,
    display: Display,
}

enum Display {
    Silent,
    Bar(ProgressBar),
    Plain { last: Option<Instant> },
}

impl Progress {
    /// Starts to report on `total` units of work.
    pub(crate) fn new(quiet: bool, what: &str, total: u64, counted: Counted) -> Self {
        let now = Instant::now();
        let display = if quiet {
            Display::Silent
        } else if std::io::stderr().is_terminal() {
            Display::Bar(bar(what, total))
        } else {
            // Steps may take long, so that the first is reported at once; copying bytes is most often done soon.
            Display::Plain { last: (counted == Counted::Bytes).then_some(now) }
        };
        let (what, note) = (what.to_string(), String::new());
        Self { what, counted, total, done: 0, note, start: now, display }
    }

    /// `done` units are done.
    pub(crate) fn set(&mut self, done: u64) {
        self.update(done, None);
    }

    /// `done` units are done; `note` is what to show beside it.
    pub(crate) fn set_with(&mut self, done: u64, note: String) {
        self.update(done, Some(note));
    }

    /// The work turned out to be `total` units.
    pub(crate) fn set_total(&mut self, total: u64) {
        if total != self.total {
            self.total = total;
            if let Display::Bar(bar) = &self.display {
                bar.set_length(total);
            }
        }
    }

    fn update(&mut self, done: u64, note: Option<String>) {
        self.done = done;
        if let Some(note) = note {
            self.note = note;
        }
        let status = self.status();
        match &mut self.display {
            Display::Silent => {}
            Display::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(status);
            }
            Display::Plain { last } => {
                if last.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL) {
                    *last = Some(Instant::now());
                    say(&format!("{}: {status}", self.what));
                }
            }
        }
    }

    /// Done, rate, time left and the note, as text.
    fn status(&self) -> String {
        let elapsed = self.start.elapsed().as_secs_f64();
        let rate = self.done as f64 / elapsed.max(1e-9);
        let mut text = match self.counted {
            Counted::Items(unit) => format!("{}/{} {unit}", self.done, self.total),
            Counted::Bytes => format!("{} of {}", bytes(self.done), bytes(self.total)),
        };
        if self.done > 0 && elapsed > 0.05 {
            text.push_str(&match self.counted {
                Counted::Items(_) if rate >= 1.0 => format!(", {rate:.1}/s"),
                Counted::Items(_) => format!(", {} each", seconds(1.0 / rate)),
                Counted::Bytes => format!(", {}/s", bytes(rate as u64)),
            });
            if self.done < self.total {
                text.push_str(&format!(", {} left", seconds((self.total - self.done) as f64 / rate)));
            }
        }
        if !self.note.is_empty() {
            text.push_str(", ");
            text.push_str(&self.note);
        }
        text
    }

    /// Ends the report; the last state stays visible.
    pub(crate) fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let took = seconds(self.start.elapsed().as_secs_f64());
        let status = self.status();
        match std::mem::replace(&mut self.display, Display::Silent) {
            Display::Silent => {}
            Display::Bar(bar) => {
                bar.finish_and_clear();
                say(&format!("{}: {status} ({took})", self.what));
            }
            Display::Plain { .. } => say(&format!("{}: {status} ({took})", self.what)),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{prefix} [{bar:24}] {wide_msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    bar.set_prefix(what.to_string());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_says_rate_and_time_left() {
        let mut progress = Progress::new(true, "x", 100, Counted::Items("steps"));
        progress.start = Instant::now() - Duration::from_secs(10);
        progress.set_with(50, "loss 1.0".into());
        assert_eq!(progress.status(), "50/100 steps, 5.0/s, 10.0 s left, loss 1.0");
        progress.set(5);
        assert_eq!(progress.status(), "5/100 steps, 2.00 s each, 3 min 10 s left, loss 1.0");
        let mut progress = Progress::new(true, "x", 2_000_000, Counted::Bytes);
        progress.start = Instant::now() - Duration::from_secs(1);
        progress.set(2_000_000);
        assert_eq!(progress.status(), "2.00 MB of 2.00 MB, 2.00 MB/s");
        progress.finish();
    }
}
