//! What is run on a device, part by part.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::matrix::{Device, Part};
use super::process::Failure;
use super::readings::{self, Reading};
use super::results::{Figure, Outcome, PartResult, median};
use super::transport::Transport;

/// A device whose files are there, with the time that it has left.
pub(super) struct Suite<'a> {
    pub(super) device: &'a Device,
    pub(super) transport: &'a Transport,
    /// When the row ends.
    pub(super) deadline: Instant,
    /// This machine's perplexity in the accuracy part.
    pub(super) perplexity: f64,
}

/// Arguments of the accuracy part.
pub(super) const EVAL: [&str; 5] = ["eval", "--context", "128", "--windows", "2"];
/// How far a device's perplexity may be from this machine's, relative.
const TOLERANCE: f64 = 1e-3;
/// The least a sustained run has to compare.
const FEWEST_ROUNDS: usize = 2;

/// What a part found: a sentence, and speeds.
type Found = (String, BTreeMap<String, Figure>);

impl Suite<'_> {
    /// Runs one part.
    ///
    /// # Errors
    /// [`Failure::Lost`], after which no other part can be run; other failures are the part's outcome.
    pub(super) fn run(&self, part: Part, readings: &mut Vec<Reading>) -> Result<PartResult, Failure> {
        let start = Instant::now();
        let found = match part {
            Part::Conformance => self.conformance(),
            Part::Bench => self.bench(),
            Part::Accuracy => self.accuracy(),
            Part::Adapt => self.adapt(),
            Part::Sustained => self.sustained(readings),
        };
        let (outcome, detail, figures) = match found {
            Ok((detail, figures)) => (Outcome::Passed, detail, figures),
            Err(Failure::Failed(reason)) => (Outcome::Failed, reason, BTreeMap::new()),
            Err(lost) => return Err(lost),
        };
        let part = format!("{part:?}").to_lowercase();
        Ok(PartResult { part, outcome, detail, seconds: start.elapsed().as_secs_f64(), figures })
    }

    /// Time until the row ends.
    pub(super) fn limit(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn json(&self, args: &[&str]) -> Result<Value, Failure> {
        let args = [args, &["--json", "--quiet"]].concat();
        let text = self.transport.program("edgellm", &args, self.limit())?;
        serde_json::from_str(&text)
            .map_err(|_| Failure::Failed(format!("edgellm {} printed no JSON: {text:.200}", args[0])))
    }

    fn conformance(&self) -> Result<Found, Failure> {
        let filter: Vec<_> = self.device.conformance_only.as_deref().into_iter().collect();
        let text = self.transport.program("conformance", &filter, self.limit())?;
        let counted = text
            .lines()
            .find_map(|l| l.strip_prefix("test result: ok. ")?.split(" passed").next()?.parse::<usize>().ok());
        match counted {
            None | Some(0) => Err(Failure::Failed(format!("no conformance test was run: {:.200}", text.trim()))),
            Some(n) => {
                let only = filter.first().map_or(String::new(), |word| format!(" of {word}"));
                Ok((format!("{n} suites{only}"), BTreeMap::new()))
            }
        }
    }

    fn bench(&self) -> Result<Found, Failure> {
        let tests = self.json(&["bench", "-m", "model", "-p", "64", "-n", "32", "--tune", "64", "-r", "5"])?;
        let mut figures = BTreeMap::new();
        for test in tests["tests"].as_array().into_iter().flatten() {
            let name = ["n_prompt", "n_gen", "n_tune"].into_iter().zip(["read", "generate", "tune"]);
            let mut name = name.filter(|(key, _)| test[*key].as_u64().is_some_and(|n| n > 0)).map(|(_, word)| word);
            let samples: Vec<_> =
                test["samples_ts"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
            figures.insert(format!("{}, tokens/s", name.next_back().unwrap_or("other")), Figure { samples });
        }
        if figures.len() != 3 || figures.values().any(|f| f.samples.is_empty()) {
            return Err(Failure::Failed(format!("expected speeds of three tests, found {tests:.300}")));
        }
        let of =
            |name: &str| figures.get(&format!("{name}, tokens/s")).and_then(|f| median(&f.samples)).unwrap_or_default();
        let detail =
            format!("tokens/s: reads {:.0}, generates {:.0}, tunes {:.0}", of("read"), of("generate"), of("tune"));
        Ok((detail, figures))
    }

    fn accuracy(&self) -> Result<Found, Failure> {
        let found = self.json(&[&EVAL[..], &["-m", "model", "--text", "text/heldout.txt"]].concat())?;
        let (there, here) = (number(&found, "perplexity")?, self.perplexity);
        if (there / here - 1.0).abs() > TOLERANCE {
            return Err(Failure::Failed(format!("perplexity {there:.5}, expected {here:.5}")));
        }
        Ok((format!("perplexity {there:.5}, {here:.5} here"), BTreeMap::new()))
    }

    fn adapt(&self) -> Result<Found, Failure> {
        let data = ["--data", "instruct/train.jsonl", "-o", "adapter", "--force"];
        let shape = ["--steps", "8", "--batch", "2", "--max-len", "96", "--exits", "1"];
        let found = self.json(&[&["adapt", "-m", "model"][..], &data, &shape].concat())?;
        let (first, last) = (number(&found, "loss_first")?, number(&found, "loss_last")?);
        if !last.is_finite() || last >= first {
            return Err(Failure::Failed(format!("8 steps moved the loss from {first:.3} to {last:.3}, expected less")));
        }
        Ok((format!("loss {first:.2} to {last:.2} in 8 steps"), BTreeMap::new()))
    }

    fn sustained(&self, readings: &mut Vec<Reading>) -> Result<Found, Failure> {
        let start = Instant::now();
        let minutes = || start.elapsed().as_secs_f64() / 60.0;
        let mut rounds = Vec::new();
        while rounds.len() < FEWEST_ROUNDS || minutes() < self.device.minutes {
            let test = self.json(&["bench", "-m", "model", "-p", "0", "-n", "128", "--tune", "0", "-r", "3"])?;
            let speed = test["tests"][0]["median_ts"].as_f64();
            rounds.push(speed.ok_or_else(|| Failure::Failed(format!("expected a speed, found {test:.300}")))?);
            readings.push(readings::read(self.transport, &format!("{:.1} min", minutes()), self.limit())?);
        }
        let part = rounds.len().div_ceil(4);
        let (first, last) = (median(&rounds[..part]), median(&rounds[rounds.len() - part..]));
        let (first, last) = (first.unwrap_or_default(), last.unwrap_or_default());
        let kept = 100.0 * last / first;
        let detail = format!("{:.1} min: {first:.0} then {last:.0} tokens/s ({kept:.0}%)", minutes());
        let figures = BTreeMap::from([("sustained, tokens/s".to_owned(), Figure { samples: rounds })]);
        Ok((detail, figures))
    }
}

fn number(value: &Value, key: &str) -> Result<f64, Failure> {
    value[key].as_f64().ok_or_else(|| Failure::Failed(format!("no number {key:?} in {value:.300}")))
}
