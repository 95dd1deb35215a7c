//! What follows from measured figures, in words with numbers. Nothing is said of a difference that may be chance.

use std::collections::BTreeMap;

use crate::compare::{Verdict, compare};
use crate::figures::{Better, Figure, Layer, Record};
use crate::names::Names;

mod curves;
mod layers;
mod runs;

pub use runs::run_recommendations;

/// Figures of quality, the most telling first.
pub(crate) const QUALITY: [&str; 6] =
    ["second_half_kl", "kl", "heldout_loss", "accuracy_norm", "second_half_perplexity", "exact_match"];

/// The figure of quality that a record is judged by.
pub(crate) fn quality(record: &Record) -> Option<(&'static str, &Figure)> {
    QUALITY.iter().find_map(|name| Some((*name, record.figures.get(*name)?)))
}

/// The size of a record's model, in bytes.
pub(crate) fn size(record: &Record) -> Option<f64> {
    record.figures.get("model_bytes").or(record.figures.get("weights_bytes")).map(|figure| figure.value)
}

/// All recommendations of records and of models' layers, in sentences.
pub fn recommendations(records: &[Record], models: &[(String, Vec<Layer>)]) -> Vec<String> {
    let names = Names::of(records);
    let mut out = policies(records, &names);
    out.extend(curves::knees(records, &names));
    out.extend(smallest_without_loss(records, &names));
    out.extend(votes(records, &names));
    out.extend(devices(records, &names));
    let of_record = |record| (names.name(record, &["task", "device", "adapter", "vote", "seed"]), &record.layers);
    let all = records.iter().map(of_record).chain(models.iter().map(|(name, layers)| (name.clone(), layers)));
    out.extend(layers::costly(all.map(|(name, layers)| (name, layers.as_slice()))));
    out
}

/// `sentence` about `what`, which may be empty.
fn about(what: &str, sentence: &str) -> String {
    if !what.is_empty() {
        return format!("{what}: {sentence}");
    }
    let mut letters = sentence.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// Records that agree in everything but one name, which all of them have.
fn groups<'a>(records: &'a [Record], names: &Names, varied: &str) -> BTreeMap<String, Vec<&'a Record>> {
    let with_it = records.iter().filter(|record| record.case.contains_key(varied));
    let mut groups = names.groups(with_it, &[varied]);
    groups.retain(|_, group| group.len() > 1);
    groups
}

/// The better of two, if it is not by chance: by which figure, and both values.
fn better<'a>(a: &'a Record, b: &'a Record, figure: &str) -> Option<(&'a Record, f64, f64)> {
    let found = compare(a, b).into_iter().find(|compared| compared.figure == figure)?;
    match found.verdict {
        Verdict::Better => Some((b, found.second.value, found.first.value)),
        Verdict::Worse => Some((a, found.first.value, found.second.value)),
        _ => None,
    }
}

fn words(figure: &str) -> String {
    match figure {
        "second_half_kl" | "kl" => "KL".into(),
        "heldout_loss" => "loss".into(),
        "second_half_perplexity" => "perplexity".into(),
        other => other.replace('_', " "),
    }
}

/// Which policy is best at each budget.
fn policies(records: &[Record], names: &Names) -> Vec<String> {
    let mut out = Vec::new();
    for (name, group) in groups(records, names, "policy") {
        // Without a budget, policies differ in size, and "better" would only mean "larger".
        if !group.iter().all(|record| record.case.contains_key("budget")) {
            continue;
        }
        let Some((figure, _)) = quality(group[0]) else { continue };
        let order = |record: &&&Record| match record.figures.get(figure) {
            Some(found) if found.better == Better::Lower => found.value,
            Some(found) => -found.value,
            None => f64::INFINITY,
        };
        let mut sorted: Vec<&Record> = group.clone();
        sorted.sort_by(|a, b| order(&a).total_cmp(&order(&b)));
        let (best, next) = (sorted[0], sorted[1]);
        let policy = |record: &Record| record.case["policy"].clone();
        // The same budget is not the same size: policies leave what fits none of their formats.
        let in_size =
            |record: &Record| size(record).map_or(String::new(), |bytes| format!(" in {:.1} MB", bytes / 1e6));
        let sentence = match better(best, next, figure) {
            Some((_, found, other)) => format!(
                "take the policy {}: {} {found:.4}{}, against {other:.4} of {}{} ({:+.0}%).",
                policy(best),
                words(figure),
                in_size(best),
                policy(next),
                in_size(next),
                100.0 * (found / other - 1.0)
            ),
            None => format!("between the policies {} and {} no difference is certain.", policy(best), policy(next)),
        };
        out.push(about(&name, &sentence));
    }
    out
}

/// Whether a vote or an earlier exit beats the last one.
fn votes(records: &[Record], names: &Names) -> Vec<String> {
    let mut out = Vec::new();
    for record in records {
        let Some(main) = record.items.get("heldout_loss") else { continue };
        let others = record.items.iter().filter(|(name, _)| name.starts_with("heldout_loss_"));
        let mut best: Option<(&str, crate::bootstrap::Difference)> = None;
        for (name, items) in others.filter(|(_, items)| items.len() == main.len()) {
            let Some(found) = crate::bootstrap::paired_difference(main, items, 0) else { continue };
            let better = best.as_ref().is_none_or(|(_, known)| found.difference < known.difference);
            if found.p < 0.05 && found.difference < 0.0 && better {
                best = Some((name, found));
            }
        }
        if let Some((name, found)) = best {
            let name = name.trim_start_matches("heldout_loss_").replace('_', " ");
            let (low, high) = found.interval;
            let sentence = format!(
                "decide by {name}: its loss is {:.4} nats less than that of the first vote ({:.4} to {:.4}).",
                -found.difference, -high, -low
            );
            out.push(about(&names.label(record, &[]), &sentence));
        }
    }
    out
}

