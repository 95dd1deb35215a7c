//! `edgellm eval compare`: two runs or two sweeps, figure by figure.

use std::path::PathBuf;

use clap::Args;
use edgellm::eval::{Compared, Record, Verdict, compare};
use serde_json::json;

use super::sweep;
use crate::cli::Context;
use crate::cli::failure::Usage;
use crate::cli::output::table;

/// Compare two runs, or two sweeps case by case, with significance
#[derive(Args)]
pub(crate) struct Compare {
    /// A run's id or its beginning, or a sweep's name
    first: String,
    /// Another
    second: String,
    /// The folder of results
    #[arg(long, value_name = "DIR", default_value = "edgellm-results")]
    store: PathBuf,
}

impl Compare {
    pub(super) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let (first, second) =
            (sweep::records(&self.store, Some(&self.first))?, sweep::records(&self.store, Some(&self.second))?);
        let pairs = pairs(&first, &second);
        if pairs.is_empty() {
            let text = format!("expected cases that '{}' and '{}' both have, found none", self.first, self.second);
            return Err(Usage(text).into());
        }
        let compared: Vec<(String, Vec<Compared>)> = pairs.iter().map(|(a, b)| (title(a, b), compare(a, b))).collect();
        let json =
            json!(compared.iter().map(|(case, figures)| json!({"case": case, "figures": figures})).collect::<Vec<_>>());
        ctx.result(json!({"compared": json}), || text(&compared))
    }
}

/// Two runs, or the cases that two sweeps share.
fn pairs<'a>(first: &'a [Record], second: &'a [Record]) -> Vec<(&'a Record, &'a Record)> {
    if let ([a], [b]) = (first, second) {
        return vec![(a, b)];
    }
    first.iter().filter_map(|a| Some((a, second.iter().find(|b| b.case == a.case)?))).collect()
}

fn title(a: &Record, b: &Record) -> String {
    if a.case == b.case {
        return sweep::name(a);
    }
    format!("{} -> {}", sweep::name(a), sweep::name(b))
}

fn text(compared: &[(String, Vec<Compared>)]) -> String {
    let mut out = String::new();
    for (case, figures) in compared {
        let rows: Vec<Vec<String>> = figures.iter().map(row).collect();
        let header = ["figure", "first", "second", "difference", "95% interval", "p", ""];
        out.push_str(&format!("{case}\n{}", table(&header, &rows)));
    }
    out.push_str("differences of perplexities are of their logarithms\n");
    out
}

fn row(compared: &Compared) -> Vec<String> {
    let value = |value: f64| if value.abs() >= 1e5 { format!("{value:.0}") } else { format!("{value:.4}") };
    let words = match compared.verdict {
        Verdict::Better => "better",
        Verdict::Worse => "worse",
        Verdict::Unclear => "no clear difference",
        Verdict::Untested => "not tested",
        Verdict::Incomparable => "other data",
    };
    let (difference, interval, p) = match &compared.difference {
        Some(found) => {
            let (low, high) = found.interval;
            (format!("{:+.4}", found.difference), format!("{low:+.4} to {high:+.4}"), format!("{:.3}", found.p))
        }
        None => (format!("{:+.4}", compared.second.value - compared.first.value), String::new(), String::new()),
    };
    let (first, second) = (value(compared.first.value), value(compared.second.value));
    vec![compared.figure.clone(), first, second, difference, interval, p, words.to_owned()]
}
