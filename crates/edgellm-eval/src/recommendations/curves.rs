//! Where a curve of size against quality bends.

use super::{about, better, quality, size, words};
use crate::figures::{Better, Record};
use crate::names::Names;

/// How far a knee lies below the line between the ends of its curve, as a share of the heights; less is no knee.
const LEAST_DEPTH: f64 = 0.15;

/// The knee of every policy's curve over budgets, if the next smaller model is certainly worse: the point that lies farthest
/// below the line between the ends, both axes scaled to 1 (Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack").
pub(super) fn knees(records: &[Record], names: &Names) -> Vec<String> {
    let with_budget = records.iter().filter(|r| r.case.contains_key("budget") && size(r).is_some());
    let groups = names.groups(with_budget, &["budget", "seed"]);
    groups.into_iter().filter_map(|(name, group)| Some(about(&name, &knee(group)?))).collect()
}

fn knee(mut group: Vec<&Record>) -> Option<String> {
    let figure = quality(group.first()?)?.0;
    group.retain(|record| record.figures.get(figure).is_some_and(|found| found.value.is_finite()));
    group.sort_by(|a, b| size(a).unwrap_or(0.0).total_cmp(&size(b).unwrap_or(0.0)));
    group.dedup_by_key(|record| size(record).unwrap_or(0.0) as u64);
    if group.len() < 4 {
        return None;
    }
    // Less is better in both directions.
    let cost = |record: &Record| {
        let found = &record.figures[figure];
        if found.better == Better::Lower { found.value } else { -found.value }
    };
    let (first, last) = (*group.first()?, *group.last()?);
    let (width, height) = (size(last)? - size(first)?, cost(first) - cost(last));
    if width <= 0.0 || height <= 0.0 {
        return None;
    }
    let depth = |record: &Record| {
        let along = (size(record).unwrap_or(0.0) - size(first).unwrap_or(0.0)) / width;
        1.0 - along - (cost(record) - cost(last)) / height
    };
    let inner = 1..group.len() - 1;
    let at = inner.max_by(|&a, &b| depth(group[a]).total_cmp(&depth(group[b])))?;
    let (smaller, chosen, larger) = (group[at - 1], group[at], group[at + 1]);
    let certain = better(chosen, smaller, figure).is_some_and(|(best, ..)| best.id == chosen.id);
    if depth(chosen) < LEAST_DEPTH || !certain {
        return None;
    }
    let megabytes = |record: &Record| size(record).unwrap_or(0.0) / 1e6;
    let value = |record: &Record| record.figures[figure].value;
    Some(format!(
        "the curve bends at {:.1} MB: {} {:.4}; {:.1} MB have {:.4}, and {:.1} MB only {:.4}.",
        megabytes(chosen),
        words(figure),
        value(chosen),
        megabytes(smaller),
        value(smaller),
        megabytes(larger),
        value(larger)
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    fn curve(values: &[(f64, f64)]) -> Vec<String> {
        let at = |(mb, kl): &(f64, f64)| {
            record(&[("policy", "solve"), ("budget", &format!("{mb} MB")), ("task", "text")], *kl, mb * 1e6)
        };
        let records: Vec<Record> = values.iter().map(at).collect();
        knees(&records, &Names::of(&records))
    }

    #[test]
    fn the_bend_of_a_curve_is_named() {
        let found = curve(&[(30.0, 1.0), (40.0, 0.2), (50.0, 0.15), (60.0, 0.12), (70.0, 0.1)]);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].starts_with("The curve bends at 40.0 MB: KL") && found[0].contains("30.0 MB have"),
            "{found:?}"
        );
    }

    #[test]
    fn a_line_and_a_flat_curve_have_no_bend() {
        assert!(curve(&[(30.0, 0.4), (40.0, 0.3), (50.0, 0.2), (60.0, 0.1)]).is_empty());
        assert!(curve(&[(30.0, 0.4), (40.0, 0.4), (50.0, 0.4), (60.0, 0.4)]).is_empty());
        assert!(curve(&[(30.0, 1.0), (40.0, 0.2), (50.0, 0.1)]).is_empty());
    }
}