/// The smallest model of a task that is not certainly worse than the best.
fn smallest_without_loss(records: &[Record], names: &Names) -> Vec<String> {
    let judged = records.iter().filter(|record| quality(record).is_some() && size(record).is_some());
    let by_task = names.groups(judged, &["policy", "budget", "seed"]);
    let mut out = Vec::new();
    for (name, mut group) in by_task.into_iter().filter(|(_, group)| group.len() > 2) {
        let Some((figure, _)) = quality(group[0]) else { continue };
        if figure.contains("kl") {
            // A distance from the base is never 0 by chance: every smaller model is certainly worse.
            continue;
        }
        group.sort_by(|a, b| size(a).unwrap_or(0.0).total_cmp(&size(b).unwrap_or(0.0)));
        let Some(largest) = group.last().copied() else { continue };
        let not_worse = |record: &&&Record| match better(largest, record, figure) {
            Some((best, ..)) => best.id != largest.id,
            None => true,
        };
        if let Some(small) = group.iter().find(not_worse).filter(|small| small.id != largest.id) {
            let megabytes = |record: &Record| size(record).unwrap_or(0.0) / 1e6;
            let sentence = format!(
                "{:.1} MB ({}) are not certainly worse in {} than {:.1} MB.",
                megabytes(small),
                names.name(small, &["task", "model", "adapter", "device", "seed"]),
                words(figure),
                megabytes(largest)
            );
            out.push(about(&name, &sentence));
        }
    }
    out
}

/// Which device setting decodes fastest.
fn devices(records: &[Record], names: &Names) -> Vec<String> {
    let mut out = Vec::new();
    for (name, group) in groups(records, names, "device") {
        let mut rates: Vec<(&Record, &Figure)> =
            group.iter().filter_map(|record| Some((*record, record.figures.get("decode_rate")?))).collect();
        rates.sort_by(|a, b| b.1.value.total_cmp(&a.1.value));
        let [(best, fast), .., (worst, slow)] = rates.as_slice() else { continue };
        let certain = match (fast.interval, slow.interval) {
            (Some(fast), Some(slow)) => fast.0 > slow.1,
            _ => false,
        };
        if certain {
            let sentence = format!(
                "with '{}' decoding is {:.2} times as fast as with '{}' ({:.1} against {:.1} tokens/s).",
                best.case["device"],
                fast.value / slow.value,
                worst.case["device"],
                fast.value,
                slow.value
            );
            out.push(about(&name, &sentence));
        }
    }
    out
}

/// `a`, `a and b`, `a, b and c`.
fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bootstrap::Item;
    use crate::figures::{Measured, RECORD_VERSION};

    pub(crate) fn record(case: &[(&str, &str)], kl: f64, bytes: f64) -> Record {
        let mut measured = Measured::default();
        let items = (0..30).map(|i| Item { sum: kl * (1.0 + 0.3 * f64::from(i % 5)), weight: 1.0 }).collect();
        measured.add("second_half_kl", items, "nats", Better::Lower);
        measured.add_exact("model_bytes", bytes, "bytes", Better::Lower);
        Record {
            version: RECORD_VERSION,
            id: format!("{kl}{bytes}"),
            sweep: None,
            sample: None,
            case: case.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect(),
            figures: measured.figures,
            items: measured.items,
            layers: Vec::new(),
            environment: BTreeMap::new(),
            seconds: 0.0,
            ended: 0,
        }
    }

    #[test]
    fn the_best_policy_of_a_budget_is_named_if_it_is_certain() {
        let at = |policy, kl| record(&[("policy", policy), ("budget", "3"), ("task", "text")], kl, 1e6);
        let said = recommendations(&[at("solve", 0.5), at("uniform", 0.8), at("paper", 0.7)], &[]);
        assert!(
            said[0].starts_with("Take the policy solve") && said[0].contains("of paper in 1.0 MB (-29%)"),
            "{said:?}"
        );
        let said = recommendations(&[at("solve", 0.5), at("uniform", 0.5)], &[]);
        assert!(said[0].contains("no difference is certain"), "{said:?}");
    }

    #[test]
    fn rates_must_be_apart() {
        let at = |device: &str, rates: &[f64]| {
            let mut measured = Measured::default();
            let items = rates.iter().map(|&sum| Item { sum, weight: 1.0 }).collect();
            measured.add("decode_rate", items, "tokens/s", Better::Higher);
            Record { figures: measured.figures, ..record(&[("device", device)], 1.0, 1.0) }
        };
        let apart = recommendations(&[at("1 thread", &[10.0, 11.0, 10.5]), at("2 threads", &[18.0, 19.0, 18.5])], &[]);
        assert!(
            apart[0].starts_with("With '2 threads' decoding is 1.76 times as fast as with '1 thread'"),
            "{apart:?}"
        );
        assert!(recommendations(&[at("a", &[10.0, 19.0, 11.0]), at("b", &[18.0, 9.0, 13.0])], &[]).is_empty());
    }
}
