//! Size against quality.

use super::{Inputs, in_numbers, results, shown};
use crate::chart::{Chart, Series};
use crate::figures::Record;
use crate::names::Names;
use crate::recommendations::{QUALITY, size};

/// What makes a line of a chart: everything else that differs makes a chart of its own.
const OF_A_LINE: [&str; 3] = ["policy", "budget", "seed"];
/// Charts for one figure at most.
const MOST_CHARTS: usize = 4;
/// The ratio of sizes from which the axis is logarithmic.
const WIDE: f64 = 4.0;

/// A chart for every figure of quality that records of several sizes have.
pub(super) fn pareto(inputs: &Inputs) -> String {
    let mut out = String::new();
    for name in QUALITY {
        let of_figure = |r: &&Record| r.figures.contains_key(name) && size(r).is_some();
        let records: Vec<&Record> = inputs.records.iter().filter(of_figure).collect();
        // What is measured in the second half of windows has all of the context; both at once say the same twice.
        let second_half = format!("second_half_{name}");
        if records.iter().any(|r| r.figures.contains_key(&second_half)) {
            continue;
        }
        let names = Names::of(records.iter().copied());
        let groups = names.groups(records.iter().copied(), &OF_A_LINE);
        for (group, records) in groups.into_iter().filter(|(_, group)| sizes(group) > 1).take(MOST_CHARTS) {
            out.push_str(&chart(name, &group, &records));
        }
    }
    out
}

fn sizes(records: &[&Record]) -> usize {
    let mut sizes: Vec<u64> = records.iter().filter_map(|r| size(r)).map(|bytes| bytes as u64).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes.len()
}

fn chart(name: &str, group: &str, records: &[&Record]) -> String {
    let names = Names::of(records.iter().copied());
    let mut series = Vec::new();
    let mut rows = Vec::new();
    for (_, mut of_line) in names.groups(records.iter().copied(), &["budget", "seed"]) {
        of_line.sort_by(|a, b| size(a).unwrap_or(0.0).total_cmp(&size(b).unwrap_or(0.0)));
        let line = of_line[0].case.contains_key("budget");
        let label = names.name(of_line[0], &["budget", "seed"]);
        let mut found = Series { label, line, ..Series::default() };
        for record in of_line {
            let (Some(figure), Some(bytes)) = (record.figures.get(name), size(record)) else { continue };
            let x = bytes / 1e6;
            found.points.push((x, figure.value));
            found.intervals.extend(figure.interval.map(|(low, high)| (x, low, high)));
            rows.push(vec![names.name(record, &[]), format!("{x:.1}"), results::value(figure)]);
        }
        series.push(found);
    }
    let of_group = if group.is_empty() { String::new() } else { format!("{group}: ") };
    let title = format!("{of_group}{} by size", words(name));
    let widths = series.iter().flat_map(|s| &s.points).map(|p| p.0);
    let (least, most) = widths.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
    let positive = series.iter().flat_map(|s| &s.points).all(|p| p.1 > 0.0);
    let chart = Chart {
        title: &title,
        x: "MB of the model",
        y: &words(name),
        log_y: positive && (name.contains("kl") || name.contains("perplexity")),
        log_x: least > 0.0 && most > WIDE * least,
    };
    let described = format!("{title}; vertical lines are 95% intervals");
    let svg = shown(chart.points(&series), &described);
    if svg.is_empty() { svg } else { svg + &in_numbers(&["case", "MB", &words(name)], &rows) }
}

fn words(figure: &str) -> String {
    match figure {
        "second_half_kl" => "KL to the base, second half of windows (nats)".into(),
        "kl" => "KL to the base (nats)".into(),
        "heldout_loss" => "held-out loss (nats)".into(),
        "second_half_perplexity" => "perplexity, second half of windows".into(),
        "accuracy_norm" => "accuracy, by length".into(),
        other => other.replace('_', " "),
    }
}
